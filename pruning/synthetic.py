"""Refitting without data, on made-up inputs: such as the network's weights and norms remember."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ellq.analysis import as_input, cost, track
from ellq.pruning.copied import copied
from ellq.pruning.plan import Plan
from ellq.pruning.refit import refit_masks
from ellq.pruning.rescale import coloured_noise, input_shapes, rescale_masks
from ellq.pruning.walk import keeps_statistics, tensors_in

_RIDGE = 0.1  # made-up inputs are trusted less than real ones
_INPUTS, _ENTRIES = 2048, 2**21  # of noise at most
_SCALE = 0.5  # of noise: between that of pixels in [0, 1] and that of standardised features
_STEPS, _RATE = 40, 0.1  # of Adam, on the inputs
_MISMATCH = 0.05  # of a norm's statistics on average, above which inputs are not like the data
_WEIGHTS = 2 * 10**7  # larger networks are rescaled
_OPERATIONS = 1e12  # of elimination, and of fits; a minute or two
_FLOPS = 5e12  # of matching statistics, as many again


def refit_synthetic(
    model: nn.Module,
    plan: Plan,
    *,
    refit: str = "obs",
    example: Tensor | None = None,
    falls_back: bool = False,
    seed: int = 0,
) -> Plan:
    """Choose anew and refit what a plan of masks retains, as ``refit_masks`` does, on ``synthetic_inputs``.

    The ridge is one of 10 %, since inputs that are made up tell less. Units keep the counts of the plan. What is
    measured on such inputs is left out of the plan.

    Args:
        model: the dense model; not changed.
        plan: of ``method="lq"``, for this model.
        refit: ``"obs"`` or ``"least_squares"``, which keeps the plan's choice.
        example: any batch that the model can be called on, for its shape.
        falls_back: whether to do with less where it would take minutes: with ``"least_squares"`` where elimination
            takes more than 10¹² operations (units times the cube of their size), and with ``rescale_masks``, as the
            plan's settings then say, where the fits take more, matching batch norms more than 5·10¹², or there are more
            than 2·10⁷ weights. And with ``rescale_masks`` where no inputs can be made, or only such as differ from
            what batch norms remember, or such as make features overflow.
        seed: of the inputs.

    Returns:
        The plan, with ``values``.

    Raises:
        ValueError: the plan is for another model, the model does not run on inputs of the example's shape, or, unless
            ``falls_back``, no inputs can be made or features overflow.

    Reference: ours; inputs that match norms as in Cai et al. 2020 (ZeroQ, arXiv 2001.00281) and Yin et al. 2020
    (DeepInversion, arXiv 1912.08795).
    """
    inputs = None
    if not falls_back or _is_affordable(plan):
        inputs = synthetic_inputs(model, example=example, seed=seed, flops=_FLOPS if falls_back else math.inf)
    if inputs is None and falls_back:
        return rescale_masks(model, plan, example=example, seed=seed)
    if inputs is None:
        raise ValueError(
            "refit='synthetic' could make no inputs that are like what the model was trained on."
            " Pass one that it can be called on as the second argument, for its shape, or use refit='rescale'."
        )
    if falls_back and (plan.table["size"].astype(float) ** 3).sum() > _OPERATIONS:
        refit = "least_squares"
    try:
        fitted = refit_masks(model, plan, [inputs], refit=refit, ridge=_RIDGE, seed=seed)
    except ValueError:  # features that overflow, say
        if falls_back:
            return rescale_masks(model, plan, example=example, seed=seed)
        raise
    return replace(fitted, measured=None, settings=plan.settings | {"refit": "synthetic"})


def _is_affordable(plan: Plan) -> bool:
    """Whether fits by least squares, and the second moments for them, are worth their time."""
    size, retained = plan.table["size"].astype(float), plan.table["retained"].astype(float)
    moments = 0.0
    for name, own in size.groupby(plan.table["layer"]).first().items():
        is_linear = len(plan.shapes.get(str(name), ())) == 2
        moments += (min(100 * own, _INPUTS) if is_linear else 100 * own) * own**2
    return bool(size.sum() <= _WEIGHTS and (retained**3).sum() / 3 + moments <= _OPERATIONS)


@torch.inference_mode(mode=False)  # whatever the caller's mode: gradients may be asked for
def synthetic_inputs(
    model: nn.Module, *, example: Tensor | None = None, seed: int = 0, flops: float = math.inf
) -> Tensor | None:
    """Make up inputs like those that a network was trained on, from the network alone.

    They are Gaussian noise: for images with the spectrum of photographs (``coloured_noise``), vectors of c·s² entries,
    c = 1 or 3, being taken for images. If the first layer is Linear, half of the inputs are instead random sums of the
    rows of its weights, which training left in the span of the data: inputs that vary together have weights that do.

    - Where batch norms hold statistics, the inputs are then changed, by 40 steps of Adam, until their means and
      spreads in front of every norm are those that it remembers.
    - Elsewhere the noise has the spread ½, and of every other input what is negative is 0, as of pixels.

    Args:
        model: not changed; run in eval mode, in float32 at least.
        example: any batch that the model can be called on, for its shape; without one, shapes are tried that would fit
            the first layer.
        seed: of the noise.
        flops: what matching norms may take at most.

    Returns:
        Inputs, of float32 on the CPU; None where the model runs on none of the shapes, takes whole numbers, would need
        more ``flops``, or has norms whose statistics the inputs do not come near.

    Reference: ours; matching norms as in Cai et al. 2020 (arXiv 2001.00281).
    """
    trial = copied(model).eval().requires_grad_(False)
    if next((p for p in trial.parameters() if p.is_floating_point()), torch.ones(1)).element_size() < 4:
        trial = trial.float()
    if example is not None and not example.is_floating_point():
        return None
    norms = [module for module in trial.modules() if keeps_statistics(module)]
    for shape in input_shapes(trial, example):
        try:
            with torch.no_grad():
                runs = bool(tensors_in(trial(as_input(torch.zeros(2, *shape[1:]), trial))))
        except Exception:  # the model's own
            continue
        if not runs:
            continue
        if not norms:
            most = max(2, min(_INPUTS, _ENTRIES // max(1, math.prod(shape[1:]))))
            noise = _SCALE * _noise(trial, (most, *shape[1:]), seed)
            noise[::2] = noise[::2].clamp(min=0)
            return noise
        noise = _noise(trial, shape, seed)
        if 3 * _STEPS * len(noise) * cost(trial, noise[:1]).flops > flops:
            return None
        return _matched(trial, norms, noise)
    return None


def _noise(model: nn.Module, shape: Sequence[int], seed: int) -> Tensor:
    """Return noise of spread 1, in turn coloured and, where the first layer is Linear, of its rows."""
    size = math.prod(shape[1:])
    noise = coloured_noise((shape[0], *_as_image(shape[1:])), seed=seed).reshape(tuple(shape))
    first = next((module for module in model.modules() if list(module.parameters(recurse=False))), None)
    if not (isinstance(first, nn.Linear) and first.in_features == size):
        return noise
    weight = first.weight.detach().float().cpu()
    sums = torch.randn(shape[0], len(weight), generator=torch.Generator().manual_seed(seed + 1)) @ weight
    spread = float(sums.std())
    if math.isfinite(spread) and spread > 0:
        half = torch.arange(shape[0]) // 2 % 2 == 1  # every other pair: of each kind, every other is then cut at 0
        noise[half] = (sums / spread).reshape(tuple(shape))[half]
    return noise


def _as_image(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an image that has as many entries as a vector, where there is one."""
    if len(shape) != 1:
        return tuple(shape)
    for channels in (1, 3):
        side = math.isqrt(shape[0] // channels)
        if side >= 4 and channels * side**2 == shape[0]:
            return (channels, side, side)
    return tuple(shape)


@torch.enable_grad()
def _matched(model: nn.Module, norms: Sequence[nn.Module], noise: Tensor) -> Tensor | None:
    """Return inputs whose statistics in front of norms are near those the norms hold; None where they do not get so."""
    mismatches: list[Tensor] = []

    def compare(norm: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        axes = [axis for axis in range(x.ndim) if axis != 1]
        variance = norm.running_var + norm.eps
        drift = (x.mean(dim=axes) - norm.running_mean).square() / variance
        spread = ((x.var(dim=axes, unbiased=False) + norm.eps) / variance).sqrt() - 1
        mismatches.append(drift.mean() + spread.square().mean())

    for norm in norms:
        norm.register_forward_pre_hook(compare)
    inputs = as_input(noise, model).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=_RATE)
    best, least = inputs.detach(), math.inf
    for _ in track(range(_STEPS + 1), "making up inputs"):
        mismatches.clear()
        try:
            model(inputs * 1)  # not a leaf, so that it may be worked on in place
        except Exception:  # the model's own: it may not be differentiable, say
            return None
        if not mismatches:
            return None
        total = torch.stack(mismatches).sum()
        mean = float(total.detach()) / len(mismatches)
        if mean < least:
            best, least = inputs.detach().clone(), mean
        if not (math.isfinite(mean) and total.requires_grad):
            break
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return best.float().cpu() if least <= _MISMATCH else None
