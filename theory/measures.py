"""How sparse a vector is, softly: the ℓq quasi-norm, the measures built on it, and those they are compared with.

Every measure takes NumPy arrays, nested lists and torch tensors of any real dtype, measures each vector along an axis
in float64, and answers an array with an array and a tensor with a float64 tensor on its device. Vectors are divided by
a power of two near their largest entry first, so entries from 1e-300 to 1e300 neither overflow nor underflow. Which
measure meets which of the six sparsity criteria is in ``axioms`` and ``docs/measures.md``.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import (
    Array,
    count,
    order_below_one,
    order_or_infinity,
    positive_order,
    real_number,
    rising_orders,
    tensor_for_tensor,
)
from ellq.theory.power_sums import power_sums, scaled_magnitudes, scaled_root
from ellq.theory.rounding import log_error, norm_error

_NEAREST = 5e-10  # orders nearer to each other, relatively, leave nothing but rounding of the effective count


@tensor_for_tensor
def lq_quasinorm(w: npt.ArrayLike, q: float, axis: int = -1) -> Array:
    """Return the ℓq quasi-norm of every vector along an axis.

        ‖w‖_q = (Σ|w_i|^q)^(1/q)        ‖w‖_∞ = max|w_i|

    A norm for q ≥ 1, a quasi-norm for 0 < q < 1: there ‖v + w‖_q ≤ 2^(1/q−1)(‖v‖_q + ‖w‖_q). Scales with w;
    ignores order, signs and appended zeros; m copies of w have m^(1/q) times the quasi-norm; does not increase with
    q; rises with every magnitude. Over a ball ‖w‖_q ≤ t the vector is *softly sparse*, see ``is_softly_sparse``.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        q: order, 0 < q ≤ ∞.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, in the units of w; 0 exactly where all entries are 0.

    Raises:
        TypeError: ``q`` is not a real number, or ``w`` is not numeric.
        ValueError: ``q`` ≤ 0, an empty axis, or a NaN or infinite entry.
        OverflowError: ‖w‖_q itself exceeds float64 (very small q); ``PowerSums.log_quasinorm`` still holds it.

    Reference: Yang et al. 2022 (arXiv 2206.05604), soft sparsity; Foucart & Rauhut 2013, section 2.1.
    """
    q = order_or_infinity(q)
    return power_sums(w, () if q == math.inf else (q,), axis=axis).quasinorm(q)


@tensor_for_tensor
def l0_count(w: npt.ArrayLike, axis: int = -1) -> Array:
    """Return how many entries of every vector along an axis are not zero.

        ‖w‖_0 = #{i : w_i ≠ 0}        0 ≤ ‖w‖_0 ≤ d

    The limit of Σ|w_i|^q as q → 0. Ignores scale, order, signs and appended zeros; m copies of w have m times the
    count.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, whole numbers in [0, d].

    Raises:
        TypeError: ``w`` is not numeric.
        ValueError: an empty axis, or a NaN or infinite entry.

    Reference: Foucart & Rauhut 2013, section 2.1.
    """
    return power_sums(w, (), axis=axis).nonzeros.astype(np.float64)


@tensor_for_tensor
def weak_quasinorm(w: npt.ArrayLike, q: float, axis: int = -1) -> Array:
    """Return the weak ℓq quasi-norm of every vector along an axis: the least power law above its sorted entries.

        ‖w‖_{q,∞} = max_i i^(1/q)·|w|_(i) = min{t : |w|_(i) ≤ t·i^(−1/q) for all i}        |w|_(1) ≥ |w|_(2) ≥ …

    max|w_i| ≤ ‖w‖_{q,∞} ≤ ‖w‖_q, equal for vectors of equal magnitudes. Scales with w; ignores order, signs and
    appended zeros; m copies of w have m^(1/q) times the quasi-norm; does not increase with q nor fall with a
    magnitude.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        q: order, 0 < q ≤ ∞.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, in the units of w; 0 exactly where all entries are 0.

    Raises:
        TypeError: ``q`` is not a real number, or ``w`` is not numeric.
        ValueError: ``q`` ≤ 0, an empty axis, or a NaN or infinite entry.
        OverflowError: ‖w‖_{q,∞} exceeds float64 (very small q).

    Reference: Foucart & Rauhut 2013, Definition 2.10.
    """
    q = order_or_infinity(q)
    vectors = scaled_magnitudes(w, axis)
    if q == math.inf:
        return vectors.largest
    falling = -np.sort(-vectors.powers(q), axis=-1)
    peaks = falling * np.arange(1, falling.shape[-1] + 1)
    norm = scaled_root(peaks.max(axis=-1), q, vectors.exponent)
    # Where the peak is the first entry it is the norm; the two powers would round it.
    norm = np.where(peaks.argmax(axis=-1) == 0, vectors.largest, norm)
    if np.isinf(norm).any():
        raise OverflowError(f"The weak quasi-norm exceeds float64 for q={q:g}. Choose a larger q, or scale w down.")
    return norm


@tensor_for_tensor
def is_softly_sparse(w: npt.ArrayLike, radius: float, q: float, axis: int = -1) -> npt.NDArray[np.bool_]:
    """Return whether every vector along an axis is softly sparse: in the ℓq ball of a radius.

        ‖w‖_q ≤ t        0 < q ≤ 1

    Few entries of such a vector carry most of it, none need vanish: its k-th largest is at most t·k^(−1/q), and its
    best k-term error falls as a power of k (``stechkin_bound``). Ignores order, signs and appended zeros;
    w with radius t and c·w with radius |c|·t agree; membership for q implies it for every larger order.

    Never False for a vector of the ball. True for one outside only if rounding cannot tell: if its quasi-norm exceeds
    t by a relative error of at most about 4·``norm_error(d, q)``, 5e-13 for d = 1000 and q = 1.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        radius: t ≥ 0, finite, in the units of w.
        q: order, 0 < q ≤ 1.
        axis: the axis that is a vector.

    Returns:
        Boolean array of ``w``'s shape without ``axis``.

    Raises:
        TypeError: ``q`` or ``radius`` is not a real number, or ``w`` is not numeric.
        ValueError: ``q`` outside (0, 1], ``radius`` negative or infinite, an empty axis, or a NaN or infinite entry.

    Reference: Gao, Ing & Yang 2013, p. 48, remark 2; Yang et al. 2022 (arXiv 2206.05604).
    """
    q = positive_order(q)
    if q > 1:
        raise ValueError(f"q={q:g} is above 1. Soft sparsity needs 0 < q <= 1, for example 0.5.")
    t = real_number(radius, "radius")
    if not 0 <= t < math.inf:
        raise ValueError(f"radius={t:g} is negative or infinite. Pass a finite value >= 0.")
    sums = power_sums(w, (q,), axis=axis)
    if not t:
        return np.asarray(sums.nonzeros == 0)
    # In logarithms, since ‖w‖_q may exceed float64. Each is off by 8u of itself, the one of the norm by its terms' too.
    log_norm, log_t = sums.log_quasinorm(q), math.log(t)
    in_logs = 8 * (abs(log_t) + np.where(sums.nonzeros > 0, np.abs(log_norm) + 2 * abs(sums.exponent), 0.0))
    slack = log_error(1.0) * in_logs + 4 * norm_error(int(sums.size.max(initial=1)), q)
    return np.asarray(log_norm <= log_t + slack)


@tensor_for_tensor
def sparsity_index(w: npt.ArrayLike, q: float, axis: int = -1) -> Array:
    """Return the paper's sparsity index of every vector along an axis; larger means sparser.

        SI_q(w) = ‖w‖_1 / ‖w‖_q        d^(1−1/q) ≤ SI_q ≤ 1

    1 for a vector with one non-zero entry, d^(1−1/q) for one of equal magnitudes. Ignores scale, order, signs and
    appended zeros; m copies of w have m^(1−1/q) times the index. Does not fall as q grows. NaN for the zero vector,
    where it is undefined; 0 where it is below float64.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
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


