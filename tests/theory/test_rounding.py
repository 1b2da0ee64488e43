import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from ellq.theory import lq_quasinorm
from ellq.theory.rounding import UNIT_ROUNDOFF, log_error, norm_error, outward, product_error
from oracles import quasinorm
from strategies import quasi_orders, vectors


@settings(max_examples=300, deadline=None)
@given(value=st.floats(0, 1e300), error=st.floats(0, 100), underflows=st.integers(1, 10))
def test_outward_exceeds_the_largest_value_the_error_allows(value, error, underflows):
    rounded = float(outward(value, error, underflows))
    with mp.workdps(60):
        assert mpf(rounded) >= mpf(value) * (1 + mpf(error)) + underflows * mpf(2) ** -1075


@settings(max_examples=200, deadline=None)
@given(value=st.floats(1e-290, 1e290), error=st.floats(0, 1e-9))
def test_outward_adds_little_more_than_the_error(value, error):
    assert float(outward(value, error)) <= value * (1 + error) * (1 + 20 * UNIT_ROUNDOFF)


def test_outward_of_zero_and_subnormal_values_moves_up():
    assert outward(0.0, 0.0) > 0
    assert outward(5e-324, 1e-16) > 5e-324
    assert np.isinf(outward(1e308, 10.0))


def test_errors_grow_with_the_terms_and_stay_small():
    assert norm_error(1, 1.0) < norm_error(1000, 1.0) < norm_error(1000, 0.1) < 1e-11
    assert norm_error(0, 1.0) > 0
    assert product_error(1) < product_error(2) < 1e-14


def test_large_errors_are_compounded_not_added():
    assert log_error(2**53) == pytest.approx(np.expm1(1.01))


@settings(max_examples=150, deadline=None)
@given(w=vectors(nonzero=True), q=st.one_of(quasi_orders(), st.floats(1, 20)))
def test_computed_norms_stray_from_the_exact_ones_by_less_than_the_stated_error(w, q):
    exact = quasinorm(w, q)
    if exact > 1e308:
        return
    computed = mpf(float(lq_quasinorm(w, q)))
    error, least = mpf(norm_error(w.size, q)), mpf(2) ** -1074
    assert exact <= computed * (1 + error) + least
    assert computed <= exact * (1 + error) + least


@settings(max_examples=100, deadline=None)
@given(w=vectors(nonzero=True, max_size=8), q=st.floats(1e-3, 3))
def test_outward_norm_covers_the_exact_norm(w, q):
    exact = quasinorm(w, q)
    if exact < 1e307:
        assert mpf(float(outward(lq_quasinorm(w, q), norm_error(w.size, q)))) >= exact
