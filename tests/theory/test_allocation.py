import time
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

import oracles
from ellq.theory.allocation import allocate_retained, allocate_shares, allocation_error, least_allocation_error
from strategies import random_orders, random_vector, rising_orders, vectors

SOME = settings(max_examples=120, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@oracles.precise
def error(gains, counts, q, p):
    q, p = mpf(q), mpf(p)
    terms = [(mpf(float(a)) * mpf(float(k)) ** (1 / p - 1 / q)) ** p for a, k in zip(gains, counts, strict=True) if a]
    return mp.fsum(terms) ** (1 / p)


def all_counts(total, sizes, least):
    """Every way of sharing ``total``, by enumeration."""
    ranges = [range(least, size + 1) for size in sizes]
    return [counts for counts in product(*ranges) if sum(counts) == total]


# --- the objective and its least value ------------------------------------------------------------------------------


@SOME
@given(gains=vectors(max_size=8), orders=rising_orders(), seed=seeds)
def test_error_is_the_formula_rounded_up(gains, orders, seed):
    gains, (q, p) = np.abs(gains), orders
    counts = np.random.default_rng(seed).integers(1, 10_000, gains.size)
    exact = error(gains, counts, q, p)
    assume(exact < 1e305)
    bound = mpf(allocation_error(gains, counts, q=q, p=p))
    assert exact <= bound <= exact * (1 + mpf(10) ** -9) + mpf(2) ** -1070 * mpf(gains.size) ** (1 / mpf(p))
    assert (bound == 0) == (exact == 0)


@SOME
@given(gains=vectors(max_size=8), orders=rising_orders(), total=st.sampled_from([1, 7, 10**6, 0.3]))
def test_least_error_is_the_formula_rounded_down(gains, orders, total):
    q, p = orders
    try:
        least = mpf(least_allocation_error(np.abs(gains), total, q=q, p=p))
    except OverflowError:
        return
    with mp.workdps(60):
        exact = oracles.quasinorm(gains, q) * mpf(total) ** (1 / mpf(p) - 1 / mpf(q)) if gains.any() else mpf(0)
        assert least <= exact
        assert exact <= least * (1 + mpf(10) ** -9) + mpf(2) ** -1070


@SOME
@given(seed=seeds)
def test_no_counts_are_below_the_least_error(seed):
    rng = np.random.default_rng(seed)
    gains = np.abs(random_vector(rng, int(rng.integers(1, 9))))
    counts = rng.integers(1, 100, gains.size)
    q, p = (float(order) for order in random_orders(rng))
    try:
        assert least_allocation_error(gains, int(counts.sum()), q=q, p=p) <= allocation_error(gains, counts, q=q, p=p)
    except OverflowError:
        assume(False)


def test_known_values():
    # k ∝ √A for q = ½: 2, 3, 1 of 6; errors 4/2 + 9/3 + 1/1.
    gains, counts = [4.0, 9.0, 1.0], [2, 3, 1]
    assert allocate_shares(gains, 6.0, q=0.5) == pytest.approx(counts)
    assert allocation_error(gains, counts, q=0.5) == pytest.approx(6.0)
    assert least_allocation_error(gains, 6, q=0.5) == pytest.approx(6.0)
    # Squares: 16/8 + 81/27 + 1/1.
    assert allocation_error(gains, counts, q=0.5, p=2.0) ** 2 == pytest.approx(6.0)
    assert least_allocation_error(gains, 6, q=0.5, p=2.0) ** 2 == pytest.approx(6.0)


# --- shares ---------------------------------------------------------------------------------------------------------


@SOME
@given(gains=vectors(nonzero=True), q=st.floats(0.05, 1.9), total=st.sampled_from([1e-3, 1.0, 12.5, 1e9]))
def test_shares_without_limits_are_powers_of_the_gains(gains, q, total):
    gains = np.abs(gains)
    shares = allocate_shares(gains, total, q=q)
    with mp.workdps(60):
        powers = [mpf(float(a)) ** mpf(q) for a in gains]
        exact = [mpf(total) * power / mp.fsum(powers) for power in powers]
    for share, value in zip(shares, exact, strict=True):
        assert share == pytest.approx(float(value), rel=1e-11, abs=1e-300)


@SOME
@given(seed=seeds)
def test_shares_meet_the_limits_and_the_condition_for_a_minimum(seed):
    rng = np.random.default_rng(seed)
    n, q = int(rng.integers(1, 12)), float(rng.uniform(0.05, 1.9))
    gains = np.abs(random_vector(rng, n)) * (rng.random(n) < 0.9)
    sizes = rng.integers(1, 50, n)
    least = float(rng.choice([0.0, 0.5, 1.0]))
    total = float(rng.uniform(max(least * n, 1e-3), sizes.sum()))
    k = allocate_shares(gains, total, q=q, sizes=sizes, least=least)
    assert k.sum() == pytest.approx(total, rel=1e-10)
    assert (k >= least).all()
    assert (k <= sizes).all()
    # Karush-Kuhn-Tucker: log k_i − q·log A_i is one level where no limit binds, above at the least, below at the size.
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.log(k) - q * np.log(gains)
    served, idle = (gains > 0) & (k > 0), gains == 0
    inside = served & (k > max(least, 1e-290)) & (k < sizes)  # subnormal shares have no digits to compare
    if inside.any():
        water = level[inside].mean()
        assert level[inside] == pytest.approx(water, abs=1e-9)
        assert (level[served & (k <= least) & (k < sizes)] >= water - 1e-9).all()
        assert (level[served & (k >= sizes) & (k > least)] <= water + 1e-9).all()
        assert (k[idle] == least).all()


@SOME
@given(seed=seeds)
def test_no_nearby_shares_are_better(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    gains = rng.lognormal(size=n)
    q, p = sorted(rng.uniform(0.1, 3.0, 2)) + np.array([0.0, 0.05])
    k = allocate_shares(gains, 10.0 * n, q=q)
    moved = k + (noise := rng.normal(size=n) * 0.01 * k.min()) - noise.mean()
    assert allocation_error(gains, k, q=q, p=p) <= allocation_error(gains, moved, q=q, p=p) * (1 + 1e-11)


# --- whole counts ---------------------------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(seed=seeds)
def test_counts_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 5))
    gains = rng.lognormal(0, rng.choice([0.0, 0.5, 3.0]), n) * (rng.random(n) < 0.9)
    sizes, least = rng.integers(2, 8, n), int(rng.integers(1, 3))
    total = int(rng.integers(least * n, sizes.sum() + 1))
    q, p = (float(order) for order in random_orders(rng))
    k = allocate_retained(gains, total, q=q, p=p, sizes=sizes, least=least)
    assert k.sum() == total
    assert (k >= least).all()
    assert (k <= sizes).all()
    best = min(error(gains, counts, q, p) for counts in all_counts(total, sizes, least))
    assert error(gains, k, q, p) <= best * (1 + mpf(10) ** -12)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_counts_without_limits_are_those_of_the_greedy(seed):
    rng = np.random.default_rng(seed)
    n, s = int(rng.integers(1, 9)), float(rng.uniform(0.2, 4.0))
    gains, total = rng.lognormal(0, 2, n), int(rng.integers(n, 60 + n))
    greedy = np.ones(n)
    for _ in range(total - n):
        greedy[np.argmax(gains * (greedy**-s - (greedy + 1) ** -s))] += 1
    k = allocate_retained(gains, total, q=1 / (1 + s))
    assert allocation_error(gains, k, q=1 / (1 + s)) == pytest.approx(allocation_error(gains, greedy, q=1 / (1 + s)))


