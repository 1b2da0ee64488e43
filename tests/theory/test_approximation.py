import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpmath import mpf

import oracles
from ellq.theory import (
    best_term_error,
    best_term_errors,
    lq_quasinorm,
    retained_exact,
    retained_necessary,
    retained_sufficient,
    stechkin_bound,
    stechkin_constant,
)
from ellq.theory.approximation import (
    extremal_vector,
    extremal_vector_weak,
    stechkin_bound_finite,
    stechkin_bound_weak,
    stechkin_bound_weak_finite,
    stechkin_constant_finite,
    tightest_bounds,
    tightest_bounds_from_norms,
    tightest_order,
)
from ellq.theory.histogram import MagnitudeHistogram
from ellq.theory.rounding import norm_error, tail_error
from strategies import MODERATE, quasi_orders, rising_orders, vectors

SOME = settings(max_examples=120, deadline=None)
error_orders = st.one_of(st.floats(0.1, 8), st.sampled_from([0.5, 1.0, 2.0, 100.0]))


def representable(w, q):
    return oracles.quasinorm(w, q) < 1e307


# --- best k-term errors ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(w=vectors(max_size=8, nonzero=True), p=error_orders)
def test_best_term_errors_are_the_least_over_all_subsets(w, p):
    assume(representable(w, p))
    errors = best_term_errors(w, p)
    assert errors.shape == (w.size + 1,)
    for k in range(w.size + 1):
        expected = oracles.best_error_over_subsets(w, k, p)
        assert errors[k] == pytest.approx(expected, rel=tail_error(w.size, p), abs=5e-324), k


@SOME
@given(w=vectors(nonzero=True), p=error_orders)
def test_each_tail_is_accurate_to_its_own_size(w, p):
    assume(representable(w, p))
    for k, error in enumerate(best_term_errors(w, p)):
        exact = oracles.best_term_error(w, k, p)
        assert abs(mpf(float(error)) - exact) <= exact * tail_error(w.size, p) + mpf(2) ** -1074


@pytest.mark.parametrize("p", [0.01, 0.02, 100.0])
def test_small_entries_add_up_across_six_hundred_decades(p):
    w = np.array([1e300, 1e-10, 2e-10, 1e-300, 2e-300, 5e-324])
    for k, error in enumerate(best_term_errors(w, p)):
        assert error == pytest.approx(float(oracles.best_term_error(w, k, p)), rel=tail_error(w.size, p), abs=5e-324), k


@SOME
@given(w=vectors(), p=error_orders)
def test_best_term_errors_fall_from_the_norm_to_zero(w, p):
    assume(representable(w, p))
    errors = best_term_errors(w, p)
    assert errors[0] == pytest.approx(float(lq_quasinorm(w, p)), rel=2 * tail_error(w.size, p), abs=5e-324)
    assert errors[-1] == 0
    assert (np.diff(errors) <= errors[:-1] * tail_error(w.size, p)).all()


@SOME
@given(w=vectors(families=MODERATE), p=error_orders, shift=st.integers(-300, 300), seed=st.integers(0, 2**32 - 1))
def test_best_term_errors_scale_and_ignore_order_and_signs(w, p, shift, seed):
    rng = np.random.default_rng(seed)
    changed = np.ldexp(rng.permutation(w) * rng.choice([-1, 1], w.size), shift)
    np.testing.assert_array_equal(best_term_errors(changed, p), np.ldexp(best_term_errors(w, p), shift))


def test_best_term_error_is_one_entry_of_the_curve():
    w = np.random.default_rng(0).normal(size=9)
    assert [best_term_error(w, k, p=1.5) for k in range(10)] == best_term_errors(w, 1.5).tolist()


