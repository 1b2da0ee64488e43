"""Where the units of a weight tensor lie: one row per unit, and back."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

Scalar = TypeVar("Scalar", bound=np.generic)


def transposed_groups(module: nn.Module) -> int:
    """Return the groups of a transposed convolution, whose weight is (in, out/groups, …); 0 for any other module."""
    if isinstance(module, _ConvTransposeNd):
        return module.groups
    # A scripted module has lost its class and keeps its name.
    if str(getattr(module, "original_name", "")).startswith("ConvTranspose"):
        return int(getattr(module, "groups", 1))
    return 0


def to_unit_rows(array: npt.NDArray[Scalar], groups: int) -> npt.NDArray[Scalar]:
    """Return a weight as shape (units, entries).

    Args:
        array: the weight, of two dimensions or more, units along the first axis.
        groups: of a transposed convolution, whose units are the output channels of each group; else 0.
    """
    if groups:
        inputs, outputs, *_ = array.shape
        grouped = array.reshape(groups, inputs // groups, outputs, -1)
        array = grouped.swapaxes(1, 2).reshape(groups * outputs, -1)
    return array.reshape(array.shape[0], -1)


def from_unit_rows(rows: npt.NDArray[Scalar], shape: tuple[int, ...], groups: int) -> npt.NDArray[Scalar]:
    """Return rows of units as the weight of the given shape they came from, undoing ``to_unit_rows``."""
    if groups:
        inputs, outputs = shape[:2]
        return rows.reshape(groups, outputs, inputs // groups, -1).swapaxes(1, 2).reshape(shape)
    return rows.reshape(shape)
