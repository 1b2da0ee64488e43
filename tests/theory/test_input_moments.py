import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

import oracles
from ellq.theory import Gram, column_scale, unit_error_l1, unit_error_observed, unit_errors
from ellq.theory.input_moments import (
    gram_scale,
    layer_errors,
    layer_errors_observed,
    moment_error,
    second_moments,
    unit_error_gram,
    unit_error_uncorrelated,
)
from strategies import MODERATE, features, random_chain, random_features, random_vector, vectors

SOME = settings(max_examples=120, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@oracles.precise
def root_of_form(v, G):
    """(vᵀGv)^½ in 60 digits; 0 where the matrix's own rounding makes it negative."""
    form = mp.fsum(
        mpf(float(a)) * mpf(float(G[i, j])) * mpf(float(b)) for i, a in enumerate(v) for j, b in enumerate(v)
    )
    return mp.sqrt(max(form, 0))


@oracles.precise
def root_mean_square(v, X):
    squares = [mp.fsum(mpf(float(a)) * mpf(float(b)) for a, b in zip(v, x, strict=True)) ** 2 for x in X]
    return mp.sqrt(mp.fsum(squares) / len(squares))


# --- the second moments ---------------------------------------------------------------------------------------------


@SOME
@given(X=features())
def test_moments_are_within_their_stated_error(X):
    moments, error = second_moments(X), moment_error(len(X))
    with mp.workdps(60):
        exact = [
            [mp.fsum(mpf(float(x[i])) * mpf(float(x[j])) for x in X) / len(X) for j in range(X.shape[1])]
            for i in range(X.shape[1])
        ]
        for i, row in enumerate(exact):
            for j, entry in enumerate(row):
                assert abs(mpf(float(moments[i, j])) - entry) <= mpf(error) * mp.sqrt(exact[i][i] * exact[j][j])


def test_moments_beyond_float64_are_refused():
    with pytest.raises(OverflowError, match=r"exceeds float64.*Scale the inputs"):
        second_moments([[1e200, 1.0]])


# --- one unit -------------------------------------------------------------------------------------------------------


@SOME
@given(v=vectors(max_size=6), seed=seeds, scale=st.sampled_from([1e-300, 1e-20, 1.0, 1e20]))
def test_gram_bound_is_the_root_of_the_form_rounded_up(v, seed, scale):
    X = random_features(np.random.default_rng(seed), columns=v.size)
    gram = second_moments(X) * scale
    exact = root_of_form(v, gram)
    with mp.workdps(60):
        size = mp.fsum(abs(mpf(float(a))) * mp.sqrt(mpf(float(g))) for a, g in zip(v, np.diag(gram), strict=True))
        assume(size < 1e307)
        with np.errstate(over="raise", invalid="raise"):
            bound = mpf(unit_error_gram(v, gram))
        assert exact <= bound
        # Cancelling terms leave the root of their rounding; entries of very different size the root of an underflow.
        least = mpf(float(np.abs(v).max())) * mp.sqrt(mpf(float(gram.max()))) * mpf(10) ** -150 + mpf(2) ** -1073
        assert bound <= exact * (1 + mpf(10) ** -14) + size * mpf(10) ** -6.5 + least
        if exact > size * mpf("0.1") and exact > least * 1e10:
            assert bound <= exact * (1 + mpf(10) ** -12) + mpf(2) ** -1072


@SOME
@given(X=features(), seed=seeds)
def test_gram_bound_covers_the_exact_error_on_the_samples(X, seed):
    v = random_vector(np.random.default_rng(seed), X.shape[1], MODERATE)
    bound = unit_error_gram(v, second_moments(X), entry_error=moment_error(len(X)))
    assert root_mean_square(v, X) <= mpf(bound)


@SOME
@given(X=features(), seed=seeds)
def test_gram_bound_is_within_the_l1_bound(X, seed):
    v = random_vector(np.random.default_rng(seed), X.shape[1], MODERATE)
    bound = unit_error_gram(v, second_moments(X), entry_error=moment_error(len(X)))
    assert bound <= unit_error_l1(v, float(column_scale(X).max())) * (1 + 1e-12)


def test_gram_bound_equals_the_observed_error():
    rng = np.random.default_rng(0)
    X, v = rng.normal(size=(500, 20)) + 3.0, rng.normal(size=20)
    assert unit_error_gram(v, second_moments(X)) == pytest.approx(unit_error_observed(v, X), rel=1e-12)


def test_gram_bound_takes_the_matrix_of_an_accumulator():
    rng = np.random.default_rng(1)
    X, v = rng.normal(size=(300, 5)) + 10.0, rng.normal(size=5)
    gram = Gram(5, 0)
    for batch in np.split(X, 6):
        gram.update(batch, np.zeros((len(batch), 0)))
    matrix = gram.moments(centred=False)[0] / gram.samples
    assert unit_error_gram(v, matrix) == pytest.approx(unit_error_observed(v, X), rel=1e-12)


def test_cancelling_terms_are_bounded_by_their_rounding():
    # Equal inputs and weights that sum to 0: the form is exactly 0 in floating point too, or slightly off 0.
    gram = second_moments(np.full((7, 3), 0.1))
    bound = unit_error_gram([0.1, 0.2, -0.1 - 0.2], gram)
    assert 0 < bound < 1e-7


def test_known_error_of_the_entries_is_covered():
    exact, off = np.array([[1.0, 0.5], [0.5, 1.0]]), np.array([[1.0, 0.499], [0.499, 1.0]])
    assert unit_error_gram([1.0, 1.0], off) < float(root_of_form([1.0, 1.0], exact))
    assert unit_error_gram([1.0, 1.0], off, entry_error=0.001) >= float(root_of_form([1.0, 1.0], exact))


def test_nothing_changed_costs_exactly_nothing():
    gram = np.diag([1.0, 0.0])
    assert unit_error_gram([0.0, 0.0], gram) == 0
    assert unit_error_gram([0.0, 1e300], gram) == 0  # an input that is always 0
    assert unit_error_gram([1.0], [[0.0]]) == 0
    assert unit_error_gram([5e-324, 1e300], gram) < 1e-320
    assert layer_errors(np.zeros((0, 2)), gram).shape == (0,)


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_gram_bound_neither_overflows_nor_underflows(size):
    assert unit_error_gram([3 * size, 4 * size], np.eye(2)) == pytest.approx(5 * size, rel=1e-14)
    assert unit_error_gram([3e-200, 4e-200], size * np.eye(2)) == pytest.approx(5e-200 * size**0.5, rel=1e-14)


def test_gram_bound_beyond_float64_is_infinite():
    assert unit_error_gram([1e300, 1e300], 1e300 * np.eye(2)) == np.inf


# --- layers ---------------------------------------------------------------------------------------------------------


@SOME
@given(X=features(), seed=seeds)
def test_layer_errors_are_those_of_its_units(X, seed):
    rng = np.random.default_rng(seed)
    changes = np.stack([random_vector(rng, X.shape[1], MODERATE) for _ in range(4)])
    gram = second_moments(X)
    bounds, values = layer_errors(changes, gram), layer_errors_observed(changes, gram)
    for v, bound, value in zip(changes, bounds, values, strict=True):
        cancelled = 2e-7 * float(np.abs(v) @ np.sqrt(np.diag(gram)))
        assert bound == pytest.approx(unit_error_gram(v, gram), rel=1e-12, abs=cancelled)
        assert value <= bound
        assert value == pytest.approx(bound, rel=1e-12, abs=cancelled)


@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_local_errors_from_moments_carried_through_a_chain_cover_the_change(seed):
    rng = np.random.default_rng(seed)
    case = random_chain(rng)
    dense = pruned = case["inputs"]
    errors = np.zeros(dense.shape[1])
    for W, b in case["layers"]:
        kept = W * (rng.random(W.shape) < 0.7)
        local = layer_errors(W - kept, second_moments(dense), entry_error=moment_error(len(dense)))
        errors = unit_errors(local, kept, errors, 1.0)
        dense, pruned = np.maximum(dense @ W.T + b, 0.0), np.maximum(pruned @ kept.T + b, 0.0)
        observed = np.sqrt(np.mean((dense - pruned) ** 2, axis=0))
        assert (observed <= errors + 1e-12 * np.abs(dense).max()).all()


# --- uncorrelated inputs --------------------------------------------------------------------------------------------


@SOME
@given(X=features())
def test_gram_scale_covers_the_largest_eigenvalue(X):
    gram = second_moments(X)
    bound = gram_scale(gram)
    with mp.workdps(60):
        exact = mp.sqrt(max(mp.eigsy(mp.matrix(gram.tolist()), eigvals_only=True)))
    assert exact <= mpf(bound) <= exact * (1 + mpf(10) ** -11)


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_gram_scale_of_known_matrices(size):
    assert gram_scale(size * np.eye(4)) == pytest.approx(size**0.5, rel=1e-12)
    assert gram_scale(np.full((3, 3), size)) == pytest.approx((3 * size) ** 0.5, rel=1e-12)
    assert gram_scale(np.diag([0.0, size])) == pytest.approx(size**0.5, rel=1e-12)
    assert gram_scale(np.zeros((2, 2))) == 0


def test_gram_scale_is_at_least_every_column_scale():
    X = random_features(np.random.default_rng(3), samples=30, columns=6)
    assert gram_scale(second_moments(X)) >= column_scale(X).max() * (1 - 1e-12)


def test_gram_scale_covers_the_known_error_of_the_entries():
    assert gram_scale(np.eye(2), entry_error=0.01) ** 2 >= 1.02


def test_uncorrelated_bound_is_met_by_equal_weights():
    w, X = np.ones(100), 10.0 * np.eye(100)
    bound = unit_error_uncorrelated(w, 75, q=0.5, scale=gram_scale(second_moments(X)))
    assert 0.99 * bound < unit_error_observed(w * (np.arange(100) >= 75), X) <= bound


@pytest.mark.parametrize("q", [0.3, 1.0, 1.7])
def test_uncorrelated_bound_falls_as_stated(q):
    w = np.random.default_rng(4).normal(size=50)
    at = [unit_error_uncorrelated(w, k, q=q, scale=3.0) for k in (4, 16)]
    assert at[1] / at[0] == pytest.approx(4 ** (0.5 - 1 / q))
    assert unit_error_uncorrelated(2 * w, 4, q=q, scale=1.5) == pytest.approx(at[0])


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones((2, 3)), "square"),
        (np.zeros((0, 0)), "square"),
        (np.ones(2), "dimensions"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "nan"),
        (np.diag([1.0, -1e-3]), "diagonal"),
        (-np.eye(2), "diagonal"),
        (np.array([[0.0, 1.0], [1.0, 0.0]]), "diagonal"),
        (np.array([[1.0, 0.5], [0.4, 1.0]]), "not symmetric"),
        (np.array([[1.0, 1.1], [1.1, 1.0]]), "negative eigenvalue"),
        (np.array([[1.0, 1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]]), "negative eigenvalue"),
    ],
)
def test_what_is_no_second_moment_matrix_is_refused(gram, message):
    for call in (lambda: unit_error_gram(np.ones(len(gram)), gram), lambda: gram_scale(gram)):
        with pytest.raises(ValueError, match=message):
            call()


