"""The plan of a pruning: what every unit keeps and why, as a table that can be printed, edited, saved and applied."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.markup import escape
from rich.table import Table

from ellq.pruning.coupling import ChannelGroup, Member
from ellq.pruning.guarantee import Guarantee
from ellq.pruning.json_format import MODEL, PLAN, VERSIONS, read_json
from ellq.theory import Skeleton

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORED = 2**18  # entries of an interpolation matrix, 2 MiB; a larger one is left out of the JSON
_STORED_AS = {"float32": "<f4", "float64": "<f8"}
_ARRAYS = ("interpolation", "offset", "feature_errors")  # of a skeleton
_TOLD = 4  # layers that stay dense, named below the table
COLUMNS = ("layer", "unit", "size", "retained", "reason")


@dataclass(frozen=True)
class Correction:
    """What replaces the weights of a consumer once its inputs are cut to a skeleton.

    Attributes:
        producer: name of the Linear whose rows are kept.
        consumer: name of the Linear that reads them.
        indices: the rows kept, rising, shape (k,).
        weight: the consumer's new weight, shape (c, k).
        bias: the consumer's new bias, shape (c,), or None where it has none.
        skeleton: how the skeleton explains the other units, for bounds; None where a plan was read from JSON and its
            interpolation matrix, of more than ``STORED`` entries, had been left out.
    """

    producer: str
    consumer: str
    indices: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64] | None
    skeleton: Skeleton | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Cut:
    """What a group of channels keeps.

    Attributes:
        group: the layers that are cut together.
        kept: the units that stay, rising.
    """

    group: ChannelGroup
    kept: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """What each unit keeps, with the reason for each number.

    Attributes:
        method: ``"lq"`` (weights set to zero, unit by unit) or ``"id"`` (hidden units removed).
        rule: the name of the rule that decided, one of those that ``ellq.plan`` describes.
        settings: the arguments that led to the plan.
        table: one row per unit (lq) or per hidden layer (id): layer, unit, size, retained, reason.
        corrections: for ``"id"``, what is folded into each consumer.
        guarantee: for ``"id"`` on one hidden layer, what is measured and proved of the outputs; None where it was not
            asked for.
        kept: for ``"lq"``, which entries stay in the layers where they are not the largest of each unit: by name, in
            the shape of the weight.
        values: for ``"lq"``, what parameters and buffers become where refitting changed them: by name in the model's
            state dict, in the tensor's shape; a weight that is planned is 0 where it does not stay.
        measured: for ``"lq"`` refitted on calibration inputs, one row per refitted layer: layer, samples, error_before
            and error_after (see ``refit_masks``); else None.
        cuts: for ``"id"`` of channels, what each group keeps that loses any; ``values`` are then in the shapes of the
            smaller layers.
        left: for ``"id"`` of channels, layers whose units stay, and why.
        shapes: for ``"lq"``, the shape of each planned weight, by name; empty where the plan was written without.
    """

    method: str
    rule: str
    settings: dict[str, float | str]
    table: pd.DataFrame
    corrections: tuple[Correction, ...] = ()
    guarantee: Guarantee | None = None
    kept: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    values: Mapping[str, npt.NDArray[np.floating[Any]]] = field(default_factory=dict)
    measured: pd.DataFrame | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The fraction removed of what the plan covers: weights (lq) or hidden units (id)."""
        return 1.0 - float(self.table["retained"].sum()) / float(self.table["size"].sum())

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table."""
        return self.table.copy()

    def plot(self) -> Figure:
        """Draw the fraction that every layer retains, with the spread over its units.

        Returns:
            A figure that belongs to no window; ``figure.savefig(path)`` writes it.
        """
        from ellq.pruning.plan_plot import draw_plan  # matplotlib takes a while to load

        return draw_plan(self)

    def with_retained(self, table: pd.DataFrame) -> Plan:
        """Return the plan with an edited table.

        What was refitted fits the plan's own counts alone. Where a count is changed it is left out, of all layers, as
        the settings then say: the values, and by rules that retain the largest weights of each unit the choice of other
        ones. ``ellq.pruning.rescale_masks``, ``refit_synthetic`` and ``refit_masks`` refit the edited
        plan.

        Args:
            table: as from ``to_frame``, with other numbers under ``retained``.

        Raises:
            ValueError: the plan holds what fits one choice only (the corrections of ``"id"``, or other counts for a
                layer whose entries a rule or pattern chose otherwise than by magnitude), rows or columns are missing or
                reordered, or a count is not a whole number in [0, size].
        """
        if self.method != "lq":
            raise ValueError("A plan of method 'id' holds corrections for its own choice. Make a new plan instead.")
        fixed = ["layer", "unit", "size"]
        own = self.table[fixed].to_numpy().tolist()
        if list(table.columns) != list(COLUMNS) or table[fixed].to_numpy().tolist() != own:
            raise ValueError("table must have the plan's own rows and columns. Start from plan.to_frame().")
        edited = _checked(table)
        is_edited = edited["retained"] != self.table["retained"]
        drops_refit = bool(self.values) and bool(is_edited.any())
        kept = {} if drops_refit and self._retains_largest() else self.kept
        fixed_layer = next((name for name in edited["layer"][is_edited] if name in kept), None)
        if fixed_layer is not None:
            raise ValueError(
                f"The entries of layer {fixed_layer!r} were chosen one by one, for the plan's own counts. Make a new"
                " plan, or leave that layer as it is."
            )
        edited.loc[is_edited, "reason"] = "edited"
        if not drops_refit:
            return replace(self, table=edited)
        settings = self.settings | {"refit": f"none ({self.settings.get('refit', 'values')} dropped: edited)"}
        return replace(self, table=edited, settings=settings, kept=kept, values={}, measured=None)

    def _retains_largest(self) -> bool:
        """Whether the rule, before any refit, retained the largest weights of each unit."""
        from ellq.pruning.allocate import RULES  # which goes by way of what imports plans

        has_pattern = "pattern" in self.settings or self.settings.get("storage") == "2:4"
        return self.rule in RULES and not has_pattern

    def to_json(self) -> str:
        """Return the plan as JSON; arrays are kept to the last bit, interpolation matrices up to ``STORED`` entries.

        Of refitted values only those that are not 0 are written.
        """
        return json.dumps(
            {
                "format": PLAN,
                "version": VERSIONS[PLAN],
                "method": self.method,
                "rule": self.rule,
                "settings": self.settings,
                "table": {name: _plain(self.table[name]) for name in COLUMNS},
                "corrections": [
                    {
                        "producer": c.producer,
                        "consumer": c.consumer,
                        "indices": c.indices.tolist(),
                        "weight": _encode(c.weight),
                        "bias": None if c.bias is None else _encode(c.bias),
                        "skeleton": _encode_skeleton(c.skeleton),
                    }
                    for c in self.corrections
                ],
                "guarantee": None if self.guarantee is None else self.guarantee.to_dict(),
                "kept": {name: _encode_mask(mask) for name, mask in self.kept.items()},
                "values": {name: _encode_sparse(value) for name, value in self.values.items()},
                "measured": None if self.measured is None else self.measured.to_dict(orient="list"),
                "cuts": [_encode_cut(one) for one in self.cuts],
                "left": dict(self.left),
                "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            },
            ensure_ascii=False,
            allow_nan=False,
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """Return the plan that ``to_json`` wrote, or that a saved model's ``plan.json`` holds.

        Raises:
            ValueError: not JSON, not a plan, damaged, or of a version this ellq does not know; or the model was saved
                without one.
        """
        data = read_json(text, PLAN, MODEL, name="The plan")
        if data["format"] == MODEL:
            if data.get("plan") is None:
                raise ValueError("The model was saved without its plan. Pass plan= to ellq.save.")
            data = read_json(json.dumps(data["plan"]), PLAN, name="The plan")
        try:
            if data["method"] not in ("lq", "id"):
                raise ValueError(f"unknown method {data['method']!r}")
            corrections = tuple(
                Correction(
                    c["producer"],
                    c["consumer"],
                    np.array(c["indices"], dtype=np.int64),
                    _decode(c["weight"]),
                    None if c["bias"] is None else _decode(c["bias"]),
                    _decode_skeleton(c.get("skeleton")),
                )
                for c in data["corrections"]
            )
            table = _checked(plan_table(**data["table"]))
            proved = data.get("guarantee")
            guarantee = None if proved is None else Guarantee.from_dict(proved)
            kept = {name: _decode_mask(mask) for name, mask in data.get("kept", {}).items()}
            retained = table.groupby("layer", sort=False)["retained"].sum()
            for name, mask in kept.items():
                if name not in retained or int(mask.sum()) != int(retained[name]):
                    raise ValueError(f"layer {name!r} keeps other entries than its counts say")
            values = {name: _decode(value) for name, value in data.get("values", {}).items()}
            measured = data.get("measured")
            return Plan(
                data["method"],
                data["rule"],
                dict(data["settings"]),
                table,
                corrections,
                guarantee,
                kept,
                values,
                None if measured is None else pd.DataFrame(measured),
                {name: tuple(map(int, shape)) for name, shape in data.get("shapes", {}).items()},
                tuple(_decode_cut(one) for one in data.get("cuts", [])),
                {str(name): str(reason) for name, reason in data.get("left", {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The plan is damaged ({type(error).__name__}: {error}).") from error

    def layers(self) -> pd.DataFrame:
        """Return one row per layer: units, size, retained, sparsity, and the reason its units share most."""
        groups = self.table.groupby("layer", sort=False)
        frame = groups.agg(units=("size", "size"), size=("size", "sum"), retained=("retained", "sum"))
        frame["sparsity"] = 1.0 - frame["retained"] / frame["size"]
        frame["reason"] = groups["reason"].agg(lambda reasons: reasons.mode().iloc[0])
        return frame.reset_index()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return (
            f"Plan(method={self.method!r}, rule={self.rule!r}, {settings}: {self.table['layer'].nunique()} layers,"
            f" sparsity {self.sparsity:.4f})"
        )

    def _caption(self) -> str | None:
        if self.guarantee is not None:
            return escape(str(self.guarantee))
        told = [f"{name}: {reason}" for name, reason in self.left.items()]
        more = f"; and {len(told) - _TOLD} more in plan.left" if len(told) > _TOLD else ""
        return escape(f"stays dense: {'; '.join(told[:_TOLD])}{more}") if told else None

    def __rich__(self) -> Table:
        table = Table(
            title=f"Plan · method {self.method} · rule {self.rule}",
            title_justify="left",
            caption=self._caption(),
            caption_justify="left",
        )
        table.add_column("layer")
        for name in ("units", "size", "retained", "sparsity"):
            table.add_column(name, justify="right")
        table.add_column("reason")
        for row in self.layers().itertuples():
            table.add_row(
                escape(str(row.layer)),
                f"{row.units:,}",
                f"{row.size:,}",
                f"{row.retained:,}",
                f"{row.sparsity:.3f}",
                str(row.reason),
            )
        return table


def plan_table(
    layer: list[str], unit: list[int | None], size: list[int], retained: list[int], reason: list[str]
) -> pd.DataFrame:
    """Return the table of a plan, with the types every plan has."""
    return pd.DataFrame(
        {
            "layer": pd.Series(layer, dtype="object"),
            "unit": pd.array(unit, dtype="Int64"),
            "size": pd.Series(size, dtype="int64"),
            "retained": pd.Series(retained, dtype="int64"),
            "reason": pd.Series(reason, dtype="object"),
        }
    )


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with its types restored; refuse counts that are not whole numbers in [0, size]."""
    counts = pd.to_numeric(table["retained"], errors="coerce")
    bad = ~(counts.between(0, table["size"]) & (counts % 1 == 0))
    if bad.any():
        worst = table.loc[bad].iloc[0]
        raise ValueError(
            f"retained={worst['retained']} of layer {worst['layer']!r}, unit {worst['unit']}, is not a whole number in"
            f" [0, {worst['size']}]."
        )
    layer, unit, size, reason = (table[name].tolist() for name in ("layer", "unit", "size", "reason"))
    return plan_table(layer, unit, size, counts.astype("int64").tolist(), reason)


