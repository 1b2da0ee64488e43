"""What one check of the flows costs beside an epoch of training, and how well a fixed monitor set knows them.

An epoch is one of ``ClassifierTrainer`` at batches of 64: of an MLP 784-300-100-10 on 20 000 MNIST images, and of the
pretrained ResNet-20 on CIFAR-10, where 1 000 of the 50 000 images are trained on and the time is scaled. Beside our
monitors stands the released form: two passes over the whole training set at the same batches, the first for means and
deviations, the second for the matrix of all correlations of each consecutive pair. Errors are the standard deviation of
a flow between disjoint monitor sets of that size, averaged over pairs, and of the whole vector, √(Σ variance). All
times are of the processors, which a busy machine does not stretch, with one thread:

    OMP_NUM_THREADS=1 ELLQ_DATA=FOLDER python benchmarks/bench_flows.py [--quick] [--csv FILE]

``--quick`` needs no data: the bundled digits and random images, smaller sets, no file unless one is named.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from contenders import print_machine, timed
from torch import Tensor, nn

from ellq.analysis import (
    PRETRAINED_MEAN,
    PRETRAINED_STD,
    FlowMonitor,
    GradientMonitor,
    cifar_resnet,
    datasets,
    flows,
    mlp,
    pretrained,
    released_pairs,
)
from ellq.pruning import ClassifierTrainer
from ellq.theory import FewSamplesWarning

CSV = Path(__file__).parent.parent / "docs" / "flows_overhead.csv"
BATCH = 64
KINDS = ("absolute", "signed", "rms", "cka", "gaussian", "copula")
Row = dict[str, Any]


def main() -> None:
    """Measure both nets, print the tables, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sets that need no data")
    parser.add_argument("--csv", type=Path, help=f"where to write the rows; {CSV.name} in docs unless quick")
    options = parser.parse_args()
    print_machine()
    torch.manual_seed(0)
    sizes, sets = ((100,), 2) if options.quick else ((250, 1000), 8)
    rows: list[Row] = []
    for case, (net, inputs, labels, examples) in (("mlp", _mlp(options.quick)), ("resnet20", _resnet(options.quick))):
        rows += bench(case, net, inputs, labels, examples, sizes, sets)
    csv = options.csv or (None if options.quick else CSV)
    if csv:
        pd.DataFrame(rows).to_csv(csv, index=False, float_format="%.4g", lineterminator="\n")


def bench(
    case: str,
    net: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    examples: tuple[int, int],
    sizes: tuple[int, ...],
    sets: int,
) -> list[Row]:
    """Time an epoch, then every monitor and the released form on the net it leaves.

    Args:
        case: its name.
        net: the net.
        inputs: images; the first are trained on, all make monitor sets.
        labels: of the images.
        examples: how many images are trained on here, and how many an epoch has.
        sizes: of monitor sets.
        sets: how many disjoint monitor sets the errors are of.
    """
    trained, whole = examples
    train = ClassifierTrainer(inputs[:trained], labels[:trained], batch_size=BATCH, learning_rate=1e-3)
    epoch = processor(lambda: train(net, 1)) * whole / trained
    print(f"{case}: an epoch of {whole} images takes {epoch:.1f} s of the processor")
    rows: list[Row] = []

    def add(contender: str, images: int, seconds: float, errors: tuple[float, float] = (np.nan, np.nan)) -> None:
        share = seconds / epoch
        rows.append(
            {"case": case, "contender": contender, "images": images, "seconds": seconds, "epoch": epoch, "share": share}
            | {"error": errors[0], "distance_error": errors[1]}
        )
        print(
            f"  {contender:22s}{images:6d} images{seconds:9.3f} s ={share:8.2%} of an epoch"
            + ("" if np.isnan(errors[0]) else f"   error {errors[0]:.4f} a pair, {errors[1]:.4f} of the vector")
        )

    warnings.simplefilter("ignore", FewSamplesWarning)  # the errors say it
    for size in sizes:
        parts = [inputs[i * size : (i + 1) * size] for i in range(sets)]
        measured = [flows(net, part, kinds=KINDS) for part in parts]
        for kind in KINDS:
            monitor = FlowMonitor(parts[0], kind)
            add(
                kind, size, processor(lambda monitor=monitor: monitor(net)), _errors([m.vector(kind) for m in measured])
            )
        monitors = [GradientMonitor(part, labels[i * size : (i + 1) * size]) for i, part in enumerate(parts)]
        seconds = processor(lambda monitor=monitors[0]: monitor(net))
        add("gradient norm", size, seconds, _errors([monitor(net) for monitor in monitors]))
    seconds = processor(lambda: released_flow(net, inputs[:trained])) * whole / trained
    add("as released", whole, seconds)
    ours = next(row["seconds"] for row in rows if row["contender"] == "absolute" and row["images"] == sizes[-1])
    print(f"  as released: {seconds / ours:.0f} × ours\n")
    return rows


def processor(work: Callable[[], Any]) -> float:
    """Return seconds of the processor: the median of three runs after one, or the first where it is long."""
    return float(timed(work, enough=20)[0]["processor"])


def _errors(vectors: list[np.ndarray]) -> tuple[float, float]:
    variances = np.stack(vectors).var(axis=0, ddof=1)
    return float(np.sqrt(variances).mean()), float(np.sqrt(variances.sum()))


def released_flow(net: nn.Module, inputs: Tensor) -> list[float]:
    """Return the signed flow as the released code computes it: two passes, float32, a matrix for every pair."""
    pairs = released_pairs(net)
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    batches = inputs.split(BATCH)
    net.eval()
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    with _outputs(net, names) as seen, torch.no_grad():
        for batch in batches:
            net(batch)
            for name in names:
                sums[name] = sums.get(name, 0) + seen[name].sum(0)
                squares[name] = squares.get(name, 0) + (seen[name] ** 2).sum(0)
        means = {name: sums[name] / len(inputs) for name in names}
        deviations = {
            name: torch.clamp((squares[name] / len(inputs) - means[name] ** 2).sqrt(), min=1e-6) for name in names
        }
        matrices: dict[tuple[str, str], Tensor] = {}
        for batch in batches:
            net(batch)
            standard = {name: (seen[name] - means[name]) / deviations[name] for name in names}
            for a, b in pairs:
                matrices[a, b] = matrices.get((a, b), 0) + standard[a].T @ standard[b]
    return [float(matrix.mean() / len(inputs)) for matrix in matrices.values()]


@contextmanager
def _outputs(net: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            seen[name] = (output.mean((2, 3)) if output.ndim == 4 else output).detach().cpu()

        return after

    hooks = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _mlp(quick: bool) -> tuple[nn.Module, Tensor, Tensor, tuple[int, int]]:
    data = datasets.load("digits" if quick else "mnist", "train")
    images = min(len(data), 20_000)
    inputs, labels = data.inputs()[:images], torch.from_numpy(data.labels[:images])
    return mlp(inputs[0].numel(), 300, 100, outputs=10), inputs, labels, (images, images)


def _resnet(quick: bool) -> tuple[nn.Module, Tensor, Tensor, tuple[int, int]]:
    if quick:
        return cifar_resnet(8), torch.randn(200, 3, 32, 32), torch.arange(200) % 10, (64, 50_000)
    data = datasets.load("cifar10", "train").select(np.arange(8000))
    inputs = data.inputs(mean=PRETRAINED_MEAN, std=PRETRAINED_STD)
    return pretrained("resnet20", os.environ.get("ELLQ_DATA")), inputs, torch.from_numpy(data.labels), (1000, 50_000)


if __name__ == "__main__":
    main()
