from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ellq
from ellq.pruning import apply, chain_bounds
from ellq.pruning.chain_steps import as_double, through
from ellq.pruning.least_bound import unit_gains
from ellq.theory import lq_quasinorm, stechkin_constant
from pruned_nets import gaussian, mlp


def total_bound(net, inputs, counts, q):
    """Σ A_i·k_i^(1 − 1/q), from the definitions."""
    gains, reach = unit_gains(net, inputs)
    total = 0.0
    for name, kept in counts.items():
        W = net.get_parameter(name).detach().double().flatten(1).numpy()
        for w, g, k in zip(W, gains[name], kept, strict=True):
            if w.any():
                total += g * reach[name] * stechkin_constant(q, 1.0) * float(lq_quasinorm(w, q)) * k ** (1 - 1 / q)
    return total


def split(decided):
    return {str(name): rows["retained"].tolist() for name, rows in decided.table.groupby("layer", sort=False)}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.3, 0.5, 0.8]), st.integers(5, 16))
def test_no_other_counts_have_a_smaller_bound(seed, q, retained):
    net, inputs = mlp(4, 3, 2, seed=seed), gaussian(20, 4, seed=seed)
    retained = min(max(retained, 5), 18)
    found = split(ellq.plan(net, inputs, rule="least_bound", nonzeros=retained, q=q))
    least = math.inf
    for choice in itertools.product(*[range(1, 5)] * 3, *[range(1, 4)] * 2):
        if sum(choice) == retained:
            least = min(least, total_bound(net, inputs, {"0.weight": choice[:3], "2.weight": choice[3:]}, q))
    assert sum(map(sum, found.values())) == retained
    assert total_bound(net, inputs, found, q) <= least * (1 + 1e-12)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_the_bound_holds_for_the_sum_of_the_outputs_errors(conv, sparsity):
    torch.manual_seed(0)
    if conv:
        layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
        net, inputs = nn.Sequential(*layers), gaussian(30, 2, 4, 4)
    else:
        net, inputs = (
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.LeakyReLU(), nn.Linear(5, 3)),
            gaussian(30, 6),
        )
    decided = ellq.plan(net, inputs, rule="least_bound", sparsity=sparsity)
    pruned = ellq.prune(net, inputs, rule="least_bound", sparsity=sparsity)
    with torch.no_grad():
        observed = float((net(inputs) - pruned(inputs)).double().square().mean(0).sqrt().sum())
    assert observed <= total_bound(net, inputs, split(decided), 0.5)
    assert chain_bounds(net, apply(net, decided), inputs, decided)["observed"].iloc[-1] <= observed


def test_gains_are_the_paths_to_the_outputs():
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    W2, W3 = (net[i].weight.detach().double().abs().numpy() for i in (2, 4))
    gains, reach = unit_gains(net, gaussian(10, 4))
    np.testing.assert_allclose(gains["4.weight"], [1, 1])
    np.testing.assert_allclose(gains["2.weight"], W3.sum(0))
    np.testing.assert_allclose(gains["0.weight"], W3.sum(0) @ W2 / 4)
    assert reach["0.weight"] == pytest.approx(float(gaussian(10, 4).double().square().mean(0).sqrt().max()))


def error_of_outputs(net, inputs, place, unit):
    """The sum of the outputs' errors where one unit errs by 1 at all its positions, step by step."""
    x, errors = inputs.double(), None
    with torch.no_grad():
        for number, module in enumerate(net):
            step = as_double(module)
            x = step(x)
            if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                errors = None if errors is None else through(step, errors)
                continue
            step.weight.abs_()
            step.bias = None
            errors = torch.zeros_like(x[0]) if errors is None else step(errors[None])[0]
            if number == place:
                errors[unit] += 1
    return float(errors.sum())


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)], (2, 4, 4)),
        ([nn.Conv1d(2, 3, 3), nn.AvgPool1d(2, padding=1), nn.Flatten(), nn.Linear(12, 3)], (2, 8)),
        ([nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)], (2, 4, 4)),
        (
            [
                nn.Conv2d(1, 3, 3, padding=1),
                nn.BatchNorm2d(3),
                nn.MaxPool2d(2),
                nn.Conv2d(3, 4, 3, padding="same"),
                nn.MaxPool2d(3, 2, 1),
                nn.Flatten(),
                nn.Linear(16, 2),
            ],
            (1, 8, 8),
        ),
    ],
)
def test_gains_follow_pools_flattening_and_zero_padding(layers, shape):
    net, inputs = nn.Sequential(*layers).eval(), gaussian(5, *shape)
    gains, _ = unit_gains(net, inputs)
    for name, found in gains.items():
        place = int(name.split(".")[0])
        assert found == pytest.approx([error_of_outputs(net, inputs, place, i) for i in range(len(found))])
        assert found.min() > 0


