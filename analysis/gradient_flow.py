"""Gradient flow: how large the gradient of the loss is in every layer, fresh, and as the released code has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ellq.analysis.calibration import as_input, inspecting
from ellq.analysis.digest import digest
from ellq.analysis.progress import track
from ellq.analysis.tables import Framed, ResultTable
from ellq.theory import Array
from ellq.theory.arguments import count

Loss = Callable[[Any, Tensor], Tensor]
STATISTICS = ("norm", "mean")


def gradient_flow(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss = cross_entropy
) -> GradientFlow:
    """Measure the gradient of the mean loss over given examples, weight by weight.

        μ_l = mean|∂L/∂W_l|        ν_l = ‖∂L/∂W_l‖_F

    Fresh: computed from these examples at these weights, in eval mode, so that batch norm uses its running statistics
    and nothing is dropped; the gradients of batches are averaged, weighted by their sizes, before the statistics are
    taken, so the result does not depend on how the examples are cut. Removed entries of masked weights have gradient 0
    and count in μ. Neither ``.grad`` nor any mode is changed.

    Args:
        model: any module.
        batches: (inputs, labels) again and again, such as a DataLoader; gone through once.
        loss: of outputs and labels, the mean over the examples of a batch.

    Returns:
        A row for every weight of two dimensions or more that is trained, in order of registration.

    Raises:
        TypeError: a batch that is not (inputs, labels).
        ValueError: no batch, no such weight, or a loss or gradient that is NaN or infinite; the layer is named.
    """
    gradients = weight_gradients(model, batches, loss)
    return _statistics({name: gradient.cpu().numpy() for name, gradient in gradients.items()})


@dataclass(frozen=True, eq=False, repr=False)
class GradientFlow(Framed):
    """The size of the gradient in every layer.

    Attributes:
        frame: columns ``layer``, the weight's name, ``mean`` μ and ``norm`` ν.
    """

    frame: pd.DataFrame

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the weights."""
        return tuple(self.frame["layer"])

    def vector(self, statistic: str) -> Array:
        """Return μ for "mean" or ν for "norm", in the order of ``layers``."""
        return self.frame[_checked(statistic)].to_numpy(dtype=np.float64)

    def __repr__(self) -> str:
        return f"GradientFlow({len(self.frame)} weights)"

    def _table(self) -> ResultTable:
        rows = self.frame.set_index("layer").rename_axis(index=None)
        rows.loc["(mean)"] = rows.mean()
        return ResultTable(repr(self), rows.map("{:.3e}".format))


class GradientMonitor:
    """Measures the gradient flow of a model on fixed examples: call it with the model for one value per layer.

    Attributes:
        statistic: "norm" or "mean".

    Args:
        inputs: the monitor set, shape (N, …).
        labels: shape (N, …).
        loss: of outputs and labels, the mean over the examples of a batch.
        batch_size: inputs at once; the result does not depend on it but for rounding.
        statistic: "norm" for ‖∂L/∂W_l‖_F, "mean" for mean|∂L/∂W_l|.

    Raises:
        TypeError: inputs is not a tensor, or batch_size is no whole number.
        ValueError: no inputs, another number of labels, an unknown statistic, or batch_size < 1.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor | npt.NDArray[Any],
        loss: Loss = cross_entropy,
        *,
        batch_size: int = 512,
        statistic: str = "norm",
    ) -> None:
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be one tensor, got {type(inputs).__name__}. Pass the monitor set as a batch.")
        labels = torch.as_tensor(labels)
        if inputs.ndim == 0 or len(inputs) == 0 or labels.ndim == 0 or len(labels) != len(inputs):
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)} and labels {tuple(labels.shape)}. Pass one label per example."
            )
        self.statistic = _checked(statistic)
        self._inputs, self._labels, self._loss = inputs, labels, loss
        self._batch_size = count(batch_size, "batch_size", low=1, high=2**31)
        self._layers: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[str, ...]:
        """The names of the weights, which are what the entries are of; known from the first call on."""
        return self._layers

    def __call__(self, model: nn.Module) -> Array:
        """Return the statistic of every layer, shape (layers,), finite.

        Args:
            model: any module, masked or not; its mode, gradients and hooks are as they were afterwards.

        Raises:
            ValueError: as ``gradient_flow``, or a model with other layers than the first it was called with.
        """
        parts = (torch.split(part, self._batch_size) for part in (self._inputs, self._labels))
        measured = gradient_flow(model, list(zip(*parts, strict=True)), self._loss)
        if self._layers and measured.layers != self._layers:
            other = next(iter(set(measured.layers) ^ set(self._layers)), "their order")
            raise ValueError(
                f"The model has other trained weights than the first one measured ({other}). Make a monitor for each."
            )
        self._layers = measured.layers
        return measured.vector(self.statistic)

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on, as JSON holds it: settings, and a digest of the data."""
        name = getattr(self._loss, "__qualname__", type(self._loss).__qualname__)
        return {
            "statistic": self.statistic,
            "loss": f"{getattr(self._loss, '__module__', '')}.{name}",
            "batch_size": self._batch_size,
            "inputs": digest(self._inputs, self._labels),
        }


