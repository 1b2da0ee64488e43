"""What runs without the model's class: written, checked, and refused where it cannot be."""

from __future__ import annotations

import logging
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from ellq.pruning import apply, load, plan, prune, save
from ellq.pruning import export as export_file
from ellq.pruning.export import ExportError, export_program, require_onnx, write_program
from pruned_nets import assert_unchanged, gaussian, mlp, same_bits, snapshot

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="needs the extra onnx"
)
BASE = ["model.safetensors", "plan.json"]


def make() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, 3)),
    )


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return prune(make().eval(), gaussian(300, 1, 8, 8), method="id", flops=0.5)


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(small, folder, example=gaussian(5, 1, 8, 8))
    return folder


def test_the_program_gives_the_outputs_for_any_batch(small, saved):
    assert names(saved) == sorted([*BASE, "model.pt2", "report.html"])
    program = torch.export.load(saved / "model.pt2").module()
    for count in (1, 2, 3, 33):
        inputs = gaussian(count, 1, 8, 8, seed=count)
        with torch.no_grad():
            torch.testing.assert_close(program(inputs), small(inputs))
    assert same_bits(load(saved, make), small)


def test_the_program_holds_neither_the_example_nor_pickles(small, saved):
    raw = gaussian(5, 1, 8, 8)[:2].numpy().tobytes()
    with zipfile.ZipFile(saved / "model.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert raw[:64] not in content
            assert not (name.endswith((".pt", ".pkl")) and content), name


def test_the_page_tells_what_plan_and_model_do(small, saved):
    page = (saved / "report.html").read_text(encoding="utf-8")
    for row in small.ellq_plan.table.itertuples():
        assert f'<td class="number">{row.retained}</td>' in page
    assert f"{sum(p.numel() for p in small.parameters()):,}" in page


def test_one_example_is_enough_and_the_model_stays_as_it_was(tmp_path):
    net = mlp(4, 6, 2).train()
    before = snapshot(net)
    save(net, tmp_path / "model", example=gaussian(1, 4))
    assert names(tmp_path / "model") == sorted([*BASE, "model.pt2"])
    assert_unchanged(net, before)
    program = torch.export.load(tmp_path / "model" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(gaussian(7, 4)), net.eval()(gaussian(7, 4)))


def test_masks_are_baked_in(tmp_path):
    net = mlp(4, 6, 2).eval()
    masked = apply(net, plan(net, sparsity=0.5))
    save(masked, tmp_path / "model", example=gaussian(3, 4))
    program = torch.export.load(tmp_path / "model" / "model.pt2")
    assert set(program.state_dict) == set(net.state_dict())
    with torch.no_grad():
        assert torch.equal(program.module()(gaussian(3, 4)), masked(gaussian(3, 4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_exported_in_their_own(tmp_path, dtype):
    save(mlp(4, 6, 2).to(dtype).eval(), tmp_path / "model", example=gaussian(3, 4))
    program = torch.export.load(tmp_path / "model" / "model.pt2").module()
    assert program(gaussian(3, 4).to(dtype)).dtype == dtype


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class Threes(Branches):
    def forward(self, x):
        return self.layer(x).reshape(2, -1)


@pytest.mark.parametrize("kind", [Branches, Threes])
def test_what_cannot_be_exported_is_refused_and_nothing_written(tmp_path, kind, capfd):
    save(mlp(4, 6, 2), tmp_path / "model")
    with pytest.raises(ExportError, match=r"cannot be exported by torch\.export: .+\. Save it without \(no example="):
        save(kind().eval(), tmp_path / "model", example=gaussian(2, 4))
    assert same_bits(load(tmp_path / "model", lambda: mlp(4, 6, 2)), mlp(4, 6, 2))
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == BASE
    assert capfd.readouterr().err == ""
    assert logging.root.manager.disable == logging.NOTSET


def test_a_program_of_another_model_is_caught(tmp_path):
    inputs = gaussian(3, 4)
    program = export_program(mlp(4, 6, 2), inputs)
    other = mlp(4, 6, 2)
    with torch.no_grad():
        other[2].bias += 1e-3
    with pytest.raises(ExportError, match=r"model\.pt2 gives outputs that differ from the model's by 0\.001"):
        write_program(program, other, inputs, tmp_path / "model.pt2")
    with pytest.raises(ExportError, match="other shapes"):
        write_program(program, mlp(4, 6, 3), inputs, tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("model", "arguments", "error", "match"),
    [
        (mlp(4, 6, 2).state_dict(), {"example": gaussian(2, 4)}, TypeError, "state dict"),
        (mlp(4, 6, 2), {"example": [gaussian(2, 4)]}, TypeError, "example must be a tensor, got list"),
        (mlp(4, 6, 2), {"onnx": True}, ValueError, "Pass example="),
        (mlp(4, 6, 2), {"example": gaussian(0, 4)}, ValueError, r"shape \(0, 4\)"),
        (mlp(4, 6, 2), {"example": gaussian(2, 5)}, ExportError, "cannot be exported"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, model, arguments, error, match):
    with pytest.raises(error, match=match):
        save(model, tmp_path / "model", **arguments)
    assert names(tmp_path) == []


def test_missing_packages_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(export_file, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxruntime\. Run: pip install 'ellq\[onnx\]'\."):
        save(mlp(4, 6, 2), tmp_path / "model", example=gaussian(2, 4), onnx=True)
    assert names(tmp_path) == []


@needs_onnx
class TestOnnx:
    def test_runs_elsewhere_for_any_batch(self, small, tmp_path):
        from onnxruntime import InferenceSession

        require_onnx()
        save(small, tmp_path / "model", example=gaussian(5, 1, 8, 8), onnx=True)
        assert names(tmp_path / "model") == sorted([*BASE, "model.onnx", "model.pt2", "report.html"])
        session = InferenceSession(tmp_path / "model" / "model.onnx", providers=["CPUExecutionProvider"])
        for count in (1, 7):
            inputs = gaussian(count, 1, 8, 8, seed=count)
            (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
            with torch.no_grad():
                np.testing.assert_allclose(found, small(inputs).numpy(), atol=1e-4)
        save(small, tmp_path / "model")  # replaces all of them
        assert names(tmp_path / "model") == BASE

    def test_what_onnx_lacks_is_refused_and_nothing_written(self, tmp_path):
        class Inverse(nn.Module):
            def forward(self, x):
                return torch.linalg.inv(x)

        with pytest.raises(ExportError, match=r"cannot be written as ONNX and run: .* \(no onnx=True"):
            save(Inverse(), tmp_path / "model", example=gaussian(2, 3, 3), onnx=True)
        assert names(tmp_path) == []