def test_zero_units_get_nothing_and_zeros_come_last():
    net = copy.deepcopy(mlp(4, 3, 2))
    with torch.no_grad():
        net[0].weight[1] = 0
        net[0].weight[2, 1:] = 0
    few = split(ellq.plan(net, gaussian(9, 4), rule="least_bound", nonzeros=11, least=3))
    assert few["0.weight"][1:] == [0, 1]
    assert min(few["0.weight"][0], *few["2.weight"]) >= 3
    all_but_one = split(ellq.plan(net, gaussian(9, 4), rule="least_bound", nonzeros=17))
    assert all_but_one == {"0.weight": [4, 4, 3], "2.weight": [3, 3]}


class Chain(nn.Module):
    """A chain of layers of a class of its own, with functions between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.pool = nn.AvgPool2d(2)
        self.first, self.last = nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, x, scale=None):
        x = torch.flatten(self.pool(torch.relu(self.body(x))), 1)
        return self.last(nn.functional.relu(self.first(x), inplace=True).tanh()).sigmoid()


def test_a_chain_of_any_class_is_planned_as_its_sequential():
    net, inputs = Chain().eval(), gaussian(30, 2, 4, 4)
    same = nn.Sequential(
        *[*net.body, nn.ReLU(), net.pool, nn.Flatten(), net.first, nn.ReLU(), nn.Tanh(), net.last, nn.Sigmoid()]
    )
    torch.testing.assert_close(same(inputs), net(inputs))
    found, expected = (ellq.plan(m, inputs, rule="least_bound", sparsity=0.6).table for m in (net, same))
    assert found["layer"].unique().tolist() == ["body.0.weight", "first.weight", "last.weight"]
    assert found["retained"].tolist() == expected["retained"].tolist()
    single = ellq.plan(nn.Linear(4, 3), gaussian(9, 4), rule="least_bound", sparsity=0.5)
    assert single.table["retained"].sum() == 6


class Forked(Chain):
    def forward(self, x):
        x = torch.flatten(self.pool(self.body(x)), 1)
        y = torch.relu(self.first(x))
        return self.last(y + torch.tanh(y))


class Twice(Chain):
    def forward(self, x):
        return self.first(self.first(torch.flatten(self.pool(self.body(x)), 1)))


class Branching(Chain):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class TwoOutputs(Chain):
    def forward(self, x):
        x = self.pool(self.body(x))
        return x, x


class Batchless(Chain):
    def forward(self, x):
        return torch.flatten(self.body(x))


class Softened(Chain):
    def forward(self, x):
        return torch.softmax(self.body(x), 1)


def tied() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    net[1].weight = net[0].weight
    return net


def twice() -> Chain:
    net = Twice()
    net.first = nn.Linear(16, 16)
    return net


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Forked, "no chain of layers: it calls"),
        (twice, "Step 'first' shares its weight"),
        (tied, "Step '1' shares its weight"),
        (Branching, "cannot be traced"),
        (TwoOutputs, "no chain of layers"),
        (Batchless, "no chain of layers: it calls .*flatten"),
        (Softened, "no chain of layers: it calls .*softmax"),
    ],
)
def test_what_is_no_chain_is_refused_with_rules_that_take_it(make, says):
    with pytest.raises(ValueError, match=rf"follows errors through a chain .*{says}.*rule='ellq', .* any network\."):
        ellq.plan(make().eval(), gaussian(9, 2, 4, 4), rule="least_bound", sparsity=0.5)


def test_models_it_cannot_follow_are_refused():
    net = mlp(4, 3, 2)
    with pytest.raises(ValueError, match="needs inputs"):
        ellq.plan(net, rule="least_bound", sparsity=0.5)
    with pytest.raises(TypeError, match=r"Pass the nn\.Module, not its state dict\. rule='ellq'"):
        ellq.plan(net.state_dict(), gaussian(9, 4), rule="least_bound", sparsity=0.5)
    with pytest.raises(ValueError, match="Softmax"):
        ellq.plan(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), gaussian(9, 4), rule="least_bound", sparsity=0.5)
    for inputs, says in (
        (gaussian(9, 5), "does not run on batch 0"),
        (torch.full((9, 4), math.nan), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=says):
            ellq.plan(net, inputs, rule="least_bound", sparsity=0.5)
    maxout = nn.Sequential(nn.Linear(4, 6), nn.MaxPool1d(2), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"Step '1' takes maxima over entries of different errors.* any network\."):
        ellq.plan(maxout, gaussian(9, 4), rule="least_bound", sparsity=0.5)
    for least in (None, 0):
        with pytest.raises(ellq.pruning.BudgetError, match=r"each of which keeps at least 1: .* unit 1 of '2\.weight'"):
            ellq.plan(net, gaussian(9, 4), rule="least_bound", nonzeros=4, least=least)
