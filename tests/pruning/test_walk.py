"""Every layer must meet what it meets in a plain forward pass, and be asked to give what the dense network gives."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from ellq.analysis.nets import cifar_resnet
from ellq.pruning.walk import norms_of, walk
from pruned_nets import assert_unchanged, gaussian, mlp, snapshot


def layers_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d)]


def met_in_forward(model: nn.Module, batch: torch.Tensor) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What each layer receives and gives when the model just runs."""
    seen: dict[str, list] = {}
    twin = copy.deepcopy(model)
    for name in layers_in(twin):
        twin.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name: seen.setdefault(name, []).append(
                ((args or tuple(kwargs.values()))[0].clone(), output.clone())
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        twin(batch.clone())
    return seen


def damaged(model: nn.Module, seed: int = 1) -> nn.Module:
    changed = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in layers_in(changed):
            weight = changed.get_submodule(name).weight
            weight.mul_(torch.rand(weight.shape, generator=draw) < 0.7)
    return changed


def assert_as_in_forward(model: nn.Module, batches: list[torch.Tensor], *, carries: tuple[str, ...] = ()) -> list:
    model.eval()
    changed = damaged(model)
    given = [batch.clone() for batch in batches]
    before = snapshot(model), snapshot(changed)
    arrivals = []
    for arrival in walk(model, changed, batches, layers_in(model)):
        arrivals.append(arrival)
        for number, batch in enumerate(batches):
            ((x, _),) = met_in_forward(changed, batch)[arrival.name]
            ((_, y),) = met_in_forward(model, batch)[arrival.name]
            assert torch.equal(arrival.inputs[number], x), arrival.name
            if arrival.name not in carries:
                assert torch.equal(arrival.targets[number], y), arrival.name
    assert_unchanged(model, before[0])
    assert_unchanged(changed, before[1])
    assert all(torch.equal(a, b) for a, b in zip(batches, given, strict=True))
    assert torch.is_grad_enabled()
    return arrivals


class Plain(nn.Module):
    """Functional calls, a concatenation, options and work in place, all of which can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.ReLU(inplace=True)  # changes its input: nobody's batch may be touched
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 5, bias=False)
        self.third = nn.Linear(input_features := 11, 3)
        assert input_features == 11

    def forward(self, x, mask=None, *, scale=2.0, twice=False):
        x = self.start(x)
        a = functional.relu(self.first(x), inplace=True)
        if mask is not None or twice:
            a = a * mask
        b = self.second(input=a)
        b *= scale
        joined = torch.cat([a, b], dim=1).tanh_()
        return {"logits": self.third(joined), "rest": (a, [b])}


class Branching(nn.Module):
    """Which way it goes depends on values: no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.twice = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        x = self.twice(self.twice(x))
        x = torch.relu_(self.first(x))
        if x.sum() > -1.0:
            x = self.second(x)
        return self.third(x)


class TypeBranch(nn.Module):
    """Can be traced, but wrongly: a symbol is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        if isinstance(x, torch.Tensor):
            x = x + 1
        return self.second(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.attend, self.write = (
            nn.Linear(4, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.read(x)
        return self.write(x + self.attend(x, x, x)[0])


def batches(*shape: int) -> list[torch.Tensor]:
    return [gaussian(5, *shape), gaussian(3, *shape, seed=1)]


def test_layers_meet_what_they_meet_in_a_forward_pass():
    found = assert_as_in_forward(mlp(4, 6, 5, 3), batches(4))
    assert [(arrival.name, arrival.norm) for arrival in found] == [("0", None), ("2", None), ("4", None)]


def test_functional_calls_options_and_work_in_place():
    found = assert_as_in_forward(Plain(), batches(4))
    assert [arrival.name for arrival in found] == ["first", "second", "third"]


def test_a_model_that_cannot_be_traced_goes_the_slow_way_to_the_same():
    torch.manual_seed(0)
    found = assert_as_in_forward(Branching(), batches(4))
    assert [arrival.name for arrival in found] == ["first", "second", "third"]  # and not what runs twice


def test_a_trace_that_tells_another_story_is_not_believed():
    assert len(assert_as_in_forward(TypeBranch(), batches(4))) == 2


def test_a_hook_of_the_whole_model_is_heeded():
    net = mlp(4, 5, 2)
    net.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    assert len(assert_as_in_forward(net, batches(4))) == 2


def test_batches_that_take_another_way_are_left_out():
    model = Branching().eval()
    with torch.no_grad():
        model.twice.weight.copy_(torch.eye(4))
        model.twice.bias.zero_()
        model.first.weight.copy_(-torch.eye(4))
        model.first.bias.zero_()
    model.forward = lambda x: model.third(model.second(x) if x.sum() > 0 else x)
    found = list(walk(model, model, [torch.ones(2, 4), -torch.ones(3, 4)], ["second", "third", "first"]))
    assert {arrival.name: [len(x) for x in arrival.inputs] for arrival in found} == {"second": [2], "third": [2, 3]}


def test_attention_is_one_call():
    found = assert_as_in_forward(Attention(), batches(7, 4))
    assert [arrival.name for arrival in found] == ["read", "write"]


def test_layers_inside_torchs_own_modules_are_found():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(4, 8), block, nn.Linear(8, 2)).eval()
    found = list(walk(net, net, batches(5, 4), ["0", "1.linear1", "1.linear2", "2"]))
    assert [arrival.name for arrival in found] == ["0", "1.linear1", "1.linear2", "2"]


def test_a_model_that_is_the_layer():
    (arrival,) = walk(net := nn.Linear(4, 3), net, batches(4), [""])
    assert arrival.name == ""
    assert torch.equal(arrival.targets[1], net(arrival.inputs[1]))


@dataclass
class Result:
    logits: torch.Tensor


@pytest.mark.parametrize("wrap", [tuple, list, lambda y: {"a": y[0]}, lambda y: Result(y[0])])
def test_outputs_of_any_kind(wrap):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 5, 2)

        def forward(self, x):
            return wrap([self.net(x)])

    assert len(assert_as_in_forward(Wrapped(), batches(4))) == 2


def test_what_is_shared_or_used_otherwise_is_left_out():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.once, self.never, self.read = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            x = self.once(self.twice(self.twice(x)))
            return functional.linear(self.read(x), self.read.weight)

    model = Shared().eval()
    assert [a.name for a in walk(model, model, batches(4), layers_in(model))] == ["once"]


def residual_block() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.norm, self.end = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.down, self.down_norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x):
            y = functional.relu(self.norm(self.first(x)))
            y = self.end(self.last(y))
            y += self.down_norm(self.down(x))
            return functional.relu(y)

    torch.manual_seed(3)
    model = Block()
    model(gaussian(30, 3, 4, 4))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
    return model.eval()


def test_the_last_layer_before_a_sum_makes_up_for_the_other_side():
    model = residual_block()
    changed = damaged(model)
    with torch.no_grad():
        found = {}
        for arrival in walk(model, changed, batches(3, 4, 4), layers_in(model)):
            found[arrival.name] = arrival
            if arrival.name == "last":
                changed.last.weight.mul_(0.5)  # done to it before the next one is met
        assert list(found) == ["first", "last", "down"]
        for number, x in enumerate(batches(3, 4, 4)):
            # The downsampling comes last, so it sees what the branch has become, and makes up for that.
            branch = [m.end(m.last(functional.relu(m.norm(m.first(x))))) for m in (model, changed)]
            scale = model.down_norm.weight / (model.down_norm.running_var + model.down_norm.eps).sqrt()
            lost = (branch[0] - branch[1]) / torch.where(scale == 0, torch.inf, scale)[:, None, None]
            torch.testing.assert_close(found["down"].targets[number], model.down(x) + lost)
            torch.testing.assert_close(found["last"].targets[number], met_in_forward(model, x)["last"][0][1])
            whole = model.down_norm(found["down"].targets[number]) + branch[1]
            torch.testing.assert_close(whole[:, :2], (model.down_norm(model.down(x)) + branch[0])[:, :2])


def test_what_is_done_to_a_layer_reaches_all_that_follow():
    model = residual_block()
    changed = damaged(model)
    for arrival in walk(model, changed, batches(3, 4, 4), layers_in(model)):
        for number, batch in enumerate(batches(3, 4, 4)):
            assert torch.equal(arrival.inputs[number], met_in_forward(changed, batch)[arrival.name][0][0])
        with torch.no_grad():
            changed.get_submodule(arrival.name).weight.add_(0.1)


def test_skip_paths_of_the_cifar_resnet():
    torch.manual_seed(0)
    model = cifar_resnet(8)
    model(gaussian(20, 3, 8, 8))
    model.eval()
    changed, batch = damaged(model), gaussian(4, 3, 8, 8)
    found = {}
    block, own = model.layer2[0], changed.layer2[0]
    for arrival in walk(model, changed, [batch], layers_in(model)):
        found[arrival.name] = arrival
    with torch.no_grad():
        trunks = [functional.relu(net.bn1(net.conv1(batch))) for net in (model, changed)]
        trunks = [net.layer1(x) for net, x in zip((model, changed), trunks, strict=True)]
        lost = block.shortcut(trunks[0]) - own.shortcut(trunks[1])
        scale = block.bn2.weight / (block.bn2.running_var + block.bn2.eps).sqrt()
        expected = met_in_forward(model, batch)["layer2.0.conv2"][0][1] + lost / scale[:, None, None]
    torch.testing.assert_close(found["layer2.0.conv2"].targets[0], expected)
    assert lost.abs().max() > 1e-3
    assert [found[name].norm for name in ("conv1", "layer2.0.conv2", "linear")] == ["bn1", "layer2.0.bn2", None]
    no_carry = met_in_forward(model, batch)["layer2.0.conv1"][0][1]
    assert torch.equal(found["layer2.0.conv1"].targets[0], no_carry)


def test_norms_are_those_that_alone_read_a_layer():
    assert norms_of(residual_block()) == {"first": "norm", "last": "end", "down": "down_norm"}
    norm = nn.BatchNorm1d(4)
    plain = nn.BatchNorm1d(4, track_running_stats=False)
    assert norms_of(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm)) == {}
    assert norms_of(nn.Sequential(nn.Linear(4, 4), plain)) == {}
    assert norms_of(Branching()) is None


def test_a_norm_over_another_axis_is_none_of_a_linear_layer():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    assert [a.norm for a in walk(net, net, [gaussian(6, 3, 4)], ["0", "2"])] == [None, None]
    assert [a.norm for a in walk(net, net, [gaussian(6, 4)], ["0", "2"])] == ["1", None]


def test_activations_are_let_go():
    net = mlp(4, 5, 5, 5, 5, 3)
    alive = []
    found = []
    for arrival in walk(net, damaged(net), batches(4), layers_in(net)):
        found += [weakref.ref(x) for x in arrival.inputs + arrival.targets]
        del arrival
        gc.collect()
        alive.append(sum(ref() is not None for ref in found))
    assert len(found) == 20
    assert max(alive) <= 8


@pytest.mark.parametrize("make", [lambda: mlp(4, 5, 3), Branching])
def test_closed_early_it_leaves_no_trace(make):
    model = make().eval()
    before = snapshot(model)
    walker = walk(model, model, batches(4), layers_in(model))
    next(walker)
    assert torch.is_grad_enabled()
    walker.close()
    assert_unchanged(model, before)


class Needs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 3)

    def forward(self, x, other):
        return self.net(x) + other


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (mlp(4, 3, 2), [gaussian(3, 5)], r"batch 0 of the calibration set, of shape \(3, 5\): mat1"),
        (mlp(4, 3, 2), [gaussian(3, 4), gaussian(2, 7)], r"batch 1 of the calibration set, of shape \(2, 7\)"),
        (Branching(), [gaussian(3, 4), gaussian(2, 7)], r"batch 1 of the calibration set, of shape \(2, 7\)"),
        (Needs(), [gaussian(3, 4)], "missing 1 required positional argument"),
        (mlp(4, 2), [], "no batches"),
    ],
)
def test_inputs_that_do_not_fit_are_named(model, given, message):
    before = snapshot(model.eval())
    with pytest.raises(ValueError, match=message):
        list(walk(model, model, given, layers_in(model)))
    assert_unchanged(model, before)


class ChangesViews(nn.Module):
    """Works in place on what shares memory with what is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x).mul_(2)
        torch.relu_(x)
        x[:, :3].add_(1)
        return self.second(x)


