"""A theorem as an object: its two sides, its assumptions as checks, its formula and its source; and the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import sympy

from ellq.theory.rounding import LEAST

Case = Mapping[str, Any]
Status = Literal["published", "classical", "reconstructed", "ours"]


@dataclass(frozen=True)
class Assumption:
    """A condition under which a statement is claimed: a name, a sentence, and a check of a case."""

    name: str
    sentence: str
    holds: Callable[[Case], bool]


@dataclass(frozen=True)
class Verdict:
    """Both sides of a statement on one case.

    Attributes:
        observed: the left-hand side, computed from its definition.
        bound: the right-hand side, rounded up.
        allowance: how far floating point may lift ``observed`` above its exact value.
    """

    observed: float
    bound: float
    allowance: float

    @property
    def holds(self) -> bool:
        """Whether the observed value is within the bound, up to the rounding of the observation."""
        return self.observed <= self.bound + self.allowance

    @property
    def slack(self) -> float:
        """Bound ÷ observed, ≥ 1 where the statement holds; infinite where nothing was observed."""
        return self.bound / self.observed if self.observed > 0 else float("inf")


@dataclass(frozen=True)
class Statement:
    """A claim observed ≤ bound, for every case that meets the assumptions.

    Attributes:
        id: short name, as in ``stechkin``.
        title: one line.
        reference: numbered source.
        status: published (its text was read), classical, reconstructed (derived from partial sources), or ours.
        assumptions: when the claim is made.
        observed: left-hand side of a case.
        bound: right-hand side of the same case.
        relative_error: rounding error of ``observed``, relative to the bound.
        formula: builds the sympy relation, on demand.
        draw: draws a case to attack it with, from families that include near-extremal ones.
    """

    id: str
    title: str
    reference: str
    status: Status
    assumptions: tuple[Assumption, ...]
    observed: Callable[..., float]
    bound: Callable[..., float]
    relative_error: Callable[..., float]
    formula: Callable[[], sympy.Basic]
    draw: Callable[[np.random.Generator], Case] | None = None

    def check(self, **case: Any) -> Verdict:
        """Evaluate both sides on one case.

        Args:
            case: the named arguments both sides take.

        Returns:
            The verdict.

        Raises:
            ValueError: an assumption does not hold; the message says which.
        """
        for assumption in self.assumptions:
            if not assumption.holds(case):
                raise ValueError(f"'{self.id}' does not apply: {assumption.sentence}")
        bound = self.bound(**case)
        # A result in the subnormal range is off by an absolute amount, besides.
        return Verdict(self.observed(**case), bound, bound * self.relative_error(**case) + LEAST)

    def falsifier(self) -> str:
        """Return what would falsify the claim, in a sentence."""
        formula = self.formula()
        sides = f"{formula.lhs} > {formula.rhs}" if isinstance(formula, sympy.LessThan) else f"not ({formula})"
        assumed = " and ".join(assumption.name for assumption in self.assumptions)
        return f"A case that meets its assumptions ({assumed}) and has {sides}, beyond what rounding explains."

    def latex(self) -> str:
        """Return the formula as LaTeX."""
        return str(sympy.latex(self.formula()))


_REGISTRY: dict[str, Statement] = {}


def register(statement: Statement) -> Statement:
    """Add a statement to the registry and return it; an id may be used once."""
    if statement.id in _REGISTRY:
        raise ValueError(f"Statement id {statement.id!r} is taken.")
    _REGISTRY[statement.id] = statement
    return statement


def registry() -> dict[str, Statement]:
    """Return all registered statements by id, in order of registration."""
    return dict(_REGISTRY)


def statement(id: str) -> Statement:
    """Return the statement of that id.

    Raises:
        KeyError: no such statement; the message lists those there are.
    """
    if id not in _REGISTRY:
        raise KeyError(f"No statement {id!r}. There are: {', '.join(_REGISTRY)}.")
    return _REGISTRY[id]
