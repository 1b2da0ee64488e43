"""Making up for masks without data: outputs get back the spread that they lost."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ellq.analysis import as_input
from ellq.pruning.masks import maskable_weights, retained_entries
from ellq.pruning.plan import Plan
from ellq.pruning.refit import layers_of
from ellq.pruning.walk import norms_of

_SIDES = (32, 28, 64, 96, 224, 16, 8, 128, 256, 299)  # of images, tried in turn where nothing tells
_IMAGES, _VECTORS = 64, 512
_LIMITS = (1e-3, 4.0)  # of how much a variance may be said to change


def rescale_masks(model: nn.Module, plan: Plan, *, example: Tensor | None = None, seed: int = 0) -> Plan:
    """Give masked layers back the spread of their outputs, from the weights and noise alone.

    - A layer that a batch norm reads: the norm's running mean and variance move as much as they do between the dense
      and the masked network on noise, both normalised on the noise itself, relative to the dense one's spread there.
      The noise says what a mask takes from a layer, not what the layer's inputs are like, so noise suffices.
    - Any other layer: unit i is multiplied by ‖w_i‖/‖w_i restricted to what stays‖, which restores its variance when
      inputs are uncorrelated and of one size.

    Noise is Gaussian, for images with a spectrum that falls as 1/frequency, as that of photographs does.

    Args:
        model: the dense model; not changed.
        plan: of ``method="lq"``, for this model.
        example: any input or batch that the model can be called on, for its shape; otherwise shapes are tried that
            would fit the first layer, and norms stay as they are where none does.
        seed: of the noise.

    Returns:
        The plan, with ``values``.

    Raises:
        ValueError: the plan is for another model.

    Reference: ours; after Nagel et al. 2019 (data-free quantisation), who correct means by norms' statistics.
    """
    dense = copy.deepcopy(model).eval()
    masks = retained_entries(maskable_weights(dense), plan)
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for weight in maskable_weights(masked):
            if weight.name in masks:
                mask = masks[weight.name].to(weight.tensor.device)
                weight.tensor.copy_(weight.tensor.double().masked_fill(~mask, 0))
    norms = norms_of(dense)
    values: dict[str, npt.NDArray[Any]] = {}
    has_norms = any(_keeps_statistics(module) for module in dense.modules())
    for name in layers_of(dense, masks):
        if norms is None and has_norms:
            continue  # some norm may read it
        if norms is not None and name in norms:
            continue
        values[f"{name}.weight"] = _rescaled(dense.get_submodule(name), masked.get_submodule(name))
    noise = _noise(dense, example, seed) if has_norms else None
    if noise is not None:
        values |= _moved(dense, masked, noise)
    return replace(plan, values=values, settings=plan.settings | {"refit": "rescale"})


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None


def _rescaled(dense: nn.Module, masked: nn.Module) -> npt.NDArray[Any]:
    before, after = (cast(Tensor, layer.weight).detach().cpu() for layer in (dense, masked))
    lengths = [weight.double().flatten(1).norm(dim=1) for weight in (before, after)]
    factor = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 1.0)
    scaled = after.double() * factor.reshape(-1, *[1] * (after.ndim - 1))
    return np.asarray(scaled.numpy() if before.dtype == torch.float64 else scaled.to(before.dtype).float().numpy())


def _moved(dense: nn.Module, masked: nn.Module, noise: Tensor) -> dict[str, npt.NDArray[Any]]:
    """Return the running statistics that norms have once they moved as between the two networks on noise."""
    values: dict[str, npt.NDArray[Any]] = {}
    before, after = _statistics(dense, noise), _statistics(masked, noise)
    for name, (mean, variance) in before.items():
        norm: Any = dense.get_submodule(name)
        own_mean, own_variance = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
        other_mean, other_variance = after[name]
        is_known = (variance > 0) & torch.isfinite(mean + variance + other_mean + other_variance)
        safe = torch.where(is_known, variance, 1.0)
        ratio = torch.where(is_known, (other_variance / safe).clamp(*_LIMITS), 1.0)
        drift = torch.where(is_known, (other_mean - mean) * (own_variance / safe).sqrt(), 0.0)
        kind = np.float64 if norm.running_var.dtype == torch.float64 else np.float32
        values[f"{name}.running_mean"] = (own_mean + drift).numpy().astype(kind)
        values[f"{name}.running_var"] = (own_variance * ratio).numpy().astype(kind)
    return values


def _statistics(model: nn.Module, noise: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the mean and variance of what each norm reads when every norm normalises by the noise itself."""
    trial = copy.deepcopy(model)
    norms: dict[str, Any] = {name: module for name, module in trial.named_modules() if _keeps_statistics(module)}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        trial(noise)
    ran = {name: norm for name, norm in norms.items() if int(norm.num_batches_tracked) > 0}
    return {name: (norm.running_mean.double().cpu(), norm.running_var.double().cpu()) for name, norm in ran.items()}


def _noise(model: nn.Module, example: Tensor | None, seed: int) -> Tensor | None:
    """Return noise of a shape that the model runs on, or None."""
    for shape in _shapes(model, example):
        noise = as_input(coloured_noise(shape, seed=seed), model)
        try:
            with torch.no_grad():
                copy.deepcopy(model)(noise)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
            continue
        return noise
    return None


def _shapes(model: nn.Module, example: Tensor | None) -> list[tuple[int, ...]]:
    if example is not None:
        return [(_VECTORS if example.ndim == 2 else _IMAGES, *example.shape[1:])]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return [(_VECTORS, module.in_features)]
        if isinstance(module, nn.modules.conv._ConvNd):
            dims = len(module.kernel_size)
            return [(_IMAGES if dims < 3 else 8, module.in_channels, *[side] * dims) for side in _SIDES]
    return []


def coloured_noise(shape: Sequence[int], *, seed: int) -> Tensor:
    """Return Gaussian noise of variance 1, whose spectrum over the axes after the second falls as 1/frequency.

    Channels share most of their variation, as those of photographs do.

    Args:
        shape: (n, channels, …); without further axes the noise is white.
        seed: of the draw.
    """
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(tuple(shape), generator=draw)
    sizes = tuple(shape[2:])
    if not sizes:
        return noise
    noise = 0.3 * noise + torch.randn((shape[0], 1, *sizes), generator=draw)
    axes = tuple(range(2, len(shape)))
    grid = torch.meshgrid(*[torch.fft.fftfreq(size) for size in sizes], indexing="ij")
    frequency = torch.stack(grid).square().sum(0).sqrt()
    coloured = torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) / frequency.clamp(min=1 / max(sizes)), dim=axes).real
    return cast(Tensor, coloured / coloured.std())
