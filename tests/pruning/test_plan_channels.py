"""Networks with fewer channels: what is planted must be found, budgets met, and what is measured measured again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import ellq
from ellq.analysis import cost, small_conv
from ellq.pruning import BudgetError, Plan, channel_groups
from ellq.pruning.channel_checkpoint import ChannelCheckpoint
from ellq.pruning.channel_curves import OutputError, measured_curves
from ellq.pruning.structured import Way, narrow_to, uniform_widths
from ellq.pruning.surgery import cut_channels_
from ellq.pruning.widths import flops_model
from pruned_nets import assert_unchanged, gaussian, snapshot


class Residual(nn.Module):
    """A stem, two residual blocks and a head: one stream that several layers make and read, two inner groups."""

    def __init__(self, width: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": nn.Conv2d(width, inner, 3, padding=1, bias=False),
                    "mid": nn.BatchNorm2d(inner),
                    "down": nn.Conv2d(inner, width, 3, padding=1, bias=False),
                    "end": nn.BatchNorm2d(width),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            y = block["end"](block["down"](functional.relu(block["mid"](block["up"](x)))))
            x = functional.relu(x + y)
        return self.head(x.mean(dim=(2, 3)))


def alive(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms statistics and scales of their own, as training does."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.running_mean, -0.5), (module.bias, -0.5)):
                    tensor.copy_(torch.rand(tensor.shape, generator=draw) + low)
                for tensor in (module.running_var, module.weight):
                    tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
    return model.eval()


def residual(seed: int = 0, **widths: int) -> nn.Module:
    torch.manual_seed(seed)
    return alive(Residual(**widths), seed)


def images(count: int, *, size: int = 6, seed: int = 1) -> torch.Tensor:
    return gaussian(count, 3, size, size, seed=seed)


def relative_error(dense: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        a, b = dense(x), small(x)
    return float((a - b).norm() / a.norm())


def plant_(block: nn.ModuleDict, twins: dict[int, int], dead: list[int]) -> None:
    """Make inner channels copies of others, or never active."""
    with torch.no_grad():
        for copy_, source in twins.items():
            block["up"].weight[copy_] = block["up"].weight[source]
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(block["mid"], name)[copy_] = getattr(block["mid"], name)[source]
        block["mid"].weight[dead] = 0
        block["mid"].bias[dead] = -1


@pytest.mark.parametrize("rule", ["ellq", "chee2021"])
def test_planted_duplicate_and_dead_channels_cost_nothing(rule):
    net = residual()
    plant_(net.blocks[0], {1: 0, 3: 2}, [4, 5])
    plant_(net.blocks[1], {7: 6, 5: 6}, [0, 1])
    x = images(40)
    plan = ellq.plan(net, x, method="id", sparsity=0.5, include="blocks.*", rule=rule)
    small = ellq.apply(net, plan)
    assert plan.table["retained"].tolist() == [4, 4]
    assert small.blocks[0]["up"].weight.shape == (4, 6, 3, 3)
    # The ridge of our refit lets what is planted shift by as much.
    assert relative_error(net, small, images(20, seed=2)) < (1e-3 if rule == "ellq" else 1e-5)


def test_chee2021_is_pivoted_qr_of_the_features_folded_into_the_reader():
    net, x = residual(), images(30)
    small = ellq.prune(net, x, method="id", sparsity=0.5, rule="chee2021")
    expected = copy.deepcopy(net)
    for block, cut in zip(net.blocks, expected.blocks, strict=True):
        seen = []
        hook = block["down"].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            net(x)
        hook.remove()
        A = seen[0].permute(0, 2, 3, 1).reshape(-1, 8).double().numpy()
        R, order = scipy.linalg.qr(A, mode="r", pivoting=True)
        T = np.zeros((4, 8))
        T[:, order] = np.concatenate([np.eye(4), np.linalg.pinv(R[:4, :4]) @ R[:4, 4:]], axis=1)
        keep = order[:4]
        W = np.einsum("ku,ouab->okab", T, block["down"].weight.detach().double().numpy())
        with torch.no_grad():
            full = torch.zeros_like(cut["down"].weight)
            full[:, keep.copy()] = torch.from_numpy(W).float()
            cut["down"].weight.copy_(full)
    y = images(10, seed=3)
    assert [block["up"].out_channels for block in small.blocks] == [4, 4]
    with torch.no_grad():
        torch.testing.assert_close(small(y), expected(y), rtol=1e-4, atol=1e-5)


def test_chee2022_cuts_the_group_of_least_pivot_per_flops_until_the_budget():
    net, x = residual(inner=10), images(30)
    plan = ellq.plan(net, x, method="id", flops=0.7, rule="chee2022", alpha=0.8)
    widths = [10, 10]
    # By hand: all layers are of one size, so the FLOPs around a group follow its width alone.
    current = copy.deepcopy(net)
    kept = [np.arange(10), np.arange(10)]
    dense = cost(net, x[:1]).flops
    per_unit = 2 * 2 * 36 * 9 * 6
    spent = dense
    while spent > 0.7 * dense:
        scores = []
        for number, block in enumerate(current.blocks):
            seen = []
            hook = block["down"].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                current(x)
            hook.remove()
            A = seen[0].permute(0, 2, 3, 1).reshape(-1, 10).double().numpy()[:, kept[number]]
            R, order = scipy.linalg.qr(A, mode="r", pivoting=True)
            k = int(0.8 * widths[number])
            scores.append((abs(R[k, k] / R[0, 0]) / widths[number], number, R, order, k))
        _, number, R, order, k = min(scores, key=lambda score: score[:2])
        T = np.zeros((k, widths[number]))
        T[:, order] = np.concatenate([np.eye(k), np.linalg.pinv(R[:k, :k]) @ R[:k, k:]], axis=1)
        weight = current.blocks[number]["down"].weight
        W = weight.detach().double().numpy()[:, kept[number]]
        kept[number], old = kept[number][order[:k]], widths[number]
        widths[number] = k
        spent -= per_unit * (old - k)
        with torch.no_grad():
            weight.zero_()
            weight[:, kept[number].copy()] = torch.from_numpy(np.einsum("ku,ouab->okab", T, W)).float()
        kept[number] = np.sort(kept[number])  # the next round's T is by columns in this order
    retained = dict(zip(plan.table["layer"], plan.table["retained"], strict=True))
    assert [retained["blocks.0.up"], retained["blocks.1.up"]] == widths
    small = ellq.apply(net, plan)
    y = images(10, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(small(y), current(y), rtol=1e-3, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["flops", "parameters", "memory"]),
    value=st.floats(0.4, 0.95),
    rule=st.sampled_from(["ellq", "chee2021"]),
    round_to=st.sampled_from([1, 2]),
)
def test_budgets_are_met_by_what_comes_out(seed, kind, value, rule, round_to):
    net, x = residual(seed), images(12, size=4)
    try:
        plan = ellq.plan(net, x, method="id", rule=rule, round_to=round_to, **{kind: value})
    except BudgetError as error:
        assume(error.nearest <= value)  # or else it is the budget's fault
        raise
    small = ellq.apply(net, plan)
    before, after = cost(net, x[:1]), cost(small, x[:1])
    if kind == "flops":
        assert after.flops <= value * before.flops
    if kind == "parameters":
        assert after.parameters <= value * before.parameters
    widths = plan.table[["retained", "size"]].to_numpy()
    assert all(k % round_to == 0 or k == full for k, full in widths)
    again = ellq.apply(net, Plan.from_json(plan.to_json()))
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True))


def test_with_all_units_the_refit_gives_the_network_back():
    net, x = residual(), images(20)
    groups = channel_groups(net, x[:2]).groups
    found = narrow_to(net, groups, [x], {group.name: group.units for group in groups}, Way())
    assert relative_error(net, found.model, images(10, seed=4)) < 1e-5


def test_ours_loses_less_than_the_authors_and_magnitude():
    net, x, held_out = residual(width=8, inner=12), images(60), images(60, seed=5)
    errors = {
        name: relative_error(net, ellq.prune(net, x, method="id", sparsity=0.4, include="blocks.*", **way), held_out)
        for name, way in {
            "ours": {},
            "chee2021": {"rule": "chee2021"},
            "magnitude": {"selection": "magnitude", "refit": "none"},
        }.items()
    }
    assert errors["ours"] < errors["chee2021"] < errors["magnitude"]


def test_curves_are_what_cutting_alone_loses_and_leave_the_network_as_it_was():
    net, x = residual(inner=6), images(24)
    groups = [group for group in channel_groups(net, x[:2]).groups if group.name.startswith("blocks")]
    changing = copy.deepcopy(net)
    before = snapshot(changing)
    every = {group.name: np.arange(group.units) for group in groups}
    curves = measured_curves(net, changing, groups, every, [x], [x])
    assert_unchanged(changing, before)
    for group in groups:
        curve = curves[group.name]
        assert curve.errors[-1] == 0
        assert (np.diff(curve.errors) <= 0).all()
        kept = curve.path.retained(3)  # half of them: a width at which outputs are looked at
        alone = refitted_reader(net, net.blocks[int(group.name.split(".")[1])], kept, x)
        with torch.no_grad():
            a, b = (y - y.mean(dim=1, keepdim=True) for y in (net(x), alone))
        assert curve.errors[3] == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-3)


def refitted_reader(net: nn.Module, block: nn.ModuleDict, kept: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Outputs with the block's reader fitted, by hand, to some channels, with the ridge and the shift."""
    twin = copy.deepcopy(net)
    place = next(number for number, own in enumerate(net.blocks) if own is block)
    seen = []
    hook = block["down"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net(x)
        hook.remove()
        patches = functional.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        W = block["down"].weight.detach().double().flatten(1)
        Y = patches @ W.T
        X, y = patches - patches.mean(0), Y - Y.mean(0)
        H, R = X.T @ X / len(X), X.T @ y / len(X)
        ridge = 0.01 * H.diagonal().mean()
        S = (torch.from_numpy(kept)[:, None] * 9 + torch.arange(9)).flatten()
        fitted = torch.zeros_like(W)
        fitted[:, S] = torch.linalg.solve(H[S][:, S] + ridge * torch.eye(len(S)), R[S] + ridge * W.T[S]).T
        twin.blocks[place]["down"].weight.copy_(fitted.reshape(block["down"].weight.shape))
        twin.blocks[place]["end"].running_mean -= Y.mean(0) - fitted @ patches.mean(0)
        return twin(x)


@pytest.mark.parametrize("are_equal", [False, True])  # two outputs, whose mean is then all they are
@pytest.mark.parametrize("tol", [0.05, 0.3])
def test_a_tolerance_of_the_outputs_holds_on_the_calibration_inputs(tol, are_equal):
    net, x = residual(), images(30)
    if are_equal:
        with torch.no_grad():
            for tensor in net.head.parameters():
                tensor.copy_(tensor[:1].expand_as(tensor))
    small = ellq.prune(net, x, method="id", tol=tol, tol_of="outputs", include="blocks.*")
    assert relative_error(net, small, x) <= tol
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_a_tolerance_of_the_authors_is_an_accurate_decomposition():
    net, x = residual(), images(30)
    plan = ellq.plan(net, x, method="id", tol=0.2, rule="chee2021")
    for name, k in zip(plan.table["layer"], plan.table["retained"], strict=True):
        seen = []
        block = net.blocks[int(name.split(".")[1])]
        hook = block["down"].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            net(x)
        hook.remove()
        A = seen[0].permute(0, 2, 3, 1).reshape(-1, 8).double().numpy()
        order = scipy.linalg.qr(A, mode="r", pivoting=True)[1]
        for width, is_accurate in ((k, True), (k - 1, False)):
            S = A[:, order[:width]]
            rest = A - S @ np.linalg.lstsq(S, A, rcond=None)[0]
            assert (np.linalg.norm(rest, 2) <= 0.2 * np.linalg.norm(A, 2)) == is_accurate


def test_later_rounds_meet_the_budget_and_lose_no_more():
    net, x = residual(1, width=10, inner=12), images(300)
    outputs = OutputError(net, [x])
    small = [ellq.prune(net, x, method="id", flops=0.3, rounds=rounds) for rounds in (1, 2, 3)]
    for one in small:
        assert cost(one, x[:1]).flops <= 0.3 * cost(net, x[:1]).flops
    errors = [outputs.of(one) for one in small]
    assert errors[2] <= errors[1] * (1 + 1e-4)
    assert errors[1] < 0.9 * errors[0]


def test_in_a_narrower_network_a_curve_counts_from_the_present_width():
    net, x = residual(), images(20)
    groups = channel_groups(net, x[:2]).groups
    group = next(group for group in groups if len(group.consumers) == 1)
    way = Way(refit="sequential")
    at = {k: narrow_to(net, groups, [x], {g.name: 6 for g in groups} | {group.name: k}, way) for k in (4, 3)}
    every = {group.name: np.arange(group.units) for group in groups}
    narrow = at[4].model
    before = snapshot(narrow)
    curve = measured_curves(net, narrow, groups, every | dict(at[4].kept), [x], [x])[group.name]
    assert_unchanged(narrow, before)
    cut = copy.deepcopy(narrow)  # three quarters of them: the width that is looked at
    reader = group.consumers[0].module
    for name in (reader, reader.replace("down", "end")):
        cut.get_submodule(name).load_state_dict(at[3].model.get_submodule(name).state_dict())
    outputs = OutputError(net, [x])
    lost = outputs.of(cut) - outputs.of(narrow)
    assert lost > 0
    assert curve.errors[3] - curve.errors[4] == pytest.approx(lost, rel=1e-3)


def test_uniform_widths_are_the_largest_within_the_budget():
    net, x = residual(), images(4)
    coupling = channel_groups(net, x)
    model = flops_model(net, coupling, x)
    widths = uniform_widths(coupling.groups, model, 0.6)
    assert model.cost(widths) <= 0.6 * model.dense
    wider = {group.name: min(widths[group.name] + 1, group.units) for group in coupling.groups}
    assert model.cost(wider) > 0.6 * model.dense


def test_norms_are_estimated_anew_when_asked():
    net, x = residual(), images(64)
    plain, anew = (
        ellq.prune(net, list(x.split(16)), method="id", flops=0.6, recalibrate=flag) for flag in (False, True)
    )
    seen = []
    anew.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        anew(x)
    torch.testing.assert_close(anew.norm.running_mean, seen[0].mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.norm.running_mean, anew.norm.running_mean)
    assert not anew.training


def test_what_is_not_cut_is_named_with_the_reason():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    plan = ellq.plan(net, gaussian(30, 6), method="id", flops=0.9)
    assert plan.table["layer"].tolist() == ["2"]
    assert set(plan.left) == {"0", "4"}


def test_the_model_its_hooks_its_mode_and_the_generator_are_left_alone():
    net, x = residual().train(), images(10)
    calls = []
    net.head.register_forward_hook(lambda *_: calls.append(1))
    before, state = snapshot(net), torch.random.get_rng_state()
    small = ellq.prune(net, x, method="id", flops=0.7)
    assert_unchanged(net, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net.training
    assert small.training
    assert len(small.head._forward_hooks) == 1


def test_half_precision_networks_come_back_in_half_precision():
    net, x = residual(), images(16)
    small = ellq.prune(net.to(torch.bfloat16), x.to(torch.bfloat16), method="id", flops=0.6)
    assert all(p.dtype == torch.bfloat16 for p in small.parameters())
    with torch.no_grad():
        assert torch.isfinite(small(x.to(torch.bfloat16))).all()


def test_the_same_arguments_give_the_same_plan():
    net, x = residual(), images(200)
    first, second = (ellq.plan(net, x, method="id", flops=0.5).to_json() for _ in range(2))
    assert first == second


def nan_images() -> torch.Tensor:
    x = images(8)
    x[3, 0, 0, 0] = torch.nan
    return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, x: ellq.plan(net, x, method="id", flops=1.5), ValueError, "flops"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.01), BudgetError, "flops=0.01 leaves .* least"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.01, rule="chee2021"), BudgetError, "least widths need"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.01, rule="chee2022"), BudgetError, "least widths need"),
        (lambda net, x: ellq.plan(net, x, method="id", sparsity=0.5, rule="chee2022"), ValueError, "Pass flops="),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, alpha=0.9), TypeError, "alpha"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, selection="best"), ValueError, "elimination"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, refit="fold"), ValueError, "pivoted-qr"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, refit="obs"), ValueError, "sequential"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, rounds=0), ValueError, "rounds"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, include="nothing"), ValueError, "nothing"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, held_out=x), ValueError, "held_out"),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, sparsity=0.5), ValueError, "exactly one budget"),
        (lambda net, _: ellq.plan(net, method="id", flops=0.5), ValueError, "calibration"),
        (lambda net, _: ellq.plan(net.state_dict(), images(4), method="id", flops=0.5), TypeError, "state dict"),
        (lambda net, _: ellq.plan(net, gaussian(4, 5, 6, 6), method="id", flops=0.5), ValueError, "channels"),
        (lambda net, _: ellq.plan(net, nan_images(), method="id", flops=0.5), ValueError, "example itself"),
        (
            lambda net, x: ellq.plan(net, [x, gaussian(4, 5, 6, 6)], method="id", flops=0.5),
            ValueError,
            r"batch 1 of the calibration set, of shape \(4, 5, 6, 6\)",
        ),
        (lambda net, x: ellq.plan(net, x, method="id", flops=0.5, recalibrate="no"), ValueError, "truth value"),
        (
            lambda net, x: ellq.plan(net, x, method="id", flops=0.5, least=99),
            BudgetError,
            "Choose a smaller least= or round_to=",
        ),
        (lambda net, x: ellq.plan(net, x, flops=0.5), ValueError, "method='id'"),
        (lambda net, x: ellq.plan(net, sparsity=0.5, round_to=8), TypeError, "round_to"),
    ],
)
def test_bad_input_is_named_and_nothing_changes(call, error, message):
    net, x = residual(), images(12)
    before = snapshot(net)
    with pytest.raises(error, match=message):
        call(net, x)
    assert_unchanged(net, before)


