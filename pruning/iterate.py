"""Iterative pruning with rewinding: prune, go back, retrain until a rule says stop; a kill leaves it resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ellq.analysis import track
from ellq.pruning.apply import apply
from ellq.pruning.copied import copied
from ellq.pruning.iterate_state import CHECKPOINT, Point, State, give_back, kept_by, read, require_trainer, write
from ellq.pruning.iterate_ways import Way, our_way, released_way
from ellq.pruning.iterated import Iterated, iterated
from ellq.pruning.mask_parametrization import install_
from ellq.pruning.replan import Decide
from ellq.pruning.resumable import finite_number, identity, random_state
from ellq.pruning.schedules import Schedule
from ellq.pruning.snapshot import (
    Snapshot,
    bared,
    copied_masks,
    effective_model,
    masked_model,
    nonzeros,
    require_finite,
    require_same_tensors,
)
from ellq.pruning.stopping import CAP, WARM_UP, Flow, History, Monitor, Rule, monitors_of, needs_drawn_masks, reason_of
from ellq.theory import Array
from ellq.theory.arguments import count

Train = Callable[[nn.Module, int], Any]
Evaluate = Callable[[nn.Module], Any]

RULES = ("ellq", "gharatappeh2025")
_VERSION = 1
_STAGES = {"train": 0, "evaluate": 1, "monitor": 2, "plan": 3}  # of an epoch, each with a random state of its own


class IterateError(RuntimeError):
    """An epoch failed; what came before it is kept.

    Attributes:
        iteration: in which it failed; 0 is the warm-up.
        epoch: the one that failed, from 1.
        result: model, masks and tables as they were before it.
        checkpoint: the file that holds them, from which the same call goes on; None where no folder was given.
    """

    def __init__(self, message: str, iteration: int, epoch: int, result: Iterated, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.iteration, self.epoch, self.result, self.checkpoint = iteration, epoch, result, checkpoint


def iterate(
    model: nn.Module,
    train: Train,
    evaluate: Evaluate,
    *,
    iterations: int,
    cap: int,
    sparsity: float | None = None,
    schedule: str | Schedule | None = None,
    plan_with: Mapping[str, Any] | Decide | None = None,
    rewind: str | int | None = None,
    warm_up: int = 0,
    stop: Rule | None = None,
    every: int | None = None,
    monitors: Mapping[str, Monitor] | None = None,
    reference: nn.Module | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    rule: str = "ellq",
) -> Iterated:
    """Prune a model again and again, each time going back and retraining until a rule says that it is enough.

    The dense net is trained for ``warm_up`` epochs. Then, in every iteration, the effective weights are planned to the
    schedule's sparsity and masked, what ``rewind`` says goes back, and the net is trained until ``stop`` gives a
    reason, at most ``cap`` epochs. Masks only shrink; one that would empty a layer is refused.

    Every epoch starts from nothing but tensors, masks, what ``train.state_dict()`` gave, and a random state (of torch,
    NumPy and ``random``) that follows from ``seed``, iteration and epoch. That is what a checkpoint holds, written
    whole or not at all after each epoch: a run killed at any moment and called again ends in the same bits on the CPU,
    given the same machine and number of threads. Evaluation and monitors have random states of their own, so that what
    is watched does not change what is trained. The global random states are as they were afterwards.

    ``rule="gharatappeh2025"`` is the authors' released loop: two stops, asked for every two epochs, masks by PQ index,
    weights going back to those after the warm-up, a first iteration that prunes nothing. It decides on ``sparsity``,
    ``schedule``, ``rewind`` and ``every`` itself; ``stop`` is its flow's stop, ``plan_with`` its orders ``p`` and
    ``q``. ``ellq.pruning.gharatappeh`` says which oddities it has.

    Args:
        model: what to prune, with masks or without; not changed.
        train: called as ``train(model, position)`` for one epoch in place, with a place in the learning-rate schedule
            that rewinding sets back; returns a loss or None. The model is another object at each call. What it keeps
            from call to call it must hand over by ``state_dict()``, ``load_state_dict(…)`` and ``reset()``; masks
            change the names and the order of parameters, so an optimiser's state should go by
            ``ellq.pruning.stored_tensors``. ``EpochTrainer`` makes one.
        evaluate: called as ``evaluate(model)`` with the masked model in eval mode; returns its accuracy on a
            validation split, one finite number, the higher the better.
        iterations: how often to prune and retrain, ≥ 1.
        cap: the most epochs of an iteration, ≥ 1.
        sparsity: fraction to remove at the last iteration, in (0, 1).
        schedule: ``"geometric"`` (the default), ``"cubic"`` or ``"one-shot"``, or a function of iteration, iterations
            and sparsity that returns the sparsity at that iteration, in [0, 1), rising.
        plan_with: keyword arguments for ``ellq.plan``, such as ``{"rule": "uniform"}``, by default the largest weights
            of all layers together (``{"rule": "global"}``); or a function of a plain model and the sparsity that
            returns a plan of method ``"lq"``.
        rewind: ``"warm-up"`` (the default), ``"start"``, an epoch of the warm-up, ``"none"`` or ``"rate"``; see
            ``ellq.pruning.rewinding``.
        warm_up: epochs of the dense net first, ≥ 0.
        stop: a function of a ``History`` that returns why to stop, or None; by default every iteration lasts as long as
            the cap allows. See ``ellq.pruning.stopping``.
        every: epochs between checks, at which the net is evaluated, the monitors are called and ``stop`` is asked; by
            default 1. The last epoch that the cap allows is always a check.
        monitors: more to measure at every check, by the names the tables use.
        reference: the dense net that flows and accuracy are compared with; by default the net after the warm-up, and
            the best accuracy of the warm-up.
        checkpoint: folder to keep the latest state in, as one file, and to go on from if there is one.
        seed: of every random state, ≥ 0.
        rule: ``"ellq"`` or ``"gharatappeh2025"``.

    Returns:
        The pruned model, its masks, and tables of iterations, epochs and flows.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, a schedule that falls, a model that cannot be planned; or a checkpoint
            that is damaged, or of other arguments or another model; these are compared as for ``ellq.gradual``.
        IterateError: an epoch failed: its plan, its training, its evaluation, a monitor or ``stop``; a loss, weights or
            an accuracy are not finite; or a layer would be emptied. What came before is kept.
        OSError: the folder cannot be written.

    Reference: Frankle & Carbin 2019 (arXiv 1803.03635); Gharatappeh & Yasaei Sekeh 2025 (arXiv 2501.15592).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    for name, function in {"train": train, "evaluate": evaluate}.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}.")
    if stop is not None and not callable(stop):
        raise TypeError(f"stop must be a function of a history, got {type(stop).__name__}.")
    if reference is not None and not isinstance(reference, nn.Module):
        raise TypeError(f"reference must be an nn.Module, got {type(reference).__name__}.")
    require_trainer(train)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown. Choose one of {', '.join(map(repr, RULES))}.")
    iterations = count(iterations, "iterations", low=1, high=10**6)
    warm_up, cap = count(warm_up, "warm_up", low=0, high=10**9), count(cap, "cap", low=1, high=10**9)
    seed = count(seed, "seed", low=0, high=2**63 - 1)
    given: dict[str, Any] = {"sparsity": sparsity, "schedule": schedule, "rewind": rewind, "every": every}
    make = our_way if rule == "ellq" else released_way
    way = make(model, iterations, warm_up, cap, stop, plan_with=plan_with, **given)
    bare, start = bared(model)
    watched = _named(monitors, way.stop)
    dense = None if reference is None else copied(reference)
    run = _Run(bare, train, evaluate, way, watched, warm_up, cap, seed, dense)
    arguments = {
        "version": _VERSION,
        "rule": rule,
        "iterations": iterations,
        "cap": cap,
        "warm_up": warm_up,
        **way.told,
        "every": way.every,
        "stop": identity(way.stop),
        "monitors": identity(watched),
        "reference": identity(reference),
        "seed": seed,
        "train": identity(train),
        "evaluate": identity(evaluate),
    }
    file = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
    state = None
    if file is not None:
        arguments["model"] = start.digests()
        state = read(file, arguments)
    if state is None:
        # Whether the last budget can be met is known before the dense net is trained.
        if way.hardest is not None:
            with random_state(seed, 0):
                way.plan(effective_model(bare, start), way.hardest)
        state = _started(run, start)
        if file is not None:
            write(file, state, arguments)
    else:
        give_back(train, state.kept)
    left = warm_up + iterations * cap - len(state.epochs)  # at most
    for later in track(_states(run, state, file), "pruning", total=left, describe=run.described):
        state = later
        if file is not None:
            write(file, state, arguments)
    return iterated(run.bare, state)


