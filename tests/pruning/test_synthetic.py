"""Inputs made up from a network alone: like what it remembers; fits on them beat rescaling, or give way to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ellq
from ellq.analysis import accuracy, datasets
from ellq.analysis import mlp as classifier
from ellq.pruning import synthetic, train_classifier
from ellq.pruning.rescale import coloured_noise, rescale_masks
from ellq.pruning.synthetic import refit_synthetic, synthetic_inputs
from pruned_nets import assert_unchanged, mlp, same_bits, snapshot

IMAGE = torch.zeros(1, 3, 8, 8)


def settled(net: nn.Module, *shape: int, scale: float = 2.0) -> nn.Module:
    """Give norms the statistics of inputs that plain noise does not have."""
    net.train()
    with torch.no_grad():
        for seed in range(60):
            net(scale * coloured_noise((32, *shape), seed=100 + seed) + 0.5)
    return net.eval()


def conv_net(*, inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.ReLU(inplace=True)] if inplace else []
    return settled(
        nn.Sequential(
            *first,
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        ),
        *(3, 8, 8),
    )


@torch.no_grad()
def mismatch(net: nn.Module, x: torch.Tensor) -> float:
    """By how much the statistics in front of norms differ from those they hold, by hand."""
    total, norms = 0.0, 0
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
            total += float(((mean - module.running_mean).square() / module.running_var).mean())
            total += float(((variance / module.running_var).sqrt() - 1).square().mean())
            norms += 1
        x = module(x.clone())
    return total / norms


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


class TestInputs:
    def test_of_vectors_are_half_noise_and_half_sums_of_rows_and_half_of_each_not_negative(self):
        net = mlp(14, 5, 3)
        found = synthetic_inputs(net)
        assert found.shape == (2048, 14)
        rows = torch.linalg.svd(net[0].weight.detach(), full_matrices=False)[2]
        outside = rms(found[3::4] - found[3::4] @ rows.T @ rows)
        assert outside < 1e-6 < 0.1 < rms(found[1::4] - found[1::4] @ rows.T @ rows)
        assert rms(found[1::4]) == pytest.approx(0.5, rel=0.05)
        assert rms(found[3::4]) == pytest.approx(0.5, rel=0.05)
        assert (found[::2] >= 0).all()
        assert (found[::2] > 0).float().mean() == pytest.approx(0.5, abs=0.05)

    @pytest.mark.parametrize(("size", "shape"), [(36, (1, 6, 6)), (75, (3, 5, 5)), (48, (3, 4, 4)), (14, None)])
    def test_a_vector_that_may_be_an_image_is_smooth_as_one(self, size, shape):
        noise = synthetic_inputs(mlp(size, 5, 3))[1::4]
        expected = coloured_noise((2048, *(shape or (size,))), seed=0).reshape(2048, size)[1::4]
        torch.testing.assert_close(noise, 0.5 * expected)

    def test_have_the_shape_of_the_example_of_which_nothing_else_is_looked_at(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
        found = synthetic_inputs(net, example=torch.full((3, 2, 4, 4), torch.nan))
        assert found.shape == (2048, 2, 4, 4)
        assert torch.equal(found, synthetic_inputs(net, example=torch.ones(1, 2, 4, 4)))

    @pytest.mark.parametrize("inplace", [False, True])
    def test_match_what_norms_remember(self, inplace):
        net = conv_net(inplace=inplace)
        noise = coloured_noise((64, 3, 32, 32), seed=0)
        found = synthetic_inputs(net)
        assert found.shape == noise.shape
        assert mismatch(net, found) < min(0.05, 0.1 * mismatch(net, noise))

    def test_that_norms_do_not_know_are_none(self, monkeypatch):
        monkeypatch.setattr(synthetic, "_MISMATCH", 1e-9)
        assert synthetic_inputs(conv_net(), example=IMAGE) is None

    def test_that_take_too_long_are_none(self):
        assert synthetic_inputs(conv_net(), flops=1e5) is None

    def test_depend_on_the_seed_alone(self):
        for net, example in ((conv_net().train(), IMAGE), (mlp(9, 4, 2), None)):
            before, state = snapshot(net), torch.get_rng_state()
            found = [synthetic_inputs(net, example=example, seed=seed) for seed in (0, 0, 1)]
            assert torch.equal(found[0], found[1])
            assert not torch.equal(found[0], found[2])
            assert torch.equal(torch.get_rng_state(), state)
            assert_unchanged(net, before)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_are_the_same_where_gradients_are_off(self, mode):
        net = conv_net()
        expected = synthetic_inputs(net, example=IMAGE)
        with mode():
            assert torch.equal(synthetic_inputs(net, example=IMAGE), expected)

    def test_of_small_types_are_made_in_float32(self):
        found = synthetic_inputs(conv_net().half(), example=IMAGE)
        assert found.dtype == torch.float32
        assert found.isfinite().all()

    @pytest.mark.parametrize(
        ("net", "example"),
        [
            (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), None),
            (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), torch.ones(2, 3, dtype=torch.long)),
            (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(60, 3)), None),
        ],
        ids=["words", "words shown", "unknown size"],
    )
    def test_that_cannot_be_guessed_are_none(self, net, example):
        assert synthetic_inputs(net, example=example) is None

    def test_of_a_dead_first_layer_are_noise(self):
        net = mlp(9, 4, 2)
        with torch.no_grad():
            net[0].weight.zero_()
        assert synthetic_inputs(net).isfinite().all()


@pytest.fixture(scope="module")
def digits():
    """A net, and images that it has not seen."""
    train = datasets.load("digits", "train")
    x, y = train.inputs(), train.labels
    net = train_classifier(lambda: classifier(64, 64, 32, outputs=10), x[:1000], y[:1000], epochs=30)
    return net, x[1000:], y[1000:]


class TestRefit:
    @pytest.mark.parametrize(("sparsity", "gain"), [(0.8, -0.02), (0.9, 0.1), (0.95, 0.2)])
    def test_is_far_above_rescaling_on_images_it_never_saw(self, digits, sparsity, gain):
        net, x, y = digits
        refitted, rescaled = (
            accuracy(ellq.prune(net, sparsity=sparsity, refit=way), x, y) for way in ("auto", "rescale")
        )
        assert refitted > rescaled + gain

    def test_is_the_default_without_data_and_meets_the_budget(self, digits):
        decided = ellq.plan(digits[0], nonzeros=700)
        assert decided.settings["refit"] == "synthetic"
        assert decided.measured is None
        assert decided.table["retained"].sum() == 700
        assert sum(int((ellq.apply(digits[0], decided)[i].weight != 0).sum()) for i in (1, 3, 5)) == 700

    def test_repeats_and_leaves_the_model_and_the_random_state(self):
        net = conv_net().train()
        before, state = snapshot(net), torch.get_rng_state()
        first, again = (ellq.plan(net, IMAGE, sparsity=0.5, refit="synthetic") for _ in range(2))
        assert first.to_json() == again.to_json()
        assert torch.equal(torch.get_rng_state(), state)
        assert_unchanged(net, before)

    def test_brings_outputs_nearer_than_masks_do(self):
        net = conv_net()
        x = 2 * coloured_noise((64, 3, 8, 8), seed=9) + 0.5
        errors = []
        for way in ("synthetic", "none"):
            pruned = ellq.prune(net, x[:1], sparsity=0.6, refit=way)
            errors.append(rms(pruned(x.clone()).detach() - net(x.clone()).detach()))
        assert errors[0] < 0.7 * errors[1]

    def test_where_nothing_is_masked_little_moves(self):
        net = mlp(9, 7, 3)
        table = (plain := ellq.plan(net, sparsity=0.5, refit="none")).to_frame()
        table["retained"] = table["size"]
        fitted = refit_synthetic(net, plain.with_retained(table))
        for name, value in fitted.values.items():
            np.testing.assert_allclose(value, net.state_dict()[name], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("limit", ["_WEIGHTS", "_OPERATIONS", "_FLOPS"])
    def test_of_what_takes_too_long_rescales_by_default_alone(self, monkeypatch, limit):
        net = conv_net()
        monkeypatch.setattr(synthetic, limit, 10)
        decided = ellq.plan(net, sparsity=0.5)
        assert decided.settings["refit"] == "rescale"
        rescaled = rescale_masks(net, ellq.plan(net, sparsity=0.5, refit="none"))
        assert same_bits(ellq.finalize(ellq.apply(net, decided)), ellq.finalize(ellq.apply(net, rescaled)))
        assert ellq.plan(net, IMAGE, sparsity=0.5, refit="synthetic").settings["refit"] == "synthetic"

    def test_without_inputs_rescales_by_default_and_says_so_when_asked_for(self):
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 5, 3))
        assert ellq.plan(net, sparsity=0.5).settings["refit"] == "rescale"
        with pytest.raises(ValueError, match=r"refit='synthetic' could make no inputs.*Pass one"):
            ellq.plan(net, sparsity=0.5, refit="synthetic")
        shown = ellq.plan(net, torch.zeros(1, 2, 5, 7), sparsity=0.5, refit="synthetic")
        assert shown.settings["refit"] == "synthetic"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_of_features_that_overflow_rescales_by_default_and_says_so_when_asked_for(self, dtype):
        net = mlp(9, 7, 3).to(dtype)
        with torch.no_grad():
            net[0].weight.mul_(1e4 if dtype == torch.float16 else 1e300)
            net[2].weight.mul_(1e4 if dtype == torch.float16 else 1e300)
        pruned = ellq.prune(net, sparsity=0.5)
        assert pruned.ellq_plan.settings["refit"] == "rescale"
        assert all(torch.isfinite(parameter).all() for parameter in pruned.parameters())
        with pytest.raises(ValueError, match=r"overflow|infinite"):
            ellq.plan(net, sparsity=0.5, refit="synthetic")

    def test_a_state_dict_is_refused(self):
        with pytest.raises(TypeError, match="refit='synthetic' runs the model"):
            ellq.plan(mlp(4, 3).state_dict(), sparsity=0.5, refit="synthetic")

    def test_a_pattern_and_least_are_kept(self):
        net = mlp(16, 12, 4)
        pruned = ellq.prune(net, pattern="2:4")
        assert pruned.ellq_plan.settings["refit"] == "synthetic"
        assert ((pruned[0].weight.reshape(12, 4, 4) != 0).sum(dim=2) == 2).all()
        pruned = ellq.prune(net, sparsity=0.8, least=2)
        assert ((pruned[2].weight != 0).sum(dim=1) >= 2).all()
