"""Accumulators: one contract for both kinds, computed by NumPy and by torch, and what only one of them keeps."""

import warnings
from fractions import Fraction
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ellq.theory import accumulators
from ellq.theory.accumulators import Gram, Tsqr
from ellq.theory.columns import Moments, Triangle
from strategies import features

SOME = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
kinds = pytest.mark.parametrize("kind", [Gram, Tsqr])
# A device makes torch do the work, as it does for tensors on a GPU.
devices = pytest.mark.parametrize("device", [None, "cpu"])


def targets_for(X, count, seed):
    return np.random.default_rng(seed).normal(size=(len(X), count)) + 3


def accumulated(kind, X, Y, cuts=(), device=None):
    accumulator = kind(X.shape[1], Y.shape[1], device=device)
    for x, y in zip(np.split(X, cuts), np.split(Y, cuts), strict=True):
        accumulator.update(x, y)
    return accumulator


def moments(accumulator, centred=True):
    return tuple(np.asarray(part) for part in accumulator.moments(centred=centred))


def assert_equal(a, b, rtol=1e-11):
    assert a.samples == b.samples
    a, b = a.to(None), b.to(None)
    for left, right in zip((a.x_mean, a.y_mean, *moments(a)), (b.x_mean, b.y_mean, *moments(b)), strict=True):
        largest = np.abs(right).max(initial=0)
        np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol * max(largest, 1e-30))


def assert_moments(accumulator, X, Y, centred):
    A, B = (X - X.mean(axis=0), Y - Y.mean(axis=0)) if centred else (X, Y)
    G, R, yy = moments(accumulator, centred)
    # Whatever the kind, an entry is good to the rounding of the two uncentred columns it comes from.
    x, y = np.linalg.norm(X, axis=0), np.linalg.norm(Y, axis=0)
    tolerance = 1e-13 * (1 + len(X))
    assert np.all(np.abs(G - A.T @ A) <= tolerance * np.outer(x, x))
    assert np.all(np.abs(R - A.T @ B) <= tolerance * np.outer(x, y))
    assert np.all(np.abs(yy - (B**2).sum(axis=0)) <= tolerance * y**2)
    if accumulator.device is None:
        np.testing.assert_array_equal(G, G.T)


@kinds
@devices
@SOME
@given(
    X=features(),
    count=st.integers(0, 3),
    seed=seeds,
    cuts=st.lists(st.integers(0, 24), max_size=4).map(sorted),
    block=st.sampled_from([1, 8, 40, 2**21]),
)
def test_batches_add_up_to_numpy_on_the_whole(kind, device, X, count, seed, cuts, block):
    Y = targets_for(X, count, seed)
    with patch.object(accumulators, "_BLOCK", block), patch.object(accumulators, "_DEVICE_BLOCK", block):
        accumulator = accumulated(kind, X, Y, [min(c, len(X)) for c in cuts], device)
    assert accumulator.samples == len(X)
    assert accumulator.batches == len(cuts) + 1
    np.testing.assert_allclose(accumulator.x_mean, X.mean(axis=0), rtol=1e-13, atol=1e-13 * np.abs(X).max())
    np.testing.assert_allclose(accumulator.y_mean, Y.mean(axis=0), rtol=1e-13)
    for centred in (True, False):
        assert_moments(accumulator, X, Y, centred)


@kinds
@devices
@SOME
@given(X=features(samples=20), seed=seeds, order=st.permutations(range(4)))
def test_accumulators_merge_in_any_order(kind, device, X, seed, order):
    Y = targets_for(X, 2, seed)
    parts = [accumulated(kind, X[i::4], Y[i::4], device=device) for i in range(4)]
    left = kind(X.shape[1], 2)
    for i in order:
        left = left.merge(parts[i])
    right = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]].merge(parts[order[3]]))
    whole = accumulated(kind, X, Y, device=device)
    for merged in (left, right):
        assert merged.device == whole.device
        assert merged.batches == 4
        assert_equal(merged, whole)
        assert_moments(merged, X, Y, True)


