"""Unit-by-unit magnitude masks: which weights can be masked, and setting all but the largest of each unit to zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ellq.analysis import from_unit_rows, to_unit_rows, transposed_groups, weight_matrices
from ellq.analysis.weights import Weights
from ellq.pruning.largest import keep_largest as keep_largest
from ellq.pruning.largest import survey
from ellq.pruning.mask_parametrization import is_masked, masked
from ellq.pruning.plan import Plan
from ellq.theory import Array, refuse_nonfinite

_MASKABLE = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class Maskable:
    """A weight tensor whose entries may be set to zero.

    Attributes:
        name: its name in the model or state dict.
        tensor: the tensor itself, not a copy.
        groups: of a transposed convolution, whose units lie along the second axis; 0 for all others.
        obstacle: why it cannot be masked and what to do; empty where it can. Of a weight that is computed from other
            tensors, ``tensor`` is one of those.
    """

    name: str
    tensor: Tensor
    groups: int
    obstacle: str = ""

    def units(self) -> Array:
        """Return the weights as float64, one unit per row; raises ValueError if one is NaN or infinite."""
        array: Array = self.tensor.detach().to("cpu", torch.float64).numpy()
        refuse_nonfinite(array, f"Weight {self.name!r}")
        return to_unit_rows(array, self.groups)

    def layer(self, values: Tensor | None = None) -> Tensor:
        """Return the weights, or other values in their shape, with units along the first axis; a view if possible."""
        values = self.tensor.detach() if values is None else values
        if not self.groups:
            return values
        inputs, *rest = values.shape
        return values.reshape(self.groups, inputs // self.groups, *rest).transpose(1, 2).flatten(0, 1)


def maskable_weights(source: nn.Module | Mapping[str, Tensor]) -> list[Maskable]:
    """Return the weights a mask acts on, a shared one once; those that it cannot act on yet with the obstacle.

    Of a model: the weights of linear, convolutional, recurrent and attention layers; embeddings and norms are left
    alone, for they are looked up or scale, not summed. Of a state dict: every weight ``ellq.measure`` finds.

    Obstacles: a weight is quantised, sparse, complex, computed from others (parametrised, masked, normalised), or lies
    in the same memory as another tensor without being the same. ``refuse_blocked`` raises them.

    Args:
        source: a model or state dict; only looked at.

    Returns:
        The weights, in the source's order.

    Raises:
        TypeError: ``source`` is neither.
        ValueError: no such weight, a quantised layer, or what ``ellq.measure`` refuses.
    """
    if isinstance(source, nn.Module):
        refuse_quantised(source)
    found = weight_matrices(source)  # refuses what cannot be measured, before anything is planned
    weights = list(_of_layers(source) if isinstance(source, nn.Module) else _of_state_dict(source, found))
    if not weights:
        raise ValueError("The model holds no prunable layer: no linear, convolutional, recurrent or attention weight.")
    for i, weight in enumerate(weights):
        if not weight.obstacle and (
            weight.tensor.is_quantized or weight.tensor.layout != torch.strided or weight.tensor.is_complex()
        ):
            obstacle = f"Weight {weight.name!r} is quantised, sparse or complex. Mask a plain dense real one."
            weights[i] = replace(weight, obstacle=obstacle)
    named = [(weight.name, weight.tensor) for weight in weights]
    if isinstance(source, nn.Module):
        named = [*source.named_parameters(), *source.named_buffers()]
    return _with_shared_memory(weights, named)


def refuse_blocked(weights: Sequence[Maskable]) -> None:
    """Raise ValueError with the first obstacle that weights have."""
    for weight in weights:
        if weight.obstacle:
            raise ValueError(weight.obstacle)


def _of_layers(model: nn.Module) -> Iterator[Maskable]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, _MASKABLE):
            continue
        prefix = f"{path}." if path else ""
        own = dict(module.named_parameters(recurse=False))
        obstacle = _obstacle(module, path or type(module).__name__, own)
        for name, parameter in (_computed_from(module, own) if obstacle else own).items():
            if parameter.ndim >= 2 and not name.startswith("bias") and id(parameter) not in seen:
                seen.add(id(parameter))
                groups = transposed_groups(module) if name == "weight" else 0
                yield Maskable(prefix + name, parameter, groups, obstacle)


def _computed_from(module: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's weights by the names of what is computed, each as one of the tensors it comes from."""
    found = {name.removesuffix("_orig").removesuffix("_v"): own[name] for name in own if not name.endswith("_g")}
    if parametrize.is_parametrized(module):
        for name, inner in cast(nn.ModuleDict, module.parametrizations).items():
            found[name] = next(inner.parameters(recurse=False))
    return found


