from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ellq.analysis.case_runner import run_cases

CASES = [{"number": number} for number in range(7)]


def squares(case):
    """Two rows a case, one with a value JSON itself does not know."""
    number = case["number"]
    return [
        {"number": number, "square": number**2, "root": math.sqrt(number)},
        {"number": math.nan, "threads": torch.get_num_threads()},
    ]


def process(case):
    return [{"process": os.getpid()}]


def fails_on_three(case):
    if case["number"] == 3:
        raise ValueError("three is refused")
    return squares(case)


def never(case):
    raise AssertionError("computed again")


def slow(case):
    time.sleep(0.3 if case["number"] < 2 else 600)
    return [dict(case)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_text(rows):
    return json.dumps(rows)


class TestRows:
    def test_come_in_the_order_of_the_cases_however_many_processes_there_are(self, tmp_path):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            alone = run_cases(squares, CASES, tmp_path / "alone", jobs=1, task="t")
            shared = run_cases(squares, CASES, tmp_path / "shared", jobs=2, task="t")
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)
        assert [row["square"] for row in alone[::2]] == [number**2 for number in range(7)]
        assert {row["threads"] for row in alone[1::2]} == {1}
        assert as_text(alone) == as_text(shared)
        assert contents(tmp_path / "alone") == contents(tmp_path / "shared")

    def test_of_finished_cases_are_not_computed_again(self, tmp_path):
        first = run_cases(squares, CASES[:4], tmp_path, jobs=1, task="t")
        assert as_text(run_cases(never, CASES[:4], tmp_path, jobs=1, task="t")) == as_text(first)
        assert as_text(run_cases(squares, CASES, tmp_path, jobs=1, task="t")[:8]) == as_text(first)

    def test_of_another_task_are_not_taken_for_these(self, tmp_path):
        run_cases(squares, CASES, tmp_path, jobs=1, task="t")
        with pytest.raises(AssertionError, match="computed again"):
            run_cases(never, CASES, tmp_path, jobs=1, task="other")

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", '{"case": {"number": 0}}', '{"case": {"number": 99}, "rows": []}']
    )
    def test_of_a_damaged_file_are_computed_again(self, tmp_path, content):
        first = run_cases(squares, CASES, tmp_path, jobs=1, task="t")
        for path in tmp_path.iterdir():
            path.write_text(content)
        assert as_text(run_cases(squares, CASES, tmp_path, jobs=1, task="t")) == as_text(first)

    def test_survive_the_failure_of_a_later_case(self, tmp_path):
        with pytest.raises(ValueError, match="three is refused"):
            run_cases(fails_on_three, CASES, tmp_path, jobs=1, task="t")
        assert len(contents(tmp_path)) == 3

    def test_of_no_cases_are_none(self, tmp_path):
        assert run_cases(squares, [], tmp_path, jobs=2, task="t") == []


class TestProcesses:
    def test_are_ours_alone_where_one_case_is_left(self, tmp_path):
        assert run_cases(process, CASES[:1], tmp_path, jobs=8, task="t") == [{"process": os.getpid()}]

    @pytest.mark.parametrize("jobs", [0, -1])
    def test_fewer_than_one_are_refused(self, tmp_path, jobs):
        with pytest.raises(ValueError, match=f"jobs={jobs} is below 1"):
            run_cases(squares, CASES, tmp_path, jobs=jobs, task="t")

    @pytest.mark.slow
    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
    def test_end_when_the_run_is_interrupted_or_killed_and_what_was_done_is_kept(self, tmp_path, how):
        script = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from test_case_runner import CASES, run_cases, slow\n"
            "if __name__ == '__main__':\n"
            "    run_cases(slow, CASES, sys.argv[2], jobs=2, task='t')\n"
        )
        (tmp_path / "script.py").write_text(script)
        folder = tmp_path / "cases"
        command = [sys.executable, str(tmp_path / "script.py"), os.path.dirname(__file__), str(folder)]
        # A session of its own, to see that no process of it is left; a job in the background ignores Ctrl-C.
        run = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not (folder.is_dir() and len(list(folder.iterdir())) == 2):
                time.sleep(0.1)
            run.send_signal(how)
            _, errors = run.communicate(timeout=20)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
        assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
        assert len([path for path in folder.iterdir() if path.suffix == ".json"]) == 2
        for _ in range(50):
            if not _session(run.pid):
                return
            time.sleep(0.1)
        raise AssertionError(f"processes {_session(run.pid)} are left")


def _session(leader: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields and int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(name))
    return found
