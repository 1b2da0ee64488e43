"""Carrying out a plan: masks on a model's weights, or smaller layers in their place; and baking the masks in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ellq.pruning import masks
from ellq.pruning.copied import copied
from ellq.pruning.mask_parametrization import install_, is_masked, masked, masks_of, remove_, stored_tensors
from ellq.pruning.plan import Plan
from ellq.pruning.surgery import cut_, cut_channels_

Model = TypeVar("Model", bound=nn.Module | Mapping[str, Tensor])
Module = TypeVar("Module", bound=nn.Module)


def apply(model: Model, plan: Plan, *, inplace: bool = False, regrow: bool = False) -> Model:
    """Carry out a plan: mask weights (``"lq"``) or build the smaller layers (``"id"``).

    In a module the masks are parametrisations (``torch.nn.utils.parametrize``): a removed weight reads as exactly 0
    and has a gradient of exactly 0, whatever an optimiser does to what is stored beneath; masks are part of
    ``state_dict`` and of copies; parameters stay the same objects, so an optimiser made before goes on. ``finalize``
    bakes them in. In a state dict zeros are put in place at once.

    Masks of a model that has some already intersect with the new ones: an entry once removed stays removed.

    Args:
        model: the model or state dict the plan was made for.
        plan: the plan; nothing is decided here. Its ``values`` are written in.
        inplace: change ``model`` itself and return it, instead of a copy.
        regrow: let the plan's masks replace those that are there; entries that come back have their stored values.

    Returns:
        The masked model, or for ``"id"`` a plain one of the same class; same dtype, device, mode. For a state dict, a
        state dict.

    Raises:
        TypeError: ``inplace`` on a mapping whose tensors cannot be changed, or an ``"id"`` plan on a state dict.
        ValueError: the plan is for another model, a layer is parametrised by others or not initialised, values are not
            finite in the model's dtype, or an ``"id"`` plan meets masks; the first mismatch is named and the model is
            untouched.
    """
    if inplace:
        _refuse_fleeting(model)
    if plan.method == "lq":
        return _apply_masks(model, plan, inplace=inplace, regrow=regrow)
    if not isinstance(model, nn.Module):
        raise TypeError("A plan of method 'id' rebuilds layers. Pass the nn.Module, not its state dict.")
    if is_masked(model):
        name = next(iter(masks_of(model)))
        raise ValueError(f"Weight {name!r} carries a mask, and layers are cut without. Call ellq.finalize first.")
    target = model if inplace else copy.deepcopy(model)
    if inplace and (plan.cuts or len(plan.corrections) > 1):
        apply(target, plan)  # on a copy first: if one cut does not fit, none is made
    for correction in plan.corrections:
        cut_(target, correction)
    if plan.cuts:
        _cut_channels_(target, plan)
    return target


def finalize(model: Module, *, inplace: bool = False) -> Module:
    """Bake the masks of ``apply`` in: zeros in place, and a plain module again.

    Classes, parameter names and their order, ``requires_grad``, shared weights, training flags and hooks are those the
    model had before ``apply``; parametrisations of others are left alone.

    Args:
        model: a model with or without masks.
        inplace: change ``model`` itself and return it, instead of a copy.

    Returns:
        The model without masks, which computes the same; one that had none comes back as it was.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a mask lies over another parametrisation; the model is untouched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}. Pass the masked module.")
    target = model if inplace else copied(model)
    remove_(target, bake=True)
    return target


def _cut_channels_(model: nn.Module, plan: Plan) -> None:
    cut_channels_(model, [(one.group, one.kept) for one in plan.cuts])
    _refuse_unfit(model, plan)
    _write(model.state_dict(), plan, {})


