from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import ellq
from ellq.pruning.largest import survey
from ellq.pruning.layers import Layers, minima_of
from ellq.pruning.masks import maskable_weights
from ellq.pruning.scores import Share, flow
from pruned_nets import assert_unchanged, gaussian, mlp, snapshot

RULES = ["flow", "synflow", "snip", "taylor", "wanda"]


def data(n=40, width=6, classes=3):
    x = gaussian(n, width)
    return [(x[:25], torch.arange(25) % classes), (x[25:], torch.arange(n - 25) % classes)]


def masks(net, decided) -> np.ndarray:
    assert set(decided.kept) == set(decided.table["layer"])
    return np.concatenate([decided.kept[name].ravel() for name in decided.table["layer"].unique()])


def conv_net() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    net(torch.randn(20, 2, 4, 4))
    return net


@pytest.mark.parametrize("rule", RULES)
class TestEveryScore:
    def test_meets_the_budget_and_changes_nothing(self, rule):
        net = mlp(6, 9, 3)
        net[0].weight.requires_grad_(False)
        net.train()
        before = snapshot(net)
        decided = ellq.plan(net, data(), rule=rule, sparsity=0.7)
        assert_unchanged(net, before)
        assert int(decided.table["retained"].sum()) == masks(net, decided).sum() == 24
        pruned = ellq.prune(net, data(), rule=rule, sparsity=0.7)
        assert sum(int((p != 0).sum()) for p in (pruned[0].weight, pruned[2].weight)) == 24

    def test_survives_json_and_agrees_with_its_counts(self, rule):
        decided = ellq.plan(mlp(6, 9, 3), data(), rule=rule, nonzeros=30)
        again = ellq.Plan.from_json(decided.to_json())
        assert again.to_json() == decided.to_json()
        for name, rows in decided.table.groupby("layer", sort=False):
            np.testing.assert_array_equal(decided.kept[name].sum(axis=1), rows["retained"])

    def test_takes_a_minimum_and_budgets_by_layer(self, rule):
        decided = ellq.plan(mlp(6, 9, 3), data(), rule=rule, nonzeros=30, least=2)
        assert decided.table["retained"].min() >= 2
        by_layer = ellq.plan(mlp(6, 9, 3), data(), rule=rule, sparsity={"0": 0.5, "2": 0.9}).layers()
        assert by_layer["retained"].tolist() == [27, 2]

    def test_repeats(self, rule):
        first, second = (ellq.plan(conv_net(), image_data(), rule=rule, sparsity=0.6) for _ in range(2))
        assert first.to_json() == second.to_json()

    def test_needs_the_model(self, rule):
        with pytest.raises(TypeError, match=f"rule='{rule}' runs the model"):
            ellq.plan(mlp(6, 9, 3).state_dict(), data(), rule=rule, sparsity=0.5)

    def test_knows_no_tolerance(self, rule):
        with pytest.raises(ValueError, match="knows no tolerance"):
            ellq.plan(mlp(6, 9, 3), data(), rule=rule, tol=0.5)


def image_data():
    x = gaussian(16, 2, 4, 4)
    return [(x, torch.arange(16) % 3)]


