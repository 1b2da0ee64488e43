"""Every figure by name, and making one: a table as CSV, and its drawing as PNG and SVG."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ellq.analysis import shared_look, write_bytes, write_text
from ellq.paper_figures import accuracy_against_sparsity, error_against_retained, reweighting_against_dropping


@dataclass(frozen=True)
class PaperFigure:
    """A figure: what it shows, how its table is computed, how it is drawn from the table.

    Attributes:
        name: what the command line calls it.
        title: one line.
        compute: seed → table.
        draw: table → figure; a pure function.
    """

    name: str
    title: str
    compute: Callable[..., pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]


FIGURES = {
    figure.name: figure
    for figure in (
        PaperFigure(
            "error-against-retained",
            "output error against what is retained, the proved bound above it (digits, one hidden layer)",
            error_against_retained.compute,
            error_against_retained.draw,
        ),
        PaperFigure(
            "accuracy-against-sparsity",
            "test accuracy against sparsity, ours beside the authors' rules, no retraining (digits)",
            accuracy_against_sparsity.compute,
            accuracy_against_sparsity.draw,
        ),
        PaperFigure(
            "reweighting-against-dropping",
            "error against what is retained: plain dropping, reweighting, refit, where inputs are correlated",
            reweighting_against_dropping.compute,
            reweighting_against_dropping.draw,
        ),
    )
}


def figure_named(name: str) -> PaperFigure:
    """Return the figure of that name.

    Raises:
        ValueError: no such figure; the message suggests the nearest name.
    """
    if name not in FIGURES:
        near = difflib.get_close_matches(name, FIGURES, n=1, cutoff=0.0)
        raise ValueError(f"name={name!r} is no figure. Did you mean {near[0]!r}? 'ellq figures list' shows all.")
    return FIGURES[name]


def make(name: str, folder: str | Path, *, seed: int = 0) -> list[Path]:
    """Compute a figure and write its table and drawings.

    Args:
        name: a key of ``FIGURES``.
        folder: where to; made if missing.
        seed: of whatever is trained.

    Returns:
        The paths written: CSV, PNG, SVG.

    Raises:
        ValueError: no such figure.
        OSError: the folder cannot be written.
    """
    figure = figure_named(name)
    table = figure.compute(seed=seed)
    stem = name.replace("-", "_")
    drawing = figure.draw(table)
    return [
        write_text(Path(folder) / f"{stem}.csv", table.to_csv(index=False)),
        write_bytes(Path(folder) / f"{stem}.png", render(drawing, "png")),
        write_bytes(Path(folder) / f"{stem}.svg", render(drawing, "svg")),
    ]


def render(figure: Figure, format: str) -> bytes:
    """Return a figure as the bytes of a file, the same for the same figure (no date inside)."""
    buffer = BytesIO()
    metadata = {"Date": None} if format == "svg" else {}
    with shared_look():
        figure.savefig(buffer, format=format, metadata=metadata)
    return buffer.getvalue()
