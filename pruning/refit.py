"""Refitting masked layers on calibration inputs, without training: each learns to do with less what it did before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from ellq.analysis import as_input, track
from ellq.pruning.masks import maskable_weights, retained_entries
from ellq.pruning.patches import PatchLayer, as_rows, outputs_at, patches, positions_of, reads_patches
from ellq.pruning.plan import Plan
from ellq.pruning.walk import Arrival, walk
from ellq.theory import Array, Gram, eliminate_rows, fit_rows, reweight, row_errors, sparsegpt_rows
from ellq.theory.input_moments import moment_error

Kept = npt.NDArray[np.bool_]

RIDGE = 1e-2
"""What is added to the diagonal of the inputs' second moments, relative to its mean."""
_SAMPLES = 100  # positions per weight of a unit that are looked at; more do not change the fit, fewer do
_SPARSEGPT_RIDGE = 1e-2  # the authors' percdamp


@dataclass(frozen=True)
class _Problem:
    """One group of rows: what they are to give, in second moments (about the means where a shift is refitted).

    Attributes:
        H: E[xxᵀ], shape (d, d).
        R: E[yxᵀ], shape (c, d).
        energy: E[y²], shape (c,).
        x_mean, y_mean: means, shapes (d,) and (c,); 0 where no shift is refitted.
        samples: how many positions they are of.
        dense: the weights so far, shape (c, d).
        kept: which of them the plan retains.
    """

    H: Array
    R: Array
    energy: Array
    x_mean: Array
    y_mean: Array
    samples: int
    dense: Array
    kept: Kept

    @property
    def ridge(self) -> float:
        return RIDGE * float(np.diag(self.H).mean())

    def ridged(self, relative: float = RIDGE) -> tuple[Array, Array]:
        """Return H and R with a ridge towards the dense weights, which leaves what the samples do not say as it was."""
        amount = relative * float(np.diag(self.H).mean())
        amount = amount if amount > 0 else 1.0  # dead inputs: keep the weights
        return self.H + amount * np.eye(len(self.H)), self.R + amount * self.dense


Fit = Callable[[_Problem], tuple[Array, Kept]]


def _masked(problem: _Problem) -> tuple[Array, Kept]:
    return np.where(problem.kept, problem.dense, 0.0), problem.kept


def _least_squares(problem: _Problem) -> tuple[Array, Kept]:
    return fit_rows(*problem.ridged(), problem.kept), problem.kept


def _surgeon(problem: _Problem) -> tuple[Array, Kept]:
    H, R = problem.ridged()
    paths = eliminate_rows(H, np.linalg.solve(H, R.T).T, precision="float32")
    kept = paths.kept(problem.kept.sum(axis=1))
    return fit_rows(H, R, kept), kept


def _reweighted(problem: _Problem) -> tuple[Array, Kept]:
    rows = zip(problem.dense, problem.kept, strict=True)
    stray = moment_error(problem.samples)
    weights = np.array([reweight(w, problem.H, int(kept.sum()), entry_error=stray).weights for w, kept in rows])
    return weights, weights != 0


def _sparsegpt(problem: _Problem) -> tuple[Array, Kept]:
    H, _ = problem.ridged(_SPARSEGPT_RIDGE)
    weights = sparsegpt_rows(H, problem.dense, 1 - float(problem.kept.mean()))
    return weights, weights != 0


@dataclass(frozen=True)
class Refit:
    """A way of refitting.

    Attributes:
        fit: from a group of rows to their new weights and which are retained.
        shifts: whether the mean of every unit's output is restored, through its bias or the batch norm after it.
        follows: whether layers meet what those before them became, and repair its drift; else each is fitted to the
            dense network's own inputs.
    """

    fit: Fit
    shifts: bool = True
    follows: bool = True


REFITS: dict[str, Refit] = {
    "bias": Refit(_masked),
    "least_squares": Refit(_least_squares),
    "obs": Refit(_surgeon),
    "reweight": Refit(_reweighted, shifts=False, follows=False),
    "sparsegpt": Refit(_sparsegpt, shifts=False),
}