@dataclass(frozen=True)
class _Run:
    """What stays the same from the first epoch to the last."""

    bare: nn.Module
    train: Train
    evaluate: Evaluate
    way: Way
    monitors: Mapping[str, Monitor]
    warm_up: int
    cap: int
    seed: int
    reference: nn.Module | None

    @property
    def iterations(self) -> int:
        return len(self.way.targets) - 1

    def described(self, state: State) -> str:
        done = state.epochs[-1] if state.epochs else {"iteration": 0, "epoch": 0}
        return f"iteration {done['iteration']} of {self.iterations}, epoch {done['epoch']}"


def _started(run: _Run, start: Snapshot) -> State:
    if hasattr(run.train, "state_dict"):
        run.train.reset()  # type: ignore[attr-defined]
    return _at_point(run, State(start, kept_by(run.train)))


def _states(run: _Run, state: State, file: Path | None) -> Iterator[State]:
    """Yield the state after every step that is left."""
    while state.iteration <= run.iterations:
        try:
            state = _advance(run, state)
        except Exception as error:
            told, result = _told(error, run, state, file), iterated(run.bare, state)
            raise IterateError(told, state.iteration, state.epoch + 1, result, file) from error
        yield state


def _advance(run: _Run, state: State) -> State:
    """Return the state after one more epoch, or after a look at the dense net that is not trained."""
    began = time.perf_counter()
    if state.iteration == 0 and run.warm_up == 0:
        return _dense(run, state)
    if state.iteration > 0 and state.epoch == 0:
        state = _pruned(run, state)
    epoch = state.epoch + 1
    is_last = epoch == (run.cap if state.iteration else run.warm_up)
    work = masked_model(run.bare, state.now)
    started = time.perf_counter()
    with _random_state(run, state.iteration, epoch, "train"):
        loss = run.train(work, state.position)
    row: dict[str, Any] = {
        "iteration": state.iteration,
        "epoch": epoch,
        "position": state.position,
        "loss": None if loss is None else finite_number(loss, "train", "loss"),
        "sparsity": state.now.sparsity,
        "training_seconds": time.perf_counter() - started,
    }
    trained = Snapshot.of(work)
    require_same_tensors(state.now.tensors, trained.tensors)
    now = Snapshot(trained.tensors, state.now.masks)  # the masks of this iteration, whatever train did to them
    require_finite(effective_model(run.bare, now))
    install_(work, now.masks)
    position = state.position + 1
    state = replace(state, now=now, kept=kept_by(run.train), epoch=epoch, position=position)
    is_check = is_last or epoch % run.way.every == 0
    if is_check:
        state, seen = _looked(run, state, work.eval())
        row |= seen
    row["seconds"] = time.perf_counter() - began
    state = replace(state, epochs=(*state.epochs, row))
    if state.iteration == 0:
        state = _at_point(run, state)
        return _dense(run, state) if is_last else state
    reason = None
    if is_check and run.way.stop is not None:
        reason = reason_of(run.way.stop, _history(run, state))
    if reason is None and not is_last:
        return state
    return _over(run, state, reason or CAP)


