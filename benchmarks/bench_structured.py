"""Accuracy against FLOPs of narrower networks, one-shot and without training, then after the same short fine-tune.

A row for each net, contender and fraction of FLOPs is appended to the CSV as soon as it is known; rows that are there
are not made again. All are given the same 2000 training images (Taylor their labels too), and none retains more FLOPs
than asked for; accuracy is of all test images, and nothing is chosen by it. `--finetune N` trains each net for N epochs
on all training images, cropped and flipped at random as the dense nets were, the same for all: SGD with momentum,
learning rate 0.02 with a cosine, batches of 128; the loss is the mean of the cross-entropy and of the divergence from
the dense net's answers.
`--latency` times dense and pruned nets in turn, into a CSV of its own. `--tables` writes the tables of
docs/structured.md.

    ELLQ_DATA=… OMP_NUM_THREADS=1 python benchmarks/bench_structured.py [--nets resnet20 …] [--fractions 0.5 …]
        [--contenders ours …] [--finetune 3] [--latency] [--images 10000] [--quick] [--csv FILE] [--tables]
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from contenders import peak_bytes
from structured_peers import CONTENDERS, OURS
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.functional import cross_entropy, pad

from ellq.analysis import PRETRAINED_MEAN, PRETRAINED_STD, cost, datasets, predict, pretrained

NETS = ("resnet20", "resnet32", "resnet44")
FRACTIONS = (0.75, 0.6, 0.5, 0.4)
CALIBRATION, TUNED = 2_000, 50_000
BATCH, PADDING, TEMPERATURE = 128, 4, 2.0
KEY = ["net", "contender", "fraction", "epochs"]
COLUMNS = [*KEY, "flops", "parameters", "accuracy", "tuned", "agreement", "dense", "images", "seconds", "peak_mb"]
LATENCY_KEY = ["net", "contender", "fraction", "batch"]
LATENCY_COLUMNS = [*LATENCY_KEY, *(f"{w}_{q}" for w in ("dense", "pruned") for q in ("low", "median", "high"))]
DOCS = Path(__file__).parent.parent / "docs"
ROUNDS = {1: 200, 64: 20}


@dataclass(frozen=True)
class Case:
    """A net and the images it is calibrated, trained and measured on.

    Attributes:
        net: the dense net.
        images: training images; the first ``CALIBRATION`` are for calibration.
        labels: of the training images.
        test: test images.
        truth: their labels.
        answers: the classes that the dense net gives them.
    """

    net: nn.Module
    images: Tensor
    labels: Tensor
    test: Tensor
    truth: Tensor
    answers: Tensor


def main() -> None:
    """Make the rows that are missing, or print the tables of those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS), help="of the FLOPs to retain")
    parser.add_argument("--images", type=int, default=10_000, help="how many test images, from the first on")
    parser.add_argument("--finetune", type=int, default=0, metavar="EPOCHS", help="train each net too")
    parser.add_argument("--latency", action="store_true", help="time forward passes instead")
    parser.add_argument("--quick", action="store_true", help="ResNet-20 at half the FLOPs and 500 test images alone")
    parser.add_argument("--csv", type=Path, help="docs/structured_accuracy.csv, or structured_latency.csv")
    parser.add_argument("--tables", action="store_true", help="print the tables of the CSV and measure nothing")
    options = parser.parse_args()
    csv = options.csv or DOCS / ("structured_latency.csv" if options.latency else "structured_accuracy.csv")
    if options.tables:
        print((latency_table if options.latency else tables)(pd.read_csv(csv)))
        return
    if options.quick:
        options.nets, options.fractions, options.images = ["resnet20"], [0.5], 500
    for name in options.nets:
        wanted = [(contender, fraction) for contender in options.contenders for fraction in options.fractions]
        if options.latency:
            time_net(name, wanted, csv)
        else:
            measure_net(name, wanted, options.images, options.finetune, csv)


def measure_net(name: str, wanted: Sequence[tuple[str, float]], images: int, epochs: int, csv: Path) -> None:
    """Append the rows of a net that are not in the file yet."""
    there = rows_there(csv, KEY)
    missing = [(contender, f) for contender, f in wanted if (name, contender, f, epochs) not in there]
    if not missing:
        return
    case = loaded(name, images, TUNED if epochs else CALIBRATION)
    for contender, fraction in missing:
        row = {"net": name, "contender": contender, "fraction": fraction, "epochs": epochs}
        row |= measured(case, contender, fraction, epochs)
        append(row, COLUMNS, csv)
        print(*row.values(), flush=True)


