"""Theorems on the error of a skeleton of features, registered with both of their sides."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.arguments import Array, Indices
from ellq.theory.id_bounds import (
    Norm,
    eckart_young_floor,
    frobenius_norm,
    leverage_factor,
    leverage_sampling_bound,
    pivot_ratio_bounds,
    pivot_threshold,
    qrcp_factor,
    skeleton_output_bound,
    skeleton_residual,
    spectral_norm,
    strong_rrqr_factor,
    swap_limit,
    unit_scaled,
    volume_sampling_bound,
)
from ellq.theory.notation import (
    NamedQuantity,
    k,
)
from ellq.theory.propagation import (
    unit_error_observed,
)
from ellq.theory.rounding import norm_error, outward, product_error, product_up
from ellq.theory.statements import Assumption, Case, Statement, register

m, sigma = sympy.Symbol("m", positive=True), NamedQuantity("σ_{k+1}(A)", r"\sigma_{k+1}(A)")
_NORMS: tuple[Norm, ...] = ("spectral", "frobenius")
_RESIDUAL = NamedQuantity("‖A − A_J·T‖", r"\|A - A_J T\|")
_R22 = NamedQuantity("‖R22‖", r"\|R_{22}\|")

finite_features = Assumption(
    "finite", "all features are finite.", lambda case: bool(np.isfinite(case["features"]).all())
)
triangular_factor = Assumption(
    "triangular",
    "R is finite and upper triangular, not all zeros.",
    lambda case: (
        np.ndim(case["R"]) == 2
        and bool(np.isfinite(case["R"]).all() and np.any(case["R"]) and not np.tril(case["R"], -1).any())
        and len(case["R"]) <= np.shape(case["R"])[1]
    ),
)
keeps_columns = Assumption(
    "0 ≤ k ≤ m",
    "between none and all columns are kept.",
    lambda case: 0 <= case["retained"] <= np.shape(case.get("R", case.get("features")))[1],
)
known_norm = Assumption("norm", "the norm is spectral or frobenius.", lambda case: case["norm"] in _NORMS)


def _norm_of(matrix: Array, norm: Norm) -> float:
    M, e = unit_scaled(matrix)
    if not M.any():
        return 0.0
    return float(np.ldexp(np.linalg.norm(M, 2 if norm == "spectral" else "fro"), e))


def _norm_rounding(shape: tuple[int, ...]) -> float:
    # A computed norm: as ``spectral_norm`` and ``frobenius_norm`` round it.
    return norm_error(max(shape), 1.0) + norm_error(int(np.prod(shape)), 2.0)


def _singular_values_up(A: Array) -> Array:
    """Return no less than the exact singular values, in falling order."""
    scaled, e = unit_scaled(A)
    values = np.linalg.svd(scaled, compute_uv=False)
    # LAPACK's are off by a modest multiple of u·σ_1 (Anderson et al. 1999, section 4.9); max(shape) covers it.
    with np.errstate(over="ignore"):
        return np.asarray(np.ldexp(outward(values + values[0] * norm_error(max(A.shape), 1.0), product_error(1)), e))


# --- the empirical risk ---------------------------------------------------------------------------------------------


def _draw_skeleton(rng: np.random.Generator) -> Case:
    width = families.size(rng, 20)
    features = families.features(rng, width)
    indices = rng.permutation(width)[: int(rng.integers(1, width + 1))]
    T = np.linalg.lstsq(features[:, indices], features, rcond=None)[0]
    return {"features": features, "indices": indices, "interpolation": T, "consumer": rng.standard_normal(width)}


def _risk_formula() -> sympy.Basic:
    n = sympy.Symbol("n", positive=True)
    error, residual = (
        NamedQuantity("‖(A − A_J·T)u‖", r"\|(A - A_J T)u\|_2"),
        NamedQuantity("‖A − A_J·T‖", r"\|A - A_J T\|_2"),
    )
    return sympy.Le(error / sympy.sqrt(n), residual * NamedQuantity("‖u‖", r"\|u\|_2") / sympy.sqrt(n))


RISK_EMPIRICAL = register(
    Statement(
        id="risk-empirical",
        title="Error of a unit whose inputs are replaced by their skeleton",
        reference="Chee et al. 2021 (arXiv 2108.00065), empirical risk bound as reconstructed",
        status="reconstructed",
        assumptions=(finite_features,),
        observed=lambda features, indices, interpolation, consumer: unit_error_observed(
            consumer, skeleton_residual(features, indices, interpolation, np.zeros(np.shape(features)[1]))
        ),
        bound=lambda features, indices, interpolation, consumer: float(
            skeleton_output_bound(
                skeleton_residual(features, indices, interpolation, np.zeros(np.shape(features)[1])),
                np.asarray(consumer)[None],
            )[0]
        ),
        # Both sides start from the same computed residual E; |fl(Eu) − Eu| ≤ m·u·|E||u| ≤ m^1.5·u·‖E‖₂‖u‖.
        relative_error=lambda features, indices, interpolation, consumer: (
            norm_error(np.shape(features)[1], 1.0) * float(np.sqrt(np.shape(features)[1]))
            + norm_error(np.shape(features)[0], 2.0)
        ),
        formula=_risk_formula,
        draw=_draw_skeleton,
    )
)


# --- the floor ------------------------------------------------------------------------------------------------------


def _draw_floor(rng: np.random.Generator) -> Case:
    width = families.size(rng, 12)
    A = families.triangular(rng) if rng.random() < 0.4 else families.features(rng, width)
    retained = int(rng.integers(1, A.shape[1] + 1))
    # The longest columns half of the time: the best ones where columns are orthogonal.
    lengths = np.linalg.norm(A, axis=0)
    indices = np.argsort(-lengths, kind="stable")[:retained]
    if rng.random() < 0.5:
        indices = rng.permutation(A.shape[1])[:retained]
    T = np.linalg.lstsq(A[:, indices], A, rcond=None)[0]
    return {"features": A, "indices": indices, "interpolation": T, "norm": _NORMS[rng.integers(2)]}


def _floor_bound(features: Array, indices: Indices, interpolation: Array, norm: Norm) -> float:
    residual = skeleton_residual(features, indices, interpolation, np.zeros(np.shape(features)[1]))
    size = spectral_norm(residual) if norm == "spectral" else frobenius_norm(residual)
    # Entry by entry the residual is off by (k + 2)u of the sum of magnitudes it is made of.
    magnitudes = np.abs(features) + np.abs(features)[:, indices] @ np.abs(interpolation)
    stray = product_up(norm_error(len(indices) + 2, 1.0), frobenius_norm(magnitudes))
    return float(outward(size + stray, product_error(1)))


def _floor_rounding(features: Array, indices: Indices, interpolation: Array, norm: Norm) -> float:
    bound = _floor_bound(features, indices, interpolation, norm)
    stray = norm_error(max(features.shape), 1.0) * np.sqrt(min(features.shape)) * spectral_norm(features)
    return float(stray / bound) if bound > 0 else 0.0


def _floor_formula() -> sympy.Basic:
    return sympy.Le(NamedQuantity("‖A − A_k‖", r"\|A - A_k\|"), _RESIDUAL)


ECKART_YOUNG = register(
    Statement(
        id="eckart-young",
        title="No skeleton is better than the best approximation of its rank",
        reference="Eckart & Young 1936; Mirsky 1960",
        status="classical",
        assumptions=(finite_features, known_norm),
        observed=lambda features, indices, interpolation, norm: eckart_young_floor(
            _singular_values(features), len(indices), norm=norm
        ),
        bound=_floor_bound,
        relative_error=_floor_rounding,
        formula=_floor_formula,
        draw=_draw_floor,
    )
)


def _singular_values(A: Array) -> Array:
    scaled, e = unit_scaled(np.asarray(A, dtype=np.float64))
    return np.asarray(np.ldexp(np.linalg.svd(scaled, compute_uv=False), e))


# --- pivoted and strong rank-revealing QR ---------------------------------------------------------------------------


def _draw_factor(rng: np.random.Generator) -> Case:
    R = families.triangular(rng) * 10.0 ** rng.uniform(-3, 3)
    # Most often one short of all: where a triangular factor is furthest from its singular values.
    width = R.shape[1]
    retained = max(width - 1, 0) if rng.random() < 0.4 else int(rng.integers(0, width + 1))
    return {"R": R, "retained": retained, "norm": _NORMS[rng.integers(2)]}


def _draw_qrcp(rng: np.random.Generator) -> Case:
    case = dict(_draw_factor(rng))
    return case | {"threshold": pivot_threshold(case["R"], case["retained"])}


def _rest(R: Array, retained: int, norm: Norm) -> float:
    return _norm_of(np.asarray(R, dtype=np.float64)[retained:], norm)


def _next_value(R: Array, retained: int) -> float:
    values = _singular_values_up(R)
    return float(values[retained]) if retained < values.size else 0.0


def _qrcp_formula() -> sympy.Basic:
    return sympy.Le(
        NamedQuantity("‖R22‖_2", r"\|R_{22}\|_2"), sigma * sympy.sqrt(1 + (m - k) * (4**k - 1) / sympy.Integer(3))
    )


QRCP = register(
    Statement(
        id="qrcp",
        title="Error of column-pivoted QR from the best approximation of its rank",
        reference="Kawamura & Suda 2021 (doi 10.1007/s13160-021-00459-x) for the spectral norm; Frobenius norm,"
        " threshold pivoting and the proof ours; weaker form √(m − k)·2^k: Gu & Eisenstat 1996",
        status="published",
        assumptions=(
            triangular_factor,
            keeps_columns,
            known_norm,
            Assumption(
                "pivoted",
                "no column left at one of the first k pivots is longer than f times the pivot, 1 ≤ f < ∞.",
                lambda case: max(1.0, pivot_threshold(case["R"], case["retained"])) <= case["threshold"] < np.inf,
            ),
        ),
        observed=lambda R, retained, norm, threshold: _rest(R, retained, norm),
        bound=lambda R, retained, norm, threshold: product_up(
            qrcp_factor(retained, R.shape[1], norm=norm, threshold=threshold), _next_value(R, retained)
        ),
        relative_error=lambda R, retained, norm, threshold: _norm_rounding(R.shape),
        formula=_qrcp_formula,
        draw=_draw_qrcp,
    )
)


def _draw_strong(rng: np.random.Generator) -> Case:
    case = dict(_draw_factor(rng))
    if rng.random() < 0.3:  # two nearly parallel columns: where the factor is attained
        t = 1 - 10.0 ** -rng.uniform(0, 6)
        case |= {"R": np.array([[1.0, t], [0.0, np.sqrt((1 - t) * (1 + t))]]), "retained": 1}
    return case | {"limit": swap_limit(case["R"], case["retained"])}


def _strong_bound(R: Array, retained: int, norm: Norm, limit: float) -> float:
    values = _singular_values_up(R)[retained:]
    floor = frobenius_norm(values[None]) if norm == "frobenius" else float(values[0]) if values.size else 0.0
    return product_up(strong_rrqr_factor(retained, R.shape[1], limit=limit), floor)


def _strong_formula() -> sympy.Basic:
    f = sympy.Symbol("f", positive=True)
    return sympy.Le(_R22, NamedQuantity("‖A − A_k‖", r"\|A - A_k\|") * sympy.sqrt(1 + f**2 * k * (m - k)))


STRONG_RRQR = register(
    Statement(
        id="strong-rrqr",
        title="Error of a skeleton that no swap of two columns improves much",
        reference="Gu & Eisenstat 1996 (doi 10.1137/0917055), Theorem 3.2",
        status="classical",
        assumptions=(
            triangular_factor,
            keeps_columns,
            known_norm,
            Assumption(
                "swaps",
                "no swap of a chosen column for another multiplies the volume by more than f < ∞.",
                lambda case: swap_limit(case["R"], case["retained"]) <= case["limit"] < np.inf,
            ),
        ),
        observed=lambda R, retained, norm, limit: _rest(R, retained, norm),
        bound=_strong_bound,
        relative_error=lambda R, retained, norm, limit: _norm_rounding(R.shape),
        formula=_strong_formula,
        draw=_draw_strong,
    )
)


def _draw_pivots(rng: np.random.Generator) -> Case:
    R, width = families.triangular(rng), families.size(rng, 12)
    retained = int(rng.integers(0, R.shape[1]))
    kind = rng.integers(4)
    if kind == 0:  # a large column, and equal small ones orthogonal to it
        R, retained = np.zeros((width + 1, width + 1)), 1
        R[0, 0], R[1, 1:] = 1.0, 10.0 ** -rng.uniform(1, 4)
    elif kind == 1:  # equal columns, and one near them
        R, retained = np.zeros((width + 1, width + 1)), 1
        R[0], R[1, 1] = 1.0, 10.0 ** -rng.uniform(1, 4)
    return {
        "R": R,
        "retained": retained,
        "side": ("lower", "upper")[rng.integers(2)],
        "threshold": pivot_threshold(R, retained + 1),
    }


def _pivots(R: Array, retained: int) -> float:
    pivots = np.abs(np.diag(R))
    return float(pivots[retained] / pivots[0]) if retained < pivots.size else 0.0


def _share_up(R: Array, retained: int) -> float:
    scaled, _ = unit_scaled(R)
    largest = np.linalg.norm(scaled, 2) * (1 - norm_error(max(R.shape), 1.0))
    return float(outward(spectral_norm(scaled[retained:]) / largest, product_error(2)))


def _pivot_observed(R: Array, retained: int, side: str, threshold: float) -> float:
    if side == "upper":
        return _rest(R, retained, "spectral") / _norm_of(R, "spectral")
    return pivot_ratio_bounds(_pivots(R, retained), retained, R.shape[1], threshold=threshold)[0]


def _pivot_bound(R: Array, retained: int, side: str, threshold: float) -> float:
    if side == "lower":
        return _share_up(R, retained)
    # A quotient of two given numbers: rounded up once.
    ratio = float(outward(_pivots(R, retained), product_error(1)))
    return pivot_ratio_bounds(min(ratio, threshold), retained, R.shape[1], threshold=threshold)[1]


def _pivot_formula() -> sympy.Basic:
    ratio, error = NamedQuantity("ρ_k", r"\rho_k"), NamedQuantity("ε_k", r"\varepsilon_k")
    return sympy.And(sympy.Le(ratio / sympy.sqrt(m), error), sympy.Le(error, ratio * sympy.sqrt(m - k)))


PIVOT_RATIO = register(
    Statement(
        id="pivot-ratio",
        title="Relative error of column-pivoted QR from the ratio of two pivots",
        reference="ours",
        status="ours",
        assumptions=(
            triangular_factor,
            Assumption(
                "k < r",
                "some pivot is left, and the first is not zero.",
                lambda case: 0 <= case["retained"] < len(case["R"]) and case["R"][0, 0] != 0,
            ),
            Assumption("side", "the side is lower or upper.", lambda case: case["side"] in ("lower", "upper")),
            Assumption(
                "pivoted",
                "no column left at one of the first k + 1 pivots is longer than f times the pivot, 1 ≤ f < ∞.",
                lambda case: max(1.0, pivot_threshold(case["R"], case["retained"] + 1)) <= case["threshold"] < np.inf,
            ),
        ),
        observed=_pivot_observed,
        bound=_pivot_bound,
        relative_error=lambda R, retained, side, threshold: 2 * _norm_rounding(R.shape) + product_error(3),
        formula=_pivot_formula,
        draw=_draw_pivots,
    )
)


# --- sampled columns ------------------------------------------------------------------------------------------------

_SUBSETS = 7  # columns whose subsets are enumerated


def _draw_volume(rng: np.random.Generator) -> Case:
    width = int(rng.integers(1, _SUBSETS))
    kind = rng.integers(3)
    if kind == 0:
        A = families.features(rng, width, samples=int(rng.integers(1, 8)))
    elif kind == 1:  # k large directions and equal small ones: where the bound is nearly attained
        large = int(rng.integers(0, width + 1))
        A = np.diag(np.where(np.arange(width) < large, 10.0 ** rng.uniform(0, 6), 1.0))
    else:
        A = rng.standard_normal((width, width)) * 10.0 ** rng.uniform(-4, 4, width)[:, None]
    return {"features": A, "retained": int(rng.integers(0, width))}


def _whole(A: Array) -> tuple[list[list[int]], int]:
    """Return whole numbers and s such that they times 2^s are the entries of A."""
    mantissas, exponents = np.frexp(np.asarray(A, dtype=np.float64))
    digits = np.ldexp(mantissas, 53).astype(np.int64)
    scale = int(exponents[digits != 0].min(initial=1100)) - 53
    return [
        [int(d) << max(int(e) - 53 - scale, 0) for d, e in zip(*rows, strict=True)]
        for rows in zip(digits, exponents, strict=True)
    ], scale


def _determinant(M: list[list[int]]) -> int:
    """Return the determinant of a matrix of whole numbers, by Bareiss's elimination without fractions."""
    M, sign, before = [row[:] for row in M], 1, 1
    for i in range(len(M) - 1):
        if M[i][i] == 0:
            swap = next((j for j in range(i + 1, len(M)) if M[j][i]), None)
            if swap is None:
                return 0
            M[i], M[swap], sign = M[swap], M[i], -sign
        for j in range(i + 1, len(M)):
            for t in range(i + 1, len(M)):
                M[j][t] = (M[j][t] * M[i][i] - M[j][i] * M[i][t]) // before
        before = M[i][i]
    return sign * (M[-1][-1] if M else 1)