def _plain(column: pd.Series[Any]) -> list[Any]:
    return [None if value is pd.NA else value for value in column.tolist()]


def _encode(array: npt.NDArray[np.floating[Any]]) -> dict[str, Any]:
    kind = "float32" if array.dtype == np.float32 else "float64"
    little = np.ascontiguousarray(array, dtype=_STORED_AS[kind])
    return {"shape": list(array.shape), kind: base64.b64encode(little.tobytes()).decode("ascii")}


def _encode_sparse(array: npt.NDArray[np.floating[Any]]) -> dict[str, Any]:
    """Encode an array, without its zeros where that is shorter."""
    bits = np.ascontiguousarray(array).view(f"u{array.itemsize}")  # -0.0 is no zero: it must come back as it is
    stays = (bits != 0).reshape(array.shape)
    if np.count_nonzero(stays) * array.itemsize + array.size / 8 >= array.nbytes:
        return _encode(array)
    return {**_encode(array[stays]), "at": _encode_mask(stays)["bits"], "shape": list(array.shape)}


def _decode(data: dict[str, Any]) -> npt.NDArray[Any]:
    kind = "float32" if "float32" in data else "float64"
    raw = np.frombuffer(base64.b64decode(data[kind]), dtype=_STORED_AS[kind])
    if "at" not in data:
        return raw.reshape(data["shape"]).astype(kind)
    stays = _decode_mask({"shape": data["shape"], "bits": data["at"]})
    if int(stays.sum()) != raw.size:
        raise ValueError(f"an array with {int(stays.sum())} places has {raw.size} entries")
    array = np.zeros(data["shape"], dtype=kind)
    array[stays] = raw
    return array


