"""The README's code runs and prints what the README says it prints, digits aside."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def _shape(text):
    """The text with all numbers and all runs of space made equal: training differs a little between machines."""
    return re.sub(r"[\s─━]+", " ", re.sub(r"\d[\d.,e+]*", "#", text)).strip()


def test_quick_start_prints_what_the_readme_shows(tmp_path):
    script = tmp_path / "quick_start.py"
    script.write_text(_blocks("python")[0], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert _shape(done.stdout) == _shape(_blocks("text")[0])


def test_every_linked_file_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_every_statement_is_in_the_readme():
    from ellq.theory import registry

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in registry():
        assert f"| `{name}` |" in text, name


def test_every_statement_is_proved_in_the_docs():
    from ellq.theory import registry

    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("theorems*.md"))
    titles = " ".join(re.findall(r"(?m)^##+ (.*)$", pages))
    for name in registry():
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", titles), name
