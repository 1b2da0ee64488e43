from __future__ import annotations

import base64
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console
from torch import nn

from ellq.pruning import Plan, apply, plan, rescale_masks, save
from pruned_nets import gaussian, mlp, same_bits

NET = mlp(4, 7, 3)
CASES = [("lq", "ellq"), ("lq", "yang2022"), ("id", "ellq"), ("id", "chee2021")]


def make(method: str, rule: str = "ellq", net: nn.Module = NET, **budget) -> Plan:
    return plan(net, gaussian(50, 4), method=method, rule=rule, **(budget or {"sparsity": 0.5}))


class TestJson:
    @pytest.mark.parametrize(("method", "rule"), CASES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_keeps_every_bit(self, method, rule, bias):
        net = mlp(4, 7, 3, bias=bias)
        first = make(method, rule, net)
        again = Plan.from_json(first.to_json())
        assert again.to_json() == first.to_json()
        assert (again.method, again.rule, again.settings) == (first.method, first.rule, first.settings)
        pd.testing.assert_frame_equal(again.table, first.table)
        for a, b in zip(again.corrections, first.corrections, strict=True):
            assert a.weight.tobytes() == b.weight.tobytes()
            assert a.weight.flags.writeable
            assert (a.bias is None) == (b.bias is None) == (not bias)
            for name in ("indices", "interpolation", "offset", "feature_errors"):
                assert np.array_equal(getattr(a.skeleton, name), getattr(b.skeleton, name))
        assert same_bits(apply(net, again), apply(net, first))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=7, max_size=7))
    def test_keeps_any_number_and_name(self, values):
        first = make("id")
        correction = first.corrections[0]
        weight = np.array(values * 3).reshape(3, 7)[:, : correction.indices.size]
        odd = Plan(
            "id", "ellq", {"tol": 0.1}, first.table, (type(correction)('ö"', "λ", correction.indices, weight, None),)
        )
        again = Plan.from_json(odd.to_json()).corrections[0]
        assert np.array_equal(again.weight, weight)
        assert np.array_equal(np.signbit(again.weight), np.signbit(weight))
        assert (again.producer, again.consumer) == ('ö"', "λ")

    def test_leaves_out_a_large_interpolation_matrix(self, monkeypatch):
        first = make("id")
        entries = first.corrections[0].skeleton.interpolation.size
        for limit in (entries, entries - 1):
            monkeypatch.setattr(sys.modules[Plan.__module__], "STORED", limit)
            skeleton = Plan.from_json(first.to_json()).corrections[0].skeleton
            assert (skeleton is None) == (limit < entries)

    def test_written_before_interpolation_matrices_were_kept_is_read(self):
        data = json.loads(make("id").to_json())
        del data["corrections"][0]["skeleton"]
        assert Plan.from_json(json.dumps(data)).corrections[0].skeleton is None

    @pytest.mark.parametrize(("method", "rule"), CASES)
    def test_is_read_from_a_saved_model(self, tmp_path, method, rule):
        first = make(method, rule)
        save(apply(NET, first), tmp_path / "model", plan=first)
        text = (tmp_path / "model" / "plan.json").read_text()
        assert Plan.from_json(text).to_json() == first.to_json()

    def test_of_a_model_saved_without_one_is_refused(self, tmp_path):
        save(NET, tmp_path / "model")
        with pytest.raises(ValueError, match="saved without its plan"):
            Plan.from_json((tmp_path / "model" / "plan.json").read_text())

    @pytest.mark.parametrize("text", ["", "{", "null", "[]", '"ellq.plan"', "{}", '{"format": "other"}'])
    def test_that_is_none_of_ours_is_refused(self, text):
        with pytest.raises(ValueError, match=r"The plan (is not JSON|has format)"):
            Plan.from_json(text)

    @pytest.mark.parametrize("version", [0, 3, "1", None])
    def test_of_another_version_is_refused(self, version):
        data = json.loads(make("lq").to_json()) | {"version": version}
        with pytest.raises(ValueError, match="this ellq reads versions up to 2"):
            Plan.from_json(json.dumps(data))

    def test_of_the_first_version_is_read(self):
        first = plan(NET, sparsity=0.5)
        data = json.loads(first.to_json()) | {"version": 1}
        del data["shapes"]
        for name, value in dict(first.values).items():
            whole = base64.b64encode(np.ascontiguousarray(value, "<f4").tobytes()).decode()
            data["values"][name] = {"shape": list(value.shape), "float32": whole}
        again = Plan.from_json(json.dumps(data))
        assert again.shapes == {}
        assert same_bits(apply(NET, again), apply(NET, first))

    @pytest.mark.parametrize("data", [None, gaussian(50, 4)], ids=["rescaled", "refitted"])
    def test_keeps_refitted_values_to_the_last_bit(self, data):
        first = plan(NET, data, sparsity=0.5)
        again = Plan.from_json(first.to_json())
        assert again.to_json() == first.to_json()
        assert again.shapes == first.shapes == {"0.weight": (7, 4), "2.weight": (3, 7)}
        found = dict(again.values)
        for name, value in dict(first.values).items():
            assert found[name].dtype == value.dtype
            assert found[name].tobytes() == value.tobytes()
            assert found[name].flags.writeable
        assert same_bits(apply(NET, again), apply(NET, first))

    @given(
        hnp.arrays(
            st.sampled_from([np.float32, np.float64]),
            hnp.array_shapes(min_dims=0),
            elements=st.sampled_from([0.0, 0.0, -0.0, 1.5, -1e-30]),
        )
    )
    def test_keeps_any_value_and_the_sign_of_zeros(self, value):
        first = replace(masks(), values={"0.weight": value})
        again = dict(Plan.from_json(first.to_json()).values)["0.weight"]
        assert (again.dtype, again.shape, again.tobytes()) == (value.dtype, value.shape, value.tobytes())

    def test_of_a_refitted_plan_leaves_out_what_was_removed(self):
        net = mlp(100, 100, 10)
        sizes = [len(plan(net, sparsity=s, refit="rescale").to_json()) for s in (0.5, 0.9)]
        plain = [len(plan(net, sparsity=s, refit="none").to_json()) for s in (0.5, 0.9)]
        retained, weights = np.array([0.5, 0.1]), 11_000
        expected = (4 * retained + 1 / 8) * weights * 4 / 3  # four bytes each, a bit for all, in base64
        np.testing.assert_allclose(np.subtract(sizes, plain), expected, rtol=0.05)

    @pytest.mark.parametrize("cut", [{"at": "AAAA"}, {"float32": "AAAA"}, {"float32": ""}])
    def test_with_values_that_are_cut_off_is_refused(self, cut):
        data = json.loads(plan(NET, sparsity=0.5).to_json())
        data["values"]["0.weight"] |= cut
        with pytest.raises(ValueError, match="The plan is damaged"):
            Plan.from_json(json.dumps(data))

    @pytest.mark.parametrize("name", ["method", "rule", "settings", "table", "corrections"])
    @pytest.mark.parametrize("method", ["lq", "id"])
    def test_with_a_part_missing_or_of_another_kind_is_refused(self, name, method):
        data = json.loads(make(method).to_json())
        missing = {key: value for key, value in data.items() if key != name}
        with pytest.raises(ValueError, match="The plan is damaged"):
            Plan.from_json(json.dumps(missing))
        if name != "rule":
            with pytest.raises(ValueError, match="The plan is damaged"):
                Plan.from_json(json.dumps(data | {name: 7}))

    @pytest.mark.parametrize("name", ["kept", "values", "shapes", "left"])
    def test_with_an_optional_part_of_another_kind_is_refused(self, name):
        data = json.loads(make("lq").to_json())
        for value in (7, [1], {"0.weight": 7}) if name != "left" else (7, [1]):
            with pytest.raises(ValueError, match="The plan is damaged"):
                Plan.from_json(json.dumps(data | {name: value}))

    @pytest.mark.parametrize("retained", [-1, 99, 1.5])
    def test_with_impossible_counts_is_refused(self, retained):
        data = json.loads(make("lq").to_json())
        data["table"]["retained"][0] = retained
        with pytest.raises(ValueError, match="The plan is damaged"):
            Plan.from_json(json.dumps(data))

    def test_with_a_cut_off_array_is_refused(self):
        data = json.loads(make("id").to_json())
        data["corrections"][0]["weight"]["float64"] = data["corrections"][0]["weight"]["float64"][:-12]
        with pytest.raises(ValueError, match="The plan is damaged"):
            Plan.from_json(json.dumps(data))