def test_layers_without_sizes_are_named():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        ellq.plan(net, gaussian(9, 3), method="id", flops=0.5)
    assert isinstance(net[0], nn.LazyLinear)


@pytest.mark.parametrize("budget", [{"flops": 0.6}, {"sparsity": 0.5}, {"flops": 0.6, "widths": "uniform"}])
def test_the_refit_that_was_asked_for_is_done(budget):
    net, x = residual(), images(60)
    small = ellq.prune(net, x, method="id", refit="none", include="blocks.*", **budget)
    for one in small.ellq_plan.cuts:
        for member in one.group.consumers:
            before, after = (m.get_submodule(member.module).weight for m in (net, small))
            assert torch.equal(after, before[:, one.kept])


def test_the_selection_that_was_asked_for_is_made_at_measured_widths():
    net, x = residual(), images(60)
    small = ellq.prune(net, x, method="id", flops=0.7, selection="magnitude", widths="measured", include="blocks.*")
    for one in small.ellq_plan.cuts:
        size = net.get_submodule(one.group.name).weight.detach().flatten(1).norm(dim=1).numpy()
        assert set(one.kept) == set(np.argsort(-size)[: len(one.kept)])


class TwoViews(nn.Module):
    """Two layers read the same units, with signs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.above, self.below = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.above(x.relu()), self.below((-x).relu())


def test_every_reader_has_an_interpolation_of_its_own():
    torch.manual_seed(0)
    net, x = TwoViews().eval(), gaussian(300, 4)
    small = ellq.prune(net, x, method="id", sparsity=0.25, selection="pivoted-qr", refit="fold")
    (cut,) = small.ellq_plan.cuts
    with torch.no_grad():
        made = net.first(x)
        for name, A in (("above", made.relu()), ("below", (-made).relu())):
            T = torch.linalg.lstsq(A[:, cut.kept], A).solution
            expected = net.get_submodule(name).weight @ T.T
            torch.testing.assert_close(small.get_submodule(name).weight, expected, rtol=1e-3, atol=1e-4)


class Branching(nn.Module):
    """Which layer reads the first one's units depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(12, 8)
        self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.left(x) if x.sum() > 100 else self.right(x)
        return self.last(self.inner(x.relu()).relu())


