"""Theorems on few reweighted terms that stand for many, registered with both of their sides."""

from __future__ import annotations

import math

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.approximation import best_term_error
from ellq.theory.arguments import Array
from ellq.theory.input_moments import moment_error, second_moments
from ellq.theory.notation import NamedQuantity, finite_weights, k, keeps_some, norm_q, quasi_order
from ellq.theory.propagation import column_scale, unit_error_observed
from ellq.theory.reweighting import hilbert_sampling_bound, reweight, unit_error_resampled
from ellq.theory.rounding import log_error, norm_error
from ellq.theory.statements import Assumption, Case, Statement, register

_FAR = 2.0**-900  # from here on, what underflows is far below every rounding


def _is_in_range(w: Array, heavy: int, inputs: Array) -> bool:
    tail, scales = best_term_error(w, heavy, p=1.0), column_scale(inputs)
    largest = float(scales.max())
    if tail == 0 or largest == 0:
        return True
    return min(tail, largest, tail * largest) >= _FAR and bool((scales[scales > 0] >= 2.0**-500 * largest).all())


_leaves_a_tail = Assumption(
    "0 ≤ h < k", "fewer weights stay as they are than are kept.", lambda case: 0 <= case["heavy"] < case["retained"]
)
_in_range = Assumption(
    "in range",
    "the tail and the inputs are far above the subnormal range.",
    lambda case: _is_in_range(case["w"], case["heavy"], case["inputs"]),
)


def _draw_unit(rng: np.random.Generator) -> Case:
    w = families.vector(rng, largest=100, tame=True)
    retained = int(rng.integers(1, w.size + 1))
    return {
        "w": w,
        "retained": retained,
        "heavy": int(rng.integers(0, retained)),
        "inputs": families.features(rng, w.size),
    }


def _draw_hull(rng: np.random.Generator) -> Case:
    return {**_draw_unit(rng), "q": float(rng.uniform(0.05, 0.999))}


def _observed(w: Array, retained: int, heavy: int, inputs: Array) -> float:
    # Picks do not depend on the scale of the inputs, whose squares might leave float64.
    moments = second_moments(np.ldexp(inputs, -int(np.frexp(np.abs(inputs).max())[1])))
    weights = reweight(w, moments, retained, heavy=heavy).weights
    return unit_error_observed(np.asarray(w, dtype=np.float64) - weights, inputs)


def _rounding(w: Array, retained: int, heavy: int, inputs: Array) -> float:
    m, d, n = retained - heavy, np.size(w), len(inputs)
    # The choice is made on rounded moments with rounding of its own (``reweighting._bounds``). Relative to the square
    # of the bound, K²A²/m, that adds m times the slack there, and what the moments miss of A·Σ|θ_j|‖X_j‖² − ‖ω‖².
    slack = log_error(24.0 * d + 120) + 3 * log_error(1.0) * m + 4.01 * moment_error(n)
    # |fl(Xv) − Xv| ≤ (d + 1)u·|X||v| entrywise, whose L2 norm is at most (d + 1)u·B·2A: 2√m times the bound.
    observation = 2 * math.sqrt(m) * norm_error(d + 1, 1.0) + norm_error(n, 2.0)
    return m * slack / 2 + 2 * moment_error(n) + observation


def _resampled_formula() -> sympy.Basic:
    h, scale = sympy.symbols("h B", positive=True)
    tail = NamedQuantity("σ_h(w)_1", r"\sigma_h(w)_1")
    return sympy.Le(NamedQuantity("‖f − f̂‖", r"\|f - \hat f\|_{L_2}"), scale * tail / sympy.sqrt(k - h))


LINEAR_UNIT_RESAMPLED = register(
    Statement(
        id="linear-unit-resampled",
        title="Error of a linear unit whose tail is represented by equal weights, inputs correlated in any way",
        reference="Yang et al. 2022 (arXiv 2206.05604), linear-unit theorem as reconstructed, case (b); picks ours",
        status="reconstructed",
        assumptions=(finite_weights, keeps_some, _leaves_a_tail, _in_range),
        observed=_observed,
        bound=lambda w, retained, heavy, inputs: unit_error_resampled(
            w, retained, scale=float(column_scale(inputs).max()), heavy=heavy
        ),
        relative_error=_rounding,
        formula=_resampled_formula,
        draw=_draw_unit,
    )
)


def _hilbert_formula() -> sympy.Basic:
    h, scale = sympy.symbols("h K", positive=True)
    constant = NamedQuantity("max (m − h) m^(−1/q)", r"\max_{h<m\leq n}(m-h)m^{-1/q}")
    return sympy.Le(NamedQuantity("‖f − f̂‖", r"\|f - \hat f\|"), scale * norm_q * constant / sympy.sqrt(k - h))


HILBERT_SAMPLING = register(
    Statement(
        id="hilbert-sampling",
        title="k terms of an ℓq hull in a Hilbert space, chosen from inner products alone",
        reference="ours, with a constant below that of Gao, Ing & Yang 2013, Theorem 2",
        status="ours",
        assumptions=(finite_weights, quasi_order, keeps_some, _leaves_a_tail, _in_range),
        observed=lambda w, retained, heavy, q, inputs: _observed(w, retained, heavy, inputs),
        bound=lambda w, retained, heavy, q, inputs: hilbert_sampling_bound(
            w, retained, q=q, scale=float(column_scale(inputs).max()), heavy=heavy
        ),
        relative_error=lambda w, retained, heavy, q, inputs: _rounding(w, retained, heavy, inputs),
        formula=_hilbert_formula,
        draw=_draw_hull,
    )
)
