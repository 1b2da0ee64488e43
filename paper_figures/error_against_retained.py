"""Output error of a pruned net against what it retains, with the proved bound above it."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ellq.analysis import INK, PALETTE, new_figure, shared_look
from ellq.paper_figures.digits import sweeps

LABELS = {"lq": "weights retained", "id": "hidden units retained"}
TITLES = {"lq": "ℓq masks (ellq, yang2022)", "id": "ID (ellq, chee2021)"}
STYLES: dict[str, Literal["-", "--", ":"]] = {"observed": "-", "bound_measured": "--", "bound": ":"}


def compute(*, seed: int = 0) -> pd.DataFrame:
    """Train the one-hidden-layer net on digits and prune it to many sizes; see ``digits.sweeps``."""
    return sweeps(nets=("mlp",), seed=seed)


def draw(table: pd.DataFrame) -> Figure:
    """Draw one panel per method: observed error and its bounds on a log scale against the retained fraction.

    Errors of rounding size (units that could be removed exactly) are left out.

    Args:
        table: from ``compute``; the rows of one net.

    Returns:
        A figure that belongs to no window.
    """
    methods = list(dict.fromkeys(table["method"]))
    figure, first = new_figure(6.9, 3.3)
    first.remove()
    with shared_look():
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            rows = table[(table["method"] == method) & (table["observed"] > 1e-6)]
            for (_, group), colour, marker in zip(rows.groupby("rule", sort=False), PALETTE, "os", strict=False):
                group = group.sort_values("sparsity")
                for column, style in STYLES.items():
                    measured = {"marker": marker, "markersize": 4} if column == "observed" else {}
                    axes.plot(1 - group["sparsity"], group[column], style, color=colour, **measured)
            axes.set_yscale("log")
            axes.set_xlim(1.0, 0.0)
            axes.set_xticks([1.0, 0.8, 0.6, 0.4, 0.2])
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlabel(f"{LABELS[method]}")
            axes.set_title(TITLES[method])
            axes.grid(axis="y")
        panels[0].set_ylabel("largest rms change of a logit")
        handles = [Line2D([], [], color=INK, linestyle=style) for style in STYLES.values()]
        handles[0].set_marker("o")
        handles += [Line2D([], [], color=colour, marker=marker) for colour, marker in zip(PALETTE, "os", strict=False)]
        names = ["observed", "bound by layer", "bound", "rule ellq (ours)", "authors' rule"]
        figure.legend(handles, names, loc="outside lower center", ncols=5, handlelength=2.4)
    return figure
