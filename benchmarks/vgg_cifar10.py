"""The CIFAR-10 VGG-16 cut to 49% of its FLOPs: trained, pruned by the authors' rules and ours, fine-tuned alike.

For each seed the net is trained (SGD, momentum 0.9, weight decay 5e-4, rate 0.1 ÷10 at a half and three quarters,
padded crops and flips), pruned from 1000 training images without labels, measured on all test images, and fine-tuned by
the same recipe from a rate of 0.01. All that is done is kept in the folder `--out`, each epoch's state and each row of
`results.csv` whole or not at all: a run that is killed goes on where it was. Nothing is chosen by test images.

With `--data mnist` images are padded to 32 and not augmented; `--small` takes an eighth of the widths and the first
10,000 training images: a check of the script that takes minutes on a processor, not the experiment.

    ELLQ_DATA=… python benchmarks/vgg_cifar10.py --out FOLDER [--data mnist] [--small] [--epochs 160]
        [--tuning-epochs 40] [--seeds 0 1 2] [--device cuda] [--tables]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import ellq
from ellq.analysis import PRETRAINED_MEAN, PRETRAINED_STD, accuracy, cost, datasets, write_bytes
from ellq.analysis.nets import VGG16_WIDTHS, vgg16_cifar10

FRACTION, CALIBRATION, SMALL = 0.49, 1_000, 10_000
CONTENDERS: dict[str, dict[str, Any]] = {
    "ours": {},
    "chee2021": {"rule": "chee2021"},
    "chee2022": {"rule": "chee2022"},
}
KEY = ["seed", "contender"]
COLUMNS = [*KEY, "dense", "flops", "parameters", "before", "after", "seconds"]


@dataclass(frozen=True)
class Recipe:
    """How a net is trained.

    Attributes:
        epochs: passes over the training images.
        rate: learning rate at the start; a tenth from a half on, a hundredth from three quarters on.
        batch: images per step.
        augments: whether images are cropped out of a padding of 4 and flipped.
    """

    epochs: int
    rate: float
    batch: int
    augments: bool


@dataclass(frozen=True)
class Images:
    """Training and test images with their labels, on the device."""

    inputs: Tensor
    labels: Tensor
    test: Tensor
    truth: Tensor


def main() -> None:
    """Do what is not done yet, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of states and results")
    parser.add_argument("--data", choices=("cifar10", "mnist"), default="cifar10")
    parser.add_argument("--small", action="store_true", help="an eighth of the widths, 10,000 training images")
    parser.add_argument("--epochs", type=int, help="of training: 160, or 2 with --small")
    parser.add_argument("--tuning-epochs", type=int, help="of fine-tuning: 40, or 1 with --small")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tables", action="store_true", help="print the table of the results and do nothing")
    options = parser.parse_args()
    csv = options.out / "results.csv"
    if options.tables:
        print(table(pd.read_csv(csv)))
        return
    trains, tunes = (
        Recipe(given or (few if options.small else many), rate, options.batch, options.data == "cifar10")
        for given, few, many, rate in ((options.epochs, 2, 160, 0.1), (options.tuning_epochs, 1, 40, 0.01))
    )
    require_same(options.out / "settings.json", {"data": options.data, "small": options.small, **vars(trains)}, tunes)
    widths = [n // 8 for n in VGG16_WIDTHS] if options.small else None
    images: Images | None = None
    for seed in options.seeds:
        there = set(pd.read_csv(csv)[KEY].itertuples(index=False, name=None)) if csv.exists() else set()
        missing = [name for name in CONTENDERS if (seed, name) not in there]
        if not missing:
            continue
        images = images or loaded(options.data, options.small, options.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = vgg16_cifar10(widths).to(options.device)
        trained(net, images, trains, seed, options.out / f"seed{seed}.safetensors")
        for name in missing:
            row = {"seed": seed, "contender": name, **compared(net, name, images, tunes, seed, options.out)}
            append(row, csv)
            print(*row.values(), flush=True)


def compared(net: nn.Module, name: str, images: Images, tunes: Recipe, seed: int, out: Path) -> dict[str, float]:
    """Prune a trained net, measure, fine-tune and measure again."""
    chosen = np.random.default_rng(seed).permutation(len(images.inputs))[:CALIBRATION]
    began = time.perf_counter()
    calibration = images.inputs[torch.from_numpy(chosen).to(images.inputs.device)]
    pruned = ellq.prune(net, calibration, method="id", flops=FRACTION, **CONTENDERS[name])
    seconds = time.perf_counter() - began
    dense, narrow = (cost(model, images.test[:1]) for model in (net, pruned))
    tuned = trained(copy.deepcopy(pruned), images, tunes, seed, out / f"seed{seed}-{name}.safetensors")
    return {
        "dense": accuracy(net, images.test, images.truth),
        "flops": round(narrow.flops / dense.flops, 5),
        "parameters": round(narrow.parameters / dense.parameters, 5),
        "before": accuracy(pruned, images.test, images.truth),
        "after": accuracy(tuned, images.test, images.truth),
        "seconds": round(seconds, 2),
    }


def trained(net: nn.Module, images: Images, recipe: Recipe, seed: int, path: Path) -> nn.Module:
    """Train a net in place from the last epoch that is in the file, to which every epoch's state is written."""
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=5e-4)
    for epoch in range(_restore_(net, optimizer, path), recipe.epochs):
        rate = recipe.rate * 0.1 ** ((epoch >= recipe.epochs / 2) + (epoch >= recipe.epochs * 3 / 4))
        optimizer.param_groups[0]["lr"] = rate
        draw = torch.Generator().manual_seed(seed * 1_000_000 + epoch)  # an epoch repeats whatever came before it
        net.train()
        for chosen in torch.split(torch.randperm(len(images.inputs), generator=draw), recipe.batch):
            chosen = chosen.to(images.inputs.device)
            batch = images.inputs[chosen]
            if recipe.augments:
                batch = augmented(batch, draw)
            optimizer.zero_grad()
            cross_entropy(net(batch), images.labels[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        _keep(net, optimizer, epoch + 1, path)
    return net.eval()


def augmented(batch: Tensor, draw: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels, zeros coming in, and flip every second one."""
    n, _, height, width = batch.shape
    top, left = (torch.randint(9, (n, 1), generator=draw).to(batch.device) for _ in range(2))
    flips = (torch.rand(n, 1, generator=draw) < 0.5).to(batch.device)
    rows = top + torch.arange(height, device=batch.device)
    across = torch.arange(width, device=batch.device)
    columns = left + torch.where(flips, width - 1 - across, across)
    images = torch.arange(n, device=batch.device)
    padded = pad(batch, (4, 4, 4, 4)).movedim(1, -1)
    return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def loaded(data: str, small: bool, device: str) -> Images:
    """Return the images in the size and the three channels that the net reads."""
    train, test = datasets.load(data, "train"), datasets.load(data, "test")
    if small:
        train = train.select(np.arange(SMALL))
    if data == "cifar10":
        inputs = [part.inputs(mean=PRETRAINED_MEAN, std=PRETRAINED_STD) for part in (train, test)]
    else:
        inputs = [pad(part.inputs(mean=0.1307, std=0.3081), (2, 2, 2, 2)).repeat(1, 3, 1, 1) for part in (train, test)]
    labels = [torch.as_tensor(np.asarray(part.labels), dtype=torch.int64) for part in (train, test)]
    return Images(inputs[0].to(device), labels[0].to(device), inputs[1].to(device), labels[1].to(device))


def require_same(path: Path, settings: dict[str, Any], tunes: Recipe) -> None:
    """Write what the results depend on, or see that the folder was begun with the same."""
    settings = settings | {f"tuning {name}": value for name, value in vars(tunes).items()}
    if not path.exists():
        write_bytes(path, json.dumps(settings, indent=1).encode())
    elif json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{path.parent} was begun with other settings, see {path}. Name another folder.")


def _keep(net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, path: Path) -> None:
    tensors = {f"net.{name}": value.cpu() for name, value in net.state_dict().items()}
    for number, parameter in enumerate(net.parameters()):
        tensors[f"momentum.{number}"] = optimizer.state[parameter]["momentum_buffer"].cpu()
    write_bytes(path, save(tensors, {"epochs": str(epochs)}))


def _restore_(net: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Read weights and momentum where the file is there and of this net; return how many epochs they have seen."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        epochs = int(file.metadata()["epochs"])
    state = net.state_dict()
    if any(tensors[f"net.{name}"].shape != value.shape for name, value in state.items()):
        return 0  # pruned anew, to other widths: not all devices repeat themselves
    net.load_state_dict({name: tensors[f"net.{name}"].to(state[name].device) for name in state})
    for number, parameter in enumerate(net.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{number}"].to(parameter.device)
    return epochs


def append(row: dict[str, Any], csv: Path) -> None:
    """Add a row to the file in one write, so that it is there whole or not at all."""
    text = pd.DataFrame([row], columns=COLUMNS).to_csv(index=False, header=not csv.exists())
    with csv.open("ab", buffering=0) as file:
        file.write(text.encode())


def table(rows: pd.DataFrame) -> str:
    """Return the table: accuracies in percent, means over seeds with their standard deviations."""
    lines = [["", "seeds", "dense", "before fine-tuning", "after", "FLOPs", "parameters", "seconds"]]
    for name in (name for name in CONTENDERS if name in set(rows["contender"])):
        own = rows[rows["contender"] == name]
        accuracies = [_spread(own[column]) for column in ("dense", "before", "after")]
        shares = [f"{own[column].mean():.1%}" for column in ("flops", "parameters")]
        lines.append([name, str(len(own)), *accuracies, *shares, f"{own['seconds'].median():.1f}"])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def _spread(values: pd.Series) -> str:
    mean = f"{100 * values.mean():.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * values.std():.2f}"


if __name__ == "__main__":
    main()
