"""The report: one HTML file with everything inside it, no script and no request to anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Protocol

import pandas as pd
from jinja2 import Environment, StrictUndefined


@dataclass(frozen=True)
class Picture:
    """An SVG drawing with the sentence that says what it shows."""

    svg: bytes
    caption: str

    @property
    def uri(self) -> str:
        """The drawing as a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode("ascii")


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, then tables and pictures; tables are shown as they are, numbers already text."""

    title: str
    text: str
    tables: Sequence[tuple[str, pd.DataFrame]] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Report:
    """What a report holds.

    Attributes:
        title: of the page.
        summary: the sentence a reader should take away.
        sections: in order.
        provenance: name → value, shown at the foot.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    provenance: dict[str, str] = field(default_factory=dict)


class Page(Protocol):
    """What shows itself as one HTML page."""

    def to_html(self) -> str:
        """Return the page."""
        ...


def render_report(report: Report) -> str:
    """Return the report as one HTML document.

    Numbers in tables are right-aligned, every table has a caption and column headers, every picture a text
    alternative. Light and dark follow the reader's setting; it prints in black on white.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("ellq.pruning").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(report=report, is_number=_is_number)


def _is_number(value: object) -> bool:
    text = str(value).replace(",", "").replace("%", "").strip()
    try:
        float(text)
    except ValueError:
        return text in ("–", "∞")
    return True
