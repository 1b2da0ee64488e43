"""What bounds are attacked with: finite, of the asked size, and repeatable."""

import numpy as np
import pytest

from ellq.theory import families


@pytest.mark.parametrize("name", list(families.VECTORS))
@pytest.mark.parametrize("d", [1, 2, 17])
def test_vectors_are_finite_and_of_the_asked_size(name, d):
    for seed in range(50):
        w = families.VECTORS[name](np.random.default_rng(seed), d)
        assert w.shape == (d,)
        assert w.dtype == np.float64
        assert np.isfinite(w).all()


def test_drawn_vectors_are_not_zero_and_repeat():
    for seed in range(200):
        w = families.vector(np.random.default_rng(seed))
        assert w.any()
        np.testing.assert_array_equal(w, families.vector(np.random.default_rng(seed)))


def test_features_have_dead_and_equal_columns_sometimes():
    drawn = [families.features(np.random.default_rng(seed), 6) for seed in range(100)]
    assert all(X.shape[1] == 6 and np.isfinite(X).all() for X in drawn)
    assert any((X == 0).all(axis=0).any() for X in drawn)
    assert any(len(X) > 1 and (X[:, :1] == X).all() for X in drawn)


def test_orders_rise():
    for seed in range(200):
        low, high = families.orders(np.random.default_rng(seed))
        assert 0 < low < high
