"""How many units each group retains: error curves against a cost, under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ellq.pruning.budget import BudgetError
from ellq.pruning.latency import LatencyTable as LatencyTable
from ellq.pruning.latency import latency_model as latency_model
from ellq.pruning.latency import measure_latencies as measure_latencies
from ellq.pruning.width_costs import CostModel as CostModel
from ellq.pruning.width_costs import Widths
from ellq.pruning.width_costs import flops_model as flops_model
from ellq.pruning.width_costs import memory_model as memory_model
from ellq.pruning.width_costs import parameters_model as parameters_model
from ellq.theory import Array, open_fraction
from ellq.theory.arguments import count, finite_array


def choose_widths(
    curves: Mapping[str, Array],
    cost: CostModel,
    *,
    budget: float,
    round_to: int = 1,
    least: int = 1,
) -> dict[str, int]:
    """Choose how many units each group retains so that the errors added up are small and the cost is within a budget.

        minimise Σ_g curve_g(k_g)   subject to cost(k) ≤ budget · cost(dense)

    Greedy: from the dense net, the step down whose error per saving is least, on the lower convex hull of each curve,
    savings taken at the current widths. Then, while it fits, the step up that takes back most error per cost. For a
    cost that is a sum over groups and convex curves the error is at most the optimum's under a budget smaller by the
    costliest unit. A peak is lowered at all operations above the budget together, by what they save in sum: one group
    alone may not change it. Deterministic: ties go to the earlier group of ``cost``, then to the smaller step.

    Args:
        curves: for each group that may be cut, its error with k units retained, k = 0 … units, finite, non-increasing;
            errors of different groups are added. Groups without a curve keep all units.
        cost: the cost that is limited.
        budget: the fraction of the dense cost, in (0, 1).
        round_to: widths are multiples of it, except where all units are kept; ≥ 1.
        least: how many units a group retains at least, or all where it has fewer; ≥ 1.

    Returns:
        The units retained by every group of the cost.

    Raises:
        BudgetError: the least widths exceed the budget; ``nearest`` is a fraction that can be met.
        ValueError: a curve of an unknown group, of the wrong length, not finite or rising; a number out of range.

    Reference: Fox 1966, Discrete optimization via marginal analysis, for separable costs; the rest is ours.
    """
    limit = float(Fraction(repr(open_fraction(budget, "budget"))) * Fraction(cost.dense))  # as typed, in decimals
    round_to = count(round_to, "round_to", low=1, high=10**9)
    least = count(least, "least", low=1, high=10**9)
    _check_curves(curves, cost)
    errors = {name: _curve(curves.get(name), units) for name, units in cost.units.items()}
    allowed = {
        name: _allowed(units, round_to, least) if name in curves else np.array([units])
        for name, units in cost.units.items()
    }
    widths = _shrink(cost, errors, allowed, limit, budget)
    widths = _fill(cost, errors, allowed, limit, widths)
    return {name: int(width) for name, width in zip(cost.units, widths, strict=True)}


@dataclass(frozen=True)
class _Steps:
    """Widths that groups can take, falling, with their errors; rows are padded with the last."""

    widths: Widths  # (groups, v)
    errors: Array  # (groups, v)
    numbers: npt.NDArray[np.int64]  # (groups,) of widths without padding

    @classmethod
    def of(cls, choices: list[Widths], errors: list[Array]) -> _Steps:
        longest = max(map(len, choices), default=1)
        padded = [np.pad(choice, (0, longest - len(choice)), mode="edge") for choice in choices]
        values = [curve[choice] for curve, choice in zip(errors, padded, strict=True)]
        shape = (len(choices), longest)
        return cls(
            np.array(padded, dtype=np.int64).reshape(shape),
            np.array(values, dtype=float).reshape(shape),
            np.array([len(choice) for choice in choices], dtype=np.int64),
        )


def _shrink(
    cost: CostModel, errors: dict[str, Array], allowed: dict[str, Widths], limit: float, budget: float
) -> Widths:
    """Go down from the dense net until the cost is within the limit."""
    curves = list(errors.values())
    hulls = [_hull(choice, curve) for choice, curve in zip(allowed.values(), curves, strict=True)]
    steps = _Steps.of(hulls, curves)
    groups, longest = steps.widths.shape
    # Steps of 1, 2, 4, … vertices: a noisy or flat cost may save nothing at the next.
    strides = 2 ** np.arange(max(1, math.ceil(math.log2(longest)) + 1))
    at = np.zeros(groups, dtype=np.int64)
    row = np.arange(groups)[:, None]
    while True:
        widths = steps.widths[row[:, 0], at]
        now = cost.operations(widths[None])[0]
        above = now > limit
        if not above.any():
            return widths
        places = np.minimum(at[:, None] + strides, (steps.numbers - 1)[:, None])
        group, stride = np.nonzero(places > at[:, None])
        place = places[group, stride]
        saving = (now - cost.operations(_replaced(widths, group, steps.widths[group, place])))[:, above].sum(axis=1)
        added = steps.errors[group, place] - steps.errors[group, at[group]]
        useful = saving > 0
        if not useful.any():
            smallest = steps.widths[row[:, 0], steps.numbers - 1]
            if cost.costs(smallest[None])[0] <= limit:
                return smallest  # where no step alone saves anything, all of them may
            raise _too_small(cost, steps, widths, budget)
        rate = np.where(useful, added, np.inf) / np.where(useful, saving, 1)
        best = int(np.argmin(rate))
        at[group[best]] = place[best]


def _fill(
    cost: CostModel, errors: dict[str, Array], allowed: dict[str, Widths], limit: float, widths: Widths
) -> Widths:
    """Go up again where there is room, by the error taken back per cost."""
    steps = _Steps.of([choice[::-1] for choice in allowed.values()], list(errors.values()))
    curve_at = list(errors.values())
    while True:
        now = np.array([curve[width] for curve, width in zip(curve_at, widths, strict=True)])
        group, place = np.nonzero((steps.widths > widths[:, None]) & (steps.errors < now[:, None]))
        candidates = _replaced(widths, group, steps.widths[group, place])
        fits = cost.costs(candidates) <= limit
        if not fits.any():
            return widths
        group, place, candidates = group[fits], place[fits], candidates[fits]
        base = float(cost.operations(widths[None]).sum())
        more = cost.operations(candidates).sum(axis=1) - base
        less = now[group] - steps.errors[group, place]
        with np.errstate(divide="ignore"):
            rate = np.where(more > 0, less / np.maximum(more, 0), np.inf)
        widths = candidates[int(np.argmax(rate))]


def _too_small(cost: CostModel, steps: _Steps, reached: Widths, budget: float) -> BudgetError:
    smallest = steps.widths[np.arange(len(reached)), steps.numbers - 1]
    value = float(cost.costs(np.stack([smallest, reached])).min())
    nearest = value / cost.dense
    while Fraction(repr(nearest)) * Fraction(cost.dense) < Fraction(value):
        nearest = math.nextafter(nearest, math.inf)
    room = budget * cost.dense
    return BudgetError(
        f"budget={budget:g}",
        f"leaves {room:,.6g} {cost.quantity}, but the least widths need {value:,.6g}",
        nearest,
        f"Choose budget >= {nearest!r}, a smaller least= or round_to=, or let more groups be cut.",
    )


def _replaced(widths: Widths, group: npt.NDArray[np.intp], wanted: Widths) -> Widths:
    """Return a row of widths for each candidate, with the width of one group replaced."""
    rows = np.repeat(widths[None], len(group), axis=0)
    rows[np.arange(len(group)), group] = wanted
    return rows


def _allowed(units: int, round_to: int, least: int) -> Widths:
    """Return the widths a group may have, falling: all units, then the multiples below."""
    first = math.ceil(least / round_to) * round_to
    multiples = np.arange(first, units, round_to, dtype=np.int64)
    return np.append(multiples, units)[::-1]


def _hull(widths: Widths, curve: Array) -> Widths:
    """Return those of the falling widths whose errors are on the lower convex hull, ends and straight runs included."""
    kept: list[int] = []
    for width in widths.tolist():
        while len(kept) > 1:
            before, last = kept[-2], kept[-1]
            rise = (curve[last] - curve[before]) * (last - width)
            if rise <= (curve[width] - curve[last]) * (before - last):
                break
            kept.pop()
        kept.append(width)
    return np.array(kept, dtype=np.int64)


def _curve(curve: Array | None, units: int) -> Array:
    return np.zeros(units + 1) if curve is None else np.minimum.accumulate(np.asarray(curve, dtype=float))


def _check_curves(curves: Mapping[str, Array], cost: CostModel) -> None:
    for name, given in curves.items():
        if name not in cost.units:
            raise ValueError(f"curves names {name!r}, which is no group. Groups: {', '.join(cost.units)}.")
        curve = finite_array(given, f"curve of {name!r}", ndim=1)
        units = cost.units[name]
        if len(curve) != units + 1:
            raise ValueError(f"curve of {name!r} has {len(curve)} errors. Pass {units + 1}, for 0 to {units} units.")
        # What was measured in float32 may rise by its rounding.
        rise = float(np.max(np.diff(curve), initial=0.0))
        if rise > np.finfo(np.float32).eps * float(np.abs(curve).max()):
            raise ValueError(
                f"curve of {name!r} rises by {rise:g}. Pass the error with k units retained at index k, non-increasing."
            )
