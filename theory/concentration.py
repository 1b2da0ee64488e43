"""How far the second moments of a sample can fall short of the true ones, in every direction at once.

z is a random vector of m features, Σ = E zzᵀ, and Σ̂ = (1/n) Σ z_i z_iᵀ over n independent samples of it. An upper
bound of qᵀΣq needs the lower tail of Σ̂ alone, and zzᵀ ≽ 0 makes it light. A ≼ B says that qᵀAq ≤ qᵀBq for all q, so q
may be chosen after the samples are seen. The randomness is that of the samples; δ is the probability that a statement
fails. Proofs: ``docs/theorems_skeletons.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

from ellq.theory.arguments import Array, count, finite_array, nonnegative, open_fraction, real_number
from ellq.theory.confidence import share_upper_limit
from ellq.theory.input_moments import layer_errors
from ellq.theory.rounding import norm_error, outward, product_error, product_up

STAKES = (0.9, 0.7, 0.45, 0.2, 0.05)
"""Stakes λ that cover what is best for a change to within a few percent, at the cost of ln 5 in L."""


def shortfall_bernstein(
    features: int, *, samples: int, delta: float, radius: float, largest: float | None = None
) -> float:
    """Bound by how much measured second moments fall short, by the matrix Bernstein inequality.

        Σ ≼ Σ̂ + t·Id        t = √(2B²‖Σ‖L/n) + 2‖Σ‖L/(3n) ≤ B²·(√(2L/n) + 2L/(3n)),   L = ln(m/δ)

    with probability 1 − δ, for ‖z‖ ≤ B. ``shortfall`` does without the second term. Scales with B² and ‖Σ‖ together.
    Rounded up.

    Args:
        features: m ≥ 1.
        samples: n ≥ 1.
        delta: δ in (0, 1).
        radius: B ≥ 0, which no ‖z‖ can exceed.
        largest: ‖Σ‖, the largest eigenvalue, or a bound of it; B² if not given.

    Returns:
        t, in the squared units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` outside (0, 1), or a negative size.

    Reference: Tropp 2015 (arXiv 1501.01571), Theorem 6.6.1, with ‖E(Σ − zzᵀ)²‖ ≤ B²‖Σ‖.
    """
    share = _log_over_samples(features, samples, delta)
    B, root = _radius_and_root(radius, largest)
    linear = product_up(root, product_up(root, float(outward(2 / 3 * share, product_error(1)))))
    spread = product_up(B, product_up(root, float(outward(math.sqrt(2 * share), product_error(1)))))
    return float(outward(spread + linear, product_error(1))) if linear else 0.0


def shortfall(features: int, *, samples: int, delta: float, radius: float, largest: float | None = None) -> float:
    """Bound by how much measured second moments fall short, without a linear term.

        Σ ≼ Σ̂ + t·Id        t = √(2B²‖Σ‖L/n) ≤ B²·√(2L/n),   L = ln(m/δ)

    with probability 1 − δ, for ‖z‖ ≤ B; more generally with ‖E‖z‖²zzᵀ‖ for B²‖Σ‖. On the same event ``size_limit``
    bounds ‖Σ‖. One feature that is B with small probability p, else 0, comes arbitrarily close as δ → 0, np/L → ∞.
    Scales with B² and ‖Σ‖ together. Rounded up.

    Args:
        features: m ≥ 1.
        samples: n ≥ 1.
        delta: δ in (0, 1).
        radius: B ≥ 0, which no ‖z‖ can exceed.
        largest: ‖Σ‖, the largest eigenvalue, or a bound of it, as of ``size_limit``; B² if not given.

    Returns:
        t, in the squared units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` outside (0, 1), or a negative size.

    Reference: ours, ``risk-shortfall`` of docs/theorems_skeletons.md: Tropp's method with exp(−x) ≤ 1 − x + x²/2.
    """
    share = _log_over_samples(features, samples, delta)
    B, root = _radius_and_root(radius, largest)
    return product_up(B, product_up(root, float(outward(math.sqrt(2 * share), product_error(1)))))


def size_limit(measured: float, *, features: int, samples: int, delta: float, radius: float) -> float:
    """Bound the largest eigenvalue of true second moments by that of the measured ones.

        √‖Σ‖ ≤ B·√(L/2n) + √(‖Σ̂‖ + B²L/2n),   and ‖Σ‖ ≤ B²        L = ln(m/δ)

    on the event of probability 1 − δ on which ``shortfall`` holds, so that δ is spent once. Scales with B² and ‖Σ̂‖
    together. Rounded up.

    Args:
        measured: ‖Σ̂‖ ≥ 0, the largest eigenvalue measured, rounded up, as of ``gram_scale`` squared.
        features: m ≥ 1.
        samples: n ≥ 1.
        delta: δ in (0, 1).
        radius: B ≥ 0, which no ‖z‖ can exceed.

    Returns:
        The bound of ‖Σ‖, in the squared units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` outside (0, 1), or a negative size.

    Reference: ours, ``risk-shortfall`` of docs/theorems_skeletons.md.
    """
    share = math.sqrt(_log_over_samples(features, samples, delta) / 2)
    step = product_up(nonnegative(radius, "radius"), float(outward(share, product_error(1))))
    root = step + math.hypot(math.sqrt(nonnegative(measured, "measured")), step)
    root = min(float(outward(root, product_error(4))), radius)
    return product_up(root, root)


def shortfall_kurtosis(features: int, *, samples: int, delta: float, kurtosis: float) -> float:
    """Bound by which share measured second moments fall short of the true ones, bounded features or not.

        Σ ≼ Σ̂/(1 − ε)        ε = √(2κmL/n),   L = ln(m/δ)

    with probability 1 − δ, where E(qᵀz)⁴ ≤ κ·(E(qᵀz)²)² for all q; κ = 3 for Gaussian features. Says nothing where
    ε ≥ 1. Ignores the scale of the features and any linear map of them. Rounded up.

    Args:
        features: m ≥ 1.
        samples: n ≥ 1.
        delta: δ in (0, 1).
        kurtosis: κ ≥ 1.

    Returns:
        ε.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` outside (0, 1), or ``kurtosis`` < 1.

    Reference: ours, ``risk-kurtosis`` of docs/theorems_skeletons.md; in the manner of Oliveira 2016.
    """
    share = _log_over_samples(features, samples, delta)
    kappa = at_least_one(kurtosis, "kurtosis")
    return float(outward(math.sqrt(2 * share * features) * math.sqrt(kappa), product_error(4)))


def relative_shortfall(
    features: int, *, samples: int, delta: float, leverage: float, stake: float
) -> tuple[float, float]:
    """Bound true second moments by a multiple of the measured ones and of a metric.

        Σ ≼ ω·Σ̂ + π·W        ω = −ln(1 − λ)/λ,   π = τL/(λn),   L = ln(m/δ)

    with probability 1 − δ, for a positive definite W fixed before the samples are seen with zᵀW⁻¹z ≤ τ. W = Id and
    τ = B² need no other data; W near Σ, from a first half of the samples, makes both terms relative. λ is fixed before
    too: to choose among N of them, use δ/N. Rounded up.

    Args:
        features: m ≥ 1.
        samples: n ≥ 1.
        delta: δ in (0, 1).
        leverage: τ ≥ 0, which no zᵀW⁻¹z can exceed.
        stake: λ in (0, 1): small where Σ̂ matters, large where W does.

    Returns:
        ω ≥ 1 and π.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a count below 1, ``delta`` or ``stake`` outside (0, 1), or ``leverage`` < 0.

    Reference: ours, ``risk-relative`` of docs/theorems_skeletons.md.
    """
    share = _log_over_samples(features, samples, delta)
    wager = open_fraction(stake, "stake")
    growth = max(1.0, float(outward(-math.log1p(-wager) / wager, product_error(2))))
    return growth, product_up(nonnegative(leverage, "leverage"), float(outward(share / wager, product_error(1))))


@dataclass(frozen=True)
class MomentsLimit:
    """An upper bound of qᵀΣq for all q at once, and the share of inputs it leaves out.

    With probability 1 − δ: E (qᵀz)²·1{z within reach} ≤ qᵀMq for every q and every form M, and at most the share of all
    z is out of reach.

    Attributes:
        forms: matrices M, shape (stakes, m, m).
        entry_error: by how much an entry (i, j) of a form may be off, relative to √(M_ii M_jj).
        share_outside: bound of the probability that zᵀW⁻¹z > τ.
        samples: n, how many the bound was made from.
        delta: δ.
    """

    forms: Array
    entry_error: float
    share_outside: float
    samples: int
    delta: float

    def risk(self, changes: npt.ArrayLike) -> float:
        """Bound E ‖Qz‖²·1{z within reach}, the mean squared change of the outputs on inputs within reach.

        Args:
            changes: Q, shape (c, m), by how much each output's weights change; may depend on the samples.

        Returns:
            The least tr QMQᵀ over the forms, in the squared units of the outputs; rounded up.

        Raises:
            TypeError: ``changes`` is not numeric.
            ValueError: shapes that do not fit, or a NaN or infinite entry.
        """
        return min(sum_of_squares(layer_errors(changes, M, entry_error=self.entry_error)) for M in self.forms)


def moments_limit(
    batches: Iterable[npt.ArrayLike],
    metric: npt.ArrayLike,
    *,
    reach: float,
    delta: float,
    stakes: Sequence[float] = STAKES,
) -> MomentsLimit:
    """Bound the second moments of features in every direction, from samples that had no part in the metric.

        Σ_τ ≼ (1/n) Σ w(ℓ_i)·z_i z_iᵀ + (L/θn)·W        w(ℓ) = −ln(1 − θℓ)/(θℓ),   θ = λ/τ,   L = ln(2Nm/δ)

    for each of N stakes λ, with ℓ = zᵀW⁻¹z the leverage of z and Σ_τ = E zzᵀ·1{ℓ ≤ τ}. Nothing is assumed of the
    features: what is out of reach, ℓ > τ, is left out and its probability bounded, by the exact binomial limit at δ/2.
    Sharper than ``relative_shortfall``, whose weights are all that of the largest leverage. One pass, in memory of
    N m×m matrices.

    Args:
        batches: held-out samples z, arrays of shape (b, m), finite.
        metric: W, shape (m, m), symmetric positive definite, fixed before these samples are seen: as a rule the second
            moments of the other half, with a small multiple of the identity added (``ridged``).
        reach: τ > 0, fixed before too: as a rule a multiple of the largest leverage in the other half (``leverages``).
        delta: δ in (0, 1).
        stakes: λ in (0, 1), at least one.

    Returns:
        The limit.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: no samples, shapes that do not fit, an entry that is not finite, a metric that is not positive
            definite, ``reach`` ≤ 0, or ``delta`` or a stake outside (0, 1).

    Reference: ours, ``risk-relative`` of docs/theorems_skeletons.md.
    """
    factor, stray = factored(metric)
    m = len(factor)
    tau = real_number(reach, "reach")
    if not 0 < tau < math.inf:
        raise ValueError(f"reach={tau:g} must be finite and positive. Pass the leverage up to which inputs count.")
    chance = open_fraction(delta, "delta")
    wagers = [open_fraction(stake, "stakes") for stake in stakes]
    if not wagers:
        raise ValueError("stakes is empty. Pass at least one number in (0, 1).")
    forms, samples, inside = np.zeros((len(wagers), m, m)), 0, 0
    for i, batch in enumerate(batches):
        Z = finite_array(batch, f"batch {i}", ndim=2)
        if Z.shape[1] != m:
            raise ValueError(f"batch {i} has {Z.shape[1]} columns but metric has shape {(m, m)}.")
        levels = outward(_leverages(Z, factor), stray) / tau
        within = levels <= 1
        Z, levels, samples, inside = Z[within], levels[within], samples + len(Z), inside + int(within.sum())
        for form, wager in zip(forms, wagers, strict=True):
            form += (stake_weights(levels, wager)[:, None] * Z).T @ Z
    if not samples:
        raise ValueError("batches hold no samples. Pass at least one.")
    W = factor @ factor.T
    for form, wager in zip(forms, wagers, strict=True):
        share = _log_over_samples(2 * len(wagers) * m, samples, chance)
        form /= samples
        form += product_up(tau, float(outward(share / wager, product_error(1)))) * W
    outside = share_upper_limit(samples - inside, samples, delta=chance / 2)
    return MomentsLimit(forms, norm_error(samples + m + 8, 1.0), outside, samples, chance)


def ridged(moments: npt.ArrayLike, ridge: float = 1e-6) -> Array:
    """Return second moments with a multiple of their mean eigenvalue added in every direction: Σ + r·(trace Σ/m)·Id.

    A metric has to be positive definite, which moments with dead or repeated features are not.

    Args:
        moments: Σ, shape (m, m).
        ridge: r > 0, the multiple.

    Returns:
        The metric, shape (m, m).

    Raises:
        TypeError: an argument is not numeric.
        ValueError: not a finite square matrix of positive trace, or ``ridge`` ≤ 0.

    Reference: by definition.
    """
    S = finite_array(moments, "moments", ndim=2)
    share = nonnegative(ridge, "ridge")
    if S.shape[0] != S.shape[1] or not np.trace(S) > 0 or not share:
        raise ValueError(
            f"moments has shape {S.shape} and trace {np.trace(S):g}, ridge is {share:g}. Pass a square matrix with a"
            " positive trace and a positive ridge."
        )
    return np.asarray(S + share * (np.trace(S) / len(S)) * np.eye(len(S)))


def leverages(samples: npt.ArrayLike, metric: npt.ArrayLike) -> Array:
    """Return zᵀW⁻¹z for every sample z: how far it reaches out of what the metric W has seen.

    Their mean is m where W is the second moments of the samples themselves. Invariant to linear maps of the features.

    Args:
        samples: Z, shape (n, m), finite.
        metric: W, shape (m, m), symmetric positive definite.

    Returns:
        The leverages, shape (n,).

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, an entry that is not finite, or a metric that is not positive definite.

    Reference: by definition.
    """
    Z, (factor, _) = finite_array(samples, "samples", ndim=2), factored(metric)
    if Z.shape[1] != len(factor):
        raise ValueError(f"samples has {Z.shape[1]} columns but metric has shape {factor.shape}.")
    return _leverages(Z, factor)


def sum_of_squares(errors: Array) -> float:
    """Return the sum of squares of bounds, rounded up; 0 only if all are."""
    with np.errstate(over="ignore"):
        total = float(outward((errors * errors).sum(), norm_error(errors.size, 1.0), underflows=errors.size))
    return total if errors.any() else 0.0


def stake_weights(levels: Array, stake: float) -> Array:
    """Return −ln(1 − λx)/(λx) ≥ 1 for every share x of the reach in [0, 1], rounded up."""
    bets = stake * levels
    with np.errstate(invalid="ignore"):
        weights = np.where(bets > 0, -np.log1p(-bets) / bets, 1.0)
    # λx is off by u, which its logarithm magnifies by 1/(1 − λx).
    return outward(weights, product_error(3) * (1 + 1 / (1 - stake)))


def at_least_one(kurtosis: float, name: str) -> float:
    """Return a bound of E x⁴/(E x²)² if it is one; refuse anything else by name."""
    number = nonnegative(kurtosis, name)
    if number < 1:
        raise ValueError(f"{name}={number:g} is below 1, which no variable has. Pass a bound >= 1.")
    return number


def _leverages(Z: Array, factor: Array) -> Array:
    whitened = solve_triangular(factor, Z.T, lower=True)
    return np.asarray((whitened * whitened).sum(axis=0))


def factored(metric: npt.ArrayLike) -> tuple[Array, float]:
    """Return C with CCᵀ = W up to rounding, and by how much leverages computed with C stray, relative to them."""
    W = finite_array(metric, "metric", ndim=2)
    if W.shape[0] != W.shape[1] or W.size == 0:
        raise ValueError(f"metric has shape {W.shape}. Pass a square matrix, one row per feature.")
    try:
        factor = np.asarray(np.linalg.cholesky(W), dtype=np.float64)
    except np.linalg.LinAlgError:
        raise ValueError("metric is not positive definite. Add to it by ridged().") from None
    # Substitution solves (C + E)x = z with |E| ≤ m·u·|C| (Higham 2002, Theorem 8.5): x is off by ‖|C⁻¹||C|‖·m·u·‖x‖.
    inverse = np.abs(solve_triangular(factor, np.eye(len(W)), lower=True))
    spread = float(np.linalg.norm(inverse @ np.abs(factor)))
    return factor, norm_error(len(W), 1.0) * (2 * spread + 2)


def _radius_and_root(radius: float, largest: float | None) -> tuple[float, float]:
    """Return B and √‖Σ‖, rounded up."""
    B = nonnegative(radius, "radius")
    if largest is None:
        return B, B
    size = nonnegative(largest, "largest")
    return B, min(B, float(outward(math.sqrt(size), product_error(1)))) if size else 0.0


def _log_over_samples(features: int, samples: int, delta: float) -> float:
    """Return ln(m/δ)/n, rounded up."""
    m = count(features, "features", low=1, high=2**53)
    n = count(samples, "samples", low=1, high=2**53)
    return float(outward((math.log(m) - math.log(open_fraction(delta, "delta"))) / n, product_error(3)))
