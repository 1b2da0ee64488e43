from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import random
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from ellq.analysis import accuracy, datasets
from ellq.analysis.flows import FlowMonitor
from ellq.analysis.gradient_flow import GradientMonitor
from ellq.analysis.nets import mlp as dense_mlp
from ellq.pruning import plan
from ellq.pruning.apply import apply
from ellq.pruning.iterate import IterateError, iterate
from ellq.pruning.iterate_state import CHECKPOINT
from ellq.pruning.mask_parametrization import is_masked, masks_of, stored_tensors
from ellq.pruning.stopping import (
    CAP,
    WARM_UP,
    accuracy_back,
    any_of,
    fixed,
    flow_back,
    masks_stable,
    patience,
    random_stop,
)
from ellq.pruning.training import EpochTrainer
from kills import unbroken_and_resumed
from pruned_nets import assert_unchanged, gaussian, mlp, same_bits, snapshot

INPUTS = gaussian(96, 4)
LABELS = (INPUTS[:, 0] > 0).long()
TRAINER = EpochTrainer(INPUTS, LABELS, batch_size=32)
TIMES = ["seconds", "training_seconds", "evaluation_seconds", "monitoring_seconds"]
OPTIONS = {"sparsity": 0.7, "iterations": 3, "cap": 3, "warm_up": 2}


def evaluate(model: nn.Module) -> float:
    """Measure accuracy on the examples; assert what iterate promises."""
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        return (model(INPUTS).argmax(1) == LABELS).double().mean().item()


def nothing(model: nn.Module, position: int) -> None:
    """Train nothing."""


class Norms:
    """A monitor: the norm of each layer's effective weights."""

    kind = "norms"
    pairs = (("0", "2"), "2")

    def __init__(self):
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        return np.array([model[0].weight.detach().norm().item(), model[2].weight.detach().norm().item()])

    def identity(self):
        return {"norms": True}


class Wandering:
    """A stateful trainer that draws from all three random states, and whose momentum lasts from call to call."""

    def __init__(self):
        self.memory: dict[str, torch.Tensor] = {}
        self.positions: list[int] = []

    def __call__(self, model, position):
        assert not hasattr(model, "left")
        model.left = True
        self.positions.append(position)
        loss = cross_entropy(model(INPUTS + 0.1 * torch.randn(96, 4)), LABELS)
        loss.backward()
        rate = 0.1 * random.random() * (1 + np.random.random()) / (1 + position)  # noqa: NPY002
        with torch.no_grad():
            for name, tensor in stored_tensors(model).items():
                if tensor.grad is not None:
                    self.memory[name] = 0.9 * self.memory.get(name, torch.zeros_like(tensor)) + tensor.grad
                    tensor.sub_(rate * self.memory[name])
        return loss.item()

    def state_dict(self):
        return {"memory": self.memory, "turns": [1, (2.5, None)], 7: "text"}

    def load_state_dict(self, state):
        assert state["turns"] == [1, (2.5, None)]
        assert state[7] == "text"
        self.memory = dict(state["memory"])

    def reset(self):
        self.memory = {}


def same_results(first, second) -> bool:
    same_masks = first.masks.keys() == second.masks.keys() and all(
        torch.equal(mask, second.masks[name]) for name, mask in first.masks.items()
    )
    tables = all(
        ours.drop(columns=TIMES, errors="ignore").equals(theirs.drop(columns=TIMES, errors="ignore"))
        for ours, theirs in [
            (first.iterations, second.iterations),
            (first.epochs, second.epochs),
            (first.flows, second.flows),
        ]
    )
    return same_masks and tables and same_bits(first.model, second.model)