def _volumes(G: list[list[int]], size: int) -> int:
    """Return the sum of all principal minors of a size."""
    return sum(_determinant([[G[i][j] for j in J] for i in J]) for J in combinations(range(len(G)), size))


def _volume_observed(features: Array, retained: int) -> float:
    A, scale = _whole(features)
    width = np.shape(features)[1]
    G = [[sum(row[i] * row[j] for row in A) for j in range(width)] for i in range(width)]
    # Σ_J det(G_J)·‖A − A_J T‖_F² = Σ_J Σ_{j∉J} det(G_{J∪j}) = (k + 1)·Σ of the minors of size k + 1: base times height.
    total, volume = (retained + 1) * _volumes(G, retained + 1), _volumes(G, retained)
    shift = max(total.bit_length() - volume.bit_length() - 60, -2000)
    ratio = total * 2 ** max(-shift, 0) // (volume * 2 ** max(shift, 0))
    return float(np.ldexp(float(ratio), shift + 2 * scale))


def _volume_formula() -> sympy.Basic:
    i, r = sympy.symbols("i r", integer=True, positive=True)
    values = sympy.IndexedBase("sigma")
    mean = NamedQuantity("E‖A − A_J·T‖_F²", r"\mathbb{E}\|A - A_J T\|_F^2")
    return sympy.Le(mean, (k + 1) * sympy.Sum(values[i] ** 2, (i, k + 1, r)))