@tensor_for_tensor
def normalised_sparsity_index(w: npt.ArrayLike, q: float, axis: int = -1) -> Array:
    """Return the sparsity index of every vector along an axis, freed of its length; larger means sparser.

        d^(1/q−1)·SI_q(w) = mean|w| / (mean|w|^q)^(1/q) = 1/(1 − I_{q,1})        1 ≤ … ≤ d^(1/q−1)

    1 for equal magnitudes, d^(1/q−1) for one non-zero entry. Ignores scale, order, signs and replication of the whole
    vector; z zeros appended to d entries multiply it by (1 + z/d)^(1/q−1). Does not rise with q. NaN for the zero
    vector.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        q: order, 0 < q < 1.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [1, d^(1/q−1)] or NaN.

    Raises:
        TypeError: ``q`` is not a real number, or ``w`` is not numeric.
        ValueError: ``q`` outside (0, 1), an empty axis, or a NaN or infinite entry.
        OverflowError: the index exceeds float64 (very small q); ``pq_index(w, q, 1)`` says the same below 1.

    Reference: Yang et al. 2022 (arXiv 2206.05604), as in the authors' code from April 2022 on.
    """
    q = order_below_one(q)
    index = power_sums(w, (q, 1.0), axis=axis).normalised_sparsity_index(q)
    if np.isinf(index).any():
        raise OverflowError(f"The index exceeds float64 for q={q:g}. Choose a larger q, or use pq_index(w, q, 1).")
    return index


