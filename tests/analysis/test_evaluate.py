from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ellq.analysis.datasets import load
from ellq.analysis.evaluate import accuracy, agreement, predict
from ellq.analysis.nets import mlp


class Fixed(nn.Module):
    """Has no parameters: the inputs are the outputs."""

    def forward(self, x):
        return x


class NanAt(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.where(x == self.value, torch.nan, x)


LOGITS = torch.tensor([[1.0, 2.0, 0.0], [5.0, 4.0, 3.0], [0.0, 0.0, 1.0], [2.0, 2.0, 1.0]])


class TestPredict:
    @pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 512])
    def test_does_not_depend_on_the_batch_size(self, batch_size):
        inputs = torch.arange(20.0).reshape(10, 2)
        assert torch.equal(predict(Fixed(), inputs, batch_size=batch_size), inputs)

    def test_runs_in_eval_mode_without_gradients(self):
        net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        inputs = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
        first = predict(net, inputs)
        assert torch.equal(first, predict(net, inputs))
        assert not first.requires_grad
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    @pytest.mark.parametrize("fails", [False, True])
    def test_restores_the_flag_of_every_module(self, fails):
        net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()), NanAt(1e9)).train()
        net[1].eval()
        net[1][1].train()
        before = [module.training for module in net.modules()]
        inputs = torch.full((4, 2), torch.nan if fails else 1.0)
        if fails:
            with pytest.raises(ValueError, match="NaN"):
                predict(net, inputs)
        else:
            predict(net, inputs)
        assert [module.training for module in net.modules()] == before

    def test_names_the_batch_that_gives_nan(self):
        with pytest.raises(ValueError, match="Batch 2 of the inputs gives NaN"):
            predict(NanAt(5.0), torch.arange(8.0).reshape(8, 1), batch_size=2)

    def test_infinity_is_an_answer(self):
        assert predict(Fixed(), torch.tensor([[torch.inf]])).isinf().all()

    def test_refuses_what_holds_no_inputs(self):
        for inputs in (torch.zeros(0, 2), torch.tensor(1.0)):
            with pytest.raises(ValueError, match="holds no example"):
                predict(Fixed(), inputs)
        with pytest.raises(TypeError, match=r"inputs is a Dataset, not a tensor. Pass data.inputs\(\)"):
            predict(Fixed(), load("digits"))
        with pytest.raises(ValueError, match="batch_size=0 is below 1"):
            predict(Fixed(), LOGITS, batch_size=0)

    def test_refuses_models_that_do_not_answer_each_input(self):
        with pytest.raises(ValueError, match=r"Batch 0 of 4 inputs gives outputs of shape \(12,\)"):
            predict(nn.Flatten(0), LOGITS)
        with pytest.raises(TypeError, match="gives a tuple"):
            predict(nn.LSTM(3, 2), LOGITS)

    def test_moves_batches_to_the_device_of_the_model(self):
        # The meta device holds no values: reaching the check for NaN proves that the inputs were moved there.
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            predict(nn.Linear(3, 2, device="meta"), LOGITS)


class TestAccuracy:
    @pytest.mark.parametrize("convert", [torch.tensor, np.array])
    def test_counts_the_largest_output(self, convert):
        assert accuracy(Fixed(), LOGITS, convert([1, 0, 2, 0])) == 1  # of equal outputs the first counts
        assert accuracy(Fixed(), LOGITS, convert([1, 0, 0, 1])) == 0.5

    def test_of_a_data_set(self):
        data = load("digits", "test")
        net = mlp(64, outputs=10)
        share = accuracy(net, data.inputs(), data.labels)
        assert share == float((net(data.inputs()).argmax(1).numpy() == data.labels).mean())

    def test_does_not_write_to_or_warn_about_read_only_labels(self):
        labels = np.array([1, 0, 2, 0])
        labels.flags.writeable = False
        assert accuracy(Fixed(), LOGITS, labels) == 1

    @pytest.mark.parametrize(
        ("labels", "complaint"),
        [
            ([0, 1], "do not fit 4 inputs"),
            ([[0], [1], [2], [0]], "do not fit 4 inputs"),
            ([0.0, 1.0, 2.0, 0.0], "do not fit 4 inputs"),
            ([0, 1, 2, 3], "3.*has 3 outputs"),
            ([0, 1, 2, -1], "-1"),
        ],
    )
    def test_refuses_labels_that_do_not_fit(self, labels, complaint):
        with pytest.raises(ValueError, match=complaint):
            accuracy(Fixed(), LOGITS, torch.tensor(labels))

    def test_refuses_outputs_that_are_not_logits(self):
        with pytest.raises(ValueError, match=r"outputs of shape \(4, 1\)"):
            accuracy(Fixed(), LOGITS[:, :1], torch.zeros(4, dtype=torch.long))


class TestAgreement:
    def test_is_one_with_itself_and_symmetric(self):
        inputs = load("digits", "test").inputs()
        first, second = mlp(64, 8, outputs=10), mlp(64, 8, outputs=10)
        assert agreement(first, first, inputs) == 1
        assert agreement(first, second, inputs) == agreement(second, first, inputs) < 1

    def test_counts_equal_places(self):
        swap = nn.Linear(3, 3, bias=False)
        swap.weight.data = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
        # Rows 0 and 1 swap their largest place; in row 3 the tie goes to the first place both times.
        assert agreement(Fixed(), swap, LOGITS) == 0.5

    def test_refuses_different_classes(self):
        with pytest.raises(ValueError, match="first has 3 outputs but second has 2"):
            agreement(Fixed(), nn.Linear(3, 2), LOGITS)
