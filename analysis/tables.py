"""How results show themselves: one table for terminals, plain text, notebooks and JSON."""

from __future__ import annotations

import html
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from ellq.analysis.files import write_text

MODEL = "(model)"  # the name of the last row
_REMARKS = 8


@dataclass(frozen=True)
class ResultTable:
    """A title, rows of text of which the last is the whole model's, and remarks below.

    Attributes:
        title: one line.
        rows: text ready to be shown, a row per layer; its index holds the layers' names.
        remarks: sentences below the table, of which at most eight are shown.
    """

    title: str
    rows: pd.DataFrame
    remarks: Sequence[str] = ()

    def rich(self) -> Table:
        """Return the table for a terminal, where long names fold."""
        caption = self._caption()
        table = Table(
            title=Text(self.title),
            title_justify="left",
            caption=Text(caption) if caption else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("layer", overflow="fold")
        for heading in self.rows.columns:
            table.add_column(Text(str(heading)), justify="left" if heading == "shape" else "right", no_wrap=True)
        for place, (name, row) in enumerate(
            zip(self.rows.index, self.rows.itertuples(index=False, name=None), strict=True)
        ):
            cells = (Text(str(cell)) for cell in row)
            table.add_row(Text(str(name).removesuffix(".weight")), *cells, end_section=place == len(self.rows) - 2)
        return table

    def text(self) -> str:
        """Return the table as plain text."""
        return "\n".join(filter(None, (self.title, self.rows.to_string(), self._caption())))

    def html(self) -> str:
        """Return the table as HTML, with names escaped."""
        return f"<p>{html.escape(self.title)}</p>{self.rows.to_html()}<p>{html.escape(self._caption())}</p>"

    def _caption(self) -> str:
        more = len(self.remarks) - _REMARKS
        return "\n".join([*self.remarks[:_REMARKS], *([f"and {more} more"] if more > 0 else [])])


class Shown(Protocol):
    """What shows itself as a table: in a terminal by rich, as plain text, and in a notebook."""

    @abstractmethod
    def _table(self) -> ResultTable: ...

    def __rich__(self) -> Table:
        return self._table().rich()

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()


class Framed(Shown, Protocol):
    """What shows itself as a table and holds a frame.

    Attributes:
        frame: all its numbers.
    """

    frame: pd.DataFrame

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the frame as CSV, whole or not at all; a missing value is an empty field.

        Raises:
            OSError: the place cannot be written.
        """
        write_text(path, self.frame.to_csv(index=False, lineterminator="\n"))


class ByLayer(Framed, Protocol):
    """What holds a frame with a row per layer, and last one for the whole model; its column ``level`` says which."""

    @property
    def layers(self) -> pd.DataFrame:
        """The rows of the layers."""
        return self.frame[self.frame["level"] == "layer"].reset_index(drop=True)

    @property
    def model(self) -> pd.Series[Any]:
        """The row of the whole model."""
        return self.frame.iloc[-1]


def remarks_on_weights(
    notes: Iterable[tuple[str, str]], tied: Mapping[str, str], skipped: Mapping[str, str]
) -> list[str]:
    """Return what a table of layers cannot show: converted, tied and skipped tensors.

    Args:
        notes: (name, how it was converted) of every weight; an empty note says nothing.
        tied: name → the earlier name of the same tensor.
        skipped: name → why it was not measured.
    """
    remarks = [f"{name}: {note}" for name, note in notes if note]
    remarks += [f"{name} is tied to {first}" for name, first in tied.items()]
    return remarks + [f"{name} skipped: {reason}" for name, reason in skipped.items()]


def plain_rows(frame: pd.DataFrame) -> list[list[Any]]:
    """Return the rows of a frame as Python values that JSON holds, None where a value is missing."""
    return [list(row) for row in zip(*(_plain(frame[name]) for name in frame), strict=True)]


def _plain(column: pd.Series[Any]) -> list[Any]:
    missing = column.isna().to_numpy()
    return [None if is_missing else value for value, is_missing in zip(column.tolist(), missing, strict=True)]
