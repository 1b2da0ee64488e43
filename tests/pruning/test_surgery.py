from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from ellq.pruning import Correction
from ellq.pruning.coupling import ChannelGroup, Member
from ellq.pruning.surgery import cut_, cut_channels_
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


def rows(units: int, each: int = 1, start: int = 0) -> np.ndarray:
    return np.arange(start, start + units * each).reshape(units, each)


def every_kind() -> tuple[nn.Sequential, ChannelGroup]:
    """One group of four units in every kind of layer that can be cut."""
    net = nn.Sequential(
        nn.Embedding(9, 8),
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.GroupNorm(4, 8),
        nn.PReLU(8),
        nn.Conv2d(8, 16, 3, groups=4),
        nn.Conv1d(16, 2, 1, bias=False),
        nn.Linear(32, 5),
    )
    members = (
        Member("0", "out", rows(4, 2)),
        Member("1", "out", rows(4, 2)),
        *(Member(str(i), "both", rows(4, 2)) for i in range(2, 6)),
        Member("6", "both", rows(4, 4), rows(4, 2)),
        Member("7", "in", rows(4, 4)),
        Member("8", "in", rows(4, 8)),
    )
    return net, ChannelGroup("0", 4, members)


KEPT = np.array([1, 3])


def test_every_kind_of_layer_keeps_the_right_entries_and_says_its_new_size():
    net, group = every_kind()
    net[2].running_mean += torch.arange(8.0)
    before = copy.deepcopy(net)
    cut_channels_(net, [(group, KEPT)])
    two, four, eight = [2, 3, 6, 7], [4, 5, 6, 7, 12, 13, 14, 15], [*range(8, 16), *range(24, 32)]
    assert torch.equal(net[0].weight, before[0].weight[:, two])
    assert torch.equal(net[1].weight, before[1].weight[two])
    assert torch.equal(net[1].bias, before[1].bias[two])
    for i in (2, 3, 4, 5):
        assert torch.equal(net[i].weight, before[i].weight[two])
    assert torch.equal(net[2].running_mean, before[2].running_mean[two])
    assert torch.equal(net[3].running_var, before[3].running_var[two])
    assert torch.equal(net[6].weight, before[6].weight[four])
    assert torch.equal(net[6].bias, before[6].bias[four])
    assert torch.equal(net[7].weight, before[7].weight[:, four])
    assert torch.equal(net[8].weight, before[8].weight[:, eight])
    assert torch.equal(net[8].bias, before[8].bias)
    sizes = [net[0].embedding_dim, net[1].out_channels, net[2].num_features, net[3].num_features, net[4].num_groups]
    assert sizes == [4, 4, 4, 4, 2]
    assert (net[4].num_channels, net[5].num_parameters, net[8].in_features) == (4, 4, 16)
    assert (net[6].in_channels, net[6].out_channels, net[6].groups, net[7].in_channels) == (4, 8, 2, 8)
    assert net[2].num_batches_tracked == 0
    body = net[1:7].eval()
    assert body(gaussian(2, 3, 9, 9)).shape == (2, 8, 5, 5)
    repr(net)


def test_dtypes_gradients_hooks_modes_and_buffers_stay_as_they_are():
    net, group = every_kind()
    net.to(torch.bfloat16)
    net[1].requires_grad_(False)
    net[3].eval()
    net[8].register_forward_hook(lambda *_: None)
    before = snapshot(net)
    cut_channels_(net, [(group, KEPT)])
    after = snapshot(net)
    for key in ("grads", "training", "hooks", "attributes"):
        assert after[key] == before[key], key
    assert after["state"].keys() == before["state"].keys()
    assert all(after["state"][name].dtype == value.dtype for name, value in before["state"].items())
    assert all(p.is_leaf for p in net.parameters())


def test_the_new_weights_do_not_share_memory_with_the_old():
    net, group = every_kind()
    old = net[8].weight
    cut_channels_(net, [(group, np.arange(4))])
    assert torch.equal(net[8].weight, old)
    assert net[8].weight.data_ptr() != old.data_ptr()


