import math
import subprocess
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from ellq.theory import (
    best_term_errors,
    effective_count,
    lq_quasinorm,
    power_sums,
    pq_index,
    sparsity_index,
    stechkin_bound,
    unit_error_observed,
)
from ellq.theory.arguments import (
    finite_array,
    is_tensor,
    order_or_infinity,
    refuse_mixed_devices,
    tensor_for_tensor,
)
from ellq.theory.matrix_measures import effective_rank, participation_rank, stable_rank
from ellq.theory.measures import (
    entropy_effective_count,
    gini,
    hoyer,
    is_softly_sparse,
    l0_count,
    normalised_sparsity_index,
    numerical_sparsity,
    tail_index,
    weak_quasinorm,
)

EVERY = {
    "lq_quasinorm": lambda w: lq_quasinorm(w, 0.5),
    "largest": lambda w: lq_quasinorm(w, math.inf),
    "l0_count": l0_count,
    "weak_quasinorm": lambda w: weak_quasinorm(w, 0.5),
    "sparsity_index": lambda w: sparsity_index(w, 0.5),
    "normalised_sparsity_index": lambda w: normalised_sparsity_index(w, 0.5),
    "pq_index": lambda w: pq_index(w, 0.5, 1.0),
    "effective_count": lambda w: effective_count(w, 1.0, 2.0),
    "numerical_sparsity": numerical_sparsity,
    "entropy_effective_count": entropy_effective_count,
    "hoyer": hoyer,
    "gini": gini,
    "tail_index": lambda w: tail_index(w, 2),
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
    "participation_rank": participation_rank,
}
each_measure = pytest.mark.parametrize("measure", EVERY.values(), ids=EVERY)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOATS += [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")]


def weights():
    return np.random.default_rng(0).normal(size=(4, 6))


# --- tensors as arrays ----------------------------------------------------------------------------------------------


@each_measure
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_tensor_of_any_float_type_measures_as_its_values_in_float64(measure, dtype):
    tensor = torch.from_numpy(weights()).to(dtype)
    answer = measure(tensor)
    assert isinstance(answer, torch.Tensor)
    assert answer.dtype == torch.float64
    assert answer.device == tensor.device
    np.testing.assert_array_equal(answer.numpy(), measure(tensor.double().numpy()))


@each_measure
def test_a_parameter_measures_without_its_gradient(measure):
    parameter = torch.nn.Parameter(torch.from_numpy(weights()))
    answer = measure(parameter)
    assert not answer.requires_grad
    assert type(answer) is torch.Tensor
    np.testing.assert_array_equal(answer.numpy(), measure(weights()))


@each_measure
def test_arrays_and_lists_are_answered_with_float64_arrays(measure):
    for w in (weights(), weights().tolist()):
        answer = measure(w)
        assert isinstance(answer, np.ndarray)
        assert answer.dtype == np.float64


@each_measure
def test_the_answer_shares_no_memory_with_the_weights(measure):
    tensor = torch.from_numpy(weights())
    measure(tensor).fill_(0.0)
    np.testing.assert_array_equal(tensor.numpy(), weights())


def test_membership_of_a_tensor_is_a_boolean_tensor():
    inside = is_softly_sparse(torch.eye(2), 1.0, 0.5)
    assert inside.dtype == torch.bool
    assert inside.tolist() == [True, True]


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.t,
        lambda w: w[::2, 1:],
        lambda w: w.to_sparse(),
        lambda w: w.to_sparse_csr(),
        lambda w: torch.complex(torch.zeros_like(w), w).conj().imag,
        lambda w: w.expand(2, 4, 6),
    ],
    ids=["transposed", "strided", "COO", "CSR", "lazily negated", "expanded"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_tensor_of_any_layout_holds_its_values(change):
    tensor = change(torch.from_numpy(weights()))
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    np.testing.assert_array_equal(finite_array(tensor, "w"), dense.resolve_neg().numpy())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64], ids=str)
def test_whole_numbers_and_booleans_are_numbers(dtype):
    assert lq_quasinorm(torch.tensor([1, 0, 1]).to(dtype), 1.0) == 2


