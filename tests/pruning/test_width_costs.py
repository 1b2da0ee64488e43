from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ellq.analysis import cost
from ellq.analysis.activation_memory import peak_activation_bytes
from ellq.analysis.flops import total_flops
from ellq.analysis.nets import cifar_resnet, vgg16_cifar10
from ellq.pruning.coupling import ChannelGroup, Coupling, Member, channel_groups
from ellq.pruning.surgery import channels, cut_channels_
from ellq.pruning.width_costs import CostModel, flops_model, layer_widths, memory_model, parameters_model


def rows(*shape: int, start: int = 0) -> np.ndarray:
    """Entries counted from ``start``, a unit after the other."""
    return np.arange(start, start + int(np.prod(shape))).reshape(shape)


class Dense(nn.Module):
    """Reads two convolutions side by side, after a norm over both; one of them is grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(2, 4, 1, bias=False)
        self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(13)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.head = nn.Linear(13 * 9, 3)

    def forward(self, x):
        both = torch.cat([self.left(x), self.depthwise(self.right(x))], dim=1)
        return self.head(self.pool(self.relu(self.norm(both))).flatten(1))


DENSE = Coupling(
    (
        ChannelGroup(
            "left",
            5,
            (Member("left", "out", rows(5, 1)), Member("norm", "both", rows(5, 1)), Member("head", "in", rows(5, 9))),
        ),
        ChannelGroup(
            "right",
            4,
            (
                Member("right", "out", rows(4, 1)),
                Member("depthwise", "both", rows(4, 2), inputs=rows(4, 1)),
                Member("norm", "both", rows(4, 2, start=5)),
                Member("head", "in", rows(4, 18, start=45)),
            ),
        ),
    ),
    {},
)


class Attends(nn.Module):
    """Weighs positions, so that its own forward computes a product as wide as the values."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.values, self.out = nn.Linear(6, 7), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.scores(x).softmax(1) @ self.values(x))


ATTENDS = Coupling(
    (ChannelGroup("values", 8, (Member("values", "out", rows(8, 1)), Member("out", "in", rows(8, 1)))),), {}
)


class Gram(nn.Module):
    """Costs what the square of its width does, in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x @ (x.mT @ x))


GRAM = Coupling((ChannelGroup("first", 6, (Member("first", "out", rows(6, 1)), Member("last", "in", rows(6, 1)))),), {})


class Twice(nn.Module):
    """Calls a layer twice, which reads and makes the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.middle(self.middle(self.first(x))))


TWICE = Coupling(
    (
        ChannelGroup(
            "first",
            6,
            tuple(
                Member(name, side, rows(6, 1))
                for name, side in (("first", "out"), ("middle", "in"), ("middle", "out"), ("last", "in"))
            ),
        ),
    ),
    {},
)


def residual() -> nn.Module:
    """Streams that convolutions both read and write."""
    net = cifar_resnet(8)
    return nn.Sequential(net.conv1, net.bn1, nn.ReLU(), net.layer1, nn.Flatten(), nn.Linear(16 * 36, 3))


ZOO = {
    "concatenated": (Dense, (2, 2, 6, 6), DENSE),
    "attention": (Attends, (2, 7, 6), ATTENDS),
    "twice": (Twice, (2, 3), TWICE),
    "residual": (residual, (2, 3, 6, 6), None),
    "resnet": (lambda: cifar_resnet(8), (2, 3, 16, 16), None),
    "vgg": (lambda: vgg16_cifar10(range(2, 16)), (2, 3, 32, 32), None),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (2, 5, 8), None),
    "dense": (lambda: nn.Sequential(nn.Linear(3, 2)), (1, 3), Coupling((), {})),
}


@pytest.fixture(params=ZOO)
def case(request):
    torch.manual_seed(0)
    build, shape, coupling = ZOO[request.param]
    net, example = build(), torch.randn(shape)
    return net, coupling or channel_groups(net, example), example


