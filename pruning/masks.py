"""Unit-by-unit magnitude masks: which weights can be masked, and setting all but the largest of each unit to zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ellq.analysis import from_unit_rows, to_unit_rows, transposed_groups, weight_matrices
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
    """

    name: str
    tensor: Tensor
    groups: int

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
    """Return the weights a mask can act on, a shared one once.

    Of a model: the weights of linear, convolutional, recurrent and attention layers; embeddings and norms are left
    alone, for they are looked up or scale, not summed. Of a state dict: every weight ``ellq.measure`` finds.

    Args:
        source: a model or state dict; only looked at.

    Returns:
        The weights, in the source's order.

    Raises:
        TypeError: ``source`` is neither.
        ValueError: no such weight, one that is quantised, sparse, complex or computed from others (parametrised,
            masked, normalised), or what ``ellq.measure`` refuses.
    """
    if isinstance(source, nn.Module):
        refuse_quantised(source)
    found = weight_matrices(source)  # refuses what cannot be measured, before anything is planned
    if isinstance(source, nn.Module):
        weights = list(_of_layers(source))
    else:
        computed = [name for name in found.skipped if "parametrizations" in name.split(".") or f"{name}_orig" in source]
        for name in [name for name in found.names if name not in source] + computed:
            raise ValueError(
                f"Weight {name!r} is computed from other tensors (a mask or a reparametrisation). Bake it in first."
            )
        weights = [Maskable(name, _as_tensor(source[name]), 0) for name in found.names]
    for weight in weights:
        if weight.tensor.is_quantized or weight.tensor.layout != torch.strided or weight.tensor.is_complex():
            raise ValueError(f"Weight {weight.name!r} is quantised, sparse or complex. Mask a plain dense real one.")
    if not weights:
        raise ValueError("The model holds no prunable layer: no linear, convolutional, recurrent or attention weight.")
    return weights


def _of_layers(model: nn.Module) -> Iterator[Maskable]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, _MASKABLE):
            continue
        prefix = f"{path}." if path else ""
        own = dict(module.named_parameters(recurse=False))
        refuse_computed(module, path or type(module).__name__, own)
        for name, parameter in own.items():
            if parameter.ndim >= 2 and not name.startswith("bias") and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Maskable(prefix + name, parameter, transposed_groups(module) if name == "weight" else 0)


def refuse_quantised(model: nn.Module) -> None:
    """Refuse a model with a quantised layer, by name."""
    for path, module in model.named_modules():
        kind = type(module)
        is_packed = hasattr(module, "_packed_params") or hasattr(module, "_all_weight_values")
        if kind.__module__.startswith("torch.ao.nn.quantized") and is_packed and "Embedding" not in kind.__name__:
            raise ValueError(f"Layer {path!r} is quantised. Prune the float model, then quantise it.")


def refuse_computed(module: nn.Module, path: str, own: Mapping[str, Tensor]) -> None:
    """Refuse a layer whose weight is computed from other tensors, with the call that bakes it in."""
    problem, remedy = "", ""
    if is_masked(module):
        raise ValueError(f"Layer {path!r} carries a mask already. Call ellq.finalize first.")
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
    if problem:
        raise ValueError(f"Layer {path!r} {problem}. Call torch.nn.utils.{remedy} first.")


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
        ValueError: the plan is for other weights, or one is not finite; the first mismatch is named.
    """
    by_name = {weight.name: weight for weight in weights}
    planned = {str(name): rows for name, rows in plan.table.groupby("layer", sort=False)}
    for name, rows in planned.items():
        if name not in by_name:
            raise ValueError(f"The plan is for another model: it has layer {name!r}, which the model lacks.")
        weight = by_name[name]
        shape = _units_shape(weight)
        if shape != (len(rows), int(rows["size"].iloc[0])):
            raise ValueError(
                f"The plan is for another model: layer {name!r} has {shape[0]} units of {shape[1]} weights, the plan"
                f" {len(rows)} of {int(rows['size'].iloc[0])}."
            )
    masks = {}
    for name, rows in planned.items():
        weight = by_name[name]
        if name in plan.kept:
            if plan.kept[name].shape != tuple(weight.tensor.shape):
                raise ValueError(
                    f"The plan is for another model: layer {name!r} has shape {tuple(weight.tensor.shape)}, the plan"
                    f" {plan.kept[name].shape}."
                )
            masks[name] = torch.from_numpy(plan.kept[name])
            continue
        survey(weight.layer(), name)  # refuses what is not finite
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
