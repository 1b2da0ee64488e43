"""Retained counts: exactly the fewest, by sort and by histogram alike, and the sufficient counts never fewer."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from ellq.analysis.retained import (
    narrow_histogram,
    retained_enclosed,
    retained_exactly,
    retained_of_rows,
    sufficient_counts,
)
from ellq.theory.approximation import retained_exact, retained_sufficient
from ellq.theory.histogram import MagnitudeHistogram
from ellq.theory.power_kernel import power_sums_fast
from ellq.theory.power_sums import power_sums
from oracles import retained_sufficient as precise_sufficient
from strategies import MODERATE, random_vector

TOLERANCES = (0.01, 0.1, 0.3, 0.7)
examples = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def _fewest(w: np.ndarray[Any, Any], tol: float) -> tuple[int, int]:
    """Return the fewest entries for tolerances a little above and a little below ``tol``, by 50 digits."""
    with mp.workdps(50):
        squares = sorted((mpf(float(x)) ** 2 for x in w), reverse=True)
        total = mp.fsum(squares)
        tails = [total]
        for square in squares:
            tails.append(tails[-1] - square)
        low, high = ((mpf(tol) * (1 + sign * mpf("1e-12"))) ** 2 * total for sign in (1, -1))
        return tuple(sum(tail > max(limit, total * mpf("1e-45")) for tail in tails) for limit in (low, high))


@examples
@given(seeds, st.integers(1, 60), st.sampled_from(TOLERANCES))
def test_rows_are_counted_to_the_last_entry(seed: int, size: int, tol: float) -> None:
    rng = np.random.default_rng(seed)
    rows = np.stack([random_vector(rng, size, MODERATE) for _ in range(3)])
    counts = retained_of_rows(rows, (tol,))
    assert counts.shape == (3, 1)
    for row, count in zip(rows, counts[:, 0].tolist(), strict=True):
        low, high = _fewest(row, tol)
        assert low <= count <= high


@examples
@given(seeds, st.integers(1, 80))
def test_rows_of_any_scale_agree_with_the_theory(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    w = random_vector(rng, size)
    expected = [retained_exact(w, tol) for tol in TOLERANCES] if np.abs(w).max() < 1e300 else None
    counts = retained_of_rows(w[None], TOLERANCES)[0].tolist()
    if expected is not None:
        assert counts == expected
    assert counts == sorted(counts, reverse=True)


@examples
@given(seeds, st.integers(1, 400), st.sampled_from(["float64", "float32", "float16"]))
def test_the_histogram_counts_what_the_sort_counts(seed: int, size: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    w = random_vector(rng, size, MODERATE).astype(dtype).astype(np.float64)
    histogram = narrow_histogram(w, "w")
    pieces = np.array_split(w, 3)
    counts = retained_exactly(histogram, TOLERANCES, lambda: pieces)
    sort = retained_of_rows(w[None], TOLERANCES)[0].tolist()
    for tol, count, sorted_count in zip(TOLERANCES, counts, sort, strict=True):
        low, high = _fewest(w, tol)
        assert low <= count <= high
        assert count == sorted_count or low < high  # ties that only rounding breaks
        ends = retained_enclosed(histogram, tol)
        assert ends[0] <= count <= ends[1]


def test_an_enclosure_is_narrow_and_the_weights_are_read_again_only_where_it_is_open() -> None:
    w = np.random.default_rng(0).standard_normal(200_000)
    low, high = retained_enclosed(MagnitudeHistogram.of(w.astype(np.float32)), 0.1)
    assert 0 <= high - low <= 3
    reads = []

    def read() -> list[Any]:
        reads.append(1)
        return [w]

    assert retained_exactly(MagnitudeHistogram.of(w), (0.1,), read) == retained_of_rows(w[None], (0.1,))[0].tolist()
    assert len(reads) == 1
    exact = np.arange(1.0, 200.0)  # whole numbers up to 256 are float16 and bfloat16, whose bins hold one value
    assert retained_exactly(narrow_histogram(exact, "w"), (0.1,), lambda: pytest.fail("read again")) == [
        retained_exact(exact, 0.1)
    ]


def test_zeros_need_nothing_and_one_entry_needs_itself() -> None:
    assert retained_of_rows(np.zeros((2, 3)), (0.5,)).tolist() == [[0], [0]]
    assert retained_enclosed(MagnitudeHistogram.of(np.zeros(4)), 0.5) == (0, 0)
    assert retained_exactly(MagnitudeHistogram.of(np.zeros(4)), (0.5,), lambda: [np.zeros(4)]) == [0]
    assert retained_of_rows(np.array([[0.0, -2.0, 0.0]]), (1e-100, 0.999)).tolist() == [[1, 1]]
    for w in (np.full(100, 1e-310), np.full(100, 1e300)):
        assert retained_exactly(narrow_histogram(w, "w"), (0.501,), lambda held=w: [held]) == [75]


@examples
@given(seeds, st.integers(1, 60), st.sampled_from([(0.5,), (0.1, 0.5, 0.9), (0.5, 1.0, 1.5, 2.0)]))
def test_sufficient_counts_are_enough_and_those_of_the_theory(seed: int, size: int, orders: Any) -> None:
    rng = np.random.default_rng(seed)
    rows = np.stack([random_vector(rng, size, MODERATE) for _ in range(3)])
    fewest = retained_of_rows(rows, TOLERANCES)
    for kernel in (power_sums, power_sums_fast):
        counts, best = sufficient_counts(kernel(rows, (*orders, 2.0)), TOLERANCES, orders)
        assert (fewest <= counts).all()
        assert (counts <= np.count_nonzero(rows, axis=1)[:, None]).all()
        for i, row in enumerate(rows):
            for j, tol in enumerate(TOLERANCES):
                if not row.any():
                    assert counts[i, j] == 0
                    continue
                alone = [np.ceil(retained_sufficient(row, tol, p=q, q=2.0)) for q in orders if q < 2]
                expected = min(*alone, np.count_nonzero(row))
                assert abs(counts[i, j] - expected) <= 1e-9 * expected + (1 if counts[i, j] != expected else 0)
                if not np.isnan(best[i, j]):
                    exact = precise_sufficient(row, tol, float(best[i, j]), 2.0)
                    assert counts[i, j] >= exact * (1 - mpf("1e-30"))


def test_a_sufficient_count_one_percent_smaller_would_be_caught() -> None:
    # Equal magnitudes: k = d(1 − tol²) entries are needed, and the bound is sharp where tol² = λ = q/2.
    w, q = np.ones((1, 100_000)), 0.5
    counts, best = sufficient_counts(power_sums(w, (q, 2.0)), (0.5,), (q,))
    fewest = retained_of_rows(w, (0.5,))[0, 0]
    assert best[0, 0] == q
    assert fewest == 75_000
    assert fewest <= counts[0, 0] <= 1.0001 * fewest