def refit_masks(model: nn.Module, plan: Plan, batches: Sequence[Tensor], *, refit: str, seed: int = 0) -> Plan:
    """Choose anew and refit what a plan of masks retains, layer by layer in the order they run, without gradients.

    - ``"bias"``: weights as they are; each unit's mean output is restored.
    - ``"least_squares"``: the retained weights of every unit, and its shift, fitted to the dense network's output.
    - ``"obs"``: besides, which weights of a unit stay is chosen by elimination (``eliminate_rows``), as many as the
      plan says.
    - ``"reweight"``: the rule of ``ellq.theory.reweight`` on the dense network's inputs, with its guarantee.
    - ``"sparsegpt"``: SparseGPT at the plan's sparsity of every layer.

    Linear layers and convolutions (1- and 2-dimensional, grouped or not) that run once are refitted; what else the plan
    masks is masked only. Where a network can be traced and a batch norm ends in a sum with a skip path, the layer also
    makes up for what that path has lost. A ridge of 1 % of the mean diagonal pulls towards the dense weights.

    Args:
        model: the dense model, in eval mode for the time; not changed.
        plan: of ``method="lq"``, for this model.
        batches: calibration inputs.
        refit: one of ``REFITS``.
        seed: of the positions that are looked at where there are more than 100 for each weight of a unit.

    Returns:
        The plan with ``kept``, ``values`` and ``measured``: one row per refitted layer with samples, error_before and
        error_after, the root mean square error of its outputs on the calibration inputs relative to the dense ones
        (their spread, where a shift is refitted): of the mask without refit, and of what it became, both on the inputs
        that the layers before leave.

    Raises:
        ValueError: the plan is for another model, the model does not run on the inputs, or a NaN or infinite input of
            a layer.

    Reference: Hassibi & Stork 1993; Frantar & Alistarh 2022, 2023; targets that carry the drift are ours.
    """
    way = REFITS[refit]
    dense = copy.deepcopy(model).eval()
    weights = maskable_weights(dense)
    masks = retained_entries(weights, plan)
    changed = copy.deepcopy(dense)
    for weight in maskable_weights(changed):
        if weight.name in masks:
            with torch.no_grad():
                weight.tensor.copy_(weight.tensor.double().masked_fill(~masks[weight.name].to(weight.tensor.device), 0))
    layers = layers_of(dense, masks)
    fed = [as_input(batch, dense) for batch in batches]
    kept = dict(plan.kept)
    values: dict[str, npt.NDArray[Any]] = {}
    rows: list[dict[str, Any]] = []
    draw = torch.Generator().manual_seed(seed)
    arrivals = walk(dense, changed if way.follows else dense, fed, layers)
    for arrival in track(arrivals, "refitting", total=len(layers)):
        name = f"{arrival.name}.weight"
        layer = cast(PatchLayer, changed.get_submodule(arrival.name))
        given = cast(PatchLayer, dense.get_submodule(arrival.name))
        shifts = way.shifts and (layer.bias is not None or arrival.norm is not None)
        problems = list(problems_of(given, arrival, masks[name], centred=shifts, draw=draw))
        fits = [way.fit(problem) for problem in problems]
        new = np.concatenate([weights for weights, _ in fits]).reshape(masks[name].shape)
        kept[name] = np.concatenate([stays for _, stays in fits]).reshape(masks[name].shape)
        values[name] = _set_(layer, "weight", new)
        if shifts:
            pairs = zip(problems, fits, strict=True)
            shift = np.concatenate([problem.y_mean - w @ problem.x_mean for problem, (w, _) in pairs])
            values |= _shift_(dense, changed, arrival, shift)
        rows.append({"layer": name} | _errors(problems, fits, given, shifts=shifts))
    table = plan.table.copy()
    for name, mask in kept.items():
        own = table["layer"] == name
        table.loc[own, "retained"] = mask.reshape(int(own.sum()), -1).sum(axis=1)
    measured = pd.DataFrame(rows, columns=["layer", "samples", "error_before", "error_after"])
    settings = plan.settings | {"refit": refit}
    return replace(plan, table=table, kept=kept, values=values, settings=settings, measured=measured)


