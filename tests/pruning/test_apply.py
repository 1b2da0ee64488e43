from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.testing import assert_close

from ellq.analysis import cost
from ellq.pruning import Plan, apply, chain_bounds, load, plan, save
from ellq.pruning.apply import finalize
from ellq.pruning.mask_parametrization import is_masked, masks_of
from pruned_nets import assert_unchanged, gaussian, mlp, same_bits, snapshot


class Scale(nn.Module):
    """A parametrisation of somebody else."""

    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


class Net(nn.Module):
    """Tied weights across kinds and levels, a frozen layer, hooks, modes that differ, parameters of its own."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(gaussian(3, 3))
        self.embedding = nn.Embedding(7, 6)
        self.blocks = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False))
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.blocks[0].weight
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embedding.weight
        self.scaled = nn.Linear(6, 6).requires_grad_(False)
        self.extra = nn.BatchNorm1d(6)
        parametrize.register_parametrization(self.extra, "weight", Scale())

    def forward(self, x):
        x = self.extra(self.blocks(self.embedding(x)))
        return self.head(self.scaled(torch.tanh(self.twin(x))))


def make() -> Net:
    net = Net()
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(gaussian(*parameter.shape, seed=number))
    net.train()
    net.extra.eval()
    net.blocks[0].register_forward_hook(lambda *_: None)
    net.twin.register_forward_pre_hook(lambda *_: None)
    return net


TOKENS = torch.tensor([0, 3, 6, 2])


def shape_of(net: nn.Module) -> dict:
    """All that finalising must give back."""
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    first = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    return {
        "names": names,
        "state": list(net.state_dict()),
        "order": [list(module._parameters) for module in net.modules()],
        "children": [list(module._modules) for module in net.modules()],
        "ties": [first[id(p)] for _, p in net.named_parameters(remove_duplicate=False)],
        "grads": [p.requires_grad for _, p in net.named_parameters(remove_duplicate=False)],
        "modes": [module.training for module in net.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
        "attributes": [sorted(vars(module)) for module in net.modules()],
        "types": [str(type(module)) for module in net.modules()],
    }


class TestFinalize:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_gives_back_the_module_that_was_with_zeros_in_place(self, inplace):
        net = make()
        before = shape_of(net)
        decided = plan(net, sparsity=0.6, refit="none")
        masked = apply(net, decided)
        assert is_masked(masked)
        assert not is_masked(net)
        found = finalize(masked, inplace=inplace)
        assert (found is masked) == inplace
        assert is_masked(masked) != inplace
        assert shape_of(found) == before
        assert type(found.twin) is nn.Linear
        assert type(found) is Net
        assert found.head.weight is found.embedding.weight
        assert found.twin.weight is found.blocks[0].weight
        for name in dict.fromkeys(decided.table["layer"]):
            weight = found.get_parameter(name)
            kept = weight != 0
            assert torch.equal(weight[kept], net.get_parameter(name)[kept])
            assert int(kept.sum()) == decided.table.loc[decided.table["layer"] == name, "retained"].sum()

    def test_computes_what_the_masked_model_did(self):
        masked = apply(make(), plan(make(), sparsity=0.6)).eval()
        assert_close(finalize(masked)(TOKENS), masked(TOKENS))

    def test_leaves_a_model_without_masks_as_it_was(self):
        net = make()
        before = snapshot(net)
        found = finalize(net)
        assert found is not net
        assert same_bits(found, net)
        assert shape_of(found) == shape_of(net)
        assert finalize(net, inplace=True) is net
        assert_unchanged(net, before)

    def test_keeps_what_others_put_over_a_mask(self):
        net = mlp(4, 6, 3)
        masked = apply(net, plan(net, sparsity=0.5, refit="none"))
        parametrize.register_parametrization(masked[0], "weight", Scale())
        parametrize.register_parametrization(masked[0], "bias", Scale())
        found = finalize(masked)
        assert torch.equal(found[0].weight, 2 * masked[0].parametrizations.weight[0](net[0].weight))
        assert_close(found(gaussian(5, 4)), masked(gaussian(5, 4)))
        assert [type(p) for p in found[0].parametrizations.weight] == [Scale]
        assert parametrize.is_parametrized(found[0], "bias")
        assert type(found[2]) is nn.Linear
        assert not is_masked(found)

    def test_refuses_a_mask_over_what_others_put_there_and_changes_nothing(self):
        net = mlp(4, 6, 3)
        masked = apply(net, plan(net, sparsity=0.5))
        inner = masked[2].parametrizations.weight
        inner.insert(0, Scale())
        before = snapshot(masked)
        with pytest.raises(ValueError, match=r"'2\.weight' has a mask over another parametrisation"):
            finalize(masked, inplace=True)
        assert_unchanged(masked, before)

    def test_refuses_what_is_no_module(self):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got OrderedDict"):
            finalize(mlp(4, 2).state_dict())

    def test_takes_a_single_layer(self):
        masked = apply(nn.Linear(4, 6), plan(nn.Linear(4, 6), sparsity=0.5))
        assert type(finalize(masked, inplace=True)) is nn.Linear
        assert list(masked.state_dict()) == ["weight", "bias"]

    def test_keeps_the_parameters_an_optimiser_knows(self):
        net = mlp(4, 6, 3)
        before = [id(p) for p in net.parameters()]
        apply(net, plan(net, sparsity=0.5), inplace=True)
        assert sorted(id(p) for p in net.parameters()) == sorted(before)
        finalize(net, inplace=True)
        assert [id(p) for p in net.parameters()] == before


class TestSharedWeights:
    def test_share_one_mask_and_stay_one_through_training(self):
        net = make()
        masked = apply(net, plan(net, sparsity=0.6))
        twins = (masked.blocks[0].parametrizations.weight, masked.twin.parametrizations.weight)
        assert twins[0].original is twins[1].original
        assert twins[0][0] is twins[1][0]
        heads = (masked.embedding.parametrizations.weight, masked.head.parametrizations.weight)
        assert heads[0].original is heads[1].original
        assert len(masks_of(masked)) == 4
        optimizer = torch.optim.SGD(masked.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            masked(TOKENS).square().sum().backward()
            optimizer.step()
        assert torch.equal(masked.twin.weight, masked.blocks[0].weight)
        for copied in (copy.deepcopy(masked), masked.double()):
            found = finalize(copied)
            assert found.twin.weight is found.blocks[0].weight
            assert found.head.weight is found.embedding.weight
            assert torch.equal(found.head.weight != 0, masks_of(masked)["embedding.weight"])

    @pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}])
    def test_refuses_an_embedding_that_reaches_past_the_mask(self, options):
        net = nn.Sequential(nn.Embedding(6, 4, **options), nn.Linear(4, 6))
        net[1].weight = net[0].weight
        decided = plan(net, sparsity=0.5)
        with pytest.raises(
            ValueError, match=rf"'1\.weight' is shared with embedding '0', whose {next(iter(options))}="
        ):
            apply(net, decided)


class TestASecondPlan:
    @settings(max_examples=25, deadline=None)
    @given(st.floats(0.1, 0.8), st.floats(0.1, 0.8), st.booleans())
    def test_can_only_shrink_the_masks(self, first, second, inplace):
        net = mlp(5, 7, 3)
        masked = apply(net, plan(net, sparsity=first))
        before = {name: mask.clone() for name, mask in masks_of(masked).items()}
        with torch.no_grad():  # training in between, which changes who is largest
            for parameter in masked.parameters():
                parameter.copy_(gaussian(*parameter.shape, seed=9))
        dense = finalize(masked) if second > first else net
        decided = plan(dense, sparsity=second, refit="none")  # a refit may choose what the first removed
        found = apply(masked, decided, inplace=inplace)
        for name, mask in masks_of(found).items():
            assert not (mask & ~before[name]).any()
            if not inplace:
                assert torch.equal(masks_of(masked)[name], before[name])
        if second > first:
            assert sum(int(mask.sum()) for mask in masks_of(found).values()) == decided.table["retained"].sum()

    def test_does_not_touch_the_first_ones_entries(self):
        net = mlp(5, 7, 3)
        kept = {"0.weight": np.arange(35).reshape(7, 5) % 2 == 0}
        decided = replace(plan(net, sparsity=0.5), kept=kept)
        masked = apply(net, decided)
        none = replace(decided, kept={"0.weight": np.zeros((7, 5), dtype=bool)})
        apply(masked, none, inplace=True)
        assert kept["0.weight"].sum() == 18
        assert not masks_of(masked)["0.weight"].any()

    def test_with_regrow_takes_the_place_of_the_first_and_brings_values_back(self):
        net = mlp(5, 7, 3)
        masked = apply(net, plan(net, sparsity=0.8))
        found = apply(masked, plan(net, sparsity=0.3), regrow=True)
        assert same_bits(finalize(found), finalize(apply(net, plan(net, sparsity=0.3))))

    def test_that_names_some_layers_leaves_the_others(self):
        net = mlp(5, 7, 3)
        decided = plan(net, sparsity=0.5, refit="none")
        masked = apply(net, decided)
        table = decided.table[decided.table["layer"] == "2.weight"].reset_index(drop=True)
        for regrow in (False, True):
            found = apply(masked, replace(decided, table=table), regrow=regrow)
            assert torch.equal(masks_of(found)["0.weight"], masks_of(masked)["0.weight"])


class TestValues:
    def plan(self, net):
        decided = plan(net, sparsity=0.5)
        values = {
            "0.weight": gaussian(6, 4, seed=3).numpy(),
            "0.bias": np.arange(6.0),
            "1.running_mean": np.arange(6.0, dtype=np.float32) / 3,
        }
        return replace(decided, values=values)

    def net(self):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def test_are_written_where_entries_stay(self):
        net = self.net()
        decided = self.plan(net)
        masked = apply(net, decided)
        kept = masks_of(masked)["0.weight"]
        assert torch.equal(kept, masks_of(apply(net, replace(decided, values={})))["0.weight"])
        assert torch.equal(masked[0].weight, torch.where(kept, torch.from_numpy(decided.values["0.weight"]), 0.0))
        assert torch.equal(masked[0].bias, torch.arange(6.0))
        assert torch.equal(masked[1].running_mean, torch.arange(6.0) / 3)
        stored = masked[0].parametrizations.weight.original
        assert torch.equal(stored[~kept], net[0].weight[~kept])  # can come back as they were
        again = apply(finalize(masked), replace(decided, table=decided.table.assign(retained=0), kept={}, values={}))
        assert (again[0].weight == 0).all()

    def test_reach_a_model_that_is_masked_already(self):
        net = self.net()
        decided = self.plan(net)
        masked = apply(net, replace(decided, values={}))
        assert same_bits(finalize(apply(masked, decided)), finalize(apply(net, decided)))

    @pytest.mark.parametrize("as_arrays", [False, True])
    def test_reach_a_state_dict_as_they_do_a_module(self, as_arrays):
        net = self.net()
        decided = self.plan(net)
        state = {name: tensor.numpy() if as_arrays else tensor for name, tensor in net.state_dict().items()}
        state = {name: tensor for name, tensor in state.items() if "batches" not in name}
        found = apply(state, decided)
        expected = finalize(apply(net, decided)).state_dict()
        assert all(torch.equal(torch.as_tensor(value), expected[name]) for name, value in found.items())
        assert not torch.equal(torch.as_tensor(state["0.bias"]), expected["0.bias"])

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize(
        ("values", "match"),
        [
            ({"0.bias": np.zeros(6), "5.bias": np.zeros(6)}, "value for '5.bias', which the model lacks"),
            ({"0.bias": np.zeros(7)}, r"'0\.bias' has shape \(6,\), the plan's value \(7,\)"),
            ({"0.weight": np.zeros((4, 6))}, r"'0\.weight' has shape \(6, 4\), the plan's value \(4, 6\)"),
            ({"3.bias": np.full(3, np.nan)}, r"'3\.bias' is not finite in torch.float32"),
            ({"3.bias": np.full(3, 1e300)}, r"'3\.bias' is not finite in torch.float32"),
        ],
    )
    def test_that_do_not_fit_are_named_and_change_nothing(self, values, match, inplace):
        net = self.net()
        decided = replace(plan(net, sparsity=0.5), values=values)
        before = snapshot(net)
        with pytest.raises(ValueError, match=match):
            apply(net, decided, inplace=inplace)
        assert_unchanged(net, before)
        with pytest.raises(ValueError, match=match):
            apply(dict(net.state_dict()), decided, inplace=inplace)
        assert_unchanged(net, before)

    @pytest.mark.parametrize(
        ("kept", "match"),
        [
            ({"0.weight": np.ones((4, 6), dtype=bool)}, r"'0\.weight'"),
            ({"0.bias": np.ones(6, dtype=bool)}, r"keeps entries of '0\.bias', which its table lacks"),
        ],
    )
    def test_masks_that_do_not_fit_are_named(self, kept, match):
        net = self.net()
        before = snapshot(net)
        with pytest.raises(ValueError, match=match):
            apply(net, replace(plan(net, sparsity=0.5), kept=kept), inplace=True)
        assert_unchanged(net, before)


class TestRefuses:
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize(("other", "shape"), [(nn.Conv2d(5, 16, 2), (16, 5, 2, 2)), (nn.Linear(16, 20), (20, 16))])
    def test_a_plan_for_weights_of_another_shape(self, other, shape, inplace):
        decided = plan(nn.Linear(20, 16), sparsity=0.5, refit="none")
        for made in (decided, Plan.from_json(decided.to_json())):
            assert made.shapes == {"weight": (16, 20)}
            before = copy.deepcopy(other.state_dict())
            says = rf"another model: layer 'weight' has shape {re.escape(str(shape))}, the plan \(16, 20\)"
            with pytest.raises(ValueError, match=says):
                apply(other, made, inplace=inplace)
            assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        with pytest.raises(ValueError, match="another model: layer 'weight'"):
            apply(other.state_dict(), decided)

    def test_no_plan_that_was_written_without_shapes(self):
        data = json.loads(plan(nn.Linear(20, 16), sparsity=0.5, refit="none").to_json())
        del data["shapes"]
        old = Plan.from_json(json.dumps(data))
        assert int((apply(nn.Linear(20, 16), old).weight == 0).sum()) == 160
        with pytest.raises(ValueError, match="layer 'weight' has 16 units of 21 weights, the plan 16 of 20"):
            apply(nn.Linear(21, 16), old)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda layer: torch_prune.l1_unstructured(layer, "weight", 2), r"'2' is already pruned by torch"),
            (lambda layer: parametrize.register_parametrization(layer, "weight", Scale()), r"'2' is parametrised"),
            (parametrizations.spectral_norm, r"'2' is parametrised"),
            (nn.utils.spectral_norm, r"'2' has spectral norm"),
        ],
    )
    @pytest.mark.parametrize("inplace", [False, True])
    def test_layers_that_others_have_taken(self, change, match, inplace):
        net = mlp(4, 6, 3)
        decided = plan(net, sparsity=0.5)
        change(net[2])
        before = snapshot(net)
        with pytest.raises(ValueError, match=match):
            apply(net, decided, inplace=inplace)
        assert_unchanged(net, before)

    @pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyBatchNorm1d()])
    def test_lazy_layers_by_name_before_anything_happens(self, lazy):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), lazy)
        decided = plan(nn.Sequential(nn.Linear(4, 6)), sparsity=0.5)
        with pytest.raises(ValueError, match=r"'2\.weight' is not initialised"):
            apply(net, decided, inplace=True)
        assert not is_masked(net)

    def test_a_plan_that_cuts_a_masked_model(self):
        net = mlp(4, 6, 3)
        decided = plan(net, gaussian(50, 4), method="id", sparsity=0.5)
        masked = apply(net, plan(net, sparsity=0.5))
        with pytest.raises(ValueError, match=r"'0\.weight' carries a mask.*ellq\.finalize"):
            apply(masked, decided)

    def test_a_float_type_without_a_zero(self):
        layer = nn.Linear(4, 4, bias=False)
        decided = plan(layer, sparsity=0.5)
        layer.weight = nn.Parameter(layer.weight.detach().abs().to(torch.float8_e8m0fnu), requires_grad=False)
        with pytest.raises(ValueError, match=r"'weight' is of type torch\.float8_e8m0fnu, which has no zero"):
            apply(layer, decided)

    def test_weights_that_are_not_finite_and_masks_none(self):
        net = mlp(4, 6, 3)
        decided = plan(net, sparsity=0.5)
        with torch.no_grad():
            net[2].weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"'2\.weight' holds"):
            apply(net, decided, inplace=True)
        assert not is_masked(net)


class TestWhatReadsMaskedModels:
    def test_save_writes_what_finalising_gives(self, tmp_path):
        net = mlp(4, 6, 3)
        decided = plan(net, sparsity=0.5)
        masked = apply(net, decided)
        before = snapshot(masked)
        save(masked, tmp_path / "model", plan=decided)
        assert_unchanged(masked, before)
        assert same_bits(load(tmp_path / "model", lambda: mlp(4, 6, 3)), finalize(masked))

    def test_bounds_of_a_chain_are_those_of_what_it_computes(self):
        net = mlp(4, 6, 5, 3)
        decided = plan(net, sparsity=0.5, refit="none")
        masked = apply(net, decided)
        with torch.no_grad():
            masked[0].parametrizations.weight.original[~masks_of(masked)["0.weight"]] = 1e6
        expected = chain_bounds(net, finalize(apply(net, decided)), gaussian(9, 4), decided)
        found = chain_bounds(net, masked, gaussian(9, 4), decided)
        assert found.equals(expected)
        assert (found["observed"] <= found["bound_measured"]).all()
        assert np.isfinite(found["bound_lq"]).all()

    def test_bounds_by_quasi_norms_are_left_out_where_others_than_the_largest_stay(self):
        net = mlp(4, 6, 3)
        decided = plan(net, sparsity=0.5)
        kept = {"0.weight": ~masks_of(apply(net, decided))["0.weight"].numpy()}
        values = {"0.weight": np.where(kept["0.weight"], 0.5, 0.0), "0.bias": np.ones(6)}
        odd = replace(decided, kept=kept, values=values)
        found = chain_bounds(net, apply(net, odd), gaussian(9, 4), odd)
        assert found["bound_lq"].isna().all()
        assert (found["observed"] <= found["bound_measured"]).all()
        assert (found["bound_measured"] <= found["bound"] * (1 + 1e-9)).all()

    def test_costs_count_what_torch_prunes_and_other_parametrisations(self):
        net = mlp(4, 6, 3)
        torch_prune.l1_unstructured(net[0], "weight", 10)
        assert cost(net, gaussian(2, 4)).nonzeros == 24 - 10 + 6 + 18 + 3
        net = mlp(4, 6, 3)
        parametrize.register_parametrization(net[0], "weight", Scale())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parametrizations.weight_norm(net[2])
        assert cost(net, gaussian(2, 4)).nonzeros == 24 + 6 + 18 + 3 + 3
        parametrizations.spectral_norm(net[0], "weight")
        before = snapshot(net.train())
        cost(net, gaussian(2, 4))
        assert_unchanged(net, before)
