import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracles
import oracles_measures
from ellq.theory import effective_count, join, lq_quasinorm, power_sums, pq_index, sparsity_index
from ellq.theory.measures import (
    entropy_effective_count,
    gini,
    hoyer,
    is_softly_sparse,
    l0_count,
    normalised_sparsity_index,
    numerical_sparsity,
    tail_index,
    weak_quasinorm,
)
from ellq.theory.rounding import norm_error
from strategies import MODERATE, quasi_orders, rising_orders, vectors

SOME = settings(max_examples=80, deadline=None)

# Each measure with one order to choose. All but the first two ignore scale.
WITH_ORDER = {
    "quasinorm": lambda w, q: lq_quasinorm(w, q),
    "weak_quasinorm": lambda w, q: weak_quasinorm(w, q),
    "sparsity_index": lambda w, q: sparsity_index(w, q),
    "normalised_sparsity_index": lambda w, q: normalised_sparsity_index(w, q),
    "pq_index": lambda w, q: pq_index(w, q, 1.0),
    "effective_count": lambda w, q: effective_count(w, q, 1.0),
}
MEASURES = WITH_ORDER | {
    "l0_count": lambda w, q: l0_count(w),
    "numerical_sparsity": lambda w, q: numerical_sparsity(w),
    "entropy_effective_count": lambda w, q: entropy_effective_count(w),
    "hoyer": lambda w, q: hoyer(w),
    "gini": lambda w, q: gini(w),
}
SCALING = ("quasinorm", "weak_quasinorm")
TEXT = (Path(__file__).parents[2] / "docs" / "measures.md").read_text(encoding="utf-8")
moderate = vectors(families=MODERATE, nonzero=True)
usual_orders = st.floats(0.1, 0.9)


def close(name, a, b, w, q):
    # These are 1 minus something, or differences of rounded entries, so their error is absolute.
    error = 1e-9 if name == "tail_index" else 10 * norm_error(2 * w.size, q)  # the former divides by near ties
    is_absolute = name in ("pq_index", "hoyer", "gini")
    return float(a) == pytest.approx(float(b), rel=error, abs=error if is_absolute else 0, nan_ok=w.size == 1)


# --- values ---------------------------------------------------------------------------------------------------------


def test_known_values():
    assert lq_quasinorm([3.0, -4.0], 2.0) == 5.0
    assert lq_quasinorm([1.0, 4.0, 9.0], 0.5) == 36.0
    assert sparsity_index([1.0, 4.0, 9.0], 0.5) == pytest.approx(14 / 36)
    assert pq_index([3.0, 4.0], 1.0, 2.0) == pytest.approx(1 - 2**-0.5 * 7 / 5)
    assert effective_count([3.0, 4.0], 1.0, 2.0) == pytest.approx(49 / 25)
    assert lq_quasinorm([3.0, -4.0], math.inf) == 4.0
    assert l0_count([3.0, 0.0, -4.0]) == 2
    assert weak_quasinorm([1.0, -9.0, 4.0], 0.5) == 16.0  # 1²·9, 2²·4, 3²·1
    assert weak_quasinorm([3.0, -4.0], math.inf) == 4.0
    assert normalised_sparsity_index([1.0, 4.0, 9.0], 0.5) == pytest.approx(14 / 12)
    assert numerical_sparsity([3.0, 4.0]) == pytest.approx(49 / 25)
    assert entropy_effective_count([1.0, 1.0, 2.0]) == pytest.approx(2**1.5)
    assert hoyer([3.0, 4.0]) == pytest.approx((2**0.5 - 7 / 5) / (2**0.5 - 1))
    assert gini([1.0, 3.0]) == 0.25
    assert gini([1.0, 2.0, 5.0]) == pytest.approx(1 / 3)
    assert tail_index([8.0, -4.0, 1.0], 2) == pytest.approx(2 / math.log(32))


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


@SOME
@given(w=vectors(nonzero=True), q=st.one_of(quasi_orders(), st.floats(1, 20)))
def test_weak_quasinorm_equals_its_formula(w, q):
    exact = oracles_measures.weak_quasinorm(w, q)
    if exact < 1e307:
        assert float(weak_quasinorm(w, q)) == pytest.approx(float(exact), rel=2 * norm_error(w.size, q), abs=1e-322)


