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
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis import to_unit_rows
from ellq.pruning.apply import finalize
from ellq.pruning.mask_parametrization import is_masked
from ellq.pruning.masks import keep_largest
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

# Exact types throughout: a subclass may compute something else.
_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MAX_POOLS: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_AVERAGES: tuple[type[nn.Module], ...] = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_WITHOUT_ROUNDING: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    *_MAX_POOLS,
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
    **dict.fromkeys(_AVERAGES, 1.0),
}


def chain_bounds(
    dense: nn.Sequential, pruned: nn.Sequential, inputs: Tensor, plan: Plan, *, q: float = 0.5
) -> pd.DataFrame:
    """Compare a dense chain with its pruned version, layer by layer, in float64 and eval mode.

    Three bounds on the same error, from less and less to more and more knowledge:

    - ``bound_lq``: of each pruned unit only ‖w‖_q and the count k; its own error is at most B·c·‖w‖_q·k^(1−1/q), with B
      the largest root mean square of an input. Masks of the largest weights only.
    - ``bound``: what was removed; a unit's own error is at most B·‖v‖_1 where weights v were masked, and at most
      ‖A − A_J T‖_2‖u‖/√n + ‖A_J(û − Tu)‖/√n where its inputs A were cut to a skeleton and its weights u became û.
    - ``bound_measured``: each unit's own error measured on the dense net's features.

    Errors of earlier layers pass on through the pruned weights' magnitudes and the activations' Lipschitz constants: by
    the largest row sum in the first two, unit by unit (and position by position) in the third. Rounding in both forward
    passes is included.

    Args:
        dense: a Sequential (nested ones allowed) of Linear and Conv layers and of element-wise functions, average or
            max pooling, dropout, batch norm, flatten.
        pruned: ``apply(dense, plan)``, masked or finalised.
        inputs: shape (n, …), n ≥ 1; the distribution the errors are over.
        plan: the plan that led from one to the other.
        q: order of the quasi-norm in ``bound_lq``, 0 < q < 1.

    Returns:
        One row per weight layer: ``layer``; ``scale`` (B); ``local_bound`` (that layer's own error); ``gain`` (largest
        row sum); ``observed`` (error at the next weight layer's inputs, or at the output); the three bounds on it, NaN
        where one does not apply.

    Raises:
        ValueError: the models are no such chains, the plan is not for them, or inputs that do not fit or are not
            finite.

    Reference: statements ``linear-unit-l1``, ``multilayer``, ``risk-empirical``, ``multilayer-units`` of the registry.
    """
    dense, pruned = (finalize(chain) if is_masked(chain) else chain for chain in (dense, pruned))
    steps = list(_steps(dense, ""))
    if not any(type(module) in _LAYERS for _, module in steps):
        raise ValueError("The chain holds no Linear or Conv layer.")
    partners = dict(_steps(pruned, ""))
    corrections = {c.consumer: c for c in plan.corrections}
    cut = {c.producer: c for c in plan.corrections}
    by_magnitude = plan.method == "lq" and not plan.kept and not plan.values  # noqa: PD011 -- no pandas
    retained = {str(name): rows["retained"].to_numpy() for name, rows in plan.table.groupby("layer", sort=False)}
    _require_same_chain([name for name, _ in steps], list(partners), [*cut, *corrections, *retained], plan.method)
    if inputs.ndim < 2 or len(inputs) == 0 or not torch.isfinite(inputs).all():
        raise ValueError(f"inputs of shape {tuple(inputs.shape)} must be finite examples along axis 0, one at least.")
    x = inputs.detach().to("cpu", torch.float64).clone()  # twice: activations may work in place
    y = x.clone()
    kept: Tensor | None = None  # which of the dense net's current features the pruned net has; None for all
    errors = torch.zeros_like(x[0])  # of every unit at every position
    # One link for each step: its own error, by ‖w‖_q too, and how it passes on the errors before it.
    local, local_lq, gains = [], [], []
    rows: list[dict[str, float | str]] = []
    ends: list[int] = []
    with torch.no_grad():
        for number, (name, module) in enumerate(steps):
            before, after = _as_double(module), _as_double(partners[name])
            _require_same_step(name, before, after)
            if isinstance(before, _Layer) and isinstance(after, _Layer):
                _require_batch(name, before, x)
                change = _Change(name, before, after, x, cut.get(name), corrections.get(name))
                noise = 0.0 if change.is_none and not errors.any() else change.rounding
                local.append(change.by_norms + noise)
                counts = retained.get(f"{name}.weight".removeprefix(".")) if by_magnitude else None
                local_lq.append(change.by_quasinorms(counts, q) + noise)
                gains.append(_largest_row_sum(_rows(after)))
                result = before(x)
                own = change.measured(result, kept).clamp(max=change.by_norms)  # above it by rounding alone
                errors = _passed_on(after, errors, own + noise)
                producer = cut.get(name)
                kept = None if producer is None else torch.from_numpy(producer.indices)
                rows.append({"layer": name, "scale": change.scale, "local_bound": local[-1], "gain": gains[-1]})
                ends.append(number)
                x, y = result, after(y)
            else:
                reach = float(_rms(x).max())
                x, y = before(x), after(y)
                terms = errors[0].numel() if type(before) in _AVERAGES else 4
                noise = _rounding(before, reach, float(_rms(x).max()), terms) if errors.any() else 0.0
                local.append(noise)
                local_lq.append(noise)
                gains.append(_slope(before))
                errors = _outward(_through(before, errors) + noise, terms)
            if len(x) != len(inputs) or x.ndim < 2:
                raise ValueError(f"Step {name!r} mixes examples. Leave axis 0 as it is.")
            if rows:
                ends[-1] = number
                rows[-1]["observed"] = float(_rms((x if kept is None else x[..., kept]) - y).max())
                rows[-1]["bound_measured"] = float(errors.max())
    table = pd.DataFrame(rows)
    ones = [1.0] * len(steps)
    table["bound"] = np.array(chain_error(local, gains, ones))[ends]
    table["bound_lq"] = np.array(chain_error(local_lq, gains, ones))[ends] if by_magnitude else math.nan
    return table


