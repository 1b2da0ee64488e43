from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracles
from ellq.theory import effective_count, join, lq_quasinorm, power_sums, pq_index, sparsity_index
from ellq.theory.rounding import norm_error
from strategies import MODERATE, quasi_orders, rising_orders, vectors

SOME = settings(max_examples=120, deadline=None)

# Each measure with one order to choose. All but the first ignore scale.
MEASURES = {
    "quasinorm": lambda w, q: lq_quasinorm(w, q),
    "sparsity_index": lambda w, q: sparsity_index(w, q),
    "pq_index": lambda w, q: pq_index(w, q, 1.0),
    "effective_count": lambda w, q: effective_count(w, q, 1.0),
}
moderate = vectors(families=MODERATE, nonzero=True)
usual_orders = st.floats(0.1, 0.9)


def close(name, a, b, w, q):
    # The PQ index is 1 minus something, so its error is absolute.
    error = 10 * norm_error(2 * w.size, q)
    return float(a) == pytest.approx(float(b), rel=error, abs=error if name == "pq_index" else 0)


# --- values ---------------------------------------------------------------------------------------------------------


def test_known_values():
    assert lq_quasinorm([3.0, -4.0], 2.0) == 5.0
    assert lq_quasinorm([1.0, 4.0, 9.0], 0.5) == 36.0
    assert sparsity_index([1.0, 4.0, 9.0], 0.5) == pytest.approx(14 / 36)
    assert pq_index([3.0, 4.0], 1.0, 2.0) == pytest.approx(1 - 2**-0.5 * 7 / 5)
    assert effective_count([3.0, 4.0], 1.0, 2.0) == pytest.approx(49 / 25)


@SOME
@given(w=vectors(nonzero=True), q=quasi_orders())
def test_sparsity_index_equals_its_formula(w, q):
    exact = oracles.sparsity_index(w, q)
    assert float(sparsity_index(w, q)) == pytest.approx(float(exact), rel=4 * norm_error(w.size, q) + 1e-12, abs=1e-307)


@SOME
@given(w=vectors(nonzero=True), orders=rising_orders())
def test_pq_index_equals_its_formula(w, orders):
    exact = oracles.pq_index(w, *orders)
    assert float(pq_index(w, *orders)) == pytest.approx(float(exact), abs=4 * norm_error(w.size, orders[0]))


@SOME
@given(w=vectors(nonzero=True), orders=rising_orders())
def test_effective_count_equals_its_formula(w, orders):
    p, q = orders
    tolerance = 8 * norm_error(w.size, 1.0) * (p + q) * (1 + p) / (q - p)
    assert float(effective_count(w, p, q)) == pytest.approx(float(oracles.effective_count(w, p, q)), rel=tolerance)


@SOME
@given(w=vectors(nonzero=True), q=st.floats(1e-6, 10))
def test_log_quasinorm_equals_its_formula_whatever_the_order(w, q):
    with oracles.mp.workdps(60):
        exact = float(oracles.mp.log(oracles.quasinorm(w, q)))
    computed = float(power_sums(w, (q,)).log_quasinorm(q))
    assert computed == pytest.approx(exact, rel=1e-13, abs=2 * norm_error(w.size, q) + 1e-12)


# --- ranges ---------------------------------------------------------------------------------------------------------


@SOME
@given(w=vectors(nonzero=True), q=quasi_orders())
def test_sparsity_index_stays_in_its_range(w, q):
    value, least = float(sparsity_index(w, q)), w.size ** (1 - 1 / q)
    assert least * (1 - 4 * norm_error(w.size, q)) <= value <= 1


@SOME
@given(w=vectors(nonzero=True), orders=rising_orders())
def test_pq_index_stays_in_its_range(w, orders):
    p, q = orders
    most = 1 - w.size ** (1 / q - 1 / p)
    assert 0 <= float(pq_index(w, p, q)) <= most + 4 * norm_error(w.size, p)


@SOME
@given(w=vectors(nonzero=True), orders=rising_orders())
def test_effective_count_lies_between_one_and_the_non_zeros(w, orders):
    assert 1 <= float(effective_count(w, *orders)) <= np.count_nonzero(w)


@SOME
@given(w=moderate, q=usual_orders, factor=st.floats(1.1, 3))
def test_quasinorm_falls_with_the_order(w, q, factor):
    assert lq_quasinorm(w, q * factor) <= lq_quasinorm(w, q) * (1 + 2 * norm_error(w.size, q))


