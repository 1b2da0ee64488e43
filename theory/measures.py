"""How sparse a vector is, softly: the ℓq quasi-norm and the measures built on it."""

from __future__ import annotations

import numpy.typing as npt

from ellq.theory.arguments import Array, order_below_one, positive_order, rising_orders
from ellq.theory.power_sums import power_sums


def lq_quasinorm(w: npt.ArrayLike, q: float, axis: int = -1) -> Array:
    """Return the ℓq quasi-norm of every vector along an axis.

        ‖w‖_q = (Σ|w_i|^q)^(1/q)

    A norm for q ≥ 1, a quasi-norm for 0 < q < 1: there ‖v + w‖_q ≤ 2^(1/q−1)(‖v‖_q + ‖w‖_q). Scales with w;
    ignores order, signs and appended zeros; does not increase with q. Over a ball ‖w‖_q ≤ t the vector is
    *softly sparse*: few entries carry most of it, none need vanish.

    Args:
        w: real array with d ≥ 1 entries along ``axis``, finite.
        q: order, 0 < q < ∞.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, in the units of w; 0 exactly where all entries are 0.

    Raises:
        TypeError: ``q`` is not a real number, or ``w`` is not numeric.
        ValueError: ``q`` ≤ 0, an empty axis, or a NaN or infinite entry.
        OverflowError: ‖w‖_q itself exceeds float64 (very small q); ``PowerSums.log_quasinorm`` still holds it.

    Reference: Yang et al. 2022 (arXiv 2206.05604), soft sparsity; Foucart & Rauhut 2013, section 2.1.
    """
    q = positive_order(q)
    return power_sums(w, (q,), axis=axis).quasinorm(q)


def sparsity_index(w: npt.ArrayLike, q: float, axis: int = -1) -> Array:
    """Return the paper's sparsity index of every vector along an axis; larger means sparser.

        SI_q(w) = ‖w‖_1 / ‖w‖_q        d^(1−1/q) ≤ SI_q ≤ 1

    1 for a vector with one non-zero entry, d^(1−1/q) for one of equal magnitudes. Ignores scale, order, signs and
    appended zeros. NaN for the zero vector, where it is undefined.

    Args:
        w: real array with d ≥ 1 entries along ``axis``, finite.
        q: order, 0 < q < 1.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [d^(1−1/q), 1] or NaN.

    Raises:
        TypeError: ``q`` is not a real number, or ``w`` is not numeric.
        ValueError: ``q`` outside (0, 1), an empty axis, or a NaN or infinite entry.

    Reference: Yang et al. 2022 (arXiv 2206.05604).
    """
    q = order_below_one(q)
    return power_sums(w, (q, 1.0), axis=axis).sparsity_index(q)


def pq_index(w: npt.ArrayLike, p: float, q: float, axis: int = -1) -> Array:
    """Return the PQ index of every vector along an axis; larger means sparser.

        I_{p,q}(w) = 1 − d^(1/q − 1/p) ‖w‖_p / ‖w‖_q        0 ≤ I ≤ 1 − d^(1/q − 1/p)

    0 for equal magnitudes, the maximum for one non-zero entry. Ignores scale, order, signs and replication of the
    whole vector; rises when a zero is appended. NaN for the zero vector. For p ≤ 1 ≤ q moving magnitude from a
    larger to a smaller entry lowers it; outside that range it may not.

    Args:
        w: real array with d ≥ 1 entries along ``axis``, finite.
        p: the lower order, 0 < p < q.
        q: the upper order, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [0, 1) or NaN.

    Raises:
        TypeError: an order is not a real number, or ``w`` is not numeric.
        ValueError: not 0 < p < q, an empty axis, or a NaN or infinite entry.

    Reference: Diao et al. 2023 (arXiv 2302.05601), Definition of the PQ index.
    """
    p, q = rising_orders(p, q, ("p", "q"))
    return power_sums(w, (p, q), axis=axis).pq_index(p, q)


def effective_count(w: npt.ArrayLike, p: float, q: float, axis: int = -1) -> Array:
    """Return how many equal magnitudes would be as spread out as each vector along an axis.

        N_{p,q}(w) = (‖w‖_p / ‖w‖_q)^(pq/(q−p)) = d (1 − I_{p,q})^(pq/(q−p))        1 ≤ N ≤ number of non-zeros

    The Hill number of order q/p of |w_i|^p; N_{1,2} is the participation ratio. Ignores scale, order, signs and
    appended zeros. 0 for the zero vector.

    Args:
        w: real array with d ≥ 1 entries along ``axis``, finite.
        p: the lower order, 0 < p < q.
        q: the upper order, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [1, d], or 0.

    Raises:
        TypeError: an order is not a real number, or ``w`` is not numeric.
        ValueError: not 0 < p < q, an empty axis, or a NaN or infinite entry.

    Reference: ours, from the bound of Diao et al. 2023 (arXiv 2302.05601, Theorem 2) at η = 0.
    """
    p, q = rising_orders(p, q, ("p", "q"))
    return power_sums(w, (p, q), axis=axis).effective_count(p, q)