def test_best_term_errors_edges():
    assert best_term_errors([]).tolist() == [0.0]
    assert best_term_errors(np.zeros(3)).tolist() == [0.0] * 4
    assert best_term_errors([3.0, -4.0, 12.0]).tolist() == [13.0, 5.0, 3.0, 0.0]
    assert best_term_errors([5e-324, 1e-200, 1e300])[1:].tolist() == [1e-200, 5e-324, 0.0]
    assert best_term_errors([1e-170] * 4)[0] == pytest.approx(2e-170, rel=1e-15, abs=0)
    assert best_term_errors(np.full(1000, 1e-300), 0.005)[0] == pytest.approx(1e300, rel=1e-10)
    with pytest.raises(OverflowError, match="exceeds float64"):
        best_term_errors([1e308, 1e308], 0.5)


@pytest.mark.parametrize("retained", [-1, 4, 1.5, "1", True, None])
def test_best_term_error_refuses_a_bad_count(retained):
    with pytest.raises((TypeError, ValueError), match="retained"):
        best_term_error([1.0, 2.0, 3.0], retained)


@pytest.mark.parametrize(("w", "p"), [([[1.0]], 2.0), ([np.nan], 2.0), ([1.0], 0.0), ([1.0], "2"), (["a"], 2.0)])
def test_best_term_errors_refuse_bad_input(w, p):
    with pytest.raises((TypeError, ValueError)):
        best_term_errors(w, p)


# --- the Stechkin bound ---------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(w=vectors(), orders=rising_orders(), k=st.integers(1, 30))
def test_stechkin_bound_is_never_below_the_error(w, orders, k):
    q, p = orders
    k = min(k, w.size)
    try:
        bound = stechkin_bound(w, k, q=q, p=p)
    except OverflowError:
        assert oracles.stechkin_bound(w, k, q, p) > 1e307
        return
    assert oracles.best_term_error(w, k, p) <= mpf(bound)


@settings(max_examples=200, deadline=None)
@given(w=vectors(nonzero=True), orders=rising_orders(low=1e-4), k=st.integers(1, 30))
def test_stechkin_bound_is_the_exact_one_rounded_up(w, orders, k):
    q, p = orders
    k = min(k, w.size)
    exact = oracles.stechkin_bound(w, k, q, p)
    assume(exact < 1e307)
    bound = mpf(stechkin_bound(w, k, q=q, p=p))
    assert exact <= bound <= exact * (1 + 1e-10 + 100 * norm_error(w.size, q)) + mpf(2) ** -1070


@pytest.mark.parametrize(("q", "p", "d", "k"), [(0.5, 1.0, 100, 50), (0.5, 2.0, 100, 75), (1.0, 2.0, 64, 32)])
def test_no_smaller_constant_serves_flat_vectors(q, p, d, k):
    w = np.full(d, -7.0)
    bound = stechkin_bound(w, k, q=q, p=p)
    assert best_term_error(w, k, p=p) == pytest.approx(bound, rel=1e-11)
    assert best_term_error(w, k, p=p) > 0.99 * bound


def test_stechkin_constants_derived_by_hand():
    assert stechkin_constant(1.0, 2.0) == pytest.approx(0.5)
    assert stechkin_constant(0.5, 1.0) == pytest.approx(0.25)
    for q in (0.1, 0.3, 0.9):
        assert stechkin_constant(q, 1.0) == pytest.approx(q * (1 - q) ** (1 / q - 1))


@SOME
@given(orders=rising_orders())
def test_stechkin_constant_is_below_one(orders):
    assert 0 < stechkin_constant(*orders) < 1


def test_stechkin_bound_edges():
    assert stechkin_bound(np.zeros(3), 1, q=0.5) == 0
    assert stechkin_bound([5e-324], 1, q=0.5) > 0
    # ‖w‖_q alone exceeds float64, the bound does not.
    assert stechkin_bound(np.ones(2000), 1500, q=0.005) >= best_term_error(np.ones(2000), 1500)
    with pytest.raises(OverflowError, match="bound exceeds float64"):
        stechkin_bound(np.ones(2000), 1, q=0.005)


