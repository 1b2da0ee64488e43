"""Masks as parametrisations: a weight that stays zero where its mask says so, whatever the optimiser does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_FOLLOWERS = "ellq_followers"  # of a masked weight: the names after it in its layer, to give it back its place


class Mask(nn.Module):
    """A parametrisation that lets the kept entries of a weight through and gives zero for the others.

    The gradient of a removed entry is exactly 0, and its stored value, NaN even, reaches nothing. It is stored all the
    same, so that the entry can come back if the mask grows.

    Attributes:
        kept: which entries are kept, boolean, of the weight's shape; a persistent buffer, so the mask is part of
            ``state_dict``.
    """

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept.to(torch.bool, copy=True))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with 0 in place of its removed entries."""
        return masked(weight, self.kept)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what to store when a weight is assigned: a copy, for torch takes over the memory of the result."""
        return weight.detach().clone()

    def extra_repr(self) -> str:
        """Say how many entries are kept."""
        return f"{int(self.kept.count_nonzero()):,} of {self.kept.numel():,} kept"


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """Return a weight with 0 where it is not kept, its dtype and every other bit as before."""
    if weight.element_size() == 1:
        # By way of float64, which holds every float exactly: not every torch can mask the smallest formats themselves.
        return torch.where(kept, weight.double(), 0.0).to(weight.dtype)
    return torch.where(kept, weight, 0.0)


def is_masked(model: nn.Module) -> bool:
    """Whether a module of the model carries one of our masks."""
    return any(isinstance(module, Mask) for module in model.modules())


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a model by the names its weights have without them; those of a shared weight once."""
    found: dict[str, Tensor] = {}
    seen: set[Mask] = set()
    for path, module in model.named_modules():
        for name, mask in _own_masks(module):
            if mask not in seen:
                seen.add(mask)
                found[_joined(path, name)] = mask.kept
    return found


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by the name it has without our masks; weights as they are stored beneath them.

    A shared tensor is listed under each of its names. Nothing is copied.
    """
    beneath = {}
    left_out = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name, _ in _own_masks(module):
            place = _joined(path, f"parametrizations.{name}")
            beneath[f"{place}.original"] = _joined(path, name)
            left_out |= {f"{place}.{i}.kept" for i, inner in enumerate(_list(module, name)) if isinstance(inner, Mask)}
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found |= dict(model.named_buffers(remove_duplicate=False))
    return {beneath.get(name, name): tensor for name, tensor in found.items() if name not in left_out}


def install_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks on weights of a model, in place of those it has; every layer that shares a weight gets its mask.

    Args:
        model: changed.
        masks: name of a weight without masks → which entries are kept, boolean, in its shape.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    holders = _holders(model)
    for name, kept in masks.items():
        path, _, local = name.rpartition(".")
        module = modules[path]
        present = dict(_own_masks(module)).get(local)
        if present is not None:
            present.kept.copy_(kept)
            continue
        weight = module._parameters[local]
        assert weight is not None
        mask = Mask(kept.to(weight.device))
        for owner, own_name in holders[id(weight)]:
            _register(owner, own_name, mask)


def remove_(model: nn.Module, *, bake: bool) -> None:
    """Take our masks off a model, with names, order and classes as they were before; other parametrisations stay.

    Args:
        model: changed.
        bake: write zeros where the masks had them; otherwise weights become what is stored beneath the masks.

    Raises:
        ValueError: a mask lies over another parametrisation, so that it cannot be taken off alone; nothing was changed.
    """
    for path, module in model.named_modules():
        for name, mask in _own_masks(module):
            if _list(module, name)[0] is not mask:
                raise ValueError(
                    f"Weight {_joined(path, name)!r} has a mask over another parametrisation. Call"
                    f" torch.nn.utils.parametrize.remove_parametrizations on its layer first."
                )
    for module in list(model.modules()):
        names = [name for name, _ in _own_masks(module)]
        for name in names:
            _unregister(module, name, bake=bake)
        if names and isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def _own_masks(module: nn.Module) -> Iterator[tuple[str, Mask]]:
    """Yield the names of a module's own weights that carry a mask, with the mask."""
    if not parametrize.is_parametrized(module):
        return
    for name, inner in cast(nn.ModuleDict, module.parametrizations).items():
        for parametrization in cast(nn.ModuleList, inner):
            if isinstance(parametrization, Mask):
                yield name, parametrization


def _list(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[name])


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return where each parameter is held, by its identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(module, parametrize.ParametrizationList):
                found.setdefault(id(parameter), []).append((module, name))
    return found


def _register(module: nn.Module, name: str, mask: Mask) -> None:
    names = list(module._parameters)
    is_first = not parametrize.is_parametrized(module)
    parametrize.register_parametrization(module, name, mask)
    vars(_list(module, name))[_FOLLOWERS] = names[names.index(name) + 1 :]
    if is_first:
        _copy_with_own_class(type(module))


def _unregister(module: nn.Module, name: str, *, bake: bool) -> None:
    inner = _list(module, name)
    if len(inner) > 1:  # others lie over the mask, and go on computing from what is stored
        if bake:
            with torch.no_grad():
                inner.original.copy_(inner[0](inner.original))
        del inner[0]
        return
    followers = vars(inner)[_FOLLOWERS]
    parametrize.remove_parametrizations(module, name, leave_parametrized=bake)
    names = list(module._parameters)
    later = next((names.index(follower) for follower in followers if follower in names), len(names) - 1)
    for moved in names[later:-1]:
        module._parameters[moved] = module._parameters.pop(moved)


def _copy_with_own_class(kind: type[nn.Module]) -> None:
    """Make copies of a parametrised module independent of it.

    The class holds the parametrised weights' properties. torch lets copies share it, and taking the parametrisation off
    one would break the others.
    """
    copied = cast(Any, kind).__deepcopy__

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        is_recurrent = isinstance(self, nn.RNNBase)
        if is_recurrent:
            memo[id(self._flat_weights)] = []  # computed tensors, which cannot be copied where a graph hangs on them
        replica = cast(nn.Module, copied(self, memo))
        own = {key: value for key, value in vars(type(self)).items() if key not in ("__dict__", "__weakref__")}
        replica.__class__ = type(type(self).__name__, type(self).__bases__, own)
        if is_recurrent:
            cast(nn.RNNBase, replica)._init_flat_weights()
        return replica

    cast(Any, kind).__deepcopy__ = deepcopy


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
