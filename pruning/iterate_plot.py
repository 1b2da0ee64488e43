"""The pictures of iterative pruning, each a function of its tables: accuracy, frontier, stops, and flows."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ellq.analysis import FAINT, INK, PALETTE, new_figure, shared_look
from ellq.analysis.layer_axis import PERCENT, short_names
from ellq.pruning.stopping import CAP, WARM_UP
from ellq.theory import Array

_WIDTH, _HEIGHT = 6.9, 2.7  # of the figure, and of each row of panels
_LABELLED = 5  # entries that a legend names; more are told apart by colour alone


def draw_iterated(iterations: pd.DataFrame, epochs: pd.DataFrame, flows: pd.DataFrame, dense_accuracy: float) -> Figure:
    """Draw all that is known of one run: accuracy, frontier, stops, and a panel of flows for each monitor.

    Args:
        iterations: the table of that name of an ``Iterated``, as are the next two.
        epochs: likewise.
        flows: likewise.
        dense_accuracy: what retraining is to reach.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    names = flows["monitor"].drop_duplicates().tolist()
    rows = math.ceil((3 + len(names)) / 2)
    figure, first = new_figure(_WIDTH, rows * _HEIGHT)
    first.remove()
    with shared_look():
        panels = list(figure.subplots(rows, 2, squeeze=False).flat)
        draw_accuracy(panels[0], epochs, dense_accuracy)
        draw_frontier(panels[1], iterations, dense_accuracy)
        draw_stops(panels[2], iterations)
        for name, axes in zip(names, panels[3:], strict=False):
            draw_flows(axes, flows[flows["monitor"] == name], epochs)
        for axes in panels[3 + len(names) :]:
            axes.remove()
    return figure


def draw_accuracy(axes: Axes, epochs: pd.DataFrame, dense_accuracy: float) -> None:
    """Draw accuracy against all epochs trained so far, a line per iteration.

    Args:
        axes: drawn into.
        epochs: of an ``Iterated``.
        dense_accuracy: a dashed line.
    """
    used = _used(epochs)
    for iteration, rows in epochs.groupby("iteration"):
        shown = rows["accuracy"].notna()
        colour = FAINT if iteration == 0 else PALETTE[0]
        axes.plot(used[rows.index[shown]], rows["accuracy"][shown], ".-", color=colour, markersize=3, linewidth=1.0)
    _mark_dense(axes, dense_accuracy)
    _mark_iterations(axes, epochs)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("epochs of training, warm-up included")
    axes.set_ylabel("accuracy")
    axes.set_title("Accuracy as it comes back", loc="left")


def draw_frontier(axes: Axes, iterations: pd.DataFrame, dense_accuracy: float) -> None:
    """Draw the accuracy at the end of every iteration against the fraction of weights that are retained.

    Args:
        axes: drawn into.
        iterations: of an ``Iterated``.
        dense_accuracy: a dashed line.
    """
    rows = iterations[iterations["accuracy"].notna()]
    axes.plot(1 - rows["sparsity"], rows["accuracy"], "o-", color=PALETTE[0], markersize=4)
    _mark_dense(axes, dense_accuracy)
    low = (1 - rows["sparsity"]).min() if len(rows) else 1.0
    axes.set_xscale("log")
    axes.set_xlim(1.15, min(low / 1.15, 0.8))  # falling: the dense net is on the left
    few = low < 0.03
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
    axes.xaxis.set_major_formatter(PERCENT)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(axis="y")
    axes.set_xlabel("weights retained")
    axes.set_ylabel("accuracy")
    axes.set_title("Sparsity and accuracy", loc="left")


def draw_stops(axes: Axes, iterations: pd.DataFrame) -> None:
    """Draw how many epochs each iteration took, coloured by what stopped it.

    Args:
        axes: drawn into.
        iterations: of an ``Iterated``.
    """
    rows = iterations[iterations["iteration"] > 0]
    reasons = rows["stop"].drop_duplicates().tolist()
    colours = {WARM_UP: FAINT, CAP: FAINT}
    others = [reason for reason in reasons if reason not in colours]
    colours |= {reason: PALETTE[place % len(PALETTE)] for place, reason in enumerate(others)}
    for reason in reasons:
        own = rows[rows["stop"] == reason]
        axes.bar(own["iteration"], own["epochs"], color=colours[reason], width=0.7, label=reason)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if reasons:
        axes.set_ylim(0, rows["epochs"].max() * 1.3)  # room for the legend
        axes.legend(loc="upper left", ncols=2)
    axes.set_xlabel("iteration")
    axes.set_ylabel("epochs")
    axes.set_title("What stopped retraining, and when", loc="left")


def draw_flows(axes: Axes, flows: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """Draw what one monitor says at every check, a line per entry, and as dashes what it says of the dense net.

    Args:
        axes: drawn into.
        flows: of an ``Iterated``, the rows of one monitor.
        epochs: of the same.
    """
    places = epochs.assign(used=_used(epochs))[["iteration", "epoch", "used"]]
    rows = flows.merge(places, on=["iteration", "epoch"], how="left")
    entries = rows["entry"].drop_duplicates().tolist()
    # Dark to light along the depth; the lightest part of the map would vanish on white.
    shades = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.85, max(len(entries), 2))))
    for place, (entry, label) in enumerate(zip(entries, short_names(entries, 22), strict=True)):
        own = rows[rows["entry"] == entry]
        axes.axhline(own["reference"].iloc[0], color=shades(place), linestyle=(0, (4, 3)), linewidth=0.7)
        for count, (_, part) in enumerate(own.groupby("iteration")):
            name = label if count == 0 else None
            axes.plot(part["used"], part["value"], ".-", color=shades(place), markersize=3, linewidth=1.0, label=name)
    _mark_iterations(axes, epochs)
    if len(entries) <= _LABELLED:
        axes.legend(loc="best")
    else:
        figure = axes.get_figure(root=True)
        assert figure is not None
        bar = figure.colorbar(ScalarMappable(Normalize(0.5, len(entries) + 0.5), shades), ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("layer, by depth")
        bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("epochs of training, warm-up included")
    axes.set_ylabel("flow")
    axes.set_title(f"{flows['monitor'].iloc[0]}: dashed, the dense net", loc="left")


def _used(epochs: pd.DataFrame) -> Array:
    """Return how many epochs have been trained after each row."""
    return np.arange(1, len(epochs) + 1, dtype=np.float64)


def _mark_dense(axes: Axes, dense_accuracy: float) -> None:
    if math.isfinite(dense_accuracy):
        axes.axhline(dense_accuracy, color=INK, linestyle=(0, (4, 3)), linewidth=0.8, label="dense net")
        axes.legend(loc="best")


def _mark_iterations(axes: Axes, epochs: pd.DataFrame) -> None:
    """Draw a faint line where each iteration begins."""
    starts = epochs.groupby("iteration").head(1)
    for place in starts.index[1:]:
        axes.axvline(place + 0.5, color=FAINT, linewidth=0.4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
