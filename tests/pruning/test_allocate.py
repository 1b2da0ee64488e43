from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ellq.pruning.allocate import RULES, by_tolerance, ellq, erk, exact, lamp, proportional_shares, retained_of, uniform
from ellq.pruning.layers import Layers
from ellq.theory import best_term_errors

RELAXED = settings(max_examples=30, deadline=None)
weights = st.one_of(st.just(0.0), st.floats(-4, 4, width=16), st.sampled_from([1.0, -1.0, 1e-200, 1e150]))


@st.composite
def arrays(draw, elements=weights, most_units=3, most_weights=4):
    shapes = draw(st.lists(st.tuples(st.integers(1, most_units), st.integers(1, most_weights)), min_size=1, max_size=3))
    return [draw(hnp.arrays(np.float64, shape, elements=elements)) for shape in shapes]


def live(units: list[np.ndarray]) -> int:
    return sum(int(layer.any(axis=1).sum()) for layer in units)


def squared_error(units: list[np.ndarray], counts) -> float:
    cases = [(w, k) for layer, kept in zip(units, counts, strict=True) for w, k in zip(layer, kept, strict=True)]
    return sum(float(best_term_errors(w)[k]) ** 2 for w, k in cases)


def log_loss(units: list[np.ndarray], counts) -> float:
    total = 0.0
    for layer, kept in zip(units, counts, strict=True):
        share = sum(float((np.sort(w**2)[::-1][:k]).sum()) for w, k in zip(layer, kept, strict=True)) / (layer**2).sum()
        total += -math.log(share) if share else math.inf
    return total


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
    @given(arrays(), st.sampled_from([0.01, 0.1, 0.3, 0.7, 0.99]))
    def test_meets_the_tolerance_and_one_fewer_would_not(self, units, tol):
        for layer, counts in zip(units, by_tolerance(Layers.of(units), tol).counts, strict=True):
            for w, k in zip(layer, counts, strict=True):
                errors = best_term_errors(w)
                assert errors[k] <= tol * errors[0] * (1 + 1e-12)
                if k:
                    assert errors[k - 1] > tol * errors[0] * (1 - 1e-12)

    @pytest.mark.parametrize("scale", [1e-170, 1.0, 1e150])
    def test_ignores_the_scale(self, scale):
        units = np.random.default_rng(0).standard_normal((5, 20))
        counts = [by_tolerance(Layers.of([w]), 0.3).counts[0] for w in (units * scale, units)]
        np.testing.assert_array_equal(*counts)

    def test_keeps_nothing_of_a_zero_unit_and_something_of_others(self):
        assert by_tolerance(Layers.of([np.array([[0.0, 0.0], [1e-300, 0.0]])]), 0.999).counts[0].tolist() == [0, 1]

    def test_keeps_at_least_the_minimum_that_is_there(self):
        units = np.array([[9.0, 1e-3, 1e-3, 1e-3], [9.0, 1e-3, 0.0, 0.0]])
        assert by_tolerance(Layers.of([units], least=3), 0.5).counts[0].tolist() == [3, 2]

    def test_keeps_exactly_the_boundary_case(self):
        # 3² + 4²: removing the 3 leaves a relative error of exactly 3/5.
        assert by_tolerance(Layers.of([np.array([[3.0, 4.0]])]), 0.6).counts[0].tolist() == [1]
        assert by_tolerance(Layers.of([np.array([[3.0, 4.0]])]), 0.599).counts[0].tolist() == [2]


MAGNITUDE_RULES = ["ellq", "exact", "uniform", "global", "lamp", "erk"]


class TestEveryRuleByMagnitude:
    @RELAXED
    @given(arrays(), st.sampled_from(MAGNITUDE_RULES), st.integers(0, 2), st.floats(0, 1))
    def test_meets_the_budget_exactly_and_every_minimum(self, units, rule, least, share):
        layers = Layers.of(units, least=least)
        total, held = sum(w.size for w in units), sum(int(m.sum()) for m in layers.minima)
        retained = held + round(share * (total - held))
        decided = RULES[rule].by_budget(layers, retained)
        assert sum(int(c.sum()) for c in decided.counts) == retained
        assert len(decided.reasons) == len(units)
        for layer, kept, minimum in zip(units, decided.counts, layers.minima, strict=True):
            assert (kept >= minimum).all()
            assert (kept <= layer.shape[1]).all()

    @RELAXED
    @given(arrays(), st.sampled_from(["ellq", "exact", "global", "lamp"]), st.floats(0, 1), st.floats(0, 1))
    def test_what_a_smaller_budget_keeps_a_larger_keeps_too(self, units, rule, one, other):
        layers = Layers.of(units, least=RULES[rule].least)
        total, held = sum(w.size for w in units), sum(int(m.sum()) for m in layers.minima)
        few, many = (
            RULES[rule].by_budget(layers, held + round(share * (total - held))).counts for share in sorted((one, other))
        )
        assert all((a <= b).all() for a, b in zip(few, many, strict=True))


