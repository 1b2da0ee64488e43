from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ellq.analysis.flows import FlowMonitor
from ellq.analysis.gradient_flow import GradientMonitor
from ellq.pruning.epsilon import calibrate_epsilon, calibrate_epsilon_on_halves
from pruned_nets import gaussian, mlp

vectors = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=6, unique=True)


@given(vectors, st.floats(0.01, 0.99))
def test_epsilon_is_a_quantile_of_the_distances(rows, quantile):
    distances = sorted(math.dist(*pair) for pair in itertools.combinations(rows, 2))
    if distances[-1] == 0 or distances[0] < 1e-300:
        return
    epsilon = calibrate_epsilon(rows, quantile=quantile)
    assert distances[0] * (1 - 1e-12) <= epsilon <= distances[-1] * (1 + 1e-12)
    assert sum(distance <= epsilon * (1 + 1e-12) for distance in distances) >= math.floor(
        quantile * (len(distances) - 1)
    )


@given(vectors, st.floats(1e-3, 1e3), st.permutations(range(6)))
def test_epsilon_scales_and_ignores_the_order(rows, factor, order):
    shuffled = [rows[place] for place in order if place < len(rows)]
    scaled = [np.array(row) * factor for row in shuffled]
    epsilon = calibrate_epsilon(rows)
    assert calibrate_epsilon(scaled) == pytest.approx(factor * epsilon, rel=1e-9, abs=1e-300)


def test_two_vectors_have_one_distance():
    assert calibrate_epsilon([[0.0, 0.0], [3.0, 4.0]], quantile=0.1) == 5.0


class Mean:
    """A monitor whose noise is known: the mean of its inputs."""

    pairs = ("mean",)

    def __init__(self, inputs):
        self.inputs = inputs

    def __call__(self, model):
        return np.array([float(self.inputs.double().mean())])

    def identity(self):
        return {}


def test_halves_of_the_data_differ_by_as_much_as_their_noise():
    inputs = torch.from_numpy(np.random.default_rng(0).standard_normal(4000))
    epsilon = calibrate_epsilon_on_halves(Mean, nn.Identity(), inputs, quantile=0.5, repeats=400)
    assert epsilon == pytest.approx(0.6745 * 2 / math.sqrt(4000), rel=0.2)  # the median of |N(0, 4σ²/N)|


def test_halves_repeat_by_their_seed_and_share_no_example():
    seen = []

    def make(inputs):
        seen.append(set(inputs.tolist()))
        return Mean(inputs)

    inputs = torch.arange(9.0)
    first = calibrate_epsilon_on_halves(make, nn.Identity(), inputs, repeats=3, seed=1)
    state = torch.random.get_rng_state()
    assert first == calibrate_epsilon_on_halves(make, nn.Identity(), inputs, repeats=3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert len(one) == len(other) == 4
        assert not one & other


def test_halves_serve_the_monitors_of_the_analysis():
    net, inputs = mlp(4, 9, 3), gaussian(64, 4)
    labels = (inputs[:, 0] > 0).long()
    assert 0 < calibrate_epsilon_on_halves(FlowMonitor, net, inputs, repeats=3) < 1
    assert calibrate_epsilon_on_halves(GradientMonitor, net, inputs, labels, repeats=3) > 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: calibrate_epsilon([[0.0]]), "vectors holds 1"),
        (lambda: calibrate_epsilon([]), "vectors holds 0"),
        (lambda: calibrate_epsilon([[0.0], [0.0, 1.0]]), r"vectors\[1\] has 2 entries, vectors\[0\] 1"),
        (lambda: calibrate_epsilon([[0.0], [math.nan]]), r"vectors\[1\] holds nan"),
        (lambda: calibrate_epsilon([[1.0], [1.0]]), "leaves no epsilon above 0"),
        (lambda: calibrate_epsilon([[0.0], [1.0]], quantile=1.0), "quantile=1 is outside"),
        (lambda: calibrate_epsilon_on_halves(Mean, nn.Identity(), torch.ones(3)), r"lengths \[3\]"),
        (lambda: calibrate_epsilon_on_halves(Mean, nn.Identity(), torch.ones(8), torch.ones(7)), r"lengths \[8, 7\]"),
        (lambda: calibrate_epsilon_on_halves(Mean, nn.Identity()), r"lengths \[\]"),
        (lambda: calibrate_epsilon_on_halves(Mean, nn.Identity(), torch.ones(8)), "All flows are equal"),
        (lambda: calibrate_epsilon_on_halves(Mean, nn.Identity(), torch.ones(8), repeats=0), "repeats=0"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
