"""How sparse every unit, layer and the whole of a model are: ``measure(model)`` gives a ``Profile``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pandas as pd
from torch import nn

from ellq.analysis.files import json_text
from ellq.analysis.grids import order_grid, tolerance_grid
from ellq.analysis.progress import track
from ellq.analysis.retained import narrow_histogram, retained_exactly, retained_of_rows, sufficient_counts
from ellq.analysis.tables import MODEL, Framed, ResultTable, plain_rows, remarks_on_weights
from ellq.analysis.weights import Weights, weight_matrices
from ellq.theory.arguments import Array, order_below_one
from ellq.theory.histogram import MagnitudeHistogram
from ellq.theory.power_kernel import power_sums_fast
from ellq.theory.power_sums import PowerSums, join, power_sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT, _VERSION = "ellq-profile", 2
_TEXT = ("level", "layer")
_COUNTS = ("size", "nonzeros")
_NORMS = ("max_abs", "l1", "l2")
_OF_ORDER = ("quasinorm", "sparsity_index", "mean_sparsity_index", "pq_index", "effective_count")
_COLUMNS = ("level", "layer", "unit", "q", *_COUNTS, *_NORMS, *_OF_ORDER)
_GRID = ("level", "layer", "unit", "q", "size", *_OF_ORDER)
_OF_TOLERANCE = ("retained", "sufficient", "order")
_RETAINED = ("level", "layer", "unit", "tol", "retained", "fraction", "sufficient", "order")
_BLOCK = 2**21  # entries measured at once, so that temporaries stay small beside the matrix
_GRID_BLOCK = 2**23  # larger, since these are shared among threads


def measure(
    source: nn.Module | Mapping[str, Any],
    /,
    *,
    q: float = 0.5,
    orders: Iterable[float] = (),
    tolerances: Iterable[float] = (),
) -> Profile:
    """Measure the soft sparsity of every unit, every layer and the whole of a model; no data is needed.

    The measures of a layer are those of all its weights as one vector, and the model's of all layers' as one;
    tied weights count once. Which tensors are weights and what is a unit: ``ellq.analysis.weight_matrices``.

    Args:
        source: an ``nn.Module``, or a state dict such as ``ellq.read_checkpoint(path)`` gives.
        q: order of the quasi-norm, 0 < q < 1.
        orders: further orders to measure at, each 0 < q ≤ 2, for ``Profile.by_order`` and ``Profile.at``.
        tolerances: relative Euclidean errors, each in (0, 1), for which ``Profile.retained`` says how many entries
            every unit, every layer and the model must keep.

    Returns:
        The profile.

    Raises:
        TypeError: ``source`` is neither, or an order or tolerance is not a real number.
        ValueError: ``q`` outside (0, 1); an order or tolerance out of range or given twice; no weight; a weight
            without data, without entries, not initialised, or with NaN or an infinite entry.
        OverflowError: a quasi-norm exceeds float64 because its order is very small.

    Reference: Yang et al. 2022 (arXiv 2206.05604), soft sparsity and the sparsity index; Diao et al. 2023 (arXiv
        2302.05601), the PQ index.
    """
    q = order_below_one(q)
    grid = order_grid(orders)
    tolerances = tolerance_grid(tolerances)
    grid = tuple(sorted({q, *grid})) if grid else ()
    weights = weight_matrices(source)
    layers: list[LayerShape] = []
    units: list[PowerSums] = []
    for weight in track(weights, "measure"):
        units.append(_unit_sums(weight.units, q, grid))
        layers.append(LayerShape(weight.name, weight.shape, weight.note))
    names, counts = [layer.name for layer in layers], [len(sums.size) for sums in units]
    sums = _with_wholes(names, units)
    frame = _frame(_labels(names, counts) | _whatever_the_order(sums) | _at_order(sums, counts, q))
    return Profile(
        frame,
        q,
        tuple(layers),
        dict(weights.skipped),
        dict(weights.tied),
        _grid_frame(frame, [_at_order(sums, counts, order) for order in grid]),
        _retained(weights, frame, sums, tolerances, grid or (q,)),
    )


@dataclass(frozen=True)
class LayerShape:
    """What a profile keeps of a weight beside its measures.

    Attributes:
        name: the weight's name.
        shape: the tensor's shape.
        note: how it was converted before it was measured; empty for plain tensors.
    """

    name: str
    shape: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Profile(Framed):
    """The measures of a model's units, its layers and itself.

    The frame has one row per unit (layer by layer, in model order), then one per layer, then one for the model:

    - ``level``: unit, layer or model; ``layer``: the weight's name, empty for the model; ``unit``: its index along
      the unit axis, missing for layers and the model; ``q``: the order.
    - ``size``, ``nonzeros``: entries d, and those that are not 0; ``max_abs``, ``l1``, ``l2``: the usual norms.
    - ``quasinorm``: ‖w‖_q. ``sparsity_index``: ‖w‖_1/‖w‖_q, larger is sparser.
    - ``mean_sparsity_index``: the paper's average, for a layer over its units, for the model over its layers;
      missing for units. Units that are zero have no index and are left out.
    - ``pq_index``: I_{q,1}, larger is sparser. ``effective_count``: N_{q,1}, smaller is sparser.

    A zero vector has NaN indices and effective count 0.

    Where further orders were measured, ``by_order()`` tabulates them all and ``at(q)`` is the profile of another.
    Where tolerances were given, ``retained`` has a row for each of them and each row of the frame, tolerance by
    tolerance: ``tol``; ``retained``, the exact min{k : σ_k(w)_2 ≤ tol·‖w‖_2}, and ``fraction``, that over the
    vector's size; ``sufficient``, the count that the quasi-norms alone promise to be enough, and ``order``, the one
    that promises least, missing where they promise no less than all non-zeros.

    Attributes:
        frame: the measures.
        q: the order of the quasi-norm.
        layer_shapes: name, shape and note of every weight, in model order.
        skipped: name → why it was not measured.
        tied: name → the earlier name under which the same tensor is measured.
        grid: the measures at every order, ``q`` among them; no rows if no further orders were measured.
        retained: the counts for every tolerance; no rows if none was given.
    """

    frame: pd.DataFrame
    q: float
    layer_shapes: tuple[LayerShape, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    grid: pd.DataFrame = field(default_factory=lambda: _empty(_GRID))
    retained: pd.DataFrame = field(default_factory=lambda: _empty(_RETAINED))

    __hash__ = None  # type: ignore[assignment]

    @property
    def units(self) -> pd.DataFrame:
        """The rows of the units."""
        return self._rows("unit")

    @property
    def layers(self) -> pd.DataFrame:
        """The rows of the layers."""
        return self._rows("layer")

    @property
    def model(self) -> pd.Series[Any]:
        """The row of the whole model."""
        return self._rows("model").iloc[0]

    @property
    def orders(self) -> tuple[float, ...]:
        """All orders measured, rising."""
        return tuple(dict.fromkeys(self.grid["q"].tolist())) or (self.q,)

    def by_order(self) -> pd.DataFrame:
        """Return the measures of every unit, every layer and the model at every order measured, order by order.

        Columns: ``level``, ``layer``, ``unit``, ``q``, ``size``, and as in the frame ``quasinorm``,
        ``sparsity_index``, ``mean_sparsity_index``, ``pq_index`` and ``effective_count``. Above 1 the last two are
        I_{1,q} and N_{1,q}: N is the same function of the two orders whichever comes first. The sparsity indices,
        which need q < 1, are missing there; at 1 itself, where the two orders coincide, all four are.
        """
        return (self.grid if len(self.grid) else self.frame[list(_GRID)]).copy()

    def at(self, q: float) -> Profile:
        """Return the profile at another order that was measured.

        It agrees with ``measure(source, q=q)`` up to the last digits, which sums of the grid round differently.

        Raises:
            TypeError: ``q`` is not a real number.
            ValueError: ``q`` is outside (0, 1) or was not measured.
        """
        q = order_below_one(q)
        if q not in self.orders:
            known = ", ".join(f"{order:g}" for order in self.orders if order < 1)
            raise ValueError(f"q={q:g} was not measured; {known} were. Add it to orders of measure.")
        if q == self.q:
            return self
        mine = self.grid.loc[self.grid["q"] == q, ["q", *_OF_ORDER]].reset_index(drop=True)
        return replace(self, q=q, frame=self.frame.assign(**mine))

    def summary(self) -> pd.DataFrame:
        """Return one row per layer in model order, and a last one for the whole model, named ``(model)``.

        Columns: ``shape``; ``units`` and ``dead_units``, those with no weight but 0; ``size``; ``sparsity``, the
        share of zeros; ``quasinorm``; ``mean_sparsity_index``; ``pq_index``; ``effective_fraction``, the share
        N/d of weights effectively used; and ``unit_low``, ``unit_median``, ``unit_high``, the quartiles of that
        share over the units.
        """
        units, whole = self.units, pd.concat([self.layers, self._rows("model")], ignore_index=True)
        fraction = units["effective_count"] / units["size"]
        names = [*(layer.name for layer in self.layer_shapes), MODEL]
        by_layer = units["layer"]
        table = pd.DataFrame(
            {
                "shape": [*("×".join(map(str, layer.shape)) for layer in self.layer_shapes), ""],
                "units": _per_layer(by_layer.groupby(by_layer, sort=False).size(), names, len(units)),
                "dead_units": _per_layer(
                    (units["nonzeros"] == 0).groupby(by_layer, sort=False).sum(),
                    names,
                    int((units["nonzeros"] == 0).sum()),
                ),
                "size": whole["size"].to_numpy(),
                "sparsity": (1 - whole["nonzeros"] / whole["size"]).to_numpy(),
                "quasinorm": whole["quasinorm"].to_numpy(),
                "mean_sparsity_index": whole["mean_sparsity_index"].to_numpy(),
                "pq_index": whole["pq_index"].to_numpy(),
                "effective_fraction": (whole["effective_count"] / whole["size"]).to_numpy(),
            },
            index=pd.Index(names, name="layer"),
        )
        for column, share in (("unit_low", 0.25), ("unit_median", 0.5), ("unit_high", 0.75)):
            quartile = fraction.groupby(by_layer, sort=False).quantile(share)
            table[column] = _per_layer(quartile, names, float(fraction.quantile(share)))
        return table

    def plot(self, kind: str = "units") -> Figure:
        """Draw the profile; ``figure.savefig(path)`` writes it, and it belongs to no window.

        Args:
            kind: ``units``, how the effective fraction N/d is spread over each layer's units; ``quantiles``, the
                same as a map of layers by quantiles; ``depth``, the fraction along the depth of the model;
                ``orders``, the fraction of layers by orders, for a profile with several.

        Raises:
            ValueError: an unknown kind, or ``orders`` for a profile of one order.
        """
        # Drawing is the slowest import of all and not everyone draws.
        from ellq.analysis.profile_plot import draw_profile

        return draw_profile(self, kind)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the profile as JSON, from which ``from_json`` makes an equal one; a missing value is null.

        Args:
            path: where to write it as well, whole or not at all.

        Raises:
            OSError: the place cannot be written.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "q": self.q,
            "layers": [{"name": s.name, "shape": list(s.shape), "note": s.note} for s in self.layer_shapes],
            "skipped": dict(self.skipped),
            "tied": dict(self.tied),
            "columns": list(_COLUMNS),
            "rows": plain_rows(self.frame),
            # The rows of these two are as many for each order or tolerance as above, in the same sequence.
            "orders": list(self.orders) if len(self.grid) else [],
            "order_columns": list(_OF_ORDER),
            "order_rows": plain_rows(self.grid[list(_OF_ORDER)]),
            "tolerances": list(dict.fromkeys(self.retained["tol"].tolist())),
            "retained_columns": list(_OF_TOLERANCE),
            "retained_rows": plain_rows(self.retained[list(_OF_TOLERANCE)]),
        }
        return json_text(content, path)

    @staticmethod
    def from_json(text: str) -> Profile:
        """Return the profile that ``to_json`` wrote, equal to the last bit.

        Raises:
            ValueError: the text is no such JSON, or of a later version.
        """
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
            if content["format"] != _FORMAT or tuple(content["columns"]) != _COLUMNS:
                raise ValueError(f"its format is {content['format']!r}")
            if content["version"] not in (1, _VERSION):
                raise ValueError(f"its version is {content['version']!r}, and up to {_VERSION} is understood")
            frame = _frame(_columns(content["columns"], content["rows"]))
            shapes = tuple(LayerShape(s["name"], tuple(s["shape"]), s["note"]) for s in content["layers"])
            q, skipped, tied = order_below_one(content["q"]), dict(content["skipped"]), dict(content["tied"])
            profile = Profile(frame, q, shapes, skipped, tied, *_read_grids(frame, content))
            levels = frame["level"].tolist()
            if profile.layers["layer"].tolist() != [s.name for s in shapes] or levels.count("model") != 1:
                raise ValueError("its rows do not match its layers")
            return profile
        except KeyError as error:
            raise ValueError(f"text is not a profile: it has no {error}. Pass what Profile.to_json returned.") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"text is not a profile: {error}. Pass what Profile.to_json returned.") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        values, tables = ("q", "layer_shapes", "skipped", "tied"), ("frame", "grid", "retained")
        return all(getattr(self, name) == getattr(other, name) for name in values) and all(
            getattr(self, name).equals(getattr(other, name)) for name in tables
        )

    def __repr__(self) -> str:
        model, units = self.model, self.units
        dead = int((units["nonzeros"] == 0).sum())
        return (
            f"Profile(q={self.q:g}: {len(self.layer_shapes)} layers, {len(units)} units"
            f"{f' ({dead} dead)' if dead else ''}, {model['size']} weights,"
            f" {model['effective_count'] / model['size']:.1%} effective)"
        )

    def _table(self) -> ResultTable:
        notes = ((layer.name, layer.note) for layer in self.layer_shapes)
        remarks = ["k/d, tol: share of entries to keep for a relative error of tol"] if len(self.retained) else []
        remarks += remarks_on_weights(notes, self.tied, self.skipped)
        return ResultTable(repr(self), self._shown(), remarks)

    def _rows(self, level: str) -> pd.DataFrame:
        return self.frame[self.frame["level"] == level].reset_index(drop=True)

    def _shown(self) -> pd.DataFrame:
        """Return the summary as text, in the columns that fit a terminal; zeros only where there are any."""
        table = self.summary()
        quartiles = zip(table["unit_low"], table["unit_high"], strict=True)
        columns = {"shape": table["shape"], "units": [str(n) for n in table["units"]]}
        if table["dead_units"].any():
            columns["dead"] = [str(n) for n in table["dead_units"]]
        if table["sparsity"].any():
            columns["zeros"] = [f"{value:.1%}" for value in table["sparsity"]]
        columns |= {
            "‖w‖_q": [f"{value:.2e}" for value in table["quasinorm"]],
            "SI": [_number(value) for value in table["mean_sparsity_index"]],
            "PQ": [_number(value) for value in table["pq_index"]],
            "N/d": [f"{value:.1%}" for value in table["effective_fraction"]],
            "of units": [f"{100 * low:.0f}–{high:.0%}" for low, high in quartiles],
        }
        wholes = self.retained[self.retained["level"] != "unit"]
        for tol, rows in wholes.groupby("tol"):
            columns[f"k/d, {tol:g}"] = [f"{share:.1%}" for share in rows["fraction"]]
        return pd.DataFrame(columns, index=table.index)


def _unit_sums(units: Array, q: float, grid: Sequence[float]) -> PowerSums:
    """Return the power sums of every row for q, 1, 2 and the grid."""
    sums = join([power_sums(block, (q, 1.0, 2.0)) for block in _blocks(units, _BLOCK)])
    more = [order for order in grid if order not in sums.sums]
    if not more:
        return sums
    # One logarithm and one exponential serve a whole grid, but round other digits than the above, which stays
    # as it is without a grid.
    fast = join([power_sums_fast(block, more) for block in _blocks(units, _GRID_BLOCK)])
    return replace(sums, sums=sums.sums | fast.sums)


def _blocks(units: Array, entries: int) -> Iterator[Array]:
    rows = max(1, entries // units.shape[1])
    return (units[start : start + rows] for start in range(0, len(units), rows))


def _with_wholes(names: Sequence[str], units: Sequence[PowerSums]) -> PowerSums:
    """Return the sums of every unit, then of every layer, then of the model."""
    layers = [sums.pooled() for sums in units]
    model = join(layers).pooled()
    for name, sums in zip((*(f"layer {name!r}" for name in names), "the whole model"), (*layers, model), strict=True):
        # A layer's norms are at least those of its units, so this finds every overflow.
        _refuse_overflow(sums, name)
    return join([*units, *layers, model])


def _labels(names: Sequence[str], counts: Sequence[int]) -> dict[str, Any]:
    return {
        "level": np.repeat(["unit", "layer", "model"], [sum(counts), len(names), 1]),
        "layer": [*np.repeat(np.array(names, dtype=object), counts), *names, ""],
        "unit": [*np.concatenate([np.arange(n) for n in counts]).tolist(), *[None] * (len(names) + 1)],
    }


def _whatever_the_order(sums: PowerSums) -> dict[str, Any]:
    return {
        "size": sums.size,
        "nonzeros": sums.nonzeros,
        "max_abs": sums.largest,
        "l1": sums.quasinorm(1.0),
        "l2": sums.quasinorm(2.0),
    }


def _at_order(sums: PowerSums, counts: Sequence[int], q: float) -> dict[str, Array]:
    """Return the columns that depend on the order, of ``counts`` units in each layer, the layers and the model."""
    missing = np.full(len(sums.size), np.nan)
    index = sums.sparsity_index(q) if q < 1 else missing
    total = sum(counts)
    means = np.array([_mean(values) for values in np.split(index[:total], np.cumsum(counts)[:-1])])
    low, high = min(q, 1.0), max(q, 1.0)
    return {
        "q": np.full(len(sums.size), q),
        "quasinorm": sums.quasinorm(q),
        "sparsity_index": index,
        "mean_sparsity_index": np.concatenate([np.full(total, np.nan), means, [_mean(means)]]),
        "pq_index": sums.pq_index(low, high) if q != 1 else missing,
        "effective_count": sums.effective_count(low, high) if q != 1 else missing,
    }


def _retained(
    weights: Weights, frame: pd.DataFrame, sums: PowerSums, tolerances: Sequence[float], orders: Sequence[float]
) -> pd.DataFrame:
    """Return the counts of every row of the frame, unit by unit from a sort, of layers and the model by histogram."""
    if not tolerances:
        return _empty(_RETAINED)
    of_units: list[Any] = []
    of_layers: list[list[int]] = []
    whole = MagnitudeHistogram()
    for weight in track(weights, "retained"):
        of_units += [retained_of_rows(rows, tolerances) for rows in _blocks(weight.units, _BLOCK)]
        histogram = narrow_histogram(weight.units, f"Weight {weight.name!r}")
        of_layers.append(retained_exactly(histogram, tolerances, lambda held=weight.units: [held]))  # type: ignore[misc]
        whole = whole.merge(histogram)
    of_model = retained_exactly(whole, tolerances, lambda: (weight.units for weight in weights))
    counts = np.concatenate([*of_units, of_layers, [of_model]])
    sufficient, order = sufficient_counts(sums, tolerances, orders)
    columns = {"retained": counts, "sufficient": sufficient, "order": order}
    return _retained_frame(frame, tolerances, {name: values.T.ravel() for name, values in columns.items()})


def _frame(values: Mapping[str, Any]) -> pd.DataFrame:
    """Return columns of values as a frame with the types that every profile has."""
    return pd.DataFrame(
        {name: pd.Series(list(values[name]), dtype=str) for name in _TEXT}
        | {"unit": pd.array(list(values["unit"]), dtype="Int64")}
        | {name: np.asarray(values[name], dtype=np.int64) for name in _COUNTS}
        | {name: _one_nan(values[name]) for name in ("q", *_NORMS, *_OF_ORDER)}
    )[list(_COLUMNS)]


def _grid_frame(frame: pd.DataFrame, by_order: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the frame's rows once for each order, with the columns that depend on it."""
    if not by_order:
        return _empty(_GRID)
    grid = pd.concat([frame[["level", "layer", "unit", "size"]]] * len(by_order), ignore_index=True)
    for name in ("q", *_OF_ORDER):
        grid[name] = _one_nan(np.concatenate([values[name] for values in by_order]))
    return grid[list(_GRID)]


