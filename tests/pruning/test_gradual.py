from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from ellq.pruning import plan
from ellq.pruning.apply import apply, finalize
from ellq.pruning.gradual import CHECKPOINT, GradualError, gradual
from ellq.pruning.mask_parametrization import is_masked, masks_of
from ellq.pruning.schedules import SCHEDULES
from ellq.pruning.training import ClassifierTrainer
from kills import unbroken_and_resumed
from pruned_nets import assert_unchanged, gaussian, mlp, same_bits, snapshot

INPUTS = gaussian(96, 4)
LABELS = (INPUTS[:, 0] > 0).long()
TRAINER = ClassifierTrainer(INPUTS, LABELS, batch_size=32)


def nothing(model: nn.Module, epochs: int) -> None:
    """Train nothing."""


def shuffled(model: nn.Module, epochs: int) -> float:
    """Train a little with all three random states, leaving flags, hooks and an attribute behind."""
    assert not hasattr(model, "left")
    assert not model[0]._forward_hooks
    model.left = True
    model[0].register_forward_hook(lambda *_: None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1 * random.random(), momentum=0.9, weight_decay=0.1)
    loss = torch.zeros(())
    for _ in range(2 * epochs):
        batch = torch.from_numpy(np.random.permutation(96)[:32])  # noqa: NPY002
        loss = cross_entropy(model(INPUTS[batch] + 0.1 * torch.randn(32, 4)), LABELS[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False).eval()
    return loss.item()


def same_results(first, second) -> bool:
    same_masks = first.masks.keys() == second.masks.keys() and all(
        torch.equal(mask, second.masks[name]) for name, mask in first.masks.items()
    )
    columns = [name for name in first.table.columns if name != "seconds"]
    return same_masks and same_bits(first.model, second.model) and first.table[columns].equals(second.table[columns])


class TestSteps:
    @pytest.mark.parametrize("schedule", [*SCHEDULES, lambda step, steps, sparsity: sparsity * step / steps])
    def test_reach_every_target_and_masks_only_shrink(self, schedule):
        seen = []

        def train(model, epochs):
            assert epochs == 3
            assert model.training
            seen.append({name: mask.clone() for name, mask in masks_of(model).items()})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))

        found = gradual(mlp(4, 9, 3), train, sparsity=0.75, steps=4, schedule=schedule, epochs=3)
        assert list(found.table["step"]) == [1, 2, 3, 4]
        assert found.table["target"].iloc[-1] == 0.75
        for row, masks in zip(found.table.itertuples(), seen, strict=True):
            total, kept = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
            assert row.target <= row.sparsity == 1 - kept / total < row.target + 1 / total
            assert row.nonzeros == kept + 9 + 3
        for earlier, later in itertools.pairwise(seen):
            assert not any((later[name] & ~earlier[name]).any() for name in later)
        for name, mask in found.masks.items():
            assert torch.equal(found.model.get_parameter(name) != 0, mask)
        assert found.table["loss"].isna().all()

    def test_give_a_plain_model_and_leave_theirs_alone(self):
        net = mlp(4, 9, 3)
        net[0].bias.requires_grad_(False)
        net[1].eval()
        before, states = snapshot(net), (random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
        found = gradual(net, shuffled, sparsity=0.6, steps=3)
        assert_unchanged(net, before)
        assert random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
        assert not is_masked(found.model)
        assert [type(m) for m in found.model.modules()] == [type(m) for m in net.modules()]
        assert [m.training for m in found.model.modules()] == [m.training for m in net.modules()]
        assert [p.requires_grad for p in found.model.parameters()] == [p.requires_grad for p in net.parameters()]
        assert not hasattr(found.model, "left")

    def test_repeat_by_their_seed(self):
        first = gradual(mlp(4, 9, 3), shuffled, sparsity=0.6, steps=3, seed=1)
        torch.manual_seed(9)
        random.seed(9)
        np.random.seed(9)  # noqa: NPY002
        assert same_results(first, gradual(mlp(4, 9, 3), shuffled, sparsity=0.6, steps=3, seed=1))
        assert not same_results(first, gradual(mlp(4, 9, 3), shuffled, sparsity=0.6, steps=3, seed=2))

    def test_of_one_are_plan_and_train(self):
        net = mlp(4, 9, 3)
        found = gradual(net, nothing, sparsity=0.6, steps=1)
        assert same_bits(found.model, finalize(apply(net, plan(net, sparsity=0.6, refit="none"))))

    def test_with_the_default_trainer_learn(self):
        found = gradual(mlp(4, 16, 2), replace(TRAINER, learning_rate=2e-2), sparsity=0.8, steps=4, epochs=30)
        with torch.no_grad():
            assert (found.model(INPUTS).argmax(1) == LABELS).double().mean() > 0.9
        assert found.table["loss"].between(0, 1).all()

    def test_plan_with_what_they_are_given(self):
        net = mlp(4, 9, 3)
        by_name = gradual(net, nothing, sparsity=0.6, steps=2, plan_with={"rule": "yang2022", "q": 0.4})
        asked = []

        def decide(model, sparsity):
            assert not is_masked(model)
            asked.append(sparsity)
            return plan(model, sparsity=sparsity, rule="yang2022", q=0.4)

        by_function = gradual(net, nothing, sparsity=0.6, steps=2, plan_with=decide)
        assert same_results(by_name, by_function)
        assert asked == list(by_function.table["target"])
        assert not same_bits(by_name.model, gradual(net, nothing, sparsity=0.6, steps=2).model)

    def test_go_on_from_the_masks_a_model_has(self):
        net = mlp(4, 9, 3)
        masked = apply(net, plan(net, sparsity=0.5))
        with torch.no_grad():
            masked[0].parametrizations.weight.original[~masks_of(masked)["0.weight"]] = 50.0
        before = masks_of(masked)
        found = gradual(masked, nothing, sparsity=0.8, steps=2)
        assert is_masked(masked)
        assert not any((mask & ~before[name]).any() for name, mask in found.masks.items())

    def test_with_regrow_bring_back_what_is_large_beneath_the_mask(self):
        net = mlp(4, 9, 3)
        smallest = net[0].weight.abs().argmin().item()

        def train(model, epochs):
            with torch.no_grad():
                stored = model[0].parametrizations.weight.original.flatten()
                stored[smallest] = 9.0

        options = {"sparsity": 0.6, "steps": 2, "schedule": "one-shot"}
        assert not gradual(net, train, **options).masks["0.weight"].flatten()[smallest]
        regrown = gradual(net, train, **options, regrow=True)
        assert regrown.masks["0.weight"].flatten()[smallest]
        assert regrown.model[0].weight.flatten()[smallest] == 9.0
        assert regrown.table["sparsity"].iloc[1] >= 0.6

    def test_with_regrow_may_fall(self):
        found = gradual(
            mlp(4, 9, 3), nothing, sparsity=0.6, steps=3, schedule=lambda t, T, s: [0.6, 0.3, 0.0][t - 1], regrow=True
        )
        assert list(found.table["sparsity"].round(1)) == [0.6, 0.3, 0.0]
        assert same_bits(found.model, mlp(4, 9, 3))

    def test_at_sparsity_zero_train_without_masks(self):
        found = gradual(mlp(4, 9, 3), TRAINER, sparsity=0.6, steps=2, schedule=lambda t, T, s: s * (t - 1))
        assert list(found.table["sparsity"].round(1)) == [0.0, 0.6]
        assert found.table["nonzeros"].iloc[0] == 36 + 9 + 27 + 3

    def test_keep_shared_weights_shared(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        net[2].weight = net[0].weight
        found = gradual(net, TRAINER, sparsity=0.5, steps=2, epochs=2)
        assert found.model[2].weight is found.model[0].weight
        assert torch.equal(found.model[0].weight != 0, found.masks["0.weight"])

    def test_are_known_by_masks_of_their_own_even_if_training_changes_them(self):
        def train(model, epochs):
            for mask in masks_of(model).values():
                mask.fill_(True)

        found = gradual(mlp(4, 9, 3), train, sparsity=0.6, steps=2)
        assert list(found.table["sparsity"].round(1)) == [0.4, 0.6]

    def test_count_buffers_that_training_moves(self):
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        found = gradual(net, TRAINER, sparsity=0.5, steps=2)
        assert found.model[1].num_batches_tracked == 2 * 3


def failing(at: int, how):
    """A trainer that trains, and at its ``at``-th call fails after having spoilt the weights."""
    calls = itertools.count(1)

    def train(model, epochs):
        loss = TRAINER(model, epochs)
        if next(calls) == at:
            with torch.no_grad():
                model[2].weight = torch.full((3, 9), 1e9)
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
    "an infinite loss": (lambda model: torch.tensor(torch.inf), "train returned the loss inf"),
    "a strange loss": (lambda model: "low", "TypeError: train returned a str"),
    "weights not finite": (_spoil, r"NaN or infinite entries in '2\.bias'"),
    "another dtype": (_cast, r"train changed '0\.\w+' from float32 .* to float64"),
}


class TestAFailingTrainer:
    @pytest.mark.parametrize(("how", "match"), FAILURES.values(), ids=FAILURES)
    @pytest.mark.parametrize("at", [1, 3])
    def test_leaves_the_last_good_state_and_says_where(self, tmp_path, how, match, at):
        net = mlp(4, 9, 3)
        before = snapshot(net)
        options = {"sparsity": 0.6, "steps": 4, "schedule": "cubic"}
        with pytest.raises(GradualError, match=match) as caught:
            gradual(net, failing(at, how), checkpoint=tmp_path, **options)
        assert_unchanged(net, before)
        assert f"Step {at} of 4" in str(caught.value)
        assert f"The state after step {at - 1} is kept in {tmp_path / CHECKPOINT}" in str(caught.value)
        error = caught.value
        assert error.step == at
        assert error.checkpoint == tmp_path / CHECKPOINT
        assert len(error.result.table) == at - 1
        unbroken = gradual(net, failing(9, how), **options)
        # The same call goes on: the function has the same name.
        again = gradual(net, failing(9, how), checkpoint=tmp_path, **options)
        assert same_results(again, unbroken)
        if at > 1:
            assert torch.equal(error.result.model[0].weight != 0, error.result.masks["0.weight"])
        else:
            assert same_bits(error.result.model, net)

    def test_without_a_checkpoint_keeps_the_state_in_the_error(self):
        with pytest.raises(GradualError, match="is in this error's result; pass checkpoint=") as caught:
            gradual(mlp(4, 9, 3), failing(2, _raise), sparsity=0.6, steps=3)
        assert caught.value.checkpoint is None
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert len(caught.value.result.table) == 1

    def test_may_leave_nan_in_removed_entries(self):
        def train(model, epochs):
            with torch.no_grad():
                model[0].parametrizations.weight.original[~masks_of(model)["0.weight"]] = torch.nan

        assert torch.isfinite(gradual(mlp(4, 9, 3), train, sparsity=0.6, steps=2).model[0].weight).all()

    def test_that_is_interrupted_goes_on_where_it_was(self, tmp_path):
        def interrupted(model):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gradual(mlp(4, 9, 3), failing(2, interrupted), sparsity=0.6, steps=3, checkpoint=tmp_path)
        again = gradual(mlp(4, 9, 3), failing(9, interrupted), sparsity=0.6, steps=3, checkpoint=tmp_path)
        assert same_results(again, gradual(mlp(4, 9, 3), failing(9, interrupted), sparsity=0.6, steps=3))

    def test_a_plan_that_fails_at_a_step_says_so_too(self):
        def decide(model, sparsity):
            return plan(model, sparsity=sparsity) if sparsity < 0.5 else "no plan"

        with pytest.raises(GradualError, match=r"Step 2 of 2 .*TypeError: plan_with returned a str"):
            gradual(mlp(4, 9, 3), nothing, sparsity=0.6, steps=2, plan_with=decide)


OPTIONS = {"sparsity": 0.6, "steps": 3, "epochs": 2}


class TestCheckpoints:
    def test_hold_tensors_and_json_and_are_read_once_all_is_done(self, tmp_path):
        first = gradual(mlp(4, 9, 3), shuffled, **OPTIONS, checkpoint=tmp_path / "new")
        assert [path.name for path in (tmp_path / "new").iterdir()] == [CHECKPOINT]
        with safe_open(tmp_path / "new" / CHECKPOINT, framework="pt") as file:
            assert len(json.loads(file.metadata()["rows"])) == 3

        assert same_results(gradual(mlp(4, 9, 3), shuffled, **OPTIONS, checkpoint=tmp_path / "new"), first)
        seconds = gradual(mlp(4, 9, 3), shuffled, **OPTIONS, checkpoint=tmp_path / "new").table["seconds"]
        assert seconds.equals(first.table["seconds"])  # nothing was done again

    def test_are_left_alone_by_what_else_is_in_the_folder(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / f".{CHECKPOINT}.0123456789ab.tmp").write_bytes(b"half")
        gradual(mlp(4, 9, 3), nothing, **OPTIONS, checkpoint=tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "notes.txt"]

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"sparsity": 0.7}, r"made with sparsity=0\.6, this call has sparsity=0\.7"),
            ({"steps": 4}, "made with steps=3, this call has steps=4"),
            ({"schedule": "cubic"}, "targets"),
            ({"epochs": 1}, "epochs=2"),
            ({"seed": 1}, "seed=0"),
            ({"regrow": True}, "regrow=False"),
            ({"plan_with": {"rule": "yang2022"}}, "plan_with=None"),
            ({"train": nothing}, "train="),
            ({"train": ClassifierTrainer(INPUTS, LABELS, batch_size=16)}, "train="),
            ({"train": ClassifierTrainer(-INPUTS, LABELS, batch_size=32)}, "train="),
            ({"model": mlp(4, 9, 3, seed=1)}, r"another model, which differs at '0\.weight'"),
            ({"model": mlp(4, 8, 3)}, r"another model, which differs at '0\.weight'"),
            ({"model": mlp(4, 9, 3, bias=False)}, r"another model, which differs at '2\.weight'"),
            ({"model": mlp(4, 9, 3).double()}, r"another model, which differs at '0\.weight'"),
        ],
    )
    def test_of_other_arguments_or_another_model_are_refused(self, tmp_path, changes, match):
        arguments = {"model": mlp(4, 9, 3), "train": TRAINER, **OPTIONS}
        gradual(**arguments, checkpoint=tmp_path)
        before = (tmp_path / CHECKPOINT).read_bytes()
        with pytest.raises(ValueError, match=match) as caught:
            gradual(**(arguments | changes), checkpoint=tmp_path)
        assert str(caught.value).startswith(str(tmp_path / CHECKPOINT))
        assert (tmp_path / CHECKPOINT).read_bytes() == before

    @pytest.mark.parametrize(
        "other",
        [
            DataLoader(TensorDataset(-INPUTS), batch_size=32),
            DataLoader(TensorDataset(INPUTS), batch_size=16),
            DataLoader(TensorDataset(INPUTS), batch_size=32, shuffle=True),
            DataLoader(Subset(TensorDataset(INPUTS), range(96)), batch_size=32),
            INPUTS,
        ],
    )
    def test_know_what_a_loader_draws_from_and_how(self, tmp_path, other):
        def options(calibration):
            return {"plan_with": {"rule": "wanda", "calibration": calibration}}

        same = [DataLoader(TensorDataset(INPUTS.clone()), batch_size=32) for _ in range(2)]
        gradual(mlp(4, 9, 3), nothing, **OPTIONS, **options(same[0]), checkpoint=tmp_path)
        gradual(mlp(4, 9, 3), nothing, **OPTIONS, **options(same[1]), checkpoint=tmp_path)
        with pytest.raises(ValueError, match="was made with plan_with="):
            gradual(mlp(4, 9, 3), nothing, **OPTIONS, **options(other), checkpoint=tmp_path)

    @pytest.mark.parametrize(
        "other", [Subset(TensorDataset(INPUTS), range(64)), ConcatDataset([TensorDataset(INPUTS)] * 2)]
    )
    def test_know_a_data_set_without_tensors_by_type_and_length(self, tmp_path, other):
        def options(data):
            return {"plan_with": {"rule": "wanda", "calibration": DataLoader(data, batch_size=32)}}

        for data in (INPUTS, -INPUTS):  # which is not told apart, as documented
            gradual(
                mlp(4, 9, 3), nothing, **OPTIONS, **options(Subset(TensorDataset(data), range(96))), checkpoint=tmp_path
            )
        with pytest.raises(ValueError, match="was made with plan_with="):
            gradual(mlp(4, 9, 3), nothing, **OPTIONS, **options(other), checkpoint=tmp_path)

    def test_know_masked_models_and_partial_functions(self, tmp_path):
        net = mlp(4, 9, 3)
        masked = apply(net, plan(net, sparsity=0.3, refit="none"))
        train = functools.partial(shuffled)
        gradual(masked, train, **OPTIONS, checkpoint=tmp_path)
        gradual(copy.deepcopy(masked), functools.partial(shuffled), **OPTIONS, checkpoint=tmp_path)
        with pytest.raises(ValueError, match=r"differs at 'mask of 0\.weight'"):
            gradual(net, train, **OPTIONS, checkpoint=tmp_path)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_that_are_damaged_are_refused(self, tmp_path, share):
        gradual(mlp(4, 9, 3), nothing, **OPTIONS, checkpoint=tmp_path)
        content = (tmp_path / CHECKPOINT).read_bytes()
        (tmp_path / CHECKPOINT).write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"is damaged .*Remove it to start again"):
            gradual(mlp(4, 9, 3), nothing, **OPTIONS, checkpoint=tmp_path)
        save_file({"w": torch.ones(2)}, tmp_path / CHECKPOINT)
        with pytest.raises(ValueError, match="is damaged"):
            gradual(mlp(4, 9, 3), nothing, **OPTIONS, checkpoint=tmp_path)

    def test_are_tried_before_anything_is_trained(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(NotADirectoryError):
            gradual(mlp(4, 9, 3), failing(1, _raise), **OPTIONS, checkpoint=tmp_path / "file")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_keep_every_bit_of_any_dtype_and_of_buffers_that_are_not_persistent(self, tmp_path, dtype):
        net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).to(dtype)
        net.register_buffer("flags", torch.tensor([True, False]), persistent=False)
        net.register_buffer("turns", torch.tensor([1 + 2j]), persistent=False)
        net.register_buffer("none", torch.zeros(0, 3), persistent=False)
        first = gradual(net, nothing, **OPTIONS, checkpoint=tmp_path)
        again = gradual(net, nothing, **OPTIONS, checkpoint=tmp_path)
        assert same_results(first, again)
        assert again.model.flags.tolist() == [True, False]
        assert again.model[0].weight.dtype == dtype


