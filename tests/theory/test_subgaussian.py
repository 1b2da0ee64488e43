from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.special import ndtri

import oracles
from ellq.theory import unit_error_lq
from ellq.theory.subgaussian import (
    unit_error_subgaussian,
    unit_error_subgaussian_joint,
    unit_error_subgaussian_lq,
)
from ellq.theory.theorems_subgaussian import LINEAR_UNIT_SUBGAUSSIAN
from strategies import MODERATE, quasi_orders, vectors

SOME = settings(max_examples=120, deadline=None)
deltas = st.one_of(st.floats(1e-3, 1 - 1e-3), st.sampled_from([5e-324, 1e-300, 1 - 2.0**-53]))


@oracles.precise
def tail_bound(v, sigma, delta, p):
    return mpf(sigma) * oracles.quasinorm(v, p) * mp.sqrt(2 * mp.log(2 / mpf(delta)))


@SOME
@given(v=vectors(families=MODERATE), sigma=st.sampled_from([1e-100, 0.5, 1e100]), delta=deltas)
@pytest.mark.parametrize(("dependence", "p"), [("any", 1.0), ("independent", 2.0)])
def test_bound_is_the_formula_rounded_up(v, sigma, delta, dependence, p):
    exact, bound = tail_bound(v, sigma, delta, p), unit_error_subgaussian(v, sigma, delta, dependence=dependence)
    assert exact <= mpf(bound) <= exact * (1 + mpf(10) ** -13)


@SOME
@given(v=vectors(families=MODERATE), q=quasi_orders(), delta=deltas, data=st.data())
@pytest.mark.parametrize(("dependence", "p"), [("any", 1.0), ("independent", 2.0)])
def test_bound_by_quasinorm_covers_that_of_the_tail(v, q, delta, data, dependence, p):
    k = data.draw(st.integers(1, v.size))
    tail = np.sort(np.abs(v))[: v.size - k]
    try:
        bound = unit_error_subgaussian_lq(v, k, q=q, sigma=2.0, delta=delta, dependence=dependence)
    except OverflowError:
        return
    assert tail_bound(tail, 2.0, delta, p) <= mpf(bound)


def test_bound_by_quasinorm_is_that_of_second_moments_times_the_deviations():
    w = np.random.default_rng(0).normal(size=20)
    factor = np.sqrt(2 * np.log(2 / 0.05))
    assert unit_error_subgaussian_lq(w, 5, q=0.5, sigma=3.0, delta=0.05) == pytest.approx(
        factor * unit_error_lq(w, 5, q=0.5, scale=3.0)
    )


@SOME
@given(v=vectors(families=MODERATE), delta=deltas)
def test_independent_inputs_are_the_joint_case_of_equal_variances(v, delta):
    joint = unit_error_subgaussian_joint(v, 4.0 * np.eye(v.size), delta)
    independent = unit_error_subgaussian(v, 2.0, delta, dependence="independent")
    assert joint == pytest.approx(independent, rel=1e-12)
    assert independent <= unit_error_subgaussian(v, 2.0, delta) * (1 + 1e-12)


@pytest.mark.parametrize("dependence", ["any", "independent"])
def test_bound_falls_with_delta_and_scales_with_sigma(dependence):
    v = np.array([1.0, -2.0, 3.0])
    bounds = [unit_error_subgaussian(v, 1.0, delta, dependence=dependence) for delta in (1e-9, 1e-3, 0.5, 0.999)]
    assert bounds == sorted(bounds, reverse=True)
    assert unit_error_subgaussian(v, 7.0, 0.5, dependence=dependence) == pytest.approx(7 * bounds[2], rel=1e-14)


def test_nothing_removed_costs_exactly_nothing():
    assert unit_error_subgaussian([0.0, 0.0], 1.0, 0.5) == 0
    assert unit_error_subgaussian([], 1.0, 0.5) == 0
    assert unit_error_subgaussian([1.0], 0.0, 0.5) == 0
    assert unit_error_subgaussian_joint([0.0], [[1.0]], 0.5) == 0


# --- the exact quantiles that the statement is held against ----------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-307, 1e-100, 1e-5, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12])
def test_gaussian_quantile_is_exact_within_eight_units(delta):
    with mp.workdps(60):
        exact = mp.findroot(
            lambda t: mp.log(mp.erfc(t / mp.sqrt(2))) - mp.log(mpf(delta)), mpf(float(-ndtri(delta / 2)))
        )
        assert abs(mpf(float(-ndtri(delta / 2))) - exact) <= 8 * mpf(2) ** -53 * exact


@SOME
@given(v=vectors(families=MODERATE, max_size=7), delta=st.floats(1e-3, 1 - 1e-3))
def test_quantile_of_signs_is_the_least_that_few_enough_exceed(v, delta):
    t = LINEAR_UNIT_SUBGAUSSIAN.observed(v, 1.0, delta, "signs", "independent")
    values = np.array([abs(np.dot(v, s)) for s in product((1.0, -1.0), repeat=v.size)])
    margin = 1e-12 * np.abs(v).sum()
    assert np.mean(values > t + margin) <= delta
    below = values[values < t - margin]
    assert below.size == 0 or np.mean(values > below.max() + margin) > delta


@pytest.mark.parametrize(
    ("law", "dependence", "expected"),
    [
        ("gaussian", "any", 12.0),
        ("gaussian", "independent", np.sqrt(14) * 2),
        ("signs", "any", 12.0),
        ("uniform", "any", 12),
    ],
)
def test_known_quantiles(law, dependence, expected):
    one_deviation = {"gaussian": 0.31731050786291415, "signs": 0.3, "uniform": 1 - 1 / np.sqrt(3)}[law]
    t = LINEAR_UNIT_SUBGAUSSIAN.observed(np.array([1.0, -2.0, 3.0]), 2.0, one_deviation, law, dependence)
    assert t == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unit_error_subgaussian([1.0], -1.0, 0.5), "sigma=-1"),
        (lambda: unit_error_subgaussian([1.0], np.inf, 0.5), "sigma=inf"),
        (lambda: unit_error_subgaussian([1.0], 1.0, 0.0), "delta=0 is outside"),
        (lambda: unit_error_subgaussian([1.0], 1.0, 1.0), "delta=1 is outside"),
        (lambda: unit_error_subgaussian([1.0], 1.0, "0.5"), "delta must be one real number"),
        (lambda: unit_error_subgaussian([1.0], 1.0, 0.5, dependence="some"), "Choose 'any' or 'independent'"),
        (lambda: unit_error_subgaussian([np.nan], 1.0, 0.5), "removed holds nan"),
        (lambda: unit_error_subgaussian_lq([1.0], 1, q=1.0, sigma=1.0, delta=0.5), "is not below p=1"),
        (lambda: unit_error_subgaussian_lq([1.0], 2, q=0.5, sigma=1.0, delta=0.5), "retained=2"),
        (lambda: unit_error_subgaussian_joint([1.0], [[-1.0]], 0.5), "diagonal"),
        (lambda: unit_error_subgaussian_joint([1.0], [[1.0]], 2.0), "delta=2 is outside"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
