import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.linalg import qr

import oracles
from ellq.theory import output_aware, pivoted_qr
from strategies import features

SOME = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def targets_for(X):
    """Two targets that depend on the features and on noise."""
    rng = np.random.default_rng(X.shape)
    return X @ rng.normal(size=(X.shape[1], 2)) / (1 + np.abs(X).max()) + 0.1 * rng.normal(size=(len(X), 2))


RULES = {
    "pivoted_qr": lambda X, k: pivoted_qr(X.T @ X, k),
    "output_aware": lambda X, k: output_aware(X.T @ X, X.T @ targets_for(X), k),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# --- the contract of every rule -------------------------------------------------------------------------------------


@each_rule
@SOME
@given(X=features())
def test_chooses_as_many_distinct_columns_as_asked(rule, X):
    m = X.shape[1]
    for k in range(1, m + 1):
        selection = rule(X, k)
        assert len(selection.indices) == k == len(set(selection.indices.tolist()))
        assert set(selection.indices.tolist()) <= set(range(m))
        assert selection.factor.shape == (selection.rank, m)
        assert selection.feature_errors.shape == (k + 1,)


@each_rule
@SOME
@given(X=features())
def test_feature_errors_fall_and_are_those_of_least_squares(rule, X):
    m = X.shape[1]
    selection = rule(X, m)
    errors = selection.feature_errors
    assert (np.diff(errors) <= 0).all()
    assert (errors >= 0).all()
    for k in range(m + 1):
        # Each feature's own error is resolved to rounding of its energy, magnified by the conditioning of the skeleton.
        expected = oracles.squared_error(X, X, selection.indices[:k], intercept=False)
        assert errors[k] == pytest.approx(expected, rel=1e-6, abs=1e-9 * errors[0] + 1e-300)


@each_rule
@SOME
@given(X=features(), data=st.data())
def test_first_k_is_what_the_rule_chooses_for_k(rule, X, data):
    m = X.shape[1]
    k = data.draw(st.integers(1, m))
    longer, shorter = rule(X, m).first(k), rule(X, k)
    np.testing.assert_array_equal(longer.indices, shorter.indices)
    assert longer.rank == shorter.rank
    np.testing.assert_array_equal(longer.factor, shorter.factor)
    np.testing.assert_array_equal(longer.feature_errors, shorter.feature_errors)


@each_rule
@SOME
@given(X=features())
def test_rank_counts_the_independent_columns(rule, X):
    lengths = np.linalg.norm(X, axis=0)
    values = np.linalg.svd(X / np.where(lengths > 0, lengths, 1), compute_uv=False)
    # Moments square the conditioning: what is nearly but not exactly dependent may count either way.
    assume(not ((values > 1e-12) & (values < 1e-3)).any())
    assert rule(X, X.shape[1]).rank == (values > 1e-3).sum()


@each_rule
@SOME
@given(X=features(), repeats=st.integers(2, 3))
def test_a_duplicate_is_taken_only_after_all_else(rule, X, repeats):
    m = X.shape[1]
    selection = rule(np.tile(X, repeats), m * repeats)
    chosen = selection.indices[: selection.rank] % m
    assert len(set(chosen.tolist())) == selection.rank


@each_rule
@SOME
@given(X=features())
def test_an_explained_column_gets_no_further_share_of_the_factor(rule, X):
    m = X.shape[1]
    selection = rule(np.tile(X, 2), 2 * m)
    for step, j in enumerate(selection.indices[: selection.rank]):
        assert not selection.factor[step + 1 :, [j, (j + m) % (2 * m)]].any()


@each_rule
def test_dead_columns_come_last(rule):
    X = np.random.default_rng(0).normal(size=(20, 5))
    X[:, [0, 3]] = 0.0
    selection = rule(X, 5)
    assert selection.rank == 3
    assert selection.indices[3:].tolist() == [0, 3]


@each_rule
def test_all_dead_columns_are_chosen_in_order(rule):
    selection = rule(np.zeros((4, 3)), 2)
    assert (selection.rank, selection.indices.tolist()) == (0, [0, 1])
    assert selection.feature_errors.tolist() == [0, 0, 0]


@each_rule
def test_ties_go_to_the_lowest_index(rule):
    X = np.eye(6)[:, [0, 1, 2]] @ np.diag([1.0, 1.0, 1.0])
    chosen = pivoted_qr(X.T @ X, 3) if rule is RULES["pivoted_qr"] else output_aware(X.T @ X, np.ones((3, 1)), 3)
    assert chosen.indices.tolist() == [0, 1, 2]
    again = rule(np.tile(X, 2), 6)
    np.testing.assert_array_equal(again.indices, rule(np.tile(X, 2), 6).indices)


@each_rule
@SOME
@given(X=features(), shift=st.sampled_from([-200, -50, 50, 200]))
def test_scaling_all_features_changes_no_choice(rule, X, shift):
    Y = targets_for(X)
    scaled = np.ldexp(X, shift)
    if rule is RULES["pivoted_qr"]:
        before, after = rule(X, X.shape[1]), rule(scaled, X.shape[1])
    else:
        before, after = (output_aware(A.T @ A, A.T @ Y, X.shape[1]) for A in (X, scaled))
    np.testing.assert_array_equal(before.indices, after.indices)


@each_rule
@pytest.mark.parametrize("retained", [0, 4, -1, 1.0, "1", None, True])
def test_a_bad_count_is_refused(rule, retained):
    with pytest.raises((TypeError, ValueError), match="retained"):
        rule(np.eye(3), retained)


@each_rule
def test_first_refuses_more_than_was_chosen(rule):
    selection = rule(np.eye(3), 2)
    assert selection.first(0).indices.size == 0
    for k in (3, -1, 1.0):
        with pytest.raises((TypeError, ValueError), match="k"):
            selection.first(k)


def test_matrices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="square"):
        pivoted_qr(np.ones((2, 3)), 1)
    with pytest.raises(ValueError, match="nan"):
        pivoted_qr(np.full((2, 2), np.nan), 1)
    with pytest.raises(ValueError, match="rows"):
        output_aware(np.eye(3), np.ones((2, 1)), 1)


