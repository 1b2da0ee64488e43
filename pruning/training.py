"""The default trainers for small classifiers: deterministic for a seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ellq.analysis import track
from ellq.analysis.digest import digest
from ellq.pruning.mask_parametrization import stored_tensors
from ellq.theory.arguments import count

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
        TypeError: epochs or batch_size is no whole number.
        ValueError: inputs and labels of different lengths, epochs or batch_size below 1, or the loss becomes NaN or
            infinite.
    """
    trainer = ClassifierTrainer(inputs, labels, batch_size, learning_rate, weight_decay, description)
    count(epochs, "epochs", low=1, high=10**9)
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
        TypeError: batch_size is no whole number.
        ValueError: inputs and labels of different lengths, or batch_size below 1.
    """

    inputs: Tensor
    labels: Labels
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    description: str = "training"

    def __post_init__(self) -> None:
        _require_examples(self.inputs, self.labels, self.batch_size)

    def __call__(self, model: nn.Module, epochs: int) -> float:
        """Train the model in place and leave it in eval mode.

        Args:
            model: maps inputs (b, …) to logits (b, classes); batches are moved to the device of its parameters.
            epochs: passes over the data, ≥ 1.

        Returns:
            The mean loss over the last epoch.

        Raises:
            TypeError: epochs is no whole number.
            ValueError: epochs below 1, or the loss becomes NaN or infinite.
        """
        count(epochs, "epochs", low=1, high=10**9)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = epochs * -(-len(self.inputs) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        loss = 0.0
        for epoch in track(range(epochs), self.description):
            loss = _one_epoch(model, self.inputs, self.labels, self.batch_size, optimizer, schedule, epoch)
        model.eval()
        return loss

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on, as JSON holds it: settings, and a digest of the data."""
        return {
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "data": digest(self.inputs, torch.as_tensor(self.labels)),
        }


