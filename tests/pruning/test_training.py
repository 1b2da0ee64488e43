from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ellq.pruning import train_classifier
from ellq.pruning.training import ClassifierTrainer
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
    with pytest.raises(ValueError, match="must be at least 1"):
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
