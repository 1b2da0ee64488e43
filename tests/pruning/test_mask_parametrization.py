from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from ellq.analysis import cost, measure
from ellq.pruning import apply, plan
from ellq.pruning.apply import finalize
from ellq.pruning.mask_parametrization import is_masked, masks_of, stored_tensors
from pruned_nets import gaussian, mlp, same_bits

OPTIMISERS = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True),
    lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
    lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.5, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
]


def halved(model: nn.Module) -> nn.Module:
    return apply(model, plan(model, sparsity=0.5, refit="none"))


class TestAMaskedWeight:
    @pytest.mark.parametrize("make", OPTIMISERS)
    def test_stays_zero_whatever_the_optimiser_does(self, make):
        net = halved(mlp(4, 8, 3))
        masks = {name: mask.clone() for name, mask in masks_of(net).items()}
        optimizer = make(net.parameters())
        before = net[0].weight.detach().clone()
        for seed in range(4):
            optimizer.zero_grad()
            net(gaussian(8, 4, seed=seed)).square().sum().backward()
            optimizer.step()
        for name, kept in masks.items():
            weight = net[int(name[0])].weight
            assert (weight[~kept] == 0).all()
            assert torch.equal(masks_of(net)[name], kept)
        assert not torch.equal(net[0].weight, before)
        assert all(
            (layer.weight == 0).sum() == (~masks[f"{i}.weight"]).sum() for i, layer in ((0, net[0]), (2, net[2]))
        )

    def test_survives_an_optimiser_that_writes_noise(self):
        net = halved(mlp(4, 8, 3))
        zeros = net[0].weight == 0
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(7.0)
        assert torch.equal(net[0].weight == 0, zeros)
        assert (net[0].weight[~zeros] == 7).all()

    def test_gives_removed_entries_a_gradient_of_exactly_zero(self):
        net = halved(mlp(4, 8, 3))
        kept = masks_of(net)["0.weight"]
        (net(gaussian(8, 4)).sum() * math.inf).backward()
        stored = net[0].parametrizations.weight.original
        assert (stored.grad[~kept] == 0).all()
        assert not torch.isfinite(stored.grad[kept]).all()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_lets_nothing_through_from_removed_entries(self, value):
        net = halved(mlp(4, 8, 3))
        expected = net(gaussian(5, 4))
        with torch.no_grad():
            net[0].parametrizations.weight.original[~masks_of(net)["0.weight"]] = value
        found = net(gaussian(5, 4))
        assert_close(found, expected)
        found.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        assert same_bits(finalize(net), finalize(halved(mlp(4, 8, 3))))

    def test_can_be_assigned_and_shares_no_memory_with_what_it_was_given(self):
        net, other = halved(mlp(4, 8, 3)), gaussian(8, 4, seed=5)
        given = other.clone()
        stored = net[0].parametrizations.weight.original
        net[0].weight = given
        assert net[0].parametrizations.weight.original is stored
        kept = masks_of(net)["0.weight"]
        assert torch.equal(net[0].weight, torch.where(kept, other, 0.0))
        net[0].weight = net[0].weight  # what is read can be written back
        assert torch.equal(net[0].weight, torch.where(kept, other, 0.0))
        with torch.no_grad():
            stored.add_(1)
        assert torch.equal(given, other)

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_is_trained_only_if_it_was(self, requires_grad):
        net = mlp(4, 8, 3)
        net[0].weight.requires_grad_(requires_grad)
        masked = halved(net)
        assert masked[0].weight.requires_grad == requires_grad
        assert masked[0].parametrizations.weight.original.requires_grad == requires_grad
        assert finalize(masked)[0].weight.requires_grad == requires_grad

    def test_says_how_much_it_keeps(self):
        assert "Mask(16 of 32 kept)" in repr(halved(mlp(4, 8)))


