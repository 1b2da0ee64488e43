"""Theorems on the risk of a skeleton on unseen inputs, registered with both of their sides.

Those that hold with probability 1 − δ are attacked on laws of a few atoms: all samples of n are enumerated by how often
they hold each atom, so that the quantity bounded has an exact quantile. It is the least t that is exceeded with
probability at most δ, and has to be within the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy
from scipy.special import gammaln

from ellq.theory import families
from ellq.theory.arguments import Array, Indices
from ellq.theory.concentration import shortfall, shortfall_bernstein, shortfall_kurtosis, stake_weights
from ellq.theory.confidence import mean_upper_limit
from ellq.theory.id_bounds import frobenius_norm, spectral_norm
from ellq.theory.notation import NamedQuantity
from ellq.theory.risk_bounds import (
    output_change,
    pseudodim_quadratic,
    risk_pointwise,
    risk_pseudodim,
    risk_split,
)
from ellq.theory.rounding import UNIT_ROUNDOFF, norm_error, outward, product_error, product_up
from ellq.theory.statements import Assumption, Case, Statement, register

_OUTCOMES = 5000  # samples of three atoms, and of two held out, that are enumerated
_BLOCKS = 4000  # blocks of counts of two atoms
_DEVIATIONS = 45.0  # how far a count of two atoms is followed: beyond, its probability is below 1e-400

n, delta, samples_log = (
    sympy.Symbol("n", positive=True),
    sympy.Symbol("delta", positive=True),
    NamedQuantity("L", "L"),
)
_RISK = NamedQuantity("R_ID", r"R_{\mathrm{ID}}")
_EMPIRICAL = NamedQuantity("R̂_ID", r"\hat R_{\mathrm{ID}}")
_RADIUS, _LARGEST = sympy.Symbol("B", positive=True), NamedQuantity("‖Σ‖", r"\|\Sigma\|")
_CHANGE = NamedQuantity("‖Q‖_F", r"\|Q\|_F")


# --- samples of a law of a few atoms --------------------------------------------------------------------------------


def shares(weights: npt.ArrayLike) -> Array:
    """Return the probabilities that weights stand for."""
    w = np.asarray(weights, dtype=np.float64)
    return np.asarray(w / w.sum())


Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcomes:
    """How often each atom may occur among n samples, by blocks of neighbouring counts.

    Attributes:
        first, last: the counts at the ends of each block, shape (M, N); the same where a block is one count.
        chances: no more than the probability of each block, up to ``error``, shape (M,).
        error: relative error of the chances.
    """

    first: Counts
    last: Counts
    chances: Array
    error: float

    def quantile(self, value: Callable[[Counts], Array], delta: float) -> float:
        """Return a t ≥ 0 with P(value(counts) > t') > δ for all t' < t: the quantile, or, with blocks, a little less.

        Args:
            value: of each row of counts, shape (M, N), the number whose quantile is asked for; convex in the counts.
            delta: δ in (0, 1).
        """
        values, chances = value(self.first), self.chances
        if self.first is not self.last:
            values = np.minimum(values, value(self.last))
            # Convex, so least at an end of its block, except for the block that holds the minimum: leave that out.
            near = np.abs(np.arange(len(values)) - int(np.argmin(values))) <= 1
            chances = np.where(near, 0.0, chances)
        order = np.argsort(-values, kind="stable")
        reached = np.cumsum(chances[order]) * (1 - self.error - len(values) * UNIT_ROUNDOFF) > delta
        return max(float(values[order[int(np.argmax(reached))]]), 0.0) if reached.any() else 0.0


def outcomes(weights: Array, samples: int) -> Outcomes:
    """List how often each of up to three atoms may occur among n samples, all that matter to a quantile.

    For two atoms counts beyond 45 standard deviations are left out, and many are taken in blocks.
    """
    p = shares(weights)
    if p.size == 1:
        first = last = np.array([[samples]])
    elif p.size == 2:
        reach = math.ceil(_DEVIATIONS * math.sqrt(samples * p[0] * p[1])) + 2000
        middle = int(samples * p[0])
        low, high = max(0, middle - reach), min(samples, middle + reach)
        if high - low < _BLOCKS:
            lows = highs = np.arange(low, high + 1)
        else:
            edges = np.linspace(low, high + 1, _BLOCKS).astype(np.int64)
            lows, highs = edges[:-1], edges[1:] - 1
        first = np.stack([lows, samples - lows], axis=1)
        last = first if highs is lows else np.stack([highs, samples - highs], axis=1)
    else:
        bars = np.array(list(combinations(range(samples + p.size - 1), p.size - 1)))
        edges = np.hstack([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), samples + p.size - 1)])
        first = last = np.diff(edges, axis=1) - 1

    def logs(counts: Counts) -> Array:
        return np.asarray(gammaln(samples + 1.0) - gammaln(counts + 1.0).sum(axis=1) + counts @ np.log(p))

    # The binomial law is log-concave: no count within a block is less likely than both of its ends.
    chances = np.exp(logs(first))
    if last is not first:
        chances = np.minimum(chances, np.exp(logs(last))) * (last - first + 1).max(axis=1)
    # Every logarithm is off by 8u of itself, p by 4u: n times as much in the exponent.
    size = float(gammaln(samples + 1.0)) + samples * (1 + float(np.abs(np.log(p)).max()))
    return Outcomes(first, last, chances, math.expm1(32 * UNIT_ROUNDOFF * (size + 10)))


def _coordinates(atoms: Array) -> Array:
    """Return the atoms in an orthonormal basis of what they span, shape (r, N)."""
    return np.asarray(np.linalg.qr(atoms.T, mode="r")) if len(atoms) <= atoms.shape[1] else atoms.T.copy()


def _top_eigenvalues(vectors: Array, factors: Array) -> Array:
    """Return λ_max(Σ_i f_i v_i v_iᵀ) for every row f of factors; the v_i are the columns."""
    if len(vectors) == 1:
        return np.asarray(factors @ vectors[0] ** 2)
    matrices = np.einsum("ai,si,bi->sab", vectors, factors, vectors, optimize=True)
    return np.asarray(np.linalg.eigvalsh(matrices)[:, -1])


def _draw_law(rng: np.random.Generator, *, bounded: bool = True) -> Case:
    kind, width = rng.integers(4), int(rng.integers(1, 5))
    if kind == 0:  # one feature that is seldom there
        atoms, weights = np.array([[1.0], [0.0]]), np.array([10.0 ** -rng.uniform(0, 4), 1.0])
        samples = int(10.0 ** rng.uniform(0, 6))
    else:
        count = int(rng.integers(1, 4))
        atoms = families.features(rng, width, samples=count)
        if kind == 1:
            atoms = np.eye(max(width, count))[:count] * 10.0 ** rng.uniform(-1, 1, (count, 1))
        weights = 10.0 ** -rng.uniform(0, 3, count)
        samples = int(rng.integers(1, 40)) if count == 3 else int(10.0 ** rng.uniform(0, 4))
    if not atoms.any():
        atoms[0, 0] = 1.0
    chance = float(rng.choice([rng.uniform(0.001, 0.999), 10.0 ** -rng.uniform(0.01, 300)]))
    return {"atoms": atoms, "weights": weights, "samples": samples, "delta": chance}


known_law = Assumption(
    "law",
    "the law has one to three atoms of positive weight, finite, of 1e-100 to 1e100 or 0, not all 0.",
    lambda case: (
        np.ndim(case["atoms"]) == 2
        and 1 <= len(case["atoms"]) <= 3
        and len(case["atoms"]) == np.size(case["weights"])
        and bool(np.isfinite(case["weights"]).all() and (np.asarray(case["weights"]) > 0).all())
        and bool(np.isfinite(case["atoms"]).all() and np.any(case["atoms"]))
        and bool(np.all((case["atoms"] == 0) | ((np.abs(case["atoms"]) > 1e-100) & (np.abs(case["atoms"]) < 1e100))))
    ),
)
listed_samples = Assumption(
    "enumerable",
    f"there are 1 to 10^10 samples, of three atoms so few that at most {_OUTCOMES} outcomes are possible.",
    lambda case: (
        1 <= case["samples"] <= 10**10
        and (np.size(case["weights"]) < 3 or math.comb(case["samples"] + 2, 2) <= _OUTCOMES)
    ),
)
probability = Assumption("0 < δ < 1", "the probability is between 0 and 1.", lambda case: 0 < case["delta"] < 1)
LAW = (known_law, listed_samples, probability)


def _sizes(atoms: Array) -> tuple[float, float]:
    """Return the largest ‖z‖, and the sum of squares of all, both rounded up."""
    lengths = outward(np.linalg.norm(atoms, axis=1), norm_error(atoms.shape[1], 2.0))
    return float(lengths.max()), float(outward((lengths**2).sum(), norm_error(len(atoms), 1.0)))


# --- the split of the risk ------------------------------------------------------------------------------------------


def _draw_split(rng: np.random.Generator) -> Case:
    shape = families.size(rng, 30), families.size(rng, 5)
    dense, labels = rng.standard_normal(shape), rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3)
    change = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 3)
    if rng.random() < 0.5:  # the same multiple everywhere: where the bound is attained
        change = (dense - labels) * 10.0 ** rng.uniform(-3, 3)
    return {"dense": dense, "pruned": dense + change, "labels": labels}


def _mean_square(A: Array, B: Array) -> float:
    return float(np.mean(np.sum((np.asarray(A) - B) ** 2, axis=1)))


def _split_bound(dense: Array, pruned: Array, labels: Array) -> float:
    error = norm_error(dense.size, 1.0) + product_error(3)
    sides = [_mean_square(pruned, dense), _mean_square(dense, labels)]
    return risk_split(*(float(outward(side, error)) if side else 0.0 for side in sides))


def _split_formula() -> sympy.Basic:
    dense = NamedQuantity("R_0", "R_0")
    return sympy.Le(NamedQuantity("R_p", "R_p"), _RISK + dense + 2 * sympy.sqrt(_RISK * dense))


def _are_moderate(case: Case) -> bool:
    arrays = [np.asarray(case[name]) for name in ("dense", "pruned", "labels")]
    return all(bool(np.isfinite(a).all()) and float(np.abs(a).max()) < 1e140 for a in arrays)


RISK_SPLIT = register(
    Statement(
        id="risk-split",
        title="Risk of the pruned net from those of the change and of the dense net",
        reference="Chee et al. 2021 (arXiv 2108.00065), form of the one-hidden-layer theorem; proof by Cauchy–Schwarz",
        status="reconstructed",
        assumptions=(Assumption("finite", "outputs and labels are finite and below 1e140.", _are_moderate),),
        observed=lambda dense, pruned, labels: _mean_square(pruned, labels),
        bound=_split_bound,
        # Each difference is rounded once; so are its square and the sums.
        relative_error=lambda dense, pruned, labels: norm_error(np.size(dense), 1.0) + product_error(3),
        formula=_split_formula,
        draw=_draw_split,
    )
)


# --- one input ------------------------------------------------------------------------------------------------------


def _draw_pointwise(rng: np.random.Generator) -> Case:
    width = families.size(rng, 12)
    indices = rng.permutation(width)[: int(rng.integers(0, width + 1))]
    T = rng.standard_normal((indices.size, width)) * 10.0 ** rng.uniform(-3, 2)
    T[:, indices] = np.eye(indices.size)
    U = rng.standard_normal((families.size(rng, 4), width))
    if rng.random() < 0.5:  # along what the projector stretches most
        P = np.eye(width)
        P[indices] -= T
        U = np.linalg.svd(P)[2][:1]
    return {"consumer": U, "indices": indices, "interpolation": T, "radius": float(10.0 ** rng.uniform(-3, 3))}


def _is_identity_on_skeleton(case: Case) -> bool:
    J, T = np.asarray(case["indices"], dtype=np.intp), np.asarray(case["interpolation"])
    return T.shape == (J.size, np.shape(case["consumer"])[1]) and bool(np.array_equal(T[:, J], np.eye(J.size)))


interpolates = Assumption(
    "T_J = Id", "the interpolation matrix is the identity on the skeleton.", _is_identity_on_skeleton
)


def _change(consumer: Array, indices: Indices, interpolation: Array) -> Array:
    return output_change(consumer, indices, np.asarray(consumer) @ np.asarray(interpolation).T)


def _pointwise_observed(consumer: Array, indices: Indices, interpolation: Array, radius: float) -> float:
    Q = _change(consumer, indices, interpolation)
    return float(np.linalg.norm(Q, 2) ** 2 * radius**2) if Q.size else 0.0


def _change_rounding(consumer: Array, interpolation: Array) -> float:
    """Bound how far a computed ‖Q‖ may be above the exact one, relative to ‖U‖_2·max(‖T‖_2, 1)."""
    # |fl(UTᵀ) − UTᵀ| ≤ (m + 1)·u·|U||T|ᵀ, and ‖|U||T|ᵀ‖ ≤ ‖U‖_F‖T‖_F ≤ m·‖U‖_2‖T‖_2.
    width = int(np.shape(consumer)[1])
    return norm_error(width + 1, 1.0) * (width + 1) + norm_error(max(*np.shape(consumer), 1), 1.0)


def _pointwise_formula() -> sympy.Basic:
    change = NamedQuantity("‖h_p − h_0‖²", r"\|h_p - h_0\|^2")
    consumer, T = NamedQuantity("‖U‖_2", r"\|U\|_2"), NamedQuantity("‖T‖_2", r"\|T\|_2")
    return sympy.Le(change, _RADIUS**2 * consumer**2 * T**2)


RISK_POINTWISE = register(
    Statement(
        id="risk-pointwise",
        title="Change of the outputs on any one input, by the norm of the interpolation matrix",
        reference="ours; Szyld 2006 (doi 10.1007/s11075-006-9046-2) for the norm of an oblique projector",
        status="ours",
        assumptions=(
            Assumption(
                "finite",
                "the consumer, T and 0 ≤ B are finite, and squares of B·U fit float64.",
                lambda case: (
                    bool(np.isfinite(case["consumer"]).all() and np.isfinite(case["interpolation"]).all())
                    and 0 <= case["radius"] < 1e100
                    and float(np.abs(case["consumer"]).max(initial=0.0)) < 1e50
                ),
            ),
            interpolates,
        ),
        observed=_pointwise_observed,
        bound=lambda consumer, indices, interpolation, radius: risk_pointwise(consumer, interpolation, radius),
        relative_error=lambda consumer, indices, interpolation, radius: (
            3 * _change_rounding(consumer, interpolation) + product_error(3)
        ),
        formula=_pointwise_formula,
        draw=_draw_pointwise,
    )
)


# --- all changes at once --------------------------------------------------------------------------------------------


def _shortfall_observed(atoms: Array, weights: Array, samples: int, delta: float) -> float:
    """Return the quantile of λ_max(Σ − Σ̂), which is the largest (R_ID − R̂_ID)/‖Q‖_F² over all changes Q."""
    vectors, p = _coordinates(np.asarray(atoms)), shares(weights)
    return outcomes(weights, samples).quantile(lambda c: _top_eigenvalues(vectors, p - c / samples), delta)


def _largest(atoms: Array, weights: Array) -> float:
    """Return ‖Σ‖, rounded up."""
    root = spectral_norm(np.asarray(atoms) * np.sqrt(shares(weights))[:, None])
    return float(outward(root * root, product_error(4)))


def _bernstein_bound(atoms: Array, weights: Array, samples: int, delta: float) -> float:
    radius, _ = _sizes(atoms)
    return shortfall_bernstein(
        np.shape(atoms)[1], samples=samples, delta=delta, radius=radius, largest=_largest(atoms, weights)
    )


def _shortfall_bound(atoms: Array, weights: Array, samples: int, delta: float) -> float:
    radius, _ = _sizes(atoms)
    return shortfall(np.shape(atoms)[1], samples=samples, delta=delta, radius=radius, largest=_largest(atoms, weights))


def _relative_to(bound: Any) -> Any:
    """Return the rounding of an observed eigenvalue: a few units of Σ p_i‖z_i‖², relative to the bound."""

    def rounding(atoms: Array, weights: Array, samples: int, delta: float) -> float:
        right = bound(atoms, weights, samples, delta)
        _, total = _sizes(np.asarray(atoms) * np.sqrt(shares(weights))[:, None])
        # Coordinates, gaps, products and the eigenvalue of a matrix of at most three rows.
        return 20 * norm_error(np.shape(atoms)[1] + 10, 1.0) * total / right if right > 0 else 0.0

    return rounding


def _bernstein_formula() -> sympy.Basic:
    spread = sympy.sqrt(2 * _RADIUS**2 * _LARGEST * samples_log / n)
    return sympy.Le(_RISK, _EMPIRICAL + _CHANGE**2 * (spread + 2 * _LARGEST * samples_log / (3 * n)))


RISK_BERNSTEIN = register(
    Statement(
        id="risk-bernstein",
        title="Risk of all changes at once with probability 1 − δ, by the matrix Bernstein inequality",
        reference="ours; matrix Bernstein inequality: Tropp 2015 (arXiv 1501.01571), Theorem 6.6.1",
        status="ours",
        assumptions=LAW,
        observed=_shortfall_observed,
        bound=_bernstein_bound,
        relative_error=_relative_to(_bernstein_bound),
        formula=_bernstein_formula,
        draw=_draw_law,
    )
)


def _shortfall_formula() -> sympy.Basic:
    return sympy.Le(_RISK, _EMPIRICAL + _CHANGE**2 * sympy.sqrt(2 * _RADIUS**2 * _LARGEST * samples_log / n))


RISK_SHORTFALL = register(
    Statement(
        id="risk-shortfall",
        title="Risk of all changes at once with probability 1 − δ, without Bernstein's linear term",
        reference="ours",
        status="ours",
        assumptions=LAW,
        observed=_shortfall_observed,
        bound=_shortfall_bound,
        relative_error=_relative_to(_shortfall_bound),
        formula=_shortfall_formula,
        draw=_draw_law,
    )
)


def _draw_relative(rng: np.random.Generator) -> Case:
    case = dict(_draw_law(rng))
    if rng.random() < 0.3:  # none of the few samples is of the one atom: where the bound is nearly attained
        rare = 10.0 ** -rng.uniform(1, 4)
        case |= {"atoms": np.array([[1.0], [0.0]]), "weights": np.array([rare, 1 - rare])}
        case |= {"samples": int(rng.integers(1, 20)), "delta": float((1 - rare) ** 20)}
    return case | {"stake": float(1 - 10.0 ** -rng.uniform(0.01, 4))}


def _relative_observed(atoms: Array, weights: Array, samples: int, delta: float, stake: float) -> float:
    """Return the quantile of λ_max(Σ − (1/n)Σ w(ℓ_i)·z_i z_iᵀ), weights at θ = λ/B²."""
    lengths = np.linalg.norm(atoms, axis=1)
    vectors, p = _coordinates(np.asarray(atoms)), shares(weights)
    heavier = stake_weights((lengths / lengths.max()) ** 2, stake)
    return outcomes(weights, samples).quantile(lambda c: _top_eigenvalues(vectors, p - c / samples * heavier), delta)


def _relative_bound(atoms: Array, weights: Array, samples: int, delta: float, stake: float) -> float:
    radius, _ = _sizes(atoms)
    share = (math.log(np.shape(atoms)[1]) - math.log(delta)) / samples
    return product_up(product_up(radius, radius), float(outward(share / stake, product_error(4))))


def _relative_rounding(atoms: Array, weights: Array, samples: int, delta: float, stake: float) -> float:
    right = _relative_bound(atoms, weights, samples, delta, stake)
    _, total = _sizes(np.asarray(atoms))
    # Weights are up to ln(1/(1 − λ))/λ, and their own rounding is magnified by 1/(1 − λ).
    size = (1 - math.log1p(-stake) / stake) + 1 / (1 - stake)
    return 20 * norm_error(np.shape(atoms)[1] + 10, 1.0) * total * size / right if right > 0 else 0.0


def _relative_formula() -> sympy.Basic:
    stake, theta = sympy.Symbol("lambda", positive=True), sympy.Symbol("tau", positive=True)
    metric = NamedQuantity("tr(QWQᵀ)", r"\operatorname{tr} Q W Q^\top")
    weighted = NamedQuantity("R̂_ID,w", r"\hat R_{\mathrm{ID},w}")
    return sympy.Le(_RISK, weighted + metric * theta * samples_log / (stake * n))


RISK_RELATIVE = register(
    Statement(
        id="risk-relative",
        title="Risk of all changes at once with probability 1 − δ, by samples weighted by their leverage",
        reference="ours",
        status="ours",
        assumptions=(
            *LAW,
            Assumption("0 < λ < 1", "the stake is a share.", lambda case: 0 < case["stake"] < 1),
        ),
        observed=_relative_observed,
        bound=_relative_bound,
        relative_error=_relative_rounding,
        formula=_relative_formula,
        draw=_draw_relative,
    )
)


def _whitened(atoms: Array, weights: Array) -> Array:
    """Return the atoms where their second moments are the identity, shape (r, N)."""
    p = shares(weights)
    sizes = np.abs(atoms).max(axis=0)
    scaled = np.asarray(atoms)[:, sizes > 0] / sizes[sizes > 0]
    left, values, _ = np.linalg.svd(scaled * np.sqrt(p)[:, None], full_matrices=False)
    return np.asarray(left[:, values > 1e-8 * values[0]].T / np.sqrt(p))


def _kurtosis_observed(atoms: Array, weights: Array, samples: int, delta: float) -> float:
    vectors, p = _whitened(atoms, weights), shares(weights)
    return outcomes(weights, samples).quantile(lambda c: _top_eigenvalues(vectors, p - c / samples), delta)


def _kurtosis(atoms: Array, weights: Array) -> float:
    """Return a kurtosis that no direction exceeds: (qᵀz)² ≤ ‖z‖²·E(qᵀz)² where Σ = Id, so the largest leverage."""
    white = _whitened(atoms, weights)
    return max(float(outward((white**2).sum(axis=0).max(), norm_error(len(white), 1.0) + 1e-10)), 1.0)


def _kurtosis_bound(atoms: Array, weights: Array, samples: int, delta: float) -> float:
    kurtosis = _kurtosis(atoms, weights)
    return shortfall_kurtosis(np.shape(atoms)[1], samples=samples, delta=delta, kurtosis=kurtosis)


def _kurtosis_rounding(atoms: Array, weights: Array, samples: int, delta: float) -> float:
    # A few units of the eigenvalues of smallest sign, which reach 1 − (the largest leverage).
    bound = _kurtosis_bound(atoms, weights, samples, delta)
    return 20 * norm_error(20, 1.0) * _kurtosis(atoms, weights) / bound


def _kurtosis_formula() -> sympy.Basic:
    kurtosis, features = sympy.symbols("kappa m", positive=True)
    return sympy.Le(_RISK * (1 - sympy.sqrt(2 * kurtosis * features * samples_log / n)), _EMPIRICAL)


RISK_KURTOSIS = register(
    Statement(
        id="risk-kurtosis",
        title="Risk of all changes at once with probability 1 − δ, for unbounded features of bounded kurtosis",
        reference="ours; in the manner of Oliveira 2016 (doi 10.1007/s00440-016-0738-9)",
        status="ours",
        assumptions=LAW,
        observed=_kurtosis_observed,
        bound=_kurtosis_bound,
        relative_error=_kurtosis_rounding,
        formula=_kurtosis_formula,
        draw=_draw_law,
    )
)


# --- one change, or one of a list ------------------------------------------------------------------------------------

Skeletons = Sequence[tuple[Indices, Array]]
_CHOICES = 6  # skeletons drawn for the samples to choose among


def _draw_pseudodim(rng: np.random.Generator) -> Case:
    law = dict(_draw_law(rng))
    width, samples = law["atoms"].shape[1], law["samples"]
    consumer = rng.standard_normal((families.size(rng, 4), width))
    skeletons = []
    for _ in range(int(rng.integers(1, _CHOICES)) if rng.random() < 0.7 else 1):
        indices = rng.permutation(width)[: 0 if rng.random() < 0.3 else int(rng.integers(0, width + 1))]
        T = rng.standard_normal((indices.size, width)) * 10.0 ** rng.uniform(-3, 2)
        T[:, indices] = np.eye(indices.size)
        skeletons.append((indices, T))
    least = _pseudodim_of(skeletons, width)
    dimension = max(least, 10.0 ** rng.uniform(-6, 2) if rng.random() < 0.7 else 0.0, 1e-6)
    law["samples"] = max(samples, math.ceil(least))
    return law | {"consumer": consumer, "skeletons": skeletons, "dimension": float(min(dimension, law["samples"]))}


def _pseudodim_of(skeletons: Skeletons, width: int) -> float:
    """Bound the pseudo-dimension of the losses of so many skeletons: of N functions, and of quadratic forms in z."""
    return min(math.log2(len(skeletons)), pseudodim_quadratic(width))


def _are_skeletons(case: Case) -> bool:
    return len(case["skeletons"]) > 0 and all(
        _is_identity_on_skeleton({"consumer": case["consumer"], "indices": J, "interpolation": T})
        and bool(np.isfinite(T).all())
        for J, T in case["skeletons"]
    )


def _pseudodim_observed(
    atoms: Array,
    weights: Array,
    samples: int,
    delta: float,
    consumer: Array,
    skeletons: Skeletons,
    dimension: float,
) -> float:
    """Return the quantile of R_ID − R̂_ID for the skeleton that the samples make look best beside what it is."""
    changes = np.stack([_change(consumer, J, T) for J, T in skeletons])
    losses = ((np.asarray(atoms) @ changes.swapaxes(1, 2)) ** 2).sum(axis=2)
    p = shares(weights)
    return outcomes(weights, samples).quantile(lambda c: np.asarray(((p - c / samples) @ losses.T).max(axis=1)), delta)


def _pseudodim_bound(
    atoms: Array,
    weights: Array,
    samples: int,
    delta: float,
    consumer: Array,
    skeletons: Skeletons,
    dimension: float,
) -> float:
    radius, _ = _sizes(atoms)
    return max(
        risk_pseudodim(consumer, T, 0.0, radius=radius, samples=samples, delta=delta, dimension=dimension)
        for _, T in skeletons
    )


def _pseudodim_rounding(
    atoms: Array,
    weights: Array,
    samples: int,
    delta: float,
    consumer: Array,
    skeletons: Skeletons,
    dimension: float,
) -> float:
    right = _pseudodim_bound(atoms, weights, samples, delta, consumer, skeletons, dimension)
    radius, _ = _sizes(atoms)
    size = radius * frobenius_norm(consumer) * (1 + max(frobenius_norm(T) for _, T in skeletons))
    return 40 * norm_error(sum(np.shape(consumer)) + 10, 1.0) * size * size / right if right > 0 else 0.0


def _pseudodim_formula() -> sympy.Basic:
    p, M, T = sympy.Symbol("p", positive=True), sympy.Symbol("M", positive=True), NamedQuantity("‖T‖_2", r"\|T\|_2")
    bracket = sympy.sqrt(2 * p * sympy.log(sympy.E * n / p)) + sympy.sqrt(sympy.log(1 / delta) / 2)
    return sympy.Le(_RISK, _EMPIRICAL + M * (1 + T) ** 2 * bracket / sympy.sqrt(n))


RISK_PSEUDODIM = register(
    Statement(
        id="risk-pseudodim",
        title="Risk with probability 1 − δ in the published form, constants as remembered and not verified",
        reference="Chee et al. 2021 (arXiv 2108.00065), from memory; textbook form: Mohri, Rostamizadeh & Talwalkar"
        " 2018, Theorem 11.8. Attacked where the samples choose one of a few skeletons fixed before",
        status="reconstructed",
        assumptions=(
            *LAW,
            Assumption(
                "consumer",
                "the consumer is finite, one column per feature, and below 1e50.",
                lambda case: (
                    bool(np.isfinite(case["consumer"]).all())
                    and np.shape(case["consumer"])[1] == np.shape(case["atoms"])[1]
                    and float(np.abs(case["consumer"]).max(initial=0.0)) < 1e50
                ),
            ),
            Assumption(
                "skeletons",
                "the samples choose one of N ≥ 1 skeletons fixed before, with finite T that is the identity on it.",
                _are_skeletons,
            ),
            Assumption(
                "p",
                "0 < p ≤ n, and p is at least log₂ N or m(m + 1)/2, which bound the pseudo-dimension of the N losses.",
                lambda case: (
                    0 < case["dimension"] <= case["samples"]
                    and case["dimension"] >= _pseudodim_of(case["skeletons"], np.shape(case["atoms"])[1])
                ),
            ),
        ),
        observed=_pseudodim_observed,
        bound=_pseudodim_bound,
        relative_error=_pseudodim_rounding,
        formula=_pseudodim_formula,
        draw=_draw_pseudodim,
    )
)


def _draw_losses(rng: np.random.Generator) -> Case:
    count = int(rng.integers(2, 4))
    losses = rng.random(count) * rng.integers(0, 2, count)
    losses[0] = 1.0
    weights = 10.0 ** -rng.uniform(0, 3, count)
    samples = int(rng.integers(1, 8)) if count == 3 else int(rng.integers(1, 40))
    chance = float(rng.choice([rng.uniform(0.001, 0.999), 1 - 10.0 ** -rng.uniform(1, 4)]))
    return {"losses": losses, "weights": weights, "samples": samples, "delta": chance}


def _failure(losses: Array, weights: Array, samples: int, delta: float) -> float:
    """Return the probability that the limit of the mean loss falls below it."""
    listed = outcomes(weights, samples)
    mean = float(shares(weights) @ losses) * (1 - 8 * UNIT_ROUNDOFF)
    limits = [mean_upper_limit(np.repeat(losses, c), largest=float(losses.max()), delta=delta) for c in listed.first]
    return float(listed.chances[np.asarray(limits) < mean].sum()) * (1 - listed.error)


def _held_out_formula() -> sympy.Basic:
    failure = NamedQuantity("P(R_ID > limit)", r"P(R_{\mathrm{ID}} > \mathrm{limit})")
    return sympy.Le(failure, delta)


RISK_HELD_OUT = register(
    Statement(
        id="risk-held-out",
        title="Probability that the limit from held-out samples is below the risk of a change",
        reference="ours; after Waudby-Smith & Ramdas 2024 (arXiv 2010.09686)",
        status="ours",
        assumptions=(
            Assumption(
                "losses",
                "there are one to three possible losses, finite and ≥ 0, with positive weights.",
                lambda case: (
                    1 <= np.size(case["losses"]) <= 3
                    and np.size(case["losses"]) == np.size(case["weights"])
                    and bool(np.isfinite(case["losses"]).all() and (np.asarray(case["losses"]) >= 0).all())
                    and bool(np.isfinite(case["weights"]).all() and (np.asarray(case["weights"]) > 0).all())
                ),
            ),
            Assumption(
                "enumerable",
                "there are 1 to 60 samples, of three losses at most 10.",
                lambda case: 1 <= case["samples"] <= (10 if np.size(case["weights"]) == 3 else 60),
            ),
            probability,
        ),
        observed=_failure,
        bound=lambda losses, weights, samples, delta: delta,
        relative_error=lambda losses, weights, samples, delta: product_error(samples + 10) / delta,
        formula=_held_out_formula,
        draw=_draw_losses,
    )
)
