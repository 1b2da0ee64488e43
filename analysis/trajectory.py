"""How compressibility changes along a training: ``trajectory(checkpoints)`` gives a ``Trajectory``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ellq.analysis.checkpoints import read_checkpoint
from ellq.analysis.compare import refuse_other_architecture
from ellq.analysis.files import json_text
from ellq.analysis.profile import LayerShape, Profile, measure
from ellq.analysis.progress import track
from ellq.analysis.tables import MODEL, Framed, ResultTable, plain_rows
from ellq.theory.arguments import order_below_one

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADING = 11  # characters of a step's name that a table shows
_SHOWN = 6  # checkpoints that a table has columns for


def trajectory(checkpoints: Mapping[Any, Any] | Iterable[str | os.PathLike[str]], /, *, q: float = 0.5) -> Trajectory:
    """Measure checkpoints of one training, or any models of one architecture in an order that means something.

    Args:
        checkpoints: step → an ``nn.Module``, a state dict or a checkpoint's path; or paths, whose names without
            ending become the steps. Steps that are all numbers are drawn to scale.
        q: order of the quasi-norm, 0 < q < 1.

    Returns:
        The trajectory, in the order given. One checkpoint is in memory at a time.

    Raises:
        TypeError: ``checkpoints`` is neither, or as ``measure``.
        ValueError: no checkpoint; two of one name; one whose layers differ from the first's, which is named; or as
            ``measure``, naming the step.
        FileNotFoundError, IsADirectoryError: as ``read_checkpoint``.
    """
    q = order_below_one(q)
    sources = _labelled(checkpoints)
    parts: list[pd.DataFrame] = []
    shapes: tuple[LayerShape, ...] = ()
    for label, source in track(list(sources.items()), "trajectory"):
        profile = _measured(source, q, label)
        if parts:
            refuse_other_architecture(f"step {next(iter(sources))!r}", shapes, f"step {label!r}", profile.layer_shapes)
        else:
            shapes = profile.layer_shapes
        parts.append(_rows(profile, shapes).assign(step=label))
    frame = pd.concat(parts, ignore_index=True)
    return Trajectory(frame[["step", *frame.columns.drop("step")]], q, shapes)


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory(Framed):
    """The measures of a model's layers and itself at several steps.

    The frame has, step by step, one row per layer in model order and a last one for the model: ``step``, ``level``,
    ``layer``, ``size``, ``nonzeros``, ``quasinorm``, ``pq_index`` and ``effective_fraction`` N/d, of all its weights
    as one vector, and ``unit_fraction``, the mean of N/d over its units, for the model the mean over layers by size.

    Attributes:
        frame: the measures.
        q: order of the quasi-norm.
        layer_shapes: name, shape and note of every weight, in the order of the first step.
    """

    frame: pd.DataFrame
    q: float
    layer_shapes: tuple[LayerShape, ...]

    __hash__ = None  # type: ignore[assignment]

    @property
    def steps(self) -> list[Any]:
        """The steps, in the order given."""
        return self.frame["step"].drop_duplicates().tolist()

    @property
    def model(self) -> pd.DataFrame:
        """The rows of the whole model, one for each step."""
        return self.frame[self.frame["level"] == "model"].reset_index(drop=True)

    def table(self, measure: str = "unit_fraction") -> pd.DataFrame:
        """Return one measure as a table: a row per layer and a last one for the model, a column per step.

        Args:
            measure: a column of the frame.

        Raises:
            ValueError: the frame has no such measure.
        """
        known = self.frame.columns[3:].tolist()
        if measure not in known:
            raise ValueError(f"measure={measure!r} is no measure of a trajectory. Choose one of {', '.join(known)}.")
        names = [*(layer.name for layer in self.layer_shapes), MODEL]
        rows = {step: part[measure].to_numpy() for step, part in self.frame.groupby("step", sort=False)}
        return pd.DataFrame(rows, index=pd.Index(names, name="layer"))

    def plot(self) -> Figure:
        """Draw the mean fraction of units along the steps, thick for the model; ``figure.savefig(path)`` writes it."""
        # Drawing is the slowest import of all and not everyone draws.
        from ellq.analysis.trajectory_plot import draw_trajectory

        return draw_trajectory(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the trajectory as JSON: the order and the rows; a missing value is null.

        Args:
            path: where to write it as well, whole or not at all.

        Raises:
            OSError: the place cannot be written.
        """
        content = {"q": self.q, "columns": list(self.frame), "rows": plain_rows(self.frame)}
        return json_text(content, path)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        return (self.q, self.layer_shapes) == (other.q, other.layer_shapes) and self.frame.equals(other.frame)

    def __repr__(self) -> str:
        ends = self.model["unit_fraction"].iloc[[0, -1]]
        return (
            f"Trajectory(q={self.q:g}: {len(self.steps)} steps, {len(self.layer_shapes)} layers,"
            f" {ends.iloc[0]:.1%} → {ends.iloc[1]:.1%} effective)"
        )

    def _table(self) -> ResultTable:
        table = self.table()
        table.columns = pd.Index([_heading(str(step)) for step in table.columns])
        remarks = ["Effective fraction N/d, mean over units."]
        if len(table.columns) > _SHOWN:
            places = [round(i * (len(table.columns) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]
            remarks.append(f"{len(table.columns) - _SHOWN} steps between are left out.")
            table = table.iloc[:, places]
        return ResultTable(repr(self), table.map("{:.1%}".format), remarks)


def _heading(step: str) -> str:
    return step if len(step) <= _HEADING else f"…{step[1 - _HEADING :]}"


def _labelled(checkpoints: object) -> dict[Any, Any]:
    if isinstance(checkpoints, Mapping):
        sources = dict(checkpoints)
        if sources and all(isinstance(name, str) and hasattr(value, "dtype") for name, value in sources.items()):
            raise TypeError("checkpoints is one state dict. Pass {step: state dict, …}.")
    elif isinstance(checkpoints, Iterable) and not isinstance(checkpoints, str | bytes):
        paths = list(checkpoints)
        other = next((path for path in paths if not isinstance(path, str | os.PathLike)), None)
        if other is not None:
            raise TypeError(f"checkpoints holds {type(other).__name__}, not a path. Pass paths, or {{step: source}}.")
        sources = {Path(path).stem: path for path in paths}
        if len(sources) < len(paths):
            # Files of the same name, such as one per folder: the whole path tells them apart.
            sources = {str(path): path for path in paths}
        if len(sources) < len(paths):
            raise ValueError("checkpoints holds the same path twice. Give each once.")
    else:
        raise TypeError(
            "checkpoints must be a mapping of steps to models or a sequence of paths,"
            f" got {type(checkpoints).__name__}."
        )
    if not sources:
        raise ValueError("checkpoints is empty. Give at least one.")
    return sources


def _measured(source: Any, q: float, label: Any) -> Profile:
    try:
        return measure(read_checkpoint(source) if isinstance(source, str | os.PathLike) else source, q=q)
    except (TypeError, ValueError, OverflowError) as error:
        raise type(error)(f"step {label!r}: {error}") from None


def _rows(profile: Profile, shapes: tuple[LayerShape, ...]) -> pd.DataFrame:
    """Return the rows of the layers, in the order of ``shapes``, and of the model."""
    units = profile.units
    fractions = (units["effective_count"] / units["size"]).groupby(units["layer"], sort=False).mean()
    layers = profile.layers.set_index("layer").loc[[layer.name for layer in shapes]].reset_index()
    rows = pd.concat([layers, profile.model.to_frame().T], ignore_index=True).infer_objects()
    means = fractions.loc[layers["layer"]].to_numpy()
    shares = layers["size"].to_numpy() / layers["size"].sum()
    return pd.DataFrame(
        {
            "level": rows["level"].astype(str),
            "layer": rows["layer"].astype(str),
            "size": rows["size"].astype("int64"),
            "nonzeros": rows["nonzeros"].astype("int64"),
            "quasinorm": rows["quasinorm"].astype(float),
            "pq_index": rows["pq_index"].astype(float),
            "effective_fraction": (rows["effective_count"] / rows["size"]).astype(float),
            "unit_fraction": [*means, shares @ means],
        }
    )
