"""How fast an interpolative decomposition is, what each rule chooses on trained nets, and what a ridge adds.

Every contender of the first two cases runs in a fresh process, in turn, several rounds; times are medians, memory is
the process's peak. Ratios are of processor time, which other work on the machine changes least; with
OPENBLAS_NUM_THREADS=1 it is also the time on an idle machine. The other cases train nets on digits, and on
Fashion-MNIST where ELLQ_DATA names a folder that has it.

    python benchmarks/bench_interpolative.py [--quick] [--only decompose|select|rules|ridge] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import Row, answered, in_turn, print_machine, timed
from scipy.linalg import interpolative as scipy_interpolative
from scipy.linalg import qr, solve_triangular
from torch import nn

from ellq.analysis import datasets, mlp
from ellq.pruning import train_classifier
from ellq.theory.accumulators import Gram
from ellq.theory.columns import Columns, Moments, Triangle
from ellq.theory.elimination import explain_targets
from ellq.theory.interpolative import interpolative, refit
from ellq.theory.selection import leverage, output_aware, pivoted_qr, random_columns, residual_trace
from ellq.theory.swaps import strong_rrqr, swap_refined

Decomposition = tuple[np.ndarray, np.ndarray]  # the skeleton and T


def main() -> None:
    """Run the cases, print the tables, write the rows."""
    if answered(run_alone):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller matrices and nets, one round")
    parser.add_argument("--only", choices=list(CASES), help="one case alone")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    print_machine()
    rows = [row for name, case in CASES.items() if options.only in (None, name) for row in case(options.quick)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


# --- a matrix from beginning to end ---------------------------------------------------------------------------------


def bench_decompose(quick: bool) -> list[Row]:
    """Decompose one matrix, beside SciPy's ways and beside the mere product AᵀA."""
    n, m, k = (4_000, 256, 100) if quick else (40_000, 512, 200)
    case = f"{k} columns of {n}×{m} float32"
    return in_turn(
        case, {name: {"decompose": name, "n": n, "m": m, "k": k} for name in DECOMPOSE}, 1 if quick else 5, enough=2
    )


