"""Weights: what counts as one, along which axis its units lie, and that reading changes nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ellq.analysis.weights import WeightMatrix, weight_matrices


def _read(source: Any) -> dict[str, WeightMatrix]:
    return {weight.name: weight for weight in weight_matrices(source)}


def _quantised(tensor: torch.Tensor, *, per_channel: bool) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates making them; models that hold them remain
        if per_channel:
            scales, zeros = torch.full((len(tensor),), 0.1), torch.zeros(len(tensor), dtype=torch.long)
            return torch.quantize_per_channel(tensor, scales, zeros, 0, torch.qint8)
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    ("module", "name", "units", "entries"),
    [
        (nn.Linear(3, 4), "weight", 4, 3),
        (nn.Conv2d(4, 6, 3, groups=2), "weight", 6, 18),
        (nn.Conv1d(4, 6, 5), "weight", 6, 20),
        (nn.Embedding(7, 5), "weight", 7, 5),
        (nn.Bilinear(2, 3, 4), "weight", 4, 6),
        (nn.LSTM(3, 5), "weight_ih_l0", 20, 3),
        (nn.LSTM(3, 5), "weight_hh_l0", 20, 5),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", 12, 4),
        (nn.ConvTranspose1d(4, 6, 5, groups=2), "weight", 6, 10),
        (nn.ConvTranspose3d(2, 3, 2), "weight", 3, 16),
    ],
)
def test_units_are_rows_filters_embeddings_gates_and_output_channels(
    module: nn.Module, name: str, units: int, entries: int
) -> None:
    weight = _read(module)[name]
    assert weight.units.shape == (units, entries)
    assert weight.units.dtype == np.float64
    assert weight.shape == tuple(module.get_parameter(name).shape)
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose3d):
        assert np.array_equal(weight.units, module.get_parameter(name).detach().double().numpy().reshape(units, -1))


@settings(max_examples=20, deadline=None)
@given(groups=st.integers(1, 3), inputs=st.integers(1, 3), outputs=st.integers(1, 3))
def test_a_unit_of_a_transposed_convolution_makes_exactly_its_output_channel(
    groups: int, inputs: int, outputs: int
) -> None:
    module = nn.ConvTranspose2d(groups * inputs, groups * outputs, 2, groups=groups, bias=False)
    units = _read(module)["weight"].units
    for unit in range(groups * outputs):
        # Only the weights that output channel `unit` depends on have a gradient.
        module.zero_grad()
        module(torch.ones(1, groups * inputs, 1, 1))[0, unit].sum().backward()
        assert module.weight.grad is not None
        used = module.weight.detach()[module.weight.grad != 0].double().numpy()
        assert np.array_equal(np.sort(used), np.sort(units[unit]))


def test_a_transposed_convolution_in_a_state_dict_is_read_along_its_first_axis() -> None:
    assert _read(nn.ConvTranspose2d(4, 6, 3).state_dict())["weight"].units.shape == (4, 54)


def test_layers_come_in_the_order_of_the_model_and_vectors_are_passed_over() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for source in (model, model.state_dict()):
        weights = weight_matrices(source)
        assert weights.names == ("0.weight", "2.weight")
        assert len(weights) == 2
        assert not weights.skipped
        assert not weights.tied


def test_a_parametrised_weight_is_the_effective_one() -> None:
    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain = model[0].weight.detach().clone()
    parametrize.register_parametrization(model[0], "weight", Double())
    weights = _read(model)
    assert list(weights) == ["0.weight", "1.weight"]
    assert np.array_equal(weights["0.weight"].units, 2 * plain.double().numpy())


def test_a_parametrised_weight_in_a_state_dict_is_skipped_with_the_reason() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    weights = weight_matrices(model.state_dict())
    assert weights.names == ("1.weight",)
    assert set(weights.skipped) == {
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    }
    assert all("pass the model" in reason for reason in weights.skipped.values())


def test_reading_spectral_norm_in_training_mode_changes_nothing() -> None:
    model = parametrizations.spectral_norm(nn.Linear(5, 4)).train()
    before = copy.deepcopy(model.state_dict())
    weight_matrices(model)
    assert np.array_equal(_read(model)["weight"].units, _read(model)["weight"].units)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("as_state", [False, True])
def test_a_pruned_weight_is_the_masked_product(as_state: bool) -> None:
    layer = nn.Linear(6, 4)
    prune.random_unstructured(layer, "weight", amount=0.5)
    prune.random_unstructured(layer, "bias", amount=0.5)
    model = nn.Sequential(layer)
    weights = weight_matrices(model.state_dict() if as_state else model)
    (weight,) = weights
    assert weight.name == "0.weight"
    assert np.array_equal(weight.units, layer.weight.detach().double().numpy())
    assert np.count_nonzero(weight.units) == 12
    assert not weights.skipped


@pytest.mark.parametrize("as_state", [False, True])
def test_weight_norm_by_hook_is_rescaled(as_state: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in many checkpoints
        layer = nn.utils.weight_norm(nn.Conv1d(3, 4, 2))
    with torch.no_grad():
        layer.weight_g.mul_(3)
    layer(torch.ones(1, 3, 5))
    weights = _read(layer.state_dict() if as_state else layer)
    assert list(weights) == ["weight"]
    assert np.allclose(weights["weight"].units, layer.weight.detach().double().numpy().reshape(4, -1))


def test_gates_and_values_that_only_look_like_weight_norm_are_weights() -> None:
    assert list(_read({"w_g": torch.ones(2, 2), "w_v": torch.ones(2, 2)})) == ["w_g", "w_v"]


def test_a_mask_beside_the_weight_itself_is_not_multiplied_again() -> None:
    state = {"w": torch.ones(2, 2), "w_orig": torch.ones(2, 2), "w_mask": torch.zeros(2, 2)}
    assert list(_read(state)) == ["w", "w_orig", "w_mask"]


def test_spectral_norm_by_hook_is_skipped_with_the_reason() -> None:
    layer = nn.utils.spectral_norm(nn.Linear(3, 4))
    weights = weight_matrices(nn.Sequential(layer, nn.Linear(4, 2)))
    assert weights.names == ("1.weight",)
    assert "spectral norm" in weights.skipped["0.weight"]


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_every_float_format_is_widened_exactly(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.5, -2.0], [0.0, 0.25]])
    assert np.array_equal(_read({"w": values.to(dtype)})["w"].units, values.double().numpy())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_numpy_arrays_are_weights_too(dtype: Any) -> None:
    assert np.array_equal(_read({"w": np.eye(3, dtype=dtype)})["w"].units, np.eye(3))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_layouts_are_filled_with_a_note(layout: torch.layout) -> None:
    weight = _read({"w": torch.eye(3).to_sparse(layout=layout)})["w"]
    assert np.array_equal(weight.units, np.eye(3))
    assert weight.note == f"filled from layout {str(layout).removeprefix('torch.')}"


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_tensors_are_dequantised_with_a_note(per_channel: bool) -> None:
    weight = _read({"w": _quantised(torch.eye(3), per_channel=per_channel)})["w"]
    assert np.allclose(weight.units, np.eye(3))
    assert weight.note == f"dequantised from {'qint8' if per_channel else 'quint8'}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_state", [False, True])
def test_quantised_modules_are_dequantised(as_state: bool) -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    weights = _read(model.state_dict() if as_state else model)
    assert list(weights) == ["0.weight", "2.weight"]
    assert np.allclose(weights["0.weight"].units, plain[0].weight.detach().double().numpy(), atol=0.01)
    assert all(weight.note == "dequantised from qint8" for weight in weights.values())


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_convolution_is_dequantised() -> None:
    conv = torch.ao.nn.quantized.Conv2d(2, 3, 1)
    conv.set_weight_bias(_quantised(torch.ones(3, 2, 1, 1), per_channel=True), None)
    assert np.allclose(_read(nn.Sequential(conv))["0.weight"].units, 1)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_recurrent_net_is_skipped_with_the_reason() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM})
    weights = weight_matrices(nn.ModuleList([model, nn.Linear(2, 2)]))
    assert weights.names == ("1.weight",)
    assert "packed" in weights.skipped["0.0"]


def test_what_might_be_taken_for_a_weight_is_skipped_with_the_reason() -> None:
    state = {
        "w": torch.ones(2, 2),
        "count": torch.ones(2, 2, dtype=torch.long),
        "flag": torch.ones(2, 2, dtype=torch.bool),
        "wave": torch.ones(2, 2, dtype=torch.complex64),
        "names": np.array([["a"]]),
        "epoch": 3,
        "nested": {"w": torch.ones(2, 2)},
        "steps": torch.tensor(3),
    }
    skipped = weight_matrices(state).skipped
    assert set(skipped) == {"count", "flag", "wave", "names", "epoch", "nested"}
    assert "int64" in skipped["count"]
    assert skipped["nested"] == "dict, not a tensor"


def test_the_buffers_of_a_model_are_no_weights() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.ones(3, 3))
    model.register_buffer("cache", torch.ones(3, 3), persistent=False)
    weights = weight_matrices(model)
    assert weights.names == ("weight",)
    assert weights.skipped == {"table": "a buffer, not a parameter"}


def test_tied_weights_are_read_once_and_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.again = self.head

    model = Tied()
    for source in (model, model.state_dict(), {n: v.numpy() for n, v in model.state_dict().items()}):
        weights = weight_matrices(source)
        assert weights.names == ("embed.weight",)
        assert weights.tied == {"head.weight": "embed.weight", "again.weight": "embed.weight"}


def test_a_shared_parametrised_or_pruned_layer_is_read_once() -> None:
    pruned, normed = nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3))
    prune.l1_unstructured(pruned, "weight", amount=0.3)
    weights = weight_matrices(nn.Sequential(pruned, normed, pruned, normed))
    assert weights.names == ("0.weight", "1.weight")
    assert weights.tied == {"2.weight": "0.weight", "3.weight": "1.weight"}


def test_other_views_of_the_same_memory_are_not_tied() -> None:
    whole = torch.arange(1.0, 5.0).reshape(2, 2)
    assert len(weight_matrices({"a": whole, "b": whole.T, "c": whole[:1]})) == 3


def test_a_mapping_that_makes_its_values_afresh_ties_nothing() -> None:
    buffer = torch.empty(2, 2)

    class Fresh(dict[str, Any]):  # as a reader that reuses its buffer
        def __getitem__(self, name: str) -> torch.Tensor:
            return buffer.fill_(float(len(name))).view(2, 2)

    weights = _read(Fresh(a=None, bb=None, ccc=None))
    assert {name: weight.units[0, 0] for name, weight in weights.items()} == {"a": 1, "bb": 2, "ccc": 3}


def test_reading_is_lazy() -> None:
    asked: list[str] = []

    class Watched(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            asked.append(name)
            return super().__getitem__(name)

    weights = weight_matrices(Watched(a=torch.ones(2, 2), b=torch.ones(2, 2)))
    asked.clear()
    next(iter(weights))
    assert asked == ["a"]


def test_the_argument_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 4)), nn.Dropout())
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert len(list(weight_matrices(model))) == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_writing_into_a_matrix_leaves_a_float64_model_alone() -> None:
    model = nn.Linear(3, 3, dtype=torch.float64)
    before = model.weight.detach().clone()
    for weight in weight_matrices(model):
        with pytest.raises(ValueError, match="read-only"):
            weight.units[:] = 0
    assert torch.equal(model.weight, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_read_like_its_source() -> None:
    plain = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(3, 4))
    scripted = _read(torch.jit.script(plain))
    for name, weight in _read(plain).items():
        assert np.array_equal(scripted[name].units, weight.units)


def test_data_parallel_is_read_like_what_it_wraps() -> None:
    assert list(_read(nn.DataParallel(nn.Linear(2, 2)))) == ["module.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named_with_its_index(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(2, 3, 2, dtype=dtype)
    tensor[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"'conv\.w' holds .* at index \[1, 2, 0\]"):
        _read({"conv.w": tensor})


def test_a_weight_without_data_is_named() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    for source in (model, model.state_dict(), nn.Sequential(parametrizations.weight_norm(model[0]))):
        with pytest.raises(ValueError, match=r"'0\.weight' has no data \(device meta\)\. Load the weights first"):
            weight_matrices(source)


def test_an_uninitialised_weight_is_named() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    for source in (model, model.state_dict()):
        with pytest.raises(ValueError, match=r"'0\.weight' is not initialised\. Run one forward pass first"):
            weight_matrices(source)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_entries_is_named_with_its_shape() -> None:
    for source in (nn.Linear(0, 3), {"weight": np.ones((3, 0))}):
        with pytest.raises(ValueError, match=r"'weight' has no entries \(shape \(3, 0\)\)"):
            weight_matrices(source)


@pytest.mark.parametrize("source", [{}, nn.ReLU(), {"bias": torch.ones(3)}, {"n": torch.ones(2, 2).long()}])
def test_a_source_without_a_weight_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="model holds no weight matrix"):
        weight_matrices(source)


@pytest.mark.parametrize("source", [None, 3, [torch.ones(2, 2)], torch.ones(2, 2), np.ones((2, 2)), nn.Linear])
def test_another_argument_is_refused_by_type(source: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a state dict"):
        weight_matrices(source)


def test_a_path_is_sent_to_the_reader() -> None:
    with pytest.raises(TypeError, match=r"ellq\.read_checkpoint\(path\)"):
        weight_matrices("model.pt")  # type: ignore[arg-type]


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="Names in a state dict must be strings, got int 3"):
        weight_matrices({3: torch.ones(2, 2)})  # type: ignore[dict-item]


def test_biases_of_attention_that_have_three_dimensions_are_no_weights():
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert attention.bias_k is not None
    assert weight_matrices(attention).names == ("in_proj_weight", "out_proj.weight")


@pytest.mark.parametrize(
    ("module", "name", "note"),
    [
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "units 0–3 query, 4–7 key, 8–11 value"),
        (nn.LSTM(3, 2), "weight_hh_l0", "units 0–1 input gate, 2–3 forget gate, 4–5 cell, 6–7 output gate"),
        (nn.GRUCell(3, 2), "weight_ih", "units 0–1 reset gate, 2–3 update gate, 4–5 new"),
        (nn.RNN(3, 2), "weight_ih_l0", ""),
        (nn.MultiheadAttention(4, 2, kdim=3), "q_proj_weight", ""),
    ],
)
def test_says_which_units_are_which_projection_or_gate(module, name, note):
    assert {weight.name: weight.note for weight in weight_matrices(module)}[name] == note
