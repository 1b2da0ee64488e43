"""Trajectories: the rows are those of each checkpoint's profile, in order; a real training on digits; the picture."""

import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

from ellq.analysis import datasets, measure, mlp
from ellq.analysis.trajectory import Trajectory, trajectory


def _states(steps: int, layers: int = 3) -> dict[Any, Any]:
    """Return weights whose tails get heavier with every step, the more the deeper the layer."""
    rng = np.random.default_rng(0)
    normal = {f"l{i}.weight": rng.standard_normal((6, 40)) for i in range(layers)}
    return {
        step: {
            name: np.sign(w) * np.abs(w) ** (1 + 0.1 * step * depth) for depth, (name, w) in enumerate(normal.items())
        }
        for step in range(steps)
    }


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of a net before and during a training on digits with a penalty on Σ|w|, which makes it sparser."""
    folder = tmp_path_factory.mktemp("training")
    data = datasets.load("digits", "train")
    inputs, labels = data.inputs().flatten(1), torch.as_tensor(data.labels)
    torch.manual_seed(0)
    model = mlp(64, 32, outputs=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    paths = []
    for epoch in range(5):
        paths.append(folder / f"epoch-{epoch}.pt")
        torch.save(model.state_dict(), paths[-1])
        for batch in torch.split(torch.randperm(len(inputs)), 64):
            penalty = sum(parameter.abs().sum() for parameter in model.parameters())
            loss = cross_entropy(model(inputs[batch]), labels[batch]) + 2e-3 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return paths


def test_a_training_with_an_l1_penalty_gets_more_compressible(training: list[Path]) -> None:
    found = trajectory(training)
    assert found.steps == [f"epoch-{epoch}" for epoch in range(5)]
    share = found.model["unit_fraction"].tolist()
    assert share == sorted(share, reverse=True)
    assert share[-1] < share[0] - 0.1
    figure = found.plot()
    axes = figure.axes[0]
    assert len(axes.lines) == 3
    assert axes.lines[-1].get_linewidth() > 2 * axes.lines[0].get_linewidth()
    assert [label.get_text() for label in axes.get_xticklabels()] == found.steps


def test_the_rows_are_those_of_each_profile(training: list[Path]) -> None:
    sources = {path.stem: torch.load(path, weights_only=True) for path in training}
    found = trajectory(sources, q=0.3)
    assert found == trajectory(training, q=0.3)
    for step, source in sources.items():
        profile = measure(source, q=0.3)
        rows = found.frame[found.frame["step"] == step]
        whole = profile.frame[profile.frame["level"] != "unit"]
        for name in ("level", "layer", "size", "nonzeros", "quasinorm", "pq_index"):
            assert rows[name].tolist() == whole[name].tolist()
        assert rows["effective_fraction"].tolist() == (whole["effective_count"] / whole["size"]).tolist()
        units = profile.units
        mean = (units["effective_count"] / units["size"]).groupby(units["layer"], sort=False).mean().tolist()
        assert rows["unit_fraction"].tolist()[:-1] == pytest.approx(mean)
        total = units["effective_count"].sum() / units["size"].sum()
        assert rows["unit_fraction"].iloc[-1] == pytest.approx(total)


def test_a_table_has_a_row_per_layer_and_a_column_per_step() -> None:
    found = trajectory(_states(4))
    table = found.table("pq_index")
    assert table.index.tolist() == ["l0.weight", "l1.weight", "l2.weight", "(model)"]
    assert table.columns.tolist() == [0, 1, 2, 3]
    assert np.ptp(table.loc["l0.weight"]) == 0
    assert (np.diff(table.loc["l2.weight"]) > 0).all()
    with pytest.raises(ValueError, match=r"measure='layer' is no measure.*unit_fraction"):
        found.table("layer")


def test_layers_of_any_order_are_matched_by_name() -> None:
    states = _states(3)
    turned = {step: dict(reversed(state.items())) if step else state for step, state in states.items()}
    one, two = trajectory(states), trajectory(turned)
    pd.testing.assert_frame_equal(one.frame, two.frame)


def test_modules_are_measured_as_they_are() -> None:
    torch.manual_seed(0)
    models = {epoch: nn.Linear(5, 4) for epoch in (10, 20)}
    found = trajectory(models)
    assert found.steps == [10, 20]
    assert found == trajectory({epoch: model.state_dict() for epoch, model in models.items()})
    assert found != trajectory(models, q=0.4)
    assert found != "trajectory"


def test_a_zero_layer_is_measured() -> None:
    found = trajectory({0: {"w": np.eye(3)}, 1: {"w": np.zeros((3, 3))}})
    assert found.model["unit_fraction"].tolist() == pytest.approx([1 / 3, 0])
    assert math.isnan(found.model["pq_index"].iloc[1])
    assert json.loads(found.to_json())["rows"][-1][6] is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": np.ones((2, 3))}, r"layer 'w' has shape \[3, 3\] in step 0 and \[2, 3\] in step 'last'"),
        ({"v": np.ones((3, 3))}, r"step 0 has a layer 'w' and step 'last' has none"),
        ({"w": np.eye(3), "v": np.eye(3)}, r"step 'last' has a layer 'v' and step 0 has none"),
        ({"w": np.full((3, 3), np.nan)}, r"step 'last': Weight 'w' holds nan at index \[0, 0\]"),
        (3, r"step 'last': model must be an nn\.Module or a state dict"),
    ],
)
def test_a_step_that_does_not_fit_is_named(other: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        trajectory({0: {"w": np.eye(3)}, "last": other})


@pytest.mark.parametrize(
    ("checkpoints", "error", "message"),
    [
        ({}, ValueError, "checkpoints is empty"),
        ([], ValueError, "checkpoints is empty"),
        ("a.pt", TypeError, "must be a mapping of steps to models or a sequence of paths, got str"),
        (3, TypeError, "got int"),
        ([{"w": np.eye(2)}], TypeError, "checkpoints holds dict, not a path"),
        (["a.pt", "a.pt"], ValueError, "same path twice"),
        ({"w": np.eye(2)}, TypeError, "is one state dict"),
        ({"w": torch.eye(2)}, TypeError, "is one state dict"),
        (["no-such-file.pt"], FileNotFoundError, "no-such-file"),
    ],
)
def test_what_are_no_checkpoints_is_refused(checkpoints: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trajectory(checkpoints)
    with pytest.raises(ValueError, match="q=2 "):
        trajectory({0: {"w": np.eye(2)}}, q=2)


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "model.pt" for folder in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        torch.save({"w": torch.eye(2)}, path)
    assert trajectory(paths).steps == [str(path) for path in paths]


def test_looks_fit_a_terminal_and_files_hold_every_row(tmp_path: Path) -> None:
    found = trajectory({f"checkpoint-{step:06d}-[b]": state for step, state in _states(9).items()})
    console = Console(file=io.StringIO(), width=80)
    console.print(found)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    assert "3 steps between are left out" in shown
    assert "…000008-[b]" in shown
    assert "(model)" in str(found)
    assert "<table" in found._repr_html_()
    assert repr(found).startswith("Trajectory(q=0.5: 9 steps, 3 layers, ")
    content = json.loads(found.to_json(tmp_path / "t.json"))
    assert content == json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert len(content["rows"]) == 9 * 4
    found.to_csv(tmp_path / "t.csv")
    read = pd.read_csv(tmp_path / "t.csv", keep_default_na=False)
    assert read["unit_fraction"].tolist() == found.frame["unit_fraction"].tolist()
    with pytest.raises(AttributeError):
        found.q = 0.3  # type: ignore[misc]
    assert isinstance(found, Trajectory)


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (3, 6), (3, 7), (40, 30)])
def test_the_picture_has_a_line_for_every_layer_and_one_for_the_model(steps: int, layers: int) -> None:
    before = dict(mpl.rcParams)
    states = _states(steps, layers)
    for labels in (range(steps), [0.5 * step for step in range(steps)], [f"s{step}" for step in range(steps)]):
        figure = trajectory(dict(zip(labels, states.values(), strict=True))).plot()
        axes = figure.axes[0]
        assert len(axes.lines) == layers + 1
        assert len(figure.axes) == (1 if layers <= 6 else 2)  # a bar of depth in place of a legend
        assert len(axes.get_xticks()) <= 31
        figure.savefig(io.BytesIO(), format="png", dpi=40)
    assert dict(mpl.rcParams) == before