class TestSynflow:
    def test_in_one_round_is_the_product_over_all_paths(self):
        net = mlp(6, 9, 3)
        first, second = net[0].weight.detach().abs().double(), net[2].weight.detach().abs().double()
        forward = first.sum(1) + net[0].bias.detach().abs().double()
        scores = torch.cat([(second.sum(0)[:, None] * first).flatten(), (second * forward).flatten()])
        kept = masks(net, ellq.plan(net, rule="synflow", rounds=1, nonzeros=30))
        expected = np.zeros(81, dtype=bool)
        expected[torch.argsort(scores, descending=True)[:30].numpy()] = True
        np.testing.assert_array_equal(kept, expected)

    def test_equals_the_authors_loop(self):
        net = conv_net()
        retained, rounds = 40, 7
        model = copy.deepcopy(net).double().eval()
        with torch.no_grad():
            for value in model.state_dict().values():
                value.abs_()
        parameters = [model[i].weight for i in (0, 3, 5)]
        total = sum(p.numel() for p in parameters)
        alive = [torch.ones_like(p) for p in parameters]
        for number in range(rounds):
            with torch.no_grad():
                for p, mask in zip(parameters, alive, strict=True):
                    p.mul_(mask)
            model.zero_grad()
            model(torch.ones(1, 2, 4, 4, dtype=torch.float64)).sum().backward()
            scores = [(p.grad * p).detach().abs() for p in parameters]
            density = (retained / total) ** ((number + 1) / rounds)
            k = int((1 - density) * total)
            threshold = torch.kthvalue(torch.cat([s.flatten() for s in scores]), k).values
            alive = [torch.where(s <= threshold, 0.0, 1.0) for s in scores]
        decided = ellq.plan(net, gaussian(5, 2, 4, 4), rule="synflow", rounds=rounds, nonzeros=retained)
        np.testing.assert_array_equal(masks(net, decided), torch.cat([m.flatten() for m in alive]).bool().numpy())

    def test_leaves_every_layer_something_where_one_shot_magnitude_does_not(self):
        net = mlp(20, 30, 30, 5, bias=False)
        with torch.no_grad():
            net[2].weight.mul_(1e-3)
        assert ellq.plan(net, rule="synflow", sparsity=0.99).layers()["retained"].min() > 0
        assert ellq.plan(net, rule="global", sparsity=0.99).layers()["retained"].min() == 0

    def test_asks_for_the_shape_of_an_input_it_cannot_know(self):
        with pytest.raises(ValueError, match="must know the shape of an input"):
            ellq.plan(conv_net(), rule="synflow", sparsity=0.5)

    @pytest.mark.parametrize("rounds", [0, -1])
    def test_needs_a_round(self, rounds):
        with pytest.raises(ValueError, match="rounds="):
            ellq.plan(mlp(4, 3), rule="synflow", sparsity=0.5, rounds=rounds)


class TestByGradients:
    @pytest.mark.parametrize("rule", ["snip", "taylor"])
    def test_equals_its_formula(self, rule):
        net = conv_net()
        model = copy.deepcopy(net).eval()
        weights = [model[i].weight for i in (0, 3, 5)]
        x, y = image_data()[0]
        batches = [(x[:10], y[:10]), (x[10:], y[10:])]
        per_batch = []
        for inputs, labels in batches:
            grads = torch.autograd.grad(functional.cross_entropy(model(inputs), labels), weights)
            per_batch.append(torch.cat([(g * w).double().flatten() for g, w in zip(grads, weights, strict=True)]))
        scores = sum(per_batch).abs() if rule == "snip" else sum(s.square() for s in per_batch)
        kept = masks(net, ellq.plan(net, batches, rule=rule, sparsity=0.5))
        assert scores[kept].min() > scores[~kept].max()

    def test_real_labels_are_fitted_by_squares(self):
        x = gaussian(20, 4)
        net = mlp(4, 3)
        grad = torch.autograd.grad(functional.mse_loss(net(x), x[:, :3]), net[0].weight)[0]
        scores = (grad * net[0].weight).abs().flatten().detach()
        kept = masks(net, ellq.plan(net, [(x, x[:, :3])], rule="snip", nonzeros=5))
        assert scores[kept].min() > scores[~kept].max()

    @pytest.mark.parametrize("rule", ["snip", "taylor"])
    @pytest.mark.parametrize("calibration", [None, gaussian(9, 6), [gaussian(9, 6)], [(gaussian(9, 6),)], []])
    def test_labels_that_are_missing_are_asked_for(self, rule, calibration):
        with pytest.raises(ValueError, match=f"rule='{rule}' needs|which rule='{rule}' needs"):
            ellq.plan(mlp(6, 9, 3), calibration, rule=rule, sparsity=0.5)


