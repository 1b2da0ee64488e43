"""Output error of a pruned net against what it retains, with the proved bound above it."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ellq.analysis import INK, PALETTE, new_figure, shared_look
from ellq.paper_figures.digits import sweeps

LABELS = {"lq": "weights retained", "id": "hidden units retained"}


def compute(*, seed: int = 0) -> pd.DataFrame:
    """Train the one-hidden-layer net on digits and prune it to many sizes; see ``digits.sweeps``."""
    return sweeps(nets=("mlp",), seed=seed)


def draw(table: pd.DataFrame) -> Figure:
    """Draw one panel per method: observed error and bound on a log scale against the retained fraction.

    Args:
        table: from ``compute``; the rows of one net.

    Returns:
        A figure that belongs to no window.
    """
    methods = list(dict.fromkeys(table["method"]))
    figure, first = new_figure(6.9, 3.0)
    first.remove()
    with shared_look():
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            rows = table[table["method"] == method]
            for (rule, group), colour, marker in zip(rows.groupby("rule", sort=False), PALETTE, "os", strict=False):
                group = group[group["observed"] > 0].sort_values("sparsity")
                retained = 1 - group["sparsity"]
                axes.plot(retained, group["bound"], ":", color=colour, label=f"bound, {rule}")
                axes.plot(retained, group["bound_measured"], "--", color=colour, label=f"bound by layer, {rule}")
                axes.plot(
                    retained, group["observed"], marker=marker, markersize=4, color=colour, label=f"observed, {rule}"
                )
            axes.set_yscale("log")
            axes.set_xlim(1.0, 0.0)
            axes.set_xlabel(f"fraction of {LABELS[method]}")
            axes.set_title({"lq": "ℓq masks", "id": "interpolative decomposition"}[method])
            axes.grid(axis="y")
            axes.legend(labelcolor=INK)
        panels[0].set_ylabel("largest rms change of a logit")
    return figure
