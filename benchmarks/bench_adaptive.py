"""How fast a large model's weights are planned, and in how much memory: ours and torch's global pruning.

Every contender runs in a fresh process, in turn, several rounds. Memory is what a process needs beyond the model: its
peak, less the peak of a process that makes the model and does nothing.

    python benchmarks/bench_adaptive.py [--quick] [--json FILE] [--only plan]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import Row, answered, in_turn, print_machine, timed
from torch import nn
from torch.nn.utils import prune as torch_prune

import ellq.pruning

SPARSITY = 0.9


def main() -> None:
    """Run the cases, print the tables, write the rows."""
    if answered(run_alone):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the weights")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", choices=CASES, action="append", help="run only this case; may be given again")
    options = parser.parse_args()
    print_machine()
    rows: list[Row] = []
    for name in options.only or CASES:
        rows += CASES[name](options.quick)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def bench_plan(quick: bool) -> list[Row]:
    """Plan a model of Linear layers at sparsity 0.9."""
    layers = 3 if quick else 30
    contenders = {
        "ellq.plan": {"kind": "ours", "layers": layers, "rule": "ellq"},
        "ellq.plan, refit none": {"kind": "ours", "layers": layers, "rule": "ellq", "refit": "none"},
        "ellq.plan, rule global": {"kind": "ours", "layers": layers, "rule": "global"},
        "ellq.plan, rule lamp": {"kind": "ours", "layers": layers, "rule": "lamp"},
        "torch global_unstructured": {"kind": "torch", "layers": layers},
        "(the model alone)": {"kind": "model", "layers": layers},
    }
    weights = sum(layer.weight.numel() for layer in _model(layers) if isinstance(layer, nn.Linear))
    rows = in_turn(f"plan of {weights / 1e6:.4g}e6 weights", contenders, 2 if quick else 3, by="seconds", enough=60)
    alone = rows[-1]["peak_mb"]
    torchs = rows[-2]
    for row in rows[:-2]:
        row["extra_mb"] = row["peak_mb"] - alone
        speed, memory = row["seconds"] / torchs["seconds"], row["extra_mb"] / (torchs["peak_mb"] - alone)
        print(f"  {row['contender']}: {speed:.3f} × torch's time, {row['extra_mb']:.0f} MB = {memory:.3f} × its memory")
    print()
    return rows


CASES: dict[str, Callable[[bool], list[Row]]] = {"plan": bench_plan}


def run_alone(task: Row) -> Row:
    """Run one contender in this process, once: torch's changes the model, so a second run would be another case."""
    model = _model(task["layers"])
    times, _ = timed(lambda: WORK[task["kind"]](model, task), enough=0)
    return times | {"error": None}


def _model(layers: int) -> nn.Sequential:
    """Return Linear layers of 3.35 million weights each, of different scales."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(*((1024, 3272), (3272, 1024))[i % 2], bias=False) for i in range(layers)))
    with torch.no_grad():
        for i, layer in enumerate(net):
            layer.weight.normal_().mul_(0.01 * 1.05**i)  # type: ignore[operator,union-attr]
    return net


def _ours(model: nn.Sequential, task: Row) -> Any:
    return ellq.pruning.plan(model, rule=task["rule"], sparsity=SPARSITY, refit=task.get("refit", "auto"))


def _torch(model: nn.Sequential, task: Row) -> Any:
    layers = [(layer, "weight") for layer in model]
    torch_prune.global_unstructured(layers, pruning_method=torch_prune.L1Unstructured, amount=SPARSITY)


WORK: dict[str, Callable[[nn.Sequential, Row], Any]] = {"ours": _ours, "torch": _torch, "model": lambda *_: None}

if __name__ == "__main__":
    main()
