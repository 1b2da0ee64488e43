"""When to stop retraining a pruned net: stopping rules on equal terms, and controls that know nothing.

Every rule has the same dense net, optimiser, masks (the largest weights of all layers), schedule, rewinding and cap;
only when an iteration ends differs. A control has exactly as many epochs in all as the rule it belongs to, for the same
net and seed: "even as …" spreads them evenly over the iterations, "random as …" at random, and "late as …" gives as
many to the last iterations as the cap allows and one to each of the others. Images are trained on, validated on (for
rules that look at accuracy, and for nothing else), monitored (the first of those trained on) and tested on (only
reported). Every run also logs all flows, whether its rule looks at them or not.

A row for each iteration of a run is appended to the CSV as soon as the run is over; runs that are there are not made
again. An epoch that a run of the same net and seed has trained before, from the same bits under the same random state,
is remembered and not trained again. Seconds are of the processor, of one thread, as they were when the epoch was
trained: what a wall clock shows where nothing else runs. A rule pays for what it looks at alone, its calibration
included.

    ELLQ_DATA=… OMP_NUM_THREADS=1 python benchmarks/bench_stopping.py [--nets "digits mlp" …] [--rules accuracy …]
        [--seeds 0 1 …] [--quick] [--csv FILE] [--tables] [--figures FOLDER]

``--tables`` and ``--figures`` make those of docs/results/stopping.md from the CSV.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ellq
from ellq.analysis import (
    INK,
    PALETTE,
    PRETRAINED_MEAN,
    PRETRAINED_STD,
    FlowMonitor,
    GradientMonitor,
    datasets,
    flows,
    gradient_flow,
    mlp,
    new_figure,
    predict,
    pretrained,
    shared_look,
    small_conv,
)
from ellq.analysis.digest import digest
from ellq.analysis.layer_axis import PERCENT
from ellq.pruning import EpochTrainer, calibrate_epsilon_on_halves
from ellq.pruning.gharatappeh import released_stop
from ellq.pruning.iterate import IterateError
from ellq.pruning.iterate_plot import draw_flows
from ellq.pruning.iterated import Iterated
from ellq.pruning.mask_parametrization import masks_of, stored_tensors
from ellq.pruning.stopping import (
    Stop,
    accuracy_back,
    all_of,
    any_of,
    fixed,
    flow_back,
    gradient_back,
    masks_stable,
    patience,
    random_stop,
)
from ellq.theory import FewSamplesWarning

CSV = Path(__file__).parent.parent / "docs" / "results" / "stopping.csv"
FLOWS = ("signed", "absolute", "rms", "cka", "gaussian", "copula")
GRADIENT = "gradient norm"
STATISTICS = (*FLOWS, GRADIENT, "gradient mean")
DRAWN_FLOWS = ("absolute", "signed", "gaussian", GRADIENT)
KEY = ["net", "seed", "rule"]
MEASURED = ("value", "distance", "change")  # mean of entries; to the dense net's; since the check before
COLUMNS = [
    *KEY,
    "iteration",
    "sparsity",
    "epochs",
    "stop",
    "validation_accuracy",
    "test_accuracy",
    "first_test_accuracy",  # after one epoch of the iteration
    "training_seconds",
    "monitoring_seconds",
    "loss",
    "validation_loss",
    *[f"{statistic}: {what}" for statistic in STATISTICS for what in MEASURED],
]
BOOTSTRAPS = 1000
REMEMBERED = 800  # epochs; those of the MLPs on MNIST take 2 MB each


@dataclass(frozen=True)
class Setting:
    """What a net is trained on, and how often and how long.

    Attributes:
        make: builds the net.
        data: the name of the images.
        fit: how many are trained on, drawn by the seed.
        validation: how many are validated on.
        test: how many of the test part are tested on, from the first on.
        warm_up: epochs of the dense net.
        iterations: how often it is pruned.
        sparsity: after the last iteration.
        cap: the most epochs of an iteration; even, as the released code needs it.
        seeds: how many.
        monitor: how many images flows are measured on.
        learning_rate: of SGD with momentum 0.9, constant.
        is_pretrained: whether the net has seen all training images, so that it is validated on others of the test part.
    """

    make: Callable[[], nn.Module]
    data: str
    fit: int
    validation: int
    test: int
    warm_up: int
    iterations: int
    sparsity: float
    cap: int
    seeds: int = 5
    monitor: int = 500
    learning_rate: float = 0.05
    is_pretrained: bool = False


def normed_conv() -> nn.Sequential:
    """Build three 3x3 convolutions with batch norm, two of them with stride 2, and a Linear layer on the means."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 2), (16, 32, 2), (32, 32, 1)):
        conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


_MLP = Setting(partial(mlp, 784, 300, 100, outputs=10), "mnist", 10_000, 2_000, 10_000, 5, 8, 0.96, 6)
_DIGITS = Setting(partial(mlp, 64, 100, 50, outputs=10), "digits", 1_000, 300, 500, 20, 14, 0.956, 10)
NETS = {
    "digits mlp": _DIGITS,
    "digits conv": Setting(partial(small_conv, 1, 8, 10), "digits", 1_000, 300, 500, 20, 10, 0.96, 8),
    "mnist mlp": _MLP,
    "fashion-mnist mlp": Setting(_MLP.make, "fashion-mnist", 10_000, 2_000, 10_000, 5, 8, 0.96, 6),
    "mnist conv": Setting(normed_conv, "mnist", 5_000, 2_000, 5_000, 4, 6, 0.953, 6, seeds=3),
    "cifar10 resnet20": Setting(
        partial(pretrained, "resnet20"),
        "cifar10",
        10_000,
        5_000,
        5_000,
        0,
        4,
        0.95,
        4,
        seeds=3,
        learning_rate=0.01,
        is_pretrained=True,
    ),
}


