"""The prune command by method imp: prune, retrain, again."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ellq
from ellq.analysis import accuracy, datasets
from ellq.cli import run
from ellq.pruning import train_classifier

SOURCE = (
    "from torch import nn\n"
    "def make():\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))\n"
)


def make() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


@pytest.fixture(scope="module")
def dense():
    data = datasets.load("digits", "train")
    return train_classifier(make, data.inputs(), data.labels, epochs=8)


@pytest.fixture
def folder(tmp_path, monkeypatch, dense):
    save_file(dense.state_dict(), str(tmp_path / "net.safetensors"))
    (tmp_path / "loopnets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FORM = ["prune", "--method", "imp", "--weights", "net.safetensors", "--out", "out"]
MODEL = ["--model", "loopnets:make", "--data", "digits"]
LOOP = ["--sparsity", "0.9", "--iterations", "3", "--cap", "4"]
ALL = [*FORM, *MODEL, *LOOP]


def log(name: str = "iterations") -> pd.DataFrame:
    return pd.read_csv(f"out/{name}.csv")


def test_from_end_to_end_in_a_process_of_its_own(folder, dense, capsys):
    words = [*ALL, "--stop", "accuracy", "--plot", "how.png", "--checkpoint", "kept"]
    words += ["--training", '{"learning_rate": 0.05}']
    command = [sys.executable, "-m", "ellq", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Written: out" in done.stdout
    assert (folder / "how.png").stat().st_size > 10_000
    assert (folder / "kept" / "iterate.safetensors").exists()
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "epochs.csv",
        "flows.csv",
        "iterations.csv",
        "model.safetensors",
        "plan.json",
    ]
    pruned = ellq.load("out", make)
    weights = [pruned[place].weight for place in (1, 3)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(0.9, abs=1e-3)
    table = log()
    assert table["sparsity"].iloc[-1] == pytest.approx(zeros)
    assert set(table["stop"][1:]) <= {"accuracy", "cap"}
    test = datasets.load("digits", "test")
    before, after = (accuracy(net, test.inputs(), test.labels) for net in (dense, pruned))
    assert f"{before:.4f} as given, {after:.4f} pruned" in done.stdout
    assert after > 0.8
    assert run(words) == 0  # from the checkpoint, in another process
    assert capsys.readouterr().out == done.stdout
    assert log().equals(table)


STOPS = {
    "accuracy": ([], "accuracy"),
    "flow": (["--stopping", '{"epsilon": 10, "monitored": 64, "kind": "signed"}'], "flow"),
    "gradient": (["--stopping", '{"epsilon": 1000.0, "monitored": 64, "statistic": "mean"}'], "gradient"),
    "fixed": (["--stopping", '{"epochs": 2}'], "fixed"),
    "patience": (["--stopping", '{"epochs": 1, "least_gain": 1.0}'], "patience"),
    "early-bird": (["--stopping", '{"threshold": 1.0, "epochs": 1}'], "early-bird"),
    "random": (["--stopping", '{"low": 1, "high": 2}'], "random"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_every_stop_stops(folder, stop, capsys):
    words, reason = STOPS[stop]
    assert run([*ALL, "--stop", stop, *words]) == 0
    table = log()
    assert reason in set(table["stop"])
    assert (table["epochs"][1:] <= 4).all()
    if stop in ("flow", "gradient"):
        assert log("flows")["monitor"].unique().tolist() == ["signed" if stop == "flow" else "GradientMonitor"]


def test_finds_an_epsilon_where_none_is_given(folder, capsys):
    assert run([*ALL, "--stop", "flow", "--stopping", '{"monitored": 128}']) == 0
    assert "from flows on halves of 128 inputs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "check"),
    [
        (["--rewind", "start"], lambda epochs: set(epochs["position"]) == {0, 1, 2, 3}),
        (["--warm_up", "2", "--rewind", "1"], lambda epochs: epochs["position"].tolist()[2:6] == [1, 2, 3, 4]),
        (["--rewind", "none"], lambda epochs: epochs["position"].tolist() == list(range(12))),
        (["--rewind", "none", "--training", '{"schedule": "cosine"}'], lambda epochs: len(epochs) == 12),
        (["--warm_up", "5", "--rewind", "rate"], lambda epochs: epochs["position"].tolist()[5:9] == [1, 2, 3, 4]),
        (["--schedule", "one-shot"], lambda epochs: epochs["sparsity"].min() > 0.89),
        (["--rule", "uniform", "--settings", "{}"], lambda epochs: len(epochs) == 12),
        (["--rule", "snip", "--least", "1"], lambda epochs: len(epochs) == 12),
        (["--samples", "200", "--seed", "3", "--compact", "true"], lambda epochs: len(epochs) == 12),
        (["--training", '{"optimizer": "adamw", "learning_rate": 0.002}'], lambda epochs: len(epochs) == 12),
    ],
)
def test_takes_what_iterate_takes(folder, words, check):
    assert run([*ALL, *words]) == 0
    assert check(log("epochs"))


def test_runs_the_released_loop(folder):
    words = [
        "--rule",
        "gharatappeh2025",
        "--iterations",
        "3",
        "--cap",
        "4",
        "--warm_up",
        "2",
        "--settings",
        '{"p": 1.0}',
    ]
    assert run([*FORM, *MODEL, *words]) == 0  # with the released flow and its threshold, if no other is asked for
    table = log()
    assert table["stop"].tolist() == ["warm-up", "flow", "flow", "flow"]
    assert log("flows")["monitor"].unique().tolist() == ["signed"]
    assert run([*FORM, *MODEL, *words, "--stopping", '{"epsilon": 0}']) == 0
    assert "flow" not in set(log()["stop"])
    assert run([*FORM, *MODEL, *words, "--stop", "accuracy"]) == 0
    assert log("flows").empty
    assert table["sparsity"].tolist()[:2] == [0.0, 0.0]
    assert table["sparsity"].iloc[2] > 0.1
    assert set(table["epochs"]) == {2}


def test_trains_on_a_file_with_labels(folder, capsys):
    data = datasets.load("digits", "train")
    np.savez("some.npz", inputs=data.inputs().numpy()[:300], labels=data.labels[:300])
    words = [*FORM, "--model", "loopnets:make", "--data", "some.npz", *LOOP]
    assert run(words) == 0
    first = load_file("out/model.safetensors")
    assert "Accuracy on the test part" not in capsys.readouterr().out
    assert run(words) == 0
    assert all(torch.equal(value, load_file("out/model.safetensors")[name]) for name, value in first.items())
    np.save("bare.npy", data.inputs().numpy()[:300])
    assert run([*FORM, "--model", "loopnets:make", "--data", "bare.npy", *LOOP]) == 1
    assert "bare.npy holds no labels to train on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([*FORM, *LOOP], "Give --model package.module:function and --data NAME"),
        ([*FORM, "--model", "loopnets", "--data", "digits", *LOOP], "names no function"),
        ([*FORM, *MODEL, "--sparsity", "0.9", "--cap", "3"], "needs one number as --iterations"),
        ([*FORM, *MODEL, "--sparsity", "0.9", "--iterations", "3"], "needs one number as --cap"),
        ([*FORM, *MODEL, "--iterations", "3", "--cap", "3"], "needs one number as --sparsity"),
        ([*FORM, *MODEL, "--iterations", "3", "--cap", "3", "--sparsity", '{"1": 0.9}'], "one number as --sparsity"),
        ([*ALL, "--tol", "0.1"], "tol is not for method imp"),
        ([*ALL, "--refit", "obs"], "refit is not for method imp"),
        ([*ALL, "--export", "onnx"], "export is not for method imp"),
        ([*ALL, "--report", "page.html"], "report is not for method imp"),
        ([*ALL, "--rule", "chee2021"], "rule='chee2021' is not a rule of method 'imp'"),
        ([*ALL, "--stopping", '{"epochs": 3}'], "Give --stop"),
        ([*ALL, "--stop", "fixed"], "does not fit stop='fixed'"),
        ([*ALL, "--stop", "fixed", "--stopping", '{"epsilon": 3}'], "does not fit stop='fixed'"),
        ([*ALL, "--stop", "flow", "--stopping", '{"epochs": 3}'], "does not fit stop='flow'"),
        ([*ALL, "--stop", "flow", "--stopping", '{"monitored": 2.5}'], "monitored must be a whole number"),
        ([*ALL, "--samples", "5"], "samples=5 leaves nothing for the validation split"),
        ([*ALL, "--training", '{"batch_size": 2.5}'], "batch_size must be a whole number"),
        ([*ALL, "--training", '{"rate": 3}'], "training={'rate': 3} does not fit"),
        ([*ALL, "--plot", "how.txt"], "has no known ending"),
        ([word if word != "imp" else "lq" for word in ALL], "iterations is for method imp"),
    ],
)
def test_wrong_usage_is_said_in_one_line(folder, words, match, capsys):
    assert run(words) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_failing_epoch_is_said_in_one_line_and_nothing_is_written(folder, capsys):
    assert run([*ALL, "--training", '{"learning_rate": 1e30}', "--checkpoint", "kept"]) == 1
    error = capsys.readouterr().err
    assert "Epoch 1 of iteration 1 of 3 failed with ValueError: The loss became" in error
    assert "the same call goes on from there" in error
    assert error.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_folder_that_holds_something_else_is_refused_before_training(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    assert run([*ALL, "--checkpoint", "kept"]) == 1
    assert "not ours to replace" in capsys.readouterr().err
    assert not (folder / "kept").exists()
