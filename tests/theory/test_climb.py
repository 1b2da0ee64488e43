"""The climb must rise where rising is possible, and leave its start alone."""

import copy
from itertools import islice

import numpy as np
import pytest

from ellq.theory.climb import climb


def climbed(objective, start, steps, seed=0):
    """The best case and ratio after that many steps, by the protocol the attack uses."""
    walk = climb(start, objective(start), np.random.default_rng(seed))
    best, case = (objective(start), start), next(walk)
    for _ in range(steps):
        ratio = objective(case)
        if ratio is not None and ratio > best[0]:
            best = (ratio, case)
        case = walk.send(ratio)
    return best


def test_finds_the_maximum_of_a_smooth_function_of_many_magnitudes():
    target = np.exp(np.linspace(-2, 2, 12))

    def objective(case):
        return 1 / (1 + np.sum(np.log(case["w"] / target) ** 2)) if case["w"].all() else None

    ratio, case = climbed(objective, {"w": np.ones(12)}, 3000)
    assert ratio > 0.99
    np.testing.assert_allclose(case["w"], target, rtol=0.1)


def test_finds_the_best_count_far_away():
    ratio, case = climbed(lambda case: 1 / (1 + abs(case["k"] - 700)), {"k": 3}, 500)
    assert (ratio, case["k"]) == (1.0, 700)


def test_reaches_floats_in_lists_of_tuples_of_arrays():
    start = {"layers": [(np.ones((2, 2)), np.ones(2)), (np.ones((1, 2)), np.zeros(1))], "scale": 1.0}

    def objective(case):
        parts = [a for pair in case["layers"] for a in pair]
        return 1 / (1 + sum(np.sum(np.log(a[a != 0] / 3) ** 2) for a in parts) + np.log(case["scale"] / 3) ** 2)

    ratio, case = climbed(objective, start, 3000)
    assert ratio > 0.9
    assert case["layers"][1][1][0] == 0  # a zero has no magnitude to scale


def test_does_not_change_its_start_nor_anything_it_yielded():
    start = {"layers": [(np.ones((2, 2)), np.ones(2))], "w": np.ones(3), "q": 0.5, "k": 2, "name": "D1", "flag": True}
    kept = copy.deepcopy(start)
    walk = climb(start, 0.0, np.random.default_rng(0))
    case, yielded = next(walk), []
    for number in range(300):
        yielded.append((case, copy.deepcopy(case)))
        case = walk.send(None if number % 3 == 0 else float(number))
    for now, then in [(start, kept), *yielded]:
        np.testing.assert_equal(now, then)


def test_leaves_names_flags_and_index_arrays_alone():
    start = {"name": "D1", "flag": True, "indices": np.array([0, 2]), "w": np.ones(3)}
    for case in islice(_answered(climb(start, 0.0, np.random.default_rng(0))), 200):
        assert case["name"] == "D1"
        assert case["flag"] is True
        assert case["indices"] is start["indices"]


def _answered(walk):
    case = next(walk)
    while True:
        yield case
        case = walk.send(0.0)


@pytest.mark.parametrize("ratio", [0.0, float("inf")])
def test_goes_on_where_there_is_no_slope(ratio):
    walk = climb({"w": np.ones(4), "k": 1}, ratio, np.random.default_rng(0))
    assert len(list(islice(_answered(walk), 100))) == 100


def test_stays_finite_at_the_largest_magnitudes():
    for case in islice(_answered(climb({"w": np.full(3, 1.7e308)}, 0.5, np.random.default_rng(0))), 300):
        assert np.isfinite(case["w"]).all()
