from functools import partial
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.linalg import interpolative as scipy_interpolative
from scipy.linalg import qr
from threadpoolctl import threadpool_limits

import oracles
from ellq.theory.columns import Moments, Triangle
from ellq.theory.elimination import eliminate
from ellq.theory.selection import exhaustive, leverage, output_aware, pivoted_qr, random_columns, residual_trace
from ellq.theory.swaps import strong_rrqr, swap_refined
from strategies import features

SOME = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threadpool_limits(1):
        yield


def targets_for(X):
    """Two targets that depend on the features and on noise."""
    rng = np.random.default_rng(X.shape)
    return X @ rng.normal(size=(X.shape[1], 2)) / (1 + np.abs(X).max()) + 0.1 * rng.normal(size=(len(X), 2))


def moments(X, Y=None):
    Y = targets_for(X) if Y is None else Y
    return Moments(X.T @ X, X.T @ Y, (Y * Y).sum(axis=0))


def triangle(X, Y=None):
    return Triangle(X, targets_for(X) if Y is None else Y)


NESTED = {
    "pivoted_qr": pivoted_qr,
    "output_aware": output_aware,
    "residual_trace": residual_trace,
    "random_columns": partial(random_columns, seed=3),
}
REPEATABLE = {  # by the data alone
    **{name: NESTED[name] for name in ("pivoted_qr", "output_aware", "residual_trace")},
    "strong_rrqr": strong_rrqr,
    "swap_refined": swap_refined,
    "swap_refined_outputs": partial(swap_refined, error="outputs"),
    "exhaustive": exhaustive,
    "exhaustive_outputs": partial(exhaustive, error="outputs"),
}
RULES = {**REPEATABLE, **NESTED, "leverage": partial(leverage, seed=3)}
KINDS = {"moments": moments, "triangle": triangle}


def each(rules):
    """Run a test for every one of the rules on both kinds of columns."""
    cases = [pytest.param(r, k, id=f"{i}-{j}") for (i, r), (j, k) in product(rules.items(), KINDS.items())]
    return pytest.mark.parametrize(("rule", "kind"), cases)


# --- the contract of every rule -------------------------------------------------------------------------------------


@each(RULES)
@SOME
@given(X=features(), data=st.data())
def test_chooses_as_many_distinct_columns_as_asked(rule, kind, X, data):
    m = X.shape[1]
    k = data.draw(st.integers(1, m))
    selection = rule(kind(X), k)
    assert len(selection.indices) == k == len(set(selection.indices.tolist()))
    assert set(selection.indices.tolist()) <= set(range(m))
    assert selection.factor.shape == (selection.rank, m)
    assert selection.feature_errors.shape == (k + 1,)


@each(RULES)
@SOME
@given(X=features(), data=st.data())
def test_feature_errors_fall_and_are_those_of_least_squares(rule, kind, X, data):
    selection = rule(kind(X), data.draw(st.integers(1, X.shape[1])))
    errors = selection.feature_errors
    assert (np.diff(errors) <= 0).all()
    assert (errors >= 0).all()
    for k in range(len(errors)):
        # Each feature's own error is resolved to rounding of its energy, magnified by the conditioning of the skeleton.
        expected = oracles.squared_error(X, X, selection.indices[:k], intercept=False)
        T = np.linalg.pinv(X[:, selection.indices[:k]], rcond=1e-12) @ X
        rounding = max(1e-9, 1e-14 * X.shape[1] * (1 + np.abs(T).sum(axis=0).max(initial=0.0)) ** 2)
        assert errors[k] == pytest.approx(expected, rel=1e-6, abs=rounding * errors[0] + 1e-300)


@each(NESTED)
@SOME
@given(X=features(), data=st.data())
def test_first_k_is_what_the_rule_chooses_for_k(rule, kind, X, data):
    m = X.shape[1]
    k = data.draw(st.integers(1, m))
    longer, shorter = rule(kind(X), m).first(k), rule(kind(X), k)
    np.testing.assert_array_equal(longer.indices, shorter.indices)
    assert longer.rank == shorter.rank
    np.testing.assert_array_equal(longer.factor, shorter.factor)
    np.testing.assert_array_equal(longer.feature_errors, shorter.feature_errors)


