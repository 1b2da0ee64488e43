from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, weight_norm

from ellq.analysis.nets import cifar_resnet, pretrained, small_conv
from ellq.pruning.coupling import ChannelGroup, Member, channel_groups
from ellq.pruning.surgery import cut_channels_
from pruned_nets import assert_unchanged, gaussian, mlp, snapshot

IMAGES = gaussian(2, 3, 10, 10)


def seeded(build, *args, **kwargs) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(*args, **kwargs)
        for module in net.modules():  # statistics and slopes that tell channels apart
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var"):
                    buffer.copy_(torch.rand_like(buffer) + 0.5)
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.PReLU)):
                for parameter in module.parameters(recurse=False):
                    parameter.data.uniform_(0.5, 1.5)
    return net.eval()


def members(group: ChannelGroup) -> list[tuple[str, str]]:
    return [(member.module, member.side) for member in group.members]


def groups_of(coupling) -> dict[str, int]:
    return {group.name: group.units for group in coupling.groups}


def assert_sound(model: nn.Module, example: torch.Tensor, groups, seed: int = 0) -> None:
    """Cut a random part of every group at once; compare with zero columns in the full net, in double precision."""
    rng = np.random.default_rng(seed)
    batch = example.double() if example.is_floating_point() else example
    small, full = copy.deepcopy(model).double().eval(), copy.deepcopy(model).double().eval()
    cuts = [(g, np.sort(rng.choice(g.units, rng.integers(1, g.units), replace=False))) for g in groups]
    cut_channels_(small, cuts)
    for group, kept in cuts:
        gone = np.setdiff1d(np.arange(group.units), kept)
        for member in group.consumers:
            columns = member.entries[gone].ravel()
            full.get_submodule(member.module).weight.data[:, columns] = 0
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        a, b, dense = (net(batch.clone()) for net in (small, full, copy.deepcopy(model).double().eval()))
    if isinstance(a, dict):
        a, b, dense = a["logits"], b["logits"], dense["logits"]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(a, dense)


def found(model: nn.Module, example: torch.Tensor):
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coupling = channel_groups(model, example)
    assert_unchanged(model, before)
    assert len({g.name for g in coupling.groups}) == len(coupling.groups)
    seen = [(m.module, m.side, e) for g in coupling.groups for m in g.members for e in m.entries.ravel().tolist()]
    assert len(seen) == len(set(seen))
    if coupling.groups:
        assert_sound(model, example, coupling.groups)
        assert_sound(model, example, coupling.groups, seed=1)
    return coupling


class Bottleneck(nn.Module):
    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        same = before == after and stride == 1
        shortcut = (nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(14), nn.Linear(14, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.conv1(functional.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(functional.relu(self.norm2(x)))], 1)
        return self.head(functional.relu(self.norm3(x)).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.three, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.mixed, self.head = nn.Conv2d(15, 7, 3), nn.Linear(7, 2)

    def forward(self, x):
        parts = [self.one(x), self.three(x), self.pool(functional.max_pool2d(x, 3, 1, 1))]
        return self.head(self.mixed(torch.cat(parts, -3).relu_()).flatten(2).mean(-1))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up, self.out = (
            nn.Conv2d(3, 8, 3),
            nn.Linear(8, 4),
            nn.Linear(4, 8),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        x = self.conv(x)
        gate = torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3))))))
        return self.out(x * gate[:, :, None, None])


class Gated(nn.Module):
    """A feed-forward block whose gate and value come from two layers, or from the halves of one."""

    def __init__(self, how="two"):
        super().__init__()
        self.how = how
        self.gate = nn.Linear(8, 12 if how == "two" else 24)
        self.value = nn.Linear(8, 12, bias=False) if how == "two" else None
        self.out = nn.Linear(12, 8)

    def forward(self, x):
        if self.value is not None:
            return self.out(functional.silu(self.gate(x)) * self.value(x))
        if self.how == "glu":
            return self.out(functional.glu(self.gate(x)))
        halves = self.gate(x).chunk(2, dim=-1) if self.how == "chunk" else self.gate(x).split(12, dim=2)
        return self.out(functional.silu(halves[0]) * halves[1])


