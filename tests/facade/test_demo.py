"""The demo, end to end as a subprocess: what it leaves behind agrees with itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import ellq
from ellq.analysis import accuracy, cost
from ellq.paper_figures.digits import NETS, digits_splits, train_net
from ellq.pruning import Plan, apply, plan

COMMAND = [sys.executable, "-m", "ellq", "demo"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "ellq-demo", done


@pytest.fixture(scope="module")
def record(demo):
    return json.loads((demo[0] / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dense():
    splits = digits_splits()
    return {net: train_net(net, splits, seed=0) for net in NETS}


def test_leaves_exactly_what_it_says(demo):
    found = {str(p.relative_to(demo[0])) for p in demo[0].rglob("*") if p.is_file()}
    models = {
        f"{net}-{method}/{file}"
        for net in ("mlp", "conv")
        for method in ("lq", "id")
        for file in ("model.safetensors", "plan.json")
    }
    assert found == {"report.html", "profile.csv", "summary.json"} | models
    assert [p.name for p in demo[0].parent.iterdir()] == ["ellq-demo"]


def test_prints_the_summary_and_nothing_on_stderr(demo):
    printed = demo[1].stdout
    for words in ("params", "non-zero", "FLOPs", "accuracy", "→", "bound", "observed", "report.html"):
        assert words in printed
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    assert demo[1].stderr == ""


def test_every_bound_is_at_least_the_observed_error(record):
    rows = [row for row in record["summary"] if row["method"] != "dense"]
    assert len(rows) == 10
    for row in rows:
        assert 0 < row["observed"] <= row["bound_measured"] <= row["bound"]
    assert len(record["layers"]) == 2 * (2 + 4)
    for row in record["layers"]:
        assert row["observed"] <= min(row["bound_measured"], row["bound"])
        assert row["bound_lq"] is None or row["bound"] <= row["bound_lq"]


def test_both_rules_stand_side_by_side(record):
    rules = {(row["net"], row["method"], row["rule"]) for row in record["summary"]}
    for net in ("mlp", "conv"):
        masks = {(net, "lq", rule) for rule in ("ellq", "yang2022", "refitted")}
        assert masks | {(net, "id", "ellq"), (net, "id", "chee2021")} <= rules


def test_pruned_models_are_smaller_and_still_work(record):
    for net in ("mlp", "conv"):
        rows = {(r["method"], r["rule"]): r for r in record["summary"] if r["net"] == net}
        before = rows["dense", ""]
        assert before["accuracy_after"] > 0.9
        assert rows["lq", "ellq"]["nonzeros"] < before["nonzeros"]
        assert rows["lq", "ellq"]["parameters"] == before["parameters"]
        assert rows["id", "ellq"]["parameters"] < before["parameters"]
        assert rows["id", "ellq"]["flops"] < before["flops"]
        for key in (("lq", "ellq"), ("id", "ellq")):
            assert rows[key]["accuracy_after"] > before["accuracy_after"] - 0.05


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("method", ["lq", "id"])
def test_reloaded_model_gives_bit_equal_outputs_and_the_numbers_in_the_summary(demo, record, dense, net, method):
    splits = digits_splits()
    row = next(r for r in record["summary"] if (r["net"], r["method"], r["rule"]) == (net, method, "ellq"))
    loaded = ellq.load(demo[0] / f"{net}-{method}", NETS[net])
    # The same training and plan again, in this process: the file holds these bits.
    refit = {"lq": "none", "id": "auto"}[method]
    decided = plan(dense[net], splits.calibration, method=method, sparsity=row["sparsity"], refit=refit)
    pruned = apply(dense[net], decided)
    inputs, labels = splits.test
    with torch.no_grad():
        assert torch.equal(loaded(inputs), pruned(inputs))
    assert accuracy(loaded, inputs, labels) == row["accuracy_after"]
    size = cost(loaded, inputs[:1])
    assert (size.parameters, size.nonzeros, size.flops) == (row["parameters"], row["nonzeros"], row["flops"])
    stored = load_file(demo[0] / f"{net}-{method}" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == row["parameters"]


def test_saved_plan_says_what_was_retained(demo, record):
    for net, method in (("mlp", "lq"), ("conv", "id")):
        saved = json.loads((demo[0] / f"{net}-{method}/plan.json").read_text(encoding="utf-8"))["plan"]
        decided = Plan.from_json(json.dumps(saved))
        row = next(r for r in record["summary"] if (r["net"], r["method"], r["rule"]) == (net, method, "ellq"))
        assert decided.sparsity == pytest.approx(row["sparsity"], abs=0.02)  # 0.8 of 64 units is not whole


def test_profile_holds_every_unit_layer_and_net(demo, dense):
    frame = pd.read_csv(demo[0] / "profile.csv")
    for net, model in dense.items():
        rows = frame[frame["net"] == net]
        weights = [p for p in model.parameters() if p.ndim >= 2]
        assert (rows["level"] == "unit").sum() == sum(len(p) for p in weights)
        assert (rows["level"] == "layer").sum() == len(weights)
        whole = rows[rows["level"] == "model"].iloc[0]
        joined = torch.cat([p.detach().flatten() for p in weights]).double().abs().numpy()
        np.testing.assert_allclose(whole["quasinorm"], (joined**0.5).sum() ** 2, rtol=1e-12)
        np.testing.assert_allclose(whole["l1"], joined.sum(), rtol=1e-12)


def test_report_is_self_contained(demo, record):
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert "<script" not in page
    assert page.count("data:image/svg+xml;base64,") == 1 + 2 + 2 * 4 + 2  # accuracy, bounds, profiles, comparisons
    for row in record["summary"]:
        assert f"{row['parameters']:,}" in page


@pytest.mark.slow
def test_same_seed_gives_the_same_files(demo, tmp_path):
    subprocess.run([*COMMAND, "--out", "again"], cwd=tmp_path, capture_output=True, timeout=400, check=True)
    for path in demo[0].rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(demo[0])).read_bytes() == path.read_bytes(), path.name


def test_interrupt_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen(
        COMMAND,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C and hand that on; a user's foreground command does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    assert process.poll() is None, "the demo ended before it could be interrupted"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip() == "ellq: interrupted; no file is half-written"
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_not_replaced(tmp_path):
    (tmp_path / "ellq-demo").mkdir()
    (tmp_path / "ellq-demo/thesis.tex").write_text("years of work")
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "thesis.tex" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "ellq-demo/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", ["/proc/ellq-demo", "file/ellq-demo"])
def test_unwritable_place_is_found_out_before_the_work(tmp_path, place):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    (tmp_path / "file").write_text("not a folder")
    began = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "--out", place], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_read_only_folder_is_found_out_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    tmp_path.chmod(0o700)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