def test_functions_that_take_arrays_take_tensors():
    w, X = weights()[0], weights()
    tensor = torch.tensor(w, requires_grad=True)
    assert stechkin_bound(tensor, 2, q=0.5) == stechkin_bound(w, 2, q=0.5)
    np.testing.assert_array_equal(best_term_errors(tensor), best_term_errors(w))
    assert unit_error_observed(tensor, torch.from_numpy(X)) == unit_error_observed(w, X)
    assert power_sums(tensor, (0.5,)).quasinorm(0.5) == power_sums(w, (0.5,)).quasinorm(0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@each_measure
def test_a_tensor_on_an_accelerator_is_answered_there(measure):
    tensor = torch.from_numpy(weights()).cuda()
    answer = measure(tensor)
    assert answer.device == tensor.device
    np.testing.assert_array_equal(answer.cpu().numpy(), measure(weights()))


def test_measuring_arrays_does_not_load_torch():
    script = (
        "import sys; from ellq.theory.measures import gini; from ellq.theory.matrix_measures import stable_rank;"
        " gini([1.0, 2.0]), stable_rank([[1.0]]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_only_torch_tensors_are_tensors():
    assert is_tensor(torch.ones(1))
    assert is_tensor(torch.nn.Parameter(torch.ones(1)))
    assert not any(is_tensor(value) for value in (np.ones(1), [1.0], 1.0, None, torch))


# --- what cannot be measured ----------------------------------------------------------------------------------------


@each_measure
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [np.array, torch.tensor, lambda w: torch.tensor(w, dtype=torch.bfloat16)])
def test_an_entry_that_is_not_finite_is_named(measure, bad, make):
    w = weights().tolist()
    w[2][3] = bad
    with pytest.raises(ValueError, match=rf"[wW] holds {bad} at index \[2, 3\], 1 such"):
        measure(make(w))


@pytest.mark.parametrize("bad", [torch.tensor([1 + 1j]), torch.ones(2, device="meta")], ids=["complex", "meta"])
def test_a_tensor_without_real_values_is_a_type_error(bad):
    with pytest.raises(TypeError, match=r"weights.*(complex64|meta device)"):
        finite_array(bad, "weights")


def test_quantised_and_nested_tensors_are_type_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(TypeError, match="qint8"):
        finite_array(quantised, "w")
    with pytest.raises(TypeError, match="nested"):
        finite_array(nested, "w")


def test_a_float_type_torch_cannot_widen_is_a_type_error():
    packed = getattr(torch, "float4_e2m1fn_x2", None)
    if packed is None:
        pytest.skip("this torch has no packed floats")
    with pytest.raises(TypeError, match="float4"):
        finite_array(torch.zeros(4, dtype=torch.uint8).view(packed), "w")


@pytest.mark.parametrize("bad", [["a"], [None], [1j], np.array([Fraction(1, 2)]), np.array(["2020"], "datetime64[D]")])
def test_what_is_not_a_real_number_is_a_type_error(bad):
    with pytest.raises(TypeError, match="real numbers"):
        finite_array(bad, "w")


def test_masked_entries_are_refused_and_an_idle_mask_is_not():
    with pytest.raises(ValueError, match="masked"):
        finite_array(np.ma.masked_array([1.0, 2.0], [True, False]), "w")
    np.testing.assert_array_equal(finite_array(np.ma.masked_array([1.0, 2.0]), "w"), [1.0, 2.0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble, ">f8", ">f4", np.int16, bool])
def test_numpy_types_become_native_float64(dtype):
    array = finite_array(np.array([1, 0, 1], dtype=dtype), "w")
    assert array.dtype == np.float64
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, [1.0, 0.0, 1.0])


def test_a_longdouble_beyond_float64_is_refused_not_rounded_to_infinity():
    if np.finfo(np.longdouble).max == np.finfo(np.float64).max:
        pytest.skip("longdouble is float64 here")
    with pytest.raises(ValueError, match=r"inf at index \[1\]"):
        finite_array(np.array([1, 1e300], dtype=np.longdouble) ** 2, "w")


def test_dimensions_are_checked_of_tensors_too():
    with pytest.raises(ValueError, match="w has 2 dimensions, expected 1"):
        finite_array(torch.ones(2, 2), "w", ndim=1)


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="axis=2 is outside"):
        gini(np.ones((2, 2)), axis=2)


# --- devices --------------------------------------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says it is on an accelerator."""

    device = property(lambda self: torch.device("cuda:1"))


def test_tensors_on_two_devices_are_refused_by_name():
    here, there = torch.ones(2), torch.ones(2).as_subclass(OnGpu)
    with pytest.raises(ValueError, match=r"removed is on cpu but inputs is on cuda:1\. Move them to one device"):
        refuse_mixed_devices(removed=here, scale=2.0, inputs=there)
    with pytest.raises(ValueError, match="meta"):
        refuse_mixed_devices(a=here, b=here, c=torch.ones(1, device="meta"))


def test_tensors_on_one_device_may_mix_with_arrays():
    there = torch.ones(2).as_subclass(OnGpu)
    refuse_mixed_devices(a=there, b=np.ones(2), c=there, d=[1.0])
    refuse_mixed_devices(a=np.ones(2), b=None)
    refuse_mixed_devices()


def test_where_the_device_has_no_float64_the_answer_is_on_the_cpu():
    class OnApple(torch.Tensor):
        device = property(lambda self: torch.device("mps"))

    answer = tensor_for_tensor(lambda w: np.ones(1))(torch.ones(2).as_subclass(OnApple))
    assert answer.device.type == "cpu"
    assert answer.dtype == torch.float64


# --- orders ---------------------------------------------------------------------------------------------------------


def test_infinity_is_an_order_where_allowed():
    assert order_or_infinity(math.inf) == math.inf
    assert order_or_infinity(Fraction(1, 2)) == 0.5
    for bad in (0.0, -1.0, -math.inf, 1e-9, 501.0, math.nan):
        with pytest.raises(ValueError, match="q"):
            order_or_infinity(bad)


def test_the_wrapper_keeps_name_and_documentation():
    assert gini.__name__ == "gini"
    assert gini.__doc__.startswith("Return the Gini index")
    assert gini(w=[1.0, 3.0]) == gini([1.0, 3.0])
