"""The picture of a pruning's report: how far every layer's outputs are from what they were, and the bound on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ellq.analysis import FAINT, INK, new_figure, shared_look
from ellq.analysis.layer_axis import PERCENT, height_for, name_rows
from ellq.analysis.style import PALETTE

if TYPE_CHECKING:
    from ellq.pruning.mask_report import MaskReport

_WIDTH = 6.9
_SERIES = {
    "error_alone": ("this layer alone", "o", FAINT, 4.0),
    "error_calibration": ("calibration", "o", PALETTE[0], 5.0),
    "error_held_out": ("held-out", "D", PALETTE[1], 4.0),
    "bound": ("bound", "|", INK, 9.0),
}


def draw_mask_report(report: MaskReport) -> Figure:
    """Draw the errors of every layer's outputs, a row per layer in the order of the model, on a logarithmic axis.

    Errors of 0 and those that are not known are left out.

    Args:
        report: what was measured.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    layers = report.layers
    figure, axes = new_figure(_WIDTH, height_for(len(layers)))
    with shared_look():
        rows = name_rows(axes, layers["layer"].tolist())
        for name, (label, marker, colour, size) in _SERIES.items():
            values = layers[name].to_numpy(dtype=np.float64)
            shown = np.isfinite(values) & (values > 1e-300)
            if shown.any():
                axes.plot(
                    values[shown], rows[shown], marker, color=colour, markersize=size, label=label, markeredgewidth=1.2
                )
        if axes.lines:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            low = min(low, high / 10)
            axes.set_xlim(low, high)
            if high < 1000 * low:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(PERCENT)
            axes.xaxis.set_minor_formatter(NullFormatter())
            figure.legend(loc="outside lower center", ncols=4)
        axes.grid(axis="both")
        axes.set_xlabel("change of the layer's outputs ÷ dense outputs (root mean squares)")
        axes.set_ylabel("layer")
        axes.set_title("What pruning changed, layer by layer", loc="left")
    return figure
