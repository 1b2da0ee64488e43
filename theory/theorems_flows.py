"""Theorems on what correlation and information between two layers say, registered with both of their sides."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy
from sympy.polys.domains import ZZ
from sympy.polys.matrices import DomainMatrix

from ellq.theory import families
from ellq.theory.arguments import Array
from ellq.theory.flows import probe_covariance
from ellq.theory.gaussian_layers import (
    correlation_information,
    flow_distance_limit,
    hidden_information,
    layer_information,
    linear_information,
    linear_information_and_error,
    unit_information,
)
from ellq.theory.notation import NamedQuantity, finite_weights
from ellq.theory.pair_moments import centred
from ellq.theory.rounding import norm_error, outward, product_error
from ellq.theory.statements import Assumption, Case, Statement, register

Integers = npt.NDArray[np.int64]

_FLOW = NamedQuantity("Δ", r"\Delta")
_INFORMATION = NamedQuantity("I(X;Y)", r"I(X; Y)")
_LEAST_EIGENVALUE = 1e-6  # of correlation matrices whose information is evaluated


def _f(name: NamedQuantity) -> sympy.Basic:
    return -sympy.log(1 - name**2) / 2


# --- the probe identity ---------------------------------------------------------------------------------------------


def _is_table(values: Any) -> bool:
    return np.ndim(values) == 2 and np.shape(values)[1] > 0 and bool(np.isfinite(values).all())


two_layers = Assumption(
    "two layers",
    "both layers are finite matrices of the same two samples or more, of at least one unit.",
    lambda case: _is_table(case["X"]) and _is_table(case["Y"]) and len(case["X"]) == len(case["Y"]) >= 2,
)
known_side = Assumption("side", "the side is above or below.", lambda case: case["side"] in ("above", "below"))


def _draw_layers(rng: np.random.Generator) -> Case:
    X = families.features(rng, families.size(rng, 12))
    X = np.vstack([X, X[:1] + 1.0])  # two samples at least
    kind = rng.integers(3)
    if kind == 0:
        Y = families.features(rng, families.size(rng, 12), samples=len(X))
    elif kind == 1:  # both signs: the flow cancels
        Y = np.hstack([X, -X])
    else:
        Y = X @ rng.standard_normal((X.shape[1], families.size(rng, 12))) + rng.standard_normal((len(X), 1))
    return {"X": X, "Y": Y, "side": ("above", "below")[rng.integers(2)]}


def _all_pairs(X: Array, Y: Array) -> float:
    Z, V = centred(X, "X"), centred(Y, "Y")
    return float((Z.T @ V / len(Z)).mean())


def _by_probes(X: Array, Y: Array) -> float:
    return probe_covariance(centred(X, "X"), centred(Y, "Y"))


def _probe_rounding(X: Array, Y: Array) -> float:
    # Both sides are sums of the same products of standardised activations, whose mean magnitude is at most 1.
    return norm_error(len(X) + np.shape(X)[1] + np.shape(Y)[1] + 8, 1.0)


def _probe_bound(X: Array, Y: Array, side: str) -> float:
    # Two is added on both sides: the rounding of terms that cancel is then small beside the bound.
    value = _by_probes(X, Y) if side == "above" else _all_pairs(X, Y)
    return float(outward(2 + value + 2 * _probe_rounding(X, Y), product_error(1)))


def _probe_formula() -> sympy.Basic:
    probe = NamedQuantity("Cov(s_X, s_Y)", r"\mathrm{Cov}(s_X, s_Y)")
    return sympy.And(sympy.Le(_FLOW, probe), sympy.Le(probe, _FLOW))


FLOW_PROBE = register(
    Statement(
        id="flow-probe",
        title="The signed information flow is the covariance of two averages, one of each layer",
        reference="ours; the flow of Gharatappeh & Yasaei Sekeh 2025 (arXiv 2501.15592) as reconstructed from code",
        status="ours",
        assumptions=(two_layers, known_side),
        observed=lambda X, Y, side: 2 + (_all_pairs(X, Y) if side == "above" else _by_probes(X, Y)),
        bound=_probe_bound,
        relative_error=lambda X, Y, side: 2 * _probe_rounding(X, Y) / _probe_bound(X, Y, side),
        formula=_probe_formula,
        draw=_draw_layers,
    )
)


# --- lower bounds of the information --------------------------------------------------------------------------------

LINKS = {
    "signed": "absolute",
    "absolute": "rms",
    "rms": "largest",
    "largest": "information",
    "signed-probe": "probe",
    "probe": "information",
}
"""Which statistic is compared with which, by the name of the link."""


def _is_correlation(C: Any) -> bool:
    return (
        np.ndim(C) == 2
        and np.shape(C)[0] == np.shape(C)[1] > 1
        and bool(np.isfinite(C).all() and (C == C.T).all() and (np.diag(C) == 1).all())
        and float(np.linalg.eigvalsh(C)[0]) >= _LEAST_EIGENVALUE
    )


correlation_matrix = Assumption(
    "correlations",
    f"the layers are jointly Gaussian, and their correlation matrix has no eigenvalue below {_LEAST_EIGENVALUE:g}, so"
    " that its determinant can be computed.",
    lambda case: _is_correlation(case["correlation"]),
)
both_have_units = Assumption(
    "1 ≤ n < p", "each layer has a unit.", lambda case: 1 <= case["units"] < len(case["correlation"])
)
known_link = Assumption("link", f"the link is one of {', '.join(LINKS)}.", lambda case: case["link"] in LINKS)


def _draw_correlation(rng: np.random.Generator) -> Case:
    p, kind = int(rng.integers(2, 14)), rng.integers(4)
    if kind == 0:
        factors = rng.standard_normal((p, int(rng.integers(1, p + 2))))
        C = factors @ factors.T + np.eye(p) * 10.0 ** -rng.uniform(0, 5)
    elif kind == 1:  # equal correlations: where averages and the largest are the same
        r = rng.uniform(-0.9 / (p - 1), 0.999)
        C = (1 - r) * np.eye(p) + r
    elif kind == 2:  # one pair of units, both signs
        C, r = np.eye(p), 1 - 10.0 ** -rng.uniform(0, 5)
        C[0, -1] = C[-1, 0] = r * rng.choice([-1.0, 1.0])
    else:
        C = np.cov(rng.standard_normal((p, 3 * p + 2)))
    roots = np.sqrt(np.diag(C))
    C = np.clip(C / roots[:, None] / roots, -1, 1)
    C = (C + C.T) / 2
    C = 0.999995 * C + 5e-6 * np.eye(p)
    np.fill_diagonal(C, 1.0)
    return {"correlation": C, "units": int(rng.integers(1, p)), "link": tuple(LINKS)[rng.integers(len(LINKS))]}


def _statistic(C: Array, n: int, name: str) -> tuple[float, float]:
    """Return a statistic of the correlations between the layers, at least 0, and its rounding."""
    R = C[:n, n:]
    error = norm_error(C.size + 8, 1.0)
    if name in ("signed", "signed-probe"):
        return abs(float(R.mean())), error * float(np.abs(R).mean())
    if name == "probe":
        sums = [float(part.sum()) for part in (C[:n, :n], C[n:, n:])]
        value = abs(float(R.sum())) / math.sqrt(sums[0]) / math.sqrt(sums[1])
        # Sums of entries of both signs: off by a share of the sum of magnitudes, at least λ_min times the units.
        strays = [error * float(np.abs(part).sum()) for part in (R, C[:n, :n], C[n:, n:])]
        relative = strays[1] / sums[0] + strays[2] / sums[1]
        return value, strays[0] / math.sqrt(sums[0] * sums[1]) * (1 + relative) + value * (relative + error)
    value = {
        "absolute": float(np.abs(R).mean()),
        "rms": math.sqrt(float((R**2).mean())),
        "largest": float(np.abs(R).max()),
    }[name]
    return value, error * value


def _information_up(value: float, error: float) -> float:
    return float(outward(correlation_information(value + error), product_error(4)))


def _chain_bound(correlation: Array, units: int, link: str) -> float:
    if LINKS[link] == "information":
        return layer_information(correlation, units)
    return _information_up(*_statistic(correlation, units, LINKS[link]))


def _chain_rounding(correlation: Array, units: int, link: str) -> float:
    value, error = _statistic(correlation, units, link)
    # f' = r/(1 − r²), rising; r is at most 1 − λ_min.
    most = value + error
    stray = error * most / ((1 - most) * (1 + most)) + product_error(4) * correlation_information(most)
    return stray / _chain_bound(correlation, units, link)


def _chain_formula() -> sympy.Basic:
    names = [
        _f(NamedQuantity("|mean ρ|", r"|\overline{\rho}|")),
        _f(NamedQuantity("mean|ρ|", r"\overline{|\rho|}")),
        _f(NamedQuantity("rms ρ", r"\mathrm{rms}\,\rho")),
        _f(NamedQuantity("max|ρ|", r"\max|\rho|")),
        _INFORMATION,
    ]
    links = [sympy.Le(low, high) for low, high in pairwise(names)]
    probe = _f(NamedQuantity("|Corr(s_X, s_Y)|", r"|\mathrm{Corr}(s_X, s_Y)|"))
    return sympy.And(*links, sympy.Le(names[0], probe), sympy.Le(probe, _INFORMATION))


FLOW_GAUSSIAN_CHAIN = register(
    Statement(
        id="flow-gaussian-chain",
        title="Mean, absolute, rms and largest correlation bound the information of Gaussian layers from below",
        reference="ours, from inequalities of means and data processing (Cover & Thomas 2006, Theorem 2.8.1)",
        status="ours",
        assumptions=(correlation_matrix, both_have_units, known_link),
        observed=lambda correlation, units, link: correlation_information(_statistic(correlation, units, link)[0]),
        bound=_chain_bound,
        relative_error=_chain_rounding,
        formula=_chain_formula,
        draw=_draw_correlation,
    )
)


# --- no upper bound -------------------------------------------------------------------------------------------------

FLOW_KINDS = ("signed", "absolute", "rms")

known_claim = Assumption(
    "claim", "the claim is of the information or of the flow.", lambda case: case["claim"] in ("information", "flow")
)
known_flow = Assumption("kind", f"the flow is one of {', '.join(FLOW_KINDS)}.", lambda case: case["kind"] in FLOW_KINDS)
resolved_target = Assumption(
    "0 < I ≤ 6", "the information asked for is from above 0 to 6 nats.", lambda case: 0 < case["information"] <= 6
)
resolved_flow = Assumption("flow", "the flow asked for is from 0.005 to 1.", lambda case: 0.005 <= case["flow"] <= 1)


def _draw_hidden(rng: np.random.Generator) -> Case:
    return {
        "information": float(10.0 ** rng.uniform(-3, math.log10(6))),
        "flow": float(10.0 ** rng.uniform(-1.3, 0)),
        "kind": FLOW_KINDS[rng.integers(3)],
        "claim": ("information", "flow")[rng.integers(2)],
    }


def _hidden_observed(information: float, flow: float, kind: str, claim: str) -> float:
    return information if claim == "information" else _statistic(*hidden_information(information, flow), kind)[0]


def _hidden_bound(information: float, flow: float, kind: str, claim: str) -> float:
    return layer_information(*hidden_information(information, flow)) if claim == "information" else flow


def _hidden_formula() -> sympy.Basic:
    low, wanted = NamedQuantity("ε", r"\varepsilon"), NamedQuantity("t", "t")
    return sympy.And(sympy.Le(_FLOW, low), sympy.Le(wanted, _INFORMATION))


FLOW_NO_UPPER = register(
    Statement(
        id="flow-no-upper",
        title="Layers of any information whose correlations average to as little as one likes: no upper bound",
        reference="ours",
        status="ours",
        assumptions=(resolved_target, resolved_flow, known_flow, known_claim),
        observed=_hidden_observed,
        bound=_hidden_bound,
        relative_error=lambda information, flow, kind, claim: (
            0.0 if claim == "information" else norm_error(math.ceil(4 / flow**2) + 8, 1.0)
        ),
        formula=_hidden_formula,
        draw=_draw_hidden,
    )
)


# --- invariances ----------------------------------------------------------------------------------------------------

INVARIANT_KINDS = ("signed", "absolute", "rms", "cka", "gaussian")
_WHOLE = 2**20


def _is_whole(values: Any, ndim: int) -> bool:
    array = np.asarray(values)
    return array.ndim == ndim and array.size > 0 and array.dtype.kind in "iu" and bool((np.abs(array) <= _WHOLE).all())


def _is_monomial(M: Integers, *, positive: bool) -> bool:
    """Whether a map permutes units and scales each."""
    has_one = bool(((M != 0).sum(axis=0) == 1).all() and ((M != 0).sum(axis=1) == 1).all())
    return has_one and (not positive or bool((M >= 0).all()))


def _is_allowed(kind: str, M: Integers) -> bool:
    if kind == "cka":
        squares = M.T @ M
        return bool(squares[0, 0] > 0 and (squares == squares[0, 0] * np.eye(len(M), dtype=np.int64)).all())
    return _determinant(M) != 0 if kind == "gaussian" else _is_monomial(M, positive=kind == "signed")


whole_layers = Assumption(
    "whole numbers",
    "layers, maps and shifts are whole numbers of at most 2^20, so that moments are exact.",
    lambda case: all(_is_whole(case[name], 2) for name in "XYAB") and all(_is_whole(case[name], 1) for name in "ab"),
)
layers_fit = Assumption(
    "shapes",
    "the layers have the same two samples or more, and maps and shifts their widths.",
    lambda case: (
        len(case["X"]) == len(case["Y"]) >= 2
        and np.shape(case["A"]) == 2 * (np.shape(case["X"])[1],)
        and np.shape(case["B"]) == 2 * (np.shape(case["Y"])[1],)
        and np.shape(case["a"]) == np.shape(case["X"])[1:]
        and np.shape(case["b"]) == np.shape(case["Y"])[1:]
    ),
)
map_is_ignored = Assumption(
    "map",
    "the flow is known, and the maps permute units and scale them: by positive numbers for the signed flow, by any but"
    " 0 for absolute and rms; they rotate and scale the layer for CKA, and are invertible for the Gaussian"
    " information.",
    lambda case: case["kind"] in INVARIANT_KINDS and all(_is_allowed(case["kind"], case[name]) for name in "AB"),
)
full_rank = Assumption(
    "rank",
    "for the Gaussian information, no unit is a linear function of others on the samples.",
    lambda case: case["kind"] != "gaussian" or _determinant(_whole_moments(case["X"], case["Y"])) != 0,
)


def _determinant(M: npt.NDArray[Any]) -> int:
    rows = [[ZZ(int(entry)) for entry in row] for row in M]
    return int(DomainMatrix(rows, M.shape, ZZ).det())


def _whole_moments(X: Integers, Y: Integers) -> npt.NDArray[Any]:
    """Return N times the centred second moments of [X | Y], exactly, as Python's numbers."""
    Z = np.hstack([X, Y]).astype(object)
    sums = Z.sum(axis=0)
    return np.asarray(len(Z) * (Z.T @ Z) - sums[:, None] * sums)


