import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from ellq.theory import Gram, interpolate, pivoted_qr, skeleton_output_bound, skeleton_residual
from strategies import features

SOME = settings(max_examples=120, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def skeleton_of(X, k, *, intercept):
    gram = Gram(X.shape[1], 0)
    gram.update(X, np.zeros((len(X), 0)))
    return interpolate(gram, pivoted_qr(gram.moments(centred=intercept)[0], k), intercept=intercept)


def exact_output_error(E, u):
    with mp.workdps(60):
        rows = [mp.fsum(mpf(float(a)) * mpf(float(b)) for a, b in zip(row, u, strict=True)) for row in E]
        return mp.sqrt(mp.fsum(r * r for r in rows) / len(rows))


@SOME
@given(X=features(), data=st.data(), intercept=st.booleans())
def test_residual_is_the_difference_and_vanishes_on_the_skeleton(X, data, intercept):
    s = skeleton_of(X, data.draw(st.integers(1, X.shape[1])), intercept=intercept)
    E = skeleton_residual(X, s.indices, s.interpolation, s.offset)
    np.testing.assert_allclose(
        E, X - (s.offset + X[:, s.indices] @ s.interpolation), rtol=1e-12, atol=1e-10 * (1 + np.abs(X).max())
    )
    np.testing.assert_allclose(E[:, s.indices], 0, atol=1e-15 * np.abs(X).max())


@SOME
@given(E=features(), seed=seeds, shift=st.integers(-900, 900), other=st.integers(-900, 900))
def test_bound_covers_the_exact_output_error_at_any_scale(E, seed, shift, other):
    if shift + other > 900:
        other = 900 - shift
    rows = np.random.default_rng(seed).normal(size=(3, E.shape[1]))
    E, U = np.ldexp(E, shift), np.ldexp(rows, other)
    for bound, u in zip(skeleton_output_bound(E, U), U, strict=True):
        assert exact_output_error(E, u) <= mpf(float(bound))


@SOME
@given(E=features(samples=12))
def test_bound_is_met_by_the_top_right_singular_vector(E):
    u = np.linalg.svd(E)[2][0]
    bound = float(skeleton_output_bound(E, u[None])[0])
    assert 0.99 * bound <= float(exact_output_error(E, u)) <= bound


@SOME
@given(E=features(), seed=seeds)
def test_bound_is_the_spectral_norm_times_the_consumers_length(E, seed):
    U = np.random.default_rng(seed).normal(size=(2, E.shape[1]))
    expected = np.linalg.norm(E, 2) * np.linalg.norm(U, axis=1) / np.sqrt(len(E))
    np.testing.assert_allclose(skeleton_output_bound(E, U), expected, rtol=1e-12)


def test_edges():
    assert skeleton_output_bound(np.zeros((2, 3)), np.ones((2, 3))).tolist() == [0, 0]
    assert skeleton_output_bound(np.ones((2, 3)), np.zeros((1, 3))).tolist() == [0]
    assert skeleton_output_bound([[1e200]], [[1e-200]]) == pytest.approx(1, rel=1e-13)
    assert skeleton_output_bound([[5e-324]], [[1e300]])[0] >= 4.94e-24
    assert np.isinf(skeleton_output_bound([[1e200]], [[1e200]])[0])


@pytest.mark.parametrize(
    ("indices", "T", "offset"),
    [
        ([0], np.ones((1, 3)), np.zeros(2)),
        ([0], np.ones((2, 2)), np.zeros(2)),
        ([0], np.ones((1, 2)), np.zeros(1)),
        ([2], np.ones((1, 2)), np.zeros(2)),
        ([-1], np.ones((1, 2)), np.zeros(2)),
        ([0.5], np.ones((1, 2)), np.zeros(2)),
        ([[0]], np.ones((1, 2)), np.zeros(2)),
        ([0], np.full((1, 2), np.nan), np.zeros(2)),
    ],
)
def test_residual_refuses_bad_input(indices, T, offset):
    with pytest.raises((TypeError, ValueError)):
        skeleton_residual(np.ones((4, 2)), indices, T, offset)


@pytest.mark.parametrize(
    ("E", "U"), [(np.ones((2, 3)), np.ones((1, 2))), (np.ones(3), np.ones((1, 3))), (np.ones((0, 3)), np.ones((1, 3)))]
)
def test_bound_refuses_bad_input(E, U):
    with pytest.raises(ValueError, match=r"columns|dimensions|empty"):
        skeleton_output_bound(E, U)
