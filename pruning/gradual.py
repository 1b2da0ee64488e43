"""Pruning in steps, training between them: schedules, and a loop that a kill at any moment leaves resumable."""

from __future__ import annotations

import copy
import functools
import glob
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, TensorDataset

from ellq.analysis import track, write_bytes
from ellq.pruning.apply import apply
from ellq.pruning.budget import KINDS
from ellq.pruning.copied import copied
from ellq.pruning.mask_parametrization import install_, masks_of, remove_, stored_tensors
from ellq.pruning.plan import Plan
from ellq.pruning.prune import plan
from ellq.pruning.refit import CHOOSING
from ellq.pruning.training import ClassifierTrainer
from ellq.theory import open_fraction
from ellq.theory.arguments import count

Schedule = Callable[[int, int, float], float]
Train = Callable[[nn.Module, int], Any]
Decide = Callable[[nn.Module, float], Plan]

CHECKPOINT = "gradual.safetensors"
COLUMNS = ("step", "target", "sparsity", "nonzeros", "loss", "seconds")
_VERSION = 1


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
    targets = _targets(schedule, steps, sparsity, regrow)
    plan_with = _by_name(plan_with, model)
    decide = _decider(plan_with, regrow=regrow)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"Tensor {name!r} is not initialised. Run one forward pass first.")
    bare = copied(model)
    bare.zero_grad(set_to_none=True)
    state = _State.of(bare)
    remove_(bare, bake=False)
    arguments = {
        "version": _VERSION,
        "steps": steps,
        "sparsity": sparsity,
        "targets": targets,
        "epochs": epochs,
        "plan_with": _identity(plan_with),
        "regrow": regrow,
        "seed": seed,
        "train": _identity(train),
    }
    file = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
    kept = None
    if file is not None:
        arguments["model"] = state.digests()
        kept = _read(file, arguments)
    if kept is not None:
        state = kept
    else:
        # Whether the last step's budget can be met is known before the first is trained.
        if not callable(plan_with) and max(targets) > 0:
            with _random_state(seed, 0):
                decide(_effective(bare, state), max(targets))
        if file is not None:
            _write(file, state, arguments)
    todo = range(len(state.rows) + 1, steps + 1)
    for step in track(todo, "pruning", describe=lambda step: f"step {step} of {steps}, sparsity {targets[step - 1]:g}"):
        try:
            with _random_state(seed, step):
                state = _advance(bare, state, targets, decide, train, epochs, regrow)
        except Exception as error:
            result = _result(bare, state)
            raise GradualError(_told(error, step, targets, file), step, result, file) from error
        if file is not None:
            _write(file, state, arguments)
    return _result(bare, state)


def one_shot(step: int, steps: int, sparsity: float) -> float:
    """Return the final sparsity from the first step on."""
    return sparsity if step >= 1 else 0.0


def geometric(step: int, steps: int, sparsity: float) -> float:
    """Return 1 − (1 − s)^(t/T): every step keeps the same fraction of what the one before kept.

    Args:
        step: t, in [0, T].
        steps: T ≥ 1.
        sparsity: s, at the last step, in [0, 1).

    Returns:
        The sparsity at step t; exactly s at T.

    Reference: iterative magnitude pruning, as in Han et al. 2015 (arXiv 1506.02626).
    """
    return sparsity if step == steps else -math.expm1(math.log1p(-sparsity) * step / steps)


def cubic(step: int, steps: int, sparsity: float, initial: float = 0.0) -> float:
    """Return s_f + (s_i − s_f)·(1 − t/T)³: much at first, while the net has most to spare, and little at the end.

    Args:
        step: t, in [0, T].
        steps: T ≥ 1.
        sparsity: s_f, at the last step.
        initial: s_i, at step 0.

    Returns:
        The sparsity at step t.

    Reference: Zhu & Gupta 2017 (arXiv 1710.01878), §3.
    """
    return sparsity + (initial - sparsity) * (1.0 - step / steps) ** 3


SCHEDULES: Mapping[str, Schedule] = {"geometric": geometric, "cubic": cubic, "one-shot": one_shot}