class TestIterations:
    @pytest.mark.parametrize("schedule", ["geometric", "cubic", "one-shot", lambda t, T, s: s * t / T])
    def test_reach_every_target_and_masks_only_shrink(self, schedule):
        seen = []

        def train(model, position):
            assert model.training
            seen.append({name: mask.clone() for name, mask in masks_of(model).items()})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))

        found = iterate(
            mlp(4, 9, 3), train, evaluate, sparsity=0.75, iterations=4, cap=2, schedule=schedule, rewind="none"
        )
        table = found.iterations
        assert list(table["iteration"]) == [0, 1, 2, 3, 4]
        assert table["target"].iloc[-1] == 0.75
        assert list(table["stop"]) == [WARM_UP, *[CAP] * 4]
        for row, masks in zip(table.iloc[1:].itertuples(), seen[1::2], strict=True):
            total, kept = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
            assert row.target <= row.sparsity == 1 - kept / total < row.target + 1 / total
            assert row.nonzeros == kept + 9 + 3
        for earlier, later in itertools.pairwise(seen):
            assert not any((later[name] & ~earlier[name]).any() for name in earlier)
        for name, mask in found.masks.items():
            assert torch.equal(found.model.get_parameter(name) != 0, mask)

    def test_remove_the_smallest_of_all_layers_unless_told_otherwise(self):
        net = mlp(4, 9, 3)
        by_default = iterate(net, nothing, evaluate, sparsity=0.6, iterations=1, cap=1)
        expected = apply(net, plan(net, sparsity=0.6, rule="global", refit="none"))
        assert all(torch.equal(by_default.masks[name], mask) for name, mask in masks_of(expected).items())
        by_layer = iterate(
            net, nothing, evaluate, sparsity=0.6, iterations=1, cap=1, plan_with={"rule": "uniform", "exclude": net[2]}
        )
        assert set(by_layer.masks) == {"0.weight"}
        by_index = iterate(
            net, nothing, evaluate, sparsity=0.5, iterations=2, cap=1, plan_with={"rule": "diao2023", "gamma": 2.0}
        )
        assert by_index.iterations["sparsity"].iloc[-1] >= 0.5

        def decide(model, sparsity):
            assert not is_masked(model)
            return plan(model, sparsity=sparsity, rule="global", refit="none")

        assert same_bits(
            by_default.model,
            iterate(net, nothing, evaluate, sparsity=0.6, iterations=1, cap=1, plan_with=decide).model,
        )

    def test_give_a_plain_model_and_leave_theirs_alone(self):
        net = mlp(4, 9, 3)
        net[0].bias.requires_grad_(False)
        net[1].eval()
        before, states = snapshot(net), (random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
        torch_state = torch.random.get_rng_state()
        found = iterate(net, Wandering(), evaluate, **OPTIONS)
        assert_unchanged(net, before)
        assert random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
        assert torch.equal(torch.random.get_rng_state(), torch_state)
        assert not is_masked(found.model)
        assert [type(m) for m in found.model.modules()] == [type(m) for m in net.modules()]
        assert [m.training for m in found.model.modules()] == [m.training for m in net.modules()]
        assert [p.requires_grad for p in found.model.parameters()] == [p.requires_grad for p in net.parameters()]
        assert not hasattr(found.model, "left")

    def test_repeat_by_their_seed(self):
        trainer = Wandering()
        first = iterate(mlp(4, 9, 3), trainer, evaluate, **OPTIONS, seed=1)
        torch.manual_seed(9)
        random.seed(9)
        assert same_results(first, iterate(mlp(4, 9, 3), trainer, evaluate, **OPTIONS, seed=1))
        assert not same_results(first, iterate(mlp(4, 9, 3), trainer, evaluate, **OPTIONS, seed=2))

    def test_draw_other_numbers_in_every_epoch_and_stage(self):
        drawn = []

        def train(model, position):
            drawn.append((torch.rand(1).item(), random.random(), np.random.random()))  # noqa: NPY002

        def judge(model):
            drawn.append((torch.rand(1).item(), random.random(), np.random.random()))  # noqa: NPY002
            return 0.5

        iterate(mlp(4, 9, 3), train, judge, **OPTIONS)
        assert len(drawn) == 2 * 11
        assert all(len(set(column)) == 22 for column in zip(*drawn, strict=True))

    def test_are_not_changed_by_what_is_watched(self):
        def drawing(model):
            torch.randn(7), random.random(), np.random.random()  # noqa: NPY002
            return evaluate(model)

        plain = iterate(mlp(4, 9, 3), Wandering(), evaluate, **OPTIONS)
        never = any_of(flow_back(Norms(), 0.0), masks_stable(1e-9, 9))
        watched = iterate(mlp(4, 9, 3), Wandering(), drawing, **OPTIONS, stop=never, monitors={"more": Norms()})
        assert same_bits(plain.model, watched.model)
        assert plain.epochs["loss"].equals(watched.epochs["loss"])

    def test_with_the_default_trainer_learn(self):
        trainer = EpochTrainer(INPUTS, LABELS, batch_size=16, learning_rate=0.1)
        found = iterate(mlp(4, 16, 2), trainer, evaluate, sparsity=0.8, iterations=3, cap=10, warm_up=10)
        assert found.iterations["accuracy"].iloc[-1] > 0.9
        assert evaluate(found.model.eval()) == found.iterations["accuracy"].iloc[-1]

    def test_go_on_from_the_masks_a_model_has(self):
        net = mlp(4, 9, 3)
        masked = apply(net, plan(net, sparsity=0.5, refit="none"))
        before = masks_of(masked)
        found = iterate(masked, nothing, evaluate, sparsity=0.8, iterations=2, cap=1)
        assert is_masked(masked)
        assert not any((mask & ~before[name]).any() for name, mask in found.masks.items())

    def test_at_sparsity_zero_prune_nothing(self):
        found = iterate(
            mlp(4, 9, 3), TRAINER, evaluate, sparsity=0.6, iterations=2, cap=1, schedule=lambda t, T, s: s * (t - 1)
        )
        assert list(found.iterations["sparsity"].round(1)) == [0.0, 0.0, 0.6]

    def test_are_known_by_masks_of_their_own_even_if_training_changes_them(self):
        def train(model, position):
            for mask in masks_of(model).values():
                mask.fill_(True)

        seen = []
        found = iterate(
            mlp(4, 9, 3), train, lambda net: seen.append(masks_of(net)) or 0.5, sparsity=0.6, iterations=2, cap=1
        )
        assert list(found.iterations["sparsity"].round(1)) == [0.0, 0.4, 0.6]
        assert not seen[-1]["0.weight"].all()


def stored(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}


class TestRewinding:
    @pytest.mark.parametrize(
        ("rewind", "epoch", "positions"),
        [
            ("warm-up", 3, [3, 4]),
            (None, 3, [3, 4]),
            ("start", 0, [0, 1]),
            (0, 0, [0, 1]),
            (2, 2, [2, 3]),
            ("none", None, None),
            ("rate", None, [1, 2]),  # the last two epochs of the three of the warm-up
        ],
    )
    def test_brings_back_tensors_position_and_what_the_trainer_keeps(self, rewind, epoch, positions):
        seen = []

        class Spy(Wandering):
            def __call__(self, model, position):
                seen.append((position, stored(model), dict(self.memory)))
                model[3].running_mean.add_(1.0)
                return super().__call__(model, position)

        net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3), nn.BatchNorm1d(3))
        options = {"sparsity": 0.7, "iterations": 3, "cap": 2, "warm_up": 3}
        iterate(net, Spy(), evaluate, **options, rewind=rewind)
        assert [position for position, *_ in seen[:3]] == [0, 1, 2]
        starts = seen[3::2]
        for number, (position, tensors, memory) in enumerate(starts):
            if positions is None:
                assert [position, seen[4 + 2 * number][0]] == [3 + 2 * number, 4 + 2 * number]
            else:
                assert [position, seen[4 + 2 * number][0]] == positions
            # What was stored when the dense net had trained so long: the first start is also the end of the warm-up.
            if epoch is not None:
                then = seen[epoch] if epoch < 3 else starts[0]
                assert all(torch.equal(tensors[name], value) for name, value in then[1].items())
                assert memory.keys() == then[2].keys()
                assert all(torch.equal(memory[name], value) for name, value in then[2].items())
        if epoch is None:
            assert not torch.equal(starts[0][1]["0.weight"], starts[1][1]["0.weight"])
            assert starts[1][2]

    def test_is_of_weights_beneath_the_masks_that_were_drawn_from_the_trained_ones(self):
        def train(model, position):
            if not is_masked(model):  # the warm-up: the first unit is the largest
                with torch.no_grad():
                    model[0].weight.copy_(torch.arange(9.0, 0, -1)[:, None].expand(9, 4))
            else:  # retraining turns the order round
                with torch.no_grad():
                    model[0].weight = torch.arange(1.0, 10)[:, None].expand(9, 4)

        found = iterate(
            mlp(4, 9, 3), train, evaluate, sparsity=2 / 3, iterations=2, cap=1, warm_up=1, plan_with={"include": "0"}
        )
        first = round(36 * (1 - math.sqrt(1 / 3)))
        assert found.iterations["sparsity"].iloc[1] == pytest.approx(first / 36, abs=1 / 36)
        # The second pruning saw the small at the top of what was left, and kept the later rows.
        assert found.masks["0.weight"][:2].sum() == 0

    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"rewind": "begin"}, ValueError, "rewind='begin' is unknown"),
            ({"rewind": 3}, ValueError, r"rewind=3 is outside \[0, 2\]"),
            ({"rewind": -1}, ValueError, "rewind=-1"),
            ({"rewind": 1.0}, TypeError, "rewind must be a name or an epoch of the warm-up, got float 1.0"),
            ({"rewind": True}, TypeError, "got bool"),
        ],
    )
    def test_that_is_not_known_is_refused(self, changes, error, match):
        with pytest.raises(error, match=match):
            iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS, **changes)


