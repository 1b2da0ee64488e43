import re
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from flint import arb
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.linalg import qr

import oracles_skeletons
from balls import precisely
from ellq.theory import Gram, families, interpolate, pivoted_qr, skeleton_output_bound, skeleton_residual
from ellq.theory.columns import Triangle
from ellq.theory.id_bounds import (
    eckart_young_floor,
    frobenius_norm,
    leverage_factor,
    leverage_sampling_bound,
    pivot_ratio_bounds,
    pivot_threshold,
    qrcp_factor,
    skeleton_error,
    spectral_norm,
    strong_rrqr_factor,
    swap_limit,
    volume_sampling_bound,
    volume_sampling_error,
)
from ellq.theory.selection import leverage
from oracles_skeletons import matrix
from strategies import features, vectors

SOME = settings(max_examples=120, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def skeleton_of(X, k, *, intercept):
    gram = Gram(X.shape[1], 0)
    gram.update(X, np.zeros((len(X), 0)))
    return interpolate(gram, pivoted_qr(gram.columns(centred=intercept), k), intercept=intercept)


def exact_output_error(E, u):
    with mp.workdps(60):
        rows = [mp.fsum(mpf(float(a)) * mpf(float(b)) for a, b in zip(row, u, strict=True)) for row in E]
        return mp.sqrt(mp.fsum(r * r for r in rows) / len(rows))


@SOME
@given(X=features(), data=st.data(), intercept=st.booleans())
def test_residual_is_the_difference_and_vanishes_on_the_skeleton(X, data, intercept):
    s = skeleton_of(X, data.draw(st.integers(1, X.shape[1])), intercept=intercept)
    E = skeleton_residual(X, s.indices, s.interpolation, s.offset)
    np.testing.assert_allclose(
        E, X - (s.offset + X[:, s.indices] @ s.interpolation), rtol=1e-12, atol=1e-10 * (1 + np.abs(X).max())
    )
    np.testing.assert_allclose(E[:, s.indices], 0, atol=1e-15 * np.abs(X).max())


@SOME
@given(E=features(), seed=seeds, shift=st.integers(-900, 900), other=st.integers(-900, 900))
def test_bound_covers_the_exact_output_error_at_any_scale(E, seed, shift, other):
    if shift + other > 900:
        other = 900 - shift
    rows = np.random.default_rng(seed).normal(size=(3, E.shape[1]))
    E, U = np.ldexp(E, shift), np.ldexp(rows, other)
    for bound, u in zip(skeleton_output_bound(E, U), U, strict=True):
        assert exact_output_error(E, u) <= mpf(float(bound))


@SOME
@given(E=features(samples=12))
def test_bound_is_met_by_the_top_right_singular_vector(E):
    u = np.linalg.svd(E)[2][0]
    bound = float(skeleton_output_bound(E, u[None])[0])
    assert 0.99 * bound <= float(exact_output_error(E, u)) <= bound


@SOME
@given(E=features(), seed=seeds)
def test_bound_is_the_spectral_norm_times_the_consumers_length(E, seed):
    U = np.random.default_rng(seed).normal(size=(2, E.shape[1]))
    expected = np.linalg.norm(E, 2) * np.linalg.norm(U, axis=1) / np.sqrt(len(E))
    np.testing.assert_allclose(skeleton_output_bound(E, U), expected, rtol=1e-12)


def test_edges():
    assert skeleton_output_bound(np.zeros((2, 3)), np.ones((2, 3))).tolist() == [0, 0]
    assert skeleton_output_bound(np.ones((2, 3)), np.zeros((1, 3))).tolist() == [0]
    assert skeleton_output_bound([[1e200]], [[1e-200]]) == pytest.approx(1, rel=1e-13)
    assert skeleton_output_bound([[5e-324]], [[1e300]])[0] >= 4.94e-24
    assert np.isinf(skeleton_output_bound([[1e200]], [[1e200]])[0])


@pytest.mark.parametrize(
    ("indices", "T", "offset"),
    [
        ([0], np.ones((1, 3)), np.zeros(2)),
        ([0], np.ones((2, 2)), np.zeros(2)),
        ([0], np.ones((1, 2)), np.zeros(1)),
        ([2], np.ones((1, 2)), np.zeros(2)),
        ([-1], np.ones((1, 2)), np.zeros(2)),
        ([0.5], np.ones((1, 2)), np.zeros(2)),
        ([[0]], np.ones((1, 2)), np.zeros(2)),
        ([0], np.full((1, 2), np.nan), np.zeros(2)),
    ],
)
def test_residual_refuses_bad_input(indices, T, offset):
    with pytest.raises((TypeError, ValueError)):
        skeleton_residual(np.ones((4, 2)), indices, T, offset)


@pytest.mark.parametrize(
    ("E", "U"), [(np.ones((2, 3)), np.ones((1, 2))), (np.ones(3), np.ones((1, 3))), (np.ones((0, 3)), np.ones((1, 3)))]
)
def test_bound_refuses_bad_input(E, U):
    with pytest.raises(ValueError, match=r"columns|dimensions|empty"):
        skeleton_output_bound(E, U)


# --- the error from the factor --------------------------------------------------------------------------------------


def pivoted(A):
    """R of column-pivoted QR, and its order."""
    R, order = qr(A, mode="r", pivoting=True)
    return R[: A.shape[1]], order


@SOME
@given(A=features(), data=st.data())
def test_the_factor_gives_the_error_of_least_squares_at_every_k(A, data):
    R, order = pivoted(A)
    k = data.draw(st.integers(0, A.shape[1]))
    residual = A - A[:, order[:k]] @ np.linalg.lstsq(A[:, order[:k]], A, rcond=1e-13)[0]
    size = np.linalg.norm(A)
    for norm, kind in (("spectral", 2), ("frobenius", "fro")):
        expected = np.linalg.norm(residual, kind)
        assert skeleton_error(R, k, norm=norm) == pytest.approx(expected, rel=1e-9, abs=1e-10 * size)
    assert skeleton_error(R, k) <= skeleton_error(R, k, norm="frobenius") * (1 + 1e-12)


@SOME
@given(A=features(), data=st.data(), shift=st.integers(-900, 900))
def test_errors_from_the_factor_scale_and_are_rounded_up(A, data, shift):
    R = pivoted(A)[0]
    k = data.draw(st.integers(0, A.shape[1]))
    for norm in ("spectral", "frobenius"):
        error = skeleton_error(R, k, norm=norm)
        exact = precisely(
            lambda norm=norm: oracles_skeletons.norm(oracles_skeletons.rows(matrix(R), min(k, len(R))), norm)
        )()
        assert not arb(error) < exact
        assert not arb(error) > exact * arb(1 + 1e-12) + arb(1e-300)
        assert skeleton_error(np.ldexp(R, shift), k, norm=norm) == pytest.approx(np.ldexp(error, shift), rel=1e-12)


def test_errors_from_the_factor_fall_to_zero():
    R = pivoted(np.random.default_rng(1).normal(size=(9, 6)))[0]
    errors = [skeleton_error(R, k) for k in range(7)]
    assert all(a > b for a, b in pairwise(errors))
    assert errors[-1] == 0
    assert skeleton_error(np.zeros((3, 3)), 0) == 0
    assert skeleton_error([[1e300, 1e300]], 0, norm="frobenius") == pytest.approx(2**0.5 * 1e300, rel=1e-13)
    assert skeleton_error([[5e-324]], 0) >= 5e-324


# --- the floor ------------------------------------------------------------------------------------------------------


@SOME
@given(values=vectors(), k=st.integers(0, 40))
def test_floor_is_the_tail_of_the_singular_values_rounded_down(values, k):
    values = np.abs(values)
    falling = np.sort(values)[::-1]
    with mp.workdps(60):
        exact = mp.sqrt(mp.fsum(mpf(float(x)) ** 2 for x in falling[k:]))
        floor = mpf(eckart_young_floor(values, k, norm="frobenius"))
        assert floor <= exact
        assert floor >= exact * (1 - mpf(10) ** -12) - mpf(2) ** -1072
    assert eckart_young_floor(values, k) == (falling[k] if k < falling.size else 0)


def test_floor_ignores_order_and_padding():
    values = np.array([3.0, 1.0, 2.0])
    for norm in ("spectral", "frobenius"):
        floor = eckart_young_floor(values, 1, norm=norm)
        assert floor == eckart_young_floor(values[::-1], 1, norm=norm)
        assert floor == pytest.approx(eckart_young_floor([*values, 0, 0], 1, norm=norm), rel=1e-14)
    assert eckart_young_floor([], 0) == eckart_young_floor([], 3, norm="frobenius") == 0


# --- pivoted QR -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("m", [1, 2, 5, 30])
def test_pivoting_factor_is_the_published_one_and_below_the_classical(norm, m):
    for k in range(m + 1):
        factor = qrcp_factor(k, m, norm=norm)
        squared = Fraction(4**k - 1, 3) * (m - k) + 1 if norm == "spectral" else Fraction(4**k + 2, 3) * (m - k)
        assert Fraction(factor) ** 2 >= squared
        assert Fraction(factor) ** 2 <= squared * Fraction(1 + 1e-11) + Fraction(10) ** -300
        assert factor <= (m - k) ** 0.5 * 2.0**k * (1 + 1e-12) or k == m
        assert qrcp_factor(k, m, norm=norm, threshold=1.2) >= factor


@pytest.mark.parametrize(("k", "rest"), [(1, 1), (1, 5), (2, 2), (3, 1), (4, 3), (6, 2)])
def test_kahan_matrices_come_within_a_thousandth_of_the_pivoting_factor(k, rest):
    R = families.wide_kahan(k, rest, 1 - 1e-4)
    value = np.linalg.svd(R)[1][k]
    assert np.linalg.norm(R[k:], 2) > 0.999 * qrcp_factor(k, k + rest) * value
    assert np.linalg.norm(R[k:]) <= qrcp_factor(k, k + rest, norm="frobenius") * value * (1 + 1e-6)


@SOME
@given(seed=seeds, f=st.floats(1.0, 3.0))
def test_pivots_within_a_threshold_meet_the_factor_of_that_threshold(seed, f):
    # Columns taken at random among those nearly as long as the longest.
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 8))
    A = rng.normal(size=(m, m)) * 10.0 ** rng.uniform(-2, 0, m)
    order, left = [], list(range(m))
    for _ in range(m):
        residual = A - A[:, order] @ np.linalg.lstsq(A[:, order], A, rcond=None)[0]
        lengths = np.linalg.norm(residual[:, left], axis=0)
        order.append(left.pop(int(rng.choice(np.flatnonzero(lengths * f >= lengths.max())))))
    R, values = np.linalg.qr(A[:, order])[1], np.linalg.svd(A)[1]
    for k in range(m):
        threshold = pivot_threshold(R, k)
        assert threshold <= f * (1 + 1e-9)
        for norm, kind in (("spectral", 2), ("frobenius", "fro")):
            factor = qrcp_factor(k, m, norm=norm, threshold=threshold)
            assert np.linalg.norm(R[k:], kind) <= factor * values[k] * (1 + 1e-9)