VOLUME_SAMPLING = register(
    Statement(
        id="volume-sampling",
        title="Mean squared error of columns drawn with probability proportional to their squared volume",
        reference="Deshpande, Rademacher, Vempala & Wang 2006 (doi 10.4086/toc.2006.v002a012), Theorem 1.3",
        status="classical",
        assumptions=(
            finite_features,
            Assumption(
                "enumerable",
                f"there are at most {_SUBSETS} columns, and entries of 1e-100 to 1e100 or 0.",
                lambda case: (
                    np.ndim(case["features"]) == 2
                    and np.shape(case["features"])[1] <= _SUBSETS
                    and _is_moderate(case["features"])
                ),
            ),
            Assumption(
                "volume",
                "some k columns, 0 ≤ k < m, are independent.",
                lambda case: (
                    0 <= case["retained"] < np.shape(case["features"])[1]
                    and _has_volume(case["features"], case["retained"])
                ),
            ),
        ),
        observed=_volume_observed,
        bound=lambda features, retained: volume_sampling_bound(_singular_values_up(features), retained),
        relative_error=lambda features, retained: product_error(1),  # whole numbers, rounded once to 60 bits and 53
        formula=_volume_formula,
        draw=_draw_volume,
    )
)


def _is_moderate(A: Array) -> bool:
    sizes = np.abs(A)
    return bool(np.all((sizes == 0) | ((sizes >= 1e-100) & (sizes <= 1e100))))