def _steps(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the weight layers and functions of a chain in order; refuse what is neither."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(f"Step {prefix!r} carries a forward hook, which may change what it computes. Remove the hook.")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for name, child in module._modules.items():  # named_children would leave out the second use of a module
            assert child is not None
            yield from _steps(child, f"{prefix}.{name}" if prefix else name)
        return
    if type(module) not in _LAYERS:
        _slope(module)
    yield prefix, module


def _slope(module: nn.Module) -> float:
    """Return the Lipschitz constant of a function; refuse those not known."""
    kind = type(module)
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) and not module.return_indices:
        # The rms of a maximum over m positions can be √m times that of any one of them.
        return math.sqrt(_window(module.kernel_size, _MAX_POOLS[kind]))
    if isinstance(module, nn.AvgPool2d | nn.AvgPool3d) and module.divisor_override:
        return _window(module.kernel_size, 2 if isinstance(module, nn.AvgPool2d) else 3) / abs(module.divisor_override)
    if kind is nn.LeakyReLU:
        return max(1.0, abs(float(module.negative_slope)))  # type: ignore[arg-type]
    if kind is nn.ELU:
        return max(1.0, abs(float(module.alpha)))  # type: ignore[arg-type]
    if kind is nn.CELU and float(module.alpha) > 0:  # type: ignore[arg-type]
        return 1.0
    if kind in _BATCH_NORMS and module.running_var is not None:
        return float(_norm_factors(module).max())
    if kind not in _LIPSCHITZ:
        raise ValueError(f"The chain holds a {kind.__name__}, whose Lipschitz constant is not known here.")
    return _LIPSCHITZ[kind]


def _window(size: int | tuple[int, ...], dims: int) -> int:
    return math.prod(size) if isinstance(size, tuple) else size**dims


def _norm_factors(module: nn.Module) -> Tensor:
    """Return what a batch norm multiplies each channel by, in magnitude, rounded up."""
    assert isinstance(module, _BATCH_NORMS)
    assert module.running_var is not None
    factors = (module.running_var.double() + module.eps).rsqrt()
    if module.affine:
        factors = factors * module.weight.detach().double().abs()
    return torch.from_numpy(outward(factors.numpy(), norm_error(4, 1.0)))


def _rounding(module: nn.Module, reach: float, result: float, terms: int) -> float:
    """Bound how far two evaluations of a function can stray together, given the rms of its inputs and outputs."""
    if type(module) in _WITHOUT_ROUNDING:
        return 0.0
    size = _slope(module) * reach + result
    if isinstance(module, _BATCH_NORMS):
        assert module.running_mean is not None
        shift = _norm_factors(module) * module.running_mean.abs()
        size += float((shift + module.bias.abs() if module.affine else shift).max())
    # Twice for a pruned net with larger features than the dense one's: see _Change.rounding.
    noise = 4 * norm_error(terms, 1.0) * size
    if isinstance(module, nn.Softplus):
        noise += math.log1p(math.exp(-module.threshold)) / abs(module.beta)  # it jumps where it becomes linear
    return noise