class TestStopping:
    def test_is_by_the_rule_and_the_log_says_which(self):
        found = iterate(mlp(4, 9, 3), Wandering(), evaluate, **OPTIONS | {"cap": 9}, stop=fixed(2))
        assert list(found.iterations["epochs"]) == [2, 2, 2, 2]
        assert list(found.iterations["stop"]) == [WARM_UP, "fixed", "fixed", "fixed"]

    def test_by_a_rule_that_never_fires_is_by_the_cap_and_the_log_says_so(self):
        found = iterate(mlp(4, 9, 3), Wandering(), evaluate, **OPTIONS, stop=flow_back(Norms(), 0.0))
        assert list(found.iterations["epochs"]) == [2, 3, 3, 3]
        assert list(found.iterations["stop"]) == [WARM_UP, CAP, CAP, CAP]

    def test_at_the_cap_by_the_rule_is_by_the_rule(self):
        found = iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS, stop=fixed(3))
        assert list(found.iterations["stop"])[1:] == ["fixed"] * 3

    def test_sees_what_the_log_holds(self):
        seen = []

        def spy(history):
            seen.append(history)

        monitor = Norms()
        found = iterate(mlp(4, 9, 3), Wandering(), evaluate, **OPTIONS, stop=spy, monitors={"norms": monitor})
        assert monitor.calls == 1 + 9
        assert len(seen) == 9
        for iteration in (1, 2, 3):
            last = seen[3 * iteration - 1]
            rows = found.epochs[found.epochs["iteration"] == iteration]
            assert last.iteration == iteration
            assert last.epochs == (1, 2, 3)
            assert list(last.losses) == list(rows["loss"])
            assert list(last.accuracies) == list(rows["accuracy"])
            assert last.dense_accuracy == found.dense_accuracy == found.epochs["accuracy"][:2].max()
            flow = last.flow(monitor)
            assert np.allclose(flow.distances, rows["distance_norms"], rtol=1e-14, atol=0)
            told = found.flows[found.flows["iteration"] == iteration]
            assert list(told["entry"].unique()) == ["0 → 2", "2"]
            assert flow.vectors.flatten().tolist() == told["value"].tolist()
            assert flow.reference.tolist() == told["reference"].tolist()[:2]
            with pytest.raises(ValueError, match="read-only"):
                last.accuracies[0] = 1.0
        assert np.isnan(seen[0].mask_distances).all()

    def test_by_accuracy_ends_where_the_dense_net_was(self):
        trainer = EpochTrainer(INPUTS, LABELS, batch_size=16, learning_rate=0.1)
        found = iterate(
            mlp(4, 16, 2), trainer, evaluate, sparsity=0.5, iterations=2, cap=40, warm_up=5, stop=accuracy_back()
        )
        assert list(found.iterations["stop"])[1:] == ["accuracy"] * 2
        assert (found.iterations["accuracy"][1:] >= found.dense_accuracy).all()
        for _, rows in found.epochs[found.epochs["iteration"] > 0].groupby("iteration"):
            assert (rows["accuracy"][:-1] < found.dense_accuracy).all()

    def test_by_accuracy_compares_with_the_best_of_the_warm_up(self):
        said = iter([0.5, 0.8, 0.6, 0.7, 0.8, 0.9, 0.8])
        options = {"sparsity": 0.5, "iterations": 2, "cap": 3, "warm_up": 3}
        found = iterate(mlp(4, 9, 3), nothing, lambda net: next(said), **options, stop=accuracy_back())
        assert found.dense_accuracy == 0.8
        assert list(found.iterations["epochs"]) == [3, 2, 1]

    def test_compares_with_another_dense_net_where_one_is_given(self):
        net, reference = mlp(4, 9, 3), mlp(4, 9, 3, seed=5)
        before = snapshot(reference)
        found = iterate(net, Wandering(), evaluate, **OPTIONS, reference=reference, monitors={"norms": Norms()})
        assert_unchanged(reference, before)
        assert found.dense_accuracy == evaluate(mlp(4, 9, 3, seed=5).eval())
        assert found.flows["reference"].tolist()[:2] == Norms()(reference).tolist()

    def test_without_warm_up_compares_with_the_model_as_it_is(self):
        net = mlp(4, 9, 3)
        found = iterate(net, nothing, evaluate, sparsity=0.5, iterations=1, cap=1, monitors={"norms": Norms()})
        assert found.dense_accuracy == evaluate(mlp(4, 9, 3).eval()) == found.iterations["accuracy"][0]
        assert found.iterations["epochs"][0] == 0
        assert found.flows["reference"].tolist() == Norms()(net).tolist()

    def test_looks_only_as_often_as_asked_and_at_the_cap(self):
        calls = []
        found = iterate(
            mlp(4, 9, 3),
            Wandering(),
            lambda net: calls.append(1) or 0.5,
            sparsity=0.5,
            iterations=1,
            cap=7,
            warm_up=2,
            every=3,
            stop=lambda history: "so" if history.epochs == (3, 6) else None,
        )
        assert found.epochs["accuracy"].notna().tolist() == [False, True, False, False, True, False, False, True]
        assert len(calls) == 3
        capped = iterate(mlp(4, 9, 3), nothing, lambda net: 0.5, sparsity=0.5, iterations=1, cap=7, every=3)
        assert capped.epochs["accuracy"].notna().tolist() == [False, False, True, False, False, True, True]

    @pytest.mark.parametrize("last", [False, True])
    def test_draws_the_masks_of_the_next_iteration(self, last):
        """The masks drawn are moved by hand: each epoch another entry is the smallest."""
        iterations = 1 if last else 2
        asked = []

        def decide(model, sparsity):
            asked.append(sparsity)
            return plan(model, sparsity=sparsity, rule="global", refit="none", include="0")

        def train(model, position):
            values = torch.arange(1.0, 37).roll(position)
            with torch.no_grad():
                model[0].weight = values.reshape(9, 4)

        found = iterate(
            mlp(4, 9, 3),
            train,
            evaluate,
            sparsity=0.5,
            iterations=iterations,
            schedule=lambda t, T, s: s * t / T,
            cap=3,
            plan_with=decide,
            stop=masks_stable(1e-9, 2),
        )
        rows = found.epochs[found.epochs["iteration"] == 1]
        # One more step that keeps the same fraction: half of what a half left.
        assert asked[1:4] == [0.75] * 3 if last else [0.5] * 3
        assert rows["mask_distance"].isna().tolist() == [True, False, False]
        retained = 9 if last else 18
        for distance, turnover in zip(rows["mask_distance"][1:], rows["mask_turnover"][1:], strict=True):
            assert 0 < distance <= 2 / 36
            assert turnover == pytest.approx(distance * 36 / (2 * retained))

    def test_draws_at_the_last_iteration_what_can_be_met_at_most(self):
        found = iterate(
            mlp(4, 9, 3),
            Wandering(),
            evaluate,
            sparsity=0.75,
            iterations=1,
            cap=4,
            plan_with={"least": 1},  # of 12 units in 63 weights: one more such step would leave 4
            stop=masks_stable(1e-9, 9),
        )
        assert found.epochs["mask_distance"][1:].notna().all()
        assert (found.epochs["mask_turnover"][1:] * 2 * 12 / 63 - found.epochs["mask_distance"][1:]).abs().max() < 1e-12

    def test_by_stable_masks_fires_where_nothing_moves(self):
        found = iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS | {"cap": 9}, stop=masks_stable(0.1, 3))
        assert list(found.iterations["epochs"])[1:] == [4, 4, 4]
        assert set(found.iterations["stop"][1:]) == {"early-bird"}

    def test_by_a_random_rule_differs_between_iterations_and_repeats(self):
        options = OPTIONS | {"iterations": 8, "cap": 9}
        first, again = (
            iterate(mlp(4, 9, 3), nothing, evaluate, **options, stop=random_stop(1, 9, seed=3)) for _ in range(2)
        )
        assert len(set(first.iterations["epochs"][1:])) > 2
        assert first.iterations["epochs"].equals(again.iterations["epochs"])

    def test_names_monitors_of_the_same_kind_apart(self):
        one, two = Norms(), Norms()
        rule = any_of(flow_back(one, 0.0), flow_back(two, 0.0))
        found = iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS, stop=rule, monitors={"mine": one})
        assert found.flows["monitor"].unique().tolist() == ["mine", "norms"]
        found = iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS, stop=rule)
        assert found.flows["monitor"].unique().tolist() == ["norms", "norms 2"]


