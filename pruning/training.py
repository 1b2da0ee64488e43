"""The default trainer for small classifiers: deterministic for a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ellq.analysis import track

Model = TypeVar("Model", bound=nn.Module)
Labels = Tensor | npt.NDArray[np.integer]


def train_classifier(
    make: Callable[[], Model],
    inputs: Tensor,
    labels: Labels,
    *,
    epochs: int = 30,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
    description: str = "training",
) -> Model:
    """Make a model and train it by Adam with a cosine schedule on the cross-entropy.

    The same arguments give the same weights on the same machine and number of threads. The global random state is as
    it was before.

    Args:
        make: builds the untrained model; called under the seed.
        inputs: shape (n, …).
        labels: class numbers, shape (n,).
        epochs: passes over the data, ≥ 1.
        batch_size: examples per step, ≥ 1.
        learning_rate: at the start; falls to 0.
        weight_decay: decoupled, as in AdamW.
        seed: of the initialisation and the order of examples.
        description: shown before the progress bar.

    Returns:
        The trained model, in eval mode.

    Raises:
        ValueError: inputs and labels of different lengths, epochs or batch_size below 1, or the loss becomes NaN or
            infinite.
    """
    trainer = ClassifierTrainer(inputs, labels, batch_size, learning_rate, weight_decay, description)
    _require_epochs(epochs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        trainer(model, epochs)
    return model


@dataclass(frozen=True, eq=False)
class ClassifierTrainer:
    """Trains a classifier that exists, masked or not: call it with the model and the number of epochs.

    By Adam with a cosine schedule on the cross-entropy. An optimiser is made for each call, so calls depend on nothing
    but the model and torch's global random state, which decides on the order of examples: seed it, as
    ``ellq.gradual`` does, and the result repeats.

    Attributes:
        inputs: shape (n, …).
        labels: class numbers, shape (n,).
        batch_size: examples per step, ≥ 1.
        learning_rate: at the start of each call; falls to 0.
        weight_decay: decoupled, as in AdamW.
        description: shown before the progress bar.

    Raises:
        ValueError: inputs and labels of different lengths, or batch_size below 1.
    """

    inputs: Tensor
    labels: Labels
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    description: str = "training"

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels) or len(self.inputs) == 0:
            raise ValueError(
                f"inputs has {len(self.inputs)} examples and labels {len(self.labels)}. Pass one label per example."
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")

    def __call__(self, model: nn.Module, epochs: int) -> float:
        """Train the model in place and leave it in eval mode.

        Args:
            model: maps inputs (b, …) to logits (b, classes); batches are moved to the device of its parameters.
            epochs: passes over the data, ≥ 1.

        Returns:
            The mean loss over the last epoch.

        Raises:
            ValueError: epochs below 1, or the loss becomes NaN or infinite.
        """
        _require_epochs(epochs)
        device = next((parameter.device for parameter in model.parameters()), self.inputs.device)
        targets = torch.as_tensor(self.labels)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = epochs * -(-len(self.inputs) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        total = 0.0
        for epoch in track(range(epochs), self.description):
            total = 0.0
            for batch in torch.split(torch.randperm(len(self.inputs)), self.batch_size):
                loss = cross_entropy(model(self.inputs[batch].to(device)), targets[batch].to(device))
                if not torch.isfinite(loss):
                    raise ValueError(f"The loss became {loss.item()} in epoch {epoch}. Choose a smaller learning_rate.")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += loss.item() * len(batch)
        model.eval()
        return total / len(self.inputs)

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on, as JSON holds it: settings, and a digest of the data."""
        digest = hashlib.sha256()
        for part in (self.inputs, torch.as_tensor(self.labels)):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "data": digest.hexdigest(),
        }


def _require_epochs(epochs: int) -> None:
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1.")
