"""N:M patterns: at most N weights in every M that follow one another in a unit."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor

from ellq.pruning.largest import Layer, keep_largest


def pattern_numbers(pattern: str) -> tuple[int, int]:
    """Return n and m of a pattern such as "2:4"; refuse what is none."""
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern) if isinstance(pattern, str) else None
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"pattern={pattern!r} is no N:M pattern. Give one such as '2:4', with 0 < N < M.")
    return int(found[1]), int(found[2])


def keep_pattern(layer: Layer, n: int, m: int) -> Tensor:
    """Return which entries are among the ``n`` largest of their group of ``m``; of equal ones the first stay.

    Groups are of entries that follow one another in a unit: along the input of a Linear, as torch's semi-structured
    tensors want it; in the order (input channel, row, column) of a convolution. Where ``m`` does not divide a unit, its
    last group is shorter and keeps n too, or all it has.

    Args:
        layer: finite, units along the first axis.
        n: how many of each group stay.
        m: how many a group has.

    Returns:
        Boolean tensor of shape (units, entries).
    """
    units, size = len(layer), math.prod(layer.shape[1:])
    rows = layer.reshape(units, size)
    whole = size - size % m
    kept = np.empty((units, size), dtype=bool)
    groups = rows[:, :whole].reshape(-1, m)
    kept[:, :whole] = keep_largest(groups, np.full(len(groups), n)).numpy().reshape(units, whole)
    if whole < size:
        kept[:, whole:] = keep_largest(rows[:, whole:], np.full(units, min(n, size - whole))).numpy()
    return torch.from_numpy(kept)


def pattern_count(size: int, n: int, m: int) -> int:
    """Return how many of a unit's weights a pattern keeps."""
    return size // m * n + min(n, size % m)
