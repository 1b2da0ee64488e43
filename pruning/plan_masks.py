"""A plan of masks: from a model, a rule and a budget to what every unit keeps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ellq.analysis import Calibration, from_unit_rows, track
from ellq.pruning.allocate import RULES, proportional_shares, retained_of
from ellq.pruning.budget import Budget, BudgetError, refuse_too_small
from ellq.pruning.coverage import Choice, covered, layer_sparsities
from ellq.pruning.largest import Counts, count_largest, keep_largest, survey
from ellq.pruning.layers import Allocation, Layers, minima_of
from ellq.pruning.masks import Maskable, maskable_weights
from ellq.pruning.pattern import keep_pattern, pattern_count, pattern_numbers
from ellq.pruning.plan import Plan, plan_table
from ellq.pruning.scores import SCORE_RULES, Share
from ellq.pruning.storage import layer_bytes, most_that_fits

LQ_RULES = (*RULES, *SCORE_RULES)
Kept = dict[str, npt.NDArray[np.bool_]]


def plan_masks(
    model: nn.Module | Mapping[str, Tensor],
    calibration: Calibration | None,
    *,
    budget: Budget,
    rule: str,
    least: int | None,
    include: Choice,
    exclude: Choice,
    settings: Mapping[str, Any],
) -> Plan:
    """Decide what every unit keeps by a rule of ``LQ_RULES``; see ``ellq.plan`` for the arguments and errors."""
    _check_settings(rule, budget, settings)
    if least and rule in RULES and RULES[rule].takes_eta and budget.kind != "tol":
        raise ValueError(
            f"rule={rule!r} meets a budget as its authors' code would, which knows no least=. Leave it out."
        )
    if budget.kind == "pattern" and least is not None:
        raise ValueError(f"least={least} has no place beside pattern=, which says what every unit keeps. Leave it out.")
    weights = covered(model, maskable_weights(model), include=include, exclude=exclude)
    sparsities: dict[int, float] = {}
    if isinstance(budget.value, Mapping):
        sparsities = layer_sparsities(model, weights, budget.value)
        weights = [weights[number] for number in sparsities]
    surveys = tuple(survey(weight.layer(), weight.name) for weight in track(weights, "reading weights"))
    asked_least = (RULES[rule].least if rule in RULES else 0) if least is None else least
    layers = Layers(
        names=tuple(weight.name for weight in weights),
        weights=tuple(weight.layer() for weight in weights),
        surveys=surveys,
        minima=minima_of(surveys, asked_least),
        shapes=tuple(tuple(weight.tensor.shape) for weight in weights),
        model=model if isinstance(model, nn.Module) else None,
        calibration=calibration,
    )
    maker = _Maker(weights, layers, rule, dict(settings))
    kept: Kept = {}
    if budget.kind == "tol":
        by_tolerance = RULES[rule].by_tolerance
        assert by_tolerance is not None  # checked above
        decided = by_tolerance(layers, budget.value, **settings)
    elif budget.kind == "pattern":
        decided, kept = maker.by_pattern(str(budget.value))
    elif budget.kind == "bytes":
        decided, kept = _by_bytes(maker, int(budget.value), budget.storage)  # type: ignore[arg-type]
    else:
        decided, kept = maker.by_shares(_shares(layers, budget, list(sparsities.values())))
    noted = (
        {name: _plain(value) for name, value in settings.items()}
        | budget.settings()
        | ({} if least is None else {"least": least})
    )
    return Plan("lq", rule, noted, _table(layers, decided, asked_least), kept=kept)


class _Maker:
    """Makes the decision for budgets of its layers."""

    def __init__(self, weights: Sequence[Maskable], layers: Layers, rule: str, settings: dict[str, Any]) -> None:
        self.weights, self.layers, self.rule, self.settings = weights, layers, rule, settings

    def by_count(self, retained: int) -> tuple[Allocation, Kept]:
        return self.by_shares([Share(tuple(range(len(self.weights))), retained)])

    def by_shares(self, shares: Sequence[Share]) -> tuple[Allocation, Kept]:
        counts: list[Counts] = [np.zeros(0, dtype=np.int64)] * len(self.weights)
        reasons = [""] * len(self.weights)
        kept: Kept = {}
        if self.rule in RULES:
            for share in shares:
                part = RULES[self.rule].by_budget(self.layers.only(share.places), share.retained, **self.settings)
                for place, own, reason in zip(share.places, part.counts, part.reasons, strict=True):
                    counts[place], reasons[place] = own, reason
            return Allocation(counts, reasons), kept
        rule = SCORE_RULES[self.rule]
        scores = self._scores(shares)
        for share in shares:
            layers, some = self.layers.only(share.places), [scores[place] for place in share.places]
            if rule.by_unit:
                units = [len(layer) for layer in some]
                sizes = np.repeat([found.size for found in layers.surveys], units).tolist()
                minima = np.concatenate(layers.minima).tolist()
                every = proportional_shares(sizes, share.retained, sizes=sizes, minima=minima)
                parts = np.split(np.array(every), np.cumsum(units)[:-1])
            else:
                parts = count_largest(some, share.retained, scales=None, minima=layers.minima)
            for place, own in zip(share.places, parts, strict=True):
                counts[place], reasons[place] = own, rule.reason
                kept |= self._kept(place, keep_largest(scores[place], own))
        return Allocation(counts, reasons), kept

    def by_pattern(self, pattern: str) -> tuple[Allocation, Kept]:
        n, m = pattern_numbers(pattern)
        each = [pattern_count(found.size, n, m) for found in self.layers.surveys]
        counts = [np.full(len(layer), k) for layer, k in zip(self.layers.weights, each, strict=True)]
        reason = f"{n} of every {m}"
        scores: Sequence[Any] = self.layers.weights
        if self.rule in SCORE_RULES:
            shares = [Share((i,), int(own.sum())) for i, own in enumerate(counts)]
            scores, reason = self._scores(shares), f"{reason}: {SCORE_RULES[self.rule].reason}"
        kept: Kept = {}
        for place, score in enumerate(scores):
            kept |= self._kept(place, keep_pattern(score, n, m))
        return Allocation(counts, [reason] * len(counts)), kept

    def _scores(self, shares: Sequence[Share]) -> list[Tensor]:
        """Return the rule's scores, units along the first axis."""
        scores = SCORE_RULES[self.rule].scores(self.layers, shares, **self.settings)
        return [weight.layer(score) for weight, score in zip(self.weights, scores, strict=True)]

    def _kept(self, place: int, kept: Tensor) -> Kept:
        weight = self.weights[place]
        return {weight.name: from_unit_rows(kept.numpy(), tuple(weight.tensor.shape), weight.groups)}


