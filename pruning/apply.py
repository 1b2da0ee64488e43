"""Carrying out a plan: masks on a model's weights, or smaller layers in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar, cast

import numpy as np
from torch import Tensor, nn

from ellq.pruning import masks
from ellq.pruning.plan import Plan
from ellq.pruning.surgery import cut_

Model = TypeVar("Model", bound=nn.Module | Mapping[str, Tensor])


def apply(model: Model, plan: Plan, *, inplace: bool = False) -> Model:
    """Carry out a plan: set weights to zero (``"lq"``) or build the smaller layers (``"id"``).

    Args:
        model: the model or state dict the plan was made for.
        plan: the plan; nothing is decided here.
        inplace: change ``model`` itself and return it, instead of a copy.

    Returns:
        A plain module of the same class, without hooks or parametrisations added; same dtype, device, mode. For a
        state dict, a state dict.

    Raises:
        TypeError: ``inplace`` on a mapping whose tensors cannot be changed, or an ``"id"`` plan on a state dict.
        ValueError: the plan is for another model; the first mismatch is named and the model is untouched.
    """
    if inplace:
        _refuse_fleeting(model)
        target = model
    elif isinstance(model, nn.Module | dict):
        target = copy.deepcopy(model)
    else:
        target = cast(Model, copy.deepcopy(dict(model)))
    if plan.method == "lq":
        masks.mask_(masks.maskable_weights(target), plan)
    elif isinstance(target, nn.Module):
        if inplace and len(plan.corrections) > 1:
            apply(target, plan)  # on a copy first: if one cut does not fit, none is made
        for correction in plan.corrections:
            cut_(target, correction)
    else:
        raise TypeError("A plan of method 'id' rebuilds layers. Pass the nn.Module, not its state dict.")
    return target


def _refuse_fleeting(model: nn.Module | Mapping[str, Tensor]) -> None:
    if isinstance(model, nn.Module):
        return
    for name in model:
        value: object = model[name]
        if value is not model[name] or (isinstance(value, np.ndarray) and not value.flags.writeable):
            raise TypeError(f"Entry {name!r} is read-only, so it cannot be changed in place. Leave out inplace=True.")
