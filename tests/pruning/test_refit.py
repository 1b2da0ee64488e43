"""Refitting lowers the errors that it reports, and these are the errors of the network that comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ellq
from ellq.pruning import layer_problem
from ellq.pruning import refit as refit_file
from ellq.pruning.refit import REFITS, refit_masks
from pruned_nets import assert_unchanged, gaussian, mlp, same_bits, snapshot

NEVER_WORSE = ["bias", "least_squares", "obs"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def conv_net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 3, bias=False),
    )
    net(torch.randn(40, 2, 4, 4))
    return net.eval()


def images(n: int = 60, seed: int = 5) -> torch.Tensor:
    return gaussian(n, 2, 4, 4, seed=seed)


def masks_only(net, sparsity: float = 0.6, **arguments) -> ellq.Plan:
    arguments = {"rule": "ellq"} | arguments
    return ellq.plan(net, sparsity=sparsity, refit="none", **arguments)


def outputs_of(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every layer and norm gives, units first."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, y, name=name: seen.__setitem__(name, y.clone()))
        for name, module in net.named_modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        net(x.clone())
    for hook in hooks:
        hook.remove()
    return {name: y.double().movedim(1, 0).flatten(1) for name, y in seen.items()}


def by_running(net: nn.Module, decided: ellq.Plan, x: torch.Tensor) -> np.ndarray:
    """error_after from the finished net, of layers with a shift: its spread is the unit of measure."""
    pruned = ellq.finalize(ellq.apply(net, decided))
    dense, now = outputs_of(net, x), outputs_of(pruned, x)
    errors = []
    for name in decided.measured["layer"]:
        layer = name.removesuffix(".weight")
        module = net.get_submodule(layer)
        change = now[layer] - dense[layer]
        target = dense[layer]
        if layer == "0":  # its shift lies in the norm
            change -= (pruned[1].running_mean - net[1].running_mean).double()[:, None]
        if module.bias is not None or layer == "0":
            target = target - target.mean(dim=1, keepdim=True)
        errors.append(float((change.square().sum() / target.square().sum()).sqrt()))
    return np.array(errors)


@pytest.mark.parametrize("way", ["bias", "least_squares", "obs", "sparsegpt"])
def test_the_finished_net_errs_as_was_measured(way):
    net, x = conv_net(), images()
    decided = refit_masks(net, masks_only(net), [x[:40], x[40:]], refit=way)
    assert list(decided.measured["layer"]) == ["0.weight", "3.weight", "6.weight"]
    assert list(decided.measured["samples"]) == [960, 240, 60]
    if way == "sparsegpt":  # without a shift, errors are relative to the outputs less their bias
        net[3].bias.data.zero_()
        net[0].bias = None
        decided = refit_masks(net, masks_only(net), [x], refit=way)
        pruned = ellq.finalize(ellq.apply(net, decided))
        dense, now = outputs_of(net, x), outputs_of(pruned, x)
        found = [float((now[n] - dense[n]).norm() / dense[n].norm()) for n in ("0", "3", "6")]
        np.testing.assert_allclose(decided.measured["error_after"], found, rtol=1e-4)
        return
    np.testing.assert_allclose(decided.measured["error_after"], by_running(net, decided, x), rtol=1e-4)


@pytest.mark.parametrize("way", NEVER_WORSE)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("samples", [1, 7, 60])  # of 24 weights and fewer
def test_the_error_never_rises(way, seed, samples):
    net = conv_net(seed)
    decided = refit_masks(net, masks_only(net, 0.8), [images(samples, seed)], refit=way)
    assert (decided.measured["error_after"] <= decided.measured["error_before"] * (1 + 1e-5) + 1e-6).all()
    if way == "obs" and samples == 60:
        assert (decided.measured["error_after"] < decided.measured["error_before"]).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 40), rule=st.sampled_from(["ellq", "uniform", "wanda"]))
def test_no_unit_of_the_first_layer_errs_more_than_masked(seed, samples, rule):
    net, x = mlp(6, 5, 4, seed=seed), gaussian(samples, 6, seed=seed)
    decided = masks_only(net, 0.5, rule=rule) if rule != "wanda" else ellq.plan(net, x, rule="wanda", sparsity=0.5)
    masked = ellq.finalize(ellq.apply(net, decided))
    errors = {}
    for way in NEVER_WORSE:
        now = ellq.finalize(ellq.apply(net, refit_masks(net, decided, [x], refit=way)))
        errors[way] = (now[0](x) - net[0](x)).square().mean(dim=0).detach().numpy()
    plain = (masked[0](x) - net[0](x)).square().mean(dim=0).detach().numpy()
    slack = 1e-9 + 1e-5 * plain
    assert (errors["bias"] <= plain + slack).all()
    assert (errors["least_squares"] <= errors["bias"] + slack).all()
    assert (errors["obs"] <= errors["least_squares"] + slack).all()


def twins() -> tuple[nn.Sequential, torch.Tensor]:
    """Every input comes twice, so half the weights can do all the work."""
    net, x = mlp(8, 5, 4), gaussian(300, 4)
    return net, torch.cat([x, x], dim=1)


@pytest.mark.parametrize("way", ["least_squares", "obs"])
def test_what_can_be_made_up_for_is(way):
    net, x = twins()
    decided = ellq.plan(net, x, rule="wanda", sparsity=0.5, include="0")  # four of each unit
    if way == "least_squares":
        decided.kept["0.weight"][:] = np.arange(8) < 4  # one of each pair
    decided = refit_masks(net, decided, [x], refit=way, ridge=1e-4)
    (row,) = decided.measured.itertuples()
    assert row.error_before > 0.1
    assert row.error_after < 3e-4
    torch.testing.assert_close(ellq.apply(net, decided)(x), net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", NEVER_WORSE)
def test_means_are_restored_through_bias_and_norm(way):
    net, x = conv_net(), images()
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2.0)
    decided = refit_masks(net, masks_only(net, 0.7), [x[:20], x[20:]], refit=way)
    assert set(decided.values) == {"0.weight", "1.running_mean", "3.weight", "3.bias", "6.weight"}
    pruned = ellq.finalize(ellq.apply(net, decided))
    dense, now = outputs_of(net, x), outputs_of(pruned, x)
    masked = outputs_of(ellq.finalize(ellq.apply(net, masks_only(net, 0.7))), x)
    for name in ("1", "3"):
        means = [outputs[name].mean(dim=1) for outputs in (dense, now, masked)]
        torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-5)
        assert (means[2] - means[0]).abs().max() > 1e-3


def test_bias_correction_leaves_weights_as_they_are():
    net, plain = conv_net(), masks_only(conv_net())
    decided = refit_masks(net, plain, [images()], refit="bias")
    masked = ellq.finalize(ellq.apply(net, plain)).state_dict()
    for name in plain.table["layer"].unique():
        assert np.array_equal(decided.values[name], masked[name])


def test_a_ridge_pulls_towards_the_dense_weights_where_samples_say_nothing():
    net, x = mlp(6, 5, 4), torch.zeros(50, 6)
    decided = refit_masks(net, plain := masks_only(net, 0.5), [x], refit="least_squares")
    masked = ellq.finalize(ellq.apply(net, plain))
    assert np.array_equal(decided.values["0.weight"], masked[0].weight.detach())
    np.testing.assert_allclose(decided.values["0.bias"], net[0].bias.detach())
    assert (decided.measured["error_after"] == 0).all()


@pytest.mark.parametrize("way", list(REFITS))
class TestEveryWay:
    def test_keeps_its_counts_and_changes_nothing_else(self, way):
        net, plain = conv_net().train(), masks_only(conv_net())
        net[3].weight.requires_grad_(False)
        x = images()
        given, before = x.clone(), snapshot(net)
        decided = refit_masks(net, plain, [x], refit=way)
        assert_unchanged(net, before)
        assert torch.equal(x, given)
        assert decided.settings["refit"] == way
        pruned = ellq.finalize(ellq.apply(net, decided))
        for name, rows in decided.table.groupby("layer", sort=False):
            planned = plain.table["retained"][plain.table["layer"] == name].to_numpy()
            counts = rows["retained"].to_numpy()
            assert (counts == decided.kept[name].reshape(len(rows), -1).sum(axis=1)).all()
            stored = pruned.get_parameter(name).detach().numpy()
            assert not stored[~decided.kept[name]].any()
            assert np.array_equal(stored, decided.values[name])
            if way == "sparsegpt":  # by groups of rows
                assert counts.sum() == planned.sum()
            elif way == "reweight":
                assert (counts <= planned).all()
            else:
                assert (counts == planned).all()

    def test_survives_json(self, way):
        net = conv_net()
        decided = refit_masks(net, masks_only(net), [images()], refit=way)
        again = ellq.Plan.from_json(decided.to_json())
        assert again.to_json() == decided.to_json()
        assert again.measured.equals(decided.measured)
        assert same_bits(ellq.apply(net, again), ellq.apply(net, decided))

    def test_the_same_seed_gives_the_same_bits(self, way, monkeypatch):
        monkeypatch.setattr(layer_problem, "SAMPLES", 2)  # so that positions are drawn
        net = conv_net()
        first, second, other = (
            refit_masks(net, masks_only(net), [images()], refit=way, seed=seed).to_json() for seed in (3, 3, 4)
        )
        assert first == second
        assert first != other

    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types(self, way, kind):
        net = conv_net().to(kind)
        decided = refit_masks(net, masks_only(net), [images()], refit=way)
        pruned = ellq.finalize(ellq.apply(net, decided))
        assert pruned[0].weight.dtype == kind
        assert all(
            value.dtype == (np.float64 if kind == torch.float64 else np.float32) for value in decided.values.values()
        )
        if way in NEVER_WORSE:
            slack = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-9}[kind]
            assert (decided.measured["error_after"] <= decided.measured["error_before"] + slack).all()
        if way == "least_squares" and kind != torch.float64:
            # What is measured is what is stored: in a coarse type the error is larger than that of the fit.
            fine = refit_masks(net.float(), masks_only(net), [images()], refit=way).measured
            np.testing.assert_allclose(decided.measured["error_after"], fine["error_after"], rtol=0.1)

    def test_bad_inputs_are_named(self, way):
        net, x = conv_net(), images()
        x[50, 0, 0, 0] = torch.nan
        other, before = mlp(3, 2), snapshot(net)
        with pytest.raises(ValueError, match=r"Batch 1 of the calibration set gives NaN.*'0'. Nothing was changed"):
            refit_masks(net, masks_only(net), [x[:30], x[30:]], refit=way)
        with pytest.raises(ValueError, match="does not run on batch 0"):
            refit_masks(net, masks_only(net), [gaussian(3, 5, 4, 4)], refit=way)
        with pytest.raises(ValueError, match="for another model"):
            refit_masks(other, masks_only(net), [gaussian(3, 3)], refit=way)
        assert_unchanged(net, before)

    def test_a_layer_that_retains_nothing_falls_silent(self, way):
        net = mlp(5, 4, 3)
        table = (plain := masks_only(net)).to_frame()
        table.loc[table["layer"] == "0.weight", "retained"] = 0
        decided = refit_masks(net, plain.with_retained(table), [gaussian(30, 5)], refit=way)
        assert not decided.values["0.weight"].any()
        assert ellq.apply(net, decided)(gaussian(2, 5)).isfinite().all()

    def test_everything_retained_changes_nothing_to_speak_of(self, way):
        net, x = mlp(5, 4, 3), gaussian(80, 5)
        table = (plain := masks_only(net)).to_frame()
        table["retained"] = table["size"]
        decided = refit_masks(net, plain.with_retained(table), [x], refit=way)
        assert (decided.measured["error_after"] < 1e-5).all()
        torch.testing.assert_close(ellq.apply(net, decided)(x), net(x), rtol=1e-4, atol=1e-5)

    def test_a_layer_without_bias_or_norm(self, way):
        net, x = mlp(5, 4, 3, bias=False), gaussian(80, 5) + 1
        decided = refit_masks(net, masks_only(net), [x], refit=way)
        assert set(decided.values) == {"0.weight", "2.weight"}
        pruned = ellq.finalize(ellq.apply(net, decided))
        found = float((pruned[0](x) - net[0](x)).norm() / net[0](x).norm())
        assert decided.measured["error_after"][0] == pytest.approx(found, rel=1e-4)

    def test_no_position_is_too_few(self, way):
        net = conv_net()
        decided = refit_masks(net, masks_only(net), [images(1)], refit=way)
        assert ellq.apply(net, decided)(images()).isfinite().all()

    def test_interrupted_it_leaves_the_model_as_it_was(self, way, monkeypatch):
        net = conv_net()
        before, threads = snapshot(net), torch.get_num_threads()
        calls = []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return write(*args, **kwargs)

        write = refit_file._set_
        monkeypatch.setattr(refit_file, "_set_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            refit_masks(net, masks_only(net), [images()], refit=way)
        assert_unchanged(net, before)
        assert torch.get_num_threads() == threads


def test_least_squares_keeps_the_support_of_a_plan_by_scores():
    net, x = conv_net(), images()
    plain = ellq.plan(net, x, rule="wanda", sparsity=0.6)
    decided = refit_masks(net, plain, [x], refit="least_squares")
    for name, mask in plain.kept.items():
        assert np.array_equal(decided.kept[name], mask)
    by_plan = ellq.plan(net, x, rule="wanda", sparsity=0.6, refit="least_squares")
    assert by_plan.to_json() == decided.to_json()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(1, 60),
    shift=st.sampled_from([0.0, 3.0]),
    sparsity=st.floats(0.1, 0.8),
)
def test_reweighting_keeps_its_bound_on_the_calibration_inputs(seed, samples, shift, sparsity):
    net, x = mlp(7, 6, 4, seed=seed).double(), (gaussian(samples, 7, seed=seed) + shift).double()
    plain = masks_only(net, sparsity)
    decided = refit_masks(net, plain, [x], refit="reweight")
    assert list(decided.measured.columns) == ["layer", "samples", "error_before", "error_after", "bound"]
    pruned, h = ellq.finalize(ellq.apply(net, decided)), x
    for layer, row in zip((0, 2), decided.measured.itertuples(), strict=True):
        with torch.no_grad():  # on the dense net's inputs
            y = net[layer](h) - net[layer].bias
            errors = (pruned[layer](h) - net[layer](h)).square().mean(dim=0).sqrt()
            size = y.square().mean().sqrt()
            h = torch.relu(net[layer](h))
        assert errors.max() <= row.bound * size * (1 + 1e-12) + 1e-14
        assert row.error_after <= row.bound
        assert row.error_after <= row.error_before * (1 + 1e-6) + 1e-7
        expected = (errors.square().mean().sqrt() / size).item() if size > 0 else 0.0
        assert row.error_after == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_bound_one_percent_too_small_would_be_caught():
    # Inputs all at right angles and equal weights: the bound is nearly what happens.
    d = 400
    net = nn.Sequential(nn.Linear(d, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    plain = masks_only(net, 0.9)
    decided = refit_masks(net, plain, [torch.eye(d).double() * d**0.5], refit="reweight")
    (row,) = decided.measured.itertuples()
    assert 0.99 * row.bound < row.error_after <= row.bound


class Mixed(nn.Module):
    """Layers that cannot be refitted among those that can."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose1d(2, 4, 3), nn.BatchNorm1d(4)
        self.conv, self.volume = nn.Conv1d(4, 6, 3), nn.Conv3d(1, 2, 1)
        self.rnn, self.attend = nn.GRU(6, 6, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True)
        self.twice, self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.conv(self.norm(self.up(x)))
        x = x + self.volume(x[:, None, :, :, None])[:, 0, :, :, 0]
        x = self.rnn(x.transpose(1, 2))[0]
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = self.twice(torch.relu(self.twice(x)))
        x = self.other(torch.relu(self.one(x)))
        return {"logits": self.last(x), "mean": (x.mean(), None)}


