"""The picture of a plan: how much of itself every layer retains, and how evenly over its units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ellq.analysis import FAINT, INK, new_figure, shared_look
from ellq.analysis.layer_axis import PERCENT, height_for, name_rows, thickness_for
from ellq.analysis.style import PALETTE

if TYPE_CHECKING:
    from ellq.pruning.plan import Plan

_WIDTH = 6.9


def draw_plan(plan: Plan) -> Figure:
    """Draw the fraction that every layer retains, a row per layer in the order of the plan.

    Bar: the whole layer. Line: from the unit that retains least of itself to the one that retains most; thick: the
    middle half of the units, with the median across it. Dotted: all layers together.

    Args:
        plan: what was decided.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    layers = plan.layers()
    share = (plan.table["retained"] / plan.table["size"]).groupby(plan.table["layer"], sort=False)
    low, q1, median, q3, high = (share.quantile(at).to_numpy() for at in (0, 0.25, 0.5, 0.75, 1))
    thick = thickness_for(len(layers))
    figure, axes = new_figure(_WIDTH, height_for(len(layers)))
    with shared_look():
        rows = name_rows(axes, layers["layer"].tolist())
        bar: dict[str, Any] = {"color": PALETTE[4], "alpha": 0.45, "linewidth": 0}
        axes.barh(rows, 1 - layers["sparsity"], height=0.72, label="layer", **bar)
        if (layers["units"] > 1).any():
            axes.hlines(rows, low, high, color=FAINT, linewidth=1.0, label="all its units")
            axes.hlines(rows, q1, q3, color=PALETTE[0], linewidth=max(4.0 * thick, 1.0), label="middle half of them")
            axes.vlines(median, rows - 0.25, rows + 0.25, color=INK, linewidth=1.6, label="median unit")
        axes.axvline(1 - plan.sparsity, color=INK, linestyle=":", linewidth=1.0, label="all layers", zorder=0)
        axes.set_xlim(0, min(1.0, 1.04 * float(np.max(high))) or 1.0)
        axes.xaxis.set_major_formatter(PERCENT)
        axes.grid(axis="x")
        what = "weights" if plan.method == "lq" else "hidden units"
        axes.set_xlabel(f"retained fraction of the {what}")
        axes.set_ylabel("layer")
        axes.set_title(f"What each layer retains: rule {plan.rule}, sparsity {plan.sparsity:.4g}", loc="left")
        figure.legend(loc="outside lower center", ncols=5, handlelength=1.3, columnspacing=1.4)
    return figure
