"""Histogram profiles: one pass over any file, shares that add up to the same bits, tables that agree with Profile."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from ellq.analysis import histogram as subject
from ellq.analysis import measure, read_checkpoint
from ellq.analysis.checkpoints import stored_tensors
from ellq.analysis.histogram import HistogramProfile, histogram_profile
from ellq.theory.histogram import MagnitudeHistogram


def _state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "layers.2.weight": random(30, 40).bfloat16(),
        "layers.10.weight": random(7, 3, 3, 3).half(),
        "head.weight": random(50, 20),
        "wide.weight": random(4, 5).double(),
        "small.weight": random(6, 6).to(torch.float8_e4m3fn),
        "head.bias": random(50),
        "steps": torch.arange(12).reshape(3, 4),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(_state(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_every_layer_and_the_model_are_counted_as_if_in_memory(file: Path) -> None:
    profile, state = histogram_profile(file), _state()
    assert [layer.name for layer in profile.layer_shapes] == list(measure(read_checkpoint(file)).summary().index[:-1])
    for name, histogram in profile.histograms.items():
        assert histogram == MagnitudeHistogram.of(state[name])
    assert profile.model == MagnitudeHistogram.total(profile.histograms.values())
    assert profile.is_complete
    assert profile.skipped == {"steps": "dtype torch.int64 is not a real floating type"}


def test_the_table_encloses_the_profile(file: Path) -> None:
    exact, frame = measure(read_checkpoint(file), q=0.5), histogram_profile(file).frame((0.5,))
    rows = pd.concat([exact.layers, exact.frame[exact.frame["level"] == "model"]], ignore_index=True)
    assert frame["layer"].tolist() == rows["layer"].tolist()
    for name in ("size", "nonzeros"):
        assert frame[name].tolist() == rows[name].tolist()
    for name in ("max_abs", "quasinorm", "sparsity_index", "pq_index", "effective_count"):
        assert (frame[f"{name}_low"] <= rows[name] * (1 + 1e-12)).all()
        assert (rows[name] * (1 - 1e-12) <= frame[f"{name}_high"]).all()


def test_a_sharded_checkpoint_gives_the_same(tmp_path: Path, file: Path) -> None:
    state = _state()
    places = {}
    for i, name in enumerate(state):
        places[name] = f"s-{i % 2}.safetensors"
        save_file({n: state[n] for j, n in enumerate(state) if j % 2 == i % 2}, tmp_path / places[name])
    (tmp_path / "s.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert histogram_profile(tmp_path / "s.safetensors.index.json") == histogram_profile(file)


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_shares_of_several_processes_add_up_to_the_same_bits(file: Path, shares: int, by_layer: bool) -> None:
    whole = histogram_profile(file, by_layer=by_layer)
    parts = []
    for i in range(shares):
        part = histogram_profile(file, by_layer=by_layer, part=(i, shares))
        part.save(file.with_name(f"part-{i}"))
        parts.append(HistogramProfile.load(file.with_name(f"part-{i}")))
        assert parts[-1] == part
        assert part.is_complete == (shares == 1)
    assert max(p.model.size for p in parts) - min(p.model.size for p in parts) <= 1
    assert HistogramProfile.merge(parts[::-1]) == whole
    assert HistogramProfile.merge([HistogramProfile.merge(parts[1:]), parts[0]] if shares > 1 else parts) == whole
    assert whole.model == histogram_profile(file).model


def test_stretches_and_threads_change_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = histogram_profile(file)
    monkeypatch.setattr(subject, "_STRETCH", 97)
    assert histogram_profile(file, threads=3) == whole
    assert histogram_profile(file, threads=1) == whole


def test_any_stretch_of_a_stored_tensor_can_be_read(file: Path) -> None:
    for name, place in stored_tensors(file).items():
        tensor = read_checkpoint(file)[name].flatten()
        assert (place.dtype, place.size) == (tensor.dtype, tensor.numel())
        assert torch.equal(place.read(2, place.size - 1).view(torch.uint8), tensor[2:-1].view(torch.uint8))
        assert torch.equal(place.read().view(torch.uint8), tensor.view(torch.uint8))
        assert place.read(3, 3).numel() == 0


def test_reading_a_file_that_was_cut_or_a_foreign_format_is_an_error(file: Path) -> None:
    place = stored_tensors(file)["head.weight"]
    with pytest.raises(TypeError, match="stores a tensor as F4, which torch cannot hold"):
        dataclasses.replace(place, stored_as="F4").read()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="ends too early"):
        place.read()


def test_models_and_state_dicts_count_in_their_own_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).bfloat16()
    profile = histogram_profile(net)
    assert profile.histograms["0.weight"] == MagnitudeHistogram.of(net[0].weight)
    assert histogram_profile(net.state_dict()) == profile
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert histogram_profile(tmp_path / "a.pt") == profile
    assert list(histogram_profile({"w": np.full((2, 2), 0.1)}).model.parts) == ["float64"]


def test_weights_made_of_several_tensors_are_counted_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(20, 10))
    prune.l1_unstructured(net[0], "weight", amount=0.25)
    state = net.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    parts = [histogram_profile(tmp_path / "a.safetensors", part=(i, 2)) for i in range(2)]
    for profile in (histogram_profile(tmp_path / "a.safetensors"), HistogramProfile.merge(parts)):
        assert profile.histograms["0.weight"] == MagnitudeHistogram.of(net[0].weight)
        assert profile.model.zeros == 50
        assert profile.is_complete


def test_a_value_that_is_not_finite_is_named_with_its_tensor_and_index(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(3, 3), "b.weight": torch.ones(2, 3, 5)}
    state["b.weight"][1, 2, 3] = math.nan
    save_file(state, tmp_path / "a.safetensors")
    for part in ((0, 1), (2, 3)):
        with pytest.raises(ValueError, match=r"^Weight 'b\.weight' holds nan at index \[1, 2, 3\]\. Only finite"):
            histogram_profile(tmp_path / "a.safetensors", part=part)


def test_tables_print_and_convert(file: Path, tmp_path: Path) -> None:
    profile = histogram_profile(file)
    assert repr(profile) == "HistogramProfile(5 layers, 2445 weights)"
    assert "(model)" in str(profile)
    assert "steps skipped" in profile._repr_html_()
    assert profile.__rich__().row_count == 6
    profile.to_csv(tmp_path / "a.csv", (0.25, 0.5))
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "a.csv", keep_default_na=False), profile.frame((0.25, 0.5)), check_exact=True
    )
    rows = json.loads(profile.to_json(tmp_path / "a.json"))
    assert rows == json.loads((tmp_path / "a.json").read_text()) == profile.frame().to_dict("records")
    part = histogram_profile(file, part=(0, 4))
    assert repr(part) == "HistogramProfile(5 layers, 2445 weights, 25.0% counted)"
    assert "nan" not in part.to_json()
    assert "–" in str(part)


def test_a_zero_layer_has_no_index(tmp_path: Path) -> None:
    profile = histogram_profile({"w": torch.zeros(2, 2)})
    assert profile.frame().loc[0, "quasinorm_high"] == 0
    assert json.loads(profile.to_json())[0]["pq_index_low"] is None


def test_merging_what_does_not_belong_together_is_refused(file: Path) -> None:
    whole, part = histogram_profile(file), histogram_profile(file, part=(0, 2))
    with pytest.raises(ValueError, match=r"layer '.*' has more entries counted than it has\. Merge every part once"):
        HistogramProfile.merge([whole, part])
    with pytest.raises(ValueError, match="the model has more entries"):
        HistogramProfile.merge([histogram_profile(file, by_layer=False)] * 2)
    with pytest.raises(ValueError, match="with and without layers"):
        HistogramProfile.merge([part, histogram_profile(file, part=(1, 2), by_layer=False)])
    with pytest.raises(ValueError, match=r"layer 'w' has shape \[2, 2\] in one profile and \[4, 1\] in another"):
        HistogramProfile.merge([histogram_profile({"w": torch.ones(s)}) for s in ((4, 1), (2, 2))])
    with pytest.raises(ValueError, match="profiles is empty"):
        HistogramProfile.merge([])


def test_a_damaged_or_foreign_file_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    later = tmp_path / "later"
    histogram_profile(file).save(later)
    later.write_bytes(later.read_bytes().replace(b'version\\": 1', b'version\\": 9'))
    cut = tmp_path / "cut"
    cut.write_bytes(later.read_bytes()[:-10])
    for path in (file, tmp_path / "text", later, cut):
        with pytest.raises(ValueError, match="is no saved histogram profile"):
            HistogramProfile.load(path)
    with pytest.raises(FileNotFoundError):
        HistogramProfile.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ((2, 2), ValueError, r"i of part=2 is outside \[0, 1\]"),
        ((0, 0), ValueError, "n of part=0"),
        (1, TypeError, "part must be a pair"),
    ],
)
def test_a_part_out_of_range_is_refused(file: Path, part: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        histogram_profile(file, part=part)  # type: ignore[arg-type]


def test_a_part_of_what_is_no_safetensors_file_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a safetensors file"):
        histogram_profile({"w": torch.ones(2, 2)}, part=(0, 2))


def test_only_safetensors_files_can_be_read_in_stretches(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is no safetensors file"):
        stored_tensors(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        stored_tensors(tmp_path / "absent.safetensors")


def test_a_quasinorm_beyond_float64_is_enclosed_by_infinity() -> None:
    profile = histogram_profile({"w": torch.full((40, 40), 1e30)})
    row = profile.frame((0.01,)).iloc[0]
    assert (row["quasinorm_low"], row["quasinorm_high"]) == (sys.float_info.max, math.inf)
    assert row["pq_index_low"] <= 0 <= row["pq_index_high"]
    assert json.loads(profile.to_json(orders=(0.01,)))[0]["quasinorm_high"] is None


def test_the_table_goes_beyond_order_one() -> None:
    values = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    frame = histogram_profile({"w": values}).frame((1.0, 1.5))
    exact = measure({"w": values}, orders=(1.0, 1.5)).by_order()
    exact = exact[exact["level"] != "unit"]
    enclosed, known = frame[frame["q"] == 1.5], exact[exact["q"] == 1.5]
    for name in ("quasinorm", "pq_index", "effective_count"):
        value = known[name].to_numpy()
        assert (enclosed[f"{name}_low"].to_numpy() <= value * (1 + 1e-9)).all()
        assert (value <= enclosed[f"{name}_high"].to_numpy() * (1 + 1e-9)).all()
    assert frame.loc[frame["q"] == 1.0, "pq_index_low"].isna().all()
    assert frame["sparsity_index_low"].isna().all()


_PEAK = """
import sys
from pathlib import Path
from ellq.analysis.histogram import histogram_profile

