"""How few entries must be kept for a relative error: counted exactly, without ever sorting a whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ellq.theory.arguments import Array
from ellq.theory.histogram import MagnitudeHistogram
from ellq.theory.power_kernel import power_sums_error
from ellq.theory.power_sums import PowerSums
from ellq.theory.rounding import log_error, outward

Counts = npt.NDArray[np.int64]

_BLOCK = 2**17  # entries looked at at once, few enough for the processor's cache
_GLANCE = 4096


def retained_of_rows(rows: Array, tolerances: Sequence[float]) -> Counts:
    """Count the fewest entries of every row whose removal of all others stays within each tolerance.

        min{k : σ_k(w)_2 ≤ tol·‖w‖_2}

    Args:
        rows: finite, shape (n, d), d ≥ 1.
        tolerances: each in [1e-100, 1).

    Returns:
        Shape (n, tolerances); as ``ellq.theory.retained_exact`` of each row, from one sort of it. Where σ_k equals
        the tolerance to the last digits, rounding decides.
    """
    magnitudes = np.sort(np.abs(rows), axis=1)
    tails = _tails(magnitudes, np.frexp(magnitudes[:, -1:])[1])
    norms = tails[:, -1:]
    return np.stack([np.count_nonzero(tails > tol * norms, axis=1) for tol in tolerances], axis=1)


def narrow_histogram(units: Array, name: str) -> MagnitudeHistogram:
    """Count the magnitudes of float64 values in the narrowest format that holds them all, where bins are finest.

    Args:
        units: finite, of any shape.
        name: what errors call them.
    """
    values = torch.from_numpy(units.copy())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # Most formats fail at a glance, which saves converting everything.
        if all(torch.equal(part.to(dtype).to(torch.float64), part) for part in (values.flatten()[:_GLANCE], values)):
            return MagnitudeHistogram.of(values.to(dtype), name)
    return MagnitudeHistogram.of(values, name)


def retained_enclosed(histogram: MagnitudeHistogram, tol: float) -> tuple[int, int]:
    """Enclose the fewest entries whose removal of all others stays within a tolerance.

    Args:
        histogram: of the vector.
        tol: relative tolerance in [1e-100, 1), of the Euclidean norm.

    Returns:
        A count that may be enough and one that certainly is; between them lies min{k : σ_k(w)_2 ≤ tol·‖w‖_2}.
    """
    norm = histogram.quasinorm(2.0)
    most, least = math.nextafter(tol * norm.high, math.inf), math.nextafter(tol * norm.low, 0.0)
    low = _first(histogram.nonzeros, lambda k: histogram.best_term_error(k).low <= most)
    return low, _first(histogram.nonzeros, lambda k: histogram.best_term_error(k).high <= least)


def retained_exactly(
    histogram: MagnitudeHistogram, tolerances: Sequence[float], read: Callable[[], Iterable[Array]]
) -> list[int]:
    """Count the fewest entries for each tolerance exactly, reading the weights once more at most.

    The histogram tells between which magnitudes the cuts lie; only the entries there are sorted.

    Args:
        histogram: of all the weights.
        tolerances: each in [1e-100, 1).
        read: gives all the weights in pieces, afresh; not called where the histogram suffices.

    Returns:
        A count for each tolerance: min{k : σ_k(w)_2 ≤ tol·‖w‖_2}. Where σ_k equals the tolerance to the last digits,
        rounding decides.
    """
    enclosed = [retained_enclosed(histogram, tol) for tol in tolerances]
    if all(low == high for low, high in enclosed):
        return [low for low, _ in enclosed]
    # The cut lies among the magnitudes in [lowest, highest]; what is smaller is removed, what is larger is kept.
    lowest = [histogram.threshold(high).low for _, high in enclosed]
    highest = [histogram.threshold(low).high for low, _ in enclosed]
    top = math.frexp(histogram.largest.high)[1]
    above = np.zeros(len(tolerances), dtype=np.int64)
    below = np.zeros(len(tolerances))
    within: list[list[Array]] = [[] for _ in tolerances]
    total = 0.0
    for piece in read():
        flat = piece.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            magnitudes = np.abs(flat[start : start + _BLOCK])
            squares = np.square(np.ldexp(magnitudes, -top))
            total += float(squares.sum())
            for i, (low, high) in enumerate(zip(lowest, highest, strict=True)):
                is_below, is_above = magnitudes < low, magnitudes > high
                above[i] += np.count_nonzero(is_above)
                below[i] += float(squares[is_below].sum())
                within[i].append(squares[~(is_below | is_above)])
    counts = []
    for tol, kept, removed, pieces in zip(tolerances, above.tolist(), below, within, strict=True):
        tails = np.sqrt(removed + np.cumsum(np.sort(np.concatenate(pieces))))
        counts.append(kept + int(np.count_nonzero(tails > tol * math.sqrt(total))))
    return counts


def sufficient_counts(sums: PowerSums, tolerances: Sequence[float], orders: Sequence[float]) -> tuple[Counts, Array]:
    """Return counts that are enough for each tolerance by the quasi-norms alone, with the order that gives the least.

        k ≥ N_{q,2}(w)·λ^(q/(2−q))·(1 − λ)·tol^(−2q/(2−q)),  λ = q/2   ⇒   σ_k(w)_2 ≤ tol·‖w‖_2

    Args:
        sums: of n vectors, for the orders and for 2.
        tolerances: each in (0, 1).
        orders: those the quasi-norm is known for; only those below 2 say anything.

    Returns:
        Counts, at most the number of non-zeros, and orders, NaN where keeping every non-zero is no more; both of
        shape (n, tolerances).

    Reference: ``ellq.theory.retained_sufficient``, here for the tightest of several orders.
    """
    n = len(sums.size)
    counts = np.repeat(sums.nonzeros[:, None], len(tolerances), axis=1)
    best = np.full((n, len(tolerances)), np.nan)
    size = int(sums.size.max())
    exponent = int(np.abs(sums.exponent).max())
    in_two = power_sums_error(size, 2.0, exponent=exponent, wide=True)
    for q in (q for q in orders if q < 2):
        effective = sums.effective_count(q, 2.0)
        # N = exp((2·log S_q − q·log S_2)/(2 − q)): the sums' errors, then the roundings of logarithms and factors.
        in_sums = (2 * power_sums_error(size, q, exponent=exponent, wide=True) + q * in_two) / (2 - q)
        in_logs = 8 * (2 * (math.log(size) + q) + q * (math.log(size) + 2) + 2 + q) / (2 - q)
        error = math.expm1(in_sums + math.log1p(log_error(in_logs + 8 * math.log(size) + 4 * 750)))
        for i, tol in enumerate(tolerances):
            log_factor = (q * math.log(q / 2) - 2 * q * math.log(tol)) / (2 - q) + math.log1p(-q / 2)
            enough = np.ceil(outward(effective * math.exp(min(log_factor, 700.0)), error))
            is_less = enough < counts[:, i]
            counts[is_less, i] = enough[is_less].astype(np.int64)
            best[is_less, i] = q
    return counts, best


def _tails(rising: Array, top: npt.ArrayLike) -> Array:
    """Return σ_k/2^top for every k from d − 1 down to 0, of magnitudes that rise along the last axis."""
    return np.asarray(np.sqrt(np.cumsum(np.square(np.ldexp(rising, -np.asarray(top))), axis=-1)))


def _first(last: int, is_enough: Callable[[int], bool]) -> int:
    """Return a k with ``is_enough(k)`` and not ``is_enough(k − 1)``; ``last`` is always enough."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return low
