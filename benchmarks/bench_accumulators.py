"""How fast samples are accumulated, in how much memory, and how many digits are left.

Every contender runs in a fresh process, in turn, three rounds; times are medians, memory is the process's peak.
Beside the seconds on the clock stand those of the processors, which a busy machine does not stretch where every
contender has one thread:

    OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python benchmarks/bench_accumulators.py

    python benchmarks/bench_accumulators.py [--quick] [--digits] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import torch
from contenders import Row, answered, in_fresh_process, in_turn, peak_bytes, print_machine, timed
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from ellq.theory.accumulators import Gram, Tsqr

Work = Callable[[], Any]
FEATURES = 512
KINDS: dict[str, type[Gram | Tsqr]] = {"Gram": Gram, "Tsqr": Tsqr}


def main() -> None:
    """Run all cases, print the tables, write the rows."""
    if answered(run_alone):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    parser.add_argument("--digits", action="store_true", help="only the digits that are left, by condition number")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    print_machine()
    rows: list[Row] = []
    if not options.digits:
        rows += bench_batch(4_000 if options.quick else 40_000, rounds=3)
        rows += bench_stream(10**6 if options.quick else 10**7)
    rows += bench_digits()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def bench_batch(n: int, rounds: int) -> list[Row]:
    """One float32 batch, beside the plain products and factorisations of the same matrix."""
    contenders = {name: {"contender": name, "n": n} for name in CONTENDERS}
    return in_turn(f"{n}×{FEATURES} float32, one batch", contenders, rounds)


def bench_stream(most: int) -> list[Row]:
    """Seconds and peak memory against the samples, fed in batches of 20 000; a tenth of the samples for Tsqr."""
    rows: list[Row] = []
    for name, limit in (("Gram", most), ("Tsqr", most // 10)):
        print(f"{name}, samples × {FEATURES} float32 in batches of 20000")
        mine = []
        for n in (limit // 50, limit // 10, limit // 4, limit):
            run = in_fresh_process({"stream": name, "n": n})
            case = f"{n:.3g}×{FEATURES} float32, batches of 20000"
            mine.append({"case": case, "contender": name, "samples": n, "error": None, "ratio_to_ours": 1.0, **run})
            print(
                f"  {n:9.3g} samples{run['seconds']:9.2f} s{run['processor']:9.2f} s of CPU   "
                f"peak {run['peak_mb']:5.0f} MB"
            )
        sizes, seconds = np.array([[row["samples"], row["processor"]] for row in mine]).T
        slope = float(sizes @ seconds / (sizes @ sizes))
        off = np.max(np.abs(slope * sizes - seconds) / seconds)
        print(f"  seconds of CPU = {slope * 1e6:.3f} per 1e6 samples, at most {off:.1%} off\n")
        rows += mine
    return rows


def bench_digits() -> list[Row]:
    """Relative errors of T and of the residual against 80 digits, for skeletons of growing condition number."""
    rows: list[Row] = []
    print("relative error of the interpolation matrix T, and of the residual ‖X − X_S T‖_F = 0.1·σ_min(X_S) of it")
    print("  condition of X_S         Gram: T    residual         Tsqr: T    residual")
    for exponent in range(2, 15, 2):
        X = ill_conditioned(10.0**exponent)
        exact_T, exact_residual = reference(X)
        line = f"  1e{exponent:<2d}              "
        for name, kind in KINDS.items():
            accumulator = kind(X.shape[1])
            for batch in np.array_split(X, 7):
                accumulator.update(batch)
            T, residual = from_gram(accumulator) if isinstance(accumulator, Gram) else from_tsqr(accumulator)
            error_T = float(np.linalg.norm(T - exact_T) / np.linalg.norm(exact_T))
            error_residual = abs(residual / exact_residual - 1)
            line += f"{error_T:12.1e}{error_residual:12.1e}     "
            for what, error in (("T", error_T), ("residual", error_residual)):
                rows.append({"case": f"condition 1e{exponent}, {what}", "contender": name, "error": error})
        print(line)
    print("  nan: the Cholesky factorisation fails, or the square of the residual comes out negative")
    return rows


def ill_conditioned(condition: float, n: int = 400, k: int = 8) -> np.ndarray:
    """Return k columns of that condition number, then k more: mixtures of them and a tenth of the smallest value."""
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(n, 2 * k)))[0]
    right = np.linalg.qr(rng.normal(size=(k, k)))[0]
    skeleton = left[:, :k] * np.geomspace(1, 1 / condition, k) @ right
    rest = skeleton @ rng.normal(size=(k, k)) / np.sqrt(k) + 0.1 / condition / np.sqrt(k) * left[:, k:]
    return np.hstack([skeleton, rest])


def reference(X: np.ndarray) -> tuple[np.ndarray, float]:
    """Return T and the residual of these very float64 values, from 80 digits, where squaring does no harm."""
    k = X.shape[1] // 2
    with mpmath.workdps(80):
        A = mpmath.matrix(X.tolist())
        G = A.T * A
        T = mpmath.inverse(G[:k, :k]) * G[:k, k:]
        left = G[k:, k:] - G[k:, :k] * T
        residual = float(mpmath.sqrt(sum(left[i, i] for i in range(k))))
        return np.array(T.tolist(), dtype=float), residual


def from_gram(accumulator: Gram) -> tuple[np.ndarray, float]:
    """Return T and the residual by the normal equations."""
    G = accumulator.columns(centred=False).G
    k = len(G) // 2
    try:
        T = cho_solve(cho_factor(G[:k, :k]), G[:k, k:])
    except np.linalg.LinAlgError:
        return np.full((k, k), np.nan), np.nan
    square = float(np.trace(G[k:, k:] - G[k:, :k] @ T))
    return T, np.sqrt(square) if square >= 0 else np.nan


def from_tsqr(accumulator: Tsqr) -> tuple[np.ndarray, float]:
    """Return T and the residual from the triangle, whose first columns are the skeleton."""
    R = accumulator.columns(centred=False).X
    k = len(R) // 2
    return solve_triangular(R[:k, :k], R[:k, k:]), float(np.linalg.norm(R[k:, k:]))


def run_alone(task: Row) -> Row:
    """Run one task in this process."""
    if "stream" in task:
        return stream(KINDS[task["stream"]], task["n"])
    x = np.random.default_rng(0).standard_normal((task["n"], FEATURES), dtype=np.float32)
    row, result = timed(CONTENDERS[task["contender"]](x))
    exact = x[:, :8].astype(np.float64).T @ x.astype(np.float64)
    return row | {"error": float(np.abs(np.asarray(result)[:8] - exact).max() / exact.max())}


def stream(kind: type[Gram | Tsqr], n: int) -> Row:
    """Feed the same batch until n samples are reached."""
    batch = np.random.default_rng(0).standard_normal((min(n, 20_000), FEATURES), dtype=np.float32)
    accumulator = kind(FEATURES)
    began, busy = time.perf_counter(), time.process_time()
    for start in range(0, n, len(batch)):
        accumulator.update(batch[: n - start])
    times = {"seconds": time.perf_counter() - began, "processor": time.process_time() - busy}
    assert accumulator.samples == n
    return times | {"peak_mb": peak_bytes() / 1e6}


def _accumulator(kind: type[Gram | Tsqr]) -> Callable[[np.ndarray], Work]:
    def contender(x: np.ndarray) -> Work:
        def work() -> np.ndarray:
            accumulator = kind(FEATURES)
            accumulator.update(x)
            return accumulator.moments(centred=False)[0]

        return work

    return contender


def _torch_product(x: np.ndarray) -> Work:
    tensor = torch.from_numpy(x)
    return lambda: tensor.T @ tensor


def _qr(x: np.ndarray) -> Work:
    def work() -> np.ndarray:
        R = np.linalg.qr(x.astype(np.float64), mode="r")
        return np.asarray(R.T @ R)

    return work


CONTENDERS: dict[str, Callable[[np.ndarray], Work]] = {
    "Gram": _accumulator(Gram),
    "Tsqr": _accumulator(Tsqr),
    "NumPy X.T @ X, float32": lambda x: lambda: x.T @ x,
    "torch X.T @ X, float32": _torch_product,
    "NumPy X.T @ X, cast to float64": lambda x: lambda: (z := x.astype(np.float64)).T @ z,
    "numpy.linalg.qr, cast to float64": _qr,
}


if __name__ == "__main__":
    main()