@pytest.mark.parametrize(
    ("w", "k", "q", "p"),
    [
        ([1.0], 0, 0.5, 2.0),
        ([1.0], 2, 0.5, 2.0),
        ([1.0], 1.0, 0.5, 2.0),
        ([1.0], 1, 2.0, 2.0),
        ([1.0], 1, 0.0, 2.0),
        ([1.0], 1, None, 2.0),
        ([np.inf], 1, 0.5, 2.0),
        ([[1.0]], 1, 0.5, 2.0),
        ([], 1, 0.5, 2.0),
    ],
)
def test_stechkin_bound_refuses_bad_input(w, k, q, p):
    with pytest.raises((TypeError, ValueError)):
        stechkin_bound(w, k, q=q, p=p)


# --- the least constant for each k and d ----------------------------------------------------------------------------


@oracles.precise
def finite_constant(q, p, k, d):
    """The maximum over every m, by trying all."""
    return max((mpf(m - k) ** (1 / mpf(p)) * mpf(m) ** (-1 / mpf(q)) for m in range(k + 1, d + 1)), default=mpf(0))


@settings(max_examples=300, deadline=None)
@given(orders=rising_orders(), d=st.integers(1, 60), data=st.data())
def test_finite_constant_is_the_maximum_over_every_count(orders, d, data):
    k = data.draw(st.integers(0, d))
    exact = finite_constant(*orders, k, d)
    assert stechkin_constant_finite(*orders, k, d) == pytest.approx(float(exact), rel=1e-11, abs=1e-300)


@SOME
@given(orders=rising_orders(low=0.1), d=st.integers(1, 10**6), data=st.data())
def test_finite_constant_is_below_the_one_for_every_size_and_rises_to_it(orders, d, data):
    k = data.draw(st.integers(0, d))
    q, p = orders
    constant = stechkin_constant_finite(q, p, k, d)
    assert 0 <= constant <= 1
    assert constant <= stechkin_constant_finite(q, p, k, d + 1) * (1 + 1e-12)
    assert stechkin_constant_finite(q, p, min(k + 1, d), d) <= constant * (1 + 1e-12)
    if k:
        assert constant <= stechkin_constant(q, p) * k ** (1 / p - 1 / q) * (1 + 1e-10)


def test_finite_constants_derived_by_hand():
    assert stechkin_constant_finite(1.0, 2.0, 0, 9) == 1
    assert stechkin_constant_finite(1.0, 2.0, 9, 9) == 0
    assert stechkin_constant_finite(1.0, 2.0, 8, 9) == pytest.approx(1 / 9)  # only m = 9 is left
    assert stechkin_constant_finite(1.0, 2.0, 4, 9) == pytest.approx(0.5 / 4**0.5)  # the turn m = 8 is whole
    assert stechkin_constant_finite(1.0, 1.0 + 1e-15, 5, 9) == pytest.approx(4 / 9)  # the turn is far beyond d
    assert stechkin_constant_finite(1e-6, 2.0, 1, 9) == 0  # below float64


@settings(max_examples=300, deadline=None)
@given(w=vectors(), orders=rising_orders(), data=st.data())
def test_finite_bound_is_the_exact_one_rounded_up_and_never_below_the_error(w, orders, data):
    (q, p), k = orders, data.draw(st.integers(0, w.size))
    exact = finite_constant(q, p, k, np.count_nonzero(w)) * oracles.quasinorm(w, q) if w.any() else mpf(0)
    assume(exact < 1e307)
    bound = mpf(stechkin_bound_finite(w, k, q=q, p=p))
    assert oracles.best_term_error(w, k, p) <= bound
    assert exact <= bound <= exact * (1 + 1e-10 + 100 * norm_error(w.size, q)) + mpf(2) ** -1070