def _has_volume(A: Array, retained: int) -> bool:
    whole, _ = _whole(A)
    width = np.shape(A)[1]
    G = [[sum(row[i] * row[j] for row in whole) for j in range(width)] for i in range(width)]
    return _volumes(G, retained) > 0


def _draw_leverage(rng: np.random.Generator) -> Case:
    A = families.triangular(rng) if rng.random() < 0.4 else families.features(rng, families.size(rng, 12))
    rank = int(rng.integers(0, A.shape[1] + 1))
    basis = np.linalg.svd(A)[2][:rank].T
    falling = np.argsort(-(basis**2).sum(axis=1), kind="stable")
    if rng.random() < 0.3:
        falling = rng.permutation(A.shape[1])
    indices = falling[: int(rng.integers(rank, A.shape[1] + 1))]
    return {"features": A, "basis": basis, "indices": indices, "norm": _NORMS[rng.integers(2)]}


def _missing(basis: Array, indices: Indices) -> float:
    """Return the leverage outside J for the nearest orthonormal basis of the same span, rounded up."""
    gone = np.delete(basis, indices, axis=0)
    lost = frobenius_norm(gone) ** 2
    return float(outward(lost * (1 + 2 * _skew(basis)), product_error(3))) if lost else 0.0


def _skew(basis: Array) -> float:
    """Return how far VᵀV is from the identity, in the Frobenius norm, rounded up."""
    span = int(basis.shape[1])
    return float(np.linalg.norm(basis.T @ basis - np.eye(span))) + (span + 1) * norm_error(len(basis), 1.0)


