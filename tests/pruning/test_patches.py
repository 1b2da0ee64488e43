"""Patches times weights must be the layer's own forward, whatever its shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ellq.pruning.patches import as_rows, outputs_at, patches, positions_of, reads_patches
from pruned_nets import gaussian


def by_product(layer, x, positions) -> torch.Tensor:
    """The layer's outputs at some positions as one product for each group."""
    return patches(layer, x, positions) @ as_rows(layer, layer.weight.detach()).transpose(1, 2)


def assert_is_forward(layer, x, seed: int) -> None:
    with torch.no_grad():
        y = layer(x)
    count = positions_of(layer, y)
    positions = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for chosen in (torch.arange(count), positions[: max(1, count // 3)], positions[:0]):
        expected = outputs_at(layer, y, chosen)
        assert expected.shape == (
            as_rows(layer, layer.weight).shape[0],
            len(chosen),
            len(layer.weight) // layer_groups(layer),
        )
        torch.testing.assert_close(by_product(layer, x, chosen), expected, rtol=1e-10, atol=1e-10)
    # Every output once, in rows of samples and places.
    every = outputs_at(layer, y, torch.arange(count))
    assert torch.equal(every.flatten().sort().values, y.flatten().sort().values)


def layer_groups(layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of the layer's own forward
@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.sampled_from([1, 2, 3]), seed=st.integers(0, 2**31))
def test_convolutions(data, dims, seed):
    draw = data.draw
    groups, each, out = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dims))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*[st.integers(0, 2)] * dims)))
    stride = (1,) * dims if padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * dims))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(seed)
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](
        groups * each, groups * out, kernel, stride, padding, dilation, groups, bias=False, padding_mode=mode
    ).double()
    sides = [draw(st.integers(5, 8)) for _ in range(dims)]
    samples = draw(st.sampled_from([(), (1,), (3,)]))
    assert_is_forward(layer, gaussian(*samples, groups * each, *sides, seed=seed).double(), seed)


@pytest.mark.parametrize("shape", [(4,), (6, 4), (2, 5, 4), (2, 3, 2, 4)])
def test_linear_layers_take_any_leading_axes(shape):
    layer = nn.Linear(4, 3, bias=False).double()
    x = gaussian(*shape).double()
    assert positions_of(layer, layer(x)) == x.numel() // 4
    assert_is_forward(layer, x, 0)


def test_half_precision_is_read_as_it_is():
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False).half()
    x = gaussian(2, 2, 4, 4).half()
    own = patches(layer, x, torch.arange(32))
    assert own.dtype == torch.float16
    torch.testing.assert_close(own.double(), patches(layer.double(), x.double(), torch.arange(32)), rtol=0, atol=0)


def test_rows_are_those_of_the_groups():
    layer = nn.Conv2d(4, 6, 2, groups=2)
    rows = as_rows(layer, layer.weight.detach())
    assert rows.shape == (2, 3, 8)
    assert torch.equal(rows.reshape(layer.weight.shape), layer.weight)


def test_only_what_is_known_exactly_is_read():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert all(map(reads_patches, (nn.Linear(1, 1), nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1))))
    others = (Twice(1, 1), nn.ConvTranspose2d(1, 1, 1), nn.LSTM(1, 1), nn.Bilinear(1, 1, 1))
    assert not any(map(reads_patches, others))
