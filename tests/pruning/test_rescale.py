"""Without data: rows get their length back, norms' statistics move as noise says, unmasked nothing moves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ellq
from ellq.pruning.rescale import coloured_noise, rescale_masks
from pruned_nets import assert_unchanged, gaussian, mlp, same_bits, snapshot


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def settled(net: nn.Module, *shape: int) -> nn.Module:
    """Give norms the statistics of some inputs, and scales of their own."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    for seed in range(30):
        net(coloured_noise((32, *shape), seed=100 + seed) + 0.3)
    return net.eval()


def conv_net(norm=nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return settled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            norm(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 3, groups=2),
            norm(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        ),
        *(3, 8, 8),
    )


def masks_only(net, sparsity: float = 0.5, **arguments) -> ellq.Plan:
    return ellq.plan(net, sparsity=sparsity, refit="none", **arguments)


def everything(net) -> ellq.Plan:
    plain = masks_only(net)
    table = plain.to_frame()
    table["retained"] = table["size"]
    return plain.with_retained(table)


def test_row_norms_are_restored():
    net = mlp(9, 7, 5, 3)
    with torch.no_grad():
        net[2].weight[1] = 0.0
    decided = rescale_masks(net, plain := masks_only(net, 0.6))
    assert set(decided.values) == {"0.weight", "2.weight", "4.weight"}
    assert decided.settings["refit"] == "rescale"
    pruned, masked = (ellq.finalize(ellq.apply(net, p)) for p in (decided, plain))
    for layer in (0, 2, 4):
        torch.testing.assert_close(pruned[layer].weight.norm(dim=1), net[layer].weight.norm(dim=1))
        assert torch.equal(pruned[layer].weight == 0, masked[layer].weight == 0)
        assert torch.equal(pruned[layer].weight.sign(), masked[layer].weight.sign())
        assert torch.equal(pruned[layer].bias, net[layer].bias)


@pytest.mark.parametrize("make", [conv_net, lambda: mlp(6, 5, 4), lambda: conv_net().half(), lambda: Untraceable()])
def test_where_nothing_is_masked_nothing_moves(make):
    net = make().eval()
    assert same_bits(ellq.finalize(ellq.apply(net, rescale_masks(net, everything(net)))), net)


def by_hand(net: nn.Module, masked: nn.Module, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics as documented, by following the sequence of layers one by one."""
    found, streams = {}, [noise.clone(), noise.clone()]
    for name, module in net.named_children():
        if not isinstance(module, nn.BatchNorm2d):
            streams = [net.get_submodule(name)(streams[0]), masked.get_submodule(name)(streams[1])]
            continue
        means = [x.mean(dim=(0, 2, 3)) for x in streams]
        variances = [x.var(dim=(0, 2, 3)) for x in streams]
        found[f"{name}.running_mean"] = (
            module.running_mean + (means[1] - means[0]) * (module.running_var / variances[0]).sqrt()
        )
        found[f"{name}.running_var"] = module.running_var * (variances[1] / variances[0]).clamp(1e-3, 4.0)
        streams = [torch.nn.functional.batch_norm(x, None, None, module.weight, module.bias, True) for x in streams]
    return found


@pytest.mark.parametrize("example", [None, torch.zeros(1, 3, 9, 9)])
def test_statistics_move_as_they_do_on_noise(example):
    net = conv_net()
    decided = rescale_masks(net, plain := masks_only(net, 0.7), example=example, seed=4)
    side = 32 if example is None else 9
    masked = ellq.finalize(ellq.apply(net, plain))
    expected = by_hand(net, masked, coloured_noise((64, 3, side, side), seed=4))
    assert set(decided.values) == {*expected, "8.weight"}
    for name, value in expected.items():
        np.testing.assert_allclose(decided.values[name], value, rtol=1e-4, atol=1e-5)
        assert not np.allclose(decided.values[name], net.get_buffer(name), rtol=1e-2)


def test_outputs_of_norms_get_their_spread_back():
    net, x = conv_net(), coloured_noise((60, 3, 8, 8), seed=9) + 0.3  # of the kind that the net has seen
    spreads = []
    for model in (net, *(ellq.prune(net, x[:1], sparsity=0.7, refit=way) for way in ("none", "rescale"))):
        spreads.append([model[:end](x.clone()).var(dim=(0, 2, 3)).log() for end in (2, 5)])
    for dense, masked, rescaled in zip(*spreads, strict=True):
        assert (rescaled - dense).abs().mean() < 0.5 * (masked - dense).abs().mean()


def test_the_seed_decides_and_the_model_stays():
    net = conv_net().train()
    plain, before = masks_only(net), snapshot(net)
    found = [rescale_masks(net, plain, seed=seed).to_json() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert_unchanged(net, before)


def test_noise_is_not_worked_on_in_place():
    net = nn.Sequential(nn.ReLU(inplace=True), *conv_net()).eval()
    twin = nn.Sequential(nn.ReLU(), *conv_net()).eval()
    values = [rescale_masks(model, masks_only(model)).values for model in (net, twin)]
    assert all(np.array_equal(values[0][name], values[1][name]) for name in values[1])
    example = -torch.ones(2, 3, 8, 8)
    rescale_masks(net, masks_only(net), example=example)
    assert torch.equal(example, -torch.ones(2, 3, 8, 8))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.last((x if x.mean() > 9 else torch.relu(x)).mean(dim=2))


def test_of_a_network_that_cannot_be_traced_only_norms_move():
    net = settled(Untraceable(), 2, 9)
    decided = rescale_masks(net, masks_only(net))
    assert set(decided.values) == {"norm.running_mean", "norm.running_var"}
    assert not np.allclose(decided.values["norm.running_var"], net.norm.running_var)
    net.norm = nn.Identity()
    assert set(rescale_masks(net, masks_only(net)).values) == {"conv.weight", "last.weight"}


class Twice(nn.Module):
    """One norm for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(5, 5), nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.second(torch.relu(self.norm(self.first(x)))))


