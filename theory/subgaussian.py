"""What pruning a linear unit changes with high probability, for sub-Gaussian inputs.

X_j is σ-sub-Gaussian when E exp(λX_j) ≤ exp(λ²σ²/2) for every real λ; its mean is then 0 and its deviation at most σ.
Gaussians of deviation σ are, and so is any centred variable within [−σ, σ]. The randomness is that of the input X; the
weights are fixed.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy.typing as npt

from ellq.theory.approximation import stechkin_bound
from ellq.theory.arguments import finite_array, nonnegative, open_fraction
from ellq.theory.input_moments import unit_error_gram
from ellq.theory.measures import lq_quasinorm
from ellq.theory.rounding import norm_error, outward, product_error, product_up

Dependence = Literal["any", "independent"]

_NORMS: dict[str, float] = {"any": 1.0, "independent": 2.0}


def unit_error_subgaussian(
    removed: npt.ArrayLike, sigma: float, delta: float, *, dependence: Dependence = "any"
) -> float:
    """Bound a linear unit's change with probability 1 − δ over sub-Gaussian inputs.

        P(|Σ v_j X_j| ≤ t) ≥ 1 − δ        t = σ·‖v‖_p·√(2 ln(2/δ))

    p = 1 for inputs that depend on each other in any way, p = 2 for independent ones. Attained as δ → 0 by Gaussians,
    all equal up to the signs of v for p = 1. Rounded up.

    Args:
        removed: v, shape (d,), finite. Inputs of different σ_j: pass v_j·σ_j and σ = 1.
        sigma: σ ≥ 0 of every input, in the units of the inputs.
        delta: δ in (0, 1), the probability that the bound fails for an input.
        dependence: ``"any"`` or ``"independent"``.

    Returns:
        t, in the units of the unit's output.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``sigma`` < 0, ``delta`` outside (0, 1), an unknown ``dependence``, or ``removed`` not a finite
            vector.

    Reference: classical, the Chernoff bound; for any dependence after Hölder's inequality with weights |v_j|/‖v‖_1.
    """
    v = finite_array(removed, "removed", ndim=1)
    p = _norm(dependence)
    norm = float(outward(lq_quasinorm(v, p), norm_error(v.size, p))) if v.any() else 0.0
    return product_up(product_up(nonnegative(sigma, "sigma"), norm), _deviations(delta))


def unit_error_subgaussian_lq(
    w: npt.ArrayLike, retained: int, *, q: float, sigma: float, delta: float, dependence: Dependence = "any"
) -> float:
    """Bound a linear unit's change after magnitude pruning with probability 1 − δ over sub-Gaussian inputs.

        P(|Σ v_j X_j| ≤ t) ≥ 1 − δ        t = σ·c(q→p)·‖w‖_q·k^(1/p − 1/q)·√(2 ln(2/δ))

    k largest weights kept; p = 1 for any dependence of the inputs, p = 2 for independent ones; c the sharp constant of
    ``stechkin_constant(q, p)``. Rounded up.

    Args:
        w: weights before pruning, shape (d,), finite.
        retained: k, 1 ≤ k ≤ d.
        q: order, 0 < q < p.
        sigma: σ ≥ 0 of every input, in the units of the inputs.
        delta: δ in (0, 1), the probability that the bound fails for an input.
        dependence: ``"any"`` or ``"independent"``.

    Returns:
        t, in the units of the unit's output.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``q`` outside (0, p), ``retained`` outside [1, d], or as ``unit_error_subgaussian``.
        OverflowError: the bound of the tail exceeds float64.

    Reference: ``unit_error_subgaussian`` after Foucart & Rauhut 2013, Theorem 2.5; the linear-unit theorem of Yang et
    al. 2022 (arXiv 2206.05604) for sub-Gaussian inputs as reconstructed.
    """
    tail = stechkin_bound(w, retained, q=q, p=_norm(dependence))
    return product_up(product_up(nonnegative(sigma, "sigma"), tail), _deviations(delta))


def unit_error_subgaussian_joint(removed: npt.ArrayLike, proxy: npt.ArrayLike, delta: float) -> float:
    """Bound a linear unit's change with probability 1 − δ over jointly sub-Gaussian inputs.

        P(|Σ v_j X_j| ≤ t) ≥ 1 − δ        t = √(vᵀΣv)·√(2 ln(2/δ))

    Σ is the variance proxy: E exp(λ·u·X) ≤ exp(λ²·uᵀΣu/2) for every u and λ; for a Gaussian vector its covariance.
    Independent inputs are the case Σ = σ²·Id. Rounded up.

    Args:
        removed: v, shape (d,), finite.
        proxy: Σ, shape (d, d), symmetric, with no negative eigenvalue beyond rounding.
        delta: δ in (0, 1), the probability that the bound fails for an input.

    Returns:
        t, in the units of the unit's output.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``delta`` outside (0, 1), shapes that do not fit, or no such matrix.

    Reference: classical, the Chernoff bound.
    """
    return product_up(unit_error_gram(removed, proxy), _deviations(delta))


def _norm(dependence: str) -> float:
    if dependence not in _NORMS:
        raise ValueError(f"dependence={dependence!r} is unknown. Choose 'any' or 'independent'.")
    return _NORMS[dependence]


def _deviations(delta: float) -> float:
    """Return √(2 ln(2/δ)), rounded up."""
    # Two logarithms of one sign: 2/δ itself may overflow.
    return float(outward(math.sqrt(2 * (math.log(2) - math.log(open_fraction(delta, "delta")))), product_error(4)))
