"""How many weights each unit may keep: from a tolerance, or from a budget for all units together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ellq.theory import Array, power_sums

Counts = npt.NDArray[np.int64]


def retained_of(total: int, sparsity: float) -> int:
    """Return how many of ``total`` stay when at least the fraction ``sparsity`` goes, the fraction taken as typed.

    In decimals 0.9 of 10 leaves exactly 1; in binary floating point it would leave 0.
    """
    return total - math.ceil(Fraction(repr(sparsity)) * total)


def by_tolerance(layers: Sequence[Array], tol: float) -> list[Counts]:
    """Return, for every unit, the fewest weights whose removed rest is within ``tol``·‖w‖_2.

    Args:
        layers: one array of units per layer, each of shape (units, d).
        tol: relative tolerance, 0 < tol < 1.

    Returns:
        One array of counts per layer; at least 1 for a non-zero unit, 0 for a zero one.

    Reference: ours; exact, by one sort per unit.
    """
    return [np.count_nonzero(_tail_shares(units) > tol**2, axis=1).astype(np.int64) for units in layers]


def _tail_shares(units: Array) -> Array:
    """Return σ_i(w)_2²/‖w‖_2² of every unit for i = 0 … d − 1 weights kept; 0 throughout for a zero unit."""
    squares = np.sort(_scaled(units, np.abs(units).max(axis=1, keepdims=True)) ** 2, axis=1)
    tails = np.cumsum(squares, axis=1)[:, ::-1]
    total = tails[:, :1]
    return np.asarray(np.divide(tails, total, out=np.zeros_like(tails), where=total > 0))


def by_budget(layers: Sequence[Array], retained: int) -> list[Counts]:
    """Return the counts that make the layers' relative squared errors, added up, as small as a budget allows.

        minimise Σ_l Σ_{i in l} σ_{k_i}(w_i)_2² / ‖W_l‖_F²   subject to Σ k_i = retained, k_i ≥ 1

    ‖ΔW_l‖_F/‖W_l‖_F is the relative error of a layer's outputs when its inputs are uncorrelated and of one size. The
    errors are convex in each k_i, so taking the largest w²/‖W_l‖_F² first is optimal. Every non-zero unit keeps at
    least one weight; ties go to the earlier layer, unit and weight.

    Args:
        layers: one array of units per layer, each of shape (units, d).
        retained: the total to keep, from the number of non-zero units to the number of weights.

    Returns:
        One array of counts per layer, summing to ``retained``.

    Reference: ours.
    """
    scores = []
    for units in layers:
        scaled = _scaled(units, np.abs(units).max(keepdims=True))
        energy = float((scaled**2).sum())
        score = scaled / np.sqrt(energy) if energy > 0 else scaled
        first = np.argmax(np.abs(units), axis=1)
        score[np.arange(len(units)), first] = np.where(units.any(axis=1), np.inf, 0.0)  # the score may underflow
        scores.append(score)
    joined = np.concatenate([score.ravel() for score in scores])
    kept = _largest(joined, retained)
    ends = np.cumsum([score.size for score in scores])[:-1]
    return [
        part.reshape(score.shape).sum(axis=1).astype(np.int64)
        for part, score in zip(np.split(kept, ends), scores, strict=True)
    ]


def _largest(values: Array, retained: int) -> npt.NDArray[np.bool_]:
    """Return which values are among the ``retained`` largest; of equal ones the first."""
    if retained == 0:
        return np.zeros(values.size, dtype=bool)
    least = np.partition(values, values.size - retained)[values.size - retained]
    kept: npt.NDArray[np.bool_] = values > least
    ties = np.flatnonzero(values == least)
    kept[ties[: retained - np.count_nonzero(kept)]] = True
    return kept


def _scaled(units: Array, largest: Array) -> Array:
    """Return magnitudes divided by the largest, so that squares of tiny weights do not vanish."""
    return np.asarray(np.divide(np.abs(units), largest, out=np.zeros_like(units), where=largest > 0))


def yang2022(layers: Sequence[Array], eta: float, *, q: float) -> list[Counts]:
    """Return the authors' per-neuron retained counts ("keep m").

        m = ⌈d·S^(−q/(1−q))·(1 + η)^(−1/(1−q))⌉ = ⌈N_{q,1}(w)·(1 + η)^(−1/(1−q))⌉,   S = 1/(1 − I_{q,1})

    Args:
        layers: one array of units per layer, each of shape (units, d).
        eta: η ≥ 0, removed ÷ kept ℓq mass the count is *necessary* for; it is not sufficient.
        q: order, 0 < q < 1.

    Returns:
        One array of counts per layer, each in [1, d] for a non-zero unit, 0 for a zero one.

    Reference: Yang et al. 2022 (arXiv 2206.05604), as in the authors' code of May 2022, first variant.
    """
    return _scaled_counts(layers, _effective_counts(layers, q), -math.log1p(eta) / (1 - q))


def yang2022_budget(layers: Sequence[Array], retained: int, *, q: float) -> tuple[list[Counts], float]:
    """Return the authors' counts at the least η for which they sum to at most a budget, and that η.

    η is negative where the counts at η = 0 undercut the budget; it then only scales the counts up.

    Args:
        layers: one array of units per layer, each of shape (units, d).
        retained: the most that may be kept, at least the number of non-zero units.
        q: order, 0 < q < 1.

    Returns:
        The counts, and η.

    Reference: the rule of Yang et al. 2022; solving it for a budget is ours.
    """
    effective = _effective_counts(layers, q)
    low, high = -50.0, 50.0  # log of the factor on N: from every count at its minimum to every count at d
    for _ in range(100):
        middle = (low + high) / 2
        total = sum(int(counts.sum()) for counts in _scaled_counts(layers, effective, middle))
        low, high = (middle, high) if total <= retained else (low, middle)
    return _scaled_counts(layers, effective, low), math.expm1(-low * (1 - q))


def _effective_counts(layers: Sequence[Array], q: float) -> list[Array]:
    return [power_sums(units, (q, 1.0)).effective_count(q, 1.0) for units in layers]


def _scaled_counts(layers: Sequence[Array], effective: Sequence[Array], log_factor: float) -> list[Counts]:
    counts = []
    for units, N in zip(layers, effective, strict=True):
        # A count that is whole but for rounding must not be lifted to the next.
        m = np.ceil(np.minimum(N * math.exp(log_factor), units.shape[1]) * (1 - 1e-12))
        counts.append(np.maximum(m, N > 0).astype(np.int64))
    return counts