class Attention(nn.Module):
    def __init__(self, width=16, heads=4, free=True, fused=True):
        super().__init__()
        self.heads, self.free, self.fused, self.size = heads, free, fused, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, -1 if self.free else self.size).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        if self.fused:
            read = functional.scaled_dot_product_attention(q, k, v)
        else:
            read = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.size), -1) @ v
        return self.out(read.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A BERT-like encoder of one block, post-norm, with learned positions."""

    def __init__(self, norm=nn.LayerNorm, **attention):
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 16), nn.Embedding(5, 16)
        self.norm0, self.norm1, self.norm2 = norm(16), norm(16), norm(16)
        self.attention = Attention(**attention)
        self.wide, self.narrow, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 2)

    def forward(self, words):
        x = self.norm0(self.words(words) + self.positions(torch.arange(words.shape[1])))
        x = self.norm1(x + self.attention(x))
        x = self.norm2(x + self.narrow(functional.gelu(self.wide(x))))
        return {"logits": self.head(x[:, 0])}


WORDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))


class TestConvolutions:
    def test_a_chain_of_linears(self):
        coupling = found(mlp(4, 5, 6, 2), gaussian(3, 4))
        assert groups_of(coupling) == {"0": 5, "2": 6}
        assert [members(group) for group in coupling.groups] == [
            [("0", "out"), ("2", "in")],
            [("2", "out"), ("4", "in")],
        ]
        assert coupling.left == {"4": "they are the model's outputs"}

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_norms_pooling_and_flattening(self, dims):
        conv, norm, pool = (
            (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d),
            (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d),
            (nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d),
        )[dims - 1]
        layers = [conv(3, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True), pool(2), nn.Flatten()]
        net = seeded(nn.Sequential, *layers, nn.Linear(8 * 2**dims, 5))
        (group,) = found(net, gaussian(2, 3, *[4] * dims)).groups
        assert members(group) == [("0", "out"), ("1", "both"), ("5", "in")]
        entries = group.consumers[0].entries
        assert entries.tolist() == np.arange(8 * 2**dims).reshape(8, -1).tolist()

    @pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
    def test_padding_modes_and_upsampling(self, mode):
        layers = [nn.Conv2d(3, 6, 3, padding=1, padding_mode=mode), nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1)]
        net = seeded(nn.Sequential, *layers, nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode), nn.Conv2d(4, 2, 1))
        assert groups_of(found(net, IMAGES)) == {"0": 6, "3": 4}

    def test_units_of_grouped_convolutions_and_group_norms_are_whole_groups(self):
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.GroupNorm(8, 16),
            nn.Conv2d(16, 32, 3, groups=4),
            nn.PReLU(32),
            nn.InstanceNorm2d(32, affine=True, track_running_stats=True),
            nn.Conv2d(32, 5, 1),
        )
        (group,) = found(seeded(lambda: net), IMAGES).groups
        shapes = {m.module: (m.side, *m.entries.shape) for m in group.members}
        assert shapes == {
            "0": ("out", 4, 4),
            "1": ("both", 4, 4),
            "2": ("both", 4, 8),
            "3": ("both", 4, 8),
            "4": ("both", 4, 8),
            "5": ("in", 4, 8),
        }
        assert group.channelwise[1].inputs.tolist() == np.arange(16).reshape(4, 4).tolist()

    def test_depthwise_convolutions_carry_units(self):
        layers = [nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 16, 3, groups=8), nn.Hardswish(), nn.Conv2d(16, 2, 1)]
        (group,) = found(seeded(nn.Sequential, *layers), IMAGES).groups
        assert members(group) == [("0", "out"), ("2", "both"), ("4", "in")]
        assert (group.units, group.members[1].entries.shape, group.members[1].inputs.shape) == (8, (8, 2), (8, 1))

    def test_a_depthwise_convolution_of_the_input_stays(self):
        coupling = found(seeded(nn.Sequential, nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 5, 1)), IMAGES)
        assert coupling.groups == ()
        assert coupling.left["0"] == "layer '0' groups them with channels that stay"

    def test_a_small_conv_net(self):
        assert groups_of(found(small_conv(1, 8, 3), gaussian(2, 1, 8, 8))) == {"0": 16, "2": 32, "6": 64}


class TestBranches:
    def test_residual_streams_with_identity_and_strided_shortcuts(self):
        blocks = [Bottleneck(8, 8), Bottleneck(8, 16, 2), Bottleneck(16, 16)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
        coupling = found(seeded(nn.Sequential, nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks, *head), IMAGES)
        assert groups_of(coupling) == {"0": 8, "2.conv1": 8, "3.conv1": 16, "3.conv2": 16, "4.conv1": 16}
        stream = coupling.groups[0]
        assert [m.module for m in stream.producers] == ["0", "2.conv2"]
        assert [m.module for m in stream.consumers] == ["2.conv1", "3.conv1", "3.shortcut.0"]
        assert [m.module for m in coupling.groups[3].producers] == ["3.conv2", "3.shortcut.0", "4.conv2"]

    def test_a_layer_that_reads_and_makes_the_same_units(self):
        class Stream(Pair):
            def __init__(self):
                super().__init__()
                self.between = nn.Linear(6, 6)

            def forward(self, x):
                x = self.first(x)
                return self.second(x + torch.relu(self.between(x)))

        (group,) = found(seeded(Stream), gaussian(3, 4)).groups
        assert members(group) == [("first", "out"), ("between", "in"), ("between", "out"), ("second", "in")]

    def test_zero_padded_shortcuts(self):
        net = seeded(cifar_resnet, 8)
        coupling = found(net, gaussian(1, 3, 8, 8))
        assert groups_of(coupling) == {"conv1": 16, "layer1.0.conv1": 16, "layer2.0.conv1": 32, "layer3.0.conv1": 64}
        # The 16 channels of the first stream go on in the middle of the wider ones; padding is of fixed size.
        entries = {m.module: m.entries.ravel().tolist() for m in coupling.groups[0].producers}
        assert entries["layer2.0.conv2"] == list(range(8, 24))
        assert entries["layer3.0.conv2"] == list(range(24, 40))
        assert "does not run without some of them" in coupling.left["layer2.0.conv2"]

    def test_the_pretrained_resnet(self):
        try:
            net = pretrained("resnet20")
        except FileNotFoundError as error:
            pytest.skip(str(error))
        coupling = found(net, gaussian(1, 3, 16, 16))
        assert len(coupling.groups) == 10
        assert sum(group.units for group in coupling.groups) == 16 + 3 * (16 + 32 + 64)

    def test_concatenation_as_in_densenet(self):
        coupling = found(seeded(DenseNet), IMAGES)
        assert groups_of(coupling) == {"stem": 6, "conv1": 4, "conv2": 4}
        assert [m.entries.ravel().tolist() for m in coupling.groups[1].members if m.module in ("norm3", "head")] == [
            [6, 7, 8, 9],
            [6, 7, 8, 9],
        ]

    def test_concatenation_as_in_inception(self):
        assert groups_of(found(seeded(Inception), IMAGES)) == {"one": 4, "three": 5, "pool": 6, "mixed": 7}

    def test_gates_of_channels(self):
        coupling = found(seeded(SqueezeExcite), IMAGES)
        assert groups_of(coupling) == {"conv": 8, "down": 4}
        assert members(coupling.groups[0]) == [("conv", "out"), ("down", "in"), ("up", "out"), ("out", "in")]

    def test_channel_shuffle_takes_a_channel_from_every_group(self):
        class Shuffle(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

            def forward(self, x):
                x = self.first(x)
                return self.second(x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2))

        (group,) = found(seeded(Shuffle), IMAGES).groups
        assert group.producers[0].entries.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
        assert group.consumers[0].entries.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]

    def test_pixel_shuffle_takes_all_that_become_one_channel(self):
        net = seeded(nn.Sequential, nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1))
        (group,) = found(net, IMAGES).groups
        assert group.producers[0].entries.tolist() == np.arange(12).reshape(3, 4).tolist()


class TestTransformers:
    @pytest.mark.parametrize("how", ["two", "chunk", "glu"])
    def test_gated_feed_forward_units_go_from_gate_and_value(self, how):
        (group,) = found(seeded(Gated, how), gaussian(2, 5, 8)).groups
        assert (group.name, group.units) == ("gate", 12)
        if how == "two":
            assert members(group) == [("gate", "out"), ("value", "out"), ("out", "in")]
        else:
            assert group.producers[0].entries[3].tolist() == [3, 15]

    def test_a_split_of_fixed_size_stays(self):
        coupling = found(seeded(Gated, "split"), gaussian(2, 5, 8))
        assert coupling.groups == ()
        assert "does not run without some of them" in coupling.left["gate"]

    @pytest.mark.parametrize("first", [False, True])
    def test_the_feed_forward_of_torch_encoder_layers(self, first):
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=first)
        coupling = found(seeded(nn.Sequential, nn.Linear(6, 16), layer, nn.Linear(16, 3)), gaussian(2, 5, 6))
        assert groups_of(coupling) == {"1.linear1": 32}
        assert coupling.left.keys() == {"0", "1.linear2", "2"}
        assert torch.backends.mha.get_fastpath_enabled()

    @pytest.mark.parametrize("fused", [False, True])
    def test_an_encoder_written_out(self, fused):
        coupling = found(seeded(Encoder, fused=fused), WORDS)
        assert groups_of(coupling) == {"attention.value": 4, "wide": 40}
        # One channel of every head, as the view with -1 allows.
        assert coupling.groups[0].producers[0].entries[1].tolist() == [1, 5, 9, 13]
        assert coupling.groups[0].consumers[0].entries[1].tolist() == [1, 5, 9, 13]
        for layer in ("attention.query", "attention.key"):
            assert "multiplie" in coupling.left[layer]
        assert coupling.left["words"] == "layer 'norm0' normalises over them (LayerNorm)"

    @pytest.mark.parametrize("fused", [False, True])
    def test_values_of_heads_of_fixed_size_stay(self, fused):
        coupling = found(seeded(Encoder, free=False, fused=fused), WORDS)
        assert groups_of(coupling) == {"wide": 40}
        assert "does not run without some of them" in coupling.left["attention.value"]

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    def test_what_is_normalised_over_stays_and_is_named(self, norm):
        coupling = found(seeded(nn.Sequential, nn.Linear(4, 6), norm(6), nn.Linear(6, 2)), gaussian(3, 4))
        assert coupling.groups == ()
        assert coupling.left["0"] == f"layer '1' normalises over them ({norm.__name__})"

    def test_embeddings_without_a_norm(self):
        (group,) = found(seeded(nn.Sequential, nn.Embedding(20, 6), nn.Tanh(), nn.Linear(6, 3)), WORDS).groups
        assert members(group) == [("0", "out"), ("2", "in")]


class Pair(nn.Module):
    def __init__(self, first=None, second=None):
        super().__init__()
        self.first, self.second = first or nn.Linear(4, 6), second or nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Twice(Pair):
    def forward(self, x):
        return super().forward(super().forward(x))


class Tied(Pair):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.second.weight = self.first.weight


class UsesWeight(Pair):
    def forward(self, x):
        return super().forward(x) * self.second.weight.norm()


class Output(Pair):
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden), [hidden]


class Scaled(Pair):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return self.second(self.first(x) * self.scale)


class Constant(Pair):
    def forward(self, x):
        return self.second(self.first(x) + torch.arange(6, dtype=x.dtype))


class Softmaxed(Pair):
    def forward(self, x):
        return self.second(self.first(x).softmax(-1))


class Summed(Pair):
    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden - hidden.mean(-1, keepdim=True))


class Writes(Pair):
    def forward(self, x):
        hidden = self.first(x)
        hidden[:, :2] = 1.0
        return self.second(hidden)


class NoGradient(Pair):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Branches(Pair):
    def forward(self, x):
        return super().forward(x) if x.sum() > 1e9 else super().forward(2 * x)


class OwnNorm(Pair):
    def forward(self, x):
        return self.second(functional.layer_norm(self.first(x), (6,)))


class Sorted(Pair):
    """Sorting mixes units in a way no rule knows; only the check can tell."""

    def forward(self, x):
        return self.second(self.first(x).sort(-1)[0])


class TestLeaves:
    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            (Twice, "is called 2 times"),
            (Tied, "it shares parameters with 'second'"),
            (UsesWeight, "the model itself uses the parameters of 'second'"),
            (Output, "they are the model's outputs"),
            (Scaled, "Mul joins them with parameter 'scale'"),
            (Constant, "does not run without some of them"),
            (Softmaxed, "Softmax mixes them"),
            (Summed, "Mean mixes them"),
            (Writes, "otherwise than zeroing what reads them"),
            (OwnNorm, "NativeLayerNorm mixes them"),
            (Sorted, "otherwise than zeroing what reads them"),
        ],
    )
    def test_units_that_cannot_go(self, kind, reason):
        coupling = found(seeded(kind), gaussian(3, 4))
        assert coupling.groups == ()
        assert reason in coupling.left["first"]

    @pytest.mark.parametrize("layer", ["first", "second"])
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (parametrizations.weight_norm, "is a ParametrizedLinear"),
            (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "has hooks"),
            (lambda layer: layer.register_forward_hook(lambda *_: None), "has hooks"),
        ],
    )
    def test_layers_that_compute_more_than_they_say(self, layer, change, reason):
        net = seeded(Pair)
        change(getattr(net, layer))
        net.zero_grad()
        for module in net.modules():  # a pruned weight is not a leaf, which cannot be copied
            if "weight" in vars(module):
                module.weight = module.weight.detach()
        coupling = found(net, gaussian(3, 4))
        assert coupling.groups == ()
        assert reason in coupling.left["first"]

    def test_layers_of_other_kinds_are_named(self):
        net = seeded(nn.Sequential, nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 2, 1))
        assert found(net, IMAGES).left["0"] == "layer '1' is a ConvTranspose2d, which cannot be cut"

        class FrozenNorm(nn.modules.batchnorm._BatchNorm):
            def _check_input_dim(self, x):
                pass

        net = seeded(nn.Sequential, nn.Linear(4, 6), FrozenNorm(6), nn.Linear(6, 3))
        assert found(net, gaussian(3, 4)).left["0"] == "layer '1' is a FrozenNorm, which cannot be cut"
        net = seeded(nn.Sequential, nn.Linear(4, 6), nn.Linear(6, 5), nn.GRU(5, 3))
        net[2].forward = lambda x, run=net[2].forward: run(x)[0]
        coupling = channel_groups(net, gaussian(2, 3, 4))
        assert groups_of(coupling) == {"0": 6}
        assert coupling.left["1"] == "layer '2' is a GRU, which cannot be cut"

    def test_an_embedding_that_renormalises(self):
        net = seeded(nn.Sequential, nn.Embedding(20, 6, max_norm=1.0), nn.Linear(6, 3))
        assert channel_groups(net, WORDS).left["0"] == "it has max_norm"

    def test_layers_that_are_not_called(self):
        class Direct(Pair):
            def forward(self, x):
                return functional.linear(torch.relu(self.first(x)), self.second.weight)

        net = seeded(Direct)
        net.unused = nn.Linear(3, 3)
        coupling = found(net, gaussian(3, 4))
        assert coupling.left == {
            "first": "Mm, outside a layer, mixes them",
            "second": "the model uses its parameters without calling it",
            "unused": "it is not called",
        }

    def test_what_depends_on_fixed_heads_does_not_hold_back_the_values(self):
        class Biased(Attention):
            def __init__(self):
                super().__init__(fused=False)
                self.bias = nn.Embedding(25, 4)

            def forward(self, x):
                q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
                bias = self.bias(torch.arange(25).reshape(5, 5)).permute(2, 0, 1)
                return self.out((torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v).transpose(1, 2).flatten(2))

        coupling = found(seeded(Biased), gaussian(2, 5, 16))
        assert groups_of(coupling) == {"value": 4}
        assert coupling.left["bias"] == "Add joins them with channels that stay"


class TestLooksOnly:
    def test_at_frozen_training_and_half_precision_models(self):
        net = seeded(nn.Sequential, nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1))
        net.train().requires_grad_(False)
        with torch.no_grad():
            assert groups_of(found(net, IMAGES)) == {"0": 6}
        for dtype in (torch.float16, torch.bfloat16):
            half = copy.deepcopy(net).to(dtype)
            assert groups_of(found(half, IMAGES.to(dtype))) == {"0": 6}
            assert half[0].weight.dtype == dtype

    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
    def test_in_place_functions(self, shape):
        class InPlace(Pair):
            def forward(self, x):
                return self.second(self.first(x).relu_().mul_(2))

        assert groups_of(found(seeded(InPlace), gaussian(*shape))) == {"first": 6}

    def test_a_branch_follows_the_example(self):
        assert groups_of(channel_groups(seeded(Branches), gaussian(3, 4))) == {"first": 6}

    def test_dropout_and_random_numbers(self):
        net = seeded(nn.Sequential, nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2)).train()
        assert groups_of(found(net, gaussian(3, 4))) == {"0": 6}


class TestRefuses:
    def test_models_whose_operations_leave_no_trace(self):
        with pytest.raises(ValueError, match=r"runs under no_grad. Pass the groups as groups="):
            channel_groups(seeded(NoGradient), gaussian(3, 4))

    def test_models_that_fail_when_followed_naming_the_module(self):
        class Leaves(nn.Linear):
            def forward(self, x):
                return super().forward(torch.from_numpy(x.numpy()))

        with pytest.raises(
            ValueError, match=r"cannot be followed \(.*numpy.* in module '1'\). Pass the groups as groups="
        ):
            channel_groups(seeded(nn.Sequential, nn.Linear(4, 4), Leaves(4, 4)), gaussian(3, 4))

    def test_examples_the_model_does_not_accept(self):
        with pytest.raises(ValueError, match=r"does not run on the example \(.*\). Pass a batch it accepts"):
            channel_groups(mlp(4, 5, 2), gaussian(3, 5))

    def test_models_without_numbers_to_compare(self):
        class Decides(Pair):
            def forward(self, x):
                return super().forward(x).argmax(-1)

        for groups in (None, [manual()]):
            with pytest.raises(ValueError, match="returns no floating-point numbers"):
                channel_groups(seeded(Decides), gaussian(3, 4), groups=groups)

    def test_examples_that_are_not_one_tensor(self):
        with pytest.raises(TypeError, match="example must be a batch as one tensor, got list"):
            channel_groups(mlp(4, 5, 2), [gaussian(3, 4)])

    def test_outputs_that_are_not_finite(self):
        net = mlp(4, 5, 2)
        net[0].weight.data[0, 0] = math.nan
        with pytest.raises(ValueError, match="outputs on the example are not finite: '0' is the first layer"):
            channel_groups(net, gaussian(3, 4))


def columns(*entries: int) -> np.ndarray:
    return np.array(entries)[:, None]


def manual(**changes) -> ChannelGroup:
    entries = {"first": columns(*range(6)), "second": columns(*range(6)), **changes}
    sides = (Member("first", "out", entries["first"]), Member("second", "in", entries["second"]))
    return ChannelGroup("mine", 6, sides)


class TestGivenGroups:
    def test_are_checked_and_returned_where_nothing_can_be_followed(self):
        net = seeded(NoGradient)
        coupling = channel_groups(net, gaussian(3, 4), groups=[manual()])
        assert [group.name for group in coupling.groups] == ["mine"]
        assert coupling.left == {"second": "it is in none of groups="}
        assert_sound(net, gaussian(3, 4), coupling.groups)

    @pytest.mark.parametrize(
        ("group", "match"),
        [
            (manual(second=columns(1, 0, 2, 3, 4, 5)), "changes the outputs otherwise than zeroing"),
            (manual(second=columns(1, 2, 3, 4, 5, 6)), "has 6 channels"),
            (manual(first=columns(0, 1)), r"entries of shape \(2, 1\), expected \(6, "),
            (ChannelGroup("mine", 6, manual().members[:1]), "does not run without some of them"),
            (
                ChannelGroup("mine", 6, (Member("none", "out", columns(*range(6))),)),
                "'none' of group 'mine' is missing",
            ),
        ],
    )
    def test_are_refused_with_what_does_not_fit(self, group, match):
        with pytest.raises(ValueError, match=rf"Group 'mine' of groups= cannot be cut: .*{match}"):
            channel_groups(seeded(Pair), gaussian(3, 4), groups=[group])

    def test_are_refused_when_they_share_a_name_or_channels(self):
        with pytest.raises(ValueError, match="two groups called 'mine'"):
            channel_groups(seeded(Pair), gaussian(3, 4), groups=[manual(), manual()])
        other = ChannelGroup("other", 6, manual().members)
        with pytest.raises(ValueError, match=r"cannot be cut together: .*same channel twice"):
            channel_groups(seeded(Pair), gaussian(3, 4), groups=[manual(), other])


def test_maps_of_the_graph_library_are_not_needed(monkeypatch):
    from torch_pruning.dependency import index_mapping

    def fails(graph):
        raise ZeroDivisionError

    monkeypatch.setattr(index_mapping, "update_index_mapping", fails)
    assert groups_of(channel_groups(small_conv(1, 8, 3), gaussian(2, 1, 8, 8))) == {"0": 16, "2": 32, "6": 64}


def test_the_check_catches_one_swapped_pair_of_channels(monkeypatch):
    """A wrong map of channels that keeps every shape is left out, with the reason."""
    from ellq.pruning import channel_flow

    def swapped(x, operation):
        return torch.cat([x[:, [1, 0]], x[:, 2:]], 1).reshape(operation._input_metadata[0].shape)

    monkeypatch.setitem(channel_flow._RULES, "View", channel_flow._moves(swapped))
    coupling = channel_groups(small_conv(1, 8, 3), gaussian(2, 1, 8, 8))
    assert groups_of(coupling) == {"0": 16, "6": 64}
    assert "otherwise than zeroing" in coupling.left["2"]


def test_a_random_cut_of_planted_duplicates_leaves_the_outputs_as_they_are():
    net = seeded(nn.Sequential, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias, net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var):
            tensor[4:] = tensor[:4]
    (group,) = channel_groups(net, IMAGES.double()).groups
    small = copy.deepcopy(net)
    small[3].weight.data[:, :4] += small[3].weight.data[:, 4:]
    cut_channels_(small, [(group, np.arange(4))])
    torch.testing.assert_close(small(IMAGES.double()), net(IMAGES.double()))


def test_legacy_weight_norm_cannot_be_copied_and_says_so():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="cannot be copied"):
        channel_groups(net, gaussian(3, 4))
