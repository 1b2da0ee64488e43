from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ellq.pruning import Correction
from ellq.pruning.surgery import cut_
from pruned_nets import assert_unchanged, gaussian, mlp, snapshot


def correction(**changes) -> Correction:
    plain = Correction("0", "2", np.array([1, 4]), np.arange(6.0).reshape(3, 2), np.array([0.5, -0.5, 2.0]))
    return dataclasses.replace(plain, **changes)


def test_slices_the_producer_and_replaces_the_consumer():
    net = mlp(4, 6, 3)
    before = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    net[0].weight.requires_grad_(False)
    cut_(net, correction())
    assert torch.equal(net[0].weight, before[0][[1, 4]])
    assert torch.equal(net[0].bias, before[1][[1, 4]])
    assert net[2].weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert net[2].bias.tolist() == [0.5, -0.5, 2.0]
    assert (net[0].out_features, net[2].in_features) == (2, 2)
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert net(gaussian(7, 4)).shape == (7, 3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"producer": "7"}, "'7' is missing"),
        ({"consumer": "1"}, "'1' is a ReLU, expected a plain Linear"),
        ({"indices": np.array([1, 6])}, "up to number 6, but '0' has 6"),
        ({"indices": np.array([-1, 2])}, "The plan is for another model"),
        ({"indices": np.array([], dtype=np.int64)}, "keeps 0 units"),
        ({"weight": np.zeros((3, 3))}, r"shape \(3, 3\), but '2' needs \(3, 2\)"),
        ({"bias": None}, "'2' has a bias, unlike in the plan"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(changes, match):
    net = mlp(4, 6, 3)
    before = snapshot(net)
    with pytest.raises(ValueError, match=match):
        cut_(net, correction(**changes))
    assert_unchanged(net, before)


@pytest.mark.parametrize("layer", [0, 2])
def test_layers_that_compute_something_else_are_refused(layer):
    net = mlp(4, 6, 3)
    parametrizations.weight_norm(net[layer])
    with pytest.raises(ValueError, match=f"'{layer}' is a ParametrizedLinear"):
        cut_(net, correction())


def test_dtypes_stay():
    net = nn.Sequential(nn.Linear(4, 6, dtype=torch.bfloat16), nn.ReLU(), nn.Linear(6, 3, dtype=torch.float64))
    cut_(net, correction())
    assert [p.dtype for p in net.parameters()] == [torch.bfloat16] * 2 + [torch.float64] * 2
