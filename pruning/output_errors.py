"""What two versions of a network answer to the same inputs, and how far apart every layer's outputs are."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ellq.analysis import Calibration, as_input, track

MANY_CALLS = "runs {calls} times for a batch, all of which count, and no bound on that is known"
NEVER = "is not run by itself, so its outputs are not seen"
OTHER_CALLS = "does not run as often as in the dense network"
OTHER_SHAPE = "gives outputs of another shape than in the dense network"


@dataclass(frozen=True)
class Examples:
    """A set of examples in batches that can be gone through again.

    Attributes:
        name: what messages call it.
        batches: tensors of inputs, or pairs of inputs and labels.
        count: how many examples, ≥ 1.
        hashes: of the bytes of each.
    """

    name: str
    batches: Iterable[Any]
    count: int
    hashes: frozenset[bytes] = field(repr=False)

    @staticmethod
    def of(data: Calibration, name: str, batch_size: int) -> Examples:
        """Read through the data once.

        Args:
            data: a tensor of inputs, shape (n, …), or an iterable of batches, each a tensor or a tuple or list that
                starts with the inputs and the labels. A one-way iterator is kept.
            name: of the argument it was.
            batch_size: of the batches a tensor is cut into.

        Raises:
            TypeError: neither a tensor nor an iterable of batches.
            ValueError: no examples.
        """
        batches: Iterable[Any]
        if isinstance(data, Tensor):
            batches = torch.split(data, batch_size) if data.ndim else ()
        elif isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
            raise TypeError(
                f"{name} must be a tensor or an iterable of batches, got {type(data).__name__}. Pass inputs the models"
                " can be called on."
            )
        else:
            batches = list(data) if isinstance(data, Iterator) else data
        whole = Examples(name, batches, 0, frozenset())
        seen: set[bytes] = set()
        count = 0
        for inputs, _ in whole:
            seen.update(_hashes(inputs))
            count += len(inputs)
        if count == 0:
            raise ValueError(f"{name} holds no example. Pass at least one input, batched along axis 0.")
        return replace(whole, count=count, hashes=frozenset(seen))

    @property
    def length(self) -> int | None:
        """The number of batches, where it is known."""
        return operator.length_hint(self.batches) or None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield inputs and labels, batch by batch; labels are None where a batch has none."""
        for number, batch in enumerate(self.batches):
            parts = list(batch) if isinstance(batch, tuple | list) and batch else [batch]
            if not isinstance(parts[0], Tensor) or parts[0].ndim == 0:
                raise TypeError(
                    f"Batch {number} of {self.name} is {type(parts[0]).__name__}, not a tensor of examples or (inputs,"
                    " labels). Pass tensors the models can be called on."
                )
            labels = parts[1] if len(parts) > 1 and isinstance(parts[1], Tensor) else None
            if len(parts[0]):
                yield parts[0], labels


def refuse_shared(first: Examples, second: Examples) -> None:
    """Raise ValueError if an example is in both sets."""
    shared = len(first.hashes & second.hashes)
    if shared:
        raise ValueError(
            f"{first.name} and {second.name} share {shared} {'example' if shared == 1 else 'examples'}, so the second"
            " would not be held out. Take both from one partition."
        )


def _hashes(inputs: Tensor) -> list[bytes]:
    rows = inputs.detach().cpu().contiguous().reshape(len(inputs), -1)
    raw = rows.view(torch.uint8) if rows.shape[1] else rows.to(torch.uint8)
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in raw.numpy()]


@dataclass(frozen=True)
class Probe:
    """Where a layer's outputs are looked at.

    Attributes:
        layer: its path.
        end: path of the batch norm that alone reads it and is taken as part of it, or the layer's own.
        reads: of its inputs, those that the pruned layer still reads; None for all.
        gives: of its outputs, those that the pruned layer still gives; None for all.
        is_alike: whether the pruned layer, given those inputs, gives those outputs.
    """

    layer: str
    end: str
    reads: Tensor | None = None
    gives: Tensor | None = None
    is_alike: bool = True


