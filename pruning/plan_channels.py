"""The plan of a deep network with fewer channels: from a budget to what every group keeps and every layer becomes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ellq.analysis import as_input
from ellq.pruning import chee
from ellq.pruning.budget import COSTS, BudgetError
from ellq.pruning.channel_checkpoint import ChannelCheckpoint, fingerprint
from ellq.pruning.channel_curves import measured_curves
from ellq.pruning.channel_settings import channel_settings
from ellq.pruning.coupling import ChannelGroup, Coupling, channel_groups, holding
from ellq.pruning.coverage import Choice, covered
from ellq.pruning.mask_parametrization import is_masked
from ellq.pruning.masks import Maskable, maskable_weights
from ellq.pruning.output_gap import output_gap
from ellq.pruning.plan import Cut, Plan, plan_table
from ellq.pruning.recalibrate import recalibrate_
from ellq.pruning.structured import (
    Narrowed,
    Way,
    narrow_by_tolerance,
    narrow_to,
    narrow_within,
    rounded_width,
    uniform_widths,
)
from ellq.pruning.surgery import cut_channels_
from ellq.pruning.walk import layers_met, tensors_in
from ellq.pruning.widths import CostModel, flops_model, latency_model, memory_model, parameters_model
from ellq.theory.arguments import count, open_fraction

_REASONS = {"chee2022": "least pivot per FLOPs, step by step"}
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
            everywhere), ``rounds`` in which what is lost is measured, each but the first in the best network so far
            (1), ``tol_of`` (``"layers"``, ``"outputs"``), ``seed`` of the positions that are looked at. ``"chee2022"``:
            ``alpha``, the factor of each step. All: ``recalibrate``, whether batch norms' statistics are estimated
            anew at the end.

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
    chosen = channel_settings(rule, settings)
    value = open_fraction(value, budget)
    least, round_to = (count(n, name, low=1, high=10**9) for n, name in ((least, "least"), (round_to, "round_to")))
    try:
        dense = copy.deepcopy(model).eval()
    except Exception as error:  # torch's, or the model's own
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"The model cannot be copied ({reason}). Remove what is not a plain value; after torch's own pruning or"
            " weight norm call torch.nn.utils.prune.remove or remove_weight_norm."
        ) from error
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
            narrowed = _narrowed(_Case(dense, coupling, cut, fed, budget, value, rule, least, round_to, chosen, kept))
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


def _covered(model: nn.Module, groups: Sequence[ChannelGroup], include: Choice, exclude: Choice) -> list[ChannelGroup]:
    if include is None and exclude is None:
        return list(groups)
    makers = {member.module: model.get_submodule(member.module) for group in groups for member in group.producers}
    weights = maskable_weights(model)
    weights += [Maskable(f"{n}.weight".lstrip("."), m.weight, 0) for n, m in makers.items() if type(m) is nn.Embedding]
    names = {weight.name for weight in covered(model, weights, include=include, exclude=exclude)}
    return [g for g in groups if all(f"{m.module}.weight".lstrip(".") in names for m in g.producers)]


@dataclass(frozen=True)
class _Case:
    """What is asked for: the arguments of ``plan_channels``, checked.

    Attributes:
        dense: the network.
        coupling: its groups.
        cut: those that may be cut.
        batches: calibration inputs.
        budget, value: what is limited, and to what.
        rule: which rule.
        least, round_to: limits of widths.
        settings: of the rule.
        checkpoint: keeps what is done.
    """

    dense: nn.Module
    coupling: Coupling
    cut: Sequence[ChannelGroup]
    batches: Sequence[Tensor]
    budget: str
    value: float
    rule: str
    least: int
    round_to: int
    settings: Mapping[str, Any]
    checkpoint: ChannelCheckpoint | None

    @property
    def limits(self) -> dict[str, Any]:
        """The limits of widths, by name."""
        return {"least": self.least, "round_to": self.round_to}

    def cost(self) -> CostModel:
        """What the budget limits; FLOPs where it is no cost."""
        return cost_model(self.budget if self.budget in COSTS else "flops", self.dense, self.coupling, self.batches[0])


def _narrowed(case: _Case) -> Narrowed:
    if case.rule == "chee2022":
        return _iterated(case)
    by_authors = case.rule == "chee2021"
    net = case.dense, case.cut, case.batches
    if by_authors and case.budget == "tol":
        return chee.one_shot(*net, chee.widths_within(*net, case.value, least=case.least))
    if by_authors:
        return chee.one_shot(*net, _uniform(case))
    chosen = case.settings
    way = Way(chosen["selection"], chosen["refit"], chosen["seed"], case.checkpoint)
    if case.budget == "tol":
        cost = case.cost() if chosen["tol_of"] == "outputs" else None
        return narrow_by_tolerance(*net, case.value, way, cost=cost, **case.limits)
    if case.budget != "sparsity" and chosen["widths"] == "measured":
        return narrow_within(*net, case.cost(), case.value, way, rounds=chosen["rounds"], **case.limits)
    widths, preferred = _uniform(case), None
    if way.selection == "elimination":
        # Groups that one layer reads are chosen there, where it is refitted.
        ahead = [g for g in case.cut if len(g.consumers) > 1 or way.refit not in ("joint", "sequential")]
        every = {g.name: np.arange(g.units) for g in ahead}
        saved: dict[str, Any] = {"seed": way.seed, "checkpoint": way.checkpoint}
        curves = measured_curves(case.dense, case.dense, ahead, every, case.batches, [], **saved)
        preferred = {name: curve.path.retained(widths[name]) for name, curve in curves.items()}
    return narrow_to(*net, widths, way, preferred=preferred)


def _iterated(case: _Case) -> Narrowed:
    if case.budget not in COSTS:
        raise ValueError(
            f"{case.budget}= is no budget of rule='chee2022', which cuts until a cost is met. Pass flops=."
        )
    cost, flops = case.cost(), chee.flops_by_layer(case.dense, case.coupling, case.batches[0])
    how = {"alpha": case.settings["alpha"], "least": case.least}
    found = chee.iterative(case.dense, case.cut, case.batches, flops, cost, case.value, **how)
    _require_met({name: len(own) for name, own in found.kept.items()}, cost, case)
    return found


def _uniform(case: _Case) -> dict[str, int]:
    """Return widths that are the same fraction everywhere."""
    if case.budget == "sparsity":
        fraction = 1 - case.value
        return {g.name: rounded_width(fraction * g.units, g.units, case.round_to, case.least) for g in case.cut}
    cost = case.cost()
    widths = uniform_widths(case.cut, cost, case.value, **case.limits)
    _require_met(widths, cost, case)
    return widths


def _require_met(widths: Mapping[str, int], cost: CostModel, case: _Case) -> None:
    least, limit = cost.cost(widths), case.value * cost.dense
    if least > limit:
        nearest = math.nextafter(least / cost.dense, 1.0)
        obstacle = f"leaves {limit:,.6g} {cost.quantity}, but the least widths need {least:,.6g}"
        raise BudgetError(f"{case.budget}={case.value:g}", obstacle, nearest, f"Choose {case.budget} >= {nearest!r}.")


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
    return output_gap(*(tensors_in(net(inputs.clone())) for net in (full, small)))
