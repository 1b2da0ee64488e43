from __future__ import annotations

import pytest
import torch
from torch import nn

from ellq.analysis.activation_memory import lifetimes, peak_activation_bytes


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class ReturnsBoth(nn.Module):
    def forward(self, x):
        y = x.repeat(1, 10)
        return y, x.sum()


# By hand: float32 numbers alive at the worst operation, for one example of shape (4,).
@pytest.mark.parametrize(
    ("net", "numbers"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 8 + 8),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), 4 + 8),
        (nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Flatten(0)), 4),
        (nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 100), nn.Linear(100, 1)), 2 + 100),
        (Residual(), 4 + 8 + 8),
        (ReturnsBoth(), 4 + 40 + 1),
        (nn.Identity(), 4),
    ],
    ids=["chain", "in place", "views", "bottleneck", "residual", "outputs stay", "nothing"],
)
def test_counts_what_is_alive_at_once(net, numbers):
    assert peak_activation_bytes(net, torch.ones(3, 4)) == 4 * numbers
    assert peak_activation_bytes(net.double(), torch.ones(1, 4).double()) == 8 * numbers


def test_tensors_are_alive_from_birth_to_last_use():
    lives = lifetimes(Residual(), torch.ones(1, 4))
    alive = dict(zip(lives.operations, (lives.alive(lives.bytes) // 4).tolist(), strict=True))
    assert alive["aten.relu.default"] == 4 + 8 + 8
    assert alive["aten.addmm.default"] == 4 + 8 + 4  # the second: the input, what it reads, what it makes
    assert alive["aten.add.Tensor"] == 4 + 4 + 4


def test_parameters_and_buffers_do_not_count():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert peak_activation_bytes(net, torch.ones(2, 4)) == 4 * 8


def test_the_first_example_is_used_and_the_model_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)).train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    switch = torch.backends.mha.get_fastpath_enabled()
    assert peak_activation_bytes(net, torch.ones(1, 4)) == peak_activation_bytes(net, torch.ones(7, 4))
    with pytest.raises(RuntimeError):
        peak_activation_bytes(net, torch.ones(1, 5))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == switch


def test_attention_holds_its_scores():
    net = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    short, long = (peak_activation_bytes(net, torch.ones(1, n, 4)) for n in (64, 128))
    assert short >= 4 * 2 * 64**2
    assert long > 3 * short


@pytest.mark.parametrize("example", [torch.zeros(0, 4), torch.tensor(1.0)])
def test_an_empty_batch_is_refused(example):
    with pytest.raises(ValueError, match="at least one input"):
        peak_activation_bytes(nn.Linear(4, 2), example)