def masks() -> Plan:
    return plan(NET, sparsity=0.5, refit="none")


class TestWithRetained:
    def test_carries_out_the_edited_counts(self):
        first = masks()
        table = first.to_frame()
        table["retained"] = [0, 1, 2, 3, 4, 4, 4, 7, 0, 1]
        edited = first.with_retained(table)
        pruned = apply(NET, edited)
        assert (pruned[0].weight != 0).sum(1).tolist() == [0, 1, 2, 3, 4, 4, 4]
        assert (pruned[2].weight != 0).sum(1).tolist() == [7, 0, 1]
        assert edited.sparsity == pytest.approx(1 - 26 / 49)
        assert first.table["retained"].sum() == 24
        assert Plan.from_json(edited.to_json()).to_json() == edited.to_json()

    def test_the_frame_is_a_copy(self):
        first = masks()
        copy = first.to_frame()
        copy["retained"] = 0
        assert first.sparsity < 1

    def test_takes_a_table_that_went_through_csv(self):
        first = masks()
        table = pd.read_csv(io.StringIO(first.to_frame().to_csv(index=False)))
        pd.testing.assert_frame_equal(first.with_retained(table).table, first.table)

    def test_counts_may_be_whole_floats(self):
        first = masks()
        table = first.to_frame()
        table["retained"] = table["retained"].astype(float)
        assert first.with_retained(table).table["retained"].dtype == "int64"

    @pytest.mark.parametrize(
        "edit",
        [
            lambda t: t.iloc[1:],
            lambda t: t.iloc[::-1],
            lambda t: t.iloc[::-1].reset_index(drop=True),
            lambda t: t.drop(columns="reason"),
            lambda t: t.rename(columns={"retained": "kept"}),
            lambda t: t.assign(size=1),
            lambda t: t.assign(layer="0.weight"),
            lambda t: pd.concat([t, t]),
        ],
    )
    def test_refuses_other_rows_and_columns(self, edit):
        first = masks()
        with pytest.raises(ValueError, match="own rows and columns"):
            first.with_retained(edit(first.to_frame()))

    @pytest.mark.parametrize("count", [-1, 5, 1.5, float("nan")])
    def test_refuses_counts_a_unit_cannot_have(self, count):
        table = masks().to_frame().astype({"retained": "float64"})
        table.loc[2, "retained"] = count
        with pytest.raises(ValueError, match=r"layer '0\.weight', unit 2, is not a whole number in \[0, 4\]"):
            masks().with_retained(table)

    def test_refuses_plans_whose_corrections_would_no_longer_fit(self):
        first = make("id")
        with pytest.raises(ValueError, match="Make a new plan"):
            first.with_retained(first.to_frame())

    @pytest.mark.parametrize("data", [None, gaussian(50, 4)], ids=["without data", "with data"])
    @pytest.mark.parametrize("refit", ["auto", "rescale"])
    def test_leaves_out_a_refit_that_would_no_longer_fit(self, data, refit):
        first = plan(NET, data, sparsity=0.5, refit=refit)
        assert first.values  # noqa: PD011 -- no pandas
        table = first.to_frame()
        table.loc[0, "retained"] = 3 if table["retained"][0] == 4 else 4
        edited = first.with_retained(table)
        assert not edited.values  # noqa: PD011 -- no pandas
        assert not edited.kept
        assert edited.measured is None
        assert edited.settings == {"sparsity": 0.5, "refit": f"none ({first.settings['refit']} dropped: edited)"}
        assert same_bits(apply(NET, edited), apply(NET, masks().with_retained(table)))
        assert Plan.from_json(edited.to_json()).to_json() == edited.to_json()
        again = rescale_masks(NET, edited)
        assert again.settings["refit"] == "rescale"
        torch.testing.assert_close(apply(NET, again)[0].weight.norm(dim=1), NET[0].weight.norm(dim=1))

    @pytest.mark.parametrize(
        "arguments", [{"rule": "wanda", "sparsity": 0.5}, {"pattern": "1:2"}, {"bytes": 10**6, "storage": "2:4"}]
    )
    def test_refuses_other_counts_where_entries_were_chosen_otherwise(self, arguments):
        net, inputs = mlp(4, 8, 2), gaussian(50, 4)
        first = plan(net, inputs, refit="least_squares", **arguments)
        table = first.to_frame()
        table.loc[0, "retained"] -= 1
        with pytest.raises(ValueError, match=r"layer '0\.weight' were chosen one by one"):
            first.with_retained(table)

    @pytest.mark.parametrize("data", [None, gaussian(50, 4)], ids=["rescaled", "refitted"])
    def test_without_an_edit_changes_nothing(self, data):
        first = plan(NET, data, sparsity=0.5)
        assert first.with_retained(first.to_frame()).to_json() == first.to_json()

    def test_says_which_numbers_were_edited_and_refuses_text(self):
        made = masks()
        table = made.to_frame()
        table.loc[0, "retained"] -= 1
        edited = made.with_retained(table)
        assert edited.table["reason"][0] == "edited"
        assert (edited.table["reason"][1:] == made.table["reason"][1:]).all()
        table["retained"] = table["retained"].astype(object)
        table.loc[0, "retained"] = "a"
        with pytest.raises(ValueError, match="is not a whole number"):
            made.with_retained(table)


