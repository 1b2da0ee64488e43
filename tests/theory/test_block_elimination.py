"""Elimination by blocks against brute force on least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellq.theory.block_elimination import BlockFit, BlockPath, eliminate_blocks, fit_columns
from ellq.theory.row_elimination import eliminate_rows


def problem(seed: int, m: int, b: int, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moments of columns in m blocks of b, and the weights that fit c targets best."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(3 * m * b + 5, m * b)) @ (np.eye(m * b) + 0.3 * rng.normal(size=(m * b, m * b)))
    Y = X @ rng.normal(size=(m * b, c)) + rng.normal(size=(len(X), c))
    H, R = X.T @ X / len(X), X.T @ Y / len(X)
    return H, R, np.linalg.solve(H, R)


def excess(H: np.ndarray, best: np.ndarray, retained, block: int) -> float:
    """Squared error of least squares on some blocks, beyond that of all."""
    change = best.copy()
    columns = (np.asarray(retained, dtype=int)[:, None] * block + np.arange(block)).ravel()
    change[columns] -= fit_columns(H, H @ best, columns)
    return float(np.einsum("ic,ij,jc->", change, H, change))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 10), b=st.integers(1, 5), c=st.integers(1, 4))
def test_costs_add_up_to_the_error_of_the_refitted_rest(seed, m, b, c):
    H, _, best = problem(seed, m, b, c)
    path = eliminate_blocks(BlockFit.in_order(H, best, block=b))
    scale = np.einsum("ic,ij,jc->", best, H, best)
    for k in range(m + 1):
        assert path.retained(k).size == k
        assert path.errors[k] == pytest.approx(excess(H, best, path.retained(k), b), rel=1e-6, abs=1e-9 * scale)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), m=st.integers(2, 7), b=st.integers(1, 3))
def test_every_removal_is_the_cheapest_there_is(seed, m, b):
    H, _, best = problem(seed, m, b, 2)
    path = eliminate_blocks(BlockFit.in_order(H, best, block=b))
    for k in range(m - 1, -1, -1):
        before = path.retained(k + 1)
        errors = [excess(H, best, np.delete(before, i), b) for i in range(k + 1)]
        assert path.errors[k] <= min(errors) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_is_below_the_best_and_one_block_less_is_optimal(seed):
    H, _, best = problem(seed, 6, 2, 3)
    path = eliminate_blocks(BlockFit.in_order(H, best, block=2))
    for k in range(1, 6):
        least = min(excess(H, best, s, 2) for s in itertools.combinations(range(6), k))
        assert least <= path.errors[k] * (1 + 1e-9)
        if k == 5:
            assert path.errors[k] == pytest.approx(least, rel=1e-6)


def test_single_columns_and_one_target_are_the_rows_of_a_layer():
    H, _, best = problem(3, 15, 1, 1)
    path, rows = eliminate_blocks(BlockFit.in_order(H, best, block=1)), eliminate_rows(H, best.T)
    assert path.order.tolist() == rows.order[0].tolist()
    np.testing.assert_allclose(path.costs, rows.costs[0], rtol=1e-8)


def test_a_duplicate_block_goes_first_and_costs_nothing():
    rng = np.random.default_rng(5)
    X = rng.normal(size=(200, 8))
    X = np.concatenate([X, X[:, 2:4] + 1e-9 * rng.normal(size=(200, 2))], axis=1)
    H = X.T @ X / 200 + 1e-10 * np.eye(10)
    best = np.linalg.solve(H, X.T @ rng.normal(size=(200, 3)) / 200)
    path = eliminate_blocks(BlockFit.in_order(H, best, block=2))
    assert path.order[0] in (1, 4)
    assert path.costs[0] <= 1e-4 * path.costs[1]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 6))
def test_readers_of_the_same_units_add_up_their_costs(seed, m):
    rng = np.random.default_rng(seed)
    fits, first = [], [problem(seed + i, m, b, 2) for i, b in enumerate((1, 3))]
    for H, _, best in first:
        places = rng.permutation(len(H)).reshape(m, -1)  # blocks that do not lie together
        fits.append(BlockFit(H, best, places))
    path = eliminate_blocks(fits)
    for k in range(m, 0, -1):
        stays = path.retained(k)

        def both(stays):
            total = 0.0
            for (H, _, best), fit in zip(first, fits, strict=True):
                change, columns = best.copy(), fit.columns[stays].ravel()
                change[columns] -= fit_columns(H, H @ best, columns)
                total += np.einsum("ic,ij,jc->", change, H, change)
            return total

        assert path.errors[k] == pytest.approx(both(stays), rel=1e-6, abs=1e-8)
        cheapest = min(both(np.delete(stays, i)) for i in range(k))
        assert path.errors[k - 1] <= cheapest * (1 + 1e-6) + 1e-9


def test_columns_in_no_block_stay():
    H, _, best = problem(8, 6, 1, 2)
    path = eliminate_blocks(BlockFit(H, best, [[1], [4]]))
    change = best.copy()
    change[[0, 2, 3, 5]] -= fit_columns(H, H @ best, [0, 2, 3, 5])
    assert path.errors[0] == pytest.approx(np.einsum("ic,ij,jc->", change, H, change), rel=1e-8)


def test_least_leaves_blocks_for_last():
    H, _, best = problem(6, 5, 2, 2)
    whole, part = (
        eliminate_blocks(BlockFit.in_order(H, best, block=2)),
        eliminate_blocks(BlockFit.in_order(H, best, block=2), least=2),
    )
    assert part.order[:3].tolist() == whole.order[:3].tolist()
    assert part.retained(2).tolist() == whole.retained(2).tolist()


@pytest.mark.parametrize("factor", [1e-100, 1e100])
def test_scale_is_no_matter(factor):
    H, _, best = problem(7, 6, 3, 2)
    plain, scaled = (
        eliminate_blocks(BlockFit.in_order(H, best, block=3)),
        eliminate_blocks(BlockFit.in_order(H * factor, best, block=3)),
    )
    assert (plain.order == scaled.order).all()
    np.testing.assert_allclose(scaled.costs, plain.costs * factor, rtol=1e-8)


def test_dependent_columns_are_fitted_without_a_ridge():
    np.testing.assert_allclose(fit_columns(np.ones((2, 2)), np.ones((2, 1)), [0, 1]), [[0.5], [0.5]])


of = BlockFit.in_order


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eliminate_blocks(of(np.eye(4), np.ones((4, 1)), block=3)), ValueError, "divisor of 4"),
        (lambda: eliminate_blocks(of(np.eye(3), np.ones((4, 1)), block=2)), ValueError, "do not fit"),
        (
            lambda: eliminate_blocks(of(np.ones((2, 2)), np.ones((2, 1)), block=1)),
            ValueError,
            "not positive definite",
        ),
        (lambda: eliminate_blocks(of(np.eye(2), [[1.0], [np.inf]], block=1)), ValueError, "weights"),
        (lambda: eliminate_blocks(of(np.eye(2), np.ones((2, 1)), block=0)), ValueError, "block"),
        (
            lambda: eliminate_blocks(of(np.eye(2), np.ones((2, 1)), block=1), least=3),
            ValueError,
            "least",
        ),
        (lambda: eliminate_blocks(of(np.eye(2), np.ones((2, 1)), block=1.5)), TypeError, "block"),
        (lambda: eliminate_blocks([]), ValueError, "fits is empty"),
        (lambda: eliminate_blocks(BlockFit(np.eye(2), np.ones((2, 1)), [[0], [0]])), ValueError, "twice"),
        (lambda: eliminate_blocks(BlockFit(np.eye(2), np.ones((2, 1)), [[2]])), ValueError, "do not fit"),
        (
            lambda: eliminate_blocks([of(np.eye(n), np.ones((n, 1)), block=1) for n in (2, 3)]),
            ValueError,
            r"\[2, 3\] blocks",
        ),
        (lambda: fit_columns(np.eye(2), np.ones((2, 1)), [2]), ValueError, "there are 2"),
        (lambda: fit_columns(np.eye(2), np.ones((3, 1)), [0]), ValueError, "do not fit"),
        (lambda: BlockPath(np.arange(2), np.zeros(2)).retained(3), ValueError, "k"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