@dataclass
class Distance:
    """How far apart two streams of outputs are, as far as they have been seen; root sums of squares.

    Attributes:
        signal: of the dense outputs.
        change: of pruned minus dense.
        alone: of what the layer alone changes, its inputs those of the dense network; NaN where not measured.
        count: how many outputs.
        calls: how often the layer ran for a batch.
        note: why the outputs cannot be compared; empty where they can.
    """

    signal: float = 0.0
    change: float = 0.0
    alone: float = 0.0
    count: int = 0
    calls: int = 0
    note: str = ""

    @property
    def rms(self) -> float:
        """The root mean square of the dense outputs."""
        return self.signal / math.sqrt(self.count) if self.count else math.nan

    def relative(self, change: float) -> float:
        """Return a change relative to the dense outputs: 0 for none, infinite where only the dense ones are 0."""
        if self.note or not self.count:
            return math.nan
        if self.signal == 0:
            return math.nan if math.isnan(change) else (math.inf if change else 0.0)
        return change / self.signal


@dataclass(frozen=True)
class Answers:
    """What both networks answered.

    Attributes:
        layers: distance by layer path.
        output: distance of the networks' own outputs.
        dense: the place of each example's largest output, shape (n,); None where outputs are not (n, classes).
        pruned: likewise.
        labels: shape (n,), where every batch had whole numbers; else None.
        classes: how many outputs an example has; 0 where ``dense`` is None.
    """

    layers: dict[str, Distance]
    output: Distance
    dense: npt.NDArray[np.int64] | None
    pruned: npt.NDArray[np.int64] | None
    labels: npt.NDArray[np.int64] | None
    classes: int


def answers(
    dense: nn.Module, pruned: nn.Module, probes: Sequence[Probe], examples: Examples, *, alone: bool
) -> Answers:
    """Run both networks, in eval mode already, on a set of examples, batch by batch.

    The outputs of all probed layers on one batch are in memory at once.

    Args:
        dense: the network before.
        pruned: the network after.
        probes: where to look.
        examples: what to run on.
        alone: whether to run each pruned layer on the dense network's inputs too.

    Raises:
        ValueError: a network does not run on a batch, or gives NaN or infinite outputs; the place is named.
    """
    layers = {probe.layer: Distance(alone=0.0 if alone and probe.is_alike else math.nan) for probe in probes}
    output = Distance(alone=math.nan)
    places: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: list[Tensor] = []
    widths: set[int] = set()
    batches = track(examples, f"comparing on {examples.name}", total=examples.length)
    for number, (inputs, own_labels) in enumerate(batches):
        batch = _Batch(examples.name, number, dense, pruned, layers)
        ours, theirs = batch.compare(inputs, probes, output, alone=alone)
        for found, answer in zip(places, (ours, theirs), strict=True):
            is_logits = answer.ndim == 2 and len(answer) == len(inputs) and answer.shape[1] > 1
            widths.add(answer.shape[1] if is_logits else 0)
            if is_logits:
                found.append(answer.argmax(1).cpu())
        if own_labels is not None:
            labels.append(own_labels.detach().cpu())
    are_logits = len(widths) == 1 and 0 not in widths
    first, second = (torch.cat(found).numpy() if are_logits else None for found in places)
    return Answers(layers, output, first, second, _whole(labels, examples.count), widths.pop() if are_logits else 0)


def _whole(labels: list[Tensor], count: int) -> npt.NDArray[np.int64] | None:
    if sum(len(part) for part in labels if part.ndim == 1 and not part.is_floating_point()) != count:
        return None
    return torch.cat(labels).long().numpy()


