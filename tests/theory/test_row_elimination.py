"""Row-by-row elimination against brute force on least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellq.theory.row_elimination import RowPaths, eliminate_rows, fit_rows, row_errors, sparsegpt_rows


def problem(seed: int, d: int, c: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moments of inputs of uneven scales, and the rows that fit targets best."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(4 * d + 3, d)) @ rng.normal(size=(d, d)) * 10.0 ** rng.uniform(-spread, spread, d)
    Y = X @ rng.normal(size=(d, c)) + rng.normal(size=(len(X), c))
    H, R = X.T @ X / len(X), Y.T @ X / len(X)
    return H, R, np.linalg.solve(H, R.T).T


def excess(H: np.ndarray, best: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Squared error of least squares on a support, beyond that of the best fit."""
    change = fit_rows(H, best @ H, kept) - best
    return np.einsum("ij,jk,ik->i", change, H, change)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 90), c=st.integers(1, 4), data=st.data())
def test_costs_add_up_to_the_error_of_the_refitted_rest(seed, d, c, data):
    H, _, best = problem(seed, d, c, 0.5)
    paths = eliminate_rows(H, best)
    retained = data.draw(st.lists(st.integers(0, d), min_size=c, max_size=c))
    expected = excess(H, best, paths.kept(retained))
    scale = np.einsum("ij,jk,ik->i", best, H, best)
    np.testing.assert_allclose(paths.errors[np.arange(c), retained], expected, rtol=1e-6, atol=1e-9 * scale.max())
    assert (paths.kept(retained).sum(axis=1) == retained).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.integers(2, 12))
def test_every_removal_is_the_cheapest_there_is(seed, d):
    H, _, best = problem(seed, d, 1)
    paths = eliminate_rows(H, best)
    for retained in range(d - 1, -1, -1):
        before = paths.kept([retained + 1])
        errors = []
        for j in np.flatnonzero(before):
            trial = before.copy()
            trial[0, j] = False
            errors.append(excess(H, best, trial)[0])
        assert paths.errors[0, retained] <= min(errors) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_no_support_beats_the_path_by_much_and_none_is_below_the_best(seed):
    H, _, best = problem(seed, 8, 1, 0.3)
    paths = eliminate_rows(H, best)
    for retained in range(1, 8):
        supports = itertools.combinations(range(8), retained)
        masks = [np.isin(np.arange(8), s)[None] for s in supports]
        least = min(excess(H, best, mask)[0] for mask in masks)
        assert least <= paths.errors[0, retained] * (1 + 1e-9)


def test_uncorrelated_inputs_lose_their_smallest_weights_first():
    paths = eliminate_rows(np.eye(4) * 2.0, [[3.0, -1.0, 0.5, 2.0]])
    assert paths.order.tolist() == [[2, 1, 3, 0]]
    np.testing.assert_allclose(paths.costs, [[0.5, 2.0, 8.0, 18.0]])
    np.testing.assert_allclose(paths.errors, [[28.5, 10.5, 2.5, 0.5, 0.0]])


def test_ties_go_by_position_and_zero_weights_cost_nothing():
    paths = eliminate_rows(np.eye(3), [[1.0, 1.0, 0.0]])
    assert paths.order.tolist() == [[2, 0, 1]]
    assert paths.costs[0, 0] == 0.0


def test_rows_do_not_see_each_other():
    H, _, best = problem(3, 40, 5)
    together = eliminate_rows(H, best)
    for i in range(5):
        alone = eliminate_rows(H, best[i : i + 1])
        assert (alone.order == together.order[i]).all()


@pytest.mark.parametrize("factor", [1e-120, 1e120])
def test_scale_is_no_matter(factor):
    H, _, best = problem(4, 20, 2)
    plain, scaled = eliminate_rows(H, best), eliminate_rows(H * factor, best / factor**0.25)
    assert (plain.order == scaled.order).all()
    np.testing.assert_allclose(scaled.costs, plain.costs * factor**0.5, rtol=1e-8)


def test_single_precision_finds_nearly_the_same_error():
    H, R, _ = problem(5, 120, 6)
    H = H + 1e-2 * np.diag(H).mean() * np.eye(120)
    best = np.linalg.solve(H, R.T).T
    exact, rounded = eliminate_rows(H, best), eliminate_rows(H * 1e30, best * 1e10, precision="float32")
    for retained in (12, 40, 90):
        counts = np.full(6, retained)
        a, b = excess(H, best, exact.kept(counts)), excess(H, best, rounded.kept(counts))
        np.testing.assert_allclose(a, b, rtol=2e-2)


def test_single_precision_has_digits_for_inputs_and_rows_of_all_sizes():
    H, _, best = problem(10, 40, 3, 0.3)
    scales, rows = 10.0 ** np.linspace(-9, 9, 40), np.array([[1e-25], [1.0], [1e25]])
    plain = eliminate_rows(H, best)
    scaled = eliminate_rows(H * scales * scales[:, None], best / scales * rows, precision="float32")
    np.testing.assert_allclose(scaled.errors[:, [5, 10, 20, 30]] / rows**2, plain.errors[:, [5, 10, 20, 30]], rtol=0.2)
    assert (np.sort(scaled.order, axis=1) == np.arange(40)).all()
    assert np.isfinite(scaled.costs).all()