def loaded(name: str, images: int, trained: int = CALIBRATION) -> Case:
    """Return a pretrained net, some training images in an order that is always the same, and the first test images."""
    scale: dict[str, Any] = {"mean": PRETRAINED_MEAN, "std": PRETRAINED_STD}
    train, test = datasets.load("cifar10", "train"), datasets.load("cifar10", "test")
    train = train.select(np.random.default_rng(0).permutation(len(train))[:trained])
    test = test.select(np.arange(min(images, len(test))))
    net, inputs = pretrained(name), test.inputs(**scale)
    labels, truth = (torch.as_tensor(np.asarray(part.labels), dtype=torch.int64) for part in (train, test))
    return Case(net, train.inputs(**scale), labels, inputs, truth, answers(net, inputs))


def measured(case: Case, contender: str, fraction: float, epochs: int) -> dict[str, float]:
    """Prune, measure on the test images, and train and measure again."""
    before = _resident_and_reset()
    began = time.perf_counter()
    pruned = CONTENDERS[contender](case.net, case.images[:CALIBRATION], case.labels[:CALIBRATION], fraction)
    seconds, peak = time.perf_counter() - began, peak_bytes() - before
    given = answers(pruned, case.test)
    dense, narrow = cost(case.net, case.test[:1]), cost(pruned, case.test[:1])
    if narrow.flops > fraction * dense.flops:
        raise ValueError(f"{contender} retains {narrow.flops / dense.flops:.4f} of the FLOPs instead of {fraction:g}.")
    return {
        "flops": round(narrow.flops / dense.flops, 5),
        "parameters": round(narrow.parameters / dense.parameters, 5),
        "accuracy": _share(given, case.truth),
        "tuned": _share(answers(finetuned(pruned, case, epochs), case.test), case.truth) if epochs else np.nan,
        "agreement": _share(given, case.answers),
        "dense": _share(case.answers, case.truth),
        "images": len(case.test),
        "seconds": round(seconds, 2),
        "peak_mb": round(max(peak, 0) / 1e6, 1),
    }


