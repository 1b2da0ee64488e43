"""How fast weights are measured: power sums of a matrix's rows, and histogram profiles of checkpoints on disk.

Every contender runs in a fresh process, in turn, several rounds; times are medians, memory is the process's peak.

    python benchmarks/bench_measure.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import answered, in_turn, print_machine, timed
from safetensors import safe_open
from safetensors.torch import save_file

ORDERS = [round(0.1 * i, 1) for i in range(1, 10)]
UNEVEN = [0.1, 0.25, 0.33, 0.4, 0.5, 0.61, 0.75, 0.87, 0.95]
Contender = Callable[[dict[str, Any]], tuple[Callable[[], Any], Callable[[Any], float | None]]]


def main() -> None:
    """Run all cases, print the tables, write the rows."""
    if answered(run_alone):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the matrix, a twentieth of the file")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    print_machine()
    rounds = 3 if options.quick else 5
    rows = bench_rows(2048 if options.quick else 8192, rounds)
    with tempfile.TemporaryDirectory(prefix="ellq-bench-") as folder:
        width, layers = (2048, 12) if options.quick else (8192, 15)
        rows += bench_file(Path(folder), width, layers, rounds)
        rows += bench_growth(Path(folder), width, rounds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def bench_rows(n: int, rounds: int) -> list[dict[str, Any]]:
    """Nine orders for every row of an n×n float32 matrix."""
    rows = []
    for label, orders in (("0.1, 0.2, … 0.9", ORDERS), ("uneven", UNEVEN)):
        contenders = {
            "power_sums_fast": {"kind": "ours", "n": n, "orders": orders},
            "torch.linalg.vector_norm": {"kind": "vector_norm", "n": n, "orders": orders},
        }
        rows += in_turn(f"9 orders ({label}), rows of {n}×{n} float32", contenders, rounds, by="seconds")
    return rows


def bench_file(folder: Path, width: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """One pass over a bfloat16 checkpoint: its histograms, and the plain sum of its tensors."""
    file = write_checkpoint(folder, width, layers)
    try:
        contenders = {
            "histogram_profile": {"kind": "histogram", "file": str(file)},
            "tensor.sum()": {"kind": "sum", "file": str(file)},
        }
        case = f"bfloat16 checkpoint of {layers * width**2 / 1e9:.3g}e9 parameters"
        rows = in_turn(case, contenders, rounds, by="seconds", size=file.stat().st_size)
    finally:
        file.unlink()
    print(f"  largest tensor {2 * width**2 / 1e6:.0f} MB; sum ÷ ours = {rows[1]['seconds'] / rows[0]['seconds']:.2f}\n")
    return rows


def bench_growth(folder: Path, width: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds against parameters, and the line through them."""
    rows = []
    for layers in (1, 2, 4, 8):
        file = write_checkpoint(folder, width, layers)
        try:
            one = {"histogram_profile": {"kind": "histogram", "file": str(file)}}
            case = f"histogram of {layers * width**2 / 1e6:.4g}e6 parameters"
            rows += in_turn(case, one, rounds, by="seconds", size=file.stat().st_size)
        finally:
            file.unlink()
    sizes = np.array([1, 2, 4, 8]) * width**2 / 1e9
    seconds = np.array([row["seconds"] for row in rows])
    slope, start = np.polyfit(sizes, seconds, 1)
    off = np.max(np.abs(slope * sizes + start - seconds) / seconds)
    r2 = 1 - np.sum((slope * sizes + start - seconds) ** 2) / np.sum((seconds - seconds.mean()) ** 2)
    print(f"  seconds = {start:.3f} + {slope:.3f} per 1e9 parameters, R² = {r2:.4f}, at most {off:.1%} off\n")
    return rows


def run_alone(task: dict[str, Any]) -> dict[str, Any]:
    """Run one contender in this process."""
    work, error = CONTENDERS[task["kind"]](task)
    row, result = timed(work)
    return row | {"error": error(result)}


def _matrix(n: int) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(0)).mul_(0.02)


def _norm_error(w: torch.Tensor, orders: list[float], norms: list[np.ndarray]) -> float:
    """Return the largest relative error of the quasi-norms of the first 256 rows against float64."""
    exact = w[:256].double().abs_()
    references = [exact.pow(q).sum(dim=1).pow(1 / q).numpy() for q in orders]
    return max(float(np.max(np.abs(a[:256] / b - 1))) for a, b in zip(norms, references, strict=True))


def _ours(task: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], float | None]]:
    from ellq.theory.power_kernel import power_sums_fast

    w, orders = _matrix(task["n"]), task["orders"]
    return lambda: power_sums_fast(w, orders), lambda sums: _norm_error(w, orders, [sums.quasinorm(q) for q in orders])


def _vector_norm(task: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], float | None]]:
    w, orders = _matrix(task["n"]), task["orders"]

    def work() -> list[torch.Tensor]:
        return [torch.linalg.vector_norm(w, ord=q, dim=1) for q in orders]

    return work, lambda norms: _norm_error(w, orders, [norm.double().numpy() for norm in norms])


def _histogram(task: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], float | None]]:
    from ellq.analysis.histogram import histogram_profile

    return lambda: histogram_profile(task["file"]), lambda _: None


def _sum(task: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], float | None]]:
    def work() -> float:
        with safe_open(task["file"], framework="pt") as file:
            return sum(float(file.get_tensor(name).sum()) for name in file.keys())  # noqa: SIM118

    return work, lambda _: None


CONTENDERS: dict[str, Contender] = {"ours": _ours, "vector_norm": _vector_norm, "histogram": _histogram, "sum": _sum}


def write_checkpoint(folder: Path, width: int, layers: int) -> Path:
    """Write a bfloat16 checkpoint of square matrices of normal weights."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"layers.{i}.weight": torch.randn(width, width, generator=generator).mul_(0.02).bfloat16()
        for i in range(layers)
    }
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


if __name__ == "__main__":
    main()
