from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ellq.pruning import largest
from ellq.pruning.largest import count_largest, keep_largest, magnitudes, survey

RELAXED = settings(max_examples=40, deadline=None)
FEW = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 3.0, 5e-324, 1e300])
MANY = st.floats(-4, 4, width=16)


@st.composite
def layers(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
    kinds = st.sampled_from([np.float32, np.float64])
    elements = draw(st.sampled_from([FEW, MANY]))
    with np.errstate(over="ignore"):
        drawn = [draw(hnp.arrays(np.float64, shape, elements=elements)).astype(draw(kinds)) for shape in shapes]
    return [np.nan_to_num(layer, posinf=1e30) for layer in drawn]


def by_sorting(layers, retained, minima):
    """The same by one sort: each unit's minimum first, then the rest by size, layer, unit and entry."""
    order = []
    counts = [np.zeros(len(layer), dtype=int) for layer in layers]
    for number, layer in enumerate(layers):
        for unit, w in enumerate(layer):
            sizes = np.abs(w).astype(np.float64)
            ranks = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
            for entry, size in enumerate(sizes):
                is_free = ranks[entry] < minima[number][unit]
                order.append((not is_free, -size, number, unit, entry))
    for _, _, number, unit, _ in sorted(order)[:retained]:
        counts[number][unit] += 1
    return [c.tolist() for c in counts]


class TestCountLargest:
    @RELAXED
    @given(layers(), st.data())
    def test_equals_a_sort_whatever_the_path(self, drawn, data):
        minima = [data.draw(hnp.arrays(np.int64, len(w), elements=st.integers(0, w.shape[1]))) for w in drawn]
        held = sum(int(m.sum()) for m in minima)
        retained = data.draw(st.integers(held, sum(w.size for w in drawn)))
        expected = by_sorting(drawn, retained, minima)
        for pool, sample, block in [(2**19, 2**18, 2**20), (0, 3, 4), (3, 2, 1), (0, 100, 2**20)]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(largest, "_POOL", pool)
                patch.setattr(largest, "_SAMPLE", sample)
                patch.setattr(largest, "_BLOCK", block)
                found = count_largest(drawn, retained, minima=minima)
            assert [c.tolist() for c in found] == expected

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("retained", [0, 1, 777, 9_000, 30_000])
    def test_of_many_weights_is_what_topk_keeps(self, dtype, retained, monkeypatch):
        monkeypatch.setattr(largest, "_POOL", 500)
        monkeypatch.setattr(largest, "_SAMPLE", 1000)
        generator = torch.Generator().manual_seed(retained)
        drawn = [torch.randn(50, 300, generator=generator).to(dtype), torch.randn(30, 10, 50, generator=generator)]
        counts = count_largest(drawn, retained, minima=None)
        flat = torch.cat([w.double().abs().flatten() for w in drawn])
        chosen = torch.zeros(flat.numel(), dtype=torch.bool)
        chosen[torch.argsort(flat, descending=True, stable=True)[:retained]] = True
        expected = [*chosen[:15_000].view(50, 300).sum(1).tolist(), *chosen[15_000:].view(30, 500).sum(1).tolist()]
        assert np.concatenate(counts).tolist() == expected

    def test_of_equal_weights_keeps_the_first_units(self, monkeypatch):
        monkeypatch.setattr(largest, "_POOL", 10)
        counts = count_largest([np.ones((5, 20)), np.ones((3, 20))], 130, minima=None)
        assert np.concatenate(counts).tolist() == [20, 20, 20, 20, 20, 20, 10, 0]

    def test_of_a_mostly_zero_model_keeps_the_others_and_then_the_first_zeros(self, monkeypatch):
        monkeypatch.setattr(largest, "_POOL", 10)
        w = np.zeros((4, 50), dtype=np.float32)
        w[2, ::10] = 1.0
        assert count_largest([w], 8, minima=None)[0].tolist() == [3, 0, 5, 0]

    def test_takes_no_memory_that_grows_with_the_layers(self):
        rng = np.random.default_rng(0)
        drawn = [rng.standard_normal((1024, 2048), dtype=np.float32) for _ in range(3)]
        count_largest(drawn, 10, minima=None)
        peaks = []
        for n in (1, 3):
            tracemalloc.start()
            count_largest(drawn[:n], n * 200_000, minima=None)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert max(peaks) < 45e6
        assert peaks[1] < 1.5 * peaks[0]


class TestKeepLargest:
    @RELAXED
    @given(st.data())
    def test_keeps_exactly_the_largest_and_the_first_of_equal_ones(self, data):
        shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 6)))
        units = data.draw(hnp.arrays(np.float64, shape, elements=FEW))
        retained = data.draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, shape[1])))
        kept = keep_largest(units, retained).numpy()
        for w, k, mask in zip(np.abs(units), retained, kept, strict=True):
            expected = np.zeros(len(w), dtype=bool)
            expected[np.argsort(-w, kind="stable")[:k]] = True
            assert mask.tolist() == expected.tolist()

    def test_keeps_the_first_of_equal_weights(self):
        kept = keep_largest(np.resize([1.0, -1.0], (2, 500)), np.array([2, 300])).numpy()
        np.testing.assert_array_equal(kept, np.arange(500) < np.array([[2], [300]]))


class TestSurvey:
    @pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
    def test_gives_the_norm_at_any_scale(self, scale):
        w = np.array([[3.0, 0.0], [0.0, 4.0]]) * scale
        found = survey(w, "w")
        assert found.nonzeros.tolist() == [1, 1]
        assert found.norm * 2.0**found.exponent == pytest.approx(5 * scale, rel=1e-14)

    def test_of_tiny_and_huge_float32(self):
        for scale in (1e-44, 3e38):
            found = survey(torch.full((2, 2), scale), "w")
            assert found.norm == pytest.approx(2 * float(np.float32(scale)))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_refuses_what_is_not_finite_by_name_and_place(self, value, dtype):
        w = torch.ones(3, 4, dtype=dtype)
        w[1, 2] = value
        with pytest.raises(ValueError, match=r"Weight 'fc' holds .* at index \[1, 2\]"):
            survey(w, "fc")


def test_magnitudes_come_as_rows_of_any_layout(monkeypatch):
    monkeypatch.setattr(largest, "_BLOCK", 30)
    w = torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last)
    joined = np.concatenate([block for _, block in magnitudes(w)])
    np.testing.assert_array_equal(joined, w.abs().reshape(5, 12).numpy())
    frozen = np.arange(6.0).reshape(2, 3)
    frozen.flags.writeable = False
    assert next(magnitudes(frozen))[1].tolist() == [[0, 1, 2], [3, 4, 5]]