def test_pivoting_factor_at_the_ends():
    assert qrcp_factor(0, 7) == pytest.approx(1, rel=1e-13)
    assert qrcp_factor(0, 7, norm="frobenius") == pytest.approx(7**0.5, rel=1e-13)
    assert qrcp_factor(7, 7, norm="frobenius") < 1e-300
    assert np.isinf(qrcp_factor(2000, 4000))


@SOME
@given(m=st.integers(1, 40), f=st.floats(1.0, 9.0), data=st.data(), norm=st.sampled_from(["spectral", "frobenius"]))
def test_pivoting_factor_is_its_formula_rounded_up(m, f, data, norm):
    k = data.draw(st.integers(0, m - 1))
    factor, exact = qrcp_factor(k, m, norm=norm, threshold=f), precisely(oracles_skeletons.qrcp)(k, m, norm, f)
    assert not arb(factor) < exact
    assert not arb(factor) > exact * arb(1 + 1e-11)


@SOME
@given(A=features())
def test_the_threshold_of_pivoted_qr_is_one_up_to_rounding(A):
    R = np.triu(pivoted(A)[0])
    rank = int((np.abs(np.diag(R)) > 1e-9 * np.abs(R).max(initial=0)).sum())
    assert 1 <= pivot_threshold(R, rank) <= 1 + 1e-6


