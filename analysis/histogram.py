"""Magnitude histograms of a model's layers in one pass over a checkpoint of any size."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import nn

from ellq.analysis.checkpoints import LazyTensors, StoredTensor, read_checkpoint, stored_tensors
from ellq.analysis.curves import ORDERS, POINTS, curve_arguments, curve_table
from ellq.analysis.files import json_text, write_bytes, write_text
from ellq.analysis.grids import order_grid, tolerance_grid
from ellq.analysis.profile import LayerShape
from ellq.analysis.progress import track
from ellq.analysis.retained import narrow_histogram, retained_enclosed
from ellq.analysis.tables import MODEL, ResultTable, Shown, plain_rows, remarks_on_weights
from ellq.analysis.weights import weight_matrices
from ellq.theory.arguments import count
from ellq.theory.histogram import Enclosure, MagnitudeHistogram, Part
from ellq.theory.workers import in_threads

_FORMAT, _VERSION = "ellq-histogram", 1
_STRETCH = 2**24  # bytes that one thread maps and counts at a time, and the progress bar moves by
_MEASURES = ("max_abs", "quasinorm", "sparsity_index", "pq_index", "effective_count")


def histogram_profile(
    source: str | os.PathLike[str] | nn.Module | Mapping[str, Any],
    /,
    *,
    by_layer: bool = True,
    part: tuple[int, int] = (0, 1),
    threads: int = 0,
) -> HistogramProfile:
    """Count the magnitudes of every layer of a model or checkpoint in one pass, whatever its size.

    A safetensors file, or the index of a sharded one, is mapped in stretches of 16 MiB: memory stays constant, apart
    from the histograms themselves, which take about 0.1 MB a layer for bfloat16 and up to 1 MB for float32, or 2 MB
    in all with ``by_layer=False``. Weights that consist of several stored tensors (masked, weight-normalised) are
    read whole. Other sources are read one matrix at a time; a matrix counts in the narrowest format that holds it
    exactly. Which tensors are weights: ``ellq.analysis.weight_matrices``.

    To share the work among processes, give each its ``part``, ``save`` the results, and ``merge`` them: the outcome
    has the same bits as that of one process.

    Args:
        source: a checkpoint's path, an ``nn.Module``, or a state dict.
        by_layer: whether to keep a histogram per layer, or the model's alone.
        part: (i, n) counts the i-th of n equal shares of a safetensors file's entries, 0 ≤ i < n.
        threads: how many count at once; 0 for as many as torch uses.

    Returns:
        The histograms.

    Raises:
        TypeError, FileNotFoundError, IsADirectoryError: as ``read_checkpoint``.
        ValueError: no weight; a NaN or infinite entry, named with its index; a damaged file; or ``part`` out of
            range, or given for a source that cannot be read in stretches.
    """
    number, of = _checked_part(part)
    if isinstance(source, str | os.PathLike):
        checkpoint = read_checkpoint(source)
        if isinstance(checkpoint, LazyTensors):
            return _of_stored(stored_tensors(source), checkpoint, by_layer, (number, of), threads)
        source = checkpoint
    if of > 1:
        raise ValueError(f"part={part} needs a safetensors file, of which shares can be read. Leave part out.")
    weights = weight_matrices(source)
    gathered = _Gathered(by_layer)
    layers = []
    for weight in track(weights, "histogram"):
        layers.append(LayerShape(weight.name, weight.shape, weight.note))
        gathered.add(weight.name, narrow_histogram(weight.units, f"Weight {weight.name!r}"))
    return gathered.profile(layers, weights.skipped, weights.tied)


def error_curves(
    source: str | os.PathLike[str] | nn.Module | Mapping[str, Any],
    /,
    *,
    orders: Iterable[float] = ORDERS,
    points: int = POINTS,
) -> pd.DataFrame:
    """Return what keeping the k largest weights of every layer and of the model loses, with the tightest ℓq bound.

        σ_k(w)_2 ≤ c(k, n) · ‖w‖_q ≤ c_q · k^(1/2 − 1/q) · ‖w‖_q        the least over the orders q

    with the sharp constant c(k, n) for n non-zero entries, ``ellq.theory.approximation.stechkin_constant_finite``.

    Columns: ``level`` (layer or model), ``layer``, ``fraction`` k/d, ``retained`` k, ``error_low`` and
    ``error_high`` between which the relative error σ_k/‖w‖_2 lies, ``bound``, which is never below it, and
    ``order``, the one that gave the bound. One pass over the weights; ``draw_curves`` draws the table.

    Args:
        source: a checkpoint's path, an ``nn.Module``, or a state dict.
        orders: orders q to take the tightest bound of, each 0 < q < 2.
        points: about how many k for each vector, half evenly spread and half close to none and all.

    Raises:
        TypeError, FileNotFoundError, IsADirectoryError: as ``histogram_profile``; or an order is not a real number.
        ValueError: as ``histogram_profile``; or no orders, one out of range or given twice, or ``points`` < 2.

    Reference: Foucart & Rauhut 2013, Theorem 2.5, for each order; ours for finitely many entries.
    """
    orders, points = curve_arguments(orders, points)
    return histogram_profile(source).curves(orders, points)


@dataclass(frozen=True, eq=False, repr=False)
class HistogramProfile(Shown):
    """The magnitude histograms of a model and its layers: every order, count and threshold, without the weights.

    ``profile.model`` and ``profile.histograms[name]`` answer for single orders and counts, such as
    ``profile.model.threshold(k)`` or ``.best_term_error(k)``; ``frame`` tabulates the usual measures.

    Attributes:
        layer_shapes: name, shape and note of every weight, in model order.
        histograms: name → the layer's histogram; empty if only the model's was kept.
        model: the histogram of all weights.
        skipped: name → why it was not counted.
        tied: name → the earlier name under which the same tensor is counted.
    """

    layer_shapes: tuple[LayerShape, ...]
    histograms: Mapping[str, MagnitudeHistogram]
    model: MagnitudeHistogram
    skipped: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    __hash__ = None  # type: ignore[assignment]

    @property
    def size(self) -> int:
        """How many entries the layers have, counted yet or not."""
        return sum(math.prod(layer.shape) for layer in self.layer_shapes)

    @property
    def is_complete(self) -> bool:
        """Whether every entry was counted; False for a part that is not merged with the others yet."""
        return self.model.size == self.size

    def frame(self, orders: Sequence[float] = (0.5,)) -> pd.DataFrame:
        """Return the measures of every layer, then of the model, for each order.

        Columns: ``level`` (layer or model), ``layer``, ``q``, ``size``, ``nonzeros``, and of ``max_abs``,
        ``quasinorm`` ‖w‖_q, ``sparsity_index`` SI_q, ``pq_index`` I_{q,1} and ``effective_count`` N_{q,1} the lower
        and upper end of an enclosure, ending in ``_low`` and ``_high``. Above q = 1 the last two are I_{1,q} and
        N_{1,q} and there is no SI_q; at q = 1 there is none of the three. A zero vector has NaN indices. A quasi-norm
        beyond float64 (very small q) lies between its largest value and infinity.

        Args:
            orders: distinct orders of the quasi-norm, each 0 < q ≤ 2.

        Raises:
            TypeError: ``orders`` is no sequence of numbers.
            ValueError: an order out of range or given twice.
        """
        rows = [
            (level, name, q, histogram.size, histogram.nonzeros, *_measures(histogram, q))
            for q in order_grid(orders)
            for level, name, histogram in self._vectors()
        ]
        columns = ["level", "layer", "q", "size", "nonzeros"]
        columns += [f"{measure}_{end}" for measure in _MEASURES for end in Enclosure._fields]
        return pd.DataFrame(rows, columns=columns)

    def retained(self, tolerances: Iterable[float]) -> pd.DataFrame:
        """Return how many of its entries every layer, then the model, must keep for a relative Euclidean error.

        Columns: ``level``, ``layer``, ``tol``, ``size``, and ``retained_low`` and ``retained_high``, between which
        the fewest lies: min{k : σ_k(w)_2 ≤ tol·‖w‖_2}. Keeping ``retained_high`` is certainly enough.

        Args:
            tolerances: each in (0, 1).

        Raises:
            TypeError: a tolerance is not a real number.
            ValueError: a tolerance out of range or given twice.
        """
        rows = [
            (level, name, tol, histogram.size, *retained_enclosed(histogram, tol))
            for tol in tolerance_grid(tolerances)
            for level, name, histogram in self._vectors()
        ]
        return pd.DataFrame(rows, columns=["level", "layer", "tol", "size", "retained_low", "retained_high"])

    def curves(self, orders: Iterable[float] = ORDERS, points: int = POINTS) -> pd.DataFrame:
        """Return the error of keeping the k largest entries of every layer and the model, with the tightest bound.

        The columns are those of ``error_curves``.

        Args:
            orders: orders q to take the tightest bound of, each 0 < q < 2.
            points: about how many k for each, half evenly spread and half close to none and all.

        Raises:
            TypeError: an order is not a real number, or ``points`` no whole number.
            ValueError: no orders; one out of range or given twice; or ``points`` < 2.
        """
        return curve_table(self.histograms, self.model, orders=orders, points=points)

    def to_csv(self, path: str | os.PathLike[str], orders: Sequence[float] = (0.5,)) -> None:
        """Write ``frame`` as CSV, whole or not at all; a missing value is an empty field.

        Raises:
            OSError: the place cannot be written.
        """
        write_text(path, self.frame(orders).to_csv(index=False, lineterminator="\n"))

    def to_json(self, path: str | os.PathLike[str] | None = None, orders: Sequence[float] = (0.5,)) -> str:
        """Return ``frame`` as JSON, a list of rows; a missing value, and infinity, is null.

        Args:
            path: where to write it as well, whole or not at all.
            orders: as for ``frame``.

        Raises:
            OSError: the place cannot be written.
        """
        frame = self.frame(orders)
        frame = frame.replace([math.inf], math.nan)
        rows = [dict(zip(frame, row, strict=True)) for row in plain_rows(frame)]
        return json_text(rows, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the histograms as a safetensors file, from which ``load`` makes an equal value.

        Raises:
            OSError: the place cannot be written.
        """
        named = {"model": self.model} | {f"layer {name}": h for name, h in self.histograms.items()}
        arrays = {
            f"{key}/{kind}/{column}": getattr(part, column)
            for key, histogram in named.items()
            for kind, part in histogram.parts.items()
            for column in ("bins", "counts", "offsets")
        }
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "layers": [{"name": s.name, "shape": list(s.shape), "note": s.note} for s in self.layer_shapes],
            "zeros": {key: histogram.zeros for key, histogram in named.items()},
            "skipped": dict(self.skipped),
            "tied": dict(self.tied),
        }
        write_bytes(path, save_arrays(arrays, metadata={"content": json.dumps(content, ensure_ascii=False)}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> HistogramProfile:
        """Return the profile that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, or of a later version.
        """
        try:
            return _loaded(Path(path).read_bytes())
        except (ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
            raise ValueError(
                f"{path} is no saved histogram profile ({error}). Name what HistogramProfile.save wrote."
            ) from None

    @staticmethod
    def merge(profiles: Iterable[HistogramProfile]) -> HistogramProfile:
        """Return the profile of all that several processes counted, the same bits in any order of merging.

        Args:
            profiles: parts of one checkpoint, or profiles of different shards.

        Raises:
            ValueError: none; a layer with two shapes; a mixture with and without layers; or more entries counted
                than there are, because a part was given twice.
        """
        every = list(profiles)
        if not every:
            raise ValueError("profiles is empty. Merge at least one.")
        if len({bool(profile.histograms) for profile in every}) > 1:
            raise ValueError("profiles with and without layers cannot be merged. Make all with the same by_layer.")
        shapes: dict[str, LayerShape] = {}
        for layer in (layer for profile in every for layer in profile.layer_shapes):
            if shapes.setdefault(layer.name, layer).shape != layer.shape:
                raise ValueError(
                    f"layer {layer.name!r} has shape {list(layer.shape)} in one profile and"
                    f" {list(shapes[layer.name].shape)} in another. Merge parts of the same model."
                )
        histograms = {
            name: MagnitudeHistogram.total(p.histograms[name] for p in every if name in p.histograms)
            for name in shapes
            if every[0].histograms
        }
        model = MagnitudeHistogram.total(profile.model for profile in every)
        skipped = {name: reason for profile in every for name, reason in profile.skipped.items()}
        tied = {name: first for profile in every for name, first in profile.tied.items()}
        merged = HistogramProfile(tuple(shapes.values()), histograms, model, skipped, tied)
        sizes = {name: math.prod(layer.shape) for name, layer in shapes.items()}
        twice = next((name for name, h in histograms.items() if h.size > sizes[name]), None)
        if twice is not None or model.size > merged.size:
            where = f"layer {twice!r}" if twice else "the model"
            raise ValueError(f"{where} has more entries counted than it has. Merge every part once.")
        return merged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HistogramProfile):
            return NotImplemented
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("layer_shapes", "histograms", "model", "skipped", "tied")
        )

    def __repr__(self) -> str:
        state = "" if self.is_complete else f", {self.model.size / self.size:.1%} counted"
        return f"HistogramProfile({len(self.layer_shapes)} layers, {self.size} weights{state})"

    def _vectors(self) -> list[tuple[str, str, MagnitudeHistogram]]:
        layers = [("layer", name, histogram) for name, histogram in self.histograms.items()]
        return [*layers, ("model", "", self.model)]

    def _table(self) -> ResultTable:
        remarks = []
        if self.model.nonzeros and not self.model.is_exact:
            ends = self.model.quasinorm(0.5)
            remarks.append(f"‖w‖_½ of the model is enclosed to {(ends.high - ends.low) / ends.high:.0e} relatively")
        remarks += remarks_on_weights(((s.name, s.note) for s in self.layer_shapes), self.tied, self.skipped)
        return ResultTable(repr(self), self._shown(), remarks)

    def _shown(self) -> pd.DataFrame:
        """Return the measures at q = ½ as text, the middles of their enclosures."""
        frame = self.frame((0.5,))
        shapes = {layer.name: "×".join(map(str, layer.shape)) for layer in self.layer_shapes}
        middle = {name: (frame[f"{name}_low"] + frame[f"{name}_high"]) / 2 for name in _MEASURES}
        columns: dict[str, list[str]] = {"shape": [shapes.get(name, "") for name in frame["layer"]]}
        columns["weights"] = [str(size) for size in frame["size"]]
        zeros = frame["size"] - frame["nonzeros"]
        if zeros.any():
            columns["zeros"] = [f"{share:.1%}" for share in zeros / frame["size"]]
        columns |= {
            "max |w|": [f"{value:.2e}" for value in middle["max_abs"]],
            "‖w‖_½": [f"{value:.2e}" for value in middle["quasinorm"]],
            "PQ": ["–" if math.isnan(value) else f"{value:.4f}" for value in middle["pq_index"]],
            "N/d": [f"{share:.1%}" for share in middle["effective_count"] / frame["size"]],
        }
        names = [name or MODEL for name in frame["layer"]]
        return pd.DataFrame(columns, index=pd.Index(names, name="layer"))


def _measures(histogram: MagnitudeHistogram, q: float) -> list[float]:
    """Return both ends of every measure of a table's row."""
    missing = Enclosure(math.nan, math.nan)
    low, high = min(q, 1.0), max(q, 1.0)
    try:
        norm = histogram.quasinorm(q)
    except OverflowError:
        norm = Enclosure(sys.float_info.max, math.inf)
    enclosures = (
        histogram.largest,
        norm,
        histogram.sparsity_index(q) if q < 1 else missing,
        histogram.pq_index(low, high) if q != 1 else missing,
        histogram.effective_count(low, high) if q != 1 else missing,
    )
    return [end for enclosure in enclosures for end in enclosure]


class _Gathered:
    """Histograms as they arrive, added up per layer or for the model alone."""

    def __init__(self, by_layer: bool) -> None:
        self.by_layer = by_layer
        self.layers: dict[str, MagnitudeHistogram] = {}
        self.whole = MagnitudeHistogram()

    def add(self, name: str, histogram: MagnitudeHistogram) -> None:
        if self.by_layer:
            self.layers[name] = self.layers[name].merge(histogram) if name in self.layers else histogram
        else:
            self.whole = self.whole.merge(histogram)

    def profile(
        self, layers: Sequence[LayerShape], skipped: Mapping[str, str], tied: Mapping[str, str]
    ) -> HistogramProfile:
        histograms = {s.name: self.layers.get(s.name, MagnitudeHistogram()) for s in layers if self.by_layer}
        whole = MagnitudeHistogram.total(histograms.values()) if self.by_layer else self.whole
        return HistogramProfile(tuple(layers), histograms, whole, dict(skipped), dict(tied))


def _of_stored(
    stored: Mapping[str, StoredTensor], checkpoint: LazyTensors, by_layer: bool, part: tuple[int, int], threads: int
) -> HistogramProfile:
    # Stand-ins of the right shape and type that take no memory tell which tensors are weights.
    stand_ins = {
        name: torch.empty((), dtype=place.dtype).expand(place.shape)
        for name, place in stored.items()
        if place.dtype is not None
    }
    foreign = {
        name: f"stored as {place.stored_as}, which cannot be measured"
        for name, place in stored.items()
        if place.dtype is None and len(place.shape) > 1
    }
    weights = weight_matrices(stand_ins)
    gathered = _Gathered(by_layer)
    layers = []
    for name in weights.names:
        if name in stored:
            layers.append(LayerShape(name, stored[name].shape))
            continue
        # Made of several tensors, as by torch.nn.utils.prune or weight_norm.
        sources = {key: checkpoint[key] for key in stored if key.rpartition("_")[0] == name}
        matrix = next(iter(weight_matrices(sources)))
        layers.append(LayerShape(name, matrix.shape, matrix.note))
        if part[0] == 0:
            gathered.add(name, narrow_histogram(matrix.units, f"Weight {name!r}"))
    stretches = list(_stretches({name: stored[name] for name in weights.names if name in stored}, part))
    total = sum(_bytes(stored[name], start, stop) for name, start, stop in stretches)

    def counted(stretch: tuple[str, int, int]) -> MagnitudeHistogram:
        name, start, stop = stretch
        place = stored[name]
        entries = place.read(start, stop)
        return MagnitudeHistogram.of_chunks([entries], f"Weight {name!r}", shape=place.shape, start=start)

    def gather() -> Iterator[int]:
        done = shown = 0
        for stretch, histogram in zip(stretches, in_threads(counted, stretches, threads=threads), strict=True):
            gathered.add(stretch[0], histogram)
            done += _bytes(stored[stretch[0]], *stretch[1:])
            while shown < done // _STRETCH:
                shown += 1
                yield shown * _STRETCH

    describe: Callable[[int], str] = lambda done: f"histogram, {done / 1e9:.1f} of {total / 1e9:.1f} GB"  # noqa: E731
    for _ in track(gather(), "histogram", total=total // _STRETCH, describe=describe):
        pass
    return gathered.profile(layers, {**weights.skipped, **foreign}, weights.tied)


def _stretches(stored: Mapping[str, StoredTensor], part: tuple[int, int]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, start, stop) of what the i-th of n processes counts, a stretch at a time."""
    number, of = part
    total = sum(place.size for place in stored.values())
    first, last = total * number // of, total * (number + 1) // of
    before = 0
    for name, place in stored.items():
        begin, end = max(first - before, 0), min(last - before, place.size)
        step = max(_STRETCH // max(_bytes(place, 0, 1), 1), 1)
        for start in range(begin, end, step):
            yield name, start, min(start + step, end)
        before += place.size


def _bytes(place: StoredTensor, start: int, stop: int) -> int:
    return (stop - start) * (place.dtype.itemsize if place.dtype else 0)


def _checked_part(part: object) -> tuple[int, int]:
    if not isinstance(part, tuple) or len(part) != 2:
        raise TypeError(f"part must be a pair (i, n) of whole numbers, got {part!r}.")
    of = count(part[1], "n of part", low=1, high=2**31)
    return count(part[0], "i of part", low=0, high=of - 1), of


def _loaded(content: bytes) -> HistogramProfile:
    arrays = load_arrays(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    told = json.loads(header["__metadata__"]["content"])
    if told["format"] != _FORMAT:
        raise ValueError(f"its format is {told['format']!r}")
    if told["version"] != _VERSION:
        raise ValueError(f"its version is {told['version']!r}, and {_VERSION} is understood")
    parts: dict[str, dict[str, Part]] = {key: {} for key in told["zeros"]}
    for path in sorted(arrays):
        key, kind, column = path.rsplit("/", 2)
        if column == "bins":
            columns = [arrays[f"{key}/{kind}/{name}"].astype(np.int64) for name in ("bins", "counts", "offsets")]
            parts[key][kind] = Part(*columns)
    histograms = {key: MagnitudeHistogram(int(told["zeros"][key]), parts[key]) for key in parts}
    layers = tuple(LayerShape(s["name"], tuple(s["shape"]), s["note"]) for s in told["layers"])
    by_name = {s.name: histograms[f"layer {s.name}"] for s in layers if f"layer {s.name}" in histograms}
    return HistogramProfile(layers, by_name, histograms["model"], told["skipped"], told["tied"])
