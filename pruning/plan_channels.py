"""The plan of a deep network with fewer channels: from a budget to what every group keeps and every layer becomes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ellq.analysis import as_input
from ellq.pruning import chee
from ellq.pruning.budget import COSTS, BudgetError
from ellq.pruning.channel_checkpoint import ChannelCheckpoint, fingerprint
from ellq.pruning.channel_curves import OutputError, measured_curves
from ellq.pruning.coupling import ChannelGroup, Coupling, channel_groups, holding
from ellq.pruning.coverage import Choice, covered
from ellq.pruning.mask_parametrization import is_masked
from ellq.pruning.masks import Maskable, maskable_weights
from ellq.pruning.plan import Cut, Plan, plan_table
from ellq.pruning.recalibrate import recalibrate_
from ellq.pruning.structured import (
    CHANNEL_REFITS,
    SELECTIONS,
    Narrowed,
    narrow_to,
    narrow_within,
    output_probe,
    rounded_width,
    uniform_widths,
)
from ellq.pruning.surgery import cut_channels_
from ellq.pruning.walk import layers_met, tensors_in
from ellq.pruning.widths import CostModel, choose_widths, flops_model, latency_model, memory_model, parameters_model
from ellq.theory.arguments import Indices, count, open_fraction

CHANNEL_RULES = ("ellq", "chee2021", "chee2022")
_SETTINGS: dict[str, dict[str, Any]] = {
    "ellq": {
        "selection": "elimination",
        "refit": "sequential",
        "widths": None,
        "rounds": 1,
        "tol_of": "layers",
        "recalibrate": False,
        "seed": 0,
    },
    "chee2021": {"recalibrate": False},
    "chee2022": {"alpha": 0.9, "recalibrate": False},
}
_REASONS = {"chee2022": "least pivot per FLOPs, step by step"}
_BISECTIONS = 6  # of a tolerance of the outputs: the FLOPs are found to 1/64 of the dense
_AGREES = 1e-4  # of the largest output: rounding of float32 through a deep network


def plan_channels(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    budget: str,
    value: float,
    rule: str = "ellq",
    least: int = 1,
    round_to: int = 1,
    include: Choice = None,
    exclude: Choice = None,
    groups: Sequence[ChannelGroup] | None = None,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> Plan:
    """Plan a network with fewer channels.

    Args:
        model: the network; not changed. It is looked at in eval mode, and in float32 where it is of half precision.
        batches: calibration inputs.
        budget: what is limited: ``"flops"``, ``"parameters"``, ``"memory"`` (the peak of activations alive at once) or
            ``"latency"`` (measured, layer by layer, on this machine), as fractions retained; ``"sparsity"``, the
            fraction of each group's units to remove; or ``"tol"``.
        value: of the budget, strictly between 0 and 1. With ``"tol"`` the relative error, root mean square, that the
            readers of each group may have, or with ``tol_of="outputs"`` that the network's outputs may have, on the
            calibration inputs.
        rule: ``"ellq"`` (ours), or the authors' ``"chee2021"`` (one-shot, the same fraction everywhere) and
            ``"chee2022"`` (iterative). The authors' rules leave groups that several layers make or read.
        least: how many units each group keeps at least, or all where it has fewer.
        round_to: widths are multiples of it, except where all units stay.
        include: what may be cut: name globs, module types or modules, of the layers that make the units.
        exclude: likewise: what may not.
        groups: which units go together, where that cannot be followed; see ``channel_groups``.
        checkpoint: for ``"ellq"``, a folder that keeps every layer that is done, so that the same call goes on where it
            was stopped; deleted at the end.
        **settings: of the rule. ``"ellq"``: ``selection`` (one of ``SELECTIONS``), ``refit`` (one of
            ``CHANNEL_REFITS``), ``widths`` (``"measured"``: by what the outputs lose; ``"uniform"``: the same fraction
            everywhere), ``rounds`` in which measured widths are approached, ``tol_of`` (``"layers"``, ``"outputs"``),
            ``seed`` of the positions that are looked at. ``"chee2022"``: ``alpha``, the factor of each step. All:
            ``recalibrate``, whether batch norms' statistics are estimated anew at the end.

    Returns:
        The plan, with ``cuts``, ``values`` and ``left``: what stays dense, and why.

    Raises:
        TypeError: a setting that the rule does not take.
        BudgetError: a ValueError: a budget that cannot be met, with the nearest value that can.
        ValueError: an argument out of range, a model that cannot be followed or carries masks, nothing to cut, or NaN
            or infinite activations.

    Reference: Chee et al. 2021, 2022 (arXiv 2108.00065); elimination by blocks as in ZipLM (Kurtić et al. 2023);
    targets that carry the drift, measured curves and the allocation are ours.
    """
    if is_masked(model):
        raise ValueError("The model carries masks, and method='id' cuts layers without. Call ellq.finalize first.")
    raw = next((name for name, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)), None)
    if raw is not None:
        raise ValueError(f"Parameter {raw!r} has no shape yet. Run the model once on a batch first.")
    chosen = _settings(rule, settings)
    value = open_fraction(value, budget)
    least, round_to = (count(n, name, low=1, high=10**9) for n, name in ((least, "least"), (round_to, "round_to")))
    try:
        dense = copy.deepcopy(model).eval()
    except Exception as error:  # torch's, or the model's own
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The model cannot be copied ({reason}). Remove what is not a plain value.") from error
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in dense.parameters()):
        dense = dense.float()
    fed = [as_input(batch, dense) for batch in batches]
    if not fed:
        raise ValueError("The calibration set holds no batches. Pass at least one.")
    coupling = channel_groups(dense, fed[0][:4], groups=groups)
    met = layers_met(dense, fed, [member.module for group in coupling.groups for member in group.consumers])
    if met is not None:
        coupling = holding(dense, coupling, fed, met)
    left = dict(coupling.left)
    cut = _covered(model, coupling.groups, include, exclude)
    if rule != "ellq":
        cut, others = chee.coverable(cut)
        left |= others
    if not cut:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in list(left.items())[:3])
        raise ValueError(
            f"No channels can be cut ({reasons or 'the model has no hidden channels'}). Use method='lq', or pass"
            " groups=."
        )
    shown = {budget: value, "least": least, "round_to": round_to} | chosen
    kept = None
    if checkpoint is not None:
        told = shown | {"rule": rule, "groups": [group.name for group in cut]}
        kept = ChannelCheckpoint(checkpoint, fingerprint(dense, fed, told))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            narrowed = _narrowed(
                dense, coupling, cut, fed, budget, value, rule, least, round_to, chosen | {"checkpoint": kept}
            )
        except BudgetError as error:  # it may speak of a budget on the way
            advice = "a smaller least= or round_to=, or let more be cut."
            advice = f"Choose {budget} >= {error.nearest!r}, {advice}" if error.nearest < 1 else f"Choose {advice}"
            raise BudgetError(f"{budget}={value:g}", error.obstacle, error.nearest, advice) from None
    for warning in {str(w.message): w for w in said}.values():
        warnings.warn(warning.message, stacklevel=3)
    decided = _as_plan(dense, cut, narrowed, fed, left, rule, shown)
    if kept is not None:
        kept.remove()
    return decided


def cost_model(kind: str, dense: nn.Module, coupling: Coupling, example: Tensor) -> CostModel:
    """Return what a budget limits as a function of the groups' widths."""
    if kind == "parameters":
        return parameters_model(dense, coupling)
    if kind == "memory":
        return memory_model(dense, coupling, example)
    if kind == "latency":
        return latency_model(dense, coupling, example)
    return flops_model(dense, coupling, example)