def cut(net: nn.Module, coupling: Coupling, widths: dict[str, int]) -> nn.Module:
    smaller = copy.deepcopy(net)
    cut_channels_(smaller, [(group, np.arange(widths[group.name])) for group in coupling.groups])
    return smaller


def choices(coupling: Coupling, number: int) -> list[dict[str, int]]:
    random = np.random.default_rng(0)
    some = [{g.name: int(random.integers(1, g.units + 1)) for g in coupling.groups} for _ in range(number)]
    return [{g.name: g.units for g in coupling.groups}, {g.name: 1 for g in coupling.groups}, *some]


class TestIsExactForEveryChoiceOfWidths:
    """The models against nets that are cut and counted."""

    @pytest.mark.parametrize("convention", ["2mac", "chee2021"])
    def test_flops(self, case, convention):
        net, coupling, example = case
        model = flops_model(net, coupling, example, convention)
        for widths in choices(coupling, 4):
            counted = total_flops(cut(net, coupling, widths), example, convention=convention)
            assert model.cost(widths) == counted

    def test_parameters(self, case):
        net, coupling, example = case
        model = parameters_model(net, coupling)
        for widths in choices(coupling, 4):
            assert model.cost(widths) == cost(cut(net, coupling, widths), example).parameters

    def test_memory(self, case):
        net, coupling, example = case
        model = memory_model(net, coupling, example)
        for widths in choices(coupling, 4):
            assert model.cost(widths) == peak_activation_bytes(cut(net, coupling, widths), example)


def test_layers_are_as_wide_as_when_cut(case):
    net, coupling, _ = case
    layers = layer_widths(net, coupling)
    for widths in choices(coupling, 4):
        smaller = cut(net, coupling, widths)
        inputs, outputs = layers.at(np.array([[widths[group.name] for group in coupling.groups]], dtype=np.int64))
        for name, read, made in zip(layers.names, inputs[0], outputs[0], strict=True):
            layer = smaller.get_submodule(name)
            assert (read, made) == (channels(layer, "in"), channels(layer, "out"))


def test_a_layer_in_the_group_twice_costs_a_square():
    net = Twice()
    model = flops_model(net, TWICE, torch.ones(1, 3))
    assert [model.cost({"first": width}) for width in (1, 2, 6)] == [2 * (3 * w + 2 * w * w + 2 * w) for w in (1, 2, 6)]


def test_by_hand():
    net, example = Dense(), torch.zeros(1, 2, 6, 6)
    widths = {"left": 3, "right": 2}
    parameters = 3 * 2 * 9 + 3 + 2 * 2 + 4 * 9 + 4 + 2 * 7 + 3 * 7 * 9 + 3
    flops = 2 * 36 * (3 * 2 * 9 + 2 * 2 + 4 * 9) + 2 * 3 * 7 * 9
    assert parameters_model(net, DENSE).cost(widths) == parameters
    assert flops_model(net, DENSE, example).cost(widths) == flops
    # Biases, then the norm, the ReLU and the pooling over 7 channels.
    chee = flops + 36 * (3 + 4) + 3 + 2 * 7 * 36 + 7 * 36 + 4 * 7 * 9
    assert flops_model(net, DENSE, example, "chee2021").cost(widths) == chee


def test_the_published_fraction_of_the_cifar_vgg():
    net, example = vgg16_cifar10(), torch.zeros(1, 3, 32, 32)
    layers = [(name, layer) for name, layer in net.named_modules() if hasattr(layer, "weight")]
    chain = zip(layers[::2], layers[1::2], layers[2::2], strict=False)  # a layer, its norm, the next layer
    coupling = Coupling(
        tuple(
            ChannelGroup(
                name,
                (units := len(layer.weight)),
                tuple(
                    Member(member, side, rows(units, 1))
                    for member, side in ((name, "out"), (norm, "both"), (reader, "in"))
                ),
            )
            for (name, layer), (norm, _), (reader, _) in chain
        ),
        {},
    )
    widths = (25, 57, 92, 115, 230, 230, 207, 372, 196, 176, 196, 158, 81, 372)
    choice = dict(zip((group.name for group in coupling.groups), widths, strict=True))
    assert flops_model(net, coupling, example, "chee2021").cost(choice) == 306_320_638
    assert parameters_model(net, coupling).cost(choice) == 3_701_870