class TestFlowsOfModels:
    def test_are_measured_by_the_monitors_of_the_analysis(self):
        parts = datasets.partition(datasets.load("digits"), fit=0.8, validation=0.2)
        fit, held = parts["fit"], parts["validation"]
        trainer = EpochTrainer(fit.inputs(), fit.labels, learning_rate=0.1)
        flow = FlowMonitor(fit.inputs()[:200])
        gradient = GradientMonitor(fit.inputs()[:200], torch.from_numpy(fit.labels[:200]))
        torch.manual_seed(0)
        found = iterate(
            dense_mlp(64, 24, 16, outputs=10),
            trainer,
            lambda net: accuracy(net, held.inputs(), held.labels),
            sparsity=0.8,
            iterations=2,
            cap=3,
            warm_up=4,
            stop=any_of(flow_back(flow, 1e-3), patience(3)),
            monitors={"gradient": gradient},
        )
        assert found.iterations["accuracy"].iloc[-1] > 0.6
        assert found.flows.groupby("monitor")["entry"].unique().map(list).to_dict() == {
            "absolute": ["1 → 3", "3 → 5"],
            "gradient": ["1.weight", "3.weight", "5.weight"],
        }
        assert np.isfinite(found.flows["value"]).all()
        assert (found.epochs["distance_absolute"][4:] > 0).all()

    def test_follow_the_branches_of_a_model(self):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

            def forward(self, x):
                x = torch.relu(self.first(x))
                return self.last(x + torch.relu(self.inner(x)))

        torch.manual_seed(0)
        found = iterate(
            Residual(),
            EpochTrainer(INPUTS, LABELS, batch_size=32),
            evaluate,
            sparsity=0.5,
            iterations=1,
            cap=2,
            warm_up=1,
            monitors={"flow": FlowMonitor(INPUTS)},
        )
        assert set(found.flows["entry"]) == {"first → inner", "first → last", "inner → last"}


