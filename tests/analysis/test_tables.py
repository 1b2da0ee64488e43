"""Result tables: the same content on a terminal, as text and as HTML; names are escaped and nothing is lost in JSON."""

import io

import numpy as np
import pandas as pd
from rich.console import Console

from ellq.analysis.tables import MODEL, ResultTable, plain_rows, remarks_on_weights


def _shown(table: ResultTable, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table.rich())
    return stream.getvalue()


ROWS = pd.DataFrame(
    {"shape": ["2×3", ""], "[bold]share": ["<b>1%", "2%"]}, index=pd.Index(["[red]a.weight", MODEL], name="layer")
)


def test_the_same_content_is_shown_everywhere() -> None:
    table = ResultTable("a [title] <i>", ROWS, ["remark & more"])
    for text in (_shown(table), table.text()):
        for part in ("a [title] <i>", "[red]a", MODEL, "2×3", "[bold]share", "<b>1%", "2%", "remark & more"):
            assert part in text
    html = table.html()
    assert "<i>" not in html
    assert "<b>1" not in html
    assert "remark &amp; more" in html
    assert ".weight" not in _shown(table)


def test_only_eight_remarks_are_shown_and_the_others_counted() -> None:
    table = ResultTable("t", ROWS, [f"remark {i}" for i in range(11)])
    assert "remark 7\nand 3 more" in table.text()
    assert "remark 8" not in table.text()
    assert "more" not in ResultTable("t", ROWS, ["one"]).text()


def test_remarks_name_what_a_table_of_layers_cannot_show() -> None:
    remarks = remarks_on_weights([("a", ""), ("b", "filled")], {"c": "a"}, {"d": "a buffer"})
    assert remarks == ["b: filled", "c is tied to a", "d skipped: a buffer"]


def test_rows_for_json_are_plain_values_and_missing_ones_none() -> None:
    frame = pd.DataFrame({"a": np.array([1, 2]), "b": [np.nan, 0.1], "c": pd.array([None, 3], dtype="Int64")})
    rows = plain_rows(frame)
    assert rows == [[1, None, None], [2, 0.1, 3]]
    assert [type(value) for value in rows[1]] == [int, float, int]
