"""What a net costs as a function of how many units each group of channels retains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ellq.analysis.activation_memory import Lifetimes, lifetimes
from ellq.analysis.flops import layer_flops, total_flops
from ellq.pruning.coupling import Coupling
from ellq.pruning.surgery import channels, cut_channels_
from ellq.theory import Array
from ellq.theory.arguments import count

Widths = npt.NDArray[np.int64]
"""How many units are retained: shape (n, groups), a row per choice, groups in the order of ``CostModel.units``."""


@dataclass(frozen=True, eq=False)
class CostModel:
    """The cost of a net by the units its groups retain.

    Attributes:
        quantity: what is counted, with its unit, such as ``"FLOPs"``.
        units: how many units each group has, by name.
        operations: maps widths, shape (n, groups), to costs, shape (n, o): the cost of a choice is the largest of its
            row. Where the cost is a sum, o = 1; where it is a peak, each operation that can be the peak has a column.
    """

    quantity: str
    units: Mapping[str, int]
    operations: Callable[[Widths], Array]

    def cost(self, widths: Mapping[str, int]) -> float:
        """Return the cost of the net with these widths; a group that is not named keeps all its units.

        Raises:
            ValueError: an unknown group, or a width outside [0, its units].
        """
        unknown = [name for name in widths if name not in self.units]
        if unknown:
            raise ValueError(f"widths names {unknown[0]!r}, which is no group. Groups: {', '.join(self.units)}.")
        row = [
            count(widths.get(name, units), f"width of {name!r}", low=0, high=units)
            for name, units in self.units.items()
        ]
        return float(self.costs(np.array([row], dtype=np.int64))[0])

    @property
    def dense(self) -> float:
        """The cost with all units."""
        return self.cost({})

    def costs(self, widths: Widths) -> Array:
        """Return the cost of each row of widths."""
        return np.asarray(self.operations(widths).max(axis=1))


@dataclass(frozen=True, eq=False)
class LayerWidths:
    """How wide the layers that a coupling cuts are, as functions of what the groups retain.

    Attributes:
        names: of the layers, m of them.
        is_product: whether a layer multiplies each input by each output: Linear, convolution without groups. The cost
            of the others follows their outputs alone; shape (m,).
        inputs: the full width of the input side, shape (m,).
        outputs: the full width of the output side, shape (m,).
        inputs_per_unit: how many inputs go with a unit of a group, shape (groups, m).
        outputs_per_unit: how many outputs go with a unit of a group, shape (groups, m).
        units: of the groups, shape (groups,).
    """

    names: tuple[str, ...]
    is_product: npt.NDArray[np.bool_]
    inputs: Array
    outputs: Array
    inputs_per_unit: Array
    outputs_per_unit: Array
    units: Array

    def at(self, widths: Widths) -> tuple[Array, Array]:
        """Return the inputs and the outputs of every layer, each of shape (n, m)."""
        removed = self.units - widths
        return self.inputs - removed @ self.inputs_per_unit, self.outputs - removed @ self.outputs_per_unit


@dataclass(frozen=True, eq=False)
class LayerCosts:
    """What layers cost as functions of their widths.

    Attributes:
        widths: of the layers, m of them.
        pairs: what each costs with all units ∝ inputs·outputs, shape (m,).
        alone: what each costs besides ∝ outputs, shape (m,).
        dense: what the whole net costs with all units.
    """

    widths: LayerWidths
    pairs: Array
    alone: Array
    dense: float

    def by_layer(self, rows: Widths) -> Array:
        """Return what every layer costs, shape (n, m)."""
        inputs, outputs = self.widths.at(rows)
        per_pair = self.pairs / (self.widths.inputs * self.widths.outputs)
        return np.asarray(outputs * (inputs * per_pair + self.alone / self.widths.outputs))

    def total(self, rows: Widths) -> Array:
        """Return what the net costs, shape (n, 1)."""
        rest = self.dense - self.pairs.sum() - self.alone.sum()
        return np.asarray(rest + self.by_layer(rows).sum(axis=1, keepdims=True))


def layer_widths(model: nn.Module, coupling: Coupling) -> LayerWidths:
    """Collect the layers that a coupling cuts."""
    modules = dict(model.named_modules())
    names = list(dict.fromkeys(member.module for group in coupling.groups for member in group.members))
    place = {name: number for number, name in enumerate(names)}
    per_unit = np.zeros((2, len(coupling.groups), len(names)))
    for number, group in enumerate(coupling.groups):
        for member in group.members:
            entries = member.entries.shape[1]
            if member.side != "out":
                read = entries if member.inputs is None else member.inputs.shape[1]
                per_unit[0, number, place[member.module]] += read
            if member.side != "in":
                per_unit[1, number, place[member.module]] += entries
    return LayerWidths(
        names=tuple(names),
        is_product=np.array([_is_product(modules[name]) for name in names], dtype=bool),
        inputs=np.array([channels(modules[name], "in") for name in names], dtype=float),
        outputs=np.array([channels(modules[name], "out") for name in names], dtype=float),
        inputs_per_unit=per_unit[0],
        outputs_per_unit=per_unit[1],
        units=np.array([group.units for group in coupling.groups], dtype=float),
    )


def flops_model(model: nn.Module, coupling: Coupling, example: Tensor, convention: str = "2mac") -> CostModel:
    """Model the FLOPs of one example, exactly for every choice of widths.

    A layer costs what its input width times its output width does, a norm what its width does. Where that leaves
    something out (activations and pooling in ``chee2021``, products that ``forward`` computes), each group is cut by
    one unit and the net counted anew. Either way the net cut by half is counted to make sure.

    Args:
        model: the dense model; not changed.
        coupling: its groups.
        example: inputs, of which the first is used.
        convention: as of ``layer_flops``.

    Raises:
        ValueError: an unknown convention, an empty batch, or FLOPs that do not follow the widths in these ways.
    """
    one = example[:1]
    costs = flops_of_layers(model, coupling, one, convention)
    return _exact("FLOPs", model, coupling, costs.total, lambda net: total_flops(net, one, convention=convention))


def flops_of_layers(model: nn.Module, coupling: Coupling, example: Tensor, convention: str = "2mac") -> LayerCosts:
    """Return the FLOPs of one example by layer, as far as they follow a layer's own widths; see ``flops_model``."""
    widths = layer_widths(model, coupling)
    flops = dict(layer_flops(model, example[:1], convention=convention)[["layer", "flops"]].to_numpy().tolist())
    products = dict(layer_flops(model, example[:1])[["layer", "flops"]].to_numpy().tolist())
    pairs = np.array([products.get(name, 0) for name in widths.names], dtype=float) * widths.is_product
    alone = np.array([flops.get(name, 0) for name in widths.names], dtype=float) - pairs
    return LayerCosts(widths, pairs, alone, sum(flops.values()))


