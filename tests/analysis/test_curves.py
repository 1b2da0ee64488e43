"""Error curves: the error is enclosed, the bound is never below it and sharp where it should be; the pictures."""

import io
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from ellq.analysis.curves import COLUMNS, ORDERS
from ellq.analysis.curves_plot import draw_curves
from ellq.analysis.histogram import error_curves, histogram_profile
from oracles import best_term_error, quasinorm, stechkin_bound
from strategies import MODERATE, random_vector

seeds = st.integers(0, 2**32 - 1)
examples = settings(max_examples=25, deadline=None)


@examples
@given(seeds, st.integers(1, 30), st.sampled_from(["float64", "float32", "float16"]))
def test_errors_are_enclosed_and_never_above_the_bound(seed: int, size: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    state = {f"l{i}": random_vector(rng, size, MODERATE).astype(dtype)[None] for i in range(2)}
    frame = error_curves(state, orders=(0.3, 1.2), points=7)
    whole = np.concatenate([w.ravel() for w in state.values()])
    for name, w in (*((name, w.ravel()) for name, w in state.items()), ("", whole)):
        part = frame[frame["layer"] == name]
        assert part["retained"].is_monotonic_increasing
        assert part["retained"].iloc[[0, -1]].tolist() == [1, len(w)]
        norm = quasinorm(w, 2)
        for row in part.itertuples():
            assert row.fraction == row.retained / len(w)
            n = np.count_nonzero(w)
            if row.retained >= n:
                assert (row.error_low, row.error_high, row.bound) == (0, 0, 0)
                assert np.isnan(row.order)
                continue
            error = best_term_error(w, row.retained, 2) / norm
            assert row.error_low <= error <= row.error_high
            # For n non-zero entries the sharp constant is max (m − k)^(1/2) m^(−1/q) over k < m ≤ n.
            places = range(row.retained + 1, n + 1)
            constants = {
                q: max(mpf(m - row.retained) ** 0.5 * mpf(m) ** (-1 / mpf(q)) for m in places) for q in (0.3, 1.2)
            }
            bounds = {q: constant * quasinorm(w, q) / norm for q, constant in constants.items()}
            assert all(
                bound <= stechkin_bound(w, row.retained, q, 2) / norm * (1 + 1e-12) for q, bound in bounds.items()
            )
            assert row.bound >= bounds[row.order]
            assert row.bound <= min(bounds.values()) * (1 + 1e-4)  # as wide as float64's bins make it


def test_a_bound_one_percent_smaller_would_be_caught() -> None:
    # Equal magnitudes and k = d(1 − q/2) make the bound of order q an equality, but for k being whole.
    frame = error_curves({"w": np.ones((100, 100), dtype=np.float32)}, orders=(0.5,), points=401)
    ratio = (frame["bound"] / frame["error_low"])[frame["error_low"] > 0]
    assert 1 <= ratio.min() < 1.001


def test_more_orders_only_tighten_the_bound() -> None:
    w = {"w": np.random.default_rng(0).standard_t(3, (20, 20))}
    every, some = error_curves(w), error_curves(w, orders=(0.5, 1.0))
    assert (every["bound"] <= some["bound"]).all()
    assert every["order"].nunique() > 5
    assert set(every["order"].dropna()) <= set(ORDERS)


@examples
@given(seeds, st.integers(-100, 100))
def test_scale_signs_and_order_of_entries_change_nothing(seed: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    w = random_vector(rng, 40, MODERATE)
    other = np.ldexp(rng.permutation(w) * rng.choice([-1.0, 1.0], 40), power)
    one, two = (error_curves({"w": values[None]}, points=9) for values in (w, other))
    pd.testing.assert_frame_equal(one.drop(columns="order"), two.drop(columns="order"), rtol=1e-4)


def test_a_file_a_module_and_a_histogram_have_the_same_curves(tmp_path: Any) -> None:
    import torch
    from safetensors.torch import save_file

    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Linear(4, 3))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    frame = error_curves(model)
    assert list(frame) == list(COLUMNS)
    assert frame["layer"].drop_duplicates().tolist() == ["0.weight", "1.weight", ""]
    pd.testing.assert_frame_equal(frame, error_curves(tmp_path / "m.safetensors"))
    pd.testing.assert_frame_equal(frame, histogram_profile(model).curves())
    (alone,) = histogram_profile(model, by_layer=False).curves()["level"].unique()
    assert alone == "model"


@pytest.mark.parametrize("size", [1, 2, 3, 50, 10_000])
def test_the_points_reach_from_one_to_all(size: int) -> None:
    frame = error_curves({"w": np.ones((1, size))})
    ks = frame.loc[frame["level"] == "model", "retained"].tolist()
    assert ks[0] == 1
    assert ks[-1] == size
    assert ks == sorted(set(ks))
    assert len(ks) <= 36
    assert len(ks) >= min(size, 25)


def test_weights_at_the_ends_of_float64_have_curves() -> None:
    for scale in (5e-324, 1e-310, 1e300):
        frame = error_curves({"w": np.full((4, 25), scale)}, points=9)
        assert (frame["error_low"] <= np.sqrt(1 - frame["fraction"]) * (1 + 1e-12)).all()
        assert (np.sqrt(1 - frame["fraction"]) * (1 - 1e-12) <= frame["error_high"]).all()
        assert (frame["error_high"] <= 1).all()


def test_bad_arguments_are_refused_before_anything_is_read() -> None:
    source = {"w": object()}
    with pytest.raises(ValueError, match="orders is empty"):
        error_curves(source, orders=())
    with pytest.raises(ValueError, match="orders holds 2"):
        error_curves(source, orders=(0.5, 2))
    with pytest.raises(ValueError, match=r"orders holds 0\.5 twice"):
        error_curves(source, orders=(0.5, 0.5))
    with pytest.raises(TypeError, match=r"orders\[0\] must be one real number"):
        error_curves(source, orders=("x",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="points=1 "):
        error_curves(source, points=1)
    with pytest.raises(TypeError, match="points must be a whole number"):
        error_curves(source, points=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Weight 'bad' holds nan at index \[1, 0\]"):
        error_curves({"bad": np.array([[1.0], [np.nan]])})


@pytest.mark.parametrize("layers", [1, 2, 4, 9])
def test_the_picture_has_a_panel_for_the_model_and_up_to_five_layers(layers: int) -> None:
    before = dict(mpl.rcParams)
    rng = np.random.default_rng(0)
    frame = error_curves({f"l{i}.weight": rng.standard_normal((4, 9)) for i in range(layers)})
    figure = draw_curves(frame)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles[0] == "(model)"
    assert titles[1] == "l0"
    assert titles[-1] == f"l{layers - 1}"
    assert len(titles) == 1 + min(layers, 5)
    assert all(len(axes.lines) == 2 for axes in panels)
    assert panels[-1].get_xlabel()
    assert panels[0].get_ylabel()
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    assert dict(mpl.rcParams) == before


def test_the_picture_shows_named_layers_and_says_where_all_is_zero() -> None:
    frame = error_curves({"a": np.eye(4), "b": np.zeros((2, 2)), "c": np.ones((2, 2))})
    figure = draw_curves(frame, ["b"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["(model)", "b"]
    assert figure.axes[1].texts[0].get_text() == "all weights are 0"
    with pytest.raises(ValueError, match="layer 'd' has no error curve"):
        draw_curves(frame, ["d"])
