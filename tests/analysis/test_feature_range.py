from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ellq.analysis.feature_range import feature_bounds, feature_norm_bound

ACTIVATIONS = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
)


def layer(rng: np.random.Generator, inputs: int, units: int, bias: bool, scale: float) -> nn.Linear:
    made = nn.Linear(inputs, units, bias=bias).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.from_numpy(scale * rng.standard_normal(parameter.shape)))
    return made


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs, units = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    made = layer(rng, inputs, units, draw(st.booleans()), draw(st.sampled_from([1e-3, 1.0, 1e3])))
    low, high = sorted(rng.standard_normal(2) * draw(st.sampled_from([0.0, 1.0, 10.0])) + draw(st.sampled_from([0, 5])))
    return made, draw(st.sampled_from(ACTIVATIONS))(), float(low), float(high), rng


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_input_in_the_box_exceeds_the_bounds(case):
    made, activation, low, high, rng = case
    corners = list(itertools.product((low, high), repeat=made.in_features))
    inputs = np.vstack([corners, rng.uniform(low, high, (50, made.in_features))])
    with torch.no_grad():
        features = activation(made(torch.from_numpy(inputs))).numpy()
    assert (np.abs(features).max(axis=0) <= feature_bounds(made, activation, low, high)).all()
    assert np.linalg.norm(features, axis=1).max() <= feature_norm_bound(made, activation, low, high)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_of_a_rising_function_some_corner_attains_the_bound(case):
    made, activation, low, high, _ = case
    if isinstance(activation, nn.GELU | nn.SiLU | nn.Mish):
        return
    corners = torch.tensor(list(itertools.product((low, high), repeat=made.in_features)), dtype=torch.float64)
    with torch.no_grad():
        reached = activation(made(corners)).abs().amax(0).numpy()
    bounds = feature_bounds(made, activation, low, high)
    # Cancellation in w·x + v is covered by an absolute allowance.
    size = float(made.weight.detach().abs().sum()) * (abs(low) + abs(high)) + 1e3
    np.testing.assert_allclose(bounds, reached, rtol=1e-12, atol=1e-13 * size)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [(nn.Tanh(), 1.0), (nn.Sigmoid(), 1.0), (nn.ReLU6(), 6.0), (nn.ReLU(), math.inf), (nn.GELU(), math.inf)],
)
def test_an_unbounded_box_leaves_what_the_function_bounds(activation, expected):
    made = layer(np.random.default_rng(0), 3, 4, True, 1.0)
    np.testing.assert_allclose(feature_bounds(made, activation, -math.inf, math.inf), expected, rtol=1e-12)
    norm = feature_norm_bound(made, activation, -math.inf, math.inf)
    assert norm == pytest.approx(2 * expected) if math.isfinite(expected) else norm == math.inf


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Mish()])
def test_the_dip_left_of_zero_is_covered_and_no_deeper_than_said(activation):
    made = nn.Linear(1, 1).double()
    with torch.no_grad():
        made.weight.fill_(1.0)
        made.bias.fill_(-1.0)
    values = activation(torch.linspace(-5, 0, 100_001).double()).detach()
    bound = feature_bounds(made, activation, -4.0, 1.0)[0]
    assert float(values.abs().max()) <= bound <= 1.001 * float(values.abs().max())


def test_many_units_of_bounded_spectral_norm_are_bounded_by_it():
    made = nn.Linear(2, 400).double()
    with torch.no_grad():
        made.weight.copy_(torch.randn(400, 2, generator=torch.Generator().manual_seed(0)))
        made.bias.zero_()
    each = np.linalg.norm(feature_bounds(made, nn.ReLU(), -1, 1))
    assert feature_norm_bound(made, nn.ReLU(), -1, 1) < 0.99 * each


def test_what_is_not_known_is_refused():
    made = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="range of a Softshrink is not known"):
        feature_bounds(made, nn.Softshrink(), 0, 1)
    with pytest.raises(ValueError, match="low=1 exceeds high=0"):
        feature_norm_bound(made, nn.ReLU(), 1, 0)
    with pytest.raises(ValueError, match="low=nan"):
        feature_norm_bound(made, nn.ReLU(), math.nan, 0)
