from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ellq.analysis import as_batches, inputs_of

INPUTS = torch.arange(24.0).reshape(8, 3)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(INPUTS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.norm(self.drop(self.first(x)))
        return self.second(input=torch.relu_(hidden))


class TestAsBatches:
    @pytest.mark.parametrize(
        "calibration",
        [
            INPUTS,
            [INPUTS[:5], INPUTS[5:]],
            (INPUTS[:1], INPUTS[1:]),
            (batch for batch in INPUTS.split(3)),
            [(INPUTS, torch.zeros(8))],
            [[INPUTS[:4], "a"], [INPUTS[4:], "b"]],
            [INPUTS[:0], INPUTS],
            DataLoader(TensorDataset(INPUTS, torch.zeros(8)), batch_size=3),
            DataLoader(Stream(), batch_size=3),
        ],
        ids=["tensor", "list", "tuple", "generator", "labels", "lists", "empty batch", "loader", "stream"],
    )
    def test_gives_the_same_inputs_every_time(self, calibration):
        batches = as_batches(calibration)
        for _ in range(3):
            assert torch.equal(torch.cat(list(batches)), INPUTS)

    def test_cuts_a_tensor_into_batches(self):
        assert [len(batch) for batch in as_batches(INPUTS, batch_size=3)] == [3, 3, 2]

    def test_starts_a_shuffling_loader_afresh(self):
        batches = as_batches(DataLoader(TensorDataset(INPUTS), batch_size=8, shuffle=True))
        seen = [next(iter(batches)) for _ in range(8)]
        assert any(not torch.equal(seen[0], other) for other in seen)

    @pytest.mark.parametrize(
        ("calibration", "hint"),
        [([INPUTS] * 3, 3), (DataLoader(TensorDataset(INPUTS), batch_size=3), 3), (DataLoader(Stream()), 0)],
    )
    def test_says_how_many_where_that_is_known(self, calibration, hint):
        assert operator.length_hint(as_batches(calibration)) == hint

    @pytest.mark.parametrize("calibration", [None, 3, "digits", b"x", {"x": INPUTS}, TensorDataset(INPUTS), len])
    def test_refuses_what_is_no_batches(self, calibration):
        with pytest.raises(TypeError, match=f"got {type(calibration).__name__}"):
            as_batches(calibration)

    @pytest.mark.parametrize("batch", [{"x": INPUTS}, "text", 3, (), [3, 4], INPUTS.numpy()])
    def test_refuses_a_batch_that_is_no_tensor_by_its_number(self, batch):
        with pytest.raises(TypeError, match="Batch 1 of the calibration set"):
            list(as_batches([INPUTS, batch]))

    @pytest.mark.parametrize("calibration", [torch.zeros(0, 3), torch.tensor(1.0)])
    def test_refuses_a_tensor_without_inputs(self, calibration):
        with pytest.raises(ValueError, match="at least one input"):
            as_batches(calibration)

    @pytest.mark.parametrize("calibration", [[], iter([]), [torch.zeros(0, 3)]])
    def test_refuses_to_go_through_nothing(self, calibration):
        with pytest.raises(ValueError, match="holds no inputs"):
            list(as_batches(calibration))


class TestInputsOf:
    def test_are_what_each_layer_received_in_eval_mode(self):
        net = Net()
        first, second = inputs_of(net, ["first", "second"], INPUTS)
        net.eval()
        assert torch.equal(first, INPUTS)
        assert torch.equal(second, torch.relu(net.norm(net.first(INPUTS))))
        assert not second.requires_grad

    def test_are_not_changed_by_functions_that_work_in_place(self):
        net = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Linear(3, 2))
        inputs = -INPUTS
        (seen,) = inputs_of(net, ["0"], inputs.clone())
        assert torch.equal(seen, inputs)

    def test_leave_modes_hooks_and_statistics(self):
        net = Net().train()
        net.drop.eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        inputs_of(net, ["second"], INPUTS)
        assert [m.training for m in net.modules()] == [m is not net.drop for m in net.modules()]
        assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in net.modules())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_leave_no_hook_after_an_error(self):
        net = Net().train()
        with pytest.raises(
            ValueError, match=r"does not run on inputs of shape \(8, 2\) and type torch\.float32: .*\. "
        ):
            inputs_of(net, ["first", "second"], INPUTS[:, :2])
        assert not any(m._forward_pre_hooks for m in net.modules())
        assert all(m.training for m in net.modules())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_come_in_the_models_type(self, dtype):
        assert inputs_of(Net().to(dtype), ["first"], INPUTS)[0].dtype == dtype

    def test_keep_whole_numbers_and_mixed_types(self):
        net = nn.Sequential(nn.Embedding(30, 3), nn.Linear(3, 2)).half()
        assert inputs_of(net, ["0"], torch.arange(3))[0].dtype == torch.int64
        mixed = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).double())
        with pytest.raises(ValueError, match="does not run"):
            inputs_of(mixed, ["0"], INPUTS)

    def test_of_layers_not_reached_or_not_there_are_errors(self):
        with pytest.raises(ValueError, match="'unused' was not reached"):
            inputs_of(Net(), ["first", "unused"], INPUTS)
        with pytest.raises(KeyError):
            inputs_of(Net(), ["third"], INPUTS)
