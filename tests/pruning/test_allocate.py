from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ellq.pruning.allocate import by_budget, by_tolerance, retained_of, yang2022, yang2022_budget
from ellq.theory import best_term_errors, effective_count

RELAXED = settings(max_examples=60, deadline=None)
weights = st.one_of(st.just(0.0), st.floats(-4, 4, width=16), st.sampled_from([1.0, -1.0, 1e-200, 1e150]))


@st.composite
def layers(draw, most_units=3, most_weights=4):
    shapes = draw(st.lists(st.tuples(st.integers(1, most_units), st.integers(1, most_weights)), min_size=1, max_size=3))
    return [draw(hnp.arrays(np.float64, shape, elements=weights)) for shape in shapes]


def live(units: list[np.ndarray]) -> int:
    return sum(int(layer.any(axis=1).sum()) for layer in units)


class TestRetainedOf:
    @pytest.mark.parametrize(
        ("total", "sparsity", "retained"),
        [(10, 0.9, 1), (10, 0.1, 9), (100, 0.29, 71), (1000, 0.999, 1), (7, 0.5, 3), (3, 1e-9, 2), (100, 0.07, 93)],
    )
    def test_takes_the_fraction_as_typed(self, total, sparsity, retained):
        assert retained_of(total, sparsity) == retained

    @given(st.one_of(st.integers(1, 10**9), st.integers(1, 10**5).map(lambda n: n * 10_000)), st.integers(1, 9999))
    def test_is_exact_for_four_decimals(self, total, tenthousandths):
        expected = total - math.ceil(Fraction(tenthousandths, 10_000) * total)
        assert retained_of(total, tenthousandths / 10_000) == expected


class TestByTolerance:
    @RELAXED
    @given(layers(), st.sampled_from([0.01, 0.1, 0.3, 0.7, 0.99]))
    def test_meets_the_tolerance_and_one_fewer_would_not(self, units, tol):
        for layer, counts in zip(units, by_tolerance(units, tol), strict=True):
            for w, k in zip(layer, counts, strict=True):
                errors = best_term_errors(w)
                assert errors[k] <= tol * errors[0] * (1 + 1e-12)
                if k:
                    assert errors[k - 1] > tol * errors[0] * (1 - 1e-12)

    @pytest.mark.parametrize("scale", [1e-170, 1.0, 1e150])
    def test_ignores_the_scale(self, scale):
        units = np.random.default_rng(0).standard_normal((5, 20))
        np.testing.assert_array_equal(by_tolerance([units * scale], 0.3)[0], by_tolerance([units], 0.3)[0])

    def test_keeps_nothing_of_a_zero_unit_and_something_of_others(self):
        assert by_tolerance([np.array([[0.0, 0.0], [1e-300, 0.0]])], 0.999)[0].tolist() == [0, 1]

    def test_keeps_exactly_the_boundary_case(self):
        # 3² + 4²: removing the 3 leaves a relative error of exactly 3/5.
        assert by_tolerance([np.array([[3.0, 4.0]])], 0.6)[0].tolist() == [1]
        assert by_tolerance([np.array([[3.0, 4.0]])], 0.599)[0].tolist() == [2]


def objective(units: list[np.ndarray], counts: list[tuple[int, ...]]) -> float:
    total = 0.0
    for layer, kept in zip(units, counts, strict=True):
        energy = float((layer**2).sum())
        if energy:
            total += sum(float(best_term_errors(w)[k]) ** 2 for w, k in zip(layer, kept, strict=True)) / energy
    return total