@SOME
@given(v=moderate, q=usual_orders, seed=st.integers(0, 2**32 - 1))
def test_quasi_triangle_inequality(v, q, seed):
    w = np.random.default_rng(seed).permutation(v)
    bound = 2 ** (1 / q - 1) * (lq_quasinorm(v, q) + lq_quasinorm(w, q))
    assert lq_quasinorm(v + w, q) <= bound * (1 + 4 * norm_error(v.size, q))


def test_extremes_of_each_measure():
    flat, one_hot = np.full(8, -2.5), np.eye(8)[3]
    assert sparsity_index(one_hot, 0.5) == 1
    assert sparsity_index(flat, 0.5) == pytest.approx(1 / 8)
    assert pq_index(flat, 0.5, 1.0) == 0
    assert pq_index(one_hot, 0.5, 1.0) == pytest.approx(7 / 8)
    assert effective_count(flat, 0.5, 1.0) == pytest.approx(8)
    assert effective_count(one_hot, 0.5, 1.0) == 1


# --- invariances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
@SOME
@given(w=moderate, q=usual_orders, shift=st.integers(-400, 400))
def test_powers_of_two_scale_exactly(name, w, q, shift):
    before, after = MEASURES[name](w, q), MEASURES[name](np.ldexp(w, shift), q)
    assert after == (np.ldexp(before, shift) if name == "quasinorm" else before)


@pytest.mark.parametrize("name", MEASURES)
@SOME
@given(w=moderate, q=usual_orders, factor=st.floats(1e-100, 1e100))
def test_any_factor_scales_to_rounding(name, w, q, factor):
    before, after = MEASURES[name](w, q), MEASURES[name](w * factor, q)
    assert close(name, after / factor if name == "quasinorm" else after, before, w, q)


@pytest.mark.parametrize("name", MEASURES)
@SOME
@given(w=moderate, q=usual_orders, seed=st.integers(0, 2**32 - 1))
def test_order_does_not_matter(name, w, q, seed):
    assert close(name, MEASURES[name](np.random.default_rng(seed).permutation(w), q), MEASURES[name](w, q), w, q)


@pytest.mark.parametrize("name", MEASURES)
@SOME
@given(w=vectors(families=MODERATE, nonzero=True), q=usual_orders)
def test_signs_do_not_matter(name, w, q):
    assert MEASURES[name](-w, q) == MEASURES[name](np.abs(w), q) == MEASURES[name](w, q)


@pytest.mark.parametrize("name", ["quasinorm", "sparsity_index", "effective_count"])
@SOME
@given(w=moderate, q=usual_orders, zeros=st.integers(1, 20))
def test_appended_zeros_do_not_matter(name, w, q, zeros):
    assert close(name, MEASURES[name](np.append(w, np.zeros(zeros)), q), MEASURES[name](w, q), w, q)


@SOME
@given(w=moderate, q=usual_orders)
def test_pq_index_rises_with_an_appended_zero(w, q):
    assert pq_index(np.append(w, 0.0), q, 1.0) > pq_index(w, q, 1.0)


@SOME
@given(w=moderate, q=usual_orders, times=st.integers(2, 5))
def test_replication_keeps_the_pq_index_and_multiplies_the_effective_count(w, q, times):
    many = np.tile(w, times)
    assert close("pq_index", pq_index(many, q, 1.0), pq_index(w, q, 1.0), many, q)
    assert close("effective_count", effective_count(many, q, 1.0), times * effective_count(w, q, 1.0), many, q)
    assert close("sparsity_index", sparsity_index(many, q), times ** (1 - 1 / q) * sparsity_index(w, q), many, q)


@SOME
@given(w=vectors(min_size=2, families=MODERATE), p=st.floats(0.2, 1.0), q=st.floats(1.0, 4.0), share=st.floats(0, 0.5))
def test_moving_magnitude_to_a_smaller_entry_lowers_the_pq_index_for_orders_around_one(w, p, q, share):
    assume(p < q * (1 - 1e-6))
    w = np.abs(w)
    i, j = np.argmax(w), np.argmin(w)
    assume(w[i] > w[j])
    moved = w.copy()
    gift = share * (w[i] - w[j])
    moved[i], moved[j] = w[i] - gift, w[j] + gift
    assert pq_index(moved, p, q) <= pq_index(w, p, q) + 8 * norm_error(w.size, p)


