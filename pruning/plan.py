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

from ellq.pruning.guarantee import Guarantee
from ellq.pruning.json_format import MODEL, PLAN, VERSIONS, read_json
from ellq.theory import Skeleton

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORED = 2**18  # entries of an interpolation matrix, 2 MiB; a larger one is left out of the JSON
_STORED_AS = {"float32": "<f4", "float64": "<f8"}
_ARRAYS = ("interpolation", "offset", "feature_errors")  # of a skeleton
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


@dataclass(frozen=True, eq=False)
class Plan:
    """What each unit keeps, with the reason for each number.

    Attributes:
        method: ``"lq"`` (weights set to zero, unit by unit) or ``"id"`` (hidden units removed).
        rule: ``"ellq"`` or the authors' rule.
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

        Args:
            table: as from ``to_frame``, with other numbers under ``retained``.

        Raises:
            ValueError: the plan holds what fits one choice only (the corrections of ``"id"``, refitted values, or other
                counts for a layer whose entries were chosen otherwise than by magnitude), rows or columns are missing
                or reordered, or a count is not a whole number in [0, size].
        """
        if self.method != "lq":
            raise ValueError("A plan of method 'id' holds corrections for its own choice. Make a new plan instead.")
        if self.values:
            raise ValueError("The plan's values were refitted for its own counts. Make a new plan with refit='none'.")
        fixed = ["layer", "unit", "size"]
        own = self.table[fixed].to_numpy().tolist()
        if list(table.columns) != list(COLUMNS) or table[fixed].to_numpy().tolist() != own:
            raise ValueError("table must have the plan's own rows and columns. Start from plan.to_frame().")
        edited = _checked(table)
        is_edited = edited["retained"] != self.table["retained"]
        fixed_layer = next((name for name in edited["layer"][is_edited] if name in self.kept), None)
        if fixed_layer is not None:
            raise ValueError(
                f"The entries of layer {fixed_layer!r} were chosen one by one, for the plan's own counts. Make a new"
                " plan, or leave that layer as it is."
            )
        edited.loc[is_edited, "reason"] = "edited"
        return replace(self, table=edited)

    def to_json(self) -> str:
        """Return the plan as JSON; arrays are kept to the last bit, interpolation matrices up to ``STORED`` entries."""
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
                "values": {name: _encode(value) for name, value in self.values.items()},
                "measured": None if self.measured is None else self.measured.to_dict(orient="list"),
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
            )
        except (KeyError, TypeError, ValueError) as error:
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

    def __rich__(self) -> Table:
        table = Table(
            title=f"Plan · method {self.method} · rule {self.rule}",
            title_justify="left",
            caption=None if self.guarantee is None else escape(str(self.guarantee)),
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


def _decode(data: dict[str, Any]) -> npt.NDArray[Any]:
    kind = "float32" if "float32" in data else "float64"
    raw = np.frombuffer(base64.b64decode(data[kind]), dtype=_STORED_AS[kind])
    return raw.reshape(data["shape"]).astype(kind)


def _encode_mask(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    return {"shape": list(mask.shape), "bits": base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")}


def _decode_mask(data: dict[str, Any]) -> npt.NDArray[np.bool_]:
    bits = np.frombuffer(base64.b64decode(data["bits"]), dtype=np.uint8)
    size = int(np.prod(data["shape"], dtype=np.int64))
    if bits.size != -(-size // 8):
        raise ValueError(f"a mask of shape {data['shape']} has {bits.size} bytes")
    return np.unpackbits(bits, count=size).reshape(data["shape"]).astype(bool)


def _encode_skeleton(skeleton: Skeleton | None) -> dict[str, Any] | None:
    if skeleton is None or skeleton.interpolation.size > STORED:
        return None
    return {"indices": skeleton.indices.tolist()} | {name: _encode(getattr(skeleton, name)) for name in _ARRAYS}


def _decode_skeleton(data: dict[str, Any] | None) -> Skeleton | None:
    if data is None:
        return None
    return Skeleton(np.array(data["indices"], dtype=np.intp), **{name: _decode(data[name]) for name in _ARRAYS})