def _dense(run: _Run, state: State) -> State:
    """Return the state with the warm-up closed: the dense net looked at, whose flows and accuracy are to be reached."""
    began = time.perf_counter()
    net = (masked_model(run.bare, state.now) if run.reference is None else run.reference).eval()
    known = [row["accuracy"] for row in state.epochs if "accuracy" in row]
    if run.reference is not None or not known:
        with _random_state(run, 0, 0, "evaluate"):
            accuracy = finite_number(run.evaluate(net), "evaluate", "accuracy")
    else:
        accuracy = max(known)
    references = {}
    with _random_state(run, 0, 0, "monitor"):
        for name, monitor in run.monitors.items():
            references[name] = _measured(name, monitor, net)
    state = replace(state, dense_accuracy=accuracy, references=references)
    if not known and run.reference is None:
        known = [accuracy]
    looking = time.perf_counter() - began
    return _over(run, state, WARM_UP, accuracy=known[-1] if known else None, seconds=looking)


def _pruned(run: _Run, state: State) -> State:
    """Return the state at the beginning of an iteration: masked anew, and gone back."""
    with _random_state(run, state.iteration, 0, "plan"):
        work = _masked_anew(run, state.now, state.iteration)
    now = Snapshot.of(work)
    emptied = next((name for name, mask in now.masks.items() if mask.numel() and not mask.any()), None)
    if emptied is not None:
        raise ValueError(f"The plan leaves nothing of {emptied!r}. Remove less, or pass least=1 in plan_with")
    back = run.way.rewinding
    if back.position is not None:
        state = replace(state, position=back.position)
    if back.epoch is not None:
        assert state.point is not None
        now = Snapshot(back.tensors(now.tensors, state.point.tensors, state.iteration), now.masks)
        state = replace(state, kept=state.point.kept)
        give_back(run.train, state.kept)
    return replace(state, now=now)


