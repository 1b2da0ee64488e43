"""Planning anew at every step of pruning that goes in steps: by arguments of ``ellq.plan``, or by a function."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ellq.pruning.budget import KINDS
from ellq.pruning.plan import Plan
from ellq.pruning.prune import plan
from ellq.pruning.refit import CHOOSING

Decide = Callable[[nn.Module, float], Plan]


def by_name(plan_with: Mapping[str, Any] | Decide | None, model: nn.Module) -> Mapping[str, Any] | Decide | None:
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


def decider(plan_with: Mapping[str, Any] | Decide | None, *, regrow: bool | None = None) -> Decide:
    """Return the function of a plain model and a sparsity that plans it.

    Args:
        plan_with: arguments of ``ellq.plan`` other than a budget, or such a function.
        regrow: whether entries removed earlier may come back; None where there is no such choice.

    Raises:
        TypeError: it is neither, or holds an iterator, which the first step would use up.
        ValueError: it holds a budget, or without ``regrow`` a refit that brings entries back.
    """
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
            otherwise = "" if regrow is None else ", or pass regrow=True"
            raise ValueError(
                f"plan_with holds refit={options['refit']!r}, which may bring removed entries back, but masks only"
                f" shrink. Use refit='least_squares'{otherwise}."
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
            raise ValueError(f"The plan is of method {found.method!r}, but pruning in steps masks. Use method 'lq'.")
        return found

    return decide
