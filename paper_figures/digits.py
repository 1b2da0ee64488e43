"""The experiment on scikit-learn's digits that several figures and the demo draw from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from torch import nn

from ellq.analysis import accuracy, datasets, mlp, partition, small_conv
from ellq.pruning import Splits, sweep, train_classifier

NETS: dict[str, Callable[[], nn.Sequential]] = {
    "mlp": lambda: mlp(64, 128, outputs=10),
    "conv": lambda: small_conv(1, 8, 10),
}
RULES = {"lq": ("ellq", "yang2022"), "id": ("ellq", "chee2021")}
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EPOCHS = 40


def digits_splits() -> Splits:
    """Return the digits: four fifths of the train part to train and calibrate, one fifth to choose, test to report."""
    train, test = datasets.load("digits", "train"), datasets.load("digits", "test")
    parts = partition(train, fit=0.8, selection=0.2)
    fit, selection = parts["fit"], parts["selection"]
    return Splits(
        calibration=fit.inputs(),
        calibration_labels=fit.labels,
        selection=(selection.inputs(), selection.labels),
        test=(test.inputs(), test.labels),
    )


def train_net(name: str, splits: Splits, *, seed: int) -> nn.Sequential:
    """Train one of ``NETS`` on the fit part of the digits."""
    return train_classifier(
        NETS[name],
        splits.calibration,
        splits.calibration_labels,
        epochs=EPOCHS,
        seed=seed,
        description=f"training {name}",
    )


def net_sweeps(name: str, dense: nn.Sequential, splits: Splits, *, sparsities: Sequence[float]) -> pd.DataFrame:
    """Prune one trained net by every method and rule to every sparsity; columns ``net`` and those of ``sweep``."""
    tables = [
        sweep(dense, splits, method=method, rules=rules, sparsities=sparsities) for method, rules in RULES.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "net", name)
    table["dense_accuracy"] = accuracy(dense, *splits.test)
    return table


def sweeps(*, nets: Sequence[str], seed: int, sparsities: Sequence[float] = SPARSITIES) -> pd.DataFrame:
    """Train the named nets on digits and prune each to every sparsity by every rule.

    Args:
        nets: names in ``NETS``.
        seed: of training; the splits are fixed.
        sparsities: fractions to remove.

    Returns:
        One row per net, method, rule and sparsity.
    """
    splits = digits_splits()
    return pd.concat(
        [net_sweeps(name, train_net(name, splits, seed=seed), splits, sparsities=sparsities) for name in nets],
        ignore_index=True,
    )