def failing(at: int, how):
    """A trainer that trains, and at its ``at``-th call fails after having spoilt the weights."""
    calls = itertools.count(1)

    def train(model, position):
        loss = EpochTrainer(INPUTS, LABELS, batch_size=32)(model, position)
        if next(calls) == at:
            with torch.no_grad():
                stored_tensors(model)["2.weight"].fill_(1e9)
            return how(model)
        return loss

    return train


def _raise(model):
    raise RuntimeError("out of memory.")


def _spoil(model):
    with torch.no_grad():
        model[2].bias[1] = torch.inf


def _cast(model):
    model.double()


FAILURES = {
    "raises": (_raise, "RuntimeError: out of memory"),
    "a NaN loss": (lambda model: torch.nan, "ValueError: train returned the loss nan"),
    "a strange loss": (lambda model: "low", "TypeError: train returned a str, where one number, the loss"),
    "weights not finite": (_spoil, r"NaN or infinite entries in '2\.bias'"),
    "another dtype": (_cast, r"train changed '0\.\w+' from float32 .* to float64"),
}


def failing_evaluate(at: int, value):
    calls = itertools.count(1)

    def judge(model):
        return value if next(calls) == at else evaluate(model)

    return judge


class TestAFailure:
    @pytest.mark.parametrize(("how", "match"), FAILURES.values(), ids=FAILURES)
    @pytest.mark.parametrize("at", [1, 7])
    def test_of_training_leaves_the_last_good_state_and_says_where(self, tmp_path, how, match, at):
        net = mlp(4, 9, 3)
        before = snapshot(net)
        with pytest.raises(IterateError, match=match) as caught:
            iterate(net, failing(at, how), evaluate, **OPTIONS, checkpoint=tmp_path)
        assert_unchanged(net, before)
        error = caught.value
        place = {1: "Epoch 1 of the warm-up", 7: "Epoch 2 of iteration 2 of 3"}[at]
        assert str(error).startswith(place)
        assert f"The state before it is kept in {tmp_path / CHECKPOINT}; the same call goes on" in str(error)
        assert error.checkpoint == tmp_path / CHECKPOINT
        assert (error.iteration, error.epoch) == {1: (0, 1), 7: (2, 2)}[at]
        assert len(error.result.epochs) == at - 1
        unbroken = iterate(net, failing(99, how), evaluate, **OPTIONS)
        assert same_results(iterate(net, failing(99, how), evaluate, **OPTIONS, checkpoint=tmp_path), unbroken)
        if at == 7:
            assert torch.equal(error.result.model[0].weight != 0, error.result.masks["0.weight"])
            assert math.isfinite(error.result.dense_accuracy)
        if at == 1:
            assert same_bits(error.result.model, net)
            assert math.isnan(error.result.dense_accuracy)

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            ("high", "TypeError: evaluate returned a str, where one number, the accuracy, is expected"),
            (None, "TypeError: evaluate returned a NoneType"),
            (True, "TypeError: evaluate returned a bool"),
            (torch.ones(2), "TypeError: evaluate returned a Tensor"),
            (math.nan, "ValueError: evaluate returned the accuracy nan"),
            (torch.tensor(math.inf), "ValueError: evaluate returned the accuracy inf"),
        ],
    )
    @pytest.mark.parametrize("at", [1, 4])
    def test_of_evaluation_keeps_what_was_before(self, value, match, at):
        with pytest.raises(IterateError, match=match) as caught:
            iterate(mlp(4, 9, 3), Wandering(), failing_evaluate(at, value), **OPTIONS)
        assert "is in this error's result; pass checkpoint= to keep it on disk" in str(caught.value)
        assert len(caught.value.result.epochs) == at - 1
        assert caught.value.checkpoint is None

    def test_of_evaluation_before_any_training_says_so(self):
        with pytest.raises(IterateError, match="Looking at the dense net failed with TypeError: evaluate") as caught:
            iterate(mlp(4, 9, 3), nothing, lambda net: "high", sparsity=0.5, iterations=1, cap=1)
        assert len(caught.value.result.epochs) == 0

    def test_an_accuracy_may_be_any_single_number(self):
        for value in (1, np.float32(0.5), torch.tensor([0.25])):
            found = iterate(mlp(4, 9, 3), nothing, lambda net, value=value: value, **OPTIONS)
            assert found.dense_accuracy == float(value)

    @pytest.mark.parametrize("said", [[0.0, math.nan], [0.0], [[0.0, 1.0]], 0.5])
    def test_of_a_monitor_names_it(self, said):
        class Odd(Norms):
            def __call__(self, model):
                super().__call__(model)
                return np.array(said if self.calls == 3 else [0.0, 1.0])

        with pytest.raises(IterateError, match=r"monitor 'odd' gave .* where 2 finite numbers are expected") as caught:
            iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS, monitors={"odd": Odd()})
        assert (caught.value.iteration, caught.value.epoch) == (1, 2)

    def test_of_a_monitor_that_turns_to_other_pairs_is_found(self):
        class Turning(Norms):
            @property
            def pairs(self):
                return ("a", "b") if self.calls == 1 else ("b", "a")

        with pytest.raises(IterateError, match="measures other pairs than on the dense net"):
            iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS, monitors={"turning": Turning()})

    @pytest.mark.parametrize("odd", [True, 0.5, ""])
    def test_of_a_rule_says_what_it_gave(self, odd):
        with pytest.raises(IterateError, match=r"TypeError: stop returned .* a reason to stop or None is expected"):
            iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS, stop=lambda history: odd)

    def test_a_mask_that_would_empty_a_layer_is_refused_and_the_last_good_state_kept(self, tmp_path):
        def train(model, position):
            with torch.no_grad():
                stored_tensors(model)["2.weight"].fill_(1e-3)

        options = {"sparsity": 0.5, "iterations": 2, "cap": 2, "schedule": "one-shot"}
        with pytest.raises(IterateError, match=r"The plan leaves nothing of '2\.weight'. Remove less, or") as caught:
            iterate(
                mlp(4, 9, 3), train, evaluate, **OPTIONS | {"sparsity": 0.9, "warm_up": 1}, checkpoint=tmp_path / "kept"
            )
        assert (tmp_path / "kept" / CHECKPOINT).exists()
        assert (caught.value.iteration, caught.value.epoch) == (1, 1)
        assert caught.value.result.masks == {}
        with_least = iterate(mlp(4, 9, 3), train, evaluate, **options, plan_with={"least": 1})
        assert all(mask.any() for mask in with_least.masks.values())

    def test_a_plan_that_fails_says_so_too(self):
        def decide(model, sparsity):
            return plan(model, sparsity=sparsity, refit="none") if sparsity < 0.5 else "no plan"

        with pytest.raises(IterateError, match=r"Epoch 1 of iteration 3 of 3 .*TypeError: plan_with returned a str"):
            iterate(mlp(4, 9, 3), nothing, evaluate, **OPTIONS | {"sparsity": 0.6}, plan_with=decide)

    def test_that_is_an_interrupt_passes_and_the_run_goes_on(self, tmp_path):
        def interrupted(model):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            iterate(mlp(4, 9, 3), failing(5, interrupted), evaluate, **OPTIONS, checkpoint=tmp_path)
        again = iterate(mlp(4, 9, 3), failing(99, interrupted), evaluate, **OPTIONS, checkpoint=tmp_path)
        assert same_results(again, iterate(mlp(4, 9, 3), failing(99, interrupted), evaluate, **OPTIONS))