def _through(module: nn.Module, errors: Tensor) -> Tensor:
    """Return the errors after a function: averaged by an average, reshaped by a flatten, times the slope by others."""
    kind = type(module)
    if kind in _AVERAGES or kind is nn.Flatten:
        passed: Tensor = module(errors[None])[0].abs()
        return passed
    if kind in _MAX_POOLS:
        largest: Tensor = module(errors[None])[0]
        return _slope(module) * largest
    if kind in _BATCH_NORMS:
        return errors * _norm_factors(module).reshape(-1, *[1] * (errors.ndim - 1))
    return errors * _slope(module)


def _passed_on(layer: _Layer, errors: Tensor, own: Tensor) -> Tensor:
    """Return each unit's error after a layer: its own, and those of the units it reads times the weights' magnitudes.

    ``unit_errors`` of the theory, every position of a unit counted as a unit.
    """
    magnitudes = copy.deepcopy(layer)
    magnitudes.weight.abs_()
    magnitudes.bias = None
    return _outward(own + magnitudes(errors[None])[0], layer.weight[0].numel() + 4)


def _outward(errors: Tensor, terms: int) -> Tensor:
    rounded = torch.from_numpy(outward(errors.numpy(), norm_error(terms, 1.0), terms))
    return torch.where(errors > 0, rounded, 0.0)


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square over axis 0, scaled so that squares neither overflow nor vanish."""
    largest = values.abs().amax(0)
    largest = torch.where(largest > 0, largest, 1.0)
    return (values / largest).square().mean(0).sqrt() * largest


def _as_double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("cpu", torch.float64).eval()


def _rows(module: _Layer) -> Array:
    return to_unit_rows(module.weight.detach().numpy(), 0)


def _largest_row_sum(W: Array) -> float:
    return float(outward(np.abs(W).sum(axis=1).max(), 2 * norm_error(W.shape[1], 1.0)))


def _bias(module: _Layer, units: int) -> Array:
    return np.zeros(units) if module.bias is None else np.asarray(module.bias.detach().numpy())


def _require_same_chain(dense: list[str], pruned: list[str], planned: list[str], method: str) -> None:
    if dense != pruned:
        odd = next((name for name in [*dense, *pruned] if (name in dense) != (name in pruned)), dense[0])
        raise ValueError(f"The chains differ at {odd!r}. Pass apply(dense, plan) as the pruned one.")
    weights = dense if method == "id" else [f"{name}.weight".removeprefix(".") for name in dense]
    for name in planned:
        if name not in weights:
            raise ValueError(f"The plan is for other models: it has layer {name!r}, which the chain lacks.")


def _require_same_step(name: str, before: nn.Module, after: nn.Module) -> None:
    same = type(before) is type(after) and (type(before) is nn.Linear or before.extra_repr() == after.extra_repr())
    if same and type(before) in _BATCH_NORMS:
        state = after.state_dict()
        same = all(torch.equal(value, state[key]) for key, value in before.state_dict().items())
    if not same:
        raise ValueError(
            f"Step {name!r} is {before} in the dense chain and {after} in the pruned one. Pass apply(dense, plan)."
        )


def _require_batch(name: str, layer: _Layer, x: Tensor) -> None:
    wanted = layer.weight.ndim
    axis = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1
    size = layer.in_channels if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else layer.in_features
    if (axis == 1 and x.ndim != wanted) or x.shape[axis] != size:
        raise ValueError(f"Layer {name!r} ({layer}) cannot read features of shape {tuple(x.shape)}, batched on axis 0.")


@dataclass(frozen=True)
class _Change:
    """One weight layer before and after, with the dense net's inputs to it."""

    name: str
    before: _Layer
    after: _Layer
    features: Tensor
    cut: Correction | None
    correction: Correction | None

    @cached_property
    def weights(self) -> tuple[Array, Array, Array, Array]:
        """Dense weights and biases of the units that stay, then pruned weights and biases."""
        W, V = _rows(self.before), _rows(self.after)
        b, c = _bias(self.before, len(W)), _bias(self.after, len(V))
        rows = np.arange(len(W)) if self.cut is None else self.cut.indices
        columns = np.arange(W.shape[1]) if self.correction is None else self.correction.indices
        fits = rows.max() < len(W) and columns.max() < W.shape[1]
        if not fits or V.shape != (rows.size, columns.size):
            raise ValueError(
                f"Weights of {self.name!r} have shapes {W.shape} and {V.shape} in the two chains, which is not what the"
                " plan makes of them. The plan is for other models."
            )
        return W[rows], b[rows], V, c

    @property
    def is_none(self) -> bool:
        """Whether the layer is as before, so that equal inputs give equal outputs bit for bit."""
        if self.cut is not None or self.correction is not None:
            return False
        W, b, V, c = self.weights
        return bool((W == V).all() and (b == c).all())

    @cached_property
    def scale(self) -> float:
        return float(outward(float(_rms(self.features).max()), norm_error(len(self.features) + 2, 2.0)))

    @property
    def rounding(self) -> float:
        """How far the two evaluations of this layer, and the measurement of its own error, can stray."""
        W, b, V, c = self.weights
        # The pruned net's features may be larger than the dense net's; twice the scale covers any sane difference, and
        # larger ones make errors beside which rounding is nothing.
        size = 2 * self.scale * (np.abs(W).sum(axis=1) + np.abs(V).sum(axis=1)) + np.abs(b) + np.abs(c)
        if self.correction is not None and (skeleton := self.correction.skeleton) is not None:
            # A large interpolation matrix makes the residual a small difference of large numbers.
            explained = self.scale * (1 + np.abs(skeleton.interpolation).sum(axis=0)) + np.abs(skeleton.offset)
            size = size + 4 * np.abs(W) @ explained
        return float(2 * norm_error(W.shape[1] + 4, 1.0) * size.max())

    @cached_property
    def by_norms(self) -> float:
        """The largest unit error, bounded from what was removed."""
        if self.is_none:
            return 0.0
        W, b, V, c = self.weights
        if self.correction is None:
            return max(unit_error_l1(v, self.scale) + abs(float(d)) for v, d in zip(W - V, b - c, strict=True))
        skeleton = self.correction.skeleton
        if skeleton is None:
            raise ValueError(
                f"The plan was read from a file, which holds no interpolation matrices as large as that of"
                f" {self.name!r}. Make the plan again."
            )
        order = np.argsort(skeleton.indices)
        folded = W @ skeleton.interpolation[order].T  # what T alone would make of the consumer
        worst = 0.0
        # Errors are over examples, at each position on its own.
        for A in self.features.flatten(1, -2).unbind(1) if self.features.ndim > 2 else (self.features,):
            residual = skeleton_residual(A.numpy(), skeleton.indices, skeleton.interpolation, skeleton.offset)
            # What was installed may differ from that: by refitting against drift, and by rounding to the model's dtype.
            mismatch = A.numpy()[:, self.correction.indices] @ (V - folded).T + (c - b - W @ skeleton.offset)
            error = skeleton_output_bound(residual, W) + _rms(torch.from_numpy(mismatch)).numpy()
            worst = max(worst, float(outward(error.max(), norm_error(max(A.shape), 1.0))))
        return worst

    def by_quasinorms(self, retained: npt.NDArray[np.int64] | None, q: float) -> float:
        """Bound the largest unit error from ‖w‖_q and the count kept; only for masks of the largest weights."""
        W, b, V, c = self.weights
        if retained is None or self.cut is not None or self.correction is not None:
            return self.by_norms
        is_planned = len(retained) == len(W) and ((retained >= 0) & (retained <= W.shape[1])).all()
        if not is_planned or (np.where(keep_largest(W, retained).numpy(), W, 0.0) != V).any() or (b != c).any():
            raise ValueError(f"Layer {self.name!r} of the pruned chain is not what the plan makes of the dense one.")
        if self.is_none:
            return 0.0
        return max(
            unit_error_lq(w, int(k), q=q, scale=self.scale) if k else unit_error_l1(w, self.scale)
            for w, k in zip(W, retained, strict=True)
        )

    def measured(self, result: Tensor, kept: Tensor | None) -> Tensor:
        """Return each unit's own error on the dense net's features, given its result on them, at every position."""
        if self.is_none:
            return torch.zeros_like(result[0])
        features = self.features if kept is None else self.features[..., kept]
        if self.cut is not None:
            result = result[..., torch.from_numpy(self.cut.indices)]
        return _outward(_rms(result - self.after(features)), len(features) + 2)
