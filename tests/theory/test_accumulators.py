import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellq.theory import Gram
from strategies import features

SOME = settings(max_examples=80, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def targets_for(X, count, seed):
    return np.random.default_rng(seed).normal(size=(len(X), count)) + 3


def accumulated(X, Y, cuts=()):
    gram = Gram(X.shape[1], Y.shape[1])
    for x, y in zip(np.split(X, cuts), np.split(Y, cuts), strict=True):
        gram.update(x, y)
    return gram


def assert_equal(a, b, rtol=1e-11):
    assert a.samples == b.samples
    for name in ("x_mean", "y_mean", "xx", "xy", "yy"):
        left, right = getattr(a, name), getattr(b, name)
        np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol * max(np.abs(right).max(initial=0), 1e-30))


@SOME
@given(X=features(), count=st.integers(0, 3), seed=seeds, cuts=st.lists(st.integers(0, 24), max_size=4).map(sorted))
def test_batches_add_up_to_numpy_on_the_whole(X, count, seed, cuts):
    Y = targets_for(X, count, seed)
    gram = accumulated(X, Y, [min(c, len(X)) for c in cuts])
    assert gram.samples == len(X)
    assert gram.batches == len(cuts) + 1
    scale = np.abs(X).max() + 1
    for centred in (True, False):
        A, B = (X - X.mean(axis=0), Y - Y.mean(axis=0)) if centred else (X, Y)
        xx, xy, yy = gram.moments(centred=centred)
        tolerance = 1e-12 * len(X)
        np.testing.assert_allclose(xx, A.T @ A, rtol=1e-11, atol=tolerance * scale**2)
        np.testing.assert_allclose(xy, A.T @ B, rtol=1e-11, atol=tolerance * scale * 10)
        np.testing.assert_allclose(yy, (B**2).sum(axis=0), rtol=1e-11, atol=tolerance * 100)


@SOME
@given(X=features(samples=20), seed=seeds, order=st.permutations(range(4)))
def test_accumulators_merge_in_any_order(X, seed, order):
    Y = targets_for(X, 2, seed)
    parts = [accumulated(X[i::4], Y[i::4]) for i in range(4)]
    left = Gram(X.shape[1], 2)
    for i in order:
        left = left.merge(parts[i])
    right = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]].merge(parts[order[3]]))
    whole = accumulated(X, Y)
    assert_equal(left, whole)
    assert_equal(right, whole)
    assert right.batches == 4


def test_large_mean_does_not_swallow_a_small_spread():
    rng = np.random.default_rng(0)
    X = 1e9 + rng.normal(size=(5000, 3))
    Y = -1e9 + X @ rng.normal(size=(3, 2))
    gram = accumulated(X, Y, range(500, 5000, 500))
    wide = X.astype(np.longdouble)
    centred = wide - wide.mean(axis=0)
    # The means are good to 1e9·2⁻⁵³; raw second moments would be off by 5000·1e18·2⁻⁵³, more than their value.
    np.testing.assert_allclose(gram.xx, np.asarray(centred.T @ centred, float), rtol=1e-7, atol=1e-4)


def test_one_long_batch_with_a_large_mean_is_centred_exactly():
    # A plain column sum of so many large values loses more digits than the spread has.
    X = 1e12 + np.random.default_rng(1).normal(size=(100_000, 2))
    gram = accumulated(X, np.zeros((len(X), 1)))
    shifted = X - 1e12  # exact
    expected = shifted - shifted.mean(axis=0)
    np.testing.assert_allclose(gram.xx, expected.T @ expected, rtol=1e-12, atol=1e-6)


def test_merging_changes_neither_part():
    X = np.random.default_rng(2).normal(size=(6, 2))
    a, b = accumulated(X[:3], X[:3, :1]), accumulated(X[3:], X[3:, :1])
    before = a.xx.copy()
    a.merge(b).update(X, X[:, :1])
    np.testing.assert_array_equal(a.xx, before)


def test_moments_do_not_change_with_later_batches():
    X = np.random.default_rng(3).normal(size=(6, 2))
    gram = accumulated(X, X[:, :1])
    held = gram.moments(centred=True)
    before = [m.copy() for m in held]
    gram.update(X + 1, X[:, :1])
    for now, then in zip(held, before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_an_empty_batch_adds_nothing():
    gram = Gram(2, 1)
    gram.update(np.zeros((0, 2)), np.zeros((0, 1)))
    assert (gram.samples, gram.batches) == (0, 1)
    with pytest.raises(ValueError, match="empty"):
        gram.moments(centred=True)


def test_one_sample_has_no_spread():
    gram = accumulated(np.array([[3.0, 4.0]]), np.array([[5.0]]))
    assert not gram.xx.any()
    xx, xy, yy = gram.moments(centred=False)
    np.testing.assert_array_equal(xx, [[9, 12], [12, 16]])
    np.testing.assert_array_equal(xy, [[15], [20]])
    np.testing.assert_array_equal(yy, [25])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["features", "targets"])
def test_nonfinite_values_name_the_batch_and_add_nothing(bad, place):
    gram = Gram(2, 1)
    gram.update(np.ones((3, 2)), np.ones((3, 1)))
    x, y = np.ones((3, 2)), np.ones((3, 1))
    (x if place == "features" else y)[1, 0] = bad
    with pytest.raises(ValueError, match=rf"batch 1, {place}.*\[1, 0\]"):
        gram.update(x, y)
    assert (gram.samples, gram.batches) == (3, 1)
    assert np.isfinite(gram.xx).all()


@pytest.mark.parametrize(
    ("x", "y"), [((3, 3), (3, 1)), ((3, 2), (3, 2)), ((3, 2), (4, 1)), ((2,), (2, 1)), ((3, 2), (3,))]
)
def test_shapes_that_do_not_fit_are_refused(x, y):
    with pytest.raises(ValueError, match="batch 0 has"):
        Gram(2, 1).update(np.ones(x), np.ones(y))


def test_accumulators_of_other_layouts_do_not_merge():
    with pytest.raises(ValueError, match="Cannot merge"):
        Gram(2, 1).merge(Gram(2, 2))
    with pytest.raises(ValueError, match="features=0"):
        Gram(0, 1)