def gradient_flow_as_released(gradients: Mapping[str, npt.ArrayLike], batches: int) -> GradientFlow:
    """Return what the released code of Gharatappeh & Yasaei Sekeh 2025 takes for the gradient flow.

        g_l ← g_l·N_b/(N_b − 1)        then μ_l and ν_l as in ``gradient_flow``

    It goes through the data without a backward pass, adds up the gradient that the last mini-batch of training has
    left, once for each of N_b batches, and divides by N_b − 1: one stale mini-batch, a little larger.

    Args:
        gradients: weight → the stored gradient of the last mini-batch, any shape.
        batches: N_b ≥ 2; one divides by zero there.

    Returns:
        Both statistics.

    Raises:
        TypeError: N_b is no whole number.
        ValueError: N_b < 2, no weight, or a gradient that is NaN or infinite, which is named.
    """
    N = count(batches, "batches", low=2, high=2**62)
    arrays = {
        name: np.asarray(g.detach().cpu().double() if isinstance(g, Tensor) else g, dtype=np.float64)
        for name, g in gradients.items()
    }
    return _statistics({name: array * (N / (N - 1)) for name, array in arrays.items()})


def gradient_distance_as_released(reference: GradientFlow, current: GradientFlow) -> float:
    """Return what the released code compares with its threshold: the *norms* now against the *means* of the reference.

        √( Σ_l (ν_l − μ_l*)² )

    Since μ ≪ ν for all but the smallest layers, this is nearly the norm of the whole gradient now, and the reference
    plays no part.

    Args:
        reference: of the dense net.
        current: of the net in training, with the same layers.

    Returns:
        The distance.

    Raises:
        ValueError: other layers.
    """
    if reference.layers != current.layers:
        raise ValueError("reference and current are of other layers. Compare models of one architecture.")
    return math.dist(current.vector("norm"), reference.vector("mean"))


def weight_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss) -> dict[str, Tensor]:
    """Return the gradient of the mean loss for every trained weight of two dimensions or more, on its device.

    Args:
        model: as in ``gradient_flow``.
        batches: as in ``gradient_flow``.
        loss: as in ``gradient_flow``.

    Raises:
        TypeError, ValueError: as ``gradient_flow``.
    """
    weights = {_plain(name): p for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
    if not weights:
        raise ValueError("The model has no trained weight of two dimensions or more. Set requires_grad of its weights.")
    totals = {name: torch.zeros_like(p, dtype=_exact(p), requires_grad=False) for name, p in weights.items()}
    examples = 0
    with inspecting(model), torch.enable_grad():
        for number, batch in enumerate(track(batches, "measuring gradients")):
            if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(b, Tensor) for b in batch):
                raise TypeError(f"Batch {number} is not (inputs, labels). Pass pairs of tensors.")
            inputs = as_input(batch[0], model)
            value = loss(model(inputs), batch[1].to(inputs.device))
            if not isinstance(value, Tensor) or value.ndim:
                raise ValueError("loss does not give one number. Pass the mean over the examples of a batch.")
            if not bool(torch.isfinite(value)):
                raise ValueError(f"The loss is {value.item()} on batch {number}. Check the weights and the examples.")
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    totals[name].add_(gradient.detach(), alpha=float(len(inputs)))
            examples += len(inputs)
    if not examples:
        raise ValueError("batches holds no examples. Pass at least one batch.")
    return {name: total / examples for name, total in totals.items()}


def _statistics(gradients: Mapping[str, npt.NDArray[Any]]) -> GradientFlow:
    if not gradients:
        raise ValueError("gradients is empty. Pass at least one layer's.")
    for name, gradient in gradients.items():
        if not np.isfinite(gradient).all():
            raise ValueError(f"The gradient of {name!r} holds NaN or infinity. Check the weights and the examples.")
    rows = [(name, float(np.abs(g).mean()), float(np.linalg.norm(g))) for name, g in gradients.items()]
    return GradientFlow(pd.DataFrame(rows, columns=["layer", "mean", "norm"]))


def _exact(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.device.type == "mps" else torch.float64


def _plain(name: str) -> str:
    """Return the name a weight has without parametrisations."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def _checked(statistic: str) -> str:
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={statistic!r} is unknown. Choose among {', '.join(STATISTICS)}.")
    return statistic