def _leverage_observed(features: Array, basis: Array, indices: Indices, norm: Norm) -> float:
    A, e = unit_scaled(features)
    Q = np.linalg.qr(A[:, indices])[0]
    return float(np.ldexp(_norm_of(A - Q @ (Q.T @ A), norm), e))


def _leverage_bound(features: Array, basis: Array, indices: Indices, norm: Norm) -> float:
    A, e = unit_scaled(features)
    rest = A - (A @ basis) @ basis.T
    # Any approximation A ≈ XVᵀ will do for the theorem, the computed X = AV too; its own product is off by this:
    stray = product_up(norm_error(sum(basis.shape) + 2, 1.0), frobenius_norm(A) * (1.0 + frobenius_norm(basis)) ** 2)
    size = (spectral_norm(rest) if norm == "spectral" else frobenius_norm(rest)) + stray
    return float(np.ldexp(product_up(leverage_factor(_missing(basis, indices)), size), e))


def _leverage_rounding(features: Array, basis: Array, indices: Indices, norm: Norm) -> float:
    # Q spans columns off by a few (n + m)·u·‖A‖; the T of the proof, of size at most 1/√(1 − ε), magnifies that.
    bound = _leverage_bound(features, basis, indices, norm)
    strays = 8 * norm_error(sum(features.shape), 1.0) * frobenius_norm(features)
    return float(strays * leverage_factor(_missing(basis, indices)) / bound) if bound > 0 else 0.0