@settings(max_examples=300, deadline=None)
@given(orders=rising_orders(low=0.2), d=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_no_vector_beats_the_extremal_one(orders, d, seed, data):
    q, p = orders
    k = data.draw(st.integers(0, d - 1))
    best = extremal_vector(k, d, q=q, p=p)
    constant = finite_constant(q, p, k, d)
    attained = oracles.best_term_error(best, k, p) / oracles.quasinorm(best, q)
    assert attained == pytest.approx(constant, rel=1e-12)
    assert stechkin_bound_finite(best, k, q=q, p=p) == pytest.approx(best_term_error(best, k, p=p), rel=1e-9)
    # Neighbours of the extreme point, and vectors far from it.
    rng = np.random.default_rng(seed)
    for other in (best * np.exp(1e-2 * rng.normal(size=d)), best + 1e-3 * rng.random(d), rng.exponential(size=d) ** 3):
        assert oracles.best_term_error(other, k, p) <= constant * oracles.quasinorm(other, q) * (1 + 1e-12)


@SOME
@given(w=vectors(families=MODERATE, nonzero=True), orders=rising_orders(low=0.2), seed=st.integers(0, 2**32 - 1))
def test_finite_bound_scales_and_ignores_order_signs_and_appended_zeros(w, orders, seed):
    q, p = orders
    rng = np.random.default_rng(seed)
    k = int(rng.integers(0, w.size + 1))
    changed = np.ldexp(rng.permutation(np.append(w, np.zeros(5))) * rng.choice([-1, 1], w.size + 5), 40)
    bound = stechkin_bound_finite(w, k, q=q, p=p)
    assert stechkin_bound_finite(changed, k, q=q, p=p) == pytest.approx(np.ldexp(bound, 40), rel=1e-9)
    if k:
        assert bound <= stechkin_bound(w, k, q=q, p=p) * (1 + 1e-9)


def test_finite_bound_edges():
    assert stechkin_bound_finite(np.zeros(3), 0, q=0.5) == 0
    assert stechkin_bound_finite([3.0, 0.0, 0.0], 1, q=0.5) == 0
    assert stechkin_bound_finite([5e-324], 0, q=0.5) >= 5e-324
    assert 1e300 <= stechkin_bound_finite([1e300], 0, q=0.5) < 1e300 * (1 + 1e-9)
    assert stechkin_bound_finite(np.ones(2000), 1999, q=0.005) >= 1
    with pytest.raises(OverflowError, match="bound exceeds float64"):
        stechkin_bound_finite(np.ones(2000), 1, q=0.005)


# --- the best of several orders -------------------------------------------------------------------------------------

ORDERS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.3, 1.6, 1.9)


@SOME
@given(w=vectors(), data=st.data())
def test_tightest_bounds_are_the_least_of_the_bounds_of_each_order(w, data):
    orders = data.draw(st.lists(st.sampled_from(ORDERS), min_size=1, max_size=5))
    counts = np.arange(w.size + 1)
    best, bounds = tightest_bounds(w, counts, orders)
    assert best.shape == bounds.shape == counts.shape
    for k in counts.tolist():
        each = {q: tightest_bounds(w, [k], [q])[1][0] for q in orders}
        assert bounds[k] == min(each.values()) == each[best[k]]
        assert oracles.best_term_error(w, k, 2.0) <= mpf(float(bounds[k]))
        if np.isfinite(bounds[k]):
            assert tightest_order(w, k, orders) == (best[k], bounds[k])
            assert stechkin_bound_finite(w, k, q=best[k]) == bounds[k]


@SOME
@given(w=vectors(), p=st.floats(1.95, 6))
def test_norms_alone_give_the_same_bounds_within_their_rounding(w, p):
    histogram = MagnitudeHistogram.of(w)
    logs = [histogram.log_quasinorm(q).high for q in ORDERS]
    size = max(histogram.nonzeros, 1)
    _, bounds = tightest_bounds_from_norms(logs, size, range(size + 1), ORDERS, p)
    for k in range(size + 1):
        assert oracles.best_term_error(w, k, p) <= mpf(float(bounds[k]))
    direct = tightest_bounds(w, range(size + 1), ORDERS, p)[1]
    if np.abs(w).max() < 1e-300 or np.isinf(direct).any():
        return  # a histogram tells such apart only coarsely
    np.testing.assert_array_less(bounds, direct * 1.05 + 1e-300)


