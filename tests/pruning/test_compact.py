from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from ellq.analysis.nets import ZeroPadShortcut, cifar_resnet, mlp, pretrained, small_conv
from ellq.pruning import apply, plan, prune
from ellq.pruning import features as features_module
from ellq.pruning.apply import finalize
from ellq.pruning.compact import compact, removable_units
from pruned_nets import ACTIVATIONS, assert_unchanged, gaussian, randomise_, snapshot

SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=20)


def gap(first, second, x):
    """Largest change of the outputs in float64 and eval mode, relative to the largest output."""
    args = x if isinstance(x, tuple) else (x,)
    args = [a.double() if a.is_floating_point() else a for a in args]
    with torch.no_grad():
        a, b = (copy.deepcopy(net).double().eval()(*args) for net in (first, second))
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))


def checked(net, x, *, removed=None):
    """Compact; demand the same outputs, on other inputs too, nothing left to remove, and the table's own count."""
    before = snapshot(net)
    table = removable_units(net, x)
    small = compact(net, x)
    assert_unchanged(net, before)
    assert type(small) is type(net)
    others = torch.cat([x, 3 * gaussian(*x.shape, seed=5).to(x.dtype)])
    assert gap(net, small, others) <= 1e-6
    widths = [sum(len(layer.weight) for layer in layers(model)) for model in (net, small)]
    if not any(isinstance(layer, nn.modules.conv._ConvTransposeNd) for layer in layers(net)):
        assert widths[0] - widths[1] == table["removed"].sum()
    if not any(getattr(layer, "groups", 1) > 1 for layer in layers(net)):  # whose last group is cut like any layer
        assert not removable_units(small, x)["removed"].any()
    if removed is not None:
        assert table["removed"].sum() == removed, table.to_string()
    return small


