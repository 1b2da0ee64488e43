"""Pruning in steps, training between them: a loop that a kill at any moment leaves resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis import track
from ellq.pruning.apply import apply
from ellq.pruning.mask_parametrization import install_
from ellq.pruning.replan import Decide, by_name, decider
from ellq.pruning.resumable import finite_number, identity, part, prefixed, random_state, read_state, write_state
from ellq.pruning.schedules import Schedule, targets_of
from ellq.pruning.snapshot import (
    Snapshot,
    bared,
    copied_masks,
    effective_model,
    masked_model,
    nonzeros,
    require_finite,
    require_same_tensors,
    stored_model,
)
from ellq.theory import open_fraction
from ellq.theory.arguments import count

Train = Callable[[nn.Module, int], Any]

CHECKPOINT = "gradual.safetensors"
COLUMNS = ("step", "target", "sparsity", "nonzeros", "loss", "seconds")
_VERSION = 2


@dataclass(frozen=True, eq=False)
class Gradual:
    """What gradual pruning made of a model.

    Attributes:
        model: a plain module with zeros in place.
        masks: name of each planned weight → which entries are kept, boolean, on the CPU.
        table: one row per step: ``step``, ``target`` (the schedule's sparsity), ``sparsity`` (the fraction removed of
            the weights the plans cover), ``nonzeros`` (parameters of the whole model that are not 0), ``loss`` (what
            ``train`` returned; NaN where it returned None), ``seconds``.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    table: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table."""
        return self.table.copy()


class GradualError(RuntimeError):
    """A step failed; what the steps before it made is kept.

    Attributes:
        step: the step that failed, from 1.
        result: the model, masks and table as they were before it.
        checkpoint: the file that holds them, from which the same call goes on; None where no folder was given.
    """

    def __init__(self, message: str, step: int, result: Gradual, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.step, self.result, self.checkpoint = step, result, checkpoint


def gradual(
    model: nn.Module,
    train: Train,
    *,
    sparsity: float,
    steps: int,
    schedule: str | Schedule = "geometric",
    epochs: int = 1,
    plan_with: Mapping[str, Any] | Decide | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    regrow: bool = False,
    seed: int = 0,
) -> Gradual:
    """Prune a model step by step, training it after each.

    At each step the effective weights are planned to the schedule's sparsity, masked, and trained. Masks only shrink:
    what was removed is zero when the next step is planned. With ``regrow`` the stored weights are planned instead, so
    that an entry removed earlier, whose stored value is the one it had then (or what weight decay and momentum made of
    it), can come back.

    Every step starts from nothing but tensors, masks and a random state (of torch, NumPy and ``random``) that follows
    from ``seed`` and the step's number; flags, hooks and attributes are those of ``model`` each time. That is what a
    checkpoint holds, written whole or not at all after each step: a run killed at any moment and called again ends in
    the same bits on the CPU, given the same machine and number of threads. The global random states are as they were
    afterwards.

    Args:
        model: what to prune, with masks or without; not changed.
        train: called as ``train(model, epochs)`` with a masked model on which it works in place; returns a loss or
            None. It should keep nothing from one call to the next. ``ClassifierTrainer`` makes one.
        sparsity: fraction to remove at the last step, in (0, 1).
        steps: how often to prune and train, ≥ 1.
        schedule: ``"geometric"``, ``"cubic"`` or ``"one-shot"``, or a function of step (1 to steps), steps and sparsity
            that returns the sparsity at that step, in [0, 1).
        epochs: what ``train`` may spend at each step, ≥ 1.
        plan_with: keyword arguments for ``ellq.plan``, which every step uses anew, or a function of a plain model and
            the step's sparsity that returns a plan of method ``"lq"``.
        checkpoint: folder to keep the latest state in, as one file, and to go on from if there is one.
        regrow: let entries come back.
        seed: of every random state, ≥ 0.

    Returns:
        The pruned model, its masks, and a table of the steps.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, a schedule that falls without ``regrow``, a model that cannot be planned;
            or a checkpoint that is damaged, or of other arguments or another model. Tensors and arrays are compared by
            content, functions and other objects by their names alone; of a DataLoader what it draws from (a
            TensorDataset's content, of another its type and length) and its batches' size and order are compared.
        GradualError: a step's plan or training failed, or left a loss or weights that are not finite.
        OSError: the folder cannot be written.

    Reference: Zhu & Gupta 2017 (arXiv 1710.01878) for ``"cubic"``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    if not callable(train):
        raise TypeError(f"train must be a function of model and epochs, got {type(train).__name__}.")
    sparsity = open_fraction(sparsity, "sparsity")
    steps, epochs = count(steps, "steps", low=1, high=10**6), count(epochs, "epochs", low=1, high=10**9)
    seed = count(seed, "seed", low=0, high=2**63 - 1)
    targets = targets_of(schedule, steps, sparsity, regrow=regrow)
    plan_with = by_name(plan_with, model)
    decide = decider(plan_with, regrow=regrow)
    bare, start = bared(model)
    state = _State(start)
    arguments = {
        "version": _VERSION,
        "steps": steps,
        "sparsity": sparsity,
        "targets": targets,
        "epochs": epochs,
        "plan_with": identity(plan_with),
        "regrow": regrow,
        "seed": seed,
        "train": identity(train),
    }
    file = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
    kept = None
    if file is not None:
        arguments["model"] = start.digests()
        kept = _read(file, arguments)
    if kept is not None:
        state = kept
    else:
        # Whether the last step's budget can be met is known before the first is trained.
        if not callable(plan_with) and max(targets) > 0:
            with random_state(seed, 0):
                decide(effective_model(bare, start), max(targets))
        if file is not None:
            _write(file, state, arguments)
    todo = range(len(state.rows) + 1, steps + 1)
    for step in track(todo, "pruning", describe=lambda step: f"step {step} of {steps}, sparsity {targets[step - 1]:g}"):
        try:
            with random_state(seed, step):
                state = _advance(bare, state, targets, decide, train, epochs, regrow)
        except Exception as error:
            result = _result(bare, state)
            raise GradualError(_told(error, step, targets, file), step, result, file) from error
        if file is not None:
            _write(file, state, arguments)
    return _result(bare, state)


@dataclass(frozen=True)
class _State:
    """All that one step hands to the next."""

    now: Snapshot
    rows: tuple[dict[str, Any], ...] = ()


def _advance(
    bare: nn.Module,
    state: _State,
    targets: list[float],
    decide: Decide,
    train: Train,
    epochs: int,
    regrow: bool,
) -> _State:
    """Return the state after one more step."""
    began = time.perf_counter()
    done = len(state.rows)
    target, before = targets[done], targets[done - 1] if done else 0.0
    work = masked_model(bare, state.now)
    if target == 0.0:
        if regrow:
            install_(work, {name: torch.ones_like(mask) for name, mask in state.now.masks.items()})
    elif regrow or target > before:
        plain = stored_model(bare, state.now) if regrow else effective_model(bare, state.now)
        apply(work, decide(plain, target), inplace=True, regrow=regrow)
    masks = copied_masks(work)
    loss = train(work, epochs)
    loss = None if loss is None else finite_number(loss, "train", "loss")
    trained = Snapshot.of(work)
    require_same_tensors(state.now.tensors, trained.tensors)
    now = Snapshot(trained.tensors, masks)  # the masks of this step, whatever train did to them
    final = effective_model(bare, now)
    require_finite(final)
    row = {
        "step": done + 1,
        "target": target,
        "sparsity": now.sparsity,
        "nonzeros": nonzeros(final),
        "loss": loss,
        "seconds": time.perf_counter() - began,
    }
    return _State(now, (*state.rows, row))


def _result(bare: nn.Module, state: _State) -> Gradual:
    table = pd.DataFrame(list(state.rows), columns=list(COLUMNS))
    kinds = {name: "int64" if name in ("step", "nonzeros") else "float64" for name in COLUMNS}
    return Gradual(effective_model(bare, state.now), dict(state.now.masks), table.astype(kinds))


def _told(error: Exception, step: int, targets: list[float], file: Path | None) -> str:
    reason = str(error).rstrip(".") or "no message"
    kept = (
        "is in this error's result; pass checkpoint= to keep it on disk"
        if file is None
        else f"is kept in {file}; the same call goes on from there"
    )
    return (
        f"Step {step} of {len(targets)} (sparsity {targets[step - 1]:g}) failed with {type(error).__name__}: {reason}."
        f" The state after step {step - 1} {kept}."
    )


def _write(file: Path, state: _State, arguments: Mapping[str, Any]) -> None:
    tensors = prefixed("stored/", state.now.tensors) | prefixed("kept/", state.now.masks)
    write_state(file, tensors, {"rows": state.rows}, arguments)


def _read(file: Path, arguments: Mapping[str, Any]) -> _State | None:
    found = read_state(file, ["rows"], arguments)
    if found is None:
        return None
    tensors, about = found
    return _State(Snapshot(part("stored/", tensors), part("kept/", tensors)), tuple(about["rows"]))