def test_best_order_of_gaussian_entries_is_above_one_when_few_are_kept():
    w = np.random.default_rng(0).normal(size=1000)
    orders = np.arange(0.1, 2.0, 0.1).tolist()
    best, bounds = tightest_bounds(w, [50, 200, 800], orders)
    assert best[0] > 1
    assert best[1] > 1
    assert best[2] < 1
    assert (bounds[:2] < 1.5 * best_term_errors(w)[[50, 200]]).all()


def test_tightest_bounds_edges():
    best, bounds = tightest_bounds(np.zeros(3), [0, 1, 3], [0.5, 1.0])
    assert bounds.tolist() == [0, 0, 0]
    assert best.tolist() == [0.5] * 3
    assert tightest_bounds([1.0], [], [0.5])[1].shape == (0,)
    assert np.isposinf(tightest_bounds(np.ones(2000), [1], [0.005])[1]).all()
    assert tightest_order(np.ones(2000), 1, [0.005, 1.0])[0] == 1.0
    with pytest.raises(OverflowError, match="bound exceeds float64"):
        tightest_order(np.ones(2000), 1, [0.005])
    assert tightest_bounds_from_norms([-np.inf], 1, [0, 1], [0.5])[1].tolist() == [0, 0]
    huge = tightest_bounds_from_norms([2 * math.log(1e15), math.log(1e15)], 10**15, [10**9], [0.5, 1.0])
    assert huge[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("counts", "orders", "p", "message"),
    [
        ([4], [0.5], 2.0, "retained holds 4"),
        ([-1], [0.5], 2.0, "retained holds -1"),
        ([1.0], [0.5], 2.0, "whole numbers"),
        ([True], [0.5], 2.0, "whole numbers"),
        ([[1]], [0.5], 2.0, "dimensions"),
        ([1], [], 2.0, "orders is empty"),
        ([1], [0.5, 2.0], 2.0, "not below"),
        ([1], [0.0], 2.0, "order"),
        ([1], [0.5], np.inf, "order"),
        ([1], [None], 2.0, "real number"),
    ],
)
def test_tightest_bounds_refuse_bad_input(counts, orders, p, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tightest_bounds([1.0, 2.0, 3.0], counts, orders, p)


@pytest.mark.parametrize(("logs", "size"), [([0.0], 3), ([np.nan, 0.0], 3), ([np.inf, 0.0], 3), ([0.0, 0.0], 0)])
def test_tightest_bounds_from_norms_refuse_bad_input(logs, size):
    with pytest.raises((TypeError, ValueError)):
        tightest_bounds_from_norms(logs, size, [0], [0.5, 1.0])


# --- the weak quasi-norm --------------------------------------------------------------------------------------------


@oracles.precise
def weak_quasinorm(w, q):
    falling = sorted((mpf(abs(float(x))) for x in w), reverse=True)
    return max(x * mpf(i) ** (1 / mpf(q)) for i, x in enumerate(falling, 1))


@oracles.precise
def weak_bound(w, k, q, p):
    q, p = mpf(q), mpf(p)
    return (q / (p - q)) ** (1 / p) * mpf(k) ** (1 / p - 1 / q) * weak_quasinorm(w, q)


@oracles.precise
def weak_finite_bound(w, k, q, p):
    q, p = mpf(q), mpf(p)
    return oracles.mp.fsum(mpf(i) ** (-p / q) for i in range(k + 1, np.count_nonzero(w) + 1)) ** (
        1 / p
    ) * weak_quasinorm(w, q)


@settings(max_examples=200, deadline=None)
@given(w=vectors(), orders=rising_orders(), data=st.data())
def test_weak_bounds_are_the_exact_ones_rounded_up_and_never_below_the_error(w, orders, data):
    (q, p), k = orders, data.draw(st.integers(0, w.size))
    error, loose = oracles.best_term_error(w, k, p), 1 + mpf(10) ** -9 + 100 * norm_error(w.size, q)
    exact = weak_finite_bound(w, k, q, p)
    assume(exact < 1e307)
    bound = mpf(stechkin_bound_weak_finite(w, k, q=q, p=p))
    assert error <= bound
    assert exact <= bound <= exact * loose + mpf(2) ** -1070
    assume(k > 0 and weak_bound(w, k, q, p) < 1e307)
    exact, bound = weak_bound(w, k, q, p), mpf(stechkin_bound_weak(w, k, q=q, p=p))
    assert error <= bound
    assert exact <= bound <= exact * loose + mpf(2) ** -1070
    assert weak_finite_bound(w, k, q, p) <= exact


@SOME
@given(q=st.floats(0.2, 2), p=st.floats(2.1, 6), d=st.integers(1, 50), data=st.data())
def test_weak_finite_bound_is_met_by_the_power_law_for_every_count(q, p, d, data):
    w, k = extremal_vector_weak(d, q=q), data.draw(st.integers(0, d))
    assert weak_quasinorm(w, q) == pytest.approx(1.0)
    bound = stechkin_bound_weak_finite(w, k, q=q, p=p)
    assert bound == pytest.approx(best_term_error(w, k, p=p), rel=1e-9)


def test_weak_bound_is_approached_by_a_long_power_law():
    w = extremal_vector_weak(100_000, q=0.5)
    bound = stechkin_bound_weak(w, 1000, q=0.5, p=2.0)
    assert 0.999 * bound < best_term_error(w, 1000) < bound


@SOME
@given(w=vectors(families=MODERATE, nonzero=True), orders=rising_orders(low=0.2), seed=st.integers(0, 2**32 - 1))
def test_weak_bounds_scale_and_ignore_order_signs_and_appended_zeros(w, orders, seed):
    q, p = orders
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, w.size + 1))
    changed = np.ldexp(rng.permutation(np.append(w, np.zeros(5))) * rng.choice([-1, 1], w.size + 5), 40)
    for weak in (stechkin_bound_weak, stechkin_bound_weak_finite):
        assert weak(changed, k, q=q, p=p) == pytest.approx(np.ldexp(weak(w, k, q=q, p=p), 40), rel=1e-9)