@SOME
@given(w=vectors(nonzero=True), orders=rising_orders())
def test_evenness_equals_its_formula_to_its_own_accuracy(w, orders):
    p, q = orders
    with oracles.mp.workdps(60):
        exact = float(1 - oracles.pq_index(w, p, q))
    error = 8 * norm_error(w.size, p) + 1e-13
    assert float(power_sums(w, orders).evenness(p, q)) == pytest.approx(exact, rel=error, abs=1e-307)


@SOME
@given(w=vectors(nonzero=True, min_size=2))
def test_hoyer_gini_and_entropy_count_equal_their_formulas(w):
    error = 8 * norm_error(w.size, 1.0)
    assert float(hoyer(w)) == pytest.approx(float(oracles_measures.hoyer(w)), abs=4 * error)
    # Scaled entries may underflow beside the largest, which is seen only where everything else is 0.
    assert float(gini(w)) == pytest.approx(float(oracles_measures.gini(w)), rel=error, abs=1e-300)
    exact = float(oracles_measures.entropy_effective_count(w))
    assert float(entropy_effective_count(w)) == pytest.approx(exact, rel=4 * error)


@SOME
@given(w=vectors(nonzero=True, min_size=2), data=st.data())
def test_tail_index_equals_its_formula(w, data):
    k = data.draw(st.integers(1, w.size - 1))
    if np.count_nonzero(w) <= k:
        assert np.isnan(tail_index(w, k))
    else:
        assert float(tail_index(w, k)) == pytest.approx(float(oracles_measures.tail_index(w, k)), rel=1e-13)


@SOME
@given(w=vectors(nonzero=True), q=st.one_of(quasi_orders(), st.just(1.0)))
def test_soft_sparsity_is_never_denied_and_seldom_granted_in_error(w, q):
    exact = oracles.quasinorm(w, q)
    if not 1e-300 < exact < 1e300:
        return
    above, below = np.nextafter(float(exact), np.inf), float(exact) * (1 - 20 * norm_error(w.size, q) - 1e-11)
    assert is_softly_sparse(w, above, q)
    assert not is_softly_sparse(w, below, q)
    assert is_softly_sparse(w, above, min(1.0, 1.5 * q))  # the balls grow with the order


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


@SOME
@given(w=vectors(nonzero=True), q=quasi_orders())
def test_every_other_measure_stays_in_its_range(w, q):
    d, nonzeros = w.size, np.count_nonzero(w)
    assert l0_count(w) == nonzeros
    assert 1 <= float(numerical_sparsity(w)) <= nonzeros
    assert 1 <= float(entropy_effective_count(w)) <= nonzeros
    assert 0 <= float(gini(w)) <= 1 - 1 / d
    assert d == 1 or 0 <= float(hoyer(w)) <= 1
    if q >= 0.05:
        most = d ** (1 / q - 1)
        assert 1 <= float(normalised_sparsity_index(w, q)) <= most * (1 + 8 * norm_error(d, q))


@SOME
@given(w=moderate, q=st.floats(0.1, 8))
def test_weak_quasinorm_lies_between_the_largest_entry_and_the_quasinorm(w, q):
    assert np.abs(w).max() <= weak_quasinorm(w, q) * (1 + norm_error(1, q))
    assert weak_quasinorm(w, q) <= lq_quasinorm(w, q) * (1 + 2 * norm_error(w.size, q))


def test_extremes_of_each_measure():
    flat, one_hot = np.full(8, -2.5), np.eye(8)[3]
    assert sparsity_index(one_hot, 0.5) == 1
    assert sparsity_index(flat, 0.5) == pytest.approx(1 / 8)
    assert pq_index(flat, 0.5, 1.0) == 0
    assert pq_index(one_hot, 0.5, 1.0) == pytest.approx(7 / 8)
    assert effective_count(flat, 0.5, 1.0) == pytest.approx(8)
    assert effective_count(one_hot, 0.5, 1.0) == 1
    assert numerical_sparsity(flat) == pytest.approx(8)
    assert entropy_effective_count(flat) == pytest.approx(8)
    assert numerical_sparsity(one_hot) == entropy_effective_count(one_hot) == 1
    assert normalised_sparsity_index(flat, 0.5) == pytest.approx(1)
    assert normalised_sparsity_index(one_hot, 0.5) == pytest.approx(8)
    assert hoyer(flat) == gini(flat) == 0
    assert hoyer(one_hot) == 1
    assert gini(one_hot) == 7 / 8
    assert weak_quasinorm(flat, 0.5) == pytest.approx(2.5 * 64)
    assert weak_quasinorm(one_hot, 0.5) == 1


