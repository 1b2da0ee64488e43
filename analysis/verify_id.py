"""The risk theorem of interpolative decomposition against one net: skeletons chosen on some inputs, tried on others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import solve_triangular
from scipy.special import ndtri
from torch import Tensor, nn

from ellq.analysis.feature_range import feature_norm_bound
from ellq.theory import (
    Array,
    Gram,
    MomentsLimit,
    empirical_risk,
    feature_moments,
    gram_scale,
    interpolate,
    mean_upper_limit,
    moment_error,
    moments_limit,
    output_aware,
    output_change,
    pivoted_qr,
    pseudodim_quadratic,
    refit,
    ridged,
    risk_bernstein,
    risk_held_out,
    risk_pointwise,
    risk_pseudodim,
    risk_relative,
    risk_shortfall,
    risk_split,
)

RULES = ("chee2021", "ellq")
# What each bound limits, by the name of its column. The first two hold for any inputs whatever, the others with
# probability 1 − δ over the choice and the held-out inputs, for all skeletons of a trial at once.
BOUNDS: Mapping[str, str] = {
    "split": "pruned_risk",
    "pointwise": "largest_ratio",
    "pseudodim": "risk",
    "bernstein": "risk",
    "shortfall": "risk",
    "relative": "risk",
    "held_out": "risk",
    "held_out_within": "risk_within",
    "held_out_clipped": "risk_clipped",
    "halves": "risk_within",
    "outside": "share_outside",
}
CERTAIN = ("split", "pointwise")
FRESH_SHARE = 0.1  # of δ: the probability that a fresh sample shows an excess which is none
_ROUNDING = 1e-9  # relative, of what is observed: sums of up to 1e5 terms of one sign, in float64
_CHUNK = 1000  # inputs at once: 32 MB of features at 4096 units
_REACH = 4.0  # changes count up to this multiple of the largest seen beforehand
_RIDGE = 1e-2  # of the metric: sharper here than a smaller one, which lets few directions decide how far inputs reach


@dataclass(frozen=True)
class Draws:
    """The inputs of one trial, no two parts with an example in common.

    Attributes:
        choice: what the skeletons are chosen with and the bounds made from, shape (n, d), n ≥ 2.
        held_out: some that the choice has not seen, for the bounds that want them.
        fresh: what the bounds are tried on, shape (N, d), N ≥ 2.
        targets: y at the fresh inputs, shape (N, c).
        low: no entry of an input, seen or unseen, is below; −∞ if none is known.
        high: nor above.
    """

    choice: Tensor
    held_out: Tensor
    fresh: Tensor
    targets: Array
    low: float
    high: float


def verify_net(
    net: nn.Sequential, draws: Draws, *, retained: Sequence[int], tolerances: Sequence[float], delta: float
) -> list[dict[str, Any]]:
    """Prune a one-hidden-layer net to several widths by every rule, bound the risk of each, and try the bounds.

    A bound counts as violated where the fresh inputs put what it limits above it by more than their own sampling
    error: the normal limit of a mean at level 0.1·δ, shared by the rows. A bound that does not apply is NaN: those that
    need bounded features where inputs and activation are unbounded, the pseudo-dimension form for fewer samples than
    that, the norm of T where the rule has none.

    Args:
        net: Flatten, Linear, activation, Linear, as ``mlp`` builds it with one hidden width.
        draws: inputs; those of the choice and the held-out ones independent of the net and of one another.
        retained: widths k to prune to.
        tolerances: relative errors to prune to: the fewest units whose R̂_ID is within tol² times the energy of the
            outputs over the choice (their variance for ``"ellq"``, which refits the bias).
        delta: δ of each bound.

    Returns:
        One row per rule and width or tolerance: ``rule``, ``tol``, ``k``; R_ID over the choice (``risk_choice``) and
        over the fresh inputs (``risk``; ``risk_within`` reach; ``risk_clipped``), ``dense_risk``, ``pruned_risk``, the
        largest ‖h_p − h_0‖²/‖z‖² (``largest_ratio``), ``share_outside`` reach, standard errors ``…_error``;
        σ_{k+1}/√n (``singular_value``), ‖A − A_J T‖_F²/n (``feature_error``) and its Eckart–Young floor
        (``feature_floor``), ‖T‖_2 (``interpolation``); a column ``bound_…`` for each of ``BOUNDS``, those broken in
        ``violations``, separated by spaces.
    """
    _, layer, activation, consumer = net.children()
    assert isinstance(layer, nn.Linear)
    assert isinstance(consumer, nn.Linear)
    features = _Features(nn.Sequential(*list(copy.deepcopy(net).children())[:-1]).to("cpu", torch.float64).eval())
    U = consumer.weight.detach().to("cpu", torch.float64).numpy()
    n, m = len(draws.choice), U.shape[1]
    first, second = draws.choice[: n // 2], draws.choice[n // 2 :]
    halves = Gram(m, len(U)), Gram(m, len(U))
    for half, inputs in zip(halves, (first, second), strict=True):
        for Z in features.of(inputs):
            half.update(Z[:, :-1], Z[:, :-1] @ U.T)
    gram = halves[0].merge(halves[1])
    moments = feature_moments(gram, constant=True)
    prunings = [found for rule in RULES for found in _prunings(gram, U, rule, retained, tolerances)]
    changes = np.stack([pruning.change for pruning in prunings])
    metric = ridged(feature_moments(halves[0], constant=True), _RIDGE)
    factor = np.asarray(np.linalg.cholesky(metric), dtype=np.float64)
    reach = max(float(_leverages(Z, factor).max()) for Z in features.of(first))
    evidence = _Evidence(
        consumer=U,
        samples=n,
        moments=moments,
        measured=gram_scale(moments, entry_error=moment_error(n)) ** 2 * (1 + 1e-15),
        widest=feature_norm_bound(layer, activation, draws.low, draws.high),
        factor=factor,
        reach=reach,
        limit=moments_limit(features.of(second), metric, reach=reach, delta=delta),
        held_out=np.concatenate(list(features.of(draws.held_out))),
        delta=delta,
        candidates=len(prunings),
    )
    clips = _REACH * np.stack([_losses(changes, Z).max(axis=0) for Z in features.of(draws.choice)]).max(axis=0)
    fresh = _try(changes, clips, features, draws, consumer, lambda Z: _leverages(Z, factor) <= reach)
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(feature_moments(gram))[::-1], 0.0))
    rows = []
    for i, pruning in enumerate(prunings):
        observed = {name: float(values[i]) for name, values in fresh.items()}
        observed["risk_choice"] = empirical_risk(pruning.change, moments, entry_error=moment_error(n))
        bounds = evidence.bounds(pruning, observed, clip=float(clips[i]))
        level = FRESH_SHARE * delta / len(prunings)
        rows.append(
            {"rule": pruning.rule, "tol": pruning.tol, "k": pruning.k}
            | observed
            | {
                "singular_value": float(sigma[pruning.k]) if pruning.k < m else 0.0,
                "feature_error": pruning.feature_error / n,
                "feature_floor": float((sigma[pruning.k :] ** 2).sum()),
                "interpolation": pruning.interpolation,
            }
            | {f"bound_{name}": value for name, value in bounds.items()}
            | {"violations": " ".join(name for name in bounds if _is_broken(name, bounds[name], observed, level))}
        )
    return rows


@dataclass(frozen=True)
class _Evidence:
    """What the bounds of a trial are made from; features have a constant 1 as the last."""

    consumer: Array
    samples: int
    moments: Array
    measured: float  # ‖Σ̂‖, rounded up
    widest: float  # no features (without the constant) are longer
    factor: Array  # C with CCᵀ = W, the metric
    reach: float
    limit: MomentsLimit
    held_out: Array
    delta: float
    candidates: int

    @cached_property
    def whitened(self) -> Array:
        return np.asarray(solve_triangular(self.factor, self.held_out.T, lower=True).T)

    def bounds(self, pruning: _Pruning, observed: Mapping[str, float], *, clip: float) -> dict[str, float]:
        """Return all bounds for one pruning, NaN where one does not apply."""
        Q, empirical = pruning.change, observed["risk_choice"]
        n, delta, candidates = self.samples, self.delta, self.candidates
        held_out = partial(risk_held_out, delta=delta, candidates=candidates)
        found = dict.fromkeys(BOUNDS, math.nan)
        found["split"] = risk_split(observed["risk"], observed["dense_risk"])
        found["halves"], found["outside"] = self.limit.risk(Q), self.limit.share_outside
        # The metric being CCᵀ, reach is the length of C⁻¹z: factored once instead of for every Q.
        found["held_out_within"] = held_out(Q @ self.factor, self.whitened, radius=math.sqrt(self.reach)).risk
        clipped = np.minimum(_losses(Q[None], self.held_out)[:, 0], clip)
        found["held_out_clipped"] = mean_upper_limit(clipped, largest=clip, delta=delta / candidates)
        if math.isfinite(self.widest):
            radius = math.hypot(self.widest, 1.0) * (1 + 1e-15)
            found["held_out"] = held_out(Q, self.held_out, radius=radius).risk
            found["bernstein"] = risk_bernstein(Q, empirical, radius=radius, samples=n, delta=delta)
            found["shortfall"] = risk_shortfall(
                Q, empirical, radius=radius, samples=n, delta=delta, measured=self.measured
            )
            found["relative"] = risk_relative(Q, empirical, radius=radius, samples=n, delta=delta)
        if math.isfinite(pruning.interpolation):
            m = self.consumer.shape[1]
            T = pruning.interpolation * np.eye(1, m)  # only its norm counts, computed once
            found["pointwise"] = risk_pointwise(self.consumer, T, 1.0)
            dimension = pseudodim_quadratic(m)
            if math.isfinite(self.widest) and n >= dimension:
                found["pseudodim"] = risk_pseudodim(
                    self.consumer, T, empirical, radius=self.widest, samples=n, delta=delta, dimension=dimension
                )
        return found


@dataclass(frozen=True)
class _Pruning:
    """One way to prune h(x) = U·z(x) + b: k units by a rule, and the change Q of the output, shape (c, m + 1)."""

    rule: str
    tol: float
    k: int
    change: Array
    feature_error: float
    interpolation: float


def _prunings(
    gram: Gram, U: Array, rule: str, retained: Sequence[int], tolerances: Sequence[float]
) -> Iterator[_Pruning]:
    intercept = rule == "ellq"
    columns = gram.columns(centred=intercept)
    path = (output_aware if intercept else pivoted_qr)(columns, columns.features)
    errors = refit(gram, path, intercept=intercept).errors
    asked = [(math.nan, k) for k in retained]
    asked += [(tol, max(1, int(np.argmax(errors <= tol**2 * errors[0])))) for tol in tolerances]
    for tol, k in asked:
        selection = path.first(k)
        if intercept:
            solved = refit(gram, selection, intercept=True, present=U.T)
            change = output_change(U, solved.indices, solved.coefficients.T, shift=solved.intercept)
            yield _Pruning(rule, tol, k, change, math.nan, math.nan)
        else:
            skeleton = interpolate(gram, selection, intercept=False)
            T = skeleton.interpolation
            change = output_change(U, skeleton.indices, U @ T.T, shift=np.zeros(len(U)))
            yield _Pruning(rule, tol, k, change, float(skeleton.feature_errors[k]), _norm(T))


def _norm(T: Array) -> float:
    """Return ‖T‖₂, rounded up; from TTᵀ, which is smaller and whose largest eigenvalue is never near 0."""
    return gram_scale(T @ T.T, entry_error=moment_error(T.shape[1]))


def _leverages(Z: Array, factor: Array) -> Array:
    return np.asarray((solve_triangular(factor, Z.T, lower=True) ** 2).sum(axis=0))


class _Features:
    """The features of a hidden layer, with a constant 1 as the last, of any inputs, in float64."""

    def __init__(self, layers: nn.Sequential) -> None:
        self.layers = layers

    def of(self, inputs: Tensor) -> Iterator[Array]:
        with torch.no_grad():
            for chunk in torch.split(inputs, _CHUNK):
                Z = self.layers(chunk.to(torch.float64)).numpy()
                yield np.hstack([Z, np.ones((len(Z), 1))])


def _losses(changes: Array, Z: Array) -> Array:
    """Return ‖Qz‖² for every row z of Z and every Q of ``changes``, shape (K, c, m + 1)."""
    K, c, width = changes.shape
    outputs = (Z @ changes.reshape(K * c, width).T).reshape(len(Z), K, c)
    return np.asarray((outputs**2).sum(axis=2))


def _try(
    changes: Array,
    clips: Array,
    features: _Features,
    draws: Draws,
    consumer: nn.Linear,
    is_within: Callable[[Array], npt.NDArray[np.bool_]],
) -> dict[str, Array]:
    """Return what the bounds limit, over the fresh inputs, with standard errors; one entry per change."""
    U = consumer.weight.detach().to("cpu", torch.float64).numpy()
    b = np.zeros(len(U)) if consumer.bias is None else consumer.bias.detach().to("cpu", torch.float64).numpy()
    K, c, width = changes.shape
    parts: dict[str, list[Array]] = {name: [] for name in ("risk", "clipped", "within", "dense", "pruned", "outside")}
    ratio = np.zeros(K)
    for start, Z in zip(range(0, len(draws.fresh), _CHUNK), features.of(draws.fresh), strict=True):
        outputs = (Z @ changes.reshape(K * c, width).T).reshape(len(Z), K, c)
        gap = Z[:, :-1] @ U.T + b - draws.targets[start : start + len(Z)]
        losses, inside = (outputs**2).sum(axis=2), is_within(Z)
        parts["risk"].append(losses)
        parts["clipped"].append(np.minimum(losses, clips))
        parts["within"].append(losses * inside[:, None])
        parts["outside"].append(np.repeat(1.0 - inside[:, None], K, axis=1))
        parts["dense"].append(np.repeat((gap**2).sum(axis=1)[:, None], K, axis=1))
        parts["pruned"].append(((outputs + gap[:, None]) ** 2).sum(axis=2))
        lengths = (Z[:, :-1] ** 2).sum(axis=1)[:, None]
        ratio = np.maximum(ratio, np.divide(losses, lengths, out=np.zeros_like(losses), where=lengths > 0).max(axis=0))
    names = {
        "risk": "risk",
        "clipped": "risk_clipped",
        "within": "risk_within",
        "outside": "share_outside",
        "dense": "dense_risk",
        "pruned": "pruned_risk",
    }
    found = {"largest_ratio": ratio}
    for part, name in names.items():
        values = np.concatenate(parts[part])
        found[name] = values.mean(axis=0)
        found[f"{name}_error"] = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return found


def _is_broken(name: str, bound: float, observed: Mapping[str, float], level: float) -> bool:
    """Say whether what a bound limits is above it, beyond rounding (if certain) or sampling error at a level."""
    if math.isnan(bound):
        return False
    value, rounded = observed[BOUNDS[name]], bound * (1 + _ROUNDING)
    if name in CERTAIN:
        return value > rounded
    return value - float(ndtri(1 - level)) * observed[f"{BOUNDS[name]}_error"] > rounded