@pytest.mark.parametrize(
    "batches",
    [
        [gaussian(200, 6)],  # the first few go another way than all
        [0.1 * gaussian(20, 6), gaussian(200, 6)],
    ],
)
def test_units_read_only_on_some_inputs_stay(batches):
    torch.manual_seed(0)
    net = Branching().eval()
    small = ellq.prune(net, batches, method="id", parameters=0.8)
    assert "first" in small.ellq_plan.left
    assert [one.group.name for one in small.ellq_plan.cuts] == ["inner"]
    for batch in batches:
        assert small(batch).shape == (len(batch), 4)


def test_what_may_be_cut_is_chosen_by_module_and_among_embeddings():
    net, x = residual(), images(60)
    plan = ellq.plan(net, x, method="id", sparsity=0.5, include=net.blocks[0]["up"])
    assert plan.table["layer"].tolist() == ["blocks.0.up"]
    words = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    numbers = torch.randint(20, (40, 5), generator=torch.Generator().manual_seed(0))
    for choice, names in (
        ({"include": "0"}, ["0"]),
        ({"exclude": nn.Embedding}, ["1"]),
        ({"exclude": "3"}, ["0", "1"]),
    ):
        plan = ellq.plan(words, numbers, method="id", parameters=0.9, **choice)
        assert plan.table["layer"].tolist() == names


