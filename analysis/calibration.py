"""Calibration inputs as batches that can be gone through again, and the features a layer sees in them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[Tensor]
Calibration = Tensor | Iterable[Any]


def as_batches(calibration: Calibration, *, batch_size: int = 512) -> Iterable[Tensor]:
    """Return calibration inputs as an iterable of batches that starts afresh every time.

    Args:
        calibration: one tensor of inputs, shape (n, …), cut into batches; or an iterable of batches, each a tensor or
            a tuple or list whose first entry is the inputs (labels are ignored), such as a DataLoader. A one-way
            iterator is read once and kept.
        batch_size: rows per batch when a single tensor is given.

    Returns:
        An iterable of input batches.

    Raises:
        TypeError: not a tensor or an iterable of batches.
        ValueError: no inputs at all.
    """
    if isinstance(calibration, Tensor):
        if calibration.ndim == 0 or calibration.shape[0] == 0:
            raise ValueError(
                f"calibration has shape {tuple(calibration.shape)}. Pass at least one input, batched along axis 0."
            )
        return list(torch.split(calibration, batch_size))
    if isinstance(calibration, str | bytes | Mapping) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration must be a tensor or an iterable of batches, got {type(calibration).__name__}."
            " Pass inputs the model can be called on."
        )
    if isinstance(calibration, Iterator):
        calibration = list(calibration)
    return _Inputs(calibration)


class _Inputs:
    """The inputs of an iterable of batches, without their labels."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __length_hint__(self) -> int:
        # Not __len__: a DataLoader over a stream has that method, and no length.
        return operator.length_hint(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        empty = True
        for number, batch in enumerate(self.batches):
            inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
            if not isinstance(inputs, Tensor):
                raise TypeError(
                    f"Batch {number} of the calibration set is {type(batch).__name__}, not a tensor or"
                    " (inputs, labels). Pass tensors the model can be called on."
                )
            if inputs.ndim and inputs.shape[0]:
                empty = False
                yield inputs
        if empty:
            raise ValueError("calibration holds no inputs. Pass at least one batch.")


@contextmanager
def inspecting(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode without gradients, and give back every module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def as_input(batch: Tensor, model: nn.Module) -> Tensor:
    """Return a batch on the model's device, and in its floating type where all parameters share one."""
    parameters = list(model.parameters())
    if parameters:
        batch = batch.to(parameters[0].device)
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    return batch.to(dtypes.pop()) if len(dtypes) == 1 and batch.is_floating_point() else batch


def inputs_of(model: nn.Module, layers: Sequence[str], batch: Tensor) -> list[Tensor]:
    """Return what each named layer receives when the model runs on a batch; no hook is left behind.

    Args:
        model: the model, run in eval mode without gradients.
        layers: names of submodules, each called once with one tensor.
        batch: inputs, shape (b, …).

    Returns:
        One tensor per layer, as it was received.

    Raises:
        KeyError: no such layer.
        ValueError: the model does not run on the batch, or a layer was not reached.
    """
    modules = dict(model.named_modules())
    seen: dict[str, Tensor] = {}
    hooks = []
    try:
        for name in layers:

            def keep(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
                # An activation further on may work in place on what it is given.
                seen[name] = (inputs or tuple(named.values()))[0].clone()

            hooks.append(modules[name].register_forward_pre_hook(keep, with_kwargs=True))
        with inspecting(model):
            model(as_input(batch, model))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"The model does not run on inputs of shape {tuple(batch.shape)} and type {batch.dtype}:"
            f" {' '.join(str(error).split()).rstrip('.')}. Pass inputs the model can be called on."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for name in layers:
        if name not in seen:
            raise ValueError(f"Layer {name!r} was not reached by the forward pass.")
    return [seen[name] for name in layers]
