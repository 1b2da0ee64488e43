"""Test accuracy of pruned nets against sparsity, ours beside the authors' rules, without retraining."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ellq.analysis import FAINT, PALETTE, new_figure, shared_look
from ellq.paper_figures.digits import sweeps


def compute(*, seed: int = 0) -> pd.DataFrame:
    """Train the two nets on digits and prune them to many sizes; see ``digits.sweeps``."""
    return sweeps(nets=("mlp", "conv"), seed=seed)


def draw(table: pd.DataFrame) -> Figure:
    """Draw one panel per net: test accuracy against sparsity, a line per method and rule, the dense net dotted.

    Args:
        table: from ``compute``.

    Returns:
        A figure that belongs to no window.
    """
    nets = list(dict.fromkeys(table["net"]))
    figure, first = new_figure(6.9, 3.0)
    first.remove()
    with shared_look():
        panels = figure.subplots(1, len(nets), sharey=True, squeeze=False)[0]
        for axes, net in zip(panels, nets, strict=True):
            rows = table[table["net"] == net]
            axes.axhline(rows["dense_accuracy"].iloc[0], color=FAINT, linestyle=":", label="dense")
            for ((method, rule), group), colour, marker in zip(
                rows.groupby(["method", "rule"], sort=False), PALETTE, "osD^", strict=False
            ):
                style = "-" if rule == "ellq" else "--"
                axes.plot(
                    group["sparsity"],
                    group["accuracy"],
                    style,
                    marker=marker,
                    markersize=3.5,
                    color=colour,
                    label=f"{method}, {rule}",
                )
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_title(net)
            axes.set_xlabel("sparsity (lq: of weights, id: of hidden units)")
            axes.grid(axis="y")
        panels[0].set_ylabel("test accuracy, no retraining")
        panels[0].legend(loc="lower left")
    return figure