def _retained_frame(frame: pd.DataFrame, tolerances: Sequence[float], values: Mapping[str, Any]) -> pd.DataFrame:
    """Return the frame's rows once for each tolerance, with the columns that depend on it."""
    table = pd.concat([frame[["level", "layer", "unit"]]] * len(tolerances), ignore_index=True)
    table["tol"] = np.repeat(np.array(tolerances, dtype=np.float64), len(frame))
    for name in ("retained", "sufficient"):
        table[name] = np.asarray(values[name], dtype=np.int64)
    table["fraction"] = table["retained"] / np.tile(frame["size"], len(tolerances))
    table["order"] = _one_nan(values["order"])
    return table[list(_RETAINED)]


def _read_grids(frame: pd.DataFrame, content: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the grid and the retained counts of a profile's JSON; version 1 has neither."""
    if content["version"] == 1:
        return _empty(_GRID), _empty(_RETAINED)
    orders, tolerances = order_grid(content["orders"]), tolerance_grid(content["tolerances"])
    is_whole = [*orders, *tolerances] == [*content["orders"], *content["tolerances"]]
    for key, grid in (("order_rows", orders), ("retained_rows", tolerances)):
        is_whole &= len(content[key]) == len(grid) * len(frame)
    if not is_whole or (orders and content["q"] not in orders):
        raise ValueError("its rows do not match its orders or tolerances")
    of_order = _columns(content["order_columns"], content["order_rows"])
    of_tolerance = _columns(content["retained_columns"], content["retained_rows"])
    by_order = [
        {name: values[i * len(frame) : (i + 1) * len(frame)] for name, values in of_order.items()}
        | {"q": np.full(len(frame), q)}
        for i, q in enumerate(orders)
    ]
    retained = _retained_frame(frame, tolerances, of_tolerance) if tolerances else _empty(_RETAINED)
    return _grid_frame(frame, by_order), retained


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else {}


def _empty(columns: Sequence[str]) -> pd.DataFrame:
    types = dict.fromkeys(_TEXT, "str") | {"unit": "Int64"} | dict.fromkeys(("size", "retained", "sufficient"), "int64")
    return pd.DataFrame({name: pd.Series(dtype=types.get(name, "float64")) for name in columns})


def _one_nan(values: Any) -> Array:
    """Return float64 values in which every NaN has the same bits, as after reading them back from a file."""
    array = np.array(values, dtype=np.float64)
    array[np.isnan(array)] = np.nan
    return array


def _refuse_overflow(sums: PowerSums, where: str) -> None:
    for order in sums.sums:
        try:
            sums.quasinorm(order)
        except OverflowError:
            log = float(sums.log_quasinorm(order)[0])
            raise OverflowError(
                f"‖w‖_q of {where} exceeds float64 for q={order:g} (its natural log is {log:.6g})."
                " Choose a larger q, or scale the weights down."
            ) from None


def _mean(values: Array) -> float:
    """Return the mean of the entries that are not NaN; NaN if there is none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else math.nan


def _per_layer(values: pd.Series[Any], names: Sequence[str], model: float) -> Array:
    """Return a value per layer in the order of ``names``, whose last is the model."""
    return np.append(values.loc[list(names[:-1])].to_numpy(), model)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")
