"""A layer as one product: what each of its weights is multiplied by, and the rows those weights make."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

PatchLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def reads_patches(module: nn.Module) -> bool:
    """Whether a layer is one that ``patches`` knows; exact types, for a subclass may compute something else."""
    return type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def positions_of(layer: PatchLayer, y: Tensor) -> int:
    """Return at how many positions a layer's outputs lie: samples times places in space."""
    return y.numel() // len(layer.weight)


def patches(layer: PatchLayer, x: Tensor, positions: Tensor) -> Tensor:
    """Return what the weights of a unit are multiplied by, at some positions.

    Args:
        layer: a Linear or a convolution, grouped or not.
        x: what it receives: (…, in) for a Linear; (b, in, …) for a convolution, or (in, …) for one sample.
        positions: numbers in [0, ``positions_of(layer, y)``), shape (n,): places in space run faster than samples.

    Returns:
        Shape (groups, n, d), where d is the number of weights of a unit, in the order of its flattened weight. At the
        same positions outputs are ``outputs_at(layer, y, positions)``.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[positions][None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(_batched(layer, x), layer._reversed_padding_repeated_twice, mode=mode)
    steps = list(zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True))
    sizes = [(length - reach * (extent - 1) - 1) // step + 1 for length, extent, reach, step in steps]
    sample, place = positions // math.prod(sizes), positions % math.prod(sizes)
    where = [sample.reshape(-1, *[1] * len(steps))]
    for axis, (_, extent, reach, step) in enumerate(steps):
        start = place // math.prod(sizes[axis + 1 :]) % sizes[axis] * step
        shape = [-1 if other == axis else 1 for other in range(len(steps))]
        taps = (torch.arange(extent, device=x.device) * reach).reshape(shape)
        where.append(start.reshape(-1, *[1] * len(steps)) + taps)
    windows = x.movedim(1, -1)[tuple(where)]  # (n, taps along each axis …, in)
    grouped = windows.reshape(*windows.shape[:-1], layer.groups, layer.weight.shape[1])
    return grouped.movedim((-2, 0, -1), (0, 1, 2)).flatten(2)


def outputs_at(layer: PatchLayer, y: Tensor, positions: Tensor) -> Tensor:
    """Return a layer's outputs at some positions, numbered as for ``patches``: shape (groups, n, c per group)."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, y.shape[-1])[positions][None]
    flat = _batched(layer, y).flatten(2).movedim(1, -1).flatten(0, 1)[positions]
    return flat.reshape(len(flat), layer.groups, len(layer.weight) // layer.groups).movedim(1, 0)


def as_rows(layer: PatchLayer, weight: Tensor) -> Tensor:
    """Return a weight as (groups, c, d): the rows of each group."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return torch.as_tensor(weight).reshape(groups, weight.shape[0] // groups, -1)


def _batched(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    return x if x.ndim == layer.weight.ndim else x[None]
