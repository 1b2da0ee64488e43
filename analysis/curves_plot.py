"""The picture of error curves: what keeping the largest weights loses, below what the quasi-norms promise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from ellq.analysis.layer_axis import PERCENT, short_names
from ellq.analysis.style import FAINT, INK, PALETTE, shared_look
from ellq.analysis.tables import MODEL

_PANELS = 6  # the model and five layers, unless more are asked for
_COLUMNS = 3
_LEAST_SHOWN = 1e-4  # relative error


def draw_curves(frame: pd.DataFrame, layers: Sequence[str] | None = None) -> Figure:
    """Draw the relative error against the retained fraction for the model and some layers, with the bounds above.

    Along the bound stands the order q that gives it. The error's axis is logarithmic.

    Args:
        frame: as ``error_curves`` returns.
        layers: names of the layers to draw beside the model; without it five, spread over the depth.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: a layer that is not in the frame.
    """
    known = frame.loc[frame["level"] == "layer", "layer"].drop_duplicates().tolist()
    if layers is None:
        places = np.unique(np.linspace(0, len(known) - 1, min(_PANELS - 1, len(known))).round().astype(int))
        layers = [known[place] for place in places]
    unknown = next((name for name in layers if name not in known), None)
    if unknown is not None:
        raise ValueError(f"layer {unknown!r} has no error curve. Choose among those of the frame.")
    parts = [frame[frame["level"] == "model"]]
    parts += [frame[(frame["level"] == "layer") & (frame["layer"] == name)] for name in layers]
    titles = [MODEL, *short_names(layers, 30)]
    rows, columns = math.ceil(len(parts) / _COLUMNS), min(len(parts), _COLUMNS)
    columns = 2 if len(parts) == 4 else min(len(parts), _COLUMNS)
    rows = math.ceil(len(parts) / columns)
    drawn = pd.concat(parts)
    is_seen = (drawn["fraction"] < 1) & (drawn["error_high"] > 0)
    lowest = float(drawn.loc[is_seen, "error_high"].min()) if is_seen.any() else 0.1
    with shared_look():
        figure = Figure(figsize=(2.2 * columns + 0.5, 2.1 * rows + 0.6), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        panels[0].set_yscale("log")
        panels[0].set_xlim(0, 1)
        panels[0].set_ylim(max(10 ** math.floor(math.log10(lowest)), _LEAST_SHOWN), 1.5)
        panels[0].yaxis.set_minor_formatter(NullFormatter())
        for axis in (panels[0].xaxis, panels[0].yaxis):
            axis.set_major_formatter(PERCENT)
        panels[0].xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        for i, (axes, part, title) in enumerate(zip(panels, parts, titles, strict=False)):
            _draw_curve(axes, part)
            axes.set_title(title, fontsize=9)
            if i % columns == 0:
                axes.set_ylabel("relative error σ_k/‖w‖₂")
            if i + columns >= len(parts):  # the lowest of its column
                axes.set_xlabel("retained fraction k/d")
                axes.tick_params(labelbottom=True)
        for axes in panels[len(parts) :]:
            axes.set_axis_off()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _draw_curve(axes: Axes, part: pd.DataFrame) -> None:
    part = part.sort_values("retained")
    x = part["fraction"].to_numpy()
    # Where nothing is lost any more, the lines leave the picture at the bottom.
    error, bound = (np.maximum(part[name].to_numpy(), 1e-9 * _LEAST_SHOWN) for name in ("error_high", "bound"))
    if not (part["bound"] > 0).any():
        axes.text(0.5, 0.5, "all weights are 0", transform=axes.transAxes, ha="center", color=FAINT)
        return
    axes.fill_between(x, error, bound, color=PALETTE[4], alpha=0.25, linewidth=0)
    axes.plot(x, bound, color=PALETTE[0], label="tightest Stechkin bound, with its order q")
    axes.plot(x, error, color=INK, label="error of keeping the k largest")
    axes.grid()
    # The order, at a few places where the bound says something.
    telling = np.flatnonzero((bound < 0.95) & (bound > _LEAST_SHOWN))
    if len(telling):
        places = np.linspace(x[telling[0]], x[telling[-1]], 4)
        for i in dict.fromkeys(int(np.abs(x - place).argmin()) for place in places):
            axes.annotate(
                f"{part['order'].iloc[i]:g}",
                (x[i], bound[i]),
                xytext=(1, 2),
                textcoords="offset points",
                fontsize=7,
                color=PALETTE[0],
            )
