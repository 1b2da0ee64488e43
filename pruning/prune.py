"""Plan and prune: the two calls that decide, for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ellq.analysis import Calibration, as_batches
from ellq.pruning.allocate import RULES
from ellq.pruning.apply import Model, apply, finalize
from ellq.pruning.budget import COSTS, Budget, one_budget
from ellq.pruning.channel_settings import CHANNEL_RULES
from ellq.pruning.coupling import ChannelGroup
from ellq.pruning.coverage import Choice
from ellq.pruning.loss_counts import share_by_loss
from ellq.pruning.plan import Plan
from ellq.pruning.plan_masks import LQ_RULES, plan_masks
from ellq.pruning.plan_units import plan_units
from ellq.pruning.refit import CHOOSING, REFITS, refit_masks
from ellq.pruning.rescale import rescale_masks
from ellq.pruning.synthetic import refit_synthetic
from ellq.theory import open_fraction
from ellq.theory.arguments import count


def plan(
    model: nn.Module | Mapping[str, Tensor],
    calibration: Calibration | None = None,
    *,
    method: str = "lq",
    rule: str = "ellq",
    sparsity: float | Mapping[str, float] | None = None,
    tol: float | None = None,
    nonzeros: int | None = None,
    bytes: int | None = None,
    storage: str = "csr",
    pattern: str | None = None,
    flops: float | None = None,
    parameters: float | None = None,
    memory: float | None = None,
    latency: float | None = None,
    round_to: int | None = None,
    groups: Sequence[ChannelGroup] | None = None,
    checkpoint: str | Path | None = None,
    least: int | None = None,
    include: Choice = None,
    exclude: Choice = None,
    held_out: Calibration | None = None,
    delta: float = 0.05,
    refit: str = "auto",
    **settings: Any,
) -> Plan:
    """Decide what every unit keeps, without changing the model.

    ``method="lq"``: which weights stay, unit by unit. Weights of linear, convolutional, recurrent and attention layers
    are covered, a tied one once, frozen ones too (what requires gradients is left as it is); biases, norms and
    embeddings are not.

    - ``rule="ellq"`` (ours): with a budget, the counts that leave the largest product of the layers' energies
      Π‖W_l kept‖_F²/‖W_l‖_F², and with ``refit="obs"`` those that lose least on the calibration inputs; with ``tol``,
      for each unit the fewest with σ_k(w)_2 ≤ tol·‖w‖_2.
    - ``"exact"``: the counts with the least Σσ_k(w)_2²; ``tol`` as above.
    - ``"least_bound"``: those with the least certified bound on the outputs' errors; for a chain of layers, with
      calibration inputs. Setting: ``q``.
    - ``"yang2022"``: the authors' count ⌈N_{q,1}(w)(1+η)^(−1/(1−q))⌉. ``tol`` is η ≥ 0, a budget solves for η.
      Settings: ``q``, ``variant`` (``"keep-m"``, ``"capped"``), ``over`` (``"survivors"``, ``"all"``), ``c``,
      ``beta``, ``scope`` (``"unit"``, ``"layer"``, ``"global"``).
    - ``"diao2023"``: a round of the authors' adaptive pruning by PQ index. ``tol`` is η ≥ 0, a budget repeats rounds.
      Settings: ``p``, ``q``, ``gamma``, ``beta``, ``scope``, and with a budget ``eta``.
    - ``"uniform"``, ``"erk"``, ``"lamp"``, ``"global"``: the usual baselines by magnitude.
    - ``"flow"`` (ours, setting ``rounds``): the largest flow of energy. Needs at most an input's shape.
    - ``"synflow"`` (setting ``rounds``), ``"snip"``, ``"taylor"``, ``"wanda"``: by scores; what stays is then in
      ``plan.kept``. SNIP and Taylor need batches of (inputs, labels), Wanda inputs, SynFlow at most an input's shape.

    ``method="id"`` (calibration needed): units are removed, and the layers become smaller.

    - Channels of any layers, with ``flops``, ``parameters``, ``memory`` or ``latency``, the fraction of the dense
      network's to retain. Rules ``"ellq"`` (ours), ``"chee2021"`` and ``"chee2022"``; settings as in
      ``ellq.pruning.plan_channels``. What cannot be cut soundly stays, and is named in ``plan.left``.
    - With ``sparsity``, the fraction of each layer's units to remove, or ``tol``, the relative error allowed in what
      reads them: the hidden units of ``Linear → activation → Linear`` chains where the network has any (see
      ``ellq.pruning.plan_hidden_units``; rules ``"ellq"`` and ``"chee2021"``), otherwise, or where an argument of
      channels is given, channels. Where there is one hidden layer, a plan by ``tol`` or with ``held_out`` inputs
      carries its guarantee: what was measured, and what is proved of new inputs; see ``ellq.pruning.guarantee``.

    Args:
        model: the model, or for ``"lq"`` by magnitude its state dict; not changed.
        calibration: inputs, shape (n, …), or an iterable of batches of inputs or (inputs, labels).
        method: ``"lq"`` or ``"id"``.
        rule: one of the above; ``ellq.pruning.allocate`` and ``ellq.pruning.scores`` describe each.
        sparsity: a budget: the fraction to remove, strictly between 0 and 1; at least this much is removed, to the next
            whole count. Or, for ``"lq"``, one for each layer: name globs → fractions, the first that matches counts;
            layers that none matches are left out.
        tol: a budget: relative tolerance, strictly between 0 and 1; or the authors' η.
        nonzeros: a budget: how many weights of those covered to retain.
        bytes: a budget: what the covered weights may take in ``storage``; the most that fit are retained.
        storage: ``"csr"``, ``"coo"``, ``"bitmask"``, ``"dense"`` or ``"2:4"``; see ``ellq.pruning.storage_bytes``.
        pattern: a budget: ``"N:M"``, N of every M that follow one another in a unit; of a last group that is shorter
            also N.
        flops: a budget of channels: the fraction of the FLOPs to retain, strictly between 0 and 1.
        parameters: likewise of the parameters.
        memory: likewise of the peak of activations alive at once.
        latency: likewise of the time of a forward pass, measured layer by layer on this machine.
        round_to: of channels: widths are multiples of it, except where all stay. By default 1.
        groups: of channels: which go together, where that cannot be followed; see ``ellq.pruning.channel_groups``.
        checkpoint: of channels: a folder that keeps what is done, so that the same call goes on where it was stopped.
        least: what every unit retains at least (of its non-zero weights); of channels, what every layer does. By
            default 1 for our rules and channels, 0 for others'.
        include: name globs, module types or modules, or a sequence of them: plan only these.
        exclude: likewise: leave these out.
        held_out: for ``"id"`` on one hidden layer: inputs as for ``calibration``, sharing no example with them, from
            which the guarantee is made; nothing is chosen by them.
        delta: probability with which the guarantee may fail, in (0, 1).
        refit: for ``"lq"``: what the layers become besides being masked, without training. ``"none"``: nothing.
            ``"synthetic"``: as ``"obs"``, on inputs made up from the model, see ``ellq.pruning.refit_synthetic``.
            ``"rescale"``: from weights and noise, see ``ellq.pruning.rescale_masks``. With calibration inputs
            ``"bias"``, ``"least_squares"``, ``"obs"``, ``"reweight"`` or ``"sparsegpt"``, see
            ``ellq.pruning.refit_masks``; what was measured is in ``plan.measured``. ``"auto"``, for ``rule="ellq"``:
            ``"obs"`` with calibration inputs (``"least_squares"`` where the budget is a pattern or a tolerance) and
            ``"synthetic"`` without (``"rescale"`` where no inputs can be made up or it would take minutes, ``"none"``
            where the budget is a tolerance). For ``rule="flow"``: ``"rescale"``.
            ``"none"`` for a state dict and for all other rules. For channels ``"joint"`` (also ``"auto"``),
            ``"sequential"``, ``"fold"`` or ``"none"``, see ``ellq.pruning.plan_channels``.
        **settings: of the rule.

    Returns:
        The plan.

    Raises:
        TypeError: an argument of the wrong kind, or one that neither ``plan`` nor the rule takes.
        BudgetError: a ValueError: a budget that cannot be met; it says what stands in the way and carries the nearest
            value that can be.
        ValueError: an argument out of range, no budget or two, no calibration where it is needed, nothing to prune,
            weights or features that are not finite, layers that are lazy, parametrised or pruned by torch, or held-out
            inputs where no guarantee is made or that overlap with the calibration ones.

    Reference: Yang et al. 2022 (arXiv 2206.05604); Diao et al. 2023 (arXiv 2302.05601); Chee et al. 2021 (arXiv
    2108.00065); each baseline's own; the other rules are ours.
    """
    if not isinstance(model, nn.Module | Mapping):
        raise TypeError(f"model must be an nn.Module or a state dict, got {type(model).__name__}.")
    _one_of(method, ("lq", "id"), "method")
    _one_of(rule, LQ_RULES if method == "lq" else CHANNEL_RULES, "rule")
    given = {"sparsity": sparsity, "tol": tol, "nonzeros": nonzeros, "bytes": bytes, "pattern": pattern}
    given |= {"flops": flops, "parameters": parameters, "memory": memory, "latency": latency}
    takes_eta = method == "lq" and rule in RULES and RULES[rule].takes_eta
    budget = one_budget(given, storage=storage, tol_is_eta=takes_eta)
    delta = open_fraction(delta, "delta")
    if method == "lq":
        if budget.kind in COSTS:
            raise ValueError(f"{budget.kind}= is a budget of method='id', which removes channels. Choose that.")
        for name, value in {"round_to": round_to, "groups": groups, "checkpoint": checkpoint}.items():
            if value is not None:
                raise TypeError(f"{name}= is an argument of method='id'. Leave it out.")
        if held_out is not None:
            raise ValueError("held_out= makes a guarantee for method='id' only. Leave it out.")
        if least is not None:
            least = count(least, "least", low=0, high=10**12)
        way = _way_of_refitting(refit, rule, budget, model, calibration)
        with torch.random.fork_rng(devices=[]):  # a shuffling DataLoader draws from the global random state
            if way in REFITS and calibration is not None:
                calibration = _kept_batches(calibration)
            decided = plan_masks(
                model,
                calibration,
                budget=budget,
                rule=rule,
                least=least,
                include=include,
                exclude=exclude,
                settings=settings,
            )
            return _refitted(
                decided,
                way,
                model,
                calibration,
                least=1 if least is None else least,
                has_pattern=_has_pattern(budget),
                falls_back=refit == "auto",
            )
    return plan_units(
        model,
        calibration,
        budget=budget,
        rule=rule,
        held_out=held_out,
        delta=delta,
        refit=refit,
        for_channels={
            "round_to": round_to,
            "groups": groups,
            "checkpoint": checkpoint,
            "least": least,
            "include": include,
            "exclude": exclude,
            **settings,
        },
    )


def prune(model: Model, calibration: Calibration | None = None, *, inplace: bool = False, **arguments: Any) -> Model:
    """Return a pruned copy of a model: ``apply(model, plan(model, …))``, its masks baked in by ``finalize``.

    The plan, with its guarantee and what was measured, is kept at ``pruned.ellq_plan``; it speaks of the moment of
    pruning, not of what is done to the model later.

    Args:
        model: the model, or for ``"lq"`` its state dict; not changed unless ``inplace``.
        calibration: see ``plan``.
        inplace: change ``model`` itself and return it.
        **arguments: the others of ``plan``.

    Returns:
        A plain module of the same class; for a state dict, a state dict.

    Raises:
        TypeError, ValueError: as for ``plan``; the model is untouched.

    Reference: see ``plan``.
    """
    decided = plan(model, calibration, **arguments)
    pruned = apply(model, decided, inplace=inplace)
    if not isinstance(pruned, nn.Module):
        return pruned
    finished = finalize(pruned, inplace=True)
    vars(finished)["ellq_plan"] = decided  # a plain attribute: no part of state_dict or of what torch sees
    return finished


def _way_of_refitting(
    refit: str, rule: str, budget: Budget, model: nn.Module | Mapping[str, Tensor], calibration: Calibration | None
) -> str:
    """Return which refit is meant; refuse what cannot be."""
    _one_of(refit, ("auto", "none", "rescale", "synthetic", *REFITS), "refit")
    has_pattern = _has_pattern(budget)
    if refit == "auto" and rule == "flow":
        return "none" if has_pattern else "rescale"
    if refit == "auto":
        if rule != "ellq" or not isinstance(model, nn.Module):
            return "none"
        if calibration is None:
            return "none" if budget.kind == "tol" else "synthetic"  # a tolerance is a promise about the weights
        return "least_squares" if has_pattern or budget.kind == "tol" else "obs"
    if refit != "none" and not isinstance(model, nn.Module):
        raise TypeError(f"refit={refit!r} runs the model. Pass the nn.Module, not its state dict, or refit='none'.")
    if refit in REFITS and calibration is None:
        raise ValueError(f"refit={refit!r} needs calibration inputs. Pass them as the second argument.")
    if refit in CHOOSING and has_pattern:
        raise ValueError(f"refit={refit!r} chooses entries anew, against a pattern. Use refit='least_squares'.")
    return refit


def _has_pattern(budget: Budget) -> bool:
    return budget.kind == "pattern" or (budget.kind == "bytes" and budget.storage == "2:4")


def _kept_batches(calibration: Calibration) -> Calibration:
    """Return calibration inputs that can be gone through again, in the same order."""
    return calibration if isinstance(calibration, Tensor) else list(calibration)


def _refitted(
    decided: Plan,
    way: str,
    model: nn.Module | Mapping[str, Tensor],
    calibration: Calibration | None,
    *,
    least: int,
    has_pattern: bool,
    falls_back: bool,
) -> Plan:
    if way == "none":
        return decided
    assert isinstance(model, nn.Module)  # checked before
    if way in ("rescale", "synthetic"):
        example = None if calibration is None else next(iter(as_batches(calibration)))
        if way == "rescale":
            return rescale_masks(model, decided, example=example)
        fit = "least_squares" if has_pattern else "obs"
        return refit_synthetic(model, decided, refit=fit, example=example, falls_back=falls_back)
    assert calibration is not None
    batches = list(as_batches(calibration))
    if way == "obs" and decided.rule == "ellq" and "tol" not in decided.settings:
        decided = share_by_loss(model, decided, batches, least=least)
    return refit_masks(model, decided, batches, refit=way)


def _one_of(value: object, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, allowed))}.")
