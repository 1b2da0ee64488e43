from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from ellq.pruning import apply, plan, prune
from ellq.pruning.apply import finalize
from ellq.pruning.masks import maskable_weights
from pruned_nets import gaussian, mlp


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class TestWhatIsMasked:
    @pytest.mark.parametrize(
        ("layer", "names"),
        [
            (nn.Linear(3, 4), ["weight"]),
            (nn.Bilinear(2, 3, 4), ["weight"]),
            (nn.Conv1d(4, 4, 3, groups=2), ["weight"]),
            (nn.ConvTranspose2d(4, 6, 3, groups=2), ["weight"]),
            (nn.LSTM(3, 4, num_layers=2, proj_size=2), None),
            (nn.GRUCell(3, 4), ["weight_ih", "weight_hh"]),
            (nn.RNN(3, 4, bidirectional=True), None),
            (Attention(), ["attention.in_proj_weight", "attention.out_proj.weight"]),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_is_every_weight_of_the_layer_and_no_bias(self, layer, names):
        found = [weight.name for weight in maskable_weights(layer)]
        if names is None:
            names = [name for name, p in layer.named_parameters() if p.ndim == 2]
        assert found == names
        pruned = prune(layer, sparsity=0.25, refit="none")
        before, after = layer.state_dict(), pruned.state_dict()
        removed = sum(int((after[name] == 0).sum()) for name in names)
        assert removed == -(-sum(before[name].numel() for name in names) // 4)
        for name, value in before.items():
            if name not in names:
                assert torch.equal(value, after[name])
            else:
                kept = after[name] != 0
                assert torch.equal(value[kept], after[name][kept])

    def test_leaves_embeddings_norms_and_buffers(self):
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm((4, 4)), nn.BatchNorm1d(4))
        net.register_buffer("table", torch.ones(3, 3))
        pruned = prune(net, sparsity=0.5, refit="none")
        for name, value in net.state_dict().items():
            assert torch.equal(value, pruned.state_dict()[name]) == (name != "1.weight")

    @pytest.mark.parametrize("groups", [1, 2, 3])
    def test_units_of_a_transposed_convolution_are_output_channels(self, groups):
        layer = nn.ConvTranspose2d(6, 6, 2, groups=groups, bias=False)
        with torch.no_grad():
            layer.weight.copy_(gaussian(*layer.weight.shape, seed=groups))
        pruned = prune(layer, tol=0.4)
        impulse = torch.eye(6).reshape(6, 6, 1, 1)
        dense_maps, maps = layer(impulse), pruned(impulse)  # [input, output, row, column]
        for channel in range(6):
            dense_weights, weights = dense_maps[:, channel].flatten(), maps[:, channel].flatten()
            removed = (weights == 0) & (dense_weights != 0)
            assert removed.any()
            assert dense_weights[removed].abs().max() <= weights[weights != 0].abs().min()
            assert (dense_weights[removed].square().sum() / dense_weights.square().sum()).sqrt() <= 0.4

    def test_a_shared_weight_is_planned_once_and_stays_shared(self):
        net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6))
        net[2].weight = net[1].weight
        net[3].weight = net[0].weight  # a language model's head; its embedding follows
        pruned = prune(net, sparsity=0.5)
        assert [weight.name for weight in maskable_weights(net)] == ["1.weight", "3.weight"]
        assert pruned[2].weight is pruned[1].weight
        assert pruned[3].weight is pruned[0].weight
        assert int((pruned[1].weight == 0).sum() + (pruned[3].weight == 0).sum()) == 20

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    )
    def test_every_float_type_keeps_its_bits(self, dtype):
        layer = nn.Linear(8, 4)
        with torch.no_grad():
            layer.weight.copy_(gaussian(4, 8) * 1e-3)
        layer.weight = nn.Parameter(layer.weight.detach().to(dtype))
        layer.weight.data[0, 0] = torch.finfo(dtype).smallest_normal
        layer.weight.data[1:, 0] = -0.25
        pruned = prune(layer, sparsity=0.5, refit="none").weight
        assert pruned.dtype == dtype
        kept = pruned.double() != 0
        assert kept.sum() <= 16
        assert torch.equal(pruned.double()[kept], layer.weight.double()[kept])
        assert (pruned.double()[1:, 0] == -0.25).all()


