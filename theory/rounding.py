"""How far float64 evaluation can stray from the exact value, so that a bound stays a bound.

The model is the standard one (Higham 2002, section 3.1): each operation has relative error at most u = 2⁻⁵³, a
sum of d non-negative terms in any order at most (d − 1)u, and the library's ``pow`` at most 8u (measured below
1 ulp; the margin covers vectorised versions).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array

UNIT_ROUNDOFF = 2.0**-53
_POWER = 8.0  # relative error of pow, in units of u


def norm_error(size: int, order: float) -> float:
    """Bound the relative error of a computed (Σ|w_i|^order)^(1/order) over ``size`` terms.

    The sum of powers is off by at most (size + 8)u, the outer power multiplies that by 1/order and adds 8u; the
    factor 1.01 absorbs the higher-order terms as long as the result is below 0.01.
    """
    return 1.01 * UNIT_ROUNDOFF * ((size + _POWER) / order + _POWER)


def product_error(operations: int) -> float:
    """Bound the relative error of ``operations`` multiplications, additions of one sign, or powers in a row."""
    return 1.01 * UNIT_ROUNDOFF * _POWER * operations


def outward(value: npt.ArrayLike, relative_error: float) -> Array:
    """Round an upper bound up so that it exceeds the exact value despite ``relative_error``.

    One step to the next float covers results in the subnormal range, where errors are absolute.
    """
    inflated = np.asarray(value, dtype=np.float64) * (1.0 + relative_error)
    return np.nextafter(inflated, np.inf)
