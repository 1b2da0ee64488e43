"""Comparisons: the interval covers the truth as often as it says, is 0 for equals, and changes sign with the order."""

import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from torch import nn

from ellq.analysis import compare_plot, measure
from ellq.analysis.compare import Comparison, compare

subject = sys.modules["ellq.analysis.compare"]


def _state(seed: int, tail: float = 4.0, units: int = 20) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"a.weight": rng.standard_t(tail, (units, 30)), "b.weight": rng.standard_t(tail, (units // 2, 40))}


def test_the_fractions_are_the_means_over_units_and_the_models_by_size() -> None:
    first, second = _state(0), _state(1, tail=2.0)
    found = compare(first, second, q=0.3, resamples=99)
    for name, source in (("first", first), ("second", second)):
        units = measure(source, q=0.3).units
        shares = (units["effective_count"] / units["size"]).groupby(units["layer"], sort=False).mean()
        assert found.layers[name].tolist() == pytest.approx(shares.tolist(), rel=1e-10)
        total = units["effective_count"].sum() / units["size"].sum()  # every unit of a layer has the same size
        assert found.model[name] == pytest.approx(total, rel=1e-10)
    difference = found.frame["second"] - found.frame["first"]
    np.testing.assert_allclose(found.frame["difference"], difference, atol=1e-14)
    assert found.frame["units"].tolist() == [20, 10, 30]
    assert found.frame["size"].tolist() == [600, 400, 1000]
    assert (found.frame["low"] <= found.frame["difference"]).all()
    assert (found.frame["difference"] <= found.frame["high"]).all()


def test_the_interval_is_welchs_where_fractions_are_nearly_normal() -> None:
    first, second = _state(0, units=100), _state(1, tail=3.0, units=100)
    found = compare(first, second).layers.iloc[0]
    shares = []
    for source in (first, second):
        units = measure({"a": source["a.weight"]}).units
        shares.append((units["effective_count"] / units["size"]).to_numpy())
    welch = stats.ttest_ind(shares[1], shares[0], equal_var=False).confidence_interval()
    assert found["low"] == pytest.approx(welch.low, abs=0.05 * (welch.high - welch.low))
    assert found["high"] == pytest.approx(welch.high, abs=0.05 * (welch.high - welch.low))


@pytest.mark.parametrize("paired", [False, True])
def test_identical_models_do_not_differ(paired: bool) -> None:
    found = compare(_state(0), _state(0), paired=paired)
    assert (found.frame["difference"] == 0).all()
    assert ((found.frame["low"] <= 0) & (found.frame["high"] >= 0)).all()
    assert (found.frame["high"].to_numpy() == 0).all() == paired
    assert found.verdict.startswith("No difference in compressibility is established: second − first is +0.00 points")


@pytest.mark.parametrize("paired", [False, True])
def test_a_factor_changes_nothing_at_all(paired: bool) -> None:
    scaled = {name: 3 * w for name, w in _state(0).items()}
    assert compare(_state(0), scaled, paired=paired) == compare(_state(0), _state(0), paired=paired)


def test_pairs_make_the_interval_of_relatives_shorter() -> None:
    first = _state(0)
    rng = np.random.default_rng(5)
    second = {name: w + 0.05 * rng.standard_normal(w.shape) for name, w in first.items()}
    lengths = []
    for paired in (False, True):
        model = compare(first, second, paired=paired).model
        lengths.append(model["high"] - model["low"])
    assert lengths[1] < 0.5 * lengths[0]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_the_other_way_round_the_differences_change_sign(seed: int) -> None:
    one, two = _state(seed), _state(seed + 1)
    there, back = compare(one, two, resamples=199), compare(two, one, resamples=199)
    assert there.frame["difference"].tolist() == (-back.frame["difference"]).tolist()
    assert there.frame["first"].tolist() == back.frame["second"].tolist()
    paired_there = compare(one, two, resamples=199, paired=True).frame
    paired_back = compare(two, one, resamples=199, paired=True).frame
    np.testing.assert_allclose(paired_there["low"], -paired_back["high"], rtol=1e-9)


def test_the_verdict_names_the_more_compressible_and_by_how_much() -> None:
    dense, sparse = _state(0, tail=50.0), _state(1, tail=1.2)
    found = compare(sparse, dense, names=("old.pt", "new.pt"))
    points = 100 * found.model["difference"]
    assert points > 0
    assert found.verdict.startswith(f"old.pt is more compressible by {points:.2f} points of effectively used weights")
    assert f"{100 * found.model['low']:.2f} to {100 * found.model['high']:.2f}" in found.verdict
    back = compare(dense, sparse, names=("new.pt", "old.pt")).verdict
    assert back.startswith("old.pt is more compressible by ")


def test_a_layer_of_one_unit_has_no_interval_and_that_is_said() -> None:
    first, second = ({**_state(seed), "lone": np.ones((1, 7)) + seed * np.eye(1, 7)} for seed in (0, 1))
    found = compare(first, second)
    lone = found.layers.iloc[-1]
    assert math.isnan(lone["low"])
    assert math.isnan(lone["high"])
    assert not math.isnan(found.model["low"])
    assert "lone has one unit and no interval" in str(found)
    alone = compare({"lone": first["lone"]}, {"lone": second["lone"]})
    assert math.isnan(alone.model["low"])
    assert "no layer has the two units an interval needs" in alone.verdict
    same = compare({"lone": first["lone"]}, {"lone": first["lone"]})
    assert same.verdict.startswith("Neither is more compressible; no layer")
    for each in (found, alone):
        each.plot().savefig(io.BytesIO(), format="png", dpi=40)


def test_two_units_a_layer_give_an_interval_as_wide_as_that_deserves() -> None:
    found = compare(_state(0, units=4), _state(1, units=4)).layers.iloc[1]
    assert found["units"] == 2
    assert (found["low"], found["high"]) == (-1, 1)  # a quarter of the draws have no spread


def test_layers_are_matched_by_name_in_any_order() -> None:
    first, second = _state(0), _state(1)
    turned = dict(reversed(second.items()))
    assert compare(first, second) == compare(first, turned)


def test_a_module_and_its_state_dict_compare_alike() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)) for _ in range(2)]
    one, two = models
    assert compare(one, two) == compare(one.state_dict(), two.state_dict())


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": (2, 3), "b": (2, 2)}, {"a": (2, 3), "b": (2, 4)}, r"layer 'b' has shape \[2, 2\] in first and \[2, 4\]"),
        ({"a": (2, 3), "b": (2, 2)}, {"a": (2, 3)}, r"first has a layer 'b' and second has none"),
        ({"a": (2, 3)}, {"a": (2, 3), "c": (2, 2)}, r"second has a layer 'c' and first has none"),
        ({"a": (6, 4)}, {"a": (6, 2, 2)}, r"layer 'a' has shape"),
    ],
)
def test_the_first_layer_that_differs_is_named(first: Any, second: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(*({name: np.ones(shape) for name, shape in shapes.items()} for shapes in (first, second)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"confidence": 1}, ValueError, "confidence=1 "),
        ({"confidence": "x"}, TypeError, "confidence"),
        ({"resamples": 10}, ValueError, "resamples=10 "),
        ({"resamples": 99.5}, TypeError, "resamples"),
        ({"seed": -1}, ValueError, "seed=-1 "),
        ({"q": 1.5}, ValueError, "q=1.5 "),
        ({"names": ("a", "a")}, ValueError, "names holds 'a' twice"),
        ({"names": "ab"}, TypeError, "names must be a pair of strings"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: Mapping[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare(_state(0), _state(1), **arguments)


def test_an_error_says_which_model_is_at_fault() -> None:
    spoilt = _state(0)
    spoilt["a.weight"][3, 4] = np.inf
    with pytest.raises(ValueError, match=r"^B: Weight 'a\.weight' holds inf at index \[3, 4\]"):
        compare(_state(0), spoilt, names=("A", "B"))
    with pytest.raises(TypeError, match=r"^first: model must be"):
        compare("a.pt", _state(0))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_and_another_nearly_so() -> None:
    one, again, other = (compare(_state(0), _state(1), seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert one != "comparison"
    length = (one.frame["high"] - one.frame["low"]).to_numpy()
    assert (np.abs(one.frame["low"] - other.frame["low"]).to_numpy() < 0.1 * length).all()


def test_many_units_are_resampled_in_the_limit_and_nothing_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _state(0, units=600), _state(1, units=600)
    drawn = compare(first, second).frame
    monkeypatch.setattr(subject, "_MANY", 2)
    limit = compare(first, second).frame
    length = (drawn["high"] - drawn["low"]).to_numpy()
    for end in ("low", "high"):
        assert (np.abs(drawn[end] - limit[end]).to_numpy() < 0.06 * length).all()


def test_small_batches_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(_state(0), _state(1), resamples=999).frame
    monkeypatch.setattr(subject, "_BATCH", 100)
    pd.testing.assert_frame_equal(compare(_state(0), _state(1), resamples=999).frame, whole)


def test_tables_files_and_looks_hold_every_row(tmp_path: Path) -> None:
    found = compare(_state(0), _state(1, tail=1.5), names=("[bold]x<b>", "y"))
    console = Console(file=io.StringIO(), width=80)
    console.print(found)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    for text in (shown, str(found)):
        assert "(model)" in text
        assert "[bold]x<b>" in text
        assert "95% interval" in text
    assert "<b>" not in found._repr_html_()
    assert repr(found).startswith("Comparison(q=0.5: ")
    content = json.loads(found.to_json(tmp_path / "c.json"))
    assert content == json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert content["verdict"] == found.verdict
    assert pd.DataFrame(content["rows"], columns=content["columns"]).equals(found.frame)
    found.to_csv(tmp_path / "c.csv")
    read = pd.read_csv(tmp_path / "c.csv", keep_default_na=False)
    assert read["low"].tolist() == found.frame["low"].tolist()


@pytest.mark.parametrize("layers", [1, 30, 200])
def test_the_picture_has_a_row_for_every_layer_and_the_model(layers: int) -> None:
    before = dict(mpl.rcParams)
    rng = np.random.default_rng(0)
    first, second = ({f"l{i}": rng.standard_normal((3, 8)) for i in range(layers)} for _ in range(2))
    figure = compare(first, second, resamples=99).plot()
    left, right = figure.axes
    assert len(left.lines[0].get_xdata()) == layers + 1
    assert "N/d" in left.get_xlabel()
    assert "95 % interval" in right.get_xlabel()
    low, high = right.get_xlim()
    assert low == -high
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    assert dict(mpl.rcParams) == before
    assert compare_plot.draw_comparison.__doc__


def _coverage(shrink: float, trials: int) -> tuple[float, float]:
    """Return how often 95 % intervals, shrunk, hold the known difference: of a layer, and of the model."""
    rng = np.random.default_rng(0)
    populations = []
    for tail in (1.5, 4.0):
        pool = {"a": rng.standard_t(tail, (2000, 24)), "b": rng.standard_t(tail + 1, (2000, 40))}
        units = measure(pool).units
        shares = (units["effective_count"] / units["size"]).groupby(units["layer"]).mean()
        populations.append((pool, shares))
    counts = {"a": 12, "b": 30}
    size = {"a": 12 * 24, "b": 30 * 40}
    truth = {name: populations[1][1][name] - populations[0][1][name] for name in counts}
    truth[""] = sum(size[name] * truth[name] for name in counts) / sum(size.values())
    hits = dict.fromkeys(("a", ""), 0)
    for trial in range(trials):
        drawn = [
            {name: pool[name][rng.integers(2000, size=n)] for name, n in counts.items()} for pool, _ in populations
        ]
        frame = compare(*drawn, resamples=499, seed=trial).frame.set_index("layer")
        for name in hits:
            row = frame.loc[name]
            low, high = (row["difference"] + shrink * (row[end] - row["difference"]) for end in ("low", "high"))
            hits[name] += low <= truth[name] <= high
    return hits["a"] / trials, hits[""] / trials


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    trials = 800
    margin = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert min(_coverage(1.0, trials)) >= 0.95 - margin
    # The check has power: intervals a fifth shorter are caught.
    assert max(_coverage(0.8, trials)) < 0.95 - margin


def test_the_result_cannot_be_changed() -> None:
    found = compare(_state(0), _state(1), resamples=99)
    assert isinstance(found, Comparison)
    with pytest.raises(AttributeError):
        found.q = 0.3  # type: ignore[misc]