@dataclass(frozen=True)
class _Batch:
    """One batch going through both networks."""

    set: str
    number: int
    dense: nn.Module
    pruned: nn.Module
    layers: dict[str, Distance]

    def compare(
        self, inputs: Tensor, probes: Sequence[Probe], output: Distance, *, alone: bool
    ) -> tuple[Tensor, Tensor]:
        """Add to the distances, and return both networks' outputs."""
        met: dict[str, list[Tensor]] = {probe.layer: [] for probe in probes}
        waiting: dict[str, Tensor] = {}  # what the pruned layer alone gives, until the norm after it has run

        def at_layer(probe: Probe, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            own = self._alone(probe, args, named) if alone and probe.is_alike else None
            if probe.end == probe.layer:
                keep(probe, result, own)
            elif own is not None:
                waiting[probe.layer] = own

        def at_norm(probe: Probe, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            own = waiting.pop(probe.layer, None)
            keep(probe, result, None if own is None else self.pruned.get_submodule(probe.end)(own))

        def keep(probe: Probe, result: Any, own: Tensor | None) -> None:
            value = _cut(tensor_in(result), probe.gives)
            distance = self.layers[probe.layer]
            distance.signal = math.hypot(distance.signal, self._norm(value, probe.layer, "dense"))
            distance.count += value.numel()
            if own is not None:
                change = own.to(value.device, torch.float64, copy=True).sub_(value)
                distance.alone = math.hypot(distance.alone, self._norm(change, probe.layer, "pruned"))
            met[probe.layer].append(value.clone())  # a function further on may work in place

        def at_end(probe: Probe, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            calls = met[probe.layer]
            distance = self.layers[probe.layer]
            if not calls:
                distance.note = OTHER_CALLS
                return
            distance.note = distance.note or self._add(distance, calls.pop(0), tensor_in(result), probe.layer)

        before = [(probe.layer, partial(at_layer, probe)) for probe in probes]
        before += [(probe.end, partial(at_norm, probe)) for probe in probes if probe.end != probe.layer]
        ours = self._run(self.dense, "dense", inputs, before)
        for probe in probes:
            distance = self.layers[probe.layer]
            distance.calls = max(distance.calls, len(met[probe.layer]))
        theirs = self._run(self.pruned, "pruned", inputs, [(probe.end, partial(at_end, probe)) for probe in probes])
        for probe in probes:
            if met[probe.layer]:
                self.layers[probe.layer].note = OTHER_CALLS
        output.signal = math.hypot(output.signal, self._norm(ours, "", "dense"))
        output.count += ours.numel()
        output.note = output.note or self._add(output, ours, theirs, "")
        return ours, theirs

    def _add(self, distance: Distance, before: Tensor, after: Tensor, layer: str) -> str:
        if before.shape != after.shape:
            return OTHER_SHAPE
        change = after.to(before.device, torch.float64, copy=True).sub_(before)
        distance.change = math.hypot(distance.change, self._norm(change, layer, "pruned"))
        return ""

    def _alone(self, probe: Probe, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        layer = self.pruned.get_submodule(probe.layer)
        if probe.reads is not None:
            args = (_cut(args[0], probe.reads), *args[1:])
        args = tuple(as_input(value, layer) if isinstance(value, Tensor) else value for value in args)
        named = {name: as_input(value, layer) if isinstance(value, Tensor) else value for name, value in named.items()}
        return tensor_in(layer(*args, **named))

    def _norm(self, values: Tensor, layer: str, which: str) -> float:
        """Return the root sum of squares, scaled where squares would overflow or vanish; refuse NaN and infinity."""
        values = values if values.is_floating_point() else values.double()
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
        if 1e-140 < norm < math.inf:
            return norm
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not math.isfinite(largest):
            place = f"layer {layer!r} of the {which} network" if layer else f"the {which} network"
            raise ValueError(f"Batch {self.number} of {self.set} gives NaN or infinite outputs of {place}. Check it.")
        return largest * float(torch.linalg.vector_norm(values / largest, dtype=torch.float64)) if largest else 0.0

    def _run(
        self, model: nn.Module, which: str, inputs: Tensor, hooks: Sequence[tuple[str, Callable[..., None]]]
    ) -> Tensor:
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda _, args, named, result, hook=hook: hook(args, named, result), with_kwargs=True
            )
            for path, hook in hooks
        ]
        try:
            with torch.no_grad():
                return tensor_in(model(as_input(inputs, model)))
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"The {which} network does not run on batch {self.number} of {self.set}, of shape"
                f" {tuple(inputs.shape)}: {' '.join(str(error).split()).rstrip('.')}. Pass inputs it can be called on."
            ) from error
        finally:
            for handle in handles:
                handle.remove()


def tensor_in(result: Any) -> Tensor:
    """Return a tensor, or the first that a tuple, list or mapping holds."""
    found = result
    while isinstance(found, tuple | list | Mapping) and len(found):
        found = next(iter(found.values() if isinstance(found, Mapping) else found))
    if not isinstance(found, Tensor):
        raise TypeError(f"a module gives a {type(found).__name__}, not a tensor")
    return found


def _cut(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values[..., kept.to(values.device)]
