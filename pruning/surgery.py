"""Smaller tensors in place of larger ones: slice the layer that makes units, fold the correction into its reader."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ellq.pruning.plan import Correction


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