class TestTheBest:
    @pytest.mark.parametrize("least", [0, 1])
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_no_other_choice_is_better(self, least, data):
        shapes = data.draw(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=2))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
        units = [rng.standard_normal(shape) ** 3 for shape in shapes]  # some units far smaller than others
        total = sum(layer.size for layer in units)
        budget = data.draw(st.integers(max(1, least * sum(map(len, units))), total))
        ranges = [range(least, layer.shape[1] + 1) for layer in units for w in layer]
        choices = [choice for choice in itertools.product(*ranges) if sum(choice) == budget]
        splits = []
        for choice in choices:
            parts = iter(choice)
            splits.append([tuple(next(parts) for _ in layer) for layer in units])
        given_layers = Layers.of(units, least=least)
        for rule, loss in ((ellq, log_loss), (exact, squared_error)):
            found = loss(units, rule(given_layers, budget).counts)
            assert found <= min(loss(units, split) for split in splits) + 1e-9

    def test_keeps_one_of_a_unit_too_small_to_compare(self):
        assert ellq(Layers.of([np.array([[1e-200, 0.0], [1e150, 1e150]])]), 2).counts[0].tolist() == [1, 1]

    def test_ellq_serves_layers_by_their_own_size_and_exact_does_not(self):
        units = [np.array([[1.0, 0.9, 0.1]]), np.array([[1000.0, 1.0, 1.0]])]
        assert [c.tolist() for c in ellq(Layers.of(units), 3).counts] == [[2], [1]]
        assert [c.tolist() for c in exact(Layers.of(units, least=0), 3).counts] == [[1], [2]]

    def test_gives_ties_to_the_first(self):
        assert [c.tolist() for c in ellq(Layers.of([np.ones((2, 2)), np.ones((2, 2))]), 5).counts] == [[2, 1], [1, 1]]


class TestUniform:
    def test_keeps_the_same_fraction_of_every_layer_by_magnitude(self):
        rng = np.random.default_rng(0)
        units = [rng.standard_normal((10, 20)) * 100, rng.standard_normal((5, 80))]
        counts = uniform(Layers.of(units, least=0), 150).counts
        assert [int(c.sum()) for c in counts] == [50, 100]
        for w, kept in zip(units, counts, strict=True):
            cut = np.sort(np.abs(w), axis=None)[-int(kept.sum())]
            np.testing.assert_array_equal(kept, (np.abs(w) >= cut).sum(axis=1))


class TestErk:
    def test_densities_follow_the_formula(self):
        rng = np.random.default_rng(0)
        units = [rng.standard_normal(shape) for shape in [(64, 3, 3, 3), (64, 64, 3, 3), (10, 64)]]
        retained = 4000
        shares = [int(c.sum()) for c in erk(Layers.of(units, least=0), retained).counts]
        raw = np.array([73 / 1728, 134 / 36864, 74 / 640])
        # As in RigL: layers whose density would exceed 1 are dense, the others share what is left.
        dense = np.zeros(3, dtype=bool)
        sizes = np.array([w.size for w in units])
        while True:
            scale = (retained - sizes[dense].sum()) / (raw * sizes)[~dense].sum()
            if not (scale * raw[~dense] > 1).any():
                break
            dense |= scale * raw > 1
        density = np.where(dense, 1.0, scale * raw)
        np.testing.assert_allclose(shares, density * sizes, atol=1)
        assert dense.tolist() == [False, False, True]


class TestLamp:
    @RELAXED
    @given(arrays(elements=st.floats(-4, 4, width=16).filter(bool)), st.floats(0, 1))
    def test_keeps_the_largest_scores_of_the_formula(self, units, share):
        retained = round(share * sum(w.size for w in units))
        counts = lamp(Layers.of(units, least=0), retained).counts
        scores, kept = [], []
        for w, own in zip(units, counts, strict=True):
            flat = np.abs(w).ravel()
            order = np.argsort(-flat, kind="stable")
            tails = np.empty_like(flat)
            tails[order] = np.cumsum(flat[order] ** 2)
            score = flat**2 / tails
            mask = np.zeros(flat.size, dtype=bool)
            mask[np.argsort(-score, kind="stable")[: int(own.sum())]] = True
            # Within a layer the largest magnitudes have the largest scores.
            np.testing.assert_array_equal(mask.reshape(w.shape).sum(axis=1), own)
            scores.append(score)
            kept.append(mask)
        score, mask = np.concatenate(scores), np.concatenate(kept)
        if mask.any() and not mask.all():
            assert score[mask].min() >= score[~mask].max() * (1 - 1e-12)

    def test_keeps_one_weight_of_every_layer_whatever_its_scale(self):
        units = [np.array([[1e-9, 1e-10]]), np.array([[5.0, 4.0]])]
        assert [int(c.sum()) for c in lamp(Layers.of(units, least=0), 2).counts] == [1, 1]


class TestProportionalShares:
    @RELAXED
    @given(st.data())
    def test_sum_to_the_total_within_their_limits(self, data):
        n = data.draw(st.integers(1, 6))
        parts = [data.draw(st.lists(st.integers(0, 40), min_size=n, max_size=n)) for _ in range(2)]
        minima = [min(pair) for pair in zip(*parts, strict=True)]
        sizes = [max(*pair, 1) for pair in zip(*parts, strict=True)]
        weights = data.draw(st.lists(st.floats(0.1, 100), min_size=n, max_size=n))
        total = data.draw(st.integers(sum(minima), sum(sizes)))
        shares = proportional_shares(weights, total, sizes=sizes, minima=minima)
        assert sum(shares) == total
        assert all(low <= share <= high for low, share, high in zip(minima, shares, sizes, strict=True))
        free = [(s, w) for s, w, low, high in zip(shares, weights, minima, sizes, strict=True) if low < s < high]
        for (a, u), (b, v) in itertools.combinations(free, 2):
            assert abs(a * v - b * u) <= 2 * max(u, v)

    def test_are_exact_where_they_are_whole(self):
        assert proportional_shares([1, 2, 3], 60, sizes=[100] * 3, minima=[0] * 3) == [10, 20, 30]
