from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ellq.analysis import datasets
from ellq.analysis.verify_id import BOUNDS
from ellq.pruning import verify_nets
from ellq.pruning.verify_nets import QUICK, Grid, full_grid, verify_id

SMALL = Grid(
    ("gaussian", "digits"),
    activations=("tanh",),
    widths=(8, 12),
    samples=(50, 200),
    fractions=(0.25, 0.5),
    tolerances=(0.2,),
    repeats=1,
)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Fewer fresh inputs and steps of training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_nets, "FRESH", 1000)
        patch.setattr(verify_nets, "_STEPS", 300)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("verification")
    return verify_id(folder, grid=SMALL, seed=3), folder


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestWrites:
    def test_a_row_per_trial_rule_and_width(self, done):
        result, folder = done
        assert len(result.frame) == 2 * 2 * 2 * 2 * 3
        written = pd.read_csv(folder / "cases.csv", keep_default_na=False, na_values=[""])
        assert written.columns.tolist() == result.frame.columns.tolist()
        assert written.columns[:7].tolist() == ["data", "activation", "width", "seed", "n", "rule", "tol"]
        assert {f"bound_{name}" for name in BOUNDS} <= set(written.columns)
        for name in ("risk", "bound_halves"):
            assert np.array_equal(written[name], result.frame[name])
        assert set(written["seed"]) == {3}

    def test_verdicts_rates_and_pictures(self, done):
        result, folder = done
        names = {"cases.csv", "verdicts.csv", "rates_samples.csv", "rates_widths.csv"}
        assert set(files(folder)) == names | {"slack.png", "samples.png", "widths.png"}
        verdicts = pd.read_csv(folder / "verdicts.csv")
        assert set(verdicts["data"]) == {"all", "gaussian", "digits"}
        assert result.holds
        assert verdicts["holds"].all()
        assert result.verdicts["trials"].max() == 8

    def test_the_same_files_again_without_computing(self, done, monkeypatch):
        _, folder = done
        before = files(folder)
        for name in ("verify_net", "train_classifier"):
            monkeypatch.setattr(verify_nets, name, None)
        verify_id(folder, grid=SMALL, seed=3)
        assert files(folder) == before

    def test_the_same_rows_in_another_order_of_the_grid_or_in_parts(self, done, tmp_path):
        result, _ = done
        part = replace(SMALL, data=("digits",), widths=(12,))
        alone = verify_id(tmp_path, grid=part, seed=3).frame
        expected = result.frame[(result.frame["data"] == "digits") & (result.frame["width"] == 12)]
        pd.testing.assert_frame_equal(alone, expected.reset_index(drop=True), check_exact=True)


class TestDraws:
    def trial(self, **changes):
        return {"data": "digits", "activation": "tanh", "width": 8, "seed": 0, "n": 40} | changes

    def test_share_no_example_nor_depend_on_anything_but_the_trial(self):
        first, again = (verify_nets._draws(self.trial()) for _ in range(2))
        rows = [{row.numpy().tobytes() for row in part} for part in (first.choice, first.held_out, first.fresh)]
        fit = {row.numpy().tobytes() for row in verify_nets._parts("digits")["fit"].inputs()}
        assert [len(part) for part in rows[:2]] == [40, 40]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not rows[a] & rows[b]
        assert not any(part & fit for part in rows)
        assert torch.equal(first.choice, again.choice)

    @pytest.mark.parametrize("data", ["gaussian", "uniform"])
    def test_of_random_nets_differ_between_trials(self, data):
        base = verify_nets._draws(self.trial(data=data))
        for change in ({"n": 41}, {"seed": 1}, {"width": 9}, {"activation": "relu"}):
            other = verify_nets._draws(self.trial(data=data, **change))
            assert not torch.equal(base.choice[:40], other.choice[:40])
        assert base.low <= float(base.fresh.min()) < float(base.fresh.max()) <= base.high
        assert base.fresh.std() == pytest.approx(1.0 if data == "gaussian" else 3**-0.5, rel=0.02)

    def test_the_test_part_is_what_the_bounds_of_trained_nets_are_tried_on(self):
        assert len(verify_nets._draws(self.trial()).fresh) == len(datasets.load("digits", "test"))


class TestNets:
    def test_are_trained_once_and_kept(self, tmp_path):
        trial = {"data": "digits", "activation": "relu", "width": 8, "seed": 0}
        first = verify_nets._net(trial, str(tmp_path))
        again = verify_nets._net(trial, str(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        (tmp_path / "digits-relu-8-0.safetensors").write_bytes(b"damaged")
        third = verify_nets._net(trial, str(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))
        test = datasets.load("digits", "test")
        with torch.no_grad():
            assert (first(test.inputs()).argmax(1).numpy() == test.labels).mean() > 0.4


class TestGrids:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"data": ("cifar",)}, "data='cifar' is unknown"),
            ({"activations": ("softplus",)}, "activations='softplus' is unknown"),
            ({"widths": ()}, "widths of the grid is empty"),
            ({"widths": (1,)}, "must be at least 2, 4 and 1"),
            ({"samples": (3,)}, "must be at least 2, 4 and 1"),
            ({"repeats": 0}, "must be at least 2, 4 and 1"),
            ({"fractions": (1.0,)}, "fractions"),
            ({"tolerances": (0.0,)}, "tolerances"),
            ({"data": ("digits",), "samples": (10**6,)}, "holds no trial"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, tmp_path, change, match):
        with pytest.raises(ValueError, match=match):
            verify_id(tmp_path / "out", grid=replace(SMALL, **change))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("settings", [{"delta": 0.0}, {"delta": 1.5}, {"jobs": 0}])
    def test_with_arguments_out_of_range_are_refused(self, tmp_path, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            verify_id(tmp_path / "out", grid=SMALL, **settings)

    def test_leave_out_choices_larger_than_a_data_set(self):
        trials = verify_nets._trials(replace(QUICK, data=("digits",)), 0, 0.05)
        assert {trial["n"] for trial in trials} == {100, 300}

    def test_of_all_cover_what_is_on_this_machine(self):
        grid = full_grid()
        assert grid.data[:3] == ("gaussian", "uniform", "digits")
        assert (min(grid.widths), max(grid.widths)) == (32, 4096)
        assert grid.activations == ("relu", "gelu", "tanh", "sigmoid")

    def test_name_a_data_set_that_is_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ELLQ_DATA", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        verify_nets._parts.cache_clear()
        with pytest.raises(FileNotFoundError, match="mnist"):
            verify_id(tmp_path / "out", grid=replace(SMALL, data=("mnist",)))


@pytest.mark.slow
@pytest.mark.skipif("ELLQ_DATA" not in os.environ, reason="ELLQ_DATA names no folder of data sets")
def test_trained_on_fashion_mnist_no_bound_is_broken(tmp_path):
    grid = replace(SMALL, data=("fashion-mnist",), widths=(16,), samples=(300,), activations=("relu",))
    assert verify_id(tmp_path, grid=grid).holds


@pytest.mark.slow
def test_the_quick_grid_in_two_processes_breaks_no_bound(tmp_path):
    result = verify_id(tmp_path / "two", grid=replace(QUICK, activations=("relu", "sigmoid"), repeats=1), jobs=2)
    assert result.holds
    assert (result.verdicts["violated"] <= result.verdicts["allowed"]).all()
    near = result.verdicts.set_index("bound")["median_slack"]
    assert near["held_out_clipped"] < 2 < near["halves"] < near["bernstein"]