def net_features(n: int, m: int) -> np.ndarray:
    """Return what a random hidden layer of tanh units makes of 64 normal inputs."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, m), np.float32) / 4
    return np.tanh(rng.standard_normal((n, 64), np.float32) @ weights)


def run_decompose(name: str, n: int, m: int, k: int) -> Row:
    """Time one contender, and measure the error of what it found."""
    A = net_features(n, m)
    prepare, work = DECOMPOSE[name]
    prepared = prepare(A)
    row, found = timed(lambda: work(prepared, k), enough=5)
    row["error"] = None
    if found is not None:
        S, T = found
        B = A.astype(np.float64)
        row["error"] = float(np.linalg.norm(B - B[:, S] @ T) / np.linalg.norm(B))
    return row


def _ours(accumulate: str, A: np.ndarray, k: int) -> Decomposition:
    found = interpolative(A, k=k, accumulate=accumulate)  # type: ignore[arg-type]
    return found.indices, found.interpolation


def _lapack(A: np.ndarray, k: int) -> Decomposition:
    R, pivots = qr(A, mode="r", pivoting=True)
    T = np.empty((k, len(pivots)))
    T[:, pivots] = np.hstack([np.eye(k), solve_triangular(R[:k, :k], R[:k, k:])])
    return pivots[:k], T


def _scipy(rand: bool, A: np.ndarray, k: int) -> Decomposition:
    indices, projection = scipy_interpolative.interp_decomp(A, k, rand=rand)
    T = np.empty((k, len(indices)))
    T[:, indices] = np.hstack([np.eye(k), projection])
    return indices[:k], T


def _product(A: np.ndarray, k: int) -> None:
    np.matmul(A.T, A)


def _as_is(A: np.ndarray) -> np.ndarray:
    return A


def _as_double(A: np.ndarray) -> np.ndarray:
    return A.astype(np.float64)


DECOMPOSE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "interpolative, gram": (_as_is, functools.partial(_ours, "gram")),
    "interpolative, tsqr": (_as_is, functools.partial(_ours, "tsqr")),
    "AᵀA, float64": (_as_double, _product),
    "AᵀA, float32": (_as_is, _product),
    "qr(pivoting=True), float32": (_as_is, _lapack),
    "qr(pivoting=True), float64": (_as_double, _lapack),
    "interp_decomp(rand=True)": (_as_double, functools.partial(_scipy, True)),
    "interp_decomp(rand=False)": (_as_double, functools.partial(_scipy, False)),
}


# --- selection alone ------------------------------------------------------------------------------------------------


def bench_select(quick: bool) -> list[Row]:
    """Choose columns from moments or from a triangle that are there already, for a consumer of ten outputs."""
    rows = []
    for m, k in ((256, 100),) if quick else ((512, 200), (2048, 1024)):
        rows += in_turn(
            f"{k} of {m}", {name: {"select": name, "m": m, "k": k} for name in SELECT}, 1 if quick else 5, enough=2
        )
    return rows


def run_select(name: str, m: int, k: int) -> Row:
    """Time one contender, and measure the error of what it chose."""
    A = net_features(2 * m, m).astype(np.float64)
    Y = A @ np.random.default_rng(1).standard_normal((m, 10))
    moments, triangle = Moments(A.T @ A, A.T @ Y, (Y * Y).sum(axis=0)), Triangle(np.linalg.qr(A, mode="r"))
    row, chosen = timed(lambda: SELECT[name](moments, triangle, k), enough=5)
    basis = np.linalg.qr(A[:, chosen])[0]
    row["error"] = float(np.linalg.norm(A - basis @ (basis.T @ A)) / np.linalg.norm(A))
    return row


SELECT: dict[str, Callable[[Moments, Triangle, int], np.ndarray]] = {
    "pivoted_qr": lambda G, X, k: pivoted_qr(G, k).indices,
    "output_aware": lambda G, X, k: output_aware(G, k).indices,
    "residual_trace": lambda G, X, k: residual_trace(G, k).indices,
    "strong_rrqr": lambda G, X, k: strong_rrqr(G, k).indices,
    "leverage": lambda G, X, k: leverage(G, k).indices,
    "pivoted_qr, triangle": lambda G, X, k: pivoted_qr(X, k).indices,
    "LAPACK's geqp3, triangle": lambda G, X, k: qr(X.X, mode="r", pivoting=True)[1][:k],
}


# --- rules on trained nets ------------------------------------------------------------------------------------------


def bench_rules(quick: bool) -> list[Row]:
    """Choose hidden units of trained nets by every rule, and refit what reads them: error on the calibration inputs."""
    rows = []
    for case, features, outputs in trained_layers(quick):
        gram = fed(features, outputs)
        columns = gram.columns(centred=True)
        m = columns.features
        counts = sorted({max(1, round(m * share)) for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)})
        print(f"{case}: output error relative to pivoted_qr's, by units kept of {m}; processor time for {counts[-1]}")
        print(f"  {'':28s}" + "".join(f"{k:>7d}" for k in counts) + "   median   seconds")
        base = [errors_at(columns, pivoted_qr, k) for k in counts]
        for name, rule in ON_NETS.items():
            if name.startswith("swap_refined") and m > 600:
                continue  # takes long
            ratios = [errors_at(columns, rule, k) / b for k, b in zip(counts, base, strict=True)]
            seconds = timed(functools.partial(rule, columns, counts[-1]), enough=5)[0]["processor"]
            values = "".join(f"{r:7.2f}" for r in ratios)
            print(f"  {name:28s}{values}{statistics.median(ratios):9.2f}{seconds:10.4f}")
            rows += [
                {"case": case, "contender": name, "k": k, "ratio": r, "relative_error": r * b, "seconds": seconds}
                for k, r, b in zip(counts, ratios, base, strict=True)
            ]
        print()
    return rows


def errors_at(columns: Columns, rule: Callable[..., Any], k: int) -> float:
    """Return the root mean square error of the refitted outputs, relative to their size."""
    errors = explain_targets(columns, rule(columns, k))[2]
    return float(np.sqrt(errors[-1] / errors[0]))


ON_NETS: dict[str, Callable[..., Any]] = {
    "pivoted_qr": pivoted_qr,
    "strong_rrqr": strong_rrqr,
    "residual_trace": residual_trace,
    "random_columns": random_columns,
    "leverage": leverage,
    "output_aware": output_aware,
    "swap_refined, features": swap_refined,
    "swap_refined, outputs": functools.partial(swap_refined, error="outputs"),
}


# --- ridge ----------------------------------------------------------------------------------------------------------


def bench_ridge(quick: bool) -> list[Row]:
    """Refit from few samples with and without a ridge: error on the inputs that were left out."""
    rows: list[Row] = []
    for case, features, outputs in trained_layers(quick):
        order = np.random.default_rng(0).permutation(len(features))
        features, outputs = features[order], outputs[order]
        k = features.shape[1] // 4
        print(f"{case}: output error on other inputs with {k} units, by samples; ridge='gcv' ÷ least squares")
        for multiple in (1.25, 2, 4, 8):
            n = int(multiple * k)
            few = fed(features[:n], outputs[:n])
            path = output_aware(few.columns(centred=True), k)
            errors, ridges = [], []
            for ridge in (0.0, "gcv"):
                solved = refit(few, path, intercept=True, ridge=ridge)  # type: ignore[arg-type]
                left = outputs[n:] - solved.intercept - features[n:, solved.indices] @ solved.coefficients
                errors.append(float(np.sqrt((left**2).sum() / ((outputs[n:] - outputs[n:].mean(0)) ** 2).sum())))
                ridges.append(solved.ridge)
            print(
                f"  {n:6d} samples   least squares {errors[0]:.4f}   gcv {errors[1]:.4f}"
                f"   ratio {errors[1] / errors[0]:.3f}   ridge {ridges[1]:.1e}"
            )
            rows.append({"case": case, "samples": n, "k": k, "plain": errors[0], "gcv": errors[1], "ridge": ridges[1]})
        print()
    return rows


def trained_layers(quick: bool) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the hidden features of trained nets over their training inputs, and the outputs that read them."""
    cases = [("digits", 128, 40), ("digits", 512, 40), ("fashion-mnist", 512, 6), ("fashion-mnist", 1024, 6)]
    for name, width, epochs in cases[:1] if quick else cases:
        if name != "digits" and "ELLQ_DATA" not in os.environ:
            continue
        data = datasets.load(name, "train", download=False)
        inputs = data.inputs()[:20_000]
        shape = int(inputs[0].numel())
        make = functools.partial(mlp, shape, width, outputs=10)
        net = train_classifier(make, inputs, data.labels[: len(inputs)], epochs=epochs, seed=0)
        with torch.no_grad():
            hidden = nn.Sequential(*list(net)[:-1])(inputs).double().numpy()
            outputs = list(net)[-1].double()(torch.from_numpy(hidden)).numpy()
        yield f"{name}, {shape}-{width}-10", hidden, outputs


def fed(features: np.ndarray, outputs: np.ndarray) -> Gram:
    """Return an accumulator that has seen these."""
    gram = Gram(features.shape[1], outputs.shape[1])
    gram.update(features, outputs)
    return gram


# --- running --------------------------------------------------------------------------------------------------------


def run_alone(task: Row) -> Row:
    """Run one contender in this process."""
    if "decompose" in task:
        return run_decompose(task["decompose"], task["n"], task["m"], task["k"])
    return run_select(task["select"], task["m"], task["k"])


CASES: dict[str, Callable[[bool], list[Row]]] = {
    "decompose": bench_decompose,
    "select": bench_select,
    "rules": bench_rules,
    "ridge": bench_ridge,
}

if __name__ == "__main__":
    main()
