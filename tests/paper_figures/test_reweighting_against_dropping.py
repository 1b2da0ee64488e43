import numpy as np
import pandas as pd
import pytest
import torch

from ellq.analysis import mlp
from ellq.paper_figures import render
from ellq.paper_figures import reweighting_against_dropping as figure
from ellq.paper_figures.reweighting_against_dropping import DROPPING, LAW, NET, REFIT, REWEIGHTING

COLUMNS = ["panel", "case", "method", "retained", "error", "bound"]
COUNTS = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def table():
    torch.manual_seed(0)
    inputs = torch.rand(200, 64)
    rows = [*figure.power_law_rows(200, COUNTS), *figure.unit_rows(mlp(64, 48, outputs=3), inputs, COUNTS)]
    return pd.DataFrame(rows, columns=COLUMNS)


def curve(table, panel, case, method):
    rows = table[(table["panel"] == panel) & (table["case"] == case) & (table["method"] == method)]
    return rows.set_index("retained")["error"]


def test_every_panel_case_method_and_count_has_one_row(table):
    assert not table.duplicated(["panel", "case", "method", "retained"]).any()
    assert len(table) == len(COUNTS) * (3 * 2 + 3 * 3)


def test_no_error_exceeds_its_bound(table):
    proved = table[table["method"] != REFIT]
    assert (proved["error"] <= proved["bound"]).all()
    assert table.loc[table["method"] == REFIT, "bound"].isna().all()


def test_reweighting_is_never_worse_than_dropping_and_refitting_is_best_on_a_net(table):
    for panel, cases in ((LAW, figure.CORRELATIONS), (NET, range(3))):
        for case in cases:
            assert (curve(table, panel, case, REWEIGHTING) <= curve(table, panel, case, DROPPING) * (1 + 1e-9)).all()
    for unit in range(3):
        assert (curve(table, NET, unit, REFIT) < curve(table, NET, unit, REWEIGHTING)).all()


def test_slopes_are_those_proved(table):
    for rho, method, rate in ((0.0, DROPPING, -1.5), (1.0, DROPPING, -1.0), (0.5, REWEIGHTING, -1.5)):
        errors = curve(table, LAW, rho, method)
        assert figure.slope(errors.index, errors) == pytest.approx(rate, abs=0.15)


def test_slope_of_a_power_law_is_its_exponent():
    assert figure.slope([1, 2, 4], [3.0, 0.75, 0.1875]) == pytest.approx(-2.0)


def test_drawing_shows_both_panels_and_leaves_rounding_out(table):
    drawn = figure.draw(table)
    left, right = drawn.axes
    assert [axes.get_yscale() for axes in (left, right)] == ["log", "log"]
    assert len(left.lines) == 5
    assert len(right.lines) == 4
    lowest = min(float(np.min(line.get_ydata())) for line in left.lines)
    assert lowest > figure.ROUNDING
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert sum("(−1.5)" in label for label in labels) == 2
    assert render(drawn, "png").startswith(b"\x89PNG")


def test_drawing_does_not_change_the_table(table):
    before = table.copy()
    figure.draw(table)
    pd.testing.assert_frame_equal(table, before)
