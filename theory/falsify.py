"""The attack on any statement: draw cases from every family, then climb from the tightest towards a violation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ellq.theory.arguments import count
from ellq.theory.statements import Statement, Verdict

_CLIMBERS = 8  # how many of the tightest drawn cases are climbed from
_DRAWN = 0.6  # share of the cases that are drawn; the rest are steps of the climbs

Case = dict[str, Any]
_Entry = tuple[float, int, Case, Verdict]  # observed ÷ bound, number, case, both sides


@dataclass(frozen=True)
class Attack:
    """What an attack on a statement found.

    Attributes:
        statement: its id.
        seed: what the cases were drawn with.
        cases: how many were evaluated.
        violations: how many broke the statement beyond the rounding of the observation.
        tightest: the least bound ÷ observed among them, rounding of the observation taken off; near 1 where the
            statement is sharp, below 1 for a violation.
        worst: the case that came closest, or the first violation.
        verdict: both sides on that case.
    """

    statement: str
    seed: int
    cases: int
    violations: int
    tightest: float
    worst: Case
    verdict: Verdict

    @property
    def survived(self) -> bool:
        """Whether no case broke the statement."""
        return self.violations == 0


def attack(
    statement: Statement, *, cases: int = 10_000, seed: int = 0, progress: Callable[[range], Any] = iter
) -> Attack:
    """Search for a violation of a statement.

    Cases come from the statement's own families, which include near-extremal ones; then the tightest are climbed from:
    random multiplicative changes of magnitudes, small and large, and unit steps of counts, kept when they tighten the
    ratio of observed to bound. A case that does not meet the assumptions is drawn again. The same seed gives the same
    attack.

    Args:
        statement: what to attack.
        cases: how many cases to evaluate, ≥ 1.
        seed: of the draws.
        progress: wraps the range of cases, to show a bar.

    Returns:
        The attack.

    Raises:
        TypeError: ``cases`` is not a whole number.
        ValueError: ``cases`` < 1, or a statement without cases to draw.
    """
    if statement.draw is None:
        raise ValueError(f"Statement {statement.id!r} has no cases to draw. Give it draw=.")
    total = count(cases, "cases", low=1, high=10**12)
    rng = np.random.default_rng([seed, *statement.id.encode()])
    best: list[_Entry] = []
    violations, first = 0, None
    drawn = max(1, round(_DRAWN * total))
    for number in progress(range(total)):
        climber = -1 if number < drawn else number % len(best)
        case, verdict = _drawn(statement, rng) if climber < 0 else _step(statement, best[climber], rng)
        ratio = _ratio(verdict)
        if not verdict.holds:
            violations += 1
            first = first or (ratio, number, case, verdict)
        if climber < 0:
            best = sorted([*best, (ratio, number, case, verdict)], key=lambda entry: -entry[0])[:_CLIMBERS]
        elif ratio > best[climber][0]:
            best[climber] = (ratio, number, case, verdict)
    ratio, _, case, verdict = first or max(best, key=lambda entry: entry[0])
    tightest = 1 / ratio if ratio > 0 else float("inf")
    return Attack(statement.id, seed, total, violations, tightest, case, verdict)


def _ratio(verdict: Verdict) -> float:
    """Return observed ÷ bound, less what rounding may have added to the observed."""
    observed = max(verdict.observed - verdict.allowance, 0.0)
    return observed / verdict.bound if verdict.bound > 0 else float("inf") if observed > 0 else 0.0


def _drawn(statement: Statement, rng: np.random.Generator) -> tuple[Case, Verdict]:
    assert statement.draw is not None
    for _ in range(1000):
        case = dict(statement.draw(rng))
        verdict = _evaluated(statement, case)
        if verdict is not None:
            return case, verdict
    raise AssertionError(f"{statement.id}: a thousand draws in a row miss the assumptions")


def _step(statement: Statement, start: _Entry, rng: np.random.Generator) -> tuple[Case, Verdict]:
    """Return a neighbour of a case that can be evaluated; the case itself if none is found soon."""
    _, _, case, verdict = start
    width = 10.0 ** rng.uniform(-6, 0.5)
    for _ in range(20):
        neighbour = {name: _nudged(value, width, rng) for name, value in case.items()}
        found = _evaluated(statement, neighbour)
        if found is not None:
            return neighbour, found
    return case, verdict


def _evaluated(statement: Statement, case: Case) -> Verdict | None:
    """Return the verdict; None where an assumption fails or a side exceeds float64."""
    if not all(assumption.holds(case) for assumption in statement.assumptions):
        return None
    try:
        return statement.check(**case)
    except OverflowError:
        return None


def _nudged(value: Any, width: float, rng: np.random.Generator) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_nudged(part, width, rng) for part in value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        moved = value * np.exp(width * rng.standard_normal(value.shape) * (rng.random(value.shape) < 0.3))
        return np.where(np.isfinite(moved), moved, value)
    if isinstance(value, bool | np.bool_ | np.ndarray):
        return value
    if isinstance(value, int | np.integer):
        return int(value) + int(rng.integers(-1, 2))
    if isinstance(value, float):
        return float(value * np.exp(0.1 * width * rng.standard_normal()))
    return value
