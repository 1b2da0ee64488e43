"""Contenders side by side, each in a fresh process, so that none finds a cache warm or memory taken by another.

A benchmark that uses this calls ``answered`` first: a process of its own is the same file with one task to run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy
import torch

Row = dict[str, Any]


def answered(run: Callable[[Row], Row]) -> bool:
    """Run the task this process was started for, print what it gave, and return True; False where there is none."""
    if sys.argv[1:2] != ["--child"]:
        return False
    print(json.dumps(run(json.loads(sys.argv[2]))))
    return True


def in_fresh_process(task: Row) -> Row:
    """Return what this benchmark gives for a task in a process of its own."""
    command = [sys.executable, sys.argv[0], "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: Row = json.loads(done.stdout)
    return result


def in_turn(
    case: str,
    contenders: Mapping[str, Row],
    rounds: int,
    *,
    by: Literal["seconds", "processor"] = "processor",
    size: int = 0,
    enough: float = math.inf,
) -> list[Row]:
    """Run every contender once a round and print the medians, beside those of the first.

    Args:
        case: what they all do.
        contenders: a task for each name; ours first.
        rounds: how often each is run.
        by: which time the ratios are of.
        size: bytes that are read, for a speed; 0 for none.
        enough: seconds of processor time from which one round is enough.
    """
    runs: dict[str, list[Row]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, task in contenders.items():
            if not turn or runs[name][0]["processor"] <= enough:
                runs[name].append(in_fresh_process(task))
    rows: list[Row] = []
    print(case)
    for name, results in runs.items():
        row = {"case": case, "contender": name, "error": results[0]["error"]}
        row |= {key: statistics.median(run[key] for run in results) for key in ("seconds", "processor")}
        row |= {"peak_mb": max(run["peak_mb"] for run in results)}
        rows.append(row)
        row["ratio_to_ours"] = row[by] / rows[0][by]
        times = [run["seconds"] for run in results]
        print(
            f"  {name:34s}{row['seconds']:9.4f} s (from {min(times):.4f} to {max(times):.4f}), processor"
            f" {row['processor']:9.4f} s   {row['ratio_to_ours']:7.2f} × ours   peak {row['peak_mb']:5.0f} MB"
            + (f"   {size / row['seconds'] / 1e9:5.2f} GB/s" if size else "")
            + ("" if row["error"] is None else f"   error {row['error']:.5g}")
        )
    print()
    return rows


def timed(work: Callable[[], Any], *, enough: float = math.inf) -> tuple[Row, Any]:
    """Return seconds, seconds of processors, the most memory this process ever had, and the result.

    After a run to warm up, the median of three; the first alone where it takes more than ``enough`` of a processor.
    """
    seconds, processor = [], []
    for _ in range(4):
        began, busy = time.perf_counter(), time.process_time()
        result = work()
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - busy)
        if processor[0] > enough:
            break
    kept = slice(1 if len(seconds) > 1 else 0, None)
    times = {"seconds": statistics.median(seconds[kept]), "processor": statistics.median(processor[kept])}
    return times | {"peak_mb": peak_bytes() / 1e6}, result


def peak_bytes() -> int:
    """Return the most memory this process ever had resident, pages of mapped files included."""
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM:"):  # getrusage would count the parent's too, from before the exec
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_machine() -> None:
    """Print the processor, its threads, how busy it is, and the versions."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    print(
        f"{model}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads,"
        f" {platform.platform()}"
    )
    versions = f"NumPy {np.__version__}, SciPy {scipy.__version__}, torch {torch.__version__}"
    print(f"Python {platform.python_version()}, {versions}\n")


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
