from __future__ import annotations

import copy
import io
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

from ellq.pruning import apply, plan, prune, storage_bytes
from ellq.pruning.allocate import retained_of
from ellq.pruning.budget import BudgetError
from ellq.pruning.masks import maskable_weights
from ellq.pruning.plan_masks import _reachable
from pruned_nets import assert_unchanged, gaussian, mlp, same_bits, snapshot, try_plan

METHODS = [("lq", "ellq"), ("lq", "yang2022"), ("id", "ellq"), ("id", "chee2021")]
RELAXED = settings(max_examples=40, deadline=None)


class Net(nn.Module):
    """A model as users write them: dropout, functions in forward, frozen parts, a hook, what it saw kept."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 3, bias=False)
        self.seen = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        self.calls += 1
        self.seen = x
        return self.second(nn.functional.dropout(torch.tanh(self.first(x)), 0.1, self.training))


def make() -> Net:
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(gaussian(*parameter.shape, seed=parameter.numel()))
    net.stem.weight.requires_grad_(False)
    net.train()
    net.norm.eval()
    net.first.register_forward_hook(lambda *_: None)
    return net


def run(net: nn.Module, method: str, rule: str, **arguments):
    calibration = gaussian(64, 6) if method == "id" else None
    arguments.setdefault("sparsity", 0.5)
    return prune(net, calibration, method=method, rule=rule, **arguments)


@pytest.mark.parametrize(("method", "rule"), METHODS)
class TestEveryMethod:
    def test_changes_nothing_of_its_input(self, method, rule):
        net = make()
        before = snapshot(net)
        run(net, method, rule)
        assert_unchanged(net, before)

    def test_a_shuffling_loader_leaves_the_random_state(self, method, rule):
        net, state = make(), torch.random.get_rng_state()
        loader = DataLoader(TensorDataset(gaussian(64, 6), torch.zeros(64)), batch_size=16, shuffle=True)
        prune(net, loader, method=method, rule=rule, sparsity=0.5)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_gives_a_plain_module_of_the_same_class(self, method, rule):
        net = make()
        pruned = run(net, method, rule)
        assert type(pruned) is Net
        assert [type(m) for m in pruned.modules()] == [type(m) for m in net.modules()]
        assert [m.training for m in pruned.modules()] == [m.training for m in net.modules()]
        assert [p.requires_grad for p in pruned.parameters()] == [p.requires_grad for p in net.parameters()]
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in pruned.modules()]
        assert sum(hooks) == 1  # the user's own
        assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in pruned.parameters())
        assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(pruned.parameters(), net.parameters(), strict=True))

    def test_in_place_gives_the_same_object_and_the_same_weights(self, method, rule):
        net = make()
        expected = run(net, method, rule)
        same = copy.deepcopy(net)
        assert run(same, method, rule, inplace=True) is same
        assert same_bits(same, expected)

    def test_the_result_copies_saves_and_trains(self, method, rule):
        pruned = run(make(), method, rule)
        pruned.first._forward_hooks.clear()  # a lambda cannot be pickled
        assert same_bits(copy.deepcopy(pruned), pruned)
        file = io.BytesIO()
        torch.save(pruned, file)
        file.seek(0)
        assert same_bits(torch.load(file, weights_only=False), pruned)
        copy.deepcopy(pruned).load_state_dict(pruned.state_dict())
        before = copy.deepcopy(pruned)
        optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
        pruned(gaussian(16, 6)).square().mean().backward()
        optimizer.step()
        for name, parameter in pruned.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
            if parameter.requires_grad and "norm" not in name:
                assert not torch.equal(parameter, before.get_parameter(name))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_the_dtype_and_feeds_it(self, method, rule, dtype):
        net = mlp(6, 9, 3).to(dtype)
        pruned = run(net, method, rule)
        assert {p.dtype for p in pruned.parameters()} == {dtype}
        assert torch.isfinite(pruned(gaussian(4, 6).to(dtype))).all()
        assert run(net, method, rule, sparsity=None, tol=0.3) is not net

    def test_takes_models_without_biases(self, method, rule):
        pruned = run(mlp(6, 9, 3, bias=False), method, rule)
        assert all(layer.bias is None for layer in pruned if isinstance(layer, nn.Linear))

    @pytest.mark.parametrize("inplace", [False, True])
    def test_a_plan_for_another_model_names_what_differs_and_changes_nothing(self, method, rule, inplace):
        decided = plan(mlp(6, 9, 9, 3), gaussian(64, 6), method=method, rule=rule, sparsity=0.5)
        for other, odd in [
            (mlp(6, 9, 3), "2"),
            (mlp(6, 9, 8, 3), "2"),
            (mlp(6, 9, 9, 4), "4"),
            (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.Linear(9, 3)), "2"),
        ]:
            before = snapshot(other)
            with pytest.raises(ValueError, match=f"'{odd}(\\.weight)?'") as caught:
                apply(other, decided, inplace=inplace)
            assert "he plan is for another model" in str(caught.value)
            assert_unchanged(other, before)

    def test_a_failing_call_in_place_leaves_the_model(self, method, rule):
        net = make()
        with torch.no_grad():
            net.second.weight[0, 0] = torch.nan
        before = {name: value.clone() for name, value in net.state_dict().items()}
        with pytest.raises(ValueError, match=r"nan|NaN"):
            run(net, method, rule, inplace=True)
        for name, value in net.state_dict().items():
            assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7))

    def test_does_not_depend_on_the_mode_of_the_model(self, method, rule):
        net = make()
        assert same_bits(run(net.train(), method, rule), run(net.eval(), method, rule))


class TestArguments:
    @pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("inf")])
    @pytest.mark.parametrize("name", ["sparsity", "tol", "q"])
    def test_outside_zero_to_one_are_refused(self, name, value):
        others = {"sparsity": 0.5, "rule": "yang2022"} if name == "q" else {}
        with pytest.raises(ValueError, match=rf"{name}=.* outside \(0, 1\)"):
            plan(mlp(4, 5, 2), **others, **{name: value})

    @pytest.mark.parametrize("value", ["0.5", True, [0.5], 0.5j])
    @pytest.mark.parametrize("name", ["sparsity", "tol"])
    def test_of_another_kind_are_refused(self, name, value):
        with pytest.raises(TypeError, match=f"{name} must be one real number"):
            plan(mlp(4, 5, 2), **{name: value})

    @pytest.mark.parametrize("value", ["5", 2.0, True])
    @pytest.mark.parametrize("name", ["nonzeros", "bytes", "least"])
    def test_counts_must_be_whole(self, name, value):
        others = {"sparsity": 0.5} if name == "least" else {}
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            plan(mlp(4, 5, 2), **others, **{name: value})

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({}, "got none"),
            ({"sparsity": 0.5, "tol": 0.1}, "got sparsity= and tol="),
            ({"nonzeros": 5, "bytes": 99, "pattern": "2:4"}, "got nonzeros= and bytes= and pattern="),
        ],
    )
    @pytest.mark.parametrize("method", ["lq", "id"])
    def test_one_budget_is_needed_and_no_more(self, method, given, words):
        with pytest.raises(ValueError, match=f"exactly one budget: .* {words}"):
            plan(mlp(4, 5, 2), gaussian(9, 4), method=method, **given)

    def test_unknown_names_come_with_the_list(self):
        with pytest.raises(ValueError, match=r"method='l1' is unknown. Choose one of 'lq', 'id'"):
            plan(mlp(4, 5, 2), method="l1", sparsity=0.5)
        with pytest.raises(ValueError, match=r"rule='chee2021' is unknown. Choose one of 'ellq', 'exact', .*'wanda'"):
            plan(mlp(4, 5, 2), rule="chee2021", sparsity=0.5)
        with pytest.raises(ValueError, match=r"rule='yang2022' is unknown. Choose one of 'ellq', 'chee2021'"):
            plan(mlp(4, 5, 2), gaussian(9, 4), method="id", rule="yang2022", sparsity=0.5)
        with pytest.raises(ValueError, match=r"storage='zip' is unknown"):
            plan(mlp(4, 5, 2), bytes=100, storage="zip")

    @pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"tol": 0.5}])
    def test_settings_a_rule_does_not_have_are_refused_with_those_it_has(self, budget):
        with pytest.raises(TypeError, match=r"q= is no argument of plan, nor a setting of rule='ellq', which takes no"):
            plan(mlp(4, 5, 2), q=0.5, **budget)
        with pytest.raises(TypeError, match=r"gamma= .* rule='yang2022', which takes q=, variant=, over=, c="):
            plan(mlp(4, 5, 2), rule="yang2022", gamma=2, **budget)
        with pytest.raises(TypeError, match=r"sparcity= is no argument"):
            plan(mlp(4, 5, 2), sparcity=0.5, **budget)

    @pytest.mark.parametrize("rule", ["uniform", "global", "lamp", "erk", "least_bound"])
    def test_rules_without_a_tolerance_say_so(self, rule):
        with pytest.raises(ValueError, match=f"rule='{rule}' knows no tolerance"):
            plan(mlp(4, 5, 2), rule=rule, tol=0.5)

    @pytest.mark.parametrize(
        "arguments", [{"nonzeros": 3}, {"pattern": "2:4"}, {"sparsity": {"0": 0.5}}, {"bytes": 10}], ids=str
    )
    def test_budgets_of_masks_are_refused_for_hidden_units(self, arguments):
        with pytest.raises(ValueError, match="is a budget of method='lq'"):
            plan(mlp(4, 5, 2), gaussian(9, 4), method="id", **arguments)

    @pytest.mark.parametrize("arguments", [{"q": 0.5}, {"variant": "capped"}], ids=str)
    def test_settings_of_masks_are_refused_for_units(self, arguments):
        with pytest.raises(TypeError, match="is no setting of rule='ellq' for channels"):
            plan(mlp(4, 5, 2), gaussian(9, 4), method="id", sparsity=0.5, **arguments)

    def test_the_model_must_be_one(self):
        with pytest.raises(TypeError, match=r"model must be an nn.Module or a state dict, got list"):
            prune([1.0], sparsity=0.5)
        with pytest.raises(TypeError, match=r"Pass the nn.Module"):
            plan(mlp(4, 5, 2).state_dict(), gaussian(9, 4), method="id", sparsity=0.5)
        decided = plan(mlp(4, 5, 2), gaussian(20, 4), method="id", sparsity=0.5)
        with pytest.raises(TypeError, match=r"Pass the nn.Module"):
            apply(mlp(4, 5, 2).state_dict(), decided)

    def test_id_needs_calibration(self):
        with pytest.raises(ValueError, match="needs calibration"):
            plan(mlp(4, 5, 2), method="id", sparsity=0.5)

    @pytest.mark.parametrize(
        ("dense_bias", "other_bias"), [(True, False), (False, True)], ids=["bias gone", "bias appeared"]
    )
    def test_a_plan_for_a_consumer_with_another_bias_is_refused(self, dense_bias, other_bias):
        decided = plan(mlp(4, 6, 2, bias=dense_bias), gaussian(20, 4), method="id", sparsity=0.5)
        with pytest.raises(ValueError, match="bias, unlike in the plan"):
            apply(mlp(4, 6, 2, bias=other_bias), decided)


@st.composite
def nets(draw):
    net = mlp(*draw(st.lists(st.integers(2, 9), min_size=2, max_size=4)), seed=draw(st.integers(0, 99)))
    with torch.no_grad():
        if draw(st.booleans()):
            net[0].weight[0] = 0
        if draw(st.booleans()):
            net[-1].weight.mul_(1e4)
    return net


class TestMasks:
    @RELAXED
    @given(nets(), st.floats(0.02, 0.98))
    def test_removes_exactly_as_many_as_asked_or_says_how_many_can_go(self, net, sparsity):
        sparsity = round(sparsity, 3)
        dense = [weight.tensor for weight in maskable_weights(net)]
        total = sum(w.numel() for w in dense)
        asked = int(np.ceil(round(sparsity * total, 6)))
        zeros = sum(int((w == 0).sum()) for w in dense)
        live = sum(int(w.any(1).sum()) for w in dense)
        if total - asked < live:
            with pytest.raises(BudgetError, match=r"unit \d+ of '\d\.weight'. Choose sparsity <= [\d.]+\.$") as refused:
                prune(net, sparsity=sparsity)
            nearest = float(str(refused.value).rpartition(" ")[2].rstrip("."))
            assert nearest == pytest.approx(refused.value.nearest)
            assert nearest < sparsity
            pruned = prune(net, sparsity=nearest)
            assert sum(int((w.tensor != 0).sum()) for w in maskable_weights(pruned)) == live
            return
        pruned = prune(net, sparsity=sparsity, refit="none")
        now = [weight.tensor for weight in maskable_weights(pruned)]
        removed = sum(int((w == 0).sum()) for w in now)
        assert asked <= removed <= asked + zeros
        decided = plan(net, sparsity=sparsity)
        assert decided.table["size"].sum() - decided.table["retained"].sum() == asked
        for before, after in zip(dense, now, strict=True):
            assert ((after != 0).any(1) == before.any(1)).all()
            for w, v in zip(before, after, strict=True):
                assert torch.equal(v[v != 0], w[v != 0])
                if (v == 0).any() and (v != 0).any():
                    assert w[v == 0].abs().max() <= w[v != 0].abs().min()

    @RELAXED
    @given(nets(), st.sampled_from([0.05, 0.2, 0.5, 0.9]))
    def test_a_tolerance_holds_for_every_unit_and_one_fewer_would_break_it(self, net, tol):
        pruned = prune(net, tol=tol)
        for before, after in zip(maskable_weights(net), maskable_weights(pruned), strict=True):
            for w, v in zip(before.units(), after.units(), strict=True):
                assert np.linalg.norm(w - v) <= tol * np.linalg.norm(w) * (1 + 1e-12)
                if v.any():
                    fewer = v.copy()
                    fewer[np.argmin(np.where(v != 0, np.abs(v), np.inf))] = 0
                    assert np.linalg.norm(w - fewer) > tol * np.linalg.norm(w) * (1 - 1e-12)

    @RELAXED
    @given(nets(), st.floats(0.05, 0.6))
    def test_the_authors_rule_removes_at_least_what_was_asked(self, net, sparsity):
        decided = try_plan(net, sparsity=sparsity, rule="yang2022")
        assume(decided is not None)
        assert decided.sparsity >= sparsity
        assert re.search(r"η = -?[\d.]+", decided.table["reason"].iloc[-1])

    def test_an_all_zero_layer_is_fine(self):
        net = mlp(4, 5, 2)
        nn.init.zeros_(net[0].weight)
        for arguments in ({"sparsity": 0.7}, {"tol": 0.1}, {"tol": 0.1, "rule": "yang2022"}):
            decided = plan(net, **arguments)
            assert (decided.table.loc[decided.table["layer"] == "0.weight", "retained"] == 0).all()
            assert set(decided.table.loc[decided.table["layer"] == "0.weight", "reason"]) == {"zero unit"}

    def test_nothing_can_go_from_units_of_one_weight(self):
        with pytest.raises(ValueError, match="Nothing can be removed"):
            prune(nn.Linear(1, 5), sparsity=0.5)

    def test_the_frozen_are_pruned_too(self):
        net = mlp(4, 5, 2).requires_grad_(False)
        pruned = prune(net, sparsity=0.5)
        assert not any(p.requires_grad for p in pruned.parameters())
        assert int((pruned[0].weight == 0).sum() + (pruned[2].weight == 0).sum()) == 15


class TestTheDefault:
    """What ``rule="ellq"`` does to what stays when nothing is said about it."""

    def test_refits_on_inputs_made_up_where_there_are_none(self):
        net, inputs = mlp(6, 20, 3), gaussian(200, 6)
        found = {
            "synthetic": plan(net, sparsity=0.6),
            "obs": plan(net, inputs, sparsity=0.6),
            "least_squares": plan(net, inputs, pattern="2:4"),
        }
        for refit, decided in found.items():
            assert decided.settings["refit"] == refit
            assert set(decided.values) >= {"0.weight", "2.weight"}
            assert (decided.measured is not None) == (refit != "synthetic")
        assert plan(net, inputs, tol=0.4).settings["refit"] == "least_squares"

    @pytest.mark.parametrize(
        ("source", "arguments"),
        [
            (mlp(6, 20, 3), {"tol": 0.4}),
            (mlp(6, 20, 3), {"sparsity": 0.6, "rule": "lamp"}),
            (mlp(6, 20, 3).state_dict(), {"sparsity": 0.6}),
        ],
        ids=["a tolerance", "another rule", "a state dict"],
    )
    def test_is_masks_alone_without_data_for(self, source, arguments):
        decided = plan(source, **arguments)
        assert not decided.values  # noqa: PD011 -- no pandas
        assert "refit" not in decided.settings

    def test_retains_as_many_as_asked_and_errs_less_than_masks_alone(self):
        net, inputs = mlp(6, 20, 3), gaussian(200, 6)
        nets = {refit: prune(net, inputs, sparsity=0.6, refit=refit) for refit in ("auto", "none")}
        with torch.no_grad():
            errors = {refit: float((found(inputs) - net(inputs)).square().mean()) for refit, found in nets.items()}
        assert errors["auto"] < 0.5 * errors["none"]
        for found in nets.values():
            assert sum(int((found[i].weight != 0).sum()) for i in (0, 2)) == 180 - 108

    def test_for_hidden_units_refuses_masks(self):
        masked = apply(mlp(6, 20, 3), plan(mlp(6, 20, 3), sparsity=0.5))
        with pytest.raises(ValueError, match=r"carries masks.*ellq\.finalize"):
            plan(masked, gaussian(50, 6), method="id", sparsity=0.5)
        with pytest.raises(ValueError, match=r"ellq\.finalize"):
            plan(masked, sparsity=0.5)


class TestBudgets:
    @RELAXED
    @given(nets(), st.integers(0, 60), st.integers(0, 3))
    def test_a_count_is_retained_exactly_or_the_nearest_is_named(self, net, nonzeros, least):
        weights = [weight.tensor for weight in maskable_weights(net)]
        total = sum(w.numel() for w in weights)
        held = sum(int((w != 0).sum(1).clamp(max=least).sum()) for w in weights)
        if held <= nonzeros <= total:
            decided = plan(net, nonzeros=nonzeros, least=least)
            assert int(decided.table["retained"].sum()) == nonzeros
            return
        with pytest.raises(BudgetError, match="Choose nonzeros") as refused:
            plan(net, nonzeros=nonzeros, least=least)
        assert refused.value.nearest == (total if nonzeros > total else held)
        assert (
            plan(net, nonzeros=int(refused.value.nearest), least=least).table["retained"].sum() == refused.value.nearest
        )

    @pytest.mark.parametrize(
        ("rule", "settings"),
        [
            ("ellq", {}),
            ("least_bound", {}),
            ("yang2022", {}),
            ("yang2022", {"scope": "layer"}),
            ("yang2022", {"variant": "capped"}),
            ("diao2023", {"scope": "unit"}),
            ("diao2023", {"scope": "global"}),
        ],
    )
    @pytest.mark.parametrize("budget", ["sparsity", "by layer", "nonzeros", "bytes"])
    def test_the_nearest_value_is_of_the_argument_given_and_can_be_met(self, rule, settings, budget):
        torch.manual_seed(0)
        net, inputs = mlp(4, 7, 3), gaussian(20, 4)
        with torch.no_grad():
            net[0].weight.sign_()  # all equal: diao2023 comes to a stop
        few = {"sparsity": 0.99, "by layer": {"*": 0.99}, "nonzeros": 0, "bytes": 44}[budget]
        name = "sparsity" if budget == "by layer" else budget
        with pytest.raises(BudgetError) as refused:
            plan(net, inputs, rule=rule, refit="none", **{name: few}, **settings)
        nearest = refused.value.nearest
        advice = rf"(Choose {name} [<>]= {nearest}|Nothing can be removed)( there)?\.$"
        assert re.search(f" (leaves|comes to a stop|is below).*{advice}", str(refused.value))
        assert re.search(r"of '\d\.weight'|layer '\d\.weight'|the model|the format", str(refused.value))
        assert type(nearest) is (float if name == "sparsity" else int)
        if budget == "by layer":
            met = plan(net, inputs, rule=rule, refit="none", sparsity={"0.weight": nearest}, **settings)
            more = {"sparsity": {"0.weight": nearest + 1 / 28}}
        else:
            met = plan(net, inputs, rule=rule, refit="none", **{name: nearest}, **settings)
            more = {name: nearest + 1 / 49 if name == "sparsity" else nearest - 1}
        if name == "bytes":
            assert storage_bytes(net, plan=met) == nearest
        else:
            total = int(met.table["size"].sum())
            assert int(met.table["retained"].sum()) == (nearest if name == "nonzeros" else retained_of(total, nearest))
        with pytest.raises(BudgetError):
            plan(net, inputs, rule=rule, refit="none", **more, **settings)

    @pytest.mark.parametrize("total", [7, 10**6, 25_557_032, 10**9])
    @pytest.mark.parametrize("held", [0, 1, 999])
    def test_the_nearest_sparsity_leaves_exactly_what_is_held(self, total, held):
        assert retained_of(total, _reachable(min(held, total), total)) == min(held, total)

    def test_a_refused_budget_survives_pickling(self):
        with pytest.raises(BudgetError) as refused:
            plan(mlp(4, 7, 3), nonzeros=3)
        again = pickle.loads(pickle.dumps(refused.value))
        assert (str(again), again.nearest) == (str(refused.value), 10)

    def test_by_layer_leaves_out_what_no_glob_matches(self):
        net = mlp(8, 10, 6, 4)
        decided = plan(net, sparsity={"2": 0.9, "*": 0.5})
        assert decided.layers()["sparsity"].tolist() == [0.5, 0.9, 0.5]
        some = plan(net, sparsity={"2.weight": 0.75})
        assert some.table["layer"].unique().tolist() == ["2.weight"]
        pruned = apply(net, some)
        assert torch.equal(pruned[0].weight, net[0].weight)
        assert "2.weight: 0.75" in repr(some)

    def test_by_layer_names_the_layer_whose_minimum_stands_in_the_way(self):
        net = mlp(8, 10, 6, 4)
        with pytest.raises(
            BudgetError, match=r"layer '2\.weight' leaves 6 weights .* unit 3 of '2\.weight'. Choose sparsity <= 0.8 "
        ):
            plan(net, sparsity={"2": 0.9}, least=2)
        with pytest.raises(ValueError, match=r"sparsity of '2' is 1, outside \[0, 1\)"):
            plan(net, sparsity={"2": 1})

    def test_the_first_unit_without_room_is_named(self):
        with pytest.raises(BudgetError, match=r"sparsity=0.9 leaves 4 weights for 9 units.* unit 4 of '0\.weight'"):
            plan(mlp(4, 7, 2), sparsity=0.9)

    def test_units_may_vanish_if_asked(self):
        net = mlp(20, 30, 5)
        with torch.no_grad():
            net[0].weight[3].mul_(1e-6)
        assert plan(net, sparsity=0.9, least=0).table["retained"][3] == 0
        assert plan(net, sparsity=0.9).table["retained"][3] == 1
        assert plan(net, sparsity=0.9, rule="global").table["retained"][3] == 0
        assert plan(net, sparsity=0.9, rule="global", least=2).table["retained"].min() == 2

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
    def test_global_is_torchs_own_mask(self, dtype, sparsity):
        net = mlp(30, 40, 20, 10).to(dtype)
        decided = plan(net, rule="global", sparsity=sparsity)
        ours, theirs = apply(net, decided), copy.deepcopy(net)
        linear = [(layer, "weight") for layer in theirs if isinstance(layer, nn.Linear)]
        removed = int((decided.table["size"] - decided.table["retained"]).sum())
        torch_prune.global_unstructured(linear, pruning_method=torch_prune.L1Unstructured, amount=removed)
        for (layer, _), own in zip(linear, (m for m in ours if isinstance(m, nn.Linear)), strict=True):
            assert torch.equal(layer.weight, own.weight)

    @pytest.mark.parametrize("scale", [1e-300, 1e300])
    def test_huge_and_tiny_layers_are_planned_as_any_other(self, scale):
        net = mlp(6, 9, 3).double()
        scaled = copy.deepcopy(net)
        with torch.no_grad():
            scaled[0].weight.mul_(scale)
        pd.testing.assert_frame_equal(plan(scaled, sparsity=0.6).table, plan(net, sparsity=0.6).table)

    def test_reasons_say_what_is_zero_and_what_is_at_its_minimum(self):
        net = mlp(20, 30, 5)
        with torch.no_grad():
            net[0].weight[3].mul_(1e-6)
            net[0].weight[4] = 0
        reasons = plan(net, sparsity=0.9).table["reason"]
        assert reasons[3].endswith("at the minimum of 1")
        assert reasons[4] == "zero unit"
        assert len({id(reason) for reason in reasons}) <= 4


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"method": "id", "tol": 0.05}])
def test_what_prune_returns_carries_its_plan(budget):
    net, inputs = mlp(6, 16, 3), gaussian(200, 6)
    pruned = prune(net, inputs, **budget)
    assert pruned.ellq_plan.table["retained"].equals(plan(net, inputs, **budget).table["retained"])
    assert (pruned.ellq_plan.guarantee is not None) == ("tol" in budget)
    assert list(pruned.state_dict()) == list(net.state_dict())
    assert copy.deepcopy(pruned).ellq_plan.sparsity == pruned.ellq_plan.sparsity
