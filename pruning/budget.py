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

KINDS = ("sparsity", "tol", "nonzeros", "bytes", "pattern", "flops", "parameters", "memory", "latency")
COSTS = KINDS[5:]
"""Budgets that are a fraction of what the dense network takes; of channels only."""


class BudgetError(ValueError):
    """A budget that cannot be met.

    Attributes:
        asked: the budget as the caller put it, such as ``"sparsity=0.99"``.
        obstacle: what stands in the way, as what the budget does: ``"leaves 3 weights for 9 units, …"``.
        nearest: the nearest value that can be, of the same argument.
        advice: what to do.
    """

    def __init__(self, asked: str, obstacle: str, nearest: float, advice: str) -> None:
        super().__init__(asked, obstacle, nearest, advice)
        self.asked, self.obstacle, self.nearest, self.advice = asked, obstacle, nearest, advice

    def __str__(self) -> str:
        return f"{self.asked} {self.obstacle}. {self.advice}"


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
        listed = ", ".join(f"{kind}=" for kind in KINDS[:-1])
        raise ValueError(f"Give exactly one budget: {listed} or {KINDS[-1]}=; got {told}.")
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


def refuse_too_small(retained: int, names: Sequence[str], minima: Sequence[Counts], *, vector: str = "unit") -> None:
    """Raise BudgetError if the minima exceed what is retained, naming the first unit that has no room.

    The error speaks of a number of weights, ``retained``; who knows what the caller asked for says it anew.

    Args:
        retained: what the budget leaves.
        names: of the layers.
        minima: for each layer what every unit keeps at least; one number where a minimum is that of a whole layer.
        vector: what a minimum is of: ``"unit"``, ``"layer"`` or ``"global"``.
    """
    held = int(sum(minimum.sum() for minimum in minima))
    if held <= retained:
        return
    layer, unit = without_room(retained, minima)
    place = f"unit {unit} of {names[layer]!r}" if vector == "unit" else f"layer {names[layer]!r}"
    number = sum(int(np.count_nonzero(minimum)) for minimum in minima)
    least = max(int(minimum.max(initial=0)) for minimum in minima)
    obstacle = (
        f"leaves {retained} weights for the model, which keeps at least {least}"
        if vector == "global"
        else f"leaves {retained} weights for {number} {vector}s, each of which keeps at least {least}: nothing is left"
        f" for {place}"
    )
    raise BudgetError(f"retained={retained}", obstacle, held, f"Choose retained >= {held}.")


def without_room(room: float, minima: Sequence[Counts]) -> tuple[int, int]:
    """Return the layer and the unit in it, by number, at which minima added up exceed the room; they do exceed it."""
    for layer, minimum in enumerate(minima):
        fits = np.cumsum(minimum) <= room
        if not fits.all():
            return layer, int(np.argmin(fits))
        room -= int(minimum.sum())
    raise AssertionError("the minima fit")