# --- invariances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
@SOME
@given(w=moderate, q=usual_orders, shift=st.integers(-400, 400))
def test_powers_of_two_scale_exactly(name, w, q, shift):
    before, after = MEASURES[name](w, q), MEASURES[name](np.ldexp(w, shift), q)
    np.testing.assert_array_equal(after, np.ldexp(before, shift) if name in SCALING else before)


@pytest.mark.parametrize("name", MEASURES)
@SOME
@given(w=moderate, q=usual_orders, factor=st.floats(1e-100, 1e100))
def test_any_factor_scales_to_rounding(name, w, q, factor):
    before, after = MEASURES[name](w, q), MEASURES[name](w * factor, q)
    assert close(name, after / factor if name in SCALING else after, before, w, q)


@pytest.mark.parametrize("name", MEASURES)
@SOME
@given(w=moderate, q=usual_orders, seed=st.integers(0, 2**32 - 1))
def test_order_does_not_matter(name, w, q, seed):
    assert close(name, MEASURES[name](np.random.default_rng(seed).permutation(w), q), MEASURES[name](w, q), w, q)


@pytest.mark.parametrize("name", MEASURES)
@SOME
@given(w=vectors(families=MODERATE, nonzero=True), q=usual_orders)
def test_signs_do_not_matter(name, w, q):
    np.testing.assert_array_equal(MEASURES[name](-w, q), MEASURES[name](w, q))
    np.testing.assert_array_equal(MEASURES[name](np.abs(w), q), MEASURES[name](w, q))


# --- the table of invariances in docs/measures.md -------------------------------------------------------------------

BY_NAME = MEASURES | {"lq_quasinorm": MEASURES["quasinorm"], "tail_index": lambda w, q, k=2: tail_index(w, k)}
# What a cell says of the measure before and after: the factor between them, or a relation.
FACTORS = {
    "same": lambda m, q: 1.0,
    "same with m·k": lambda m, q: 1.0,
    "× c": lambda m, q: m,
    "× m": lambda m, q: m,
    "× m^(1/q)": lambda m, q: m ** (1 / q),
    "× m^(1−1/q)": lambda m, q: m ** (1 - 1 / q),
}
RELATIONS = {
    "rises": lambda before, after: after > before,
    "never falls": lambda before, after: after >= before - 1e-12,
    "never rises": lambda before, after: after <= before + 1e-12,
}