def run(checkpoint=None, **changes):
    """A run with all that a state can hold: a stateful trainer, a monitor, drawn masks, a point to go back to."""
    arguments = {"model": mlp(4, 9, 3), "train": Wandering(), "evaluate": evaluate, **OPTIONS, "rewind": 1, "seed": 4}
    arguments |= {"stop": any_of(flow_back(Norms(), 0.05), masks_stable(0.03, 1)), "checkpoint": checkpoint}
    return iterate(**arguments | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that is done."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


class TestCheckpoints:
    def test_hold_tensors_and_json_and_are_read_once_all_is_done(self, tmp_path):
        first = run(tmp_path / "new")
        assert [path.name for path in (tmp_path / "new").iterdir()] == [CHECKPOINT]
        with safe_open(tmp_path / "new" / CHECKPOINT, framework="pt") as file:
            assert len(json.loads(file.metadata()["iterations"])) == 4

        class Never(Wandering):
            def __call__(self, model, position):
                raise AssertionError("trained")

        Never.__qualname__ = Wandering.__qualname__
        again = run(tmp_path / "new", train=Never())
        assert same_results(again, first)
        assert again.epochs["seconds"].equals(first.epochs["seconds"])

    def test_are_left_alone_by_what_else_is_in_the_folder(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / f".{CHECKPOINT}.0123456789ab.tmp").write_bytes(b"half")
        run(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "notes.txt"]

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"sparsity": 0.6}, r"made with sparsity=0\.7, this call has sparsity=0\.6"),
            ({"iterations": 4}, "made with iterations=3, this call has iterations=4"),
            ({"schedule": "cubic"}, "targets"),
            ({"cap": 4}, "cap=3"),
            ({"warm_up": 3}, "warm_up=2"),
            ({"rewind": 2}, "rewind="),
            ({"rewind": "rate"}, "rewind="),
            ({"every": 2}, "every=1"),
            ({"seed": 1}, "seed=4"),
            ({"plan_with": {"rule": "uniform"}}, "plan_with="),
            ({"stop": None}, "stop="),
            ({"stop": any_of(flow_back(Norms(), 0.06), masks_stable(0.03, 1))}, "stop="),
            ({"monitors": {"more": Norms()}}, "monitors="),
            ({"reference": mlp(4, 9, 3)}, "reference="),
            ({"train": nothing}, "train="),
            ({"evaluate": lambda net: 0.5}, "evaluate="),
            ({"model": mlp(4, 9, 3, seed=1)}, r"another model, which differs at '0\.weight'"),
        ],
    )
    def test_of_other_arguments_or_another_model_are_refused(self, finished, changes, match):
        before = (finished / CHECKPOINT).read_bytes()
        with pytest.raises(ValueError, match=match) as caught:
            run(finished, **changes)
        assert str(caught.value).startswith(str(finished / CHECKPOINT))
        assert (finished / CHECKPOINT).read_bytes() == before

    @pytest.mark.parametrize(
        "other", [replace(TRAINER, learning_rate=0.01), replace(TRAINER, labels=1 - LABELS), replace(TRAINER, epochs=9)]
    )
    def test_know_the_default_trainer_by_its_settings_and_data(self, tmp_path, other):
        run(tmp_path, train=TRAINER)
        run(tmp_path, train=replace(TRAINER, inputs=INPUTS.clone()))
        with pytest.raises(ValueError, match="train="):
            run(tmp_path, train=other)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_that_are_damaged_are_refused(self, tmp_path, finished, share):
        content = (finished / CHECKPOINT).read_bytes()
        (tmp_path / CHECKPOINT).write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"is damaged .*Remove it to start again"):
            run(tmp_path)
        save_file({"w": torch.ones(2)}, tmp_path / CHECKPOINT)
        with pytest.raises(ValueError, match="is damaged"):
            run(tmp_path)

    def test_are_tried_before_anything_is_trained(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(NotADirectoryError):
            run(tmp_path / "file", train=failing(1, _raise))

    @pytest.mark.parametrize("rewind", ["warm-up", "start", 1, "none", "rate"])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_let_the_optimiser_go_on_after_each_epoch(self, tmp_path, rewind, optimizer):
        class Stop(BaseException):
            pass

        options = {"rewind": rewind, "stop": None, "seed": 0}
        trainer = replace(TRAINER, optimizer=optimizer, schedule="cosine", epochs=20, learning_rate=0.01)
        expected = run(train=trainer, **options)

        def killed(left, model):
            if next(left) == 0:
                raise Stop
            return evaluate(model)

        for _ in range(14):  # two epochs at a time, each time with a trainer of its own that knows nothing
            judge = functools.partial(killed, itertools.count(-2))
            judge = functools.update_wrapper(lambda model, judge=judge: judge(model), evaluate)
            with contextlib.suppress(Stop):
                found = run(tmp_path, train=replace(trainer), evaluate=judge, **options)
                break
        assert same_results(found, expected)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.sampled_from(["read", "plan", "train", "look", "stop", "state", "write", "copy"]),
        min_size=1,
        max_size=5,
    ),
    st.data(),
)
def test_a_run_stopped_at_any_stage_ends_in_the_same_bits(tmp_path_factory, stages, data):
    """In one process: stopped at a stage chosen by hand, at an epoch chosen by hand."""
    folder = tmp_path_factory.mktemp("kept")
    expected = run()

    class Stop(BaseException):
        pass

    for stage in stages:
        left = itertools.count(-data.draw(st.integers(0, 5)))

        def stopping(function, left=left):
            @functools.wraps(function)
            def stopped(*args, **kwargs):
                if next(left) == 0:
                    raise Stop
                return function(*args, **kwargs)

            return stopped

        place, name = {
            "read": (sys.modules["ellq.pruning.iterate"], "read"),
            "plan": (sys.modules["ellq.pruning.replan"], "plan"),
            "train": (Wandering, "__call__"),
            "look": (Norms, "__call__"),
            "stop": (sys.modules["ellq.pruning.iterate"], "reason_of"),
            "state": (Wandering, "state_dict"),
            "write": (os, "replace"),
            "copy": (sys.modules["ellq.pruning.iterate"], "masked_model"),
        }[stage]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, stopping(getattr(place, name)))
            with contextlib.suppress(Stop):
                run(folder)
    assert same_results(run(folder), expected)