@kinds
@SOME
@given(X=features(), seed=seeds, power=st.integers(-30, 30))
def test_a_power_of_two_scales_the_moments_exactly(kind, X, seed, power):
    Y = targets_for(X, 2, seed)
    one, other = accumulated(kind, X, Y), accumulated(kind, X * 2.0**power, Y)
    for centred in (True, False):
        (G, R, yy), (scaled_G, scaled_R, same) = moments(one, centred), moments(other, centred)
        np.testing.assert_array_equal(G * 4.0**power, scaled_G)
        np.testing.assert_array_equal(R * 2.0**power, scaled_R)
        np.testing.assert_array_equal(yy, same)


@kinds
@SOME
@given(X=features(), seed=seeds)
def test_permuted_columns_have_permuted_moments(kind, X, seed):
    order = np.random.default_rng(seed).permutation(X.shape[1])
    G, _, _ = moments(accumulated(kind, X, X[:, :0]))
    permuted, _, _ = moments(accumulated(kind, X[:, order], X[:, :0]))
    scale = np.linalg.norm(X, axis=0)
    assert np.all(np.abs(G[np.ix_(order, order)] - permuted) <= 1e-12 * np.outer(scale, scale)[np.ix_(order, order)])


@kinds
@devices
@SOME
@given(X=features(), seed=seeds)
def test_columns_hold_the_moments_of_the_samples(kind, device, X, seed):
    Y = targets_for(X, 2, seed)
    accumulator = accumulated(kind, X, Y, device=device)
    for centred in (True, False):
        columns = accumulator.columns(centred=centred)
        assert isinstance(columns, Moments if kind is Gram else Triangle)
        assert (columns.features, columns.targets) == (X.shape[1], 2)
        assert isinstance(columns.yy, np.ndarray if device is None else torch.Tensor)
        seen = columns.cpu().moments()
        for ours, theirs in zip((seen.G, seen.R, seen.yy), moments(accumulator, centred), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13 * np.abs(theirs).max(initial=0))


@kinds
@devices
def test_large_mean_does_not_swallow_a_small_spread(kind, device):
    rng = np.random.default_rng(0)
    X = 1e9 + rng.normal(size=(5000, 3))
    Y = -1e9 + (X - 1e9) @ rng.normal(size=(3, 2))
    accumulator = accumulated(kind, X, Y, range(500, 5000, 500), device)
    shifted = X - 1e9  # exact
    expected = shifted - shifted.mean(axis=0)
    # Raw second moments would be off by 5000·1e18·2⁻⁵³, more than their value.
    np.testing.assert_allclose(moments(accumulator)[0], expected.T @ expected, rtol=1e-12, atol=1e-9)


@kinds
@devices
def test_one_long_batch_with_a_large_mean_is_centred_exactly(kind, device):
    # A plain column sum of so many large values loses more digits than the spread has.
    X = 1e12 + np.random.default_rng(1).normal(size=(100_000, 2))
    accumulator = accumulated(kind, X, np.zeros((len(X), 1)), device=device)
    shifted = X - 1e12  # exact
    expected = shifted - shifted.mean(axis=0)
    np.testing.assert_allclose(moments(accumulator)[0], expected.T @ expected, rtol=1e-12, atol=1e-6)


@kinds
def test_a_mean_that_drifts_from_batch_to_batch_is_part_of_the_spread(kind):
    X = np.random.default_rng(5).normal(size=(600, 3)) + np.repeat([0.0, 1e6, -1e6], 200)[:, None]
    accumulator = accumulated(kind, X, X[:, :1], [200, 400])
    exact = [[Fraction(value) for value in column] for column in X.T]
    mean = [sum(column) / len(X) for column in exact]
    spread = [float(sum((value - m) ** 2 for value in column)) for column, m in zip(exact, mean, strict=True)]
    np.testing.assert_allclose(np.diag(moments(accumulator)[0]), spread, rtol=1e-14)