def parameters_model(model: nn.Module, coupling: Coupling) -> CostModel:
    """Model the number of parameters, exactly for every choice of widths; a shared one counts once.

    Args:
        model: the dense model; not changed.
        coupling: its groups.
    """
    widths = layer_widths(model, coupling)
    layers = [model.get_submodule(name) for name in widths.names]
    held = np.array([sum(p.numel() for p in layer.parameters()) for layer in layers], dtype=float)
    weights = [
        layer.get_parameter("weight").numel() if is_product else 0
        for layer, is_product in zip(layers, widths.is_product, strict=True)
    ]
    pairs = np.array(weights, dtype=float)
    total = sum(p.numel() for p in model.parameters())
    return CostModel("parameters", _units(coupling), LayerCosts(widths, pairs, held - pairs, total).total)


def memory_model(model: nn.Module, coupling: Coupling, example: Tensor) -> CostModel:
    """Model the peak of the bytes of activations alive at once, exactly for every choice of widths.

    What is counted: ``peak_activation_bytes``. The net is run dense, with one unit less of each group, and cut by half
    to make sure.

    Args:
        model: the dense model; not changed.
        coupling: its groups.
        example: inputs, of which the first is used.

    Raises:
        ValueError: an empty batch, or a net that computes something else, or tensors whose sizes do not change evenly,
            when it is narrower.
    """
    dense = lifetimes(model, example)
    slopes = np.zeros((len(dense.bytes), len(coupling.groups)), dtype=np.int64)
    for number, group in enumerate(coupling.groups):
        if group.units > 1:
            fewer = lifetimes(_cut(model, coupling, {group.name: group.units - 1}), example)
            slopes[:, number] = dense.bytes - _same_lifetimes(dense, fewer).bytes
    halves = _halves(coupling)
    removed = np.array([group.units - halves[group.name] for group in coupling.groups], dtype=np.int64)
    half = _same_lifetimes(dense, lifetimes(_cut(model, coupling, halves), example))
    if not np.array_equal(dense.bytes - slopes @ removed, half.bytes):
        raise ValueError(
            "The sizes of the activations do not change evenly with the widths. Choose another budget than memory."
        )
    units = np.array([group.units for group in coupling.groups], dtype=np.int64)
    per_unit = dense.alive(slopes)
    rest = dense.alive(dense.bytes) - per_unit @ units
    rows = _undominated(np.column_stack([rest, per_unit]))
    constant, per_unit = rows[:, 0].astype(float), rows[:, 1:].astype(float)
    return CostModel("bytes of activations", _units(coupling), lambda widths: constant + widths @ per_unit.T)


