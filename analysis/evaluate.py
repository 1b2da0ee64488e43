"""What a model answers on given inputs, and how often two answers agree. No weight or flag is left changed."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ellq.analysis.calibration import inspecting
from ellq.analysis.progress import track


def predict(model: nn.Module, inputs: Tensor, *, batch_size: int = 512) -> Tensor:
    """Run a model in eval mode, without gradients, batch by batch on the model's own device.

    The training flag of every module is as it was afterwards, also after an error.

    Args:
        model: maps a batch (b, …) to a tensor (b, …).
        inputs: shape (n, …) with n ≥ 1, on any device.
        batch_size: how many inputs at once, ≥ 1.

    Returns:
        The outputs on the CPU, shape (n, …).

    Raises:
        TypeError: inputs or an output of the model is not a tensor.
        ValueError: no inputs, batch_size < 1, NaN in an output, or not one output for each input.
    """
    _require_inputs(inputs)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1. Pass batch_size >= 1.")
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((tensor.device for tensor in tensors), inputs.device)
    starts = range(0, len(inputs), batch_size)
    with inspecting(model):
        outputs = [
            _outputs(model, inputs[start : start + batch_size].to(device), start // batch_size).cpu()
            for start in track(starts, "predicting")
        ]
    return torch.cat(outputs)


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor | NDArray[np.integer], *, batch_size: int = 512) -> float:
    """Measure the share of inputs whose largest output is at the label.

    Args:
        model: maps a batch (b, …) to logits (b, classes) with two classes or more.
        inputs: shape (n, …) with n ≥ 1.
        labels: integers in [0, classes), shape (n,).
        batch_size: how many inputs at once, ≥ 1.

    Returns:
        The accuracy, in [0, 1]. Of equal outputs the first counts as the largest.

    Raises:
        TypeError: inputs is not a tensor.
        ValueError: what `predict` raises, labels that do not fit the inputs or the classes, or outputs that are
            not logits.
    """
    _require_inputs(inputs)
    truth = labels.cpu() if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
    if truth.shape != (len(inputs),) or truth.is_floating_point() or truth.is_complex():
        raise ValueError(
            f"labels of shape {tuple(truth.shape)} and type {truth.dtype} do not fit {len(inputs)} inputs. "
            f"Pass one integer for each input."
        )
    logits = _require_logits(predict(model, inputs, batch_size=batch_size), "model")
    if not 0 <= int(truth.min()) <= int(truth.max()) < logits.shape[1]:
        raise ValueError(
            f"labels lie in [{int(truth.min())}, {int(truth.max())}], but the model has {logits.shape[1]} outputs. "
            f"Pass labels in [0, {logits.shape[1] - 1}]."
        )
    return float((logits.argmax(1) == truth).double().mean())


def agreement(first: nn.Module, second: nn.Module, inputs: Tensor, *, batch_size: int = 512) -> float:
    """Measure the share of inputs on which two models have their largest output at the same place.

    Symmetric in the models; 1 says nothing about whether either is right.

    Args:
        first: maps a batch (b, …) to logits (b, classes) with two classes or more.
        second: likewise, with as many classes.
        inputs: shape (n, …) with n ≥ 1.
        batch_size: how many inputs at once, ≥ 1.

    Returns:
        The agreement, in [0, 1].

    Raises:
        TypeError: inputs is not a tensor.
        ValueError: what `predict` raises, outputs that are not logits, or different numbers of classes.
    """
    ours = _require_logits(predict(first, inputs, batch_size=batch_size), "first")
    theirs = _require_logits(predict(second, inputs, batch_size=batch_size), "second")
    if ours.shape != theirs.shape:
        raise ValueError(
            f"first has {ours.shape[1]} outputs but second has {theirs.shape[1]}. Pass models of the same classes."
        )
    return float((ours.argmax(1) == theirs.argmax(1)).double().mean())


def _require_inputs(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs is a {type(inputs).__name__}, not a tensor. Pass data.inputs() for a data set.")
    if inputs.ndim == 0 or len(inputs) == 0:
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}, which holds no example. Pass at least one.")


def _require_logits(outputs: Tensor, name: str) -> Tensor:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(
            f"{name} gives outputs of shape {tuple(outputs.shape)}. Pass a model that gives (n, classes), classes >= 2."
        )
    return outputs


def _outputs(model: nn.Module, batch: Tensor, index: int) -> Tensor:
    outputs = model(batch)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"The model gives a {type(outputs).__name__}, not a tensor. Wrap it to return its logits.")
    if outputs.ndim == 0 or len(outputs) != len(batch):
        raise ValueError(
            f"Batch {index} of {len(batch)} inputs gives outputs of shape {tuple(outputs.shape)}. "
            f"Pass a model that gives one output for each input."
        )
    if bool(outputs.isnan().any()):
        raise ValueError(f"Batch {index} of the inputs gives NaN in the outputs. Check the weights and the inputs.")
    return outputs