def _masked_anew(run: _Run, now: Snapshot, iteration: int) -> nn.Module:
    """Return the model with the masks that pruning for an iteration draws."""
    work = masked_model(run.bare, now)
    plan = run.way.plan(effective_model(run.bare, now), iteration)
    return work if plan is None else apply(work, plan, inplace=True)


def _looked(run: _Run, state: State, net: nn.Module) -> tuple[State, dict[str, Any]]:
    """Return the state with what a check measures, and the part of the epoch's row that tells it."""
    started = time.perf_counter()
    with _random_state(run, state.iteration, state.epoch, "evaluate"):
        seen: dict[str, Any] = {"accuracy": finite_number(run.evaluate(net), "evaluate", "accuracy")}
    evaluated = time.perf_counter()
    seen["evaluation_seconds"] = evaluated - started
    if state.iteration == 0:
        return state, seen
    with _random_state(run, state.iteration, state.epoch, "monitor"):
        vectors = {}
        for name, monitor in run.monitors.items():
            entries, vectors[name] = _measured(name, monitor, net)
            if entries != state.references[name][0]:
                raise ValueError(f"monitor {name!r} measures other pairs than on the dense net")
    state = replace(state, vectors=(*state.vectors, (state.iteration, state.epoch, vectors)))
    if needs_drawn_masks(run.way.stop):
        with _random_state(run, state.iteration, state.epoch, "plan"):
            drawn = copied_masks(_masked_anew(run, state.now, state.iteration + 1))
        if state.drawn:
            seen |= _difference(state.drawn, drawn)
        state = replace(state, drawn=drawn)
    return state, seen | {"monitoring_seconds": time.perf_counter() - evaluated}


def _over(run: _Run, state: State, reason: str, *, accuracy: float | None = None, seconds: float = 0.0) -> State:
    """Return the state with its iteration over."""
    own = [row for row in state.epochs if row["iteration"] == state.iteration]
    row = {
        "iteration": state.iteration,
        "target": run.way.targets[state.iteration],
        "sparsity": state.now.sparsity,
        "nonzeros": nonzeros(effective_model(run.bare, state.now)),
        "epochs": len(own),
        "stop": reason,
        "loss": own[-1]["loss"] if own else None,
        "accuracy": own[-1]["accuracy"] if own else accuracy,
        "seconds": sum((row["seconds"] for row in own), seconds),
    }
    return replace(state, iteration=state.iteration + 1, epoch=0, drawn={}, iterations=(*state.iterations, row))