def layers(net):
    return [m for m in net.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def zero_rows_(layer, rows):
    with torch.no_grad():
        layer.weight[rows] = 0


# Random nets ---------------------------------------------------------------------------------------------------------


@st.composite
def planted_mlps(draw):
    """A net, an input, and which units of each hidden layer were made constant or unread."""
    widths = draw(st.lists(st.integers(1, 7), min_size=3, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules += [nn.Linear(before, after, bias=draw(st.booleans()))]
        if draw(st.booleans()):
            modules.append(nn.BatchNorm1d(after, affine=draw(st.booleans())))
        modules += [draw(st.sampled_from(ACTIVATIONS))(), nn.Dropout(0.5)]
    net = nn.Sequential(*modules, nn.Linear(widths[-1], 2, bias=draw(st.booleans())))
    randomise_(net, rng, draw(st.sampled_from([0.0, 1.0])))
    linears = layers(net)
    planted = []
    for layer, reader in itertools.pairwise(linears):
        dead = rng.random(layer.out_features) < 0.3
        unread = rng.random(layer.out_features) < 0.3
        zero_rows_(layer, torch.from_numpy(dead))
        with torch.no_grad():
            reader.weight[:, torch.from_numpy(unread)] = 0
        planted.append(min(int((dead | unread).sum()), layer.out_features - 1))
    return net.eval(), torch.from_numpy(rng.standard_normal((4, widths[0]))).float(), planted


@SETTINGS
@given(planted_mlps())
def test_every_planted_unit_of_an_mlp_goes_and_the_outputs_stay(case):
    net, x, planted = case
    small = checked(net, x)
    for layer, narrow, count in zip(layers(net), layers(small), planted, strict=False):
        assert layer.out_features - narrow.out_features >= count
    assert layers(small)[-1].out_features == 2
    assert layers(small)[0].in_features == x.shape[1]


class Block(nn.Module):
    """One of the ways in which convolutional nets are wired."""

    def __init__(self, kind, planes, conv, norm):
        super().__init__()
        self.kind = kind
        self.conv1, self.norm1, self.act = conv(planes, planes), norm(planes), nn.ReLU(inplace=True)
        if kind not in ("dense", "transposed"):
            self.conv2 = conv(planes, planes)
        if kind in ("plain", "residual", "depthwise"):
            self.norm2 = norm(planes)
        if kind == "dense":
            self.join = nn.Conv2d(2 * planes, planes, 1)
        elif kind == "depthwise":
            self.deep = nn.Conv2d(planes, planes, 3, padding=1, groups=planes)
        elif kind == "grouped":
            self.pairs = nn.Conv2d(planes, planes, 1, groups=planes // 2)
        elif kind == "gated":
            self.gate = nn.Linear(planes, planes)
        elif kind == "shortcut":
            self.shortcut, self.wide = ZeroPadShortcut(1, 2), conv(planes + 3, planes)
        elif kind == "transposed":
            self.up = nn.ConvTranspose2d(planes, planes, 2, stride=2)

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        if self.kind == "plain":
            return self.act(self.norm2(self.conv2(y)))
        if self.kind == "residual":
            return self.act(self.norm2(self.conv2(y)) + x)
        if self.kind == "dense":
            return self.act(self.join(torch.cat([x, y], 1)))
        if self.kind == "depthwise":
            return self.act(self.conv2(functional.relu6(self.norm2(self.deep(y)))))
        if self.kind == "grouped":
            return self.conv2(functional.leaky_relu(self.pairs(y)))
        if self.kind == "gated":
            gate = torch.sigmoid(self.gate(y.mean((2, 3))))
            return x + self.conv2(y * gate[:, :, None, None])
        if self.kind == "pooled":
            return self.conv2(functional.max_pool2d(functional.avg_pool2d(y, 3, 1, 1), 3, 1, 1))
        if self.kind == "shortcut":
            return self.conv2(self.act(self.wide(self.shortcut(y))))
        return functional.avg_pool2d(self.act(self.up(y)), 2)


KINDS = ("plain", "residual", "dense", "depthwise", "grouped", "gated", "pooled", "shortcut", "transposed")


class ConvNet(nn.Module):
    def __init__(self, kinds, planes, mode, has_norm, flattens):
        super().__init__()

        def conv(before, after):
            return nn.Conv2d(before, after, 3, padding=1, padding_mode=mode, bias=not has_norm)

        def norm(count):
            return nn.BatchNorm2d(count) if has_norm else nn.Identity()

        self.stem = conv(2, planes)
        self.blocks = nn.Sequential(*(Block(kind, planes, conv, norm) for kind in kinds))
        self.flattens = flattens
        self.head = nn.Linear(planes * 4 if flattens else planes, 3)

    def forward(self, x):
        y = functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 2 if self.flattens else 1)
        return self.head(y.view(y.size(0), -1))


@st.composite
def conv_nets(draw):
    """A net with rows, columns and scales set to zero, and inputs."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"]))
    net = ConvNet(kinds, draw(st.sampled_from([4, 6])), mode, draw(st.booleans()), draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    randomise_(net, rng, 0.3)
    share = draw(st.sampled_from([0.2, 0.5, 0.8]))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                module.weight[torch.from_numpy(rng.random(len(module.weight)) < share)] = 0
                module.weight[:, torch.from_numpy(rng.random(module.weight.shape[1]) < share / 2)] = 0
                if module.bias is not None and rng.random() < 0.5:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight[torch.from_numpy(rng.random(len(module.weight)) < share / 2)] = 0
    return net.eval(), torch.from_numpy(rng.standard_normal((2, 2, 9, 9))).float()


@settings(SETTINGS, max_examples=25)
@given(conv_nets())
def test_convolutional_nets_of_every_wiring_keep_their_outputs(case):
    net, x = case
    small = checked(net, x)
    wider = gaussian(3, 2, 11, 10, seed=1)  # nothing decided depends on the size of the images
    assert gap(net, small, wider) <= 1e-6


# What is removed, by name --------------------------------------------------------------------------------------------


class Wired(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.wiring = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.wiring(self, x)


def test_units_whose_plan_retains_nothing_are_cut_out():
    net = mlp(6, 9, 7, outputs=3)
    decided = plan(net, sparsity=0.5, refit="none")
    table = decided.to_frame()
    table.loc[(table["layer"] == "1.weight") & table["unit"].isin([0, 4, 8]), "retained"] = 0
    table.loc[(table["layer"] == "3.weight") & table["unit"].isin([2]), "retained"] = 0
    masks = apply(net, decided.with_retained(table))
    with pytest.raises(ValueError, match=r"carries masks. Call ellq.finalize first"):
        compact(masks, gaussian(5, 6))
    small = checked(finalize(masks), gaussian(5, 6))
    assert small[1].out_features <= 6
    assert small[3].out_features <= 6


def test_parameters_that_go_are_those_of_the_dead_units():
    net = mlp(6, 9, 7, outputs=3)
    zero_rows_(net[1], [0, 4, 8])
    small = checked(net, gaussian(5, 6), removed=3)
    assert parameters(net) - parameters(small) == 3 * (6 + 1 + 7)


def test_a_constant_goes_through_every_layer_it_makes_constant():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2))
    zero_rows_(net[0], [1])
    with torch.no_grad():
        net[2].weight[0] = torch.tensor([0.0, 2.0, 0.0])  # reads the constant unit only
    small = checked(net, gaussian(5, 4), removed=2)
    assert [layer.out_features for layer in layers(small)] == [2, 2, 2]


def test_what_only_unread_units_read_goes_too():
    net = mlp(4, 5, 6, 7, outputs=2)
    with torch.no_grad():
        net[7].weight[:, 3] = 0  # so unit 3 of the third layer is unread, and with it what it alone reads
        keep = torch.arange(7) != 3
        net[5].weight[keep, 1] = 0
        net[3].weight[torch.arange(6) != 1, 2] = 0
    small = checked(net, gaussian(5, 4), removed=3)
    assert [layer.out_features for layer in layers(small)] == [4, 5, 6, 2]


def test_a_batch_norm_without_scale_makes_a_unit_constant():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[1].weight[[0, 3]] = 0
        net[1].bias.copy_(torch.arange(5.0))
    small = checked(net.eval(), gaussian(5, 4), removed=2)
    assert small[1].num_features == 3
    assert small[1].running_var.shape == (3,)


def test_without_a_bias_the_constant_goes_into_the_running_mean_and_training_feels_nothing():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 2))
    zero_rows_(net[0], [2])
    with torch.no_grad():
        net[0].bias[2] = 3.0
    net.double().train()
    x = gaussian(6, 4).double()
    small = compact(net, x)
    assert small[2].bias is None
    assert small.training
    for _ in range(3):
        assert torch.allclose(net(x), small(x), atol=1e-12)  # and both update their running means
    assert gap(net, small, x) < 1e-12


def test_without_a_bias_and_a_batch_norm_a_bias_is_added():
    net = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3, bias=False))
    zero_rows_(net[0], [2])
    net[2].weight.requires_grad_(False)
    small = checked(net, gaussian(6, 4), removed=1)
    assert small[2].bias.shape == (3,)
    assert not small[2].bias.requires_grad
    value = torch.sigmoid(net[0].bias[2]).item()
    assert removable_units(net, gaussian(6, 4))["reason"][0] == f"constant {value:.6g}, folded into 2.bias"


def convs(mode="zeros", padding=1, pool=None):
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        pool or nn.Identity(),
        nn.Conv2d(6, 4, 3, padding=padding, padding_mode=mode),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    net(torch.zeros(1, 2, 6, 6))
    zero_rows_(net[0], [0, 2, 5])
    with torch.no_grad():
        net[0].bias[[0, 2, 5]] = torch.tensor([0.5, -1.0, 2.0])
    return net


def test_a_constant_before_zero_padding_stays_and_stands_for_the_others():
    net, x = convs(), gaussian(3, 2, 6, 6)
    small = checked(net, x, removed=2)
    assert small[0].out_channels == 4
    table = removable_units(net, x).set_index("unit")
    assert table["reason"][0] == "constant 0.5, folded into 3.weight, column 5"
    assert table["reason"][2] == "constant 0 where '3' reads it"
    assert not table["removed"][5]
    assert "zero-padded '3'" in table["reason"][5]


@pytest.mark.parametrize(("mode", "padding"), [("zeros", 0), ("reflect", 1), ("replicate", 1), ("circular", 1)])
def test_a_constant_before_other_padding_is_folded(mode, padding):
    checked(convs(mode, padding), gaussian(3, 2, 6, 6), removed=3)


def test_one_constant_alone_before_zero_padding_stays():
    net = convs()
    with torch.no_grad():
        net[0].bias[0] = -1.0
    assert checked(net, gaussian(3, 2, 6, 6), removed=2)[0].out_channels == 4


def test_folding_a_constant_before_zero_padding_as_if_it_were_uniform_is_caught(monkeypatch):
    net, x = convs(), gaussian(3, 2, 6, 6)
    monkeypatch.setattr(features_module, "_is_uniform", lambda module: True)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match=r"would change outputs by .* from the input of '5' on. Nothing was changed"):
        compact(net, x, inplace=True)
    assert_unchanged(net, before)


@pytest.mark.parametrize(
    ("pool", "removed"),
    [
        (nn.AvgPool2d(2), 3),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), 3),
        (nn.AvgPool2d(2, ceil_mode=True), 3),
        (nn.AvgPool2d(3, 1, 1), 1),  # less at the borders than inside, but for the unit that is 0
        (nn.AvgPool2d(2, divisor_override=3), 1),
        (nn.MaxPool2d(3, 1, 1), 3),
        (nn.AdaptiveAvgPool2d(3), 3),
        (nn.AdaptiveMaxPool2d(3), 3),
        (nn.ZeroPad2d(1), 1),
        (nn.ConstantPad2d(1, 0.5), 1),
        (nn.ReflectionPad2d(1), 3),
        (nn.Upsample(scale_factor=2), 3),
        (nn.Dropout2d(), 3),
        (nn.PReLU(6), 3),
        (nn.Softmax(dim=1), 0),
        (nn.MaxPool2d(2, dilation=2, padding=1), 0),
        (nn.AvgPool2d(5, 1, 2, ceil_mode=True), 1),
    ],
    ids=str,
)
def test_pooling_and_padding_are_followed_to_the_borders(pool, removed):
    checked(convs("circular", 1, pool).eval(), gaussian(3, 2, 6, 6), removed=removed)


def test_flatten_cuts_the_channels_whole_block_of_columns():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2))
    zero_rows_(net[0], [1])
    small = checked(net, gaussian(3, 1, 6, 6), removed=1)
    assert small[3].in_features == 48


def test_a_residual_stream_goes_only_where_all_members_allow_it():
    def forward(net, x):
        stream = net.stem(x)
        stream = stream + net.second(torch.relu(net.first(stream)))
        return net.head(torch.relu(stream))

    def build():
        return Wired(forward, stem=nn.Linear(4, 6), first=nn.Linear(6, 5), second=nn.Linear(5, 6), head=nn.Linear(6, 2))

    one_sided = build()
    zero_rows_(one_sided.stem, [1])
    checked(one_sided, gaussian(5, 4), removed=0)
    both = build()
    zero_rows_(both.stem, [1])
    zero_rows_(both.second, [1])
    small = checked(both, gaussian(5, 4), removed=2)
    assert [layer.weight.shape for layer in layers(small)] == [(5, 4), (5, 5), (5, 5), (2, 5)]


def test_a_stream_that_only_writes_to_itself_is_unread():
    def forward(net, x):
        stream = net.stem(x)
        return net.head(stream + net.loop(stream))

    net = Wired(forward, stem=nn.Linear(4, 5), loop=nn.Linear(5, 5), head=nn.Linear(5, 2))
    with torch.no_grad():
        net.head.weight[:, 3] = 0
        net.loop.weight[torch.arange(5) != 3, 3] = 0
    checked(net, gaussian(5, 4), removed=2)


def test_a_gate_that_is_shut_makes_its_unit_constant():
    def forward(net, x):
        return net.head(net.body(x) * torch.relu(net.gate(x)))

    net = Wired(forward, body=nn.Linear(4, 5), gate=nn.Linear(4, 5), head=nn.Linear(5, 2))
    zero_rows_(net.gate, [1])
    with torch.no_grad():
        net.gate.bias[1] = -1.0
    checked(net, gaussian(5, 4), removed=2)


def test_padding_by_a_computed_amount_is_left_as_it_is():
    def forward(net, x):
        return net.head(functional.pad(net.body(x), (0, x.size(-1) - 2)).flatten(1))

    net = Wired(forward, body=nn.Conv1d(2, 4, 1), head=nn.Linear(4 * 6, 2))
    zero_rows_(net.body, [1])
    checked(net, gaussian(3, 2, 4), removed=0)


def test_concatenation_keeps_track_of_who_is_who():
    def forward(net, x):
        first = torch.relu(net.first(x))
        second = torch.relu(net.second(torch.cat([x, first], 1)))
        return net.head(torch.cat([x, first, second], 1).mean((2, 3)))

    net = Wired(forward, first=nn.Conv2d(2, 4, 1), second=nn.Conv2d(6, 5, 1), head=nn.Linear(11, 3))
    zero_rows_(net.first, [1])
    zero_rows_(net.second, [0, 4])
    small = checked(net, gaussian(3, 2, 5, 5), removed=3)
    assert small.head.in_features == 8


def test_a_depthwise_filter_goes_with_its_channel():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )
    zero_rows_(net[0], [0])
    with torch.no_grad():
        net[0].bias[0] = -1.0
        net[2].weight[3] = 0  # constant, whatever its channel holds
    small = checked(net, gaussian(3, 2, 5, 5), removed=4)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (4, 4, 4)


def test_a_grouped_convolution_is_cut_by_whole_groups():
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 2, 1))
    zero_rows_(net[2], [0, 3, 4, 5])  # one of the first group's three, all of the second's
    small = checked(net, gaussian(3, 2, 5, 5), removed=5)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (2, 4, 6)


def test_every_layer_keeps_a_unit():
    net = mlp(4, 5, 6, outputs=3)
    with torch.no_grad():
        for layer in layers(net):
            layer.weight.zero_()
    small = checked(net, gaussian(5, 4), removed=9)
    assert [layer.out_features for layer in layers(small)] == [1, 1, 3]
    assert (removable_units(net, gaussian(5, 4))["reason"] == "the last unit of a layer stays").sum() == 2


def test_small_conv_loses_its_dead_filters():
    net = small_conv(1, 8, 4)
    zero_rows_(net[0], [3])
    zero_rows_(net[2], list(range(5, 15)))
    zero_rows_(net[6], [0, 1])
    with torch.no_grad():
        net[0].bias[3] = -0.1
    small = checked(net, gaussian(2, 1, 8, 8), removed=13)
    assert small[6].in_features == 22 * 16


def test_the_shortcut_of_a_resnet_is_cut_with_its_stream():
    net = cifar_resnet(8).eval()
    randomise_(net, np.random.default_rng(0), 0.2)
    block = net.layer2[0]
    with torch.no_grad():
        for unit in (2, 29):  # padding of the shortcut on either side
            block.conv2.weight[unit] = 0
            block.bn2.bias[unit] -= 10
            later = net.layer3[0]  # whose shortcut passes it on, 16 further
            later.conv2.weight[16 + unit] = 0
            later.bn2.bias[16 + unit] -= 10
        net.linear.weight[:, 60] = 0
    small = checked(net, gaussian(2, 3, 8, 8))
    assert small.layer2[0].conv2.out_channels == 30
    assert (small.layer2[0].shortcut.before, small.layer2[0].shortcut.after) == (7, 7)
    assert small.layer3[0].conv1.in_channels == 30
    assert (small.layer3[0].shortcut.before, small.layer3[0].shortcut.after) == (16, 15)
    assert small.linear.in_features == 61
    assert parameters(small) < parameters(net)


has_data = pytest.mark.skipif(
    not (Path(os.environ.get("ELLQ_DATA", "")) / "cifar10-resnets/resnet20.safetensors").is_file(),
    reason="ELLQ_DATA does not name a folder with the pretrained ResNets",
)


@has_data
def test_a_pretrained_resnet_loses_the_filters_zeroed_by_hand():
    net = pretrained("resnet20")
    blocks = [block for layer in (net.layer1, net.layer2, net.layer3) for block in layer]
    for block in blocks:
        zero_rows_(block.conv1, [0, 3, 7])
        with torch.no_grad():
            block.bn1.bias[[0, 3, 7]] -= 10  # below the ReLU
    small = checked(net, gaussian(2, 3, 16, 16))
    widths = [layer.conv1.out_channels for part in (small.layer1, small.layer2, small.layer3) for layer in part]
    assert widths == [13] * 3 + [29] * 3 + [61] * 3


@has_data
def test_a_pretrained_resnet_pruned_by_magnitude_keeps_its_outputs():
    net = pretrained("resnet20")
    with torch.no_grad():
        for layer in layers(net)[:-1]:
            norms = layer.weight.flatten(1).norm(dim=1)
            layer.weight[norms <= norms.quantile(0.3)] = 0
    small = checked(net, gaussian(2, 3, 16, 16))
    assert parameters(small) < 0.85 * parameters(net)


# What is left dense --------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight = self.second.weight

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def chain(*middle):
    """Two layers, the second of which feeds ``middle``; the first has a dead unit that can go."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), *middle, nn.Linear(6, 3)).eval()


def called_twice():
    again = nn.Linear(6, 6)
    return chain(again, nn.ReLU(), again)


def wired(middle, **modules):
    def forward(net, x):
        return net.head(middle(net, net.second(torch.relu(net.first(x)))))

    return Wired(forward, first=nn.Linear(4, 6), second=nn.Linear(6, 6), head=nn.Linear(6, 3), **modules)


UNKNOWN = {
    "LayerNorm": lambda: chain(nn.LayerNorm(6)),
    "GroupNorm": lambda: chain(nn.GroupNorm(2, 6)),
    "Softmax": lambda: chain(nn.Softmax(dim=-1)),
    "Linear' reads it, which has a hook": lambda: chain(doubled(nn.Linear(6, 6))),
    "called more than once": called_twice,
    "linear()": lambda: chain(Doubling(6, 6)),
    "MultiheadAttention": Attends,
    "shares a parameter": Shares,
    "chunk()": lambda: wired(lambda net, x: torch.cat(torch.chunk(x, 2, dim=-1)[::-1], -1)),
    ".view()": lambda: wired(lambda net, x: x.view(-1, 6)),
    ".size()": lambda: wired(lambda net, x: x / x.size(1)),
    "getattr()": lambda: wired(lambda net, x: x / x.shape[-1]),
    "getitem()": lambda: wired(lambda net, x: x[:, [5, 4, 3, 2, 1, 0]]),
    "mul()": lambda: wired(lambda net, x: x * net.scale, scale=nn.Parameter(torch.arange(6.0))),
    "sort()": lambda: wired(lambda net, x: torch.sort(x, dim=-1)[0]),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_not_understood_is_left_dense_and_named(what):
    torch.manual_seed(0)
    net = UNKNOWN[what]()
    first, second = layers(net)[:2]
    zero_rows_(first, [1])
    zero_rows_(second, [2])
    x = gaussian(5, 4, 4) if what == "MultiheadAttention" else gaussian(5, 4)
    small = checked(net.eval(), x)
    table = removable_units(net, x)
    assert layers(small)[0].out_features == (6 if what == "shares a parameter" else 5)
    assert layers(small)[1].out_features == 6
    names = table["layer"].str.cat(" " + table["reason"])
    assert names[table["unit"].isna()].str.contains(what.split("'")[0], regex=False).any(), table.to_string()
    stays = table[(table["unit"] == 2) & ~table["removed"]]
    assert what == "shares a parameter" or len(stays) == 1


def test_an_lstm_after_what_can_be_cut():
    net = Wired(
        lambda net, x: net.head(net.lstm(net.second(torch.relu(net.first(x))))[0]),
        **{"first": nn.Linear(4, 6), "second": nn.Linear(6, 5), "lstm": nn.LSTM(5, 7), "head": nn.Linear(7, 3)},
    )
    zero_rows_(net.first, [0, 1])
    zero_rows_(net.second, [0])
    checked(net, gaussian(5, 3, 4), removed=2)


def test_a_layer_over_the_last_axis_of_images_mixes_positions_not_channels():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    zero_rows_(net[0], [0])
    zero_rows_(net[1], [1])
    checked(net, gaussian(3, 2, 5, 5), removed=1)


def test_a_batch_norm_over_positions_is_not_taken_for_one_over_units():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    zero_rows_(net[0], [0])
    with torch.no_grad():
        net[1].running_mean.copy_(torch.arange(5.0))
    checked(net.eval(), gaussian(3, 5, 4), removed=0)


def test_what_an_in_place_function_overwrites_is_not_taken_for_a_constant():
    def forward(net, x):
        hidden = net.first(x)
        active = functional.relu(hidden, inplace=True)
        return net.second(active) + net.third(hidden)

    net = Wired(forward, first=nn.Linear(4, 5), second=nn.Linear(5, 2), third=nn.Linear(5, 2))
    zero_rows_(net.first, [1])
    with torch.no_grad():
        net.first.bias[1] = -1.0
    checked(net, gaussian(3, 4))


def test_what_only_training_reads_stays():
    def forward(net, x):
        hidden = torch.relu(net.first(x))
        return (net.second(hidden), net.third(hidden)) if net.training else net.second(hidden)

    net = Wired(forward, first=nn.Linear(4, 5), second=nn.Linear(5, 2), third=nn.Linear(5, 2))
    zero_rows_(net.first, [1])
    with torch.no_grad():
        net.second.weight[:, [2, 3]] = 0
        net.third.weight[:, 3] = 0
    x = gaussian(3, 4)
    small = checked(net.eval(), x, removed=2)
    for dense, cut in zip(net.train()(x), small.train()(x), strict=True):
        assert torch.allclose(dense, cut, atol=1e-6)


def test_a_layer_that_training_calls_twice_is_left_as_it_is():
    def forward(net, x):
        hidden = torch.relu(net.second(torch.relu(net.first(x))))
        return net.head(torch.relu(net.second(hidden)) if net.training else hidden)

    net = Wired(forward, first=nn.Linear(4, 6), second=nn.Linear(6, 6), head=nn.Linear(6, 2))
    for layer in (net.first, net.second):
        zero_rows_(layer, [1])
    small = checked(net.eval(), gaussian(3, 4), removed=0)
    assert torch.allclose(net.train()(gaussian(3, 4)), small.train()(gaussian(3, 4)))


def test_a_layer_that_reads_the_input_itself_in_training_keeps_its_columns():
    def forward(net, x):
        return net.second(x if net.training else torch.relu(net.first(x)))

    net = Wired(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 2))
    zero_rows_(net.first, [1])
    small = checked(net.eval(), gaussian(3, 4), removed=0)
    assert torch.equal(net.train()(gaussian(3, 4)), small.train()(gaussian(3, 4)))


def test_an_unknown_layer_that_reads_the_input_is_named():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    table = removable_units(net, torch.tensor([[0, 1], [2, 3]]))
    assert table["layer"].tolist() == ["'0' (Embedding)"]


def test_dropout_that_is_always_on_leaves_only_zero_constant():
    def forward(net, x):
        return net.second(functional.dropout(torch.relu(net.first(x)), 0.5))

    net = Wired(forward, first=nn.Linear(4, 5), second=nn.Linear(5, 2))
    zero_rows_(net.first, [1, 2])
    with torch.no_grad():
        net.first.bias[1:3] = torch.tensor([1.0, -1.0])
    table = removable_units(net, gaussian(3, 4))
    assert table.loc[table["removed"], "unit"].tolist() == [2]


# The model itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_mode_hooks_and_gradients_are_kept(dtype):
    net = mlp(4, 6, 5, outputs=2).to(dtype)
    zero_rows_(net[1], [0, 3])
    net[3].weight.requires_grad_(False)
    net[2].eval()
    net[5].register_forward_hook(lambda *args: None)
    small = compact(net, gaussian(3, 4))
    assert all(p.dtype == dtype for p in small.parameters())
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    assert len(small[5]._forward_hooks) == 1
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in net.parameters()]
    assert small[1].out_features == 4
    assert gap(net, small, gaussian(3, 4)) <= max(1e-6, 16 * torch.finfo(dtype).eps)


def test_inplace_changes_and_returns_the_model_itself():
    net = mlp(4, 6, outputs=2)
    zero_rows_(net[1], [0, 3])
    small = compact(net, gaussian(3, 4))
    assert compact(net, gaussian(3, 4), inplace=True) is net
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), small.parameters(), strict=True))


