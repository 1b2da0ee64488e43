"""The budget of a plan: exactly one, and what it leaves for the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ellq.pruning.largest import Counts
from ellq.pruning.pattern import pattern_numbers
from ellq.pruning.storage import require_storage
from ellq.theory import open_fraction
from ellq.theory.arguments import count, real_number

KINDS = ("sparsity", "tol", "nonzeros", "bytes", "pattern")


class BudgetError(ValueError):
    """A budget that cannot be met.

    Attributes:
        nearest: the nearest value that can be, of the same argument.
    """

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class Budget:
    """What limits a plan.

    Attributes:
        kind: the name of the argument, one of ``KINDS``.
        value: what it was given.
        storage: for ``"bytes"``, the format they are counted in.
    """

    kind: str
    value: float | str | Mapping[str, float]
    storage: str = "csr"

    def settings(self) -> dict[str, float | str]:
        """Return what a plan notes down."""
        if isinstance(self.value, Mapping):
            value: float | str = ", ".join(f"{glob}: {sparsity:g}" for glob, sparsity in self.value.items())
        else:
            value = self.value
        return {self.kind: value} | ({"storage": self.storage} if self.kind == "bytes" else {})


def one_budget(given: Mapping[str, object], *, storage: str, tol_is_eta: bool) -> Budget:
    """Return the one budget among the arguments, checked.

    Args:
        given: for each of ``KINDS`` what the caller passed, None for nothing.
        storage: the format of ``bytes``.
        tol_is_eta: ``tol`` may be any η ≥ 0 instead of a fraction.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: no budget, two, or one out of range.
    """
    require_storage(storage)
    named = [kind for kind in KINDS if given.get(kind) is not None]
    if len(named) != 1:
        told = " and ".join(f"{kind}=" for kind in named) or "none"
        raise ValueError(f"Give exactly one budget: sparsity=, tol=, nonzeros=, bytes= or pattern=; got {told}.")
    kind = named[0]
    value = given[kind]
    if kind == "pattern":
        pattern_numbers(str(value))
        return Budget(kind, str(value))
    if kind in ("nonzeros", "bytes"):
        return Budget(kind, count(value, kind, low=0, high=10**18), storage)
    if kind == "tol" and tol_is_eta:
        eta = real_number(value, "tol")
        if not 0 <= eta < math.inf:
            raise ValueError(f"tol={eta:g} is not a finite η >= 0. Choose one such as tol=0.")
        return Budget(kind, eta)
    if isinstance(value, Mapping):
        fractions = {}
        for glob, wanted in value.items():
            fraction = real_number(wanted, f"sparsity of {glob!r}")
            if not 0 <= fraction < 1:
                raise ValueError(f"sparsity of {glob!r} is {fraction:g}, outside [0, 1). Choose a fraction.")
            fractions[glob] = fraction
        return Budget(kind, fractions)
    return Budget(kind, open_fraction(value, kind))


def refuse_too_small(
    retained: int, names: Sequence[str], minima: Sequence[Counts], *, asked: str, advice: str, nearest: float
) -> None:
    """Raise BudgetError if the minima of the units exceed what is retained, naming the first that has no room.

    Args:
        retained: what the budget leaves.
        names: of the layers.
        minima: for each layer what every unit keeps at least.
        asked: the budget as the caller put it, such as ``"sparsity=0.99"``.
        advice: what to do.
        nearest: the nearest value that can be met.
    """
    held = np.cumsum(np.concatenate(minima))
    if not held.size or held[-1] <= retained:
        return
    place = int(np.searchsorted(held, retained, side="right"))
    layer = int(np.searchsorted(np.cumsum([len(minimum) for minimum in minima]), place, side="right"))
    unit = place - sum(len(minimum) for minimum in minima[:layer])
    units = sum(int(np.count_nonzero(minimum)) for minimum in minima)
    least = max(int(minimum.max(initial=0)) for minimum in minima)
    raise BudgetError(
        f"{asked} leaves {retained} weights for {units} units, each of which keeps at least {least}: nothing is left"
        f" for unit {unit} of {names[layer]!r}. {advice}",
        nearest,
    )
