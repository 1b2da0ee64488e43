"""Columns: what is checked once when they are made."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ellq.theory.columns import Moments, Triangle

X = np.random.default_rng(0).normal(size=(6, 3))
Y = np.random.default_rng(1).normal(size=(6, 2))


@given(rows=st.integers(0, 5), features=st.integers(1, 4), targets=st.integers(0, 3))
def test_a_triangle_has_the_moments_of_its_rows(rows, features, targets):
    rng = np.random.default_rng(rows)
    x, y = rng.normal(size=(rows, features)), rng.normal(size=(rows, targets))
    for form in (np.asarray, torch.from_numpy):
        triangle = Triangle(form(x), form(y))
        assert (triangle.features, triangle.targets) == (features, targets)
        for columns in (triangle.moments(), triangle.cpu().moments()):
            assert isinstance(columns, Moments)
            np.testing.assert_allclose(columns.G, x.T @ x, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(columns.R, x.T @ y, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(columns.yy, (y**2).sum(axis=0), rtol=1e-12)


def test_targets_may_be_left_out():
    for columns in (Moments(X.T @ X), Triangle(X), Moments(torch.eye(3)), Triangle(torch.eye(3))):
        assert (columns.features, columns.targets) == (3, 0)
        assert tuple(columns.yy.shape) == (0,)
    assert tuple(Moments(np.eye(3), np.ones((3, 2))).yy) == (0, 0)


def test_values_are_taken_as_they_are():
    G = X.T @ X
    assert Moments(G).G is G
    assert Triangle(X).X is X
    np.testing.assert_array_equal(Moments([[2, 1], [1, 2]], [[1], [1]], [4]).G, [[2.0, 1.0], [1.0, 2.0]])


def test_tensors_stay_tensors_until_asked_for():
    parameter = torch.nn.Parameter(torch.eye(3, dtype=torch.float32))
    for columns in (Moments(parameter), Triangle(parameter)):
        values = vars(columns).values()
        assert all(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in values)
        assert not any(value.requires_grad for value in values)
        assert all(isinstance(value, np.ndarray) for value in vars(columns.cpu()).values())
    assert isinstance(Triangle(parameter).moments().G, torch.Tensor)


def test_columns_are_frozen():
    with pytest.raises(AttributeError):
        Moments(np.eye(2)).G = np.eye(2)  # type: ignore[misc]


NAN = np.diag([1.0, np.nan])
BAD = {
    "not square": (Moments, (np.ones((2, 3)),), ValueError, r"G has shape \(2, 3\)"),
    "no features": (Moments, (np.ones((0, 0)),), ValueError, "at least one feature"),
    "not symmetric": (Moments, ([[1, 2], [3, 4]],), ValueError, "not symmetric"),
    "negative": (Moments, (np.diag([1.0, -2.0]),), ValueError, "-2 on its diagonal"),
    "NaN": (Moments, (NAN,), ValueError, r"G holds nan at index \[1, 1\]"),
    "NaN tensor": (Moments, (torch.from_numpy(NAN),), ValueError, r"G holds nan at index \[1, 1\]"),
    "infinite R": (Moments, (np.eye(2), [[1.0], [np.inf]]), ValueError, "R holds inf"),
    "vector": (Moments, (np.ones(3),), ValueError, "dimensions"),
    "text": (Moments, ([["a"]],), TypeError, "real numbers"),
    "complex tensor": (Moments, (torch.eye(2) * 1j,), TypeError, "real numbers"),
    "short R": (Moments, (np.eye(2), np.ones((3, 1))), ValueError, "R has 3 rows but G has 2"),
    "long yy": (Moments, (np.eye(2), np.ones((2, 1)), np.ones(2)), ValueError, r"yy has shape \(2,\), expected \(1,\)"),
    "negative yy": (Moments, (np.eye(2), np.ones((2, 1)), [-1.0]), ValueError, "yy holds -1"),
    "no columns": (Triangle, (np.ones((3, 0)),), ValueError, "at least one feature"),
    "short Y": (Triangle, (X, Y[:4]), ValueError, "Y has 4 rows but X has 6"),
    "NaN in X": (Triangle, (NAN,), ValueError, "X holds nan"),
    "NaN in yy": (Triangle, (X, Y, [1.0, np.nan]), ValueError, "yy holds nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case):
    kind, values, error, words = BAD[case]
    with pytest.raises(error, match=words):
        kind(*values)


def test_rounding_does_not_make_a_matrix_asymmetric():
    rng = np.random.default_rng(2)
    A = rng.normal(size=(50, 20)).astype(np.float32)
    G = (A.T @ A.copy()).astype(np.float64)
    G[0, 1] *= 1 + 1e-7
    assert Moments(G).features == 20
    G[0, 1] += 1e-3 * np.abs(G).max()
    with pytest.raises(ValueError, match="not symmetric"):
        Moments(G)
