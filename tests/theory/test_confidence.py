"""Limits are held to their failure rate by enumerating every sample of a known law."""

import re
from fractions import Fraction
from math import comb, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from ellq.theory.confidence import mean_upper_limit, mean_upper_limit_bernstein, share_upper_limit

SOME = settings(max_examples=100, deadline=None)
seeds = st.integers(0, 2**32 - 1)
deltas = st.one_of(st.floats(0.001, 0.999), st.sampled_from([1e-300, 1e-12, 1 - 1e-12]))
MEANS = (mean_upper_limit, mean_upper_limit_bernstein)
each_mean = pytest.mark.parametrize("limit", MEANS)


def failures(limit, law, samples, delta):
    """The probability that the limit is below the mean, over all samples of a law of two values."""
    (low, high), chance = law
    mean = low * (1 - chance) + high * chance
    values = [np.repeat([low, high], [samples - s, s]) for s in range(samples + 1)]
    chances = [comb(samples, s) * chance**s * (1 - chance) ** (samples - s) for s in range(samples + 1)]
    limits = [limit(Y, largest=high, delta=delta) for Y in values]
    return sum(p for p, u in zip(chances, limits, strict=True) if u < mean * (1 - 1e-12))


@each_mean
@pytest.mark.parametrize("chance", [0.003, 0.05, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("samples", [2, 7, 40])
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5, 0.9])
def test_mean_limits_fail_with_probability_at_most_delta(limit, chance, samples, delta):
    assert failures(limit, ((0.0, 1.0), chance), samples, delta) <= delta
    assert failures(limit, ((0.4, 2.0), chance), samples, delta) <= delta


def test_the_mean_itself_would_fail_too_often():
    # The negative control: what the limits add is needed.
    def mean(Y, *, largest, delta):
        return float(Y.mean())

    assert failures(mean, ((0.0, 1.0), 0.3), 40, 0.1) > 0.4
    assert failures(mean_upper_limit, ((0.0, 1.0), 0.3), 40, 0.1) > 0  # and the limit is not simply b


def wealth(Y, b, mean):
    """The wealth at a mean, in 60 digits."""
    with mp.workdps(60):
        stakes = [mpf(0.9) * mpf(2) ** -j for j in range(2 + int(np.ceil(np.log2(len(Y)) / 2)))]
        return mp.fsum(mp.fprod(1 + stake * (mpf(mean) - mpf(float(y))) / mpf(b) for y in Y) for stake in stakes) / len(
            stakes
        )


@SOME
@given(seed=seeds, delta=deltas)
def test_betting_limit_is_where_the_wealth_is_enough_and_no_further(seed, delta):
    rng = np.random.default_rng(seed)
    b = 10.0 ** rng.uniform(-100, 100)
    Y = rng.random(int(rng.integers(1, 60))) ** rng.uniform(0.2, 9) * b
    limit = mean_upper_limit(Y, largest=b, delta=delta)
    assert Y.mean() <= limit * (1 + 1e-12)
    assert limit <= b
    if limit < b:
        assert wealth(Y, b, limit) >= 1 / mpf(delta)
        assert wealth(Y, b, limit * (1 - 1e-8)) < 1 / mpf(delta)
    else:
        assert wealth(Y, b, b) <= (1 + mpf(10) ** -6) / mpf(delta)


@SOME
@given(seed=seeds, delta=deltas)
def test_bernstein_limit_is_the_formula_rounded_up(seed, delta):
    rng = np.random.default_rng(seed)
    b = 10.0 ** rng.uniform(-100, 100)
    Y = rng.random(int(rng.integers(2, 60))) ** rng.uniform(0.2, 9) * b
    limit = mean_upper_limit_bernstein(Y, largest=b, delta=delta)
    with mp.workdps(60):
        values, n = [mpf(float(y)) for y in Y], len(Y)
        mean, need = mp.fsum(values) / n, mp.log(2 / mpf(delta))
        variance = mp.fsum((y - mean) ** 2 for y in values) / (n - 1)
        exact = mean + mp.sqrt(2 * variance * need / n) + 7 * mpf(b) * need / (3 * (n - 1))
        assert exact <= mpf(limit) <= exact * (1 + mpf(10) ** -6)