SCRIPT = """
import os, random, signal, sys, time
import torch
from torch import nn
from ellq.pruning.gradual import gradual
from ellq.pruning.schedules import SCHEDULES
from ellq.pruning.training import ClassifierTrainer
from safetensors.torch import save_file

torch.set_num_threads(1)

def run(checkpoint, result):
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    trainer = ClassifierTrainer(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long(), batch_size=64)
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))
    found = gradual(net, trainer, sparsity=0.8, steps=8, epochs=3, schedule="cubic", checkpoint=checkpoint)
    tensors = {f"model/{name}": tensor for name, tensor in found.model.state_dict().items()}
    tensors |= {f"mask/{name}": mask for name, mask in found.masks.items()}
    table = torch.from_numpy(found.table[["step", "loss", "sparsity", "nonzeros"]].to_numpy().copy())
    save_file(tensors | {"table": table}, result)

"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_in_the_same_bits(tmp_path):
    expected, found, seed = unbroken_and_resumed(SCRIPT, tmp_path)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), (seed, name)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [CHECKPOINT]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(["read", "plan", "train", "write", "written"]), min_size=1, max_size=4), st.data())
def test_a_run_stopped_at_any_stage_ends_in_the_same_bits(tmp_path_factory, stages, data):
    """As above, in one process: stopped at a stage chosen by hand, at a step chosen by hand."""
    folder = tmp_path_factory.mktemp("kept")
    expected = gradual(mlp(4, 9, 3), shuffled, **OPTIONS)

    class Stop(BaseException):
        pass

    for stage in stages:
        left = itertools.count(-data.draw(st.integers(0, 2)))

        def stopping(function, left=left):
            def stopped(*args, **kwargs):
                if next(left) == 0:
                    raise Stop
                return function(*args, **kwargs)

            return stopped

        place, name = {
            "read": ("ellq.pruning.gradual", "_read"),
            "plan": ("ellq.pruning.replan", "plan"),
            "train": ("torch.optim", "SGD"),
            "write": ("os", "replace"),
            "written": ("ellq.pruning.gradual", "masked_model"),
        }[stage]
        with pytest.MonkeyPatch.context() as patch:
            module = sys.modules[place]
            patch.setattr(module, name, stopping(getattr(module, name)))
            with contextlib.suppress(Stop):
                gradual(mlp(4, 9, 3), shuffled, **OPTIONS, checkpoint=folder)
    assert same_results(gradual(mlp(4, 9, 3), shuffled, **OPTIONS, checkpoint=folder), expected)


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"sparsity": 1.0}, ValueError, "sparsity"),
            ({"sparsity": "0.5"}, TypeError, "sparsity"),
            ({"steps": 0}, ValueError, "steps"),
            ({"steps": 2.5}, (TypeError, ValueError), "steps"),
            ({"epochs": 0}, ValueError, "epochs"),
            ({"seed": -1}, ValueError, "seed"),
            ({"schedule": "linear"}, ValueError, "Choose one of 'geometric', 'cubic', 'one-shot'"),
            ({"schedule": 3}, TypeError, "schedule must be a name or a function, got int"),
            ({"schedule": lambda t, T, s: 1.0}, ValueError, "schedule gives 1.0 at step 1 of 3"),
            ({"schedule": lambda t, T, s: float("nan")}, ValueError, "schedule gives nan at step 1"),
            ({"schedule": lambda t, T, s: None}, ValueError, "schedule gives None at step 1"),
            ({"schedule": lambda t, T, s: 0.6 / t}, ValueError, "falls from 0.6 to 0.3 at step 2"),
            ({"plan_with": 3}, TypeError, "plan_with must be keyword arguments or a function, got int"),
            ({"plan_with": {"tol": 0.1}}, ValueError, "plan_with holds 'tol'"),
            ({"plan_with": {"rule": "none"}}, ValueError, "rule='none' is unknown"),
            (
                {"plan_with": {"rule": "wanda", "calibration": (INPUTS[i : i + 32] for i in (0, 32))}},
                TypeError,
                "holds a generator as 'calibration', which the first step would use up",
            ),
            ({"train": None}, TypeError, "train must be a function"),
            ({"model": {"w": torch.ones(2, 2)}}, TypeError, "model must be an nn.Module, got dict"),
            ({"model": nn.Sequential(nn.LazyLinear(3))}, ValueError, r"'0\.weight' is not initialised"),
            (
                {"model": nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(affine=False))},
                ValueError,
                "not initialised",
            ),
            ({"sparsity": 0.99}, ValueError, "sparsity"),
        ],
    )
    def test_that_do_not_do_are_refused_before_anything_is_trained(self, tmp_path, changes, error, match):
        def train(model, epochs):
            raise AssertionError("trained")

        arguments = {"model": mlp(4, 9, 3), "train": train, **OPTIONS} | changes
        with pytest.raises(error, match=match):
            gradual(**arguments, checkpoint=tmp_path / "kept")
        assert not (tmp_path / "kept").exists()

    def test_a_plan_that_cuts_is_refused(self):
        def decide(model, sparsity):
            return plan(model, INPUTS, method="id", sparsity=sparsity)

        with pytest.raises(GradualError, match="method 'id', but pruning in steps masks"):
            gradual(mlp(4, 9, 3), nothing, **OPTIONS, plan_with=decide)


@pytest.mark.parametrize("as_list", [False, True])
def test_modules_to_plan_are_told_apart(as_list, tmp_path):
    net = mlp(4, 8, 3)
    options = {"sparsity": 0.5, "steps": 2, "checkpoint": tmp_path}
    first, last = ([net[place]] if as_list else net[place] for place in (0, 2))
    found = gradual(net, nothing, **options, plan_with={"include": first})
    assert set(found.masks) == {"0.weight"}
    assert found.table["sparsity"].tolist()[-1] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="made with plan_with="):
        gradual(net, nothing, **options, plan_with={"include": last})
    assert set(gradual(net, nothing, **options | {"checkpoint": None}, plan_with={"exclude": first}).masks) == {
        "2.weight"
    }


@pytest.mark.parametrize("refit", ["obs", "auto", "reweight", "sparsegpt", "synthetic"])
def test_refits_that_bring_entries_back_need_regrow(refit):
    options = {"calibration": gaussian(16, 4), "refit": refit}
    with pytest.raises(ValueError, match="masks only shrink"):
        gradual(mlp(4, 8, 3), nothing, sparsity=0.5, steps=2, plan_with=options)
