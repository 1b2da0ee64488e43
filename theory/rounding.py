"""How far float64 evaluation can stray from the exact value, so that a bound stays a bound.

The model is the standard one (Higham 2002, section 3.1): each operation has relative error at most u = 2⁻⁵³, a
sum of d non-negative terms in any order at most (d − 1)u, and the library's ``pow``, ``exp`` and ``log`` at most 8u
(measured below 1 ulp; the margin covers vectorised versions). A result in the subnormal range is off by at most
2⁻¹⁰⁷⁵ besides. Relative errors here are e with exact ≤ (1 + e)·computed and computed ≤ (1 + e)·exact.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array

UNIT_ROUNDOFF = 2.0**-53
_POWER = 8.0  # relative error of pow, in units of u
LEAST = 2.0**-1074


def norm_error(size: int, order: float) -> float:
    """Bound the relative error of a computed (Σ|w_i|^order)^(1/order) over ``size`` terms.

    The sum of powers is off by at most (size + 8)u. The outer power multiplies that by 1/order, adds the rounding of
    1/order times the logarithm of the sum, and at most three errors of its own (taken in two halves, multiplied).
    """
    terms = max(size, 1)
    return log_error((terms + _POWER + math.log(terms)) / order + 3 * _POWER)


def tail_error(size: int, order: float) -> float:
    """Bound the relative error of a tail computed by ``best_term_errors`` from up to ``size`` terms.

    Beyond ``norm_error``: sums over up to 1001 binary digits, whose logarithm meets the rounding of 1/order; and at
    most three of them carried on to a larger scale, over 2100 digits together.
    """
    terms = max(size, 1)
    return log_error((terms + 4 * _POWER + math.log(terms)) / order + 3 * _POWER + math.log(2) * (1001 + 2100))


def log_error(units: float) -> float:
    """Bound the relative error of a result whose logarithm is off by at most ``units`` times u.

    The factor 1.01 absorbs what first-order counts of roundings leave out.
    """
    return math.expm1(1.01 * UNIT_ROUNDOFF * units)


def product_error(operations: int) -> float:
    """Bound the relative error of ``operations`` multiplications, additions of one sign, or powers in a row."""
    return log_error(_POWER * operations)


def outward(value: npt.ArrayLike, relative_error: float, underflows: int = 1) -> Array:
    """Round a computed upper bound ≥ 0 up so that it exceeds the exact value despite ``relative_error``.

    Args:
        value: the computed bound.
        relative_error: its error, where no operation underflowed.
        underflows: how many operations may have ended in the subnormal range, where errors are absolute.

    Returns:
        An upper bound; infinite where that is beyond float64. Above 0 even for 0, which may have underflowed.
    """
    # The four operations below round by u each; 8u makes up for it.
    with np.errstate(over="ignore"):
        inflated = np.asarray(value, dtype=np.float64) * ((1.0 + relative_error) * (1.0 + 8 * UNIT_ROUNDOFF))
    return np.asarray(inflated + underflows * LEAST)


def product_up(a: float, b: float) -> float:
    """Return the product of two bounds, one of them possibly a sum of two, rounded up; 0 only if one of them is."""
    return float(outward(a * b, product_error(2))) if a and b else 0.0
