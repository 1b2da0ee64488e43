"""How many weights each unit keeps, from what calibration inputs say that removing them loses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ellq.analysis import as_input, track
from ellq.pruning.copied import copied
from ellq.pruning.layer_problem import RIDGE, problems_of
from ellq.pruning.masks import maskable_weights, retained_entries
from ellq.pruning.patches import PatchLayer, outputs_at, positions_of
from ellq.pruning.plan import Plan
from ellq.pruning.refit import is_affordable, layers_of, weight_name
from ellq.pruning.walk import does_not_run, tensors_in, walk
from ellq.theory import Array, eliminate_rows

_INPUTS = 256  # calibration inputs that tell how outputs respond; more change little


def share_by_loss(model: nn.Module, plan: Plan, batches: Sequence[Tensor], *, least: int = 1, seed: int = 0) -> Plan:
    """Share what a plan retains among units anew, by what each weight's removal loses once the unit is refitted.

    Removing one more weight of unit i raises its squared error by cost_i, from ``eliminate_rows`` on the dense
    network's inputs. The weights of least √(s_i/e_l)·cost_i go, until as many are left as the plan retains: s_i is the
    mean squared response of the network's outputs to a change of the unit's (first order, so right for small errors),
    e_l the energy of the layer's outputs (so that cost/e_l is a relative error, right for large ones). The geometric
    mean of both is a heuristic; for given weights of units the counts are optimal as far as costs rise. Where outputs
    respond to nothing (whole numbers, say), cost_i/e_l decides.

    Args:
        model: the dense model; not changed.
        plan: of ``method="lq"``. Layers that cannot be refitted, or are too large to be eliminated row by row (see
            ``refit_masks``), keep what they have; where the plan's budget is by
            layer, each layer keeps its total, and where it is in bytes, the layers of each type theirs.
        batches: calibration inputs.
        least: what every unit with a weight other than 0 retains at least.
        seed: of the directions in which outputs are looked at.

    Returns:
        The plan with other counts, of the same total.

    Raises:
        ValueError: as for ``refit_masks``, or ``least`` asks for more than the plan retains.

    Reference: ours.
    """
    dense = copied(model).eval()
    weights = {weight.name: weight for weight in maskable_weights(dense)}
    masks = retained_entries(list(weights.values()), plan)
    layers = layers_of(dense, masks)
    fed = [as_input(batch, dense) for batch in batches]
    response = _responses(dense, layers, fed, seed)
    is_deaf = not any(own.any() for own in response.values())
    losses: dict[str, Array] = {}
    draw = torch.Generator().manual_seed(seed)
    for arrival in track(walk(dense, dense, fed, layers), "weighing units", total=len(layers)):
        name = weight_name(arrival.name)
        layer = cast(PatchLayer, dense.get_submodule(arrival.name))
        if not is_affordable(len(layer.weight), layer.weight[0].numel()):
            continue
        centred = layer.bias is not None or arrival.norm is not None
        problems = list(problems_of(layer, arrival, masks[name], centred=centred, draw=draw))
        energy = sum(float(problem.energy.sum()) for problem in problems)
        own = response[arrival.name]
        weight = np.zeros_like(own)
        if energy > 0:
            weight = np.full_like(own, 1 / energy) if is_deaf else np.sqrt(own / energy)
        costs = [eliminate_rows(p.ridged(RIDGE)[0], p.dense, precision="float32").costs for p in problems]
        rows = np.concatenate([p.dense for p in problems])
        losses[name] = _lasting(np.concatenate(costs) * weight[:, None], rows, least)
    table = plan.table.copy()
    reasons = {reason: _shared_anew(reason) for reason in set(table["reason"])}
    for names in _together(plan, {name: weights[name].tensor for name in losses}):
        for name, counts in zip(names, _counts([losses[n] for n in names], _retained(plan, names)), strict=True):
            units = table["layer"] == name
            table.loc[units, "retained"] = counts
            table.loc[units, "reason"] = table.loc[units, "reason"].map(reasons)
    kept = {name: mask for name, mask in plan.kept.items() if name not in losses}
    return replace(plan, table=table, kept=kept, values={}, measured=None)


def _shared_anew(reason: str) -> str:
    """Return why a unit keeps what it does: a rule gave the total, and losses the share of it."""
    if reason == "zero unit":
        return reason
    return f"{reason.partition('; at the minimum of ')[0]}; shared by least loss on calibration inputs"


def _together(plan: Plan, tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return which layers share a total without breaking the plan's budget."""
    if not isinstance(plan.settings.get("sparsity", 0.0), float):
        return [[name] for name in tensors]
    if "bytes" not in plan.settings:
        return [list(tensors)] if tensors else []
    sizes = {tensor.element_size() for tensor in tensors.values()}
    return [[name for name, tensor in tensors.items() if tensor.element_size() == size] for size in sorted(sizes)]


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
    held = int(np.isinf(joined).sum())
    if held > retained:
        raise ValueError(f"least asks for {held} weights where the plan retains {retained}. Choose a smaller least.")
    stays = np.zeros(joined.size, dtype=bool)
    stays[np.argsort(-joined, kind="stable")[:retained]] = True
    ends = np.cumsum([loss.size for loss in losses])[:-1]
    return [part.reshape(loss.shape).sum(axis=1) for part, loss in zip(np.split(stays, ends), losses, strict=True)]


@torch.inference_mode(mode=False)  # whatever the caller's mode: gradients are what is asked for
@torch.enable_grad()
def _responses(model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor], seed: int) -> Mapping[str, Array]:
    """Return the mean squared response of random sums of outputs to each unit's, added up over positions."""
    trial = copy.deepcopy(model).requires_grad_(False)
    found = {name: torch.zeros(len(cast(Tensor, trial.get_submodule(name).weight))).double() for name in layers}

    def note(name: str, layer: PatchLayer, output: Tensor) -> None:
        def add(slope: Tensor) -> None:
            every = torch.arange(positions_of(layer, slope), device=slope.device)
            found[name] += outputs_at(layer, slope, every).double().square().sum(dim=1).flatten().cpu()

        if output.requires_grad:  # not where the model itself runs without gradients
            output.register_hook(add)  # type: ignore[no-untyped-call]

    for name in layers:
        layer = cast(PatchLayer, trial.get_submodule(name)).requires_grad_(True)
        layer.register_forward_hook(lambda module, _inputs, output, name=name: note(name, module, output))
    draw = torch.Generator().manual_seed(seed)
    inputs = 0
    for number, batch in enumerate(batches):
        if inputs >= _INPUTS:
            break
        batch = batch[: _INPUTS - inputs].clone()
        inputs += len(batch)
        try:
            outputs = [output for output in tensors_in(trial(batch)) if output.requires_grad]
        except Exception as error:  # the model's own
            raise does_not_run(number, batch, error) from error
        total = sum((output * torch.randn(output.shape, generator=draw).to(output)).sum() for output in outputs)
        if isinstance(total, Tensor):
            total.backward()  # type: ignore[no-untyped-call]
    return {name: total.numpy() / max(inputs, 1) for name, total in found.items()}
