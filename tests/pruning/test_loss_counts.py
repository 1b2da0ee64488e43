"""Counts by what is lost: the total stays, minima hold, and no other counts lose less."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ellq
from ellq.pruning import loss_counts
from ellq.pruning.loss_counts import share_by_loss
from ellq.pruning.storage import storage_bytes
from pruned_nets import assert_unchanged, gaussian, mlp, snapshot


def masks_only(net, **budget) -> ellq.Plan:
    return ellq.plan(net, refit="none", **budget)


def totals(decided: ellq.Plan) -> dict[str, int]:
    return decided.table.groupby("layer", sort=False)["retained"].sum().to_dict()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0.05, 0.8), least=st.integers(0, 2), samples=st.integers(1, 50))
def test_the_total_stays_and_minima_hold(seed, sparsity, least, samples):
    net = mlp(6, 7, 5, 4, seed=seed)
    with torch.no_grad():
        net[2].weight[0] = 0.0
        net[0].weight[1, 1:] = 0.0
    plain = masks_only(net, sparsity=sparsity, least=min(least, 1))
    if sum(np.minimum(least, (row != 0).sum()) for i in (0, 2, 4) for row in net[i].weight.detach().numpy()) > sum(
        totals(plain).values()
    ):
        with pytest.raises(ValueError, match="least asks for"):
            share_by_loss(net, plain, [gaussian(samples, 6)], least=least)
        return
    shared = share_by_loss(net, plain, [gaussian(samples, 6)], least=least)
    assert sum(totals(shared).values()) == sum(totals(plain).values())
    for name, rows in shared.table.groupby("layer", sort=False):
        weights = net.get_parameter(str(name)).detach().numpy()
        counts = rows["retained"].to_numpy()
        assert (counts >= np.minimum(least, (weights != 0).sum(axis=1))).all()
        assert (counts <= weights.shape[1]).all()
    for before, after in zip(plain.table["reason"], shared.table["reason"], strict=True):
        rule = before.partition(";")[0]
        assert after == (rule if rule == "zero unit" else f"{rule}; shared by least loss on calibration inputs")


def test_for_rising_costs_no_other_counts_lose_less():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = np.sort(rng.random((3, 4)), axis=1)
        losses = loss_counts._lasting(costs, np.ones((3, 4)), 1)
        for retained in range(3, 13):
            (counts,) = loss_counts._counts([losses], retained)
            assert counts.sum() == retained
            errors = np.concatenate([np.zeros((3, 1)), np.cumsum(costs, axis=1)], axis=1)[:, ::-1]

            def lost(chosen, errors=errors):
                return sum(errors[i, k] for i, k in enumerate(chosen))

            least = min(lost(c) for c in itertools.product(range(1, 5), repeat=3) if sum(c) == retained)
            assert lost(counts) == pytest.approx(least)


def test_costs_that_fall_wait_for_the_dear_one_before():
    losses = loss_counts._lasting(np.array([[5.0, 1.0, 6.0]]), np.ones((1, 3)), 0)
    assert losses.tolist() == [[5.0, 5.0, 6.0]]


def test_a_layer_that_matters_little_gives_way():
    # Two branches of one kind, one of which reaches the output a thousand times weaker.
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loud, self.quiet = nn.Linear(8, 8), nn.Linear(8, 8)
            self.quiet.load_state_dict(self.loud.state_dict())

        def forward(self, x):
            return self.loud(x) + 1e-3 * self.quiet(x)

    net = Branches()
    kept = totals(share_by_loss(net, masks_only(net, sparsity=0.5), [gaussian(100, 8)]))
    assert kept["loud.weight"] > kept["quiet.weight"] + 20


def test_budgets_by_layer_and_in_bytes_stay_met():
    net = mlp(8, 9, 4)
    by_layer = masks_only(net, sparsity={"0": 0.7, "2": 0.2})
    assert totals(share_by_loss(net, by_layer, [gaussian(50, 8)])) == totals(by_layer)
    mixed = Mixed()
    plain = masks_only(mixed, bytes=500, storage="bitmask")
    shared = share_by_loss(mixed, plain, [gaussian(50, 8).double()])
    assert storage_bytes(mixed, "bitmask", plan=shared) <= 500
    kept = totals(shared), totals(plain)
    assert kept[0]["fine.weight"] == kept[1]["fine.weight"]
    assert not shared.table["retained"].equals(plain.table["retained"])


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse, self.last = nn.Linear(8, 6).double(), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.relu(self.coarse(self.fine(x).float())))


def conv_net() -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(27, 3),
    )
    net(torch.randn(30, 2, 4, 4))
    return net.double().eval()


def test_responses_are_finite_differences():
    net, x = conv_net(), gaussian(7, 2, 4, 4).double()
    found = loss_counts._responses(net, ["0", "3", "5"], [x[:4], x[4:]], seed=9)
    draw = torch.Generator().manual_seed(9)
    directions = torch.cat([torch.randn(4, 3, generator=draw), torch.randn(3, 3, generator=draw)])
    for name in ("0", "3", "5"):
        layer = net.get_submodule(name)
        with torch.no_grad():
            size = outputs(net, name, x).shape[1:]
            slopes = torch.zeros(7, *size).double()
            for place in itertools.product(*map(range, size)):
                ends = []
                for step in (1e-6, -1e-6):
                    bump = torch.zeros(1, *size).double()
                    bump[(0, *place)] = step
                    hook = layer.register_forward_hook(lambda _, args, y, bump=bump: y + bump)
                    ends.append((net(x.clone()) * directions).sum(dim=1))
                    hook.remove()
                slopes[(slice(None), *place)] = (ends[0] - ends[1]) / 2e-6
        expected = slopes.square().flatten(2).sum(dim=2) if slopes.ndim > 2 else slopes.square()
        np.testing.assert_allclose(found[name], expected.mean(dim=0).numpy(), rtol=1e-5, atol=1e-9)


def outputs(net: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = net.get_submodule(name).register_forward_hook(lambda _, args, y: seen.append(y))
    net(x.clone())
    hook.remove()
    return seen[0]


def test_more_inputs_than_are_looked_at_change_nothing():
    net, x = mlp(5, 4, 3), gaussian(600, 5)
    first = loss_counts._responses(net, ["0"], [x[:256]], seed=0)["0"]
    np.testing.assert_array_equal(first, loss_counts._responses(net, ["0"], [x], seed=0)["0"])


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.net, self.wrap = mlp(6, 5, 4), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


@pytest.mark.parametrize("wrap", [lambda y: {"logits": y, "none": None}, lambda y: (y, [y.argmax(1)])])
def test_outputs_of_any_kind(wrap):
    net, x = Wrapped(wrap), gaussian(40, 6)
    plain = share_by_loss(Wrapped(lambda y: y), masks_only(net, sparsity=0.5), [x])
    assert share_by_loss(net, masks_only(net, sparsity=0.5), [x]).table.equals(plain.table)


@pytest.mark.parametrize(
    "silence", [lambda y: y.argmax(1), torch.no_grad()(lambda y: y * 2.0), lambda y: (y > 0).long()]
)
def test_outputs_without_slopes_leave_relative_errors_to_decide(silence):
    net, x = Wrapped(silence), gaussian(40, 6)
    shared = share_by_loss(net, masks_only(net, sparsity=0.5), [x])
    assert sum(totals(shared).values()) == 25
    big = Wrapped(silence)
    with torch.no_grad():
        big.net[0].weight.mul_(1e3)
        big.net[0].bias.mul_(1e3)
    scaled = share_by_loss(big, masks_only(net, sparsity=0.5), [x])
    assert totals(scaled) == totals(shared)


def test_the_model_is_as_before_and_the_callers_mode_does_not_matter():
    net, x = conv_net().train(), gaussian(30, 2, 4, 4).double()
    for parameter in list(net.parameters())[:3]:
        parameter.requires_grad_(False)
    plain = masks_only(net, sparsity=0.5)
    given, before = x.clone(), snapshot(net)
    found = share_by_loss(net, plain, [x])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert share_by_loss(net, plain, [x]).to_json() == found.to_json()
            assert share_by_loss(net, plain, [given.clone()]).to_json() == found.to_json()
    assert_unchanged(net, before)
    assert torch.equal(x, given)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert share_by_loss(net, plain, [x], seed=1).to_json() != found.to_json()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind):
    net = mlp(6, 7, 4).to(kind)
    shared = share_by_loss(net, masks_only(net, sparsity=0.5), [gaussian(40, 6)])
    assert sum(totals(shared).values()) == 35


def test_layers_that_cannot_be_weighed_keep_what_they_have():
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.Conv1d(4, 5, 2), nn.ReLU(), nn.Conv1d(5, 3, 1))
    x = gaussian(20, 2, 6)
    plain = ellq.plan(net, [(x, torch.zeros(20, 3, 7))], rule="taylor", sparsity=0.5)
    shared = share_by_loss(net, plain, [x])
    assert np.array_equal(shared.kept["0.weight"], plain.kept["0.weight"])
    assert set(shared.kept) == {"0.weight"}
    own = [decided.table[decided.table["layer"] == "0.weight"] for decided in (plain, shared)]
    assert own[0].equals(own[1])
    only = nn.Sequential(nn.ConvTranspose1d(2, 4, 3))
    plain = masks_only(only, sparsity=0.5)
    assert share_by_loss(only, plain, [x]).table.equals(plain.table)


def test_dead_layers_go_first():
    net, x = mlp(6, 5, 4, 3), gaussian(40, 6)
    with torch.no_grad():
        net[0].bias.fill_(-1e3)  # nothing fires
    shared = share_by_loss(net, masks_only(net, sparsity=0.3), [x])
    assert sum(totals(shared).values()) == sum(totals(masks_only(net, sparsity=0.3)).values())


def test_inputs_that_do_not_fit_are_named():
    net = mlp(6, 5, 4)
    with pytest.raises(ValueError, match=r"batch 1 of the calibration set, of shape \(3, 5\)"):
        share_by_loss(net, masks_only(net, sparsity=0.3), [gaussian(3, 6), gaussian(3, 5)])
    bad = gaussian(3, 6)
    bad[1, 2] = torch.inf
    with pytest.raises(ValueError, match="Batch 0 of the calibration set gives NaN or infinite"):
        share_by_loss(net, masks_only(net, sparsity=0.3), [bad])