@SOME
@given(gains=vectors(), seed=seeds, q=st.floats(0.1, 0.95))
def test_counts_ignore_scale_and_rise_with_the_gain(gains, seed, q):
    gains = np.abs(gains)
    total = gains.size + int(np.random.default_rng(seed).integers(0, 10_000))
    k = allocate_retained(gains, total, q=q)
    assert k.sum() == total
    order = np.argsort(gains, kind="stable")
    assert (np.diff(k[order]) >= -1).all()  # among equal gains one may get the odd one
    if gains.max() < 1e290 and (gains[gains > 0] > 1e-290).all():
        again = allocate_retained(gains * 1024.0, total, q=q)
        assert np.abs(again - k).max() <= 1


def test_equal_gains_share_evenly_the_first_taking_the_odd_one():
    assert allocate_retained([2.0] * 4, 10, q=0.5).tolist() == [3, 3, 2, 2]


def test_units_without_gain_get_the_least_and_what_is_left():
    assert allocate_retained([0.0, 5.0, 0.0], 10, q=0.5).tolist() == [1, 8, 1]
    assert allocate_retained([0.0, 5.0, 0.0], 10, q=0.5, sizes=[9, 3, 9]).tolist() == [4, 3, 3]
    assert allocate_retained([0.0, 0.0], 7, q=0.5).tolist() == [4, 3]
    assert allocate_shares([0.0, 5.0, 0.0], 10.0, q=0.5, sizes=[9, 3, 9]) == pytest.approx([3.5, 3.0, 3.5])


