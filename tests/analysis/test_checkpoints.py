"""Checkpoints: every format read, every bad file refused in one sentence, no code ever run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ellq.analysis.checkpoints import LazyTensors, read_checkpoint
from ellq.analysis.weights import weight_matrices


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).state_dict()


def _same(read: object, state: dict[str, torch.Tensor]) -> bool:
    assert hasattr(read, "keys")
    return sorted(read.keys()) == sorted(state) and all(torch.equal(read[name], state[name]) for name in state)  # type: ignore[index]


@pytest.mark.parametrize("ending", ["pt", "pth", "th", "bin", "ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_a_state_dict_in_either_torch_format(
    tmp_path: Path, state: dict[str, torch.Tensor], ending: str, zipped: bool
) -> None:
    path = tmp_path / f"a.{ending}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(str(path))
    assert _same(read, state)
    assert list(read) == list(state)


def test_reads_safetensors_tensor_by_tensor(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "a.safetensors")
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert isinstance(read, LazyTensors)
    assert _same(read, state)
    assert repr(read) == "LazyTensors(4 tensors)"
    with pytest.raises(KeyError):
        read["absent"]


def test_measuring_reads_each_weight_of_safetensors_once(
    tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    state |= {"body.weight_extra": torch.ones(2, 2)}  # a name that may be a part of another's weight
    save_file(state, tmp_path / "a.safetensors")
    read = read_checkpoint(tmp_path / "a.safetensors")
    opened: list[str] = []
    fetch = LazyTensors.__getitem__
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda self, name: (opened.append(name), fetch(self, name))[1])
    found = weight_matrices(read)
    assert opened == []
    assert [matrix.name for matrix in found] == list(found.names) == opened
    with_all_at_hand = weight_matrices({name: state[name] for name in read})
    assert found.names == with_all_at_hand.names
    for one, other in zip(found, with_all_at_hand, strict=True):
        assert (one.units == other.units).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_stand_ins_have_the_shape_and_type_and_are_not_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.ones(3, 4).to(dtype)}, tmp_path / "a.safetensors")
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert isinstance(read, LazyTensors)
    (tmp_path / "a.safetensors").unlink()
    assert (read.stand_in("w").shape, read.stand_in("w").dtype) == ((3, 4), dtype)


def test_safetensors_names_come_with_their_numbers_in_order(tmp_path: Path) -> None:
    names = [f"layers.{i}.weight" for i in range(12)]
    save_file({name: torch.ones(1, 1) for name in names}, tmp_path / "a.safetensors")
    assert list(read_checkpoint(tmp_path / "a.safetensors")) == names


def test_reads_a_sharded_checkpoint(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    names = list(state)
    save_file({n: state[n] for n in names[:2]}, tmp_path / "a-1.safetensors")
    save_file({n: state[n] for n in names[2:]}, tmp_path / "a-2.safetensors")
    places = {n: f"a-{1 + i // 2}.safetensors" for i, n in enumerate(names)}
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert _same(read_checkpoint(index), state)
    (tmp_path / "a-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"a-2\.safetensors does not exist"):
        read_checkpoint(index)
    index.write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        read_checkpoint(index)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not the index"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 2)}}}},
        lambda s: {"model_state_dict": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"net": s, "acc": 91.7},
        lambda s: {"module": s},
        lambda s: {f"module.{name}": value for name, value in s.items()},
        lambda s: {f"_orig_mod.module.{name}": value for name, value in s.items()},
        lambda s: {"state_dict": s, "pytorch-lightning_version": "2.0", "hyper_parameters": {"width": 3}},
        lambda s: {**s, "extra": None},
    ],
)
def test_unwraps_the_usual_nests(
    tmp_path: Path, state: dict[str, torch.Tensor], nest: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    torch.save(nest(state), tmp_path / "a.pt")
    assert _same(read_checkpoint(tmp_path / "a.pt"), state)


def test_a_prefix_that_not_all_names_share_is_kept(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1, 1), "b": torch.ones(1, 1)}, tmp_path / "a.pt")
    assert set(read_checkpoint(tmp_path / "a.pt")) == {"module.a", "b"}


def test_the_packed_weight_of_a_quantised_linear_is_kept(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates making them; files that hold them remain
        weight = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)
    state = {"fc._packed_params._packed_params": (weight, None), "fc.scale": torch.tensor(1.0)}
    torch.save(state, tmp_path / "a.pt")
    assert torch.equal(read_checkpoint(tmp_path / "a.pt")["fc.weight"].int_repr(), weight.int_repr())


class _Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "executed"
    with (tmp_path / "a.pt").open("wb") as stream:
        pickle.dump({"w": _Trap(mark)}, stream, protocol=protocol)
    with pytest.raises(ValueError, match=r"a\.pt (was refused|holds text)") as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert not mark.exists()
    assert "\n" not in str(caught.value)
    with (tmp_path / "a.pt").open("rb") as stream:  # the trap does work
        pickle.load(stream)
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "executed"
    torch.save({"w": torch.ones(2, 2), "x": _Trap(mark)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    message = r"refused.*posix\.system.*nothing was executed.*Save model\.state_dict\(\)"
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert not mark.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_pickled_model_is_refused_with_advice(tmp_path: Path, zipped: bool) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused.*Linear.*Save model\.state_dict\(\)") as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_other_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"refused.*argparse\.Namespace"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_torch_file_is_refused(
    tmp_path: Path, state: dict[str, torch.Tensor], zipped: bool, share: float
) -> None:
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"truncated|refused") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [4, 20, -5])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, state: dict[str, torch.Tensor], kept: int) -> None:
    save_file(state, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_an_empty_file_is_named_as_such(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.{ending}").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_checkpoint(tmp_path / f"a.{ending}")


@pytest.mark.parametrize(
    ("content", "what"), [(b"version https://git-lfs.github.com/spec/v1\n", "text"), (b"\x00\x01\x02", "something")]
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=f"holds {what}.*not a PyTorch checkpoint"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [3, {}, {"a": 1}, [torch.ones(2, 2)], {"state_dict": {}}])
def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_lone_tensor_is_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="one tensor without a name"):
        read_checkpoint(tmp_path / "a.pt")


def test_empty_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_missing_file_a_folder_an_unknown_ending_and_a_non_path_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.pt does not exist"):
        read_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(IsADirectoryError, match=r"is a folder.*\.safetensors"):
        read_checkpoint(tmp_path)
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"unknown ending.*\.safetensors, .*\.ckpt"):
        read_checkpoint(tmp_path / "a.npy")
    with pytest.raises(TypeError, match="path must be a file path, got dict"):
        read_checkpoint({})  # type: ignore[arg-type]


_PEAK = """
import sys
from ellq.analysis import measure, read_checkpoint
measure(read_checkpoint(sys.argv[1]))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_measuring_takes_no_more_memory_for_more_tensors(tmp_path):
    peaks = []
    for tensors in (2, 12):
        file = tmp_path / f"{tensors}.safetensors"
        save_file({f"l{i}.weight": torch.ones(2048, 2048) for i in range(tensors)}, str(file))  # 16 MiB each
        done = subprocess.run([sys.executable, "-c", _PEAK, str(file)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 40_000  # KiB; all tensors together have 160 MiB more
