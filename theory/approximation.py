"""How well a few entries represent a vector: exact best k-term errors, their ℓq bounds, and the inverse questions."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import (
    Array,
    count,
    finite_array,
    open_fraction,
    positive_order,
    real_number,
    rising_orders,
)
from ellq.theory.measures import effective_count
from ellq.theory.power_sums import power_sums, scaled_root
from ellq.theory.rounding import log_error, outward


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
        A lower bound on the count, in [0, d]; rounded down in the last digits so that it stays one.

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
    return float(effective_count(vector, p, q)) * share / (1 + _count_error(vector.size, p, q))


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
        The count as a real number, rounded up in the last digits; keep at least its ceiling.

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
    bound = float(effective_count(vector, p, q)) * math.exp(min(log_factor, 700.0))
    return float(outward(bound, _count_error(vector.size, p, q)))


def _count_error(size: int, p: float, q: float) -> float:
    # N = exp((q·log S_p − p·log S_q)/(q − p)): sums of `size` powers, each off by (size + 8)u relatively, their
    # logarithms at most log(size) + order in size; then the factors around N, whose inner roundings are amplified
    # by at most (p + q)/(q − p) and whose logarithms stay below 750.
    in_sums = (size + 8) * (p + q)
    in_logarithms = 8 * (q * (math.log(size) + p) + p * (math.log(size) + q))
    return log_error((in_sums + in_logarithms + 8 * (p + q)) / (q - p) + 8 * math.log(size) + 4 * 750)
