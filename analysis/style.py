"""The look every figure shares: one font size, few lines, colours that survive greyscale and colour blindness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#222222"  # text, axes, what is measured
FAINT = "#8c8c8c"  # references and guides
PALE = "#d9d9d9"  # grid, areas behind the data
# Okabe & Ito 2008, in an order whose lightness alternates; yellow is left out, being invisible on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")

_LOOK = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "ellq",
}


@contextmanager
def shared_look() -> Iterator[None]:
    """Give everything drawn inside the block the shared look, and leave matplotlib's settings as they were."""
    with mpl.rc_context(_LOOK):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure with one pair of axes in the shared look, belonging to no window.

    Args:
        width: inches; 3.3 is one column of a paper, 6.9 two.
        height: inches.

    Returns:
        The figure, which lays itself out, and its axes.
    """
    with shared_look():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()
