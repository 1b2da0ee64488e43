"""Which units a group keeps and what their readers become: layer by layer, each against the dense network's outputs."""

from __future__ import annotations

import copy
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ellq.analysis import track
from ellq.pruning.channel_checkpoint import ChannelCheckpoint, listed, unlisted
from ellq.pruning.coupling import ChannelGroup
from ellq.pruning.joint_refit import refit_together_
from ellq.pruning.layer_problem import RIDGE, Problem, problems_of
from ellq.pruning.patches import PatchLayer, as_rows
from ellq.pruning.refit import layers_of, weight_name
from ellq.pruning.walk import Arrival, walk
from ellq.theory import Array, BlockFit, BlockPath, eliminate_blocks, fit_columns
from ellq.theory.arguments import Indices


@dataclass(frozen=True)
class Reading:
    """That a layer reads a group's units.

    Attributes:
        group: which.
        columns: of a row of the layer's flattened weight, which belong to each unit; shape (units, b).
        is_only: whether nothing else reads the group.
    """

    group: ChannelGroup
    columns: Indices
    is_only: bool


def readings_of(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, list[Reading]]:
    """Return for each layer that reads units of some groups how it does."""
    found: dict[str, list[Reading]] = {}
    for group in groups:
        for member in group.consumers:
            weight = cast(Tensor, model.get_submodule(member.module).weight)
            taps = weight[0, 0].numel()
            columns = (member.entries[:, :, None] * taps + np.arange(taps)).reshape(group.units, -1)
            found.setdefault(member.module, []).append(Reading(group, columns, len(group.consumers) == 1))
    return found


@dataclass(frozen=True)
class LayerFit:
    """What a layer meets and is to give, and how much each of its outputs counts.

    Attributes:
        arrival: where it comes from.
        problems: one for each group of the convolution.
        importance: by which each output's error is multiplied, shape (c,): what a batch norm after it does.
        shifts: whether a shift of every output is fitted too.
    """

    arrival: Arrival
    problems: list[Problem]
    importance: Array
    shifts: bool

    def normal_equations(self) -> tuple[Array, Array]:
        """Return H, shape (d, d), and R, shape (d, c), with a ridge towards the dense weights; without groups."""
        (problem,) = self.problems
        H, R = problem.ridged(RIDGE)
        return H, R.T

    @property
    def energy(self) -> float:
        """What the outputs have, weighted by importance."""
        return float(sum(p.energy @ np.square(w) for p, w in zip(self.problems, self._importances, strict=True)))

    @property
    def _importances(self) -> list[Array]:
        return np.split(self.importance, len(self.problems))


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group's units, with all that is known there.

    Attributes:
        fit: of the layer.
        reading: which of its columns are the group's.
        others: its other columns that are there, rising.
    """

    fit: LayerFit
    reading: Reading
    others: Indices

    def columns(self, units: Indices) -> Indices:
        """Return the columns that are there when the group keeps some units, rising."""
        return np.sort(np.concatenate([self.reading.columns[units].ravel(), self.others]))

    def block_fit(self, alive: Indices) -> BlockFit:
        """Return the fit that units are taken from, targets weighted by importance."""
        H, R = self.fit.normal_equations()
        own = self.reading.columns[alive]
        columns = np.concatenate([own.ravel(), self.others])
        weights = fit_columns(H, R, columns) * self.fit.importance
        return BlockFit(H[np.ix_(columns, columns)], weights, np.arange(own.size).reshape(own.shape))

    def rows(self, units: Indices) -> Array:
        """Return the layer's refitted rows when the group keeps some units, shape (c, d); 0 where a column is not."""
        H, R = self.fit.normal_equations()
        columns = self.columns(units)
        full = np.zeros(R.shape)
        full[columns] = fit_columns(H, R, columns)
        return full.T


