"""Measured latency: single layers timed at a few widths, and between them interpolated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ellq.analysis.flops import layer_flops
from ellq.analysis.progress import track
from ellq.pruning.coupling import Coupling
from ellq.pruning.width_costs import CostModel, Widths, layer_widths
from ellq.theory import Array
from ellq.theory.arguments import count

_FORMAT, _VERSION = "ellq.latency", 1
_LEAST_TIME = 0.02  # seconds a layer runs again and again for one median

_Timed: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Timings:
    """The latencies of one layer at a grid of widths.

    Attributes:
        inputs: widths of its input side, rising.
        outputs: widths of its output side, rising.
        seconds: for each input width, the medians for all output widths.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LatencyTable:
    """What was timed, on one machine.

    Attributes:
        batch_size: how many examples a layer was given.
        threads: how many threads torch used.
        layers: the timings by a layer's description, which says all that its latency depends on.
    """

    batch_size: int
    threads: int
    layers: Mapping[str, Timings]

    def to_json(self) -> str:
        """Return the table as a JSON text that ``from_json`` reads; numbers come back bit for bit."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: the text is something else.
        """
        try:
            data = json.loads(text)
            if (data["format"], data["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
            layers = {
                name: Timings(tuple(t["inputs"]), tuple(t["outputs"]), tuple(tuple(row) for row in t["seconds"]))
                for name, t in data["layers"].items()
            }
            return cls(data["batch_size"], data["threads"], layers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The text is no latency table of version {_VERSION} ({error}). Pass what LatencyTable.to_json wrote."
            ) from error


def measure_latencies(
    model: nn.Module,
    coupling: Coupling,
    example: Tensor,
    *,
    batch_size: int = 1,
    threads: int = 1,
    points: int = 5,
    known: LatencyTable | None = None,
) -> LatencyTable:
    """Time every Linear and convolution of a model alone, on the model's device, at a grid of widths.

    A side that a group cuts is timed at 1 and at even shares of its full width, a side that stays at its full width.
    Layers that differ in nothing that matters are timed once. A median of repeated runs is kept.

    Args:
        model: the dense model; not changed.
        coupling: its groups.
        example: inputs, of which the first is used: they give the sizes of the images or sequences.
        batch_size: how many examples a layer is given, ≥ 1.
        threads: how many threads torch uses, ≥ 1.
        points: how many widths of a side are timed, ≥ 2.
        known: an earlier table; what it holds is not timed again.

    Raises:
        ValueError: a number out of range, an empty batch, or a known table of another batch size or number of threads.
    """
    batch_size = count(batch_size, "batch_size", low=1, high=10**6)
    threads = count(threads, "threads", low=1, high=10**4)
    points = count(points, "points", low=2, high=10**3)
    if known is not None and (known.batch_size, known.threads) != (batch_size, threads):
        raise ValueError(
            f"known was timed with batch_size={known.batch_size} and threads={known.threads}, not {batch_size} and"
            f" {threads}. Pass a table of the same."
        )
    timed = dict(known.layers) if known is not None else {}
    wanted = {}
    for layer in _layers(model, coupling, example):
        if layer.description not in timed:
            wanted[layer.description] = layer
    for layer in track(wanted.values(), "timing layers", describe=lambda layer: f"timing {layer.name}"):
        inputs, outputs = layer.grids(points)
        seconds = tuple(tuple(layer.seconds(i, o, batch_size, threads) for o in outputs) for i in inputs)
        timed[layer.description] = Timings(inputs, outputs, seconds)
    return LatencyTable(batch_size, threads, timed)


def latency_model(
    model: nn.Module,
    coupling: Coupling,
    example: Tensor,
    *,
    batch_size: int = 1,
    threads: int = 1,
    table: LatencyTable | None = None,
) -> CostModel:
    """Model the seconds that the Linear and convolution layers of a net take, one after the other.

    Between the widths that were timed latencies are interpolated, bilinearly. Other layers and functions are not
    counted. The model is a function of the table alone; a table measured anew differs by noise.

    Args:
        model: the dense model; not changed.
        coupling: its groups.
        example: inputs, of which the first is used.
        batch_size: as of ``measure_latencies``; with a table, the table's holds.
        threads: as of ``measure_latencies``; with a table, the table's holds.
        table: what ``measure_latencies`` gave for this model; None to measure now.

    Raises:
        ValueError: as of ``measure_latencies``; or the table lacks a layer.
    """
    if table is None:
        table = measure_latencies(model, coupling, example, batch_size=batch_size, threads=threads)
    layers = _layers(model, coupling, example)
    for layer in layers:
        if layer.description not in table.layers:
            raise ValueError(
                f"The table has no latencies of {layer.name!r} ({layer.description}). Measure this model with"
                " known= this table."
            )
    widths = layer_widths(model, coupling)
    timings = {layer.name: table.layers[layer.description] for layer in layers}
    calls = {layer.name: layer.calls for layer in layers}
    constant = sum(calls[name] * timing.seconds[-1][-1] for name, timing in timings.items() if name not in widths.names)
    units = {group.name: group.units for group in coupling.groups}
    cut = [number for number, name in enumerate(widths.names) if name in timings]
    grids = [timings[widths.names[number]] for number in cut]
    repeated = np.array([calls[widths.names[number]] for number in cut], dtype=float)
    latencies = _Interpolated(grids, widths.inputs[cut], widths.outputs[cut])

    def operations(rows: Widths) -> Array:
        inputs, outputs = widths.at(rows)
        seconds = latencies.at(inputs[:, cut].astype(int), outputs[:, cut].astype(int))
        return np.asarray(constant + (seconds * repeated).sum(axis=1, keepdims=True))

    return CostModel("seconds", units, operations)


class _Interpolated:
    """The latencies of several layers at once."""

    def __init__(self, timings: list[Timings], inputs: Array, outputs: Array) -> None:
        # One more row and column than needed, so that the last point has a right neighbour, of weight 0.
        rows = max((len(t.inputs) for t in timings), default=0) + 1
        columns = max((len(t.outputs) for t in timings), default=0) + 1
        self.seconds = np.zeros((len(timings), rows, columns))
        for number, t in enumerate(timings):
            self.seconds[number, : len(t.inputs), : len(t.outputs)] = t.seconds
        self.layer = np.arange(len(timings))
        self.inputs, self.input_starts = _places([t.inputs for t in timings], inputs)
        self.outputs, self.output_starts = _places([t.outputs for t in timings], outputs)

    def at(self, inputs: Widths, outputs: Widths) -> Array:
        """Return the seconds of every layer, shape (n, m), at these widths, shape (n, m)."""
        x, y = self.inputs[self.input_starts + inputs], self.outputs[self.output_starts + outputs]
        i, j = x.astype(int), y.astype(int)
        x, y = x - i, y - j
        s, m = self.seconds, self.layer
        left = s[m, i, j] * (1 - x) + s[m, i + 1, j] * x
        right = s[m, i, j + 1] * (1 - x) + s[m, i + 1, j + 1] * x
        return np.asarray(left * (1 - y) + right * y)


def _places(grids: list[tuple[int, ...]], full: Array) -> tuple[Array, Widths]:
    """Return for every width 0 … full of every layer where it lies in its grid, and where each layer begins."""
    places = [
        np.interp(np.arange(int(width) + 1), grid, np.arange(len(grid)))
        for grid, width in zip(grids, full, strict=True)
    ]
    starts = np.cumsum([0, *(len(place) for place in places)])[:-1]
    return np.concatenate([np.zeros(0), *places]), starts


@dataclass(frozen=True)
class _Layer:
    """A layer to be timed, with all that its latency depends on besides its widths."""

    name: str
    module: _Timed
    calls: int
    shape: tuple[int, ...]  # of its input, for one example
    is_cut: tuple[bool, bool]  # on the input and the output side

    @property
    def description(self) -> str:
        weight = self.module.weight
        cut = " and ".join(side for side, is_cut in zip(("inputs", "outputs"), self.is_cut, strict=True) if is_cut)
        shape = "x".join(map(str, self.shape))
        return f"{self.module} of {shape} in {weight.dtype} on {weight.device.type}, {cut or 'nothing'} cut"

    def grids(self, points: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the widths at which it is timed; whole groups of a convolution with groups follow the outputs."""
        module = self.module
        if isinstance(module, nn.Linear):
            full, step = (module.in_features, module.out_features), 1
        else:
            full, step = (module.in_channels, module.out_channels), module.out_channels // module.groups
        if isinstance(module, nn.Linear) or module.groups == 1:
            sides = [
                _grid(width, points) if is_cut else (width,) for width, is_cut in zip(full, self.is_cut, strict=True)
            ]
            return sides[0], sides[1]
        groups = _grid(module.groups, points) if self.is_cut[1] else (module.groups,)
        return (full[0],), tuple(step * number for number in groups)

    def seconds(self, inputs: int, outputs: int, batch_size: int, threads: int) -> float:
        """Time it at other widths; a layer of its own is made and the model's is left alone."""
        module, weight = self.module, self.module.weight
        bias = module.bias is not None
        if isinstance(module, nn.Linear):
            layer: nn.Module = nn.Linear(inputs, outputs, bias, device="meta", dtype=weight.dtype)
            shape = (*self.shape[:-1], inputs)
        else:
            groups = module.groups * outputs // module.out_channels if module.groups > 1 else 1
            inputs = module.in_channels // module.groups * groups if module.groups > 1 else inputs
            kind = next(t for t in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, t))
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            settings = {name: getattr(module, name) for name in names}
            layer = kind(inputs, outputs, groups=groups, bias=bias, **settings, device="meta", dtype=weight.dtype)
            shape = (inputs, *self.shape[1:])
        layer = layer.to_empty(device=weight.device).eval()
        for parameter in layer.parameters():
            # Uninitialised memory may hold subnormal numbers, which are slow.
            nn.init.constant_(parameter, 0.01)
        x = torch.ones((batch_size, *shape), device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=threads)
            return float(timer.blocked_autorange(min_run_time=_LEAST_TIME).median)


def _layers(model: nn.Module, coupling: Coupling, example: Tensor) -> list[_Layer]:
    """Return the layers of a model that are timed: those called, in running order."""
    widths = layer_widths(model, coupling)
    cut = np.column_stack([widths.inputs_per_unit.any(axis=0), widths.outputs_per_unit.any(axis=0)])
    is_cut = {name: (bool(inputs), bool(outputs)) for name, (inputs, outputs) in zip(widths.names, cut, strict=True)}
    found = []
    table = layer_flops(model, example[:1])
    for name, calls, shape in zip(table["layer"], table["calls"], table["inputs"], strict=True):
        module = model.get_submodule(name)
        if calls and isinstance(module, _Timed):
            found.append(_Layer(name, module, calls, shape, is_cut.get(name, (False, False))))
    return found


def _grid(width: int, points: int) -> tuple[int, ...]:
    """Return 1, even shares of a width, and the width itself."""
    return tuple(sorted({max(1, math.ceil(width * i / (points - 1))) for i in range(points)}))
