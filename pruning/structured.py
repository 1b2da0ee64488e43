"""Fewer channels in every layer of a deep network: which stay, how many, and what the layers that read them become."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ellq.pruning.budget import BudgetError
from ellq.pruning.channel_checkpoint import ChannelCheckpoint
from ellq.pruning.channel_curves import Curve, OutputError, measured_curves
from ellq.pruning.channel_features import accumulate, fold_, magnitudes, select, zero_
from ellq.pruning.channel_refit import refit_in_order
from ellq.pruning.coupling import ChannelGroup
from ellq.pruning.widths import CostModel, choose_widths
from ellq.theory import RULES as FEATURE_RULES
from ellq.theory import Array
from ellq.theory.arguments import Indices

SELECTIONS = ("elimination", *FEATURE_RULES, "magnitude")
CHANNEL_REFITS = ("joint", "sequential", "fold", "none")
_IN_ORDER = ("joint", "sequential")
_BISECTIONS = 6  # of a tolerance of the outputs: the cost is found to 1/64 of the dense
_TRUSTED = 16.0  # a new measurement up to this factor from what was known
_PROBE = 256  # calibration inputs on which outputs are looked at where one group is cut
_JUDGED = 1024  # those by which one of several networks is chosen


@dataclass(frozen=True)
class Way:
    """How units are chosen and what reads them is refitted.

    Attributes:
        selection: ``"elimination"`` (by what the readers lose, on what the layers before leave), a rule of
            ``ellq.theory.RULES`` on the dense network's features where they are read, or ``"magnitude"``.
        refit: ``"sequential"`` (every layer, in order, to the dense network's outputs), ``"joint"`` (also each together
            with the layer that alone makes what it reads), ``"fold"`` (the interpolation of features folded into the
            readers), or ``"none"``.
        seed: of the positions that are looked at.
        checkpoint: keeps curves and layers that are done.
    """

    selection: str = "elimination"
    refit: str = "joint"
    seed: int = 0
    checkpoint: ChannelCheckpoint | None = None


@dataclass(frozen=True)
class Narrowed:
    """A network of full size in which readers have weights of 0 for the units that go.

    Attributes:
        model: the network.
        kept: which units each group that is cut keeps, by name, rising.
        reasons: why that many, by name.
    """

    model: nn.Module
    kept: Mapping[str, Indices]
    reasons: Mapping[str, str] = field(default_factory=dict)


def narrow_to(
    dense: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    widths: Mapping[str, int],
    way: Way,
    *,
    preferred: Mapping[str, Indices] | None = None,
    stage: str = "refit",
) -> Narrowed:
    """Choose units for given widths and refit what reads them.

    Args:
        dense: the network, in eval mode; not changed.
        groups: what may be cut.
        batches: calibration inputs.
        widths: how many units each group keeps, by name.
        way: how.
        preferred: for elimination, the units of groups that several layers read.
        stage: under which name the checkpoint keeps layers.
    """
    selection, refit = way.selection, way.refit
    saved: dict[str, Any] = {"seed": way.seed, "checkpoint": way.checkpoint, "stage": stage}
    saved["together"] = refit == "joint"
    groups = [group for group in groups if widths[group.name] < group.units]
    if selection == "elimination" and refit in _IN_ORDER:
        return Narrowed(*refit_in_order(dense, groups, widths, preferred or {}, batches, **saved))
    changing = copy.deepcopy(dense)
    kept: dict[str, Indices] = {}
    if selection in FEATURE_RULES:
        others = [(group, member) for group in groups if refit == "fold" for member in group.consumers[1:]]
        views = [
            replace(group, name=f"{group.name} in {member.module}", members=(*group.producers, member))
            for group, member in others
        ]
        triangles = accumulate(dense, [*groups, *views], batches)
    for group in groups:
        k = widths[group.name]
        if selection == "magnitude":
            kept[group.name] = np.sort(np.argsort(-magnitudes(dense, group), kind="stable")[:k])
        elif selection == "elimination":
            kept[group.name] = (preferred or {})[group.name]
        else:
            chosen = select(dense, group, triangles[group.name], FEATURE_RULES[selection], k)
            kept[group.name] = np.sort(chosen.indices)
            if refit == "fold":
                elsewhere = {
                    member.module: triangles[view.name]
                    for (owner, member), view in zip(others, views, strict=True)
                    if owner is group
                }
                fold_(changing, group, triangles[group.name], chosen, elsewhere=elsewhere)
        if refit == "none":
            zero_(changing, group, kept[group.name])
    if refit in _IN_ORDER:
        return Narrowed(*refit_in_order(dense, groups, widths, kept, batches, chooses=False, **saved))
    return Narrowed(changing, kept)


def narrow_within(
    dense: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    cost: CostModel,
    budget: float,
    way: Way,
    *,
    round_to: int = 1,
    least: int = 1,
    rounds: int = 1,
) -> Narrowed:
    """Choose the widths too: those that lose least of the outputs within a budget.

    What narrower layers lose is measured (see ``measured_curves``) and traded by error per cost (``choose_widths``). In
    the rounds after the first it is measured anew in the best network so far; widths are then chosen by the geometric
    mean with what was known, units of groups that several layers read by the new measurement alone. What loses least of
    the outputs, on up to 1024 calibration inputs, is returned.
    """
    probe, outputs = output_probe(batches), OutputError(dense, output_probe(batches, _JUDGED))
    saved: dict[str, Any] = {"seed": way.seed, "checkpoint": way.checkpoint}
    every = {group.name: np.arange(group.units) for group in groups}
    best, least_error = Narrowed(dense, {}), math.inf
    errors: dict[str, Array] = {}
    for number in range(1, rounds + 1):
        kept = every | dict(best.kept)
        curves = measured_curves(dense, best.model, groups, kept, batches, probe, stage=f"curves {number}", **saved)
        errors = {name: _joined(errors.get(name), curve, len(kept[name])) for name, curve in curves.items()}
        widths = choose_widths(errors, cost, budget=budget, round_to=round_to, least=least)
        preferred = {name: curve.path.retained(widths[name]) for name, curve in curves.items()}
        found = narrow_to(dense, groups, batches, widths, way, preferred=preferred, stage=f"refit {number}")
        error = outputs.of(found.model) if rounds > 1 else 0.0
        if error < least_error:
            best, least_error = found, error
    reasons = dict.fromkeys(best.kept, f"least loss of outputs per {cost.quantity}")
    return replace(best, reasons=reasons)


def _joined(known: Array | None, curve: Curve, width: int) -> Array:
    """Return what is taken to be lost, from what was known and a new measurement at the present width."""
    if known is None:
        return curve.errors
    if width == 1:  # there is no narrower one to be measured
        return known
    return np.sqrt(known * np.clip(curve.errors, known / _TRUSTED, known * _TRUSTED))


def narrow_by_tolerance(
    dense: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    tol: float,
    way: Way,
    *,
    cost: CostModel | None = None,
    round_to: int = 1,
    least: int = 1,
) -> Narrowed:
    """Choose the widths by the error that is allowed.

    Args:
        dense: the network, in eval mode; not changed.
        groups: what may be cut.
        batches: calibration inputs.
        tol: the relative error, root mean square, on them: of what reads each group, or with a cost of the outputs.
        way: how units are chosen.
        cost: what is made small, by bisection, as far as the outputs' error allows.
        round_to: widths are multiples of it, except where all units stay.
        least: how many units a group keeps at least.
    """
    every = {group.name: np.arange(group.units) for group in groups}
    probe = [] if cost is None else output_probe(batches)
    saved: dict[str, Any] = {"seed": way.seed, "checkpoint": way.checkpoint}
    curves = measured_curves(dense, dense, groups, every, batches, probe, **saved)

    def at(widths: Mapping[str, int], number: int = 0) -> Narrowed:
        preferred = {name: curve.path.retained(widths[name]) for name, curve in curves.items()}
        return narrow_to(dense, groups, batches, widths, way, preferred=preferred, stage=f"refit {number}")

    if cost is None:
        widths = {}
        for group in groups:
            k = int(np.argmax(curves[group.name].errors <= tol**2))  # never rising, and 0 with all units
            widths[group.name] = min(group.units, math.ceil(max(k, least) / round_to) * round_to)
        return at(widths)
    errors = {name: curve.errors for name, curve in curves.items()}
    outputs = OutputError(dense, batches, centred=False)
    best, low, high = Narrowed(dense, {}), 0.0, 1.0
    for number in range(_BISECTIONS):
        middle = (low + high) / 2
        try:
            found = at(choose_widths(errors, cost, budget=middle, round_to=round_to, least=least), number)
        except BudgetError:
            low = middle
            continue
        if outputs.of(found.model) <= tol**2:
            best, high = found, middle
        else:
            low = middle
    return best


def uniform_widths(
    groups: Sequence[ChannelGroup], cost: CostModel, budget: float, *, least: int = 1, round_to: int = 1
) -> dict[str, int]:
    """Return the largest widths that are the same fraction of every group, rounded down, within a budget."""

    def at(fraction: float) -> dict[str, int]:
        return {g.name: rounded_width(fraction * g.units, g.units, round_to, least) for g in groups}

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.cost(at(middle)) <= budget * cost.dense else (low, middle)
    return at(low)


def rounded_width(width: float, units: int, round_to: int, least: int) -> int:
    """Return a width rounded down to a multiple, at least ``least`` and at most all units."""
    return min(units, max(math.floor(width / round_to + 1e-9) * round_to, math.ceil(least / round_to) * round_to))


def output_probe(batches: Sequence[Tensor], count: int = _PROBE) -> list[Tensor]:
    """Return the first calibration inputs, on which outputs are looked at."""
    found: list[Tensor] = []
    for batch in batches:
        if count > 0:
            found.append(batch[:count])
            count -= len(batch)
    return found