class Observer:
    """Measures all that is logged of a net, once for each net.

    Attributes:
        seconds: what each name's measurement alone takes of the processor, as it did on the first net.
        entries: what the entries of each name are, once a net has been measured.

    Args:
        inputs: monitored, and their labels.
        validation: images and labels that are validated on.
        test: likewise tested.
    """

    def __init__(
        self, inputs: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
    ) -> None:
        self._inputs, self._answered = inputs, {"validation": validation, "test": test}
        self._known: dict[str, dict[str, np.ndarray]] = {}
        self._last: tuple[nn.Module | None, str] = None, ""
        self.seconds: dict[str, float] = {}
        self.entries: dict[str, Sequence[Any]] = {}

    def __call__(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Return the values of every name."""
        if model is not self._last[0]:  # each epoch gives another object
            self._last = model, _digest_of(model)
        state = self._last[1]
        if state not in self._known:
            self._known[state] = self._measured(model)
        return self._known[state]

    def _measured(self, model: nn.Module) -> dict[str, np.ndarray]:
        inputs, labels = self._inputs
        found = flows(model, inputs, kinds=FLOWS)
        gradients = gradient_flow(model, [(inputs, labels)])
        vectors = {kind: found.vector(kind) for kind in FLOWS}
        vectors |= {f"gradient {what}": gradients.vector(what) for what in ("norm", "mean")}
        for name, (images, truth) in self._answered.items():
            logits = predict(model, images)
            right = float((logits.argmax(1) == truth).double().mean())
            vectors[name] = np.array([right, float(cross_entropy(logits, truth))])
        if not self.seconds:
            self.entries = dict.fromkeys(FLOWS, found.pairs) | dict.fromkeys(self._answered, ("accuracy", "loss"))
            self.entries |= {f"gradient {what}": gradients.layers for what in ("norm", "mean")}
            self._time(model)
        return vectors

    def _time(self, model: nn.Module) -> None:
        inputs, labels = self._inputs
        looks: dict[str, Callable[[nn.Module], Any]] = {kind: FlowMonitor(inputs, kind) for kind in FLOWS}
        looks["gradient norm"] = GradientMonitor(inputs, labels)
        looks["validation"] = partial(predict, inputs=self._answered["validation"][0])
        for name, look in looks.items():
            look(model)
            began = time.process_time()
            for _ in range(3):
                look(model)
            self.seconds[name] = (time.process_time() - began) / 3


@dataclass(frozen=True, eq=False)
class View:
    """One of the monitors that an observer combines."""

    observer: Observer
    name: str

    @property
    def pairs(self) -> Sequence[Any]:
        """What the entries are."""
        return self.observer.entries.get(self.name, ())

    def __call__(self, model: nn.Module) -> np.ndarray:
        """Return the values of the entries."""
        return self.observer(model)[self.name]

    def identity(self) -> str:
        """Return its name."""
        return self.name


class RememberingTrainer:
    """An ``EpochTrainer`` that remembers what an epoch made of a net, its moments and a random state.

    Attributes:
        trainer: what it trains with.
        seconds: of the processor, an entry for each epoch since the last run began.
    """

    def __init__(self, trainer: EpochTrainer) -> None:
        self.trainer, self.seconds = trainer, list[float]()
        self._known: dict[tuple[str, str, int], tuple[dict[str, Tensor], dict[str, Any], float, float]] = {}
        self.state_dict, self.load_state_dict, self.reset = trainer.state_dict, trainer.load_state_dict, trainer.reset

    def __call__(self, model: nn.Module, position: int) -> float:
        """Train the model in place for an epoch, or put in place what that gave before."""
        moments = self.trainer.state_dict()["moments"] or {}
        kept = [value for name in sorted(moments) for value in moments[name].values() if isinstance(value, Tensor)]
        key = _digest_of(model), digest(torch.get_rng_state(), *kept), position
        if key not in self._known:
            began = time.process_time()
            loss = self.trainer(model, position)
            seconds = time.process_time() - began
            if len(self._known) < REMEMBERED:
                tensors = {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}
                self._known[key] = tensors, self.trainer.state_dict(), loss, seconds
        else:
            tensors, state, loss, seconds = self._known[key]
            self.trainer.load_state_dict(state)
            with torch.no_grad():
                for name, tensor in stored_tensors(model).items():
                    tensor.copy_(tensors[name])
            model.eval()
        self.seconds.append(seconds)
        return loss


def _digest_of(model: nn.Module) -> str:
    named = {**stored_tensors(model), **{f"mask of {name}": mask for name, mask in masks_of(model).items()}}
    return digest(*(named[name] for name in sorted(named)))


@dataclass
class Case:
    """A dense net, and all that looks at it.

    Attributes:
        setting: how it is pruned.
        seed: of all random states.
        net: the dense net.
        train: trains it.
        observer: looks at it.
        monitors: all that is logged, by name.
        inputs: those monitored, and their labels.
        epsilons: ε of each flow that was asked for, and the seconds it took to find.
    """

    setting: Setting
    seed: int
    net: nn.Module
    train: RememberingTrainer
    observer: Observer
    monitors: dict[str, View]
    inputs: tuple[Tensor, Tensor]
    epsilons: dict[str, tuple[float, float]] = field(default_factory=dict)

    def epsilon(self, name: str) -> float:
        """Return how far flows of the dense net lie apart on halves of the monitored images."""
        if name not in self.epsilons:
            began = time.process_time()
            if name == GRADIENT:
                found = calibrate_epsilon_on_halves(GradientMonitor, self.net, *self.inputs, seed=self.seed)
            else:
                found = calibrate_epsilon_on_halves(partial(FlowMonitor, kind=name), self.net, self.inputs[0])
            self.epsilons[name] = found, time.process_time() - began
        return self.epsilons[name][0]


def make_case(setting: Setting, seed: int) -> Case:
    """Draw images, train the dense net, and prepare what looks at it."""
    scale: dict[str, Any] = {"mean": PRETRAINED_MEAN, "std": PRETRAINED_STD} if setting.is_pretrained else {}
    train, test = (datasets.load(setting.data, part) for part in ("train", "test"))
    drawn = np.random.default_rng(seed).permutation(len(train))
    fit = train.select(drawn[: setting.fit])
    validated = train.select(drawn[setting.fit : setting.fit + setting.validation])
    tested = test.select(np.arange(min(setting.test, len(test))))
    if setting.is_pretrained:
        validated = test.select(np.arange(setting.test, setting.test + setting.validation))
    datasets.refuse_overlap(fit=fit, validated=validated, tested=tested)
    parts = [(part.inputs(**scale), torch.from_numpy(part.labels)) for part in (fit, validated, tested)]
    trainer = EpochTrainer(*parts[0], learning_rate=setting.learning_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = setting.make()
        for epoch in range(setting.warm_up):
            trainer(net, epoch)
    trainer.reset()
    inputs, labels = (part[: setting.monitor] for part in parts[0])
    observer = Observer((inputs, labels), *parts[1:])
    monitors = {name: View(observer, name) for name in (*STATISTICS, "validation", "test")}
    return Case(setting, seed, net, RememberingTrainer(trainer), observer, monitors, (inputs, labels))


Rule = Callable[[Case], Stop]


@dataclass(frozen=True)
class Contender:
    """A way to stop.

    Attributes:
        stop: makes the rule; None where the cap alone holds, or where it follows another.
        sees_accuracy: whether the rule looks at validation accuracy.
        follows: the rule whose epochs in all it has, for controls.
        spread: how a control has them: "even", "random" or "late".
        every: epochs between checks.
        has_own_epsilon: whether ε is the authors' and need not be found.
        is_released: whether the whole loop is the authors', masks included.
    """

    stop: Rule | None = None
    sees_accuracy: bool = False
    follows: str = ""
    spread: str = ""
    every: int = 1
    has_own_epsilon: bool = False
    is_released: bool = False


def _flow(case: Case, name: str) -> Stop:
    back = gradient_back if name == GRADIENT else flow_back
    return back(case.monitors[name], case.epsilon(name))


def _both(case: Case) -> Stop:
    return all_of(_flow(case, "absolute"), _flow(case, GRADIENT))


def _or_accuracy(case: Case, stop: Rule) -> Stop:
    return any_of(stop(case), accuracy_back())


def _released(case: Case, epsilon: float) -> Stop:
    return released_stop(_released_flow(case, epsilon))


def _released_flow(case: Case, epsilon: float) -> Stop:
    """Return their stop by flow, though between layers that the graph joins: in a ResNet theirs skips shortcuts."""
    return flow_back(case.monitors["signed"], epsilon)


def _anywhere(case: Case, number: int) -> Stop:
    return random_stop(1, case.setting.cap, seed=1000 * case.seed + number)


def _at_the_end(case: Case) -> Stop:
    """Return the rule that trains one epoch in every iteration, and as long as it can in the last."""
    once, last = fixed(1), case.setting.iterations
    return Stop("at_the_end", {}, lambda history: None if history.iteration == last else once(history))


FLOW_RULES: dict[str, Rule] = {
    "signed flow": partial(_flow, name="signed"),
    "absolute flow": partial(_flow, name="absolute"),
    "Gaussian flow": partial(_flow, name="gaussian"),
    "gradient flow": partial(_flow, name=GRADIENT),
    "flow and gradient": _both,
}
OTHER_RULES: dict[str, Rule] = {
    "patience": lambda case: patience(2),
    "early-bird": lambda case: masks_stable(0.1, 2, relative=True),
}
FIXED, ACCURACY = "fixed budget", "accuracy"
ALONE: dict[str, Contender] = {
    FIXED: Contender(),
    "one epoch, the last the cap": Contender(_at_the_end),
    ACCURACY: Contender(lambda case: accuracy_back(), sees_accuracy=True),
    **{name: Contender(stop, sees_accuracy=name == "patience") for name, stop in (FLOW_RULES | OTHER_RULES).items()},
}
COMBINED: dict[str, Contender] = {
    f"{name} or accuracy": Contender(partial(_or_accuracy, stop=stop), sees_accuracy=True)
    for name, stop in (FLOW_RULES | OTHER_RULES).items()
}
RELEASED: dict[str, Contender] = {
    f"{name}, ε = {epsilon:g}": Contender(partial(stop, epsilon=epsilon), True, has_own_epsilon=True, **how)
    for name, stop, how in (
        ("released stops", _released, {"every": 2}),
        ("gharatappeh2025", _released_flow, {"is_released": True}),
    )
    for epsilon in (0.11, 1.0)
}
SPREADS = ("even", "random", "late")
FOLLOWED = [ACCURACY, *(name for flow in FLOW_RULES for name in (flow, f"{flow} or accuracy"))]
CONTROLS: dict[str, Contender] = {
    f"{spread} as {name}": Contender(follows=name, spread=spread) for name in FOLLOWED for spread in SPREADS
}
ANYWHERE = {f"any time, draw {number}": Contender(partial(_anywhere, number=number)) for number in (1, 2, 3)}
CONTENDERS = ALONE | COMBINED | RELEASED | CONTROLS | ANYWHERE


def main() -> None:
    """Make the runs that are missing, or show those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--rules", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, help="by default as many as the net's setting says")
    parser.add_argument("--quick", action="store_true", help="the MLP on digits, one seed, two iterations, a cap of 4")
    parser.add_argument("--csv", type=Path, help=f"where rows are; {CSV.name} in docs/results, for --quick a new file")
    parser.add_argument("--tables", action="store_true", help="print the tables of the CSV and train nothing")
    parser.add_argument("--figures", type=Path, help="folder to draw the CSV's figures into; nothing is trained")
    options = parser.parse_args()
    csv = options.csv or (Path(tempfile.mkdtemp()) if options.quick else CSV.parent) / CSV.name
    if options.tables or options.figures:
        rows = pd.read_csv(csv)
        if options.tables:
            print(tables(rows))
        if options.figures:
            draw_all(rows, pd.read_csv(_flows_csv(csv)), options.figures)
        return
    settings = {name: NETS[name] for name in options.nets}
    if options.quick:
        settings = {"digits mlp": Setting(_DIGITS.make, "digits", 500, 200, 200, 4, 2, 0.9, 4, seeds=1, monitor=200)}
    warnings.simplefilter(
        "ignore", FewSamplesWarning
    )  # half of the monitored images can be fewer than the units of a pair
    for name, setting in settings.items():
        for seed in options.seeds or range(setting.seeds):
            run_missing(name, setting, seed, options.rules, csv)


def run_missing(net: str, setting: Setting, seed: int, rules: Iterable[str], csv: Path) -> None:
    """Append the rows of a net and seed that are not in the file yet; a control waits for the rule it follows."""
    there = pd.read_csv(csv) if csv.exists() else pd.DataFrame(columns=COLUMNS)
    own = there[(there["net"] == net) & (there["seed"] == seed)]
    missing = [rule for rule in CONTENDERS if rule in set(rules) - set(own["rule"])]
    if not missing:
        return
    case = make_case(setting, seed)
    used = {rule: rows["epochs"].tolist()[1:] for rule, rows in own.groupby("rule")}
    for rule in missing:
        follows = CONTENDERS[rule].follows
        if follows and follows not in used:
            print(f"{net}, seed {seed}: {rule!r} follows a rule that has not been run")
            continue
        began = time.perf_counter()
        rows, said = run(case, rule, used.get(follows, []))
        named: dict[str, Any] = {"net": net, "seed": seed, "rule": rule}
        if rule == FIXED and seed == 0:
            append(said.assign(**named), [*KEY, *said.columns], _flows_csv(csv))
        append(rows.assign(**named), COLUMNS, csv)  # the last, because it says that the run is there
        used[rule] = rows["epochs"].tolist()[1:]
        last = rows.iloc[-1]
        print(
            f"{net}, seed {seed}, {rule}: {sum(used[rule])} epochs {used[rule]}, {last['test_accuracy']:.4f} at"
            f" {last['sparsity']:.3f}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )


def append(rows: pd.DataFrame, columns: list[str], csv: Path) -> None:
    """Add rows to a file in one write, so that they are there whole or not at all."""
    text = rows.to_csv(columns=columns, index=False, header=not csv.exists(), float_format="%.5g", lineterminator="\n")
    with csv.open("ab", buffering=0) as file:
        file.write(text.encode())


def _flows_csv(csv: Path) -> Path:
    return csv.with_name(f"{csv.stem}_flows.csv")


def run(case: Case, rule: str, followed: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prune a case's net by a rule.

    Args:
        case: net, data and what looks at them.
        rule: the contender's name.
        followed: the epochs of each iteration of the rule that a control follows.

    Returns:
        A row for each iteration, and what the flows that are drawn said.
    """
    contender, setting = CONTENDERS[rule], case.setting
    stop = None if contender.stop is None else contender.stop(case)
    if contender.follows:
        stop = scheduled(followed, setting.cap, contender.spread, case.seed)
    case.train.seconds.clear()
    planning: list[float] = []

    def plan(net: nn.Module, sparsity: float) -> Any:
        began = time.process_time()
        planned = ellq.plan(net, rule="global", refit="none", sparsity=sparsity)
        planning.append(time.process_time() - began)
        return planned

    own: dict[str, Any] = {"rule": "gharatappeh2025", "warm_up": 2}
    if not contender.is_released:
        own = {"sparsity": setting.sparsity, "plan_with": plan, "every": contender.every}
    found, failure = _iterated(
        case.net,
        case.train,
        lambda net: case.observer(net)["validation"][0],
        iterations=setting.iterations,
        cap=setting.cap,
        stop=stop,
        monitors=case.monitors,
        seed=case.seed,
        **own,
    )
    watched = [name for name, monitor in case.monitors.items() if stop is not None and monitor in stop.monitors]
    calibrated = () if contender.has_own_epsilon else watched
    calibrating = sum(case.epsilons[name][1] for name in calibrated)
    watched += ["validation"] if contender.sees_accuracy else []
    check = once = sum(case.observer.seconds[name] for name in watched)
    if stop is not None and stop.draws_masks:
        check += float(np.mean(planning))
    rows = _rows(found, case.train.seconds, once + calibrating, check)
    if failure:
        rows.loc[rows.index[-1], "stop"] = failure
    return rows, found.flows[found.flows["monitor"].isin(DRAWN_FLOWS)]


def _iterated(*args: Any, **options: Any) -> tuple[Iterated, str]:
    """Return what came of a run, as far as it went, and why it went no further."""
    try:
        return ellq.iterate(*args, **options), ""
    except IterateError as error:
        return error.result, f"failed: {error}"


def scheduled(epochs: Sequence[int], cap: int, spread: str, seed: int) -> Stop:
    """Return a rule that knows beforehand when to stop, with as many epochs in all.

    Args:
        epochs: of each iteration of another rule.
        cap: the most of an iteration.
        spread: "even"; "random", drawn uniformly among all stop times with this sum; or "late", as many in the last
            iterations as the cap allows.
        seed: of what is drawn.
    """
    total, count = sum(epochs), len(epochs)
    if spread == "even":
        times = np.diff(np.round(np.linspace(0, total, count + 1))).astype(int)
    elif spread == "late":
        times = 1 + np.diff(np.minimum(np.arange(count + 1) * (cap - 1), total - count))[::-1]
    else:
        random = np.random.default_rng([seed, total])
        is_long = 2 * total > count * (1 + cap)  # then what is missing to the cap is drawn, of which there is less
        left = count * (cap + 1) - total if is_long else total
        parts = np.array([cap + 1])
        while parts.max() > cap:
            cuts = np.sort(random.choice(left - 1, count - 1, replace=False)) + 1
            parts = np.diff([0, *cuts, left])
        times = cap + 1 - parts if is_long else parts

    def decide(history: Any) -> str | None:
        return fixed(int(times[history.iteration - 1]))(history)

    return Stop("scheduled", {"times": times.tolist()}, decide)


def _rows(found: Iterated, training: Sequence[float], once: float, check: float) -> pd.DataFrame:
    """Return a row for each iteration of a run, the dense net's being the first.

    Args:
        found: by it.
        training: seconds of every epoch.
        once: seconds of looking at the dense net.
        check: seconds of looking after an epoch.
    """
    epochs = found.epochs.assign(training=list(training)[: len(found.epochs)])
    vectors = {
        str(name): part.pivot_table(
            index=["iteration", "epoch"], columns="entry", values=["value", "reference"], sort=False
        )
        for name, part in found.flows.groupby("monitor")
    }
    rows = []
    for iteration in found.iterations.itertuples():
        own = epochs[epochs["iteration"] == iteration.iteration]
        row: dict[str, Any] = {name: getattr(iteration, name) for name in ("iteration", "sparsity", "epochs", "stop")}
        row |= {"validation_accuracy": iteration.accuracy, "loss": iteration.loss}
        row |= {"training_seconds": own["training"].sum(), "monitoring_seconds": check * own["accuracy"].notna().sum()}
        if iteration.iteration == 0:
            row["test_accuracy"] = vectors["test"]["reference"]["accuracy"].iloc[0]
            row["monitoring_seconds"] = once
        else:
            row |= _measured(vectors, row["iteration"])
        rows.append(row)
    return pd.DataFrame(rows)


def _measured(vectors: Mapping[str, pd.DataFrame], iteration: int) -> dict[str, float]:
    """Return what monitors said at the end of an iteration."""
    test, validation = (vectors[name]["value"].loc[iteration] for name in ("test", "validation"))
    row = {"test_accuracy": test["accuracy"].iloc[-1], "validation_loss": validation["loss"].iloc[-1]}
    row["first_test_accuracy"] = test["accuracy"].get(1, math.nan)
    for name in STATISTICS:
        values = vectors[name]["value"].loc[iteration].to_numpy()
        reference = vectors[name]["reference"].loc[iteration].to_numpy()[-1]
        change = float(np.linalg.norm(values[-1] - values[-2])) if len(values) > 1 else math.nan
        measured = values[-1].mean(), float(np.linalg.norm(values[-1] - reference)), change
        row |= {f"{name}: {what}": value for what, value in zip(MEASURED, measured, strict=True)}
    return row


def tables(rows: pd.DataFrame) -> str:
    """Return all tables: an overview, three for each net, and what predicts accuracy."""
    nets = [net for net in NETS if net in set(rows["net"])]
    ends = {net: totals(rows[rows["net"] == net]) for net in nets}
    parts = ["**What the flows know beyond their controls**", overview(ends)]
    parts += ["**How long iterations last: one epoch, more, the cap**", lengths_table(rows, nets)]
    for net in nets:
        own, seeds = rows[rows["net"] == net], ends[net].groupby("seed")["dense"].first()
        dense = f"{100 * seeds.mean():.1f}"
        budget = NETS[net].iterations * NETS[net].cap
        count = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
        title = f"**{net}**, {count}, dense test accuracy {dense} %, at most {budget} epochs"
        parts += [title, rule_table(ends[net]), accuracy_table(ends[net]), reach_table(own)]
    return "\n\n".join([*filter(None, parts), "**What predicts the accuracy to come**", *predictor_tables(rows, nets)])


def totals(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what every run of a net took and came to, by rule and seed."""
    runs = rows.assign(seconds=rows["training_seconds"] + rows["monitoring_seconds"]).groupby(["rule", "seed"])
    ends = runs[["epochs", "seconds"]].sum()
    # The warm-up of the authors' loop is not part of what the others are counted by.
    ends["epochs"] -= runs["epochs"].first()
    ends["accuracy"] = runs["test_accuracy"].last()
    ends["sparsity"] = runs["sparsity"].last()
    ends["dense"] = runs["test_accuracy"].first()
    ends["stops"] = runs["stop"].agg(lambda reasons: ";".join(reasons.iloc[1:]))
    return ends


@dataclass(frozen=True)
class Gap:
    """By how much something is above something else in the mean over seeds, and its 95 % t-interval."""

    mean: float
    noise: float

    @staticmethod
    def of(differences: pd.Series) -> Gap | None:
        """Return the gap of paired differences; None where there are fewer than two."""
        if len(differences) < 2:
            return None
        noise = float(student.ppf(0.975, len(differences) - 1)) * float(differences.std()) / math.sqrt(len(differences))
        return Gap(float(differences.mean()), noise)

    def word(self, above: str, below: str) -> str:
        """Return what the interval says."""
        if abs(self.mean) <= self.noise or not self.mean:
            return "ties"
        return above if self.mean > 0 else below


def _of(ends: pd.DataFrame, rule: str, what: str) -> pd.Series:
    """Return one column of a rule's runs, by seed."""
    return ends.loc[ends.index.get_level_values("rule") == rule, what].droplevel("rule")


def gap(ends: pd.DataFrame, rule: str, other: str, what: str) -> Gap | None:
    """Return by how much a rule is above another in one column, over the seeds that both have."""
    if rule.startswith("gharatappeh"):
        return None  # of other sparsity
    return Gap.of((_of(ends, rule, what) - _of(ends, other, what)).dropna())


def _points(found: Gap | None) -> str:
    """Return a gap of accuracies in points, and the word for it."""
    if found is None:
        return ""
    return f"{found.word('**gains**', '**loses**')} {100 * found.mean:+.2f} ± {100 * found.noise:.2f}"


def _cost(found: Gap | None, digits: int) -> str:
    if found is None:
        return ""
    return f"{found.word('**loses**', '**saves**')} {found.mean:+.{digits}f} ± {found.noise:.{digits}f}"


def overview(ends: Mapping[str, pd.DataFrame]) -> str:
    """Return what rules by flows, and that by accuracy, save of the fixed budget, and how they stand to controls."""
    ends = {net: own for net, own in ends.items() if len(_of(own, FIXED, "epochs")) > 1}
    head = ["rule", "against", *ends, "all of these"]
    lines = []
    for rule in FOLLOWED:
        against = {"fixed budget: epochs": FIXED} | {spread: f"{spread} as {rule}" for spread in SPREADS}
        for title, other in against.items():
            is_cost = other == FIXED
            what = "epochs" if is_cost else "accuracy"
            gaps = [gap(own, rule, other, what) for own in ends.values()]
            if not any(gaps):
                continue
            if is_cost:
                cells = [_share(found, own) for found, own in zip(gaps, ends.values(), strict=True)]
                pooled = ""
            else:
                cells = [_points(found) for found in gaps]
                both = [
                    _of(own, rule, what) - _of(own, other, what)
                    for own, found in zip(ends.values(), gaps, strict=True)
                    if found
                ]
                pooled = _points(Gap.of(pd.concat(both).dropna()))
            lines.append([rule, title, *cells, pooled])
    return _markdown([head, *lines])


def _share(found: Gap | None, ends: pd.DataFrame) -> str:
    """Return a gap of epochs as a share of the fixed budget."""
    if found is None:
        return ""
    budget = _of(ends, FIXED, "epochs").mean()
    word = found.word("**loses**", "**saves**")
    return f"{word} {100 * found.mean / budget:+.0f} ± {100 * found.noise / budget:.0f} %"


def lengths_table(rows: pd.DataFrame, nets: Sequence[str]) -> str:
    """Return which share of a rule's iterations lasted one epoch, more than that, and as long as the cap allows."""
    own = rows[rows["iteration"] > 0]
    lines = [["rule", *nets]]
    for rule in [ACCURACY, *FLOW_RULES, *OTHER_RULES]:
        cells = []
        for net in nets:
            epochs = own.loc[(own["net"] == net) & (own["rule"] == rule), "epochs"]
            shares = (
                (epochs == 1).mean(),
                ((epochs > 1) & (epochs < NETS[net].cap)).mean(),
                (epochs == NETS[net].cap).mean(),
            )
            cells.append(", ".join(f"{100 * share:.0f}" for share in shares) + " %" if len(epochs) else "")
        lines.append([rule, *cells])
    return _markdown(lines)


def rule_table(ends: pd.DataFrame) -> str:
    """Return what every rule took and came to, beside the fixed budget and its controls."""
    head = [
        "rule",
        "stopped by",
        "epochs",
        "against fixed",
        "seconds",
        "against fixed",
        "test accuracy",
        "against fixed",
    ]
    there = set(ends.index.get_level_values("rule"))
    shown = [rule for rule in ALONE | COMBINED | RELEASED | ANYWHERE if rule in there]
    controls = [f"against {spread}" for spread in SPREADS]
    return _markdown([[*head, *controls], *(_rule_line(ends, rule) for rule in shown)])


def _rule_line(ends: pd.DataFrame, rule: str) -> list[str]:
    own = ends[ends.index.get_level_values("rule") == rule]
    reasons = pd.Series(";".join(own["stops"]).split(";")).value_counts(normalize=True)
    other = f" at {own['sparsity'].mean():.3f}" if rule.startswith("gharatappeh") else ""
    is_fixed = rule == FIXED
    return [
        rule,
        ", ".join(f"{reason} {100 * share:.0f} %" for reason, share in reasons.items()),
        f"{own['epochs'].mean():.1f}",
        "" if is_fixed else _cost(gap(ends, rule, FIXED, "epochs"), 1),
        f"{own['seconds'].mean():.2f}",
        "" if is_fixed else _cost(gap(ends, rule, FIXED, "seconds"), 2),
        f"{100 * own['accuracy'].mean():.2f}{other}",
        "" if is_fixed else _points(gap(ends, rule, FIXED, "accuracy")),
        *(_points(gap(ends, rule, f"{spread} as {rule}", "accuracy")) for spread in SPREADS),
    ]


def accuracy_table(ends: pd.DataFrame) -> str:
    """Return how rules stand against the accuracy stop alone; nothing of one seed."""
    lines = [["against the accuracy stop alone", "epochs", "seconds", "test accuracy"]]
    for rule in [*ALONE, *COMBINED]:
        if rule in (FIXED, ACCURACY) or gap(ends, rule, ACCURACY, "epochs") is None:
            continue
        costs = [_cost(gap(ends, rule, ACCURACY, what), digits) for what, digits in (("epochs", 1), ("seconds", 2))]
        lines.append([rule, *costs, _points(gap(ends, rule, ACCURACY, "accuracy"))])
    return _markdown(lines) if len(lines) > 1 else ""


def reach_table(rows: pd.DataFrame) -> str:
    """Return the epochs and seconds to reach sparsities; * and † where the interval says fewer than the fixed budget's.

    Args:
        rows: of one net.
    """
    runs = rows.assign(seconds=rows["training_seconds"] + rows["monitoring_seconds"])
    spent = runs.set_index(["rule", "seed", "iteration"])[["epochs", "seconds"]].groupby(["rule", "seed"]).cumsum()
    last = int(rows["iteration"].max())
    shown = sorted({round(last * share / 5) for share in range(1, 6)})
    sparsity = rows[rows["rule"] == FIXED].groupby("iteration")["sparsity"].mean()
    lines = [["to reach sparsity", *(f"{sparsity[iteration]:.3f}" for iteration in shown)]]
    for rule in (rule for rule in [*ALONE, *COMBINED] if rule in set(rows["rule"])):
        cells = []
        for iteration in shown:
            at = spent[spent.index.get_level_values("iteration") == iteration].droplevel("iteration")
            marks = ""
            for what, mark in (("epochs", "*"), ("seconds", "†")):
                found = gap(at, rule, FIXED, what)
                marks += mark if found and found.word("more", "fewer") == "fewer" else ""
            epochs, seconds = (_of(at, rule, what).mean() for what in ("epochs", "seconds"))
            cells.append(f"{epochs:.1f}, {seconds:.2f} s {marks}".strip())
        lines.append([rule, *cells])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


OUTCOMES = {
    "next": "at the end of the next iteration",
    "first": "after one epoch of it",
    "last": "at the end of the run",
}
PREDICTORS = (
    "epochs",
    "loss",
    "validation_accuracy",
    "validation_loss",
    *(f"{statistic}: {what}" for what in MEASURED for statistic in STATISTICS),
)


def predictor_tables(rows: pd.DataFrame, nets: Sequence[str]) -> list[str]:
    """Return two tables of rank correlations: net by net, and of all nets with each kind of outcome."""
    known = with_outcomes(rows)
    by_net = {net: correlations(known[known["net"] == net], "next") for net in nets}
    seeds = known.groupby("net")["seed"].nunique()
    titles = [net if seeds[net] > 1 else f"{net}, one seed" for net in nets]
    head = ["measured when an iteration ends", *titles, "all nets"]
    pooled = correlations(known, "next")
    lines = [[name, *(_tau(by_net[net].get(name)) for net in nets), _tau(pooled.get(name))] for name in PREDICTORS]
    others = {title: correlations(known, outcome) for outcome, title in OUTCOMES.items() if outcome != "next"}
    others = {OUTCOMES["next"]: pooled} | others
    others["the first, where epochs of this iteration are equal"] = correlations(known, "next", at_equal_epochs=True)
    wide = [[name, *(_tau(found.get(name)) for found in others.values())] for name in PREDICTORS]
    return [_markdown([head, *lines]), _markdown([["with test accuracy", *others], *wide])]


def with_outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the iterations that another follows, with the test accuracy to come and what tells equal runs apart."""
    own = rows[~rows["rule"].isin(list(RELEASED)) & (rows["iteration"] > 0)].sort_values([*KEY, "iteration"])
    runs = own.groupby(KEY)
    told = own.assign(
        next=runs["test_accuracy"].shift(-1),
        first=runs["first_test_accuracy"].shift(-1),
        last=runs["test_accuracy"].transform("last"),
    )
    for outcome, after in (("first", 0), ("next", 1), ("last", None)):
        told[f"path to {outcome}"] = runs["epochs"].transform(partial(_paths, after=after))
    return told[told["next"].notna()]


def _paths(epochs: pd.Series, after: int | None) -> list[str]:
    """Return for each iteration the epochs of all up to it and so many after; None for all."""
    counts = [str(count) for count in epochs]
    return [" ".join(counts[: None if after is None else place + 1 + after]) for place in range(len(counts))]


def correlations(
    rows: pd.DataFrame, outcome: str, *, at_equal_epochs: bool = False
) -> dict[str, tuple[float, float, float]]:
    """Return Kendall's τ_b of every predictor with an outcome, and its 95 % bootstrap interval.

    Runs are compared with those of the same net and seed at the same iteration alone, so that neither sparsity nor the
    dense net decides, and runs that were alike so far count once. The bootstrap draws seeds, and runs of each.

    Args:
        rows: as ``with_outcomes`` gives them.
        outcome: a key of ``OUTCOMES``.
        at_equal_epochs: whether only runs are compared that have just been trained for equally many epochs.
    """
    random = np.random.default_rng(0)
    sums = {name: np.zeros((3, 1 + BOOTSTRAPS)) for name in PREDICTORS}  # agreeing, and where each differs
    for _, net in rows.groupby("net"):
        seeds = sorted(set(net["seed"]))
        times = random.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), size=BOOTSTRAPS)
        for place, seed in enumerate(seeds):
            own = net[net["seed"] == seed]
            runs = sorted(set(own["rule"]))
            drawn = random.multinomial(len(runs), [1 / len(runs)] * len(runs), size=BOOTSTRAPS)
            weights = pd.DataFrame(np.vstack([np.ones((1, len(runs))), drawn]).T, index=runs)
            often = np.concatenate([[1], times[:, place]])
            for _, stratum in own.groupby("iteration"):
                distinct = stratum.drop_duplicates(f"path to {outcome}")
                W = weights.loc[distinct["rule"]].to_numpy()  # (runs, bootstraps)
                _count_pairs(sums, distinct, W, often, outcome, at_equal_epochs)
    taus = {}
    for name, (agreeing, differing, outcomes) in sums.items():
        if not differing[0] * outcomes[0]:
            continue
        with np.errstate(invalid="ignore"):
            tau = agreeing / np.sqrt(differing * outcomes)
        low, high = np.nanquantile(tau, [0.025, 0.975])
        taus[name] = float(tau[0]), float(low), float(high)
    return taus


def _count_pairs(
    sums: dict[str, np.ndarray],
    rows: pd.DataFrame,
    W: np.ndarray,
    often: np.ndarray,
    outcome: str,
    at_equal_epochs: bool,
) -> None:
    """Add the pairs of runs of one stratum, weighted by how often each run and the seed were drawn."""
    epochs, came = (rows[name].to_numpy(dtype=float) for name in ("epochs", outcome))
    compared = np.equal.outer(epochs, epochs) if at_equal_epochs else np.ones((len(rows), len(rows)), dtype=bool)
    for name in PREDICTORS:
        values = rows[name].to_numpy(dtype=float)
        is_known = np.isfinite(values) & np.isfinite(came)
        pairs = compared & np.logical_and.outer(is_known, is_known)
        signs = np.sign(np.subtract.outer(values, values)), np.sign(np.subtract.outer(came, came))
        first, second = (np.where(pairs, sign, 0.0) for sign in signs)
        for row, matrix in enumerate((first * second, np.abs(first), np.abs(second))):
            sums[name][row] += often * ((matrix @ W) * W).sum(0)


def _tau(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return ""
    tau, low, high = found
    shown = f"{tau:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{shown}**" if low * high > 0 else shown


DRAWN_RULES = (FIXED, ACCURACY, "absolute flow", "even as absolute flow", "gradient flow", "patience")


def draw_all(rows: pd.DataFrame, said: pd.DataFrame, folder: Path) -> None:
    """Write the four figures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    nets = [net for net in NETS if net in set(rows["net"])]
    for name, draw in {"accuracy": draw_epochs, "frontier": draw_sparsity, "times": draw_times}.items():
        draw(rows, nets).savefig(folder / f"stopping_{name}.png", dpi=110)
    shown = next((net for net in ("mnist mlp", *nets) if net in set(said["net"])), None)
    if shown:
        own = said[said["net"] == shown].drop_duplicates(["monitor", "entry", "iteration", "epoch"])  # after a kill
        draw_said(own, shown).savefig(folder / "stopping_flows.png", dpi=110)


def draw_epochs(rows: pd.DataFrame, nets: Sequence[str]) -> Figure:
    """Draw test accuracy at the end of every iteration against the epochs so far, means over seeds."""

    def draw(axes: Axes, runs: pd.DataFrame, colour: str, rule: str) -> None:
        used = runs["epochs"].cumsum()
        axes.plot(used, runs["test_accuracy"], ".-", color=colour, markersize=4, linewidth=1.0, label=rule)

    return _panels(rows, nets, draw, "epochs of retraining")


def draw_sparsity(rows: pd.DataFrame, nets: Sequence[str]) -> Figure:
    """Draw test accuracy at the end of every iteration against what is retained, means over seeds."""

    def draw(axes: Axes, runs: pd.DataFrame, colour: str, rule: str) -> None:
        retained = 1 - runs["sparsity"]
        axes.plot(retained, runs["test_accuracy"], ".-", color=colour, markersize=4, linewidth=1.0, label=rule)
        axes.set_xscale("log")
        axes.set_xlim(1.1, 0.035)
        axes.xaxis.set_major_locator(FixedLocator([1, 0.5, 0.2, 0.1, 0.05]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(PERCENT)

    return _panels(rows, nets, draw, "weights retained")


def _panels(rows: pd.DataFrame, nets: Sequence[str], draw: Callable[..., None], label: str) -> Figure:
    """Return a figure with a panel for each net and a line for each of the rules that are drawn."""
    with shared_look():
        figure, panels = _grid(len(nets), 2.5)
        for axes, net in zip(panels, nets, strict=True):
            for rule, colour in zip(DRAWN_RULES, PALETTE, strict=True):
                own = rows[(rows["net"] == net) & (rows["rule"] == rule)]
                if len(own):
                    draw(axes, own.groupby("iteration").mean(numeric_only=True), colour, rule)
            dense = rows[(rows["net"] == net) & (rows["rule"] == FIXED) & (rows["iteration"] == 0)]
            axes.axhline(dense["test_accuracy"].mean(), color=INK, linestyle=(0, (4, 3)), linewidth=0.7)
            axes.yaxis.set_major_formatter(PERCENT)
            axes.set_title(net, loc="left")
            axes.set_xlabel(label)
            axes.set_ylabel("test accuracy")
        panels[0].legend(loc="lower left" if "retained" in label else "best", fontsize=7)
    return figure


def draw_times(rows: pd.DataFrame, nets: Sequence[str]) -> Figure:
    """Draw how many epochs every rule took in every iteration, means over seeds, as shades."""
    rules = [rule for rule in [*ALONE, *COMBINED, *list(RELEASED)[:2]] if rule in set(rows["rule"])]
    with shared_look():
        figure, panels = _grid(len(nets), 0.6 + 0.17 * len(rules), sharey=True)
        for axes, net in zip(panels, nets, strict=True):
            own = rows[(rows["net"] == net) & (rows["iteration"] > 0)]
            mean = own.pivot_table(index="rule", columns="iteration", values="epochs").reindex(rules)
            extent = 0.5, NETS[net].iterations + 0.5, len(rules) - 0.5, -0.5
            image = axes.imshow(mean, aspect="auto", cmap="cividis", vmin=1, vmax=NETS[net].cap, extent=extent)
            axes.set_yticks(range(len(rules)), rules, fontsize=7)
            axes.tick_params(length=0)
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
            axes.set_xlabel("iteration")
            axes.set_title(net, loc="left")
            bar = figure.colorbar(image, ax=axes, pad=0.02)
            bar.outline.set_visible(False)
            bar.ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            bar.set_label("epochs")
    return figure


def draw_said(said: pd.DataFrame, net: str) -> Figure:
    """Draw what four flows said of every layer after every epoch of the fixed budget."""
    epochs = said[["iteration", "epoch"]].drop_duplicates().reset_index(drop=True)
    with shared_look():
        figure, panels = _grid(len(DRAWN_FLOWS), 2.5)
        for axes, name in zip(panels, DRAWN_FLOWS, strict=True):
            draw_flows(axes, said[said["monitor"] == name], epochs)
            axes.set_xlabel("epochs of retraining")
            axes.set_ylabel("")
            axes.set_title(name, loc="left")
        figure.suptitle(f"{net}, flows under the fixed budget; dashed, the dense net", x=0.01, ha="left", fontsize=9)
    return figure


def _grid(count: int, height: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many panels, two in a row."""
    rows = math.ceil(count / 2)
    figure, first = new_figure(6.9, rows * height)
    first.remove()
    panels = list(figure.subplots(rows, 2, squeeze=False, sharey=sharey).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


if __name__ == "__main__":
    main()
