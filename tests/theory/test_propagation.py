import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mpmath import mp, mpf

import oracles
from ellq.theory import (
    chain_error,
    column_scale,
    stechkin_constant,
    unit_error_l1,
    unit_error_lq,
    unit_error_observed,
    unit_errors,
)
from strategies import MODERATE, features, quasi_orders, vectors

SOME = settings(max_examples=120, deadline=None)
sizes = st.floats(0, 1e100)
any_size = st.one_of(st.floats(0, 1e100), st.floats(0, 1e-300), st.just(0.0))


def exact_dot(a, b):
    return mp.fsum(mpf(abs(float(x))) * mpf(float(y)) for x, y in zip(a, b, strict=True))


# --- one unit -------------------------------------------------------------------------------------------------------


@SOME
@given(X=features(), seed=st.integers(0, 2**32 - 1))
def test_observed_error_is_the_root_mean_square(X, seed):
    v = np.random.default_rng(seed).normal(size=X.shape[1])
    assert unit_error_observed(v, X) == pytest.approx(float(np.sqrt(np.mean((X @ v) ** 2))), rel=1e-13, abs=0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_observed_error_neither_overflows_nor_underflows(scale):
    assert unit_error_observed([3.0, 4.0], [[scale, scale], [scale, scale]]) == pytest.approx(7 * scale, rel=1e-15)
    np.testing.assert_allclose(column_scale([[3 * scale], [4 * scale]]), [scale * 12.5**0.5], rtol=1e-14)


@SOME
@given(X=features())
def test_column_scale_covers_the_root_mean_square_of_each_column(X):
    scales = column_scale(X)
    for column, scale in zip(X.T, scales, strict=True):
        exact = oracles.quasinorm(column, 2.0) / mp.sqrt(len(column)) if column.any() else mpf(0)
        assert exact <= mpf(float(scale)) <= exact * (1 + mpf(10) ** -13)


@SOME
@given(w=vectors(), scale=any_size)
def test_l1_bound_is_the_product_rounded_up(w, scale):
    with mp.workdps(60):
        exact = mp.fsum(mpf(abs(float(x))) for x in w) * mpf(scale)
    assume(exact < 1e308)
    bound = mpf(unit_error_l1(w, scale))
    assert exact <= bound <= exact * (1 + mpf(10) ** -13) + (1 + mpf(scale)) * mpf(2) ** -1073


def test_l1_bound_is_met_by_equal_inputs_and_one_sign():
    v, x = np.array([1.0, 2.0, 3.0]), np.random.default_rng(0).normal(size=(50, 1))
    X = np.repeat(x, 3, axis=1)
    bound = unit_error_l1(v, float(column_scale(X).max()))
    assert 0.99 * bound < unit_error_observed(v, X) <= bound


def test_lq_bound_is_met_by_equal_weights_and_inputs():
    w, X, q = np.full(100, 2.0), np.ones((3, 100)), 0.5
    removed = w * (np.arange(100) >= 50)
    bound = unit_error_lq(w, 50, q=q, scale=1.0)
    assert 0.99 * bound < unit_error_observed(removed, X) <= bound


@SOME
@given(w=vectors(families=MODERATE), q=quasi_orders(), data=st.data())
def test_l1_bound_of_the_tail_is_within_the_lq_bound(w, q, data):
    k = data.draw(st.integers(1, w.size))
    tail = np.sort(np.abs(w))[: w.size - k]
    try:
        assert unit_error_l1(tail, 2.5) <= unit_error_lq(w, k, q=q, scale=2.5) * (1 + 1e-13)
    except OverflowError:
        assume(False)


def test_lq_constant_is_the_published_one():
    for q in (0.2, 0.5, 0.8):
        assert stechkin_constant(q, 1.0) == pytest.approx(q * (1 - q) ** (1 / q - 1))
        bound = unit_error_lq([1.0] + [0.0] * 9, 4, q=q, scale=3.0)
        assert bound == pytest.approx(3 * q * (1 - q) ** (1 / q - 1) * 4 ** (1 - 1 / q))


def test_nothing_removed_costs_exactly_nothing():
    assert unit_error_l1(np.zeros(3), 2.0) == 0
    assert unit_error_l1([1.0], 0.0) == 0
    assert unit_error_l1([], 1.0) == 0
    assert unit_error_lq(np.zeros(3), 1, q=0.5, scale=2.0) == 0
    assert column_scale(np.zeros((2, 3))).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: unit_error_observed([1.0], [[1.0, 2.0]]),
        lambda: unit_error_observed([1.0], np.zeros((0, 1))),
        lambda: unit_error_observed([np.nan], [[1.0]]),
        lambda: unit_error_observed([1.0], [1.0]),
        lambda: unit_error_l1([1.0], -1.0),
        lambda: unit_error_l1([1.0], np.inf),
        lambda: unit_error_l1([1.0], "1"),
        lambda: unit_error_lq([1.0], 1, q=1.0, scale=1.0),
        lambda: unit_error_lq([1.0], 0, q=0.5, scale=1.0),
        lambda: unit_error_lq([1.0], 1, q=0.5, scale=np.nan),
        lambda: column_scale(np.zeros((0, 2))),
        lambda: column_scale([1.0]),
        lambda: column_scale([[np.inf]]),
    ],
)
def test_unit_bounds_refuse_bad_input(call):
    with pytest.raises((TypeError, ValueError)):
        call()


