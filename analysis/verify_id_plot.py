"""The pictures of a verification: how near each bound comes, and how the risk falls with inputs and with units."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ellq.analysis.style import FAINT, INK, PALETTE, new_figure, shared_look
from ellq.analysis.verify_id import BOUNDS
from ellq.analysis.verify_id_tables import fitted_slope

_LABELS = {
    "split": "risk split",
    "pointwise": "one input, ‖T‖",
    "pseudodim": "pseudo-dimension\n(constants unverified)",
    "bernstein": "matrix Bernstein",
    "shortfall": "measured ‖Σ‖",
    "relative": "relative",
    "held_out": "held out",
    "held_out_within": "held out, within reach",
    "held_out_clipped": "held out, clipped",
    "halves": "two halves, within reach",
    "outside": "share out of reach",
}
_LINES = ("bernstein", "relative", "halves", "held_out_clipped")


def draw_slack(frame: pd.DataFrame) -> Figure:
    """Draw bound ÷ observed of every bound over all skeletons: least to largest, the middle half, the median.

    Args:
        frame: rows of ``verify_net``.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    slacks = {}
    for name, observed in BOUNDS.items():
        ratio = (frame[f"bound_{name}"] / frame[observed]).where(frame[observed] > 0).dropna()
        if len(ratio):
            slacks[name] = np.quantile(ratio, (0, 0.25, 0.5, 0.75, 1))
    figure, axes = new_figure(6.9, 0.8 + 0.34 * len(slacks))
    with shared_look():
        for row, (low, first, middle, third, high) in enumerate(slacks.values()):
            axes.plot([low, high], [row, row], color=FAINT, linewidth=1)
            axes.plot([first, third], [row, row], color=PALETTE[0], linewidth=5, solid_capstyle="butt")
            axes.plot(middle, row, "|", color=INK, markersize=12, markeredgewidth=2)
            axes.annotate(f"{middle:.3g}", (middle, row), (0, 8), textcoords="offset points", ha="center", fontsize=7)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.axvline(2, color=FAINT, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yticks(range(len(slacks)), [_LABELS[name] for name in slacks])
        axes.set_ylim(len(slacks) - 0.4, -0.7)
        axes.set_xlabel("bound ÷ observed on fresh inputs; a bound holds right of 1")
        axes.grid(axis="x")
        axes.set_title("How near each bound comes")
    return figure


def draw_samples(frame: pd.DataFrame) -> Figure:
    """Draw the risk over fresh inputs, its excess over that of the choice, and some bounds, against the samples n.

    One panel per data set: the first activation and the largest width tried on it, half of the units kept by pivoted
    QR, the median over seeds.

    Args:
        frame: rows of ``verify_net`` with those columns of the trial.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    figure, panels = _panels(frame)
    for axes, (data, part) in panels:
        half = part[part["k"] == _nearest(part["k"], part["width"].iloc[0] / 2)]
        columns = {"risk": half["risk"], "excess": half["risk"] - half["risk_choice"]}
        columns |= {name: half[f"bound_{name}"] for name in _LINES}
        median = pd.DataFrame(columns).groupby(half["n"]).median()
        n = median.index.to_numpy()
        with shared_look():
            axes.plot(n, median["risk"], "o-", color=INK, markersize=4, label="fresh inputs")
            shown = median["excess"].where(median["excess"] > 0)
            axes.plot(n, shown, "o--", color=INK, markersize=3, linewidth=1, label="excess over the choice")
            for colour, name in zip(PALETTE, _LINES, strict=False):
                if median[name].notna().any():
                    label = _LABELS[name].replace("\n", " ")
                    axes.plot(n, median[name], "s-", color=colour, markersize=3, label=label)
            top = float(np.nanmax(median.to_numpy()))
            axes.plot(n, top * np.sqrt(n[0] / n), color=FAINT, linestyle=":", label="slope −1/2")
            slope = fitted_slope(n, median["excess"].to_numpy())
            if math.isfinite(slope):
                # Under the middle of the lowest curve, where nothing else is.
                middle = math.sqrt(n[0] * n[-1]), math.sqrt(shown.dropna().iloc[0] * shown.dropna().iloc[-1])
                label = rf"$\propto n^{{{slope:.2f}}}$"
                axes.annotate(label, middle, (-4, -4), textcoords="offset points", ha="right", va="top")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("inputs n of the choice")
            _title(axes, data, part)
    _finish(figure, [axes for axes, _ in panels], "mean squared change of the outputs")
    return figure


def draw_widths(frame: pd.DataFrame) -> Figure:
    """Draw the risk over fresh inputs by both rules beside the singular values, against the units kept.

    One panel per data set: the first activation and the largest width tried on it, at its largest choice, the median
    over seeds. The singular values are squared and scaled to the risk of pivoted QR at the fewest units.

    Args:
        frame: rows of ``verify_net`` with those columns of the trial.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    figure, panels = _panels(frame, rules=("chee2021", "ellq"))
    for axes, (data, part) in panels:
        largest = part[part["n"] == part["n"].max()]
        curves = {
            rule: rows.groupby("k")[["risk", "singular_value"]].median() for rule, rows in largest.groupby("rule")
        }
        with shared_look():
            for colour, (rule, label) in zip(
                PALETTE, {"chee2021": "pivoted QR", "ellq": "output-aware, refit"}.items(), strict=False
            ):
                axes.plot(curves[rule].index, curves[rule]["risk"], "o-", color=colour, markersize=4, label=label)
            squares = curves["chee2021"]["singular_value"] ** 2
            scale = float(curves["chee2021"]["risk"].iloc[0] / squares.iloc[0])
            axes.plot(squares.index, scale * squares, color=FAINT, linestyle="--", label="σ²ₖ₊₁, scaled")
            axes.set_yscale("log")
            axes.set_xlabel("units kept k")
            _title(axes, data, part)
    _finish(figure, [axes for axes, _ in panels], "mean squared change of the outputs")
    return figure


def _panels(
    frame: pd.DataFrame, rules: tuple[str, ...] = ("chee2021",)
) -> tuple[Figure, list[tuple[Axes, tuple[str, pd.DataFrame]]]]:
    """Return one panel per data set with the rows it shows."""
    asked = frame[frame["tol"].isna() & frame["rule"].isin(rules)]
    shown = []
    for data, part in asked.groupby("data", sort=False):
        first = part[part["activation"] == part["activation"].iloc[0]]
        shown.append((str(data), first[first["width"] == first["width"].max()]))
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    with shared_look():
        figure = Figure(figsize=(6.9, 0.9 + 2.3 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in grid[len(shown) :]:
        empty.set_visible(False)
    return figure, list(zip(grid, shown, strict=False))


def _nearest(values: pd.Series, wanted: float) -> int:
    return int(min(values.unique(), key=lambda value: abs(value - wanted)))


def _title(axes: Axes, data: str, part: pd.DataFrame) -> None:
    axes.set_title(f"{data}, {part['activation'].iloc[0]}, m = {part['width'].iloc[0]}", fontsize=8)
    axes.grid()


def _finish(figure: Figure, panels: list[Axes], label: str) -> None:
    with shared_look():
        figure.supylabel(label, fontsize=8)
        handles: dict[str, Artist] = {}
        for axes in panels:
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(name, handle)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
