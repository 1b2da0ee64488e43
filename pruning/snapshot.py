"""A model's tensors and masks at one moment, and the models made from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ellq.analysis.digest import digest
from ellq.pruning.copied import copied
from ellq.pruning.mask_parametrization import install_, masks_of, remove_, stored_tensors


@dataclass(frozen=True)
class Snapshot:
    """All that pruning in steps hands on of a model.

    Attributes:
        tensors: parameters and buffers by name, as they are stored, entries that masks remove included.
        masks: name of each masked weight → which entries are kept, boolean, on the CPU.
    """

    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        """Copy a model's tensors and masks."""
        tensors = {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}
        return Snapshot(tensors, copied_masks(model))

    @property
    def sparsity(self) -> float:
        """The fraction that masks remove of the weights that have one."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1.0 - sum(int(mask.sum()) for mask in self.masks.values()) / total if total else 0.0

    def digests(self) -> dict[str, str]:
        """Return what identifies the tensors and masks, by name."""
        named = [*self.tensors.items(), *((f"mask of {name}", mask) for name, mask in self.masks.items())]
        return {name: f"{kind(tensor)} {digest(tensor)[:32]}" for name, tensor in named}


def bared(model: nn.Module) -> tuple[nn.Module, Snapshot]:
    """Return a copy of a model without masks and gradients, and what its tensors and masks are.

    Raises:
        ValueError: a tensor is not initialised.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"Tensor {name!r} is not initialised. Run one forward pass first.")
    bare = copied(model)
    bare.zero_grad(set_to_none=True)
    now = Snapshot.of(bare)
    remove_(bare, bake=False)
    return bare, now


def copied_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's masks, on the CPU."""
    return {name: mask.cpu().clone() for name, mask in masks_of(model).items()}


def stored_model(bare: nn.Module, now: Snapshot) -> nn.Module:
    """Return a plain model with the tensors as they are stored, entries that masks remove included."""
    model = copy.deepcopy(bare)
    tensors = stored_tensors(model)
    with torch.no_grad():
        for name, value in now.tensors.items():
            tensors[name].copy_(value)
    return model


def masked_model(bare: nn.Module, now: Snapshot) -> nn.Module:
    """Return the model with its masks on, as it is trained."""
    model = stored_model(bare, now)
    install_(model, now.masks)
    return model


def effective_model(bare: nn.Module, now: Snapshot) -> nn.Module:
    """Return a plain model with zeros in place."""
    model = masked_model(bare, now)
    remove_(model, bake=True)
    return model


def nonzeros(model: nn.Module) -> int:
    """Return how many parameters of a plain model are not 0."""
    return sum(int(parameter.detach().double().count_nonzero()) for parameter in model.parameters())


def require_finite(model: nn.Module) -> None:
    """Raise ValueError if training left parameters that are not finite, naming the first."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.detach().double()).all():
            raise ValueError(f"train left NaN or infinite entries in {name!r}")


def require_same_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Raise ValueError if training changed a tensor's shape or type, or took one away."""
    for name in [*before, *after]:
        had, has = (kind(tensors[name]) if name in tensors else "missing" for tensors in (before, after))
        if had != has:
            raise ValueError(f"train changed {name!r} from {had} to {has}, where only values may change")


def kind(tensor: Tensor) -> str:
    """Return a tensor's type and shape as text."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