@pytest.mark.parametrize("way", [*REFITS, "auto"])
def test_layers_that_cannot_be_refitted_are_masked_only(way):
    torch.manual_seed(0)
    net, x = Mixed().eval(), gaussian(30, 2, 9)
    decided = ellq.plan(net, x, sparsity=0.5, refit=way)
    assert list(decided.measured["layer"]) == ["conv.weight", "volume.weight", "last.weight"]
    pruned = ellq.finalize(ellq.apply(net, decided))
    for name, rows in decided.table.groupby("layer", sort=False):
        weight = pruned.get_parameter(str(name))
        assert int(weight.count_nonzero()) <= rows["retained"].sum()
        if name not in decided.values:
            kept = weight != 0
            assert torch.equal(weight[kept], net.get_parameter(str(name))[kept])
    assert int(decided.table["retained"].sum()) <= int(ellq.plan(net, sparsity=0.5).table["retained"].sum())
    assert ellq.Plan.from_json(decided.to_json()).to_json() == decided.to_json()


def test_kept_entries_of_a_layer_that_is_masked_only_keep_their_counts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose1d(2, 4, 3, groups=2), nn.Conv1d(4, 3, 1))
    batches = [(gaussian(8, 2, 6), torch.zeros(8, 3, 8))]
    plain = ellq.plan(net, batches, rule="taylor", sparsity=0.5)
    decided = refit_masks(net, plain, [batches[0][0]], refit="least_squares")
    assert decided.table.equals(plain.table)
    assert list(decided.measured["layer"]) == ["1.weight"]


