"""The attack on any statement: draw cases from every family, then climb from some of them towards a violation."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ellq.theory.arguments import count
from ellq.theory.climb import Case, climb
from ellq.theory.statements import Statement, Verdict

_CLIMBERS = 8  # cases climbed from: half the tightest drawn, half whatever was drawn last
_DRAWN = 0.5  # share of the cases that are drawn; the rest are steps of the climbs
_MISSES = 1000  # draws or steps in a row that may miss the assumptions

_Entry = tuple[float, Case, Verdict]  # observed ÷ bound, case, both sides


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

    Cases come from the statement's own families, which include near-extremal ones. From the tightest and from random
    ones it then climbs: gradient ascent of observed ÷ bound in the logarithms of the magnitudes, a search over the
    counts nearby, random changes of all sizes. A case that does not meet the assumptions is not counted. The same
    seed gives the same attack.

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
    violations, first, top = 0, None, None
    # The range comes first: it ends the search, which has no end of its own.
    for _, entry in zip(progress(range(total)), _search(statement, round(_DRAWN * total), rng), strict=False):
        ratio, _, verdict = entry
        if not verdict.holds:
            violations += 1
            first = first or entry
        if top is None or ratio > top[0]:
            top = entry
    assert top is not None
    ratio, case, verdict = first or top
    tightest = 1 / ratio if ratio > 0 else float("inf")
    return Attack(statement.id, seed, total, violations, tightest, case, verdict)


def _search(statement: Statement, drawn: int, rng: np.random.Generator) -> Iterator[_Entry]:
    """Yield drawn cases, then the steps of climbs that start from some of them, for ever."""
    tightest: list[_Entry] = []
    latest: deque[_Entry] = deque(maxlen=_CLIMBERS // 2)
    for _ in range(max(drawn, 1)):
        entry = _drawn(statement, rng)
        yield entry
        latest.append(entry)
        tightest = sorted([*tightest, entry], key=lambda known: -known[0])[: _CLIMBERS // 2]
    climbs = [climb(case, ratio, rng) for ratio, case, _ in (*tightest, *latest)]
    steps = [next(each) for each in climbs]
    for i in itertools.cycle(range(len(climbs))):
        for _ in range(_MISSES):
            case = steps[i]
            found = _evaluated(statement, case)
            steps[i] = climbs[i].send(None if found is None else found[0])
            if found is not None:
                yield found
                break
        else:
            yield _drawn(statement, rng)


def _ratio(verdict: Verdict) -> float:
    """Return observed ÷ bound, less what rounding may have added to the observed."""
    observed = max(verdict.observed - verdict.allowance, 0.0)
    return observed / verdict.bound if verdict.bound > 0 else float("inf") if observed > 0 else 0.0


def _drawn(statement: Statement, rng: np.random.Generator) -> _Entry:
    assert statement.draw is not None
    for _ in range(_MISSES):
        found = _evaluated(statement, dict(statement.draw(rng)))
        if found is not None:
            return found
    raise AssertionError(f"{statement.id}: {_MISSES} draws in a row miss the assumptions")


def _evaluated(statement: Statement, case: Case) -> _Entry | None:
    """Return the case with its verdict; None where an assumption fails or a side exceeds float64."""
    if not all(assumption.holds(case) for assumption in statement.assumptions):
        return None
    try:
        verdict = statement.check(**case)
    except OverflowError:
        return None
    return _ratio(verdict), case, verdict