@each(RULES)
@SOME
@given(X=features())
def test_rank_counts_the_independent_columns(rule, kind, X):
    lengths = np.linalg.norm(X, axis=0)
    values = np.linalg.svd(X / np.where(lengths > 0, lengths, 1), compute_uv=False)
    # Moments square the conditioning: what is nearly but not exactly dependent may count either way.
    assume(not ((values > 1e-12) & (values < 1e-3)).any())
    assert rule(kind(X), X.shape[1]).rank == (values > 1e-3).sum()


@each(RULES)
@SOME
@given(X=features(), repeats=st.integers(2, 3))
def test_a_duplicate_is_taken_only_after_all_else(rule, kind, X, repeats):
    X = X[:, : 14 // repeats]
    m = X.shape[1]
    selection = rule(kind(np.tile(X, repeats)), m * repeats)
    chosen = selection.indices[: selection.rank] % m
    assert len(set(chosen.tolist())) == selection.rank


@each(RULES)
@SOME
@given(X=features())
def test_an_explained_column_gets_no_further_share_of_the_factor(rule, kind, X):
    X = X[:, :7]
    m = X.shape[1]
    selection = rule(kind(np.tile(X, 2)), 2 * m)
    for step, j in enumerate(selection.indices[: selection.rank]):
        assert not selection.factor[step + 1 :, [j, (j + m) % (2 * m)]].any()


@each(RULES)
@SOME
@given(X=features(), data=st.data())
def test_the_factor_is_that_of_qr_of_the_chosen_columns(rule, kind, X, data):
    selection = rule(kind(X), data.draw(st.integers(1, X.shape[1])))
    chosen = selection.indices[: selection.rank]
    upper = selection.factor[:, chosen]
    assert not np.tril(upper, -1).any()
    assert (np.diag(upper) > 0).all()
    np.testing.assert_allclose(
        selection.factor.T @ selection.factor[:, chosen], X.T @ X[:, chosen], rtol=0, atol=1e-11 * (X**2).sum()
    )


@each(RULES)
def test_dead_columns_come_last(rule, kind):
    X = np.random.default_rng(0).normal(size=(20, 5))
    X[:, [0, 3]] = 0.0
    selection = rule(kind(X), 5)
    assert selection.rank == 3
    assert selection.indices[3:].tolist() == [0, 3]


@each(RULES)
def test_all_dead_columns_are_chosen_in_order(rule, kind):
    selection = rule(kind(np.zeros((4, 3))), 2)
    assert (selection.rank, selection.indices.tolist()) == (0, [0, 1])
    assert selection.feature_errors.tolist() == [0, 0, 0]


@each(REPEATABLE)
def test_ties_go_to_the_lowest_index(rule, kind):
    X = np.eye(6)[:, :4] * (1 + 1e-15 * np.arange(4))
    for k in (1, 2, 4):
        assert sorted(rule(kind(X, X.sum(axis=1, keepdims=True)), k).indices.tolist()) == list(range(k))


@each(RULES)
@SOME
@given(X=features(), shift=st.sampled_from([-200, -50, 50, 200]), data=st.data())
def test_scaling_all_features_changes_no_choice(rule, kind, X, shift, data):
    k, Y = data.draw(st.integers(1, X.shape[1])), targets_for(X)
    before, after = rule(kind(X, Y), k), rule(kind(np.ldexp(X, shift), Y), k)
    np.testing.assert_array_equal(before.indices, after.indices)
    np.testing.assert_array_equal(np.ldexp(before.factor, shift), after.factor)


@each(REPEATABLE)
@SOME
@given(seed=seeds, k=st.integers(1, 6))
def test_permuting_the_features_permutes_the_choice(rule, kind, seed, k):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(20, 7)), rng.normal(size=(20, 2))
    order = rng.permutation(7)
    np.testing.assert_array_equal(order[rule(kind(X[:, order], Y), k).indices], rule(kind(X, Y), k).indices)