def test_a_model_that_is_one_layer():
    net, x = nn.Linear(6, 3), gaussian(50, 6)
    decided = ellq.plan(net, x, sparsity=0.5)
    assert set(decided.values) == {"weight", "bias"}
    assert list(decided.measured["layer"]) == ["weight"]
    pruned = ellq.finalize(ellq.apply(net, decided))
    error = (pruned(x) - net(x)).square().sum() / (net(x) - net(x).mean(dim=0)).square().sum()
    assert decided.measured["error_after"][0] == pytest.approx(float(error.detach().sqrt()), rel=1e-4)


def test_gone_units_and_dead_inputs():
    net, x = mlp(6, 5, 4), gaussian(80, 6)
    x[:, 2] = 0.0
    with torch.no_grad():
        net[0].weight[1] = 0.0
        net[0].bias[3] = -1e3  # never fires
    for way in REFITS:
        decided = refit_masks(net, masks_only(net), [x], refit=way)
        assert not decided.values["0.weight"][1].any()
        assert ellq.apply(net, decided)(x).isfinite().all()
        assert np.isfinite(decided.measured.drop(columns="layer").to_numpy(float)).all()


class Residual(nn.Module):
    """Blocks like those of a ResNet, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(2, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.end = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.start(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)) + x)
        return self.end(x.mean(dim=(2, 3)))


def test_the_outputs_of_a_residual_net_err_the_less_the_more_is_refitted():
    torch.manual_seed(0)
    net, x = Residual(), gaussian(200, 2, 6, 6)
    net(x)
    net.eval()
    errors = [
        float((ellq.prune(net, x, sparsity=0.7, refit=way)(x) - net(x)).norm())
        for way in ("none", "bias", "least_squares", "obs")
    ]
    assert errors == sorted(errors, reverse=True)


def test_unknown_ways_are_named():
    net = mlp(3, 2)
    with pytest.raises(ValueError, match=r"refit='magic' is unknown\. Choose one of 'bias'"):
        refit_masks(net, masks_only(net), [gaussian(3, 3)], refit="magic")


def test_layers_too_large_to_eliminate_are_fitted_by_least_squares(monkeypatch):
    net, inputs = mlp(12, 10, 3), gaussian(200, 12)
    expected = ellq.plan(net, inputs, sparsity=0.6, refit="least_squares")
    monkeypatch.setattr("ellq.pruning.refit._OPERATIONS", 1.0)
    found = ellq.plan(net, inputs, sparsity=0.6, refit="obs")
    assert found.table["retained"].equals(expected.table["retained"])
    for name, value in expected.values.items():
        np.testing.assert_array_equal(found.values[name], value)
