"""A plan of masks: from a model, a rule and a budget to what every unit keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ellq.analysis import Calibration, from_unit_rows, track
from ellq.pruning.allocate import RULES, proportional_shares, retained_of
from ellq.pruning.budget import Budget, BudgetError, refuse_too_small, without_room
from ellq.pruning.coverage import Choice, covered, layer_sparsities
from ellq.pruning.largest import Counts, count_largest, keep_largest, survey
from ellq.pruning.layers import Allocation, Layers, minima_of
from ellq.pruning.masks import Maskable, maskable_weights, refuse_blocked
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
    refuse_blocked(weights)
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
        decided, kept = maker.by_asked(_asked(layers, budget, list(sparsities.values())))
    noted = (
        {name: _plain(value) for name, value in settings.items()}
        | budget.settings()
        | ({} if least is None else {"least": least})
    )
    shapes = dict(zip(layers.names, layers.shapes, strict=True))
    return Plan("lq", rule, noted, _table(layers, decided, asked_least), kept=kept, shapes=shapes)


@dataclass(frozen=True)
class _Asked:
    """What the caller asked of some layers.

    Attributes:
        share: which layers, and how many weights they retain together.
        words: the budget as the caller put it.
        nearest: from the fewest weights that can stay to the nearest value of the argument.
        advice: from that value to what to do.
    """

    share: Share
    words: str
    nearest: Callable[[int], float]
    advice: Callable[[float], str]

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """Turn a BudgetError about a number of weights into one about what was asked."""
        try:
            yield
        except BudgetError as error:
            nearest = self.nearest(int(error.nearest))
            raise BudgetError(self.words, error.obstacle, nearest, self.advice(nearest)) from None


class _Maker:
    """Makes the decision for budgets of its layers."""

    def __init__(self, weights: Sequence[Maskable], layers: Layers, rule: str, settings: dict[str, Any]) -> None:
        self.weights, self.layers, self.rule, self.settings = weights, layers, rule, settings

    def by_count(self, retained: int) -> tuple[Allocation, Kept]:
        """Decide for one number of weights, in which a BudgetError speaks."""
        everything = Share(tuple(range(len(self.weights))), retained)
        return self.by_asked([_Asked(everything, f"retained={retained}", int, "Choose retained >= {}.".format)])

    def by_asked(self, asked: Sequence[_Asked]) -> tuple[Allocation, Kept]:
        shares = [one.share for one in asked]
        for one in asked:
            layers = self.layers.only(one.share.places)
            with one.in_words():
                refuse_too_small(one.share.retained, layers.names, layers.minima)
        counts: list[Counts] = [np.zeros(0, dtype=np.int64)] * len(self.weights)
        reasons = [""] * len(self.weights)
        kept: Kept = {}
        if self.rule in RULES:
            for one, share in zip(asked, shares, strict=True):
                with one.in_words():
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
                parts = count_largest(some, share.retained, minima=layers.minima)
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


def _asked(layers: Layers, budget: Budget, sparsities: Sequence[float]) -> list[_Asked]:
    """Return the budgets of a sparsity, for all layers or each, or of a count."""
    if sparsities:
        return [
            _Asked(
                Share((place,), retained_of(size, sparsity)),
                f"sparsity={sparsity:g} of layer {layers.names[place]!r}",
                partial(_reachable, total=size),
                partial(_at_most, where=" there"),
            )
            for place, (sparsity, size) in enumerate(zip(sparsities, layers.sizes, strict=True))
        ]
    total, every = sum(layers.sizes), tuple(range(len(layers.names)))
    if budget.kind == "nonzeros":
        retained = int(budget.value)  # type: ignore[arg-type]
        words = f"nonzeros={retained}"
        if retained > total:
            obstacle = f"exceeds the {total} weights that the plan covers"
            raise BudgetError(words, obstacle, total, f"Choose nonzeros <= {total}.")
        return [_Asked(Share(every, retained), words, int, "Choose nonzeros >= {}.".format)]
    sparsity = float(budget.value)  # type: ignore[arg-type]
    share = Share(every, retained_of(total, sparsity))
    return [_Asked(share, f"sparsity={sparsity:g}", partial(_reachable, total=total), _at_most)]


def _reachable(held: int, total: int) -> float:
    """Return the largest sparsity that leaves what is held, cut off after as many decimals as tell weights apart."""
    scale: int = 10 ** max(6, len(str(total)))
    return ((total - held) * scale // total) / scale


def _at_most(sparsity: float, where: str = "") -> str:
    return f"Choose sparsity <= {sparsity}{where}." if sparsity > 0 else f"Nothing can be removed{where}."


def _by_bytes(maker: _Maker, limit: int, storage: str) -> tuple[Allocation, Kept]:
    """Retain the most weights that fit."""
    weights, layers = maker.weights, maker.layers

    def size(counts: Sequence[Counts]) -> int:
        return sum(layer_bytes(w, int(own.sum()), storage) for w, own in zip(weights, counts, strict=True))

    words = f"bytes={limit} in storage={storage!r}"
    if storage == "2:4":
        decided, kept = maker.by_pattern(storage)
        needed = size(decided.counts)
        if needed > limit:
            obstacle = f"is below the {needed} that two of every four weights of each unit take"
            raise BudgetError(words, obstacle, needed, f"Choose bytes >= {needed}.")
        return decided, kept
    # What a count takes depends on whose the weights are where they have several types; it rises with the count.
    middle = most_that_fits(weights, limit, storage)
    low, high, best, obstacle = -1, middle + 1, None, ""  # above low some count may fit, from high on none does
    while high - low > 1:
        try:
            found = maker.by_count(middle)
        except BudgetError as error:
            low, obstacle = middle, error.obstacle
        else:
            if size(found[0].counts) <= limit:
                low, best = middle, found
            else:
                high = middle
        middle = (low + high) // 2
    if best is not None:
        return best
    try:
        (fewest, _) = maker.by_count(sum(int(minimum.sum()) for minimum in layers.minima))
    except BudgetError as error:
        (fewest, _) = maker.by_count(int(error.nearest))
    needed = size(fewest.counts)
    room = limit - size([np.zeros_like(own) for own in fewest.counts])
    if room < 0:
        obstacle = f"leaves no room for weights: the format alone takes {limit - room}"
    elif not obstacle:
        each = [layer_bytes(w, 1, storage) - layer_bytes(w, 0, storage) for w in weights]
        layer, unit = without_room(room, [own * width for own, width in zip(fewest.counts, each, strict=True)])
        obstacle = (
            f"leaves no room for unit {unit} of {layers.names[layer]!r}, which keeps {fewest.counts[layer][unit]}"
        )
    raise BudgetError(words, obstacle, needed, f"Choose bytes >= {needed}.")


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