@each(RULES)
@SOME
@given(seed=seeds, k=st.integers(1, 6))
def test_tensors_give_what_arrays_give_and_stay_tensors(rule, kind, seed, k):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(20, 7)), rng.normal(size=(20, 2))
    arrays, tensors = rule(kind(X, Y), k), rule(kind(torch.tensor(X), torch.tensor(Y)), k)
    assert isinstance(tensors.factor, torch.Tensor)
    np.testing.assert_array_equal(tensors.indices, arrays.indices)
    np.testing.assert_allclose(tensors.factor.numpy(), arrays.factor, atol=1e-10)
    np.testing.assert_allclose(tensors.feature_errors, arrays.feature_errors, rtol=1e-9)


@each(RULES)
@SOME
@given(X=features(), repeats=st.integers(1, 2))
def test_tensors_with_redundant_columns(rule, kind, X, repeats):
    X = np.tile(X[:, :7], repeats)
    m = X.shape[1]
    selection = rule(kind(torch.tensor(X), torch.tensor(targets_for(X))), m)
    assert sorted(selection.indices.tolist()) == list(range(m))
    errors = selection.feature_errors
    for k in range(m + 1):
        expected = oracles.squared_error(X, X, selection.indices[:k], intercept=False)
        assert errors[k] == pytest.approx(expected, rel=1e-6, abs=1e-9 * errors[0] + 1e-300)


@each(RULES)
@pytest.mark.parametrize("retained", [0, 4, -1, 1.0, "1", None, True])
def test_a_bad_count_is_refused(rule, kind, retained):
    with pytest.raises((TypeError, ValueError), match="retained"):
        rule(kind(np.eye(3)), retained)


@each(RULES)
def test_first_refuses_more_than_was_chosen(rule, kind):
    selection = rule(kind(np.eye(3)), 2)
    assert selection.first(0).indices.size == 0
    for k in (3, -1, 1.0):
        with pytest.raises((TypeError, ValueError), match="k"):
            selection.first(k)


@each(RULES)
def test_inputs_are_left_as_they_were(rule, kind):
    columns = kind(np.random.default_rng(4).normal(size=(9, 4)))
    held = [value.copy() for value in vars(columns).values()]
    rule(columns, 3)
    for now, then in zip(vars(columns).values(), held, strict=True):
        np.testing.assert_array_equal(now, then)


@each(RULES)
def test_progress_goes_through_the_choices(rule, kind):
    seen = []

    def bar(steps):
        for step in steps:
            seen.append(step)
            yield step

    rule(kind(np.random.default_rng(4).normal(size=(9, 4))), 3, progress=bar)
    assert seen == [0, 1, 2]


@each({name: rule for name, rule in RULES.items() if "output" in name})
def test_without_targets_there_is_nothing_to_choose_by(rule, kind):
    X = np.eye(3)
    with pytest.raises(ValueError, match="no targets"):
        rule(kind(X, X[:, :0]), 2)


@each(NESTED)
@pytest.mark.parametrize("tensors", [False, True])
def test_blocks_change_nothing(rule, kind, tensors):
    # Directions fade, so that targets and residuals get stale within blocks too.
    rng = np.random.default_rng(5)
    X = rng.normal(size=(220, 200)) * np.geomspace(1, 1e-3, 200) @ rng.normal(size=(200, 200))
    Y = X @ rng.normal(size=(200, 3))
    selection = rule(kind(torch.tensor(X), torch.tensor(Y)) if tensors else kind(X, Y), 150)
    chosen = selection.indices
    R = np.linalg.qr(X[:, chosen], mode="r")
    np.testing.assert_allclose(
        np.asarray(selection.factor)[:, chosen], R * np.sign(np.diag(R))[:, None], atol=1e-7 * np.abs(R).max()
    )
    for k in (1, 63, 64, 65, 130, 150):
        expected = oracles.squared_error(X, X, chosen[:k], intercept=False)
        assert selection.feature_errors[k] == pytest.approx(expected, rel=1e-7)