def _exact(
    quantity: str,
    model: nn.Module,
    coupling: Coupling,
    operations: Callable[[Widths], Array],
    measured: Callable[[nn.Module], int],
) -> CostModel:
    """Return a model of a count that agrees with counting the net cut by half, adding a share per unit if need be."""
    units = _units(coupling)
    found = CostModel(quantity, units, operations)
    halves = _halves(coupling)
    at_half = measured(_cut(model, coupling, halves))
    if found.cost(halves) == at_half:
        return found
    dense = measured(model)
    assert found.dense == dense
    slopes = np.zeros((len(units), 1))
    for number, (name, full) in enumerate(units.items()):
        if full > 1:
            fewer = {name: full - 1}
            slopes[number] = found.cost(fewer) - measured(_cut(model, coupling, fewer))
    full_widths = np.array(list(units.values()))
    complete = CostModel(quantity, units, lambda widths: operations(widths) - (full_widths - widths) @ slopes)
    if complete.cost(halves) != at_half:
        raise ValueError(
            f"The {quantity} do not follow the widths: cut by half the model has {at_half}, not"
            f" {complete.cost(halves):.0f}. Choose the budget parameters= instead."
        )
    return complete


def _cut(model: nn.Module, coupling: Coupling, widths: Mapping[str, int]) -> nn.Module:
    """Return a copy in which each group that is named retains its first units."""
    smaller = copy.deepcopy(model)
    cut_channels_(smaller, [(g, np.arange(widths[g.name])) for g in coupling.groups if g.name in widths])
    return smaller


def _halves(coupling: Coupling) -> dict[str, int]:
    return {group.name: math.ceil(group.units / 2) for group in coupling.groups}


def _units(coupling: Coupling) -> dict[str, int]:
    return {group.name: group.units for group in coupling.groups}


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or getattr(module, "groups", 0) == 1


def _same_lifetimes(dense: Lifetimes, narrow: Lifetimes) -> Lifetimes:
    same = dense.operations == narrow.operations
    if not (same and np.array_equal(dense.born, narrow.born) and np.array_equal(dense.last, narrow.last)):
        raise ValueError(
            "The model runs other operations when it is narrower, so its memory cannot be foretold. Choose another"
            " budget than memory."
        )
    return narrow


def _undominated(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the rows that no other row exceeds in every entry, each once."""
    rows = np.unique(rows, axis=0)
    return np.array([row for row in rows if (rows >= row).all(axis=1).sum() == 1])