def test_groups_of_rows_give_the_same(monkeypatch):
    H, _, best = problem(6, 30, 7)
    whole = eliminate_rows(H, best)
    monkeypatch.setattr("ellq.theory.row_elimination._BYTES", 3 * 8 * 30 * 30)
    seen = []
    parts = eliminate_rows(H, best, progress=lambda groups: (seen.append(g) or g for g in groups))
    assert seen == [0, 1, 2]
    assert (parts.order == whole.order).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 20), ridge=st.sampled_from([0.0, 0.1, 10.0]))
def test_fits_as_least_squares_does(seed, d, ridge):
    H, R, _ = problem(seed, d, 3, 0.3)
    kept = np.random.default_rng(seed).random((3, d)) < 0.5
    fitted = fit_rows(H, R, kept, ridge=ridge)
    assert not fitted[~kept].any()
    slope = (fitted @ (H + ridge * np.eye(d)) - R)[kept]
    assert np.abs(slope).max(initial=0.0) <= 1e-7 * (np.abs(R).max() + 1)


def test_dependent_inputs_share_the_weight():
    fitted = fit_rows(np.ones((2, 2)), [[1.0, 1.0]], np.array([[True, True]]))
    np.testing.assert_allclose(fitted, [[0.5, 0.5]])


def test_errors_are_those_of_the_samples():
    rng = np.random.default_rng(7)
    X, Y, W = rng.normal(size=(50, 6)), rng.normal(size=(50, 3)), rng.normal(size=(3, 6))
    errors = row_errors(X.T @ X / 50, Y.T @ X / 50, (Y**2).mean(axis=0), W)
    np.testing.assert_allclose(errors, ((Y - X @ W.T) ** 2).mean(axis=0))
    assert (row_errors(X.T @ X / 50, (X[:, :3].T @ X) / 50, (X[:, :3] ** 2).mean(axis=0), np.eye(3, 6)) < 1e-14).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_sparsegpt_removes_its_share_of_every_block_and_beats_dropping_by_its_scores(sparsity):
    H, _, best = problem(8, 60, 10, 0.3)
    pruned = sparsegpt_rows(H, best, sparsity, block=20)
    removed = (pruned == 0).reshape(10, 3, 20).sum(axis=(0, 2))
    assert removed.tolist() == [int(200 * sparsity)] * 3
    plain = np.where(pruned == 0, 0.0, best)
    quadratic = [np.einsum("ij,jk,ik->", w - best, H, w - best) for w in (pruned, plain)]
    assert quadratic[0] <= quadratic[1] * (1 + 1e-9)
    refitted = excess(H, best, pruned != 0).sum()
    assert refitted <= quadratic[0] * (1 + 1e-9) + 1e-12


@settings(max_examples=20, deadline=None)
@given(c=st.integers(1, 5), d=st.integers(1, 30), block=st.integers(1, 12), sparsity=st.floats(0, 0.99))
def test_sparsegpt_removes_as_many_as_asked(c, d, block, sparsity):
    H, _, best = problem(11, d, c, 0.3)
    assert (sparsegpt_rows(H, best, sparsity, block=block) == 0).sum() == round(c * d * sparsity)


def test_sparsegpt_column_by_column_is_the_surgeon_with_a_fixed_order():
    H, _, best = problem(9, 6, 1, 0.3)
    pruned = sparsegpt_rows(H, best, 0.5, block=6)[0]
    gone = np.flatnonzero(pruned == 0)
    # The last column that goes is made up for by those after it only.
    w, inverse = best[0].copy(), np.linalg.inv(H)
    for j in range(6):
        if j in gone:
            w -= w[j] / inverse[j, j] * inverse[:, j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    np.testing.assert_allclose(pruned, np.where(pruned == 0, 0, w), rtol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eliminate_rows(np.eye(2), [[1.0, 2.0, 3.0]]), "gram has shape"),
        (lambda: eliminate_rows(np.ones((2, 2)), [[1.0, 2.0]]), "not positive definite"),
        (lambda: eliminate_rows(np.eye(2), [[1.0, np.nan]]), "weights"),
        (lambda: eliminate_rows(np.eye(2), [[1.0, 2.0]], precision="half"), "precision='half'"),
        (lambda: fit_rows(np.eye(2), [[1.0, 2.0]], np.array([[True]])), "do not fit"),
        (lambda: fit_rows(np.eye(2), [[1.0, 2.0]], np.array([[1, 0]])), "do not fit"),
        (lambda: fit_rows(np.eye(1), [[1.0]], np.array([[True]]), ridge=-1.0), "ridge"),
        (lambda: row_errors(np.eye(1), [[1.0]], [1.0, 2.0], [[1.0]]), "do not fit"),
        (lambda: sparsegpt_rows(np.eye(2), [[1.0, 2.0]], 1.0), "sparsity=1"),
        (lambda: sparsegpt_rows(np.zeros((1, 1)), [[1.0]], 0.5), "not positive definite"),
        (lambda: RowPaths(np.zeros((2, 3), int), np.zeros((2, 3))).kept([4, 0]), "counts in"),
        (lambda: RowPaths(np.zeros((2, 3), int), np.zeros((2, 3))).kept([1]), "2 counts"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