# --- pivoted QR -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@SOME
@given(seed=seeds, n=st.integers(8, 30), m=st.integers(1, 8))
def test_pivots_are_those_of_lapack_on_generic_matrices(kind, seed, n, m):
    X = np.random.default_rng(seed).normal(size=(n, m)) * np.random.default_rng(seed + 1).lognormal(size=m)
    R, pivots = qr(X, mode="r", pivoting=True)
    selection = pivoted_qr(kind(X), m)
    np.testing.assert_array_equal(selection.indices, pivots)
    np.testing.assert_allclose(np.abs(selection.factor[:, pivots]), np.abs(R[:m]), atol=1e-8 * np.abs(R).max())
    left = [np.linalg.norm(R[k:m, k:]) for k in range(m + 1)]
    np.testing.assert_allclose(np.sqrt(selection.feature_errors), left, rtol=1e-6, atol=1e-7 * left[0])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_pivots_are_those_of_lapack_on_features_of_a_net(kind):
    rng = np.random.default_rng(0)
    X = np.tanh(rng.normal(size=(900, 12)) @ rng.normal(size=(12, 160)))
    R, pivots = qr(X, mode="r", pivoting=True)
    selection = pivoted_qr(kind(X), 100)
    np.testing.assert_array_equal(selection.indices, pivots[:100])
    left = [np.linalg.norm(R[k:160, k:]) for k in range(101)]
    np.testing.assert_allclose(np.sqrt(selection.feature_errors), left, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@SOME
@given(seed=seeds, k=st.integers(1, 8))
def test_scipy_decomposes_by_the_same_columns_with_the_same_error(kind, seed, k):
    X = np.random.default_rng(seed).normal(size=(20, 9)) * np.random.default_rng(seed + 1).lognormal(size=9)
    indices, projection = scipy_interpolative.interp_decomp(X, k, rand=False)
    selection = pivoted_qr(kind(X), k)
    assert set(selection.indices.tolist()) == set(indices[:k].tolist())
    theirs = X - scipy_interpolative.reconstruct_matrix_from_id(X[:, indices[:k]], indices, projection)
    assert np.sqrt(selection.feature_errors[k]) == pytest.approx(np.linalg.norm(theirs), rel=1e-6)


def graded(m, smallest, seed=0):
    """A matrix with singular values from 1 down to ``smallest``."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(m, m)))[0] for _ in range(2))
    return U * np.geomspace(1, smallest, m) @ V


def test_a_triangle_resolves_twice_the_digits_that_moments_do():
    X = graded(24, 1e-12)
    R, pivots = qr(X, mode="r", pivoting=True)
    selection = pivoted_qr(triangle(X), 24)
    assert selection.rank == 24
    np.testing.assert_array_equal(selection.indices, pivots)
    np.testing.assert_allclose(np.abs(np.diag(selection.factor[:, pivots])), np.abs(np.diag(R)), rtol=1e-3)
    np.testing.assert_allclose(selection.feature_errors[:24], [(R[k:, k:] ** 2).sum() for k in range(24)], rtol=1e-3)
    assert 8 < pivoted_qr(moments(X), 24).rank < 20


@pytest.mark.parametrize("size", [1e-140, 1e140])
def test_extreme_units_on_a_triangle(size):
    X = np.random.default_rng(2).normal(size=(9, 5))
    usual, extreme = pivoted_qr(Triangle(X), 5), pivoted_qr(Triangle(X * size), 5)
    np.testing.assert_array_equal(usual.indices, extreme.indices)
    np.testing.assert_allclose(usual.factor * size, extreme.factor, rtol=1e-12, atol=1e-15 * size)


# --- greedy rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@SOME
@given(seed=seeds, n=st.integers(8, 25), m=st.integers(1, 6), c=st.integers(1, 3))
def test_greedy_rules_are_forward_selection(kind, seed, n, m, c):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(n, m)) @ (np.eye(m) + rng.normal(size=(m, m))), rng.normal(size=(n, c))
    assume(np.linalg.cond(X) < 1e4)
    assert output_aware(kind(X, Y), m).indices.tolist() == oracles.greedy_columns(X, Y, m, intercept=False)
    # The last choice changes nothing: whichever is left.
    chosen = residual_trace(kind(X, Y), m).indices.tolist()
    assert chosen[:-1] == oracles.greedy_columns(X, X, m, intercept=False)[:-1]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_residual_trace_scores_by_the_schur_complement(kind):
    X = np.random.default_rng(7).normal(size=(40, 90)) @ np.random.default_rng(8).normal(size=(90, 90))
    chosen = residual_trace(kind(X), 30).indices
    S = X.T @ X
    for j in chosen:
        scores = (S**2).sum(axis=1) / np.maximum(np.diag(S), 1e-6 * np.diag(S).max())
        assert scores[j] == pytest.approx(scores.max(), rel=1e-9)
        S = S - np.outer(S[j], S[j]) / S[j, j]


def test_output_aware_takes_the_best_first_column_and_can_miss_the_best_pair():
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(30):
        X, Y = rng.normal(size=(20, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(20, 1))
        selection = output_aware(moments(X, Y), 5)
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
    columns = moments(X, X[:, [1]])
    assert output_aware(columns, 1).indices.tolist() == [1]
    assert pivoted_qr(columns, 1).indices.tolist() == [0]


def test_choice_can_be_kept_to_some_columns_until_they_explain_nothing_more():
    X = np.random.default_rng(1).normal(size=(30, 5)) * [1.0, 9.0, 2.0, 3.0, 3.0]
    X[:, 4] = X[:, 0] + X[:, 2]
    assert eliminate(moments(X), 3, among=np.array([0, 2, 4])).indices.tolist()[2] == 1


# --- sampling -------------------------------------------------------------------------------------------------------


def first_choices(rule, columns, k, draws=3000):
    return np.bincount([rule(columns, k, seed=s).indices[0] for s in range(draws)], minlength=columns.features) / draws


def test_random_columns_are_uniform():
    X = np.random.default_rng(1).normal(size=(30, 5)) * [1.0, 9.0, 2.0, 8.0, 3.0]
    shares = first_choices(random_columns, moments(X), 1)
    np.testing.assert_allclose(shares, 0.2, atol=5 * np.sqrt(0.16 / 3000))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_leverage_draws_by_the_scores_of_rank_k(kind):
    X = np.random.default_rng(1).normal(size=(30, 5)) * [1.0, 9.0, 2.0, 8.0, 3.0]
    for k in (1, 2):
        scores = (np.linalg.svd(X)[2][:k] ** 2).sum(axis=0) / k
        shares = first_choices(leverage, kind(X), k, draws=1500)
        np.testing.assert_allclose(shares, scores, atol=5 * np.sqrt(0.25 / 1500))


# --- swaps ----------------------------------------------------------------------------------------------------------


def kahan(m, c=0.285):
    """Pivoted QR chooses its columns in order, whatever is left."""
    s = np.sqrt(1 - c * c)
    ones = np.triu(np.ones((m, m)), 1)
    return (s ** np.arange(m))[:, None] * (np.eye(m) - c * ones) * (1 - 1e-10) ** np.arange(m)


def interpolation(selection):
    return np.linalg.solve(selection.factor[:, selection.indices[: selection.rank]], selection.factor)


def test_swaps_rescue_pivoted_qr_on_kahans_matrix():
    X = kahan(60)
    plain, strong = pivoted_qr(triangle(X), 59), strong_rrqr(triangle(X), 59, f=2.0)
    assert plain.indices.tolist() == list(range(59))
    assert np.abs(interpolation(plain)).max() > 1e4
    assert np.abs(interpolation(strong)).max() <= 2
    assert strong.feature_errors[-1] < 1e-6 * plain.feature_errors[-1]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@SOME
@given(seed=seeds, k=st.integers(1, 7), f=st.sampled_from([1.0001, 1.1, 2.0]))
def test_strong_rrqr_leaves_no_swap_that_multiplies_the_volume_by_more_than_f(kind, seed, k, f):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(12, 8)) @ (np.eye(8) + rng.normal(size=(8, 8)))
    assume(np.linalg.cond(X) < 1e4)
    selection = strong_rrqr(kind(X), k, f=f)
    S = selection.indices

    def volume(columns):
        return np.sqrt(np.linalg.det(X[:, columns].T @ X[:, columns]))

    for i, j in product(range(k), set(range(8)) - set(S.tolist())):
        assert volume([*np.delete(S, i), j]) <= f * (1 + 1e-6) * volume(S)
    assert np.abs(interpolation(selection)).max() <= f * (1 + 1e-6)
    values, kept = np.linalg.svd(X)[1], np.linalg.svd(X[:, S])[1]
    left = np.linalg.svd(X - X[:, S] @ np.linalg.lstsq(X[:, S], X, rcond=None)[0])[1]
    constant = np.sqrt(1 + f**2 * k * (8 - k))
    assert (kept * constant >= values[:k] * (1 - 1e-9)).all()
    assert (left[: 8 - k] <= constant * values[k:] * (1 + 1e-9) + 1e-12).all()


def test_strong_rrqr_swaps_more_for_a_smaller_f():
    # Else the test above could be passed by pivoted QR alone.
    rng = np.random.default_rng(3)
    swapped = 0
    for _ in range(40):
        X = rng.normal(size=(12, 10)) @ rng.normal(size=(10, 10))
        chosen = [set(strong_rrqr(moments(X), 5, f=f).indices.tolist()) for f in (1.0001, 1e9)]
        assert chosen[1] == set(pivoted_qr(moments(X), 5).indices.tolist())
        swapped += chosen[0] != chosen[1]
    assert swapped > 5


@pytest.mark.parametrize(("f", "problem"), [(1, "f=1"), (0.5, "f=0.5"), (float("nan"), "f is NaN"), ("2", "f must")])
def test_strong_rrqr_refuses_an_f_with_which_it_might_not_end(f, problem):
    with pytest.raises((TypeError, ValueError), match=problem):
        strong_rrqr(moments(np.eye(3)), 2, f=f)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("error", ["features", "outputs"])
@SOME
@given(seed=seeds, k=st.integers(1, 6))
def test_swap_refined_is_no_worse_than_its_start_and_than_any_swap(kind, error, seed, k):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(12, 7)) @ (np.eye(7) + rng.normal(size=(7, 7))), rng.normal(size=(12, 2))
    assume(np.linalg.cond(X) < 1e4)
    start = partial(random_columns, seed=seed)
    goal = X if error == "features" else Y

    def cost(columns):
        return oracles.squared_error(X, goal, list(columns), intercept=False)

    S = swap_refined(kind(X, Y), k, start=start, error=error).indices
    slack = 1e-7 * (goal**2).sum()
    assert cost(S) <= cost(start(kind(X, Y), k).indices) + slack
    for i, j in product(range(k), set(range(7)) - set(S.tolist())):
        assert cost(S) <= cost([*np.delete(S, i), j]) * (1 + 1e-6) + slack


def test_swaps_improve_a_random_start():
    X = np.random.default_rng(5).normal(size=(40, 30)) @ np.diag(np.geomspace(1, 1e-2, 30))
    start = partial(random_columns, seed=0)
    refined = swap_refined(moments(X), 10, start=start)
    assert refined.feature_errors[-1] < 0.9 * start(moments(X), 10).feature_errors[-1]


@pytest.mark.parametrize("rule", [exhaustive, swap_refined])
def test_unknown_errors_are_refused(rule):
    with pytest.raises(ValueError, match="error='output' is unknown"):
        rule(moments(np.eye(3)), 2, error="output")


# --- exhaustive -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("error", ["features", "outputs"])
@SOME
@given(X=features(samples=12), data=st.data())
def test_exhaustive_finds_the_least_error(kind, error, X, data):
    X = X[:, :6]
    k, Y = data.draw(st.integers(1, X.shape[1])), targets_for(X)
    goal = X if error == "features" else Y
    chosen = exhaustive(kind(X, Y), k, error=error).indices
    least = min(oracles.squared_error(X, goal, list(s), intercept=False) for s in combinations(range(X.shape[1]), k))
    slack = 1e-9 * (goal**2).sum()
    assert oracles.squared_error(X, goal, chosen, intercept=False) <= least * (1 + 1e-6) + slack


def test_exhaustive_refuses_what_takes_too_long():
    exhaustive(moments(np.eye(14)), 7)
    with pytest.raises(ValueError, match="swap_refined"):
        exhaustive(moments(np.eye(15)), 7)
