"""A dense and a pruned chain side by side: what each layer's outputs changed by, and the bound on it.

Errors are root mean squares over the inputs given, the largest over a layer's units (and positions, for
convolutions). For those inputs every bound is deterministic: it uses the sizes of weights and of the dense net's
features, never the pruned net's outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis import to_unit_rows
from ellq.pruning.apply import finalize
from ellq.pruning.chain_steps import (
    AVERAGES,
    BATCH_NORMS,
    LAYERS,
    WeightLayer,
    as_double,
    passed_on,
    rms,
    rounded_out,
    rounding_of,
    slope_of,
    steps_of,
    through,
)
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


def chain_bounds(
    dense: nn.Sequential, pruned: nn.Sequential, inputs: Tensor, plan: Plan, *, q: float = 0.5
) -> pd.DataFrame:
    """Compare a dense chain with its pruned version, layer by layer, in float64 and eval mode.

    Three bounds on the same error, from less and less to more and more knowledge:

    - ``bound_lq``: of each pruned unit only ‖w‖_q and the count k; its own error is at most B·c·‖w‖_q·k^(1−1/q), with B
      the largest root mean square of an input. Masks of the largest weights
      only, not refitted.
    - ``bound``: what was removed; a unit's own error is at most B·‖v‖_1 where weights v were masked, and at most
      ‖A − A_J T‖_2‖u‖/√n + ‖A_J(û − Tu)‖/√n where its inputs A were cut to a skeleton and its weights u became û.
    - ``bound_measured``: each unit's own error measured on the dense net's features.

    Errors of earlier layers pass on through the pruned weights' magnitudes and the activations' Lipschitz constants: by
    the largest row sum in the first two, unit by unit (and position by position) in the third. Rounding in both forward
    passes is included.

    The last two hold for whatever weights and biases the pruned chain has, refitted and trained ones too; only a batch
    norm must be as it was, so a plan whose refit moved one is refused.

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
    steps = list(steps_of(dense, ""))
    if not any(type(module) in LAYERS for _, module in steps):
        raise ValueError("The chain holds no Linear or Conv layer.")
    partners = dict(steps_of(pruned, ""))
    corrections = {c.consumer: c for c in plan.corrections}
    cut = {c.producer: c for c in plan.corrections}
    by_magnitude = plan.method == "lq" and not plan.kept and not plan.values  # noqa: PD011 -- no pandas
    rows_of = {str(name): rows for name, rows in plan.table.groupby("layer", sort=False)}
    retained = {name: rows["retained"].to_numpy() for name, rows in rows_of.items()}
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
            before, after = as_double(module), as_double(partners[name])
            _require_same_step(name, before, after)
            if isinstance(before, WeightLayer) and isinstance(after, WeightLayer):
                _require_batch(name, before, x)
                change = _Change(name, before, after, x, cut.get(name), corrections.get(name))
                noise = 0.0 if change.is_none and not errors.any() else change.rounding
                planned = f"{name}.weight".removeprefix(".")
                if planned in rows_of:
                    _require_planned_shape(planned, _rows(before), rows_of[planned])
                local.append(change.by_norms + noise)
                counts = retained.get(planned) if by_magnitude else None
                local_lq.append(change.by_quasinorms(counts, q) + noise)
                gains.append(_largest_row_sum(_rows(after)))
                result = before(x)
                own = change.measured(result, kept).clamp(max=change.by_norms)  # above it by rounding alone
                errors = passed_on(after, errors, own + noise)
                producer = cut.get(name)
                kept = None if producer is None else torch.from_numpy(producer.indices)
                rows.append({"layer": name, "scale": change.scale, "local_bound": local[-1], "gain": gains[-1]})
                ends.append(number)
                x, y = result, after(y)
            else:
                reach = float(rms(x).max())
                x, y = before(x), after(y)
                terms = errors[0].numel() if type(before) in AVERAGES else 4
                noise = rounding_of(before, reach, float(rms(x).max()), terms) if errors.any() else 0.0
                local.append(noise)
                local_lq.append(noise)
                gains.append(slope_of(before))
                errors = rounded_out(through(before, errors) + noise, terms)
            if len(x) != len(inputs) or x.ndim < 2:
                raise ValueError(f"Step {name!r} mixes examples. Leave axis 0 as it is.")
            if rows:
                ends[-1] = number
                rows[-1]["observed"] = float(rms((x if kept is None else x[..., kept]) - y).max())
                rows[-1]["bound_measured"] = float(errors.max())
    table = pd.DataFrame(rows)
    ones = [1.0] * len(steps)
    table["bound"] = np.array(chain_error(local, gains, ones))[ends]
    table["bound_lq"] = np.array(chain_error(local_lq, gains, ones))[ends] if by_magnitude else math.nan
    return table


def _rows(module: WeightLayer) -> Array:
    return to_unit_rows(module.weight.detach().numpy(), 0)


def _largest_row_sum(W: Array) -> float:
    return float(outward(np.abs(W).sum(axis=1).max(), 2 * norm_error(W.shape[1], 1.0)))


def _bias(module: WeightLayer, units: int) -> Array:
    return np.zeros(units) if module.bias is None else np.asarray(module.bias.detach().numpy())


def _require_same_chain(dense: list[str], pruned: list[str], planned: list[str], method: str) -> None:
    if dense != pruned:
        odd = next((name for name in [*dense, *pruned] if (name in dense) != (name in pruned)), dense[0])
        raise ValueError(f"The chains differ at {odd!r}. Pass apply(dense, plan) as the pruned one.")
    weights = dense if method == "id" else [f"{name}.weight".removeprefix(".") for name in dense]
    for name in planned:
        if name not in weights:
            raise ValueError(f"The plan is for other models: it has layer {name!r}, which the chain lacks.")


def _require_planned_shape(name: str, W: Array, rows: pd.DataFrame) -> None:
    shape = (len(rows), int(rows["size"].iloc[0]))
    if W.shape != shape:
        raise ValueError(
            f"The plan is for other models: {name!r} has {W.shape[0]} units of {W.shape[1]} weights, the plan"
            f" {shape[0]} of {shape[1]}."
        )


def _require_same_step(name: str, before: nn.Module, after: nn.Module) -> None:
    advice = "Pass apply(dense, plan)."
    same = type(before) is type(after) and (type(before) is nn.Linear or before.extra_repr() == after.extra_repr())
    if same and type(before) in BATCH_NORMS:
        state = after.state_dict()
        same = all(torch.equal(value, state[key]) for key, value in before.state_dict().items())
        advice = "Pass apply(dense, plan), of a plan with refit='none' where a refit moved the norm."
    if not same:
        raise ValueError(
            f"Step {name!r} is {before} in the dense chain and {after} in the pruned one, or its state differs."
            f" {advice}"
        )


def _require_batch(name: str, layer: WeightLayer, x: Tensor) -> None:
    wanted = layer.weight.ndim
    axis = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1
    size = layer.in_channels if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else layer.in_features
    if (axis == 1 and x.ndim != wanted) or x.shape[axis] != size:
        raise ValueError(f"Layer {name!r} ({layer}) cannot read features of shape {tuple(x.shape)}, batched on axis 0.")


@dataclass(frozen=True)
class _Change:
    """One weight layer before and after, with the dense net's inputs to it."""

    name: str
    before: WeightLayer
    after: WeightLayer
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
        return float(outward(float(rms(self.features).max()), norm_error(len(self.features) + 2, 2.0)))

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
            error = skeleton_output_bound(residual, W) + rms(torch.from_numpy(mismatch)).numpy()
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
        return rounded_out(rms(result - self.after(features)), len(features) + 2)
