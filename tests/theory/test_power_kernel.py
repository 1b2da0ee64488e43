"""The fast power sums: within their stated error of the exact ones, and far closer in practice."""

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from ellq.theory import power_kernel, power_sums
from ellq.theory.power_kernel import power_sums_error, power_sums_fast
from ellq.theory.workers import in_threads
from strategies import vectors

GRIDS = ([0.1 * i for i in range(1, 10)], [0.5, 1.0, 2.0], [0.3, 0.45, 0.7, 1.0], [0.05, 20.0], [1e-3, 8.0], [2.0])


def _relative_error(w: torch.Tensor, orders: list[float]) -> dict[float, float]:
    fast, slow = power_sums_fast(w, orders), power_sums(w.double().numpy(), orders)
    np.testing.assert_array_equal(fast.largest, slow.largest)
    np.testing.assert_array_equal(fast.exponent, slow.exponent)
    np.testing.assert_array_equal(fast.nonzeros, slow.nonzeros)
    np.testing.assert_array_equal(fast.size, slow.size)
    errors = {}
    for q in orders:
        present = slow.sums[q] > 0
        assert not fast.sums[q][~present].any()
        errors[q] = float(np.max(np.abs(fast.sums[q] / np.where(present, slow.sums[q], 1) - 1)[present], initial=0.0))
    return errors


@settings(max_examples=60, deadline=None)
@given(vectors(max_size=40), st.sampled_from(GRIDS), st.sampled_from(["float16", "bfloat16", "float32", "float64"]))
def test_sums_are_within_the_stated_error(w: np.ndarray, orders: list[float], name: str) -> None:
    tensor = torch.from_numpy(w).to(getattr(torch, name))
    tensor = torch.where(torch.isfinite(tensor), tensor, torch.ones_like(tensor))
    exponent = int(power_sums(tensor.double().numpy(), orders).exponent)
    wide = name == "float64" or max(orders) > 8
    slack = 1e-12  # of the float64 sums compared with
    for q, error in _relative_error(tensor, orders).items():
        assert error <= power_sums_error(tensor.numel(), q, exponent=exponent, wide=wide) + slack


@settings(max_examples=30, deadline=None)
@given(vectors(max_size=20), st.sampled_from([0.1, 0.5, 3.0]))
def test_float64_sums_agree_with_sixty_digits(w: np.ndarray, q: float) -> None:
    sums = power_sums_fast(w, [q])
    with oracles.mp.workdps(oracles.DIGITS):
        exact = oracles._power_sum(w, q) * oracles.mpf(2) ** (-oracles.mpf(q) * int(sums.exponent))
        error = power_sums_error(w.size, q, exponent=int(sums.exponent), wide=True)
        assert abs(oracles.mpf(float(sums.sums[q])) - exact) <= error * exact


@pytest.mark.parametrize("orders", GRIDS)
def test_long_float32_rows_are_closer_than_a_millionth(orders: list[float]) -> None:
    w = torch.randn(5, 20_003, generator=torch.Generator().manual_seed(0)) * 0.02
    assert max(_relative_error(w, orders).values()) < 1e-6


def test_rows_longer_than_a_block_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(7, 101, generator=torch.Generator().manual_seed(0))
    w[:, 90:] = 0
    whole = power_sums_fast(w, [0.25, 0.5])
    monkeypatch.setattr(power_kernel, "_BLOCK", 32)
    monkeypatch.setattr(power_kernel, "_TASK", 300)
    parts = power_sums_fast(w, [0.25, 0.5])
    np.testing.assert_array_equal(parts.nonzeros, whole.nonzeros)
    for q in (0.25, 0.5):
        np.testing.assert_allclose(parts.sums[q], whole.sums[q], rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_any_axis_of_arrays_and_tensors(axis: int) -> None:
    w = np.random.default_rng(0).normal(size=(3, 4, 5))
    for source in (w, torch.from_numpy(w), torch.from_numpy(w).transpose(0, 2).contiguous().transpose(0, 2)):
        fast, slow = power_sums_fast(source, [0.5, 1.0], axis), power_sums(w, [0.5, 1.0], axis)
        assert fast.sums[0.5].shape == slow.sums[0.5].shape
        np.testing.assert_allclose(fast.sums[0.5], slow.sums[0.5], rtol=1e-13)
        np.testing.assert_allclose(fast.quasinorm(1.0), slow.quasinorm(1.0), rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_extreme_scales_change_nothing(scale: float) -> None:
    w = np.random.default_rng(0).normal(size=100)
    fast = power_sums_fast(w * scale, [0.5]).quasinorm(0.5) / scale
    assert fast == pytest.approx(power_sums(w, [0.5]).quasinorm(0.5), rel=1e-12)


def test_zeros_subnormals_one_value_and_no_order() -> None:
    zero = power_sums_fast(torch.zeros(2, 3), [0.5])
    assert not zero.sums[0.5].any()
    assert not zero.nonzeros.any()
    tiny = torch.tensor([2.0**-149, 0.0, -(2.0**-140)])
    assert _relative_error(tiny, [0.5])[0.5] < 1e-5
    assert power_sums_fast(np.float32(3), [0.5]).quasinorm(0.5) == 3
    assert power_sums_fast([1.0, 2.0], []).sums == {}
    assert list(power_sums_fast([1.0], [2, 0.5, 2.0]).sums) == [2.0, 0.5]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w has no entries along axis -1 \(shape \(2, 0\)\)"):
        power_sums_fast(torch.zeros(2, 0), [0.5])
    for bad in (math.nan, math.inf):
        w = torch.zeros(2, 3, 4)
        w[1, 2, 3] = -bad
        with pytest.raises(ValueError, match=r"at index \[1, 2, 3\]\. Only finite"):
            power_sums_fast(w, [0.5])
    with pytest.raises(ValueError, match=r"nan at index \[1\]"):
        power_sums_fast([0.0, math.nan], [0.5])
    with pytest.raises(ValueError, match="order=0"):
        power_sums_fast([1.0], [0.0])
    for wrong in (np.array(["a"]), torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")):
        with pytest.raises(TypeError, match="w must be"):
            power_sums_fast(wrong, [0.5])


def test_no_rows_give_no_sums() -> None:
    assert power_sums_fast(torch.zeros(0, 3), [0.5]).sums[0.5].shape == (0,)


def test_threads_give_results_in_order_and_raise_where_they_would_come() -> None:
    before = torch.get_num_threads()
    assert list(in_threads(lambda i: i * i, range(100))) == [i * i for i in range(100)]
    seen: list[float] = []
    with pytest.raises(ZeroDivisionError):
        seen.extend(in_threads(lambda i: 1 / (5 - i), range(100), threads=3))
    assert len(seen) == 5
    inherited: list[int] = []
    later = threading.Thread(target=lambda: inherited.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert torch.get_num_threads() == before == inherited[0]