@each_rule
def test_inputs_are_left_as_they_were(rule):
    X = np.random.default_rng(4).normal(size=(9, 4))
    G, R = X.T @ X, X.T @ targets_for(X)
    held = G.copy(), R.copy()
    pivoted_qr(G, 4)
    output_aware(G, R, 4)
    np.testing.assert_array_equal(G, held[0])
    np.testing.assert_array_equal(R, held[1])


# --- pivoted QR -----------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, n=st.integers(8, 30), m=st.integers(1, 8))
def test_pivots_are_those_of_lapack_on_generic_matrices(seed, n, m):
    X = np.random.default_rng(seed).normal(size=(n, m)) * np.random.default_rng(seed + 1).lognormal(size=m)
    R, pivots = qr(X, mode="r", pivoting=True)
    selection = pivoted_qr(X.T @ X, m)
    np.testing.assert_array_equal(selection.indices, pivots)
    np.testing.assert_allclose(np.abs(selection.factor[:, pivots]), np.abs(R[:m]), atol=1e-8 * np.abs(R).max())


@SOME
@given(X=features())
def test_the_factor_explains_the_moments(X):
    G = X.T @ X
    selection = pivoted_qr(G, X.shape[1])
    np.testing.assert_allclose(selection.factor.T @ selection.factor, G, rtol=0, atol=1e-11 * np.abs(G).max() + 1e-300)


# --- output-aware ---------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, n=st.integers(8, 25), m=st.integers(1, 6), c=st.integers(1, 3))
def test_output_aware_is_greedy_least_squares(seed, n, m, c):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(n, m)) @ (np.eye(m) + rng.normal(size=(m, m))), rng.normal(size=(n, c))
    assume(np.linalg.cond(X) < 1e4)
    chosen = output_aware(X.T @ X, X.T @ Y, m).indices.tolist()
    assert chosen == oracles.greedy_columns(X, Y, m, intercept=False)


def test_output_aware_takes_the_best_first_column_and_can_miss_the_best_pair():
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(30):
        X, Y = rng.normal(size=(20, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(20, 1))
        selection = output_aware(X.T @ X, X.T @ Y, 5)
        for k in (1, 2):
            greedy = oracles.squared_error(X, Y, selection.indices[:k], intercept=False)
            best = oracles.squared_error(X, Y, list(oracles.best_columns(X, Y, k, intercept=False)), intercept=False)
            assert greedy >= best * (1 - 1e-9)
            if k == 1:
                assert greedy == pytest.approx(best, rel=1e-9)
            gaps.append(greedy / best)
    assert max(gaps) > 1 + 1e-6  # else the comparison above could not fail


def test_output_aware_prefers_what_is_read_over_what_is_large():
    X = np.random.default_rng(1).normal(size=(30, 3)) * [100.0, 1.0, 10.0]
    Y = X[:, [1]]
    assert output_aware(X.T @ X, X.T @ Y, 1).indices.tolist() == [1]
    assert pivoted_qr(X.T @ X, 1).indices.tolist() == [0]