class TestRefuses:
    @pytest.mark.parametrize(
        ("change", "advice"),
        [
            (lambda layer: torch_prune.l1_unstructured(layer, "weight", 2), r"prune\.remove"),
            (lambda layer: torch_prune.random_unstructured(layer, "bias", 1), r"prune\.remove"),
            (parametrizations.weight_norm, "remove_parametrizations"),
            (parametrizations.spectral_norm, "remove_parametrizations"),
            (nn.utils.spectral_norm, "remove_spectral_norm"),
        ],
    )
    def test_computed_weights_with_the_remedy(self, change, advice):
        net = mlp(4, 5, 2)
        change(net[2])
        with pytest.raises(ValueError, match=advice):
            prune(net, sparsity=0.5)

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: torch_prune.l1_unstructured(layer, "weight", 2),
            lambda layer: torch_prune.random_unstructured(layer, "bias", 1),
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            nn.utils.spectral_norm,
            lambda layer: apply(layer, plan(layer, sparsity=0.5, refit="none"), inplace=True),
        ],
    )
    @pytest.mark.parametrize("exclude", ["2", "2.weight", nn.Linear, "module"])
    def test_no_computed_weights_that_are_excluded(self, change, exclude):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv1d(3, 3, 2, bias=False), nn.Flatten(), nn.Linear(9, 2)).eval()
        change(net[2])
        inputs = gaussian(4, 3, 4)
        decided = plan(net, sparsity=0.5, refit="none", exclude=net[2] if exclude == "module" else exclude)
        assert decided.table["layer"].unique().tolist() == ["0.weight"]
        masked = apply(net, decided)
        assert int((masked[0].weight == 0).sum()) == 9
        features = masked[:2](inputs)
        torch.testing.assert_close(masked(inputs), net[2](features))
        for refit in ("none", "rescale", "synthetic", "least_squares"):
            pruned = prune(net, gaussian(50, 3, 4), sparsity=0.5, refit=refit, include="0")
            assert int((pruned[0].weight == 0).sum()) == 9

    def test_no_computed_weights_of_state_dicts_that_are_excluded(self):
        net = mlp(4, 5, 2)
        torch_prune.l1_unstructured(net[0], "weight", 2)
        pruned = prune(net.state_dict(), sparsity=0.5, exclude="0*")
        assert int((pruned["2.weight"] == 0).sum()) == 5
        assert torch.equal(pruned["0.weight_orig"], net[0].weight_orig)

    def test_a_plan_whose_layer_was_parametrised_since(self):
        net = mlp(4, 5, 2)
        decided = plan(net, sparsity=0.5)
        parametrizations.weight_norm(net[0])
        with pytest.raises(ValueError, match="Layer '0' is parametrised"):
            apply(net, decided)

    def test_layers_with_a_mask_of_ours_with_the_remedy(self):
        net = mlp(4, 5, 2)
        masked = apply(net, plan(net, sparsity=0.5))
        with pytest.raises(ValueError, match=r"'0' carries a mask already. Call ellq\.finalize"):
            plan(masked, sparsity=0.7)
        assert plan(finalize(masked), sparsity=0.7).sparsity >= 0.7

    def test_weight_norm_by_hook_with_the_remedy(self):
        net = mlp(4, 5, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(net[0])
        with pytest.raises(ValueError, match="remove_weight_norm"):
            prune(net, sparsity=0.5)

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: torch_prune.l1_unstructured(layer, "weight", 2),
            parametrizations.weight_norm,
            nn.utils.spectral_norm,
        ],
    )
    def test_their_state_dicts(self, change):
        net = mlp(4, 5, 2)
        change(net[0])
        with pytest.raises(ValueError, match="Bake it in"):
            prune(net.state_dict(), sparsity=0.5)

    def test_quantised_layers_even_beside_float_ones(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), {nn.Linear}, dtype=torch.qint8
            )
        with pytest.raises(ValueError, match="'0' is quantised"):
            prune(net, sparsity=0.5)

    def test_complex_weights(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r"'1\.weight' is quantised, sparse or complex"):
            prune(net, sparsity=0.5)

    def test_sparse_weights(self):
        with pytest.raises(ValueError, match="sparse"):
            prune({"w": torch.eye(4).to_sparse()}, sparsity=0.5)

    def test_weights_without_data(self):
        with pytest.raises(ValueError, match="no data"):
            prune(nn.Linear(4, 4, device="meta"), sparsity=0.5)
        with pytest.raises(ValueError, match="not initialised"):
            prune(nn.LazyLinear(4), sparsity=0.5)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_weights_that_are_not_finite_and_changes_none(self, value, inplace):
        net = mlp(4, 5, 2)
        with torch.no_grad():
            net[2].weight[0, 0] = value
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=r"'2\.weight' holds"):
            prune(net, sparsity=0.5, inplace=inplace)
        assert torch.equal(before["0.weight"], net[0].weight)

    @pytest.mark.parametrize("net", [nn.Sequential(nn.Embedding(4, 4)), nn.BatchNorm2d(3), nn.ReLU()])
    def test_a_model_with_nothing_to_mask(self, net):
        with pytest.raises(ValueError, match="holds no"):
            prune(net, sparsity=0.5)