def layers_of(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the layers among those masked that can be refitted."""
    owners = [name.removesuffix(".weight") for name in masks if name.endswith(".weight")]
    modules = dict(model.named_modules())
    return [name for name in owners if name in modules and reads_patches(modules[name])]


def problems_of(
    layer: PatchLayer, arrival: Arrival, mask: Tensor, *, centred: bool, draw: torch.Generator
) -> Iterator[_Problem]:
    """Accumulate what a layer meets, and yield one problem for each group of its units."""
    dense = as_rows(layer, layer.weight.detach().to("cpu", torch.float64)).numpy()
    stays = as_rows(layer, mask).numpy()
    d = dense.shape[2]
    limit = math.ceil(_SAMPLES * d / len(arrival.inputs))
    grams = [Gram(d, dense.shape[1]) for _ in dense]
    for number, (x, y) in enumerate(zip(arrival.inputs, arrival.targets, strict=True)):
        count = positions_of(layer, y)
        places = torch.randperm(count, generator=draw)[:limit] if count > limit else torch.arange(count)
        places = places.to(x.device)
        X = patches(layer, x, places).detach().cpu().float()
        Y = outputs_at(layer, y, places).detach().cpu().float()
        if not (torch.isfinite(X).all() and torch.isfinite(Y).all()):
            raise ValueError(
                f"Batch {number} of the calibration set gives NaN or infinite inputs or outputs of {arrival.name!r}."
                " Nothing was changed."
            )
        for gram, features, targets in zip(grams, X, Y, strict=True):
            gram.update(features.numpy(), targets.numpy())
    bias = np.zeros(len(dense) * dense.shape[1])
    if layer.bias is not None:
        bias = layer.bias.detach().double().cpu().numpy()
    for gram, own, keep, shift in zip(grams, dense, stays, np.split(bias, len(dense)), strict=True):
        n = gram.samples
        H, R, energy = (part / n for part in gram.moments(centred=centred))
        if centred:
            yield _Problem(H, R.T, energy, gram.x_mean, gram.y_mean, n, own, keep)
        else:  # the bias stays, so the weights account for the rest
            R, energy = R - np.outer(gram.x_mean, shift), energy - 2 * shift * gram.y_mean + shift**2
            nothing = np.zeros(len(H)), np.zeros(len(R.T))
            yield _Problem(H, R.T, energy, *nothing, n, own, keep)


def _errors(
    problems: Sequence[_Problem], fits: Sequence[tuple[Array, Kept]], layer: PatchLayer, *, shifts: bool
) -> dict[str, Any]:
    """Return the relative error of a layer's outputs before and after."""
    signal = before = after = 0.0
    bias = np.zeros(sum(len(problem.dense) for problem in problems))
    if layer.bias is not None:
        bias = layer.bias.detach().double().cpu().numpy()
    for problem, (weights, _), old in zip(problems, fits, np.split(bias, len(problems)), strict=True):
        plain = np.where(problem.kept, problem.dense, 0.0)
        measure = partial(row_errors, problem.H, problem.R, problem.energy)
        drift = problem.y_mean - plain @ problem.x_mean - old if shifts else 0.0
        signal += float(problem.energy.sum())
        before += float(measure(plain).sum() + np.sum(np.square(drift)))
        after += float(measure(weights).sum())
    relative = [math.sqrt(error / signal) if signal > 0 else 0.0 for error in (before, after)]
    return {"samples": problems[0].samples, "error_before": relative[0], "error_after": relative[1]}


def _set_(module: nn.Module, name: str, value: Array) -> npt.NDArray[Any]:
    """Write a tensor and return it as it was stored."""
    tensor = cast(Tensor, getattr(module, name))
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(value))
    stored = tensor.detach().cpu()
    return (stored if stored.dtype == torch.float64 else stored.float()).numpy().copy()


def _shift_(dense: nn.Module, changed: nn.Module, arrival: Arrival, shift: Array) -> dict[str, npt.NDArray[Any]]:
    """Move every unit's output by a shift: through its own bias, or the running mean of the norm that reads it."""
    layer = changed.get_submodule(arrival.name)
    if layer.bias is not None:
        return {f"{arrival.name}.bias": _set_(layer, "bias", shift)}
    assert arrival.norm is not None
    mean = cast(Tensor, dense.get_submodule(arrival.norm).running_mean).double().cpu().numpy()
    norm = changed.get_submodule(arrival.norm)
    return {f"{arrival.norm}.running_mean": _set_(norm, "running_mean", mean - shift)}
