"""Information flow between layers of a model: ``flows(model, inputs)`` gives a table, a ``FlowMonitor`` a vector."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis.calibration import Calibration, as_batches, as_input, inspecting
from ellq.analysis.digest import digest
from ellq.analysis.layer_pairs import (
    LayerGraph,
    Pair,
    Pairs,
    chosen_pairs,
    does_not_run,
    layer_graph,
    listed_pairs,
)
from ellq.analysis.progress import track
from ellq.analysis.tables import Framed, ResultTable
from ellq.theory import FLOWS, Array, FewSamplesWarning, PairSums, copula_information
from ellq.theory.arguments import count

KINDS = (*FLOWS, "copula")
"""The flows that can be measured, each by its default estimator; the copula's needs all samples at once."""
PLACES = ("output", "activation")


def flows(
    model: nn.Module,
    inputs: Calibration,
    *,
    kinds: Iterable[str] = ("absolute",),
    pairs: Pairs = "graph",
    at: str = "output",
    batch_size: int = 512,
) -> Flows:
    """Measure how much the layers of a model tell of the next ones on given inputs.

    One pass in batches, in eval mode, without gradients; the memory does not depend on the number of inputs, except for
    the copula's information, which holds what every unit gives on every input. Modes are as they were afterwards and no
    hook is left behind, whatever happens.

    Args:
        model: any module, masked or not; only looked at.
        inputs: a tensor, shape (N, …), or an iterable of batches, as ``as_batches``.
        kinds: of "signed", "absolute", "rms", "cka", "gaussian" and "copula", as in ``ellq.theory``.
        pairs: "graph" for every layer with each layer whose output reaches it, through sums and concatenations too;
            "released" for consecutive layers in order of registration; or a list of (from, to) names.
        at: "output" for what Linear and convolutional layers give, before norm and activation, as in the released code;
            "activation" for what the first layer that reads them receives, where there is one. Averaged over space, or
            over the positions of a sequence; flattened maps channel by channel.
        batch_size: inputs at once, where ``inputs`` is one tensor.

    Returns:
        The table.

    Raises:
        TypeError: inputs or pairs of another type, or batch_size is no whole number.
        ValueError: an unknown name; no inputs; batch_size < 1; a layer that gives NaN or infinity, or has no flow of
            this kind on so few inputs; the layer or the pair is named.

    Warns:
        FewSamplesWarning: fewer inputs than units, for kinds that are not valid then.
    """
    kinds = tuple(_checked(kind, "kinds", KINDS) for kind in ((kinds,) if isinstance(kinds, str) else kinds))
    if not kinds:
        raise ValueError(f"kinds is empty. Name at least one of {', '.join(KINDS)}.")
    sums = flow_sums(model, inputs, pairs=pairs, at=at, batch_size=batch_size, hold="copula" in kinds)
    return sums.flows(kinds)