def test_threshold_says_how_much_longer_a_column_left_was():
    R = np.array([[1.0, 3.0], [0.0, 4.0]])
    assert pivot_threshold(R, 1) == pytest.approx(5, rel=1e-13)
    assert 1 <= pivot_threshold(R, 0) <= 1 + 1e-13
    assert pivot_threshold(1e-300 * R, 1) == pytest.approx(5, rel=1e-13)
    assert pivot_threshold([[0.0, 1.0]], 1) == np.inf
    assert 1 <= pivot_threshold(np.zeros((2, 2)), 2) <= 1 + 1e-13
    assert 1 <= pivot_threshold(np.diag([2.0, 1.0]), 2) <= 1 + 1e-13


# --- strong rank-revealing QR ---------------------------------------------------------------------------------------


def swap_gains(A, J):
    """|det R11| after every swap, over that before, by taking determinants."""
    volume = np.sqrt(np.linalg.det(A[:, J].T @ A[:, J]))
    rest = [j for j in range(A.shape[1]) if j not in J]
    swapped = ([*J[:i], j, *J[i + 1 :]] for i in range(len(J)) for j in rest)
    return [np.sqrt(max(np.linalg.det(A[:, S].T @ A[:, S]), 0.0)) / volume for S in swapped]


@SOME
@given(seed=seeds)
def test_swap_limit_is_the_largest_gain_in_volume(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 6))
    A, k = rng.normal(size=(m + 1, m)), int(rng.integers(1, m))
    R = np.linalg.qr(A)[1]
    assert swap_limit(R, k) == pytest.approx(max(swap_gains(A, list(range(k)))), rel=1e-6)
    assert swap_limit(1e-200 * R, k) == pytest.approx(swap_limit(R, k), rel=1e-9)


