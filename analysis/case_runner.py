"""Many independent cases, computed side by side and kept as they come: what is done is not done again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from ellq.analysis.files import write_text
from ellq.analysis.progress import track

Case = Mapping[str, Any]
Rows = list[dict[str, Any]]


def run_cases(
    compute: Callable[[Case], Rows], cases: Sequence[Case], folder: str | os.PathLike[str], *, jobs: int, task: str
) -> Rows:
    """Compute the rows of every case, those of earlier runs read from the folder, and return them in order.

    Every case ends in a file of its own, written whole or not at all; whenever the run is stopped, the next one with
    the same folder does what is left. The result depends neither on ``jobs`` nor on the order in which cases end:
    each is computed by a single thread.

    Args:
        compute: what to do with one case; a function of a module, for other processes import it.
        cases: settings that JSON holds, all different.
        folder: where finished cases are kept; made if it does not exist.
        jobs: how many processes, ≥ 1; with 1 the work is done in this one.
        task: says what is being done, beside the progress bar; part of what identifies a case.

    Returns:
        The rows of all cases, in the order of ``cases``.

    Raises:
        ValueError: jobs < 1.
        OSError: the folder cannot be written.
        Exception: whatever ``compute`` raises; cases that ended before are kept.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} is below 1. Pass how many processes to use.")
    places = [Path(folder) / f"{_digest(case, task)}.json" for case in cases]
    rows = [_read(place, case) for place, case in zip(places, cases, strict=True)]
    left = [i for i, known in enumerate(rows) if known is None]
    jobs = min(jobs, max(len(left), 1))
    ended = _inline(compute, cases, left) if jobs == 1 else _in_processes(compute, cases, left, jobs)
    for i, found in track(ended, task, total=len(left)):
        # Through JSON either way, so that a resumed run returns what an unbroken one does.
        text = json.dumps({"case": dict(cases[i]), "rows": found})
        write_text(places[i], text)
        rows[i] = json.loads(text)["rows"]
    return [row for of_case in rows for row in of_case or []]


def _digest(case: Case, task: str) -> str:
    return hashlib.sha256(json.dumps([task, dict(case)], sort_keys=True).encode()).hexdigest()[:24]


def _read(place: Path, case: Case) -> Rows | None:
    """Return the rows of a finished case; None where there is none, or a file that is not one."""
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        return list(kept["rows"]) if kept["case"] == json.loads(json.dumps(dict(case))) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _inline(compute: Callable[[Case], Rows], cases: Sequence[Case], left: list[int]) -> Iterator[tuple[int, Rows]]:
    for i in left:
        with _one_thread():
            found = compute(cases[i])
        yield i, found


def _in_processes(
    compute: Callable[[Case], Rows], cases: Sequence[Case], left: list[int], jobs: int
) -> Iterator[tuple[int, Rows]]:
    others = set(multiprocessing.active_children())
    # Spawned: a forked process inherits locks that threads of this one may hold.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        futures = {pool.submit(compute, cases[i]): i for i in left}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BaseException:
        # What is being computed may last for long and would be thrown away.
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    pool.shutdown()


def _begin() -> None:
    """Make a process a quiet worker: one thread, no progress bars, and the parent decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    torch.set_num_threads(1)
    threadpool_limits(1)


def _end_with_the_parent() -> None:
    """End this process when its parent has, which may have been killed and then told nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