@dataclass(frozen=True, eq=False, repr=False)
class Flows(Framed):
    """Flows between layers, a row for every pair and kind.

    Attributes:
        frame: columns ``from``, ``to``, ``kind``, ``value``; nats for "gaussian" and "copula".
        samples: on how many inputs.
    """

    frame: pd.DataFrame
    samples: int

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of layers, in running order of the second."""
        return tuple(dict.fromkeys(zip(self.frame["from"], self.frame["to"], strict=True)))

    def vector(self, kind: str) -> Array:
        """Return the flows of one kind, in the order of ``pairs``.

        Raises:
            KeyError: a kind that was not measured.
        """
        values = self.frame.loc[self.frame["kind"] == kind, "value"].to_numpy(dtype=np.float64)
        if not len(values):
            raise KeyError(f"No flow {kind!r} was measured. There are: {', '.join(self.frame['kind'].unique())}.")
        return values

    def __repr__(self) -> str:
        return f"Flows({len(self.pairs)} pairs of layers, {self.samples} inputs)"

    def _table(self) -> ResultTable:
        named = self.frame.assign(layer=self.frame["from"] + " → " + self.frame["to"])
        rows = named.set_index(["layer", "kind"])["value"].unstack(sort=False)  # noqa: PD010
        rows.loc["(mean)"] = rows.mean()
        rows = rows.rename_axis(index=None, columns=None)
        return ResultTable(repr(self), rows.map("{:.4f}".format))


class FlowMonitor:
    """Measures one flow of a model on a fixed set of inputs: call it with the model for one value per pair of layers.

    The pairs are those of the first model it is called with, so vectors can be compared.

    Attributes:
        kind: which flow.

    Args:
        inputs: the monitor set, shape (N, …). Averages of correlations over many pairs of units need few: see the
            standard errors in ``docs/flows_overhead.csv``.
        kind: of "signed", "absolute", "rms", "cka", "gaussian" and "copula".
        pairs: as in ``flows``; None for "graph".
        at: as in ``flows``.
        batch_size: inputs at once.

    Warns:
        FewSamplesWarning: at the first call, as ``flows``.

    Raises:
        TypeError: inputs is not a tensor, pairs are no pairs of names, or batch_size is no whole number.
        ValueError: an unknown kind or place, no inputs, or batch_size < 1.
    """

    def __init__(
        self,
        inputs: Tensor,
        kind: str = "absolute",
        pairs: Pairs | None = None,
        *,
        at: str = "output",
        batch_size: int = 512,
    ) -> None:
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be one tensor, got {type(inputs).__name__}. Pass the monitor set as a batch.")
        if inputs.ndim == 0 or len(inputs) < 2:
            raise ValueError(f"inputs has shape {tuple(inputs.shape)}. Pass at least two inputs, batched along axis 0.")
        self.kind = _checked(kind, "kind", KINDS)
        self._inputs, self._at = inputs, _checked(at, "at", PLACES)
        self._batch_size = count(batch_size, "batch_size", low=1, high=2**31)
        self._asked: Pairs = "graph" if pairs is None else pairs if isinstance(pairs, str) else listed_pairs(pairs)
        self._has_warned = False
        self._pairs: tuple[Pair, ...] = () if isinstance(self._asked, str) else tuple(self._asked)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of layers, (from, to); those the graph gives are known from the first call on, and empty before."""
        return self._pairs

    def __call__(self, model: nn.Module) -> Array:
        """Return the flow of every pair, shape (pairs,), finite.

        Args:
            model: any module, masked or not; its mode, gradients and hooks are as they were afterwards.

        Raises:
            ValueError: as ``flows``.
        """
        asked = self._pairs or self._asked
        with warnings.catch_warnings():
            if self._has_warned:  # once, not after every epoch
                warnings.simplefilter("ignore", FewSamplesWarning)
            measured = flows(
                model, self._inputs, kinds=(self.kind,), pairs=asked, at=self._at, batch_size=self._batch_size
            )
        self._pairs, self._has_warned = measured.pairs, True
        return measured.vector(self.kind)

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on, as JSON holds it: settings, and a digest of the inputs."""
        return {
            "kind": self.kind,
            "pairs": self._asked if isinstance(self._asked, str) else [list(pair) for pair in self._asked],
            "at": self._at,
            "batch_size": self._batch_size,
            "inputs": digest(self._inputs),
        }


@dataclass(frozen=True, eq=False)
class FlowSums:
    """What flows are computed of, summed over inputs; those of parts of the inputs merge.

    Attributes:
        sums: (from, to) → the second moments of the two layers.
        precision: layer → the spacing of its numbers next to 1.
        rows: layer → what its units gave on each input, for the copula's information; None if not held.
    """

    sums: dict[Pair, PairSums]
    precision: dict[str, float]
    rows: dict[str, Array] | None

    @property
    def samples(self) -> int:
        """How many inputs so far."""
        return next(iter(self.sums.values())).samples

    def merge(self, other: FlowSums) -> FlowSums:
        """Return the sums over both parts; neither changes.

        Raises:
            ValueError: the two are of other pairs or widths, or only one holds rows.
        """
        if self.sums.keys() != other.sums.keys() or (self.rows is None) != (other.rows is None):
            raise ValueError("Cannot merge sums of other pairs of layers, or with and without rows. Sum up the same.")
        rows = None
        if self.rows is not None and other.rows is not None:
            rows = {name: np.concatenate([own, other.rows[name]]) for name, own in self.rows.items()}
        precision = {name: max(own, other.precision[name]) for name, own in self.precision.items()}
        return FlowSums({pair: own.merge(other.sums[pair]) for pair, own in self.sums.items()}, precision, rows)

    def flows(self, kinds: Sequence[str]) -> Flows:
        """Return the flows of the inputs so far.

        Args:
            kinds: as in ``flows``; the copula's needs rows.

        Raises:
            ValueError: as ``flows``.
        """
        values = [(*pair, kind, self._flow(pair, kind)) for kind in kinds for pair in self.sums]
        return Flows(pd.DataFrame(values, columns=["from", "to", "kind", "value"]), self.samples)

    def _flow(self, pair: Pair, kind: str) -> float:
        try:
            if kind == "copula":
                if self.rows is None:
                    raise ValueError("The copula's information needs rows. Sum up with hold=True.")
                value = copula_information(*(self.rows[name] for name in pair))
            else:
                # A unit that wanders by roundings of the model's own numbers is constant.
                spread = 4 * max(self.precision[name] for name in pair)
                value = FLOWS[kind](self.sums[pair].moments(least_spread=spread))
        except ValueError as error:
            raise ValueError(f"Flow {kind!r} from {pair[0]!r} to {pair[1]!r}: {error}") from None
        if not np.isfinite(value):
            raise ValueError(f"Flow {kind!r} from {pair[0]!r} to {pair[1]!r} is {value}. Choose another kind.")
        return value


def flow_sums(
    model: nn.Module,
    inputs: Calibration,
    *,
    pairs: Pairs = "graph",
    at: str = "output",
    batch_size: int = 512,
    hold: bool = False,
) -> FlowSums:
    """Sum up what flows are computed of, in one pass over the inputs.

    Args:
        model: as in ``flows``.
        inputs: as in ``flows``.
        pairs: as in ``flows``.
        at: as in ``flows``.
        batch_size: as in ``flows``.
        hold: whether to keep what every unit gives on every input, for the copula's information.

    Returns:
        The sums, which merge with those of other inputs.

    Raises:
        TypeError, ValueError: as ``flows``.
    """
    _checked(at, "at", PLACES)
    count(batch_size, "batch_size", low=1, high=2**31)
    batches = as_batches(inputs, batch_size=batch_size)
    graph = layer_graph(model, next(iter(batches)))
    chosen = chosen_pairs(model, pairs, graph)
    names = tuple(dict.fromkeys(name for pair in chosen for name in pair))
    sums: dict[Pair, PairSums] = {}
    precision = dict.fromkeys(names, 0.0)
    rows: dict[str, list[Array]] = {name: [] for name in names}
    with _recording(model, names, graph, at) as seen, inspecting(model):
        for number, batch in enumerate(track(batches, "measuring flows")):
            seen.clear()
            try:
                model(as_input(batch, model))
            except (RuntimeError, TypeError) as error:
                raise does_not_run(batch, error) from error
            for name in names:
                _refuse_unfit(name, seen, number, len(batch))
                precision[name] = max(precision[name], seen[name].precision)
                if hold:
                    rows[name].append(seen[name].units.cpu().numpy())
            for pair in chosen:
                x, y = (seen[name].units for name in pair)
                own = sums.setdefault(pair, PairSums(x.shape[1], y.shape[1]))
                try:
                    own.update(x, y)
                except ValueError as error:
                    raise ValueError(f"Layers {pair[0]!r} and {pair[1]!r}: {error}") from None
    return FlowSums(sums, precision, {name: np.concatenate(rows[name]) for name in names} if hold else None)


@dataclass(frozen=True)
class _Seen:
    """What the units of a layer gave on a batch, shape (b, units), in float64 where the device has it."""

    units: Tensor
    precision: float


@contextmanager
def _recording(model: nn.Module, names: Sequence[str], graph: LayerGraph, at: str) -> Iterator[dict[str, _Seen]]:
    """Keep what the units of layers give, averaged at once: an in-place activation further on changes nothing here."""
    seen: dict[str, _Seen] = {}
    modules = dict(model.named_modules())
    readers = {name: graph.reader(name) if at == "activation" else None for name in names}

    def output(name: str) -> Any:
        def after(module: nn.Module, _: Any, result: Any) -> None:
            seen[name] = _averaged(result, is_last=isinstance(module, nn.Linear), width=0)

        return after

    def activation(name: str) -> Any:
        maker = modules[name]
        width = 0 if isinstance(maker, nn.Linear) else int(maker.out_channels)

        def before(module: nn.Module, inputs: Any, named: Any) -> None:
            received = (inputs or tuple(named.values()))[0]
            seen[name] = _averaged(received, is_last=isinstance(module, nn.Linear), width=width)

        return before

    hooks = []
    try:
        for name, reader in readers.items():
            if reader is None:
                hooks.append(modules[name].register_forward_hook(output(name)))
            else:
                hooks.append(modules[reader].register_forward_pre_hook(activation(name), with_kwargs=True))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _averaged(values: Tensor, *, is_last: bool, width: int) -> _Seen:
    """Return one row of units an example: averaged over all axes but the first and that of the units.

    Args:
        values: what a layer gives or reads.
        is_last: whether units are the last axis, else the second.
        width: filters of the convolution whose maps a Linear reads, perhaps flattened; 0 for no convolution.
    """
    if is_last and width and values.ndim == 2 and values.shape[1] % width == 0:
        values, is_last = values.reshape(len(values), width, -1), False
    exact = torch.float32 if values.device.type == "mps" else torch.float64
    units = values.movedim(-1, 1) if is_last else values
    # A copy in any case: what is averaged over nothing is still the layer's own memory.
    averaged = units.flatten(2).mean(-1, dtype=exact) if units.ndim > 2 else units.to(exact, copy=True)
    return _Seen(averaged, float(torch.finfo(values.dtype).eps))


def _refuse_unfit(name: str, seen: dict[str, _Seen], number: int, examples: int) -> None:
    if name not in seen:
        raise ValueError(f"Layer {name!r} is not run on batch {number} of the inputs. Name pairs= of layers that are.")
    units = seen[name].units
    if len(units) != examples:
        raise ValueError(
            f"Layer {name!r} gives {len(units)} rows for {examples} examples. Name pairs= of layers that give one each."
        )
    if not bool(torch.isfinite(units).all()):
        raise ValueError(
            f"Layer {name!r} gives NaN or infinite values on batch {number} of the inputs. Check its weights and the"
            " inputs."
        )


def _checked(value: str, name: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown. Choose among {', '.join(allowed)}.")
    return value
