"""The theorem on what pruning a linear unit changes with high probability, registered with both of its sides."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import sympy
from scipy.special import ndtri

from ellq.theory import families
from ellq.theory.arguments import Array
from ellq.theory.measures import lq_quasinorm
from ellq.theory.notation import NamedQuantity
from ellq.theory.rounding import norm_error, product_error
from ellq.theory.statements import Assumption, Case, Statement, register
from ellq.theory.subgaussian import unit_error_subgaussian

_RAREST = 1e-300
_ENUMERATED = 12  # inputs whose signs are tried in all combinations

# The (1 − δ)-quantile of |Z| for a 1-sub-Gaussian Z. A uniform variable is, with its own deviation.
_QUANTILES: dict[str, Callable[[float], float]] = {
    "gaussian": lambda delta: -float(ndtri(delta / 2)),
    "signs": lambda delta: 1.0,
    "uniform": lambda delta: float(np.sqrt(3.0)) * (1 - delta),
}


def _quantile(removed: Array, sigma: float, delta: float, law: str, dependence: str) -> float:
    """Return the least t with P(|Σ v_j X_j| > t) ≤ δ, X_j = σZ_j, the worst way of depending where any is allowed."""
    if dependence == "any":  # all equal up to the signs of v, so that nothing cancels
        return float(sigma * np.abs(removed).sum() * _QUANTILES[law](delta))
    if law == "gaussian":
        return float(sigma * lq_quasinorm(removed, 2.0) * _QUANTILES[law](delta))
    # |v·s| is the same for s and −s: the first sign is fixed.
    signs = np.array([(1.0, *rest) for rest in product((1.0, -1.0), repeat=removed.size - 1)])
    falling = -np.sort(-np.abs(signs @ removed))
    return float(sigma * falling[int(delta * falling.size)])


def _draw_subgaussian(rng: np.random.Generator) -> Case:
    law, dependence = [
        ("gaussian", "any"),
        ("gaussian", "independent"),
        ("signs", "any"),
        ("signs", "independent"),
        ("uniform", "any"),
    ][rng.integers(5)]
    return {
        "removed": families.vector(rng, largest=10 if law == "signs" else 100, tame=True),
        "sigma": float(10.0 ** rng.uniform(-3, 3)),
        "delta": float(rng.choice([rng.uniform(0.001, 0.999), 10.0 ** -rng.uniform(0.01, 300)])),
        "law": law,
        "dependence": dependence,
    }


def _rounding(removed: Array, sigma: float, delta: float, law: str, dependence: str) -> float:
    # Of |Σ ± v_j|, relative to ‖v‖₁, or to ‖v‖₂ ≥ ‖v‖₁/√d; then of the quantile (ndtri is within 8u) and products.
    d = removed.size
    sums = norm_error(d, 1.0) * (float(np.sqrt(d)) if dependence == "independent" else 1.0)
    return sums + norm_error(d, 2.0) + product_error(4)


def _subgaussian_formula() -> sympy.Basic:
    sigma, delta = sympy.symbols("sigma delta", positive=True)
    quantile = NamedQuantity("Q_{1−δ}(|f − f̂|)", r"Q_{1-\delta}(|f - \hat f|)")
    return sympy.Le(quantile, sigma * NamedQuantity("‖v‖_p", r"\|v\|_p") * sympy.sqrt(2 * sympy.log(2 / delta)))


LINEAR_UNIT_SUBGAUSSIAN = register(
    Statement(
        id="linear-unit-subgaussian",
        title="Change of a pruned linear unit with probability 1 − δ over sub-Gaussian inputs",
        reference="classical, the Chernoff bound; p = 1 for any dependence of the inputs, p = 2 for independent ones",
        status="classical",
        assumptions=(
            Assumption("finite", "what was removed is finite.", lambda case: bool(np.isfinite(case["removed"]).all())),
            Assumption("σ ≥ 0", "0 ≤ σ < ∞.", lambda case: 0 <= case["sigma"] < np.inf),
            Assumption(
                "0 < δ < 1",
                f"the probability is between 0 and 1, and at least {_RAREST:g}, whose quantiles float64 resolves.",
                lambda case: _RAREST <= case["delta"] < 1,
            ),
            Assumption(
                "known law",
                "the inputs' law is one whose quantiles are known: gaussian, signs or uniform, depending in the worst"
                f" way; gaussian, or signs of at most {_ENUMERATED} inputs, independent.",
                lambda case: (
                    (case["law"], case["dependence"])
                    in {("gaussian", "independent"), *((law, "any") for law in _QUANTILES)}
                    or (
                        (case["law"], case["dependence"]) == ("signs", "independent")
                        and 1 <= np.size(case["removed"]) <= _ENUMERATED
                    )
                ),
            ),
        ),
        observed=_quantile,
        bound=lambda removed, sigma, delta, law, dependence: unit_error_subgaussian(
            removed, sigma, delta, dependence=dependence
        ),
        relative_error=_rounding,
        formula=_subgaussian_formula,
        draw=_draw_subgaussian,
    )
)