def _of_state_dict(state: Mapping[str, Tensor], found: Weights) -> Iterator[Maskable]:
    computed = [name for name in found.skipped if "parametrizations" in name.split(".") or f"{name}_orig" in state]
    for name in [*found.names, *computed]:
        if name in state and name not in computed:
            yield Maskable(name, _as_tensor(state[name]), 0)
            continue
        obstacle = f"Weight {name!r} is computed from other tensors (a mask or a reparametrisation). Bake it in first."
        part = next(key for key in state if key == name or key.startswith(f"{name}_"))
        yield Maskable(name, _as_tensor(state[part]), 0, obstacle)


def _with_shared_memory(weights: Sequence[Maskable], tensors: Iterable[tuple[str, Tensor]]) -> list[Maskable]:
    """Return weights with an obstacle where they share memory with another tensor, which their masks would not reach.

    Args:
        weights: those to look at.
        tensors: name and tensor of all that may share memory with them, the weights included.
    """
    places = sorted(
        ((str(tensor.device), *_span(tensor), name, tensor) for name, tensor in tensors if _has_memory(tensor)),
        key=lambda place: place[:3],
    )
    sharing: dict[int, str] = {}
    open_: list[tuple[str, int, int, str, Tensor]] = []  # those that reach as far as the one at hand
    for place in places:
        device, start, _, name, tensor = place
        open_ = [other for other in open_ if other[0] == device and other[2] > start]
        for *_, other_name, other in open_:
            if _overlap(other, tensor):
                sharing.setdefault(id(tensor), other_name)
                sharing.setdefault(id(other), name)
        open_.append(place)
    return [
        replace(
            weight,
            obstacle=f"Weight {weight.name!r} shares memory with {sharing[id(weight.tensor)]!r} without being the same"
            " tensor, so a mask would reach one alone. Make them one parameter, or clone one.",
        )
        if id(weight.tensor) in sharing and not weight.obstacle
        else weight
        for weight in weights
    ]


