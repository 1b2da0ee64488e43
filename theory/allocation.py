"""How to share a number of retained weights among units, so that the bound on their errors together is least.

Unit i, keeping k_i of its weights, errs by at most A_i·k_i^(1/p − 1/q): A_i is its gain, the product of what its error
is multiplied by on the way to the output, of the size of its inputs, of ‖w_i‖_q and of ``stechkin_constant(q, p)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import (
    Array,
    count,
    finite_array,
    positive_order,
    real_number,
    refuse_mixed_devices,
    rising_orders,
)
from ellq.theory.measures import lq_quasinorm
from ellq.theory.power_sums import power_sums
from ellq.theory.rounding import log_error, norm_error, outward

Counts = npt.NDArray[np.int64]
Shares = TypeVar("Shares", Array, Counts)


def allocation_error(gains: npt.ArrayLike, counts: npt.ArrayLike, *, q: float, p: float = 1.0) -> float:
    """Return the bound on all units' errors together, for given counts.

        (Σ_i (A_i·k_i^(1/p − 1/q))^p)^(1/p)

    p = 1 adds the errors up; p = 2 adds their squares. Scales with the gains; ignores a common order of both. Rounded
    up.

    Args:
        gains: A, shape (n,), n ≥ 1, finite, ≥ 0.
        counts: k, how much each unit retains, shape (n,), finite, > 0; whole numbers or not.
        q: order of the quasi-norm, 0 < q < p.
        p: order in which errors are added, finite.

    Returns:
        The bound, in the units of the gains.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, a negative gain, a count ≤ 0, or not 0 < q < p.
        OverflowError: the bound exceeds float64.

    Reference: ``stechkin_bound`` of every unit, added up.
    """
    q, p = rising_orders(q, p)
    refuse_mixed_devices(gains=gains, counts=counts)
    A = _gains(gains)
    k = finite_array(counts, "counts", ndim=1)
    if k.shape != A.shape:
        raise ValueError(f"counts has {k.size} entries but gains has {A.size}. Give one of each per unit.")
    if k.min() <= 0:
        raise ValueError(f"counts reach down to {k.min():g}. Every unit must retain something.")
    A, k = A[A > 0], k[A > 0]
    if not A.size:
        return 0.0
    # In logarithms: the power of k may leave float64 where its product with A does not. Every rounding is relative to
    # one of the terms.
    log_A, log_k = np.log(A), np.log(k)
    terms = float(np.max(np.abs(log_A) + (1 / q + 1 / p) * np.abs(log_k))) + 1
    with np.errstate(over="ignore"):
        errors = outward(np.exp(log_A - (1 / q - 1 / p) * log_k), log_error(16 * terms))
    if np.isinf(errors).any():
        raise OverflowError(f"The bound exceeds float64 for q={q:g}. Retain more, or scale the gains down.")
    return float(outward(lq_quasinorm(errors, p), norm_error(A.size, p)))


def least_allocation_error(gains: npt.ArrayLike, total: float, *, q: float, p: float = 1.0) -> float:
    """Return the least bound that any allocation of a total can have.

        min {(Σ_i (A_i·k_i^(1/p − 1/q))^p)^(1/p) : Σk_i = K} = ‖A‖_q·K^(1/p − 1/q)

    As if all units were one vector. Attained by k_i = K·A_i^q/Σ_j A_j^q, the same allocation for every p. Rounded down,
    so that no allocation is below it; whole counts, or counts held within limits, may stay above.

    Args:
        gains: A, shape (n,), n ≥ 1, finite, ≥ 0.
        total: K > 0, how much all units retain together, finite.
        q: order of the quasi-norm, 0 < q < p.
        p: order in which errors are added, finite.

    Returns:
        The least bound, in the units of the gains.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a negative gain, ``total`` ≤ 0, or not 0 < q < p.
        OverflowError: the least bound exceeds float64.

    Reference: ours; Hölder's inequality, with the allocation that makes it an equality.
    """
    q, p = rising_orders(q, p)
    A = _gains(gains)
    K = real_number(total, "total")
    if not 0 < K < np.inf:
        raise ValueError(f"total={K:g} is not a finite positive number. Retain something.")
    sums = power_sums(A, (q,))
    if not sums.nonzeros:
        return 0.0
    log_norm, log_K = float(sums.log_quasinorm(q)), float(np.log(K))
    log_least = log_norm - (1 / q - 1 / p) * log_K
    if log_least > 709:
        raise OverflowError(f"The least bound exceeds float64 for q={q:g} (its natural log is {log_least:.6g}).")
    terms = (1 / p + 1 / q) * abs(log_K) + np.log(2 * A.size) / q + abs(int(sums.exponent)) + 1
    least = float(np.exp(log_least)) / (1 + log_error((A.size + 16) / q + 16 * terms) + 2.0**-50)
    return max(least - 2.0**-1073, 0.0)


def allocate_shares(
    gains: npt.ArrayLike, total: float, *, q: float, sizes: npt.ArrayLike | None = None, least: float = 0.0
) -> Array:
    """Share a total among units so that the bound on their errors together is least, in real numbers.

        k_i = min(max(c·A_i^q, least), size_i)        c such that Σk_i = K

    Without limits k_i = K·A_i^q/Σ_j A_j^q. The best for every order p > q in which errors are added. Ignores the scale
    of the gains. Units of gain 0 get the least, and share evenly what the others cannot take.

    Args:
        gains: A, shape (n,), n ≥ 1, finite, ≥ 0.
        total: K > 0, n·least ≤ K ≤ Σ size_i.
        q: order of the quasi-norm, > 0.
        sizes: how much each unit has, shape (n,), finite, ≥ ``least``; None for no limit.
        least: what every unit retains at least, ≥ 0.

    Returns:
        k, shape (n,); its sum is K up to rounding.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a total that the limits do not admit, limits that exclude each other, or a negative gain.

    Reference: ours; the condition of Karush, Kuhn and Tucker.
    """
    A, q = _gains(gains), positive_order(q, "q")
    K, low = real_number(total, "total"), real_number(least, "least")
    if not 0 < K < np.inf or not 0 <= low < np.inf:
        raise ValueError(f"total={K:g} and least={low:g} must be finite, total > 0 and least >= 0.")
    caps = np.full(A.size, K) if sizes is None else finite_array(sizes, "sizes", ndim=1)
    _require_room(A, K, np.minimum(caps, K), low)
    return _by_gain(lambda log_A, cap, amount: _level(q * log_A, cap, amount, low), A, K, caps, low)


def allocate_retained(
    gains: npt.ArrayLike, total: int, *, q: float, p: float = 1.0, sizes: npt.ArrayLike | None = None, least: int = 1
) -> Counts:
    """Share a total among units so that the bound on their errors together is least, in whole numbers.

        min {Σ_i A_i^p·k_i^(1 − p/q) : Σk_i = K, least ≤ k_i ≤ size_i}

    The optimum itself, ``allocate_shares`` rounded in the best way: every unit's error falls with its count and falls
    ever slower, so the K steps worth most are taken. Ignores the scale of the gains; among equal gains the first units
    get what cannot be divided. Units of gain 0 get the least, and share evenly what the others cannot take. A million
    units take about a second.

    Args:
        gains: A, shape (n,), n ≥ 1, finite, ≥ 0.
        total: K, n·least ≤ K ≤ Σ size_i, at most 10¹².
        q: order of the quasi-norm, 0 < q < p.
        p: order in which errors are added, finite.
        sizes: how much each unit has, whole numbers ≥ ``least``, shape (n,); None for no limit.
        least: what every unit retains at least, ≥ 1.

    Returns:
        k, shape (n,); its sum is K exactly.

    Raises:
        TypeError: an argument is not numeric, or a count is not whole.
        ValueError: a total that the limits do not admit, limits that exclude each other, a negative gain, or not
            0 < q < p.

    Reference: ours; marginal analysis of a separable convex objective (Fox 1966), steps found by ``allocate_shares``.
    """
    q, p = rising_orders(q, p)
    A = _gains(gains)
    K, low = count(total, "total", low=1, high=10**12), count(least, "least", low=1, high=10**12)
    caps = np.full(A.size, K) if sizes is None else np.asarray(sizes)
    if caps.dtype.kind not in "iu" or caps.ndim != 1:
        raise TypeError(f"sizes must be a list of whole numbers, got {caps.dtype} of shape {caps.shape}.")
    _require_room(A, K, np.minimum(caps, K), low)
    # No unit can have more than the others' least leave.
    caps = np.minimum(caps, K - (A.size - 1) * low).astype(np.int64)
    return _by_gain(lambda log_A, cap, amount: _whole_level(log_A, cap, amount, low, q, p), A, K, caps, low)


def _by_gain(
    level: Callable[[Array, Shares, Any], Shares], A: Array, total: float, caps: Shares, least: float
) -> Shares:
    """Serve the units of positive gain first; those of gain 0 share what is left as equals."""
    has_gain = A > 0
    shares = np.full(A.shape, least, dtype=caps.dtype)
    room = caps[has_gain].sum()
    idle = A.size - np.count_nonzero(has_gain)
    if total - least * idle < room:
        log_A = np.log(A[has_gain])
        shares[has_gain] = level(log_A - log_A.max(), caps[has_gain], total - least * idle)
        return shares
    shares[has_gain] = caps[has_gain]
    if idle:
        shares[~has_gain] = level(np.zeros(idle), caps[~has_gain], total - room)
    return shares


def _level(logs: Array, caps: npt.NDArray[Any], total: float, least: float) -> Array:
    """Return min(max(exp(t + logs), least), caps) for the t at which they sum to ``total``."""
    # Where a cap cannot bind, none: sums that do not change with t would leave the other shares undetermined.
    is_free = caps >= total
    limits = np.where(is_free, np.inf, caps)

    def shares(t: float) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(np.clip(np.exp(t + logs), least, limits))

    if total <= least * logs.size:
        return np.full(logs.size, float(least))
    # At ``low`` no unit has more than an equal share. At ``high`` every unit has all it can take, or one has the total.
    low = np.log(total / logs.size) - logs.max()
    some = caps > 0
    high = np.log(total) - logs[is_free].max() if is_free.any() else np.max(np.log(caps[some]) - logs[some])
    if shares(low).sum() >= total:
        return shares(low)
    if shares(high).sum() <= total:
        return shares(high)
    from scipy.optimize import brentq  # slow to load, and needed here only

    return shares(brentq(lambda t: shares(t).sum() - total, low, high, xtol=1e-14))


def _whole_level(log_A: Array, caps: Counts, total: int, least: int, q: float, p: float) -> Counts:
    # A step from k to k + 1 is worth A^p(k^−s − (k + 1)^−s), s = p/q − 1, which lies between the slopes of the error
    # at its two ends. So with all steps worth at least some amount taken, each unit is within 1 of the real number x
    # at which its slope is that amount, and all together are within n of Σx. The best counts are therefore between
    # those of real totals n lower and n higher; one more on both sides for the rounding of x. Between lie a few steps
    # a unit, whose worth is compared.
    n = log_A.size
    below, above = max(total - n, n * least), min(total + n, int(caps.sum()))
    low = np.clip(np.floor(_level(q * log_A, caps, below, least)).astype(np.int64) - 1, least, caps)
    high = np.clip(np.floor(_level(q * log_A, caps, above, least)).astype(np.int64) + 2, least, caps)
    width = high - low
    unit = np.repeat(np.arange(n), width)
    k = (low[unit] + np.arange(unit.size) - np.repeat(np.cumsum(width) - width, width)).astype(np.float64)
    s = p / q - 1
    worth = p * log_A[unit] - s * np.log(k) + np.log(-np.expm1(-s * np.log1p(1 / k)))
    steps = total - int(low.sum())
    assert 0 <= steps <= unit.size
    if steps == 0:
        return np.asarray(low)
    least_worth = np.partition(worth, -steps)[-steps]
    is_taken = worth > least_worth
    is_taken[np.flatnonzero(worth == least_worth)[: steps - np.count_nonzero(is_taken)]] = True
    return np.asarray(low + np.bincount(unit[is_taken], minlength=n))


def _gains(gains: npt.ArrayLike) -> Array:
    A = finite_array(gains, "gains", ndim=1)
    if A.size == 0:
        raise ValueError("gains is empty. Pass at least one unit.")
    if A.min() < 0:
        raise ValueError(f"gains reach down to {A.min():g}. A gain is the size of a bound, >= 0.")
    return A


def _require_room(A: Array, total: float, caps: npt.NDArray[Any], least: float) -> None:
    if caps.shape != A.shape:
        raise ValueError(f"sizes has {caps.size} entries but gains has {A.size}. Give one of each per unit.")
    if caps.min() < least:
        raise ValueError(f"sizes reach down to {caps.min():g}, below least={least:g}. Lower least or drop the unit.")
    if not least * A.size <= total <= caps.sum():
        raise ValueError(
            f"total={total:g} is outside [{least * A.size:g}, {caps.sum():g}], what {A.size} units can retain together."
        )
