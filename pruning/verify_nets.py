"""One-hidden-layer nets, random and trained, against the risk theorem: a grid of trials, resumed where it stopped."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ellq.analysis import Dataset, datasets, mlp, partition, write_bytes, write_text
from ellq.analysis.case_runner import run_cases
from ellq.analysis.verify_id import Draws, verify_net
from ellq.analysis.verify_id_plot import draw_samples, draw_slack, draw_widths
from ellq.analysis.verify_id_tables import sample_rates, verdict_table, width_rates
from ellq.pruning.training import train_classifier
from ellq.theory import open_fraction

ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid")
# Entries of the inputs of random nets: independent, standard normal or uniform in [−1, 1].
RANDOM = {"gaussian": (-np.inf, np.inf), "uniform": (-1.0, 1.0)}
TRAINED = ("digits", "fashion-mnist", "mnist")
SHARES = {"fit": 0.3, "choice": 0.5, "held_out": 0.2}  # of the train part: to train, to choose by, to bound by
INPUTS, OUTPUTS = 32, 4  # of random nets
FRESH = 20_000  # inputs to try the bounds of random nets on
_STEPS = 2000  # of training, about


@dataclass(frozen=True)
class Grid:
    """Which nets to try the theorem on, and how.

    Attributes:
        data: ``"gaussian"`` and ``"uniform"`` for random nets on such inputs, or data sets to train on.
        activations: of the hidden layer.
        widths: hidden units m.
        samples: sizes n of the choice; those beyond what a data set holds are left out.
        fractions: of the units to keep.
        tolerances: relative output errors to keep units for.
        repeats: nets, each with its own choices, for every combination.
    """

    data: tuple[str, ...]
    activations: tuple[str, ...] = ACTIVATIONS
    widths: tuple[int, ...] = (32, 128, 512, 2048, 4096)
    samples: tuple[int, ...] = (100, 300, 1000, 3000, 10_000, 30_000)
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75)
    tolerances: tuple[float, ...] = (0.3, 0.1, 0.03)
    repeats: int = 3


QUICK = Grid(("gaussian", "uniform", "digits"), widths=(32, 128), samples=(100, 300, 1000, 3000), repeats=2)


def full_grid() -> Grid:
    """Return the whole grid, over the data sets that are on this machine: days of one processor."""
    return Grid((*RANDOM, *(name for name in TRAINED if _is_here(name))))


@dataclass(frozen=True, eq=False)
class Verification:
    """What a grid of trials found.

    Attributes:
        frame: a row per trial, rule and width: ``verify_net``'s columns behind those of the trial.
        delta: δ of each bound.
    """

    frame: pd.DataFrame
    delta: float

    @property
    def verdicts(self) -> pd.DataFrame:
        """How each bound fared, over all trials: ``verdict_table``."""
        return verdict_table(self.frame, delta=self.delta)

    @property
    def holds(self) -> bool:
        """Whether no bound was broken more often than its δ allows."""
        return bool(self.verdicts["holds"].all())


def verify_id(
    out: str | os.PathLike[str], *, grid: Grid = QUICK, jobs: int = 1, seed: int = 0, delta: float = 0.05
) -> Verification:
    """Check the risk theorem of interpolative decomposition on a grid of nets, with inputs it has not seen.

    Nets are random, or trained on a part of the data of their own. Another part chooses the skeletons and makes the
    bounds, a third serves those that need held-out inputs, and the test part (or fresh draws) tries them. Every trial
    is kept in ``out`` as it ends: stopped at any time, the same call does the rest and ends with the same files,
    whatever ``jobs``.

    Writes ``cases.csv`` (a row per trial, rule and width), ``verdicts.csv``, ``rates_samples.csv`` and
    ``rates_widths.csv``, the pictures ``slack``, ``samples`` and ``widths`` as PNG, and below ``cases/`` and ``nets/``
    what resuming needs.

    Args:
        out: the folder; made if it does not exist.
        grid: which trials.
        jobs: how many processes.
        seed: of everything random.
        delta: δ of each bound, in (0, 1).

    Returns:
        The verification.

    Raises:
        ValueError: an argument out of range, a name that is not known, or a grid without trials.
        FileNotFoundError: a data set of the grid is not on this machine.
        OSError: ``out`` cannot be written.
    """
    open_fraction(delta, "delta")
    trials = _trials(grid, seed, delta)
    folder = Path(out)
    nets = list({_net_file(trial): trial for trial in trials if trial["data"] not in RANDOM}.values())
    kept = folder / "nets"
    run_cases(partial(_train, folder=str(kept)), nets, folder / "cases", jobs=jobs, task="training")
    rows = run_cases(partial(_try, folder=str(kept)), trials, folder / "cases", jobs=jobs, task="verifying")
    result = Verification(pd.DataFrame(rows), delta)
    frame = result.frame
    tables = {
        "cases": frame,
        "verdicts": pd.concat([result.verdicts.assign(data="all"), verdict_table(frame, delta=delta, by=["data"])]),
        "rates_samples": sample_rates(frame),
        "rates_widths": width_rates(frame),
    }
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    for name, draw in {"slack": draw_slack, "samples": draw_samples, "widths": draw_widths}.items():
        draw(frame).savefig(folder / f"{name}.png")
    return result


def _trials(grid: Grid, seed: int, delta: float) -> list[dict[str, Any]]:
    _check(grid)
    trials = []
    for data, activation, width, repeat in product(grid.data, grid.activations, grid.widths, range(grid.repeats)):
        most = None if data in RANDOM else len(_parts(data)["choice"])
        for n in grid.samples:
            if most is None or n <= most:
                trials.append(
                    {
                        "data": data,
                        "activation": activation,
                        "width": width,
                        "seed": seed + repeat,
                        "n": n,
                        "retained": sorted({max(1, round(fraction * width)) for fraction in grid.fractions}),
                        "tolerances": list(grid.tolerances),
                        "delta": delta,
                        "version": version("ellq"),
                    }
                )
    if not trials:
        raise ValueError(f"The grid holds no trial: samples={grid.samples} exceed what {grid.data} hold.")
    return trials


def _check(grid: Grid) -> None:
    for field in fields(grid):
        if field.name != "repeats" and not getattr(grid, field.name):
            raise ValueError(f"{field.name} of the grid is empty. Give at least one.")
    for name, known in (("data", (*RANDOM, *TRAINED)), ("activations", ACTIVATIONS)):
        for value in getattr(grid, name):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown. Choose among {', '.join(known)}.")
    if min(grid.widths) < 2 or min(grid.samples) < 4 or grid.repeats < 1:
        raise ValueError(
            f"widths={grid.widths}, samples={grid.samples} and repeats={grid.repeats} must be at least 2, 4 and 1."
        )
    for name in ("fractions", "tolerances"):
        for value in getattr(grid, name):
            open_fraction(value, name)


def _train(trial: Mapping[str, Any], *, folder: str) -> list[dict[str, Any]]:
    _net(trial, folder)
    return []


def _try(trial: Mapping[str, Any], *, folder: str) -> list[dict[str, Any]]:
    names = ("data", "activation", "width", "seed", "n")
    found = verify_net(
        _net(trial, folder),
        _draws(trial),
        retained=trial["retained"],
        tolerances=trial["tolerances"],
        delta=trial["delta"],
    )
    return [{name: trial[name] for name in names} | row for row in found]


def _draws(trial: Mapping[str, Any]) -> Draws:
    n, data = trial["n"], trial["data"]
    generator = torch.Generator().manual_seed(_entropy(trial, "draws", n))
    if data in RANDOM:
        low, high = RANDOM[data]

        def draw(count: int) -> Tensor:
            if data == "gaussian":
                return torch.randn(count, INPUTS, generator=generator)
            return 2 * torch.rand(count, INPUTS, generator=generator) - 1

        fresh = draw(FRESH)
        teacher = _new_net(trial, seed=_entropy(trial, "teacher"))
        with torch.no_grad():
            targets = teacher(fresh).double().numpy()
        return Draws(draw(n), draw(n), fresh, targets, low, high)
    parts = _parts(data)
    choice, held_out = (_some(parts[name], n, generator) for name in ("choice", "held_out"))
    test = parts["test"]
    return Draws(choice, held_out, test.inputs(), np.eye(len(test.classes))[test.labels], 0.0, 1.0)


def _some(part: Dataset, count: int, generator: torch.Generator) -> Tensor:
    return part.inputs()[torch.randperm(len(part), generator=generator)[:count]]


def _net(trial: Mapping[str, Any], folder: str) -> nn.Sequential:
    """Return the net of a trial: drawn, or trained once and kept."""
    seed = _entropy(trial, "net")
    if trial["data"] in RANDOM:
        return _new_net(trial, seed=seed)
    path = Path(folder) / _net_file(trial)
    fit = _parts(trial["data"])["fit"]
    try:
        net = _new_net(trial, seed=seed)
        net.load_state_dict(load(path.read_bytes()))
        return net.eval()
    except (OSError, SafetensorError, RuntimeError):
        net = train_classifier(
            lambda: _new_net(trial, seed=seed),
            fit.inputs(),
            fit.labels,
            epochs=max(3, _STEPS * 64 // len(fit)),
            seed=seed,
        )
        write_bytes(path, save(net.state_dict()))
        return net


def _net_file(trial: Mapping[str, Any]) -> str:
    return "-".join(str(trial[name]) for name in ("data", "activation", "width", "seed")) + ".safetensors"


def _new_net(trial: Mapping[str, Any], *, seed: int) -> nn.Sequential:
    if trial["data"] in RANDOM:
        inputs, outputs = INPUTS, OUTPUTS
    else:
        test = _parts(trial["data"])["test"]
        inputs, outputs = math.prod(test.images.shape[1:]), len(test.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp(inputs, trial["width"], outputs=outputs, activation=trial["activation"]).eval()


def _entropy(trial: Mapping[str, Any], *purpose: object) -> int:
    """Return a seed that depends on the net of a trial and what it is for, so that no two draws are alike."""
    text = repr([*(trial[name] for name in ("data", "activation", "width", "seed")), *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")


@lru_cache(maxsize=2)
def _parts(name: str) -> dict[str, Dataset]:
    """Return the three parts of a data set's train part, and its test part without what is in those."""
    train, test = (datasets.load(name, part, download=False) for part in ("train", "test"))
    known = {image.tobytes() for image in train.images}
    is_new = np.array([image.tobytes() not in known for image in test.images])
    return {**partition(train, **SHARES), "test": test.select(is_new)}


def _is_here(name: str) -> bool:
    try:
        datasets.load(name, "test", download=False)
    except FileNotFoundError:
        return False
    return True
