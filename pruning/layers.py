"""The layers a rule decides on, and what it decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from ellq.analysis import Calibration
from ellq.pruning.largest import Counts, Layer, Survey, survey


@dataclass(frozen=True)
class Layers:
    """What a rule decides on.

    Attributes:
        names: of the weights.
        weights: the weights, units along the first axis.
        surveys: what one reading of each told.
        minima: for each layer what every unit keeps at least, shape (units,).
        shapes: the weights' own shapes; of grouped and transposed convolutions not those of ``weights``.
        model: the model they belong to, for rules that look at it; None for a state dict.
        calibration: inputs, for rules that use them; else None.
    """

    names: tuple[str, ...]
    weights: tuple[Layer, ...]
    surveys: tuple[Survey, ...]
    minima: tuple[Counts, ...]
    shapes: tuple[tuple[int, ...], ...]
    model: nn.Module | None = None
    calibration: Calibration | None = None

    @staticmethod
    def of(weights: Sequence[Layer], *, least: int = 1) -> Layers:
        """Return arrays or tensors as layers, every unit of which keeps ``least`` of its non-zero weights."""
        names = tuple(f"layer {number}" for number in range(len(weights)))
        surveys = tuple(survey(layer, name) for layer, name in zip(weights, names, strict=True))
        return Layers(names, tuple(weights), surveys, minima_of(surveys, least), tuple(tuple(w.shape) for w in weights))

    def only(self, places: Sequence[int]) -> Layers:
        """Return some of the layers."""
        return replace(
            self,
            names=tuple(self.names[i] for i in places),
            weights=tuple(self.weights[i] for i in places),
            surveys=tuple(self.surveys[i] for i in places),
            minima=tuple(self.minima[i] for i in places),
            shapes=tuple(self.shapes[i] for i in places),
        )

    @property
    def sizes(self) -> list[int]:
        """The number of weights of each layer."""
        return [math.prod(shape) for shape in self.shapes]


@dataclass(frozen=True)
class Allocation:
    """What a rule decided.

    Attributes:
        counts: for each layer what every unit keeps.
        reasons: for each layer why.
    """

    counts: list[Counts]
    reasons: list[str]


def minima_of(surveys: Sequence[Survey], least: int) -> tuple[Counts, ...]:
    """Return for each layer what every unit keeps at least: ``least``, or its non-zero weights if they are fewer."""
    return tuple(np.minimum(found.nonzeros, least) for found in surveys)


def same_reason(counts: list[Counts], reason: str) -> Allocation:
    """Return counts that have one reason in all layers."""
    return Allocation(counts, [reason] * len(counts))