@tensor_for_tensor
def pq_index(w: npt.ArrayLike, p: float, q: float, axis: int = -1) -> Array:
    """Return the PQ index of every vector along an axis; larger means sparser.

        I_{p,q}(w) = 1 − d^(1/q − 1/p) ‖w‖_p / ‖w‖_q        0 ≤ I ≤ 1 − d^(1/q − 1/p)

    0 for equal magnitudes, the maximum for one non-zero entry. Ignores scale, order, signs and replication of the
    whole vector; rises when a zero is appended; does not fall as q grows or p shrinks. NaN for the zero vector. For
    p ≤ 1 ≤ q moving magnitude from a larger to a smaller entry lowers it; for other orders it may not
    (``docs/errata.md``).

    Near 0 the error is absolute, ``norm_error(d, p) + norm_error(d, q)`` at most: magnitudes that differ relatively by
    less than about 1e-8 measure as equal. 1 − I, which matters for very sparse vectors, is ``PowerSums.evenness``,
    accurate relative to itself.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        p: the lower order, 0 < p < q.
        q: the upper order, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [0, 1) or NaN; 1 where 1 − I is below 2⁻⁵³.

    Raises:
        TypeError: an order is not a real number, or ``w`` is not numeric.
        ValueError: not 0 < p < q, an empty axis, or a NaN or infinite entry.

    Reference: Diao et al. 2023 (arXiv 2302.05601), Definition of the PQ index. Minus 1, the pq-mean of Hurley &
    Rickard 2009.
    """
    p, q = rising_orders(p, q, ("p", "q"))
    return power_sums(w, (p, q), axis=axis).pq_index(p, q)


@tensor_for_tensor
def effective_count(w: npt.ArrayLike, p: float, q: float, axis: int = -1) -> Array:
    """Return how many equal magnitudes would be as spread out as each vector along an axis.

        N_{p,q}(w) = (‖w‖_p / ‖w‖_q)^(pq/(q−p)) = d (1 − I_{p,q})^(pq/(q−p))        1 ≤ N ≤ number of non-zeros

    The Hill number of order q/p of |w_i|^p; N_{1,2} is the participation ratio, also called numerical sparsity.
    Smaller means sparser. Ignores scale, order, signs and appended zeros; m copies of w have m times the count.
    Does not increase with p nor with q, up to its relative error of at most some (d + 16)·2⁻⁵³·(p + q)/(q − p). 0 for
    the zero vector.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        p: the lower order, 0 < p < q.
        q: the upper order, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [1, d], or 0.

    Raises:
        TypeError: an order is not a real number, or ``w`` is not numeric.
        ValueError: not 0 < p < q, orders so nearly equal that rounding decides, an empty axis, or a NaN or infinite
            entry.

    Reference: ours, from the bound of Diao et al. 2023 (arXiv 2302.05601, Theorem 2) at η = 0.
    """
    p, q = rising_orders(p, q, ("p", "q"))
    if q - p < _NEAREST * q:
        raise ValueError(
            f"p={p:.17g} and q={q:.17g} are too near each other for float64. Choose q - p >= {_NEAREST:g}·q, or take"
            " entropy_effective_count, the limit at 1."
        )
    return power_sums(w, (p, q), axis=axis).effective_count(p, q)


