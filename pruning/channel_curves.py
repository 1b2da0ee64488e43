"""What a network's outputs lose when one group keeps fewer units: whole curves from one factorisation each."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ellq.analysis import add_up, track
from ellq.pruning.channel_checkpoint import ChannelCheckpoint
from ellq.pruning.channel_refit import Reader, install_, layer_fit, order_of_removal, readers_of, readings_of
from ellq.pruning.coupling import ChannelGroup
from ellq.pruning.walk import does_not_run, tensors_in, walk
from ellq.theory import Array, BlockPath
from ellq.theory.arguments import Indices

FRACTIONS = (0.3, 0.5, 0.7, 0.85)
"""Of the units that the dense network has, at how many the outputs are looked at."""
FRACTION = 0.75
"""Of the units that a group of a narrower network has."""


@dataclass(frozen=True)
class Curve:
    """What outputs lose, by how many units of a group stay.

    Attributes:
        errors: squared error of the outputs relative to their energy, shape (units + 1,), never rising.
        path: in which order units go.
    """

    errors: Array
    path: BlockPath


def measured_curves(
    dense: nn.Module,
    changing: nn.Module,
    groups: Sequence[ChannelGroup],
    present: Mapping[str, Indices],
    batches: Sequence[Tensor],
    probe: Sequence[Tensor],
    *,
    seed: int = 0,
    checkpoint: ChannelCheckpoint | None = None,
    stage: str = "curves",
) -> dict[str, Curve]:
    """Measure for each group what the outputs lose when it alone loses units, its readers being refitted.

    The order in which units go and the readers' own errors come from one elimination, of all units, gone ones too. At a
    few widths below the present one the network is run with that group cut; between them, outputs' errors are taken to
    follow the readers', times a ratio that is interpolated.

    Args:
        dense: what is aimed at.
        changing: the network so far, of full size; as it was on return.
        groups: whose curves are wanted.
        present: what they keep so far.
        batches: calibration inputs.
        probe: those on which outputs are looked at.
        seed: of the positions that are looked at.
        checkpoint: keeps every curve that is known, and has those that were.
        stage: under which name.

    Returns:
        One curve for each group that a layer of those walked reads, by name.
    """
    found = {group.name: known for group in groups if (known := _known(checkpoint, stage, group.name)) is not None}
    readings = readings_of(dense, groups)
    unknown = [name for name, own in readings.items() if any(reading.group.name not in found for reading in own)]
    outputs = OutputError(dense, probe)
    waiting: dict[str, list[Reader]] = {}
    arrivals = walk(dense, changing, batches, unknown)
    for arrival in track(arrivals, "measuring what narrower layers lose", total=len(unknown)):
        fit = layer_fit(dense, arrival, seed=seed)
        for reader in readers_of(fit, readings[arrival.name], present):
            group = reader.reading.group
            if group.name in found:
                continue
            readers = waiting.setdefault(group.name, [])
            readers.append(reader)
            if len(readers) == len(group.consumers):
                width = len(present[group.name])
                curve = _curve(dense, changing, group.units, width, waiting.pop(group.name), outputs)
                found[group.name] = curve
                if checkpoint is not None:
                    parts = {"errors": curve.errors, "order": curve.path.order, "costs": curve.path.costs}
                    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
                    checkpoint.write(stage, group.name, tensors, None)
    return found


def _known(checkpoint: ChannelCheckpoint | None, stage: str, name: str) -> Curve | None:
    found = None if checkpoint is None else checkpoint.read(stage, name)
    if found is None:
        return None
    parts = {key: tensor.numpy() for key, tensor in found[0].items()}
    return Curve(parts["errors"], BlockPath(parts["order"], parts["costs"]))


class OutputError:
    """How far a network's outputs are from the dense one's: Σ‖Δ‖²/Σ‖y‖².

    Args:
        dense: what is aimed at.
        probe: on which inputs.
        centred: whether outputs count about their mean over units. A constant added to all of an example's outputs is
            then no error: a classifier's decision does not depend on it.

    Raises:
        ValueError: a batch that the network does not run on.
    """

    def __init__(self, dense: nn.Module, probe: Sequence[Tensor], *, centred: bool = True) -> None:
        self._probe, self._centred = probe, centred
        self._aims = [self._outputs(dense, number) for number in range(len(probe))]
        self._energy = add_up(sum(float(y.square().sum()) for aims in self._aims for y in aims))

    def of(self, model: nn.Module) -> float:
        """Return the error of a network."""
        total = 0.0
        for number, aims in enumerate(self._aims):
            found = self._outputs(model, number)
            total += sum(float((y - a).square().sum()) for y, a in zip(found, aims, strict=True))
        total = add_up(total)
        return total / self._energy if self._energy > 0 else total

    @torch.no_grad()
    def _outputs(self, model: nn.Module, number: int) -> list[Tensor]:
        try:
            outputs = model(self._probe[number].clone())
        except Exception as error:  # the model's own
            raise does_not_run(number, self._probe[number], error) from error
        found = [y.double() for y in tensors_in(outputs) if y.is_floating_point()]
        return [_about_mean(y) for y in found] if self._centred else found


def _about_mean(y: Tensor) -> Tensor:
    """Return outputs about their mean over units, which are along the last axis, or in images the second."""
    axis = 1 if y.ndim > 3 else -1
    return y - y.mean(dim=axis, keepdim=True) if y.ndim > 1 and y.shape[axis] > 1 else y


def _curve(
    dense: nn.Module, changing: nn.Module, units: int, width: int, readers: Sequence[Reader], outputs: OutputError
) -> Curve:
    """Return the curve of a group that has ``width`` of its units in the network so far."""
    path = order_of_removal(readers, np.arange(units))
    own, start = path.errors, outputs.of(changing)
    fractions = FRACTIONS if width == units else (FRACTION,)
    widths = sorted({max(1, round(width * fraction)) for fraction in fractions} - {width})
    ratios = []
    for k in widths:
        with _trial(changing, readers):
            for reader in readers:
                install_(dense, changing, reader.fit, [reader.rows(path.retained(k))])
            lost = max(outputs.of(changing) - start, 0.0)
        ratios.append(lost / (own[k] - own[width]) if own[k] > own[width] else 0.0)
    errors = own * np.interp(np.arange(units + 1), widths, ratios) if any(ratios) else own
    return Curve(np.maximum.accumulate(errors[::-1])[::-1], path)


@contextlib.contextmanager
def _trial(changing: nn.Module, readers: Sequence[Reader]) -> Iterator[None]:
    """Put what is done to the readers back."""
    names = [reader.fit.arrival.name for reader in readers]
    names += [reader.fit.arrival.norm for reader in readers if reader.fit.arrival.norm is not None]
    before = {name: copy.deepcopy(changing.get_submodule(name).state_dict()) for name in names}
    try:
        yield
    finally:
        for name, state in before.items():
            changing.get_submodule(name).load_state_dict(state)