def _table():
    section = TEXT[TEXT.index("## What they ignore") : TEXT.index("## The six criteria")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    return [(row[0].strip("`"), change, cell) for row in rows for change, cell in zip(CHANGES, row[2:], strict=True)]


CHANGES = {
    "factor": lambda w, m: w * float(m),
    "order, signs": lambda w, m: -np.random.default_rng(m).permutation(w),
    "zeros": lambda w, m: np.append(w, np.zeros(m)),
    "copies": lambda w, m: np.tile(w, m),
}


def test_the_table_names_every_measure():
    assert {name for name, _, _ in _table()} == set(BY_NAME) - {"quasinorm"}


@pytest.mark.parametrize(("name", "change", "cell"), _table())
@settings(max_examples=25, deadline=None)
@given(w=vectors(min_size=3, families=MODERATE, nonzero=True), q=usual_orders, m=st.integers(2, 5))
def test_every_cell_of_the_table_holds(name, change, cell, w, q, m):
    w = w / np.abs(w).max()
    if name == "tail_index":
        magnitudes = np.sort(np.abs(w))
        assume(magnitudes[-3] > 0 and magnitudes[-1] > 1.001 * magnitudes[-3])
    before = float(BY_NAME[name](w, q))
    changed = CHANGES[change](w, m)
    after = float(BY_NAME[name](changed, q, 2 * m) if cell == "same with m·k" else BY_NAME[name](changed, q))
    if cell in FACTORS:
        assert close(name, after, before * FACTORS[cell](m, q), changed, q)
    else:
        assert RELATIONS[cell](before, after)


@SOME
@given(w=moderate, q=usual_orders, zeros=st.integers(1, 9))
def test_appended_zeros_change_the_other_indexes_by_known_factors(w, q, zeros):
    more, ratio = np.append(w, np.zeros(zeros)), (w.size + zeros) / w.size
    expected = normalised_sparsity_index(w, q) * ratio ** (1 / q - 1)
    assert close("normalised_sparsity_index", normalised_sparsity_index(more, q), expected, more, q)
    assert close("gini", 1 - gini(more), (1 - gini(w)) / ratio, more, 1.0)


# --- monotone in magnitudes and orders ------------------------------------------------------------------------------


@SOME
@given(w=moderate, q=st.floats(0.1, 0.7), factor=st.floats(1.1, 3))
def test_measures_are_monotone_in_their_order(w, q, factor):
    higher, allowed = min(q * factor, 0.99), 1 + 20 * norm_error(w.size, q)
    assert weak_quasinorm(w, higher) <= weak_quasinorm(w, q) * allowed
    assert sparsity_index(w, q) <= sparsity_index(w, higher) * allowed
    assert normalised_sparsity_index(w, higher) <= normalised_sparsity_index(w, q) * allowed
    assert l0_count(w) >= effective_count(w, q, 1.0) / allowed


@SOME
@given(w=moderate, orders=rising_orders(0.1, 3.0), factor=st.floats(1.1, 3))
def test_pq_index_and_effective_count_are_monotone_in_both_orders(w, orders, factor):
    p, q = orders
    assume(q > 1.01 * p)
    allowed = 40 * norm_error(w.size, p / factor) * (q + p) / (q - p)
    assert pq_index(w, p, q) <= pq_index(w, p, q * factor) + allowed
    assert pq_index(w, p, q) <= pq_index(w, p / factor, q) + allowed
    assert effective_count(w, p, q * factor) <= effective_count(w, p, q) * (1 + allowed)
    assert effective_count(w, p, q) <= effective_count(w, p / factor, q) * (1 + allowed)


@SOME
@given(w=moderate, q=usual_orders, share=st.floats(0.01, 1), data=st.data())
def test_norms_rise_with_every_magnitude(w, q, share, data):
    i = data.draw(st.integers(0, w.size - 1))
    larger = np.abs(w)
    larger[i] += share * larger.max()
    for measure in (lq_quasinorm, weak_quasinorm):
        assert measure(larger, q) >= measure(w, q) * (1 - 4 * norm_error(w.size, q))


@SOME
@given(w=moderate)
def test_the_family_is_one(w):
    count = float(numerical_sparsity(w))
    assert count == float(effective_count(w, 1.0, 2.0))
    error = 20 * norm_error(w.size, 1.0)
    assert count == pytest.approx(float((lq_quasinorm(w, 1.0) / lq_quasinorm(w, 2.0)) ** 2), rel=error)
    limit = float(effective_count(w, 1 - 1e-5, 1 + 1e-5))
    assert float(entropy_effective_count(w)) == pytest.approx(limit, rel=1e-4)
    if w.size > 1:
        index = float(pq_index(w, 1.0, 2.0)) / (1 - w.size**-0.5)
        assert float(hoyer(w)) == pytest.approx(index, rel=error, abs=error)
    assert float(normalised_sparsity_index(w, 0.5)) == pytest.approx(1 / (1 - float(pq_index(w, 0.5, 1.0))), rel=1e-9)
    assert float(power_sums(w, (0.5, 1.0)).evenness(0.5, 1.0)) == pytest.approx(1 - float(pq_index(w, 0.5, 1.0)))


def test_pq_index_and_effective_count_are_two_forms_of_one():
    w = np.random.default_rng(0).normal(size=50)
    assert effective_count(w, 0.5, 1.0) == pytest.approx(50 * (1 - pq_index(w, 0.5, 1.0)))
    assert sparsity_index(w, 0.5) * 50 == pytest.approx(1 / (1 - pq_index(w, 0.5, 1.0)))


# --- arrays, pooling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MEASURES, "tail_index"])
def test_an_axis_is_measured_vector_by_vector(name):
    w = np.random.default_rng(1).normal(size=(3, 4, 5))
    for axis in range(3):
        expected = np.apply_along_axis(lambda v: BY_NAME[name](v, 0.5), axis, w)
        by_axis = {
            "quasinorm": lq_quasinorm(w, 0.5, axis=axis),
            "weak_quasinorm": weak_quasinorm(w, 0.5, axis=axis),
            "sparsity_index": sparsity_index(w, 0.5, axis=axis),
            "normalised_sparsity_index": normalised_sparsity_index(w, 0.5, axis=axis),
            "pq_index": pq_index(w, 0.5, 1.0, axis=axis),
            "effective_count": effective_count(w, 0.5, 1.0, axis=axis),
            "l0_count": l0_count(w, axis=axis),
            "numerical_sparsity": numerical_sparsity(w, axis=axis),
            "entropy_effective_count": entropy_effective_count(w, axis=axis),
            "hoyer": hoyer(w, axis=axis),
            "gini": gini(w, axis=axis),
            "tail_index": tail_index(w, 2, axis=axis),
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


@pytest.mark.parametrize("name", [*MEASURES, "tail_index"])
def test_the_zero_vector_measures_as_documented(name):
    written = "lq_quasinorm" if name == "quasinorm" else name
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{written}("))
    np.testing.assert_equal(float(BY_NAME[name](np.zeros(3), 0.5)), float(row.split("|")[-2]))


def test_zero_vectors_pool_to_zero():
    assert power_sums(np.zeros((2, 3)), (0.5,)).pooled().quasinorm(0.5) == 0


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-300, 1.0, 1e300, 1.7e308 / 4])
def test_flat_vector_at_any_scale(scale):
    w = np.full(4, scale)
    assert lq_quasinorm(w, 2.0) == pytest.approx(2 * scale, rel=1e-15, abs=0)
    assert sparsity_index(w, 0.5) == pytest.approx(0.25, rel=1e-14)
    assert pq_index(w, 0.5, 1.0) == pytest.approx(0, abs=1e-15)
    assert effective_count(w, 0.5, 1.0) == pytest.approx(4, rel=1e-14)
    assert weak_quasinorm(w, 2.0) == pytest.approx(2 * scale, rel=1e-15, abs=0)
    assert normalised_sparsity_index(w, 0.5) == pytest.approx(1)
    assert numerical_sparsity(w) == entropy_effective_count(w) == l0_count(w) == 4
    assert hoyer(w) == gini(w) == 0
    assert tail_index(w, 3) == math.inf
    assert is_softly_sparse(w, 4 * scale, 1.0)
    assert not is_softly_sparse(w, 3 * scale, 1.0)


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


def test_one_entry_alone():
    assert np.isnan(hoyer([3.0]))  # neither flat nor one of many
    assert gini([3.0]) == 0
    assert numerical_sparsity([3.0]) == entropy_effective_count([3.0]) == l0_count([-3.0]) == 1
    assert weak_quasinorm([-3.0], 0.5) == 3
    with pytest.raises(ValueError, match="d >= 2"):
        tail_index([3.0], 1)


def test_tail_index_of_ties_and_zeros():
    assert tail_index([2.0, 2.0, -2.0, 1.0], 2) == math.inf
    assert tail_index([4.0, 2.0, 2.0, 1.0], 2) == pytest.approx(2 / math.log(2))
    assert np.isnan(tail_index([4.0, 2.0, 0.0, 0.0], 2))
    assert tail_index([1e300, 1e-300], 1) == pytest.approx(1 / (600 * math.log(10)), rel=1e-14)
    assert tail_index([1 + 2**-52, 1.0], 1) == pytest.approx(2.0**52, rel=1e-15)


def test_tail_index_estimates_that_of_a_pareto_sample():
    w = np.random.default_rng(0).pareto(1.5, size=100_000) + 1
    assert float(tail_index(w, 5000)) == pytest.approx(1.5, abs=5 * 1.5 / 5000**0.5)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (3, ValueError), (1.0, TypeError), (True, TypeError)])
