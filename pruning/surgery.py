"""Smaller tensors in place of larger ones: slice the layer that makes units, fold the correction into its reader."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ellq.theory.arguments import Indices

if TYPE_CHECKING:
    from ellq.pruning.coupling import ChannelGroup, Member
    from ellq.pruning.plan import Correction

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHANNELWISE: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.PReLU,
)
"""Layers that treat channel by channel, or groups of channels by themselves."""
_SIDES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out", "in"),
    nn.Embedding: ("out",),
    **dict.fromkeys(CONVOLUTIONS, ("out", "in", "both")),
    **dict.fromkeys(CHANNELWISE, ("both",)),
}


def cut_(model: nn.Module, correction: Correction) -> None:
    """Remove hidden units from a model in place and install the consumer's corrected weights.

    Parameters keep their dtype, device and ``requires_grad``; they become new tensors, so an optimiser made before
    must be made again.

    Args:
        model: the model; changed.
        correction: which units stay, and what the consumer becomes.

    Raises:
        ValueError: a layer is missing, is not a plain Linear, or has other sizes than the correction was made for;
            or the corrected weights are not finite in the model's dtype; nothing was changed.
    """
    modules = dict(model.named_modules())
    producer, consumer = (_linear(modules, name) for name in (correction.producer, correction.consumer))
    kept = torch.as_tensor(correction.indices)
    if kept.numel() == 0 or int(kept.min()) < 0 or int(kept.max()) >= producer.out_features:
        raise ValueError(
            f"The correction keeps {kept.numel()} units up to number {int(kept.max()) if kept.numel() else 0}, but"
            f" {correction.producer!r} has {producer.out_features}. The plan is for another model."
        )
    needed = (consumer.out_features, kept.numel())
    if correction.weight.shape != needed or consumer.in_features != producer.out_features:
        raise ValueError(
            f"The correction's weight has shape {correction.weight.shape}, but {correction.consumer!r} needs {needed}."
            " The plan is for another model."
        )
    if (correction.bias is None) != (consumer.bias is None):
        has = "no bias" if consumer.bias is None else "a bias"
        raise ValueError(f"Layer {correction.consumer!r} has {has}, unlike in the plan. The plan is for another model.")
    weight = _tensor(correction.weight, consumer.weight)
    bias = None if correction.bias is None else _tensor(correction.bias, consumer.weight)
    if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
        raise ValueError(
            f"The corrected weights of {correction.consumer!r} exceed {consumer.weight.dtype}. Convert the model to"
            " float32 first."
        )
    producer.weight = _parameter(producer.weight.detach()[kept.to(producer.weight.device)], producer.weight)
    if producer.bias is not None:
        producer.bias = _parameter(producer.bias.detach()[kept.to(producer.bias.device)], producer.bias)
    producer.out_features = kept.numel()
    consumer.weight = _parameter(weight, consumer.weight)
    if consumer.bias is not None and bias is not None:
        consumer.bias = _parameter(bias.to(consumer.bias.dtype), consumer.bias)
    consumer.in_features = kept.numel()


def cut_channels_(model: nn.Module, cuts: Iterable[tuple[ChannelGroup, Indices]]) -> None:
    """Remove units from every layer that makes, carries or reads them, in place.

    Parameters keep their values, dtype, device and ``requires_grad``; they become new tensors, so an optimiser made
    before must be made again. Attributes such as ``out_channels`` follow; hooks and modes stay.

    Args:
        model: the model; changed.
        cuts: each group with the units it keeps, in rising order, at least one. All of them are numbered as they
            are before the call.

    Raises:
        ValueError: a layer is missing or of another type or size than the group was made for, an entry is cut
            twice, or the units are not in rising order; nothing was changed.
    """
    modules = dict(model.named_modules())
    removed: dict[tuple[str, str], list[NDArray[np.int64]]] = defaultdict(list)
    for group, kept in cuts:
        gone = _removed_units(group, kept)
        for member in group.members:
            _require_fit(modules.get(member.module), group, member)
            inputs = member.entries if member.inputs is None else member.inputs
            if member.side != "in":
                removed[member.module, "out"].append(member.entries[gone].ravel())
            if member.side != "out":
                removed[member.module, "in"].append(inputs[gone].ravel())
    stay = {
        (name, side): _stay(modules[name], side, name, np.concatenate(gone)) for (name, side), gone in removed.items()
    }
    for (name, side), entries in stay.items():
        _keep_entries_(modules[name], side, entries)


def channels(module: nn.Module, side: str) -> int:
    """How many entries a layer's channel axis has: of its inputs (``"in"``) or of its outputs."""
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, CONVOLUTIONS):
        return int(module.in_channels if side == "in" else module.out_channels)  # type: ignore[arg-type]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    return int(module.num_features)  # type: ignore[arg-type]


def _removed_units(group: ChannelGroup, kept: Indices) -> NDArray[np.int64]:
    kept = np.asarray(kept)
    rises = (
        kept.ndim == 1 and len(kept) > 0 and np.issubdtype(kept.dtype, np.integer) and bool((np.diff(kept) > 0).all())
    )
    if not rises or kept[0] < 0 or kept[-1] >= group.units:
        raise ValueError(
            f"Group {group.name!r} has {group.units} units and must keep some of them, numbered from 0 in rising order."
            f" It was asked to keep {kept.tolist()}."
        )
    return np.setdiff1d(np.arange(group.units), kept)


