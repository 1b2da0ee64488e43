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


def tail_shares(units: Array, *, p: float) -> Array:
    """Return, for every unit and rank i, the share of the unit that would go if only i weights were kept.

        s_i = Σ_{j>i} |w|_(j)^p / ‖w‖_p^p        1 = s_0 ≥ s_1 ≥ … ≥ s_{d−1}

    A unit kept to relative tolerance t needs exactly the weights with s_i > t^p, so one threshold on these shares
    gives every unit the same relative error. 0 throughout for a zero unit.

    Args:
        units: one unit per row, shape (units, d), finite.
        p: order in which the error is measured.

    Returns:
        Array of shape (units, d), column i for the (i+1)-th largest weight.

    Reference: ours; for p = 2 and one unit per layer it orders weights as LAMP does (Lee et al. 2021).
    """
    falling = -np.sort(-np.abs(units), axis=1)
    largest = falling[:, :1]
    # Divided by the largest first, so that squares of tiny weights do not vanish.
    powers = np.divide(falling, largest, out=np.zeros_like(falling), where=largest > 0) ** p
    tails = np.cumsum(powers[:, ::-1], axis=1)[:, ::-1]
    total = tails[:, :1]
    return np.asarray(np.divide(tails, total, out=np.zeros_like(tails), where=total > 0))


def by_tolerance(layers: Sequence[Array], tol: float, *, p: float) -> list[Counts]:
    """Return, for every unit, the fewest weights whose removed rest is within ``tol``·‖w‖_p.

    Args:
        layers: one array of units per layer, each of shape (units, d).
        tol: relative tolerance, 0 < tol < 1.
        p: order in which the error is measured.

    Returns:
        One array of counts per layer; at least 1 for a non-zero unit, 0 for a zero one.

    Reference: ours; exact, by one sort per unit.
    """
    return [np.count_nonzero(tail_shares(units, p=p) > tol**p, axis=1).astype(np.int64) for units in layers]


def by_budget(layers: Sequence[Array], retained: int, *, p: float) -> list[Counts]:
    """Return counts that sum to a budget and make the largest relative error of any unit as small as possible.

    Every non-zero unit keeps at least one weight. Ties go to the earlier layer, unit and larger weight.

    Args:
        layers: one array of units per layer, each of shape (units, d).
        retained: the total to keep, from the number of non-zero units to the number of weights.
        p: order in which the error is measured.

    Returns:
        One array of counts per layer, summing to ``retained``.

    Reference: ours; a threshold on ``tail_shares`` is optimal because each unit's error falls with its count.
    """
    shares = [tail_shares(units, p=p) for units in layers]
    joined = np.concatenate([s.ravel() for s in shares])
    kept = np.zeros(joined.size, dtype=bool)
    # A stable sort on the negated share takes ties in order.
    kept[np.argsort(-joined, kind="stable")[:retained]] = True
    counts, start = [], 0
    for s in shares:
        counts.append(kept[start : start + s.size].reshape(s.shape).sum(axis=1).astype(np.int64))
        start += s.size
    return counts


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
    counts = []
    for units in layers:
        exact = power_sums(units, (q, 1.0)).effective_count(q, 1.0) * (1 + eta) ** (-1 / (1 - q))
        # A count that is whole but for rounding must not be lifted to the next.
        m = np.ceil(exact * (1 - 1e-12)).astype(np.int64)
        counts.append(np.clip(m, (exact > 0).astype(np.int64), units.shape[1]))
    return counts


def yang2022_budget(layers: Sequence[Array], retained: int, *, q: float) -> tuple[list[Counts], float]:
    """Return the authors' counts at the least η for which they sum to at most a budget, and that η.

    η may be negative where the counts at η = 0 already undercut the budget; then it only scales the counts up.

    Args:
        layers: one array of units per layer, each of shape (units, d).
        retained: the most that may be kept, at least the number of non-zero units.
        q: order, 0 < q < 1.

    Returns:
        The counts, and η.

    Reference: the rule of Yang et al. 2022; solving it for a budget is ours.
    """

    def total(log_scale: float) -> int:
        return sum(int(c.sum()) for c in yang2022(layers, np.expm1(-log_scale), q=q))

    low, high = -60.0, 60.0  # log of 1/(1 + η): from every count at its minimum to every count at d
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= retained else (low, middle)
    eta = float(np.expm1(-low))
    return yang2022(layers, eta, q=q), eta
