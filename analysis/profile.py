"""How sparse every unit, layer and the whole of a model are: ``measure(model)`` gives a ``Profile``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text
from torch import nn

from ellq.analysis.files import write_text
from ellq.analysis.progress import track
from ellq.analysis.weights import weight_matrices
from ellq.theory.arguments import Array, order_below_one
from ellq.theory.power_sums import PowerSums, join, power_sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT, _VERSION = "ellq-profile", 1
_TEXT = ("level", "layer")
_COUNTS = ("size", "nonzeros")
_REALS = (
    "max_abs",
    "l1",
    "l2",
    "quasinorm",
    "sparsity_index",
    "mean_sparsity_index",
    "pq_index",
    "effective_count",
)
_COLUMNS = ("level", "layer", "unit", "q", *_COUNTS, *_REALS)
_BLOCK = 2**21  # entries measured at once, so that temporaries stay small beside the matrix


def measure(source: nn.Module | Mapping[str, Any], /, *, q: float = 0.5) -> Profile:
    """Measure the soft sparsity of every unit, every layer and the whole of a model; no data is needed.

    The measures of a layer are those of all its weights as one vector, and the model's of all layers' as one;
    tied weights count once. Which tensors are weights and what is a unit: ``ellq.analysis.weight_matrices``.

    Args:
        source: an ``nn.Module``, or a state dict such as ``ellq.read_checkpoint(path)`` gives.
        q: order of the quasi-norm, 0 < q < 1.

    Returns:
        The profile.

    Raises:
        TypeError: ``source`` is neither, or ``q`` is not a real number.
        ValueError: ``q`` outside (0, 1); no weight; a weight without data, without entries, not initialised, or
            with NaN or an infinite entry.
        OverflowError: a quasi-norm exceeds float64 because ``q`` is very small.

    Reference: Yang et al. 2022 (arXiv 2206.05604), soft sparsity and the sparsity index; Diao et al. 2023 (arXiv
        2302.05601), the PQ index.
    """
    q = order_below_one(q)
    weights = weight_matrices(source)
    layers: list[LayerShape] = []
    units: list[PowerSums] = []
    for weight in track(weights, "measure"):
        rows = max(1, _BLOCK // weight.units.shape[1])
        blocks = [weight.units[start : start + rows] for start in range(0, len(weight.units), rows)]
        units.append(join([power_sums(block, (q, 1.0, 2.0)) for block in blocks]))
        layers.append(LayerShape(weight.name, weight.shape, weight.note))
    frame = _measured([layer.name for layer in layers], units, q)
    return Profile(frame, q, tuple(layers), dict(weights.skipped), dict(weights.tied))


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
class Profile:
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

    Attributes:
        frame: the measures.
        q: the order of the quasi-norm.
        layer_shapes: name, shape and note of every weight, in model order.
        skipped: name → why it was not measured.
        tied: name → the earlier name under which the same tensor is measured.
    """

    frame: pd.DataFrame
    q: float
    layer_shapes: tuple[LayerShape, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

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

    def summary(self) -> pd.DataFrame:
        """Return one row per layer in model order, and a last one for the whole model, named ``(model)``.

        Columns: ``shape``; ``units`` and ``dead_units``, those with no weight but 0; ``size``; ``sparsity``, the
        share of zeros; ``quasinorm``; ``mean_sparsity_index``; ``pq_index``; ``effective_fraction``, the share
        N/d of weights effectively used; and ``unit_low``, ``unit_median``, ``unit_high``, the quartiles of that
        share over the units.
        """
        units, whole = self.units, pd.concat([self.layers, self._rows("model")], ignore_index=True)
        fraction = units["effective_count"] / units["size"]
        names = [*(layer.name for layer in self.layer_shapes), _MODEL]
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

    def plot(self) -> Figure:
        """Draw how the effective fraction is spread over each layer's units; ``figure.savefig(path)`` writes it."""
        # Drawing is the slowest import of all and not everyone draws.
        from ellq.analysis.profile_plot import draw_profile

        return draw_profile(self.frame, self.q)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the frame as CSV, whole or not at all; a missing value is an empty field.

        Raises:
            OSError: the place cannot be written.
        """
        write_text(path, self.frame.to_csv(index=False, lineterminator="\n"))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the profile as JSON, from which ``from_json`` makes an equal one; a missing value is null.

        Args:
            path: where to write it as well, whole or not at all.

        Raises:
            OSError: the place cannot be written.
        """
        columns = [_plain(self.frame[name]) for name in _COLUMNS]
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "q": self.q,
            "layers": [{"name": s.name, "shape": list(s.shape), "note": s.note} for s in self.layer_shapes],
            "skipped": dict(self.skipped),
            "tied": dict(self.tied),
            "columns": list(_COLUMNS),
            "rows": list(zip(*columns, strict=True)),
        }
        text = json.dumps(content, allow_nan=False, ensure_ascii=False)
        if path is not None:
            write_text(path, text)
        return text

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
            if content["version"] != _VERSION:
                raise ValueError(f"its version is {content['version']!r}, and {_VERSION} is understood")
            values = dict(zip(_COLUMNS, zip(*content["rows"], strict=True), strict=True))
            shapes = tuple(LayerShape(s["name"], tuple(s["shape"]), s["note"]) for s in content["layers"])
            q, skipped, tied = order_below_one(content["q"]), dict(content["skipped"]), dict(content["tied"])
            profile = Profile(_frame(values), q, shapes, skipped, tied)
            if profile.layers["layer"].tolist() != [s.name for s in shapes] or values["level"].count("model") != 1:
                raise ValueError("its rows do not match its layers")
            return profile
        except KeyError as error:
            raise ValueError(f"text is not a profile: it has no {error}. Pass what Profile.to_json returned.") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"text is not a profile: {error}. Pass what Profile.to_json returned.") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        return (
            (self.q, self.layer_shapes, self.skipped, self.tied)
            == (other.q, other.layer_shapes, other.skipped, other.tied)
        ) and self.frame.equals(other.frame)

    def __repr__(self) -> str:
        model, units = self.model, self.units
        dead = int((units["nonzeros"] == 0).sum())
        return (
            f"Profile(q={self.q:g}: {len(self.layer_shapes)} layers, {len(units)} units"
            f"{f' ({dead} dead)' if dead else ''}, {model['size']} weights,"
            f" {model['effective_count'] / model['size']:.1%} effective)"
        )

    def __rich__(self) -> Table:
        remarks = self._remarks()
        table = Table(
            title=Text(repr(self)),
            title_justify="left",
            caption=Text(remarks) if remarks else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        rows = self._shown()
        table.add_column("layer", overflow="fold")
        for heading in rows.columns:
            table.add_column(heading, justify="left" if heading == "shape" else "right", no_wrap=True)
        for place, (name, row) in enumerate(zip(rows.index, rows.itertuples(index=False), strict=True)):
            table.add_row(Text(str(name).removesuffix(".weight")), *row, end_section=place == len(rows) - 2)
        return table

    def __str__(self) -> str:
        return "\n".join(filter(None, (repr(self), self._shown().to_string(), self._remarks())))

    def _repr_html_(self) -> str:
        remarks = self._remarks().replace("&", "&amp;").replace("<", "&lt;")
        return f"<p>{self!r}</p>{self._shown().to_html()}<p>{remarks}</p>"

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
        return pd.DataFrame(columns, index=table.index)

    def _remarks(self) -> str:
        """Return what the table cannot show: tied, skipped and converted tensors."""
        notes = [f"{s.name}: {s.note}" for s in self.layer_shapes if s.note]
        notes += [f"{name} is tied to {first}" for name, first in self.tied.items()]
        notes += [f"{name} skipped: {reason}" for name, reason in self.skipped.items()]
        more = len(notes) - _REMARKS
        return "\n".join(notes[:_REMARKS] + ([f"and {more} more"] if more > 0 else []))


_MODEL = "(model)"
_REMARKS = 8


def _measured(names: Sequence[str], units: Sequence[PowerSums], q: float) -> pd.DataFrame:
    """Return the frame of every unit, every layer, and the model."""
    layers = [sums.pooled() for sums in units]
    model = join(layers).pooled()
    for name, sums in zip((*(f"layer {name!r}" for name in names), "the whole model"), (*layers, model), strict=True):
        # A layer's norms are at least those of its units, so this finds every overflow.
        _refuse_overflow(sums, q, name)
    sums = join([*units, *layers, model])
    counts = [len(part.size) for part in units]
    index = [part.sparsity_index(q) for part in units]
    means = np.array([_mean(values) for values in index])
    total = sum(counts)
    values: dict[str, Any] = {
        "level": np.repeat(["unit", "layer", "model"], [total, len(names), 1]),
        "layer": [*np.repeat(np.array(names, dtype=object), counts), *names, ""],
        "unit": [*np.concatenate([np.arange(n) for n in counts]).tolist(), *[None] * (len(names) + 1)],
        "q": np.full(len(sums.size), q),
        "size": sums.size,
        "nonzeros": sums.nonzeros,
        "max_abs": sums.largest,
        "l1": sums.quasinorm(1.0),
        "l2": sums.quasinorm(2.0),
        "quasinorm": sums.quasinorm(q),
        "sparsity_index": sums.sparsity_index(q),
        "mean_sparsity_index": np.concatenate([np.full(total, np.nan), means, [_mean(means)]]),
        "pq_index": sums.pq_index(q, 1.0),
        "effective_count": sums.effective_count(q, 1.0),
    }
    return _frame(values)


def _frame(values: Mapping[str, Any]) -> pd.DataFrame:
    """Return columns of values as a frame with the types that every profile has."""
    return pd.DataFrame(
        {name: pd.Series(list(values[name]), dtype=str) for name in _TEXT}
        | {"unit": pd.array(list(values["unit"]), dtype="Int64")}
        | {name: np.asarray(values[name], dtype=np.int64) for name in _COUNTS}
        | {name: _one_nan(values[name]) for name in ("q", *_REALS)}
    )[list(_COLUMNS)]


def _one_nan(values: Any) -> Array:
    """Return float64 values in which every NaN has the same bits, as after reading them back from a file."""
    array = np.array(values, dtype=np.float64)
    array[np.isnan(array)] = np.nan
    return array


def _refuse_overflow(sums: PowerSums, q: float, where: str) -> None:
    for order in (q, 1.0, 2.0):
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


def _plain(column: pd.Series[Any]) -> list[Any]:
    """Return a column as Python values, None where it is missing."""
    missing = column.isna().to_numpy()
    return [None if is_missing else value for value, is_missing in zip(column.tolist(), missing, strict=True)]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")
