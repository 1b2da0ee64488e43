"""What iterative pruning made of a model, and the tables that tell how it went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor, nn

from ellq.pruning.iterate_state import State
from ellq.pruning.snapshot import effective_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ITERATIONS = {
    "iteration": "int64",
    "target": "float64",
    "sparsity": "float64",
    "nonzeros": "int64",
    "epochs": "int64",
    "stop": "object",
    "loss": "float64",
    "accuracy": "float64",
    "seconds": "float64",
}
_FLOWS = {
    "iteration": "int64",
    "epoch": "int64",
    "monitor": "object",
    "entry": "object",
    "value": "float64",
    "reference": "float64",
}
_EPOCHS = {
    "iteration": "int64",
    "epoch": "int64",
    "position": "int64",
    "loss": "float64",
    "accuracy": "float64",
    "sparsity": "float64",
    "mask_distance": "float64",
    "mask_turnover": "float64",
    "training_seconds": "float64",
    "evaluation_seconds": "float64",
    "monitoring_seconds": "float64",
    "seconds": "float64",
}


@dataclass(frozen=True, eq=False)
class Iterated:
    """What iterative pruning made of a model, and how it went.

    Attributes:
        model: a plain module with zeros in place.
        masks: name of each planned weight → which entries are kept, boolean, on the CPU.
        iterations: a row per iteration, 0 being the dense net's warm-up: ``iteration``, ``target`` (the schedule's
            sparsity; NaN where the rule decides), ``sparsity`` (removed of the weights the plans cover), ``nonzeros``
            (parameters that are not 0), ``epochs``, ``stop`` (the reason the rule gave; ``"cap"`` where it gave none;
            ``"warm-up"``), ``loss`` and ``accuracy`` at the end, ``seconds``.
        epochs: a row per epoch: ``iteration``, ``epoch`` (from 1), ``position`` (given to ``train``), ``loss``,
            ``accuracy`` (NaN between checks), ``sparsity``, a column ``distance_…`` for each monitor (‖F − F_dense‖₂),
            ``mask_distance`` and ``mask_turnover`` (NaN unless the rule draws masks), ``training_seconds``,
            ``evaluation_seconds``, ``monitoring_seconds`` (drawing masks included), ``seconds`` (all together).
        flows: a row per check and entry of a monitor: ``iteration``, ``epoch``, ``monitor``, ``entry``, ``value``,
            ``reference`` (the dense net's).
        dense_accuracy: what ``accuracy_back`` compares with; NaN until the warm-up is over.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    iterations: pd.DataFrame
    epochs: pd.DataFrame
    flows: pd.DataFrame
    dense_accuracy: float

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table of iterations."""
        return self.iterations.copy()

    def plot(self) -> Figure:
        """Draw accuracy, frontier, stops and flows; ``figure.savefig(path)`` writes it."""
        # Drawing is the slowest import of all and not everyone draws.
        from ellq.pruning.iterate_plot import draw_iterated

        return draw_iterated(self.iterations, self.epochs, self.flows, self.dense_accuracy)


def iterated(bare: nn.Module, state: State) -> Iterated:
    """Return the model that a state holds, and its tables.

    Args:
        bare: the model without masks.
        state: at any epoch.
    """
    iterations = pd.DataFrame(list(state.iterations), columns=list(_ITERATIONS)).astype(_ITERATIONS)
    epochs = pd.DataFrame(list(state.epochs), columns=list(_EPOCHS)).astype(_EPOCHS)
    for name, (_, reference) in state.references.items():
        said = {(i, e): math.dist(vectors[name], reference) for i, e, vectors in state.vectors}
        distances = [said.get(key, math.nan) for key in zip(epochs["iteration"], epochs["epoch"], strict=True)]
        epochs[f"distance_{name}"] = np.array(distances, dtype=np.float64)
    flows = [
        (iteration, epoch, name, entry, value, reference)
        for iteration, epoch, vectors in state.vectors
        for name, vector in vectors.items()
        for entry, value, reference in zip(state.references[name][0], vector, state.references[name][1], strict=True)
    ]
    return Iterated(
        effective_model(bare, state.now),
        dict(state.now.masks),
        iterations,
        epochs,
        pd.DataFrame(flows, columns=list(_FLOWS)).astype(_FLOWS),
        state.dense_accuracy,
    )
