"""Making up for masks without data: outputs get back the spread that they lost."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ellq.analysis import as_input
from ellq.pruning.copied import copied
from ellq.pruning.masks import mask_, maskable_weights, retained_entries
from ellq.pruning.plan import Plan
from ellq.pruning.refit import layers_of, weight_name
from ellq.pruning.walk import keeps_statistics, norms_of

_SIDES = (32, 28, 64, 96, 224, 16, 8, 128, 256, 299)  # of images, tried in turn where nothing tells
_IMAGES, _VECTORS = 64, 512
_ENTRIES = 2**24  # of noise at most, 64 MiB
_LIMITS = (1e-3, 4.0)  # of how much a variance may be said to change


def rescale_masks(model: nn.Module, plan: Plan, *, example: Tensor | None = None, seed: int = 0) -> Plan:
    """Give masked layers back the spread of their outputs, from the weights and noise alone.

    - A layer that a batch norm reads: the norm's running mean and variance move as much as they do between the dense
      and the masked network on noise, both normalised on the noise itself, relative to the dense one's spread there.
      The noise says what a mask takes from a layer, not what the layer's inputs are like, so noise suffices.
    - Any other layer: unit i is multiplied by ‖w_i‖/‖w_i restricted to what stays‖, which restores its variance when
      inputs are uncorrelated and of one size.

    Noise is Gaussian, for images with a spectrum that falls as 1/frequency, as that of photographs does. Of a network
    that cannot be traced and has such norms, only they move.

    Args:
        model: the dense model; not changed.
        plan: of ``method="lq"``, for this model.
        example: any batch that the model can be called on, for its shape; one of whole numbers is itself the noise.
            Without one, shapes are tried that would fit the first layer, and norms stay as they are where none does.
        seed: of the noise.

    Returns:
        The plan, with ``values``.

    Raises:
        ValueError: the plan is for another model, or the model does not run on inputs of the example's shape.

    Reference: ours; after Nagel et al. 2019 (data-free quantisation), who correct means by norms' statistics.
    """
    masks = retained_entries(maskable_weights(model), plan)
    has_norms = any(keeps_statistics(module) for module in model.modules())
    norms = norms_of(model) if has_norms else {}
    values: dict[str, npt.NDArray[Any]] = {}
    for name in layers_of(model, masks):
        if norms is None or name in norms:
            continue
        scaled = _rescaled(cast(Tensor, model.get_submodule(name).weight), masks[weight_name(name)])
        values[weight_name(name)] = _plain(scaled)
    if has_norms:
        dense = copied(model).eval()
        changed = copy.deepcopy(dense)
        mask_(maskable_weights(changed), masks)
        tensors = changed.state_dict()
        for name, value in values.items():
            tensors[name].copy_(torch.from_numpy(value))
        values |= _moved(dense, changed, example, seed)
    return replace(plan, values=values, settings=plan.settings | {"refit": "rescale"})


def _rescaled(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a masked weight whose units have their lengths back, as far as its type reaches."""
    before = weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    after = torch.where(mask.to(weight.device).flatten(1), before, 0.0)
    largest = before.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)  # so that squares neither overflow nor vanish
    lengths = [torch.linalg.vector_norm(rows / scale, dim=1, dtype=torch.float64) for rows in (before, after)]
    factor = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 1.0)
    limit = torch.finfo(weight.dtype).max
    return (after.double() * factor[:, None]).clamp(-limit, limit).to(weight.dtype).reshape(weight.shape)


def _plain(tensor: Tensor) -> npt.NDArray[Any]:
    return np.asarray(tensor.cpu().to(torch.promote_types(tensor.dtype, torch.float32)).numpy())


def _moved(dense: nn.Module, changed: nn.Module, example: Tensor | None, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Return the running statistics that norms have once they moved as between the two networks on noise."""
    values: dict[str, npt.NDArray[Any]] = {}
    before, after = _both_statistics(dense, changed, example, seed)
    for name, (mean, variance) in before.items():
        norm: Any = dense.get_submodule(name)
        own_mean, own_variance = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
        if not torch.isfinite(own_mean + own_variance).all():
            continue
        other_mean, other_variance = after[name]
        is_known = (variance > 0) & torch.isfinite(mean + variance + other_mean + other_variance)
        safe = torch.where(is_known, variance, 1.0)
        ratio = torch.where(is_known, (other_variance / safe).clamp(*_LIMITS), 1.0)
        drift = torch.where(is_known, (other_mean - mean) * (own_variance / safe).sqrt(), 0.0)
        if not drift.any() and (ratio == 1).all():
            continue
        values[f"{name}.running_mean"] = _plain((own_mean + drift).to(norm.running_mean.dtype))
        values[f"{name}.running_var"] = _plain((own_variance * ratio).to(norm.running_var.dtype))
    return values


Statistics = dict[str, tuple[Tensor, Tensor]]


def _both_statistics(
    dense: nn.Module, changed: nn.Module, example: Tensor | None, seed: int
) -> tuple[Statistics, Statistics]:
    """Return the norms' statistics in both networks on noise of a shape that they run on; none where none is found."""
    for shape in input_shapes(dense, example):
        # Whole numbers are labels, of words say; what else they could be is not known.
        is_labels = example is not None and not example.is_floating_point()
        try:
            if not is_labels:
                _statistics(dense, coloured_noise((2, *shape[1:]), seed=seed))  # whether it runs at all
            noise = cast(Tensor, example) if is_labels else coloured_noise(shape, seed=seed)
            return _statistics(dense, noise), _statistics(changed, noise)
        except Exception as error:  # the model's own
            if example is not None:
                reason = " ".join(str(error).split()).rstrip(".")
                raise ValueError(
                    f"The model does not run on inputs such as the example, of shape {tuple(example.shape)}: {reason}."
                    " Pass one that the model can be called on."
                ) from error
    return {}, {}


def _statistics(model: nn.Module, noise: Tensor) -> Statistics:
    """Return the mean and variance of what each norm reads when every norm normalises by the noise itself."""
    trial = copy.deepcopy(model)
    if next((p for p in trial.parameters() if p.is_floating_point()), noise).element_size() < 4:
        trial = trial.float()  # sums of squares leave the range of smaller types
    norms: dict[str, Any] = {name: module for name, module in trial.named_modules() if keeps_statistics(module)}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        trial(as_input(noise, trial).clone())
    ran = {name: norm for name, norm in norms.items() if int(norm.num_batches_tracked) > 0}
    return {name: (norm.running_mean.double().cpu(), norm.running_var.double().cpu()) for name, norm in ran.items()}


def input_shapes(model: nn.Module, example: Tensor | None) -> list[tuple[int, ...]]:
    """Return shapes of batches to try a model on: that of the example, or such as would fit its first layer."""
    if example is not None:
        most = _VECTORS if example.ndim == 2 else _IMAGES
        return [(_at_most(most, example.shape[1:]), *example.shape[1:])]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return [(_VECTORS, module.in_features)]
        if isinstance(module, nn.modules.conv._ConvNd):
            shapes = [(module.in_channels, *[side] * len(module.kernel_size)) for side in _SIDES]
            return [(_at_most(_IMAGES, shape), *shape) for shape in shapes if math.prod(shape) <= _ENTRIES // 2]
    return []


def _at_most(inputs: int, shape: Sequence[int]) -> int:
    return max(2, min(inputs, _ENTRIES // max(1, math.prod(shape))))


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