def layer_fit(dense: nn.Module, arrival: Arrival, *, seed: int) -> LayerFit:
    """Gather what a layer meets on the calibration inputs; which positions are looked at depends on seed and name."""
    draw = torch.Generator().manual_seed(zlib.crc32(arrival.name.encode(), seed))
    layer = cast(PatchLayer, dense.get_submodule(arrival.name))
    shifts = layer.bias is not None or arrival.norm is not None
    problems = list(problems_of(layer, arrival, None, centred=shifts, draw=draw))
    importance = np.ones(len(layer.weight))
    if arrival.norm is not None:
        norm = cast(nn.BatchNorm2d, dense.get_submodule(arrival.norm))
        scale = (cast(Tensor, norm.running_var) + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach()
        importance = scale.abs().double().cpu().numpy()
    return LayerFit(arrival, problems, importance, shifts)


def readers_of(fit: LayerFit, readings: Sequence[Reading], kept: Mapping[str, Indices]) -> list[Reader]:
    """Return a layer's readings with the columns that the other groups it reads leave there."""
    found = []
    for own in readings:
        others = np.ones(fit.problems[0].H.shape[0], dtype=bool)
        others[own.columns.ravel()] = False
        for reading in readings:
            if reading is not own and reading.group.name in kept:
                gone = np.setdiff1d(np.arange(reading.group.units), kept[reading.group.name])
                others[reading.columns[gone].ravel()] = False
        found.append(Reader(fit, own, np.flatnonzero(others)))
    return found


def order_of_removal(readers: Sequence[Reader], alive: Indices, *, least: int = 1) -> BlockPath:
    """Return in which order a group's units go so that all its readers together lose least of their outputs.

    The path is of positions in ``alive``, down to ``least`` units; its errors are relative to the energy of the
    readers' outputs.
    """
    blocks = []
    for reader in readers:
        block, energy = reader.block_fit(alive), reader.fit.energy
        weights = np.asarray(block.weights) / (np.sqrt(energy) if energy > 0 else 1.0)
        blocks.append(BlockFit(block.gram, weights, block.columns))
    return eliminate_blocks(blocks, least=least)


def install_(dense: nn.Module, changing: nn.Module, fit: LayerFit, weights: Sequence[Array]) -> None:
    """Write a layer's new rows, and the shift that goes with them, into the changing network."""
    name = fit.arrival.name
    layer = cast(PatchLayer, changing.get_submodule(name))
    with torch.no_grad():
        rows = torch.from_numpy(np.concatenate(list(weights)))
        layer.weight.copy_(rows.reshape(layer.weight.shape))
        if not fit.shifts:
            return
        stored = as_rows(layer, layer.weight.detach().cpu().double()).numpy()
        pairs = zip(fit.problems, stored, strict=True)
        shift = torch.from_numpy(np.concatenate([p.y_mean - w @ p.x_mean for p, w in pairs]))
        if layer.bias is not None:
            layer.bias.copy_(shift)
            return
        assert fit.arrival.norm is not None
        before = cast(Tensor, dense.get_submodule(fit.arrival.norm).running_mean)
        after = cast(Tensor, changing.get_submodule(fit.arrival.norm).running_mean)
        after.copy_(before.double().cpu() - shift)


def refit_in_order(
    dense: nn.Module,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    kept: Mapping[str, Indices],
    batches: Sequence[Tensor],
    *,
    chooses: bool = True,
    together: bool = True,
    seed: int = 0,
    checkpoint: ChannelCheckpoint | None = None,
    stage: str = "refit",
) -> tuple[nn.Module, dict[str, Indices]]:
    """Cut groups to widths and refit every layer, in the order they run.

    Each layer meets what those before it became, and is fitted to what the dense network gives there; where a sum with
    a skip path follows, also to what that path has lost.

    Args:
        dense: what is aimed at.
        groups: whose units go.
        widths: how many each keeps, by name.
        kept: which units they keep, by name, as far as that is decided.
        batches: calibration inputs.
        chooses: whether the units of groups that one layer reads are chosen anew there and then.
        together: whether a layer and the one that alone makes what it reads are refitted together too.
        seed: of the positions that are looked at.
        checkpoint: keeps every layer that is done, and has those that were.
        stage: under which name.

    Returns:
        A copy of the dense network, of full size: what reads units that went does so with weights of 0. And which
        units every group keeps, by name, rising.
    """
    changing = copy.deepcopy(dense)
    readings = readings_of(dense, groups)
    chosen = {group.name: np.arange(group.units) for group in groups} | dict(kept)
    layers = layers_of(dense, {weight_name(name): torch.empty(0) for name, _ in dense.named_modules()})
    waiting = [name for name in layers if not _restore_(changing, name, chosen, checkpoint, stage)]
    scarce: tuple[float, str, int, int] | None = None
    arrivals = walk(dense, changing, batches, waiting, makers=together)
    for arrival in track(arrivals, "refitting", total=len(waiting)):
        fit = layer_fit(dense, arrival, seed=seed)
        own = readings.get(arrival.name, []) if len(fit.problems) == 1 else []
        for number, reading in enumerate(own):
            name, units = reading.group.name, reading.group.units
            if chooses and reading.is_only and widths[name] < units:
                reader = readers_of(fit, own, chosen)[number]
                chosen[name] = order_of_removal([reader], np.arange(units), least=widths[name]).retained(widths[name])
        install_(dense, changing, fit, _rows(fit, own, chosen))
        maker = arrival.maker if arrival.maker is not None and arrival.maker.name in layers else None
        if maker is not None and refit_together_(changing, arrival, torch.from_numpy(fit.importance)):
            again = layer_fit(dense, arrival, seed=seed)
            install_(dense, changing, again, _rows(again, own, chosen))
        if checkpoint is not None:
            parts = (arrival.name, arrival.norm, *((maker.name, maker.norm) if maker is not None else ()))
            tensors = {f"{part}.{key}": tensor for part, key, tensor in _touched(changing, parts)}
            done = {reading.group.name: chosen[reading.group.name] for reading in own}
            checkpoint.write(stage, arrival.name, tensors, listed(done))
        samples, size = fit.problems[0].samples, len(fit.problems[0].H)
        if samples < size:
            scarce = max(scarce or (0.0, "", 0, 0), (size / samples, arrival.name, samples, size))
    if scarce is not None:
        warnings.warn(
            f"Layer {scarce[1]!r} is fitted to {scarce[2]} samples for {scarce[3]} inputs. Pass about"
            f" {math.ceil(scarce[0])} times as many calibration inputs.",
            stacklevel=2,
        )
    return changing, chosen


def _rows(fit: LayerFit, readings: Sequence[Reading], chosen: Mapping[str, Indices]) -> list[Array]:
    """Return a layer's refitted rows, of each group of a convolution, when groups keep the units chosen."""
    if not readings:
        return [fit_rows_of(problem) for problem in fit.problems]
    reader = readers_of(fit, readings, chosen)[0]
    return [reader.rows(chosen[reader.reading.group.name])]


def _touched(changing: nn.Module, parts: Iterable[str | None]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what a refit changes: name of the module, of the tensor, and the tensor."""
    for part in parts:
        if part is not None:
            for key, tensor in changing.get_submodule(part).state_dict().items():
                yield part, key, tensor


def _restore_(
    changing: nn.Module, name: str, chosen: dict[str, Indices], checkpoint: ChannelCheckpoint | None, stage: str
) -> bool:
    """Put back what was done to a layer before; return whether anything was."""
    found = None if checkpoint is None else checkpoint.read(stage, name)
    if found is None:
        return False
    tensors, kept = found
    state = changing.state_dict()
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key.removeprefix(".")].copy_(tensor)
    chosen |= unlisted(kept)
    return True


def fit_rows_of(problem: Problem) -> Array:
    """Return the rows of one group of a convolution, refitted with all their columns."""
    H, R = problem.ridged(RIDGE)
    return fit_columns(H, R.T, np.arange(len(H))).T
