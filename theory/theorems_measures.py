"""Theorems on measures of sparsity, registered with both of their sides."""

from __future__ import annotations

import math

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.arguments import GREATEST_ORDER, LEAST_ORDER, Array
from ellq.theory.axioms import CRITERIA
from ellq.theory.notation import NamedQuantity, finite_weights, p, q, some_weight
from ellq.theory.power_sums import power_sums
from ellq.theory.rounding import log_error, outward
from ellq.theory.statements import Assumption, Case, Statement, register

_LEAST, _LARGEST = 1e-100, 1e100  # magnitudes and amounts between change without underflow or overflow

_orders_around_one = Assumption(
    "p ≤ 1 ≤ q",
    f"0 < p ≤ 1 ≤ q and p < q, both from {LEAST_ORDER:g} to {GREATEST_ORDER:g}.",
    lambda case: LEAST_ORDER <= case["p"] <= 1 <= case["q"] <= GREATEST_ORDER and case["p"] < case["q"],
)
_is_criterion = Assumption(
    "criterion", f"the criterion is one of {', '.join(CRITERIA)}.", lambda case: case["criterion"] in CRITERIA
)
_entries_exist = Assumption(
    "entries",
    "both entries are indices of w.",
    lambda case: all(0 <= case[i] < np.size(case["w"]) for i in ("entry", "other")),
)
_is_moderate = Assumption(
    "moderate",
    f"the amount and all magnitudes but 0 lie between {_LEAST:g} and {_LARGEST:g}, and the amount is at most 1.",
    lambda case: (
        _LEAST <= case["amount"] <= 1 and all(_LEAST <= size <= _LARGEST for size in np.abs(case["w"]) if size > 0)
    ),
)


def _evenness(
    w: Array, criterion: str, entry: int, other: int, amount: float, p: float, q: float
) -> tuple[float, float]:
    """Return 1 − I of the vector that must be the sparser and of the other; where both must agree, the larger first."""
    first, second = (
        float(power_sums(vector, (p, q)).evenness(p, q)) for vector in CRITERIA[criterion].pair(w, entry, other, amount)
    )
    return (first, second) if CRITERIA[criterion].is_strict else (max(first, second), min(first, second))


def _evenness_error(size: int, p: float, q: float) -> float:
    """Bound the relative error of 1 − I of a vector whose at most ``size`` entries are themselves rounded.

    Its logarithm is log(S_p/d)/p − log(S_q/d)/q: the sums are off by (d + 8)u, the logarithms by 8u of at most
    log d + order·log 2, the quotients and the difference by 4u of that; exp by 8u; and the entries change it by 8u.
    """
    return log_error((size + 10 + 12 * math.log(size)) * (1 / p + 1 / q) + 48)


def _draw_criterion(rng: np.random.Generator) -> Case:
    w = families.vector(rng)
    largest = np.abs(w).max()
    w = np.where(np.abs(w) < 1e-60 * largest, 0.0, w / largest)
    return {
        "w": w,
        "criterion": str(rng.choice(list(CRITERIA))),
        "entry": int(rng.integers(w.size)),
        "other": int(rng.integers(w.size)),
        "amount": float(10.0 ** -rng.uniform(0.0, 4.0)),
        "p": float(rng.choice([1.0, rng.uniform(0.05, 1.0)])),
        "q": float(rng.uniform(1.0, 4.0)),
    }


def _axioms_formula() -> sympy.Basic:
    def evenness(vector: str, tex: str, size: str) -> sympy.Basic:
        d = sympy.Symbol(size, positive=True)
        norms = (NamedQuantity(f"‖{vector}‖_{order}", rf"\|{tex}\|_{order}") for order in ("p", "q"))
        return d ** (1 / q - 1 / p) * next(norms) / next(norms)

    return sympy.Le(evenness("w⁺", "w^+", "d_+"), evenness("w⁻", "w^-", "d_-"))


PQ_AXIOMS = register(
    Statement(
        id="pq-axioms",
        title="The PQ index orders vectors as each of the six sparsity criteria demands",
        reference=(
            "Diao et al. 2023 (arXiv 2302.05601), Theorem 1, restricted to p ≤ 1 ≤ q by us; for the pq-mean, which is"
            " I − 1, with p ≤ 1 < q Hurley & Rickard 2009"
        ),
        status="published",
        assumptions=(finite_weights, some_weight, _orders_around_one, _is_criterion, _entries_exist, _is_moderate),
        observed=lambda w, criterion, entry, other, amount, p, q: _evenness(w, criterion, entry, other, amount, p, q)[
            0
        ],
        bound=lambda w, criterion, entry, other, amount, p, q: float(
            outward(_evenness(w, criterion, entry, other, amount, p, q)[1], _evenness_error(2 * np.size(w), p, q))
        ),
        relative_error=lambda w, criterion, entry, other, amount, p, q: _evenness_error(2 * np.size(w), p, q),
        formula=_axioms_formula,
        draw=_draw_criterion,
    )
)
