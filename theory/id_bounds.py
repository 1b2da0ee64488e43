"""What replacing features by a skeleton of them costs: the error itself, and what is known of it beforehand.

A has n samples of m features, J are the k columns of the skeleton, T is the interpolation matrix, A ≈ A_J T. R is the
upper triangular factor of A with the columns in order of choice, RᵀR = Πᵀ AᵀA Π, in blocks R11 (k, k), R12, R22. For
the least-squares T = [Id, R11⁻¹R12]Πᵀ the error is that of R22 in every unitarily invariant norm. Singular values are
in falling order. Proofs: ``docs/theorems_skeletons.md``.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

from ellq.theory.arguments import Array, count, finite_array, nonnegative, refuse_mixed_devices
from ellq.theory.rounding import LEAST, UNIT_ROUNDOFF, log_error, norm_error, outward, product_error, product_up

Norm = Literal["spectral", "frobenius"]
_LOST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # ε of draws by leverage


def skeleton_residual(
    features: npt.ArrayLike, indices: npt.ArrayLike, interpolation: npt.ArrayLike, offset: npt.ArrayLike
) -> Array:
    """Return A − 1·offsetᵀ − A[:, indices] @ T, what the skeleton leaves unexplained.

    Args:
        features: A, shape (n, m), finite.
        indices: the skeleton, shape (k,).
        interpolation: T, shape (k, m).
        offset: constant part, shape (m,).

    Returns:
        The residual, shape (n, m), in the units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, or a NaN or infinite entry.

    Reference: by definition; Chee et al. 2021 (arXiv 2108.00065).
    """
    refuse_mixed_devices(features=features, interpolation=interpolation, offset=offset)
    A = finite_array(features, "features", ndim=2)
    T = finite_array(interpolation, "interpolation", ndim=2)
    constant = finite_array(offset, "offset", ndim=1)
    J = np.asarray(indices)
    if J.ndim != 1 or (J.size and J.dtype.kind not in "iu"):
        raise TypeError(f"indices must be a list of whole numbers, got {J.dtype} of shape {J.shape}.")
    if T.shape != (J.size, A.shape[1]) or constant.shape != A.shape[1:]:
        raise ValueError(
            f"interpolation and offset have shapes {T.shape} and {constant.shape}; expected"
            f" {(J.size, A.shape[1])} and {A.shape[1:]}."
        )
    J = J.astype(np.intp)
    if J.size and not 0 <= J.min() <= J.max() < A.shape[1]:
        raise ValueError(f"indices reach from {J.min()} to {J.max()}, outside the {A.shape[1]} columns of features.")
    return np.asarray(A - constant - A[:, J] @ T)


def skeleton_output_bound(residual: npt.ArrayLike, consumer: npt.ArrayLike) -> Array:
    """Bound the root mean square change of every output when features are replaced by their skeleton.

        ‖(A − A_J T)u‖ / √n ≤ ‖A − A_J T‖_2 · ‖u‖_2 / √n

    Holds for any skeleton and any T; equality when u is the top right singular vector of the residual. Rounded up; 0
    where the residual or the row is.

    Args:
        residual: A − A_J T over n samples, shape (n, m), finite.
        consumer: rows u of the weights that read the features, shape (c, m), finite.

    Returns:
        One bound per output, shape (c,), in the units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, or a NaN or infinite entry.

    Reference: the empirical risk bound of Chee et al. 2021 (arXiv 2108.00065) as reconstructed, R_ID ≤ ε²M, before
    the norms are replaced by a priori values.
    """
    refuse_mixed_devices(residual=residual, consumer=consumer)
    E = finite_array(residual, "residual", ndim=2)
    U = finite_array(consumer, "consumer", ndim=2)
    if E.shape[1] != U.shape[1]:
        raise ValueError(f"residual has {E.shape[1]} columns but consumer rows have {U.shape[1]} entries.")
    if not E.size:
        raise ValueError(f"residual is empty (shape {E.shape}). Pass at least one sample and one feature.")
    # Scaled by powers of two, so that neither squares nor products leave float64 before the result does.
    e, f = np.frexp(np.abs(E).max())[1], np.frexp(np.abs(U).max(axis=1))[1]
    largest = float(np.linalg.norm(np.ldexp(E, -e), 2)) / np.sqrt(E.shape[0])
    product = largest * np.linalg.norm(np.ldexp(U, -f[:, None]), axis=1)
    # A singular value from LAPACK is off by a modest multiple of u·‖E‖; max(shape) covers it (Anderson et al. 1999).
    error = norm_error(U.shape[1], 2.0) + norm_error(max(E.shape), 1.0)
    with np.errstate(over="ignore"):
        return np.where(product > 0, outward(np.ldexp(product, e + f), error), 0.0)


def skeleton_error(R: npt.ArrayLike, retained: int, *, norm: Norm = "spectral") -> float:
    """Return what k skeleton columns leave of all, from the triangular factor alone.

        ‖A − A_J T‖ = ‖R22‖        R22 = R[k:, k:],  T the least-squares interpolation

    One factor gives the error at every k, in both norms. Scales with A. Rounded up.

    Args:
        R: upper triangular factor, all of it, shape (r, m), columns in order of choice. Of a complete
            ``Selection`` it is ``factor[:, indices]``.
        retained: k, 0 ≤ k ≤ m.
        norm: ``"spectral"`` or ``"frobenius"``.

    Returns:
        The error, in the units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``R`` is not upper triangular or not finite, ``retained`` outside [0, m], or an unknown norm.

    Reference: Golub & Van Loan 2013, section 5.4.2; the error of Chee et al. 2021 (arXiv 2108.00065).
    """
    factor = _triangular(R)
    rest = factor[count(retained, "retained", low=0, high=factor.shape[1]) :]
    return spectral_norm(rest) if _is_spectral(norm) else frobenius_norm(rest)


def eckart_young_floor(singular_values: npt.ArrayLike, retained: int, *, norm: Norm = "spectral") -> float:
    """Return the least error of any approximation of rank k, which no k columns can be below.

        ‖A − A_J T‖_2 ≥ σ_{k+1}        ‖A − A_J T‖_F ≥ (Σ_{i>k} σ_i²)^½

    Attained by skeletons where the other columns are orthogonal to them and small. Scales with A. Rounded down.

    Args:
        singular_values: σ of A, shape (r,), ≥ 0, in any order; missing ones are 0.
        retained: k ≥ 0.
        norm: ``"spectral"`` or ``"frobenius"``.

    Returns:
        The floor, in the units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a negative singular value, ``retained`` < 0, or an unknown norm.

    Reference: Eckart & Young 1936; Mirsky 1960.
    """
    rest = _falling(singular_values)[count(retained, "retained", low=0, high=2**53) :]
    if _is_spectral(norm):
        return float(rest[0]) if rest.size else 0.0
    up = frobenius_norm(rest[None])
    return max(up * (1 - 3 * (norm_error(rest.size, 2.0) + product_error(2))) - 2 * LEAST, 0.0)


def qrcp_factor(retained: int, columns: int, *, norm: Norm = "spectral", threshold: float = 1.0) -> float:
    """Bound by how much column-pivoted QR can miss the best approximation of rank k.

        ‖R22‖_2 ≤ σ_{k+1}·√(1 + (m − k)(4^k − 1)/3)        ‖R22‖_F ≤ σ_{k+1}·√((m − k)(4^k + 2)/3)

    Sharp in the spectral norm: generalised Kahan matrices come arbitrarily close. Below the classical √(m − k)·2^k in
    both. With a threshold f, for pivots of at least 1/f times the largest column left, (4^k − 1)/3 becomes
    f⁴·((1 + f)^(2k) − 1)/((1 + f)² − 1). Useless beyond a dozen columns, as the worst case is; no trained net is near
    it. Rounded up.

    Args:
        retained: k, 0 ≤ k ≤ m.
        columns: m ≥ 1.
        norm: ``"spectral"`` or ``"frobenius"``.
        threshold: f ≥ 1, as of ``pivot_threshold``; 1 for exact pivoting.

    Returns:
        The factor on σ_{k+1}; infinite beyond float64.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``retained`` outside [0, m], ``threshold`` below 1 or infinite, or an unknown norm.

    Reference: Kawamura & Suda 2021 (doi 10.1007/s13160-021-00459-x) for the spectral norm; the proof, the Frobenius
    norm and the threshold ours. Classical form: Gu & Eisenstat 1996, after Faddeev, Kublanovskaja & Faddeeva 1968.
    """
    m = count(columns, "columns", low=1, high=2**53)
    k = count(retained, "retained", low=0, high=m)
    f = _threshold(threshold)
    beside, counted = (m - k, 1) if _is_spectral(norm) else (1, m - k)
    base = (1 + f) ** 2
    # The power leaves float64 long before k does; what multiplies it is at least 1/4.
    log_power = k * math.log(base)
    if log_power > 600:
        return math.inf
    squared = 1 + beside * f**4 * math.expm1(log_power) / (base - 1)
    return float(outward(math.sqrt(squared * counted), log_error(40 + 10 * k)))


def strong_rrqr_factor(retained: int, columns: int, *, limit: float) -> float:
    """Bound by how much a strong rank-revealing QR can miss the best approximation of rank k.

        σ_j(R22) ≤ σ_{k+j}·√(1 + f²k(m − k))    for every j;  so  ‖R22‖ ≤ floor·√(1 + f²k(m − k)) in both norms

    f bounds the gain of every swap, T_ij² + (γ_j/ω_i)² ≤ f², which ``swap_limit`` measures: 1/ω_i is the length of row
    i of R11⁻¹, γ_j that of column j of R22. That |T_ij| ≤ f is not enough. The factor bounds ‖T‖_2 too. Sharp for one
    of two columns, nearly parallel. Rounded up.

    Args:
        retained: k, 0 ≤ k ≤ m.
        columns: m ≥ 1.
        limit: f ≥ 0.

    Returns:
        The factor, ≥ 1; infinite beyond float64.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``retained`` outside [0, m], or ``limit`` negative or infinite.

    Reference: Gu & Eisenstat 1996 (doi 10.1137/0917055), Theorem 3.2.
    """
    m = count(columns, "columns", low=1, high=2**53)
    k = count(retained, "retained", low=0, high=m)
    f = nonnegative(limit, "limit")
    return float(outward(math.hypot(1.0, f * math.sqrt(k * (m - k))), product_error(4)))


def swap_limit(R: npt.ArrayLike, retained: int) -> float:
    """Return by how much the best swap of a skeleton column for another would multiply the volume of the skeleton.

        f = max over i ≤ k < j of √(T_ij² + (γ_j/ω_i)²) = max |det R11 after swapping i and j| / |det R11|

    At most 1 where no swap helps; ``strong_rrqr_factor`` turns it into a bound of the error. Ignores the scale of A.
    Rounded up; infinite where R11 is singular.

    Args:
        R: upper triangular factor, shape (r, m), columns in order of choice.
        retained: k, 0 ≤ k ≤ m.

    Returns:
        f; 0 where there is nothing to swap.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``R`` is not upper triangular or not finite, or ``retained`` outside [0, m].

    Reference: Gu & Eisenstat 1996 (doi 10.1137/0917055), Lemma 3.1.
    """
    factor = _triangular(R)
    m = factor.shape[1]
    k = count(retained, "retained", low=0, high=m)
    if not 0 < k < m:
        return 0.0
    if k > len(factor) or not np.all(np.diag(factor)[:k]):
        return math.inf
    factor, _ = unit_scaled(factor)
    upper = factor[:k, :k]
    with np.errstate(over="ignore", invalid="ignore"):
        solved = solve_triangular(upper, np.hstack([np.eye(k), factor[:k, k:]]))
        # Substitution is backward stable entry by entry (Higham 2002, Theorem 8.5); doubled for the terms left out.
        sizes = np.abs(solved)
        sizes += 2 * norm_error(k, 1.0) * (sizes[:, :k] @ (np.abs(upper) @ sizes))
        inverse, T = sizes[:, :k], sizes[:, k:]
        rows, columns = np.linalg.norm(inverse, axis=1), np.linalg.norm(factor[k:, k:], axis=0)
        largest = float(np.hypot(T, rows[:, None] * columns).max())
    return float(outward(largest, norm_error(m + len(factor), 2.0))) if math.isfinite(largest) else math.inf


def volume_sampling_error(singular_values: npt.ArrayLike, retained: int) -> float:
    """Return the mean squared error of a skeleton drawn with probability proportional to its squared volume.

        E ‖A − A_J T‖_F² = (k + 1)·e_{k+1}(σ²)/e_k(σ²) ≤ (k + 1)·Σ_{i>k} σ_i²

    P(J) ∝ det(A_JᵀA_J), |J| = k; e_j the elementary symmetric polynomials. Some skeleton is no worse than the mean.
    The right-hand side, ``volume_sampling_bound``, is met as the first k values outgrow the others, all equal. Scales
    with A². Rounded up.

    Args:
        singular_values: σ of A, shape (r,), ≥ 0, in any order.
        retained: k, 0 ≤ k; at most the number of positive singular values.

    Returns:
        The mean, in the squared units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a negative singular value, or ``retained`` beyond the rank, where no volume is positive.

    Reference: Deshpande, Rademacher, Vempala & Wang 2006 (doi 10.4086/toc.2006.v002a012), Theorem 1.3 and its proof.
    """
    values, k = _falling(singular_values), count(retained, "retained", low=0, high=2**53)
    positive = values[values > 0]
    if k > positive.size:
        raise ValueError(f"retained={k} exceeds the rank {positive.size}. Choose retained <= {positive.size}.")
    if k == positive.size:
        return 0.0
    # e_{j+1}/e_j of the first i squares, by adding one at a time: with p the square and r_j = e_j/e_{j−1},
    # e_j(i) = e_j(i−1) + p·e_{j−1}(i−1). All terms are positive, so every ratio keeps its relative accuracy.
    top = int(np.frexp(positive[0])[1])
    squares = np.ldexp(positive, -top) ** 2
    logs = np.full(k + 2, -np.inf)
    logs[0] = 0.0
    for square in squares:
        if square > 0:
            logs[1:] = np.logaddexp(logs[1:], logs[:-1] + math.log(square))
    if logs[k + 1] == -np.inf:
        return float(outward(0.0, 0.0))
    error = log_error(16 * positive.size * (10 + abs(logs[k + 1]) + abs(logs[k])))
    with np.errstate(over="ignore"):
        return float(outward(np.ldexp((k + 1) * math.exp(logs[k + 1] - logs[k]), 2 * top), error))


def volume_sampling_bound(singular_values: npt.ArrayLike, retained: int) -> float:
    """Bound the mean squared error of a skeleton drawn by squared volume, by the best approximation of its rank.

        E ‖A − A_J T‖_F² ≤ (k + 1)·Σ_{i>k} σ_i²

    No smaller factor serves all A. ``volume_sampling_error`` is the mean itself. Scales with A². Rounded up.

    Args:
        singular_values: σ of A, shape (r,), ≥ 0, in any order.
        retained: k ≥ 0.

    Returns:
        The bound, in the squared units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a negative singular value, or ``retained`` < 0.

    Reference: Deshpande, Rademacher, Vempala & Wang 2006 (doi 10.4086/toc.2006.v002a012), Theorem 1.3.
    """
    k = count(retained, "retained", low=0, high=2**53)
    rest = frobenius_norm(_falling(singular_values)[k:][None])
    return product_up(product_up(rest, k + 1.0), rest)


def leverage_factor(missing: float) -> float:
    """Bound by how much columns of high leverage can miss the best approximation of rank k.

        ‖A − A_J T‖ ≤ ‖A − A_k‖/√(1 − ε)        ε = k − Σ_{j∈J} ℓ_j < 1,  in both norms

    ℓ_j = Σ_{i≤k} V_ji² are the leverages of the columns at rank k, of sum k, from the right singular vectors V; J may
    have more columns than k, and be drawn or chosen in any way. Equality for J the support of the first k vectors.
    Rounded up.

    Args:
        missing: ε, the leverage outside J, 0 ≤ ε < 1.

    Returns:
        The factor on the Eckart–Young floor of rank k, ≥ 1.

    Raises:
        TypeError: ``missing`` is not a number.
        ValueError: ``missing`` outside [0, 1): nothing is known then.

    Reference: Papailiopoulos, Kyrillidis & Boutsidis 2014 (arXiv 1404.1530), Theorem 1.
    """
    share = nonnegative(missing, "missing")
    if share >= 1:
        raise ValueError(f"missing={share:g} is not below 1. Add columns until less than 1 of the leverage is missing.")
    return float(outward(1 / math.sqrt(1 - share), product_error(3)))


def leverage_sampling_bound(floor: float, size: float, *, rank: int, draws: int, beta: float = 1.0) -> float:
    """Bound the mean squared error of columns drawn by their leverage, with replacement.

        E ‖A − A_J T‖_F² ≤ min over ε of  ‖A − A_k‖_F²·(1 + k/(βc(1 − ε)²)) + k·(e^(−ε)/(1 − ε)^(1−ε))^(βc/k)·‖A‖_F²

    J the columns met in c independent draws of probabilities P_j ≥ β·ℓ_j/k, ℓ_j the leverages at rank k. As good as
    the best approximation of rank k for c ≫ k·ln k; vacuous, ‖A‖_F², for c near k. Holds as well for c distinct columns
    drawn one after another, as the rule ``leverage`` does with ``rank=k``. Scales with A². Rounded up.

    Args:
        floor: ‖A − A_k‖_F ≥ 0, as of ``eckart_young_floor``, or ‖A − AVVᵀ‖_F where the leverages are those of V.
        size: ‖A‖_F ≥ 0.
        rank: k ≥ 1.
        draws: c ≥ 1.
        beta: β in (0, 1]: 1 for exact leverages; k/(m·max ℓ_j) for uniform draws.

    Returns:
        The bound, in the squared units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: a negative norm, a count below 1, or ``beta`` outside (0, 1].

    Reference: ours, after Drineas, Mahoney & Muthukrishnan 2008 and the Chernoff inequality of Tropp 2012.
    """
    rest, whole = nonnegative(floor, "floor"), nonnegative(size, "size")
    k = count(rank, "rank", low=1, high=2**53)
    share = nonnegative(beta, "beta")
    if not 0 < share <= 1:
        raise ValueError(f"beta={share:g} is outside (0, 1]. Pass 1 for draws by exact leverages.")
    ratio = float(outward(k / share / count(draws, "draws", low=1, high=2**53), product_error(2)))
    trivial = product_up(whole, whole)
    bounds = [trivial]
    for lost in _LOST:
        rate = lost + (1 - lost) * math.log1p(-lost)  # ≥ ε²/2, from terms of at most ε
        exponent = math.log(k) - rate / ratio
        stray = log_error(8 * (abs(math.log(k)) + 4 * lost / ratio + 2))
        chance = min(float(outward(math.exp(min(exponent, 0.0)), stray)), 1.0)
        grown = float(outward(1 + ratio / (1 - lost) ** 2, product_error(5)))
        bounds.append(product_up(rest, product_up(rest, grown)) + product_up(chance, trivial))
    return min(float(outward(min(bounds), product_error(1))) if trivial else 0.0, trivial)


def pivot_ratio_bounds(ratio: float, retained: int, columns: int, *, threshold: float = 1.0) -> tuple[float, float]:
    """Bound the relative error of column-pivoted QR by the pivots alone.

        ρ_k/(f√m) ≤ ε_k ≤ f√(m − k)·ρ_k        ρ_k = |r_{k+1,k+1}|/|r_11|,   ε_k = ‖R22‖_2/‖A‖_2

    What a tolerance on the pivots means; f = 1 for exact pivoting. The lower end is approached by m − 1 equal columns
    and one near them, the upper by equal small columns orthogonal to a large one (k = 1). Rounded outward.

    Args:
        ratio: ρ_k, 0 ≤ ρ_k ≤ 1.
        retained: k, 0 ≤ k ≤ m.
        columns: m ≥ 1.
        threshold: f ≥ 1, as of ``pivot_threshold`` for k + 1 pivots.

    Returns:
        The lower and the upper bound of ε_k; the upper at most 1.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``ratio`` outside [0, f], ``retained`` outside [0, m], or ``threshold`` < 1.

    Reference: ours.
    """
    rho, f = nonnegative(ratio, "ratio"), _threshold(threshold)
    if rho > f:
        raise ValueError(f"ratio={rho:g} exceeds {f:g}. Pivots fall: pass the later one divided by the first.")
    m = count(columns, "columns", low=1, high=2**53)
    k = count(retained, "retained", low=0, high=m)
    low = max(rho / f / math.sqrt(m) * (1 - 6 * UNIT_ROUNDOFF) - 2 * LEAST, 0.0)
    return low, min(product_up(product_up(rho, f), float(outward(math.sqrt(m - k), product_error(1)))) * (k < m), 1.0)


def pivot_threshold(R: npt.ArrayLike, retained: int) -> float:
    """Return by which factor a column left at one of the first k pivots was longer than the one taken.

        f = max over i ≤ k, j > i of ‖R[i:, j]‖/|r_ii|, or 1 if that is less

    1 up to rounding where the largest column left was always taken. Ignores the scale of A. Rounded up; infinite where
    a pivot is 0 and a column left is not.

    Args:
        R: upper triangular factor, shape (r, m), columns in order of choice.
        retained: k, 0 ≤ k ≤ m.

    Returns:
        f ≥ 1.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``R`` is not upper triangular or not finite, or ``retained`` outside [0, m].

    Reference: by definition.
    """
    factor, _ = unit_scaled(_triangular(R))
    k = count(retained, "retained", low=0, high=factor.shape[1])
    worst = 1.0
    for i in range(min(k, len(factor))):
        left = float(np.linalg.norm(factor[i:, i + 1 :], axis=0).max(initial=0.0))
        if left > abs(factor[i, i]):
            worst = max(worst, left / abs(factor[i, i]) if factor[i, i] else math.inf)
    # Where nothing was longer, rounding may still have hidden that something was.
    return float(outward(worst, norm_error(len(factor), 2.0))) if math.isfinite(worst) else worst


def spectral_norm(matrix: npt.ArrayLike) -> float:
    """Return the largest singular value, rounded up; 0 for a matrix of zeros or without entries.

    Args:
        matrix: shape (n, m), finite.

    Raises:
        TypeError: ``matrix`` is not numeric.
        ValueError: not a finite matrix.

    Reference: LAPACK's singular values are off by a modest multiple of u·‖M‖ (Anderson et al. 1999, section 4.9).
    """
    M = finite_array(matrix, "matrix", ndim=2)
    if not M.any():
        return 0.0
    M, e = unit_scaled(M)
    largest = np.linalg.norm(M, 2)
    with np.errstate(over="ignore"):
        return float(outward(np.ldexp(largest, e), norm_error(max(M.shape), 1.0)))


def frobenius_norm(matrix: npt.ArrayLike) -> float:
    """Return the root of the sum of squares, rounded up; 0 for a matrix of zeros or without entries.

    Args:
        matrix: shape (n, m), finite.

    Raises:
        TypeError: ``matrix`` is not numeric.
        ValueError: not a finite matrix.

    Reference: by definition.
    """
    M = finite_array(matrix, "matrix", ndim=2)
    if not M.any():
        return 0.0
    M, e = unit_scaled(M)
    size = np.linalg.norm(M)
    with np.errstate(over="ignore"):
        return float(outward(np.ldexp(size, e), norm_error(M.size, 2.0)))


def unit_scaled(M: Array) -> tuple[Array, int]:
    """Return M divided by the power of two that brings its largest entry into [½, 1), and the exponent; M if all 0."""
    exponent = int(np.frexp(np.abs(M).max(initial=0.0))[1])
    return np.ldexp(M, -exponent), exponent


def _threshold(threshold: float) -> float:
    f = nonnegative(threshold, "threshold")
    if f < 1:
        raise ValueError(f"threshold={f:g} is below 1. Pass 1 for exact pivoting.")
    return f


def _is_spectral(norm: str) -> bool:
    if norm not in ("spectral", "frobenius"):
        raise ValueError(f"norm={norm!r} is unknown. Choose 'spectral' or 'frobenius'.")
    return norm == "spectral"


def _triangular(R: npt.ArrayLike) -> Array:
    factor = finite_array(R, "R", ndim=2)
    if len(factor) > factor.shape[1] or np.tril(factor, -1).any():
        raise ValueError(f"R, of shape {factor.shape}, is not upper triangular. Put its columns in order of choice.")
    return factor


def _falling(singular_values: npt.ArrayLike) -> Array:
    values = finite_array(singular_values, "singular_values", ndim=1)
    if values.size and values.min() < 0:
        raise ValueError(f"singular_values holds {values.min():g}. They are >= 0.")
    return np.asarray(np.sort(values)[::-1])