def test_the_model_is_left_alone():
    net = Dense().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    example = torch.zeros(1, 2, 6, 6)
    flops_model(net, DENSE, example, "chee2021"), parameters_model(net, DENSE), memory_model(net, DENSE, example)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())


def test_many_choices_are_counted_at_once():
    model = parameters_model(Dense(), DENSE)
    widths = np.array([[5, 4], [3, 2], [1, 1]])
    assert model.costs(widths).tolist() == [model.cost({"left": a, "right": b}) for a, b in widths.tolist()]
    assert model.dense == model.cost({}) == model.cost({"left": 5})


def test_a_peak_is_the_largest_operation():
    model = CostModel("bytes", {"a": 3, "b": 3}, lambda widths: widths.astype(float))
    assert model.costs(np.array([[3, 3], [3, 2], [2, 2], [1, 2]])).tolist() == [3, 3, 2, 2]


def test_a_narrow_chain_lowers_the_peak_only_as_far_as_the_next():
    net = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 6), nn.Linear(6, 1))
    first = ChannelGroup("0", 8, (Member("0", "out", rows(8, 1)), Member("1", "in", rows(8, 1))))
    second = ChannelGroup("1", 6, (Member("1", "out", rows(6, 1)), Member("2", "in", rows(6, 1))))
    model = memory_model(net, Coupling((first, second), {}), torch.zeros(1, 2))
    assert [model.cost({"0": width}) // 4 for width in (8, 3, 1)] == [14, 9, 7]
    assert model.cost({"0": 1, "1": 1}) // 4 == 3


class TestRefuses:
    def test_unknown_groups_and_widths_out_of_range(self):
        model = parameters_model(Dense(), DENSE)
        with pytest.raises(ValueError, match=r"widths names 'middle', which is no group\. Groups: left, right"):
            model.cost({"middle": 1})
        with pytest.raises(ValueError, match=r"width of 'left'=6 is outside \[0, 5\]"):
            model.cost({"left": 6})
        with pytest.raises(TypeError, match="width of 'left' must be a whole number"):
            model.cost({"left": 2.0})

    def test_costs_that_follow_no_known_law(self):
        with pytest.raises(ValueError, match="FLOPs do not follow the widths: cut by half the model has"):
            flops_model(Gram(), GRAM, torch.ones(1, 5, 4))
        with pytest.raises(ValueError, match="do not change evenly with the widths"):
            memory_model(Gram(), GRAM, torch.ones(1, 5, 4))

    def test_models_that_run_otherwise_when_narrow(self):
        class Fickle(nn.Sequential):
            def forward(self, x):
                x = self[0](x)
                return self[1](x if x.shape[1] > 3 else x.relu())

        net = Fickle(nn.Linear(2, 6), nn.Linear(6, 2))
        group = ChannelGroup("0", 6, (Member("0", "out", rows(6, 1)), Member("1", "in", rows(6, 1))))
        with pytest.raises(ValueError, match="runs other operations when it is narrower"):
            memory_model(net, Coupling((group,), {}), torch.ones(1, 2))

    def test_unknown_conventions_and_empty_batches(self):
        with pytest.raises(ValueError, match="convention='mac' is unknown"):
            flops_model(Dense(), DENSE, torch.zeros(1, 2, 6, 6), "mac")
        with pytest.raises(ValueError, match="at least one input"):
            flops_model(Dense(), DENSE, torch.zeros(0, 2, 6, 6))
        with pytest.raises(ValueError, match="at least one input"):
            memory_model(Dense(), DENSE, torch.zeros(0, 2, 6, 6))