def _history(run: _Run, state: State) -> History:
    rows = [row for row in state.epochs if row["iteration"] == state.iteration and "accuracy" in row]
    vectors = [said for iteration, _, said in state.vectors if iteration == state.iteration]
    flows = [
        Flow(monitor, _column([said[name] for said in vectors]), _column(state.references[name][1]))
        for name, monitor in run.monitors.items()
    ]
    return History(
        iteration=state.iteration,
        epochs=tuple(row["epoch"] for row in rows),
        losses=_column([row["loss"] for row in rows]),
        accuracies=_column([row["accuracy"] for row in rows]),
        dense_accuracy=state.dense_accuracy,
        mask_distances=_column([row.get("mask_distance") for row in rows]),
        mask_turnover=_column([row.get("mask_turnover") for row in rows]),
        drawn=dict(state.drawn),
        flows=tuple(flows),
    )


def _column(values: list[Any]) -> Array:
    """Return numbers as an array that cannot be changed, NaN for None."""
    column = np.array(values, dtype=np.float64)
    column.flags.writeable = False
    return column


def _measured(name: str, monitor: Monitor, net: nn.Module) -> tuple[list[str], list[float]]:
    """Return the names of a monitor's entries, and what it says of a net."""
    vector = np.asarray(monitor(net), dtype=np.float64)
    entries = [" → ".join(entry) if isinstance(entry, tuple | list) else str(entry) for entry in monitor.pairs]
    if vector.shape != (len(entries),) or not np.isfinite(vector).all():
        raise ValueError(f"monitor {name!r} gave {vector!r}, where {len(entries)} finite numbers are expected")
    return entries, [float(value) for value in vector]


def _difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how far two sets of masks differ, as shares of all entries and of those that they retain."""
    pairs = [(before[name], mask) for name, mask in after.items() if name in before]
    differing = sum(int((old ^ new).sum()) for old, new in pairs)
    entries = sum(new.numel() for _, new in pairs)
    retained = sum(int(old.sum()) + int(new.sum()) for old, new in pairs)
    return {"mask_distance": differing / max(entries, 1), "mask_turnover": differing / max(retained, 1)}


def _named(monitors: Mapping[str, Monitor] | None, stop: Rule | None) -> dict[str, Monitor]:
    """Return all monitors by name: those given, and those that the rule brings."""
    if monitors is not None and not isinstance(monitors, Mapping):
        raise TypeError(f"monitors must map names to monitors, got {type(monitors).__name__}.")
    found = dict(monitors or {})
    for monitor in monitors_of(stop):
        if any(monitor is other for other in found.values()):
            continue
        stem = str(getattr(monitor, "kind", type(monitor).__name__))
        names = [stem, *(f"{stem} {number}" for number in range(2, len(found) + 3))]
        found[next(name for name in names if name not in found)] = monitor
    for name, monitor in found.items():
        if not callable(monitor) or not hasattr(monitor, "pairs"):
            raise TypeError(f"Monitor {name!r} must be a function of a model with an attribute pairs.")
    return found


def _at_point(run: _Run, state: State) -> State:
    """Return the state with what rewinding goes back to, if it has just been reached."""
    if state.epoch != run.way.rewinding.epoch:
        return state
    return replace(state, point=Point(state.now.tensors, state.kept))


def _random_state(run: _Run, iteration: int, epoch: int, stage: str) -> AbstractContextManager[None]:
    return random_state(run.seed, iteration, epoch, _STAGES[stage])


def _told(error: Exception, run: _Run, state: State, file: Path | None) -> str:
    reason = str(error).rstrip(".") or "no message"
    where = f"Epoch {state.epoch + 1} of iteration {state.iteration} of {run.iterations}"
    if state.iteration == 0:
        where = f"Epoch {state.epoch + 1} of the warm-up" if run.warm_up else "Looking at the dense net"
    kept = (
        "is in this error's result; pass checkpoint= to keep it on disk"
        if file is None
        else f"is kept in {file}; the same call goes on from there"
    )
    return f"{where} failed with {type(error).__name__}: {reason}. The state before it {kept}."