def _leverage_formula() -> sympy.Basic:
    missing = NamedQuantity("ε", r"\varepsilon")
    return sympy.Le(_RESIDUAL, NamedQuantity("‖A − A_k‖", r"\|A - A_k\|") / sympy.sqrt(1 - missing))


LEVERAGE_COLUMNS = register(
    Statement(
        id="leverage-columns",
        title="Error of columns that hold all but a part of the leverage",
        reference="Papailiopoulos, Kyrillidis & Boutsidis 2014 (arXiv 1404.1530), Theorem 1; for any basis ours",
        status="classical",
        assumptions=(
            finite_features,
            known_norm,
            Assumption(
                "orthonormal",
                "the basis is orthonormal up to rounding, one row per column of the features.",
                lambda case: case["basis"].shape[0] == case["features"].shape[1] and _skew(case["basis"]) < 1e-6,
            ),
            Assumption(
                "leverage",
                "less than all of one unit of leverage is missing.",
                lambda case: _missing(case["basis"], case["indices"]) < 1,
            ),
        ),
        observed=_leverage_observed,
        bound=_leverage_bound,
        relative_error=_leverage_rounding,
        formula=_leverage_formula,
        draw=_draw_leverage,
    )
)


def _draw_sampling(rng: np.random.Generator) -> Case:
    width = int(rng.integers(1, _SUBSETS))
    A = families.features(rng, width, samples=int(rng.integers(1, 8)))
    if rng.random() < 0.4:  # orthogonal columns of falling size: where few draws find the best ones
        A = np.diag(10.0 ** -rng.uniform(0, 3, width).cumsum())
    rank = int(rng.integers(1, width + 1))
    basis = np.linalg.svd(A)[2][:rank].T
    return {"features": A, "basis": basis, "draws": int(10.0 ** rng.uniform(0, 4))}


def _over_sets(basis: Array, draws: int, sign: float) -> Array:
    """Return Σ_{I⊆J} (±1)^|J∖I| P(all c draws are in I), for every J as a number in binary.

    With −1 that is the probability that c draws by leverage meet just the columns J.
    """
    leverages = (basis**2).sum(axis=1)
    within = np.zeros(1)
    for share in leverages / leverages.sum():
        within = np.concatenate([within, within + share])
    sums = within**draws
    for j in range(len(leverages)):
        pairs = sums.reshape(-1, 2, 2**j)
        pairs[:, 1] += sign * pairs[:, 0]
    return np.asarray(sums)


