import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellq.theory.matrix_measures import effective_rank, participation_rank, stable_rank
from ellq.theory.measures import entropy_effective_count, numerical_sparsity

MEASURES = {"stable": stable_rank, "effective": effective_rank, "participation": participation_rank}
SOME = settings(max_examples=60, deadline=None)
each_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


@st.composite
def matrices(draw):
    """Matrices of any shape and rank, with singular values of one size or spread over many."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, n = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    r = draw(st.integers(1, min(m, n)))
    spread = draw(st.sampled_from([0.0, 1.0, 4.0]))
    return rotation(rng, m)[:, :r] * 10.0 ** rng.uniform(-spread, 0, r) @ rotation(rng, n)[:r]


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def near(a, b):
    return float(a) == pytest.approx(float(b), rel=1e-10)


# --- values ---------------------------------------------------------------------------------------------------------


def test_known_values():
    W = np.diag([2.0, 1.0, 1.0])
    assert near(stable_rank(W), 6 / 4)
    assert near(participation_rank(W), 36 / 18)
    assert near(effective_rank(W), np.exp(np.log(4) - 0.5 * np.log(2)))  # shares ½, ¼, ¼
    assert near(stable_rank([[3.0, 4.0]]), 1)


@SOME
@given(W=matrices())
def test_ranks_equal_their_formulas_from_the_entries(W):
    gram = W @ W.T
    assert near(stable_rank(W), np.trace(gram) / np.linalg.eigvalsh(gram)[-1])
    assert near(participation_rank(W), np.trace(gram) ** 2 / (gram**2).sum())


@SOME
@given(s=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=8))
def test_ranks_of_a_diagonal_matrix_are_counts_of_its_entries(s):
    assert near(effective_rank(np.diag(s)), entropy_effective_count(s))
    assert near(participation_rank(np.diag(s)), numerical_sparsity(np.square(s)))
    assert near(stable_rank(np.diag(s)), np.sum(np.square(s)) / max(s) ** 2)


@each_measure
@pytest.mark.parametrize("r", [1, 2, 5])
def test_equal_singular_values_count_as_the_rank(measure, r):
    rng = np.random.default_rng(r)
    assert near(measure(rotation(rng, 6)[:, :r] @ rotation(rng, 7)[:r]), r)


@SOME
@given(W=matrices())
def test_ranks_are_ordered_and_in_their_range(W):
    rank = np.linalg.matrix_rank(W, tol=1e-9)
    stable, participation, effective = (
        float(measure(W)) for measure in (stable_rank, participation_rank, effective_rank)
    )
    assert 1 <= stable <= participation * (1 + 1e-12)
    assert participation <= effective * (1 + 1e-12)
    assert effective <= rank * (1 + 1e-10) + 1e-10


# --- invariances ----------------------------------------------------------------------------------------------------


@each_measure
@SOME
@given(W=matrices(), factor=st.floats(1e-200, 1e200), seed=st.integers(0, 99))
def test_scale_transposition_and_rotations_do_not_matter(measure, W, factor, seed):
    rng, value = np.random.default_rng(seed), measure(W)
    assert near(measure(W * factor), value)
    assert near(measure(-W.T), value)
    assert near(measure(rotation(rng, len(W)) @ W), value)
    assert near(measure(W[rng.permutation(len(W))][:, rng.permutation(W.shape[1])]), value)


@each_measure
@SOME
@given(W=matrices(), times=st.integers(2, 4))
def test_padding_repetition_and_blocks(measure, W, times):
    value = measure(W)
    assert near(measure(np.pad(W, ((0, times), (1, 0)))), value)
    assert near(measure(np.tile(W, (1, times))), value)
    assert near(measure(np.tile(W, (times, 1))), value)
    assert near(measure(np.kron(np.eye(times), W)), times * float(value))


@each_measure
def test_powers_of_two_scale_exactly(measure):
    W = np.random.default_rng(0).normal(size=(5, 4))
    assert measure(np.ldexp(W, 900)) == measure(np.ldexp(W, -900)) == measure(W)


# --- arrays, edges, errors ------------------------------------------------------------------------------------------


@each_measure
def test_matrices_of_a_batch_are_measured_one_by_one(measure):
    W = np.random.default_rng(1).normal(size=(2, 3, 5, 4)) * 10.0 ** np.arange(-30, 30, 20)[:, None, None]
    values = measure(W)
    assert values.shape == (2, 3)
    for index in np.ndindex(2, 3):
        assert near(values[index], measure(W[index]))
    assert measure(np.zeros((0, 3, 2))).shape == (0,)


@each_measure
@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1.0, 1e300, 1.7e308])
def test_any_scale_is_measured(measure, scale):
    assert near(measure(np.eye(3)[:2] * scale), 2)
    assert near(measure(np.full((3, 4), scale)), 1)


@each_measure
def test_the_zero_matrix_has_rank_zero(measure):
    np.testing.assert_array_equal(measure(np.stack([np.zeros((2, 3)), np.ones((2, 3))])).round(12), [0.0, 1.0])


@each_measure
@pytest.mark.parametrize("W", [3.0, [1.0, 2.0], np.zeros((0, 3)), np.zeros((2, 0))])
def test_what_is_no_matrix_is_refused(measure, W):
    with pytest.raises(ValueError, match="W has shape"):
        measure(W)


@each_measure
def test_an_entry_that_is_not_finite_is_named(measure):
    with pytest.raises(ValueError, match=r"W holds nan at index \[1, 0\]"):
        measure([[1.0, 2.0], [np.nan, 4.0]])