# --- chains ---------------------------------------------------------------------------------------------------------


@SOME
@given(layers=st.lists(st.tuples(any_size, any_size, st.sampled_from([0.0, 0.25, 1.0, 3.0])), max_size=4))
def test_chain_error_is_the_recursion_rounded_up(layers):
    bounds = chain_error(*(list(column) for column in zip(*layers, strict=True))) if layers else chain_error([], [], [])
    assert len(bounds) == len(layers)
    exact = mpf(0)
    for (delta, gain, rho), bound in zip(layers, bounds, strict=True):
        with mp.workdps(60):
            exact = mpf(rho) * (mpf(gain) * exact + mpf(delta))
        assert exact <= mpf(bound)
        assert (bound == 0) == (exact == 0)
        if exact > 1e-250:
            assert bound == pytest.approx(float(exact), rel=1e-12) or exact > 1e307


def test_chain_error_equals_its_sum_form():
    delta, gain, rho = [0.3, 0.2, 0.7], [9.0, 1.5, 2.5], 0.5
    total = sum(d * rho ** (3 - l) * np.prod(gain[l + 1 :]) for l, d in enumerate(delta))  # noqa: E741
    assert chain_error(delta, gain, [rho] * 3)[-1] == pytest.approx(total, rel=1e-13)


def test_chain_error_ignores_the_first_gain():
    assert chain_error([1.0], [5.0], [1.0]) == chain_error([1.0], [0.0], [1.0])


@pytest.mark.parametrize(
    "arguments",
    [([1.0], [1.0, 2.0], [1.0]), ([-1.0], [1.0], [1.0]), ([1.0], [np.inf], [1.0]), ([1.0], [1.0], [np.nan])],
)
def test_chain_error_refuses_bad_input(arguments):
    with pytest.raises(ValueError, match=r"lengths|negative|NaN"):
        chain_error(*arguments)


@SOME
@given(
    W=hnp.arrays(np.float64, (3, 4), elements=st.one_of(st.floats(-1e100, 1e100), st.just(0.0))),
    errors=hnp.arrays(np.float64, 4, elements=any_size),
    delta=hnp.arrays(np.float64, 3, elements=any_size),
    rho=st.sampled_from([0.0, 0.25, 1.0, 1e10]),
)
def test_unit_errors_are_the_sums_rounded_up(W, errors, delta, rho):
    bounds = unit_errors(delta, W, errors, rho)
    for d, row, bound in zip(delta, W, bounds, strict=True):
        with mp.workdps(60):
            exact = mpf(rho) * (mpf(float(d)) + exact_dot(row, errors))
        assert exact <= mpf(float(bound))
        assert (bound == 0) == (exact == 0)
        if exact > 1e-250:
            assert bound == pytest.approx(float(exact), rel=1e-12)


def test_unit_errors_cover_products_that_all_underflow():
    # Twenty products of 0.499·2⁻¹⁰⁷⁴ round to 0; their sum is ten times the least float.
    bound = unit_errors([0.0], np.full((1, 20), 0.499 * 2.0**-500), np.full(20, 2.0**-574), 2.0)
    assert mpf(float(bound[0])) >= 2 * 20 * mpf(0.499) * mpf(2) ** -1074


@SOME
@given(
    W=hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e3, 1e3)),
    errors=hnp.arrays(np.float64, 4, elements=st.floats(0, 1e3)),
    delta=hnp.arrays(np.float64, 3, elements=st.floats(0, 1e3)),
)
def test_unit_errors_are_within_the_chain_bound(W, errors, delta):
    gain = float(np.abs(W).sum(axis=1).max())
    # The chain's second layer, given a first whose error is the largest of ``errors``.
    bound = chain_error([float(errors.max()), float(delta.max())], [0.0, gain], [1.0, 1.0])[-1]
    assert unit_errors(delta, W, errors, 1.0).max() <= bound * (1 + 1e-13) + 1e-300


@pytest.mark.parametrize(
    "arguments",
    [
        ([1.0], [[1.0, 2.0]], [1.0], 1.0),
        ([-1.0], [[1.0]], [1.0], 1.0),
        ([1.0], [[1.0]], [-1.0], 1.0),
        ([1.0], [[np.nan]], [1.0], 1.0),
        ([1.0], [[1.0]], [1.0], -1.0),
    ],
)
def test_unit_errors_refuse_bad_input(arguments):
    with pytest.raises(ValueError, match=r"shape|negative|nan"):
        unit_errors(*arguments)


def test_errors_beyond_float64_are_infinite_without_a_warning():
    assert unit_error_observed([1e200, 1.0], [[1e200, 0.0]]) == np.inf
    assert unit_error_observed([1e200, 1.0], [[1e-200, 0.0]]) == pytest.approx(1.0)
    assert unit_error_l1([1e308] * 10, 1.0) == np.inf
    assert unit_errors([1e308], [[1e308, 1.0]], [1e308, 0.0], 1.0)[0] == np.inf
    assert chain_error([1e308, 1e308], [1e308, 1e308], [1.0, 1.0])[-1] == np.inf
