"""The prune command's budgets, rules and choices of layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ellq
from ellq.cli import run

SOURCE = (
    "from torch import nn\n"
    "def make():\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    save_file(net.state_dict(), str(tmp_path / "net.safetensors"))
    (tmp_path / "ournets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return net


def prune(*words: str) -> int:
    return run(["prune", "--weights", "net.safetensors", "--out", "out", *words])


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["--nonzeros", "300"], {"nonzeros": 300}),
        (["--bytes", "3000"], {"bytes": 3000}),
        (["--bytes", "3000", "--storage", "bitmask"], {"bytes": 3000, "storage": "bitmask"}),
        (["--pattern", "2:4"], {"pattern": "2:4"}),
        (["--sparsity", '{"1": 0.9, "3.*": 0.5}'], {"sparsity": {"1": 0.9, "3.*": 0.5}}),
        (["--sparsity", "0.9", "--include", '["1"]'], {"sparsity": 0.9, "include": ["1"]}),
        (["--sparsity", "0.9", "--exclude", '["1"]', "--least", "0"], {"sparsity": 0.9, "exclude": ["1"], "least": 0}),
        (["--sparsity", "0.9", "--rule", "lamp"], {"sparsity": 0.9, "rule": "lamp"}),
        (["--tol", "0", "--rule", "yang2022", "--q", "0.3"], {"tol": 0, "rule": "yang2022", "q": 0.3}),
        (
            ["--tol", "0", "--rule", "diao2023", "--settings", '{"scope": "layer", "p": 1.0}', "--q", "2"],
            {"tol": 0, "rule": "diao2023", "scope": "layer", "p": 1.0, "q": 2.0},
        ),
    ],
)
def test_takes_what_plan_takes(folder, words, arguments, capsys):
    assert prune(*words) == 0
    expected = ellq.prune(folder, **arguments).state_dict()
    for name, value in load_file("out/model.safetensors").items():
        assert torch.equal(value, expected[name])
    assert "Written: out" in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["synflow", "snip", "taylor", "wanda", "least_bound"])
def test_rules_that_run_the_model_read_the_data(folder, rule, capsys):
    words = ["--sparsity", "0.8", "--rule", rule, "--model", "ournets:make", "--data", "digits", "--samples", "100"]
    assert prune(*words) == 0
    plan = ellq.Plan.from_json(Path("out/plan.json").read_text(encoding="utf-8"))
    assert plan.rule == rule
    assert plan.sparsity == pytest.approx(0.8, abs=1e-3)


def test_draws_the_plan(folder, capsys):
    assert prune("--sparsity", "0.5", "--plot", "plan.svg") == 0
    assert Path("plan.svg").read_text(encoding="utf-8").count("<svg") == 1
    assert json.loads(Path("out/plan.json").read_text(encoding="utf-8"))["plan"]["rule"] == "ellq"


@pytest.mark.parametrize(
    ("status", "words", "says"),
    [
        (2, ["--sparsity", "0.5", "--nonzeros", "5"], "not both"),
        (2, ["--sparsity", "0.5", "--rule", "snip"], "Rule snip runs the model on data. Give --model"),
        (2, ["--sparsity", "0.5", "--rule", "synflow"], "--model package.module:function"),
        (2, ["--tol", "0"], "outside (0, 1)"),
        (2, ["--sparsity", "0.5", "--rule", "magic"], "rule='magic'"),
        (2, ["--sparsity", "0.5", "--plot", "plan.txt"], ".png, .svg or .pdf"),
        (1, ["--nonzeros", "5"], "Choose nonzeros >= 30"),
        (1, ["--pattern", "4:2"], "no N:M pattern"),
        (1, ["--sparsity", "0.5", "--include", '["conv"]'], "'conv', which matches no weight"),
        (1, ["--sparsity", "0.5", "--settings", '{"gamma": 3}'], "gamma= is no argument"),
    ],
)
def test_says_what_is_wrong_in_one_line(folder, status, words, says, capsys):
    assert prune(*words) == status
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