@kinds
def test_merging_changes_neither_part(kind):
    X = np.random.default_rng(2).normal(size=(6, 2))
    a, b = accumulated(kind, X[:3], X[:3, :1]), accumulated(kind, X[3:], X[3:, :1])
    before = moments(a) + moments(b)
    a.merge(b).update(X, X[:, :1])
    kind(2, 1).merge(a).update(X, X[:, :1])
    for now, then in zip(moments(a) + moments(b), before, strict=True):
        np.testing.assert_array_equal(now, then)


@kinds
@devices
@pytest.mark.parametrize("centred", [True, False])
def test_what_is_handed_out_changes_nothing_and_never_changes(kind, device, centred):
    X = np.random.default_rng(3).normal(size=(6, 2))
    accumulator = accumulated(kind, X, X[:, :1], device=device)
    first = moments(accumulator, centred)
    columns = accumulator.columns(centred=centred)
    for array in (*accumulator.moments(centred=centred), *vars(columns).values(), accumulator.x_mean):
        array += 1
    for now, then in zip(moments(accumulator, centred), first, strict=True):
        np.testing.assert_array_equal(now, then)
    held = accumulator.columns(centred=centred).cpu()
    accumulator.update(X + 1, X[:, :1])
    for now, then in zip((held.moments().G, held.moments().R), first[:2], strict=True):
        np.testing.assert_allclose(now, then, rtol=1e-13, atol=1e-14)


@kinds
@devices
def test_an_empty_batch_adds_nothing(kind, device):
    accumulator = kind(2, 1, device=device)
    accumulator.update(np.zeros((0, 2)), np.zeros((0, 1)))
    assert (accumulator.samples, accumulator.batches) == (0, 1)
    for use in (accumulator.moments, accumulator.columns):
        with pytest.raises(ValueError, match="empty"):
            use(centred=True)
    assert accumulator.merge(kind(2, 1)).samples == 0


@kinds
@devices
def test_one_sample_has_no_spread(kind, device):
    accumulator = accumulated(kind, np.array([[3.0, 4.0]]), np.array([[5.0]]), device=device)
    assert not any(part.any() for part in moments(accumulator))
    xx, xy, yy = moments(accumulator, centred=False)
    np.testing.assert_allclose(xx, [[9, 12], [12, 16]], rtol=1e-15)
    np.testing.assert_allclose(xy, [[15], [20]], rtol=1e-15)
    np.testing.assert_allclose(yy, [25], rtol=1e-15)


@kinds
@devices
def test_dead_and_constant_columns_are_exactly_zero(kind, device):
    X = np.random.default_rng(4).normal(size=(50, 4))
    X[:, 1], X[:, 2] = 0.0, 1 / 3
    accumulator = accumulated(kind, X, X[:, :1], [20], device)
    xx, xy, _ = moments(accumulator)
    assert not xx[1:3].any()
    assert not xy[1:3].any()
    assert not moments(accumulator, centred=False)[0][1].any()
    zero = accumulated(kind, np.zeros((7, 3)), np.zeros((7, 2)), device=device)
    for centred in (True, False):
        assert not any(part.any() for part in moments(zero, centred))


@kinds
@devices
def test_fewer_samples_than_features_have_that_rank(kind, device):
    X = np.random.default_rng(6).normal(size=(4, 9))
    accumulator = accumulated(kind, X, X[:, :1], [1, 3], device)
    assert np.linalg.matrix_rank(moments(accumulator)[0], tol=1e-10) == 3
    assert np.linalg.matrix_rank(moments(accumulator, centred=False)[0], tol=1e-10) == 4


