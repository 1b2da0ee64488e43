"""The plan of a network with fewer units: hidden units of Linear chains, or channels of any layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ellq.analysis import Calibration, as_batches
from ellq.pruning.apply import apply
from ellq.pruning.budget import COSTS, Budget
from ellq.pruning.guarantee import guarantee
from ellq.pruning.hidden_layers import hidden_layers
from ellq.pruning.hidden_units import plan_hidden_units
from ellq.pruning.mask_parametrization import is_masked
from ellq.pruning.plan import Plan
from ellq.pruning.plan_channels import plan_channels


def plan_units(
    model: nn.Module | Mapping[str, Tensor],
    calibration: Calibration | None,
    *,
    budget: Budget,
    rule: str,
    held_out: Calibration | None,
    delta: float,
    refit: str,
    for_channels: Mapping[str, Any],
) -> Plan:
    """Plan ``method="id"``; see ``ellq.plan``.

    Args:
        model: the model.
        calibration: inputs.
        budget: what is limited.
        rule: the rule.
        held_out: inputs for a guarantee.
        delta: probability with which it may fail.
        refit: ``"auto"``, or one of channels.
        for_channels: what only channels take; None for what was not given.
    """
    if not isinstance(budget.value, float):
        raise ValueError(f"{budget.kind}= is a budget of method='lq'. Give flops=, sparsity=, one number, or tol=.")
    if not isinstance(model, nn.Module):
        raise TypeError("method='id' runs the model on data. Pass the nn.Module, not its state dict.")
    if calibration is None:
        raise ValueError("method='id' needs calibration inputs. Pass a tensor or batches as the second argument.")
    if is_masked(model):
        raise ValueError("The model carries masks, and method='id' cuts layers without. Call ellq.finalize first.")
    batches = as_batches(calibration)
    given = {name: value for name, value in for_channels.items() if value is not None}
    if budget.kind in COSTS or rule == "chee2022" or given or refit != "auto" or not _has_hidden_layers(model):
        if held_out is not None:
            raise ValueError(
                "held_out= makes a guarantee for the hidden units of one Linear chain, not for channels. Leave it out."
            )
        if refit != "auto":
            given["refit"] = refit
        with torch.random.fork_rng(devices=[]):  # a shuffling DataLoader draws from the global random state
            held = list(batches)
        return plan_channels(model, held, budget=budget.kind, value=budget.value, rule=rule, **given)
    by_tol = budget.kind == "tol"
    decided = plan_hidden_units(
        model,
        batches,
        sparsity=None if by_tol else budget.value,
        tol=budget.value if by_tol else None,
        rule=rule,
    )
    if held_out is None and (not by_tol or len(decided.corrections) > 1):
        return decided
    with torch.random.fork_rng(devices=[]):  # a shuffling DataLoader draws from the global random state
        found = guarantee(model, apply(model, decided), decided, batches, held_out, delta=delta)
    return replace(decided, guarantee=found)


def _has_hidden_layers(model: nn.Module) -> bool:
    try:
        return bool(hidden_layers(model))
    except ValueError:  # cannot be traced symbolically; channels are followed otherwise
        return False
    except RuntimeError:  # cannot be copied, which plan_hidden_units explains
        return True
