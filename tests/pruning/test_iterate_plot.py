from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ellq.pruning.iterate_plot import draw_accuracy, draw_flows, draw_frontier, draw_iterated, draw_stops

ITERATIONS = pd.DataFrame(
    {
        "iteration": [0, 1, 2, 3],
        "sparsity": [0.0, 0.5, 0.75, 0.99],
        "epochs": [2, 3, 1, 2],
        "stop": ["warm-up", "cap", "flow", "accuracy"],
        "accuracy": [0.9, 0.91, 0.89, 0.5],
    }
)
EPOCHS = pd.DataFrame(
    {
        "iteration": [0, 0, 1, 1, 1, 2, 3, 3],
        "epoch": [1, 2, 1, 2, 3, 1, 1, 2],
        "accuracy": [0.5, 0.9, 0.8, math.nan, 0.91, 0.89, 0.4, 0.5],
    }
)


def flows(entries: int, *monitors: str) -> pd.DataFrame:
    checks = EPOCHS[(EPOCHS["iteration"] > 0) & EPOCHS["accuracy"].notna()]
    return pd.DataFrame(
        [
            (row.iteration, row.epoch, name, f"{entry} → {entry + 1}", 0.1 * entry + 0.01 * row.epoch, 0.1 * entry)
            for row in checks.itertuples()
            for name in monitors
            for entry in range(entries)
        ],
        columns=["iteration", "epoch", "monitor", "entry", "value", "reference"],
    )


def axes():
    return Figure().add_subplot()


@pytest.mark.parametrize("monitors", [(), ("absolute",), ("absolute", "gradient"), ("a", "b", "c")])
@pytest.mark.parametrize("entries", [1, 4, 20])
def test_a_run_has_three_panels_and_one_for_each_monitor(monitors, entries):
    figure = draw_iterated(ITERATIONS, EPOCHS, flows(entries, *monitors), 0.9)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert len(titles) == 3 + len(monitors)
    assert all(any(title.startswith(name) for title in titles) for name in monitors)
    figure.canvas.draw()


def test_a_run_that_failed_at_once_can_be_drawn():
    figure = draw_iterated(ITERATIONS[:0], EPOCHS[:0], flows(0), math.nan)
    figure.canvas.draw()
    draw_iterated(ITERATIONS[:1], EPOCHS[:2], flows(0), 0.9).canvas.draw()


def test_accuracy_is_drawn_at_the_checks_over_all_epochs():
    panel = axes()
    draw_accuracy(panel, EPOCHS, 0.9)
    lines = [line.get_xydata() for line in panel.lines[:4]]
    np.testing.assert_allclose(lines[0], [[1, 0.5], [2, 0.9]])
    np.testing.assert_allclose(lines[1], [[3, 0.8], [5, 0.91]])
    np.testing.assert_allclose(lines[3], [[7, 0.4], [8, 0.5]])
    assert panel.lines[4].get_ydata()[0] == 0.9


def test_the_frontier_is_accuracy_over_what_is_retained():
    panel = axes()
    draw_frontier(panel, ITERATIONS, 0.9)
    np.testing.assert_allclose(panel.lines[0].get_xydata(), np.c_[1 - ITERATIONS["sparsity"], ITERATIONS["accuracy"]])
    assert panel.get_xlim()[0] > 1 > 0.01 > panel.get_xlim()[1]


def test_stops_are_bars_of_the_epochs_used_named_by_the_reason():
    panel = axes()
    draw_stops(panel, ITERATIONS)
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["cap", "flow", "accuracy"]
    assert sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in panel.patches) == [
        (1, 3),
        (2, 1),
        (3, 2),
    ]


def test_flows_are_lines_by_entry_that_break_where_an_iteration_begins():
    panel = axes()
    draw_flows(panel, flows(2, "absolute"), EPOCHS)
    drawn = [line for line in panel.lines if line.get_marker() == "."]
    assert len(drawn) == 2 * 3
    np.testing.assert_allclose(drawn[0].get_xydata(), [[3, 0.01], [5, 0.03]])
    np.testing.assert_allclose(drawn[3].get_xydata(), [[3, 0.11], [5, 0.13]])
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["0 → 1", "1 → 2"]
