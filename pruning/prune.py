"""Plan and prune: the two calls that decide, for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ellq.analysis import Calibration, as_batches, track
from ellq.pruning import allocate, hidden_units, masks
from ellq.pruning.apply import Model, apply
from ellq.pruning.guarantee import guarantee
from ellq.pruning.plan import Plan, plan_table
from ellq.theory import Array, open_fraction, order_below_one

_LQ_RULES = ("ellq", "yang2022")


def plan(
    model: nn.Module | Mapping[str, Tensor],
    calibration: Calibration | None = None,
    *,
    method: str = "lq",
    sparsity: float | None = None,
    tol: float | None = None,
    rule: str = "ellq",
    q: float = 0.5,
    held_out: Calibration | None = None,
    delta: float = 0.05,
) -> Plan:
    """Decide what every unit keeps, without changing the model.

    ``method="lq"`` (no data needed): per-unit counts of the largest weights.

    - ``rule="ellq"``: with ``sparsity``, the counts that make the layers' relative squared errors Σ‖ΔW_l‖_F²/‖W_l‖_F²
      as small as the budget allows; with ``tol``, for each unit the fewest with σ_k(w)_2 ≤ tol·‖w‖_2.
    - ``rule="yang2022"``: the authors' count ⌈N_{q,1}(w)(1+η)^(−1/(1−q))⌉; ``tol`` is η, ``sparsity`` solves for η.

    ``method="id"`` (calibration needed): hidden units of ``Linear → activation → Linear`` chains; see
    ``ellq.pruning.plan_hidden_units``. ``sparsity`` is the fraction of each hidden layer's units to remove, ``tol`` the
    relative error allowed in what reads them. Rules ``"ellq"`` and ``"chee2021"``. Where there is one hidden layer, a
    plan by ``tol`` or with ``held_out`` inputs carries its guarantee: what was measured, and what is proved of new
    inputs; see ``ellq.pruning.guarantee``.

    Args:
        model: the model, or for ``"lq"`` its state dict; not changed.
        calibration: for ``"id"``: inputs, shape (n, …), or an iterable of batches of inputs or (inputs, labels).
        method: ``"lq"`` or ``"id"``.
        sparsity: fraction to remove, strictly between 0 and 1. At least this much is removed, to the next whole count.
        tol: relative tolerance, strictly between 0 and 1. Give this or ``sparsity``.
        rule: ``"ellq"`` (ours) or the authors' rule of the method.
        q: order of the quasi-norm for ``"yang2022"``, 0 < q < 1.
        held_out: for ``"id"`` on one hidden layer: inputs as for ``calibration``, sharing no example with them, from
            which the guarantee is made; nothing is chosen by them.
        delta: probability with which the guarantee may fail, in (0, 1).

    Returns:
        The plan.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, no budget or two, no calibration where it is needed, nothing to prune,
            weights or features that are not finite, or held-out inputs where no guarantee is made or that overlap
            with the calibration ones.

    Reference: Yang et al. 2022 (arXiv 2206.05604); Chee et al. 2021 (arXiv 2108.00065); the ``"ellq"`` rules are ours.
    """
    if not isinstance(model, nn.Module | Mapping):
        raise TypeError(f"model must be an nn.Module or a state dict, got {type(model).__name__}.")
    if (sparsity is None) == (tol is None):
        given = "neither" if sparsity is None else "both"
        raise ValueError(f"Give either sparsity= or tol=, got {given}.")
    if sparsity is not None:
        sparsity = open_fraction(sparsity, "sparsity")
    if tol is not None:
        tol = open_fraction(tol, "tol")
    q, delta = order_below_one(q), open_fraction(delta, "delta")
    if method == "lq":
        if held_out is not None:
            raise ValueError("held_out= makes a guarantee for method='id' only. Leave it out.")
        _one_of(rule, _LQ_RULES, "rule")
        return _plan_masks(model, sparsity=sparsity, tol=tol, rule=rule, q=q)
    if method == "id":
        _one_of(rule, hidden_units.RULES, "rule")
        if not isinstance(model, nn.Module):
            raise TypeError("method='id' runs the model on data. Pass the nn.Module, not its state dict.")
        if calibration is None:
            raise ValueError("method='id' needs calibration inputs. Pass a tensor or batches as the second argument.")
        batches = as_batches(calibration)
        decided = hidden_units.plan_hidden_units(model, batches, sparsity=sparsity, tol=tol, rule=rule)
        if held_out is None and (tol is None or len(decided.corrections) > 1):
            return decided
        with torch.random.fork_rng(devices=[]):  # a shuffling DataLoader draws from the global random state
            found = guarantee(model, apply(model, decided), decided, batches, held_out, delta=delta)
        return replace(decided, guarantee=found)
    _one_of(method, ("lq", "id"), "method")
    raise AssertionError(method)


def prune(
    model: Model,
    calibration: Calibration | None = None,
    *,
    method: str = "lq",
    sparsity: float | None = None,
    tol: float | None = None,
    rule: str = "ellq",
    q: float = 0.5,
    inplace: bool = False,
) -> Model:
    """Return a pruned copy of a model: ``apply(model, plan(model, …))``; the plan is what carries the guarantee.

    Args:
        model: the model, or for ``"lq"`` its state dict; not changed unless ``inplace``.
        calibration: see ``plan``.
        method: see ``plan``.
        sparsity: see ``plan``.
        tol: see ``plan``.
        rule: see ``plan``.
        q: see ``plan``.
        inplace: change ``model`` itself and return it.

    Returns:
        A plain module of the same class; for a state dict, a state dict.

    Raises:
        TypeError, ValueError: as for ``plan``; the model is untouched.

    Reference: see ``plan``.
    """
    decided = plan(model, calibration, method=method, sparsity=sparsity, tol=tol, rule=rule, q=q)
    return apply(model, decided, inplace=inplace)


def _plan_masks(
    model: nn.Module | Mapping[str, Tensor], *, sparsity: float | None, tol: float | None, rule: str, q: float
) -> Plan:
    weights = masks.maskable_weights(model)
    layers = [weight.units() for weight in track(weights, "reading weights")]
    settings: dict[str, float | str] = {} if rule == "ellq" else {"q": q}
    if sparsity is not None:
        settings["sparsity"] = sparsity
        budget = _budget(layers, sparsity)
        if rule == "ellq":
            counts = allocate.by_budget(layers, budget)
            reason = f"least total relative error at sparsity {sparsity:g}"
        else:
            counts, eta = allocate.yang2022_budget(layers, budget, q=q)
            reason = f"⌈N(1+η)^(−1/(1−q))⌉, η = {eta:.4g} for sparsity {sparsity:g}"
    else:
        assert tol is not None
        settings["tol"] = tol
        if rule == "ellq":
            counts = allocate.by_tolerance(layers, tol)
            reason = f"fewest with relative error <= {tol:g}"
        else:
            counts = allocate.yang2022(layers, tol, q=q)
            reason = f"⌈N(1+η)^(−1/(1−q))⌉, η = {tol:g}"
    rows: dict[str, list[object]] = {"layer": [], "unit": [], "size": [], "retained": [], "reason": []}
    for weight, units, kept in zip(weights, layers, counts, strict=True):
        dead = ~units.any(axis=1)
        rows["layer"] += [weight.name] * len(units)
        rows["unit"] += range(len(units))
        rows["size"] += [units.shape[1]] * len(units)
        rows["retained"] += kept.tolist()
        rows["reason"] += np.where(dead, "zero unit", reason).tolist()
    return Plan("lq", rule, settings, plan_table(**rows))  # type: ignore[arg-type]


def _budget(layers: list[Array], sparsity: float) -> int:
    total = sum(units.size for units in layers)
    live = sum(int(units.any(axis=1).sum()) for units in layers)
    budget = allocate.retained_of(total, sparsity)
    if budget < live:
        reachable = math.floor((1 - live / total) * 1e6) / 1e6
        advice = f"Choose sparsity <= {reachable:g}." if reachable > 0 else "Nothing can be removed."
        raise ValueError(
            f"sparsity={sparsity:g} leaves {budget} weights for {live} units, each of which keeps at least one."
            f" {advice}"
        )
    return budget


def _one_of(value: object, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, allowed))}.")