def finetuned(net: nn.Module, case: Case, epochs: int) -> nn.Module:
    """Return the net after some epochs of SGD on the training images: the same, in the same order, for all."""
    trained, draw = copy.deepcopy(net).train(), torch.Generator().manual_seed(0)
    steps = -(-len(case.images) // BATCH)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(case.images), generator=draw), BATCH):
            images = _shifted(case.images[batch], draw)
            with torch.no_grad():
                aims = case.net(images)
            given = trained(images)
            truth = cross_entropy(given, case.labels[batch])
            likeness = cross_entropy(given / TEMPERATURE, (aims / TEMPERATURE).softmax(1)) * TEMPERATURE**2
            optimizer.zero_grad()
            ((truth + likeness) / 2).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return trained.eval()


def _shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return images shifted by up to ``PADDING`` pixels, zeros coming in, half of them mirrored."""
    n, _, height, width = images.shape
    top, left = torch.randint(2 * PADDING + 1, (2, n), generator=draw)
    down, across = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
    across = torch.where((torch.rand(n, generator=draw) < 0.5)[:, None], across.flip(1), across)
    padded = pad(images, [PADDING] * 4)
    return padded[
        torch.arange(n)[:, None, None, None],
        torch.arange(images.shape[1])[:, None, None],
        down[:, None, :, None],
        across[:, None, None, :],
    ]


def answers(net: nn.Module, inputs: Tensor) -> Tensor:
    """Return the classes a net gives, computed the fastest way: norms folded into convolutions, channels last."""
    fast = fuse(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return predict(fast, inputs, batch_size=64).argmax(1)


def time_net(name: str, wanted: Sequence[tuple[str, float]], csv: Path) -> None:
    """Append the latencies of a net that are not in the file yet: dense and pruned in turn, medians and quartiles."""
    there = rows_there(csv, LATENCY_KEY)
    missing = [(c, f) for c, f in wanted if any((name, c, f, batch) not in there for batch in ROUNDS)]
    if not missing:
        return
    case = loaded(name, 64)
    for contender, fraction in missing:
        pruned = CONTENDERS[contender](case.net, case.images[:CALIBRATION], case.labels[:CALIBRATION], fraction)
        for batch, rounds in ROUNDS.items():
            if (name, contender, fraction, batch) in there:
                continue
            nets = {"dense": fuse(case.net), "pruned": fuse(pruned)}
            row: dict[str, Any] = {"net": name, "contender": contender, "fraction": fraction, "batch": batch}
            for which, times in timed_in_turn(nets, case.test[:batch], rounds).items():
                low, median, high = statistics.quantiles(times, n=4)
                row |= {f"{which}_low": low, f"{which}_median": median, f"{which}_high": high}
            append(row, LATENCY_COLUMNS, csv)
            print(*row.values(), flush=True)


@torch.no_grad()
def timed_in_turn(nets: dict[str, nn.Module], inputs: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of forward passes of each net, after one in ten of them to warm up."""
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds + max(1, rounds // 10)):
        for name, net in nets.items():
            began = time.perf_counter()
            net(inputs)
            times[name].append(time.perf_counter() - began)
    return {name: own[-rounds:] for name, own in times.items()}


def rows_there(csv: Path, key: list[str]) -> set[tuple[Any, ...]]:
    """Return the keys of the rows in the file."""
    return set(pd.read_csv(csv)[key].itertuples(index=False, name=None)) if csv.exists() else set()


def append(row: dict[str, Any], columns: list[str], csv: Path) -> None:
    """Add a row to the file in one write, so that it is there whole or not at all."""
    text = pd.DataFrame([row], columns=columns).to_csv(index=False, header=not csv.exists())
    with csv.open("ab", buffering=0) as file:
        file.write(text.encode())


def tables(rows: pd.DataFrame) -> str:
    """Return the tables: for each net one without training and one after it, accuracies in percent."""
    parts = []
    for name in (name for name in NETS if name in set(rows["net"])):
        own = rows[rows["net"] == name]
        heading = f"**{name}**, {own['images'].max():,} test images, dense {100 * own['dense'].iloc[0]:.1f} %"
        untrained = own.drop_duplicates(["contender", "fraction"])
        parts.append(f"{heading}, without training\n\n{_table(untrained, 'accuracy')}")
        trained = own[own["epochs"] > 0]
        if len(trained):
            parts.append(f"{heading}, after the same short fine-tune\n\n{_table(trained, 'tuned')}")
    return "\n\n".join(parts)


def latency_table(rows: pd.DataFrame) -> str:
    """Return the table of latencies: milliseconds, medians and quartiles."""
    lines = [["net", "contender", "FLOPs", "batch", "dense, ms", "pruned, ms", "times as fast"]]
    for row in rows.to_dict("records"):
        cells = [
            f"{1e3 * row[f'{w}_median']:.2f} ({1e3 * row[f'{w}_low']:.2f}–{1e3 * row[f'{w}_high']:.2f})"
            for w in ("dense", "pruned")
        ]
        ratio = row["dense_median"] / row["pruned_median"]
        lines.append(
            [row["net"], row["contender"], f"{row['fraction']:.0%}", str(row["batch"]), *cells, f"{ratio:.2f}"]
        )
    return _markdown(lines)


def _table(rows: pd.DataFrame, column: str) -> str:
    """Return a line for each contender; the best at each fraction in bold, and how far below it ours is where it is."""
    fractions = sorted(set(rows["fraction"]), reverse=True)
    order = [name for name in CONTENDERS if name in set(rows["contender"])]
    values = rows.pivot_table(index="contender", columns="fraction", values=column)
    with_extras = column == "accuracy"
    extras = ["agreement", "parameters", "seconds", "peak MB"] if with_extras else []
    lines = [["FLOPs retained", *[f"{f:.0%}" for f in fractions], *extras]]
    for name in order:
        cells = []
        for fraction in fractions:
            value = values[fraction].get(name, np.nan)
            text = "" if np.isnan(value) else f"{100 * value:.1f}"
            cells.append(f"**{text}**" if text and value == values[fraction].max() else text)
        own = rows[rows["contender"] == name]
        half = own[own["fraction"] == 0.5]
        if with_extras and len(half):
            first = half.iloc[0]
            cells += [f"{100 * first['agreement']:.1f}", f"{first['parameters']:.0%}"]
            cells += [f"{own['seconds'].median():.1f}", f"{own['peak_mb'].max():.0f}"]
        elif with_extras:
            cells += ["", "", f"{own['seconds'].median():.1f}", f"{own['peak_mb'].max():.0f}"]
        lines.append([name, *cells])
    ours, others = ([name for name in order if (name in OURS) == is_ours] for is_ours in (True, False))
    if "ours" in ours and others:
        gaps = [100 * (values[f].get("ours", np.nan) - values[f].reindex(others).max()) for f in fractions]
        lines.append(
            [
                "*ours above the best other*",
                *["" if np.isnan(gap) else f"{gap:+.1f}" for gap in gaps],
                *[""] * len(extras),
            ]
        )
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def _share(given: Tensor, wanted: Tensor) -> float:
    return round(float((given == wanted).double().mean()), 5)


def _resident_and_reset() -> int:
    """Return the bytes resident now, free ones given back, having set the most that ever were to it."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


if __name__ == "__main__":
    main()
