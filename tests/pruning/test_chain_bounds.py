from __future__ import annotations

import copy
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

from ellq.pruning import Plan, apply, chain_bounds, plan
from pruned_nets import gaussian, mlp, prunings, quiet

ATTACK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
CHECK = settings(ATTACK, max_examples=50)


def edited(net: nn.Module, retained) -> Plan:
    """A plan of masks with these counts."""
    decided = plan(net, tol=0.5, refit="none")
    table = decided.to_frame()
    table["retained"] = retained
    return decided.with_retained(table)


def bounds(net, retained, inputs):
    decided = edited(net, retained)
    return chain_bounds(net, apply(net, decided), inputs, decided)


def is_of_masks(decided: Plan) -> bool:
    return decided.method == "lq" and not decided.values  # noqa: PD011 -- no pandas


class TestEveryBound:
    @ATTACK
    @given(prunings())
    def test_is_never_below_what_is_observed(self, case):
        assume(case is not None)
        dense, pruned, inputs, decided = case
        table = chain_bounds(dense, pruned, inputs, decided)
        names = ["bound", "bound_measured"] + ["bound_lq"] * is_of_masks(decided)
        for name in names:
            assert (table[name] >= table["observed"]).all(), table.T

    @CHECK
    @given(prunings())
    def test_is_smaller_the_more_it_knows(self, case):
        assume(case is not None)
        table = chain_bounds(*case)
        assert (table["bound_measured"] <= table["bound"] * (1 + 1e-9)).all(), table.T
        if is_of_masks(case[3]):
            assert (table["bound"] <= table["bound_lq"] * (1 + 1e-9)).all(), table.T

    @CHECK
    @given(prunings())
    def test_agrees_with_the_models_own_outputs(self, case):
        assume(case is not None)
        dense, pruned, inputs, decided = case
        last = chain_bounds(dense, pruned, inputs, decided).iloc[-1]
        with torch.no_grad():
            first = copy.deepcopy(dense).double().eval()(inputs)
            second = copy.deepcopy(pruned).double().eval()(inputs)
        expected = float((first - second).square().mean(0).sqrt().max())
        assert last["observed"] == pytest.approx(expected, rel=1e-9, abs=1e-14 * float(first.abs().max()))

    @pytest.mark.parametrize("name", ["bound", "bound_measured", "bound_lq"])
    def test_is_attained_so_one_percent_less_would_fail(self, name):
        # Equal inputs, equal weights, of which half go: the errors add up without cancellation.
        net = nn.Sequential(nn.Linear(400, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(1.0)
        table = bounds(net, [200, 1], torch.ones(3, 400))
        last = table.iloc[-1]
        assert last["observed"] == 200.0  # and for q = ½: c·‖w‖_q/k = ¼·400²/200
        assert 0.99 * last[name] < last["observed"] <= last[name]

    def test_is_zero_when_nothing_is_pruned(self):
        net = mlp(4, 6, 5, 2)
        table = bounds(net, [4] * 6 + [6] * 5 + [5] * 2, gaussian(7, 4))
        for name in ("observed", "bound", "bound_measured", "bound_lq", "local_bound"):
            assert (table[name] == 0.0).all()

    def test_is_zero_up_to_the_first_pruned_layer(self):
        net = mlp(4, 6, 5, 2)
        table = bounds(net, [4] * 6 + [3] * 5 + [5] * 2, gaussian(7, 4))
        assert (table.loc[0, ["observed", "bound", "bound_measured", "bound_lq"]] == 0.0).all()
        assert (table.loc[1:, ["observed", "bound", "bound_measured", "bound_lq"]] > 0.0).all(axis=None)

    def test_scales_with_the_inputs_where_there_is_no_bias(self):
        net = mlp(4, 6, 2, bias=False).double()
        small = bounds(net, [2] * 6 + [3] * 2, gaussian(7, 4))
        large = bounds(net, [2] * 6 + [3] * 2, gaussian(7, 4) * 1024)
        for name in ("observed", "bound", "bound_measured", "bound_lq"):
            np.testing.assert_allclose(large[name], 1024 * small[name], rtol=1e-12)

    @pytest.mark.parametrize("size", [1e-250, 1e200])
    def test_holds_where_squares_leave_the_range(self, size):
        net = mlp(4, 6, 2, bias=False).double()
        table = bounds(net, [2] * 6 + [3] * 2, gaussian(7, 4).double() * size)
        assert (table["observed"] > 0).all()
        for name in ("bound", "bound_measured", "bound_lq"):
            assert (table[name] >= table["observed"]).all()
            assert (table[name] <= 1000 * table["observed"]).all()

    def test_covers_units_emptied_by_hand(self):
        net = mlp(4, 6, 2)
        table = bounds(net, [0] * 8, gaussian(7, 4))
        for name in ("bound", "bound_measured", "bound_lq"):
            assert (table[name] >= table["observed"]).all()
        assert (table["observed"] > 0).all()


class TestLayouts:
    def test_units_of_tokens_are_told_from_positions(self):
        # Only unit 0 changes; after Flatten its errors lie at columns 0 and 4, both read with weight 1.
        net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Flatten(), nn.Linear(8, 1, bias=False)).double()
        with torch.no_grad():
            net[0].weight.fill_(1.0)
            net[2].weight.zero_()
            net[2].weight[0, [0, 4]] = 1.0
        table = bounds(net, [1, 3, 3, 3, 8], torch.ones(5, 2, 3))
        assert table["observed"].iloc[-1] == 4.0
        assert table["bound_measured"].iloc[-1] == pytest.approx(4.0, rel=1e-12)

    def test_a_linear_along_positions_reads_every_channel_on_its_own(self):
        net = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.Linear(2, 1, bias=False)).double()
        with torch.no_grad():
            net[0].weight.fill_(1.0)
            net[1].weight.copy_(torch.tensor([[100.0, 1.0]]))
        table = bounds(net, [0, 1, 2], torch.ones(3, 1, 2))
        assert table["observed"].iloc[-1] == 101.0
        assert table["bound_measured"].iloc[-1] == pytest.approx(101.0, rel=1e-12)

    @pytest.mark.parametrize("rule", ["ellq", "chee2021"])
    def test_one_loud_position_among_many_tokens_counts_in_full(self, rule):
        for seed in range(10):
            net = mlp(3, 4, 1, seed=seed)
            inputs = gaussian(5, 6, 3, seed=seed)
            inputs[:, 0] *= 30
            decided = plan(net, inputs, method="id", rule=rule, sparsity=0.7)
            last = chain_bounds(net, apply(net, decided), inputs, decided).iloc[-1]
            assert last["observed"] <= last["bound_measured"] <= last["bound"] * (1 + 1e-9)

    def test_a_module_used_twice_runs_twice(self):
        activation = nn.Tanh()
        net = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 5), activation, nn.Linear(5, 2)).double()
        decided = plan(net, sparsity=0.5)
        pruned = apply(net, decided)
        inputs = gaussian(6, 4).double()
        table = chain_bounds(net, pruned, inputs, decided)
        with torch.no_grad():
            expected = (net(inputs) - pruned(inputs)).square().mean(0).sqrt().max()
        assert table["observed"].iloc[-1] == pytest.approx(float(expected), rel=1e-12)

    def test_a_layer_used_twice_is_bounded_at_both_places(self):
        layer = nn.Linear(4, 4)
        net = nn.Sequential(layer, nn.ReLU(), layer).double()
        decided = plan(net, sparsity=0.5)
        table = chain_bounds(net, apply(net, decided), gaussian(6, 4).double(), decided)
        assert list(table["layer"]) == ["0", "2"]
        assert (table["bound_measured"] >= table["observed"]).all()
        assert (table["bound"] >= table["observed"]).all()
        assert (table["observed"] > 0).all()

    def test_one_layer_alone_is_a_chain(self):
        net = nn.Linear(4, 3)
        decided = plan(net, sparsity=0.5, refit="none")
        table = chain_bounds(net, apply(net, decided), gaussian(6, 4), decided)
        assert table["observed"].iloc[0] <= table["bound"].iloc[0] <= table["bound_lq"].iloc[0]

    def test_sums_instead_of_averages_are_counted_as_sums(self):
        net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.AvgPool2d(2, divisor_override=1)).double()
        with torch.no_grad():
            net[0].weight.fill_(1.0)
        table = bounds(net, [0], torch.ones(3, 1, 2, 2))
        assert table["observed"].iloc[0] == 4.0
        assert table["bound"].iloc[0] == pytest.approx(4.0, rel=1e-12)
        assert table["bound_measured"].iloc[0] == pytest.approx(4.0, rel=1e-12)

    def test_a_maximum_can_be_further_off_than_any_of_its_positions(self):
        net = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.MaxPool1d(2)).double()
        with torch.no_grad():
            net[0].weight.fill_(1.0)
        table = bounds(net, [0], torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        assert table["observed"].iloc[0] == 1.0  # each position's rms is √½
        assert table["bound"].iloc[0] == pytest.approx(1.0, rel=1e-12)
        assert table["bound_measured"].iloc[0] == pytest.approx(1.0, rel=1e-12)

    @pytest.mark.parametrize(
        ("function", "slope"), [(nn.ELU(2.0), 2.0), (nn.CELU(2.0), 1.0), (nn.LeakyReLU(-3.0), 3.0)]
    )
    def test_negative_inputs_meet_the_slope_there(self, function, slope):
        net = nn.Sequential(nn.Linear(1, 1, bias=False), function).double()
        with torch.no_grad():
            net[0].weight.fill_(1.0)
        table = bounds(net, [0], torch.full((2, 1), -1e-6, dtype=torch.float64))
        assert table["observed"].iloc[0] == pytest.approx(slope * 1e-6, rel=1e-5)
        assert table["observed"].iloc[0] <= table["bound_measured"].iloc[0] <= 1.01 * table["observed"].iloc[0]

    def test_softplus_jumps_where_it_becomes_linear(self):
        net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Softplus(threshold=1.0)).double()
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[1.0 + 1e-9, 1e-8]]))
        table = bounds(net, [1], torch.tensor([[1.0 - 4e-9, 1.0]], dtype=torch.float64))
        assert table["observed"].iloc[0] == pytest.approx(math.log1p(math.e) - 1)
        assert table["observed"].iloc[0] <= table["bound_measured"].iloc[0] <= table["bound"].iloc[0] * (1 + 1e-9)

    def test_training_mode_in_place_functions_and_inputs_are_left_alone(self):
        net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)).double().train()
        inputs = gaussian(6, 4).double()
        before = inputs.clone()
        decided = plan(net, sparsity=0.5)
        pruned = apply(net, decided)
        first = chain_bounds(net, pruned, inputs, decided)
        assert torch.equal(inputs, before)
        assert all(module.training for module in net.modules())
        assert first.equals(chain_bounds(net, pruned, inputs, decided))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Backwards(nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


class TestRefuses:
    @pytest.mark.parametrize(
        "odd",
        [
            nn.Softmax(dim=1),
            nn.LayerNorm(4),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.CELU(-1.0),
            Doubling(4, 4),
            Backwards(nn.Linear(4, 4), nn.ReLU()),
            nn.ConvTranspose1d(4, 4, 1),
            nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        ],
        ids=lambda module: type(module).__name__,
    )
    def test_what_it_does_not_know(self, odd):
        net = nn.Sequential(nn.Linear(4, 4))
        decided = plan(net, sparsity=0.5)
        with pytest.raises(ValueError, match="is not known"):
            chain_bounds(nn.Sequential(*net, odd), nn.Sequential(*net, odd), gaussian(3, 4), decided)

    def test_max_pooling_that_returns_indices(self):
        net = nn.Sequential(nn.Conv1d(1, 1, 1), nn.MaxPool1d(2, return_indices=True))
        with pytest.raises(ValueError, match="is not known"):
            chain_bounds(net, net, gaussian(3, 1, 4), plan(mlp(2, 2), sparsity=0.5))

    def test_a_chain_without_layers(self):
        with pytest.raises(ValueError, match="no Linear or Conv"):
            chain_bounds(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU()), gaussian(3, 4), plan(mlp(2, 2), tol=0.5))

    def test_a_plan_with_layers_the_chain_lacks(self):
        net = mlp(4, 5, 2)
        with pytest.raises(ValueError, match=r"'4\.weight'"):
            chain_bounds(net, net, gaussian(3, 4), plan(mlp(4, 5, 2, 2), sparsity=0.5))

    def test_a_plan_that_did_not_lead_from_one_to_the_other(self):
        net = mlp(4, 5, 2)
        with pytest.raises(ValueError, match="not what the plan makes"):
            chain_bounds(
                net,
                apply(net, plan(net, sparsity=0.5, refit="none")),
                gaussian(3, 4),
                plan(net, sparsity=0.6, refit="none"),
            )

    @pytest.mark.parametrize("method", ["lq", "id"])
    def test_a_plan_for_other_widths(self, method):
        net, other = mlp(4, 9, 2), mlp(4, 5, 2)
        inputs = gaussian(40, 4)
        decided = plan(net, inputs, method=method, sparsity=0.2)
        with pytest.raises(ValueError, match="plan"):
            chain_bounds(other, other, inputs, decided)
        with pytest.raises(ValueError, match="plan"):
            chain_bounds(net, other, inputs, decided)

    def test_chains_of_different_functions(self):
        net = mlp(4, 5, 2)
        decided = plan(net, sparsity=0.5)
        pruned = apply(net, decided)
        pruned[1] = nn.Tanh()
        with pytest.raises(ValueError, match="Step '1' is ReLU"):
            chain_bounds(net, pruned, gaussian(3, 4), decided)
        with pytest.raises(ValueError, match="differ at '2'"):
            chain_bounds(net, pruned[:2], gaussian(3, 4), decided)

    def test_a_plan_whose_refit_moved_a_batch_norm(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        decided = plan(net, sparsity=0.5, refit="rescale")
        assert "1.running_var" in decided.values  # noqa: PD011 -- no pandas
        with pytest.raises(ValueError, match=r"Step '1' is BatchNorm1d.*refit='none'"):
            chain_bounds(net, apply(net, decided), gaussian(3, 4), decided)

    def test_batch_norms_in_different_states(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        decided = plan(net, sparsity=0.5)
        pruned = apply(net, decided)
        pruned[1].running_mean += 1
        with pytest.raises(ValueError, match="Step '1'"):
            chain_bounds(net, pruned, gaussian(3, 4), decided)

    @pytest.mark.parametrize(
        "inputs",
        [torch.zeros(0, 4), torch.zeros(4), torch.full((2, 4), math.nan), torch.full((2, 4), math.inf)],
        ids=["none", "no batch", "nan", "inf"],
    )
    def test_inputs_without_a_meaning(self, inputs):
        net = mlp(4, 5, 2)
        decided = plan(net, sparsity=0.5)
        with pytest.raises(ValueError, match="must be finite examples"):
            chain_bounds(net, apply(net, decided), inputs, decided)

    def test_an_image_without_a_batch(self):
        net = nn.Sequential(nn.Conv2d(2, 3, 3))
        decided = plan(net, sparsity=0.5)
        with pytest.raises(ValueError, match="batched on axis 0"):
            chain_bounds(net, apply(net, decided), gaussian(2, 5, 5), decided)

    def test_flattening_the_batch(self):
        net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 2))
        decided = plan(net, sparsity=0.5)
        with pytest.raises(ValueError, match="mixes examples"):
            chain_bounds(net, apply(net, decided), gaussian(3, 5, 4), decided)

    def test_a_plan_read_from_a_file_too_small_for_its_interpolation_matrix(self, monkeypatch):
        net, inputs = mlp(4, 9, 2), gaussian(40, 4)
        decided = plan(net, inputs, method="id", sparsity=0.5)
        expected = chain_bounds(net, apply(net, decided), inputs, decided)
        kept = Plan.from_json(decided.to_json())
        pd.testing.assert_frame_equal(chain_bounds(net, apply(net, kept), inputs, kept), expected)
        monkeypatch.setattr(sys.modules[Plan.__module__], "STORED", 1)
        decided = Plan.from_json(decided.to_json())
        with pytest.raises(ValueError, match="Make the plan again"):
            chain_bounds(net, apply(net, decided), inputs, decided)


def test_exact_duplicates_are_bounded_by_rounding_alone():
    net = mlp(4, 6, 2).double()
    with torch.no_grad():
        net[0].weight[3:] = net[0].weight[:3]
        net[0].bias[3:] = net[0].bias[:3]
    inputs = gaussian(50, 4).double()
    with quiet():
        decided = plan(net, inputs, method="id", sparsity=0.5)
    last = chain_bounds(net, apply(net, decided), inputs, decided).iloc[-1]
    assert last["observed"] <= last["bound_measured"] < 1e-11
    assert last["observed"] <= last["bound"] < 1e-11
    assert math.isnan(last["bound_lq"])