def _squared_errors(features: Array) -> Array:
    """Return ‖A − A_J T‖_F² for every J as a number in binary, rounded once."""
    A, scale = _whole(features)
    width = np.shape(features)[1]
    G = [[sum(row[i] * row[j] for row in A) for j in range(width)] for i in range(width)]

    def volume(J: list[int]) -> int:
        return _determinant([[G[i][j] for j in J] for i in J])

    errors = []
    for number in range(2**width):
        J: list[int] = []
        for j in range(width):
            if number >> j & 1 and volume([*J, j]):
                J.append(j)
        total = sum(volume([*J, j]) for j in range(width) if j not in J)
        errors.append(float(Fraction(total, volume(J)) * Fraction(2) ** (2 * scale)))
    return np.array(errors)


def _sampling_observed(features: Array, basis: Array, draws: int) -> float:
    return float(np.maximum(_over_sets(basis, draws, -1.0), 0.0) @ _squared_errors(features))


def _sampling_bound(features: Array, basis: Array, draws: int) -> float:
    A, e = unit_scaled(features)
    rest = frobenius_norm(A - (A @ basis) @ basis.T)
    rest += product_up(norm_error(sum(basis.shape) + 2, 1.0), frobenius_norm(A) * (1.0 + frobenius_norm(basis)) ** 2)
    # Probabilities are by the basis as given, leverages those of the orthonormal one.
    beta = 1 - 4 * _skew(basis)
    bound = leverage_sampling_bound(rest, frobenius_norm(A), rank=basis.shape[1], draws=draws, beta=beta)
    return float(np.ldexp(bound, 2 * e))


def _sampling_rounding(features: Array, basis: Array, draws: int) -> float:
    # Shares are off by a few units for each term of their sums, their powers c times as much.
    bound, error = _sampling_bound(features, basis, draws), norm_error((draws + 8) * (sum(basis.shape) + 12), 1.0)
    return float(error * (_over_sets(basis, draws, 1.0) @ _squared_errors(features)) / bound) if bound > 0 else 0.0


def _sampling_formula() -> sympy.Basic:
    c, lost = sympy.symbols("c epsilon", positive=True)
    mean = NamedQuantity("E‖A − A_J·T‖_F²", r"\mathbb{E}\|A - A_J T\|_F^2")
    floor, size = NamedQuantity("‖A − A_k‖_F", r"\|A - A_k\|_F"), NamedQuantity("‖A‖_F", r"\|A\|_F")
    failure = k * (sympy.exp(-lost) / (1 - lost) ** (1 - lost)) ** (c / k)
    return sympy.Le(mean, floor**2 * (1 + k / (c * (1 - lost) ** 2)) + failure * size**2)


LEVERAGE_SAMPLING = register(
    Statement(
        id="leverage-sampling",
        title="Mean squared error of columns drawn by their leverage",
        reference="ours, after Drineas, Mahoney & Muthukrishnan 2008 (doi 10.1137/07070471X) and Tropp 2012",
        status="ours",
        assumptions=(
            finite_features,
            Assumption(
                "enumerable",
                f"there are at most {_SUBSETS} columns, not all 0, entries of 1e-100 to 1e100 or 0, 1 to 10^4 draws.",
                lambda case: (
                    np.ndim(case["features"]) == 2
                    and np.shape(case["features"])[1] <= _SUBSETS
                    and bool(np.any(case["features"]))
                    and _is_moderate(case["features"])
                    and 1 <= case["draws"] <= 10**4
                ),
            ),
            Assumption(
                "orthonormal",
                "the basis is orthonormal up to rounding, of one vector at least, one row per column of the features.",
                lambda case: (
                    case["basis"].shape[0] == case["features"].shape[1]
                    and case["basis"].shape[1] > 0
                    and _skew(case["basis"]) < 1e-6
                ),
            ),
        ),
        observed=_sampling_observed,
        bound=_sampling_bound,
        relative_error=_sampling_rounding,
        formula=_sampling_formula,
        draw=_draw_sampling,
    )
)
