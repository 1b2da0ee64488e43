"""Sums Σ|w_i|^q of a vector's entries, from which every ℓq measure follows.

They are taken after division by a power of two near the largest magnitude, so weights from 1e-300 to 1e300 neither
overflow nor underflow. Sums of several vectors can be pooled, which gives a layer's and a model's measures from its
units' without a second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array, count, finite_array, positive_order

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
        """Return ‖w‖_q, the largest magnitude for q = ∞; raises OverflowError where it exceeds float64."""
        if q == np.inf:
            return self.largest
        norm = scaled_root(self.sums[q], q, self.exponent)
        # A single non-zero entry is its own norm; 1/q would magnify the rounding of its q-th power.
        norm = np.where(self.nonzeros == 1, self.largest, np.maximum(norm, self.largest))
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

    def normalised_sparsity_index(self, q: float) -> Array:
        """Return size^(1/q − 1)‖w‖_1/‖w‖_q ≥ 1 for q < 1; NaN for a zero vector, infinite beyond float64."""
        with np.errstate(over="ignore"):
            index = np.exp(-self._log_evenness(q, 1.0))
            return np.asarray(np.minimum(index, self.size.astype(np.float64) ** (1 / q - 1)))

    def pq_index(self, p: float, q: float) -> Array:
        """Return 1 − size^(1/q − 1/p)‖w‖_p/‖w‖_q, in [0, 1); NaN for a zero vector."""
        return np.asarray(0.0 - np.expm1(self._log_evenness(p, q)))  # not −: a 0 without sign

    def evenness(self, p: float, q: float) -> Array:
        """Return size^(1/q − 1/p)‖w‖_p/‖w‖_q = 1 − I_{p,q}, in (0, 1], to its own relative accuracy."""
        return np.asarray(np.exp(self._log_evenness(p, q)))

    def _log_evenness(self, p: float, q: float) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.log(self.sums[p] / self.size) / p - np.log(self.sums[q] / self.size) / q
            # With one non-zero entry the sums say nothing, and 1/p would magnify their rounding.
            single = (1 / q - 1 / p) * np.log(self.size)
        return np.asarray(np.where(self.nonzeros == 1, single, np.minimum(log_ratio, 0.0)))

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
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        orders: the orders q, each 0 < q < ∞.
        axis: the axis that is a vector.

    Returns:
        Sums whose arrays have ``w``'s shape without ``axis``.

    Raises:
        TypeError: an order is not a real number, or ``w`` is not numeric.
        ValueError: an order ≤ 0, an empty axis, or a NaN or infinite entry.
    """
    orders = [positive_order(q, "order") for q in orders]
    vectors = scaled_magnitudes(w, axis)
    magnitude = vectors.magnitude
    return PowerSums(
        size=np.full(magnitude.shape[:-1], magnitude.shape[-1], dtype=np.int64),
        nonzeros=np.count_nonzero(magnitude, axis=-1).astype(np.int64, copy=False)
        if magnitude.ndim > 1
        else np.asarray(np.count_nonzero(magnitude), dtype=np.int64),
        largest=vectors.largest,
        exponent=vectors.exponent,
        sums={q: vectors.powers(q).sum(axis=-1) for q in orders},
    )


@dataclass(frozen=True)
class ScaledMagnitudes:
    """Magnitudes of vectors along the last axis, divided by a power of two near each vector's largest.

    Attributes:
        magnitude: |w|, shape (…, d).
        largest: largest magnitude, shape (…).
        exponent: the e of the power of two, shape (…).
        scaled: |w|/2^e, shape (…, d), in [½, 1) where largest; 0 for entries too small beside it.
    """

    magnitude: Array
    largest: Array
    exponent: npt.NDArray[np.int64]
    scaled: Array

    def powers(self, q: float) -> Array:
        """Return (|w|/2^e)^q, taken through logarithms where |w|/2^e itself would underflow."""
        if q == 1.0:
            powers = self.scaled
        elif q == 2.0:
            powers = self.scaled * self.scaled
        elif q == 0.5:
            powers = np.sqrt(self.scaled)
        else:
            powers = self.scaled**q
        tiny = self._tiny
        if tiny is not None:
            logs = np.log(self.magnitude[tiny])
            logs -= np.broadcast_to(self.exponent[..., None], tiny.shape)[tiny] * _LOG2
            powers = np.array(powers)
            powers[tiny] = np.exp(q * logs)
        return powers

    @cached_property
    def _tiny(self) -> npt.NDArray[np.bool_] | None:
        tiny = self.scaled < _SAFE
        if tiny.any():
            tiny &= self.magnitude > 0
        return tiny if tiny.any() else None


def scaled_magnitudes(w: npt.ArrayLike, axis: int = -1) -> ScaledMagnitudes:
    """Return the magnitudes of every vector along an axis, scaled so that sums and powers are safe.

    Args:
        w: real array with d ≥ 1 entries along ``axis``, finite.
        axis: the axis that is a vector; the last in the result.

    Raises:
        TypeError: ``w`` is not numeric.
        ValueError: an empty axis, or a NaN or infinite entry.
    """
    array = np.atleast_1d(finite_array(w, "w"))
    axis = count(axis, "axis", low=-array.ndim, high=array.ndim - 1)
    magnitude = np.abs(np.moveaxis(array, axis, -1))
    if magnitude.shape[-1] == 0:
        raise ValueError(f"w has no entries along axis {axis} (shape {array.shape}). Pass at least one.")
    largest = magnitude.max(axis=-1, initial=0.0)
    # frexp: largest = f·2^e with f in [½, 1). Dividing by 2^e is exact.
    exponent = np.frexp(largest)[1].astype(np.int64)
    return ScaledMagnitudes(magnitude, largest, exponent, np.ldexp(magnitude, -exponent[..., None]))