def _has_memory(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and not tensor.is_meta and tensor.layout == torch.strided and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses from a tensor's first entry to the end of its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have an entry in common, given that their spans do; interleaved ones need not."""
    if first.is_contiguous() and second.is_contiguous():
        return True
    width = first.element_size()
    (start, end), (other, other_end) = _span(first), _span(second)
    low = min(start, other)
    if second.element_size() != width or (other - start) % width:
        return True
    marks = torch.zeros((max(end, other_end) - low) // width, dtype=torch.bool)
    marks.as_strided(first.shape, first.stride(), (start - low) // width).fill_(True)
    return bool(marks.as_strided(second.shape, second.stride(), (other - low) // width).any())


def refuse_quantised(model: nn.Module) -> None:
    """Refuse a model with a quantised layer, by name."""
    for path, module in model.named_modules():
        kind = type(module)
        is_packed = hasattr(module, "_packed_params") or hasattr(module, "_all_weight_values")
        if kind.__module__.startswith("torch.ao.nn.quantized") and is_packed and "Embedding" not in kind.__name__:
            raise ValueError(f"Layer {path!r} is quantised. Prune the float model, then quantise it.")


def refuse_computed(module: nn.Module, path: str, own: Mapping[str, Tensor]) -> None:
    """Refuse a layer whose weight is computed from other tensors, with the call that bakes it in."""
    obstacle = _obstacle(module, path, own)
    if obstacle:
        raise ValueError(obstacle)


def _obstacle(module: nn.Module, path: str, own: Mapping[str, Tensor]) -> str:
    """Return that a layer's weight is computed from other tensors, and the call that bakes it in; else nothing."""
    problem, remedy = "", ""
    if is_masked(module):
        return f"Layer {path!r} carries a mask already. Call ellq.finalize first."
    if parametrize.is_parametrized(module):
        problem, remedy = "is parametrised", "parametrize.remove_parametrizations"
    for name in own:
        base, _, kind = name.rpartition("_")
        if kind == "orig" and hasattr(module, f"{base}_mask"):
            problem, remedy = "is already pruned by torch", "prune.remove"
        elif kind == "orig":
            problem, remedy = "has spectral norm", "remove_spectral_norm"
        elif kind == "g" and f"{base}_v" in own:
            problem, remedy = "has weight norm", "remove_weight_norm"
    return f"Layer {path!r} {problem}. Call torch.nn.utils.{remedy} first." if problem else ""


def _as_tensor(value: Tensor | np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()
    return torch.as_tensor(value)


def retained_entries(weights: list[Maskable], plan: Plan) -> dict[str, Tensor]:
    """Return which entries of every planned weight stay, as masks of the weights' own shapes.

    Args:
        weights: from ``maskable_weights``.
        plan: made for these weights.

    Returns:
        For each weight the plan names, a boolean tensor of its shape, on the CPU.

    Raises:
        ValueError: the plan is for other weights, or one cannot be masked or is not finite; the first is named.
    """
    by_name = {weight.name: weight for weight in weights}
    planned = {str(name): rows for name, rows in plan.table.groupby("layer", sort=False)}
    for name, rows in planned.items():
        if name not in by_name:
            raise ValueError(f"The plan is for another model: it has layer {name!r}, which the model lacks.")
        weight = by_name[name]
        refuse_blocked([weight])
        planned_shape, own_shape = plan.shapes.get(name), tuple(weight.tensor.shape)
        if planned_shape is not None and planned_shape != own_shape:
            raise ValueError(
                f"The plan is for another model: layer {name!r} has shape {own_shape}, the plan {planned_shape}."
            )
        shape = _units_shape(weight)
        if shape != (len(rows), int(rows["size"].iloc[0])):  # of a plan that was written without shapes
            raise ValueError(
                f"The plan is for another model: layer {name!r} has {shape[0]} units of {shape[1]} weights, the plan"
                f" {len(rows)} of {int(rows['size'].iloc[0])}."
            )
    masks = {}
    for name, rows in planned.items():
        weight = by_name[name]
        survey(weight.layer(), name)  # refuses what is not finite
        if name in plan.kept:
            if plan.kept[name].shape != tuple(weight.tensor.shape):
                raise ValueError(
                    f"The plan is for another model: layer {name!r} has shape {tuple(weight.tensor.shape)}, the plan"
                    f" {plan.kept[name].shape}."
                )
            masks[name] = torch.from_numpy(plan.kept[name])
            continue
        kept = keep_largest(weight.layer(), rows["retained"].to_numpy(dtype="int64"))
        masks[name] = torch.from_numpy(from_unit_rows(kept.numpy(), tuple(weight.tensor.shape), weight.groups))
    return masks


def mask_(weights: list[Maskable], masks: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, what masks do not keep.

    Args:
        weights: from ``maskable_weights``.
        masks: from ``retained_entries``, for weights of these names and shapes.
    """
    with torch.no_grad():
        for weight in weights:
            if weight.name in masks:
                weight.tensor.copy_(masked(weight.tensor, masks[weight.name].to(weight.tensor.device)))


def _units_shape(weight: Maskable) -> tuple[int, int]:
    shape = weight.tensor.shape
    units = shape[1] * weight.groups if weight.groups else shape[0]
    return int(units), weight.tensor.numel() // int(units)