class TestShown:
    @pytest.mark.parametrize(("method", "rule"), CASES)
    def test_on_one_line(self, method, rule):
        text = repr(make(method, rule))
        assert text.startswith(f"Plan(method='{method}', rule='{rule}', ")
        assert "sparsity=0.5" in text
        assert "\n" not in text

    @pytest.mark.parametrize(("method", "rule"), CASES)
    def test_as_a_table_of_layers(self, method, rule):
        console = Console(file=io.StringIO(), width=200)
        console.print(make(method, rule))
        text = console.file.getvalue()
        for name in make(method, rule).table["layer"].unique():
            assert name in text
        assert f"method {method}" in text

    def test_with_names_that_look_like_markup(self):
        state = {"a[/red].[bold]w": torch.eye(3)}
        console = Console(file=io.StringIO(), width=200)
        console.print(plan(state, tol=0.5))
        assert "a[/red].[bold]w" in console.file.getvalue()

    def test_layer_by_layer(self):
        frame = make("lq").layers()
        assert frame["layer"].tolist() == ["0.weight", "2.weight"]
        assert frame["units"].tolist() == [7, 3]
        assert frame["size"].tolist() == [28, 21]
        assert frame["retained"].sum() == 24
        np.testing.assert_allclose(frame["sparsity"], 1 - frame["retained"] / frame["size"])


