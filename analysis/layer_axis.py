"""The axis of layers that pictures share: names that fit, a row for each, however many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ellq.theory.arguments import Array

_ROW = 0.23  # inches a layer takes while there is room
_TALLEST = 16.0  # inches; beyond it rows get thinner and only some are named
_FRAME = 1.5  # inches around the rows
_LINE = 0.15  # inches a name needs
_NAME = 42  # characters of a layer's name that are shown

PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.6g}%")  # no digits that are not needed


def height_for(layers: int) -> float:
    """Return the height in inches of a picture with a row for each layer."""
    return min(_FRAME + _ROW * layers, _TALLEST)


def thickness_for(layers: int) -> float:
    """Return the share of its usual thickness that a row has left."""
    return min(1.0, (_TALLEST - _FRAME) / (_ROW * layers))


def name_rows(axes: Axes, names: Sequence[str]) -> Array:
    """Make the vertical axis one of layers, the first on top, and return their places."""
    rows = np.arange(len(names), dtype=np.float64)
    axes.set_ylim(len(names) - 0.4, -0.6)
    step = math.ceil(len(names) / ((_TALLEST - _FRAME) / _LINE))
    axes.set_yticks(rows[::step], short_names(names[::step]))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return rows


def short_names(names: Sequence[str], longest: int = _NAME) -> list[str]:
    """Return the names without a final .weight, and the middle of long ones left out."""
    shown = [str(name).removesuffix(".weight") for name in names]
    front, back = 2 * longest // 3, longest // 3 - 1
    return [name if len(name) <= longest else f"{name[:front]}…{name[-back:]}" for name in shown]