def test_rounding_of_a_moment_matrix_is_not_refused():
    X = np.random.default_rng(5).normal(size=(200_000, 1)) @ np.ones((1, 4))
    assert unit_error_gram(np.ones(4), second_moments(X)) == pytest.approx(unit_error_observed(np.ones(4), X))
    gram = second_moments(X) + np.array([[0, 1e-15, 0, 0]] + [[0.0] * 4] * 3)
    assert gram_scale(gram) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    "call",
    [
        lambda: second_moments([1.0]),
        lambda: second_moments(np.zeros((0, 2))),
        lambda: second_moments([[np.nan]]),
        lambda: unit_error_gram([1.0], np.eye(2)),
        lambda: unit_error_gram([np.nan], np.eye(1)),
        lambda: unit_error_gram([[1.0]], np.eye(1)),
        lambda: unit_error_gram(["a"], np.eye(1)),
        lambda: unit_error_gram([1.0], np.eye(1), entry_error=-1.0),
        lambda: layer_errors([1.0], np.eye(1)),
        lambda: gram_scale(np.eye(1), entry_error=np.inf),
        lambda: unit_error_uncorrelated([1.0], 1, q=2.0, scale=1.0),
        lambda: unit_error_uncorrelated([1.0], 0, q=1.0, scale=1.0),
        lambda: unit_error_uncorrelated([1.0], 1, q=1.0, scale=-1.0),
        lambda: unit_error_uncorrelated([np.inf], 1, q=1.0, scale=1.0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises((TypeError, ValueError)):
        call()