def test_weak_bound_edges():
    for weak in (stechkin_bound_weak, stechkin_bound_weak_finite):
        assert weak(np.zeros(3), 1, q=0.5) == 0
        assert weak([5e-324, 5e-324], 1, q=0.5) >= 5e-324
        assert weak([1e300, 1e-300], 1, q=0.5) >= 1e-300
        # The weak quasi-norm alone exceeds float64, the bound does not.
        assert weak(np.ones(2000), 1999, q=0.005) >= 1
        with pytest.raises(OverflowError, match="bound exceeds float64"):
            weak(np.ones(2000), 1, q=0.005)
    assert stechkin_bound_weak_finite([3.0, 4.0], 2, q=0.5) == 0
    assert extremal_vector_weak(3, q=1e-3).tolist() == [1.0, 2.0**-1000, 0.0]


@pytest.mark.parametrize(
    ("k", "q", "p"), [(-1, 0.5, 2.0), (3, 0.5, 2.0), (1.0, 0.5, 2.0), (1, 2.0, 2.0), (1, 0.0, 2.0), (1, "1", 2.0)]
)
@pytest.mark.parametrize("bound", [stechkin_bound_finite, stechkin_bound_weak, stechkin_bound_weak_finite])
def test_other_stechkin_bounds_refuse_bad_input(bound, k, q, p):
    with pytest.raises((TypeError, ValueError)):
        bound([1.0, 2.0], k, q=q, p=p)
    for w in ([np.nan], [[1.0]], ["a"], []):
        with pytest.raises((TypeError, ValueError)):
            bound(w, 1, q=0.5)