@SOME
@given(seed=seeds)
def test_every_singular_value_of_the_rest_is_within_the_strong_factor(seed):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(6, 5)) * 10.0 ** rng.uniform(-3, 0, 5) + rng.choice([0.0, 1.0])
    k = int(rng.integers(0, 6))
    R = np.linalg.qr(A)[1]
    factor = strong_rrqr_factor(k, 5, limit=swap_limit(R, k))
    values, rest = np.linalg.svd(A)[1], np.linalg.svd(R[k:, k:])[1] if k < 5 else []
    assert all(b <= factor * values[k + j] * (1 + 1e-9) for j, b in enumerate(rest))
    kept = np.linalg.svd(R[:k, :k])[1] if k else []
    assert all(a <= factor * b * (1 + 1e-9) for a, b in zip(values, kept, strict=False))
    T = np.hstack([np.eye(k), np.linalg.solve(R[:k, :k], R[:k, k:])]) if k else np.zeros((0, 5))
    assert np.linalg.norm(T, 2) <= factor * (1 + 1e-9) if k else True


def test_small_interpolation_alone_says_nothing_about_the_error():
    # T = 0, so |T_ij| ≤ 1; the error is 10⁶ times the best. The swap is what is seen.
    R = np.diag([1e-6, 1.0])
    assert skeleton_error(R, 1) > 0.99e6 * eckart_young_floor([1.0, 1e-6], 1)
    assert swap_limit(R, 1) == pytest.approx(1e6, rel=1e-12)
    assert strong_rrqr_factor(1, 2, limit=swap_limit(R, 1)) >= 1e6