def test_moving_magnitude_may_raise_the_pq_index_for_other_orders():
    assert pq_index([100.0, 1.5, 1.5], 1.5, 2.0) > pq_index([100.0, 2.0, 1.0], 1.5, 2.0)


def test_pq_index_and_effective_count_are_two_forms_of_one():
    w = np.random.default_rng(0).normal(size=50)
    assert effective_count(w, 0.5, 1.0) == pytest.approx(50 * (1 - pq_index(w, 0.5, 1.0)))
    assert sparsity_index(w, 0.5) * 50 == pytest.approx(1 / (1 - pq_index(w, 0.5, 1.0)))


# --- arrays, pooling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
def test_an_axis_is_measured_vector_by_vector(name):
    w = np.random.default_rng(1).normal(size=(3, 4, 5))
    for axis in range(3):
        expected = np.apply_along_axis(lambda v: MEASURES[name](v, 0.5), axis, w)
        by_axis = {
            "quasinorm": lq_quasinorm(w, 0.5, axis=axis),
            "sparsity_index": sparsity_index(w, 0.5, axis=axis),
            "pq_index": pq_index(w, 0.5, 1.0, axis=axis),
            "effective_count": effective_count(w, 0.5, 1.0, axis=axis),
        }
        np.testing.assert_allclose(by_axis[name], expected, rtol=1e-14, atol=1e-15)


@SOME
@given(parts=st.lists(vectors(max_size=8), min_size=1, max_size=5), q=quasi_orders())
def test_pooled_sums_measure_the_concatenated_vector(parts, q):
    whole = np.concatenate(parts)
    pooled = join([power_sums(part, (q, 1.0)) for part in parts]).pooled()
    direct = power_sums(whole, (q, 1.0))
    assert pooled.size == whole.size
    assert pooled.nonzeros == np.count_nonzero(whole)
    assert pooled.largest == np.abs(whole).max()
    assert pooled.exponent == direct.exponent
    error = 4 * norm_error(whole.size, q) + 1e-12
    np.testing.assert_allclose(pooled.log_quasinorm(q)[0], direct.log_quasinorm(q), rtol=1e-12, atol=error)
    np.testing.assert_allclose(pooled.sparsity_index(q)[0], direct.sparsity_index(q), rtol=error, atol=1e-307)
    np.testing.assert_allclose(pooled.pq_index(q, 1.0)[0], direct.pq_index(q, 1.0), rtol=0, atol=error)
    np.testing.assert_allclose(
        pooled.effective_count(q, 1.0)[0], direct.effective_count(q, 1.0), rtol=error * (1 + q) / (1 - q)
    )


def test_join_keeps_vectors_in_order():
    blocks = np.random.default_rng(2).normal(size=(2, 3, 4))
    joined = join([power_sums(block, (0.5,)) for block in blocks])
    np.testing.assert_array_equal(joined.quasinorm(0.5), lq_quasinorm(blocks.reshape(6, 4), 0.5))


def test_a_pool_of_pools_is_the_pool():
    w = np.random.default_rng(3).normal(size=(4, 6))
    halves = [power_sums(w[:1], (0.5, 1.0)).pooled(), power_sums(w[1:], (0.5, 1.0)).pooled()]
    np.testing.assert_allclose(join(halves).pooled().quasinorm(0.5), lq_quasinorm(w.ravel(), 0.5), rtol=1e-14)


def test_join_refuses_nothing_and_unequal_orders():
    with pytest.raises(ValueError, match="empty"):
        join([])
    with pytest.raises(ValueError, match="different orders"):
        join([power_sums([1.0], (0.5,)), power_sums([1.0], (1.0,))])


# --- edges ----------------------------------------------------------------------------------------------------------


def test_zero_vector():
    assert lq_quasinorm(np.zeros(3), 0.5) == 0
    assert np.isnan(sparsity_index(np.zeros(3), 0.5))
    assert np.isnan(pq_index(np.zeros(3), 0.5, 1.0))
    assert effective_count(np.zeros(3), 0.5, 1.0) == 0
    assert power_sums(np.zeros((2, 3)), (0.5,)).pooled().quasinorm(0.5) == 0


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-300, 1.0, 1e300, 1.7e308 / 4])
def test_flat_vector_at_any_scale(scale):
    w = np.full(4, scale)
    assert lq_quasinorm(w, 2.0) == pytest.approx(2 * scale, rel=1e-15, abs=0)
    assert sparsity_index(w, 0.5) == pytest.approx(0.25, rel=1e-14)
    assert pq_index(w, 0.5, 1.0) == pytest.approx(0, abs=1e-15)
    assert effective_count(w, 0.5, 1.0) == pytest.approx(4, rel=1e-14)