@dataclass(frozen=True)
class _State:
    """All that one step hands to the next: tensors as they are stored, masks, and the table so far."""

    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    rows: tuple[dict[str, Any], ...] = ()

    @staticmethod
    def of(model: nn.Module, rows: tuple[dict[str, Any], ...] = ()) -> _State:
        tensors = {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}
        return _State(tensors, {name: mask.cpu().clone() for name, mask in masks_of(model).items()}, rows)

    def digests(self) -> dict[str, str]:
        """Return what identifies the state's tensors and masks, by name."""
        named = [*self.tensors.items(), *((f"mask of {name}", mask) for name, mask in self.masks.items())]
        return {name: f"{_kind(tensor)} {_digest(tensor)}" for name, tensor in named}


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
    work = _masked(bare, state)
    if target == 0.0:
        if regrow:
            install_(work, {name: torch.ones_like(mask) for name, mask in state.masks.items()})
    elif regrow or target > before:
        plain = _stored(bare, state) if regrow else _effective(bare, state)
        apply(work, decide(plain, target), inplace=True, regrow=regrow)
    masks = {name: mask.cpu().clone() for name, mask in masks_of(work).items()}
    loss = _as_loss(train(work, epochs))
    found = _State.of(work)
    _require_same_tensors(state.tensors, found.tensors)
    state_after = _State(found.tensors, masks, state.rows)  # the masks of this step, whatever train did to them
    final = _effective(bare, state_after)
    for name, parameter in final.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.detach().double()).all():
            raise ValueError(f"train left NaN or infinite entries in {name!r}")
    total = sum(mask.numel() for mask in masks.values())
    row = {
        "step": done + 1,
        "target": target,
        "sparsity": 1.0 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0,
        "nonzeros": sum(int(parameter.detach().double().count_nonzero()) for parameter in final.parameters()),
        "loss": loss,
        "seconds": time.perf_counter() - began,
    }
    return _State(found.tensors, masks, (*state.rows, row))


def _stored(bare: nn.Module, state: _State) -> nn.Module:
    """Return a plain model with the tensors as they are stored, entries that masks remove included."""
    model = copy.deepcopy(bare)
    tensors = stored_tensors(model)
    with torch.no_grad():
        for name, value in state.tensors.items():
            tensors[name].copy_(value)
    return model


def _masked(bare: nn.Module, state: _State) -> nn.Module:
    model = _stored(bare, state)
    install_(model, state.masks)
    return model


def _effective(bare: nn.Module, state: _State) -> nn.Module:
    """Return a plain model with zeros in place."""
    model = _masked(bare, state)
    remove_(model, bake=True)
    return model


def _result(bare: nn.Module, state: _State) -> Gradual:
    table = pd.DataFrame(list(state.rows), columns=list(COLUMNS))
    kinds = {name: "int64" if name in ("step", "nonzeros") else "float64" for name in COLUMNS}
    return Gradual(_effective(bare, state), dict(state.masks), table.astype(kinds))


def _as_loss(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"train returned a {type(value).__name__}, where a loss or None is expected")
    if not math.isfinite(value):
        raise ValueError(f"train returned the loss {value}")
    return float(value)


def _require_same_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name in [*before, *after]:
        had, has = (_kind(tensors[name]) if name in tensors else "missing" for tensors in (before, after))
        if had != has:
            raise ValueError(f"train changed {name!r} from {had} to {has}, where only values may change")


def _targets(schedule: str | Schedule, steps: int, sparsity: float, regrow: bool) -> list[float]:
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"schedule={schedule!r} is unknown. Choose one of {known}, or pass a function.")
    function = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    if not callable(function):
        raise TypeError(f"schedule must be a name or a function, got {type(schedule).__name__}.")
    targets: list[float] = []
    for step in range(1, steps + 1):
        value: object = function(step, steps, sparsity)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < 1.0:
            raise ValueError(f"schedule gives {value!r} at step {step} of {steps}. Return a sparsity in [0, 1).")
        if targets and float(value) < targets[-1] and not regrow:
            raise ValueError(
                f"schedule falls from {targets[-1]:g} to {float(value):g} at step {step}, but masks only shrink. Let it"
                " rise, or pass regrow=True."
            )
        targets.append(float(value))
    return targets


def _by_name(plan_with: Mapping[str, Any] | Decide | None, model: nn.Module) -> Mapping[str, Any] | Decide | None:
    """Return what to plan with, modules of the model given by name, since what each step plans is a copy of it."""
    if not isinstance(plan_with, Mapping):
        return plan_with
    paths = {id(module): glob.escape(path) or "*" for path, module in model.named_modules()}
    named = dict(plan_with)
    for argument in {"include", "exclude"} & set(named):
        given = named[argument]
        if isinstance(given, nn.Module | list | tuple):
            items = [given] if isinstance(given, nn.Module) else given
            named[argument] = [paths.get(id(item), item) for item in items]
    return named


