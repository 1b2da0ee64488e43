from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ellq.pruning import train_classifier
from ellq.pruning.apply import apply
from ellq.pruning.prune import plan
from ellq.pruning.training import ClassifierTrainer, EpochTrainer
from pruned_nets import gaussian, same_bits

INPUTS = gaussian(96, 4)
LABELS = (INPUTS[:, 0] > 0).long()


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def train(**changes) -> nn.Module:
    return train_classifier(make, INPUTS, LABELS, **{"epochs": 3, **changes})


def test_the_same_seed_gives_the_same_weights():
    first = train(seed=5)
    torch.manual_seed(123)
    assert same_bits(first, train(seed=5))
    assert not same_bits(first, train(seed=6))


def test_the_random_state_is_as_before_even_after_an_error():
    state = torch.random.get_rng_state()
    train()
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="loss"):
        train(learning_rate=1e30)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_learns_and_returns_in_eval_mode():
    net = train(epochs=40, learning_rate=1e-2)
    assert not any(module.training for module in net.modules())
    with torch.no_grad():
        assert (net(INPUTS).argmax(1) == LABELS).double().mean() > 0.95


def test_takes_labels_as_an_array():
    assert same_bits(train(), train_classifier(make, INPUTS, LABELS.numpy().astype(np.int64), epochs=3))


@pytest.mark.parametrize("inputs", [torch.full((8, 4), torch.nan), torch.full((8, 4), torch.inf)])
def test_a_loss_that_is_not_finite_is_an_error(inputs):
    with pytest.raises(ValueError, match="The loss became nan in epoch 0"):
        train_classifier(make, inputs, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(("inputs", "labels"), [(INPUTS, LABELS[:5]), (INPUTS[:0], LABELS[:0])])
def test_inputs_and_labels_must_pair(inputs, labels):
    with pytest.raises(ValueError, match="one label per example"):
        train_classifier(make, inputs, labels)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"batch_size": 0}])
def test_counts_below_one_are_refused(changes):
    with pytest.raises(ValueError, match=r"=0 is outside \[1, "):
        train(**changes)


class TestATrainer:
    def test_trains_a_model_that_exists_as_it_would_be_from_scratch(self):
        torch.manual_seed(0)
        net = make()
        assert 0 < ClassifierTrainer(INPUTS, LABELS)(net, 3) < 1
        assert same_bits(net, train(seed=0))
        assert not net.training

    def test_returns_the_mean_loss_of_its_last_epoch(self):
        torch.manual_seed(0)
        net = nn.Linear(4, 2)
        trainer = ClassifierTrainer(INPUTS, LABELS, batch_size=40, learning_rate=0.0)  # batches of 40, 40 and 16
        expected = nn.functional.cross_entropy(net(INPUTS), LABELS).item()
        assert trainer(net, 2) == pytest.approx(expected, rel=1e-5)

    def test_is_known_by_its_settings_and_data(self):
        first = ClassifierTrainer(INPUTS, LABELS)
        assert first.identity() == ClassifierTrainer(INPUTS.clone(), LABELS.numpy()).identity()
        others = [
            ClassifierTrainer(INPUTS, LABELS, batch_size=3),
            ClassifierTrainer(INPUTS, LABELS, weight_decay=0.0),
            ClassifierTrainer(INPUTS.double(), LABELS),
            ClassifierTrainer(INPUTS, 1 - LABELS),
        ]
        assert all(other.identity() != first.identity() for other in others)


