"""Two layers refitted together."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ellq
from ellq.pruning import joint_refit
from ellq.pruning.joint_refit import refit_together_
from ellq.pruning.walk import walk
from pruned_nets import gaussian


def chain(seed: int = 0, *, bias: bool = True) -> nn.Module:
    """Convolution, norm, activation, pooling, convolution, norm, head; norms have statistics of their own."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5)),
    ).eval()
    with torch.no_grad():
        for norm in (net[1], net[5]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return net


def damaged(net: nn.Module) -> nn.Module:
    """A copy in which the second convolution does not read three channels."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[4].weight[:, :3] = 0
    return other


def error_at(dense: nn.Module, changing: nn.Module, x: torch.Tensor, place: int) -> float:
    """The squared error of the outputs of one module."""
    with torch.no_grad():
        return float((dense[: place + 1](x) - changing[: place + 1](x)).square().sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_layers_move_and_inputs_that_were_not_looked_at_gain(seed, bias):
    net, x = chain(seed, bias=bias), gaussian(300, 3, 6, 6, seed=seed)
    changing = damaged(net)
    new = gaussian(200, 3, 6, 6, seed=seed + 100)
    before = error_at(net, changing, new, 4)
    stayed = {name: value.clone() for name, value in changing.state_dict().items() if name.startswith("8.")}
    for arrival in walk(net, changing, [x[:150], x[150:]], ["0", "4", "8"], makers=True):
        if arrival.name == "4":
            assert arrival.maker is not None
            assert (arrival.maker.name, arrival.maker.norm) == ("0", "1")
            first = changing[0].weight.clone()
            assert refit_together_(changing, arrival, torch.ones(6))
            assert not torch.equal(first, changing[0].weight)
            with torch.no_grad():  # what the layer meets is made anew
                assert torch.equal(arrival.inputs[1], changing[:4](x[150:]))
    # A shift without a bias is kept by the norm after the layer.
    assert error_at(net, changing, new, 5) < 0.8 * error_at(net, damaged(net), new, 5)
    assert not bias or error_at(net, changing, new, 4) < 0.8 * before
    assert (changing[4].weight[:, :3] == 0).all()
    assert torch.equal(changing[0].weight[:3], net[0].weight[:3])  # nothing reads them
    assert all(torch.equal(value, changing.state_dict()[name]) for name, value in stayed.items())


def test_a_step_is_the_damped_least_squares_solution(monkeypatch):
    monkeypatch.setattr(joint_refit, "PRODUCTS", 400)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    changing = copy.deepcopy(net)
    with torch.no_grad():
        changing[2].weight[:, 0] = 0
    x = gaussian(60, 3).double()
    importance = torch.tensor([1.0, 3.0], dtype=torch.float64)
    (arrival,) = (a for a in walk(net, changing, [x], ["0", "2"], makers=True) if a.name == "2")
    pair = joint_refit._Pair.of(changing, arrival, arrival.maker, importance)
    values = [value.clone() for value in pair.start()]
    with torch.no_grad():
        fitted, _ = pair.examples(arrival, arrival.maker)
        (own, aims), scales = fitted[0], joint_refit._scales(pair, values, fitted)

    def outputs(*changes):
        return pair([v + s * c for v, s, c in zip(values, scales, changes, strict=True)], own).ravel()

    zero = tuple(torch.zeros_like(value) for value in values)
    blocks = torch.autograd.functional.jacobian(outputs, zero)
    J = torch.cat([block.reshape(aims.numel(), -1) for block in blocks], dim=1)
    r = (aims.ravel() - outputs(*zero)).detach()
    g = J.T @ r
    damping = joint_refit._DAMPING * (J @ g).square().sum() / g.square().sum()
    expected = torch.linalg.solve(J.T @ J + damping * torch.eye(J.shape[1]), g)
    with torch.no_grad():
        found = joint_refit._step(pair, values, fitted)
    flat = torch.cat([f.ravel() for f in found])
    wanted = torch.cat([s.ravel() for s in scales]) * expected
    np.testing.assert_allclose(flat.detach().numpy(), wanted.numpy(), rtol=1e-6, atol=1e-9)


def test_what_needs_no_change_gets_none():
    net, x = chain(), gaussian(80, 3, 6, 6)
    changing = copy.deepcopy(net)
    for arrival in walk(net, changing, [x], ["0", "4"], makers=True):
        if arrival.name == "4":
            refit_together_(changing, arrival, torch.ones(6))
    for name, value in changing.state_dict().items():
        assert torch.allclose(value, net.state_dict()[name], rtol=1e-4, atol=1e-6), name


class Branching(nn.Module):
    """The first layer is read twice, the second once but changed in place, the third by one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        y = torch.relu(self.first(x))
        z = self.second(y)
        z.relu_()
        return self.last(torch.relu(self.third(z)) + 0.5) + y


def test_a_maker_is_known_only_where_nothing_else_reads_it():
    torch.manual_seed(0)
    net = Branching().eval()
    layers = ["first", "second", "third", "last"]
    found = {
        a.name: a.maker and a.maker.name for a in walk(net, copy.deepcopy(net), [gaussian(9, 4)], layers, makers=True)
    }
    assert found == {"first": None, "second": None, "third": None, "last": "third"}


class Quantized(nn.Module):
    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)


def test_what_cannot_be_differentiated_between_is_left_as_it_was():
    net, x = chain(), gaussian(80, 3, 6, 6)
    net = nn.Sequential(*net[:2], Quantized(), *net[3:]).eval()
    changing = damaged(net)
    before = {name: value.clone() for name, value in changing.state_dict().items()}
    for arrival in walk(net, changing, [x], ["0", "4"], makers=True):
        if arrival.name == "4":
            assert not refit_together_(changing, arrival, torch.ones(6))
    assert all(torch.equal(value, before[name]) for name, value in changing.state_dict().items())


@pytest.mark.parametrize("seed", [3, 5])
def test_pruning_loses_less_than_without(seed):
    net, x, new = chain(seed), gaussian(3000, 3, 6, 6), gaussian(1000, 3, 6, 6, seed=9)
    lost = {}
    for refit in ("joint", "sequential"):
        small = ellq.prune(net, x, method="id", sparsity=0.4, refit=refit)
        with torch.no_grad():
            lost[refit] = float((small(new) - net(new)).square().sum())
    assert lost["joint"] < 0.95 * lost["sequential"]