def _shares(layers: Layers, budget: Budget, sparsities: Sequence[float]) -> list[Share]:
    """Return the budgets of a sparsity, for all layers or each, or of a count; refuse those the minima exceed."""
    total = sum(layers.sizes)
    if sparsities:
        shares = []
        for place, (sparsity, size) in enumerate(zip(sparsities, layers.sizes, strict=True)):
            retained = retained_of(size, sparsity)
            minima = layers.minima[place]
            reachable = _reachable(int(minima.sum()), size)
            name = layers.names[place]
            advice = f"Choose at most {reachable:g} there."
            asked = f"sparsity={sparsity:g} of layer {name!r}"
            refuse_too_small(retained, [name], [minima], asked=asked, advice=advice, nearest=reachable)
            shares.append(Share((place,), retained))
        return shares
    held = sum(int(minimum.sum()) for minimum in layers.minima)
    if budget.kind == "nonzeros":
        retained = int(budget.value)  # type: ignore[arg-type]
        if retained > total:
            raise BudgetError(
                f"nonzeros={retained} exceeds the {total} weights that the plan covers. Choose nonzeros <= {total}.",
                total,
            )
        asked, advice, nearest = f"nonzeros={retained}", f"Choose nonzeros >= {held}.", float(held)
    else:
        sparsity = float(budget.value)  # type: ignore[arg-type]
        retained = retained_of(total, sparsity)
        nearest = _reachable(held, total)
        advice = f"Choose sparsity <= {nearest:g}." if nearest > 0 else "Nothing can be removed."
        asked = f"sparsity={sparsity:g}"
    refuse_too_small(retained, layers.names, layers.minima, asked=asked, advice=advice, nearest=nearest)
    return [Share(tuple(range(len(layers.names))), retained)]


