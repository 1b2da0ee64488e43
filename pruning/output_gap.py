"""How far outputs lie apart, for checks that two versions of a network compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def output_gap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the largest change relative to the largest entry, output by output; NaN where one is not finite."""
    gaps = [0.0]
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return np.inf
        scale = float(a.double().abs().max()) if a.numel() else 0.0
        change = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        gaps.append(change / scale if scale > 0 else change)
    return float(np.max(gaps))
