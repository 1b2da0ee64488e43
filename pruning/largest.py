"""The largest of all weights together, layer by layer and block by block: exact, in memory that does not grow.

A layer is an array or tensor with units along its first axis. Its weights are never copied whole, whatever the model's
size: blocks of it are read once to look at it, and a few times to find the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ellq.theory import Array, refuse_nonfinite

Counts = npt.NDArray[np.int64]
Layer = Tensor | npt.NDArray[np.floating]

_BLOCK = 2**20  # entries looked at at once
_POOL = 2**19  # entries that may be compared one by one
_SAMPLE = 2**18  # entries that say roughly where the cut is


def magnitudes(layer: Layer) -> Iterator[tuple[slice, npt.NDArray[np.floating]]]:
    """Yield which units a block holds, and their magnitudes.

    Args:
        layer: units along the first axis, of any float type, on any device.

    Yields:
        The units' places, and an array of shape (units, entries) that is the caller's own: float64 of a float64
        layer, else float32, which holds every smaller type exactly.
    """
    units, size = len(layer), math.prod(layer.shape[1:])
    step = max(1, _BLOCK // size)
    for start in range(0, units, step):
        part = layer[start : start + step].reshape(-1, size)
        if isinstance(part, Tensor):
            part = part.detach().to("cpu", torch.float64 if part.dtype == torch.float64 else torch.float32)
            part = part.resolve_neg().numpy()
        yield slice(start, start + len(part)), np.abs(part)


@dataclass(frozen=True)
class Survey:
    """What one reading of a layer tells.

    Attributes:
        size: weights of each unit.
        nonzeros: how many of each unit's weights are not 0, shape (units,).
        exponent: the e of ‖W‖_F = 2^e·norm; 0 for layers whose squares fit into float64 as they are.
        norm: ‖W/2^e‖_F.
    """

    size: int
    nonzeros: Counts
    exponent: int
    norm: float


def survey(layer: Layer, name: str) -> Survey:
    """Read a layer once (a float64 one twice).

    Args:
        layer: units along the first axis.
        name: what errors call it.

    Raises:
        ValueError: a weight that is NaN or infinite.
    """
    exponent = 0
    if layer.dtype in (torch.float64, np.dtype(np.float64)):
        largest = max(float(block.max()) for _, block in magnitudes(layer))
        exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    nonzeros = np.empty(len(layer), dtype=np.int64)
    energy = 0.0
    for rows, block in magnitudes(layer):
        nonzeros[rows] = np.count_nonzero(block, axis=1)
        wide = np.ldexp(block.astype(np.float64), -exponent).ravel() if exponent else block.astype(np.float64).ravel()
        with np.errstate(over="ignore", invalid="ignore"):
            energy += float(wide @ wide)
    if not math.isfinite(energy):
        wide = layer.detach().double().cpu().numpy() if isinstance(layer, Tensor) else layer.astype(np.float64)
        refuse_nonfinite(wide, f"Weight {name!r}")
    return Survey(math.prod(layer.shape[1:]), nonzeros, exponent, math.sqrt(energy))


def count_largest(layers: Sequence[Layer], retained: int, *, minima: Sequence[Counts] | None) -> list[Counts]:
    """Count how many of the largest weights of all layers together each unit has.

    Of equal ones those of the earlier layer, unit and entry. A unit that would have fewer than its minimum gets that
    many, at the cost of the smallest of the others'. Exact: no weight that goes is larger than one that stays.

    Args:
        layers: finite, units along the first axis.
        retained: from the sum of the minima to the number of weights.
        minima: for each layer what each unit has at least, at most its size; None for nothing.

    Returns:
        One array of counts per layer, summing to ``retained``.
    """
    cut = _Cut(
        list(layers),
        np.concatenate(minima) if minima is not None else np.zeros(sum(map(len, layers)), dtype=np.int64),
    )
    return cut.split(cut.counts(retained))


@dataclass(frozen=True)
class _Cut:
    """The search for the magnitude at which the largest weights end; units of all layers are numbered through."""

    layers: list[Layer]
    minima: Counts

    def split(self, counts: Counts) -> list[Counts]:
        return np.split(counts, np.cumsum([len(layer) for layer in self.layers])[:-1])

    def counts(self, retained: int) -> Counts:
        total = sum(math.prod(layer.shape) for layer in self.layers)
        assert self.minima.sum() <= retained <= total, (self.minima.sum(), retained, total)
        # Weights of magnitude >= high stay, those below low go; between lie those to compare.
        low, high = 0.0, math.inf
        at_low, at_high = self._sizes(), np.zeros_like(self.minima)
        if total > _POOL:
            probes, guesses = self._probes(total, retained)
            i, j = -1, len(probes)  # probes[i] is too high a cut, probes[j] too low
            while j - i > 1 and (guesses or self._between(at_low, at_high) > _POOL):
                k = guesses.pop(0) if guesses else (i + j) // 2
                if not i < k < j:
                    continue
                at_probe = self._at_least(float(probes[k]))
                if self._held(at_probe) <= retained:
                    i, high, at_high = k, float(probes[k]), at_probe
                else:
                    j, low, at_low = k, float(probes[k]), at_probe
        if math.nextafter(low, math.inf) >= high:
            return self._share_ties(at_low, at_high, retained)
        return self._compare(low, high, at_high, retained)

    def _held(self, counts: Counts) -> int:
        return int(np.maximum(counts, self.minima).sum())

    @staticmethod
    def _between(at_low: Counts, at_high: Counts) -> int:
        return int(at_low.sum() - at_high.sum())

    def _sizes(self) -> Counts:
        return np.concatenate([np.full(len(layer), math.prod(layer.shape[1:])) for layer in self.layers])

    def _probes(self, total: int, retained: int) -> tuple[Array, list[int]]:
        """Return magnitudes to try as cuts, falling, and the places of two that the cut should lie between.

        They are those of some weights, and the next above each, which tells ties apart.
        """
        step = math.ceil(total / _SAMPLE)
        parts, offset = [], 0
        for layer in self.layers:
            for _, block in magnitudes(layer):
                parts.append(block.ravel()[-offset % step :: step].astype(np.float64))
                offset += block.size
        sizes = np.sort(np.concatenate(parts))[::-1]
        share = retained / total
        near, spread = share * sizes.size, 4 * math.sqrt(sizes.size * share * (1 - share)) + 4
        ends = sizes[np.clip([int(near - spread), int(near + spread)], 0, sizes.size - 1)]
        some = sizes[sizes > 0]
        probes = np.unique(np.concatenate([some, np.nextafter(some, np.inf)]))[::-1]
        return probes, np.searchsorted(-probes, -ends).tolist()

    def _at_least(self, size: float) -> Counts:
        """Count for each unit the weights of at least this magnitude."""
        counts = []
        for layer in self.layers:
            least = _least_number(size, _format(layer))
            counts += [np.count_nonzero(block >= least, axis=1) for _, block in magnitudes(layer)]
        return np.concatenate(counts)

    def _share_ties(self, at_low: Counts, at_high: Counts, retained: int) -> Counts:
        """Share what is left among weights that all are of one size: the first units take theirs."""
        counts = np.maximum(at_high, self.minima)
        room = np.maximum(at_low, self.minima) - counts
        before = np.cumsum(room) - room
        return np.asarray(counts + np.clip(retained - int(counts.sum()) - before, 0, room))

    def _compare(self, low: float, high: float, at_high: Counts, retained: int) -> Counts:
        """Compare the weights of magnitudes in [low, high) one by one."""
        units, sizes, first = [], [], 0
        for layer in self.layers:
            least, over = (_least_number(size, _format(layer)) for size in (low, high))
            for rows, block in magnitudes(layer):
                row, column = np.nonzero((block >= least) & (block < over))
                units.append(first + rows.start + row)
                sizes.append(block[row, column].astype(np.float64))
            first += len(layer)
        unit, size = np.concatenate(units), np.concatenate(sizes)
        counts = np.maximum(at_high, self.minima)
        missing = self.minima - at_high  # how many more a unit has anyway
        has_some = np.flatnonzero(missing[unit] > 0)
        if has_some.size:
            order = has_some[np.lexsort((-size[has_some], unit[has_some]))]
            starts = np.flatnonzero(np.diff(unit[order], prepend=-1))
            rank = np.arange(order.size) - np.repeat(starts, np.diff(starts, append=order.size))
            is_free = np.zeros(unit.size, dtype=bool)
            is_free[order] = rank < missing[unit[order]]
            unit, size = unit[~is_free], size[~is_free]
        is_kept = first_largest(size, retained - int(counts.sum()))
        return np.asarray(counts + np.bincount(unit[is_kept], minlength=counts.size))


def first_largest(values: npt.NDArray[np.floating], retained: int) -> npt.NDArray[np.bool_]:
    """Return which values are among the ``retained`` largest; of equal ones the first."""
    if retained == 0:
        return np.zeros(values.size, dtype=bool)
    least = np.partition(values, values.size - retained)[values.size - retained]
    kept: npt.NDArray[np.bool_] = values > least
    ties = np.flatnonzero(values == least)
    kept[ties[: retained - np.count_nonzero(kept)]] = True
    return kept


def keep_largest(layer: Layer, retained: Counts) -> Tensor:
    """Return which entries are among the ``retained`` largest of their unit; of equal ones the first stay.

    Args:
        layer: finite, units along the first axis.
        retained: how many of each unit stay, shape (units,).

    Returns:
        Boolean tensor of shape (units, entries) with exactly ``retained[i]`` True in row i.
    """
    size = math.prod(layer.shape[1:])
    kept = np.empty((len(layer), size), dtype=bool)
    for rows, block in magnitudes(layer):
        k = np.asarray(retained[rows])[:, None]
        least = np.take_along_axis(np.sort(block, axis=1), np.minimum(size - k, size - 1), axis=1)
        np.greater_equal(block, np.where(k > 0, least, np.inf), out=kept[rows])
        tied = rows.start + np.flatnonzero(np.count_nonzero(kept[rows], axis=1) > k[:, 0])
        if tied.size:
            inside = tied - rows.start
            is_larger, is_least = block[inside] > least[inside], block[inside] == least[inside]
            missing = k[inside] - np.count_nonzero(is_larger, axis=1)[:, None]
            kept[tied] = is_larger | (is_least & (np.cumsum(is_least, axis=1) <= missing))
    return torch.from_numpy(kept)


def _format(layer: Layer) -> type[np.floating]:
    return np.float64 if layer.dtype in (torch.float64, np.dtype(np.float64)) else np.float32


def _least_number(value: float, kind: type[np.floating]) -> np.floating:
    """Return the least number of a format that is not below a value; infinite if none is."""
    with np.errstate(over="ignore"):
        nearest = kind(value)
    return nearest if float(nearest) >= value else np.nextafter(nearest, kind(np.inf))