@each_mean
@SOME
@given(seed=seeds, delta=st.floats(0.01, 0.5), shift=st.integers(-900, 900))
def test_mean_limits_ignore_order_scale_and_grow_with_confidence_and_range(limit, seed, delta, shift):
    rng = np.random.default_rng(seed)
    Y = rng.random(int(rng.integers(2, 40)))
    first = limit(Y, largest=1.0, delta=delta)
    assert limit(rng.permutation(Y), largest=1.0, delta=delta) == pytest.approx(first, rel=1e-8)
    scaled = limit(np.ldexp(Y, shift), largest=2.0**shift, delta=delta)
    assert scaled == pytest.approx(np.ldexp(first, shift), rel=1e-8)
    assert limit(Y, largest=1.0, delta=delta / 2) >= first * (1 - 1e-8)
    assert limit(Y, largest=3.0, delta=delta) >= first * (1 - 1e-8)


def test_betting_is_near_the_normal_limit_for_many_samples():
    Y = np.random.default_rng(0).random(30_000) / 4
    limit = mean_upper_limit(Y, largest=1.0, delta=0.05)
    assert limit < Y.mean() + 1.5 * np.sqrt(2 * Y.var() * log(20) / Y.size)
    assert limit < mean_upper_limit_bernstein(Y, largest=1.0, delta=0.05)


def test_values_without_any_success():
    assert mean_upper_limit(np.zeros(1000), largest=1.0, delta=0.05) < 7.5 / 1000
    assert mean_upper_limit(np.zeros(3), largest=0.0, delta=0.05) == 0
    assert mean_upper_limit_bernstein(np.zeros(3), largest=0.0, delta=0.05) == 0
    assert mean_upper_limit(np.full(5, 2.0), largest=2.0, delta=0.5) == 2
    assert mean_upper_limit([5e-324], largest=5e-324, delta=0.5) == 5e-324
    assert mean_upper_limit(np.full(50, 1e300), largest=1.5e300, delta=0.5) < 1.5e300


# --- a share --------------------------------------------------------------------------------------------------------


@SOME
@given(n=st.integers(1, 60), delta=deltas, data=st.data())
def test_share_limit_is_the_exact_one_of_clopper_and_pearson(n, delta, data):
    s = data.draw(st.integers(0, n))
    limit = share_upper_limit(s, n, delta=delta)
    if s == n:
        assert limit == 1
        return

    def at_most(p):
        return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(s + 1))

    assert at_most(Fraction(limit)) <= Fraction(delta)
    assert at_most(Fraction(limit) * (1 - Fraction(1, 10**6))) > Fraction(delta) * (1 - Fraction(1, 10**6))


def test_share_limit_without_success_is_that_of_independent_misses():
    assert share_upper_limit(0, 1000, delta=0.05) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-12)
    assert share_upper_limit(0, 10**9, delta=1e-300) == pytest.approx(690.7755e-9, rel=1e-6)
    assert share_upper_limit(0, 1, delta=1e-300) == pytest.approx(1)


# --- bad input ------------------------------------------------------------------------------------------------------


@each_mean
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"values": []}, "0 entries"),
        ({"values": [0.5, -0.1]}, "-0.1 to 0.5"),
        ({"values": [0.5, 1.1]}, "Pass a larger"),
        ({"values": [0.5, np.nan]}, "nan"),
        ({"largest": -1.0}, "largest=-1"),
        ({"delta": 0.0}, "delta=0"),
        ({"delta": 1.0}, "delta=1"),
    ],
)
def test_mean_limits_refuse_bad_numbers(limit, change, word):
    case = {"values": [0.5, 0.2], "largest": 1.0, "delta": 0.1} | change
    with pytest.raises(ValueError, match=re.escape(word)):
        limit(case["values"], largest=case["largest"], delta=case["delta"])


@pytest.mark.parametrize(
    ("arguments", "word"), [((-1, 3), "successes=-1"), ((4, 3), "successes=4"), ((0, 0), "samples=0")]
)
def test_share_limit_refuses_bad_counts(arguments, word):
    with pytest.raises(ValueError, match=word):
        share_upper_limit(*arguments, delta=0.1)
    with pytest.raises(ValueError, match="delta=2"):
        share_upper_limit(0, 1, delta=2)
    with pytest.raises(TypeError, match="samples"):
        share_upper_limit(0, 1.5, delta=0.1)