class TestSharedMemory:
    """Tensors that are not one parameter and yet lie in the same memory."""

    def of(self, view) -> nn.Sequential:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
        net[2].weight.data = view(net[0].weight.data)
        return net

    @pytest.mark.parametrize("view", [lambda w: w, lambda w: w.t(), lambda w: w[1:2].expand(4, 4)])
    def test_is_refused_by_both_names(self, view):
        net = self.of(view)
        for name, other in (("0.weight", "2.weight"), ("2.weight", "0.weight")):
            with pytest.raises(
                ValueError, match=f"Weight '{name}' shares memory with '{other}' without being the same"
            ):
                plan(net, sparsity=0.5, include=[name, "3"])
        assert plan(net, sparsity=0.5, exclude=["0", "2"]).table["layer"].unique().tolist() == ["3.weight"]

    def test_with_what_is_not_planned_is_refused_too(self):
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        net[1].weight.data = net[0].weight.data
        with pytest.raises(ValueError, match=r"'1\.weight' shares memory with '0\.weight'"):
            prune(net, sparsity=0.5)
        net = nn.Linear(4, 4)
        net.register_buffer("row", net.weight.data[2])
        with pytest.raises(ValueError, match="'weight' shares memory with 'row'"):
            prune(net, sparsity=0.5)

    def test_in_a_state_dict_is_refused_unless_it_is_the_same_view(self):
        base = gaussian(4, 4)
        with pytest.raises(ValueError, match="'a' shares memory with 'b'"):
            prune({"a": base, "b": base.t()}, sparsity=0.5)
        pruned = prune({"a": base, "b": base[:]}, sparsity=0.5)
        assert torch.equal(pruned["a"], pruned["b"])

    def test_neighbours_in_one_storage_share_nothing(self):
        flat = gaussian(40)
        side_by_side = gaussian(4, 10)
        for first, second in (
            (flat[:16].reshape(4, 4), flat[16:32].reshape(4, 4)),
            (side_by_side[:, :4], side_by_side[:, 4:8]),
            (flat[0:32:2].reshape(4, 4), flat[1:33:2].reshape(4, 4)),
        ):
            net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            net[0].weight.data, net[1].weight.data = first, second
            assert int(sum((p == 0).sum() for p in prune(net, sparsity=0.5, refit="none").parameters())) == 16

    def test_of_gates_that_lie_in_one_buffer_is_none(self):
        layer = nn.LSTM(3, 4)
        flat = torch.cat([p.detach().flatten() for p in layer.parameters()])
        for p, part in zip(layer.parameters(), flat.split([p.numel() for p in layer.parameters()]), strict=True):
            p.data = part.view(p.shape)
        assert plan(layer, sparsity=0.5).sparsity >= 0.5


class TestStateDicts:
    def test_are_pruned_as_their_module(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).to(torch.float16)
        state = prune(net.state_dict(), sparsity=0.6)
        for name, value in prune(net, sparsity=0.6, refit="none").state_dict().items():
            assert torch.equal(value, state[name])
            assert value.dtype == state[name].dtype
        assert type(state) is type(net.state_dict())
        net.load_state_dict(state)

    def test_are_not_changed_unless_in_place(self):
        state = mlp(4, 5, 2).state_dict()
        before = copy.deepcopy(state)
        pruned = prune(state, sparsity=0.5)
        assert pruned is not state
        assert all(torch.equal(value, before[name]) for name, value in state.items())
        assert prune(state, sparsity=0.5, inplace=True) is state
        assert all(torch.equal(value, pruned[name]) for name, value in state.items())

    def test_keep_shared_tensors_shared(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        pruned = prune(net.state_dict(), sparsity=0.5)
        assert pruned["0.weight"].data_ptr() == pruned["1.weight"].data_ptr()
        assert int((pruned["0.weight"] == 0).sum()) == 8

    @pytest.mark.parametrize("writeable", [True, False])
    def test_may_hold_numpy_arrays(self, writeable):
        array = np.arange(1.0, 9.0, dtype=np.float32).reshape(2, 4)
        array.flags.writeable = writeable
        assert prune({"w": array}, sparsity=0.5)["w"].tolist() == [[0, 0, 0, 4], [0, 6, 7, 8]]
        assert array[0, 0] == 1.0
        if writeable:
            prune({"w": array}, sparsity=0.5, inplace=True)
            assert array[0, 0] == 0.0
        else:
            with pytest.raises(TypeError, match="read-only"):
                prune({"w": array}, sparsity=0.5, inplace=True)