def _settings(rule: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if rule not in CHANNEL_RULES:
        raise ValueError(f"rule={rule!r} is unknown. Choose one of {', '.join(map(repr, CHANNEL_RULES))}.")
    known = _SETTINGS[rule]
    stray = next((name for name in given if name not in known), None)
    if stray is not None:
        raise TypeError(f"{stray}= is no setting of rule={rule!r} for channels, which takes {', '.join(known)}.")
    chosen = known | dict(given)
    allowed = {
        "selection": SELECTIONS,
        "refit": CHANNEL_REFITS,
        "widths": (None, "measured", "uniform"),
        "tol_of": ("layers", "outputs"),
    }
    for name, options in allowed.items():
        if name in chosen and chosen[name] not in options:
            shown = ", ".join(repr(option) for option in options if option is not None)
            raise ValueError(f"{name}={chosen[name]!r} is unknown. Choose one of {shown}.")
    if rule == "ellq":
        is_default = chosen["selection"] == "elimination"
        if chosen["refit"] == "fold" and chosen["selection"] in ("elimination", "magnitude"):
            raise ValueError("refit='fold' needs the features of a selection such as 'pivoted-qr'. Choose that too.")
        if chosen["widths"] is None:
            chosen["widths"] = "measured" if is_default else "uniform"
        chosen["rounds"] = count(chosen["rounds"], "rounds", low=1, high=100)
        chosen["seed"] = count(chosen["seed"], "seed", low=0, high=2**32 - 1)
    if chosen["recalibrate"] not in (False, True):
        raise ValueError(f"recalibrate={chosen['recalibrate']!r} is no truth value. Pass True or False.")
    if "alpha" in chosen:
        chosen["alpha"] = open_fraction(chosen["alpha"], "alpha")
    return chosen


def _covered(model: nn.Module, groups: Sequence[ChannelGroup], include: Choice, exclude: Choice) -> list[ChannelGroup]:
    if include is None and exclude is None:
        return list(groups)
    makers = {member.module: model.get_submodule(member.module) for group in groups for member in group.producers}
    weights = maskable_weights(model)
    weights += [Maskable(f"{n}.weight".lstrip("."), m.weight, 0) for n, m in makers.items() if type(m) is nn.Embedding]
    names = {weight.name for weight in covered(model, weights, include=include, exclude=exclude)}
    return [g for g in groups if all(f"{m.module}.weight".lstrip(".") in names for m in g.producers)]


def _narrowed(
    dense: nn.Module,
    coupling: Coupling,
    cut: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    budget: str,
    value: float,
    rule: str,
    least: int,
    round_to: int,
    chosen: Mapping[str, Any],
) -> Narrowed:
    if budget in COSTS or rule == "chee2022":
        cost = cost_model(budget if budget in COSTS else "flops", dense, coupling, batches[0])
    if rule == "chee2022":
        if budget not in COSTS:
            raise ValueError(f"{budget}= is no budget of rule='chee2022', which cuts until a cost is met. Pass flops=.")
        flops = chee.LayerFlops(dense, coupling, batches[0])
        found = chee.iterative(dense, cut, batches, flops, cost, value, alpha=chosen["alpha"], least=least)
        _require_met(found.kept, cost, budget, value)
        return found
    if budget == "tol":
        if rule == "chee2021":
            return chee.one_shot(dense, cut, batches, chee.widths_within(dense, cut, batches, value, least=least))
        return _within_tolerance(dense, coupling, cut, batches, value, least, round_to, chosen)
    if budget == "sparsity":
        widths = {g.name: rounded_width((1 - value) * g.units, g.units, round_to, least) for g in cut}
    elif rule == "chee2021" or chosen["widths"] == "uniform":
        widths = uniform_widths(cut, cost, value, least=least, round_to=round_to)
        if cost.cost(widths) > value * cost.dense:
            raise _out_of_reach(widths, cost, budget, value)
    else:
        return narrow_within(
            dense,
            cut,
            batches,
            cost,
            value,
            round_to=round_to,
            least=least,
            rounds=chosen["rounds"],
            selection=chosen["selection"],
            refit=chosen["refit"],
            seed=chosen["seed"],
            checkpoint=chosen["checkpoint"],
        )
    if rule == "chee2021":
        return chee.one_shot(dense, cut, batches, widths)
    seed = chosen["seed"]
    preferred = None
    if chosen["selection"] == "elimination":
        # Groups that one layer reads are chosen there, where it is refitted.
        ahead = [g for g in cut if len(g.consumers) > 1 or chosen["refit"] != "sequential"]
        every = {g.name: np.arange(g.units) for g in ahead}
        curves = measured_curves(dense, dense, ahead, every, batches, [], seed=seed, checkpoint=chosen["checkpoint"])
        preferred = {name: curve.retained(widths[name]) for name, curve in curves.items()}
    return narrow_to(
        dense,
        cut,
        batches,
        widths,
        selection=chosen["selection"],
        refit=chosen["refit"],
        preferred=preferred,
        seed=seed,
        checkpoint=chosen["checkpoint"],
    )


def _within_tolerance(
    dense: nn.Module,
    coupling: Coupling,
    cut: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    tol: float,
    least: int,
    round_to: int,
    chosen: Mapping[str, Any],
) -> Narrowed:
    seed = chosen["seed"]
    every = {g.name: np.arange(g.units) for g in cut}
    by_layer = chosen["tol_of"] == "layers"
    probe = [] if by_layer else output_probe(batches)
    checkpoint = chosen["checkpoint"]
    curves = measured_curves(dense, dense, cut, every, batches, probe, seed=seed, checkpoint=checkpoint)

    def at(widths: Mapping[str, int], number: int = 0) -> Narrowed:
        preferred = {name: curve.retained(widths[name]) for name, curve in curves.items()}
        return narrow_to(
            dense,
            cut,
            batches,
            widths,
            selection=chosen["selection"],
            refit=chosen["refit"],
            preferred=preferred,
            seed=seed,
            checkpoint=checkpoint,
            stage=f"refit {number}",
        )

    if by_layer:
        widths = {}
        for group in cut:
            k = int(np.argmax(curves[group.name].errors <= tol**2))  # never rising, and 0 with all units
            widths[group.name] = min(group.units, math.ceil(max(k, least) / round_to) * round_to)
        return at(widths)
    cost = flops_model(dense, coupling, batches[0])
    errors = {name: curve.errors for name, curve in curves.items()}
    outputs = OutputError(dense, batches, centred=False)
    best, low, high = Narrowed(dense, {}), 0.0, 1.0
    for number in range(_BISECTIONS):
        middle = (low + high) / 2
        try:
            found = at(choose_widths(errors, cost, budget=middle, round_to=round_to, least=least), number)
        except BudgetError:
            low = middle
            continue
        if outputs.of(found.model) <= tol**2:
            best, high = found, middle
        else:
            low = middle
    return best


def _require_met(kept: Mapping[str, Indices], cost: CostModel, budget: str, value: float) -> None:
    widths = {name: len(own) for name, own in kept.items()}
    if cost.cost(widths) > value * cost.dense:
        raise _out_of_reach(widths, cost, budget, value)


def _out_of_reach(widths: Mapping[str, int], cost: CostModel, budget: str, value: float) -> BudgetError:
    least = cost.cost(widths)
    nearest = math.nextafter(least / cost.dense, 1.0)
    return BudgetError(
        f"{budget}={value:g}",
        f"leaves {value * cost.dense:,.6g} {cost.quantity}, but the least widths need {least:,.6g}",
        nearest,
        f"Choose {budget} >= {nearest!r}, or let more be cut",
    )


def _as_plan(
    dense: nn.Module,
    cut: Sequence[ChannelGroup],
    narrowed: Narrowed,
    batches: Sequence[Tensor],
    left: Mapping[str, str],
    rule: str,
    settings: Mapping[str, Any],
) -> Plan:
    cuts = tuple(
        Cut(group, np.asarray(narrowed.kept[group.name], dtype=np.int64))
        for group in cut
        if len(narrowed.kept.get(group.name, range(group.units))) < group.units
    )
    small = copy.deepcopy(narrowed.model)
    plain = copy.deepcopy(dense)
    for net in (small, plain):
        cut_channels_(net, [(one.group, one.kept) for one in cuts])
    _require_same(narrowed.model, small, cuts, batches[0][:8])
    if settings["recalibrate"]:
        recalibrate_(small, batches)
    before = plain.state_dict()
    values = {
        name: value.detach().cpu().numpy().copy()
        for name, value in small.state_dict().items()
        if value.is_floating_point() and not torch.equal(value, before[name])
    }
    retained = {one.group.name: len(one.kept) for one in cuts}
    why = _REASONS.get(rule) or ("fewest within the tolerance" if "tol" in settings else "the same fraction everywhere")
    names = [group.name for group in cut]
    table = plan_table(
        names,
        [None] * len(names),
        [group.units for group in cut],
        [retained.get(group.name, group.units) for group in cut],
        [narrowed.reasons.get(name, why) if name in retained else "all units are worth their cost" for name in names],
    )
    shown = {name: value for name, value in settings.items() if value is not None}
    return Plan("id", rule, shown, table, cuts=cuts, values=values, left=dict(left))


def _require_same(full: nn.Module, small: nn.Module, cuts: Sequence[Cut], inputs: Tensor) -> None:
    """Check that cutting a network changes nothing but its size; name the group where it does."""
    if _gap(full, small, inputs) <= _AGREES:
        return
    for one in cuts:
        alone = copy.deepcopy(full)
        cut_channels_(alone, [(one.group, one.kept)])
        if not _gap(full, alone, inputs) <= _AGREES:
            raise RuntimeError(
                f"Cutting group {one.group.name!r} changes the outputs otherwise than leaving its units unread."
                " Nothing was changed. Exclude it."
            )
    raise RuntimeError("Cutting all groups together changes the outputs. Nothing was changed. Exclude some of them.")


@torch.no_grad()
def _gap(full: nn.Module, small: nn.Module, inputs: Tensor) -> float:
    """Return the largest change of an output relative to the largest of its tensor; NaN where one is not finite."""
    found = [tensors_in(net(inputs.clone())) for net in (full, small)]
    gaps = [0.0]
    for a, b in zip(*found, strict=True):
        if a.shape != b.shape:
            return math.inf
        scale = float(a.double().abs().max()) if a.numel() else 0.0
        change = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        gaps.append(change / scale if scale > 0 else change)
    return float(np.max(gaps))