def test_a_norm_used_twice_moves_by_the_mean_of_both_uses_of_the_rescaled_layers():
    net = settled(Twice(), 5)
    decided = rescale_masks(net, masks_only(net), seed=2)
    assert set(decided.values) == {"first.weight", "second.weight", "norm.running_mean", "norm.running_var"}
    scaled = copy.deepcopy(net)
    for name in ("first", "second"):
        scaled.get_submodule(name).weight.copy_(torch.from_numpy(decided.values[f"{name}.weight"]))
    noise, variances = coloured_noise((512, 5), seed=2), []
    for model in (net, scaled):
        a = model.first(noise)
        b = model.second(torch.relu(nn.functional.batch_norm(a, None, None, net.norm.weight, net.norm.bias, True)))
        variances.append((a.var(dim=0) + b.var(dim=0)) / 2)
    expected = net.norm.running_var * (variances[1] / variances[0])
    np.testing.assert_allclose(decided.values["norm.running_var"], expected, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(kind):
    net = conv_net()
    plain = masks_only(net)
    fine = rescale_masks(net, plain).values
    coarse = rescale_masks(net.to(kind), plain).values
    for name, value in fine.items():
        assert coarse[name].dtype == (np.float64 if kind == torch.float64 else np.float32)
        np.testing.assert_allclose(coarse[name], value, rtol=0.05, atol=0.05)
    assert ellq.apply(net, rescale_masks(net, plain))(gaussian(3, 3, 8, 8).to(kind)).isfinite().all()


def test_norms_without_scales_or_without_statistics():
    plain = conv_net(lambda width: nn.BatchNorm2d(width, affine=False))
    assert set(rescale_masks(plain, masks_only(plain)).values) == {
        *(f"{i}.running_{part}" for i in (1, 4) for part in ("mean", "var")),
        "8.weight",
    }
    fleeting = conv_net(lambda width: nn.BatchNorm2d(width, track_running_stats=False))
    assert set(rescale_masks(fleeting, masks_only(fleeting)).values) == {"0.weight", "3.weight", "8.weight"}


def test_a_model_whose_inputs_cannot_be_guessed_keeps_its_norms():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 3 * 5, 3))
    decided = rescale_masks(settled(net, 2, 5, 7), masks_only(net))
    assert set(decided.values) == {"3.weight"}
    decided = rescale_masks(net, masks_only(net), example=torch.zeros(1, 2, 5, 7))
    assert set(decided.values) == {"1.running_mean", "1.running_var", "3.weight"}
    with pytest.raises(ValueError, match=r"inputs such as the example, of shape \(1, 2, 6, 7\)"):
        rescale_masks(net, masks_only(net), example=torch.zeros(1, 2, 6, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_row_norms_are_restored_at_both_ends_of_a_type(dtype):
    net = mlp(9, 7, 3).to(dtype)
    unit = net[0].weight.detach().double()
    net[0].weight.data = (unit * (torch.finfo(dtype).max / 4 / unit.abs().max())).to(dtype)
    net[2].weight.data = (unit[:3, :7] * (torch.finfo(dtype).tiny * 64)).to(dtype)
    pruned = ellq.prune(net, sparsity=0.5, refit="rescale")
    for layer in (0, 2):
        before, after = (model[layer].weight.detach().double() for model in (net, pruned))
        scale = before.abs().amax()
        torch.testing.assert_close((after / scale).norm(dim=1), (before / scale).norm(dim=1), rtol=1e-2, atol=0.0)


def test_a_unit_whose_norm_its_type_cannot_hold_is_clipped():
    net = nn.Linear(4, 1, bias=False).half()
    net.weight.data.fill_(60000.0)
    pruned = ellq.prune(net, sparsity=0.5, refit="rescale")
    assert pruned.weight.detach().abs().max() == torch.finfo(torch.float16).max


def test_norms_of_statistics_that_are_not_finite_are_left_alone():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()
    net[1].running_var[2] = torch.nan
    decided = ellq.plan(net, sparsity=0.5)
    assert decided.settings["refit"] == "rescale"
    assert not any(name.startswith("1.") for name in decided.values)
    assert ellq.finalize(ellq.apply(net, decided))[1].running_var[2].isnan()


def test_words_are_their_own_noise():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look, self.conv, self.norm = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.conv(self.look(x).transpose(1, 2))).mean(dim=2)

    torch.manual_seed(0)
    net = Words().eval()
    words = torch.randint(9, (40, 7))
    decided = rescale_masks(net, masks_only(net), example=words)
    assert set(decided.values) == {"norm.running_mean", "norm.running_var"}
    assert rescale_masks(net, masks_only(net)).values == {}


def test_shared_weights_and_a_model_of_one_layer():
    net = mlp(5, 5, 5)
    net[2].weight = net[0].weight
    assert rescale_masks(net, masks_only(net)).values == {}
    layer = nn.Linear(6, 3)
    decided = rescale_masks(layer, masks_only(layer))
    torch.testing.assert_close(ellq.apply(layer, decided).weight.norm(dim=1), layer.weight.norm(dim=1))


def test_a_unit_that_falls_silent_changes_its_norm_within_limits():
    net = conv_net()
    table = (plain := masks_only(net)).to_frame()
    table.loc[(table["layer"] == "0.weight") & (table["unit"] == 2), "retained"] = 0
    decided = rescale_masks(net, plain.with_retained(table))
    assert decided.values["1.running_var"][2] == pytest.approx(1e-3 * float(net[1].running_var[2]))
    assert all(np.isfinite(value).all() for value in decided.values.values())


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 16), (40, 3, 16, 16), (2, 1, 8, 8, 8), (2, 3, 1, 1)])
def test_noise_has_the_spread_of_one(shape):
    noise = coloured_noise(shape, seed=1)
    assert noise.shape == shape
    assert torch.equal(noise, coloured_noise(shape, seed=1))
    if noise.ndim > 2:
        assert float(noise.std()) == pytest.approx(1.0, rel=1e-4)


def test_noise_is_smooth_and_shared_by_channels():
    noise = coloured_noise((64, 3, 32, 32), seed=0)
    power = torch.fft.fft2(noise).abs().square().mean(dim=(0, 1))
    assert float(power[0, 2] / power[0, 8]) == pytest.approx(16.0, rel=0.5)
    flat = noise.movedim(1, 0).flatten(1)
    assert (torch.corrcoef(flat) > 0.7).all()


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(ValueError, match="for another model"):
        rescale_masks(mlp(3, 2), masks_only(mlp(4, 3, 2)))