def _whole_flow(X: Integers, Y: Integers, kind: str) -> float:
    """Return a flow of whole numbers, exact but for the last few operations."""
    C, n = _whole_moments(X, Y), np.shape(X)[1]
    if kind == "gaussian":
        logarithms = [math.log(_determinant(part)) for part in (C[:n, :n], C[n:, n:], C)]
        return 0.5 * (logarithms[0] + logarithms[1] - logarithms[2])
    if kind == "cka":
        xx, xy, yy = (float((part**2).sum()) for part in (C[:n, :n], C[:n, n:], C[n:, n:]))
        return xy / math.sqrt(xx) / math.sqrt(yy) if xx > 0 and yy > 0 else 0.0
    deviations = np.sqrt(np.array([float(c) for c in np.diag(C)]))
    live = np.where(deviations > 0, deviations, 1.0)
    R = C[:n, n:].astype(np.float64) / live[:n, None] / live[n:]
    if kind == "rms":
        return math.sqrt(float((R**2).mean()))
    return float(R.mean() if kind == "signed" else np.abs(R).mean())


def _rotation(rng: np.random.Generator, n: int) -> Integers:
    """Draw a rotation times a whole number: signed permutations, and turns by the 3-4-5 triangle."""
    M = 5 * np.eye(n, dtype=np.int64) if n > 1 else np.array([[int(rng.integers(1, 6))]])
    if n > 1:
        M[:2, :2] = [[3, 4], [-4, 3]]
        if n > 3:
            M[2:4, 2:4] = [[4, -3], [3, 4]]
    return np.asarray(M[rng.permutation(n)][:, rng.permutation(n)] * rng.choice([-1, 1], n))


