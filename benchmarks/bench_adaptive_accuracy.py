"""Accuracy against sparsity, one-shot and without training: ours beside the rules of others, with and without data.

A row for each net, seed, contender and sparsity is appended to the CSV as soon as it is known; rows that are there are
not made again. Calibration inputs are 2000 training images without labels, accuracy is of test images, and nothing is
chosen by either. `--tables` writes the tables of docs/adaptive.md from the CSV.

    ELLQ_DATA=… OMP_NUM_THREADS=1 python benchmarks/bench_adaptive_accuracy.py [--nets resnet20 …] [--sparsities 0.9 …]
        [--contenders lamp …] [--seed 0 1 2] [--images 5000] [--quick] [--csv FILE] [--tables]
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import ellq
from ellq.analysis import PRETRAINED_MEAN, PRETRAINED_STD, accuracy, datasets, mlp, pretrained, small_conv
from ellq.pruning import train_classifier

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
TRAINED, CALIBRATION, EPOCHS = 20_000, 2_000, 5
CHANCE = 0.15  # below it a net of ten classes has nothing to compare
KEY = ["net", "seed", "contender", "sparsity"]
COLUMNS = [*KEY, "reached", "accuracy", "dense", "images", "seconds"]
CSV = Path(__file__).parent.parent / "docs" / "adaptive_accuracy.csv"


@dataclass(frozen=True)
class Contender:
    """A way to plan.

    Attributes:
        arguments: of ``ellq.plan``, besides the sparsity.
        inputs: what it is given: "none", "shape" (one image, of which only the shape is looked at) or "images".
        is_ours: whether rule and refit are what we recommend.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: str = "none"
    is_ours: bool = False

    @property
    def has_our_refit(self) -> bool:
        """Whether it is a rule of others with the refit that ``ellq.plan`` does by default."""
        return not self.is_ours and self.arguments.get("refit") in ("synthetic", "rescale", "obs")


CONTENDERS = {
    "ours": Contender(is_ours=True),
    "ours, rescaled": Contender({"refit": "rescale"}),
    "ours, flow": Contender({"rule": "flow"}, "shape"),
    "lamp": Contender({"rule": "lamp"}),
    "global": Contender({"rule": "global"}),
    "global + rescale": Contender({"rule": "global", "refit": "rescale"}),
    "global + synthetic": Contender({"rule": "global", "refit": "synthetic"}),
    "uniform": Contender({"rule": "uniform"}),
    "erk": Contender({"rule": "erk"}),
    "erk + rescale": Contender({"rule": "erk", "refit": "rescale"}),
    "erk + synthetic": Contender({"rule": "erk", "refit": "synthetic"}),
    "synflow": Contender({"rule": "synflow"}, "shape"),
    "synflow + rescale": Contender({"rule": "synflow", "refit": "rescale"}, "shape"),
    "diao2023": Contender({"rule": "diao2023", "p": 0.5, "q": 1.0}),
    "diao2023, by layer": Contender({"rule": "diao2023", "p": 0.5, "q": 1.0, "scope": "layer"}),
    "yang2022, capped": Contender({"rule": "yang2022", "variant": "capped"}),
    "yang2022, keep-m": Contender({"rule": "yang2022", "variant": "keep-m"}),
    "ours, no refit": Contender({"refit": "none"}),
    "ours + images": Contender(inputs="images", is_ours=True),
    "lamp + obs": Contender({"rule": "lamp", "refit": "obs"}, "images"),
    "lamp + least_squares": Contender({"rule": "lamp", "refit": "least_squares"}, "images"),
    "lamp + sparsegpt": Contender({"rule": "lamp", "refit": "sparsegpt"}, "images"),
    "uniform + sparsegpt": Contender({"rule": "uniform", "refit": "sparsegpt"}, "images"),
    "wanda": Contender({"rule": "wanda"}, "images"),
    "wanda + least_squares": Contender({"rule": "wanda", "refit": "least_squares"}, "images"),
}
OURS = ("ours", "ours, rescaled", "ours, flow", "ours, no refit", "ours + images")


@dataclass(frozen=True)
class Case:
    """A net and the images it is calibrated and measured on."""

    net: nn.Module
    calibration: Tensor
    test: Tensor
    labels: Any
    dense: float