def test_swaps_at_the_ends():
    R = np.triu(np.ones((3, 3)))
    assert swap_limit(R, 0) == swap_limit(R, 3) == 0
    assert swap_limit(np.triu(np.ones((3, 3)), 1), 1) == np.inf
    assert swap_limit(np.array([[1.0, 2.0, 3.0]]), 1) == pytest.approx(3, rel=1e-13)
    assert swap_limit(np.array([[1.0, 2.0, 3.0]]), 2) == np.inf
    assert strong_rrqr_factor(0, 4, limit=9.0) == pytest.approx(1, rel=1e-13)
    assert strong_rrqr_factor(2, 4, limit=2.0) == pytest.approx(17**0.5, rel=1e-13)
    assert strong_rrqr_factor(2, 4, limit=1e300) == pytest.approx(2e300, rel=1e-13)


def test_gu_eisenstat_matrices_keep_pivoting_from_swaps_it_needs():
    R = families.gu_eisenstat(20, 0.5)
    assert pivot_threshold(R, 20) <= 1 + 1e-12
    assert swap_limit(R, 20) > 500


def test_drawn_triangular_factors_are_in_the_order_of_pivoting():
    for seed in range(200):
        R = families.triangular(np.random.default_rng(seed))
        assert np.isfinite(R).all()
        assert len(R) <= R.shape[1]
        assert not np.tril(R, -1).any()
        large = int((np.abs(np.diag(R)) > 1e-9 * np.abs(R).max(initial=0)).sum())
        assert pivot_threshold(R, large) <= 1 + 1e-6


@pytest.mark.parametrize("cosine", [0.1, 0.9, 0.9999])
def test_kahan_columns_have_length_one_and_their_pivots_tie(cosine):
    K = families.kahan(6, cosine)
    np.testing.assert_allclose(np.linalg.norm(K, axis=0), 1, rtol=1e-12)
    assert pivot_threshold(K, 6) <= 1 + 1e-12
    np.testing.assert_allclose(np.diag(K), (1 - cosine**2) ** (np.arange(6) / 2), rtol=1e-9)


# --- sampled columns ------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds)
def test_volume_sampling_is_as_enumerated_with_projections(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 6))
    A, k = rng.normal(size=(m + 1, m)) * 10.0 ** rng.uniform(-2, 0, m), int(rng.integers(0, m))
    subsets = [list(J) for J in combinations(range(m), k)]
    weights = np.array([np.linalg.det(A[:, J].T @ A[:, J]) for J in subsets])
    errors = [np.linalg.norm(A - A[:, J] @ np.linalg.lstsq(A[:, J], A, rcond=None)[0]) ** 2 for J in subsets]
    mean = volume_sampling_error(np.linalg.svd(A)[1], k)
    assert mean == pytest.approx(weights @ errors / weights.sum(), rel=1e-8)
    assert mean <= volume_sampling_bound(np.linalg.svd(A)[1], k) * (1 + 1e-12)
    assert min(errors) <= mean * (1 + 1e-9)


@SOME
@given(seed=seeds, shift=st.integers(-400, 400))
def test_volume_sampling_mean_is_rounded_up_and_scales(seed, shift):
    rng = np.random.default_rng(seed)
    values = 10.0 ** rng.uniform(-8, 8, int(rng.integers(1, 9)))
    k = int(rng.integers(0, values.size + 1))
    symmetric = [mpf(1)] + [mpf(0)] * values.size
    with mp.workdps(120):
        for value in values:
            for j in range(values.size, 0, -1):
                symmetric[j] += symmetric[j - 1] * mpf(float(value)) ** 2
        exact = (k + 1) * symmetric[k + 1] / symmetric[k] if k < values.size else mpf(0)
        mean = volume_sampling_error(values, k)
        assert exact <= mpf(mean) <= exact * (1 + mpf(10) ** -9)
        bound = mpf(volume_sampling_bound(values, k))
        tail = (k + 1) * mp.fsum(mpf(float(x)) ** 2 for x in np.sort(values)[::-1][k:])
        assert tail <= bound <= tail * (1 + mpf(10) ** -12)
    scaled = volume_sampling_error(np.ldexp(values, shift), k)
    assert scaled == pytest.approx(np.ldexp(mean, 2 * shift), rel=1e-9)


