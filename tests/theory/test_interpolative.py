import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from ellq.theory import Gram, interpolate, output_aware, pivoted_qr, refit
from strategies import features

SOME = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
intercepts = pytest.mark.parametrize("intercept", [False, True])


def fed(X, Y):
    gram = Gram(X.shape[1], Y.shape[1])
    gram.update(X, Y)
    return gram


def chosen(gram, k, intercept, rule=pivoted_qr):
    G, R, _ = gram.moments(centred=intercept)
    return rule(G, k) if rule is pivoted_qr else rule(G, R, k)


def generic(seed, n=30, m=6, c=2):
    """Correlated features of full rank, condition number at most 100 or so, and targets that depend on them."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, m)) @ (2 * np.eye(m) + rng.uniform(-0.5, 0.5, size=(m, m))) + rng.normal(size=m)
    return X, X @ rng.normal(size=(m, c)) + rng.normal(size=(n, c)) + 2


def with_constant(X, intercept):
    return np.hstack([X, np.ones((len(X), 1))]) if intercept else X


# --- interpolation --------------------------------------------------------------------------------------------------


@intercepts
@SOME
@given(X=features(), data=st.data())
def test_skeleton_represents_itself_exactly(intercept, X, data):
    gram = fed(X, np.zeros((len(X), 0)))
    k = data.draw(st.integers(1, X.shape[1]))
    skeleton = interpolate(gram, chosen(gram, k, intercept), intercept=intercept)
    assert skeleton.interpolation.shape == (k, X.shape[1])
    np.testing.assert_array_equal(skeleton.interpolation[:, skeleton.indices], np.eye(k))
    assert not skeleton.offset[skeleton.indices].any()
    assert intercept or not skeleton.offset.any()


@intercepts
@SOME
@given(seed=seeds, k=st.integers(1, 6))
def test_interpolation_equals_least_squares(intercept, seed, k):
    X, Y = generic(seed)
    gram = fed(X, Y)
    skeleton = interpolate(gram, chosen(gram, k, intercept), intercept=intercept)
    solution = np.linalg.lstsq(with_constant(X[:, skeleton.indices], intercept), X, rcond=None)[0]
    np.testing.assert_allclose(skeleton.interpolation, solution[:k], rtol=1e-8, atol=1e-9)
    if intercept:
        np.testing.assert_allclose(skeleton.offset, solution[k], rtol=1e-8, atol=1e-9)


@intercepts
@SOME
@given(seed=seeds)
def test_feature_errors_equal_the_actual_residuals(intercept, seed):
    X, Y = generic(seed)
    gram = fed(X, Y)
    whole = chosen(gram, 6, intercept)
    for k in range(1, 7):
        skeleton = interpolate(gram, whole.first(k), intercept=intercept)
        residual = X - skeleton.offset - X[:, skeleton.indices] @ skeleton.interpolation
        energy = skeleton.feature_errors[0]
        assert skeleton.feature_errors[k] == pytest.approx((residual**2).sum(), rel=1e-8, abs=1e-12 * energy)


@intercepts
@SOME
@given(X=features(samples=20), seed=seeds)
def test_duplicates_are_met_to_rounding(intercept, X, seed):
    doubled = np.hstack([X, X])[:, np.random.default_rng(seed).permutation(2 * X.shape[1])]
    gram = fed(doubled, np.zeros((len(X), 0)))
    whole = chosen(gram, doubled.shape[1], intercept)
    if not whole.rank:
        return
    selection = whole.first(whole.rank)
    skeleton = interpolate(gram, selection, intercept=intercept)
    residual = doubled - skeleton.offset - doubled[:, skeleton.indices] @ skeleton.interpolation
    inside = {tuple(doubled[:, j]) for j in skeleton.indices}
    lengths = np.sqrt(np.diag(gram.moments(centred=intercept)[0]))[skeleton.indices]
    # Moments resolve a column to ε of its length, hence its share of a small pivot to ε times their ratio.
    conditioning = (lengths / np.diag(selection.factor[:, skeleton.indices])).max()
    for j in range(doubled.shape[1]):
        if tuple(doubled[:, j]) in inside:
            assert np.linalg.norm(residual[:, j]) <= 1e-14 * conditioning * np.linalg.norm(doubled[:, j])


@intercepts
@SOME
@given(seed=seeds)
def test_duplicates_of_well_conditioned_features_are_met_to_twelve_digits(intercept, seed):
    X, _ = generic(seed)
    doubled = np.hstack([X, X])
    gram = fed(doubled, np.zeros((len(X), 0)))
    selection = chosen(gram, 6, intercept)
    assert selection.rank == 6
    skeleton = interpolate(gram, selection, intercept=intercept)
    residual = doubled - skeleton.offset - doubled[:, skeleton.indices] @ skeleton.interpolation
    assert (np.linalg.norm(residual, axis=0) <= 1e-12 * np.linalg.norm(doubled, axis=0)).all()


@intercepts
def test_dead_and_constant_features(intercept):
    X = np.random.default_rng(0).normal(size=(15, 4))
    X[:, 1], X[:, 2] = 0.0, 5.0
    gram = fed(X, np.zeros((15, 0)))
    skeleton = interpolate(gram, chosen(gram, 2, True), intercept=True)
    assert skeleton.indices.tolist() in ([0, 3], [3, 0])
    assert not skeleton.interpolation[:, 1:3].any()
    np.testing.assert_allclose(skeleton.offset, [0, 0, 5, 0], atol=1e-14)


def test_all_features_dead():
    gram = fed(np.zeros((4, 3)), np.ones((4, 1)))
    skeleton = interpolate(gram, chosen(gram, 2, False), intercept=False)
    np.testing.assert_array_equal(skeleton.interpolation, [[1, 0, 0], [0, 1, 0]])
    assert not refit(gram, chosen(gram, 2, False), intercept=False).coefficients.any()


# --- refit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [pivoted_qr, output_aware])
@intercepts
@SOME
@given(seed=seeds, k=st.integers(1, 6))
def test_refit_equals_least_squares(rule, intercept, seed, k):
    X, Y = generic(seed)
    gram = fed(X, Y)
    solution = refit(gram, chosen(gram, k, intercept, rule), intercept=intercept)
    expected = np.linalg.lstsq(with_constant(X[:, solution.indices], intercept), Y, rcond=None)[0]
    np.testing.assert_allclose(solution.coefficients, expected[:k], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(solution.intercept, expected[k] if intercept else 0, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", [pivoted_qr, output_aware])
@intercepts
@SOME
@given(seed=seeds)
def test_refit_errors_equal_the_actual_ones_at_every_count(rule, intercept, seed):
    X, Y = generic(seed)
    gram = fed(X, Y)
    errors = refit(gram, chosen(gram, 6, intercept, rule), intercept=intercept).errors
    assert (np.diff(errors) <= 0).all()
    for k in range(1, 7):
        part = chosen(gram, k, intercept, rule)
        solution = refit(gram, part, intercept=intercept)
        actual = ((Y - solution.intercept - X[:, part.indices] @ solution.coefficients) ** 2).sum()
        assert errors[k] == pytest.approx(actual, rel=1e-8)
        assert actual == pytest.approx(oracles.squared_error(X, Y, part.indices, intercept=intercept), rel=1e-8)


@intercepts
@SOME
@given(X=features(samples=20), seed=seeds)
def test_redundant_columns_keep_their_weights_and_the_fit(intercept, X, seed):
    rng = np.random.default_rng(seed)
    X = np.hstack([X, X[:, :1], np.zeros((20, 1)), 2 * X[:, -1:]])
    X = X / np.maximum(np.linalg.norm(X, axis=0), 1e-300)
    X = X[:, rng.permutation(X.shape[1])]
    present = rng.normal(size=(X.shape[1], 2))
    Y = X @ rng.normal(size=(X.shape[1], 2)) + 1
    gram = fed(X, Y)
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


@intercepts
def test_dead_features_keep_their_weights_even_if_all_are_dead(intercept):
    gram = fed(np.zeros((4, 3)), np.full((4, 1), 2.0))
    present = np.array([[1.0], [2.0], [3.0]])
    solution = refit(gram, chosen(gram, 2, intercept), intercept=intercept, present=present)
    np.testing.assert_array_equal(solution.coefficients, [[1.0], [2.0]])
    np.testing.assert_array_equal(solution.intercept, [2.0 if intercept else 0.0])
    np.testing.assert_allclose(solution.errors, 0 if intercept else 16)


def test_refit_of_everything_reproduces_the_targets():
    X, _ = generic(7)
    Y = X @ np.arange(12.0).reshape(6, 2) + 1
    gram = fed(X, Y)
    solution = refit(gram, chosen(gram, 6, True), intercept=True)
    np.testing.assert_allclose(X[:, solution.indices] @ solution.coefficients + solution.intercept, Y, rtol=1e-10)
    assert solution.errors[-1] <= 1e-13 * solution.errors[0]


def test_bad_input_is_refused():
    gram = fed(np.eye(3), np.ones((3, 2)))
    selection = chosen(gram, 2, False)
    with pytest.raises(ValueError, match="present has shape"):
        refit(gram, selection, intercept=False, present=np.ones((2, 3)))
    for solve in (interpolate, refit):
        with pytest.raises(ValueError, match="empty"):
            solve(Gram(3, 2), selection, intercept=False)