class TestWanda:
    def test_of_a_linear_layer_is_magnitude_times_input_norm_by_row(self):
        net, x = mlp(6, 9, 3), gaussian(50, 6) * torch.tensor([10.0, 1, 1, 1, 1, 0.1])
        kept = ellq.plan(net, x, rule="wanda", sparsity=0.5).kept["0.weight"]
        scores = (net[0].weight.detach().abs() * x.norm(dim=0)).numpy()
        for row, mask in zip(scores, kept, strict=True):
            assert mask.sum() == 3
            assert row[mask].min() > row[~mask].max()

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.Conv1d(4, 2, 2, dilation=2),
            nn.Conv2d(4, 2, (3, 2), padding=1, padding_mode="circular"),
        ],
        ids=["grouped", "dilated", "circular"],
    )
    def test_of_a_convolution_reads_patches(self, layer):
        x = gaussian(3, 4, *[6] * (layer.weight.ndim - 2))
        kept = ellq.plan(layer, x, rule="wanda", sparsity=0.5).kept["weight"].reshape(len(layer.weight), -1)
        # What the entry (c, i, j) reads is what a filter of that entry alone gives.
        energy = torch.zeros(layer.weight.shape)
        with torch.no_grad():
            for place in np.ndindex(*layer.weight.shape):
                probe = copy.deepcopy(layer)
                probe.bias = None
                probe.weight.zero_()
                probe.weight[place] = 1.0
                energy[place] = probe(x).square().sum()
        scores = (layer.weight.detach().abs() * energy.sqrt()).reshape(len(layer.weight), -1).numpy()
        for row, mask in zip(scores, kept, strict=True):
            assert row[mask].min() >= row[~mask].max() * (1 - 1e-5)

    def test_needs_inputs_and_layers_that_read_them(self):
        with pytest.raises(ValueError, match="needs inputs"):
            ellq.plan(mlp(6, 9, 3), rule="wanda", sparsity=0.5)
        with pytest.raises(ValueError, match=r"no inputs of 'weight_ih_l0'"):
            ellq.plan(nn.LSTM(3, 4), gaussian(5, 2, 3), rule="wanda", sparsity=0.5)


class TestFlow:
    def test_is_the_energy_of_the_paths_through_a_weight(self):
        net = mlp(3, 4, 2)
        layers = [m for m in net if isinstance(m, nn.Linear)]
        A, B = (layer.weight.detach().double() ** 2 for layer in layers)
        expected = [A * B.sum(0)[:, None], B * A.sum(1)]
        joined = torch.cat([score.flatten() for score in expected])
        for retained in (5, 10, 15):
            decided = ellq.plan(net, rule="flow", rounds=1, nonzeros=retained)
            cut = joined.sort(descending=True).values[retained - 1]
            for mask, score in zip(decided.kept.values(), expected, strict=True):
                assert (torch.from_numpy(mask) == (score >= cut)).all()

    def test_layers_share_one_total(self):
        net = mlp(5, 7, 6, 3)
        weights = maskable_weights(net)
        surveys = tuple(survey(w.layer(), w.name) for w in weights)
        layers = Layers(
            tuple(w.name for w in weights),
            tuple(w.layer() for w in weights),
            surveys,
            minima_of(surveys, 0),
            tuple(tuple(w.tensor.shape) for w in weights),
            net,
        )
        scores = flow(layers, [Share((0, 1, 2), 10)], rounds=1)
        totals = [float(score.sum()) for score in scores]
        assert totals == pytest.approx([totals[0]] * 3, rel=1e-12)

    def test_a_batch_norm_multiplies_energies(self):
        net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)).eval()
        net[1].running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
        nn.init.uniform_(net[1].weight, 0.5, 2.0)
        nn.init.normal_(net[1].bias)
        folded = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
        scale = (net[1].weight / (net[1].running_var + net[1].eps).sqrt()).detach()
        folded[0].weight.data = net[0].weight.data * scale[:, None]
        folded[1].weight.data = net[2].weight.data
        ours = ellq.plan(net, rule="flow", rounds=1, nonzeros=9).kept
        same = ellq.plan(folded, rule="flow", rounds=1, nonzeros=9).kept
        for mine, theirs in zip(ours.values(), same.values(), strict=True):
            assert (mine == theirs).all()

    def test_is_rescaled_by_default_and_meets_its_budget(self):
        net = mlp(20, 16, 12, 4)
        decided = ellq.plan(net, rule="flow", sparsity=0.8)
        assert decided.settings["refit"] == "rescale"
        assert decided.sparsity == pytest.approx(0.8, abs=1e-2)
        pruned = ellq.prune(net, rule="flow", sparsity=0.8)
        before, after = net[0].weight.norm(dim=1), pruned[0].weight.norm(dim=1)
        assert torch.allclose(before[after > 0], after[after > 0], rtol=1e-5)