def _draw_map(rng: np.random.Generator, n: int, kind: str) -> Integers:
    if kind == "cka":
        return _rotation(rng, n)
    if kind == "gaussian":
        M = np.tril(rng.integers(-3, 4, (n, n)), -1) + np.diag(rng.integers(1, 4, n))
        return np.asarray(M[rng.permutation(n)][:, rng.permutation(n)])
    scales = rng.integers(1, 100, n) * (1 if kind == "signed" else rng.choice([-1, 1], n))
    return np.asarray(np.diag(scales)[rng.permutation(n)])


def _draw_invariance(rng: np.random.Generator) -> Case:
    kind = INVARIANT_KINDS[rng.integers(len(INVARIANT_KINDS))]
    n, m = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    N = int(rng.integers(2, 12)) + (n + m if kind == "gaussian" else 0)
    X = rng.integers(-20, 21, (N, n))
    Y = rng.integers(-20, 21, (N, m)) + X @ rng.integers(-2, 3, (n, m))
    if kind != "gaussian" and rng.random() < 0.2:
        X[:, 0] = 3  # a dead unit
    return {
        "X": X,
        "Y": Y,
        "A": _draw_map(rng, n, kind),
        "B": _draw_map(rng, m, kind),
        "a": rng.integers(-50, 51, n),
        "b": rng.integers(-50, 51, m),
        "kind": kind,
    }


