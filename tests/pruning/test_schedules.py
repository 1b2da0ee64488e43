from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellq.pruning.schedules import SCHEDULES, cubic, geometric, one_shot


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 40), st.floats(1e-6, 1 - 1e-6))
def test_rise_to_the_sparsity_exactly(name, steps, sparsity):
    values = [SCHEDULES[name](step, steps, sparsity) for step in range(steps + 1)]
    assert values[0] == 0.0
    assert values[-1] == sparsity
    assert all(0 <= a <= b * (1 + 1e-15) for a, b in itertools.pairwise(values))


@given(st.integers(1, 40), st.floats(1e-6, 0.999))
def test_geometric_keeps_the_same_fraction_each_time(steps, sparsity):
    retained = [1 - geometric(step, steps, sparsity) for step in range(steps + 1)]
    ratios = [b / a for a, b in itertools.pairwise(retained)]
    np.testing.assert_allclose(ratios, (1 - sparsity) ** (1 / steps), rtol=1e-9)


def test_cubic_is_that_of_zhu_and_gupta():
    assert cubic(5, 10, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert cubic(5, 10, 0.8, initial=0.4) == pytest.approx(0.8 - 0.4 * 0.125)
    assert cubic(0, 10, 0.8, initial=0.4) == pytest.approx(0.4)


def test_one_shot_removes_all_at_once():
    assert [one_shot(step, 3, 0.7) for step in range(4)] == [0, 0.7, 0.7, 0.7]
