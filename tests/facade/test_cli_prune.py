"""The prune command's budgets, rules and choices of layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ellq
from ellq.analysis import datasets
from ellq.cli import run
from ellq.commands import _reported
from ellq.pruning.widths import flops_model

SOURCE = (
    "from torch import nn\n"
    "def make():\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))\n"
)
CONVS = (
    "from torch import nn\n"
    "def make():\n"
    "    return nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),"
    " nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))\n"
)


def make() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = make()
    save_file(net.state_dict(), str(tmp_path / "net.safetensors"))
    (tmp_path / "ournets.py").write_text(SOURCE)
    np.savez(tmp_path / "odd.npz", x=np.zeros(3))
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
    expected = ellq.prune(folder.state_dict(), **arguments)
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


def in_a_process(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ellq", "prune", "--weights", "net.safetensors", "--out", "out", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def inputs(n: int = 100) -> torch.Tensor:
    return datasets.load("digits", "train").inputs()[:n]


MODEL = ["--model", "ournets:make", "--sparsity", "0.8"]
DIGITS = ["--data", "digits", "--samples", "100"]


@pytest.mark.parametrize(
    ("words", "refit", "has_data"),
    [
        (MODEL, "synthetic", False),
        ([*MODEL, "--refit", "rescale"], "rescale", False),
        ([*MODEL, *DIGITS], "obs", True),
        ([*MODEL, *DIGITS, "--refit", "none"], "none", True),
        ([*MODEL, *DIGITS, "--refit", "bias"], "bias", True),
        ([*MODEL, *DIGITS, "--rule", "uniform", "--refit", "least_squares"], "least_squares", True),
    ],
)
def test_refits_what_it_is_told_to(folder, words, refit, has_data):
    done = in_a_process(*words)
    assert done.returncode == 0, done.stderr
    rule = "uniform" if "uniform" in words else "ellq"
    expected = ellq.prune(folder.eval(), inputs() if has_data else None, sparsity=0.8, rule=rule, refit=refit)
    written = load_file("out/model.safetensors")
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(written[name], value, rtol=1e-4, atol=1e-6)
    decided = ellq.Plan.from_json(Path("out/plan.json").read_text(encoding="utf-8"))
    assert decided.settings.get("refit", "none") == refit
    assert (decided.measured is not None) == (refit in ("obs", "bias", "least_squares"))


@pytest.mark.parametrize("name", ["inputs.npy", "inputs.npz"])
def test_calibrates_on_a_file(folder, name):
    array = inputs().numpy()
    if name.endswith("npy"):
        np.save(name, array)
    else:
        np.savez(name, inputs=array.astype(np.float64), labels=np.zeros(len(array), dtype=int))
    assert in_a_process(*MODEL, "--data", name).returncode == 0
    from_file = load_file("out/model.safetensors")
    assert in_a_process(*MODEL, *DIGITS).returncode == 0
    from_set = load_file("out/model.safetensors")
    assert all(torch.equal(value, from_set[key]) for key, value in from_file.items())


def test_scores_from_a_file_need_its_labels(folder, capsys):
    np.savez("with.npz", inputs=inputs().numpy(), labels=np.arange(100) % 10)
    assert prune(*MODEL, "--data", "with.npz", "--rule", "snip") == 0
    np.save("without.npy", inputs().numpy())
    assert prune(*MODEL, "--data", "without.npy", "--rule", "snip") == 1
    assert "labels" in capsys.readouterr().err


def test_cuts_out_what_is_constant_or_unread(folder):
    with torch.no_grad():
        folder[1].weight[[2, 5, 7]] = 0.0
        folder[3].weight[:, 11] = 0.0
    save_file(folder.state_dict(), "net.safetensors")
    done = in_a_process(*MODEL, *DIGITS, "--compact", "true")
    assert done.returncode == 0, done.stderr
    assert "Constant and unread units cut out: 1,510 parameters, now " in done.stdout
    small = ellq.load("out", make)
    assert small[1].out_features == small[3].in_features <= 16
    expected = ellq.prune(folder.eval(), inputs(), sparsity=0.8)
    torch.testing.assert_close(small(inputs()), expected(inputs()), rtol=1e-4, atol=1e-5)


def test_cuts_out_channels_that_load_puts_back_together(folder):
    Path("ourconvs.py").write_text(CONVS, encoding="utf-8")
    sys.path.insert(0, str(Path.cwd()))
    try:
        from ourconvs import make as make_convs
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    net = make_convs().eval()
    with torch.no_grad():
        net[0].weight[[1, 3]] = 0.0
        net[3].weight[:, 6] = 0.0
    save_file(net.state_dict(), "net.safetensors")
    np.save("inputs.npy", torch.randn(80, 1, 8, 8).numpy())
    words = ["--model", "ourconvs:make", "--data", "inputs.npy", "--sparsity", "0.5", "--compact", "true"]
    done = in_a_process(*words)
    assert done.returncode == 0, done.stderr
    small = ellq.load("out", make_convs)
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (5, 5, 5)
    batch = torch.from_numpy(np.load("inputs.npy"))
    torch.testing.assert_close(small(batch), ellq.prune(net, batch, sparsity=0.5)(batch), rtol=1e-4, atol=1e-5)


CHANNELS = (
    "import torch\n"
    "from torch import nn\n"
    "class Net(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)\n"
    "        self.norm = nn.BatchNorm2d(8)\n"
    "        self.second = nn.Conv2d(8, 8, 3, padding=1, stride=4)\n"
    "        self.last = nn.Linear(32, 10)\n"
    "    def forward(self, x):\n"
    "        return self.last(self.second(self.norm(self.first(x)).relu()).relu().flatten(1))\n"
    "class Moody(Net):\n"
    "    def forward(self, x):\n"
    "        return super().forward(x if x.sum() > -1e9 else -x)\n"
)
ARTEFACT = ["model.pt2", "model.safetensors", "plan.json", "report.html"]
ID = ["--method", "id", "--data", "digits", "--samples", "300"]


@pytest.fixture
def channels(tmp_path, monkeypatch):
    (tmp_path / "ourchannels.py").write_text(CHANNELS)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "ourchannels"}
    exec(CHANNELS, namespace)
    torch.manual_seed(0)
    net = namespace["Net"]().eval()
    save_file(net.state_dict(), "net.safetensors")
    np.save("inputs.npy", inputs(300).numpy())
    return net


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_cuts_channels_to_a_budget_and_writes_all_that_is_needed(channels):
    done = in_a_process("--model", "ourchannels:Net", *ID, "--flops", "0.5", "--round_to", "2")
    assert done.returncode == 0, done.stderr
    assert names("out") == ARTEFACT
    small = ellq.load("out", type(channels))
    widths = small.first.out_channels, small.second.out_channels
    assert all(width % 2 == 0 for width in widths)
    before, after = (ellq.analysis.cost(net, inputs(1)).flops for net in (channels, small))
    assert after <= before / 2
    expected = ellq.prune(channels, inputs(300), method="id", flops=0.5, round_to=2)
    torch.testing.assert_close(small(inputs()), expected(inputs()), rtol=1e-3, atol=1e-4)
    program = torch.export.load("out/model.pt2").module()
    torch.testing.assert_close(program(inputs()), small(inputs()))
    page = Path("out/report.html").read_text(encoding="utf-8")
    verdict = next(line for line in done.stdout.splitlines() if "of the FLOPs" in line)
    assert f"{after / before:.1%} of the FLOPs" in verdict
    assert "held-out outputs off by" in verdict
    assert verdict in page
    assert '<td class="number">300</td>' in page


def test_reads_the_same_from_yaml(channels):
    text = "weights: net.safetensors\nmodel: ourchannels:Net\nmethod: id\nparameters: 0.6\ndata: inputs.npy\n"
    settings = "selection: pivoted-qr\nrefit: fold\nsettings: {seed: 1}\nexport: none\nout: from_yaml\n"
    Path("prune.yaml").write_text(text + settings, encoding="utf-8")
    assert run(["prune", "--config", "prune.yaml"]) == 0
    words = ["--model", "ourchannels:Net", "--method", "id", "--parameters", "0.6", "--data", "inputs.npy"]
    words += ["--selection", "pivoted-qr", "--refit", "fold", "--settings", '{"seed": 1}', "--export", "none"]
    assert prune(*words) == 0
    assert names("out") == names("from_yaml") == ["model.safetensors", "plan.json", "report.html"]
    first, second = (load_file(f"{folder}/model.safetensors") for folder in ("out", "from_yaml"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    plan = ellq.Plan.from_json(Path("out/plan.json").read_text(encoding="utf-8"))
    assert (plan.settings["selection"], plan.settings["refit"], plan.settings["seed"]) == ("pivoted-qr", "fold", 1)
    assert "<td>held-out</td>" not in Path("out/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words",
    [
        ["--memory", "0.9"],
        ["--latency", "0.7"],
        ["--flops", "0.6", "--rule", "chee2021"],
        ["--flops", "0.6", "--rule", "chee2022"],
    ],
)
def test_takes_every_cost_and_rule_of_channels(channels, words, monkeypatch):
    # So small a net takes no time; by its full name, because a function of the package hides the module.
    monkeypatch.setattr(sys.modules["ellq.pruning.plan_channels"], "latency_model", flops_model)
    assert prune("--model", "ourchannels:Net", *ID, *words, "--export", "none") == 0
    small = ellq.load("out", type(channels))
    assert small.first.out_channels + small.second.out_channels < 16


def test_leaves_out_the_program_of_what_cannot_be_exported(channels, capsys):
    words = ["--model", "ourchannels:Moody", *ID, "--flops", "0.5"]
    assert prune(*words) == 0
    assert "model.pt2 is left out. The model cannot be exported" in capsys.readouterr().out
    assert names("out") == ["model.safetensors", "plan.json", "report.html"]
    assert prune(*words, "--export", "pt2", "--out", "asked") == 1
    assert "cannot be exported by torch.export" in capsys.readouterr().err
    assert not Path("asked").exists()


def test_reports_on_calibration_inputs_where_others_are_not_held_out(channels, capsys):
    small = ellq.prune(channels, inputs(300), method="id", sparsity=0.5, round_to=1)
    known, labels = inputs(300), np.arange(300) % 10
    found = _reported(channels, small, small.ellq_plan, known, (known[:9], labels[:9]), falls_back=True)
    assert list(found.outputs.index) == ["calibration"]
    assert "share 9 examples" in capsys.readouterr().out
    with pytest.raises(ValueError, match="share 9 examples"):
        _reported(channels, small, small.ellq_plan, known, (known[:9], labels[:9]), falls_back=False)


def test_exports_masks_when_told_to(folder):
    assert prune(*MODEL, *DIGITS) == 0
    assert names("out") == ["model.safetensors", "plan.json"]
    assert prune(*MODEL, *DIGITS, "--export", "pt2") == 0
    assert names("out") == ["model.pt2", "model.safetensors", "plan.json"]
    small = ellq.load("out", make)
    torch.testing.assert_close(torch.export.load("out/model.pt2").module()(inputs()), small(inputs()))


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
        (2, ["--sparsity", "0.5", "--refit", "rescale"], "refit='rescale' runs the model. Give --model"),
        (2, [*MODEL, "--refit", "obs"], "refit='obs' runs the model"),
        (2, [*MODEL, "--refit", "magic"], "refit"),
        (2, [*MODEL, "--compact", "true"], "compact runs the model"),
        (2, [*MODEL, "--export", "pt2"], "export='pt2' runs the model"),
        (2, ["--flops", "0.5"], "flops is for method id"),
        (2, [*MODEL, "--round_to", "8"], "round_to is for method id"),
        (2, ["--nonzeros", "5", "--method", "id"], "nonzeros is for method lq"),
        (2, ["--flops", "1.5", "--method", "id"], "flops=1.5"),
        (2, ["--flops", "0.5", "--latency", "0.5", "--method", "id"], "not both"),
        (2, ["--flops", "0.5", "--method", "id"], "Give --model package.module:function and --data NAME"),
        (2, ["--flops", "0.5", *ID, "--refit", "obs"], "refit='obs' is not for method 'id'"),
        (2, [*MODEL, "--refit", "fold"], "refit='fold' is not for method 'lq'"),
        (2, ["--flops", "0.5", *ID, "--selection", "magic"], "elimination, "),
        (2, ["--flops", "0.5", *ID, "--rule", "lamp"], "rule='lamp' is not a rule of method 'id'"),
        (1, ["--flops", "0.001", "--model", "ournets:make", *ID], "Choose flops >= "),
        (2, ["--sparsity", "0.5", *DIGITS], "data='digits' is for running the model"),
        (2, [*MODEL, "--data", "x.npy", "--mean", "[0.5]"], "mean and std are for data sets"),
        (2, [*MODEL, "--data", "x.npy", "--report", "x.html"], "holds out the test part"),
        (1, [*MODEL, "--data", "missing.npy"], "missing.npy"),
        (1, [*MODEL, "--data", "odd.npz"], "odd.npz holds x, not inputs"),
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
