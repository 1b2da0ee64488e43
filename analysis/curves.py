"""Error curves: what keeping the k largest weights of a layer loses, and what its quasi-norms promise beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from ellq.analysis.grids import order_grid
from ellq.analysis.progress import track
from ellq.theory.approximation import tightest_bounds_from_norms
from ellq.theory.arguments import Array, count
from ellq.theory.histogram import MagnitudeHistogram

ORDERS = tuple(tenths / 10 for tenths in range(1, 20))
POINTS = 33
COLUMNS = ("level", "layer", "fraction", "retained", "error_low", "error_high", "bound", "order")


def curve_table(
    layers: Mapping[str, MagnitudeHistogram],
    model: MagnitudeHistogram,
    *,
    orders: Iterable[float] = ORDERS,
    points: int = POINTS,
) -> pd.DataFrame:
    """Return the relative error σ_k/‖w‖_2 of every layer and the model at many k, with the tightest bound.

        σ_k(w)_2 ≤ c(k, n) · ‖w‖_q ≤ c_q · k^(1/2 − 1/q) · ‖w‖_q        the least over the orders q

    with the sharp constant c(k, n) for n non-zero entries, ``ellq.theory.approximation.stechkin_constant_finite``.

    Columns: ``level`` (layer or model), ``layer``, ``fraction`` k/d, ``retained`` k, ``error_low`` and
    ``error_high`` between which the exact relative error lies, ``bound``, which is never below it, and ``order``,
    the one that gave the bound; one above 1 says nothing. Where k reaches the number of non-zeros, error and bound
    are 0 and there is no order.

    Args:
        layers: name → the layer's histogram.
        model: the histogram of all weights.
        orders: orders q to take the tightest of, each 0 < q < 2.
        points: about how many k for each, half evenly spread and half close to 0 and to d; fewer where d is small.

    Raises:
        TypeError: an order is not a real number, or ``points`` no whole number.
        ValueError: no orders; one out of range or given twice; or ``points`` < 2.

    Reference: Foucart & Rauhut 2013, Theorem 2.5, for each order; ours for finitely many entries.
    """
    chosen, points = curve_arguments(orders, points)
    parts = []
    every = [*(("layer", name, histogram) for name, histogram in layers.items()), ("model", "", model)]
    for level, name, histogram in track(every, "error curves"):
        ks = _retained_counts(histogram.size, points)
        low, high = _relative_errors(histogram, ks)
        bounds, order = _tightest(histogram, ks, chosen)
        columns = (level, name, ks / max(histogram.size, 1), ks, low, high, bounds, order)
        parts.append(pd.DataFrame(dict(zip(COLUMNS, columns, strict=True))))
    return pd.concat(parts, ignore_index=True)


def curve_arguments(orders: Iterable[float], points: int) -> tuple[tuple[float, ...], int]:
    """Return the orders, rising, and the number of points, or refuse them; before hours are spent on reading."""
    chosen = order_grid(orders, is_open=True)
    if not chosen:
        raise ValueError("orders is empty. Give at least one order, for example 0.5.")
    return chosen, count(points, "points", low=2, high=10_000)


def _retained_counts(size: int, points: int) -> npt.NDArray[np.int64]:
    """Return counts from 1 to the size: half evenly spread, a quarter close to none and a quarter close to all."""
    if size == 0:
        return np.zeros(0, dtype=np.int64)
    even = np.linspace(1, size, points - 2 * (points // 4))
    by_ratio = np.geomspace(1, size, points // 4 + 2)[:-1]
    return np.unique(np.rint(np.concatenate([even, by_ratio, size - by_ratio])).astype(np.int64).clip(1))


def _relative_errors(histogram: MagnitudeHistogram, ks: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    if not histogram.nonzeros:
        return np.zeros(len(ks)), np.zeros(len(ks))
    norm = histogram.quasinorm(2.0)
    errors = [histogram.best_term_error(int(k)) for k in ks]
    low = np.nextafter([error.low / norm.high for error in errors], 0.0)
    # The norm of the least subnormals is enclosed from 0 on; the error is never above it.
    high = np.nextafter([error.high / norm.low if norm.low else 1.0 for error in errors], math.inf)
    return low, np.where([error.high > 0 for error in errors], np.minimum(high, 1.0), 0.0)


def _tightest(
    histogram: MagnitudeHistogram, ks: npt.NDArray[np.int64], orders: tuple[float, ...]
) -> tuple[Array, Array]:
    """Return the least bound for every k, relative to ‖w‖_2, and the order that gave it."""
    bounds, best = np.zeros(len(ks)), np.full(len(ks), np.nan)
    telling = ks < histogram.nonzeros
    if not telling.any():
        return bounds, best
    log_norm = histogram.log_quasinorm(2.0).low
    if math.isinf(log_norm):  # of the least subnormals alone, which are enclosed from 0 on
        return np.where(telling, 1.0, 0.0), best
    ratios = [math.nextafter(histogram.log_quasinorm(q).high - log_norm, math.inf) for q in orders]
    best[telling], bounds[telling] = tightest_bounds_from_norms(ratios, histogram.nonzeros, ks[telling], orders)
    return bounds, best