def test_leverage_factor():
    assert leverage_factor(0) == pytest.approx(1, rel=1e-13)
    assert leverage_factor(0.75) == pytest.approx(2, rel=1e-13)
    assert leverage_factor(0.75) >= 2
    with pytest.raises(ValueError, match="missing=1"):
        leverage_factor(1)


def test_draws_by_leverage_cost_less_the_more_there_are_and_never_more_than_all_of_the_matrix():
    bounds = [leverage_sampling_bound(1.0, 10.0, rank=3, draws=c) for c in (1, 10, 30, 100, 1000, 10**6)]
    assert bounds[0] == pytest.approx(100, rel=1e-12)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[2] < 50
    assert 1 <= bounds[-1] <= 1 + 1e-5
    # By hand, with the ε of 0.5 that is best here.
    failure = 3 * np.sqrt(2 / np.e) ** (100 / 3)
    assert bounds[3] <= (1 + 4 * 3 / 100 + failure * 100) * (1 + 1e-9)
    assert leverage_sampling_bound(1.0, 10.0, rank=3, draws=200, beta=0.5) == pytest.approx(bounds[3], rel=1e-9)
    assert leverage_sampling_bound(0.0, 0.0, rank=1, draws=1) == 0
    scaled = leverage_sampling_bound(1e-100, 1e-99, rank=3, draws=100)
    assert scaled == pytest.approx(1e-200 * bounds[3], rel=1e-9)


def test_draws_by_leverage_are_within_their_bound_by_the_rule_itself():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(60, 30)) @ np.diag(0.5 ** np.arange(30.0)) @ np.linalg.qr(rng.normal(size=(30, 30)))[0]
    values, squares = np.linalg.svd(A)[1], []
    for seed in range(40):
        squares.append(leverage(Triangle(A), 20, rank=2, seed=seed).feature_errors[-1])
    floor = np.linalg.norm(values[2:])
    assert np.mean(squares) <= leverage_sampling_bound(floor, np.linalg.norm(A), rank=2, draws=20)
    with pytest.raises(ValueError, match="rank=31"):
        leverage(Triangle(A), 20, rank=31)


# --- the ratio of pivots --------------------------------------------------------------------------------------------


@SOME
@given(A=features(), data=st.data())
def test_pivot_ratio_encloses_the_relative_error(A, data):
    R = np.triu(pivoted(A)[0])
    if not R.any():
        return
    k = data.draw(st.integers(0, len(R) - 1))
    low, high = pivot_ratio_bounds(abs(R[k, k] / R[0, 0]), k, A.shape[1], threshold=1 + 1e-6)
    share = np.linalg.norm(R[k:], 2) / np.linalg.norm(R, 2)
    assert low * (1 - 1e-9) <= share <= high * (1 + 1e-9) + 1e-12


def test_both_ends_of_the_pivot_ratio_are_approached():
    m, small = 9, 1e-4
    R = np.zeros((m, m))
    R[0], R[1, 1] = 1.0, small  # equal columns and one near them
    assert np.linalg.norm(R[1:], 2) / np.linalg.norm(R, 2) < 1.001 * pivot_ratio_bounds(small, 1, m)[0]
    R = np.zeros((m, m))
    R[0, 0], R[1, 1:] = 1.0, small  # equal small columns beside a large one
    assert np.linalg.norm(R[1:], 2) / np.linalg.norm(R, 2) > 0.999 * pivot_ratio_bounds(small, 1, m)[1]


def test_pivot_ratio_at_the_ends():
    assert pivot_ratio_bounds(0.0, 2, 5) == (0.0, 0.0)
    assert pivot_ratio_bounds(1.0, 0, 1) == pytest.approx((1, 1))
    assert pivot_ratio_bounds(1.0, 0, 100)[1] == 1
    assert pivot_ratio_bounds(0.5, 4, 4)[1] == 0
    assert pivot_ratio_bounds(0.5, 1, 4, threshold=2.0) == pytest.approx((0.125, 1))
    assert pivot_ratio_bounds(5e-324, 1, 4)[0] == 0


