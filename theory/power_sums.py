"""Sums Σ|w_i|^q of a vector's entries, from which every ℓq measure follows.

They are taken after division by a power of two near the largest magnitude, so weights from 1e-300 to 1e300 neither
overflow nor underflow. Sums of several vectors can be pooled, which gives a layer's and a model's measures from its
units' without a second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array, finite_array, positive_order

_LOG2 = float(np.log(2.0))
_SAFE = 2.0**-1000  # below this ratio to the largest entry, powers are taken through logarithms


@dataclass(frozen=True)
class PowerSums:
    """The sums Σ(|w_i|/2^e)^q of n vectors for a few orders q, from which every measure follows.

    Attributes:
        size: entries of each vector, shape (n,).
        nonzeros: entries that are not 0, shape (n,).
        largest: largest magnitude, shape (n,).
        exponent: the e of the power of two each vector was divided by, shape (n,).
        sums: order → the sum, shape (n,), in [2^−q, size] for non-zero vectors and 0 for zero ones.
    """

    size: npt.NDArray[np.int64]
    nonzeros: npt.NDArray[np.int64]
    largest: Array
    exponent: npt.NDArray[np.int64]
    sums: dict[float, Array]

    def log_quasinorm(self, q: float) -> Array:
        """Return log ‖w‖_q, which is finite whatever the order; −∞ for a zero vector."""
        with np.errstate(divide="ignore"):
            norm = np.log(self.sums[q]) / q + self.exponent * _LOG2
            return np.where(self.nonzeros == 1, np.log(self.largest), norm)

    def quasinorm(self, q: float) -> Array:
        """Return ‖w‖_q; raises OverflowError where it exceeds float64."""
        norm = scaled_root(self.sums[q], q, self.exponent)
        # A single non-zero entry is its own norm; 1/q would magnify the rounding of its q-th power.
        norm = np.where(self.nonzeros == 1, self.largest, norm)
        if np.isinf(norm).any():
            raise OverflowError(
                f"‖w‖_q exceeds float64 for q={q:g} (its natural log is"
                f" {float(self.log_quasinorm(q).max()):.6g}). Choose a larger q, or scale w down."
            )
        return np.asarray(norm)

    def sparsity_index(self, q: float) -> Array:
        """Return ‖w‖_1/‖w‖_q, in [size^(1−1/q), 1] for q < 1; NaN for a zero vector."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.exp(np.log(self.sums[1.0]) - np.log(self.sums[q]) / q)
        return np.where(self.nonzeros == 1, 1.0, np.minimum(ratio, 1.0))

    def pq_index(self, p: float, q: float) -> Array:
        """Return 1 − size^(1/q − 1/p)‖w‖_p/‖w‖_q, in [0, 1); NaN for a zero vector."""
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.log(self.sums[p] / self.size) / p - np.log(self.sums[q] / self.size) / q
        return np.maximum(-np.expm1(log_ratio), 0.0)

    def effective_count(self, p: float, q: float) -> Array:
        """Return (‖w‖_p/‖w‖_q)^(pq/(q−p)), in [1, nonzeros]; 0 for a zero vector."""
        with np.errstate(divide="ignore", invalid="ignore"):
            count = np.exp((q * np.log(self.sums[p]) - p * np.log(self.sums[q])) / (q - p))
        least = np.minimum(self.nonzeros, 1)
        return np.asarray(np.clip(np.nan_to_num(count, nan=0.0), least, self.nonzeros))

    def pooled(self) -> PowerSums:
        """Return the sums of the one vector that all n vectors make when joined, as arrays of shape (1,)."""
        largest = np.max(self.largest, initial=0.0)
        top = np.frexp(largest)[1]
        # A vector of tiny scale beside a huge one may underflow to 0 here, which only q near 0 could notice;
        # exp2 of the scaled difference keeps it exactly as small as it is.
        shift = np.where(self.nonzeros > 0, self.exponent - top, 0).astype(np.float64)
        return PowerSums(
            size=np.array([np.sum(self.size)], dtype=np.int64),
            nonzeros=np.array([np.sum(self.nonzeros)], dtype=np.int64),
            largest=np.array([largest]),
            exponent=np.array([top], dtype=np.int64),
            sums={q: np.array([np.sum(total * np.exp2(q * shift))]) for q, total in self.sums.items()},
        )