@pytest.mark.parametrize(("k", "d"), [(3, 3), (-1, 3), (0, 0), (0.0, 3), (0, None)])
def test_extremal_vectors_refuse_bad_counts(k, d):
    with pytest.raises((TypeError, ValueError)):
        extremal_vector(k, d, q=0.5)
    with pytest.raises((TypeError, ValueError)):
        stechkin_constant_finite(0.5, 2.0, -1 if k == 3 else k, d)


# --- how many must be retained --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    w=st.lists(st.integers(-6, 6), min_size=1, max_size=8).map(np.array),
    tol=st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 0.9, 1.0]),
)
def test_retained_exact_is_the_least_count_over_all_subsets(w, tol):
    # Integers and p = 1: every sum is exact, so ties with the tolerance are met exactly.
    k = retained_exact(w, tol, p=1.0)
    allowed = tol * np.abs(w).sum()
    assert oracles.best_error_over_subsets(w, k, 1.0) <= allowed
    if k > 0:
        assert oracles.best_error_over_subsets(w, k - 1, 1.0) > allowed


@SOME
@given(w=vectors(), p=error_orders, tol=st.floats(0, 1))
def test_retained_exact_meets_the_tolerance_and_one_fewer_does_not(w, p, tol):
    assume(representable(w, p))
    errors, k = best_term_errors(w, p), retained_exact(w, tol, p=p)
    assert errors[k] <= tol * errors[0]
    assert k == 0 or errors[k - 1] > tol * errors[0]


@SOME
@given(w=vectors(), p=error_orders)
def test_tolerance_zero_retains_every_non_zero_and_one_retains_none(w, p):
    assume(representable(w, p))
    assert retained_exact(w, 0.0, p=p) == np.count_nonzero(w)
    assert retained_exact(w, 1.0, p=p) == 0


@pytest.mark.parametrize("tol", [-0.1, 1.1, np.nan, "0.1", None, True])
def test_retained_exact_refuses_a_bad_tolerance(tol):
    with pytest.raises((TypeError, ValueError), match="tol"):
        retained_exact([1.0], tol)


@settings(max_examples=200, deadline=None)
@given(w=vectors(nonzero=True), orders=rising_orders(), data=st.data())
def test_retained_necessary_never_exceeds_the_count(w, orders, data):
    # The proof never uses that the kept entries are the largest, so any set that keeps some mass will do.
    p, q = orders
    kept = data.draw(st.lists(st.booleans(), min_size=w.size, max_size=w.size).map(np.array))
    assume(w[kept].any())
    with oracles.mp.workdps(oracles.DIGITS):
        mass = [oracles.quasinorm(part, p) ** mpf(p) for part in (w[~kept], w[kept])] if (~kept).any() else [0, 1]
        ratio = float(mass[0] / mass[1] * (1 + mpf(10) ** -15))
    bound = retained_necessary(w, ratio, p=p, q=q)
    assert 0 <= bound <= kept.sum()


@SOME
@given(w=vectors(nonzero=True), orders=rising_orders(), ratio=st.one_of(st.floats(0, 1e6), st.just(0.0)))
def test_retained_necessary_is_the_exact_bound_rounded_down(w, orders, ratio):
    exact = oracles.retained_necessary(w, ratio, *orders)
    bound = mpf(retained_necessary(w, ratio, p=orders[0], q=orders[1]))
    conditioning = sum(orders) * (1 + orders[0]) / (orders[1] - orders[0])
    assert exact * (1 - 1e-11 - 100 * norm_error(w.size, 1.0) * conditioning) - mpf(10) ** -300 <= bound <= exact


def test_retained_necessary_is_met_by_flat_vectors_with_nothing_removed():
    bound = retained_necessary(np.full(100, 3.0), 0.0, p=0.5, q=1.0)
    assert 100 * (1 - 1e-11) < bound <= 100


