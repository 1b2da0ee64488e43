"""Theorems on replacing features by a skeleton of them, registered with both of their sides."""

from __future__ import annotations

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.id_bounds import skeleton_output_bound, skeleton_residual
from ellq.theory.notation import (
    NamedQuantity,
)
from ellq.theory.propagation import (
    unit_error_observed,
)
from ellq.theory.rounding import norm_error
from ellq.theory.statements import Assumption, Case, Statement, register


def _draw_skeleton(rng: np.random.Generator) -> Case:
    m = families.size(rng, 20)
    features = families.features(rng, m)
    indices = rng.permutation(m)[: int(rng.integers(1, m + 1))]
    T = np.linalg.lstsq(features[:, indices], features, rcond=None)[0]
    return {"features": features, "indices": indices, "interpolation": T, "consumer": rng.standard_normal(m)}


def _risk_formula() -> sympy.Basic:
    n = sympy.Symbol("n", positive=True)
    error, residual = (
        NamedQuantity("‖(A − A_J·T)u‖", r"\|(A - A_J T)u\|_2"),
        NamedQuantity("‖A − A_J·T‖", r"\|A - A_J T\|_2"),
    )
    return sympy.Le(error / sympy.sqrt(n), residual * NamedQuantity("‖u‖", r"\|u\|_2") / sympy.sqrt(n))


RISK_EMPIRICAL = register(
    Statement(
        id="risk-empirical",
        title="Error of a unit whose inputs are replaced by their skeleton",
        reference="Chee et al. 2021 (arXiv 2108.00065), empirical risk bound as reconstructed",
        status="reconstructed",
        assumptions=(
            Assumption("finite", "all features are finite.", lambda case: bool(np.isfinite(case["features"]).all())),
        ),
        observed=lambda features, indices, interpolation, consumer: unit_error_observed(
            consumer, skeleton_residual(features, indices, interpolation, np.zeros(np.shape(features)[1]))
        ),
        bound=lambda features, indices, interpolation, consumer: float(
            skeleton_output_bound(
                skeleton_residual(features, indices, interpolation, np.zeros(np.shape(features)[1])),
                np.asarray(consumer)[None],
            )[0]
        ),
        # Both sides start from the same computed residual E; |fl(Eu) − Eu| ≤ m·u·|E||u| ≤ m^1.5·u·‖E‖₂‖u‖.
        relative_error=lambda features, indices, interpolation, consumer: (
            norm_error(np.shape(features)[1], 1.0) * float(np.sqrt(np.shape(features)[1]))
            + norm_error(np.shape(features)[0], 2.0)
        ),
        formula=_risk_formula,
        draw=_draw_skeleton,
    )
)
