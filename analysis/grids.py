"""Checks of the grids a model is measured on: orders and tolerances."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ellq.theory.arguments import open_fraction, positive_order

LEAST_TOLERANCE = 1e-100  # far above √(2⁻¹⁰⁷⁴), where squares of what is removed would underflow


def order_grid(orders: Iterable[float], *, highest: float = 2.0, is_open: bool = False) -> tuple[float, ...]:
    """Return distinct orders of the quasi-norm, rising.

    Args:
        orders: each above 0 and at most ``highest``.
        highest: the largest order allowed.
        is_open: whether ``highest`` itself is refused.

    Raises:
        TypeError: no sequence, or an order that is not a real number.
        ValueError: an order out of range or given twice.
    """
    chosen = [positive_order(q, name) for name, q in _entries(orders, "orders")]
    beyond = next((q for q in chosen if q > highest or (is_open and q == highest)), None)
    if beyond is not None:
        raise ValueError(f"orders holds {beyond:g}. Choose 0 < q {'<' if is_open else '<='} {highest:g}.")
    return _distinct(chosen, "orders")


def tolerance_grid(tolerances: Iterable[float]) -> tuple[float, ...]:
    """Return distinct relative tolerances, rising.

    Args:
        tolerances: each in (0, 1) and at least 1e-100.

    Raises:
        TypeError: no sequence, or a tolerance that is not a real number.
        ValueError: a tolerance out of range or given twice.
    """
    chosen = [open_fraction(tol, name) for name, tol in _entries(tolerances, "tolerances")]
    tiny = next((tol for tol in chosen if tol < LEAST_TOLERANCE), None)
    if tiny is not None:
        raise ValueError(f"tolerances holds {tiny:g}, which float64 cannot resolve. Choose tol >= {LEAST_TOLERANCE:g}.")
    return _distinct(chosen, "tolerances")


def _entries(values: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__} {values!r}.")
    return [(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _distinct(values: list[float], name: str) -> tuple[float, ...]:
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{name} holds {twice:g} twice. Give each once.")
    return tuple(sorted(values))