class TestAMaskedModel:
    def test_keeps_its_masks_in_its_state_dict(self):
        net = halved(mlp(4, 8, 3))
        state = net.state_dict()
        assert state["0.parametrizations.weight.0.kept"].dtype == torch.bool
        other = halved(mlp(4, 8, 3, seed=1))
        assert not same_bits(other, net)
        other.load_state_dict(state)
        assert same_bits(finalize(other), finalize(net))

    def test_state_dict_goes_through_a_file_without_pickled_code(self):
        net, file = halved(mlp(4, 8, 3)), io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        other = halved(mlp(4, 8, 3, seed=1))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert same_bits(other, net)

    def test_copies_are_independent_in_every_way(self):
        net = halved(mlp(4, 8, 3))
        expected = net(gaussian(5, 4))
        twin = copy.deepcopy(net)
        third = copy.deepcopy(twin)
        assert same_bits(twin, net)
        parametrize.remove_parametrizations(twin[0], "weight")  # torch's own call; breaks copies that share a class
        finalize(third, inplace=True)
        assert type(twin[0]) is type(third[2]) is nn.Linear
        assert_close(net(gaussian(5, 4)), expected)
        assert_close(twin(gaussian(5, 4)), expected)
        assert_close(third(gaussian(5, 4)), expected)
        with torch.no_grad():
            twin[2].parametrizations.weight.original.zero_()
            masks_of(twin)["2.weight"].zero_()
        assert_close(net(gaussian(5, 4)), expected)

    def test_a_class_with_its_own_copy_is_copied_its_way(self):
        class Counting(nn.Linear):
            copies = 0

            def __deepcopy__(self, memo):
                Counting.copies += 1
                twin = type(self).__new__(type(self))
                twin.__dict__ = copy.deepcopy(self.__dict__, memo)
                return twin

        net = nn.Sequential(Counting(4, 4), nn.ReLU())
        masked = halved(net)
        before = Counting.copies
        twin = copy.deepcopy(masked)
        assert Counting.copies == before + 1
        assert type(finalize(twin)[0]) is Counting
        assert torch.equal(masked[0].weight, twin[0].weight)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_converts(self, dtype):
        net = halved(mlp(4, 8, 3))
        expected = finalize(net).to(dtype)
        net = net.to(dtype)
        assert masks_of(net)["0.weight"].dtype == torch.bool
        assert net[0].weight.dtype == dtype
        assert same_bits(finalize(net), expected)
        inputs = gaussian(5, 4).to(dtype)
        assert torch.equal(net(inputs), expected(inputs))
        net(inputs).sum().backward()
        assert net[0].parametrizations.weight.original.grad.dtype == dtype

    def test_moves_to_a_device_with_its_masks(self):
        net = halved(mlp(4, 8, 3)).to("meta")
        assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_may_be_of_the_smallest_floats(self, dtype):
        layer = nn.Linear(8, 4)
        layer.weight = nn.Parameter((gaussian(4, 8) * 1e-2).to(dtype))
        layer.weight.data[0, 0] = torch.finfo(dtype).max
        masked = halved(layer)
        kept = masks_of(masked)["weight"]
        assert masked.weight.dtype == dtype
        assert (masked.weight.double()[~kept] == 0).all()
        assert torch.equal(masked.weight.double()[kept], layer.weight.double()[kept])
        baked = finalize(masked).weight
        assert torch.equal(baked.double(), masked.weight.double())

    def test_measures_as_what_it_computes(self):
        net = halved(mlp(4, 8, 3))
        with torch.no_grad():
            net[0].parametrizations.weight.original[~masks_of(net)["0.weight"]] = 99.0
        assert measure(net) == measure(finalize(net))

    def test_costs_what_it_computes(self):
        net = halved(mlp(4, 8, 3))
        with torch.no_grad():
            net[0].weight = net[0].weight  # zeros beneath the mask too
            net[2].parametrizations.weight.original[0, 0] = 0.0
        assert cost(net, gaussian(2, 4)) == cost(finalize(net), gaussian(2, 4))
        assert cost(net, gaussian(2, 4)).parameters == 8 * 4 + 8 + 3 * 8 + 3

    def test_exports(self):
        net = halved(mlp(4, 8, 3))
        program = torch.export.export(net, (gaussian(5, 4),))
        assert_close(program.module()(gaussian(5, 4)), net(gaussian(5, 4)))

    def test_lists_its_tensors_by_their_own_names(self):
        net = nn.Sequential(mlp(4, 8, 3), nn.BatchNorm1d(3))
        tensors = stored_tensors(halved(net))
        assert tensors.keys() == net.state_dict().keys()
        assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in tensors.items())


