"""The profile: its numbers against independent formulas, its invariances, its files, its looks."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console
from torch import nn

from ellq.analysis.checkpoints import read_checkpoint
from ellq.analysis.profile import Profile, measure
from ellq.analysis.style import new_figure
from ellq.theory.approximation import retained_exact, retained_sufficient

_INDICES = ["sparsity_index", "mean_sparsity_index", "pq_index", "effective_count"]

weights = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5),
    elements=st.one_of(st.just(0.0), st.floats(-100, -0.01), st.floats(0.01, 100)),
)
states = st.lists(weights, min_size=1, max_size=4).map(lambda ws: {f"l{i}.weight": w for i, w in enumerate(ws)})
orders = st.floats(0.1, 0.9)
examples = settings(max_examples=40, deadline=None)
few = settings(max_examples=15, deadline=None)  # for what measures several times


def _expected(w: np.ndarray[Any, Any], q: float) -> dict[str, float]:
    """Return every measure by its definition, without any scaling."""
    a = np.abs(w.ravel())
    d, l1, lq = a.size, a.sum(), (a[a > 0] ** q).sum() ** (1 / q)
    is_zero = l1 == 0
    return {
        "size": d,
        "nonzeros": np.count_nonzero(a),
        "max_abs": a.max(),
        "l1": l1,
        "l2": math.sqrt((a**2).sum()),
        "quasinorm": lq,
        "sparsity_index": math.nan if is_zero else l1 / lq,
        "pq_index": math.nan if is_zero else 1 - d ** (1 - 1 / q) * lq / l1,
        "effective_count": 0.0 if is_zero else (lq / l1) ** (q / (1 - q)),
    }


def _agrees(row: Any, w: np.ndarray[Any, Any], q: float) -> None:
    for name, value in _expected(w, q).items():
        assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name


@examples
@given(states, orders)
def test_every_row_is_the_measure_of_its_flattened_vector(state: dict[str, Any], q: float) -> None:
    profile = measure(state, q=q)
    units = profile.units
    for place, (name, w) in enumerate(state.items()):
        layer = profile.layers.iloc[place]
        assert (layer["layer"], layer["level"]) == (name, "layer")
        _agrees(layer, w, q)
        mine = units[units["layer"] == name]
        assert mine["unit"].tolist() == list(range(len(w)))
        for (_, row), unit in zip(mine.iterrows(), w, strict=True):
            _agrees(row, unit, q)
    _agrees(profile.model, np.concatenate([w.ravel() for w in state.values()]), q)


@examples
@given(states, orders)
def test_the_mean_sparsity_index_averages_over_units_then_over_layers(state: dict[str, Any], q: float) -> None:
    means = []
    for w in state.values():
        live = [_expected(unit, q)["sparsity_index"] for unit in w if unit.any()]
        means.append(np.mean(live) if live else math.nan)
    profile = measure(state, q=q)
    assert profile.layers["mean_sparsity_index"].tolist() == pytest.approx(means, rel=1e-9, nan_ok=True)
    live_layers = [mean for mean in means if not math.isnan(mean)]
    expected = np.mean(live_layers) if live_layers else math.nan
    assert profile.model["mean_sparsity_index"] == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert profile.units["mean_sparsity_index"].isna().all()


@examples
@given(states, orders, st.integers(-200, 200))
def test_indices_ignore_scale_to_the_last_bit_for_powers_of_two(state: dict[str, Any], q: float, power: int) -> None:
    scaled = {name: np.ldexp(w, power) for name, w in state.items()}
    pd.testing.assert_frame_equal(
        measure(state, q=q).frame[_INDICES], measure(scaled, q=q).frame[_INDICES], check_exact=True
    )


@examples
@given(states, orders, st.randoms(use_true_random=False))
def test_permuting_units_permutes_their_rows_only(state: dict[str, Any], q: float, random: Any) -> None:
    orderings = {name: random.sample(range(len(w)), len(w)) for name, w in state.items()}
    before = measure(state, q=q)
    after = measure({name: w[orderings[name]] for name, w in state.items()}, q=q)
    columns = ["quasinorm", *_INDICES]
    for name, ordering in orderings.items():
        one = before.units.loc[before.units["layer"] == name, columns].to_numpy()[ordering]
        two = after.units.loc[after.units["layer"] == name, columns].to_numpy()
        assert np.array_equal(one, two, equal_nan=True)
    np.testing.assert_allclose(before.layers[columns], after.layers[columns], rtol=1e-12)


@examples
@given(states, orders)
def test_json_makes_an_equal_profile(state: dict[str, Any], q: float) -> None:
    profile = measure(state | {"steps": 3}, q=q)
    text = profile.to_json()
    again = Profile.from_json(text)
    assert again == profile
    assert (again.frame.dtypes == profile.frame.dtypes).all()
    for name in profile.frame.select_dtypes("float"):
        assert again.frame[name].to_numpy().tobytes() == profile.frame[name].to_numpy().tobytes()
    assert "NaN" not in text
    assert again.to_json() == text


@examples
@given(states)
def test_csv_holds_every_number_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    path = tmp_path_factory.mktemp("csv") / "profile.csv"
    profile = measure(state)
    profile.to_csv(path)
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == list(profile.frame)
    assert [row["layer"] for row in rows] == profile.frame["layer"].tolist()
    assert [row["unit"] for row in rows] == ["" if pd.isna(u) else str(u) for u in profile.frame["unit"]]
    for name in profile.frame.select_dtypes("float"):
        read = [float(row[name] or "nan") for row in rows]
        assert np.array_equal(read, profile.frame[name], equal_nan=True)


@pytest.fixture
def profile() -> Profile:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[2] = 0
    model[3].weight = model[2].weight
    model.register_buffer("[bold]<b>", torch.ones(2, 2))
    return measure(model)


def test_units_layers_and_model_are_the_parts_of_the_frame(profile: Profile) -> None:
    assert profile.frame["level"].value_counts().to_dict() == {"unit": 8, "layer": 2, "model": 1}
    assert len(profile.units) == 8
    assert profile.layers["layer"].tolist() == ["0.weight", "2.weight"]
    assert profile.model["layer"] == ""
    assert profile.frame["unit"].dtype == "Int64"
    assert profile.frame["unit"].isna().sum() == 3
    assert (profile.frame["q"] == 0.5).all()
    assert profile.tied == {"3.weight": "2.weight"}
    assert profile.model["size"] == 55


def test_a_dead_unit_has_no_index_counts_nothing_and_is_said(profile: Profile) -> None:
    dead = profile.units.iloc[2]
    assert math.isnan(dead["sparsity_index"])
    assert math.isnan(dead["pq_index"])
    assert dead["effective_count"] == 0
    assert profile.summary()["dead_units"].tolist() == [1, 0, 1]
    assert "1 dead" in repr(profile)


def test_the_summary_has_a_row_per_layer_and_one_for_the_model(profile: Profile) -> None:
    table = profile.summary()
    assert table.index.tolist() == ["0.weight", "2.weight", "(model)"]
    assert table["shape"].tolist() == ["5×8", "3×5", ""]
    assert table["units"].tolist() == [5, 3, 8]
    assert table["sparsity"].tolist() == pytest.approx([8 / 40, 0, 8 / 55])
    units = profile.units
    share = (units["effective_count"] / units["size"]).to_numpy()
    for column, level in (("unit_low", 0.25), ("unit_median", 0.5), ("unit_high", 0.75)):
        expected = [np.quantile(part, level) for part in (share[:5], share[5:], share)]
        assert table[column].tolist() == pytest.approx(expected)
    assert not table.isna().any(axis=None)


def test_layers_stay_in_model_order_where_names_sort_otherwise() -> None:
    state = {name: torch.eye(2) * i for i, name in enumerate(["z", "l10", "l2", "a"], 1)}
    profile = measure(state)
    assert profile.layers["layer"].tolist() == ["z", "l10", "l2", "a"]
    assert profile.summary()["quasinorm"].tolist()[:4] == pytest.approx([4, 8, 12, 16])


def test_looks_are_short_and_escape_names(profile: Profile) -> None:
    assert repr(profile) == str(repr(profile)).split("\n")[0]
    assert repr(profile).startswith("Profile(q=0.5: 2 layers, 8 units (1 dead), 55 weights, ")
    console = Console(file=io.StringIO(), width=80)
    console.print(profile)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    for text in (shown, str(profile)):
        assert "(model)" in text
        assert "3.weight is tied to 2.weight" in text
        assert "[bold]<b>" in text
    html = profile._repr_html_()
    assert "<b>" not in html
    assert html.count("<table") == 1


def test_a_conversion_is_noted() -> None:
    profile = measure({"w": torch.eye(3).to_sparse()})
    assert profile.layer_shapes[0].note == "filled from layout sparse_coo"
    assert "w: filled from layout sparse_coo" in str(profile)
    assert Profile.from_json(profile.to_json()) == profile


def test_profiles_differ_by_any_part() -> None:
    one = measure({"w": torch.eye(3)})
    assert one == measure({"w": torch.eye(3)})
    assert one != measure({"v": torch.eye(3)})
    assert one != measure({"w": torch.eye(3)}, q=0.4)
    assert one != measure({"w": 2 * torch.eye(3)})
    assert one != measure({"w": torch.eye(3), "n": 3})
    assert one != "profile"


def test_files_are_written_whole(profile: Profile, tmp_path: Path) -> None:
    text = profile.to_json(tmp_path / "new" / "profile.json")
    assert (tmp_path / "new" / "profile.json").read_text(encoding="utf-8") == text
    content = json.loads(text)
    assert (content["format"], content["version"], content["q"]) == ("ellq-profile", 2, 0.5)
    assert len(content["rows"]) == len(profile.frame)
    assert os.listdir(tmp_path / "new") == ["profile.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot be written"):
        profile.to_csv(tmp_path / "file" / "a.csv")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: "no json",
        lambda c: json.dumps([]),
        lambda c: json.dumps({}),
        lambda c: json.dumps(c | {"format": "other"}),
        lambda c: json.dumps(c | {"version": 3}),
        lambda c: json.dumps(c | {"rows": []}),
        lambda c: json.dumps(c | {"rows": c["rows"][1:-1]}),
        lambda c: json.dumps(c | {"rows": [row[:-1] for row in c["rows"]]}),
        lambda c: json.dumps(c | {"rows": [["unit", "w", 0, 0.5, *["x"] * 10]]}),
        lambda c: json.dumps(c | {"layers": []}),
        lambda c: json.dumps(c | {"q": 2}),
        lambda c: json.dumps(c | {"q": "0.5"}),
        lambda c: json.dumps({k: v for k, v in c.items() if k != "tied"}),
        lambda c: json.dumps(c | {"q": math.nan}),
    ],
)
def test_json_of_something_else_is_refused(profile: Profile, spoil: Any) -> None:
    with pytest.raises(ValueError, match=r"text is not a profile: .*Pass what Profile\.to_json returned"):
        Profile.from_json(spoil(json.loads(profile.to_json())))


ORDERS = (0.25, 0.5, 1.0, 1.5, 2.0)
TOLERANCES = (0.05, 0.5)


@few
@given(states)
def test_every_order_is_measured_by_its_definition(state: dict[str, Any]) -> None:
    profile = measure(state, q=0.5, orders=ORDERS)
    table = profile.by_order()
    vectors = [*(row for w in state.values() for row in w), *state.values()]
    vectors.append(np.concatenate([w.ravel() for w in state.values()]))
    assert table["q"].tolist() == np.repeat(ORDERS, len(vectors)).tolist()
    for place, row in enumerate(table.itertuples()):
        a, q = np.abs(vectors[place % len(vectors)].ravel()), row.q
        assert row.size == a.size
        l1, lq = a.sum(), (a[a > 0] ** q).sum() ** (1 / q)
        assert row.quasinorm == pytest.approx(lq, rel=1e-12)
        if q == 1:
            assert np.isnan([row.sparsity_index, row.mean_sparsity_index, row.pq_index, row.effective_count]).all()
            continue
        share = math.nan if l1 == 0 else (a.size ** (1 - 1 / q) * lq / l1) ** (1 if q < 1 else -1)
        assert row.pq_index == pytest.approx(1 - share, rel=1e-9, abs=1e-12, nan_ok=True)
        count = 0.0 if l1 == 0 else (lq / l1) ** (q / (1 - q))
        assert row.effective_count == pytest.approx(count, rel=1e-9)
        assert math.isnan(row.sparsity_index) == (q > 1 or l1 == 0)


@few
@given(states)
def test_a_grid_leaves_the_frame_as_it_is(state: dict[str, Any]) -> None:
    plain, full = measure(state, q=0.3), measure(state, q=0.3, orders=ORDERS, tolerances=TOLERANCES)
    pd.testing.assert_frame_equal(plain.frame, full.frame, check_exact=True)
    assert plain != full
    assert len(plain.grid) == len(plain.retained) == 0
    assert plain.orders == (0.3,)
    assert full.orders == (0.25, 0.3, 0.5, 1.0, 1.5, 2.0)
    assert plain.by_order().equals(plain.frame[list(plain.by_order())])


@few
@given(states)
def test_the_profile_at_another_order_is_as_if_measured_there(state: dict[str, Any]) -> None:
    profile = measure(state, q=0.3, orders=ORDERS)
    at = profile.at(0.25)
    assert at.q == 0.25
    pd.testing.assert_frame_equal(at.frame, measure(state, q=0.25).frame, rtol=1e-11, atol=1e-12)
    assert at.at(0.3) == profile
    assert profile.at(0.3) is profile
    assert measure(state).at(0.5).q == 0.5


def test_an_order_that_was_not_measured_is_refused() -> None:
    profile = measure({"w": torch.eye(3)}, orders=ORDERS)
    with pytest.raises(ValueError, match=r"q=0\.3 was not measured; 0\.25, 0\.5 were\. Add it to orders of measure"):
        profile.at(0.3)
    with pytest.raises(ValueError, match=r"q=1\.5 is outside \(0, 1\)"):
        profile.at(1.5)
    with pytest.raises(TypeError, match="q must be one real number"):
        profile.at("0.25")  # type: ignore[arg-type]


@few
@given(states)
def test_the_fewest_retained_are_those_of_every_vector(state: dict[str, Any]) -> None:
    profile = measure(state, tolerances=TOLERANCES, orders=(0.25, 1.0))
    table = profile.retained
    vectors = [*(row for w in state.values() for row in w), *state.values()]
    vectors.append(np.concatenate([w.ravel() for w in state.values()]))
    assert table["tol"].tolist() == np.repeat(TOLERANCES, len(vectors)).tolist()
    for place, row in enumerate(table.itertuples()):
        w = vectors[place % len(vectors)].ravel()
        near = [retained_exact(w, row.tol * (1 + sign * 1e-12)) for sign in (1, -1)]
        assert near[0] <= row.retained <= near[1]
        assert row.fraction == row.retained / w.size
        assert row.retained <= row.sufficient <= np.count_nonzero(w)
        if not math.isnan(row.order):
            enough = retained_sufficient(w, row.tol, p=row.order, q=2.0)
            assert row.sufficient == pytest.approx(math.ceil(enough), rel=1e-9, abs=1)
    assert table[["level", "layer"]].equals(pd.concat([profile.frame[["level", "layer"]]] * 2, ignore_index=True))


def test_the_table_shows_what_to_retain() -> None:
    profile = measure({"w": np.ones((2, 50))}, tolerances=(0.1, 0.501))
    text = str(profile)
    assert "k/d, 0.1" in text
    assert "99.0%" in text
    assert "75.0%" in text
    assert "share of entries to keep for a relative error of tol" in text


@few
@given(states)
def test_json_holds_the_grid_and_the_counts(state: dict[str, Any]) -> None:
    profile = measure(state, orders=ORDERS, tolerances=TOLERANCES)
    again = Profile.from_json(profile.to_json())
    assert again == profile
    for name in ("grid", "retained"):
        assert (getattr(again, name).dtypes == getattr(profile, name).dtypes).all()
    assert again.at(0.25) == profile.at(0.25)
    plain = measure(state)
    for name in ("grid", "retained"):
        assert (getattr(plain, name).dtypes == getattr(profile, name).dtypes).all()


def test_json_of_version_1_is_still_read(profile: Profile) -> None:
    content = json.loads(profile.to_json()) | {"version": 1}
    new = {"orders", "order_columns", "order_rows", "tolerances", "retained_columns", "retained_rows"}
    old = {key: value for key, value in content.items() if key not in new}
    assert len(old) == len(content) - len(new)
    assert Profile.from_json(json.dumps(old)) == profile


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c | {"orders": [0.5]},
        lambda c: c | {"orders": [0.25, 3.0]},
        lambda c: c | {"orders": [0.5, 0.25]},
        lambda c: c | {"orders": [0.25, 0.75]},
        lambda c: c | {"order_rows": c["order_rows"][:-1]},
        lambda c: c | {"order_rows": []},
        lambda c: c | {"tolerances": [0.05, 0.5, 0.7]},
        lambda c: c | {"tolerances": [2]},
        lambda c: c | {"tolerances": []},
        lambda c: c | {"retained_rows": c["retained_rows"][1:]},
        lambda c: {k: v for k, v in c.items() if k != "retained_columns"},
    ],
)
def test_json_with_a_damaged_grid_is_refused(spoil: Any) -> None:
    content = json.loads(measure({"w": torch.eye(3)}, orders=(0.25,), tolerances=TOLERANCES).to_json())
    with pytest.raises(ValueError, match=r"text is not a profile: .*Pass what Profile\.to_json returned"):
        Profile.from_json(json.dumps(spoil(content)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"orders": 0.5}, TypeError, "orders must be a sequence of numbers"),
        ({"orders": (0.5, "1")}, TypeError, r"orders\[1\] must be one real number"),
        ({"orders": (0.5, 0.5)}, ValueError, r"orders holds 0\.5 twice"),
        ({"orders": (2.5,)}, ValueError, r"orders holds 2\.5"),
        ({"orders": (0,)}, ValueError, r"orders\[0\]=0 "),
        ({"tolerances": (0.1, 1.0)}, ValueError, r"tolerances\[1\]=1 is outside \(0, 1\)"),
        ({"tolerances": (0.1, 0.1)}, ValueError, r"tolerances holds 0\.1 twice"),
        ({"tolerances": "0.1"}, TypeError, "tolerances must be a sequence"),
    ],
)
def test_a_bad_grid_is_refused_by_name(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure({"w": torch.eye(3)}, **arguments)


def test_an_order_of_the_grid_too_small_for_float64_is_named() -> None:
    with pytest.raises(OverflowError, match=r"layer 'w'.*q=0\.001"):
        measure({"w": torch.ones(20, 20)}, orders=(0.001,))


def test_a_weight_that_is_not_finite_is_named_with_its_index() -> None:
    with pytest.raises(ValueError, match=r"Weight 'w' holds inf at index \[0, 1\]"):
        measure({"w": torch.tensor([[0.0, math.inf]])}, orders=ORDERS, tolerances=TOLERANCES)


@pytest.mark.parametrize("q", [0, 1, -0.5, 1.5, math.nan, math.inf])
def test_an_order_outside_zero_and_one_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="q"):
        measure({"w": torch.eye(3)}, q=q)


@pytest.mark.parametrize("q", ["0.5", [0.5], None, True])
def test_an_order_that_is_no_number_is_refused(q: Any) -> None:
    with pytest.raises(TypeError, match="q must be one real number"):
        measure({"w": torch.eye(3)}, q=q)


def test_an_order_too_small_for_float64_names_the_layer() -> None:
    with pytest.raises(OverflowError, match=r"layer 'wide'.*q=0\.001.*Choose a larger q"):
        measure({"narrow": torch.eye(2), "wide": torch.ones(20, 20)}, q=0.001)


def test_an_order_too_small_for_the_model_alone_says_so() -> None:
    with pytest.raises(OverflowError, match="the whole model"):
        measure({f"l{i}": torch.ones(4, 4) for i in range(100)}, q=0.01)


def test_huge_and_tiny_weights_are_measured() -> None:
    for scale in (1e-300, 1e300):
        profile = measure({"w": np.full((2, 3), scale)})
        assert profile.model["pq_index"] == pytest.approx(0, abs=1e-12)
        assert profile.model["effective_count"] == pytest.approx(6)


def test_an_all_zero_model_is_measured() -> None:
    profile = measure({"w": torch.zeros(2, 3)})
    assert profile.model["effective_count"] == 0
    assert profile.summary()["sparsity"].tolist() == [1, 1]
    assert profile.plot().axes
    assert Profile.from_json(profile.to_json()) == profile


def test_a_matrix_beyond_one_block_is_measured_as_one() -> None:
    w = np.random.default_rng(0).standard_normal((3, 2**20 + 1))
    profile = measure({"w": w})
    _agrees(profile.layers.iloc[0], w, 0.5)
    assert len(profile.units) == 3


def test_a_hundred_thousand_units_take_seconds() -> None:
    state = {f"l{i}": torch.randn(1000, 8) for i in range(100)}
    began = time.perf_counter()
    profile = measure(state)
    profile.summary()
    profile.plot()
    assert len(profile.units) == 100_000
    assert time.perf_counter() - began < 10  # 0.5 s on two cores; row by row it would be minutes


def test_a_module_and_its_state_dict_have_the_same_profile() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    assert measure(model) == measure(model.state_dict())


@pytest.mark.parametrize(
    ("module", "units"),
    [
        (nn.Conv3d(4, 6, 2, groups=2), {"weight": (6, 16)}),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), {"weight": (6, 18)}),
        (nn.Embedding(7, 5), {"weight": (7, 5)}),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight": (12, 4), "out_proj.weight": (4, 4)}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {"q_proj_weight": (4, 4), "k_proj_weight": (4, 3), "v_proj_weight": (4, 5), "out_proj.weight": (4, 4)},
        ),
        (nn.LSTM(3, 5, proj_size=2), {"weight_ih_l0": (20, 3), "weight_hh_l0": (20, 2), "weight_hr_l0": (2, 5)}),
        (nn.GRU(3, 5), {"weight_ih_l0": (15, 3), "weight_hh_l0": (15, 5)}),
    ],
)
def test_neurons_filters_embeddings_projections_and_gates_are_units(module: nn.Module, units: dict[str, Any]) -> None:
    rows = measure(module).units
    found = {str(name): (len(part), int(part["size"].iloc[0])) for name, part in rows.groupby("layer", sort=False)}
    assert found == units


@pytest.mark.parametrize("layers", [1, 2, 60, 400])
def test_the_plot_names_its_axes_and_shows_every_layer(layers: int) -> None:
    settings_before = dict(mpl.rcParams)
    profile = measure({f"l{i}.weight": torch.randn(6, 9) for i in range(layers)})
    figure = profile.plot()
    (axes,) = figure.axes
    assert len(axes.patches) == layers
    assert "N/d" in axes.get_xlabel()
    assert axes.get_ylabel() == "layer"
    assert axes.get_yticklabels()[0].get_text() == "l0"
    assert len(axes.get_yticks()) == layers or layers > 90
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first layer is on top
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    assert dict(mpl.rcParams) == settings_before


@pytest.mark.parametrize("layers", [1, 2, 30, 200])
@pytest.mark.parametrize("kind", ["quantiles", "depth", "orders"])
def test_every_other_picture_shows_every_layer(kind: str, layers: int) -> None:
    settings_before = dict(mpl.rcParams)
    name = "a.very.long.name.of.a.layer.in.a.model.with.many.blocks.{}.weight"
    profile = measure({name.format(i): torch.randn(6, 9) for i in range(layers)}, orders=ORDERS)
    figure = profile.plot(kind)
    axes = figure.axes[0]
    if kind == "depth":
        assert len(axes.lines[0].get_xdata()) == layers
        assert "N/d" in axes.get_ylabel()
    else:
        (image,) = axes.images
        assert image.get_array().shape == ((layers, 41) if kind == "quantiles" else (layers + 1, 4))
        assert "N/d" in figure.axes[1].get_xlabel()  # of the colour bar
        assert axes.get_yticklabels()[0].get_text().endswith("blocks.0")
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    assert dict(mpl.rcParams) == settings_before


@pytest.mark.parametrize("kind", ["units", "quantiles", "depth", "orders"])
def test_every_picture_can_be_drawn_of_nothing_but_zeros(kind: str) -> None:
    measure({"w": torch.zeros(2, 3)}, orders=ORDERS).plot(kind).savefig(io.BytesIO(), format="svg")


def test_the_quantiles_drawn_are_those_of_the_units() -> None:
    profile = measure({"w": np.random.default_rng(0).standard_normal((9, 20))})
    shares = (profile.units["effective_count"] / 20).to_numpy()
    drawn = profile.plot("quantiles").axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn[0], np.quantile(shares, np.linspace(0, 1, 41)))


def test_a_map_of_orders_needs_several() -> None:
    for orders in ((), (1.0,)):
        with pytest.raises(ValueError, match="kind='orders' needs several orders"):
            measure({"w": torch.eye(3)}, orders=orders).plot("orders")


def test_an_unknown_picture_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"kind='pie' is no picture.*units, quantiles, depth, orders"):
        measure({"w": torch.eye(3)}).plot("pie")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_the_plot_holds_whatever_share_there_is(share: float) -> None:
    w = np.zeros((4, 100))
    w[:, : max(1, int(100 * share))] = share
    (axes,) = measure({"w": w}, q=0.5).plot().axes
    low, high = axes.get_xlim()
    assert 0 <= low <= share <= high <= 1


def test_the_gaussian_line_is_where_gaussian_weights_are() -> None:
    from ellq.analysis.profile_plot import _gaussian_fraction

    w = np.random.default_rng(0).standard_normal((1, 400_000))
    for q in (0.1, 0.5, 0.9):
        model = measure({"w": w}, q=q).model
        assert model["effective_count"] / model["size"] == pytest.approx(_gaussian_fraction(q), abs=0.003)


def test_a_new_figure_belongs_to_no_window() -> None:
    figure, axes = new_figure(3.3, 2)
    assert figure.get_size_inches().tolist() == [3.3, 2]
    assert axes.figure is figure
    assert not axes.spines["top"].get_visible()


@pytest.mark.skipif("ELLQ_DATA" not in os.environ, reason="ELLQ_DATA names no folder with the trained ResNets")
def test_a_trained_resnet20_is_measured() -> None:
    state = read_checkpoint(Path(os.environ["ELLQ_DATA"]) / "cifar10-resnets" / "resnet20.safetensors")
    profile = measure(state)
    assert len(profile.layers) == 20  # 19 convolutions and the classifier: He et al. 2015, section 4.2
    assert len(profile.units) == 16 * 7 + 32 * 6 + 64 * 6 + 10
    assert profile.model["size"] == 268_336
    for name in ("conv1.weight", "linear.weight"):
        row = profile.layers.set_index("layer").loc[name]
        _agrees(row, state[name].double().numpy(), 0.5)
    assert profile.summary()["effective_fraction"].between(0.6, 0.9).all()