def test_entries_six_hundred_decades_apart_all_count():
    w = [1e300, 1e-300]
    assert lq_quasinorm(w, 0.01) == pytest.approx(float(oracles.quasinorm(w, 0.01)), rel=1e-12)
    assert lq_quasinorm(w, 0.01) > 1.0001e300


@pytest.mark.parametrize("q", [1e-6, 1e-3, 0.5, 1.0, 2.0, 500.0])
@pytest.mark.parametrize("value", [5e-324, -3.0, 1e300])
def test_single_entry_is_its_own_norm(q, value):
    assert lq_quasinorm([0.0, value], q) == abs(value)
    if q < 1:
        assert sparsity_index([0.0, value], q) == 1


def test_power_that_overflows_alone_is_no_overflow():
    w = np.full(1000, 1e-300)
    assert lq_quasinorm(w, 0.005) == pytest.approx(1e300, rel=1e-10)


def test_tiny_order_overflows_by_name_and_its_logarithm_is_there():
    with pytest.raises(OverflowError, match=r"q=0\.001.*log is 1609\.44"):
        lq_quasinorm(np.ones(5), 0.001)
    assert power_sums(np.ones(5), (0.001,)).log_quasinorm(0.001) == pytest.approx(np.log(5) / 0.001)


def test_large_orders_approach_the_largest_entry():
    assert lq_quasinorm([0.6, 0.5, -0.59], 500.0) == pytest.approx(0.6, rel=1e-3)


def test_empty_axis_is_refused():
    for measure in MEASURES.values():
        with pytest.raises(ValueError, match="no entries along axis"):
            measure(np.zeros((3, 0)), 0.5)
    assert lq_quasinorm(np.zeros((0, 3)), 0.5).shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_entries_are_named_by_index(bad):
    w = np.ones((2, 3))
    w[1, 2] = bad
    for measure in MEASURES.values():
        with pytest.raises(ValueError, match=r"index \[1, 2\]"):
            measure(w, 0.5)


@pytest.mark.parametrize("q", ["0.5", [0.5], None, True, np.array([0.5]), 0.5j])
def test_order_that_is_no_number_is_a_type_error(q):
    for measure in MEASURES.values():
        with pytest.raises(TypeError, match="must be one real number"):
            measure([1.0, 2.0], q)


@pytest.mark.parametrize("q", [0, -1.0, float("nan"), float("inf"), 1e-9, 501])
def test_order_out_of_range_is_a_value_error(q):
    for measure in MEASURES.values():
        with pytest.raises(ValueError, match=r"q|p"):
            measure([1.0, 2.0], q)


@pytest.mark.parametrize("q", [1.0, 1.5])
def test_sparsity_index_needs_an_order_below_one(q):
    with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
        sparsity_index([1.0], q)


def test_orders_that_do_not_rise_are_refused():
    for measure in (pq_index, effective_count):
        with pytest.raises(ValueError, match="not below"):
            measure([1.0], 1.0, 1.0)


def test_any_real_number_type_is_an_order():
    for q in (Fraction(1, 3), np.float32(0.25), np.float64(0.5)):
        assert lq_quasinorm([1.0, 2.0], q) == lq_quasinorm([1.0, 2.0], float(q))
        assert sparsity_index([1.0, 2.0], q) == sparsity_index([1.0, 2.0], float(q))


@pytest.mark.parametrize("w", [["a"], [None], [1j], [[1.0], [2.0, 3.0]]])
def test_what_is_not_numeric_is_refused(w):
    with pytest.raises((TypeError, ValueError)):
        lq_quasinorm(w, 0.5)


def test_integers_booleans_and_lists_are_measured_as_numbers():
    assert lq_quasinorm([True, False, True], 1.0) == 2
    assert lq_quasinorm(np.array([3, 4], dtype=np.int8), 2.0) == 5
    assert lq_quasinorm(7.0, 0.5) == 7
