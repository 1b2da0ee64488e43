"""What a rule of iterative pruning decides: the plan of every iteration, what goes back, when to look and to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ellq.pruning.budget import BudgetError
from ellq.pruning.gharatappeh import CALL, released_plan, released_rewinding, released_stop, require_released
from ellq.pruning.plan import Plan
from ellq.pruning.replan import Decide, by_name, decider
from ellq.pruning.resumable import identity
from ellq.pruning.rewinding import Rewinding, rewinding
from ellq.pruning.schedules import Schedule, targets_of
from ellq.pruning.stopping import Rule
from ellq.theory import open_fraction
from ellq.theory.arguments import count


@dataclass(frozen=True)
class Way:
    """What a rule decides.

    Attributes:
        targets: the sparsity of every iteration, from 0, the dense net; NaN where the plan itself decides.
        plan: plans a plain model for an iteration; None where masks stay as they are. It can also be asked for the
            iteration after the last.
        rewinding: what goes back.
        stop: when to stop.
        every: epochs between checks.
        hardest: the iteration whose budget is the hardest to meet; None where that cannot be told beforehand.
        told: what it was made with.
    """

    targets: tuple[float, ...]
    plan: Callable[[nn.Module, int], Plan | None]
    rewinding: Rewinding
    stop: Rule | None
    every: int
    hardest: int | None
    told: Mapping[str, Any]


def our_way(
    model: nn.Module,
    iterations: int,
    warm_up: int,
    cap: int,
    stop: Rule | None,
    *,
    sparsity: float | None,
    schedule: str | Schedule | None,
    plan_with: Mapping[str, Any] | Decide | None,
    rewind: str | int | None,
    every: int | None,
) -> Way:
    """Return what ``rule="ellq"`` decides by the arguments of ``ellq.iterate``."""
    if sparsity is None:
        raise TypeError(
            "sparsity is missing. Pass the fraction to remove, or rule='gharatappeh2025', which decides it."
        )
    sparsity = open_fraction(sparsity, "sparsity")
    targets = (0.0, *targets_of("geometric" if schedule is None else schedule, iterations, sparsity))
    plan_with = by_name(plan_with, model)
    if plan_with is None or isinstance(plan_with, Mapping):
        plan_with = {"rule": "global"} | dict(plan_with or {})
    decide = decider(plan_with)
    # One more step that keeps the same fraction, or as little as can be, for rules that ask what would be pruned next.
    asked = (*targets, 1.0 - (1.0 - targets[-1]) ** 2 / (1.0 - targets[-2]))

    def plan(net: nn.Module, iteration: int) -> Plan | None:
        if asked[iteration] <= asked[iteration - 1]:
            return None
        try:
            return decide(net, asked[iteration])
        except BudgetError as error:
            if iteration <= iterations:
                raise
            return decide(net, error.nearest)

    back = rewinding("warm-up" if rewind is None else rewind, warm_up, cap)
    told = {"sparsity": sparsity, "targets": targets, "rewind": [back.epoch, back.position]}
    every = 1 if every is None else count(every, "every", low=1, high=10**9)
    hardest = None if callable(plan_with) else targets.index(max(targets))
    return Way(targets, plan, back, stop, every, hardest, told | {"plan_with": identity(plan_with)})


def released_way(
    model: nn.Module,
    iterations: int,
    warm_up: int,
    cap: int,
    stop: Rule | None,
    *,
    plan_with: Mapping[str, Any] | Decide | None,
    **decided: Any,
) -> Way:
    """Return what ``rule="gharatappeh2025"`` decides, which leaves less to decide by arguments."""
    orders = require_released(warm_up, cap, plan_with, decided)

    def plan(net: nn.Module, iteration: int) -> Plan | None:
        return released_plan(net, **orders) if iteration > 1 else None

    targets = (0.0, 0.0, *[math.nan] * (iterations - 1))
    told = {"plan_with": orders}
    return Way(targets, plan, released_rewinding(warm_up), released_stop(stop), CALL, None, told)
