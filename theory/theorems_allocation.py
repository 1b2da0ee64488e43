"""The theorem on sharing retained weights among units, registered with both of its sides."""

from __future__ import annotations

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.allocation import allocate_shares, allocation_error, least_allocation_error
from ellq.theory.arguments import Array
from ellq.theory.notation import NamedQuantity, orders_rise_to_p, p, q
from ellq.theory.rounding import log_error
from ellq.theory.statements import Assumption, Case, Statement, register


def _draw_allocation(rng: np.random.Generator) -> Case:
    gains = np.abs(families.vector(rng, largest=100, tame=True))
    low, high = families.orders(rng, smallest=0.1)
    counts = np.asarray(rng.integers(1, 1000, gains.size), dtype=np.float64)
    if rng.random() < 0.5:  # near the best: where the bound is nearly attained
        best = allocate_shares(gains, float(10 * gains.size), q=low, least=1e-6)
        counts = best * np.exp(10.0 ** rng.uniform(-8, 0) * rng.standard_normal(gains.size))
    return {"gains": gains, "counts": counts, "q": low, "p": high}


def _least(gains: Array, counts: Array, q: float, p: float) -> float:
    return least_allocation_error(gains, float(np.sum(counts)), q=q, p=p)


def _allocation_formula() -> sympy.Basic:
    i, n = sympy.symbols("i n", integer=True, positive=True)
    gain, retained = sympy.IndexedBase("A"), sympy.IndexedBase("k")
    least = NamedQuantity("‖A‖_q", r"\|A\|_q") * sympy.Symbol("K", positive=True) ** (1 / p - 1 / q)
    errors = sympy.Sum((gain[i] * retained[i] ** (1 / p - 1 / q)) ** p, (i, 1, n))
    return sympy.Le(least, errors ** (1 / p))


ALLOCATION = register(
    Statement(
        id="allocation",
        title="Least bound that any sharing of a number of retained weights among units can have",
        reference="ours, Hölder's inequality; attained by k_i proportional to A_i^q",
        status="ours",
        assumptions=(
            Assumption(
                "A ≥ 0",
                "the gains are finite and not negative.",
                lambda case: bool(np.isfinite(case["gains"]).all() and np.min(case["gains"]) >= 0),
            ),
            Assumption(
                "k > 0",
                "every unit retains something, and finitely much.",
                lambda case: bool(np.isfinite(case["counts"]).all() and np.min(case["counts"]) > 0),
            ),
            orders_rise_to_p,
        ),
        observed=_least,
        bound=lambda gains, counts, q, p: allocation_error(gains, counts, q=q, p=p),
        # Rounded down; what is left is the rounding of Σk_i, which enters by the power 1/p − 1/q.
        relative_error=lambda gains, counts, q, p: log_error(np.size(counts) / q),
        formula=_allocation_formula,
        draw=_draw_allocation,
    )
)