VALUES = np.random.default_rng(7).integers(-8, 8, size=(30, 3))
FORMS = {
    "float16": VALUES.astype(np.float16),
    "float32": VALUES.astype(np.float32),
    "longdouble": VALUES.astype(np.longdouble),
    "int8": VALUES.astype(np.int8),
    "big-endian": VALUES.astype(">f4"),
    "Fortran order": np.asfortranarray(VALUES.astype(np.float64)),
    "every other row backwards": np.repeat(VALUES[::-1].astype(np.float64), 2, axis=0)[::-2],
    "list": VALUES.tolist(),
    "bfloat16 tensor": torch.tensor(VALUES).bfloat16(),
    "float16 tensor": torch.tensor(VALUES).half(),
    "float32 tensor": torch.tensor(VALUES).float(),
    "int64 tensor": torch.tensor(VALUES),
    "parameter": torch.nn.Parameter(torch.tensor(VALUES).double()),
    "transposed tensor": torch.tensor(VALUES.T.copy()).float().T,
    "sparse tensor": torch.tensor(VALUES).float().to_sparse(),
}


@kinds
@devices
@pytest.mark.parametrize("form", FORMS)
def test_any_real_dtype_and_layout_counts_alike(kind, device, form):
    accumulator = kind(3, 3, device=device)
    accumulator.update(FORMS[form], FORMS[form])
    accumulator.update(FORMS["float32"], FORMS[form])  # mixed with others
    expected = accumulated(kind, np.vstack([VALUES, VALUES]) * 1.0, np.vstack([VALUES, VALUES]) * 1.0)
    assert_equal(accumulator, expected, rtol=1e-13)


@kinds
def test_unsigned_and_boolean_values_do_not_wrap(kind):
    X = np.array([[250], [1], [7]], dtype=np.uint8)
    accumulator = kind(1, 1)
    accumulator.update(X, X > 5)
    spread = X - X.mean()
    np.testing.assert_allclose(moments(accumulator)[0], spread.T @ spread, rtol=1e-15)
    np.testing.assert_allclose(moments(accumulator)[1], spread.T @ (X > 5), rtol=1e-15)


@kinds
def test_read_only_values_are_read_only(kind):
    X = VALUES.astype(np.float64)
    X.setflags(write=False)
    for device in (None, "cpu"):
        accumulator = kind(3, device=device)
        accumulator.update(X)
    tensor = torch.tensor(VALUES).double()
    before = tensor.clone()
    kind(3).update(tensor)
    assert torch.equal(tensor, before)


@kinds
@devices
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["features", "targets"])
@pytest.mark.parametrize("row", [0, 1, 30])  # of the first block or a later one
def test_nonfinite_values_name_the_batch_and_add_nothing(kind, device, bad, place, row):
    accumulator = kind(2, 1, device=device)
    accumulator.update(np.ones((3, 2)), np.ones((3, 1)))
    before = moments(accumulator, centred=False)
    x, y = np.ones((40, 2)), np.ones((40, 1))
    (x if place == "features" else y)[row, 0] = bad
    for form in (np.asarray, torch.from_numpy):
        with (
            patch.object(accumulators, "_BLOCK", 16),
            patch.object(accumulators, "_DEVICE_BLOCK", 16),
            pytest.raises(
                ValueError, match=rf"batch 1, {place}.*{abs(bad)} at index \[{row}, 0\]".replace("inf", "-?inf")
            ),
        ):
            accumulator.update(form(x), form(y))
    assert (accumulator.samples, accumulator.batches) == (3, 1)
    for now, then in zip(moments(accumulator, centred=False), before, strict=True):
        np.testing.assert_array_equal(now, then)


