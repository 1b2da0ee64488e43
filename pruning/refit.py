"""Refitting masked layers on calibration inputs, without training: each learns to do with less what it did before."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis import as_input, track
from ellq.pruning.copied import copied
from ellq.pruning.layer_problem import RIDGE, Kept, Problem, on_host, problems_of
from ellq.pruning.masks import mask_, maskable_weights, retained_entries
from ellq.pruning.patches import PatchLayer, as_rows, reads_patches
from ellq.pruning.plan import Plan
from ellq.pruning.walk import Arrival, walk
from ellq.theory import Array, eliminate_rows, fit_rows, reweight, sparsegpt_rows
from ellq.theory.input_moments import layer_errors

_OPERATIONS = 2e12  # of an elimination; about five minutes on two processors
_SPARSEGPT_RIDGE = 1e-2  # the authors' percdamp


@dataclass(frozen=True)
class _Fitted:
    """What the rows of a group become.

    Attributes:
        weights: shape (c, d), 0 where not kept.
        kept: which of them are retained.
        bounds: of each row's root mean square error, where one is proved; shape (c,).
    """

    weights: Array
    kept: Kept
    bounds: Array | None = None


Fit = Callable[[Problem, float], _Fitted]


def _masked(problem: Problem, ridge: float = RIDGE) -> _Fitted:
    return _Fitted(np.where(problem.kept, problem.dense, 0.0), problem.kept)


def _least_squares(problem: Problem, ridge: float) -> _Fitted:
    return _Fitted(fit_rows(*problem.ridged(ridge), problem.kept), problem.kept)


def is_affordable(units: int, size: int) -> bool:
    """Whether elimination row by row is worth its time for a layer."""
    return units * size**3 <= _OPERATIONS


def _surgeon(problem: Problem, ridge: float) -> _Fitted:
    if not is_affordable(*problem.dense.shape):
        return _least_squares(problem, ridge)
    H, R = problem.ridged(ridge)
    paths = eliminate_rows(H, np.linalg.solve(H, R.T).T, precision="float32")
    kept = paths.kept(problem.kept.sum(axis=1))
    # Greedy: where the plan's own choice does better, it stays.
    ours, plain = _Fitted(fit_rows(H, R, kept), kept), _least_squares(problem, ridge)
    worse = problem.errors(ours.weights) > problem.errors(plain.weights)
    ours.weights[worse], ours.kept[worse] = plain.weights[worse], plain.kept[worse]
    return ours


def _reweighted(problem: Problem, ridge: float) -> _Fitted:
    found = [
        reweight(w, problem.H, int(kept.sum()), entry_error=problem.stray)
        for w, kept in zip(problem.dense, problem.kept, strict=True)
    ]
    weights = np.array([row.weights for row in found])
    return _Fitted(weights, weights != 0, np.array([row.bound for row in found]))


def _sparsegpt(problem: Problem, ridge: float) -> _Fitted:
    if not problem.kept.any():
        return _masked(problem)
    H, _ = problem.ridged(_SPARSEGPT_RIDGE)
    weights = sparsegpt_rows(H, problem.dense, 1 - float(problem.kept.mean()))
    return _Fitted(weights, weights != 0)


@dataclass(frozen=True)
class Refit:
    """A way of refitting.

    Attributes:
        fit: from a group of rows to their new weights and which are retained.
        shifts: whether the mean of every unit's output is restored, through its bias or the batch norm after it.
        follows: whether layers meet what those before them became, and repair its drift; else each is fitted to the
            dense network's own inputs.
        proves: whether a bound of each unit's error comes with it.
    """

    fit: Fit
    shifts: bool = True
    follows: bool = True
    proves: bool = False


REFITS: dict[str, Refit] = {
    "bias": Refit(_masked),
    "least_squares": Refit(_least_squares),
    "obs": Refit(_surgeon),
    "reweight": Refit(_reweighted, shifts=False, follows=False, proves=True),
    "sparsegpt": Refit(_sparsegpt, shifts=False),
}


CHOOSING = ("obs", "reweight", "sparsegpt")
"""The refits that choose anew which entries stay."""


def refit_masks(
    model: nn.Module, plan: Plan, batches: Sequence[Tensor], *, refit: str, ridge: float = RIDGE, seed: int = 0
) -> Plan:
    """Choose anew and refit what a plan of masks retains, layer by layer in the order they run, without gradients.

    - ``"bias"``: weights as they are; each unit's mean output is restored.
    - ``"least_squares"``: the retained weights of every unit, and its shift, fitted to the dense network's output.
    - ``"obs"``: besides, which weights of a unit stay is chosen by elimination (``eliminate_rows``), as many as the
      plan says; the plan's own choice stays where it does better.
      Layers for which that would take more than 2e12 operations (units times the cube of their size) are refitted by
      ``"least_squares"``.
    - ``"reweight"``: the rule of ``ellq.theory.reweight`` on the dense network's inputs, with its guarantee; a unit may
      retain fewer than the plan says, where one entry is picked twice.
    - ``"sparsegpt"``: SparseGPT at the plan's sparsity of every layer; like the authors', it knows no minimum of units.

    The first three never raise a unit's error on the positions that are looked at, rounding aside; nor does
    ``"reweight"`` where the plan keeps the largest of each unit. A shift goes through the layer's bias, or the batch
    norm that alone reads it; without either there is none.

    Linear layers and convolutions (grouped or not) that run once and share nothing are refitted;
    what else the plan masks is masked only. Where a network can be traced and a batch norm ends in a sum with a skip
    path, the layer also makes up for what that path has lost. A ridge pulls towards the dense weights.

    Args:
        model: the dense model, in eval mode for the time; not changed.
        plan: of ``method="lq"``, for this model.
        batches: calibration inputs.
        refit: one of ``REFITS``.
        ridge: of ``"least_squares"`` and ``"obs"``, > 0, relative to the mean diagonal of the inputs' second moments.
        seed: of the positions that are looked at where there are more than 100 for each weight of a unit.

    Returns:
        The plan with ``kept``, ``values`` and ``measured``: one row per refitted layer with samples, error_before and
        error_after, the root mean square error of its outputs on the calibration inputs relative to the dense ones
        (their spread, where a shift is refitted): of the mask without refit, and of what it became, both on the inputs
        that the layers before leave. For ``"reweight"`` also bound: what is proved, beforehand, of the root mean square
        error of each of its units, relative to that of the layer's outputs over units; error_after is below it.

    Raises:
        ValueError: an unknown ``refit``, the plan is for another model, the model does not run on the inputs, or a NaN
            or infinite input of a layer.

    Reference: Hassibi & Stork 1993; Frantar & Alistarh 2022, 2023; targets that carry the drift are ours.
    """
    if refit not in REFITS:
        raise ValueError(f"refit={refit!r} is unknown. Choose one of {', '.join(map(repr, REFITS))}.")
    way = REFITS[refit]
    dense = copied(model).eval()
    weights = maskable_weights(dense)
    masks = retained_entries(weights, plan)
    changed = copy.deepcopy(dense)
    mask_(maskable_weights(changed), masks)
    layers = layers_of(dense, masks)
    fed = [as_input(batch, dense) for batch in batches]
    table = plan.table.copy()
    kept = dict(plan.kept)
    values: dict[str, npt.NDArray[Any]] = {}
    rows: list[dict[str, Any]] = []
    draw = torch.Generator().manual_seed(seed)
    arrivals = walk(dense, changed if way.follows else dense, fed, layers)
    for arrival in track(arrivals, "refitting", total=len(layers)):
        name = weight_name(arrival.name)
        layer = cast(PatchLayer, changed.get_submodule(arrival.name))
        given = cast(PatchLayer, dense.get_submodule(arrival.name))
        shifts = way.shifts and (layer.bias is not None or arrival.norm is not None)
        problems = list(problems_of(given, arrival, masks[name], centred=shifts, draw=draw))
        if not way.follows:
            problems = [problem.without_noise() for problem in problems]
        fits = [way.fit(problem, ridge) for problem in problems]
        shape = masks[name].shape
        kept[name] = np.concatenate([fit.kept for fit in fits]).reshape(shape)
        own = table["layer"] == name
        counts = kept[name].reshape(int(own.sum()), -1).sum(axis=1)
        if refit in CHOOSING and (counts != table.loc[own, "retained"]).any():
            table.loc[own, "reason"] = f"chosen by refit {refit}"
        table.loc[own, "retained"] = counts
        values[name] = _set_(layer.weight, np.concatenate([fit.weights for fit in fits]).reshape(shape))
        stored = list(as_rows(layer, torch.from_numpy(values[name])).double().numpy())
        before = after = np.zeros(shape[0])
        if shifts:
            pairs = zip(problems, stored, strict=True)
            after = np.concatenate([problem.y_mean - w @ problem.x_mean for problem, w in pairs])
            value, before, after = _shift_(dense, changed, arrival, after)
            values |= value
        plain = [_masked(problem).weights for problem in problems]
        errors = [_relative_error(problems, w, shift) for w, shift in ((plain, before), (stored, after))]
        row = {"layer": name, "samples": problems[0].samples, "error_before": errors[0], "error_after": errors[1]}
        bound = _relative_bound(problems, fits, stored)
        rows.append(row | ({} if bound is None else {"bound": bound}))
    columns = ["layer", "samples", "error_before", "error_after", *(["bound"] if way.proves else [])]
    measured = pd.DataFrame(rows, columns=columns)
    settings = plan.settings | {"refit": refit}
    return replace(plan, table=table, kept=kept, values=values, settings=settings, measured=measured)


def layers_of(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the layers among those masked that can be refitted: of a known kind, and sharing nothing."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    modules = dict(model.named_modules())
    owners = [name.rpartition(".")[0] for name in masks if name.rpartition(".")[2] == "weight"]
    known = [name for name in owners if name in modules and reads_patches(modules[name])]
    return [name for name in known if all(holders[id(p)] == 1 for p in modules[name].parameters(recurse=False))]


def weight_name(layer: str) -> str:
    """Return the name of a layer's weight; that of a model which is the layer has no path."""
    return f"{layer}.weight" if layer else "weight"


