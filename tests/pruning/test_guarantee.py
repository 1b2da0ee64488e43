from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binom
from torch import nn

from ellq.analysis import datasets, partition
from ellq.analysis.feature_range import feature_norm_bound
from ellq.pruning import Guarantee, Plan, apply, guarantee, plan, save, train_classifier
from pruned_nets import assert_unchanged, gaussian, mlp, quiet, snapshot


def changes(net, pruned, inputs) -> np.ndarray:
    with torch.no_grad():
        return (pruned(inputs) - net(inputs)).double().square().sum(1).numpy()


def case(n=400, held=300, **settings):
    net, inputs = mlp(5, 12, 3, seed=1), gaussian(n, 5, seed=2)
    held_out = gaussian(held, 5, seed=3) if held else None
    arguments = {"tol": 0.2, "held_out": held_out} | settings
    return net, inputs, held_out, plan(net, inputs, method="id", **arguments)


class TestMeasures:
    @pytest.mark.parametrize("rule", ["ellq", "chee2021"])
    @pytest.mark.parametrize("held", [0, 300])
    def test_what_the_pruned_model_does_in_its_own_type(self, rule, held):
        net, inputs, held_out, decided = case(held=held, rule=rule)
        pruned, found = apply(net, decided), decided.guarantee
        on = changes(net, pruned, inputs)
        assert found.calibration_risk == pytest.approx(on.mean(), rel=1e-9)
        assert found.calibration_samples == 400
        with torch.no_grad():
            outputs = net(inputs).double().numpy()
        assert found.output_energy == pytest.approx(((outputs - outputs.mean(0)) ** 2).sum(1).mean(), rel=1e-9)
        assert found.relative_error == pytest.approx(math.sqrt(on.mean() / found.output_energy), rel=1e-9)
        basis = changes(net, pruned, held_out) if held else on
        assert found.basis == ("held-out" if held else "calibration")
        assert (found.samples, found.observed) == (len(basis), pytest.approx(basis.mean(), rel=1e-9))
        assert found.risk_bound >= basis[basis <= found.limit].sum() / len(basis)
        assert found.relative_bound == pytest.approx(math.sqrt(found.risk_bound / found.output_energy))
        assert 0 < found.share_left_out < 1
        if held:
            assert found.limit == pytest.approx(4 * on.max(), rel=1e-9)

    def test_the_error_that_the_tolerance_limits(self):
        for tol in (0.3, 0.05):
            assert case(tol=tol)[3].guarantee.relative_error <= tol

    def test_examples_of_many_positions_as_one_sample_each(self):
        net, inputs = mlp(5, 12, 3, seed=1), gaussian(80, 6, 5, seed=2)
        decided = plan(net, inputs, method="id", sparsity=0.5, held_out=gaussian(50, 6, 5, seed=3))
        with torch.no_grad():
            mean = (apply(net, decided)(inputs) - net(inputs)).double().square().sum(-1).mean()
        assert decided.guarantee.calibration_samples == 80
        assert decided.guarantee.samples == 50
        assert decided.guarantee.calibration_risk == pytest.approx(float(mean), rel=1e-9)
        # Their features are no independent samples, so nothing is said without held-out inputs.
        assert plan(net, inputs, method="id", tol=0.3).guarantee.risk_bound == math.inf

    def test_without_touching_the_models_or_the_random_state(self):
        net, inputs, held_out, decided = case()
        net.append(nn.BatchNorm1d(3))
        net.train()
        pruned = apply(net, decided)
        before = snapshot(net), snapshot(pruned)
        guarantee(net, pruned, decided, inputs, held_out)
        assert_unchanged(net, before[0])
        assert_unchanged(pruned, before[1])