@tensor_for_tensor
def numerical_sparsity(w: npt.ArrayLike, axis: int = -1) -> Array:
    """Return the numerical sparsity of every vector along an axis, a smooth count of its non-zeros.

        (‖w‖_1 / ‖w‖_2)² = N_{1,2}(w)        1 ≤ … ≤ number of non-zeros

    ``effective_count`` for p = 1, q = 2, with its invariances: smaller means sparser; ignores scale, order, signs and
    appended zeros; m copies of w have m times the count. 0 for the zero vector.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [1, d], or 0.

    Raises:
        TypeError: ``w`` is not numeric.
        ValueError: an empty axis, or a NaN or infinite entry.

    Reference: Lopes 2013 (arXiv 1204.4227).
    """
    return power_sums(w, (1.0, 2.0), axis=axis).effective_count(1.0, 2.0)


@tensor_for_tensor
def entropy_effective_count(w: npt.ArrayLike, axis: int = -1) -> Array:
    """Return the exponential of the entropy of every vector along an axis, its magnitudes taken as shares.

        exp(−Σ π_i log π_i),   π_i = |w_i|/‖w‖_1        1 ≤ … ≤ number of non-zeros

    The Hill number of order 1 of |w_i|: the limit of N_{p,q} as p and q both tend to 1. Shares of |w_i|^p with another
    p are had by passing |w|^p. Smaller means sparser. Ignores scale, order, signs and appended zeros; m copies of w
    have m times the count. 0 for the zero vector.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [1, d], or 0.

    Raises:
        TypeError: ``w`` is not numeric.
        ValueError: an empty axis, or a NaN or infinite entry.

    Reference: Hill 1973, the diversity number of order 1.
    """
    vectors = scaled_magnitudes(w, axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = vectors.scaled / vectors.scaled.sum(axis=-1, keepdims=True)
        entropy = -np.where(shares > 0, shares * np.log(shares), 0.0).sum(axis=-1)
    nonzeros = np.count_nonzero(vectors.magnitude, axis=-1)
    return np.asarray(np.clip(np.exp(entropy), np.minimum(nonzeros, 1), nonzeros))


@tensor_for_tensor
def hoyer(w: npt.ArrayLike, axis: int = -1) -> Array:
    """Return Hoyer's sparseness of every vector along an axis; larger means sparser.

        (√d − ‖w‖_1/‖w‖_2) / (√d − 1) = I_{1,2}(w) / (1 − 1/√d)        0 ≤ … ≤ 1

    0 for equal magnitudes, 1 for one non-zero entry: the PQ index of orders 1 and 2, divided by its maximum. Ignores
    scale, order and signs; never rises when the whole vector is replicated, does not fall when a zero is appended. NaN
    for the zero vector and for d = 1, where it is undefined.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [0, 1] or NaN.

    Raises:
        TypeError: ``w`` is not numeric.
        ValueError: an empty axis, or a NaN or infinite entry.

    Reference: Hoyer 2004, section 3.1.
    """
    sums = power_sums(w, (1.0, 2.0), axis=axis)
    index = sums.pq_index(1.0, 2.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.minimum(index / (1 - 1 / np.sqrt(sums.size)), 1.0)
    return np.where(sums.size > 1, np.where(sums.nonzeros == 1, 1.0, share), np.nan)


@tensor_for_tensor
def gini(w: npt.ArrayLike, axis: int = -1) -> Array:
    """Return the Gini index of every vector along an axis; larger means sparser.

        G(w) = 1 − 2·Σ_i (|w|_[i]/‖w‖_1)·(d − i + ½)/d = Σ_{i,j} ||w_i| − |w_j|| / (2d·‖w‖_1)        0 ≤ G ≤ 1 − 1/d

    with |w|_[1] ≤ |w|_[2] ≤ … rising. 0 for equal magnitudes, the maximum for one non-zero entry. Ignores scale,
    order, signs and replication of the whole vector; rises when a zero is appended: m zeros beside d entries take
    1 − G to (1 − G)·d/(d + m). NaN for the zero vector. Accurate relative to itself, near 0 too.

    Args:
        w: real array or tensor with d ≥ 1 entries along ``axis``, finite.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in [0, 1 − 1/d] or NaN.

    Raises:
        TypeError: ``w`` is not numeric.
        ValueError: an empty axis, or a NaN or infinite entry.

    Reference: Hurley & Rickard 2009 (arXiv 0811.4706), section II.
    """
    rising = np.sort(scaled_magnitudes(w, axis).scaled, axis=-1)
    d = rising.shape[-1]
    # Σ (2i − d − 1)|w|_[i] with the i-th smallest and the i-th largest taken together: all terms are ≥ 0.
    half = d // 2
    gaps = rising[..., ::-1][..., :half] - rising[..., :half]
    spread = (gaps * (d + 1 - 2.0 * np.arange(1, half + 1))).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.minimum(spread / (d * rising.sum(axis=-1)), 1 - 1 / d))


@tensor_for_tensor
def tail_index(w: npt.ArrayLike, k: int, axis: int = -1) -> Array:
    """Return Hill's estimate of the tail index of every vector along an axis; smaller means heavier tails.

        α̂ = [ (1/k)·Σ_{i≤k} log(|w|_(i)/|w|_(k+1)) ]^(−1)        |w|_(1) ≥ |w|_(2) ≥ …,   0 < α̂ ≤ ∞

    If magnitudes exceed x with probability ~ x^(−α), α̂ estimates α with standard deviation about α/√k. Entries drawn
    so with α < 2 are compressible in the limit of large d: the best k-term error for a fixed share k/d tends to 0
    relative to ‖w‖_2. Ignores scale, order, signs and appended zeros; with m·k for k, replication of the whole
    vector too. Infinite where |w|_(1) = |w|_(k+1), ties that leave no tail; NaN where |w|_(k+1) = 0, since a tail
    needs a positive threshold. Ties elsewhere need no care.

    Args:
        w: real array or tensor with d ≥ 2 entries along ``axis``, finite.
        k: how many of the largest entries are the tail, 1 ≤ k ≤ d − 1; usually a few per cent of d. Few vary, many
            reach into the bulk.
        axis: the axis that is a vector.

    Returns:
        Array of ``w``'s shape without ``axis``, values in (0, ∞] or NaN.

    Raises:
        TypeError: ``k`` is not a whole number, or ``w`` is not numeric.
        ValueError: ``k`` outside [1, d − 1], an empty axis, or a NaN or infinite entry.

    Reference: Hill 1975; Amini, Unser & Marvasti 2011 and Gribonval, Cevher & Davies 2012 for compressibility.
    """
    magnitude = scaled_magnitudes(w, axis).magnitude
    d = magnitude.shape[-1]
    if d < 2:
        raise ValueError("w has one entry along the axis. A tail needs d >= 2: one entry above a threshold.")
    k = count(k, "k", low=1, high=d - 1)
    top = np.partition(magnitude, d - 1 - k, axis=-1)[..., d - 1 - k :]
    threshold, tail = top[..., :1], top[..., 1:]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        excess = (tail - threshold) / threshold  # log1p of it is accurate for near ties
        logs = np.where(np.isinf(excess), np.log(tail) - np.log(threshold), np.log1p(excess))
        return np.where(threshold[..., 0] > 0, 1 / logs.mean(axis=-1), np.nan)