def _invariance_bound(X: Integers, Y: Integers, A: Integers, B: Integers, a: Integers, b: Integers, kind: str) -> float:
    return float(outward(2 + _whole_flow(X, Y, kind) + _whole_rounding(X, Y, kind), product_error(1)))


def _whole_rounding(X: Integers, Y: Integers, kind: str) -> float:
    n, m = np.shape(X)[1], np.shape(Y)[1]
    if kind == "gaussian":
        # Determinants are exact; their logarithms are at most p·log of N²·(largest entry)² in size.
        largest = max(float(np.abs(part).max()) for part in (X, Y))
        return product_error(8) * 3 * int(n + m) * math.log(4 * (len(X) * (largest + 1)) ** 2 + 1)
    return norm_error(int(n * m) + 16, 1.0)


def _invariance_formula() -> sympy.Basic:
    mapped, plain = NamedQuantity("F(XA + a, YB + b)", r"F(XA + a, YB + b)"), NamedQuantity("F(X, Y)", "F(X, Y)")
    return sympy.And(sympy.Le(mapped, plain), sympy.Le(plain, mapped))


FLOW_INVARIANCES = register(
    Statement(
        id="flow-invariances",
        title="What each flow does not see: shifts, scales, signs, rotations, invertible maps",
        reference="by definition; CKA: Kornblith et al. 2019 (arXiv 1905.00414); information: Cover & Thomas 2006",
        status="classical",
        assumptions=(whole_layers, layers_fit, map_is_ignored, full_rank),
        observed=lambda X, Y, A, B, a, b, kind: 2 + _whole_flow(X @ A + a, Y @ B + b, kind),
        bound=_invariance_bound,
        relative_error=lambda X, Y, A, B, a, b, kind: (
            (_whole_rounding(X @ A + a, Y @ B + b, kind) + product_error(1)) / _invariance_bound(X, Y, A, B, a, b, kind)
        ),
        formula=_invariance_formula,
        draw=_draw_invariance,
    )
)


