"""What the report of narrower layers says is what two networks do."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ellq.analysis import cost
from ellq.pruning import MaskReport, prune
from ellq.pruning.channel_report import ChannelReport, report, report_channels
from pruned_nets import assert_unchanged, gaussian, mlp, snapshot

CALIBRATION, HELD_OUT = gaussian(300, 1, 6, 6), gaussian(50, 1, 6, 6, seed=1)
LABELS = torch.arange(50) % 3


class Net(nn.Module):
    """A residual stream, and a layer that stays dense."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1)
        self.back = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.back(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Net().eval()
    return net, prune(net, CALIBRATION, method="id", sparsity=0.5, round_to=1)


def test_says_what_was_cut_and_why(nets):
    dense, small = nets
    found = report(dense, small)
    assert isinstance(found, ChannelReport)
    groups = found.groups.set_index("group")
    assert list(groups.index) == ["stem", "inner"]
    assert groups.loc["stem", "made_by"] == ["stem", "back"]
    assert groups.loc["stem", "read_by"] == ["inner", "head"]
    assert groups.loc["inner", "retained"] == small.inner.out_channels
    assert groups.loc["stem", "retained"] == small.head.in_features
    page = found.to_html()
    for layer, why in small.ellq_plan.left.items():
        assert f"<td>{layer}</td>" in page
        assert why.replace("'", "&#39;") in page


def test_says_which_groups_were_left_whole_and_why():
    net = Net().eval()
    small = prune(net, CALIBRATION, method="id", sparsity=0.5, round_to=8)
    found = report(net, small)
    assert found.groups.set_index("group").loc["inner", "retained"] == 8
    page = found.to_html()
    assert page[page.index("What stays dense") :].count("<td>inner</td>") == 1


def test_sizes_are_those_of_the_networks(nets):
    dense, small = nets
    unrun = report(dense, small).sizes
    assert unrun["flops"].isna().all()
    sizes = report(dense, small, calibration=CALIBRATION).sizes
    for name, net in (("dense", dense), ("pruned", small)):
        counted = cost(net, CALIBRATION[:1])
        assert sizes.loc[name, "parameters"] == counted.parameters == unrun.loc[name, "parameters"]
        assert sizes.loc[name, "flops"] == counted.flops
        header = 8 + int.from_bytes(save(net.state_dict())[:8], "little")
        assert sizes.loc[name, "bytes"] == len(save(net.state_dict())) - header
    assert (sizes.loc["pruned"] < sizes.loc["dense"]).all()


def test_a_shared_tensor_counts_once():
    net = mlp(4, 4, 4)
    plan = prune(net, gaussian(60, 4), method="id", sparsity=0.5, include=["0"]).ellq_plan
    net[2].weight = net[0].weight
    assert report_channels(plan, net).sizes.loc["pruned", "bytes"] == 4 * (16 + 4 + 4)


@pytest.mark.parametrize("labels", [LABELS, LABELS.numpy(), None])
def test_outputs_are_compared_on_both_sets(nets, labels):
    dense, small = nets
    before = [snapshot(net) for net in nets]
    found = report(dense, small, calibration=CALIBRATION, held_out=HELD_OUT, labels=labels)
    for net, state in zip(nets, before, strict=True):
        assert_unchanged(net, state)
    with torch.no_grad():
        for name, inputs in (("calibration", CALIBRATION), ("held-out", HELD_OUT)):
            row = found.outputs.loc[name]
            ours, theirs = dense(inputs), small(inputs)
            assert row["examples"] == len(inputs)
            assert row["error"] == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-4)
            assert row["agreement"] == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).float().mean()))
            if name == "calibration" or labels is None:
                assert math.isnan(row["accuracy_dense"])
            else:
                assert row["accuracy_dense"] == pytest.approx(float((ours.argmax(1) == LABELS).float().mean()))
                assert row["accuracy_pruned"] == pytest.approx(float((theirs.argmax(1) == LABELS).float().mean()))
                assert f"accuracy {row['accuracy_dense']:.2%} before" in found.verdict


def test_batches_bring_their_labels(nets):
    loader = DataLoader(TensorDataset(HELD_OUT, LABELS), batch_size=16)
    given = report(*nets, held_out=HELD_OUT, labels=LABELS)
    pd.testing.assert_frame_equal(report(*nets, held_out=loader).outputs, given.outputs)


def test_gives_json_and_writes_the_page(nets, tmp_path):
    found = report(*nets, tmp_path / "page.html", held_out=HELD_OUT)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == found.to_html()
    data = json.loads(found.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == data
    assert data["verdict"] == found.verdict
    assert [row["network"] for row in data["sizes"]] == ["dense", "pruned"]
    assert data["outputs"][0]["accuracy_dense"] is None
    assert data["groups"][1]["made_by"] == ["inner"]


def test_without_the_dense_network_tells_what_is_known(nets):
    found = report_channels(nets[1].ellq_plan, nets[1], calibration=CALIBRATION[:1])
    assert list(found.sizes.index) == ["pruned"]
    assert found.outputs.empty
    assert "of 14 units stay" in found.verdict
    assert "The dense network was not given" in found.to_html()


def test_outputs_that_choose_no_class_have_no_agreement(nets):
    dense, small = (nn.Sequential(net, nn.Unflatten(1, (1, 3))) for net in nets)
    plan = nets[1].ellq_plan
    moved = [group.replace("stem", "0.stem").replace("inner", "0.inner") for group in plan.table["layer"]]
    renamed = type(plan)(plan.method, plan.rule, plan.settings, plan.table.assign(layer=moved))
    row = report(dense, small, held_out=HELD_OUT, plan=renamed).outputs.loc["held-out"]
    assert row["error"] > 0
    assert math.isnan(row["agreement"])
    with pytest.raises(ValueError, match="do not give outputs of shape"):
        report(dense, small, held_out=HELD_OUT, labels=LABELS, plan=renamed)


def test_masks_are_reported_layer_by_layer():
    net = mlp(4, 6, 3).eval()
    sparse = prune(net, gaussian(60, 4), sparsity=0.5)
    found = report(net, sparse, calibration=gaussian(60, 4), held_out=gaussian(20, 4, seed=2))
    assert isinstance(found, MaskReport)
    with pytest.raises(ValueError, match="Pass calibration= and held_out="):
        report(net, sparse)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"held_out": CALIBRATION[:3], "calibration": CALIBRATION}, ValueError, "share 3 examples"),
        ({"labels": LABELS}, ValueError, "Pass held_out= too"),
        ({"held_out": HELD_OUT, "labels": LABELS[:9]}, ValueError, r"labels of shape \(9,\)"),
        ({"held_out": HELD_OUT, "labels": LABELS.double()}, ValueError, "float64"),
        ({"held_out": gaussian(3, 5)}, ValueError, "does not run on batch 0 of held-out"),
        ({"calibration": HELD_OUT[:0]}, ValueError, "no example"),
        ({"plan": "id"}, TypeError, "plan must be an ellq.Plan"),
    ],
)
def test_what_makes_no_sense_is_refused(nets, change, error, match):
    with pytest.raises(error, match=match):
        report(*nets, **change)


def test_another_model_is_refused(nets):
    with pytest.raises(ValueError, match="it has layer 'stem', which the dense one lacks"):
        report(mlp(4, 6, 3), nets[1])
    with pytest.raises(TypeError, match=r"dense must be an nn\.Module"):
        report(nets[0].state_dict(), nets[1])