class TestByBudget:
    @RELAXED
    @given(layers(), st.floats(0, 1))
    def test_sums_to_the_budget_with_at_least_one_per_live_unit(self, units, share):
        total = sum(layer.size for layer in units)
        budget = live(units) + round(share * (total - live(units)))
        counts = by_budget(units, budget)
        assert sum(int(c.sum()) for c in counts) == budget
        for layer, kept in zip(units, counts, strict=True):
            assert (kept >= layer.any(axis=1)).all()
            assert (kept <= layer.shape[1]).all()

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_no_other_choice_is_better(self, data):
        moderate = st.floats(-4, 4, width=16)
        shapes = data.draw(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=2))
        units = [data.draw(hnp.arrays(np.float64, shape, elements=moderate)) for shape in shapes]
        total = sum(layer.size for layer in units)
        budget = data.draw(st.integers(live(units), total))
        ranges = [range(int(w.any()), layer.shape[1] + 1) for layer in units for w in layer]
        best = math.inf
        for choice in itertools.product(*ranges):
            if sum(choice) == budget:
                parts = iter(choice)
                best = min(best, objective(units, [tuple(next(parts) for _ in layer) for layer in units]))
        assert objective(units, [tuple(c) for c in by_budget(units, budget)]) <= best + 1e-12

    def test_keeps_one_of_a_unit_too_small_to_compare(self):
        assert by_budget([np.array([[1e-200, 0.0], [1e150, 1e150]])], 2)[0].tolist() == [1, 1]

    def test_serves_layers_by_their_own_size(self):
        small, large = np.array([[1.0, 0.9, 0.1]]), np.array([[1000.0, 1.0, 1.0]])
        assert [c.tolist() for c in by_budget([small, large], 3)] == [[2], [1]]

    def test_gives_ties_to_the_first(self):
        assert [c.tolist() for c in by_budget([np.ones((2, 2)), np.ones((2, 2))], 5)] == [[2, 1], [1, 1]]


class TestYang2022:
    @RELAXED
    @given(layers(), st.floats(0, 3), st.sampled_from([0.1, 0.5, 0.9]))
    def test_equals_its_formula(self, units, eta, q):
        for layer, counts in zip(units, yang2022(units, eta, q=q), strict=True):
            for w, k in zip(layer, counts, strict=True):
                m = float(effective_count(w, q, 1.0)) * (1 + eta) ** (-1 / (1 - q)) if w.any() else 0.0
                allowed = {max(math.ceil(m * (1 + e)), 1) if w.any() else 0 for e in (-1e-9, 1e-9)}
                assert min(k, w.size) == k
                assert k in {min(a, w.size) for a in allowed}

    @pytest.mark.parametrize("q", [0.1, 0.3, 0.5, 0.9])
    def test_keeps_all_equal_weights_and_none_of_the_zeros(self, q):
        units = np.where(np.arange(60) < np.arange(61)[:, None], -0.3, 0.0)
        assert yang2022([units], 0.0, q=q)[0].tolist() == list(range(61))

    @RELAXED
    @given(layers(), st.tuples(st.floats(0, 5), st.floats(0, 5)))
    def test_keeps_no_more_for_a_larger_eta(self, units, etas):
        few, many = (yang2022(units, eta, q=0.5) for eta in sorted(etas, reverse=True))
        assert all((a <= b).all() for a, b in zip(few, many, strict=True))

    @RELAXED
    @given(layers(), st.floats(0, 1), st.sampled_from([0.2, 0.5, 0.8]))
    def test_never_exceeds_a_budget(self, units, share, q):
        total = sum(layer.size for layer in units)
        budget = live(units) + round(share * (total - live(units)))
        counts, eta = yang2022_budget(units, budget, q=q)
        assert sum(int(c.sum()) for c in counts) <= budget
        assert eta >= -1
        for layer, kept in zip(units, counts, strict=True):
            assert ((kept > 0) == layer.any(axis=1)).all()

    def test_solves_for_the_least_eta(self):
        units = [np.random.default_rng(1).standard_normal((20, 30))]
        counts, eta = yang2022_budget(units, 250, q=0.5)
        np.testing.assert_array_equal(counts[0], yang2022(units, eta, q=0.5)[0])
        assert yang2022(units, eta * (1 - 1e-6), q=0.5)[0].sum() > 250