def main() -> None:
    """Make the rows that are missing, or print the tables of those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2], help="pretrained nets take the first alone")
    parser.add_argument("--images", type=int, default=10_000, help="how many test images, from the first on")
    parser.add_argument("--quick", action="store_true", help="the small convolutional net at sparsity 0.9 alone")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--tables", action="store_true", help="print the tables of the CSV and measure nothing")
    options = parser.parse_args()
    if options.tables:
        print(tables(pd.read_csv(options.csv)))
        return
    if options.quick:
        options.nets, options.sparsities, options.seed = ["digits conv"], [0.9], [0]
    for name in options.nets:
        for seed in options.seed[:1] if name.startswith("resnet") else options.seed:
            wanted = [(contender, s) for contender in options.contenders for s in options.sparsities]
            measure_net(name, seed, wanted, options.images, options.csv)


def measure_net(name: str, seed: int, wanted: Sequence[tuple[str, float]], images: int, csv: Path) -> None:
    """Append the rows of a net that are not in the file yet."""
    there = set(pd.read_csv(csv)[KEY].itertuples(index=False, name=None)) if csv.exists() else set()
    missing = [(contender, s) for contender, s in wanted if (name, seed, contender, s) not in there]
    if not missing:
        return
    case = NETS[name](seed, images)
    for contender, sparsity in missing:
        row = {"net": name, "seed": seed, "contender": contender, "sparsity": sparsity}
        row |= measured(case, CONTENDERS[contender], sparsity)
        append(row, csv)
        print(*row.values(), flush=True)


def measured(case: Case, contender: Contender, sparsity: float) -> dict[str, float]:
    """Plan, prune, and measure on the test images. A rule that stops before the sparsity is measured where it stops."""
    given = {"none": None, "shape": case.calibration[:1], "images": case.calibration}[contender.inputs]
    began = time.perf_counter()
    try:
        plan = ellq.plan(case.net, given, sparsity=sparsity, **contender.arguments)
    except ValueError as error:
        stop = re.search(r"comes to a stop at ([\d,]+) weights", str(error))
        if stop is None:
            raise
        plan = ellq.plan(case.net, given, nonzeros=int(stop[1].replace(",", "")), **contender.arguments)
    seconds = time.perf_counter() - began
    pruned = ellq.finalize(ellq.apply(case.net, plan))
    return {
        "reached": round(plan.sparsity, 5),
        "accuracy": answered_right(pruned, case.test, case.labels),
        "dense": case.dense,
        "images": len(case.test),
        "seconds": round(seconds, 2),
    }


def answered_right(net: nn.Module, inputs: Tensor, labels: Any) -> float:
    """Return the accuracy, computed the fastest way: norms folded into convolutions, channels last."""
    fast = fuse(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return accuracy(fast, inputs, labels, batch_size=64)


def append(row: dict[str, Any], csv: Path) -> None:
    """Add a row to the file in one write, so that it is there whole or not at all."""
    text = pd.DataFrame([row], columns=COLUMNS).to_csv(index=False, header=not csv.exists())
    with csv.open("ab", buffering=0) as file:
        file.write(text.encode())


def _resnet(name: str, seed: int, images: int) -> Case:
    return _case(pretrained(name), "cifar10", seed, images, mean=PRETRAINED_MEAN, std=PRETRAINED_STD)


def _mlp(name: str, hidden: tuple[int, ...], seed: int, images: int) -> Case:
    return _case(partial(mlp, 784, *hidden, outputs=10), name, seed, images)


def _conv(seed: int, images: int) -> Case:
    return _case(partial(small_conv, 1, 8, 10), "digits", seed, images, epochs=30)


def _case(
    net: nn.Module | Callable[[], nn.Module], data: str, seed: int, images: int, *, epochs: int = EPOCHS, **scale: Any
) -> Case:
    """Train a net on images that the seed draws, unless it is there, and calibrate on some of them."""
    train, test = datasets.load(data, "train"), datasets.load(data, "test")
    drawn = np.random.default_rng(seed).permutation(len(train))[:TRAINED]
    test = test.select(np.arange(min(images, len(test))))
    if not isinstance(net, nn.Module):
        chosen = train.select(drawn)
        net = train_classifier(net, chosen.inputs(**scale), chosen.labels, epochs=epochs, seed=seed)
    inputs = test.inputs(**scale)
    calibration = train.select(drawn[:CALIBRATION]).inputs(**scale)
    return Case(net, calibration, inputs, test.labels, answered_right(net, inputs, test.labels))


NETS: dict[str, Callable[[int, int], Case]] = {
    **{name: partial(_resnet, name) for name in ("resnet20", "resnet32", "resnet44")},
    **{
        f"{data} {'-'.join(map(str, (784, *hidden, 10)))}": partial(_mlp, data, hidden)
        for data in ("fashion-mnist", "mnist")
        for hidden in ((300,), (256, 128))
    },
    "digits conv": _conv,
}


def tables(rows: pd.DataFrame) -> str:
    """Return the tables: for each net one without data and one with, accuracies in percent, ours judged below."""
    rows = rows.assign(with_data=rows["contender"].map(lambda name: CONTENDERS[name].inputs == "images"))
    parts = []
    for name in (name for name in NETS if name in set(rows["net"])):
        for with_data, title in ((False, "without data"), (True, f"with {CALIBRATION} calibration images")):
            own = rows[(rows["net"] == name) & (rows["with_data"] == with_data)]
            if len(own):
                parts.append(f"{_heading(own, name)}, {title}\n\n{_table(own)}")
    return "\n\n".join(parts)


def _heading(rows: pd.DataFrame, name: str) -> str:
    dense = rows.groupby("seed")["dense"].first()
    seeds = f", {len(dense)} seeds" if len(dense) > 1 else ""
    images = " or ".join(f"{count:,}" for count in sorted(rows["images"].unique()))  # the first so many
    return f"**{name}**{seeds}, {images} test images, dense {_percent(dense)} %"


def _table(rows: pd.DataFrame) -> str:
    sparsities = sorted(set(rows["sparsity"]))
    order = [name for name in CONTENDERS if name in set(rows["contender"])]
    has_time = bool(rows["with_data"].any())
    lines = [["sparsity", *[f"{s:g}" for s in sparsities], *(["seconds"] if has_time else [])]]
    for name in order:
        own = rows[rows["contender"] == name]
        cells = [_cell(own[own["sparsity"] == s]) for s in sparsities]
        lines.append([name, *cells, *([f"{own['seconds'].median():.1f}"] if has_time else [])])
    for ours in (name for name in order if CONTENDERS[name].is_ours):
        for has_our_refit, title in ((False, "best other"), (True, "best other with our refit")):
            others = [name for name in order if CONTENDERS[name].has_our_refit == has_our_refit and name not in OURS]
            verdicts = [_verdict(rows[rows["sparsity"] == s], ours, others) for s in sparsities]
            if any(verdicts):
                lines.append([f"*{ours} against the {title}*", *verdicts, *([""] if has_time else [])])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    short = rows["reached"].mean() < rows["sparsity"].iloc[0] - 1e-3
    return _percent(rows["accuracy"]) + (f" at {rows['reached'].mean():.3f}" if short else "")


def _percent(values: pd.Series) -> str:
    """Return a mean in percent, with the least and the largest where there are several."""
    mean = f"{100 * values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * values.min():.1f}–{100 * values.max():.1f})"


def _verdict(rows: pd.DataFrame, ours: str, others: Sequence[str]) -> str:
    """Say how ours stands against others that reach the sparsity: the one that beats it by most, or else the best.

    "best" and "beaten" are differences outside their 95 % interval: over seeds the paired t-interval, for a single net
    two standard errors of the difference as if both were measured on images of their own. Of the rest "ahead" and
    "behind" have the same sign in every seed.
    """
    reaching = rows[rows["reached"] > rows["sparsity"] - 1e-3]
    by_name = reaching.pivot_table(index="seed", columns="contender", values="accuracy")
    rivals = [name for name in others if name in by_name]
    if ours not in by_name or not rivals:
        return ""
    if by_name[[ours, *rivals]].mean().max() < CHANCE:
        return "all lost"
    gaps = {name: _gap(by_name[[ours, name]].dropna(), int(rows["images"].min())) for name in rivals}
    beating = [name for name in rivals if gaps[name][1] == "**beaten**"]
    rival = min(beating or rivals, key=lambda name: gaps[name][0])
    return f"{gaps[rival][1]} {100 * gaps[rival][0]:+.1f} ({rival})"


def _gap(pair: pd.DataFrame, images: int) -> tuple[float, str]:
    """Return by how much the first column is above the second in the mean, and the word for it."""
    differences = pair.iloc[:, 0] - pair.iloc[:, 1]
    gain, seeds = float(differences.mean()), len(differences)
    if seeds > 1:
        noise = float(student.ppf(0.975, seeds - 1)) * float(differences.std()) / math.sqrt(seeds)
    else:
        noise = 2 * math.sqrt(float((pair * (1 - pair)).to_numpy().sum()) / images)
    if abs(gain) > noise:
        return gain, "**best**" if gain > 0 else "**beaten**"
    if seeds > 1 and abs(np.sign(differences).sum()) == seeds:
        return gain, "ahead" if gain > 0 else "behind"
    return gain, "tied"


if __name__ == "__main__":
    main()
