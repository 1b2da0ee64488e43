"""A dense and a pruned chain side by side: what each layer's outputs changed by, and the bound on it.

Errors are root mean squares over the inputs given, the largest over a layer's units (and positions, for
convolutions). For those inputs every bound is deterministic: it uses the sizes of weights and of the dense net's
features, never the pruned net's outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ellq.analysis import to_unit_rows
from ellq.pruning.plan import Correction, Plan
from ellq.theory import (
    Array,
    chain_error,
    norm_error,
    outward,
    product_error,
    skeleton_output_bound,
    skeleton_residual,
    unit_error_l1,
    unit_error_lq,
    unit_errors,
)

# Largest slope of each function, or of one position's output in the largest position's input for averages. GELU's and
# SiLU's and Mish's are rounded up in the last digit.
_LIPSCHITZ: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Dropout: 1.0,
    nn.Dropout1d: 1.0,
    nn.Dropout2d: 1.0,
    nn.Dropout3d: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Hardtanh: 1.0,
    nn.Tanh: 1.0,
    nn.Softsign: 1.0,
    nn.Softplus: 1.0,
    nn.LogSigmoid: 1.0,
    nn.Sigmoid: 0.25,
    nn.GELU: 1.13,
    nn.SiLU: 1.1,
    nn.Mish: 1.09,
    nn.AvgPool1d: 1.0,
    nn.AvgPool2d: 1.0,
    nn.AvgPool3d: 1.0,
    nn.AdaptiveAvgPool1d: 1.0,
    nn.AdaptiveAvgPool2d: 1.0,
    nn.AdaptiveAvgPool3d: 1.0,
}


def chain_bounds(
    dense: nn.Sequential, pruned: nn.Sequential, inputs: Tensor, plan: Plan, *, q: float = 0.5
) -> pd.DataFrame:
    """Compare a dense chain with its pruned version, layer by layer, in float64.

    Three bounds on the same error, from less and less to more and more knowledge:

    - ``bound_lq``: of each pruned unit only ‖w‖_q and the count k; its own error is at most B·c·‖w‖_q·k^(1−1/q), with B
      the largest root mean square of an input. Masks only.
    - ``bound``: what was removed; a unit's own error is at most B·‖v‖_1 where weights v were masked, and at most
      ‖A − A_J T‖_2‖u‖/√n + ‖A_J(û − Tu)‖/√n where its inputs A were cut to a skeleton and its weights u became û.
    - ``bound_measured``: each unit's own error measured on the dense net's features.

    Errors of earlier layers pass on through the pruned weights' magnitudes and the activations' Lipschitz constants: by
    the largest row sum in the first two, unit by unit in the third. Rounding in both forward passes is included.

    Args:
        dense: a Sequential (nested ones allowed) of Linear and Conv layers and of element-wise functions, average or
            max pooling, dropout, batch norm, flatten.
        pruned: ``apply(dense, plan)``.
        inputs: shape (n, …), n ≥ 1; the distribution the errors are over.
        plan: the plan that led from one to the other.
        q: order of the quasi-norm in ``bound_lq``, 0 < q < 1.

    Returns:
        One row per weight layer: ``layer``; ``scale`` (B); ``local_bound`` (that layer's own error); ``gain`` (largest
        row sum); ``observed`` (error at the next weight layer's inputs, or at the output); the three bounds on it, NaN
        where one does not apply.

    Raises:
        ValueError: the models are no such chains, or the plan is not for them.

    Reference: statements ``linear-unit-l1``, ``multilayer``, ``risk-empirical``, ``multilayer-units`` of the registry.
    """
    segments = _segments(dense)
    partners = dict(pruned.named_modules())
    corrections = {c.consumer: c for c in plan.corrections}
    cut = {c.producer: c for c in plan.corrections}
    retained = {str(name): rows["retained"].to_numpy() for name, rows in plan.table.groupby("layer", sort=False)}
    x = y = inputs.detach().to("cpu", torch.float64)
    kept: Tensor | None = None  # which of the dense net's current features the pruned net has; None for all
    errors = np.zeros(1)
    scales, local, local_lq, gains, slopes, measured, observed = [], [], [], [], [], [], []
    with torch.no_grad():
        for segment in segments:
            slope = 1.0
            for name, module in segment.steps:
                before, after = _as_double(module), _as_double(partners[name])
                if isinstance(before, nn.Linear | _ConvNd):
                    assert isinstance(after, nn.Linear | _ConvNd)
                    change = _Change(before, after, x, cut.get(name), corrections.get(name))
                    scales.append(change.scale)
                    gains.append(_largest_row_sum(_rows(after)))
                    untouched = not errors.any() and change.is_none
                    noise = 0.0 if untouched else change.rounding
                    local.append(change.by_norms() + noise)
                    local_lq.append(change.by_quasinorms(retained.get(f"{name}.weight"), q) + noise)
                    own = change.measured(kept) + noise
                    errors = unit_errors(own, *_passed_on(after, errors), 1.0)
                    producer = cut.get(name)
                    kept = None if producer is None else torch.from_numpy(producer.indices)
                else:
                    slope *= _slope(before)
                x, y = before(x), after(y)
            errors = errors * slope
            slopes.append(slope)
            measured.append(float(outward(errors.max(), product_error(2))) if errors.any() else 0.0)
            seen = x if kept is None else x[..., kept]
            observed.append(float((seen - y).square().mean(0).sqrt().max()))
    is_masked = plan.method == "lq"
    return pd.DataFrame(
        {
            "layer": [segment.layer for segment in segments],
            "scale": scales,
            "local_bound": local,
            "gain": gains,
            "observed": observed,
            "bound_measured": measured,
            "bound": chain_error(local, gains, slopes),
            "bound_lq": chain_error(local_lq, gains, slopes) if is_masked else math.nan,
        }
    )


@dataclass
class _Segment:
    """A weight layer with the functions that follow it; what precedes the first layer joins the first."""

    layer: str
    steps: list[tuple[str, nn.Module]]


def _segments(model: nn.Sequential) -> list[_Segment]:
    segments: list[_Segment] = []
    lead: list[tuple[str, nn.Module]] = []
    for name, module in _leaves(model, ""):
        if isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd):
            segments.append(_Segment(name, [*lead, (name, module)]))
            lead = []
            continue
        _slope(module)  # refuses what is not a known function
        if segments:
            segments[-1].steps.append((name, module))
        elif isinstance(module, nn.Flatten | nn.Identity):
            lead.append((name, module))
        else:
            raise ValueError(f"The chain starts with a {type(module).__name__}. Start it at its first weight layer.")
    if not segments:
        raise ValueError("The chain holds no Linear or Conv layer.")
    return segments


def _leaves(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _leaves(child, f"{prefix}.{name}" if prefix else name)


def _slope(module: nn.Module) -> float:
    kind = type(module)
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
        # The rms of a maximum over m positions can be √m times that of any one of them.
        dims = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}[kind]  # type: ignore[index]
        size = module.kernel_size
        return math.sqrt(math.prod(size) if isinstance(size, tuple) else size**dims)
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.ELU | nn.CELU):
        return max(1.0, abs(module.alpha))
    if isinstance(module, _BatchNorm) and module.running_var is not None:
        factor = (module.running_var.double() + module.eps).rsqrt()
        if module.weight is not None:
            factor = factor * module.weight.detach().double().abs()
        return float(outward(float(factor.max()), norm_error(4, 1.0)))
    if kind not in _LIPSCHITZ:
        raise ValueError(f"The chain holds a {kind.__name__}, whose Lipschitz constant is not known here.")
    return _LIPSCHITZ[kind]


def _as_double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("cpu", torch.float64).eval()


def _rows(module: nn.Module) -> Array:
    assert isinstance(module, nn.Linear | _ConvNd)
    return to_unit_rows(module.weight.detach().numpy(), 0)


def _largest_row_sum(W: Array) -> float:
    return float(outward(np.abs(W).sum(axis=1).max(), norm_error(W.shape[1], 1.0)))


def _bias(module: nn.Module, units: int) -> Array:
    assert isinstance(module, nn.Linear | _ConvNd)
    return np.zeros(units) if module.bias is None else module.bias.detach().numpy()


@dataclass(frozen=True)
class _Change:
    """One weight layer before and after, with the dense net's inputs to it."""

    before: nn.Linear | _ConvNd
    after: nn.Linear | _ConvNd
    features: Tensor
    cut: Correction | None
    correction: Correction | None

    def weights(self) -> tuple[Array, Array, Array, Array]:
        """Return dense weights and biases of the units that stay, then pruned weights and biases."""
        W, V = _rows(self.before), _rows(self.after)
        b, c = _bias(self.before, len(W)), _bias(self.after, len(V))
        if self.cut is not None:
            W, b = W[self.cut.indices], b[self.cut.indices]
        if len(W) != len(V) or (self.correction is None and W.shape != V.shape):
            raise ValueError(f"Weights of shapes {W.shape} and {V.shape} do not match. The plan is for other models.")
        return W, b, V, c

    @property
    def is_none(self) -> bool:
        """Whether the layer is as before, so that equal inputs give equal outputs bit for bit."""
        if self.cut is not None or self.correction is not None:
            return False
        W, b, V, c = self.weights()
        return bool((W == V).all() and (b == c).all())

    @property
    def scale(self) -> float:
        rms = self.features.square().mean(0).sqrt().max()
        return float(outward(float(rms), norm_error(self.features.shape[0], 2.0)))

    @property
    def rounding(self) -> float:
        """How far the two evaluations of this layer can stray together."""
        W, V = _rows(self.before), _rows(self.after)
        # The pruned net's features may be larger than the dense net's; twice the scale covers any sane difference, and
        # larger ones make errors beside which rounding is nothing.
        size = 2 * self.scale * max(_largest_row_sum(W), _largest_row_sum(V))
        size += float(np.abs(_bias(self.before, len(W))).max() + np.abs(_bias(self.after, len(V))).max())
        return float(2 * norm_error(W.shape[1] + 1, 1.0) * size)

    def by_norms(self) -> float:
        """Bound the largest unit error from what was removed."""
        W, b, V, c = self.weights()
        if self.correction is None:
            return max(unit_error_l1(v, self.scale) + abs(d) for v, d in zip(W - V, b - c, strict=True))
        skeleton = self.correction.skeleton
        if skeleton is None:
            raise ValueError("The plan was read from a file and lacks its interpolation matrices. Make the plan again.")
        A = self.features.reshape(-1, self.features.shape[-1]).numpy()
        residual = skeleton_residual(A, skeleton.indices, skeleton.interpolation, skeleton.offset)
        order = np.argsort(skeleton.indices)
        folded = W @ skeleton.interpolation[order].T  # what T alone would make of the consumer
        # What was installed may differ from that: by refitting against drift, and by rounding to the model's dtype.
        mismatch = A[:, self.correction.indices] @ (V - folded).T + (c - b - W @ skeleton.offset)
        rms = np.sqrt(np.mean(mismatch**2, axis=0))
        return float(outward((skeleton_output_bound(residual, W) + rms).max(), norm_error(max(A.shape), 1.0)))

    def by_quasinorms(self, retained: npt.NDArray[np.int64] | None, q: float) -> float:
        """Bound the largest unit error from ‖w‖_q and the count kept; only for masks of the largest weights."""
        W, _, V, _ = self.weights()
        if retained is None or W.shape != V.shape or len(retained) != len(W):
            return self.by_norms()
        return max(
            unit_error_lq(w, int(k), q=q, scale=self.scale) if k else 0.0 for w, k in zip(W, retained, strict=True)
        )

    def measured(self, kept: Tensor | None) -> Array:
        """Return each unit's own error on the dense net's features, the largest over positions."""
        features = self.features if kept is None else self.features[..., kept]
        dense = self.before(self.features)
        if self.cut is not None:
            dense = dense[..., torch.from_numpy(self.cut.indices)]
        rms = (dense - self.after(features)).square().mean(0).sqrt()
        by_unit = rms.flatten(1).amax(1) if isinstance(self.before, _ConvNd) else rms.reshape(-1, rms.shape[-1]).amax(0)
        return outward(by_unit.numpy(), norm_error(self.features.shape[0], 2.0))


def _passed_on(layer: nn.Linear | _ConvNd, errors: Array) -> tuple[Array, Array]:
    """Return the layer's magnitudes as a matrix over the units read, and their errors, one for each column.

    A convolution reads each channel at several offsets, with the channel's largest error at each; a Linear after a
    flatten reads each channel at several positions in a row.
    """
    magnitudes = np.abs(layer.weight.detach().numpy())
    if isinstance(layer, nn.Linear):
        return magnitudes, np.repeat(errors, layer.in_features // errors.size)
    by_channel = magnitudes.reshape(*magnitudes.shape[:2], -1).sum(axis=2)
    units_per_group = layer.out_channels // layer.groups
    full = np.zeros((layer.out_channels, layer.in_channels))
    for i, row in enumerate(by_channel):
        first = (i // units_per_group) * by_channel.shape[1]
        full[i, first : first + by_channel.shape[1]] = row
    return full, np.repeat(errors, layer.in_channels // errors.size)