class TestHolds:
    """Against the truth: Gaussian inputs, of which there are always more."""

    DELTA = 0.2

    @pytest.mark.parametrize("held", [0, 60])
    def test_at_least_as_often_as_promised(self, held):
        fresh = gaussian(20_000, 5, seed=99)
        failures, total = 0, 60
        for seed in range(total):
            net = mlp(5, 8, 2, seed=seed)
            drawn = gaussian(200 + held, 5, seed=1000 + seed)
            held_out = drawn[200:] if held else None
            decided = plan(net, drawn[:200], method="id", sparsity=0.5)
            pruned = apply(net, decided)
            found = guarantee(net, pruned, decided, drawn[:200], held_out, delta=self.DELTA)
            losses = changes(net, pruned, fresh)
            if held:
                counted = losses <= found.limit
                failures += (
                    np.where(counted, losses, 0).mean() > found.risk_bound or (~counted).mean() > found.share_left_out
                )
            else:
                failures += losses.mean() > found.risk_bound  # nearly all inputs count
        assert binom.sf(failures - 1, total, self.DELTA) > 1e-3

    def test_and_is_sharp_enough_to_be_of_use(self):
        found = case(n=4000, held=4000)[3].guarantee
        assert found.risk_bound < 1.3 * found.observed
        assert found.share_left_out < 2e-3
        assert case(n=4000, held=0)[3].guarantee.risk_bound < 3 * found.observed

    def test_where_what_was_measured_in_calibration_does_not(self):
        # With about as many inputs as weights the error measured promises too much; the guarantee does not.
        fresh, failures = gaussian(5000, 5, seed=99), 0
        for seed in range(12):
            net, inputs = mlp(5, 24, 2, seed=seed), gaussian(26, 5, seed=seed)
            with quiet():
                decided = plan(net, inputs, method="id", sparsity=0.05, held_out=gaussian(200, 5, seed=500 + seed))
            losses, found = changes(net, apply(net, decided), fresh), decided.guarantee
            counted = losses <= found.limit
            failures += losses.mean() > 3 * found.calibration_risk
            assert np.where(counted, losses, 0).mean() <= found.risk_bound
            assert (~counted).mean() <= found.share_left_out
        assert failures >= 10


class TestFollows:
    def test_the_risk_split_from_it(self):
        _, _, _, decided = case()
        found = decided.guarantee
        for dense in (0.0, 0.3, 5.0):
            assert found.pruned_risk(dense) == pytest.approx((math.sqrt(dense) + math.sqrt(found.risk_bound)) ** 2)
        with pytest.raises(ValueError, match="dense_risk"):
            found.pruned_risk(-1.0)

    def test_the_risk_on_all_inputs_where_features_are_bounded(self):
        net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
        torch.manual_seed(0)
        inputs = gaussian(300, 5, seed=2)
        decided = plan(net, inputs, method="id", tol=0.3, held_out=gaussian(300, 5, seed=3))
        radius = math.hypot(feature_norm_bound(net[0], net[1], -math.inf, math.inf), 1)
        found, fresh = decided.guarantee, gaussian(5000, 5, seed=4)
        whole = found.whole_risk(radius)
        assert found.risk_bound < whole < math.inf
        assert whole == pytest.approx(found.risk_bound + found.share_left_out * (found.change_norm * radius) ** 2)
        assert changes(net, apply(net, decided), fresh).max() <= (found.change_norm * radius) ** 2

    def test_nothing_on_new_inputs_where_features_do_not_fit(self, monkeypatch):
        monkeypatch.setitem(guarantee.__globals__, "_HELD", 100)
        found = case(held=0)[3].guarantee
        assert found.risk_bound == math.inf
        assert "pass held_out=" in str(found)

    @pytest.mark.parametrize("bias", [True, False])
    def test_nothing_bad_of_a_dead_layer(self, bias):
        net = mlp(5, 6, 2, bias=bias)
        with torch.no_grad():
            net[0].weight.zero_()
            if bias:
                net[0].bias.fill_(-1)
        for inputs in (gaussian(40, 5), gaussian(2, 5)):
            found = plan(net, inputs, method="id", tol=0.5).guarantee
            assert found.calibration_risk < 1e-12
            assert found.relative_error <= 1e-6 or found.output_energy < 1e-12
        held = plan(net, gaussian(40, 5), method="id", tol=0.5, held_out=gaussian(40, 5, seed=1)).guarantee
        assert held.risk_bound < 1e-12


