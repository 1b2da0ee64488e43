"""Grids of orders and tolerances: what is accepted comes out rising, everything else is refused by name."""

from typing import Any

import numpy as np
import pytest

from ellq.analysis.grids import order_grid, tolerance_grid


def test_grids_come_out_rising_as_floats() -> None:
    assert order_grid([1.5, 0.5, 2]) == (0.5, 1.5, 2.0)
    assert order_grid(q for q in np.linspace(0.25, 1, 4)) == (0.25, 0.5, 0.75, 1.0)
    assert tolerance_grid((0.5, 1e-100, 0.1)) == (1e-100, 0.1, 0.5)
    assert order_grid(()) == tolerance_grid([]) == ()


@pytest.mark.parametrize("q", [0, -1, 2.5, float("inf"), float("nan"), 1e-9])
def test_an_order_out_of_range_is_refused_by_name(q: float) -> None:
    with pytest.raises(ValueError, match="orders"):
        order_grid([0.5, q])


def test_an_open_grid_refuses_its_end() -> None:
    with pytest.raises(ValueError, match=r"orders holds 2\. Choose 0 < q < 2\."):
        order_grid([2.0], is_open=True)


@pytest.mark.parametrize("tol", [0, 1, -0.1, 2, 1e-200, float("nan")])
def test_a_tolerance_out_of_range_is_refused_by_name(tol: float) -> None:
    with pytest.raises(ValueError, match="tolerances"):
        tolerance_grid([0.5, tol])


@pytest.mark.parametrize("grid", [order_grid, tolerance_grid])
@pytest.mark.parametrize("values", [0.5, "0.5", b"1", None, 3])
def test_what_is_no_sequence_is_refused(grid: Any, values: Any) -> None:
    with pytest.raises(TypeError, match=r"(orders|tolerances) must be a sequence of numbers"):
        grid(values)


@pytest.mark.parametrize("grid", [order_grid, tolerance_grid])
@pytest.mark.parametrize("value", ["0.5", None, True, 1j, [0.5]])
def test_what_is_no_number_is_refused_with_its_place(grid: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=r"(orders|tolerances)\[1\] must be one real number"):
        grid([0.25, value])


@pytest.mark.parametrize("grid", [order_grid, tolerance_grid])
def test_the_same_twice_is_refused(grid: Any) -> None:
    with pytest.raises(ValueError, match=r"holds 0\.25 twice"):
        grid([0.25, 0.5, 0.25])