def _decider(plan_with: Mapping[str, Any] | Decide | None, *, regrow: bool) -> Decide:
    options: Mapping[str, Any] = {}
    if isinstance(plan_with, Mapping):
        options = plan_with
        for name in KINDS:
            if name in options:
                raise ValueError(f"plan_with holds {name!r}, but the budget is the schedule's. Leave it out.")
        for name, value in options.items():
            if isinstance(value, Iterator):
                raise TypeError(
                    f"plan_with holds a {type(value).__name__} as {name!r}, which the first step would use up. Pass a"
                    " list, a tensor or a DataLoader."
                )
        if options.get("refit") in (*CHOOSING, "synthetic", "auto") and not regrow:
            raise ValueError(
                f"plan_with holds refit={options['refit']!r}, which may bring removed entries back, but masks only"
                " shrink. Use refit='least_squares', or pass regrow=True."
            )
    elif plan_with is not None and not callable(plan_with):
        raise TypeError(f"plan_with must be keyword arguments or a function, got {type(plan_with).__name__}.")

    def decide(model: nn.Module, sparsity: float) -> Plan:
        found = (
            plan_with(model, sparsity)
            if callable(plan_with)
            else plan(model, sparsity=sparsity, **({"refit": "none"} | dict(options)))
        )
        if not isinstance(found, Plan):
            raise TypeError(f"plan_with returned a {type(found).__name__}, where a Plan is expected")
        if found.method != "lq":
            raise ValueError(f"The plan is of method {found.method!r}, but gradual pruning masks. Use method 'lq'.")
        return found

    return decide


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


@contextmanager
def _random_state(seed: int, step: int) -> Iterator[None]:
    """Run under random states that follow from seed and step, and restore those that were."""
    derived = np.random.SeedSequence([seed, step]).generate_state(2)
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the one that users' code draws from
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(derived[0]))
            random.seed(int(derived[1]))
            np.random.seed(derived)  # noqa: NPY002
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def _write(file: Path, state: _State, arguments: Mapping[str, Any]) -> None:
    content = {f"stored/{name}": tensor for name, tensor in state.tensors.items()}
    content |= {f"kept/{name}": mask for name, mask in state.masks.items()}
    # Cloned, because safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in content.items()}
    about = {"arguments": json.dumps(arguments), "rows": json.dumps(state.rows)}
    write_bytes(file, save(plain, metadata=about))


def _read(file: Path, arguments: Mapping[str, Any]) -> _State | None:
    """Return the state a file holds, None if there is no file; what a kill left half-written beside it is removed."""
    for partial in file.parent.glob(f".{CHECKPOINT}.*.tmp"):
        with suppress(OSError):
            partial.unlink()
    if not file.exists():
        return None
    try:
        with safe_open(str(file), framework="pt") as opened:
            about = opened.metadata() or {}
            made_with, rows = json.loads(about["arguments"]), tuple(json.loads(about["rows"]))
            content = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}). Remove it to start again.") from error
    _require_same_arguments(file, made_with, json.loads(json.dumps(arguments)))
    parts = {
        part: {name.removeprefix(part): tensor for name, tensor in content.items() if name.startswith(part)}
        for part in ("stored/", "kept/")
    }
    return _State(parts["stored/"], parts["kept/"], rows)


def _require_same_arguments(file: Path, made_with: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    remedy = "Pass what it was made with, or another folder."
    for name, value in arguments.items():
        had = made_with.get(name)
        if name == "model" and isinstance(had, dict):
            odd = next((key for key in [*value, *had] if value.get(key) != had.get(key)), None)
            if odd is not None:
                raise ValueError(f"{file} was made from another model, which differs at {odd!r}. {remedy}")
        elif had != value:
            raise ValueError(f"{file} was made with {name}={had!r}, this call has {name}={value!r}. {remedy}")


def _identity(value: object) -> Any:
    """Return what identifies an argument, as JSON holds it: its content, or the name of a function or a type."""
    if isinstance(value, ClassifierTrainer):
        return value.identity()
    if isinstance(value, functools.partial):
        return [_identity(value.func), _identity(value.args), _identity(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): _identity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(inner) for inner in value]
    if isinstance(value, Tensor):
        return f"{_kind(value)} {_digest(value)}"
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()[:32]}"
    if isinstance(value, DataLoader):
        data = value.dataset
        content = (
            list(data.tensors) if isinstance(data, TensorDataset) else len(data) if isinstance(data, Sized) else None
        )
        parts = (data, content, value.batch_size, value.drop_last, value.sampler, value.batch_sampler)
        return ["DataLoader", *map(_identity, parts)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:32]
