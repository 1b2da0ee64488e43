"""What replacing the features of a hidden layer by a skeleton costs the net: from the samples to the population.

z are the features of a hidden layer (m of them, with a constant 1 appended where biases change), h_0 = Uz the net's
outputs and h_p those of the pruned net, which differ by Qz for some Q. R_ID = E‖h_p − h_0‖² = tr QΣQᵀ is the risk of
that change, Σ = E zzᵀ; its empirical counterpart has Σ̂ instead. The bounds for "all changes at once" hold for every Q,
also for one that was found on the same samples. Randomness: the samples, independent of one another and of the net.
Proofs: ``docs/theorems_skeletons.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

from ellq.theory.accumulators import Accumulator
from ellq.theory.arguments import Array, count, finite_array, nonnegative, open_fraction, real_number
from ellq.theory.concentration import (
    STAKES,
    at_least_one,
    factored,
    relative_shortfall,
    shortfall,
    shortfall_bernstein,
    shortfall_kurtosis,
    size_limit,
    sum_of_squares,
)
from ellq.theory.confidence import mean_upper_limit, share_upper_limit
from ellq.theory.id_bounds import frobenius_norm, spectral_norm, unit_scaled
from ellq.theory.input_moments import layer_errors
from ellq.theory.rounding import norm_error, outward, product_error, product_up


def risk_split(change_risk: float, dense_risk: float) -> float:
    """Bound the risk of the pruned net by those of the change and of the dense net.

        R_p ≤ R_ID + R_0 + 2√(R_ID·R_0) = (√R_ID + √R_0)²

    For squared loss, R_0 = E‖h_0 − y‖², whatever the labels y. Equality where h_p − h_0 is the same multiple of h_0 − y
    on every input. Holds as well for upper bounds of both. Rounded up.

    Args:
        change_risk: R_ID = E‖h_p − h_0‖², ≥ 0.
        dense_risk: R_0, ≥ 0, in the same units.

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a negative or infinite risk.

    Reference: Chee et al. 2021 (arXiv 2108.00065), form of the theorem; Cauchy–Schwarz.
    """
    change, dense = nonnegative(change_risk, "change_risk"), nonnegative(dense_risk, "dense_risk")
    if not change or not dense:
        return change + dense
    return float(outward(change + dense + 2 * (math.sqrt(change) * math.sqrt(dense)), product_error(4)))


def output_change(
    consumer: npt.ArrayLike,
    indices: npt.ArrayLike,
    weights: npt.ArrayLike,
    *,
    shift: npt.ArrayLike | None = None,
) -> Array:
    """Return Q with h_p − h_0 = Qz, for a pruned net that reads the skeleton with other weights.

        Q = W E_Jᵀ − U,  with the change of the biases as a last column where one is given

    For an interpolation matrix T the weights are W = UTᵀ and Q = U(TᵀE_Jᵀ − Id); a refit has its own.

    Args:
        consumer: U, shape (c, m), what reads the features before.
        indices: the skeleton J, shape (k,), without repeats.
        weights: W, shape (c, k), what reads the skeleton after.
        shift: change of the c biases, shape (c,); then z has a constant 1 as its last feature.

    Returns:
        Q, shape (c, m), or (c, m + 1) with a shift.

    Raises:
        TypeError: an argument is not numeric, or indices are not whole numbers.
        ValueError: shapes that do not fit, an index outside [0, m) or twice, or a NaN or infinite entry.

    Reference: by definition.
    """
    U, W = finite_array(consumer, "consumer", ndim=2), finite_array(weights, "weights", ndim=2)
    J = np.asarray(indices)
    if J.ndim != 1 or (J.size and J.dtype.kind not in "iu"):
        raise TypeError(f"indices must be a list of whole numbers, got {J.dtype} of shape {J.shape}.")
    J = J.astype(np.intp)
    if W.shape != (len(U), J.size):
        raise ValueError(
            f"weights has shape {W.shape}, expected {(len(U), J.size)}: consumer rows by skeleton columns."
        )
    if J.size and not 0 <= J.min() <= J.max() < U.shape[1]:
        raise ValueError(f"indices reach from {J.min()} to {J.max()}, outside the {U.shape[1]} columns of consumer.")
    if np.unique(J).size < J.size:
        raise ValueError("indices names a column twice. Name each once.")
    Q = -U
    Q[:, J] += W
    if shift is None:
        return Q
    bias = finite_array(shift, "shift", ndim=1)
    if bias.size != len(U):
        raise ValueError(f"shift has {bias.size} entries but consumer has {len(U)} rows.")
    return np.hstack([Q, bias[:, None]])


def feature_moments(accumulator: Accumulator, *, constant: bool = False) -> Array:
    """Return Σ̂, the second moments of accumulated features, as ``empirical_risk`` takes them.

    Args:
        accumulator: features fed to it, ``Gram`` or ``Tsqr``.
        constant: whether to append a feature that is always 1, for changes with a shift.

    Returns:
        Σ̂, shape (m, m), or (m + 1, m + 1) with the constant last.

    Raises:
        ValueError: the accumulator is empty.

    Reference: by definition.
    """
    moments = finite_array(accumulator.moments(centred=False)[0], "moments", ndim=2) / accumulator.samples
    if not constant:
        return moments
    mean = finite_array(accumulator.x_mean, "x_mean", ndim=1)[:, None]
    return np.block([[moments, mean], [mean.T, np.ones((1, 1))]])


def empirical_risk(changes: npt.ArrayLike, moments: npt.ArrayLike, *, entry_error: float = 0.0) -> float:
    """Return the mean squared change of the outputs over the samples, from their second moments alone.

        R̂_ID = tr QΣ̂Qᵀ = (1/n) Σ ‖Qz_i‖² ≤ ‖A − A_J T‖_2²·‖U‖_F²/n

    An equality: what is above it is rounding, as in ``layer_errors``. Rounded up.

    Args:
        changes: Q, shape (c, m), as of ``output_change``.
        moments: Σ̂, shape (m, m), as of ``feature_moments`` or ``second_moments``.
        entry_error: by how much entry (i, j) may be off, relative to √(Σ_ii Σ_jj): ``moment_error(n)`` for moments
            computed from n samples; 0 takes them as exact.

    Returns:
        The risk, summed over outputs, in their squared units.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: as ``layer_errors``.

    Reference: by definition.
    """
    return sum_of_squares(layer_errors(changes, moments, entry_error=entry_error))


def risk_pointwise(consumer: npt.ArrayLike, interpolation: npt.ArrayLike, radius: float) -> float:
    """Bound the squared change of the outputs on any one input, by the norm of the interpolation matrix.

        ‖h_p − h_0‖² ≤ B²·‖U‖_2²·max(‖T‖_2², 1)

    Replacing features by their skeleton, z ↦ TᵀE_Jᵀz, is an oblique projector, so Id − TᵀE_Jᵀ has its norm, ‖T‖_2.
    Equality for one consumer along the top left singular vector of that. Scales with B² and U². Rounded up.

    Args:
        consumer: U, shape (c, m).
        interpolation: T, shape (k, m), with T[:, J] = Id for the skeleton J; of a refit this is not so.
        radius: B ≥ 0, which no ‖z‖ can exceed.

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, ``radius`` < 0, or a NaN or infinite entry.

    Reference: ours; Ljance 1958, Szyld 2006 (doi 10.1007/s11075-006-9046-2) for the norm of a projector.
    """
    U, T = _fitting(consumer, interpolation)
    product = product_up(product_up(nonnegative(radius, "radius"), spectral_norm(U)), max(spectral_norm(T), 1.0))
    return product_up(product, product)


def risk_pointwise_published(consumer: npt.ArrayLike, interpolation: npt.ArrayLike, radius: float) -> float:
    """Bound the squared change of the outputs on any one input, by the triangle inequality.

        ‖h_p − h_0‖² ≤ M·(1 + ‖T‖_2)²        M = B²·‖U‖_F²

    Between 1 and 4·min(c, m) times ``risk_pointwise``, which is never above it. Scales with B² and U². Rounded up.

    Args:
        consumer: U, shape (c, m).
        interpolation: T, shape (k, m).
        radius: B ≥ 0, which no ‖z‖ can exceed.

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, ``radius`` < 0, or a NaN or infinite entry.

    Reference: Chee et al. 2021 (arXiv 2108.00065), range of the loss as reconstructed.
    """
    U, T = _fitting(consumer, interpolation)
    sizes = product_up(nonnegative(radius, "radius"), frobenius_norm(U))
    product = product_up(sizes, float(outward(1 + spectral_norm(T), product_error(1))))
    return product_up(product, product)


def risk_bernstein(changes: npt.ArrayLike, empirical: float, *, radius: float, samples: int, delta: float) -> float:
    """Bound the risk of all changes at once with probability 1 − δ, by the matrix Bernstein inequality.

        R_ID ≤ R̂_ID + ‖Q‖_F²·B²·(√(2L/n) + 2L/(3n)) ≤ M·{ε² + ‖T‖²·[√(2L/n) + 2L/(3n)]}

    with L = ln(m/δ), M = B²‖U‖_F², for ‖z‖ ≤ B. Its second form is for a skeleton of accuracy ε. Neither a
    pseudo-dimension nor a cap on ‖T‖ is needed, since every Q is covered. ``risk_shortfall`` is never above it.
    Rounded up.

    Args:
        changes: Q, shape (c, m).
        empirical: R̂_ID ≥ 0, as of ``empirical_risk`` over the n samples.
        radius: B ≥ 0, which no ‖z‖ can exceed.
        samples: n ≥ 1.
        delta: δ in (0, 1).

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` outside (0, 1), or a negative size.

    Reference: ours; matrix Bernstein inequality of Tropp 2015 (arXiv 1501.01571), Theorem 6.6.1.
    """
    Q = finite_array(changes, "changes", ndim=2)
    unit = shortfall_bernstein(Q.shape[1], samples=samples, delta=delta, radius=1.0)
    return _plus(empirical, _squared_product(nonnegative(radius, "radius"), frobenius_norm(Q), unit))


def risk_shortfall(
    changes: npt.ArrayLike,
    empirical: float,
    *,
    radius: float,
    samples: int,
    delta: float,
    measured: float | None = None,
) -> float:
    """Bound the risk of all changes at once with probability 1 − δ, by how far second moments fall short.

        R_ID ≤ R̂_ID + ‖Q‖_F²·√(2B²SL/n)        S ≥ ‖Σ‖ of ``size_limit``,   L = ln(m/δ)

    for ‖z‖ ≤ B. Where Σ̂ was measured, S is near ‖Σ̂‖ for n ≫ LB²/‖Σ̂‖. Rounded up.

    Args:
        changes: Q, shape (c, m).
        empirical: R̂_ID ≥ 0 over the n samples.
        radius: B ≥ 0, which no ‖z‖ can exceed.
        samples: n ≥ 1.
        delta: δ in (0, 1).
        measured: ‖Σ̂‖, rounded up: ``gram_scale`` squared; without it S = B².

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` outside (0, 1), or a negative size.

    Reference: ours, after ``shortfall``.
    """
    Q, B = finite_array(changes, "changes", ndim=2), nonnegative(radius, "radius")
    share = None
    if measured is not None and B:  # in units of B², which it is below
        ratio = float(outward(nonnegative(measured, "measured") / B / B, product_error(2)))
        share = size_limit(min(ratio, 1.0), features=Q.shape[1], samples=samples, delta=delta, radius=1.0)
    unit = shortfall(Q.shape[1], samples=samples, delta=delta, radius=1.0, largest=share)
    return _plus(empirical, _squared_product(B, frobenius_norm(Q), unit))


def risk_relative(
    changes: npt.ArrayLike,
    empirical: float,
    *,
    radius: float,
    samples: int,
    delta: float,
    stakes: Sequence[float] = STAKES,
) -> float:
    """Bound the risk of all changes at once with probability 1 − δ, by a multiple of the empirical risk.

        R_ID ≤ min over λ of  ω(λ)·R̂_ID + ‖Q‖_F²·B²·L/(λn)        ω(λ) = −ln(1 − λ)/λ,   L = ln(Nm/δ)

    over N stakes λ, for ‖z‖ ≤ B. An error of order B²/n instead of B²/√n for changes of small empirical risk. The same
    with z measured by another metric is ``moments_limit``. Rounded up.

    Args:
        changes: Q, shape (c, m).
        empirical: R̂_ID ≥ 0 over the n samples.
        radius: B ≥ 0, which no ‖z‖ can exceed.
        samples: n ≥ 1.
        delta: δ in (0, 1).
        stakes: λ in (0, 1), at least one, fixed before the samples are seen.

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` or a stake outside (0, 1), no stakes, or a negative size.

    Reference: ours, after ``relative_shortfall``.
    """
    Q, B = finite_array(changes, "changes", ndim=2), nonnegative(radius, "radius")
    if not len(stakes):
        raise ValueError("stakes is empty. Pass at least one number in (0, 1).")
    size, chance = frobenius_norm(Q), open_fraction(delta, "delta") / len(stakes)
    bounds = []
    for stake in stakes:
        growth, unit = relative_shortfall(Q.shape[1], samples=samples, delta=chance, leverage=1.0, stake=stake)
        bounds.append(_plus(product_up(growth, nonnegative(empirical, "empirical")), _squared_product(B, size, unit)))
    return min(bounds)


def risk_kurtosis(empirical: float, *, features: int, samples: int, delta: float, kurtosis: float) -> float:
    """Bound the risk of all changes at once with probability 1 − δ, features bounded or not, by their kurtosis.

        R_ID ≤ R̂_ID/(1 − ε)        ε = √(2κmL/n),   L = ln(m/δ)

    where E(qᵀz)⁴ ≤ κ·(E(qᵀz)²)² for every q, an assumption that no sample can prove. Infinite where ε ≥ 1: n has to
    exceed 2κmL. Rounded up.

    Args:
        empirical: R̂_ID ≥ 0 over the n samples.
        features: m ≥ 1.
        samples: n ≥ 1.
        delta: δ in (0, 1).
        kurtosis: κ ≥ 1; 3 for Gaussian features.

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` outside (0, 1), ``kurtosis`` < 1, or ``empirical`` < 0.

    Reference: ours, after ``shortfall_kurtosis``.
    """
    missing = shortfall_kurtosis(features, samples=samples, delta=delta, kurtosis=kurtosis)
    return _inflated(nonnegative(empirical, "empirical"), missing)


@dataclass(frozen=True)
class RiskWithin:
    """A bound of the risk on inputs within reach, and of the probability of all others; both hold with 1 − δ.

    Attributes:
        risk: bound of E ‖Qz‖²·1{z within reach}, in the squared units of the outputs.
        share_outside: bound of the probability that z is out of reach.
    """

    risk: float
    share_outside: float


def risk_held_out(
    changes: npt.ArrayLike,
    samples: npt.ArrayLike,
    *,
    radius: float,
    delta: float,
    metric: npt.ArrayLike | None = None,
    candidates: int = 1,
) -> RiskWithin:
    """Bound the risk of a change with probability 1 − δ, by samples that had no part in choosing it.

        E ‖Qz‖²·1{zᵀW⁻¹z ≤ B²} ≤ mean_upper_limit(‖Qz_i‖²·1{z_iᵀW⁻¹z_i ≤ B²};  b = B²·‖QW^(1/2)‖_2²,  δ/2N)

    The sharpest bound here, for N changes fixed beforehand instead of all at once. Nothing is assumed of the features:
    where no z is out of reach this is the whole risk, else ``risk_whole`` adds the rest. Rounded up.

    Args:
        changes: Q, shape (c, m), independent of the samples.
        samples: z_1 … z_n, shape (n, m), n ≥ 1, finite.
        radius: B > 0, how far inputs reach that count; independent of the samples.
        delta: δ in (0, 1): half for the risk, half for the share out of reach.
        metric: W, shape (m, m), symmetric positive definite, independent of the samples, as in ``moments_limit``; the
            identity if not given, so that reach is ‖z‖ ≤ B.
        candidates: N ≥ 1, how many changes are looked at before one is reported.

    Returns:
        The bound and the share of inputs it leaves out.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, no samples, ``radius`` ≤ 0, a metric that is not positive definite, or
            ``delta`` outside (0, 1).

    Reference: ours, after ``mean_upper_limit`` and ``share_upper_limit``.
    """
    Q, Z = finite_array(changes, "changes", ndim=2), finite_array(samples, "samples", ndim=2)
    if Q.shape[1] != Z.shape[1] or not len(Z):
        raise ValueError(f"samples has shape {Z.shape}, expected at least one row of {Q.shape[1]} as changes has.")
    B, chance = nonnegative(radius, "radius"), open_fraction(delta, "delta") / 2
    if not B:
        raise ValueError("radius=0 leaves no inputs. Pass how far those reach that count.")
    shares = count(candidates, "candidates", low=1, high=2**53)
    # By powers of two, so that no square leaves float64 before the result does.
    (Q, e), (Z, f) = unit_scaled(Q), unit_scaled(Z)
    if metric is None:
        B = float(np.ldexp(B, -f))
        lengths, largest = outward(_row_norms(Z), norm_error(Z.shape[1], 2.0)), product_up(spectral_norm(Q), B)
    else:
        factor, stray = factored(np.ldexp(finite_array(metric, "metric", ndim=2), -2 * f))
        lengths = outward(_row_norms(solve_triangular(factor, Z.T, lower=True).T), stray)
        # QC is off by m·u·|Q||C| entry by entry.
        blur = product_up(norm_error(len(factor), 1.0), product_up(frobenius_norm(Q), frobenius_norm(factor)))
        largest = product_up(float(outward(spectral_norm(Q @ factor) + blur, product_error(1))), B)
    within = lengths <= B
    outside = share_upper_limit(int(len(Z) - within.sum()), len(Z), delta=chance)
    if not largest:
        return RiskWithin(0.0, outside)
    # Each Qz is off by m·u·‖Q‖_F‖z‖, which is added to its length.
    blur = product_up(norm_error(Q.shape[1], 1.0), frobenius_norm(Q))
    changed = outward(_row_norms(Z[within] @ Q.T) + blur * _row_norms(Z[within]), norm_error(sum(Q.shape), 2.0))
    losses = np.zeros(len(Z))
    losses[within] = np.minimum(outward(changed / largest, product_error(1)), 1.0) ** 2
    limit = mean_upper_limit(losses, largest=1.0, delta=chance / shares)
    with np.errstate(over="ignore"):
        risk = float(outward(np.ldexp(product_up(largest, product_up(largest, limit)), 2 * (e + f)), 0.0))
    return RiskWithin(risk, outside)


def risk_whole(
    within: float, share_outside: float, *, largest: float | None = None, kurtosis: float | None = None
) -> float:
    """Bound the risk on all inputs by that on inputs within reach and an assumption about the others.

        R_ID ≤ R_within + p·b    or    R_ID ≤ R_within/(1 − √(κp))

    with b ≥ ‖Qz‖² on every input, such as ‖Q‖_2²B² where ‖z‖ ≤ B always; or with E(qᵀz)⁴ ≤ κ(E(qᵀz)²)² for each row q
    of Q, for unbounded features. The lower of the two where both are given. Infinite where κp ≥ 1. Rounded up.

    Args:
        within: bound of E ‖Qz‖²·1{z within reach}, ≥ 0.
        share_outside: p, bound of the probability that z is out of reach, in [0, 1].
        largest: b ≥ 0.
        kurtosis: κ ≥ 1.

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: neither assumption given, or a number out of range.

    Reference: Cauchy–Schwarz; ours.
    """
    inside, p = nonnegative(within, "within"), nonnegative(share_outside, "share_outside")
    if p > 1:
        raise ValueError(f"share_outside={p:g} exceeds 1. Pass a probability.")
    bounds = []
    if largest is not None:
        bounds.append(_plus(inside, product_up(p, nonnegative(largest, "largest"))))
    if kurtosis is not None:
        lost = float(outward(math.sqrt(p) * math.sqrt(at_least_one(kurtosis, "kurtosis")), product_error(3)))
        bounds.append(_inflated(inside, lost if p else 0.0))
    if not bounds:
        raise ValueError("Neither largest nor kurtosis is given. Without one nothing is known of inputs out of reach.")
    return min(bounds)


def risk_pseudodim(
    consumer: npt.ArrayLike,
    interpolation: npt.ArrayLike,
    empirical: float,
    *,
    radius: float,
    samples: int,
    delta: float,
    dimension: float,
) -> float:
    """Evaluate the high-probability bound in the form it is remembered to be published in, constants unverified.

        R_ID ≤ ε²M + M(1 + ‖T‖)²·[√(2p·ln(en/p)) + √(½ ln(1/δ))]/√n        p = ζ·d·m·ln(dm),   M = B²‖U‖_F²

    The bracket is that of the textbook bound for a class of pseudo-dimension p and one skeleton norm. For nets of
    fixed first layer p = m(m + 1)/2 is enough, since the loss is a quadratic form. The published p and constants were
    not seen; ``risk_bernstein`` has what is proved. Rounded up.

    Args:
        consumer: U, shape (c, m).
        interpolation: T, shape (k, m).
        empirical: ε²M, or R̂_ID, ≥ 0.
        radius: B ≥ 0, which no ‖z‖ can exceed.
        samples: n ≥ p.
        delta: δ in (0, 1).
        dimension: p > 0: as of ``pseudodim_remembered`` or ``pseudodim_quadratic``.

    Returns:
        The bound, in the squared units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: fewer samples than p, for which the form is not claimed; shapes that do not fit; ``delta`` outside
            (0, 1), or a negative size.

    Reference: Chee et al. 2021 (arXiv 2108.00065), from memory; textbook form: Mohri et al. 2018, Theorem 11.8.
    """
    n, p = count(samples, "samples", low=1, high=2**53), real_number(dimension, "dimension")
    if not 0 < p <= n:
        raise ValueError(f"dimension={p:g} is outside (0, {n}]. The bound needs at least as many samples as that.")
    log = -math.log(open_fraction(delta, "delta"))
    bracket = math.sqrt(2 * p * (1 + math.log(n / p)) / n) + math.sqrt(log / (2 * n))
    value = risk_pointwise_published(consumer, interpolation, radius)
    return _plus(empirical, product_up(value, float(outward(bracket, product_error(8)))))


def pseudodim_remembered(inputs: int, width: int, *, zeta: float = 1.0) -> float:
    """Return ζ·d·m·ln(dm), the pseudo-dimension of one-hidden-layer ReLU nets as it is remembered to be published.

    Args:
        inputs: d ≥ 1.
        width: m ≥ 1, with dm ≥ 2.
        zeta: ζ > 0, a constant nobody here has seen.

    Returns:
        p.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: dm < 2, or ``zeta`` ≤ 0.

    Reference: Chee et al. 2021 (arXiv 2108.00065), from memory, unverified.
    """
    d, m = count(inputs, "inputs", low=1, high=2**31), count(width, "width", low=1, high=2**31)
    if d * m < 2:
        raise ValueError(f"inputs={d} and width={m} make dm < 2, where ln(dm) is 0.")
    if not nonnegative(zeta, "zeta"):
        raise ValueError("zeta=0 leaves nothing. Pass a constant > 0.")
    return float(outward(zeta * d * m * math.log(d * m), product_error(3)))


def pseudodim_quadratic(width: int) -> float:
    """Return m(m + 1)/2, which the pseudo-dimension of quadratic forms in m variables does not exceed.

    Args:
        width: m ≥ 1.

    Returns:
        p.

    Raises:
        TypeError: ``width`` is not a whole number.
        ValueError: ``width`` < 1.

    Reference: classical: a vector space of functions has its dimension for pseudo-dimension.
    """
    m = count(width, "width", low=1, high=2**26)
    return m * (m + 1) / 2


def _plus(empirical: float, excess: float) -> float:
    risk = nonnegative(empirical, "empirical")
    return float(outward(risk + excess, product_error(1))) if risk and excess else risk + excess


def _inflated(risk: float, missing: float) -> float:
    """Return risk/(1 − missing), rounded up; infinite where all may be missing."""
    if missing >= 1:
        return math.inf
    return product_up(risk, float(outward(1 / (1 - missing), product_error(2)))) if missing else risk


def _row_norms(rows: Array) -> Array:
    return np.asarray(np.linalg.norm(rows, axis=1))


def _squared_product(radius: float, size: float, factor: float) -> float:
    """Return (B·‖Q‖)²·factor, rounded up, with nothing beyond float64 on the way if the result is not."""
    product = product_up(radius, size)
    return product_up(product_up(product, factor), product)


def _fitting(consumer: npt.ArrayLike, interpolation: npt.ArrayLike) -> tuple[Array, Array]:
    U, T = finite_array(consumer, "consumer", ndim=2), finite_array(interpolation, "interpolation", ndim=2)
    if U.shape[1] != T.shape[1]:
        raise ValueError(f"consumer has {U.shape[1]} columns but interpolation has {T.shape[1]}.")
    return U, T
