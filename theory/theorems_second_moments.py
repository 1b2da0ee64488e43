"""Theorems on what pruning a unit changes, from the second moments of its inputs, with both of their sides."""

from __future__ import annotations

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.arguments import Array
from ellq.theory.input_moments import (
    gram_scale,
    moment_error,
    second_moments,
    unit_error_gram,
    unit_error_uncorrelated,
)
from ellq.theory.notation import NamedQuantity, finite_weights, k, keeps_some, norm_q, q
from ellq.theory.propagation import column_scale, unit_error_l1, unit_error_observed
from ellq.theory.rounding import norm_error
from ellq.theory.statements import Assumption, Case, Statement, register
from ellq.theory.theorems_propagation import removed_by_magnitude

squares_fit = Assumption(
    "squares fit",
    "every input is 0 or between 1e-140 and 1e140 in size, so that products of two are float64.",
    lambda case: bool(
        np.all((case["inputs"] == 0) | ((np.abs(case["inputs"]) >= 1e-140) & (np.abs(case["inputs"]) <= 1e140)))
    ),
)


def _draw_unit_gram(rng: np.random.Generator) -> Case:
    v = families.vector(rng, largest=60, tame=True)
    return {"removed": v, "inputs": families.features(rng, v.size)}


def _inner_rounding(v: Array, inputs: Array, bound: float) -> float:
    # |fl(Xv) − Xv| ≤ d·u·|X||v|, whose L2 norm is at most d·u·Σ|v_j|‖X_j‖: it does not shrink where the terms cancel.
    size = unit_error_l1(v * column_scale(inputs), 1.0)
    return norm_error(v.size, 1.0) * size / bound + norm_error(len(inputs), 2.0) if bound > 0 else 0.0


def _gram_bound(removed: Array, inputs: Array) -> float:
    return unit_error_gram(removed, second_moments(inputs), entry_error=moment_error(len(inputs)))


def _gram_formula() -> sympy.Basic:
    i, j, d = sympy.symbols("i j d", integer=True, positive=True)
    v, moment = sympy.IndexedBase("v"), sympy.IndexedBase("Sigma")
    form = sympy.Sum(v[i] * moment[i, j] * v[j], (i, 1, d), (j, 1, d))
    return sympy.Le(NamedQuantity("‖f − f̂‖", r"\|f - \hat f\|_{L_2}"), sympy.sqrt(form))


LINEAR_UNIT_GRAM = register(
    Statement(
        id="linear-unit-gram",
        title="Error of a pruned linear unit from the measured second moments of its inputs",
        reference="by definition of the second moments; its rounding ours",
        status="classical",
        assumptions=(
            Assumption("finite", "what was removed is finite.", lambda case: bool(np.isfinite(case["removed"]).all())),
            squares_fit,
        ),
        observed=unit_error_observed,
        bound=_gram_bound,
        relative_error=lambda removed, inputs: _inner_rounding(removed, inputs, _gram_bound(removed, inputs)),
        formula=_gram_formula,
        draw=_draw_unit_gram,
    )
)


def _draw_uncorrelated(rng: np.random.Generator) -> Case:
    w = families.vector(rng, largest=40, tame=True)
    inputs = families.features(rng, w.size)
    if rng.random() < 0.5:  # orthogonal columns of equal or of different sizes: where the bound is nearly attained
        sizes = 10.0 ** rng.uniform(-1, 1, w.size) if rng.random() < 0.5 else 1.0
        inputs = np.eye(w.size)[rng.permutation(w.size)] * sizes * rng.choice([-1.0, 1.0], w.size)
    return {
        "w": w,
        "retained": int(rng.integers(1, w.size + 1)),
        "q": float(rng.uniform(0.05, 1.999)),
        "inputs": inputs,
    }


def _uncorrelated_bound(w: Array, retained: int, q: float, inputs: Array) -> float:
    scale = gram_scale(second_moments(inputs), entry_error=moment_error(len(inputs)))
    return unit_error_uncorrelated(w, retained, q=q, scale=scale)


def _uncorrelated_formula() -> sympy.Basic:
    error, largest = NamedQuantity("‖f − f̂‖", r"\|f - \hat f\|_{L_2}"), sympy.Symbol("Lambda", positive=True)
    constant = ((q / 2) ** (q / 2) * (1 - q / 2) ** (1 - q / 2)) ** (1 / q)
    return sympy.Le(error, sympy.sqrt(largest) * constant * norm_q * k ** (sympy.Rational(1, 2) - 1 / q))


LINEAR_UNIT_UNCORRELATED = register(
    Statement(
        id="linear-unit-uncorrelated",
        title="Error of a magnitude-pruned linear unit, inputs uncorrelated or of second moments at most Λ·Id",
        reference="Yang et al. 2022 (arXiv 2206.05604), linear-unit theorem as reconstructed, case (c)",
        status="reconstructed",
        assumptions=(
            finite_weights,
            Assumption("q < 2", "0 < q < 2.", lambda case: 0 < case["q"] < 2),
            keeps_some,
            squares_fit,
        ),
        observed=lambda w, retained, q, inputs: unit_error_observed(removed_by_magnitude(w, retained), inputs),
        bound=_uncorrelated_bound,
        # ‖ |X||v| ‖/√n ≤ √(trace Σ)·‖v‖₂ ≤ √d·√Λ‖v‖₂ ≤ √d·bound.
        relative_error=lambda w, retained, q, inputs: (
            norm_error(np.size(w), 1.0) * float(np.sqrt(np.size(w))) + norm_error(len(inputs), 2.0)
        ),
        formula=_uncorrelated_formula,
        draw=_draw_uncorrelated,
    )
)
