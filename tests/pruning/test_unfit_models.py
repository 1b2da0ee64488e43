"""Models whose hidden units cannot be removed soundly are refused by name, and left as they were."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import ellq
from ellq.pruning import chain_bounds


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def _refused(model, says, inputs=None):
    with pytest.raises(ValueError, match=says):
        ellq.prune(model, torch.randn(200, 6) if inputs is None else inputs, method="id", sparsity=0.5)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(name, value):
    model = _net()
    with torch.no_grad():
        model.get_parameter(name).flatten()[1] = value
    _refused(model, name)


def test_weights_without_data_or_entries():
    _refused(_net().to("meta"), "no data")
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 4))
    _refused(model, r"\(0, 6\)")


def test_layers_pruned_by_torch_or_normalised_by_a_hook():
    model = _net()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    _refused(model, "prune.remove")


def test_corrected_weights_that_exceed_half_precision():
    # Sixteen equal units: the one that stays must carry the weights of all, beyond what float16 holds.
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        model[0].weight[:] = model[0].weight[0]
        model[0].bias[:] = 0.1
        model[2].weight.fill_(6e4)
    model = model.to(torch.float16)
    before = copy.deepcopy(model.state_dict())
    _refused(model, "float32", torch.rand(200, 6) * 1e-3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class _ReadsItsWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) / self.a.out_features**0.5


@pytest.mark.parametrize("rule", ["ellq", "chee2021"])
def test_forward_that_computes_with_a_width(rule):
    with pytest.raises(ValueError, match="width of a layer"):
        ellq.prune(_ReadsItsWidth(), torch.randn(200, 6), method="id", sparsity=0.5, rule=rule)


def test_bounds_refuse_a_chain_with_a_forward_hook():
    model = _net()
    decided = ellq.plan(model, sparsity=0.5)
    pruned = ellq.apply(model, decided)
    chain_bounds(model, pruned, torch.randn(20, 6), decided)
    model[0].register_forward_hook(lambda module, inputs, output: output * 100)
    with pytest.raises(ValueError, match="'0' carries a forward hook"):
        chain_bounds(model, pruned, torch.randn(20, 6), decided)