def test_weights_that_stay_are_kept_to_the_last_bit():
    net = mlp(4, 6, 5, outputs=2)
    zero_rows_(net[1], [0, 3])
    small = compact(net, gaussian(3, 4))
    assert torch.equal(small[1].weight, net[1].weight[[1, 2, 4, 5]])
    assert torch.equal(small[3].weight, net[3].weight[:, [1, 2, 4, 5]])
    assert torch.equal(small[5].weight, net[5].weight)


def test_a_net_without_dead_units_is_copied():
    net = mlp(4, 6, outputs=2)
    small = checked(net, gaussian(3, 4), removed=0)
    assert small is not net
    assert len(removable_units(net, gaussian(3, 4))) == 0


def test_one_example_will_do_and_several_inputs_may_be_given():
    net = mlp(4, 6, outputs=2)
    zero_rows_(net[1], [0])
    assert compact(net, gaussian(1, 4))[1].out_features == 5
    two = Wired2(nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2))
    zero_rows_(two.first, [0])
    zero_rows_(two.second, [0])
    small = compact(two, (gaussian(2, 4), gaussian(2, 3)))
    assert small.head.in_features == 5
    assert gap(two, small, (gaussian(2, 4), gaussian(2, 3))) <= 1e-6


class Wired2(nn.Module):
    def __init__(self, first, second, head):
        super().__init__()
        self.first, self.second, self.head = first, second, head

    def forward(self, x, y, scale=1.0, mask=None):
        hidden = self.first(x) + self.second(y)
        return self.head(torch.relu(hidden if mask is None else hidden * mask) * scale)


