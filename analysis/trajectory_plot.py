"""The picture of a trajectory: how the share of weights effectively used changes from checkpoint to checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ellq.analysis.layer_axis import PERCENT, short_names
from ellq.analysis.style import INK, new_figure, shared_look

if TYPE_CHECKING:
    from ellq.analysis.trajectory import Trajectory

_LABELLED = 6  # layers that a legend names; more are told apart by colour alone
_NAMED = 30  # steps whose names fit below the axis


def draw_trajectory(trajectory: Trajectory) -> Figure:
    """Draw the mean effective fraction of units at every step, a line per layer and a thick one for the model.

    Args:
        trajectory: what was measured.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    table = trajectory.table()
    steps = table.columns.tolist()
    is_to_scale = all(isinstance(step, int | float) and not isinstance(step, bool) for step in steps)
    x = np.array(steps, dtype=np.float64) if is_to_scale else np.arange(len(steps))
    *names, _ = table.index
    figure, axes = new_figure(6.9, 3.8)
    with shared_look():
        # Dark to light along the depth; the lightest part of the map would vanish on white.
        shades = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.85, max(len(names), 2))))
        marker = "o" if len(steps) <= _NAMED else ""
        for place, (name, row) in enumerate(zip(short_names(names, 26), table.to_numpy()[:-1], strict=True)):
            axes.plot(x, row, color=shades(place), linewidth=1.0, marker=marker, markersize=2.5, label=name)
        axes.plot(x, table.iloc[-1], color=INK, linewidth=3.0, marker=marker, markersize=5, label="whole model")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.grid(axis="y")
        if is_to_scale:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=all(isinstance(step, int) for step in steps)))
        else:
            every = -(-len(steps) // _NAMED)
            labels = short_names([str(step) for step in steps[::every]], 22)
            slant: dict[str, Any] = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"} if len(steps) > 6 else {}
            axes.set_xticks(x[::every], labels, **slant)
        axes.set_xlabel("step")
        axes.set_ylabel(f"effective fraction, N/d, q = {trajectory.q:g}")
        axes.set_title("Compressibility along the steps: lower is sparser", loc="left")
        if len(names) <= _LABELLED:
            figure.legend(loc="outside right upper")
        else:
            axes.legend(*([part[-1]] for part in axes.get_legend_handles_labels()), loc="best")
            depth = ScalarMappable(Normalize(0.5, len(names) + 0.5), shades)
            bar = figure.colorbar(depth, ax=axes, fraction=0.03, pad=0.02)
            bar.outline.set_visible(False)
            bar.set_label("layer, by depth")
            bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure
