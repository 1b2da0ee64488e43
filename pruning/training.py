"""The default trainer for small classifiers: deterministic for a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ellq.analysis import track

Model = TypeVar("Model", bound=nn.Module)


def train_classifier(
    make: Callable[[], Model],
    inputs: Tensor,
    labels: Tensor | npt.NDArray[np.integer],
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
    if len(inputs) != len(labels) or len(inputs) == 0:
        raise ValueError(f"inputs has {len(inputs)} examples and labels {len(labels)}. Pass one label per example.")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs} and batch_size={batch_size} must be at least 1.")
    targets = torch.as_tensor(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        steps = epochs * -(-len(inputs) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for epoch in track(range(epochs), description):
            for batch in torch.split(torch.randperm(len(inputs)), batch_size):
                loss = cross_entropy(model(inputs[batch]), targets[batch])
                if not torch.isfinite(loss):
                    raise ValueError(f"The loss became {loss.item()} in epoch {epoch}. Choose a smaller learning_rate.")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model.eval()
