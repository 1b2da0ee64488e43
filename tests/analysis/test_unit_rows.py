from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ellq.analysis import from_unit_rows, to_unit_rows, transposed_groups


@st.composite
def weights(draw):
    groups = draw(st.sampled_from([0, 1, 2, 3]))
    first = draw(st.integers(1, 3)) * max(groups, 1)
    shape = (first, draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 3), max_size=3)))
    return np.arange(np.prod(shape)).reshape(shape), groups


@settings(max_examples=80, deadline=None)
@given(weights())
def test_there_and_back_gives_the_same_array(case):
    array, groups = case
    rows = to_unit_rows(array, groups)
    assert rows.shape[0] == (array.shape[1] * groups if groups else array.shape[0])
    assert sorted(rows.ravel()) == sorted(array.ravel())
    np.testing.assert_array_equal(from_unit_rows(rows, array.shape, groups), array)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_rows_of_a_transposed_convolution_are_what_each_output_channel_reads(kind, groups):
    layer = kind(4, 8, 2, groups=groups, bias=False)
    assert transposed_groups(layer) == groups
    rows = torch.from_numpy(to_unit_rows(layer.weight.detach().numpy(), groups).copy())
    dims = layer.weight.ndim - 2
    for unit in range(8):
        alone = torch.zeros_like(rows)
        alone[unit] = rows[unit]
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(from_unit_rows(alone.numpy(), tuple(layer.weight.shape), groups)))
            outputs = layer(torch.ones(1, 4, *[3] * dims))
        reached = outputs.flatten(2).abs().sum(-1)[0] > 0
        assert reached.tolist() == [channel == unit for channel in range(8)]


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(3, 2), nn.LSTM(2, 2)])
def test_units_of_other_layers_lie_along_the_first_axis(layer):
    assert transposed_groups(layer) == 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_transposed_convolution_is_recognised():
    scripted = torch.jit.script(nn.Sequential(nn.ConvTranspose1d(4, 4, 2, groups=2)))
    assert transposed_groups(getattr(scripted, "0")) == 2