def test_retained_necessary_edges():
    assert retained_necessary(np.zeros(3), 0.5, p=0.5, q=1.0) == 0
    assert retained_necessary([1.0, 2.0], np.inf, p=0.5, q=1.0) == 0
    assert retained_necessary([1.0, 2.0], 1e300, p=0.5, q=1.0) >= 0
    for bad in (-0.1, np.nan, "1", None):
        with pytest.raises((TypeError, ValueError), match="ratio"):
            retained_necessary([1.0], bad, p=0.5, q=1.0)
    with pytest.raises(ValueError, match="not below"):
        retained_necessary([1.0], 0.0, p=1.0, q=0.5)


@settings(max_examples=200, deadline=None)
@given(w=vectors(nonzero=True), orders=rising_orders(), tol=st.floats(1e-6, 1 - 1e-6))
def test_retained_sufficient_suffices(w, orders, tol):
    p, q = orders
    enough = math.ceil(min(retained_sufficient(w, tol, p=p, q=q), w.size))
    assert oracles.best_term_error(w, enough, q) <= mpf(tol) * oracles.quasinorm(w, q)


@SOME
@given(w=vectors(nonzero=True), orders=rising_orders(), tol=st.floats(1e-3, 0.999))
def test_retained_sufficient_is_the_exact_bound_rounded_up(w, orders, tol):
    exact = oracles.retained_sufficient(w, tol, *orders)
    assume(exact < 1e300)
    bound = mpf(retained_sufficient(w, tol, p=orders[0], q=orders[1]))
    conditioning = sum(orders) * (1 + orders[0]) / (orders[1] - orders[0])
    assert exact <= bound <= exact * (1 + 1e-11 + 100 * norm_error(w.size, 1.0) * conditioning)


def test_retained_sufficient_cannot_be_lowered_for_flat_vectors():
    w, p, q = np.ones(1000), 1.0, 2.0
    tol = (p / q) ** (1 / q)
    enough = retained_sufficient(w, tol, p=p, q=q)
    assert enough == pytest.approx(500, rel=1e-9)
    assert best_term_error(w, math.ceil(0.99 * enough), p=q) > tol * float(lq_quasinorm(w, q))


@given(q=quasi_orders())
@settings(max_examples=20, deadline=None)
def test_retained_sufficient_may_exceed_the_size_where_it_says_nothing(q):
    assert retained_sufficient([1.0, 2.0, 3.0], 1e-9, p=q, q=1.0) > 0
    assert retained_sufficient([1.0, 2.0, 3.0], 1e-9, p=1.0, q=1.0 + 1e-7) == math.inf


@pytest.mark.parametrize("w", [np.ones(60), np.array([1e150, 1.0, 1e-9])])
def test_orders_a_rounding_apart_leave_bounds_that_say_nothing(w):
    p, q = 300.0, math.nextafter(300.0, 301.0)
    assert retained_necessary(w, 0.0, p=p, q=q) == 0
    assert retained_sufficient(w, 0.5, p=p, q=q) == math.inf


def test_bounds_hold_where_the_sum_of_many_powers_rounds_down():
    # Equal terms: their sum of powers is known exactly, so that its rounding shows.
    for d in (3000, 10_001, 65_537):
        for x in (0.1, 0.3, 0.7):
            w, q, k = np.full(d, x), 0.02, d // 2
            weight = max(mpf(m - k) ** mpf(0.5) * mpf(m) ** (-1 / mpf(q)) for m in range(d - 50, d + 1))
            exact = weight * mpf(d) ** (1 / mpf(q)) * mpf(x)
            assert stechkin_bound_finite(w, k, q=q) >= exact


@pytest.mark.parametrize("tol", [0.0, 1.0, -1.0, np.nan, "0.5", None])
def test_retained_sufficient_refuses_a_bad_tolerance(tol):
    with pytest.raises((TypeError, ValueError), match="tol"):
        retained_sufficient([1.0], tol, p=0.5, q=1.0)