def test_a_last_batch_of_one_example_has_no_variance():
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = gaussian(129, 6)
    found = [
        ellq.plan(
            net,
            batches,
            method="id",
            sparsity=0.5,
            recalibrate=True,
            widths="uniform",
            selection="magnitude",
            refit="none",
        )
        for batches in ([x[:64], x[64:128], x[128:]], [x[:64], x[64:128]])
    ]
    assert found[0].to_json() == found[1].to_json()
    with pytest.raises(ValueError, match=r"does not run on batch 0.*more than 1 value per channel"):
        ellq.plan(net, list(x[:30].split(1)), method="id", sparsity=0.5, recalibrate=True)


def test_a_plan_for_another_network_is_refused():
    plan = ellq.plan(residual(), images(8), method="id", flops=0.6)
    other = residual(inner=12)
    before = snapshot(other)
    with pytest.raises(ValueError, match="blocks"):
        ellq.apply(other, plan, inplace=True)
    assert_unchanged(other, before)


def test_the_digits_network_of_the_demo_can_lose_channels_of_its_convolutions():
    torch.manual_seed(0)
    net = small_conv(channels=1, size=8, outputs=10).eval()
    x = gaussian(600, 1, 8, 8)
    small = ellq.prune(net, x, method="id", flops=0.6)
    assert cost(small, x[:1]).flops <= 0.6 * cost(net, x[:1]).flops
    groups = {group.name for group in channel_groups(net, x[:2]).groups}
    assert len(groups) > 1
    twin = copy.deepcopy(net)
    cut_channels_(twin, [(one.group, one.kept) for one in ellq.plan(net, x, method="id", flops=0.6).cuts])
    assert [p.shape for p in twin.parameters()] == [p.shape for p in small.parameters()]


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("stop_after", [1, 3, 8, 10, 14])
def test_a_pruning_that_was_stopped_goes_on_to_the_same_result(tmp_path, monkeypatch, stop_after):
    net, x = residual(), images(300)
    expected = ellq.plan(net, x, method="id", flops=0.5, rounds=2)
    left = [stop_after]

    def stopping(self, *arguments):
        whole(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise StopError

    whole = ChannelCheckpoint.write
    monkeypatch.setattr(ChannelCheckpoint, "write", stopping)
    with pytest.raises(StopError):
        ellq.plan(net, x, method="id", flops=0.5, rounds=2, checkpoint=tmp_path / "place")
    written = []
    monkeypatch.setattr(ChannelCheckpoint, "write", lambda *a: written.append(a) or whole(*a))
    found = ellq.plan(net, x, method="id", flops=0.5, rounds=2, checkpoint=tmp_path / "place")
    assert len(written) == 18 - stop_after  # in two rounds three groups and six layers
    assert found.to_json() == expected.to_json()
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_of_another_pruning_is_refused(tmp_path):
    net, x = residual(), images(20)
    folder = tmp_path / "place"
    ChannelCheckpoint(folder, "of something else")
    with pytest.raises(ValueError, match="holds another pruning"):
        ellq.plan(net, x, method="id", flops=0.5, checkpoint=folder)


def test_a_damaged_checkpoint_is_named(tmp_path):
    kept = ChannelCheckpoint(tmp_path, "one")
    kept.write("refit 1", "layer", {"weight": torch.ones(3)}, {"group": [1, 2]})
    tensors, value = kept.read("refit 1", "layer")
    assert torch.equal(tensors["weight"], torch.ones(3))
    assert value == {"group": [1, 2]}
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        kept.read("refit 1", "layer")


@pytest.mark.parametrize("rule", ["chee2021", "chee2022"])
def test_too_few_samples_for_the_features_are_told(rule):
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    with pytest.warns(UserWarning, match=r"'0' has features of 5 samples for 12 units.*about 3 times"):
        ellq.plan(net, gaussian(5, 6), method="id", flops=0.7, rule=rule)


def test_too_few_samples_are_told_with_the_number_needed():
    with pytest.warns(UserWarning, match=r"12 samples for 72 inputs.*about 6 times"):
        ellq.plan(residual(), images(3, size=2), method="id", flops=0.5)
