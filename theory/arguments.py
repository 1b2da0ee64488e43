"""Checks of the arguments every public function of the theory shares: orders, counts, tolerances, arrays."""

from __future__ import annotations

import math
import numbers

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

# Orders outside cannot be resolved: below, every |w|^q rounds to 1; above, every (½)^q to 0.
LEAST_ORDER, GREATEST_ORDER = 1e-6, 500.0


def real_number(value: object, name: str) -> float:
    """Return ``value`` as a float; strings, lists, booleans and NaN are refused by name."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be one real number, got {type(value).__name__} {value!r}.")
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"{name} is NaN. Pass a number.")
    return number


def order_below_one(q: object, name: str = "q") -> float:
    """Return ``q`` if 0 < q < 1, where ‖·‖_q is a quasi-norm and small values mean soft sparsity."""
    number = real_number(q, name)
    if not 0 < number < 1:
        raise ValueError(f"{name}={number:g} is outside (0, 1). The theory needs 0 < {name} < 1, for example 0.5.")
    return positive_order(number, name)


def positive_order(q: object, name: str = "q") -> float:
    """Return ``q`` if 0 < q < ∞ and float64 can tell it from both ends: 1e-6 ≤ q ≤ 500."""
    number = real_number(q, name)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={number:g} is not a finite positive order. Choose {name} > 0.")
    if not LEAST_ORDER <= number <= GREATEST_ORDER:
        raise ValueError(
            f"{name}={number:g} is too extreme for float64. Choose {LEAST_ORDER:g} <= {name} <= {GREATEST_ORDER:g}."
        )
    return number


def rising_orders(q: object, p: object, names: tuple[str, str] = ("q", "p")) -> tuple[float, float]:
    """Return ``(q, p)`` if 0 < q < p < ∞."""
    low, high = positive_order(q, names[0]), positive_order(p, names[1])
    if not low < high:
        raise ValueError(
            f"{names[0]}={low:g} is not below {names[1]}={high:g}. The bound needs {names[0]} < {names[1]}."
        )
    return low, high


def open_fraction(value: object, name: str) -> float:
    """Return ``value`` if it lies strictly between 0 and 1."""
    number = real_number(value, name)
    if not 0 < number < 1:
        raise ValueError(f"{name}={number:g} is outside (0, 1). Choose a fraction such as {name}=0.5.")
    return number


def count(value: object, name: str, *, low: int, high: int) -> int:
    """Return ``value`` as an int if it is a whole number in [low, high]."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__} {value!r}.")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name}={number} is outside [{low}, {high}]. Choose {low} <= {name} <= {high}.")
    return number


def finite_array(values: npt.ArrayLike, name: str, *, ndim: int | None = None) -> Array:
    """Return ``values`` as float64; refuse what is not numeric, not finite, or of the wrong dimension."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}.")
    array = array.astype(np.float64, copy=False)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has {array.ndim} dimensions, expected {ndim}.")
    refuse_nonfinite(array, name)
    return array


def refuse_nonfinite(array: Array, name: str) -> None:
    """Raise ValueError naming the first NaN or infinite entry of ``array``, if there is one."""
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} holds {array[where]} at index {list(where)}, {int((~finite).sum())} such entries in all."
            " Only finite values can be measured."
        )