def peak():  # getrusage would count the parent's too, from before the exec
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

before = peak()
histogram_profile(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted otherwise elsewhere")
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    size = 2**27
    save_file({"w": torch.ones(size // 2**12, 2**11, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    grown = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "a.safetensors")], capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) * 1024 < size / 2


def test_the_fewest_retained_are_enclosed_for_every_layer_and_the_model(file: Path) -> None:
    exact = measure(read_checkpoint(file), tolerances=(0.01, 0.3)).retained
    exact = exact[exact["level"] != "unit"]
    found = histogram_profile(file).retained((0.3, 0.01))
    for name in ("level", "layer", "tol"):
        assert found[name].tolist() == exact[name].tolist()
    assert (found["retained_low"].to_numpy() <= exact["retained"].to_numpy()).all()
    assert (exact["retained"].to_numpy() <= found["retained_high"].to_numpy()).all()
    assert (found["retained_high"] - found["retained_low"] <= 2).all()
    with pytest.raises(ValueError, match=r"tolerances\[0\]=1 is outside"):
        histogram_profile(file).retained((1,))


def test_curves_have_a_row_for_every_layer_and_the_model(file: Path) -> None:
    profile = histogram_profile(file)
    frame = profile.curves(orders=(0.5, 1.0), points=5)
    assert frame["layer"].drop_duplicates().tolist() == [*profile.histograms, ""]
    assert (frame["error_high"] <= frame["bound"]).all()
    with pytest.raises(ValueError, match="orders is empty"):
        profile.curves(orders=())
