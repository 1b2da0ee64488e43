from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils import spectral_norm

import ellq
from ellq.pruning.copied import copied
from pruned_nets import gaussian, mlp


class Remembers(nn.Module):
    """Keeps what it saw last, with its graph."""

    def __init__(self):
        super().__init__()
        self.net = mlp(6, 9, 3)
        self.seen = None

    def forward(self, x):
        self.seen = self.net[0](x)
        return self.net(x)


def remembers() -> nn.Module:
    return Remembers()


def pruned_by_torch() -> nn.Module:
    net = mlp(6, 9, 9, 3)
    torch_prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def normed() -> nn.Module:
    net = mlp(6, 9, 9, 3)
    spectral_norm(net[0])
    return net


@pytest.mark.parametrize("make", [remembers, pruned_by_torch, normed])
def test_a_copy_computes_the_same_and_is_independent(make):
    net, x = make(), gaussian(20, 6)
    net(x)
    net.eval()
    before, again = net(x), copied(net)
    assert torch.equal(again(x), before)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    assert not torch.equal(again(x), before)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("make", [remembers, pruned_by_torch, normed])
@pytest.mark.parametrize("refit", ["synthetic", "rescale", "obs", "bias"])
def test_layers_beside_those_that_hold_computed_tensors_are_planned(make, refit):
    net, x = make(), gaussian(50, 6)
    net(x)
    exclude = None if make is remembers else "0"
    decided = ellq.plan(net, x, sparsity=0.5, exclude=exclude, refit=refit)
    assert decided.settings["refit"] == refit
    assert torch.isfinite(ellq.apply(net, decided)(x)).all()


@pytest.mark.parametrize("rule", ["flow", "wanda"])
def test_scores_are_of_a_copy(rule):
    net, x = pruned_by_torch(), gaussian(50, 6)
    net(x)
    assert ellq.plan(net, x, rule=rule, sparsity=0.5, exclude="0").sparsity == pytest.approx(0.5, abs=0.01)