def _reachable(held: int, total: int) -> float:
    return math.floor((1 - held / total) * 1e6) / 1e6


def _by_bytes(maker: _Maker, limit: int, storage: str) -> tuple[Allocation, Kept]:
    """Retain the most weights that fit."""
    weights, layers = maker.weights, maker.layers

    def size(counts: Sequence[Counts]) -> int:
        return sum(layer_bytes(w, int(own.sum()), storage) for w, own in zip(weights, counts, strict=True))

    if storage == "2:4":
        decided, kept = maker.by_pattern(storage)
        needed = size(decided.counts)
        if needed > limit:
            raise BudgetError(f"bytes={limit} is below the {needed} that storage='2:4' takes.", needed)
        return decided, kept
    needed = size(layers.minima)
    if needed > limit:
        fits = most_that_fits(weights, limit, storage)
        advice = f"Choose bytes >= {needed}."
        if fits >= 0:
            asked = f"bytes={limit} in storage={storage!r}"
            refuse_too_small(fits, layers.names, layers.minima, asked=asked, advice=advice, nearest=needed)
        raise BudgetError(
            f"bytes={limit} is below the {needed} that storage={storage!r} takes with the units at their minimum."
            f" {advice}",
            needed,
        )
    low, high = sum(int(m.sum()) for m in layers.minima), most_that_fits(weights, limit, storage)
    found = maker.by_count(high)
    if size(found[0].counts) <= limit:
        return found
    # Weights of several types: what a count takes depends on whose they are, and rises with it.
    best = None
    while high - low > 1:
        middle = (low + high) // 2
        found = maker.by_count(middle)
        if size(found[0].counts) <= limit:
            low, best = middle, found
        else:
            high = middle
    return best or maker.by_count(low)


def _table(layers: Layers, decided: Allocation, least: int) -> Any:
    """Return the plan's table; units share their strings, which makes it light."""
    names: list[str] = []
    unit: list[int | None] = []
    size: list[int] = []
    retained: list[int] = []
    reasons: list[str] = []
    for name, found, minimum, counts, reason in zip(
        layers.names, layers.surveys, layers.minima, decided.counts, decided.reasons, strict=True
    ):
        n = len(counts)
        names += [name] * n
        unit += range(n)
        size += [found.size] * n
        retained += counts.tolist()
        told = np.array([reason, f"{reason}; at the minimum of {least}", "zero unit"], dtype=object)
        which = np.where(found.nonzeros == 0, 2, np.where((counts == minimum) & (minimum > 0), 1, 0))
        reasons += told[which].tolist()
    return plan_table(names, unit, size, retained, reasons)


def _plain(value: Any) -> Any:
    """Return a NumPy number as Python's, for JSON."""
    return value.item() if isinstance(value, np.generic) else value


def _check_settings(rule: str, budget: Budget, settings: Mapping[str, Any]) -> None:
    function: Callable[..., Any]
    if rule in RULES:
        by_tolerance = RULES[rule].by_tolerance
        if budget.kind == "tol" and by_tolerance is None:
            raise ValueError(f"rule={rule!r} knows no tolerance. Give sparsity=, nonzeros= or bytes= instead of tol=.")
        function = by_tolerance if budget.kind == "tol" and by_tolerance is not None else RULES[rule].by_budget
    else:
        function = SCORE_RULES[rule].scores
        if budget.kind == "tol":
            raise ValueError(f"rule={rule!r} knows no tolerance. Give sparsity=, nonzeros= or bytes= instead of tol=.")
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            takes = f"takes {', '.join(f'{k}=' for k in known)}" if known else "takes no settings"
            raise TypeError(f"{name}= is no argument of plan, nor a setting of rule={rule!r}, which {takes}.")
