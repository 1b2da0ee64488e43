"""Checks of the arguments every public function of the theory shares: orders, counts, tolerances, arrays.

Arrays may be torch tensors wherever NumPy arrays may. Torch is never loaded for that: who passes a tensor has it.
"""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeGuard, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Options = ParamSpec("Options")
Result = TypeVar("Result", bound=npt.NDArray[Any], covariant=True)

# Orders outside cannot be resolved: below, every |w|^q rounds to 1; above, every (½)^q to 0.
LEAST_ORDER, GREATEST_ORDER = 1e-6, 500.0


def real_number(value: object, name: str) -> float:
    """Return ``value`` as a float; strings, lists, booleans and NaN are refused by name."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be one real number, got {type(value).__name__} {value!r}.")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is beyond float64. Pass a smaller number.") from None
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


def order_or_infinity(q: object, name: str = "q") -> float:
    """Return ``q`` if it is an order as of ``positive_order``, or ∞, the order of the largest magnitude."""
    number = real_number(q, name)
    return number if number == math.inf else positive_order(number, name)


def rising_orders(q: object, p: object, names: tuple[str, str] = ("q", "p")) -> tuple[float, float]:
    """Return ``(q, p)`` if 0 < q < p < ∞."""
    low, high = positive_order(q, names[0]), positive_order(p, names[1])
    if not low < high:
        raise ValueError(
            f"{names[0]}={low:g} is not below {names[1]}={high:g}. The bound needs {names[0]} < {names[1]}."
        )
    return low, high


def nonnegative(value: object, name: str) -> float:
    """Return ``value`` as a float if 0 ≤ value < ∞; refuse anything else by name."""
    number = real_number(value, name)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}={number:g} is negative or infinite. Pass a finite value >= 0.")
    return number


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
    if high < low:
        raise ValueError(f"{name}={number} is impossible: there is nothing to choose from. Pass more entries.")
    if not low <= number <= high:
        raise ValueError(f"{name}={number} is outside [{low}, {high}]. Choose {low} <= {name} <= {high}.")
    return number


def finite_array(values: npt.ArrayLike, name: str, *, ndim: int | None = None) -> Array:
    """Return ``values`` as float64; refuse what is not numeric, not finite, or of the wrong dimension.

    A torch tensor may have any real dtype, layout and device, and may require gradients.
    """
    array = _tensor_data(values, name) if is_tensor(values) else _plain_data(values, name)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}.")
    if np.ma.is_masked(values):
        raise ValueError(f"{name} has masked entries. Fill them or take them out first.")
    with np.errstate(over="ignore"):  # a longdouble beyond float64 is refused as infinite
        array = array.astype(np.float64, copy=False)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has {array.ndim} dimensions, expected {ndim}.")
    refuse_nonfinite(array, name)
    return array


def _plain_data(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is no array of numbers ({error}). Give every row as many entries.") from None


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether ``value`` is a torch tensor, without loading torch."""
    loaded = sys.modules.get("torch")
    return loaded is not None and isinstance(value, loaded.Tensor)


def _tensor_data(tensor: torch.Tensor, name: str) -> npt.NDArray[Any]:
    import torch

    if tensor.is_meta:
        raise TypeError(f"{name} is a tensor on the meta device, which holds no data. Load its values first.")
    if tensor.is_complex() or tensor.is_quantized or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"dtype {tensor.dtype}"
        raise TypeError(f"{name} must be an array of real numbers, got {kind}.")
    data = tensor.detach().cpu()
    if data.layout != torch.strided:
        data = data.to_dense()
    data = data.resolve_neg()
    if data.is_floating_point() and data.dtype not in (torch.float16, torch.float32, torch.float64):
        try:
            data = data.double()  # NumPy knows neither bfloat16 nor float8
        except NotImplementedError as error:
            raise TypeError(f"{name} has dtype {tensor.dtype}, which torch cannot turn into float64.") from error
    return data.numpy()


def refuse_nonfinite(array: Array, name: str) -> None:
    """Raise ValueError naming the first NaN or infinite entry of ``array``, if there is one."""
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{name} holds {array[where]} at index {list(where)}, {int((~finite).sum())} such entries in all."
            " Only finite values can be measured."
        )


class Measure(Protocol[Options, Result]):
    """A function of an array that returns an array, or a tensor for a tensor."""

    @overload
    def __call__(self, w: torch.Tensor, /, *args: Options.args, **options: Options.kwargs) -> torch.Tensor: ...
    @overload
    def __call__(self, w: npt.ArrayLike, /, *args: Options.args, **options: Options.kwargs) -> Result: ...


def tensor_for_tensor(measure: Callable[Concatenate[npt.ArrayLike, Options], Result]) -> Measure[Options, Result]:
    """Let a function of an array answer a tensor with a tensor: on its device, detached.

    Where the device has no float64 (Apple's), the answer stays on the CPU.
    """

    @functools.wraps(measure)
    def answer(w: Any, *args: Options.args, **options: Options.kwargs) -> Any:
        result = np.asarray(measure(w, *args, **options))
        if not is_tensor(w):
            return result
        import torch

        # A copy: the result may share memory with w.
        return torch.tensor(result, device="cpu" if w.device.type == "mps" else w.device)

    return cast("Measure[Options, Result]", answer)


def refuse_mixed_devices(**values: object) -> None:
    """Raise ValueError if tensors among the named values lie on different devices, naming two of them."""
    placed = [(name, str(value.device)) for name, value in values.items() if is_tensor(value)]
    for name, device in placed[1:]:
        first, home = placed[0]
        if device != home:
            raise ValueError(f"{first} is on {home} but {name} is on {device}. Move them to one device first.")
