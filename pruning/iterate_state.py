"""All that one epoch of iterative pruning hands to the next, and its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ellq.pruning.resumable import decoded, encoded, part, prefixed, read_state, write_state
from ellq.pruning.snapshot import Snapshot

CHECKPOINT = "iterate.safetensors"
_METHODS = ("state_dict", "load_state_dict", "reset")


@dataclass(frozen=True)
class Kept:
    """What a trainer keeps from call to call, as a checkpoint holds it."""

    content: Any
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Point:
    """What rewinding goes back to."""

    tensors: Mapping[str, Tensor]
    kept: Kept | None


@dataclass(frozen=True)
class State:
    """All that one epoch hands to the next.

    Attributes:
        now: tensors and masks.
        kept: by the trainer.
        iteration: the one that the next epoch belongs to; 0 is the warm-up.
        epoch: how many epochs of it are done.
        position: where the next one is in the learning-rate schedule.
        point: what rewinding goes back to, once it is reached.
        drawn: the masks drawn at the last check of this iteration.
        dense_accuracy: NaN until the warm-up is over.
        references: name of a monitor → its entries' names, and what it says of the dense net; empty until then.
        iterations: a row for each that is over.
        epochs: a row for each.
        vectors: iteration, epoch, and what each monitor said, for each check.
    """

    now: Snapshot
    kept: Kept | None
    iteration: int = 0
    epoch: int = 0
    position: int = 0
    point: Point | None = None
    drawn: Mapping[str, Tensor] = field(default_factory=dict)
    dense_accuracy: float = math.nan
    references: Mapping[str, tuple[list[str], list[float]]] = field(default_factory=dict)
    iterations: tuple[dict[str, Any], ...] = ()
    epochs: tuple[dict[str, Any], ...] = ()
    vectors: tuple[tuple[int, int, dict[str, list[float]]], ...] = ()


def require_trainer(train: Any) -> None:
    """Raise TypeError if a trainer keeps something from call to call, but does not say all that is needed to resume."""
    if hasattr(train, "state_dict"):
        lacking = next((name for name in _METHODS if not callable(getattr(train, name, None))), None)
        if lacking is not None:
            all_three = ", ".join(_METHODS)
            raise TypeError(f"train has a state_dict, but no {lacking}. Give it all of {all_three}, or none.")


def kept_by(train: Any) -> Kept | None:
    """Return what a trainer keeps from call to call."""
    if not hasattr(train, "state_dict"):
        return None
    tensors: dict[str, Tensor] = {}
    return Kept(encoded(train.state_dict(), tensors), tensors)


def give_back(train: Any, kept: Kept | None) -> None:
    """Give a trainer what it kept."""
    if kept is not None:
        train.load_state_dict(decoded(kept.content, kept.tensors))


_TOLD = ("iteration", "epoch", "position", "dense_accuracy", "references", "iterations", "epochs", "vectors")


def write(file: Path, state: State, arguments: Mapping[str, Any]) -> None:
    """Write the state to its file, whole or not at all."""
    tensors = prefixed("stored/", state.now.tensors) | prefixed("kept/", state.now.masks)
    tensors |= prefixed("drawn/", state.drawn)
    trainers = {"now": state.kept, "point": None}
    if state.point is not None:
        tensors |= prefixed("point/", state.point.tensors)
        trainers["point"] = state.point.kept
    for name, kept in trainers.items():
        tensors |= {} if kept is None else prefixed(f"trainer {name}/", kept.tensors)
    contents = {name: None if kept is None else [kept.content] for name, kept in trainers.items()}
    about = {name: getattr(state, name) for name in _TOLD}
    write_state(file, tensors, about | {"trainers": contents, "has_point": state.point is not None}, arguments)


def read(file: Path, arguments: Mapping[str, Any]) -> State | None:
    """Return the state that a file holds, None if there is no file; refuse that of other arguments."""
    found = read_state(file, [*_TOLD, "trainers", "has_point"], arguments)
    if found is None:
        return None
    tensors, about = found
    kept = {
        name: None if content is None else Kept(content[0], part(f"trainer {name}/", tensors))
        for name, content in about["trainers"].items()
    }
    told: dict[str, Any] = {
        name: tuple(about[name]) if isinstance(about[name], list) else about[name] for name in _TOLD
    }
    return State(
        now=Snapshot(part("stored/", tensors), part("kept/", tensors)),
        kept=kept["now"],
        point=Point(part("point/", tensors), kept["point"]) if about["has_point"] else None,
        drawn=part("drawn/", tensors),
        **told,
    )