def _require_fit(module: nn.Module | None, group: ChannelGroup, member: Member) -> None:
    where = f"Layer {member.module!r} of group {group.name!r}"
    if module is None:
        raise ValueError(f"{where} is missing. The group is of another model.")
    # A subclass, such as a parametrised Linear, may compute something else.
    if member.side not in _SIDES.get(type(module), ()):
        raise ValueError(
            f"{where} is a {type(module).__name__}, which cannot be cut on side {member.side!r}."
            " The group is of another model."
        )
    if any(name in vars(module) for name in ("weight", "bias")):
        raise ValueError(f"{where} computes its weight from others, so it cannot be cut. Make that permanent first.")
    grouped = isinstance(module, CONVOLUTIONS) and module.groups != 1
    if grouped != (member.inputs is not None) or (grouped and member.side != "both"):
        raise ValueError(f"{where} must be cut by whole groups exactly where its groups != 1. Find the groups again.")
    sides = [("in" if member.side == "in" else "out", member.entries)]
    if member.inputs is not None:
        sides.append(("in", member.inputs))
    for side, entries in sides:
        size = channels(module, side)
        if entries.ndim != 2 or len(entries) != group.units or entries.size == 0:
            raise ValueError(
                f"{where} has entries of shape {entries.shape}, expected ({group.units}, entries of a unit)."
            )
        if entries.min() < 0 or entries.max() >= size or len(np.unique(entries)) != entries.size:
            raise ValueError(
                f"{where} has {size} channels ({side}), but its entries go from {entries.min()} to {entries.max()},"
                " each of which may be there once. The group is of another model."
            )
    if member.inputs is not None:
        _require_same_groups(module, where, member)


def _stay(module: nn.Module, side: str, name: str, gone: NDArray[np.int64]) -> Tensor:
    """Return the entries that stay; refuse entries cut twice, layers left empty and torn groups."""
    size = channels(module, side)
    if len(np.unique(gone)) != len(gone):
        raise ValueError(f"Layer {name!r} would lose the same channel twice ({side}). Pass disjoint groups.")
    if len(gone) == size:
        raise ValueError(f"Layer {name!r} would lose all of its {size} channels ({side}). Keep some.")
    if isinstance(module, nn.GroupNorm) or (isinstance(module, CONVOLUTIONS) and module.groups != 1):
        groups = int(module.num_groups if isinstance(module, nn.GroupNorm) else module.groups)  # type: ignore[arg-type]
        lost = np.bincount(gone * groups // size, minlength=groups)
        if not np.isin(lost, (0, size // groups)).all():
            raise ValueError(f"Layer {name!r} would lose part of one of its {groups} groups. Cut whole groups.")
    return torch.from_numpy(np.setdiff1d(np.arange(size), gone))


def _require_same_groups(module: nn.Module, where: str, member: Member) -> None:
    """Refuse units of a grouped convolution whose inputs and outputs lie in different conv groups."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    assert member.inputs is not None
    made = member.entries // (module.out_channels // module.groups)
    read = member.inputs // (module.in_channels // module.groups)
    if any(set(a) != set(b) for a, b in zip(made.tolist(), read.tolist(), strict=True)):
        raise ValueError(
            f"{where} has units whose inputs are in other conv groups than their outputs. Find them again."
        )


def _keep_entries_(module: nn.Module, side: str, kept: Tensor) -> None:
    if isinstance(module, CHANNELWISE):
        if side == "in":
            return  # its inputs are its outputs
        _keep_channelwise_(module, kept)
    elif isinstance(module, nn.Embedding):
        module.weight = _kept(module.weight, kept, 1)
        module.embedding_dim = len(kept)
    elif isinstance(module, nn.Linear):
        module.weight = _kept(module.weight, kept, 1 if side == "in" else 0)
        if side == "in":
            module.in_features = len(kept)
            return
        module.out_features = len(kept)
        if module.bias is not None:
            module.bias = _kept(module.bias, kept, 0)
    else:
        assert isinstance(module, nn.modules.conv._ConvNd)
        _keep_convolution_(module, side, kept)


def _keep_convolution_(module: nn.modules.conv._ConvNd, side: str, kept: Tensor) -> None:
    if side == "in":
        if module.groups == 1:  # a grouped convolution's weight has no axis of all inputs
            module.weight = _kept(module.weight, kept, 1)
        else:
            module.groups = len(kept) * module.groups // module.in_channels
        module.in_channels = len(kept)
        return
    module.weight = _kept(module.weight, kept, 0)
    module.out_channels = len(kept)
    if module.bias is not None:
        module.bias = _kept(module.bias, kept, 0)


def _keep_channelwise_(module: nn.Module, kept: Tensor) -> None:
    before = channels(module, "out")
    for name, value in module.named_parameters(recurse=False):
        setattr(module, name, _kept(value, kept, 0))
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.ndim == 1:  # not the count of batches
            setattr(module, name, buffer[kept.to(buffer.device)].clone())
    if isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(kept) // before
        module.num_channels = len(kept)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(kept)
    else:
        module.num_features = len(kept)  # type: ignore[assignment]


def _kept(parameter: Tensor, kept: Tensor, axis: int) -> nn.Parameter:
    return _parameter(parameter.detach().index_select(axis, kept.to(parameter.device)), parameter)


def _linear(modules: dict[str, nn.Module], name: str) -> nn.Linear:
    module = modules.get(name)
    if type(module) is not nn.Linear:  # a subclass, such as a parametrised Linear, may compute something else
        found = "is missing" if module is None else f"is a {type(module).__name__}"
        raise ValueError(f"Layer {name!r} {found}, expected a plain Linear. The plan is for another model.")
    return module


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.clone(), requires_grad=like.requires_grad)


def _tensor(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)
