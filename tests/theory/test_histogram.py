"""The magnitude histogram: every enclosure holds the exact value, merging is exact, thresholds count right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

import oracles
from ellq.theory.histogram import Enclosure, MagnitudeHistogram
from strategies import rising_orders, vectors

FORMATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EXACT = (torch.bfloat16, torch.float16)
ORDERS = st.one_of(st.floats(0.05, 8.0), st.sampled_from([1e-3, 0.1, 0.5, 1.0, 2.0, 1 + 1e-9, 40.0]))


@st.composite
def tensors(draw, formats=FORMATS):
    """A vector of any family, rounded to a format; what that format cannot hold becomes 1."""
    tensor = torch.from_numpy(draw(vectors(max_size=40))).to(draw(st.sampled_from(formats)))
    return torch.where(torch.isfinite(tensor), tensor, torch.ones_like(tensor))


def _holds(enclosure: Enclosure, exact: object) -> bool:
    with mp.workdps(oracles.DIGITS):
        own = mpf(10) ** (10 - oracles.DIGITS) * abs(exact)  # what the oracle itself may be off
        return mpf(enclosure.low) - own <= exact <= mpf(enclosure.high) + own


def _values(w: torch.Tensor) -> list[float]:
    return w.double().tolist()


def _is_finite(exact: object) -> bool:
    return exact < mpf(2) ** 1020


@settings(max_examples=60, deadline=None)
@given(tensors(), ORDERS)
def test_power_sums_and_quasinorms_are_enclosed(w: torch.Tensor, q: float) -> None:
    histogram = MagnitudeHistogram.of(w)
    with mp.workdps(oracles.DIGITS):
        total = oracles._power_sum(_values(w), q)
        norm = total ** (1 / mpf(q))
        assert histogram.size == w.numel()
        assert histogram.nonzeros == int(torch.count_nonzero(w))
        if _is_finite(total):
            assert _holds(histogram.power_sum(q), total)
        if _is_finite(norm):
            assert _holds(histogram.quasinorm(q), norm)
        if total:
            assert _holds(histogram.log_quasinorm(q), mp.log(norm))
        assert _holds(histogram.largest, mpf(max(map(abs, _values(w)))))


@settings(max_examples=60, deadline=None)
@given(tensors(), rising_orders(), st.floats(0.01, 0.99))
def test_indices_are_enclosed(w: torch.Tensor, orders: tuple[float, float], q: float) -> None:
    histogram, values = MagnitudeHistogram.of(w), _values(w)
    if not histogram.nonzeros:
        assert math.isnan(histogram.pq_index(*orders).low)
        assert math.isnan(histogram.sparsity_index(q).high)
        assert histogram.effective_count(*orders) == (0.0, 0.0)
        return
    assert _holds(histogram.pq_index(*orders), max(oracles.pq_index(values, *orders), mpf(0)))
    assert _holds(histogram.effective_count(*orders), oracles.effective_count(values, *orders))
    assert _holds(histogram.sparsity_index(q), oracles.sparsity_index(values, q))


@settings(max_examples=60, deadline=None)
@given(tensors(), st.data(), ORDERS)
def test_best_term_errors_are_enclosed(w: torch.Tensor, data: st.DataObject, p: float) -> None:
    k = data.draw(st.integers(0, w.numel()))
    exact = oracles.best_term_error(_values(w), k, p)
    if _is_finite(exact):
        assert _holds(MagnitudeHistogram.of(w).best_term_error(k, p), exact)


@settings(max_examples=60, deadline=None)
@given(st.lists(tensors(), min_size=1, max_size=4), st.data(), ORDERS)
def test_mixed_formats_are_enclosed(parts: list[torch.Tensor], data: st.DataObject, p: float) -> None:
    histogram = MagnitudeHistogram.total(map(MagnitudeHistogram.of, parts))
    values = [x for part in parts for x in _values(part)]
    k = data.draw(st.integers(0, len(values)))
    exact = oracles.best_term_error(values, k, p)
    if _is_finite(exact):
        assert _holds(histogram.best_term_error(k, p), exact)
    _check_threshold(histogram, values, k)


@settings(max_examples=60, deadline=None)
@given(tensors(), st.data())
def test_thresholds_retain_what_they_say(w: torch.Tensor, data: st.DataObject) -> None:
    _check_threshold(MagnitudeHistogram.of(w), _values(w), data.draw(st.integers(0, w.numel())))


def _check_threshold(histogram: MagnitudeHistogram, values: list[float], k: int) -> None:
    magnitudes = np.sort(np.abs(values))[::-1]
    cut = histogram.threshold(k)
    assert cut.above < k <= cut.above + cut.within or k == 0 == cut.above
    assert k == 0 or cut.low <= magnitudes[k - 1] <= cut.high
    assert cut.above <= np.count_nonzero(magnitudes > cut.high)
    assert np.count_nonzero(magnitudes >= cut.low) <= cut.above + cut.within
    if histogram.is_exact and k:
        assert cut.low == cut.high
        assert cut.above == np.count_nonzero(magnitudes > cut.high)
        assert cut.within == np.count_nonzero(magnitudes == cut.high)


@settings(max_examples=60, deadline=None)
@given(tensors(EXACT), st.data(), st.floats(0.2, 8.0))
def test_half_precision_is_exact_to_rounding(w: torch.Tensor, data: st.DataObject, q: float) -> None:
    histogram = MagnitudeHistogram.of(w)
    assert histogram.is_exact
    k = data.draw(st.integers(0, w.numel()))
    for low, high in (histogram.power_sum(q), histogram.quasinorm(q), histogram.best_term_error(k, q)):
        assert high - low <= 2.0**-40 * high or high < 1e-290


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4e-8), (torch.float64, 3e-6)])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_wider_formats_are_enclosed_as_tightly_as_documented(dtype: torch.dtype, width: float, q: float) -> None:
    w = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.02
    histogram = MagnitudeHistogram.of(w)
    low, high = histogram.power_sum(q)
    assert low <= float((w.double().abs() ** q).sum()) <= high
    assert high - low <= width * high
    for k in (0, 100, 50_000, 99_000):
        least, most = histogram.best_term_error(k, 2.0)
        exact = float(w.double().abs().sort().values[: 100_000 - k].square().sum().sqrt())
        assert least <= exact <= most
        assert most - least <= (20 * width + 2e-5) * most


def test_the_sum_of_float32_magnitudes_is_exact_to_rounding() -> None:
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    low, high = MagnitudeHistogram.of(w).power_sum(1.0)
    assert low <= math.fsum(abs(x) for x in w.tolist()) <= high <= low * (1 + 1e-14)


@settings(max_examples=40, deadline=None)
@given(st.lists(tensors(), min_size=1, max_size=5), st.randoms())
def test_merging_in_any_order_and_grouping_gives_the_same_bits(parts: list[torch.Tensor], random) -> None:
    histograms = [MagnitudeHistogram.of(part) for part in parts]
    whole = MagnitudeHistogram.total(histograms)
    while len(histograms) > 1:
        random.shuffle(histograms)
        histograms.append(histograms.pop().merge(histograms.pop()))
    assert histograms[0] == whole
    assert whole.merge(MagnitudeHistogram()) == whole
    assert whole.size == sum(part.numel() for part in parts)


@pytest.mark.parametrize("dtype", FORMATS)
def test_pieces_add_up_to_the_whole(dtype: torch.dtype) -> None:
    w = torch.randn(3, 400_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = MagnitudeHistogram.of(w)
    pieces = torch.split(w.flatten(), [7, 700_000, 1_200_000 - 700_007])
    assert MagnitudeHistogram.of_chunks(pieces) == whole
    assert MagnitudeHistogram.total(MagnitudeHistogram.of(piece) for piece in pieces) == whole


@settings(max_examples=40, deadline=None)
@given(tensors())
def test_sign_order_and_shape_are_ignored(w: torch.Tensor) -> None:
    histogram = MagnitudeHistogram.of(w)
    assert MagnitudeHistogram.of(-w.flip(0)) == histogram
    assert MagnitudeHistogram.of(w.reshape(-1, 1).t()) == histogram
    assert MagnitudeHistogram.of(torch.stack([w, w])[:, ::2].contiguous()[0]) == MagnitudeHistogram.of(w[::2])


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_bin_boundary_is_counted_where_it_belongs(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    w = torch.tensor([0.0, -0.0, 2.0**-24, 1.0, torch.finfo(dtype).tiny, largest, -largest], dtype=dtype)
    histogram = MagnitudeHistogram.of(w)
    assert (histogram.zeros, histogram.nonzeros) == (2, 5)
    assert histogram.largest.low <= largest == histogram.largest.high
    assert histogram.threshold(2).within == 2
    assert histogram.threshold(6) == (0.0, 0.0, 5, 2)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_zero_vector(dtype: torch.dtype) -> None:
    histogram = MagnitudeHistogram.of(torch.zeros(5, dtype=dtype))
    assert histogram.power_sum(0.5) == histogram.quasinorm(2.0) == histogram.best_term_error(3) == (0.0, 0.0)
    assert histogram.log_quasinorm(0.5) == (-math.inf, -math.inf)
    assert histogram.threshold(2) == (0.0, 0.0, 0, 5)


def test_the_empty_vector_is_the_identity_of_merging() -> None:
    empty = MagnitudeHistogram.of(np.zeros(0))
    assert empty == MagnitudeHistogram() == MagnitudeHistogram.total([])
    assert empty.size == 0
    assert empty.quasinorm(0.5) == empty.best_term_error(0) == empty.largest == (0.0, 0.0)
    assert empty.threshold(0) == (math.inf, math.inf, 0, 0)


def test_one_value_is_its_own_norm() -> None:
    histogram = MagnitudeHistogram.of(torch.tensor([0.0, 0.3], dtype=torch.float16))
    assert histogram.quasinorm(1e-3) == (float(torch.tensor(0.3, dtype=torch.float16)),) * 2
    assert histogram.sparsity_index(0.5) == histogram.effective_count(0.5, 1.0) == (1.0, 1.0)


def test_a_tail_far_below_the_largest_keeps_its_digits() -> None:
    w = torch.tensor([1.0] + [2.0**-120] * 9, dtype=torch.bfloat16)
    low, high = MagnitudeHistogram.of(w).best_term_error(1, 40.0)
    assert low <= 9 ** (1 / 40) * 2.0**-120 <= high <= low * (1 + 1e-13)


def test_what_exceeds_float64_is_an_error_and_its_logarithm_is_not() -> None:
    histogram = MagnitudeHistogram.of(np.full(100, 1e300))
    with pytest.raises(OverflowError, match=r"natural log is 1151\.\d+\). Choose a larger q"):
        histogram.quasinorm(0.01)
    with pytest.raises(OverflowError, match="exceeds float64"):
        histogram.power_sum(2.0)
    with pytest.raises(OverflowError, match="exceeds float64"):
        histogram.best_term_error(1, 0.01)
    low, high = histogram.log_quasinorm(0.01)
    assert low <= 100 * math.log(100) + 300 * math.log(10) <= high


def test_eight_bit_floats_integers_and_lists_are_widened() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        w = torch.tensor([0.0, 0.5, -3.5, 2.0**-9]).to(dtype)
        assert MagnitudeHistogram.of(w) == MagnitudeHistogram.of(w.to(torch.float16))
    assert MagnitudeHistogram.of([1, -2]) == MagnitudeHistogram.of(np.array([1.0, 2.0]))
    assert MagnitudeHistogram.of(np.arange(3, dtype=">f4")).nonzeros == 2
    read_only = np.ones(3)
    read_only.flags.writeable = False
    assert MagnitudeHistogram.of(read_only).size == 3


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_name_and_index(dtype: torch.dtype, bad: float) -> None:
    w = torch.zeros(3, 400_000, dtype=dtype)
    w[2, 5] = bad
    with pytest.raises(ValueError, match=rf"^Weight 'fc' holds {bad} at index \[2, 5\]\. Only finite"):
        MagnitudeHistogram.of(w, "Weight 'fc'")
    with pytest.raises(ValueError, match=r"at index \[2, 5\]"):
        MagnitudeHistogram.of_chunks([w.flatten()[600_000:]], shape=w.shape, start=600_000)


@pytest.mark.parametrize(
    "w",
    [np.array(["a"]), np.ones(2, dtype=complex), torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")],
)
def test_what_holds_no_real_numbers_is_refused(w: object) -> None:
    with pytest.raises(TypeError, match="w must be"):
        MagnitudeHistogram.of(w)


@pytest.mark.parametrize("k", [-1, 4])
def test_a_count_out_of_range_is_refused(k: int) -> None:
    histogram = MagnitudeHistogram.of(np.ones(3))
    with pytest.raises(ValueError, match=rf"k={k} is outside \[0, 3\]"):
        histogram.threshold(k)
    with pytest.raises(ValueError, match=rf"k={k} is outside \[0, 3\]"):
        histogram.best_term_error(k)
    with pytest.raises(TypeError, match="k must be a whole number"):
        histogram.threshold(1.0)  # type: ignore[arg-type]


def test_orders_out_of_range_are_refused() -> None:
    histogram = MagnitudeHistogram.of(np.ones(3))
    for call in (histogram.power_sum, histogram.quasinorm, histogram.log_quasinorm):
        with pytest.raises(ValueError, match="q=0 is not a finite positive order"):
            call(0.0)
    with pytest.raises(ValueError, match="outside"):
        histogram.sparsity_index(1.0)
    with pytest.raises(ValueError, match="p=2 is not below q=1"):
        histogram.pq_index(2.0, 1.0)
    with pytest.raises(ValueError, match="p=2 is not below q=1"):
        histogram.effective_count(2.0, 1.0)


def test_a_histogram_says_what_it_holds() -> None:
    histogram = MagnitudeHistogram.of(torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.bfloat16))
    assert repr(histogram) == "MagnitudeHistogram(4 entries, 1 zero; 2 bins of bfloat16)"


def test_a_zero_is_not_mistaken_for_a_subnormal() -> None:
    cut = MagnitudeHistogram.of(np.array([0.0, 3e-321])).threshold(1)
    assert (cut.above, cut.within) == (0, 1)
    assert 0 < cut.low <= 3e-321 <= cut.high