class TestKept:
    @pytest.mark.parametrize("held", [0, 300])
    def test_with_the_plan_on_disk_to_the_last_bit(self, tmp_path, held):
        net, _, _, decided = case(held=held)
        assert Plan.from_json(decided.to_json()).guarantee == decided.guarantee
        save(apply(net, decided), tmp_path / "model", plan=decided)
        text = (tmp_path / "model" / "plan.json").read_text()
        assert Plan.from_json(text).guarantee == decided.guarantee
        kept = json.loads(text)["plan"]["guarantee"]
        assert kept["delta"] == 0.05
        assert kept["assumptions"] == list(decided.guarantee.assumptions)

    def test_also_where_it_is_infinite(self):
        _, _, _, decided = case()
        endless = replace(decided, guarantee=replace(decided.guarantee, risk_bound=math.inf, limit=math.inf))
        assert Plan.from_json(endless.to_json()).guarantee == endless.guarantee

    @pytest.mark.parametrize("damage", [{"samples": "x"}, {"risk_bound": [1]}, 7])
    def test_damaged_is_refused(self, damage):
        data = json.loads(case()[3].to_json())
        data["guarantee"] = data["guarantee"] | damage if isinstance(damage, dict) else damage
        with pytest.raises(ValueError, match="The plan is damaged"):
            Plan.from_json(json.dumps(data))

    def test_printed_below_the_plan(self):
        _, _, _, decided = case()
        console = Console(file=io.StringIO(), width=200)
        console.print(decided)
        text = console.file.getvalue()
        assert f"<= {decided.guarantee.relative_bound:.3g} on new inputs" in text
        assert "probability 0.95, by 300 held-out samples" in text

    def test_absent_where_none_was_asked_for(self):
        net, inputs = mlp(5, 12, 3), gaussian(100, 5)
        assert plan(net, inputs, method="id", sparsity=0.5).guarantee is None
        assert plan(net, tol=0.5).guarantee is None
        assert plan(mlp(5, 9, 9, 3), inputs, method="id", tol=0.5).guarantee is None
        assert Plan.from_json(plan(net, tol=0.5).to_json()).guarantee is None


class TestRefuses:
    def test_held_out_inputs_that_were_chosen_by(self):
        net, inputs = mlp(5, 12, 3), gaussian(100, 5)
        mixed = [gaussian(10, 5, seed=5), torch.cat([gaussian(3, 5, seed=6), inputs[40:42]])]
        for held_out in (mixed, [part.double() for part in mixed]):
            with pytest.raises(ValueError, match="Batch 1 of held_out shares 2 examples with calibration"):
                plan(net, inputs, method="id", tol=0.3, held_out=held_out)

    @pytest.mark.parametrize("method", ["lq", "id"])
    def test_held_out_inputs_where_no_guarantee_is_made(self, method):
        net, inputs = mlp(5, 9, 9, 3), gaussian(100, 5)
        with pytest.raises(ValueError, match=r"method='id' only|cuts 2 hidden layers; the guarantee is for one"):
            plan(net, inputs, method=method, sparsity=0.3, held_out=gaussian(30, 5, seed=1))

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1, float("nan")])
    def test_an_impossible_delta(self, delta):
        with pytest.raises(ValueError, match="delta"):
            case(delta=delta)

    @pytest.mark.parametrize(
        ("held_out", "error"), [(torch.zeros(0, 5), ValueError), (gaussian(9, 4), ValueError), ("mnist", TypeError)]
    )
    def test_held_out_inputs_that_are_none(self, held_out, error):
        with pytest.raises(error):
            case(held_out=held_out)


def test_digits_end_to_end(tmp_path):
    parts = partition(datasets.load("digits"), fit=0.5, calibration=0.5)
    fit, calibration = parts["fit"], parts["calibration"].inputs()
    held_out, fresh = partition(datasets.load("digits", "test"), held_out=0.5, fresh=0.5).values()
    net = train_classifier(lambda: nn.Sequential(nn.Flatten(), *mlp(64, 96, 10)), fit.inputs(), fit.labels)
    decided = plan(net, calibration, method="id", tol=1e-2, held_out=held_out.inputs())
    pruned, found = apply(net, decided), decided.guarantee
    assert isinstance(found, Guarantee)
    assert pruned[1].out_features < 96
    assert found.relative_error <= 1e-2
    losses = changes(net, pruned, fresh.inputs())
    counted = losses <= found.limit
    assert np.where(counted, losses, 0).mean() <= found.risk_bound
    assert (~counted).mean() <= found.share_left_out
    with torch.no_grad():
        targets = torch.eye(10)[fresh.labels]
        dense, after = (float((model(fresh.inputs()) - targets).square().sum(1).mean()) for model in (net, pruned))
    assert after <= found.pruned_risk(dense) + (losses * ~counted).sum()
