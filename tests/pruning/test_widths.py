from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellq.pruning.budget import BudgetError
from ellq.pruning.width_costs import CostModel
from ellq.pruning.widths import choose_widths


def separable(units: dict[str, int], prices: list[int], constant: int = 0) -> CostModel:
    """Every unit of a group costs the same, whatever the others are."""
    return CostModel("units", units, lambda rows: constant + (rows @ np.array(prices, dtype=float))[:, None])


def chain(units: dict[str, int]) -> CostModel:
    """A chain of Linear layers with 3 inputs and 2 outputs: products of neighbouring widths."""

    def operations(rows):
        padded = np.pad(rows.astype(float), ((0, 0), (1, 1)), constant_values=((0, 0), (3, 2)))
        return (padded[:, 1:] * padded[:, :-1]).sum(axis=1, keepdims=True)

    return CostModel("FLOPs", units, operations)


def peak(units: dict[str, int]) -> CostModel:
    """Each group is alive together with the next."""
    return CostModel("bytes", units, lambda rows: (rows + np.roll(rows, -1, axis=1)).astype(float))


KINDS = {"separable": lambda units: separable(units, [3, 1, 2][: len(units)]), "chain": chain, "peak": peak}


@st.composite
def curves(draw, convex: bool, most: int = 5):
    """Up to three groups with integer errors, so that sums are exact."""
    found = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        losses = draw(st.lists(st.integers(0, 9), min_size=1, max_size=most))
        losses = sorted(losses) if convex else losses
        found[name] = np.cumsum([0, *losses])[::-1].astype(float)
    return found


budgets = st.integers(5, 95).map(lambda percent: percent / 100)


def units_of(found: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: len(curve) - 1 for name, curve in found.items()}


def error(found: dict[str, np.ndarray], widths: dict[str, int]) -> float:
    return sum(curve[widths[name]] for name, curve in found.items())


def limit_of(cost: CostModel, budget: float) -> Fraction:
    return Fraction(repr(budget)) * Fraction(cost.dense)


def every_choice(units: dict[str, int]):
    return (
        dict(zip(units, widths, strict=True))
        for widths in itertools.product(*(range(1, number + 1) for number in units.values()))
    )


def least_error(found: dict[str, np.ndarray], cost: CostModel, limit: Fraction) -> float:
    """The optimum, by trying everything."""
    return min((error(found, w) for w in every_choice(cost.units) if cost.cost(w) <= limit), default=np.inf)


class TestAgainstTryingEverything:
    @settings(max_examples=150, deadline=None)
    @given(curves(convex=True), budgets, st.lists(st.integers(1, 4), min_size=3, max_size=3))
    def test_convex_curves_lose_at_most_a_unit_to_the_optimum(self, found, budget, prices):
        units = units_of(found)
        cost = separable(units, prices[: len(units)])
        limit = limit_of(cost, budget)
        try:
            widths = choose_widths(found, cost, budget=budget)
        except BudgetError:
            assert least_error(found, cost, limit) == np.inf
            return
        assert cost.cost(widths) <= limit
        optimum = least_error(found, cost, limit)
        assert optimum <= error(found, widths) <= least_error(found, cost, limit - max(prices[: len(units)]))

    @settings(max_examples=100, deadline=None)
    @given(curves(convex=True), budgets)
    def test_convex_curves_and_equal_prices_give_the_optimum(self, found, budget):
        cost = separable(units_of(found), [1] * len(found))
        try:
            widths = choose_widths(found, cost, budget=budget)
        except BudgetError:
            return
        assert error(found, widths) == least_error(found, cost, limit_of(cost, budget))

    @pytest.mark.parametrize("kind", KINDS)
    @settings(max_examples=60, deadline=None)
    @given(found=curves(convex=False), budget=budgets)
    def test_any_curves_and_costs_keep_the_budget_and_leave_no_room(self, kind, found, budget):
        cost = KINDS[kind](units_of(found))
        limit = limit_of(cost, budget)
        if least_error(found, cost, limit) == np.inf:
            with pytest.raises(BudgetError) as refused:
                choose_widths(found, cost, budget=budget)
            nearest = refused.value.nearest
            assert nearest > budget
            if nearest < 1:
                assert set(choose_widths(found, cost, budget=nearest).values()) == {1}
            return
        widths = choose_widths(found, cost, budget=budget)
        assert cost.cost(widths) <= limit
        assert all(1 <= widths[name] <= number for name, number in cost.units.items())
        for name, number in cost.units.items():
            for wider in range(widths[name] + 1, number + 1):
                better = found[name][wider] < found[name][widths[name]]
                assert not (better and cost.cost(widths | {name: wider}) <= limit)

    def test_the_chain_is_close_to_the_optimum_on_average(self):
        random = np.random.default_rng(0)
        ratios = []
        for _ in range(40):
            found = {name: np.sort(random.random(8) ** 3)[::-1] for name in "abc"}
            cost = chain(units_of(found))
            got = error(found, choose_widths(found, cost, budget=0.5))
            ratios.append(got / least_error(found, cost, limit_of(cost, 0.5)))
        assert np.mean(ratios) < 1.05


