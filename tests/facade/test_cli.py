"""The command line: what it prints, what it writes, and one clear line for every mistake."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ellq
from ellq.cli import run


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


@pytest.fixture
def checkpoint(tmp_path, net):
    path = tmp_path / "net.safetensors"
    save_file(net.state_dict(), str(path))
    return path


def _fails(capsys, *arguments, status=1):
    """Run a command that must fail; return the one line it says on stderr."""
    assert run([str(a) for a in arguments]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ellq: error: " if status == 1 else "ellq: wrong usage: ")
    return lines[0]


# --- measure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth", "th"])
def test_measure_agrees_with_the_function_for_every_file_type(tmp_path, net, ending, capsys):
    path = tmp_path / f"net.{ending}"
    save_file(net.state_dict(), str(path)) if ending == "safetensors" else torch.save(net.state_dict(), path)
    assert run(["measure", str(path), "--q", "0.4", "--csv", str(tmp_path / "p.csv")]) == 0
    assert "(model)" in capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "p.csv")
    expected = ellq.measure(net, q=0.4)
    np.testing.assert_array_equal(
        frame.loc[frame["level"] == "unit", "quasinorm"].to_numpy(), expected.units["quasinorm"].to_numpy()
    )


def test_measure_writes_json_and_picture(tmp_path, checkpoint, capsys):
    files = [tmp_path / name for name in ("p.json", "p.png", "p.svg")]
    assert run(["measure", str(checkpoint), "--json", str(files[0]), "--plot", str(files[1])]) == 0
    assert run(["measure", str(checkpoint), "--plot", str(files[2])]) == 0
    assert ellq.Profile.from_json(files[0].read_text(encoding="utf-8")) == ellq.measure(load_file(checkpoint))
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in files[2].read_bytes()
    assert "Profile(q=0.5" in capsys.readouterr().out


def test_measure_as_a_process_from_a_folder_with_its_own_analysis(tmp_path, checkpoint):
    (tmp_path / "analysis.py").write_text("raise RuntimeError('a foreign module was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "ellq", "measure", checkpoint.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(model)" in done.stdout


@pytest.mark.parametrize("q", ["0", "1", "-0.5", "2", "nan", "inf", "half", "[0.5]", "0.5,0.6", ""])
def test_measure_refuses_a_wrong_q_as_wrong_usage(checkpoint, q, capsys):
    assert "q" in _fails(capsys, "measure", checkpoint, f"--q={q}", status=2)


@pytest.mark.parametrize("words", [[], ["measure"], ["measures"], ["measure", "a", "b"], ["measure", "a", "--p", "1"]])
def test_wrong_words_are_wrong_usage(words, capsys):
    _fails(capsys, *words, status=2)


def test_help_and_version_are_no_errors(capsys):
    for words in (["--help"], ["measure", "--help"], ["prune", "--help"], ["figures", "make", "--help"]):
        assert run(words) == 0
    assert run(["--version"]) == 0
    assert ellq.__version__ in capsys.readouterr().out


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _broken_files(folder, net):
    state = net.state_dict()
    save_file(state, str(folder / "cut.safetensors"))
    whole = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(state, folder / "cut.pt")
    whole = (folder / "cut.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("these are no weights")
    (folder / "text.safetensors").write_text("these are no weights")
    (folder / "empty.pt").touch()
    (folder / "weights.onnx").write_bytes(b"x")
    torch.save(net, folder / "module.pt")
    torch.save({"epoch": 3}, folder / "no_tensor.pt")
    torch.save({"bias": torch.ones(3), "steps": torch.ones(2, 2, dtype=torch.int64)}, folder / "no_matrix.pt")
    torch.save({"w": torch.tensor([[1.0, float("nan")]])}, folder / "nan.pt")
    torch.save({"w": torch.tensor([[1.0], [float("inf")]])}, folder / "inf.pt")
    torch.save({"w": torch.ones(3, 0)}, folder / "zero_size.pt")
    (folder / "folder.pt").mkdir()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.pt", "missing.pt"),
        ("folder.pt", "folder"),
        ("cut.safetensors", "cut.safetensors"),
        ("cut.pt", "cut.pt"),
        ("text.pt", "text.pt"),
        ("text.safetensors", "text.safetensors"),
        ("empty.pt", "empty"),
        ("weights.onnx", ".safetensors"),
        ("module.pt", "refused"),
        ("no_tensor.pt", "no tensor"),
        ("no_matrix.pt", "no weight matrix"),
        ("nan.pt", "'w'"),
        ("inf.pt", "[1, 0]"),
        ("zero_size.pt", "(3, 0)"),
    ],
)
@pytest.mark.parametrize("command", ["measure", "prune"])
def test_bad_files_fail_in_one_line(tmp_path, net, name, says, command, capsys):
    _broken_files(tmp_path, net)
    path = tmp_path / name
    if command == "measure":
        said = _fails(capsys, "measure", path)
    else:
        said = _fails(capsys, "prune", "--weights", path, "--out", tmp_path / "out", "--sparsity", "0.5")
    assert says in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["measure", "prune"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, command, capsys):
    path, proof = tmp_path / "evil.pt", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"w": _Bomb(proof)}))
    rest = [] if command == "measure" else ["--out", tmp_path / "out", "--sparsity", "0.5"]
    said = _fails(capsys, command, *(["--weights"] if command == "prune" else []), path, *rest)
    assert "refused" in said
    assert not proof.exists()


def test_debug_shows_the_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ellq", "measure", "missing.pt", "--debug"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "FileNotFoundError" in done.stderr


@pytest.mark.parametrize("option", ["--csv", "--json", "--plot"])
def test_measure_says_where_it_cannot_write(tmp_path, checkpoint, option, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot be written" in _fails(capsys, "measure", checkpoint, option, tmp_path / "file/p.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "net.safetensors"]


def test_measure_refuses_a_picture_without_ending_before_it_reads(tmp_path, capsys):
    assert ".png" in _fails(capsys, "measure", tmp_path / "missing.pt", "--plot", "picture", status=2)


def test_measure_over_a_grid_and_tolerances_writes_what_the_profile_holds(tmp_path, net, checkpoint, capsys):
    files = {name: str(tmp_path / f"{name}.csv") for name in ("grid", "retained")}
    options = ["--orders", "[0.2, 1.5]", "--tolerances", "[0.1, 0.3]"]
    options += ["--grid_csv", files["grid"], "--retained_csv", files["retained"]]
    assert run(["measure", str(checkpoint), *options]) == 0
    assert "10" in capsys.readouterr().out
    expected = ellq.measure(net, orders=(0.2, 1.5), tolerances=(0.1, 0.3))
    for name, frame in (("grid", expected.by_order()), ("retained", expected.retained)):
        written = pd.read_csv(files[name])
        assert list(written) == list(frame)
        number = "quasinorm" if name == "grid" else "retained"
        np.testing.assert_array_equal(written[number].to_numpy(), frame[number].to_numpy())


@pytest.mark.parametrize("kind", ["quantiles", "depth", "orders", "curves"])
def test_measure_draws_every_kind(tmp_path, checkpoint, kind):
    picture = tmp_path / "p.svg"
    assert run(["measure", str(checkpoint), "--orders", "[0.2]", "--plot", str(picture), "--kind", kind]) == 0
    assert b"</svg>" in picture.read_bytes()


def test_measure_writes_a_page_that_needs_nothing_else(tmp_path, checkpoint):
    page = tmp_path / "page.html"
    assert run(["measure", str(checkpoint), "--tolerances", "[0.1]", "--report", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "net.safetensors" in text
    assert text.count("data:image/svg+xml") == 4
    assert "Fewest weights" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--orders", "[3]"], "orders"),
        (["--orders", "[0.5, 0.5]"], "twice"),
        (["--tolerances", "[1.5]"], "tolerances"),
        (["--grid_csv", "g.csv"], "--orders"),
        (["--retained_csv", "g.csv"], "--tolerances"),
        (["--plot", "p.png", "--kind", "orders"], "--orders"),
        (["--plot", "p.gif"], ".png"),
        (["--kind", "depth"], "--plot"),
    ],
)
def test_measure_refuses_wrong_usage_before_it_reads(options, said, capsys):
    assert said in _fails(capsys, "measure", "nowhere.safetensors", *options, status=2)


# --- compare, trajectory, histogram ----------------------------------------------------------------------------


@pytest.fixture
def halved(tmp_path, net):
    path = tmp_path / "halved.safetensors"
    pruned = ellq.prune(net, method="lq", sparsity=0.5)
    save_file(pruned.state_dict(), str(path))
    return path


def test_compare_says_which_is_more_compressible(tmp_path, checkpoint, halved, capsys):
    options = ["--paired", "true", "--json", str(tmp_path / "c.json"), "--csv", str(tmp_path / "c.csv")]
    assert run(["compare", str(halved), str(checkpoint), *options, "--plot", str(tmp_path / "c.png")]) == 0
    assert "halved is more compressible" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "c.json").read_text())
    assert len(pd.read_csv(tmp_path / "c.csv")) == 3
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_compare_names_what_differs(tmp_path, checkpoint, capsys):
    other = tmp_path / "other.safetensors"
    save_file(nn.Sequential(nn.Flatten(), nn.Linear(64, 21), nn.ReLU(), nn.Linear(21, 10)).state_dict(), str(other))
    assert "1.weight" in _fails(capsys, "compare", checkpoint, other)
    assert "confidence" in _fails(capsys, "compare", checkpoint, checkpoint, "--confidence", "1.5", status=2)
    assert "resamples" in _fails(capsys, "compare", checkpoint, checkpoint, "--resamples", "5", status=2)
    few = ["--confidence", "0.999", "--resamples", "99"]
    assert "resamples" in _fails(capsys, "compare", checkpoint, checkpoint, *few, status=2)
    assert run(["compare", str(checkpoint), str(checkpoint)]) == 0


def test_trajectory_follows_files_in_order(tmp_path, checkpoint, halved, capsys):
    assert run(["trajectory", str(checkpoint), str(halved), "--csv", str(tmp_path / "t.csv")]) == 0
    frame = pd.read_csv(tmp_path / "t.csv")
    assert frame["step"].drop_duplicates().tolist() == ["net", "halved"]
    capsys.readouterr()
    assert "files" in _fails(capsys, "trajectory", status=2)


def test_histograms_of_parts_merge_to_the_bits_of_one_pass(tmp_path, checkpoint, capsys):
    whole, merged, parts = tmp_path / "whole", tmp_path / "merged", [str(tmp_path / f"part{i}") for i in range(3)]
    assert run(["histogram", "make", str(checkpoint), "--save", str(whole), "--plot", str(tmp_path / "h.png")]) == 0
    for i, part in enumerate(parts):
        assert run(["histogram", "make", str(checkpoint), "--part", f"[{i}, 3]", "--save", part]) == 0
    options = ["--tolerances", "[0.1]", "--retained_csv", str(tmp_path / "r.csv"), "--csv", str(tmp_path / "m.csv")]
    options += ["--orders", "[0.3, 0.5]", "--curves_csv", str(tmp_path / "c.csv")]
    assert run(["histogram", "merge", *parts, "--save", str(merged), *options]) == 0
    assert merged.read_bytes() == whole.read_bytes()
    retained = pd.read_csv(tmp_path / "r.csv")
    exact = ellq.measure(ellq.read_checkpoint(checkpoint), tolerances=(0.1,)).retained
    exact = exact[exact["level"] != "unit"]["retained"].to_numpy()
    assert (retained["retained_low"].to_numpy() <= exact).all()
    assert (exact <= retained["retained_high"].to_numpy()).all()
    assert set(pd.read_csv(tmp_path / "m.csv")["q"]) == {0.3, 0.5}
    assert len(pd.read_csv(tmp_path / "c.csv"))
    capsys.readouterr()
    assert "part" in _fails(capsys, "histogram", "make", checkpoint, "--part", "[3, 3]", status=2)
    assert "--retained_csv" in _fails(capsys, "histogram", "make", checkpoint, "--tolerances", "[0.1]", status=2)
    assert "orders" in _fails(capsys, "histogram", "make", "nowhere.st", "--csv", "a", "--orders", "[3]", status=2)
    assert "saved" in _fails(capsys, "histogram", "merge", checkpoint)


# --- prune -----------------------------------------------------------------------------------------------------


def test_prune_masks_a_checkpoint_without_its_class(tmp_path, checkpoint, net, capsys):
    out = tmp_path / "out"
    assert run(["prune", "--weights", str(checkpoint), "--out", str(out), "--sparsity", "0.75"]) == 0
    pruned = load_file(out / "model.safetensors")
    expected = ellq.prune(net, sparsity=0.75, refit="none").state_dict()
    assert pruned.keys() == expected.keys()
    for name in pruned:
        assert torch.equal(pruned[name], expected[name])
    assert json.loads((out / "plan.json").read_text(encoding="utf-8"))["plan"]["method"] == "lq"
    assert "Written" in capsys.readouterr().out


def test_prune_removes_hidden_units_of_a_model_from_the_current_folder(tmp_path, checkpoint, monkeypatch, capsys):
    (tmp_path / "ournets.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["prune", "--weights", str(checkpoint), "--model", "ournets:make", "--data", "digits"]
    assert run([*words, "--method", "id", "--sparsity", "0.5", "--out", "out", "--samples", "300"]) == 0
    small = ellq.load("out", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)))
    assert (small[1].out_features, small[3].in_features) == (10, 10)
    assert "plan" in capsys.readouterr().out.lower()


def test_prune_reads_its_arguments_from_yaml(tmp_path, checkpoint, capsys):
    config = tmp_path / "prune.yaml"
    config.write_text(f"weights: {checkpoint}\nout: {tmp_path / 'out'}\ntol: 0.2\n", encoding="utf-8")
    assert run(["prune", "--config", str(config)]) == 0
    assert (tmp_path / "out/model.safetensors").is_file()
    assert "0.2" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--sparsity", "--tol", "--q"])
@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "nan", "much"])
def test_prune_refuses_budgets_outside_0_1_as_wrong_usage(tmp_path, checkpoint, option, value, capsys):
    said = _fails(capsys, "prune", "--weights", checkpoint, "--out", tmp_path / "out", f"{option}={value}", status=2)
    assert option.removeprefix("--") in said


@pytest.mark.parametrize(
    ("status", "words", "says"),
    [
        (2, [], "either --sparsity or --tol"),
        (2, ["--sparsity", "0.5", "--tol", "0.5"], "not both"),
        (2, ["--sparsity", "0.5", "--method", "id"], "--model"),
        (2, ["--sparsity", "0.5", "--model", "json"], "package.module:function"),
        (2, ["--sparsity", "0.5", "--rule", "chee2021"], "'chee2021'"),
        (1, ["--sparsity", "0.999"], "Choose sparsity <="),
        (1, ["--sparsity", "0.5", "--model", "nowhere:make"], "nowhere"),
        (1, ["--sparsity", "0.5", "--model", "json:make"], "make"),
        (1, ["--sparsity", "0.5", "--model", "builtins:list"], "not an nn.Module"),
    ],
)
def test_prune_says_what_is_missing_or_wrong(tmp_path, checkpoint, status, words, says, capsys):
    said = _fails(capsys, "prune", "--weights", checkpoint, "--out", tmp_path / "out", *words, status=status)
    assert says in said
    assert not (tmp_path / "out").exists()


def test_prune_keeps_the_dtype_of_the_weights_and_reads_tied_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiednets.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))\n"
        "    net[2].weight = net[0].weight\n"
        "    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    ellq.save(net.double(), "saved")
    words = [
        "prune",
        "--weights",
        "saved/model.safetensors",
        "--model",
        "tiednets:make",
        "--tol",
        "0.2",
        "--out",
        "out",
    ]
    assert run(words) == 0
    capsys.readouterr()
    assert all(t.dtype == torch.float64 for t in load_file("out/model.safetensors").values())


def test_interrupt_while_an_extension_loads_is_an_interrupt(monkeypatch, capsys):
    def loading(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as cause:
            raise SystemError("initialization failed") from cause

    monkeypatch.setattr("ellq.demo.run_demo", loading)
    assert run(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["bfloat16", "float16", "float64", "tied", "zero layer", "integer beside"])
@pytest.mark.parametrize("command", ["measure", "prune"])
def test_unusual_checkpoints_work(tmp_path, net, case, command, capsys):
    state = dict(net.state_dict())
    if case in ("bfloat16", "float16", "float64"):
        state = {name: t.to(getattr(torch, case)) for name, t in state.items()}
    elif case == "tied":
        state["again.weight"] = state["1.weight"]
    elif case == "zero layer":
        state["1.weight"] = torch.zeros(20, 64)
    else:
        state["index"] = torch.arange(6).reshape(2, 3)
    torch.save(state, tmp_path / "net.pt")
    words = ["measure", str(tmp_path / "net.pt")]
    if command == "prune":
        words = ["prune", "--weights", words[1], "--out", str(tmp_path / "out"), "--tol", "0.3"]
    assert run(words) == 0
    capsys.readouterr()
    if command == "prune":
        pruned = load_file(tmp_path / "out/model.safetensors")
        assert pruned["3.weight"].dtype == state["3.weight"].dtype
        assert pruned.keys() == state.keys()


def test_meta_tensors_cannot_be_measured(tmp_path, capsys):
    torch.save({"w": torch.empty(3, 4, device="meta")}, tmp_path / "meta.pt")
    assert "no data" in _fails(capsys, "measure", tmp_path / "meta.pt")


def test_prune_says_when_the_weights_are_of_another_model(tmp_path, checkpoint, monkeypatch, capsys):
    (tmp_path / "othernets.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 3)\n")
    monkeypatch.chdir(tmp_path)
    words = ["prune", "--weights", checkpoint, "--out", "out", "--sparsity", "0.5", "--model", "othernets:make"]
    assert "does not fit" in _fails(capsys, *words)


def test_prune_names_the_nearest_data_set(tmp_path, checkpoint, monkeypatch, capsys):
    (tmp_path / "morenets.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["--model", "morenets:make", "--method", "id", "--data", "digit", "--sparsity", "0.5"]
    assert "digits" in _fails(capsys, "prune", "--weights", checkpoint, "--out", "out", *words)


@pytest.mark.parametrize("place", ["/proc/out", "file/out"])
def test_prune_says_where_it_cannot_write(tmp_path, checkpoint, place, monkeypatch, capsys):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    words = ["prune", "--weights", checkpoint, "--out", place, "--sparsity", "0.5"]
    assert "cannot be written" in _fails(capsys, *words)


def test_prune_of_a_model_without_prunable_layers(tmp_path, monkeypatch, capsys):
    (tmp_path / "flatnets.py").write_text("from torch import nn\ndef make():\n    return nn.BatchNorm1d(4)\n")
    monkeypatch.chdir(tmp_path)
    torch.save(nn.BatchNorm1d(4).state_dict(), tmp_path / "bn.pt")
    for words in ([], ["--model", "flatnets:make"]):
        said = _fails(capsys, "prune", "--weights", "bn.pt", "--out", "out", "--sparsity", "0.5", *words)
        assert "no weight matrix" in said


# --- figures ---------------------------------------------------------------------------------------------------


def test_figures_are_listed(capsys):
    assert run(["figures", "list"]) == 0
    printed = capsys.readouterr().out
    assert "error-against-retained" in printed
    assert "accuracy-against-sparsity" in printed


def test_unknown_figure_suggests_the_nearest(tmp_path, capsys):
    words = ["figures", "make", "error-retained", "--out", tmp_path / "f"]
    assert "'error-against-retained'" in _fails(capsys, *words, status=2)
    assert not (tmp_path / "f").exists()


def test_ctrl_c_ends_with_130_and_no_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ellq.demo.run_demo", interrupted)
    assert run(["demo"]) == 130
    assert capsys.readouterr().err.strip() == "ellq: interrupted; no file is half-written"


def test_help_loads_no_torch():
    code = "import sys; from ellq.cli import run; run(['prune', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("False")


# --- theory ----------------------------------------------------------------------------------------------------


def test_theory_lists_and_shows_every_statement(capsys):
    from ellq.theory import registry

    assert run(["theory", "list"]) == 0
    listed = capsys.readouterr().out
    for name, statement in registry().items():
        assert name in listed
        assert run(["theory", "show", name]) == 0
        shown = capsys.readouterr().out
        assert statement.latex() in shown
        assert statement.reference in shown
        assert statement.falsifier() in shown


def test_theory_check_attacks_one_or_all(capsys):
    assert run(["theory", "check", "stechkin", "--cases", "50"]) == 0
    assert "stechkin" in capsys.readouterr().out
    assert run(["theory", "check", "all", "--cases", "20", "--seed", "5"]) == 0
    assert "risk-empirical" in capsys.readouterr().out


def test_theory_check_writes_its_table(tmp_path, capsys):
    assert run(["theory", "check", "stechkin", "--cases", "50", "--seed", "3", "--csv", str(tmp_path / "a.csv")]) == 0
    (row,) = pd.read_csv(tmp_path / "a.csv").to_dict("records")
    assert (row["statement"], row["seed"], row["cases"], row["violations"]) == ("stechkin", 3, 50, 0)
    assert row["least_bound_over_observed"] >= 1


def test_theory_check_fails_when_a_statement_is_broken(monkeypatch, capsys):
    from dataclasses import replace

    from ellq.theory import statement, statements

    true = statement("stechkin")
    monkeypatch.setitem(statements._REGISTRY, "stechkin", replace(true, bound=lambda **case: 0.5 * true.bound(**case)))
    assert run(["theory", "check", "stechkin", "--cases", "100"]) == 1
    assert "stechkin is violated" in capsys.readouterr().err


def test_theory_of_an_unknown_statement_lists_those_there_are(capsys):
    assert "stechkin" in _fails(capsys, "theory", "show", "stechkins", status=2)
    assert "stechkin" in _fails(capsys, "theory", "check", "stechkins", status=2)


def test_theory_check_refuses_no_cases(capsys):
    assert "cases" in _fails(capsys, "theory", "check", "stechkin", "--cases", "0", status=2)


def test_ctrl_c_inside_exec_of_a_string_ends_with_130_too(tmp_path):
    # Python remembers such an interrupt, though it was met, and would end by a signal.
    lines = ["try:", "    exec('raise KeyboardInterrupt')", "except KeyboardInterrupt:", "    pass"]
    lines += ["from ellq.__main__ import _leave_interrupted", "_leave_interrupted()"]
    (tmp_path / "struck.py").write_text("\n".join(lines))
    assert subprocess.run([sys.executable, "-m", "struck"], cwd=tmp_path, check=False).returncode == 130