def test_tail_index_refuses_tails_that_are_none(k, error):
    with pytest.raises(error, match="k"):
        tail_index([3.0, 2.0, 1.0], k)


def test_gini_of_near_ties_is_accurate_relative_to_itself():
    w = np.array([1 + 3 * 2**-52, 1.0, 1 + 2**-52])
    assert float(gini(w)) == pytest.approx(float(oracles_measures.gini(w)), rel=1e-15)


def test_flat_vectors_with_a_radius_of_their_own_norm_are_inside():
    assert is_softly_sparse(np.ones(4), 16.0, 0.5)
    assert not is_softly_sparse(np.ones(4), 15.999, 0.5)
    assert is_softly_sparse(np.ones(10), 1e300, 1e-2) == (10.0**100 <= 1e300)
    assert not is_softly_sparse(np.ones(10), 1e300, 1e-3)  # 10^1000 is beyond float64, but not beyond its logarithm
    assert is_softly_sparse(np.zeros(3), 0.0, 0.5)
    assert not is_softly_sparse([5e-324], 0.0, 0.5)
    np.testing.assert_array_equal(is_softly_sparse(np.diag([1.0, 2.0]), 1.5, 0.5, axis=0), [True, False])


@pytest.mark.parametrize(
    ("radius", "q", "error"),
    [
        (-1.0, 0.5, ValueError),
        (math.inf, 0.5, ValueError),
        (math.nan, 0.5, ValueError),
        (1.0, 1.5, ValueError),
        (1.0, 0.0, ValueError),
        (1.0, math.inf, ValueError),
        ([1.0], 0.5, TypeError),
        ("1", 0.5, TypeError),
    ],
)
def test_soft_sparsity_needs_a_radius_and_an_order_up_to_one(radius, q, error):
    with pytest.raises(error, match=r"radius|q="):
        is_softly_sparse([1.0], radius, q)