def _encode_mask(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    return {"shape": list(mask.shape), "bits": base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")}


def _decode_mask(data: dict[str, Any]) -> npt.NDArray[np.bool_]:
    bits = np.frombuffer(base64.b64decode(data["bits"]), dtype=np.uint8)
    size = int(np.prod(data["shape"], dtype=np.int64))
    if bits.size != -(-size // 8):
        raise ValueError(f"a mask of shape {data['shape']} has {bits.size} bytes")
    return np.unpackbits(bits, count=size).reshape(data["shape"]).astype(bool)


def _encode_cut(cut: Cut) -> dict[str, Any]:
    members = [
        {
            "module": member.module,
            "side": member.side,
            "entries": member.entries.tolist(),
            "inputs": None if member.inputs is None else member.inputs.tolist(),
        }
        for member in cut.group.members
    ]
    return {"group": cut.group.name, "units": cut.group.units, "kept": cut.kept.tolist(), "members": members}


def _decode_cut(data: dict[str, Any]) -> Cut:
    def whole(values: Any) -> npt.NDArray[np.int64]:
        return np.array(values, dtype=np.int64)

    members = tuple(
        Member(m["module"], m["side"], whole(m["entries"]), None if m["inputs"] is None else whole(m["inputs"]))
        for m in data["members"]
    )
    return Cut(ChannelGroup(data["group"], int(data["units"]), members), whole(data["kept"]))


def _encode_skeleton(skeleton: Skeleton | None) -> dict[str, Any] | None:
    if skeleton is None or skeleton.interpolation.size > STORED:
        return None
    return {"indices": skeleton.indices.tolist()} | {name: _encode(getattr(skeleton, name)) for name in _ARRAYS}


def _decode_skeleton(data: dict[str, Any] | None) -> Skeleton | None:
    if data is None:
        return None
    return Skeleton(np.array(data["indices"], dtype=np.intp), **{name: _decode(data[name]) for name in _ARRAYS})