# --- norms ----------------------------------------------------------------------------------------------------------


@SOME
@given(A=features(), shift=st.integers(-1000, 950))
def test_norms_are_rounded_up_at_any_scale(A, shift):
    A = np.ldexp(A, shift)
    M = matrix(A)
    for ours, kind in ((spectral_norm, "spectral"), (frobenius_norm, "frobenius")):
        exact = precisely(lambda kind=kind: oracles_skeletons.norm(M, kind))()
        assert not arb(ours(A)) < exact
        assert not arb(ours(A)) > exact * arb(1 + 1e-12) + arb(1e-307)


def test_norms_of_nothing_are_zero():
    assert spectral_norm(np.zeros((0, 3))) == frobenius_norm(np.zeros((3, 0))) == spectral_norm(np.zeros((2, 2))) == 0


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: skeleton_error(np.ones((2, 2)), 1), "upper triangular"),
        (lambda: skeleton_error(np.zeros((3, 2)), 1), "upper triangular"),
        (lambda: skeleton_error([[np.nan]], 0), "R holds nan"),
        (lambda: skeleton_error(np.eye(2), 3), "retained=3"),
        (lambda: skeleton_error(np.eye(2), 1, norm="nuclear"), "norm='nuclear'"),
        (lambda: eckart_young_floor([-1.0], 0), "singular_values holds -1"),
        (lambda: eckart_young_floor([1.0], -1), "retained=-1"),
        (lambda: eckart_young_floor([1.0], 0, norm="2"), "norm='2'"),
        (lambda: qrcp_factor(3, 2), "retained=3"),
        (lambda: qrcp_factor(1, 2, threshold=0.9), "threshold=0.9"),
        (lambda: qrcp_factor(1, 2, threshold=np.inf), "threshold=inf"),
        (lambda: qrcp_factor(1, 2, norm=""), "norm=''"),
        (lambda: qrcp_factor(0, 0), "columns=0"),
        (lambda: strong_rrqr_factor(1, 2, limit=-1.0), "limit=-1"),
        (lambda: strong_rrqr_factor(1, 2, limit=np.inf), "limit=inf"),
        (lambda: swap_limit(np.ones((2, 2)), 1), "upper triangular"),
        (lambda: swap_limit(np.eye(2), -1), "retained=-1"),
        (lambda: pivot_threshold(np.eye(2), 3), "retained=3"),
        (lambda: volume_sampling_error([1.0, 0.0], 2), "exceeds the rank 1"),
        (lambda: volume_sampling_error([-1.0], 0), "holds -1"),
        (lambda: volume_sampling_bound([1.0], -1), "retained=-1"),
        (lambda: leverage_factor(-0.1), "missing=-0.1"),
        (lambda: leverage_sampling_bound(-1.0, 1.0, rank=1, draws=1), "floor=-1"),
        (lambda: leverage_sampling_bound(1.0, 1.0, rank=0, draws=1), "rank=0"),
        (lambda: leverage_sampling_bound(1.0, 1.0, rank=1, draws=0), "draws=0"),
        (lambda: leverage_sampling_bound(1.0, 1.0, rank=1, draws=1, beta=1.5), "beta=1.5"),
        (lambda: pivot_ratio_bounds(1.1, 0, 2), "ratio=1.1"),
        (lambda: pivot_ratio_bounds(0.5, 3, 2), "retained=3"),
        (lambda: pivot_ratio_bounds(0.5, 1, 2, threshold=0.5), "threshold=0.5"),
        (lambda: spectral_norm([1.0]), "1 dimensions"),
    ],
)
def test_bounds_refuse_bad_numbers(call, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: skeleton_error("R", 1),
        lambda: skeleton_error(np.eye(2), 1.0),
        lambda: qrcp_factor(True, 2),
        lambda: strong_rrqr_factor(1, 2, limit="2"),
        lambda: volume_sampling_error(["a"], 1),
        lambda: pivot_ratio_bounds("0.5", 1, 2),
    ],
)
def test_bounds_refuse_what_is_no_number(call):
    with pytest.raises(TypeError):
        call()