def test_overflow_is_named_where_a_measure_exceeds_float64():
    with pytest.raises(OverflowError, match=r"q=0\.001"):
        weak_quasinorm(np.ones(10), 0.001)
    with pytest.raises(OverflowError, match=r"q=0\.001.*pq_index"):
        normalised_sparsity_index(np.eye(10)[0], 0.001)
    assert pq_index(np.eye(10)[0], 0.001, 1.0) == 1
    assert normalised_sparsity_index(np.ones(10), 0.001) == pytest.approx(1)


@pytest.mark.parametrize("q", ["0.5", [0.5], None, True, np.array([0.5]), 0.5j])
def test_order_that_is_no_number_is_a_type_error(q):
    for measure in WITH_ORDER.values():
        with pytest.raises(TypeError, match="must be one real number"):
            measure([1.0, 2.0], q)


@pytest.mark.parametrize("q", [0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-9, 501])
def test_order_out_of_range_is_a_value_error(q):
    for name, measure in WITH_ORDER.items():
        if q == math.inf and name in SCALING:
            continue
        with pytest.raises(ValueError, match=r"q|p"):
            measure([1.0, 2.0], q)


@pytest.mark.parametrize("q", [1.0, 1.5])
def test_sparsity_index_needs_an_order_below_one(q):
    for measure in (sparsity_index, normalised_sparsity_index):
        with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
            measure([1.0], q)


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


@pytest.mark.parametrize("p", [1e-6, 0.3, 1.0])
def test_measures_of_one_entry_are_exact(p):
    assert pq_index([3.0], p, 500.0) == 0
    assert normalised_sparsity_index([7.0, 0.0, 0.0], 0.1) <= 3.0**9
    assert pq_index([7.0, 0.0, 0.0], 0.5, 1.0) == pytest.approx(1 - 1 / 3, abs=1e-15)


def test_the_quasinorm_is_never_below_the_largest_entry():
    assert lq_quasinorm([1e300, 1e-300], 0.3) >= 1e300


def test_orders_that_leave_nothing_but_rounding_are_refused():
    w = np.arange(1, 1001.0)
    with pytest.raises(ValueError, match="too near each other"):
        effective_count(w, 1.0, 1 + 2**-48)
    limit = entropy_effective_count(w)
    assert effective_count(w, 1.0, 1 + 1e-8) == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize(("axis", "error"), [(1.5, TypeError), (None, TypeError), (True, TypeError), (3, ValueError)])
def test_an_axis_that_is_none_is_refused_by_name(axis, error):
    with pytest.raises(error, match="axis"):
        gini(np.ones((2, 2)), axis=axis)


def test_what_is_no_array_or_beyond_float64_is_refused_by_name():
    with pytest.raises(ValueError, match="w is no array"):
        gini([[1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="q is beyond float64"):
        lq_quasinorm([1.0], 10**400)