@kinds
@devices
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ((3, 3), (3, 1)),
        ((3, 2), (3, 2)),
        ((3, 2), (4, 1)),
        ((2,), (2, 1)),
        ((3, 2), (3,)),
        ((), (1, 1)),
        ((3, 2, 1), (3, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(kind, device, x, y):
    for form in (np.ones, torch.ones):
        with pytest.raises(ValueError, match="batch 0 has"):
            kind(2, 1, device=device).update(form(x), form(y))


@kinds
def test_a_batch_of_another_width_names_the_batch_and_both_widths(kind):
    accumulator = kind(2)
    accumulator.update(np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"batch 1 has features of shape \(3, 5\).*expected \(b, 2\)"):
        accumulator.update(np.ones((3, 5)))


@kinds
def test_targets_are_needed_where_they_were_announced(kind):
    with pytest.raises(ValueError, match="batch 0 has no targets"):
        kind(2, 1).update(np.ones((3, 2)))
    accumulator = kind(2)
    accumulator.update(np.ones((3, 2)))
    accumulator.update(np.ones((3, 2)), np.ones((3, 0)))
    assert accumulator.samples == 6


@kinds
@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (np.ones((3, 2)) * 1j, TypeError, "real numbers"),
        (torch.ones(3, 2, dtype=torch.complex64), TypeError, "real numbers"),
        (torch.ones(3, 2, device="meta"), TypeError, "meta device"),
        ([["a", "b"]], TypeError, "real numbers"),
        (np.array([[None, 1.0]]), TypeError, "real numbers"),
        (np.ma.masked_equal([[1.0, 2.0], [3.0, 1.0]], 2.0), ValueError, "masked"),
    ],
)
def test_values_that_are_no_real_numbers_are_refused(kind, values, error, words):
    accumulator = kind(2)
    with pytest.raises(error, match=rf"batch 0, features, .*{words}"):
        accumulator.update(values)
    assert (accumulator.samples, accumulator.batches) == (0, 0)


@kinds
@devices
def test_sums_beyond_float64_are_refused_by_name(kind, device):
    accumulator = kind(1, 1, device=device)
    accumulator.update([[0.0], [1.0]], [[0.0], [1.0]])
    with pytest.raises(ValueError, match=r"batch 1 holds values so large"):
        accumulator.update([[0.0], [1.0]], [[1e200], [-1e200]])
    assert accumulator.samples == 2
    # Each part fits, their distance does not.
    low, high = kind(1, 1, device=device), kind(1, 1, device=device)
    low.update([[0.0]], [[-1e200]])
    high.update([[0.0]], [[1e200]])
    with pytest.raises(ValueError, match="merged sums of squares overflow"):
        low.merge(high)
    with pytest.raises(ValueError, match="yy holds inf"):
        low.columns(centred=False)


@kinds
def test_accumulators_of_other_layouts_or_kinds_do_not_merge(kind):
    other = Tsqr if kind is Gram else Gram
    with pytest.raises(ValueError, match=r"Cannot merge .* 2 features and 1 targets with 2 and 2"):
        kind(2, 1).merge(kind(2, 2))
    with pytest.raises(TypeError, match=f"Cannot merge a {kind.__name__} with a {other.__name__}"):
        kind(2, 1).merge(other(2, 1))
    with pytest.raises(TypeError, match="with a ndarray"):
        kind(2, 1).merge(np.eye(2))


@kinds
@pytest.mark.parametrize(
    ("counts", "error", "words"),
    [((0, 1), ValueError, "features=0"), ((1, -1), ValueError, "targets=-1"), ((2.0, 1), TypeError, "features")],
)
def test_counts_out_of_range_are_refused(kind, counts, error, words):
    with pytest.raises(error, match=words):
        kind(*counts)


@kinds
def test_an_accumulator_moves_between_numpy_and_torch(kind):
    X = np.random.default_rng(8).normal(size=(20, 3))
    here = accumulated(kind, X, X[:, :2])
    there = here.to("cpu")
    assert here.device is None
    assert there.device == torch.device("cpu")
    assert (there.samples, there.batches) == (20, 1)
    assert isinstance(there.x_mean, torch.Tensor)
    back = there.to(None)
    assert back.device is None
    for now, then in zip(moments(back), moments(here), strict=True):
        np.testing.assert_array_equal(now, then)
    there.update(X, X[:, :2])
    assert_equal(here.merge(there.to(None)), here.merge(there))
    assert here.merge(there).device is None
    assert kind(3, 2).merge(there).device == torch.device("cpu")