def test_limits_that_leave_no_choice_are_met():
    assert allocate_retained([1.0, 100.0], 7, q=0.5, sizes=[4, 3]).tolist() == [4, 3]
    assert allocate_retained([1.0, 100.0], 4, q=0.5, least=2).tolist() == [2, 2]
    assert allocate_retained([3.0], 5, q=0.5).tolist() == [5]


@pytest.mark.parametrize("gains", [[1e300, 1e-300], [5e-324, 1.0], [1e300, 1e300]])
def test_extreme_gains_are_shared(gains):
    k = allocate_retained(gains, 1000, q=0.9, p=2.0)
    assert k.sum() == 1000
    assert k[0] == k[1] or k[int(np.argmin(gains))] == 1


def test_a_million_units_are_shared_in_seconds():
    rng = np.random.default_rng(0)
    gains, sizes = rng.lognormal(0, 2, 10**6), rng.integers(1, 4000, 10**6)
    start = time.perf_counter()
    k = allocate_retained(gains, 50 * 10**6, q=0.5, sizes=sizes)
    assert time.perf_counter() - start < 20  # measured: 0.4
    assert k.sum() == 50 * 10**6
    shares = allocate_shares(gains, 50e6, q=0.5, sizes=sizes, least=1.0)
    assert np.abs(k - shares).max() < 2
    assert allocation_error(gains, k, q=0.5) == pytest.approx(allocation_error(gains, shares, q=0.5), rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: allocate_retained([1.0, -1.0], 5, q=0.5), "gains reach down to -1"),
        (lambda: allocate_retained([], 5, q=0.5), "gains is empty"),
        (lambda: allocate_retained([np.nan], 5, q=0.5), "gains holds nan"),
        (lambda: allocate_retained([1.0, 1.0], 1, q=0.5), r"total=1 is outside \[2, 2\]"),
        (lambda: allocate_retained([1.0, 1.0], 6, q=0.5, sizes=[2, 3]), r"total=6 is outside \[2, 5\]"),
        (lambda: allocate_retained([1.0], 5, q=0.5, sizes=[2, 3]), "sizes has 2 entries"),
        (lambda: allocate_retained([1.0], 5, q=0.5, sizes=[0]), "below least=1"),
        (lambda: allocate_retained([1.0], 5, q=0.5, sizes=[2.5]), "whole numbers"),
        (lambda: allocate_retained([1.0], 5.0, q=0.5), "total must be a whole number"),
        (lambda: allocate_retained([1.0], 5, q=0.5, least=0), "least=0 is outside"),
        (lambda: allocate_retained([1.0], 5, q=1.0), "is not below p=1"),
        (lambda: allocate_shares([1.0], -5.0, q=0.5), "total=-5"),
        (lambda: allocate_shares([1.0], 1.0, q=0.5, least=-1.0), "least=-1"),
        (lambda: allocate_shares([1.0], 9.0, q=0.5, sizes=[3.0]), r"total=9 is outside \[0, 3\]"),
        (lambda: allocate_shares([1.0], 9.0, q=0.0), "q=0 is not"),
        (lambda: allocation_error([1.0], [1, 2], q=0.5), "counts has 2 entries"),
        (lambda: allocation_error([1.0], [0], q=0.5), "counts reach down to 0"),
        (lambda: allocation_error([1.0], [np.inf], q=0.5), "counts holds inf"),
        (lambda: least_allocation_error([1.0], 0, q=0.5), "total=0"),
        (lambda: least_allocation_error([1.0], np.inf, q=0.5), "total=inf"),
        (lambda: least_allocation_error([1.0], 1, q=0.5, p=0.5), "is not below p=0.5"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_bounds_beyond_float64_are_refused():
    with pytest.raises(OverflowError):
        allocation_error([1e300], [1e-10], q=0.01)
    with pytest.raises(OverflowError):
        least_allocation_error([1e300], 1e-10, q=0.01)