@dataclass(eq=False)
class EpochTrainer:
    """Trains a classifier by one epoch at a time: call it with the model and the epoch's place in the schedule.

    By SGD or AdamW on the cross-entropy. The learning rate follows from the place alone,

        constant: η,   cosine: η·(1 + cos(π·t/T))/2 at step t of the T steps of ``epochs`` epochs,

    so that calling it with an earlier place again rewinds the schedule. Momentum, or AdamW's moments, last from call
    to call; ``state_dict``, ``load_state_dict`` and ``reset`` hand them over, as ``ellq.iterate`` does to go on after a
    kill. They belong to parameters by the names these have without masks, not to one model object. The order of
    examples follows from torch's global random state.

    Attributes:
        inputs: shape (n, …).
        labels: class numbers, shape (n,).
        epochs: the length of the cosine schedule, ≥ 1; none is needed where the rate is constant.
        schedule: ``"constant"`` or ``"cosine"``.
        optimizer: ``"sgd"`` or ``"adamw"``.
        learning_rate: η > 0, at the start.
        momentum: of SGD, in [0, 1).
        weight_decay: ≥ 0; decoupled for AdamW.
        batch_size: examples per step, ≥ 1.

    Raises:
        TypeError: epochs or batch_size is no whole number.
        ValueError: inputs and labels of different lengths, an unknown name, a number out of range, or a cosine schedule
            without ``epochs``.
    """

    inputs: Tensor
    labels: Labels
    epochs: int | None = None
    schedule: str = "constant"
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    _moments: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _require_examples(self.inputs, self.labels, self.batch_size)
        for name, known in {"schedule": ("constant", "cosine"), "optimizer": ("sgd", "adamw")}.items():
            if getattr(self, name) not in known:
                choices = " or ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Choose {choices}.")
        if not self.learning_rate > 0 or not self.weight_decay >= 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"learning_rate={self.learning_rate:g}, weight_decay={self.weight_decay:g} and momentum="
                f"{self.momentum:g} are not > 0, >= 0 and in [0, 1). Choose such."
            )
        if self.epochs is None and self.schedule == "cosine":
            raise ValueError("schedule='cosine' falls over a number of epochs. Pass epochs=.")
        if self.epochs is not None:
            count(self.epochs, "epochs", low=1, high=10**9)

    def __call__(self, model: nn.Module, epoch: int) -> float:
        """Train the model in place for one epoch and leave it in eval mode.

        Args:
            model: maps inputs (b, …) to logits (b, classes); batches are moved to the device of its parameters.
            epoch: its place in the schedule, from 0.

        Returns:
            The mean loss over the epoch.

        Raises:
            ValueError: an epoch beyond the schedule, a model whose parameters the moments do not fit, or the loss
                becomes NaN or infinite.
        """
        if epoch < 0 or (self.schedule == "cosine" and epoch >= (self.epochs or 0)):
            raise ValueError(f"epoch={epoch} lies outside the schedule of {self.epochs} epochs. Pass a longer epochs=.")
        parameters = _parameters(model)
        optimizer = self._optimizer(parameters)
        steps = -(-len(self.inputs) // self.batch_size)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._factor((epoch * steps + step) / steps))
        model.train()
        loss = _one_epoch(model, self.inputs, self.labels, self.batch_size, optimizer, rates, epoch)
        model.eval()
        moments = optimizer.state_dict()["state"]
        self._moments = {name: moments[index] for index, name in enumerate(parameters) if index in moments}
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return what lasts from call to call; nothing changes it later."""
        return {"moments": self._moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what ``state_dict`` gave."""
        self._moments = state["moments"]

    def reset(self) -> None:
        """Forget what lasts from call to call."""
        self._moments = None

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on, as JSON holds it: settings, and a digest of the data."""
        names = ("epochs", "schedule", "optimizer", "learning_rate", "momentum", "weight_decay", "batch_size")
        data = digest(self.inputs, torch.as_tensor(self.labels))
        return {name: getattr(self, name) for name in names} | {"data": data}

    def _optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        own, rate, decay = list(parameters.values()), self.learning_rate, self.weight_decay
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=decay)
        else:
            optimizer = torch.optim.SGD(own, lr=rate, momentum=self.momentum, weight_decay=decay)
        if self._moments is not None:
            for name, moments in self._moments.items():
                shape = parameters[name].shape if name in parameters else None
                if any(isinstance(value, Tensor) and value.ndim and value.shape != shape for value in moments.values()):
                    raise ValueError(f"The moments of {name!r} do not fit the model. Call the trainer's reset() first.")
            indices = {name: index for index, name in enumerate(parameters)}
            moments = {indices[name]: copy.deepcopy(value) for name, value in self._moments.items() if name in indices}
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        return optimizer

    def _factor(self, epochs: float) -> float:
        """Return the learning rate over that at the start, after a number of epochs."""
        if self.schedule == "constant":
            return 1.0
        assert self.epochs is not None
        return (1 + math.cos(math.pi * min(epochs / self.epochs, 1.0))) / 2


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter once, by its name without masks, in an order that masks do not change."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, tensor in sorted(stored_tensors(model).items()):
        if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _one_epoch(
    model: nn.Module,
    inputs: Tensor,
    labels: Labels,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    rates: torch.optim.lr_scheduler.LRScheduler,
    epoch: int,
) -> float:
    """Go through the examples once, in an order of torch's global random state; return the mean loss."""
    device = next((parameter.device for parameter in model.parameters()), inputs.device)
    targets = torch.as_tensor(labels)
    total = 0.0
    for batch in torch.split(torch.randperm(len(inputs)), batch_size):
        loss = cross_entropy(model(inputs[batch].to(device)), targets[batch].to(device))
        if not torch.isfinite(loss):
            raise ValueError(f"The loss became {loss.item()} in epoch {epoch}. Choose a smaller learning_rate.")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
        total += loss.item() * len(batch)
    return total / len(inputs)


def _require_examples(inputs: Tensor, labels: Labels, batch_size: int) -> None:
    if len(inputs) != len(labels) or len(inputs) == 0:
        raise ValueError(f"inputs has {len(inputs)} examples and labels {len(labels)}. Pass one label per example.")
    count(batch_size, "batch_size", low=1, high=2**31)
