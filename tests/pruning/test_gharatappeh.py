from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from ellq.pruning.gharatappeh import released_flow, released_plan, released_stop
from ellq.pruning.iterate import iterate
from ellq.pruning.mask_parametrization import is_masked, stored_tensors
from ellq.pruning.stopping import CAP, History
from ellq.pruning.training import EpochTrainer
from pruned_nets import gaussian, mlp

INPUTS = gaussian(96, 4)
LABELS = (INPUTS[:, 0] > 0).long()
TRAINER = EpochTrainer(INPUTS, LABELS, batch_size=32, momentum=0.0, learning_rate=0.01)
OPTIONS = {"iterations": 4, "warm_up": 2, "cap": 4, "rule": "gharatappeh2025"}


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        return (model(INPUTS).argmax(1) == LABELS).double().mean().item()


def never(model: nn.Module) -> float:
    """Fall from call to call, so that the dense net's accuracy never comes back."""
    never.value -= 1e-3
    return never.value


def survivors_after_a_round(w: np.ndarray, p: float, q: float) -> int:
    """Count by the formula of the released code, over all surviving weights w."""
    d = len(w)
    index = 1 - (np.abs(w) ** p).mean() ** (1 / p) / (np.abs(w) ** q).mean() ** (1 / q)
    m = math.ceil(d * (1 - index) ** (p * q / (q - p)))
    return d - min(d - m, 9 * d // 10)


@pytest.mark.parametrize("orders", [{}, {"p": 0.5, "q": 1.0}])
def test_masks_are_those_of_one_round_by_pq_index_over_all_layers(orders):
    never.value = 1.0
    p, q = orders.get("p", 1.0), orders.get("q", 2.0)
    before = []

    def train(model, position):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        before.append(np.concatenate([model[place].weight.detach().double().numpy().ravel() for place in (0, 2)]))

    found = iterate(mlp(4, 9, 3), train, never, **OPTIONS, plan_with=orders)
    assert list(found.iterations["stop"]) == ["warm-up", *[CAP] * 4]
    assert list(found.iterations["sparsity"][:2]) == [0.0, 0.0]
    ends = [before[place] for place in (5, 9, 13)]  # the last epoch of each iteration that another follows
    for weights, sparsity in zip(ends, found.iterations["sparsity"][2:], strict=True):
        kept = weights[weights != 0]
        assert sparsity == 1 - survivors_after_a_round(kept, p, q) / 63
    assert np.isnan(found.iterations["target"][2:]).all()


def test_weights_come_back_biases_once_and_batch_norm_never():
    never.value = 1.0
    net = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    seen = []

    def train(model, position):
        seen.append((position, {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}))
        with torch.no_grad():
            for tensor in stored_tensors(model).values():
                if tensor.is_floating_point():
                    tensor.add_(0.1)

    iterate(net, train, never, **OPTIONS)
    starts = {iteration: seen[2 + 4 * (iteration - 1)] for iteration in (1, 2, 3, 4)}
    dense = starts[1][1]
    for iteration in (2, 3, 4):
        position, tensors = starts[iteration]
        assert position == 2
        for name in ("0.weight", "3.weight"):
            assert torch.equal(tensors[name], dense[name])
        rose = 0.4 * (iteration - 1)
        for name in ("1.weight", "1.running_mean", "1.running_var"):
            torch.testing.assert_close(tensors[name], dense[name] + rose)
        for name in ("0.bias", "1.bias", "3.bias"):  # back at the second iteration, then as trained
            torch.testing.assert_close(tensors[name], dense[name] + (rose - 0.4))


def test_the_first_iteration_trains_the_dense_net_further_in_calls_of_two_epochs():
    never.value = 1.0
    masked = []

    def train(model, position):
        masked.append(is_masked(model))
        return TRAINER(model, position)

    found = iterate(mlp(4, 9, 3), train, never, **OPTIONS)
    assert masked == [False] * 6 + [True] * 12
    assert found.epochs["accuracy"].notna().tolist() == [False, True] * 9


def test_accuracy_stops_at_the_best_of_the_warm_up():
    found = iterate(mlp(4, 9, 3), TRAINER, evaluate, **OPTIONS | {"warm_up": 4, "cap": 20})
    assert found.dense_accuracy == found.epochs["accuracy"][:4].max()
    for row in found.iterations[1:].itertuples():
        assert (row.stop == "accuracy") == (row.accuracy >= found.dense_accuracy)
    assert "accuracy" in set(found.iterations["stop"])


def test_flow_is_asked_first_and_at_the_default_threshold_fires_at_once():
    never.value = 1.0
    found = iterate(mlp(4, 9, 3), TRAINER, never, **OPTIONS, stop=released_flow(INPUTS))
    assert list(found.iterations["stop"][1:]) == ["flow"] * 4
    assert list(found.iterations["epochs"][1:]) == [2] * 4
    nan = np.array([math.nan])
    both = History(1, (2,), nan, np.array([0.9]), 0.5, nan, nan)
    assert released_stop(lambda history: "flow")(both) == "flow"
    assert released_stop(lambda history: None)(both) == "accuracy"
    assert released_stop(None)(both) == "accuracy"


def test_flow_is_the_signed_one_of_layers_in_order_of_registration():
    (monitor,) = released_flow(INPUTS, 0.11).monitors
    assert monitor.kind == "signed"
    monitor(mlp(4, 9, 3))
    assert monitor.pairs == (("0", "2"),)


def test_a_plan_takes_the_zeros_of_a_model_for_removed():
    net = mlp(4, 9, 3)
    with torch.no_grad():
        net[0].weight[:5] = 0.0
    weights = np.concatenate([net[place].weight.detach().double().numpy().ravel() for place in (0, 2)])
    planned = released_plan(net)
    assert planned.table["retained"].sum() == survivors_after_a_round(weights[weights != 0], 1.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sparsity": 0.5}, "sparsity= is decided by rule='gharatappeh2025'"),
        ({"schedule": "cubic"}, "schedule= is decided by"),
        ({"rewind": "start"}, "rewind= is decided by"),
        ({"every": 1}, "every= is decided by"),
        ({"warm_up": 3}, "warm_up=3 is not made of calls of two epochs"),
        ({"warm_up": 0}, "warm_up=0 is not made of calls"),
        ({"cap": 5}, "cap=5 is not made of calls"),
        ({"plan_with": {"rule": "global"}}, "plan_with= holds nothing but p and q"),
        ({"plan_with": released_plan}, "plan_with= holds nothing but p and q"),
    ],
)
def test_what_the_rule_decides_cannot_be_given(changes, match):
    with pytest.raises(ValueError, match=match):
        iterate(mlp(4, 9, 3), TRAINER, evaluate, **OPTIONS | changes)


def test_runs_repeat_and_resume(tmp_path):
    options = OPTIONS | {"stop": released_flow(INPUTS, 0.05)}
    calls = itertools.count(1)
    expected = iterate(mlp(4, 9, 3), TRAINER, evaluate, **options)

    class Stop(BaseException):
        pass

    def judge(model):
        if next(calls) in (2, 4, 6):
            raise Stop
        return evaluate(model)

    for _ in range(4):
        try:
            found = iterate(mlp(4, 9, 3), TRAINER, judge, **options, checkpoint=tmp_path)
        except Stop:
            continue
    assert all(
        torch.equal(found.model.state_dict()[name], value) for name, value in expected.model.state_dict().items()
    )
    assert found.iterations.drop(columns="seconds").equals(expected.iterations.drop(columns="seconds"))