def scaled_root(total: Array, q: float, exponent: npt.ArrayLike) -> Array:
    """Return total^(1/q)·2^exponent; infinite only where that exceeds float64."""
    with np.errstate(over="ignore"):
        norm = np.ldexp(total ** (1 / q), exponent)
        if np.isinf(norm).any():  # the power alone may have overflown
            root = total ** (0.5 / q)
            norm = np.where(np.isinf(norm), root * np.ldexp(root, exponent), norm)
    return np.asarray(norm)


def join(parts: Sequence[PowerSums]) -> PowerSums:
    """Return the sums of all vectors of several parts, in order, as one value.

    Raises:
        ValueError: no parts, or parts with different orders.
    """
    if not parts:
        raise ValueError("parts is empty. Join at least one PowerSums.")
    orders = set(parts[0].sums)
    if any(set(part.sums) != orders for part in parts):
        raise ValueError("parts hold different orders. Take all sums with the same orders.")
    return PowerSums(
        size=np.hstack([part.size for part in parts]),
        nonzeros=np.hstack([part.nonzeros for part in parts]),
        largest=np.hstack([part.largest for part in parts]),
        exponent=np.hstack([part.exponent for part in parts]),
        sums={q: np.hstack([part.sums[q] for part in parts]) for q in parts[0].sums},
    )


def power_sums(w: npt.ArrayLike, orders: Sequence[float], axis: int = -1) -> PowerSums:
    """Return the scaled power sums of every vector along an axis, for several orders in one pass.

    Args:
        w: real array with d ≥ 1 entries along ``axis``, finite.
        orders: the orders q, each 0 < q < ∞.
        axis: the axis that is a vector.

    Returns:
        Sums whose arrays have ``w``'s shape without ``axis``.

    Raises:
        TypeError: an order is not a real number, or ``w`` is not numeric.
        ValueError: an order ≤ 0, an empty axis, or a NaN or infinite entry.
    """
    orders = [positive_order(q, "order") for q in orders]
    array = np.moveaxis(np.atleast_1d(finite_array(w, "w")), axis, -1)
    if array.shape[-1] == 0:
        raise ValueError(f"w has no entries along axis {axis} (shape {np.shape(w)}). Pass at least one.")
    magnitude = np.abs(array)
    largest = magnitude.max(axis=-1, initial=0.0)
    # frexp: largest = f·2^e with f in [½, 1). Dividing by 2^e is exact.
    exponent = np.frexp(largest)[1].astype(np.int64)
    scaled = np.ldexp(magnitude, -exponent[..., None])
    tiny = (magnitude > 0) & (scaled < _SAFE)
    sums: dict[float, Array] = {}
    for q in orders:
        if q == 1.0:
            powers = scaled
        elif q == 2.0:
            powers = scaled * scaled
        elif q == 0.5:
            powers = np.sqrt(scaled)
        else:
            powers = scaled**q
        if tiny.any():
            logs = np.log(magnitude[tiny]) - np.broadcast_to(exponent[..., None], tiny.shape)[tiny] * _LOG2
            powers = np.array(powers)
            powers[tiny] = np.exp(q * logs)
        sums[q] = powers.sum(axis=-1)
    return PowerSums(
        size=np.full(largest.shape, array.shape[-1], dtype=np.int64),
        nonzeros=np.count_nonzero(magnitude, axis=-1).astype(np.int64, copy=False)
        if array.ndim > 1
        else np.asarray(np.count_nonzero(magnitude), dtype=np.int64),
        largest=largest,
        exponent=exponent,
        sums=sums,
    )
