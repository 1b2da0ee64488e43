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
    skeleton_output_bound,
    skeleton_residual,
    unit_error_l1,
    unit_error_lq,
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

    Where weights were masked, a layer's own error is at most B·‖v‖_1 per unit (B: largest root mean square of an
    input, v: what was removed), and at most B·c·‖w‖_q·k^(1−1/q) from its quasi-norm alone. Where hidden units were
    removed it is at most ‖A − A_J T‖_2‖u‖/√n, plus what the installed weights û add by differing from Tu, which is
    ‖A_J(û − Tu)‖/√n. Errors of earlier
    layers pass on through the pruned layer's largest row sum and the activation's Lipschitz constant. The rounding of
    both forward passes is included.

    Args:
        dense: a Sequential (nested ones allowed) of Linear and Conv layers and of element-wise functions, average or
            max pooling, dropout, batch norm, flatten.
        pruned: ``apply(dense, plan)``.
        inputs: shape (n, …), n ≥ 1; the distribution the errors are over.
        plan: the plan that led from one to the other.
        q: order of the quasi-norm in the second bound, 0 < q < 1.

    Returns:
        One row per weight layer: ``layer``; ``scale`` (B); ``local_bound`` (that layer's own error); ``gain`` (largest
        row sum); ``observed`` (error at the next weight layer's inputs, or at the output); ``bound`` on it;
        ``bound_lq``, the bound from quasi-norms (NaN for removed units); ``slack`` = bound ÷ observed.

    Raises:
        ValueError: the models are no such chains, or the plan is not for them.

    Reference: statements ``multilayer``, ``linear-unit-l1`` and ``risk-empirical`` of the registry.
    """
    segments = _segments(dense)
    partners = dict(pruned.named_modules())
    corrections = {c.consumer: c for c in plan.corrections}
    cut = {c.producer: c for c in plan.corrections}
    retained = {str(name): rows["retained"].to_numpy() for name, rows in plan.table.groupby("layer", sort=False)}
    x = y = inputs.detach().to("cpu", torch.float64)
    local, local_lq, gains, slopes, scales, observed = [], [], [], [], [], []
    with torch.no_grad():
        for segment in segments:
            slope = 1.0
            for name, module in segment.steps:
                before = _as_double(module)
                after = _as_double(partners[name])
                if isinstance(module, nn.Linear | _ConvNd):
                    scale = _largest_rms(x)
                    errors, errors_lq = _local_errors(
                        before, after, x, cut.get(name), corrections.get(name), retained.get(f"{name}.weight"), scale, q
                    )
                    local.append(errors)
                    local_lq.append(errors_lq)
                    gains.append(_largest_row_sum(_rows(after)))
                    scales.append(scale)
                else:
                    slope *= _slope(module)
                x, y = before(x), after(y)
            producer = cut.get(segment.layer)
            seen = x if producer is None else x[..., torch.from_numpy(producer.indices)]
            observed.append(float((seen - y).square().mean(0).sqrt().max()))
            slopes.append(slope)
    bounds = chain_error(local, gains, slopes)
    masked = not plan.corrections
    bounds_lq = chain_error(local_lq, gains, slopes) if masked else [math.nan] * len(bounds)
    return pd.DataFrame(
        {
            "layer": [segment.layer for segment in segments],
            "scale": scales,
            "local_bound": local,
            "gain": gains,
            "observed": observed,
            "bound": bounds,
            "bound_lq": bounds_lq,
            "slack": [b / o if o > 0 else math.inf for b, o in zip(bounds, observed, strict=True)],
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


def _largest_rms(features: Tensor) -> float:
    rms = features.square().mean(0).sqrt().max()
    return float(outward(float(rms), norm_error(features.shape[0], 2.0)))


def _rows(module: nn.Module) -> Array:
    assert isinstance(module, nn.Linear | _ConvNd)
    return to_unit_rows(module.weight.detach().numpy(), 0)


def _largest_row_sum(W: Array) -> float:
    return float(outward(np.abs(W).sum(axis=1).max(), norm_error(W.shape[1], 1.0)))


def _bias(module: nn.Module, units: int) -> Array:
    assert isinstance(module, nn.Linear | _ConvNd)
    return np.zeros(units) if module.bias is None else module.bias.detach().numpy()


def _local_errors(
    before: nn.Module,
    after: nn.Module,
    features: Tensor,
    cut: Correction | None,
    correction: Correction | None,
    retained: Array | None,
    scale: float,
    q: float,
) -> tuple[float, float]:
    """Bound the largest error of a unit from changing this layer's weights alone, in two ways."""
    W, b = _rows(before), _bias(before, len(_rows(before)))
    rounding = 2 * norm_error(W.shape[1] + 1, 1.0) * float(np.abs(W).sum(1).max() * scale + np.abs(b).max(initial=0.0))
    V, c = _rows(after), _bias(after, len(_rows(after)))
    if cut is not None:
        W, b = W[cut.indices], b[cut.indices]
    if correction is not None:
        return _refit_error(W, b, V, c, features, correction) + rounding, math.nan
    if W.shape != V.shape:
        raise ValueError(f"Weights of shapes {W.shape} and {V.shape} do not match. The plan is for other models.")
    changed = W - V
    by_tail = max(unit_error_l1(v, scale) + abs(d) for v, d in zip(changed, b - c, strict=True))
    by_norm = by_tail
    if retained is not None and len(retained) == len(W):
        by_norm = max(
            unit_error_lq(w, int(k), q=q, scale=scale) if k else 0.0 for w, k in zip(W, retained, strict=True)
        )
    # Forward passes of equal weights are equal bit for bit; only then is there no rounding to allow for.
    noise = rounding if changed.any() or cut is not None else 0.0
    return by_tail + noise, by_norm + noise


def _refit_error(W: Array, b: Array, V: Array, c: Array, features: Tensor, correction: Correction) -> float:
    skeleton = correction.skeleton
    if skeleton is None:
        raise ValueError("The plan was read from a file and lacks its interpolation matrices. Make the plan again.")
    A = features.reshape(-1, features.shape[-1]).numpy()
    residual = skeleton_residual(A, skeleton.indices, skeleton.interpolation, skeleton.offset)
    by_skeleton = skeleton_output_bound(residual, W)
    order = np.argsort(skeleton.indices)
    folded = W @ skeleton.interpolation[order].T  # what T alone would make of the consumer
    # What was installed may differ from T's fold: by refitting against drift, and by rounding to the model's dtype.
    mismatch = A[:, correction.indices] @ (V - folded).T + (c - b - W @ skeleton.offset)
    rms = np.sqrt(np.mean(mismatch**2, axis=0))
    return float(outward((by_skeleton + rms).max(), norm_error(max(A.shape), 1.0)))