@pytest.mark.parametrize(("kind", "inputs"), [(Plain, batches(4)), (ChangesViews, [gaussian(5, 4)])])
def test_what_does_not_fit_in_memory_is_mapped_from_files(monkeypatch, kind, inputs):
    model = kind().eval()
    changed = damaged(model)
    expected = list(walk(model, changed, inputs, layers_in(model)))
    monkeypatch.setattr("ellq.pruning.walk.HELD", 1)
    mapped = list(walk(model, changed, inputs, layers_in(model)))
    assert [arrival.name for arrival in mapped] == [arrival.name for arrival in expected]
    for one, other in zip(expected, mapped, strict=True):
        assert all(map(torch.equal, one.inputs, other.inputs))
        assert all(map(torch.equal, one.targets, other.targets))


class Feedforward(nn.Module):
    """A residual block without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        x = self.start(x)
        return x + self.down(torch.relu(self.up(x)))


def test_a_layer_that_ends_in_a_sum_itself_makes_up_for_the_other_side():
    model = Feedforward().eval()
    changed, x = damaged(model), gaussian(7, 6)
    target = {arrival.name: arrival.targets[0] for arrival in walk(model, changed, [x], layers_in(model))}["down"]
    with torch.no_grad():
        drift = model.start(x) - changed.start(x)
        torch.testing.assert_close(target, model.down(torch.relu(model.up(model.start(x)))) + drift)
        torch.testing.assert_close(target + changed.start(x), model(x))
