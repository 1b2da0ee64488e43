"""How well a few entries represent a vector: exact best k-term errors, their ℓq bounds, and the inverse questions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import (
    Array,
    Indices,
    count,
    finite_array,
    open_fraction,
    positive_order,
    real_number,
    rising_orders,
)
from ellq.theory.power_sums import PowerSums, power_sums, scaled_root
from ellq.theory.rounding import UNIT_ROUNDOFF, log_error, outward


def best_term_errors(w: npt.ArrayLike, p: float = 2.0) -> Array:
    """Return the exact best k-term error of w for every k at once, from one sort.

        σ_k(w)_p = (Σ_{i>k} |w|_(i)^p)^(1/p)        |w|_(1) ≥ |w|_(2) ≥ …

    Scales with w; ignores order and signs; does not increase with k; σ_0 = ‖w‖_p and σ_d = 0.

    Args:
        w: real vector, shape (d,), finite.
        p: order in which the error is measured, 0 < p < ∞; 2 is the Euclidean norm.

    Returns:
        Array of shape (d + 1,): entry k is the error of keeping the k largest entries, in the units of w.

    Raises:
        TypeError: ``p`` is not a real number, or ``w`` is not numeric.
        ValueError: ``p`` ≤ 0, ``w`` not a vector, or a NaN or infinite entry.
        OverflowError: ‖w‖_p exceeds float64.

    Reference: Foucart & Rauhut 2013, Definition 2.2.
    """
    vector = finite_array(w, "w", ndim=1)
    p = positive_order(p, "p")
    rising = np.sort(np.abs(vector))
    # Summed from the smallest up: the tails are running sums, each accurate to its own size.
    errors = np.append(_running_norms(rising, p)[::-1], 0.0)
    if np.isinf(errors[0]):
        raise OverflowError(f"‖w‖_p exceeds float64 for p={p:g}. Choose a larger p, or scale w down.")
    return errors


def _running_norms(rising: Array, p: float) -> Array:
    # (Σ_{j≤i} |w_j|^p)^(1/p) for every i. Entries are taken in stretches in which both they and their p-th powers,
    # relative to the largest of the stretch, stay above 2^−1001: beside a large entry small ones would underflow.
    norms = np.zeros(rising.size)
    exponents = np.frexp(rising)[1].astype(np.int64)
    stretch = int(min(1000 / p - 1, 1000))
    start, below, top = int(np.count_nonzero(rising == 0)), 0.0, 0
    while start < rising.size:
        stop = start + int(np.searchsorted(exponents[start:], exponents[start] + stretch, side="right"))
        last, top = top, int(exponents[stop - 1])
        powers = np.ldexp(rising[start:stop], -top) ** p
        if below:
            powers[0] += below * 2.0 ** (p * (last - top))
        totals = np.cumsum(powers)
        norms[start:stop] = scaled_root(totals, p, top)
        start, below = stop, float(totals[-1])
    return norms


def best_term_error(w: npt.ArrayLike, retained: int, *, p: float = 2.0) -> float:
    """Return σ_k(w)_p for one k: the error of keeping the ``retained`` largest entries of w.

    Args:
        w: real vector, shape (d,), finite.
        retained: k, 0 ≤ k ≤ d.
        p: order in which the error is measured, 0 < p < ∞.

    Returns:
        The error, in the units of w.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: ``retained`` outside [0, d], ``p`` ≤ 0, or ``w`` not a finite vector.

    Reference: Foucart & Rauhut 2013, Definition 2.2.
    """
    errors = best_term_errors(w, p)
    return float(errors[count(retained, "retained", low=0, high=errors.size - 1)])


def stechkin_constant(q: float, p: float) -> float:
    """Return the least c with σ_k(w)_p ≤ c·k^(1/p − 1/q)·‖w‖_q for all w and k.

        c_{q,p} = [λ^λ (1 − λ)^(1−λ)]^(1/q),   λ = q/p

    Args:
        q: order of the quasi-norm, 0 < q < p.
        p: order in which the error is measured, finite.

    Returns:
        The constant, in (0, 1).

    Raises:
        TypeError: an order is not a real number.
        ValueError: not 0 < q < p.

    Reference: Foucart & Rauhut 2013, Theorem 2.5.
    """
    q, p = rising_orders(q, p)
    return math.exp(_log_stechkin_constant(q, p))


def _log_stechkin_constant(q: float, p: float) -> float:
    ratio = q / p
    return (ratio * math.log(ratio) + (1 - ratio) * math.log1p(-ratio)) / q


def stechkin_bound(w: npt.ArrayLike, retained: int, *, q: float, p: float = 2.0) -> float:
    """Bound the best k-term error of w by its ℓq quasi-norm.

        σ_k(w)_p ≤ c · k^(1/p − 1/q) · ‖w‖_q      c = [(q/p)^(q/p) · (1 − q/p)^(1 − q/p)]^(1/q)

    Sharp: vectors of equal magnitudes come arbitrarily close. Scales with w; ignores order and signs. Rounded up, so
    the float returned is never below the exact bound; 0 for the zero vector.

    Args:
        w: real vector, shape (d,), d ≥ 1, finite.
        retained: k, 1 ≤ k ≤ d: how many largest entries are kept.
        q: order of the quasi-norm, 0 < q < p.
        p: order in which the error is measured; 2 is the Euclidean norm.

    Returns:
        The bound, in the units of w.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: q outside (0, p), ``retained`` outside [1, d], or ``w`` not a finite vector.
        OverflowError: the bound exceeds float64.

    Reference: Foucart & Rauhut 2013, Theorem 2.5.
    """
    vector = finite_array(w, "w", ndim=1)
    q, p = rising_orders(q, p)
    k = count(retained, "retained", low=1, high=vector.size)
    sums = power_sums(vector, (q,))
    if not sums.nonzeros:
        return 0.0
    # In logarithms: k^(1/p − 1/q) and ‖w‖_q may each leave float64 where their product does not.
    log_constant, log_k, log_norm = _log_stechkin_constant(q, p), math.log(k), float(sums.log_quasinorm(q))
    log_bound = log_constant + (1 / p - 1 / q) * log_k + log_norm
    if log_bound > 709:
        raise OverflowError(f"The bound exceeds float64 for q={q:g} (its natural log is {log_bound:.6g}).")
    # Every rounding is relative to one of these terms; the sum of powers and the constant carry theirs into 1/q.
    terms = abs(log_constant) + (1 / p + 1 / q) * log_k + math.log(2 * vector.size) / q + abs(int(sums.exponent)) + 1
    return float(outward(math.exp(log_bound), log_error((vector.size + 16) / q + 8 * terms)))


def stechkin_constant_finite(q: float, p: float, retained: int, size: int) -> float:
    """Return the least c with σ_k(w)_p ≤ c·‖w‖_q for all w of d entries: ``stechkin_constant`` for one k and d.

        c = max_{k<m≤d} (m − k)^(1/p) m^(−1/q) ≤ c_{q,p}·k^(1/p − 1/q)

    The maximum is next to m = k/(1 − q/p), or at d where that is less. Attained by ``extremal_vector``. Does not
    increase with k, nor fall with d. 1 for k = 0, 0 for k = d.

    Args:
        q: order of the quasi-norm, 0 < q < p.
        p: order in which the error is measured, finite.
        retained: k, 0 ≤ k ≤ d.
        size: d ≥ 1.

    Returns:
        The constant, in [0, 1]; 0 also where it is below float64 (very small q).

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: not 0 < q < p, ``size`` < 1, or ``retained`` outside [0, d].

    Reference: ours; proof in docs/theorems.md, ``stechkin-finite``.
    """
    q, p = rising_orders(q, p)
    d = count(size, "size", low=1, high=_GREATEST_SIZE)
    k = count(retained, "retained", low=0, high=d)
    return math.exp(_log_finite_constant(q, p, np.array([k]), d)[0])


_GREATEST_SIZE = 2**53


def _log_finite_constant(q: float, p: float, k: Indices, size: int) -> Array:
    m = _peak(q, p, k, size)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(m - k) / p - np.log(m) / q)


def _peak(q: float, p: float, k: Indices, size: int) -> Indices:
    # (m − k)^(1/p) m^(−1/q) rises up to m = k/(1 − q/p) and falls after it: the best whole m is next to it.
    with np.errstate(over="ignore"):
        turn = np.floor(np.minimum(p * k / (p - q), size)).astype(np.intp)
    near = np.minimum(np.maximum(turn[:, None] + np.arange(-1, 3), k[:, None] + 1), size)
    with np.errstate(divide="ignore"):
        best = (np.log(near - k[:, None]) / p - np.log(near) / q).argmax(axis=1)
    return np.asarray(near[np.arange(k.size), best])


def stechkin_bound_finite(w: npt.ArrayLike, retained: int, *, q: float, p: float = 2.0) -> float:
    """Bound the best k-term error of w by its ℓq quasi-norm with the least constant for its number of non-zeros.

        σ_k(w)_p ≤ max_{k<m≤n} (m − k)^(1/p) m^(−1/q) · ‖w‖_q        n = number of non-zero entries ≤ d

    Never above ``stechkin_bound`` by more than rounding; much below it where k is near n. Sharp for every k and n: an
    equality for ``extremal_vector``. Scales with w; ignores order, signs and appended zeros. Rounded up; 0 for k ≥ n.

    Args:
        w: real vector, shape (d,), d ≥ 1, finite.
        retained: k, 0 ≤ k ≤ d: how many largest entries are kept.
        q: order of the quasi-norm, 0 < q < p.
        p: order in which the error is measured; 2 is the Euclidean norm.

    Returns:
        The bound, in the units of w.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: q outside (0, p), ``retained`` outside [0, d], or ``w`` not a finite vector.
        OverflowError: the bound exceeds float64.

    Reference: ours; proof in docs/theorems.md, ``stechkin-finite``.
    """
    return tightest_order(w, retained, (q,), p)[1]


def tightest_order(w: npt.ArrayLike, retained: int, orders: Sequence[float], p: float = 2.0) -> tuple[float, float]:
    """Return the order whose ``stechkin_bound_finite`` of the best k-term error is least, and that bound.

    The best order is often above 1: for Gaussian entries and p = 2 it is, unless nearly half of them are kept.

    Args:
        w: real vector, shape (d,), d ≥ 1, finite.
        retained: k, 0 ≤ k ≤ d.
        orders: the orders q to choose from, each 0 < q < p.
        p: order in which the error is measured.

    Returns:
        The order, the first of several equally good ones, and the bound.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: no orders, one outside (0, p), ``retained`` outside [0, d], or ``w`` not a finite vector.
        OverflowError: all bounds exceed float64.

    Reference: ours, the least of ``stechkin-finite`` over q.
    """
    vector = finite_array(w, "w", ndim=1)
    k = count(retained, "retained", low=0, high=vector.size)
    best, bounds = tightest_bounds(vector, [k], orders, p)
    if np.isinf(bounds[0]):
        raise OverflowError(f"The bound exceeds float64 for q={best[0]:g}. Choose a larger q, or scale w down.")
    return float(best[0]), float(bounds[0])


def tightest_bounds(
    w: npt.ArrayLike, retained: npt.ArrayLike, orders: Sequence[float], p: float = 2.0
) -> tuple[Array, Array]:
    """Return ``tightest_order`` for many counts at once: w is summed once per order.

    Args:
        w: real vector, shape (d,), d ≥ 1, finite.
        retained: counts k, shape (n,), each 0 ≤ k ≤ d.
        orders: the orders q to choose from, each 0 < q < p.
        p: order in which the errors are measured.

    Returns:
        Orders and bounds, shapes (n,): the best order for every count, and its bound; infinite where every bound
        exceeds float64.

    Raises:
        TypeError: an argument is not numeric, or counts that are not whole numbers.
        ValueError: no orders, one outside (0, p), a count outside [0, d], or ``w`` not a finite vector.

    Reference: ours, the least of ``stechkin-finite`` over q.
    """
    sums = power_sums(finite_array(w, "w", ndim=1), _orders_below(orders, p))
    k, nonzeros = _counts(retained, int(sums.size)), int(sums.nonzeros)
    logs = [_log_quasinorm_up(sums, q) for q in sums.sums]
    return tightest_bounds_from_norms(logs, max(nonzeros, 1), np.minimum(k, nonzeros), list(sums.sums), p)


def tightest_bounds_from_norms(
    log_quasinorms: npt.ArrayLike, size: int, retained: npt.ArrayLike, orders: Sequence[float], p: float = 2.0
) -> tuple[Array, Array]:
    """Return ``tightest_bounds`` of a vector of which only quasi-norms are known.

    For vectors too large to hold: ``MagnitudeHistogram`` encloses log ‖w‖_q of any order in one pass; pass the upper
    ends, and its number of non-zeros as the size.

    Args:
        log_quasinorms: log ‖w‖_q or more for every order, shape (r,); −∞ for the zero vector.
        size: d ≥ 1, or fewer: the number of non-zero entries, at least 1.
        retained: counts k, shape (n,), each 0 ≤ k ≤ ``size``.
        orders: the orders q, each 0 < q < p, r of them.
        p: order in which the errors are measured.

    Returns:
        Orders and bounds, shapes (n,), as ``tightest_bounds``.

    Raises:
        TypeError: an argument is not numeric, or counts that are not whole numbers.
        ValueError: no orders, one outside (0, p), as many quasi-norms as orders not given, one that is NaN or ∞, or a
            count outside [0, size].

    Reference: ours, the least of ``stechkin-finite`` over q.
    """
    orders = _orders_below(orders, p)
    d = count(size, "size", low=1, high=_GREATEST_SIZE)
    k = _counts(retained, d)
    logs = np.asarray(log_quasinorms, dtype=np.float64)
    if logs.shape != (len(orders),):
        raise ValueError(f"log_quasinorms has shape {logs.shape}, expected one for each of the {len(orders)} orders.")
    if np.isnan(logs).any() or np.isposinf(logs).any():
        raise ValueError("log_quasinorms holds NaN or infinity. Pass logarithms of quasi-norms.")
    best, bounds = np.full(k.size, orders[0]), np.full(k.size, np.inf)
    for q, log_norm in zip(orders, logs, strict=True):
        log_bound = _log_finite_constant(q, p, k, d) + log_norm
        # Every rounding is relative to one of these terms: two logarithms, their quotients, two sums, exp.
        units = 12 * ((1 / p + 1 / q) * math.log(d) + (abs(log_norm) if log_norm > -np.inf else 0.0) + 1)
        with np.errstate(over="ignore"):
            found = np.where(np.isneginf(log_bound), 0.0, outward(np.exp(log_bound), log_error(units)))
        is_less = found < bounds
        best[is_less], bounds[is_less] = q, found[is_less]
    return best, bounds


def _log_quasinorm_up(sums: PowerSums, q: float) -> float:
    # The sum is off by (size + 8)u relatively; its logarithm and the multiple of log 2 by a few u of their own sizes.
    size, exponent = int(sums.size), abs(int(sums.exponent))
    units = (size + 16) / q + 12 * (math.log(2 * size) / q + exponent + 1)
    return float(sums.log_quasinorm(q)) + 1.01 * UNIT_ROUNDOFF * units


def _orders_below(orders: Sequence[float], p: float) -> list[float]:
    if len(orders) == 0:
        raise ValueError("orders is empty. Pass at least one order q with 0 < q < p.")
    return [rising_orders(q, p)[0] for q in orders]


def _counts(retained: npt.ArrayLike, size: int) -> Indices:
    k = np.asarray(retained)
    if k.size and k.dtype.kind not in "iu":
        raise TypeError(f"retained must be an array of whole numbers, got dtype {k.dtype}.")
    if k.ndim != 1:
        raise ValueError(f"retained has {k.ndim} dimensions, expected 1.")
    outside = k[(k < 0) | (k > size)]
    if outside.size:
        raise ValueError(f"retained holds {outside[0]}, outside [0, {size}]. Choose 0 <= retained <= {size}.")
    return k.astype(np.intp)


def stechkin_bound_weak(w: npt.ArrayLike, retained: int, *, q: float, p: float = 2.0) -> float:
    """Bound the best k-term error of w by its weak ℓq quasi-norm, for which a decay of the entries is enough.

        σ_k(w)_p ≤ (q/(p − q))^(1/p) · k^(1/p − 1/q) · ‖w‖_{q,∞}        ‖w‖_{q,∞} = max_i i^(1/q)·|w|_(i)

    Sharp: the power law i^(−1/q) comes arbitrarily close as k and d/k grow. Scales with w; ignores order, signs and
    appended zeros. Rounded up; 0 for the zero vector.

    Args:
        w: real vector, shape (d,), d ≥ 1, finite.
        retained: k, 1 ≤ k ≤ d: how many largest entries are kept.
        q: order of the weak quasi-norm, 0 < q < p.
        p: order in which the error is measured; 2 is the Euclidean norm.

    Returns:
        The bound, in the units of w.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: q outside (0, p), ``retained`` outside [1, d], or ``w`` not a finite vector.
        OverflowError: the bound exceeds float64.

    Reference: classical; compare Foucart & Rauhut 2013, section 2.1. Proof in docs/theorems.md.
    """
    vector = finite_array(w, "w", ndim=1)
    q, p = rising_orders(q, p)
    k = count(retained, "retained", low=1, high=vector.size)
    log_norm, units = _log_weak_quasinorm(vector, q)
    log_constant, log_k = math.log(q / (p - q)) / p, math.log(k)
    units += 12 * (abs(log_constant) + (1 / p + 1 / q) * log_k + 1 / p + 1)
    return _exp_up(log_constant + (1 / p - 1 / q) * log_k + log_norm, units, q)


def stechkin_bound_weak_finite(w: npt.ArrayLike, retained: int, *, q: float, p: float = 2.0) -> float:
    """Bound the best k-term error of w by its weak ℓq quasi-norm with the least constant for its non-zeros.

        σ_k(w)_p ≤ (Σ_{k<i≤n} i^(−p/q))^(1/p) · ‖w‖_{q,∞}        n = number of non-zero entries ≤ d

    Sharp for every k and n: an equality for the power law i^(−1/q). Scales with w; ignores order, signs and appended
    zeros. Rounded up; 0 for k ≥ n.

    Args:
        w: real vector, shape (d,), d ≥ 1, finite.
        retained: k, 0 ≤ k ≤ d: how many largest entries are kept.
        q: order of the weak quasi-norm, 0 < q < p.
        p: order in which the error is measured; 2 is the Euclidean norm.

    Returns:
        The bound, in the units of w.

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: q outside (0, p), ``retained`` outside [0, d], or ``w`` not a finite vector.
        OverflowError: the bound exceeds float64.

    Reference: ours; proof in docs/theorems.md, ``stechkin-weak-finite``.
    """
    vector = finite_array(w, "w", ndim=1)
    q, p = rising_orders(q, p)
    k = count(retained, "retained", low=0, high=vector.size)
    nonzeros = int(np.count_nonzero(vector))
    if k >= nonzeros:
        return 0.0
    log_norm, units = _log_weak_quasinorm(vector, q)
    # Relative to its first term the sum neither overflows nor underflows.
    terms = ((k + 1) / np.arange(k + 1, nonzeros + 1)) ** (p / q)
    log_first = math.log(k + 1) / q
    # A term is off by p/q times the rounding of its base, and by its exponent's times its logarithm, at most 750.
    units += (terms.size + p / q + 800) / p + 12 * (math.log(terms.size) / p + log_first + 1)
    return _exp_up(math.log(terms.sum()) / p - log_first + log_norm, units, q)


def _log_weak_quasinorm(vector: Array, q: float) -> tuple[float, float]:
    """Return log ‖w‖_{q,∞}, −∞ for the zero vector, and its error in units of roundoff."""
    magnitude = np.abs(vector[vector != 0])
    if not magnitude.size:
        return -math.inf, 0.0
    logs, ranks = -np.sort(-np.log(magnitude)), np.log(np.arange(1, magnitude.size + 1)) / q
    return float((logs + ranks).max()), 12 * float(np.abs(logs).max() + ranks[-1])


def _exp_up(log_bound: float, units: float, q: float) -> float:
    if log_bound == -math.inf:
        return 0.0
    if log_bound > 709:
        raise OverflowError(f"The bound exceeds float64 for q={q:g} (its natural log is {log_bound:.6g}).")
    return float(outward(math.exp(log_bound), log_error(units)))


def extremal_vector(retained: int, size: int, *, q: float, p: float = 2.0) -> Array:
    """Return the vector that attains ``stechkin_bound_finite`` for its k: equal entries, as many as the maximum says.

        w = (1, …, 1, 0, …, 0) with m ones        m = argmax_{k<m≤d} (m − k)^(1/p) m^(−1/q)

    It comes close to ``stechkin_bound`` too when k and d/k are large.

    Args:
        retained: k, 0 ≤ k < d.
        size: d.
        q: order of the quasi-norm, 0 < q < p.
        p: order in which the error is measured.

    Returns:
        The vector, shape (d,).

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: not 0 < q < p, ``size`` < 1, or ``retained`` outside [0, d − 1].

    Reference: ours; proof in docs/theorems.md, ``stechkin-finite``.
    """
    q, p = rising_orders(q, p)
    d = count(size, "size", low=1, high=_GREATEST_SIZE)
    k = count(retained, "retained", low=0, high=d - 1)
    return np.asarray((np.arange(d) < _peak(q, p, np.array([k]), d)[0]).astype(np.float64))


def extremal_vector_weak(size: int, *, q: float) -> Array:
    """Return the power law i^(−1/q), which attains ``stechkin_bound_weak_finite`` for every k and p at once.

    Args:
        size: d ≥ 1.
        q: order of the weak quasi-norm, 0 < q < ∞.

    Returns:
        The vector, shape (d,), falling; entries below float64 are 0 (very small q).

    Raises:
        TypeError: an argument is not a number of its kind.
        ValueError: ``q`` ≤ 0, or ``size`` < 1.

    Reference: by definition of the weak quasi-norm.
    """
    q = positive_order(q)
    return np.asarray(np.arange(1.0, count(size, "size", low=1, high=_GREATEST_SIZE) + 1) ** (-1 / q))


def retained_exact(w: npt.ArrayLike, tol: float, *, p: float = 2.0) -> int:
    """Return the fewest entries of w whose removal of all others stays within a relative tolerance.

        min{k : σ_k(w)_p ≤ tol·‖w‖_p}

    Ignores scale, order and signs. 0 for the zero vector.

    Args:
        w: real vector, shape (d,), finite.
        tol: relative tolerance, 0 ≤ tol ≤ 1.
        p: order in which the error is measured, 0 < p < ∞.

    Returns:
        The count, 0 ≤ k ≤ d.

    Raises:
        TypeError: an argument is not a real number.
        ValueError: ``tol`` outside [0, 1], ``p`` ≤ 0, or ``w`` not a finite vector.
        OverflowError: ‖w‖_p exceeds float64.

    Reference: by definition; one sort.
    """
    tolerance = real_number(tol, "tol")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tol={tolerance:g} is outside [0, 1]. A relative tolerance is a share of ‖w‖_p.")
    errors = best_term_errors(w, p)
    # errors fall with k, so the first that meets the tolerance is the count of those that do not.
    return int(np.count_nonzero(errors > tolerance * errors[0]))


def retained_necessary(w: npt.ArrayLike, ratio: float, *, p: float, q: float) -> float:
    """Bound from below how many entries must be kept for a given ratio of removed to kept p-mass.

        Σ_removed |w|^p ≤ η·Σ_kept |w|^p   ⇒   kept ≥ N_{p,q}(w)·(1 + η)^(−q/(q−p))

    Necessary, not sufficient: keeping that many need not achieve η. Equality for equal magnitudes at η = 0.

    Args:
        w: real vector, shape (d,), d ≥ 1, finite.
        ratio: η ≥ 0, removed p-mass ÷ kept p-mass.
        p: the lower order, 0 < p < q.
        q: the upper order, finite.

    Returns:
        A lower bound on the count, in [0, d]; rounded down in the last digits so that it stays one. 0 where p and q
        are so nearly equal that rounding leaves nothing.

    Raises:
        TypeError: an argument is not a real number.
        ValueError: η < 0, not 0 < p < q, or ``w`` not a finite vector.

    Reference: Diao et al. 2023 (arXiv 2302.05601), Theorem 2.
    """
    vector = finite_array(w, "w", ndim=1)
    p, q = rising_orders(p, q, ("p", "q"))
    eta = real_number(ratio, "ratio")
    if eta < 0:
        raise ValueError(f"ratio={eta:g} is negative. It is removed mass divided by kept mass.")
    share: float = (1 + eta) ** (-q / (q - p))
    if share < np.finfo(np.float64).tiny:  # subnormal, hence inaccurate; 0 is a lower bound too
        share = 0.0
    return _effective_count(vector, p, q) * share / (1 + _count_error(vector.size, p, q))


def retained_sufficient(w: npt.ArrayLike, tol: float, *, p: float, q: float) -> float:
    """Return a count that is enough for a relative tail, from the measures of w alone.

        k ≥ N_{p,q}(w)·λ^(p/(q−p))·(1 − λ)·tol^(−pq/(q−p)),  λ = p/q   ⇒   σ_k(w)_q ≤ tol·‖w‖_q

    The companion of ``retained_necessary``: the same effective count, for the upper order. May exceed d, where it
    says nothing.

    Args:
        w: real vector, shape (d,), d ≥ 1, finite.
        tol: relative tolerance, 0 < tol < 1.
        p: the lower order, 0 < p < q.
        q: the upper order, in which the tail is measured, finite.

    Returns:
        The count as a real number, rounded up in the last digits; keep at least its ceiling. Infinite where that is
        beyond float64, or p and q are so nearly equal that rounding leaves nothing.

    Raises:
        TypeError: an argument is not a real number.
        ValueError: ``tol`` outside (0, 1), not 0 < p < q, or ``w`` not a finite vector.

    Reference: ours, from ``stechkin_bound`` solved for k.
    """
    vector = finite_array(w, "w", ndim=1)
    p, q = rising_orders(p, q, ("p", "q"))
    tolerance = open_fraction(tol, "tol")
    share = p / q
    log_factor = (p * math.log(share) - p * q * math.log(tolerance)) / (q - p) + math.log1p(-share)
    error = _count_error(vector.size, p, q)
    if log_factor > 690 or error > 1e15:
        return math.inf if vector.any() else 0.0
    return float(outward(_effective_count(vector, p, q) * math.exp(log_factor), error))


def _effective_count(vector: Array, p: float, q: float) -> float:
    # Not the measure, which refuses orders that are nearly equal: here the error is taken into account.
    return float(power_sums(vector, (p, q)).effective_count(p, q))


def _count_error(size: int, p: float, q: float) -> float:
    # N = exp((q·log S_p − p·log S_q)/(q − p)): sums of `size` powers, each off by (size + 8)u relatively, their
    # logarithms at most log(size) + order in size; then the factors around N, whose inner roundings are amplified
    # by at most (p + q)/(q − p) and whose logarithms stay below 750.
    in_sums = (size + 8) * (p + q)
    in_logarithms = 8 * (q * (math.log(size) + p) + p * (math.log(size) + q))
    units = (in_sums + in_logarithms + 8 * (p + q)) / (q - p) + 8 * math.log(size) + 4 * 750
    return log_error(units) if units < 2.0**58 else math.inf