class TestPlot:
    @pytest.mark.parametrize(("method", "rule"), CASES)
    def test_shows_every_layer_and_what_it_retains(self, method, rule):
        decided = make(method, rule)
        axes = decided.plot().axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            name.removesuffix(".weight") for name in decided.table["layer"].unique()
        ]
        widths = [bar.get_width() for bar in axes.patches]
        np.testing.assert_allclose(widths, 1 - decided.layers()["sparsity"])
        assert f"rule {rule}" in axes.get_title(loc="left")

    def test_of_a_plan_that_retains_nothing_is_drawn(self):
        empty = masks().with_retained(masks().to_frame().assign(retained=0))
        assert empty.plot().axes[0].get_xlim()[1] > 0


class TestChosenEntries:
    def chosen(self) -> Plan:
        return plan(NET, gaussian(20, 4), rule="wanda", sparsity=0.5)

    def test_counts_of_a_layer_chosen_one_by_one_are_fixed(self):
        first = self.chosen()
        table = first.to_frame()
        assert first.with_retained(table).to_json() == first.to_json()
        table.loc[0, "retained"] -= 1
        with pytest.raises(ValueError, match=r"layer '0\.weight' were chosen one by one"):
            first.with_retained(table)

    def test_that_disagree_with_the_counts_are_damaged(self):
        data = json.loads(self.chosen().to_json())
        data["table"]["retained"][0] += 1
        with pytest.raises(ValueError, match=r"damaged .*'0\.weight' keeps other entries"):
            Plan.from_json(json.dumps(data))

    def test_stay_and_others_go(self):
        first = self.chosen()
        pruned = apply(NET, first)
        for name, kept in first.kept.items():
            weight = NET.get_parameter(name).detach().numpy()
            layer = pruned[int(name[0])]
            np.testing.assert_array_equal(layer.weight.detach().numpy(), np.where(kept, weight, 0))