def test_triangles_keep_what_squares_lose():
    # Läuchli's matrix: 1 + e² is 1 in float64, so its Gram matrix has rank 1.
    e = 2.0**-30
    X = np.array([[1.0, 1.0], [e, 0.0], [0.0, e]])
    triangle = accumulated(Tsqr, X, X[:, :0]).columns(centred=False).X
    exact = e * np.sqrt((2 + e**2) / (1 + e**2))
    np.testing.assert_allclose(abs(triangle[1, 1]), exact, rtol=1e-7)  # 2⁻⁵³ / e of a column of norm 1
    G, _, _ = moments(accumulated(Gram, X, X[:, :0]), centred=False)
    assert abs(np.linalg.det(G)) < 1e-15
    assert not abs(np.linalg.det(G) / exact**2 - 1) < 0.01


def test_triangles_keep_the_condition_of_the_features():
    rng = np.random.default_rng(9)
    U, V = np.linalg.qr(rng.normal(size=(400, 8)))[0], np.linalg.qr(rng.normal(size=(8, 8)))[0]
    values = np.logspace(0, -12, 8)
    X = U * values @ V.T
    for device in (None, "cpu"):
        triangle = accumulated(Tsqr, X, X[:, :0], [100, 130], device).columns(centred=False).X
        np.testing.assert_allclose(
            np.linalg.svd(np.asarray(triangle), compute_uv=False), values, rtol=1e-15 / 1e-12 * 10
        )
    G, _, _ = moments(accumulated(Gram, X, X[:, :0]), centred=False)
    seen = np.sqrt(np.abs(np.linalg.eigvalsh(G)[::-1]))
    assert abs(seen[-1] / values[-1] - 1) > 10  # the negative control: Gram cannot


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e150, 1e300])
def test_triangles_need_no_squares_of_the_features(scale):
    X = np.random.default_rng(10).normal(size=(40, 3))
    usual, scaled = accumulated(Tsqr, X, X[:, :0]), accumulated(Tsqr, X * scale, X[:, :0], [11])
    for centred in (True, False):
        one, other = usual.columns(centred=centred).X, scaled.columns(centred=centred).X
        np.testing.assert_allclose(np.abs(other / scale), np.abs(one), rtol=1e-13, atol=1e-14)


def test_grams_refuse_features_whose_squares_overflow():
    with pytest.raises(ValueError, match="batch 0 holds values so large"):
        Gram(1).update([[0.0], [1e200]])


@SOME
@given(X=features(), seed=seeds)
def test_the_factor_is_triangular_and_the_triangle_its_head(X, seed):
    Y = targets_for(X, 2, seed)
    accumulator = accumulated(Tsqr, X, Y, [len(X) // 2])
    m = X.shape[1]
    for centred in (True, False):
        columns = accumulator.columns(centred=centred)
        np.testing.assert_array_equal(columns.X, np.triu(columns.X))
        assert columns.X.shape == (m, m)
        assert np.all(columns.yy >= (columns.Y**2).sum(axis=0) * (1 - 1e-14))
    np.testing.assert_array_equal(accumulator.factor, np.triu(accumulator.factor))


def test_a_long_batch_is_never_copied_whole():
    X = np.ones((200_000, 64), dtype=np.float16)
    import tracemalloc

    for kind in (Gram, Tsqr):
        accumulator = kind(64)
        accumulator.update(X[:10])
        tracemalloc.start()
        accumulator.update(X)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Two blocks of 2²¹ float64 values, one as read and one as LAPACK wants it; the batch would be 102 MB.
        assert peak < 2.2 * 2**21 * 8


def test_no_warning_is_raised_on_the_way_to_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (Gram, Tsqr):
            with pytest.raises(ValueError, match="holds"):
                kind(2, 1).update([[1e308, -1e308], [-1e308, 1e308]], [[np.inf], [-np.inf]])