# Bad input -----------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.layer(x)
        return x


def scaled_by_width():
    return Wired(
        lambda net, x: net.second(torch.relu(net.first(x))) / net.first.out_features,
        first=nn.Linear(4, 6),
        second=nn.Linear(6, 2),
    )


def with_weight(value):
    net = mlp(4, 6, outputs=2)
    with torch.no_grad():
        net[1].weight[0, 0] = value
    return net


def masked():
    net = mlp(4, 6, outputs=2)
    torch_prune.l1_unstructured(net[1], "weight", 3)
    return net


def overflowing():
    """In float16 the constant behind a sigmoid and a large weight does not fit into a bias."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).half()
    with torch.no_grad():
        net[0].weight[0], net[0].bias[0], net[2].weight[:, 0] = 0, 6e4, 6e4
    return net


BAD = [
    ("mlp", gaussian(3, 4), TypeError, "model must be an nn.Module, got str"),
    (mlp(4, 6, outputs=2), [[1.0]], TypeError, "example must be a tensor or a tuple of tensors, got list"),
    (mlp(4, 6, outputs=2), (), TypeError, "example must be a tensor or a tuple of tensors, got tuple"),
    (mlp(4, 6, outputs=2), torch.zeros(0, 4), ValueError, r"example has shape \(0, 4\)"),
    (mlp(4, 6, outputs=2), torch.zeros(3, 5), ValueError, r"does not run in float64 on an example of shape \(3, 5\)"),
    (mlp(4, 6, outputs=2), gaussian(3, 4) * torch.inf, ValueError, "outputs on the example are not finite"),
    (Branches(), gaussian(3, 4), ValueError, r"cannot be traced at test_compact.py:\d+ `if x.sum\(\) > 0:`"),
    (with_weight(torch.nan), gaussian(3, 4), ValueError, "'1.weight' holds NaN or infinite values"),
    (nn.Sequential(nn.LazyLinear(3, bias=False)), gaussian(3, 4), ValueError, "'0.weight' is lazy"),
    (mlp(4, 6, outputs=2).to("meta"), gaussian(3, 4), ValueError, "'1.weight' is on the meta device"),
    (masked(), gaussian(3, 4), ValueError, "Layer '1' is already pruned by torch. Call torch.nn.utils.prune.remove"),
    (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
        gaussian(3, 4),
        ValueError,
        "Layer '0' is parametrised. Call",
    ),
]


@pytest.mark.parametrize(("net", "x", "kind", "message"), BAD)
@pytest.mark.parametrize("call", [compact, removable_units])
def test_bad_input_is_an_error_that_says_what_to_do(call, net, x, kind, message):
    with pytest.raises(kind, match=message):
        call(net, x)


def test_a_forward_that_computes_with_a_width_is_refused_and_nothing_changes():
    net = scaled_by_width()
    zero_rows_(net.first, [1])
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"computes with the width of a layer: .*, 6.* would become .*, 5"):
        compact(net, gaussian(3, 4), inplace=True)
    assert_unchanged(net, before)


def test_constants_too_large_for_the_type_are_refused_and_nothing_changes():
    net = overflowing()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"Rounding the folded constants to torch.float16 would change outputs"):
        compact(net, gaussian(3, 4), inplace=True)
    assert_unchanged(net, before)


def test_a_model_pruned_in_one_call_can_be_compacted():
    checked(finalize(prune(mlp(6, 30, 20, outputs=3), sparsity=0.9)), gaussian(4, 6))
