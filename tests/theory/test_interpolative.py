import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from threadpoolctl import threadpool_limits

import oracles
from ellq.theory.accumulators import Gram, Tsqr
from ellq.theory.families import kahan
from ellq.theory.interpolative import RULES, interpolate, interpolative, refit
from ellq.theory.selection import output_aware, pivoted_qr, random_columns
from ellq.theory.swaps import strong_rrqr
from strategies import features

SOME = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
intercepts = pytest.mark.parametrize("intercept", [False, True])
kinds = pytest.mark.parametrize("kind", [Gram, Tsqr])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threadpool_limits(1):
        yield


def fed(kind, X, Y, device=None):
    accumulator = kind(X.shape[1], Y.shape[1], device=device)
    accumulator.update(X, Y)
    return accumulator


def chosen(accumulator, k, intercept, rule=pivoted_qr):
    return rule(accumulator.columns(centred=intercept), k)


def generic(seed, n=30, m=6, c=2):
    """Correlated features of full rank, condition number at most 100 or so, and targets that depend on them."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, m)) @ (2 * np.eye(m) + rng.uniform(-0.5, 0.5, size=(m, m))) + rng.normal(size=m)
    return X, X @ rng.normal(size=(m, c)) + rng.normal(size=(n, c)) + 2


def with_constant(X, intercept):
    return np.hstack([X, np.ones((len(X), 1))]) if intercept else X


# --- interpolation --------------------------------------------------------------------------------------------------


@kinds
@intercepts
@SOME
@given(X=features(), data=st.data())
def test_skeleton_represents_itself_exactly(kind, intercept, X, data):
    gram = fed(kind, X, np.zeros((len(X), 0)))
    k = data.draw(st.integers(1, X.shape[1]))
    skeleton = interpolate(gram, chosen(gram, k, intercept), intercept=intercept)
    assert skeleton.interpolation.shape == (k, X.shape[1])
    np.testing.assert_array_equal(skeleton.interpolation[:, skeleton.indices], np.eye(k))
    assert not skeleton.offset[skeleton.indices].any()
    assert intercept or not skeleton.offset.any()


@kinds
@intercepts
@SOME
@given(seed=seeds, k=st.integers(1, 6))
def test_interpolation_equals_least_squares(kind, intercept, seed, k):
    X, Y = generic(seed)
    gram = fed(kind, X, Y)
    skeleton = interpolate(gram, chosen(gram, k, intercept), intercept=intercept)
    solution = np.linalg.lstsq(with_constant(X[:, skeleton.indices], intercept), X, rcond=None)[0]
    np.testing.assert_allclose(skeleton.interpolation, solution[:k], rtol=1e-8, atol=1e-9)
    if intercept:
        np.testing.assert_allclose(skeleton.offset, solution[k], rtol=1e-8, atol=1e-9)


@kinds
@intercepts
@SOME
@given(seed=seeds)
def test_feature_errors_equal_the_actual_residuals(kind, intercept, seed):
    X, Y = generic(seed)
    gram = fed(kind, X, Y)
    whole = chosen(gram, 6, intercept)
    for k in range(1, 7):
        skeleton = interpolate(gram, whole.first(k), intercept=intercept)
        residual = X - skeleton.offset - X[:, skeleton.indices] @ skeleton.interpolation
        energy = skeleton.feature_errors[0]
        assert skeleton.feature_errors[k] == pytest.approx((residual**2).sum(), rel=1e-8, abs=1e-12 * energy)


def assert_duplicates_are_met(kind, X, order, intercept, device=None):
    doubled = np.hstack([X, X])[:, order]
    accumulator = fed(kind, doubled, np.zeros((len(X), 0)), device)
    whole = chosen(accumulator, doubled.shape[1], intercept)
    skeleton = interpolate(accumulator, whole.first(whole.rank), intercept=intercept)
    T, offset = np.asarray(skeleton.interpolation), np.asarray(skeleton.offset)
    residual = doubled - offset - doubled[:, skeleton.indices] @ T
    inside = {tuple(doubled[:, j]) for j in skeleton.indices}
    for j in range(doubled.shape[1]):
        if tuple(doubled[:, j]) in inside:
            assert np.linalg.norm(residual[:, j]) <= 1e-12 * np.linalg.norm(doubled[:, j])


@kinds
@intercepts
@pytest.mark.parametrize("device", [None, "cpu"])
@SOME
@given(X=features(samples=20), seed=seeds)
def test_duplicates_are_met_to_twelve_digits(kind, intercept, device, X, seed):
    order = np.random.default_rng(seed).permutation(2 * X.shape[1])
    assert_duplicates_are_met(kind, X, order, intercept, device)


@kinds
@SOME
@given(seed=seeds, smallest=st.sampled_from([1e-2, 1e-5, 1e-7]))
def test_duplicates_among_ill_conditioned_features_are_met_to_twelve_digits(kind, seed, smallest):
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (20, 8))
    X = U[:, :8] * np.geomspace(1, smallest, 8) @ V
    assert_duplicates_are_met(kind, X, rng.permutation(16), False)


@kinds
@intercepts
def test_dead_and_constant_features(kind, intercept):
    X = np.random.default_rng(0).normal(size=(15, 4))
    X[:, 1], X[:, 2] = 0.0, 5.0
    gram = fed(kind, X, np.zeros((15, 0)))
    skeleton = interpolate(gram, chosen(gram, 2, True), intercept=True)
    assert skeleton.indices.tolist() in ([0, 3], [3, 0])
    assert not skeleton.interpolation[:, 1:3].any()
    np.testing.assert_allclose(skeleton.offset, [0, 0, 5, 0], atol=1e-14)


@kinds
def test_all_features_dead(kind):
    gram = fed(kind, np.zeros((4, 3)), np.ones((4, 1)))
    skeleton = interpolate(gram, chosen(gram, 2, False), intercept=False)
    np.testing.assert_array_equal(skeleton.interpolation, [[1, 0, 0], [0, 1, 0]])
    assert not refit(gram, chosen(gram, 2, False), intercept=False).coefficients.any()


# --- refit ----------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("rule", [pivoted_qr, output_aware])
@intercepts
@SOME
@given(seed=seeds, k=st.integers(1, 6))
def test_refit_equals_least_squares(kind, rule, intercept, seed, k):
    X, Y = generic(seed)
    gram = fed(kind, X, Y)
    solution = refit(gram, chosen(gram, k, intercept, rule), intercept=intercept)
    expected = np.linalg.lstsq(with_constant(X[:, solution.indices], intercept), Y, rcond=None)[0]
    np.testing.assert_allclose(solution.coefficients, expected[:k], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(solution.intercept, expected[k] if intercept else 0, rtol=1e-8, atol=1e-9)


@kinds
@pytest.mark.parametrize("rule", [pivoted_qr, output_aware])
@intercepts
@SOME
@given(seed=seeds)
def test_refit_errors_equal_the_actual_ones_at_every_count(kind, rule, intercept, seed):
    X, Y = generic(seed)
    gram = fed(kind, X, Y)
    errors = refit(gram, chosen(gram, 6, intercept, rule), intercept=intercept).errors
    assert (np.diff(errors) <= 0).all()
    for k in range(1, 7):
        part = chosen(gram, k, intercept, rule)
        solution = refit(gram, part, intercept=intercept)
        actual = ((Y - solution.intercept - X[:, part.indices] @ solution.coefficients) ** 2).sum()
        assert errors[k] == pytest.approx(actual, rel=1e-8)
        assert actual == pytest.approx(oracles.squared_error(X, Y, part.indices, intercept=intercept), rel=1e-8)


@kinds
@intercepts
@SOME
@given(X=features(samples=20), seed=seeds)
def test_redundant_columns_keep_their_weights_and_the_fit(kind, intercept, X, seed):
    rng = np.random.default_rng(seed)
    X = np.hstack([X, X[:, :1], np.zeros((20, 1)), 2 * X[:, -1:]])
    X = X / np.maximum(np.linalg.norm(X, axis=0), 1e-300)
    X = X[:, rng.permutation(X.shape[1])]
    present = rng.normal(size=(X.shape[1], 2))
    Y = X @ rng.normal(size=(X.shape[1], 2)) + 1
    gram = fed(kind, X, Y)
    selection = chosen(gram, X.shape[1], intercept)
    kept = refit(gram, selection, intercept=intercept, present=present)
    plain = refit(gram, selection, intercept=intercept)
    redundant = selection.indices[selection.rank :]
    assert redundant.size >= 2
    np.testing.assert_array_equal(kept.coefficients[selection.rank :], present[redundant])
    assert not plain.coefficients[selection.rank :].any()
    np.testing.assert_array_equal(kept.errors, plain.errors)
    fits = [X[:, s.indices] @ s.coefficients + s.intercept for s in (kept, plain)]
    np.testing.assert_allclose(*fits, rtol=0, atol=1e-7 * (1 + np.abs(plain.coefficients).max()))


@kinds
@intercepts
def test_dead_features_keep_their_weights_even_if_all_are_dead(kind, intercept):
    gram = fed(kind, np.zeros((4, 3)), np.full((4, 1), 2.0))
    present = np.array([[1.0], [2.0], [3.0]])
    solution = refit(gram, chosen(gram, 2, intercept), intercept=intercept, present=present)
    np.testing.assert_array_equal(solution.coefficients, [[1.0], [2.0]])
    np.testing.assert_array_equal(solution.intercept, [2.0 if intercept else 0.0])
    np.testing.assert_allclose(solution.errors, 0 if intercept else 16)


@kinds
def test_refit_of_everything_reproduces_the_targets(kind):
    X, _ = generic(7)
    Y = X @ np.arange(12.0).reshape(6, 2) + 1
    gram = fed(kind, X, Y)
    solution = refit(gram, chosen(gram, 6, True), intercept=True)
    np.testing.assert_allclose(X[:, solution.indices] @ solution.coefficients + solution.intercept, Y, rtol=1e-10)
    assert solution.errors[-1] <= 1e-13 * solution.errors[0]


@kinds
def test_bad_input_is_refused(kind):
    gram = fed(kind, np.eye(3), np.ones((3, 2)))
    selection = chosen(gram, 2, False)
    with pytest.raises(ValueError, match="present has shape"):
        refit(gram, selection, intercept=False, present=np.ones((2, 3)))
    for ridge in (-1.0, np.nan, np.inf, "cv"):
        with pytest.raises((TypeError, ValueError), match="ridge"):
            refit(gram, selection, intercept=False, ridge=ridge)
    for solve in (interpolate, refit):
        with pytest.raises(ValueError, match="empty"):
            solve(Gram(3, 2), selection, intercept=False)


# --- refit with a ridge ---------------------------------------------------------------------------------------------


def penalised(X, Y, columns, ridge, intercept):
    """The minimiser of the definition, by stacking the penalty under the features."""
    if intercept:
        X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    A = X[:, columns]
    weight = np.sqrt(ridge * (A**2).sum() / len(columns)) * np.eye(len(columns))
    goal = np.vstack([Y, np.zeros((len(columns), Y.shape[1]))])
    return np.linalg.lstsq(np.vstack([A, weight]), goal, rcond=None)[0]


@kinds
@intercepts
@SOME
@given(seed=seeds, k=st.integers(1, 6), ridge=st.sampled_from([1e-6, 0.1, 10.0]))
def test_ridge_is_the_minimiser_of_the_penalised_error(kind, intercept, seed, k, ridge):
    X, Y = generic(seed)
    accumulator = fed(kind, X, Y)
    selection = chosen(accumulator, k, intercept)
    solution = refit(accumulator, selection, intercept=intercept, ridge=ridge)
    expected = penalised(X, Y, selection.indices, ridge, intercept)
    np.testing.assert_allclose(solution.coefficients, expected, rtol=1e-8, atol=1e-9)
    left = Y - solution.intercept - X[:, selection.indices] @ solution.coefficients
    assert solution.error == pytest.approx((left**2).sum(), rel=1e-9)
    assert solution.error >= solution.errors[-1]
    assert solution.ridge == ridge


@kinds
@intercepts
@SOME
@given(seed=seeds)
def test_generalised_cross_validation_takes_the_penalty_of_least_score(kind, intercept, seed):
    X, Y = generic(seed, n=12)
    accumulator = fed(kind, X, Y)
    selection = chosen(accumulator, 6, intercept)
    found = refit(accumulator, selection, intercept=intercept, ridge="gcv")
    if intercept:
        X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)

    def score(ridge):
        penalty = ridge * (X**2).sum() / 6
        hat = X @ np.linalg.solve(X.T @ X + penalty * np.eye(6), X.T)
        return ((Y - hat @ Y) ** 2).sum() / (12 - intercept - np.trace(hat)) ** 2

    for ridge in [0.0, *np.geomspace(1e-9, 100, 200)]:
        assert score(found.ridge) <= score(ridge) * (1 + 1e-2)


def test_generalised_cross_validation_pays_where_samples_are_few():
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X, truth = rng.normal(size=(2000, 30)), rng.normal(size=(30, 3))
        Y = X @ truth + 5 * rng.normal(size=(2000, 3))
        few = fed(Gram, X[:40], Y[:40])
        selection = chosen(few, 30, False)
        plain, ridged = (refit(few, selection, intercept=False, ridge=r) for r in (0.0, "gcv"))
        errors = [((Y[40:] - X[40:, s.indices] @ s.coefficients) ** 2).sum() for s in (plain, ridged)]
        gains.append(errors[1] / errors[0])
    assert np.median(gains) < 0.7
    many = fed(Gram, X, Y)
    assert refit(many, chosen(many, 30, False), intercept=False, ridge="gcv").ridge < 0.1


# --- the whole decomposition ----------------------------------------------------------------------------------------


def net_features(n=300, m=40, seed=0):
    rng = np.random.default_rng(seed)
    return np.tanh(rng.normal(size=(n, 6)) @ rng.normal(size=(6, m)) + rng.normal(size=m))


accumulations = pytest.mark.parametrize("accumulate", ["gram", "tsqr"])


@accumulations
@intercepts
@pytest.mark.parametrize("select", [name for name in RULES if name != "exhaustive"])
def test_every_rule_gives_the_actual_errors_above_the_floors(accumulate, intercept, select):
    A = net_features()
    Y = A[:, :3] * [1.0, 2.0, 3.0]
    found = interpolative(A, k=9, select=select, targets=Y, intercept=intercept, accumulate=accumulate)
    left = A - found.skeleton.offset - A[:, found.indices] @ found.interpolation
    assert found.errors[-1] == pytest.approx(np.linalg.norm(left), rel=1e-9)
    assert found.spectral_error == pytest.approx(np.linalg.norm(left, 2), rel=1e-9)
    about = A - A.mean(axis=0) if intercept else A
    values = np.linalg.svd(about)[1]
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.spectral_floors, values[:10], rtol=1e-9)
    np.testing.assert_allclose(found.floors, [np.linalg.norm(values[i:]) for i in range(10)], rtol=1e-9)
    assert (found.floors <= found.errors).all()
    assert found.spectral_error >= found.spectral_floors[-1]
    np.testing.assert_array_equal(found.interpolation[:, found.indices], np.eye(9))


@accumulations
@SOME
@given(X=features(), data=st.data())
@pytest.mark.filterwarnings("ignore:.*samples cannot tell")
def test_errors_hold_for_any_features(accumulate, X, data):
    k = data.draw(st.integers(1, X.shape[1]))
    found = interpolative(X, k=k, accumulate=accumulate)
    left = X - X[:, found.indices] @ found.interpolation
    slack = 1e-5 * np.linalg.norm(X)
    assert np.linalg.norm(left) == pytest.approx(found.errors[-1], rel=1e-6, abs=slack)
    assert np.linalg.norm(left, 2) == pytest.approx(found.spectral_error, rel=1e-6, abs=slack)
    assert (found.floors <= found.errors).all()
    assert found.spectral_error <= found.errors[-1]


@accumulations
def test_batches_accumulators_and_tensors_give_what_the_matrix_gives(accumulate):
    A, Y = net_features(), net_features(m=2, seed=1)
    whole = interpolative(A, k=5, targets=Y, refit="least-squares", accumulate=accumulate)
    parts = [(A[:100], Y[:100]), (A[100:], Y[100:])]
    kind = {"gram": Gram, "tsqr": Tsqr}[accumulate]
    others = [
        interpolative(source, k=5, refit="least-squares", accumulate=accumulate)
        for source in (
            iter(parts),
            fed(kind, A, Y),
            fed(kind, A, Y, "cpu"),
            [[torch.tensor(p) for p in q] for q in parts],
        )
    ]
    others.append(interpolative(torch.tensor(A), k=5, targets=torch.tensor(Y), refit="least-squares"))
    for other in others:
        np.testing.assert_array_equal(other.indices, whole.indices)
        np.testing.assert_allclose(other.interpolation, whole.interpolation, atol=1e-9)
        np.testing.assert_allclose(other.refit.coefficients, whole.refit.coefficients, atol=1e-9)
        np.testing.assert_allclose(other.errors, whole.errors, rtol=1e-9)
        np.testing.assert_allclose(other.singular_values, whole.singular_values, rtol=1e-6, atol=1e-7)
        assert other.spectral_error == pytest.approx(whole.spectral_error)
        assert str(other) == str(whole)
    assert isinstance(others[2].interpolation, torch.Tensor)


@accumulations
@pytest.mark.parametrize("select", ["pivoted-qr", "residual-trace", "strong-rrqr", partial(random_columns, seed=4)])
def test_tolerance_takes_the_fewest_columns_on_the_path(accumulate, select):
    A = net_features(m=100, n=400)
    for tol in (0.5, 0.1, 1e-2):
        found = interpolative(A, tol=tol, select=select, accumulate=accumulate)
        k, size = len(found.indices), np.linalg.norm(A)
        assert found.errors[k] <= tol * size
        fewer = interpolative(A, k=k - 1, select=select, accumulate=accumulate)
        assert fewer.errors[-1] > tol * size


def test_tolerance_of_a_refit_is_that_of_the_targets():
    A = net_features()
    Y = A @ np.random.default_rng(1).normal(size=(40, 3))
    found = interpolative(A, tol=0.1, select="output-aware", targets=Y, refit="least-squares", intercept=True)
    energy = ((Y - Y.mean(axis=0)) ** 2).sum()
    left = Y - found.refit.intercept - A[:, found.indices] @ found.refit.coefficients
    assert (left**2).sum() <= 0.01 * energy
    assert found.refit.errors[-2] > 0.01 * energy
    assert "outputs refitted to 0.0" in str(found)
    noise = np.random.default_rng(2).normal(size=(300, 1))
    with pytest.raises(ValueError, match=r"tol=0.01 is met by no columns: all of them leave 0.9"):
        interpolative(A, tol=0.01, targets=noise, refit="least-squares")


def test_exhaustive_search_meets_a_tolerance_with_the_fewest_columns():
    A = net_features(m=8)
    found = interpolative(A, tol=0.3, select="exhaustive")
    k = len(found.indices)
    assert found.errors[-1] <= 0.3 * np.linalg.norm(A)
    assert interpolative(A, k=k - 1, select="exhaustive").errors[-1] > 0.3 * np.linalg.norm(A)


def test_a_triangle_meets_tolerances_that_moments_refuse():
    A = net_features(n=400, m=60)
    with pytest.raises(ValueError, match=r"tol=1e-09 is below .*accumulate='tsqr'"):
        interpolative(A, tol=1e-9)
    # 60 smooth functions of six variables are not that redundant; powers of one are.
    A = np.linspace(0, 1, 400)[:, None] ** np.arange(1, 30)
    found = interpolative(A, tol=1e-9, accumulate="tsqr")
    left = A - A[:, found.indices] @ found.interpolation
    assert np.linalg.norm(left) <= 1.01e-9 * np.linalg.norm(A)
    assert found.errors[-1] == pytest.approx(np.linalg.norm(left), rel=0.01)
    with pytest.raises(ValueError, match=r"tol=1e-16 is below [^.]*\.$"):
        interpolative(A, tol=1e-16, accumulate="tsqr")


def near_dependent(name):
    if name == "kahan":  # pivoted QR takes its columns in order
        return kahan(60, 0.3) * (1 - 1e-10) ** np.arange(60)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(90, 12))
    return {
        "powers": np.linspace(0, 1, 60)[:, None] ** np.arange(1, 25),
        "twins": np.hstack([X, X + 1e-9 * rng.normal(size=X.shape)]),
        "scales": X * 10.0 ** np.linspace(-60, 60, 12),
        "outliers": X * 10.0 ** rng.uniform(-50, 50, 90)[:, None],
        "far": X + 1e9,
    }[name]


@accumulations
@pytest.mark.parametrize("select", ["pivoted-qr", "residual-trace", "strong-rrqr", "leverage"])
@pytest.mark.parametrize("name", ["kahan", "powers", "twins", "scales", "outliers", "far"])
def test_no_error_is_above_its_bound_whatever_rounding_does(accumulate, select, name):
    A = near_dependent(name)
    for k in (A.shape[1] // 2, A.shape[1] - 1):
        found = interpolative(A, k=k, select=select, accumulate=accumulate)
        with mp.workdps(40):
            assert exact_error(A, found.indices, found.interpolation) <= found.error_bound


def exact_error(A, S, T):
    """Return ‖A − A_S T‖_F of float64 values, exactly but for the end."""
    whole = np.vectorize(mp.mpf, otypes=[object])
    left = whole(A) - whole(A[:, S]) @ whole(T)
    return mp.sqrt((left * left).sum())


def test_moments_of_kahans_matrix_hide_an_error_that_the_bound_and_a_warning_show():
    A = kahan(60, 0.6) * (1 - 1e-10) ** np.arange(60)
    size = np.linalg.norm(A)
    found = interpolative(A, k=59, select="residual-trace")
    left = np.linalg.norm(A - A[:, found.indices] @ found.interpolation)
    assert found.errors[-1] < 1e-6 * size < 1e-4 * size < left <= found.error_bound
    assert "but for rounding, which may hide" in str(found)
    with pytest.warns(UserWarning, match=r"Rounding may hide .* more than tol=1e-06.*accumulate='tsqr'"):
        interpolative(A, tol=1e-6, select="residual-trace")
    exact = interpolative(A, k=59, select="residual-trace", accumulate="tsqr")
    left = np.linalg.norm(A - A[:, exact.indices] @ exact.interpolation)
    assert left <= exact.error_bound < 1e-4 * size
    assert "rounding" not in str(interpolative(net_features(), k=9))


@accumulations
def test_the_bound_of_the_error_is_near_it_where_rounding_is_small(accumulate):
    found = interpolative(net_features(), k=9, intercept=True, accumulate=accumulate)
    assert found.errors[-1] <= found.error_bound <= (1 + 1e-9) * found.errors[-1]
    assert interpolative(np.zeros((5, 3)), k=2, accumulate=accumulate).error_bound == 0


@pytest.mark.parametrize(("accumulate", "scales"), [("gram", (1e-150, 1e150)), ("tsqr", (1e-290, 1e200, 1e290))])
def test_errors_scale_with_the_matrix_as_far_as_the_accumulator_reaches(accumulate, scales):
    A = np.random.default_rng(0).normal(size=(50, 6))
    A[:, 3] = A[:, 1]
    unit = interpolative(A, k=4, accumulate=accumulate)
    for scale in scales:
        found = interpolative(A * scale, k=4, accumulate=accumulate)
        np.testing.assert_array_equal(found.indices, unit.indices)
        np.testing.assert_allclose(found.interpolation, unit.interpolation, atol=1e-9)
        for name in ("errors", "floors", "spectral_floors", "spectral_error", "error_bound"):
            np.testing.assert_allclose(getattr(found, name) / scale, getattr(unit, name), rtol=1e-7, err_msg=name)


def test_a_table_of_pandas_is_a_matrix():
    A = net_features()
    np.testing.assert_array_equal(interpolative(pd.DataFrame(A), k=5).indices, interpolative(A, k=5).indices)


def test_prints_as_a_table():
    A = np.diag([4.0, 3.0, 0.0])
    assert str(interpolative(A, k=2)) == (
        "2 of 3 columns stand for all, on 3 samples; relative to ‖A‖_F = 5:\n"
        "     k   ‖A − A_S T‖_F  least possible     σ_(k+1)\n"
        "     0               1               1         0.8\n"
        "     1             0.6             0.6         0.6\n"
        "     2               0               0           0\n"
        "‖A − A_S T‖_2 = 0 with 2 columns"
    )


@accumulations
def test_a_matrix_of_zeros(accumulate):
    for budget in ({"k": 2}, {"tol": 0.1}):
        found = interpolative(np.zeros((5, 3)), accumulate=accumulate, **budget)
        assert not found.errors.any()
        assert not found.floors.any()
        assert found.spectral_error == 0
        assert found.interpolation.sum() == len(found.indices) == len(found.interpolation)
        assert "0 samples" not in str(found)


@accumulations
def test_fewer_samples_than_columns_work_and_say_so(accumulate):
    A = net_features(n=10)
    with pytest.warns(UserWarning, match=r"10 samples .* 40 columns apart: at most 10 .* 10 of the 15 chosen"):
        found = interpolative(A, k=15, accumulate=accumulate)
    assert len(set(found.indices.tolist())) == 15
    left = A - A[:, found.indices] @ found.interpolation
    assert np.linalg.norm(left) <= 1e-6 * np.linalg.norm(A)
    with pytest.warns(UserWarning, match=r"at most 9 are independent.*Use at least 41"):
        interpolative(A, k=5, intercept=True, accumulate=accumulate)


def test_rules_may_be_functions():
    A = net_features()
    found = interpolative(A, k=8, select=partial(strong_rrqr, f=1.01))
    assert np.abs(found.interpolation).max() <= 1.01 * (1 + 1e-9)


class TestBadInput:
    @pytest.mark.parametrize("budget", [{}, {"k": 2, "tol": 0.1}])
    def test_one_budget(self, budget):
        with pytest.raises(ValueError, match="Pass one of the two"):
            interpolative(np.eye(3), **budget)

    @pytest.mark.parametrize("k", [0, -1, 4, 2.0, "2", True])
    def test_count(self, k):
        with pytest.raises((TypeError, ValueError), match="k"):
            interpolative(np.eye(3), k=k)

    @pytest.mark.parametrize("tol", [0.0, -0.1, np.nan, "0.1", True])
    def test_tolerance(self, tol):
        with pytest.raises((TypeError, ValueError), match="tol"):
            interpolative(np.eye(3), tol=tol)

    @pytest.mark.parametrize("words", [{"select": "qr"}, {"refit": "lstsq"}, {"accumulate": "qr"}])
    def test_words(self, words):
        ((name, word),) = words.items()
        with pytest.raises(ValueError, match=f"{name}='{word}' is unknown"):
            interpolative(np.eye(3), k=1, **words)

    def test_targets(self):
        with pytest.raises(ValueError, match="needs targets"):
            interpolative(np.eye(3), k=1, refit="least-squares")
        with pytest.raises(ValueError, match="no targets"):
            interpolative(np.eye(3), k=1, select="output-aware")
        for source in (iter([np.eye(3)]), fed(Gram, np.eye(3), np.eye(3))):
            with pytest.raises(ValueError, match="targets= goes with one matrix"):
                interpolative(source, k=1, targets=np.eye(3))
        with pytest.raises(ValueError, match="batch 0 has 3 feature rows but 2 target rows"):
            interpolative(np.eye(3), k=1, targets=np.eye(2))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("accumulate", ["gram", "tsqr"])
    def test_batches_that_are_not_finite_are_named(self, bad, accumulate):
        batches = [np.ones((2, 3)), np.ones((2, 3))]
        batches[1][1, 2] = bad
        with pytest.raises(ValueError, match=rf"batch 1, features, holds {bad} at index \[1, 2\]"):
            interpolative(batches, k=1, accumulate=accumulate)

    def test_batches_of_other_widths(self):
        with pytest.raises(ValueError, match="batch 1 has features of shape"):
            interpolative([np.eye(3), np.eye(2)], k=1)

    @pytest.mark.parametrize("empty", [np.zeros((0, 3)), [], [np.zeros((0, 3))], Gram(3, 0), Tsqr(3, 0)])
    def test_no_samples(self, empty):
        with pytest.raises(ValueError, match=r"holds no samples|is empty"):
            interpolative(empty, k=1)

    @pytest.mark.parametrize("other", [np.zeros((3, 0)), np.zeros(3), np.zeros((2, 2, 2)), [1.0, 2.0]])
    def test_no_matrix(self, other):
        with pytest.raises(ValueError, match="Pass matrices of at least one column"):
            interpolative(other, k=1)

    @pytest.mark.parametrize("other", [3, "rows", None, {"a": 1}])
    def test_no_batches(self, other):
        with pytest.raises(TypeError, match="A must be a matrix"):
            interpolative(other, k=1)

    def test_complex_values(self):
        with pytest.raises(TypeError, match="real numbers"):
            interpolative(np.eye(3) * 1j, k=1)


def test_the_guide_shows_what_its_example_prints(capsys):
    guide = (Path(__file__).parents[2] / "docs" / "interpolative.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", guide, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == shown
