from __future__ import annotations

import pytest
import torch
from torch import nn

from ellq.analysis import Cost, cost


class Last(nn.Module):
    """Gives the first output of what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class Attends(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class TestFlops:
    @pytest.mark.parametrize(
        ("model", "example", "flops"),
        [
            (nn.Linear(5, 7), torch.zeros(3, 5), 2 * 5 * 7),
            (nn.Linear(5, 7), torch.zeros(3, 4, 5), 4 * 2 * 5 * 7),
            (nn.Conv2d(4, 6, 3, groups=2), torch.zeros(2, 4, 5, 5), 2 * 9 * 6 * 2 * 9),
            (nn.ConvTranspose1d(4, 6, 3), torch.zeros(2, 4, 5), 2 * 5 * 4 * 6 * 3),
            (Last(nn.LSTM(4, 5, batch_first=True)), torch.zeros(2, 7, 4), 7 * 2 * 4 * 5 * (4 + 5)),
            (Last(nn.GRU(4, 5, batch_first=True)), torch.zeros(2, 7, 4), 7 * 2 * 3 * 5 * (4 + 5)),
            (Last(nn.RNN(4, 5, batch_first=True)), torch.zeros(2, 7, 4), 7 * 2 * 5 * (4 + 5)),
            (Attends(), torch.zeros(2, 3, 10, 8), 3 * 2 * (2 * 10 * 10 * 8)),
            (SelfAttention(), torch.zeros(2, 10, 8), 10 * 2 * 8 * 32 + 2 * (2 * 10 * 10 * 8)),
            (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5)), torch.zeros(3, 5), 0),
        ],
        ids=["linear", "tokens", "conv", "transposed", "lstm", "gru", "rnn", "attention", "self-attention", "none"],
    )
    def test_are_two_for_each_multiply_add_of_one_example(self, model, example, flops):
        assert cost(model, example).flops == flops
        assert cost(model, torch.cat([example, example])).flops == flops

    def test_do_not_fall_for_zero_weights(self):
        model = nn.Linear(5, 7)
        with torch.no_grad():
            model.weight.zero_()
        assert cost(model, torch.zeros(1, 5)) == Cost(42, int((model.bias != 0).sum()), 70)


class TestParameters:
    def test_count_a_shared_one_once(self):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        with torch.no_grad():
            model[0].weight.fill_(1.0)[0] = 0.0
        assert cost(model, torch.zeros(1, 4)) == Cost(16, 12, 64)

    def test_leave_out_buffers(self):
        assert cost(nn.BatchNorm1d(3), torch.zeros(2, 3)).parameters == 6


def test_leaves_the_model_and_global_switches_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    switches = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    state = torch.random.get_rng_state()
    cost(model, torch.ones(3, 4))
    with pytest.raises(RuntimeError):
        cost(model, torch.ones(3, 5))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()) == switches
    assert torch.equal(torch.random.get_rng_state(), state)


def test_takes_examples_of_another_float_type():
    assert cost(nn.Linear(4, 2).bfloat16(), torch.ones(3, 4).double()).flops == 16


@pytest.mark.parametrize("example", [torch.zeros(0, 4), torch.tensor(1.0)])
def test_an_empty_batch_is_refused(example):
    with pytest.raises(ValueError, match="at least one input"):
        cost(nn.Linear(4, 2), example)
