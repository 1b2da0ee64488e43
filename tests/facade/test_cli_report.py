"""The page that the prune command writes about what pruning changed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ellq
from ellq.analysis import datasets
from ellq.cli import run
from ellq.pruning.mask_report import compare_outputs

SOURCE = (
    "from torch import nn\n"
    "def make():\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))\n"
)
WORDS = ["prune", "--weights", "net.safetensors", "--out", "out", "--sparsity", "0.8", "--report", "page.html"]
DATA = ["--model", "ournets:make", "--data", "digits", "--samples", "100"]


@pytest.fixture
def net(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    save_file(net.state_dict(), str(tmp_path / "net.safetensors"))
    (tmp_path / "ournets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return net


def test_the_page_holds_the_numbers_of_the_models_written(net, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ellq", *WORDS, *DATA],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pruned = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    pruned.load_state_dict(load_file("out/model.safetensors"))
    train, test = (datasets.load("digits", part).select(range(100)) for part in ("train", "test"))
    expected = compare_outputs(net, pruned, calibration=train.inputs(), held_out=test.inputs(), labels=test.labels)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert expected.verdict in page
    for name in ("error_alone", "error_calibration", "error_held_out"):
        assert f"{expected.layers[name][0]:.3g}" in page
    assert "rule ellq" in page


@pytest.mark.parametrize("words", [[], ["--data", "digits"], ["--model", "ournets:make"]])
def test_a_report_needs_the_model_and_data(net, tmp_path, words, capsys):
    assert run([*WORDS, *words]) == 2
    assert "Give --model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "page.html").exists()


def test_units_removed_are_reported_too(net, tmp_path, capsys):
    assert run([*WORDS, *DATA, "--method", "id"]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "method id" in page
    assert "Bound: on the error on calibration inputs" in page
    assert ellq.Plan.from_json((tmp_path / "out" / "plan.json").read_text(encoding="utf-8")).method == "id"