SCRIPT = """
import os, random, signal, sys, time
import numpy as np
import torch
from torch import nn
from ellq.pruning import EpochTrainer, any_of, flow_back, iterate, masks_stable
from safetensors.torch import save_file

torch.set_num_threads(1)

class Norms:
    pairs = ("0", "4")
    def __call__(self, model):
        return np.array([model[0].weight.detach().norm().item(), model[4].weight.detach().norm().item()])
    def identity(self):
        return {}

def run(checkpoint, result):
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    trainer = EpochTrainer(inputs, labels, 30, "cosine", "adamw", learning_rate=1e-2)
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))
    def evaluate(model):
        with torch.no_grad():
            return (model(inputs).argmax(1) == labels).double().mean()
    stop = any_of(flow_back(Norms(), 0.02), masks_stable(0.01, 2))
    found = iterate(net, trainer, evaluate, sparsity=0.8, iterations=4, cap=5, warm_up=5, rewind=2, stop=stop,
                    checkpoint=checkpoint)
    tensors = {f"model/{name}": tensor for name, tensor in found.model.state_dict().items()}
    tensors |= {f"mask/{name}": mask for name, mask in found.masks.items()}
    table = torch.from_numpy(found.epochs[["loss", "accuracy", "distance_Norms", "mask_distance"]].to_numpy().copy())
    save_file(tensors | {"table": table}, result)

"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_in_the_same_bits(tmp_path):
    expected, found, seed = unbroken_and_resumed(SCRIPT, tmp_path)
    for name, tensor in expected.items():
        assert torch.equal(tensor.nan_to_num(-1), found[name].nan_to_num(-1)), (seed, name)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [CHECKPOINT]


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"sparsity": 1.0}, ValueError, "sparsity"),
            ({"sparsity": None}, TypeError, "sparsity is missing. Pass the fraction to remove"),
            ({"iterations": 0}, ValueError, "iterations=0"),
            ({"cap": 0}, ValueError, "cap=0"),
            ({"cap": 2.5}, TypeError, "cap must be a whole number"),
            ({"warm_up": -1}, ValueError, "warm_up=-1"),
            ({"every": 0}, ValueError, "every=0"),
            ({"seed": -1}, ValueError, "seed"),
            ({"rule": "infcop"}, ValueError, "rule='infcop' is unknown. Choose one of 'ellq', 'gharatappeh2025'"),
            ({"schedule": "linear"}, ValueError, "Choose one of 'geometric', 'cubic', 'one-shot'"),
            ({"schedule": lambda t, T, s: 0.6 / t}, ValueError, r"masks only shrink\. Let it rise\.$"),
            ({"plan_with": 3}, TypeError, "plan_with must be keyword arguments or a function, got int"),
            ({"plan_with": {"tol": 0.1}}, ValueError, "plan_with holds 'tol'"),
            ({"plan_with": {"rule": "none"}}, ValueError, "rule='none' is unknown"),
            ({"plan_with": {"refit": "obs"}}, ValueError, r"Use refit='least_squares'\.$"),
            ({"train": None}, TypeError, "train must be a function, got NoneType"),
            ({"evaluate": 0.9}, TypeError, "evaluate must be a function, got float"),
            ({"stop": "accuracy"}, TypeError, "stop must be a function of a history, got str"),
            ({"reference": 0.9}, TypeError, "reference must be an nn.Module, got float"),
            ({"monitors": [Norms()]}, TypeError, "monitors must map names to monitors, got list"),
            ({"monitors": {"norm": lambda net: np.zeros(2)}}, TypeError, "Monitor 'norm' must be a function"),
            ({"model": {"w": torch.ones(2, 2)}}, TypeError, "model must be an nn.Module, got dict"),
            ({"model": nn.Sequential(nn.LazyLinear(3))}, ValueError, r"'0\.weight' is not initialised"),
            ({"sparsity": 0.99, "plan_with": {"least": 1}}, ValueError, "sparsity=0.99 "),
        ],
    )
    def test_that_do_not_do_are_refused_before_anything_is_trained(self, tmp_path, changes, error, match):
        def train(model, position):
            raise AssertionError("trained")

        arguments = {"model": mlp(4, 9, 3), "train": train, "evaluate": evaluate, **OPTIONS} | changes
        with pytest.raises(error, match=match):
            iterate(**arguments, checkpoint=tmp_path / "kept")
        assert not (tmp_path / "kept").exists()

    @pytest.mark.parametrize("lacking", ["load_state_dict", "reset"])
    def test_a_trainer_that_cannot_be_given_its_state_back_is_refused(self, lacking):
        train = Wandering()
        setattr(train, lacking, None)
        with pytest.raises(TypeError, match=f"train has a state_dict, but no {lacking}. Give it all of"):
            iterate(mlp(4, 9, 3), train, evaluate, **OPTIONS)

    def test_a_trainer_whose_state_a_file_cannot_hold_is_refused(self):
        class Odd(Wandering):
            def state_dict(self):
                return {"optimiser": object()}

        with pytest.raises(TypeError, match=r"train.state_dict\(\) holds a object, which a checkpoint cannot"):
            iterate(mlp(4, 9, 3), Odd(), evaluate, **OPTIONS)


def test_tables_have_the_same_columns_however_little_there_is():
    full = run()
    with pytest.raises(IterateError) as caught:
        run(train=failing(1, _raise))
    empty = caught.value.result
    assert empty.iterations.dtypes.equals(full.iterations.dtypes)
    assert empty.flows.dtypes.equals(full.flows.dtypes)
    assert set(empty.epochs) <= set(full.epochs)
    assert full.to_frame().equals(full.iterations)
    assert full.to_frame() is not full.iterations
    assert isinstance(full.iterations, pd.DataFrame)