class TestAnEpochTrainer:
    def make(self, **changes) -> EpochTrainer:
        return EpochTrainer(INPUTS, LABELS, **{"batch_size": 40, **changes})

    def epochs(self, trainer, net, places):
        torch.manual_seed(3)
        return [trainer(net, place) for place in places]

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return make()

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    @pytest.mark.parametrize("schedule", ["constant", "cosine"])
    def test_trains_as_one_optimiser_of_torch_does(self, optimizer, schedule):
        ours, theirs = self.net(), self.net()
        self.epochs(self.make(optimizer=optimizer, schedule=schedule, epochs=4, learning_rate=0.01), ours, range(4))
        options = {"lr": 0.01, "weight_decay": 5e-4}
        reference = (
            torch.optim.SGD(theirs.parameters(), momentum=0.9, **options)
            if optimizer == "sgd"
            else torch.optim.AdamW(theirs.parameters(), **options)
        )
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 4 * 3)
        torch.manual_seed(3)
        theirs.train()
        for _ in range(4):
            for batch in torch.split(torch.randperm(96), 40):
                loss = nn.functional.cross_entropy(theirs(INPUTS[batch]), LABELS[batch])
                reference.zero_grad()
                loss.backward()
                reference.step()
                if schedule == "cosine":
                    rates.step()
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        assert not ours.training

    def test_rewinds_with_the_place_in_the_schedule(self):
        trainer = self.make(schedule="cosine", epochs=4, momentum=0.0)
        first, second = self.net(), self.net()
        self.epochs(trainer, first, [0, 3, 1])
        self.epochs(trainer, second, [0, 1, 1])
        assert not same_bits(first, second)
        early, late = self.net(), self.net()
        self.epochs(trainer, early, [0])
        self.epochs(trainer, late, [3])
        moved = [
            sum((own - other).norm() for own, other in zip(net.parameters(), self.net().parameters(), strict=True))
            for net in (early, late)
        ]
        assert moved[1] < moved[0] / 5

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_hands_its_moments_over_bit_for_bit(self, optimizer):
        whole, halves = self.net(), self.net()
        self.epochs(self.make(optimizer=optimizer), whole, [0, 1])
        first, second = self.make(optimizer=optimizer), self.make(optimizer=optimizer)
        torch.manual_seed(3)
        first(halves, 0)
        second.load_state_dict(first.state_dict())
        again = copy.deepcopy(halves)
        second(again, 1)
        assert same_bits(whole, again)
        forgetful = self.net()
        torch.manual_seed(3)
        second.reset()
        second(forgetful, 0)
        second.reset()
        second(forgetful, 1)
        assert not same_bits(whole, forgetful)

    def test_keeps_each_moment_with_its_weight_when_masks_come_on(self):
        dense = self.net()
        trainer = self.make()
        self.epochs(trainer, dense, [0])
        before = trainer.state_dict()["moments"]
        masked = apply(dense, plan(dense, sparsity=0.5, refit="none"))
        parameters = {name: parameter.shape for name, parameter in make().named_parameters()}
        trainer(masked, 1)
        after = trainer.state_dict()["moments"]
        assert before.keys() == after.keys() == parameters.keys()
        assert all(after[name]["momentum_buffer"].shape == shape for name, shape in parameters.items())

    def test_refuses_a_model_its_moments_do_not_fit(self):
        trainer = self.make()
        self.epochs(trainer, self.net(), [0])
        with pytest.raises(ValueError, match=r"The moments of '0\.bias' do not fit the model\. Call the trainer's"):
            trainer(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), 1)
        trainer.reset()
        trainer(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), 1)

    def test_is_known_by_its_settings_and_data_and_not_by_its_moments(self):
        first = self.make()
        told = first.identity()
        self.epochs(first, self.net(), [0])
        assert first.identity() == told == self.make().identity()
        others = [
            self.make(learning_rate=0.1),
            self.make(momentum=0.0),
            self.make(optimizer="adamw"),
            self.make(epochs=3),
            self.make(weight_decay=0.0),
            self.make(batch_size=4),
            EpochTrainer(-INPUTS, LABELS, batch_size=40),
        ]
        assert all(other.identity() != told for other in others)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"schedule": "linear"}, "schedule='linear' is unknown. Choose 'constant' or 'cosine'"),
            ({"optimizer": "rmsprop"}, "optimizer='rmsprop' is unknown"),
            ({"schedule": "cosine"}, "Pass epochs="),
            ({"epochs": 0}, "epochs=0"),
            ({"learning_rate": 0.0}, "learning_rate=0,"),
            ({"learning_rate": float("nan")}, "learning_rate=nan"),
            ({"momentum": 1.0}, "momentum=1 are not"),
            ({"weight_decay": -1.0}, "weight_decay=-1"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"inputs": INPUTS[:3]}, "one label per example"),
        ],
    )
    def test_refuses_settings_that_do_not_do(self, changes, match):
        arguments = {"inputs": INPUTS, "labels": LABELS} | changes
        with pytest.raises(ValueError, match=match):
            EpochTrainer(**arguments)

    @pytest.mark.parametrize("place", [-1, 4])
    def test_refuses_a_place_beyond_its_schedule(self, place):
        with pytest.raises(ValueError, match=f"epoch={place} lies outside the schedule of 4 epochs"):
            self.make(schedule="cosine", epochs=4)(self.net(), place)

    def test_says_in_which_epoch_the_loss_went_wrong(self):
        with pytest.raises(ValueError, match=r"The loss became .* in epoch 7\. Choose a smaller"):
            self.make(learning_rate=1e30)(self.net(), 7)
