"""The picture of a comparison: two models' fractions side by side, and their differences with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ellq.analysis.layer_axis import PERCENT, height_for, name_rows, short_names, thickness_for
from ellq.analysis.style import FAINT, INK, PALE, PALETTE, shared_look
from ellq.analysis.tables import MODEL

if TYPE_CHECKING:
    from ellq.analysis.compare import Comparison


def draw_comparison(comparison: Comparison) -> Figure:
    """Draw the effective fractions of two models, a row per layer, and the differences with their intervals.

    Args:
        comparison: what ``compare`` found.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    frame = comparison.frame
    names = [name or MODEL for name in frame["layer"]]
    first, second = short_names(comparison.names, 20)
    thick = thickness_for(len(names))
    size = 5.0 * thick**0.5
    with shared_look():
        figure = Figure(figsize=(6.9, height_for(len(names))), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.15))
        rows = name_rows(left, names)
        right.tick_params(axis="y", length=0)
        right.spines["left"].set_visible(False)
        for axes in (left, right):
            axes.axhspan(len(names) - 1.5, len(names) - 0.4, color=PALE, alpha=0.45, linewidth=0)
            axes.grid(axis="x")
        a, b = frame["first"].to_numpy(), frame["second"].to_numpy()
        left.hlines(rows, a, b, color=FAINT, linewidth=1.2 * thick)
        left.plot(a, rows, "o", color=PALETTE[0], markersize=size, label=first)
        left.plot(b, rows, "s", color=PALETTE[1], markersize=0.9 * size, label=second)
        left.xaxis.set_major_formatter(PERCENT)
        left.set_xlabel(f"effective fraction, mean of units\nN/d at q = {comparison.q:g}")
        left.set_ylabel("layer")
        points, low, high = (100 * frame[name].to_numpy() for name in ("difference", "low", "high"))
        clear = np.where((low > 0) | (high < 0), INK, FAINT)
        right.axvline(0, color=INK, linewidth=0.8)
        right.hlines(rows, low, high, color=clear, linewidth=1.8 * thick)
        right.scatter(points, rows, color=clear, s=size**2, zorder=3)
        reach = 1.08 * float(np.nanmax(np.abs(np.concatenate([points, low, high, [0.5]]))))
        right.set_xlim(-reach, reach)
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
        interval = f"{100 * comparison.confidence:g} % interval"
        right.set_xlabel(f"difference in points, {interval}\n← second sparser     first sparser →")
        left.set_title("Effective fraction", loc="left")
        right.set_title("Difference", loc="left")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
