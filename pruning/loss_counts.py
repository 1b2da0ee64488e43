"""How many weights each unit keeps, from what calibration inputs say that removing them loses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ellq.analysis import as_input, track
from ellq.pruning.masks import maskable_weights, retained_entries
from ellq.pruning.patches import PatchLayer
from ellq.pruning.plan import Plan
from ellq.pruning.refit import layers_of, problems_of
from ellq.pruning.walk import walk
from ellq.theory import Array, eliminate_rows

_INPUTS = 256  # calibration inputs that tell how outputs respond; more change little


def share_by_loss(model: nn.Module, plan: Plan, batches: Sequence[Tensor], *, least: int = 1, seed: int = 0) -> Plan:
    """Share what a plan retains among units anew, by what each weight's removal loses once the unit is refitted.

    Removing one more weight of unit i raises its squared error by cost_i, from ``eliminate_rows`` on the dense
    network's inputs. The weights of least √(s_i/e_l)·cost_i go, until as many are left as the plan retains: s_i is the
    mean squared response of the network's outputs to a change of the unit's (first order, so right for small errors),
    e_l the energy of the layer's outputs (so that cost/e_l is a relative error, right for large ones). The geometric
    mean of both is a heuristic; for given weights of units the counts are optimal as far as costs rise.

    Args:
        model: the dense model; not changed.
        plan: of ``method="lq"``. Layers that cannot be refitted keep their counts; so does each layer its total where
            the plan's budget is by layer.
        batches: calibration inputs.
        least: what every unit with a weight other than 0 retains at least.
        seed: of the directions in which outputs are looked at.

    Returns:
        The plan with other counts, of the same total.

    Raises:
        ValueError: as for ``refit_masks``.

    Reference: ours.
    """
    dense = copy.deepcopy(model).eval()
    masks = retained_entries(maskable_weights(dense), plan)
    layers = layers_of(dense, masks)
    fed = [as_input(batch, dense) for batch in batches]
    response = _responses(dense, layers, fed, seed)
    losses: dict[str, Array] = {}
    draw = torch.Generator().manual_seed(seed)
    for arrival in track(walk(dense, dense, fed, layers), "weighing units", total=len(layers)):
        name = f"{arrival.name}.weight"
        layer = cast(PatchLayer, dense.get_submodule(arrival.name))
        centred = layer.bias is not None or arrival.norm is not None
        problems = list(problems_of(layer, arrival, masks[name], centred=centred, draw=draw))
        energy = sum(float(problem.energy.sum()) for problem in problems)
        costs = [eliminate_rows(p.ridged()[0], p.dense, precision="float32").costs for p in problems]
        weight = np.sqrt(response[arrival.name] / energy) if energy > 0 else np.zeros(len(response[arrival.name]))
        losses[name] = _lasting(
            np.concatenate(costs) * weight[:, None], np.concatenate([p.dense for p in problems]), least
        )
    table = plan.table.copy()
    together = [list(losses)] if isinstance(plan.settings.get("sparsity", 0.0), float) else [[name] for name in losses]
    for names in together:
        for name, counts in zip(names, _counts([losses[n] for n in names], _retained(plan, names)), strict=True):
            table.loc[table["layer"] == name, "retained"] = counts
            table.loc[table["layer"] == name, "reason"] = "least loss on calibration inputs"
    return replace(plan, table=table, kept={}, values={})


def _lasting(costs: Array, weights: Array, least: int) -> Array:
    """Return what must be lost to get below each count: no later removal is cheaper than an earlier one."""
    rising = np.maximum.accumulate(costs, axis=1)
    d = costs.shape[1]
    protected = np.minimum(least, np.count_nonzero(weights, axis=1))
    rising[np.arange(d) >= d - protected[:, None]] = np.inf
    return rising


def _retained(plan: Plan, names: Sequence[str]) -> int:
    return int(plan.table["retained"][plan.table["layer"].isin(names)].sum())


def _counts(losses: Sequence[Array], retained: int) -> list[npt.NDArray[np.int64]]:
    """Return how many of each unit stay when the ``retained`` dearest of all do; of equal ones the first."""
    joined = np.concatenate([loss.ravel() for loss in losses])
    stays = np.zeros(joined.size, dtype=bool)
    stays[np.argsort(-joined, kind="stable")[:retained]] = True
    ends = np.cumsum([loss.size for loss in losses])[:-1]
    return [part.reshape(loss.shape).sum(axis=1) for part, loss in zip(np.split(stays, ends), losses, strict=True)]


def _responses(model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor], seed: int) -> Mapping[str, Array]:
    """Return the mean squared response of random sums of outputs to each unit's, added up over positions."""
    totals: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        is_linear = isinstance(model.get_submodule(name), nn.Linear)

        def add(slope: Tensor) -> None:
            squares = slope.double().square()
            own = squares.flatten(0, -2).sum(0) if is_linear else squares.flatten(2).sum((0, 2))
            totals[name] = totals.get(name, torch.zeros_like(own)) + own

        output.register_hook(add)  # type: ignore[no-untyped-call]

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name in layers
    ]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    draw = torch.Generator().manual_seed(seed)
    inputs = 0
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for batch in batches:
            if inputs >= _INPUTS:
                break
            batch = batch[: _INPUTS - inputs]
            inputs += len(batch)
            outputs: Any = model(batch)
            outputs = outputs if isinstance(outputs, Tensor) else next(iter(outputs))
            direction = torch.randn(outputs.shape, generator=draw).to(outputs)
            model.zero_grad()
            (outputs * direction).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
    units = {name: len(cast(Tensor, model.get_submodule(name).weight)) for name in layers}
    zero = {name: np.zeros(count) for name, count in units.items()}
    return zero | {name: total.cpu().numpy() / max(inputs, 1) for name, total in totals.items()}