def test_groups_that_share_a_layer_are_numbered_as_before_the_call():
    net = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4), "c": nn.Linear(7, 1)})
    weight = net["c"].weight
    first = ChannelGroup("a", 3, (Member("a", "out", rows(3)), Member("c", "in", rows(3))))
    second = ChannelGroup("b", 4, (Member("b", "out", rows(4)), Member("c", "in", rows(4, start=3))))
    cut_channels_(net, [(first, np.array([0, 2])), (second, np.array([1]))])
    assert torch.equal(net["c"].weight, weight[:, [0, 2, 4]])
    assert net["c"].in_features == 3


def changed(group: ChannelGroup, number: int, **changes) -> ChannelGroup:
    members = list(group.members)
    members[number] = dataclasses.replace(members[number], **changes)
    return dataclasses.replace(group, members=tuple(members))


@pytest.mark.parametrize(
    ("number", "changes", "match"),
    [
        (8, {"module": "9"}, "Layer '9' of group '0' is missing"),
        (8, {"module": "4"}, "Layer '4' of group '0' is a GroupNorm, which cannot be cut on side 'in'"),
        (0, {"side": "both"}, "is a Embedding, which cannot be cut on side 'both'"),
        (8, {"entries": rows(3, 8)}, r"'8' of group '0' has entries of shape \(3, 8\), expected \(4, "),
        (8, {"entries": rows(4, 8, 1)}, r"has 32 channels \(in\), but its entries go from 1 to 32"),
        (8, {"entries": rows(4, 8, -1)}, "from -1 to 30"),
        (8, {"entries": np.zeros((4, 1), dtype=np.int64)}, "each of which may be there once"),
        (6, {"inputs": None}, "cut by whole groups"),
        (1, {"inputs": rows(4, 2)}, "cut by whole groups"),
        (6, {"inputs": rows(4, 2)[::-1]}, "inputs are in other conv groups than their outputs"),
        (4, {"entries": rows(8)[[0, 2, 4, 6]]}, "'4' would lose part of one of its 4 groups"),
    ],
)
def test_groups_of_another_model_are_refused_and_nothing_is_changed(number, changes, match):
    net, group = every_kind()
    before = snapshot(net)
    with pytest.raises(ValueError, match=match):
        cut_channels_(net, [(changed(group, number, **changes), KEPT)])
    assert_unchanged(net, before)


@pytest.mark.parametrize(
    "kept", [[], [0, 4], [-1, 2], [2, 1], [1, 1], [0.0, 1.0], [[0, 1]], [True, False, True, False]]
)
def test_units_that_are_not_in_rising_order_are_refused(kept):
    net, group = every_kind()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"Group '0' has 4 units and must keep some of them, .* asked to keep \["):
        cut_channels_(net, [(group, np.array(kept))])
    assert_unchanged(net, before)


def test_channels_cut_twice_and_layers_left_empty_are_refused():
    net, group = every_kind()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"Layer '0' would lose the same channel twice \(out\)"):
        cut_channels_(net, [(group, KEPT), (group, KEPT)])
    two = ChannelGroup("0", 2, (Member("8", "in", rows(2, 16)),))
    halves = [changed(two, 0, entries=rows(2, 8)), changed(two, 0, entries=rows(2, 8, 16))]
    cut_channels_(copy.deepcopy(net), [(half, np.array([0])) for half in halves])
    assert_unchanged(net, before)


def test_parametrised_and_pruned_layers_are_refused():
    net, group = every_kind()
    parametrizations.weight_norm(net[8])
    with pytest.raises(ValueError, match="'8' of group '0' is a ParametrizedLinear"):
        cut_channels_(net, [(group, KEPT)])
    net, group = every_kind()
    prune.l1_unstructured(net[8], "weight", 0.5)
    before = net[0].weight
    with pytest.raises(ValueError, match="'8' of group '0' computes its weight from others"):
        cut_channels_(net, [(group, KEPT)])
    assert net[0].weight is before
