"""One dense net pruned to many sizes by several rules: accuracy, observed error and bound at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import pandas as pd
from torch import Tensor, nn

from ellq.analysis import accuracy, agreement, cost, track
from ellq.pruning.apply import apply, finalize
from ellq.pruning.chain_bounds import chain_bounds
from ellq.pruning.prune import plan


@dataclass(frozen=True)
class Splits:
    """The data of an experiment: calibrate on one part, choose on a second, report on a third.

    Attributes:
        calibration: inputs to train and calibrate with, shape (n, …).
        calibration_labels: their classes, shape (n,).
        selection: inputs and labels to choose a size with.
        test: inputs and labels to report on, used for nothing else.
    """

    calibration: Tensor
    calibration_labels: npt.NDArray[Any]
    selection: tuple[Tensor, npt.NDArray[Any]]
    test: tuple[Tensor, npt.NDArray[Any]]


def sweep(
    dense: nn.Sequential,
    splits: Splits,
    *,
    method: str,
    rules: Sequence[str],
    sparsities: Sequence[float],
    refit: str = "none",
) -> pd.DataFrame:
    """Prune a chain by every rule to every sparsity and measure the result.

    Args:
        dense: the trained chain.
        splits: disjoint data sets.
        method: ``"lq"`` or ``"id"``.
        rules: rules of that method.
        sparsities: fractions to remove, of weights (lq) or hidden units (id).
        refit: of ``plan``, for ``"lq"``; ``"none"`` compares the rules by their masks alone.

    Returns:
        One row per rule and sparsity: parameters, nonzeros, flops, selection_accuracy, accuracy and agreement with
        the dense net on test, observed error and bounds of the outputs over the test inputs.
    """
    rows = []
    test_inputs, test_labels = splits.test
    cases = [(rule, sparsity) for rule in rules for sparsity in sparsities]
    for rule, sparsity in track(cases, f"pruning by {method}"):
        way = refit if method == "lq" else "auto"
        decided = plan(dense, splits.calibration, method=method, rule=rule, sparsity=sparsity, refit=way)
        pruned = finalize(apply(dense, decided))
        last = chain_bounds(dense, pruned, test_inputs, decided).iloc[-1]
        size = cost(pruned, test_inputs[:1])
        rows.append(
            {
                "method": method,
                "rule": rule,
                "sparsity": sparsity,
                "parameters": size.parameters,
                "nonzeros": size.nonzeros,
                "flops": size.flops,
                "selection_accuracy": accuracy(pruned, *splits.selection),
                "accuracy": accuracy(pruned, test_inputs, test_labels),
                "agreement": agreement(dense, pruned, test_inputs),
                "observed": last["observed"],
                "bound_measured": last["bound_measured"],
                "bound": last["bound"],
                "bound_lq": last["bound_lq"],
            }
        )
    return pd.DataFrame(rows)


def largest_within(table: pd.DataFrame, floor: float) -> float:
    """Return the largest sparsity at which, and at all smaller ones, selection accuracy stays at or above a floor.

    Args:
        table: rows of one rule from ``sweep``.
        floor: the least selection accuracy to accept.

    Returns:
        The sparsity; the smallest tried if none is accepted.
    """
    ordered = table.sort_values("sparsity")
    accepted = (ordered["selection_accuracy"] >= floor).cummin()
    return float(ordered.loc[accepted, "sparsity"].max() if accepted.any() else ordered["sparsity"].min())
