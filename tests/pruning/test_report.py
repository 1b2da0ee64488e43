from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from ellq.pruning.report import Picture, Report, Section, render_report

EVIL = '<script>alert("x")</script>&"\''
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><text>hi</text></svg>'


def page(text: str = "plain") -> str:
    table = pd.DataFrame({text: ["12.5%", "1,024", "–"], "name": [text, "b", "c"]})
    section = Section(text, text, tables=[(text, table)], pictures=[Picture(SVG, text)])
    return render_report(
        Report(text, text, [section, Section("empty", "", tables=[("none", table[:0])])], {text: text})
    )


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("text", ["plain", EVIL])
def test_asks_nothing_of_the_network_and_runs_nothing(text):
    html = page(text)
    assert "http" not in html
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    for tag, attributes in tags.found:
        assert not any(name.startswith("on") for name in attributes)
        assert "href" not in attributes
        if tag == "img":
            assert base64.b64decode(attributes["src"].removeprefix("data:image/svg+xml;base64,")) == SVG
            assert attributes["alt"] == text


def test_shows_text_as_it_is():
    html = page(EVIL)
    assert EVIL not in html
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&amp;&#34;&#39;" in html
    assert re.search(r"<t[dh][^>]*>&lt;script", html)


def test_aligns_numbers_right_and_words_left():
    html = page()
    for shown in ("12.5%", "1,024", "–"):
        assert f'<td class="number">{shown}</td>' in html
    assert "<td>b</td>" in html
    assert re.search(r'<th scope="col" class="number">plain</th>', html)
    assert '<th scope="col">name</th>' in html