def _apply_masks(model: Model, plan: Plan, *, inplace: bool, regrow: bool) -> Model:
    plain: nn.Module | Mapping[str, Tensor] = model
    present: dict[str, Tensor] = {}
    if isinstance(model, nn.Module) and is_masked(model):
        present = masks_of(model)
        plain = copied(model)
        remove_(plain, bake=not regrow)
    weights = masks.maskable_weights(plain)
    kept = masks.retained_entries(weights, plan)
    _refuse_unfit(plain, plan)
    _refuse_unmaskable(plain, [weight for weight in weights if weight.name in kept])
    if not regrow:
        kept = {name: mask & present[name].cpu() if name in present else mask for name, mask in kept.items()}
    if inplace:
        target = model
    elif isinstance(model, nn.Module):
        target = copied(model)
    elif isinstance(model, dict):
        target = copy.deepcopy(model)
    else:
        target = cast(Model, copy.deepcopy(dict(model)))
    if isinstance(target, nn.Module):
        _write(stored_tensors(target), plan, {name: mask for name, mask in kept.items() if name in plan.values})
        install_(target, kept)
        return target
    tensors = {name: _tensor(target[name]) for name in {*kept, *plan.values}}
    _write(tensors, plan, {})
    with torch.no_grad():
        for name, mask in kept.items():
            tensors[name].copy_(masked(tensors[name], mask.to(tensors[name].device)))
    return target


def _write(tensors: Mapping[str, Tensor], plan: Plan, kept: Mapping[str, Tensor]) -> None:
    """Write the plan's values in; where a mask is given, only what it keeps."""
    with torch.no_grad():
        for name, value in plan.values.items():
            tensor = tensors[name]
            new = _tensor(value).to(tensor.device, tensor.dtype)
            mask = kept.get(name)
            tensor.copy_(new if mask is None else torch.where(mask.to(tensor.device), new, tensor))


def _refuse_unfit(model: nn.Module | Mapping[str, Tensor], plan: Plan) -> None:
    """Refuse values of a plan that have no tensor of their shape in the model, or are not finite in its dtype."""
    stray = next((name for name in plan.kept if name not in set(plan.table["layer"])), None)
    if stray is not None:
        raise ValueError(f"The plan keeps entries of {stray!r}, which its table lacks. Make a new plan.")
    tensors = stored_tensors(model) if isinstance(model, nn.Module) else model
    for name, value in plan.values.items():
        if name not in tensors:
            raise ValueError(f"The plan is for another model: it has a value for {name!r}, which the model lacks.")
        tensor = _tensor(tensors[name])
        if value.shape != tuple(tensor.shape):
            raise ValueError(
                f"The plan is for another model: {name!r} has shape {tuple(tensor.shape)}, the plan's value"
                f" {value.shape}."
            )
        if not torch.isfinite(_tensor(value).to(tensor.dtype).double()).all():
            raise ValueError(
                f"The plan's value for {name!r} is not finite in {tensor.dtype}. Convert the model to float32 first."
            )


def _refuse_unmaskable(model: nn.Module | Mapping[str, Tensor], weights: list[masks.Maskable]) -> None:
    for weight in weights:
        if torch.zeros(1).to(weight.tensor.dtype).double().any():
            raise ValueError(
                f"Weight {weight.name!r} is of type {weight.tensor.dtype}, which has no zero. Convert the model first."
            )
    names = {id(weight.tensor): weight.name for weight in weights}
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or id(module.weight) not in names:
            continue
        for option in ("sparse", "max_norm"):  # both reach past what computes the weight
            if getattr(module, option):
                raise ValueError(
                    f"Weight {names[id(module.weight)]!r} is shared with embedding {path!r}, whose {option}="
                    f"{getattr(module, option)} cannot go with a mask. Switch it off first."
                )


def _tensor(value: Tensor | np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    """Return the tensor itself, or one that shares an array's memory where that can be written to."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.require(value, requirements="W"))


def _refuse_fleeting(model: nn.Module | Mapping[str, Tensor]) -> None:
    if isinstance(model, nn.Module):
        return
    for name in model:
        value: object = model[name]
        if value is not model[name] or (isinstance(value, np.ndarray) and not value.flags.writeable):
            raise TypeError(f"Entry {name!r} is read-only, so it cannot be changed in place. Leave out inplace=True.")