class TestWidths:
    def test_what_loses_nothing_goes_first(self):
        found = {"a": np.array([9.0, 4.0, 2.0, 1.0, 0.0]), "b": np.array([9.0, 9.0, 0.0, 0.0, 0.0])}
        assert choose_widths(found, separable({"a": 4, "b": 4}, [1, 1]), budget=0.75) == {"a": 4, "b": 2}

    def test_are_multiples_unless_dense(self):
        found = {name: np.linspace(1, 0, 11) * scale for name, scale in (("a", 1), ("b", 9))}
        cost = separable({"a": 10, "b": 10}, [1, 1])
        assert choose_widths(found, cost, budget=0.7, round_to=4) == {"a": 4, "b": 10}
        assert choose_widths(found, cost, budget=0.5, round_to=4) == {"a": 4, "b": 4}

    def test_are_the_least_where_only_all_steps_together_save(self):
        found = {"a": np.linspace(1, 0, 5), "b": np.linspace(1, 0, 5)}

        def both(widths):  # costs less only once both are narrow
            return np.where((widths <= 1).all(axis=1), 1.0, 4.0)[:, None]

        cost = CostModel("seconds", {"a": 4, "b": 4}, both)
        assert choose_widths(found, cost, budget=0.5) == {"a": 1, "b": 1}

    def test_keep_the_least(self):
        found = {"a": np.zeros(11), "b": np.zeros(3)}
        cost = separable({"a": 10, "b": 2}, [1, 1])
        assert choose_widths(found, cost, budget=0.5, least=3) == {"a": 4, "b": 2}
        assert choose_widths(found, cost, budget=0.9, least=3, round_to=4) == {"a": 8, "b": 2}
        with pytest.raises(BudgetError) as refused:
            choose_widths(found, cost, budget=0.4, least=3)
        assert refused.value.nearest == 5 / 12

    def test_groups_without_a_curve_stay_dense(self):
        cost = separable({"a": 4, "b": 4}, [1, 1])
        assert choose_widths({"b": np.zeros(5)}, cost, budget=0.75) == {"a": 4, "b": 2}
        with pytest.raises(BudgetError, match="least widths need 5"):
            choose_widths({"b": np.zeros(5)}, cost, budget=0.5)
        with pytest.raises(BudgetError, match="least widths need 8"):
            choose_widths({}, cost, budget=0.5)

    def test_ties_go_to_the_earlier_group(self):
        cost = separable({"b": 4, "a": 4}, [1, 1])
        found = {name: np.arange(4.0, -1, -1) for name in "ab"}
        assert choose_widths(found, cost, budget=0.7) == {"b": 1, "a": 4}
        assert choose_widths(dict(reversed(found.items())), cost, budget=0.7) == {"b": 1, "a": 4}

    def test_savings_are_those_at_the_current_widths(self):
        # Once a is narrow, b is cheap, and taking more of b no longer pays.
        found = {"a": np.array([99.0, 0, 0, 0, 0, 0, 0, 0, 0]), "b": np.arange(8.0, -1, -1)}
        assert choose_widths(found, chain({"a": 8, "b": 8}), budget=0.3) == {"a": 1, "b": 8}

    def test_a_step_that_overshoots_is_filled_up(self):
        # On the hull of a only 0, 1 and 8 lie; after the jump to 1 there is room up to 5.
        found = {"a": np.array([9.0, 8.9, 8.8, 8.7, 8.6, 8.5, 8.45, 8.4, 0])}
        assert choose_widths(found, separable({"a": 8}, [1]), budget=0.7) == {"a": 5}

    def test_flat_and_noisy_costs_are_stepped_over(self):
        # As latencies are: nothing is saved until half the units are gone, and less than nothing on the way.
        seconds = np.array([1.0, 1, 1, 1, 1.01, 4.2, 4.1, 4.3, 4])
        cost = CostModel("seconds", {"a": 8}, lambda rows: seconds[rows])
        assert choose_widths({"a": np.arange(8.0, -1, -1)}, cost, budget=0.5) == {"a": 4}
        with pytest.raises(BudgetError) as refused:
            choose_widths({"a": np.arange(8.0, -1, -1)}, cost, budget=0.2)
        assert refused.value.nearest == 0.25

    def test_a_peak_is_lowered_where_one_group_alone_cannot(self):
        # a and b are never alive together, and both operations are at the peak.
        cost = CostModel("bytes", {"a": 8, "b": 8}, lambda rows: rows.astype(float))
        found = {name: np.arange(8.0, -1, -1) for name in "ab"}
        assert choose_widths(found, cost, budget=0.5) == {"a": 4, "b": 4}

    def test_groups_that_are_not_at_the_peak_stay(self):
        cost = CostModel("bytes", {"a": 8, "b": 4}, lambda rows: rows.astype(float))
        found = {"a": np.arange(8.0, -1, -1), "b": np.zeros(5)}
        assert choose_widths(found, cost, budget=0.5) == {"a": 4, "b": 4}

    def test_the_budget_counts_as_typed(self):
        assert 0.29 * 100 < 29  # in binary
        assert choose_widths({"a": np.arange(100.0, -1, -1)}, separable({"a": 100}, [1]), budget=0.29) == {"a": 29}

    def test_errors_are_weighed_against_what_is_saved(self):
        # A unit of a loses twice what one of b does, and saves ten times as much.
        found = {"a": np.arange(20.0, -1, -2), "b": np.arange(20.0, -1, -1)}
        widths = choose_widths(found, separable({"a": 10, "b": 20}, [10, 1]), budget=0.9)
        assert error(found, widths) == 4

    def test_what_a_step_saves_beyond_need_counts(self):
        # Found by trying at random: counting only what is needed would end at an error of 81.
        a = np.array([111.0, 84, 60, 41, 22, 8, 0])
        b = np.array([110.0, 81, 60, 41, 26, 13, 3, 1, 0])
        cost = separable({"a": 6, "b": 8}, [3, 11])
        found = {"a": a, "b": b}
        assert error(found, choose_widths(found, cost, budget=44 / cost.dense)) <= least_error(
            found, cost, Fraction(33)
        )

    def test_cliffs_are_seen_beyond_the_next_steps(self):
        # The first unit of a costs as much as the first three: 5/3 each, less than the 2 of b.
        found = {"a": np.array([60.0, 60, 60, 60, 60, 5, 5, 5, 0]), "b": np.arange(16.0, -1, -2)}
        assert choose_widths(found, separable({"a": 8, "b": 8}, [1, 1]), budget=13 / 16) == {"a": 5, "b": 8}

    def test_are_fast_for_wide_nets(self):
        random = np.random.default_rng(0)
        units = {str(number): 256 for number in range(30)}
        found = {name: np.cumsum(np.sort(random.random(257)))[::-1] for name in units}
        cost = chain(units)
        widths = choose_widths(found, cost, budget=0.5)
        step = cost.dense - cost.cost({"0": 255, "15": 255})
        assert cost.dense / 2 - step < cost.cost(widths) <= cost.dense / 2


