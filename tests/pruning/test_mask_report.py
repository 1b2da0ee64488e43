"""The report of a pruning: its numbers by an independent route, its bounds, and what it refuses."""

from __future__ import annotations

import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ellq
from ellq.pruning.mask_report import COLUMNS, compare_outputs
from pruned_nets import assert_unchanged, gaussian, mlp, prunings, snapshot

ERRORS = ["bound", "error_alone", "error_calibration", "error_held_out"]
# What the networks' own sums are off by, relative to their outputs, where terms cancel a thousandfold and more.
FLOAT64, FLOAT32 = 1e5 * 2.0**-53, 100 * 2.0**-24


class Residual(nn.Module):
    """Two branches, a batch norm, a layer that runs twice, one that never does, an in-place function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.never = nn.Linear(5, 5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = x + self.act(self.body(x))
        x = self.twice(self.twice(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    net = Residual().double()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2.0)
    return net.eval()


def images(count: int, seed: int) -> torch.Tensor:
    return gaussian(count, 3, 6, 6, seed=seed).double()


def relative(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


def outputs(model: nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    found = []
    hook = model.get_submodule(path).register_forward_hook(lambda *args: found.append(args[2].clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    return torch.stack(found)


def report_on(dense, pruned, plan=None, *, calibration=None, held_out=None, **others):
    first = next(dense.parameters())
    shape = (3, 6, 6) if first.ndim == 4 else (first.shape[1],)
    calibration = gaussian(40, *shape, seed=1).to(first.dtype) if calibration is None else calibration
    held_out = gaussian(30, *shape, seed=2).to(first.dtype) if held_out is None else held_out
    return compare_outputs(dense, pruned, plan, calibration=calibration, held_out=held_out, **others)


# --- the numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refit", ["none", "obs"])
def test_errors_are_those_of_every_layer_as_both_networks_run(residual, refit):
    x, y = images(40, 1), images(30, 2)
    plan = ellq.plan(residual, x, sparsity=0.5, refit=refit)
    pruned = ellq.apply(residual, plan)
    plain = ellq.finalize(pruned)
    labels = torch.arange(30) % 3
    report = compare_outputs(residual, pruned, plan, calibration=x, held_out=y, labels=labels, batch_size=7)
    rows = report.layers.set_index("layer")
    for layer, end in (("stem", "norm"), ("body", "body"), ("twice", "twice"), ("head", "head")):
        row = rows.loc[f"{layer}.weight"]
        assert row["measured_at"] == end
        for column, inputs in (("error_calibration", x), ("error_held_out", y)):
            expected = relative(outputs(residual, end, inputs), outputs(plain, end, inputs))
            assert row[column] == pytest.approx(expected, rel=1e-9)
        weight = residual.get_submodule(layer).weight
        assert row["nonzeros_before"] == weight.count_nonzero()
        assert row["nonzeros_after"] == plain.get_submodule(layer).weight.count_nonzero()
        assert row["sparsity"] == 1 - row["nonzeros_after"] / row["weights"]
        assert (row["units"], row["weights"]) == (len(weight), weight.numel())
    alone = copy.deepcopy(residual)
    alone.body = plain.body
    expected = relative(outputs(residual, "body", x), outputs(alone, "body", x))
    assert rows.loc["body.weight", "error_alone"] == pytest.approx(expected, rel=1e-9)
    alone = copy.deepcopy(residual)
    alone.stem, alone.norm = plain.stem, plain.norm
    expected = relative(outputs(residual, "norm", x), outputs(alone, "norm", x))
    assert rows.loc["stem.weight", "error_alone"] == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():
        before, after = residual(y), plain(y)
        assert report.model["error_calibration"] == pytest.approx(relative(residual(x), plain(x)), rel=1e-9)
    assert report.model["error_held_out"] == pytest.approx(relative(before, after), rel=1e-9)
    was, now = before.argmax(1), after.argmax(1)
    assert report.agreement == pytest.approx(float((was == now).double().mean()))
    assert report.accuracies == pytest.approx([float((answer == labels).double().mean()) for answer in (was, now)])
    assert report.lost.tolist() == torch.nonzero((was == labels) & (now != labels)).flatten().tolist()
    assert report.gained.tolist() == torch.nonzero((was != labels) & (now == labels)).flatten().tolist()
    assert report.costs[0].parameters == sum(p.numel() for p in residual.parameters())
    assert report.costs[1].nonzeros == sum(int(p.count_nonzero()) for p in plain.parameters())


def test_says_which_layers_run_often_or_never_and_why_there_is_no_bound(residual):
    report = report_on(residual, copy.deepcopy(residual))
    notes = report.layers.set_index("layer")["note"]
    assert "runs 2 times" in notes["twice.weight"]
    assert "not run by itself" in notes["never.weight"]
    assert np.isnan(report.layers.set_index("layer").loc["never.weight", ERRORS].to_numpy(dtype=float)).all()
    assert report.frame["bound"].isna().all()
    assert "no chain" in report.no_bound
    assert any("never.weight is not run" in remark for remark in report.remarks)


def test_an_unpruned_copy_changes_nothing(residual):
    for net in (residual, mlp(6, 9, 7, 4)):
        report = report_on(net, copy.deepcopy(net), labels=torch.zeros(30, dtype=torch.long))
        ran = report.frame[~report.frame["note"].str.contains("not run")]
        assert (ran[["error_calibration", "error_held_out"]] == 0).all(axis=None)
        assert (ran["error_alone"].dropna() == 0).all()
        assert (ran["bound"].dropna() == 0).all()
        assert report.agreement == 1
        assert report.accuracies[0] == report.accuracies[1]
        assert len(report.lost) == len(report.gained) == 0
        assert (report.frame["nonzeros_after"] == report.frame["nonzeros_before"]).all()


def test_batches_their_size_and_their_labels_make_no_difference(residual):
    x, y, labels = images(40, 1), images(30, 2), torch.arange(30) % 3
    pruned = ellq.prune(residual, sparsity=0.6)
    one = compare_outputs(residual, pruned, calibration=x, held_out=y, labels=labels, batch_size=1000)
    loader = DataLoader(TensorDataset(y, labels), batch_size=4)
    for other in (
        compare_outputs(residual, pruned, calibration=x, held_out=y, labels=labels.numpy(), batch_size=3),
        compare_outputs(residual, pruned, calibration=iter(x.split(9)), held_out=loader),
    ):
        np.testing.assert_allclose(other.frame[ERRORS].to_numpy(float), one.frame[ERRORS].to_numpy(float), rtol=1e-12)
        assert other.examples.equals(one.examples)
        assert other.samples == (40, 30)


def test_errors_do_not_overflow_nor_vanish():
    for scale in (1e-200, 1.0, 1e200):
        net = mlp(5, 4, bias=False).double()
        with torch.no_grad():
            net[0].weight.mul_(scale)
        report = report_on(net, ellq.prune(net, sparsity=0.5, refit="none"))
        assert report.layers["error_calibration"][0] == pytest.approx(
            report_on(
                mlp(5, 4, bias=False).double(), ellq.prune(mlp(5, 4, bias=False).double(), sparsity=0.5, refit="none")
            ).layers["error_calibration"][0],
            rel=1e-12,
        )


def test_a_dead_layer_that_comes_alive_is_infinitely_off():
    dense = mlp(4, 3, 2)
    with torch.no_grad():
        dense[0].weight.zero_()
        dense[0].bias.zero_()
    alive = copy.deepcopy(dense)
    alive[0].bias.data.fill_(1.0)
    report = report_on(dense, alive)
    assert report.layers["error_calibration"][0] == math.inf
    assert json.loads(report.to_json())["rows"][0][COLUMNS.index("error_calibration")] is None
    assert "∞" in str(report)


def test_outputs_that_are_no_classes_have_errors_and_no_agreement():
    net = mlp(6, 5, 1)
    report = report_on(net, ellq.prune(net, sparsity=0.5))
    assert report.examples is None
    assert math.isnan(report.agreement)
    assert report.model["error_held_out"] > 0
    assert "off by" in report.verdict
    assert "Example by example" not in report.to_html()


def test_without_labels_there_is_agreement_and_no_accuracy():
    net = mlp(6, 5, 3)
    report = report_on(net, ellq.prune(net, sparsity=0.5))
    assert 0 <= report.agreement <= 1
    assert np.isnan(report.accuracies).all()
    assert report.lost.size == report.gained.size == 0
    assert json.loads(report.to_json())["accuracy"] == {"dense": None, "pruned": None}


def test_layers_cut_smaller_are_compared_where_they_can_be():
    net = mlp(6, 8, 4)
    with torch.no_grad():
        net[0].weight[2:].zero_()
    smaller = ellq.compact(net, gaussian(1, 6))
    assert smaller[0].out_features < 8
    report = report_on(net, smaller)
    first, second = report.layers.to_dict("records")
    assert "another shape" in first["note"]
    assert math.isnan(first["error_calibration"])
    assert math.isnan(first["error_alone"])
    assert second["error_calibration"] < 1e-6
    assert second["nonzeros_after"] < second["nonzeros_before"]
    assert report.agreement == 1


def test_attention_and_recurrent_layers_are_watched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.recurrent = nn.LSTM(8, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.recurrent(x)[0][:, -1])

    torch.manual_seed(0)
    net = Net().eval()
    plan = ellq.plan(net, sparsity=0.5)
    x, y = gaussian(20, 4, 8, seed=1), gaussian(20, 4, 8, seed=2)
    rows = compare_outputs(net, ellq.apply(net, plan), plan, calibration=x, held_out=y).layers.set_index("layer")
    assert (rows.drop("attention.out_proj.weight")[["error_alone", "error_held_out"]] > 0).all(axis=None)
    assert "not run by itself" in rows.loc["attention.out_proj.weight", "note"]
    assert rows.loc["recurrent.weight_ih_l0", "error_held_out"] == rows.loc["recurrent.weight_hh_l0", "error_held_out"]


# --- the bounds ------------------------------------------------------------------------------------------------


def shortfalls(report, rounding: float) -> list[str]:
    """The layers whose error on calibration inputs exceeds its bound by more than a rounding of their outputs."""
    frame = report.frame
    known = frame[frame["bound"].notna() & frame["error_calibration"].notna()]
    return known.loc[known["error_calibration"] > known["bound"] * (1 + rounding) + rounding, "layer"].tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prunings())
def test_bounds_hold(case):
    if case is None:
        return
    net, pruned, inputs, plan = case
    net, pruned = net.double(), ellq.finalize(pruned).double()
    held_out = torch.cat([inputs, inputs]) * 3 + 1
    try:
        report = compare_outputs(net, pruned, plan, calibration=inputs, held_out=held_out, batch_size=5)
    except ValueError as error:  # features may exceed what a float holds, or overlap by chance
        if "infinite" in str(error) or "share" in str(error):
            return
        raise
    assert report.no_bound == ""
    assert shortfalls(report, FLOAT64) == []


@pytest.mark.parametrize("method", ["lq", "id"])
@pytest.mark.parametrize("refit", ["auto", "data"])
def test_bounds_of_a_chain_are_known_and_no_looser_than_needed(method, refit):
    net, x = mlp(12, 20, 20, 5), gaussian(300, 12, seed=1)
    given_inputs = x if method == "id" or refit == "data" else None
    plan = ellq.plan(net, given_inputs, method=method, sparsity=0.5)
    report = report_on(net, ellq.apply(net, plan), plan, calibration=x)
    rows = report.layers
    assert report.frame["bound"].notna().all()
    assert shortfalls(report, FLOAT32) == []
    # Nothing drifts before the first layer, and what ends the chain is the model's output.
    assert rows["bound"][0] == pytest.approx(rows["error_alone"][0], rel=1e-6)
    assert rows["bound"].iloc[-1] == report.model["bound"]
    assert report.to_html().count("bound")


def test_a_bound_one_percent_too_small_is_caught():
    net = mlp(12, 20, 5)
    report = report_on(net, ellq.prune(net, sparsity=0.5, refit="none"))
    report.frame["bound"] *= 0.99
    assert shortfalls(report, FLOAT32) == ["0.weight"]


def test_a_chain_with_a_norm_is_bounded_behind_it():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 3)
    )
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.2, 3.0)
    net[1].weight.data.normal_()
    net = net.eval().double()
    plan = ellq.plan(net, sparsity=0.4, refit="none")
    report = report_on(net, ellq.apply(net, plan), plan)
    assert report.layers["measured_at"].tolist() == ["1", "3", "5"]
    assert report.frame["bound"].notna().all()
    assert shortfalls(report, FLOAT64) == []
    shifted = ellq.plan(net, images(40, 1), sparsity=0.4, refit="bias")  # moves the norm, which no bound covers
    report = report_on(net, ellq.apply(net, shifted), shifted)
    assert report.no_bound.startswith("Step '1'")
    assert report.frame["bound"].isna().all()


def test_a_layer_used_twice_in_a_chain_has_no_bound():
    layer = nn.Linear(6, 6)
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), layer)
    report = report_on(net, ellq.prune(net, sparsity=0.5, refit="none"))
    rows = report.layers.set_index("layer")
    assert math.isnan(rows.loc["0.weight", "bound"])
    assert rows.loc["2.weight", "bound"] >= rows.loc["2.weight", "error_calibration"]
    assert rows.loc["2.weight", "bound"] != report.model["bound"]


# --- what is shown ---------------------------------------------------------------------------------------------


def test_shows_itself_everywhere_with_the_same_numbers(tmp_path):
    net = mlp(6, 9, 4)
    plan = ellq.plan(net, sparsity=0.7)
    report = report_on(net, ellq.apply(net, plan), plan, labels=torch.arange(30) % 4)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == data
    page = report.to_html(tmp_path / "report.html", title="Our <net>")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert "Our &lt;net&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    shown = f"{report.layers['error_held_out'][0]:.3g}"
    for view in (text, str(report), report._repr_html_(), page):
        assert shown in view
        assert "held-out" in view
    assert report.verdict in page.replace("&#39;", "'")
    assert repr(report) == f"MaskReport({report.verdict})"
    assert data["columns"] == list(COLUMNS)
    assert data["agreement"] == report.agreement
    assert data["lost"] == report.lost.tolist()
    assert data["samples"] == {"calibration": 40, "held_out": 30}
    assert data["what"] == "method lq, rule ellq"
    assert len(data["examples"]["dense"]) == 30
    frame = report.to_frame()
    frame["bound"] = 0.0
    assert (report.frame["bound"] != 0).all()
    report.to_csv(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text(encoding="utf-8").count("\n") == 4
    assert report.plot().axes[0].get_xscale() == "log"


def test_an_unpruned_copy_can_be_drawn():
    net = mlp(4, 3)
    assert "<svg" not in report_on(net, net).to_html()  # pictures are data, not markup
    assert report_on(net, net).plot().axes


# --- what it leaves alone and refuses --------------------------------------------------------------------------


def test_neither_model_is_changed(residual):
    pruned = ellq.apply(residual, ellq.plan(residual, sparsity=0.5))
    residual.train()
    before = snapshot(residual), snapshot(pruned)
    loader = DataLoader(TensorDataset(images(30, 2)), batch_size=4, shuffle=True)
    compare_outputs(residual, pruned, calibration=images(20, 1), held_out=loader)
    assert_unchanged(residual, before[0])
    assert_unchanged(pruned, before[1])


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"dense": {}}, TypeError, "dense must be an nn.Module, got dict"),
        ({"pruned": None}, TypeError, "pruned must be an nn.Module, got NoneType"),
        ({"plan": "plan.json"}, TypeError, "plan must be an ellq.Plan, got str"),
        ({"batch_size": 0}, ValueError, "batch_size=0 is below 1"),
        ({"calibration": "digits"}, TypeError, "calibration must be a tensor or an iterable of batches, got str"),
        ({"held_out": 3}, TypeError, "held_out must be a tensor or an iterable of batches, got int"),
        ({"held_out": [{"x": 1}]}, TypeError, "Batch 0 of held_out is dict"),
        ({"held_out": []}, ValueError, "held_out holds no example"),
        ({"calibration": torch.zeros(0, 6)}, ValueError, "calibration holds no example"),
        ({"calibration": torch.tensor(1.0)}, ValueError, "calibration holds no example"),
        ({"calibration": gaussian(9, 6, seed=2)[3:]}, ValueError, "share 6 examples"),
        ({"held_out": gaussian(9, 5, seed=2)}, ValueError, "dense network does not run on batch 0 of held_out"),
        (
            {"held_out": torch.full((9, 6), math.nan)},
            ValueError,
            "Batch 0 of held_out gives NaN .* layer '0' of the dense",
        ),
        ({"labels": torch.zeros(8, dtype=torch.long)}, ValueError, r"labels of shape \(8,\) .* do not fit 9"),
        ({"labels": torch.zeros(9)}, ValueError, "float32 do not fit 9"),
        ({"labels": torch.arange(9)}, ValueError, r"labels lie in \[0, 8\], but the models have 4 outputs"),
        ({"labels": torch.arange(9) - 5}, ValueError, r"labels lie in \[-5, 3\]"),
    ],
)
def test_refuses_what_it_cannot_use(arguments, error, says):
    net = mlp(6, 5, 4)
    usual = {"dense": net, "pruned": net, "plan": None, "calibration": gaussian(9, 6, seed=1)}
    usual |= {"held_out": gaussian(9, 6, seed=2)} | arguments
    with pytest.raises(error, match=says):
        compare_outputs(usual.pop("dense"), usual.pop("pruned"), usual.pop("plan"), **usual)


def test_refuses_labels_of_what_has_no_classes_and_plans_for_other_models():
    net = mlp(6, 5, 1)
    with pytest.raises(ValueError, match="do not give outputs of shape"):
        report_on(net, net, labels=torch.zeros(30, dtype=torch.long))
    with pytest.raises(ValueError, match=r"plan is for another model: it has layer '4.weight'"):
        report_on(net, net, ellq.plan(mlp(6, 5, 4, 1), sparsity=0.5))


def test_names_the_layer_and_the_batch_where_the_pruned_network_breaks():
    net = mlp(6, 5, 4)
    broken = copy.deepcopy(net)
    broken[2].bias.data[1] = math.nan
    with pytest.raises(
        ValueError, match="Batch 0 of held_out gives NaN or infinite outputs of layer '2' of the pruned"
    ):
        report_on(net, broken)
    inputs = gaussian(30, 6, seed=2)
    inputs[25] = math.inf
    with pytest.raises(ValueError, match="Batch 5 of held_out"):
        report_on(net, net, held_out=inputs, batch_size=5)