class TestRecurrentNets:
    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_read_the_masked_weights(self, kind):
        net = kind(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        masked = halved(net)
        inputs = gaussian(3, 5, 4)
        baked = finalize(masked)
        for mode in (True, False):
            assert_close(masked.train(mode)(inputs)[0], baked.train(mode)(inputs)[0])
        with torch.no_grad():
            assert_close(masked(inputs)[0], baked(inputs)[0])
            assert all(torch.equal(a, b) for a, b in zip(masked._flat_weights, baked._flat_weights, strict=True))
            for parameter in masked.parameters():
                parameter.mul_(0.5)
            assert not torch.allclose(
                masked(inputs)[0], baked(inputs)[0], atol=1e-2
            )  # the next pass reads what is there

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
    def test_train_and_copy_after_a_forward_pass(self, kind):
        net = nn.Sequential(kind(4, 6, batch_first=True))
        masked = halved(net)
        optimizer = torch.optim.Adam(masked.parameters(), 0.1)
        loss = masked(gaussian(3, 5, 4))[0].square().sum()
        loss.backward()
        optimizer.step()
        found = masked(gaussian(3, 5, 4))[0]  # a graph hangs on the weights it holds
        twin = copy.deepcopy(masked)
        assert_close(twin(gaussian(3, 5, 4))[0], found)
        baked = finalize(masked)
        assert type(baked[0]) is kind
        assert_close(baked(gaussian(3, 5, 4))[0], found)
        assert list(baked.state_dict()) == list(net.state_dict())
        assert all(p.is_leaf for p in baked[0]._flat_weights)
        assert (baked[0].weight_hh_l0 == 0).sum() == (~masks_of(masked)["0.weight_hh_l0"]).sum()
        copy.deepcopy(baked)(gaussian(3, 5, 4))

    def test_cells_are_masked(self):
        cell = nn.LSTMCell(4, 6)
        masked = halved(cell)
        assert_close(masked(gaussian(3, 4))[0], finalize(masked)(gaussian(3, 4))[0])


class TestAttention:
    def test_fast_paths_read_the_masked_weights(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        net = nn.TransformerEncoder(layer, 2).eval()
        masked = halved(net)
        baked = finalize(masked)
        inputs = gaussian(3, 5, 8)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[:, 4] = True
        assert_close(masked(inputs), baked(inputs))  # with gradients: the slow path
        for mask in (None, padding):
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
                found, expected, dense = (m(inputs, src_key_padding_mask=mask) for m in (masked, baked, net))
            assert_close(found, expected)
            assert not torch.allclose(found, dense, atol=1e-3)
        assert list(baked.state_dict()) == list(net.state_dict())

    @pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}, {"add_bias_kv": True}, {"batch_first": True}])
    def test_alone(self, options):
        net = nn.MultiheadAttention(8, 2, **options)
        masked = halved(net)
        query = gaussian(4, 3, 8)
        key = gaussian(4, 3, options.get("kdim", 8), seed=1)
        value = gaussian(4, 3, options.get("vdim", 8), seed=2)
        baked = finalize(masked)
        for mode in (True, False):
            found, expected = (m.train(mode)(query, key, value)[0] for m in (masked, baked))
            assert_close(found, expected)
        masked(query, key, value)[0].sum().backward()
        assert [name for name, _ in baked.named_parameters()] == [name for name, _ in net.named_parameters()]
        assert not is_masked(baked)