class TestRefuses:
    @pytest.mark.parametrize(
        ("curve", "said"),
        [
            ({"b": np.zeros(5)}, "names 'b', which is no group. Groups: a"),
            ({"a": np.zeros(4)}, "curve of 'a' has 4 errors. Pass 5, for 0 to 4 units"),
            ({"a": np.array([4.0, 3, 2, np.nan, 0])}, "curve of 'a' holds nan"),
            ({"a": np.arange(5.0)}, "curve of 'a' rises by 1. Pass the error with k units retained at index k"),
            ({"a": np.zeros((5, 1))}, "curve of 'a' has 2 dimensions"),
        ],
    )
    def test_curves_of_something_else(self, curve, said):
        with pytest.raises(ValueError, match=said):
            choose_widths(curve, separable({"a": 4}, [1]), budget=0.5)

    @pytest.mark.parametrize(
        "setting", [{"budget": 0.0}, {"budget": 1.0}, {"budget": np.nan}, {"round_to": 0}, {"least": 0}]
    )
    def test_numbers_out_of_range(self, setting):
        with pytest.raises(ValueError, match=next(iter(setting))):
            choose_widths({"a": np.zeros(5)}, separable({"a": 4}, [1]), **({"budget": 0.5} | setting))

    def test_budgets_that_cannot_be_met_and_says_what_can(self):
        cost = separable({"a": 4, "b": 3}, [3, 1], constant=5)
        with pytest.raises(BudgetError, match=r"budget=0.2 leaves 4 units, but the least widths need 9") as refused:
            choose_widths({name: np.zeros(number + 1) for name, number in cost.units.items()}, cost, budget=0.2)
        assert refused.value.nearest == 9 / 20


def test_rounding_of_measured_curves_is_forgiven():
    curve = np.array([4.0, 3, 2, 2 * (1 + 1e-8), 0])
    assert choose_widths({"a": curve}, separable({"a": 4}, [1]), budget=0.5) == {"a": 2}


def test_the_same_arguments_give_the_same_widths():
    random = np.random.default_rng(0)
    found = {name: np.sort(random.random(20))[::-1] for name in "abc"}
    before = {name: curve.copy() for name, curve in found.items()}
    once, again = (choose_widths(found, chain(units_of(found)), budget=0.4) for _ in range(2))
    assert once == again
    assert all(np.array_equal(curve, before[name]) for name, curve in found.items())