def _relative_error(problems: Sequence[Problem], weights: Sequence[Array], shift: Array) -> float:
    """Return the root mean square error of a layer's outputs, relative to theirs (their spread if centred)."""
    error = 0.0
    for problem, w, own in zip(problems, weights, np.split(shift, len(problems)), strict=True):
        drift = problem.y_mean - w @ problem.x_mean - own
        error += float(problem.errors(w).sum() + np.square(drift).sum())
    signal = sum(float(problem.energy.sum()) for problem in problems)
    return math.sqrt(error / signal) if signal > 0 else 0.0


def _relative_bound(problems: Sequence[Problem], fits: Sequence[_Fitted], stored: Sequence[Array]) -> float | None:
    """Return the largest bound of a unit relative to the root mean square of all units' outputs, if there is any."""
    largest = 0.0
    for problem, fit, w in zip(problems, fits, stored, strict=True):
        if fit.bounds is None:
            return None
        rounding = layer_errors(w - fit.weights, problem.H, entry_error=problem.stray)
        largest = max(largest, float((fit.bounds + rounding).max()))
    units = sum(len(problem.energy) for problem in problems)
    signal = sum(float(problem.energy.sum()) for problem in problems) / units
    return math.nextafter(largest / math.sqrt(signal) * (1 + 1e-14), math.inf) if signal > 0 else 0.0


def _set_(tensor: Tensor, value: Array) -> npt.NDArray[Any]:
    """Write a tensor and return it as it was stored."""
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(value))
    return on_host(tensor).numpy().copy()


def _shift_(
    dense: nn.Module, changed: nn.Module, arrival: Arrival, shift: Array
) -> tuple[dict[str, npt.NDArray[Any]], Array, Array]:
    """Move every unit's output by a shift, through its own bias or the running mean of the norm that reads it.

    Returns:
        What was stored, by name, and the shift before and after.
    """
    layer = changed.get_submodule(arrival.name)
    if layer.bias is not None:
        before = cast(Tensor, dense.get_submodule(arrival.name).bias).detach().cpu().double().numpy()
        stored = _set_(cast(Tensor, layer.bias), shift)
        return {weight_name(arrival.name).removesuffix("weight") + "bias": stored}, before, stored.astype(np.float64)
    assert arrival.norm is not None
    mean = cast(Tensor, dense.get_submodule(arrival.norm).running_mean).double().cpu().numpy()
    stored = _set_(cast(Tensor, changed.get_submodule(arrival.norm).running_mean), mean - shift)
    return {f"{arrival.norm}.running_mean": stored}, np.zeros_like(shift), mean - stored