# --- chains ---------------------------------------------------------------------------------------------------------

whole_chain = Assumption(
    "whole numbers",
    "weights and variances of the noise are whole numbers of at most 64, the variances positive, so that covariances"
    " are exact.",
    lambda case: (
        all(_is_whole(case[name], 2) and np.abs(case[name]).max() <= 64 for name in "AB")
        and all(1 <= case[name] <= 64 and case[name] == int(case[name]) for name in ("noise_y", "noise_z"))
    ),
)
chain_fits = Assumption(
    "shapes",
    "the second layer reads what the first makes, of at most 64 units.",
    lambda case: np.shape(case["B"])[1] == np.shape(case["A"])[0] and max(*case["A"].shape, *case["B"].shape) <= 64,
)
resolved_chain = Assumption(
    "resolved",
    "no unit of the last layer has a signal above 1e10 times its noise, cancellation not counted, so that determinants"
    " can be computed.",
    lambda case: (
        _largest_signal(case["B"], case["A"] @ case["A"].T + case["noise_y"] * np.eye(len(case["A"])))
        <= 1e10 * case["noise_z"]
    ),
)


def _largest_signal(W: Array, S: Array) -> float:
    """Return the largest signal of an output of Wx for x of second moments S, cancellation not counted."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.diag(np.abs(W) @ np.abs(S) @ np.abs(W).T).max())


def _draw_markov(rng: np.random.Generator) -> Case:
    n, m, k = (int(rng.integers(1, 5)) for _ in range(3))
    return {
        "A": rng.integers(-4, 5, (m, n)),
        "B": rng.integers(-4, 5, (k, m)) * int(rng.choice([1, 16])),
        "noise_y": int(rng.integers(1, 9)),
        "noise_z": int(rng.integers(1, 9)),
        "side": ("above", "below")[rng.integers(2)],
    }


def _markov_ends(A: Integers, B: Integers, noise_y: int, noise_z: int, side: str) -> tuple[Array, Array, Array]:
    total = noise_y * (B @ B.T) + noise_z * np.eye(len(B), dtype=np.int64)
    return (B @ A).astype(np.float64), np.eye(A.shape[1]), total.astype(np.float64)


def _markov_bound(A: Integers, B: Integers, noise_y: int, noise_z: int, side: str) -> float:
    m = len(A)
    if side == "above":  # I(X; Y)
        return linear_information(A, np.eye(A.shape[1]), noise_y * np.eye(m))
    return linear_information(B, A @ A.T + noise_y * np.eye(m), noise_z * np.eye(len(B)))


def _markov_formula() -> sympy.Basic:
    ends, second = NamedQuantity("I(X;Z)", "I(X; Z)"), NamedQuantity("I(Y;Z)", "I(Y; Z)")
    return sympy.Le(ends, sympy.Min(_INFORMATION, second))


FLOW_MARKOV_CHAIN = register(
    Statement(
        id="flow-markov-chain",
        title="Over two noisy layers no more gets through than over either",
        reference="data processing inequality, Cover & Thomas 2006, Theorem 2.8.1",
        status="classical",
        assumptions=(whole_chain, chain_fits, resolved_chain, known_side),
        observed=lambda **case: max(linear_information_and_error(*_markov_ends(**case))[0], 0.0),
        bound=_markov_bound,
        relative_error=lambda **case: linear_information_and_error(*_markov_ends(**case))[1] / _markov_bound(**case),
        formula=_markov_formula,
        draw=_draw_markov,
    )
)


# --- pruning --------------------------------------------------------------------------------------------------------


def _is_diagonal(S: Array) -> bool:
    return not bool(np.any(S - np.diag(np.diag(S))))


def _is_psd(S: Any) -> bool:
    if np.ndim(S) != 2 or np.shape(S)[0] != np.shape(S)[1] or not np.isfinite(S).all() or (S != S.T).any():
        return False
    return float(np.linalg.eigvalsh(S)[0]) >= 0


finite_layer = Assumption(
    "finite",
    "the weights are finite, with a mask of rows and one of columns.",
    lambda case: (
        _is_table(case["W"])
        and np.shape(case["rows"]) == np.shape(case["W"])[:1]
        and np.shape(case["columns"]) == np.shape(case["W"])[1:]
    ),
)
covariance_fits = Assumption(
    "Σ",
    "the inputs are Gaussian with a covariance matrix, symmetric and without negative eigenvalues.",
    lambda case: len(case["covariance"]) == np.shape(case["W"])[1] and _is_psd(case["covariance"]),
)
resolved_signal = Assumption(
    "σ² > 0",
    "the noise is independent of equal variances σ² > 0, and no output has a signal above 1e8·σ², cancellation not"
    " counted.",
    lambda case: 0 < case["noise"] < np.inf and _largest_signal(case["W"], case["covariance"]) <= 1e8 * case["noise"],
)
inputs_independent = Assumption(
    "independent where removed",
    "inputs are independent, if any are removed.",
    lambda case: bool(np.all(case["columns"])) or _is_diagonal(np.asarray(case["covariance"])),
)


def _draw_pruned(rng: np.random.Generator) -> Case:
    m, n = int(rng.integers(1, 6)), int(rng.integers(1, 7))
    W = rng.standard_normal((m, n)) * 10.0 ** rng.uniform(-1, 1)
    if rng.random() < 0.3:
        W = np.ones((m, n))
    columns = rng.random(n) < 0.7 if rng.random() < 0.5 else np.ones(n, dtype=bool)
    if columns.all():
        factor = rng.standard_normal((n, n))
        S = factor @ factor.T
        S = (S + S.T) / 2 + 1e-9 * np.eye(n)
    else:
        S = np.diag(10.0 ** rng.uniform(-2, 2, n))
    return {
        "W": W,
        "covariance": S,
        "noise": float(10.0 ** rng.uniform(-3, 2)),
        "rows": rng.random(m) < 0.7,
        "columns": columns,
    }


def _pruned_layer(W: Array, covariance: Array, noise: float, rows: Array, columns: Array) -> tuple[Array, Array, Array]:
    kept = W * np.asarray(rows, dtype=bool)[:, None] * np.asarray(columns, dtype=bool)
    return kept, covariance, noise * np.eye(len(W))


def _pruning_bound(W: Array, covariance: Array, noise: float, rows: Array, columns: Array) -> float:
    return linear_information(W, covariance, noise * np.eye(len(W)))


def _pruning_formula() -> sympy.Basic:
    return sympy.Le(
        NamedQuantity("I(x; (M∘W)x + σε)", r"I(x; (M \circ W)x + \sigma\varepsilon)"),
        NamedQuantity("I(x; Wx + σε)", r"I(x; Wx + \sigma\varepsilon)"),
    )


PRUNING_MI = register(
    Statement(
        id="pruning-mi",
        title="Removing outputs, or independent inputs, never raises what a noisy linear layer tells of its inputs",
        reference="ours, from data processing and the monotonicity of the determinant",
        status="ours",
        assumptions=(finite_layer, covariance_fits, resolved_signal, inputs_independent),
        observed=lambda **case: max(linear_information_and_error(*_pruned_layer(**case))[0], 0.0),
        bound=_pruning_bound,
        relative_error=lambda **case: linear_information_and_error(*_pruned_layer(**case))[1] / _pruning_bound(**case),
        formula=_pruning_formula,
        draw=_draw_pruned,
    )
)

mask_fits = Assumption(
    "mask",
    "the mask says of every weight whether it is kept.",
    lambda case: np.shape(case["kept"]) == np.shape(case["w"]),
)
positive_sizes = Assumption(
    "s, σ",
    "inputs and noise have standard deviations from 1e-100 to 1e100.",
    lambda case: 1e-100 <= case["scale"] <= 1e100 and 1e-100 <= case["noise"] <= 1e100,
)


def _draw_unit_mask(rng: np.random.Generator) -> Case:
    w = families.vector(rng, largest=60)
    kept = rng.random(w.size) < rng.random()
    if rng.random() < 0.5:  # all but one as magnitude has it: where the bound is nearly attained
        kept = np.zeros(w.size, dtype=bool)
        kept[np.argsort(-np.abs(w), kind="stable")[: int(rng.integers(1, w.size + 1))]] = True
        kept[rng.integers(w.size)] ^= True
    return {
        "w": w,
        "kept": kept,
        "scale": float(10.0 ** rng.uniform(-3, 3)),
        "noise": float(10.0 ** rng.uniform(-3, 3)),
    }


def _by_magnitude(w: Array, kept: npt.NDArray[np.bool_], scale: float, noise: float) -> float:
    largest = np.sort(np.abs(w))[::-1][: int(np.count_nonzero(kept))]
    return unit_information(largest, scale=scale, noise=noise)


def _magnitude_formula() -> sympy.Basic:
    kept, best = NamedQuantity("‖M∘w‖", r"\|M \circ w\|"), NamedQuantity("‖w_{1…k}*‖", r"\|w^*_{1 \ldots k}\|")
    s, sigma = sympy.symbols("s sigma", positive=True)
    return sympy.Le(*(sympy.log(1 + s**2 * norm**2 / sigma**2) / 2 for norm in (kept, best)))


PRUNING_MI_MAGNITUDE = register(
    Statement(
        id="pruning-mi-magnitude",
        title="Of masks that keep k weights of a unit, the largest magnitudes keep most information",
        reference="ours",
        status="ours",
        assumptions=(finite_weights, mask_fits, positive_sizes),
        observed=lambda w, kept, scale, noise: unit_information(np.where(kept, w, 0.0), scale=scale, noise=noise),
        bound=_by_magnitude,
        # The observed side is rounded up itself, in logarithms of at most 710 and two of 231.
        relative_error=lambda w, kept, scale, noise: (
            4 * product_error(4) * (2 * 745 + 2 * 231) + 4 * norm_error(np.size(w), 1.0)
        ),
        formula=_magnitude_formula,
        draw=_draw_unit_mask,
    )
)


# --- thresholds -----------------------------------------------------------------------------------------------------

flows_in_range = Assumption(
    "range",
    "both are vectors of as many flows, at least one, in [−1, 1] where signed and in [0, 1] where not.",
    lambda case: (
        np.ndim(case["first"]) == 1
        and np.shape(case["first"]) == np.shape(case["second"])
        and np.size(case["first"]) > 0
        and all(
            bool(np.all((np.asarray(case[name]) >= (-1 if case["signed"] else 0)) & (np.asarray(case[name]) <= 1)))
            for name in ("first", "second")
        )
    ),
)


def _draw_vectors(rng: np.random.Generator) -> Case:
    signed, P = bool(rng.integers(2)), families.size(rng, 40)
    first, second = rng.uniform(-1 if signed else 0, 1, (2, P))
    if rng.random() < 0.4:
        first, second = np.ones(P), np.full(P, -1.0 if signed else 0.0)
    return {"first": first, "second": second, "signed": signed}


def _threshold_formula() -> sympy.Basic:
    depth = sympy.Symbol("L", integer=True, positive=True)
    return sympy.Le(NamedQuantity("‖Δ − Δ'‖", r"\|\Delta - \Delta'\|_2"), 2 * sympy.sqrt(depth - 1))


FLOW_TRIVIAL_THRESHOLD = register(
    Statement(
        id="flow-trivial-threshold",
        title="Two flow vectors are never further apart than this: a larger threshold fires at the first check",
        reference="ours",
        status="ours",
        assumptions=(flows_in_range,),
        observed=lambda first, second, signed: float(np.linalg.norm(np.asarray(first) - np.asarray(second))),
        bound=lambda first, second, signed: flow_distance_limit(np.size(first), signed=signed),
        relative_error=lambda first, second, signed: norm_error(np.size(first) + 2, 2.0),
        formula=_threshold_formula,
        draw=_draw_vectors,
    )
)
