"""When to stop retraining: plain functions of what has been seen since the last pruning, and how they compose.

A rule takes a ``History`` and returns why to stop, or None to go on. Any such function will do; those made here also
say what they need measured (``monitors``, ``draws_masks``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from ellq.pruning.resumable import identity
from ellq.theory import Array
from ellq.theory.arguments import count, nonnegative, real_number

Rule = Callable[["History"], str | None]

CAP = "cap"
"""Why an iteration ended where no rule gave a reason."""
WARM_UP = "warm-up"
"""Why the dense net's training did."""


class Monitor(Protocol):
    """What is measured of a model at every check: a number for each of its entries, layers or pairs of layers.

    ``ellq.analysis.FlowMonitor`` and ``GradientMonitor`` make some. One that has a ``kind`` is called so in tables,
    others by their type.
    """

    @property
    def pairs(self) -> Sequence[Any]:
        """What the entries are, once it has been called."""
        ...

    def __call__(self, model: nn.Module) -> Array:
        """Return one finite number for each entry."""
        ...

    def identity(self) -> Any:
        """Return what its results depend on, as JSON holds it."""
        ...


@dataclass(frozen=True, eq=False)
class Flow:
    """What one monitor has said since the last pruning.

    Attributes:
        monitor: which.
        vectors: shape (checks, entries).
        reference: what it says of the dense net, shape (entries,).
    """

    monitor: Monitor
    vectors: Array
    reference: Array

    @property
    def distances(self) -> Array:
        """‖F − F_dense‖₂ at every check."""
        distances: Array = np.sqrt(((self.vectors - self.reference) ** 2).sum(1))
        return distances


@dataclass(frozen=True, eq=False)
class History:
    """What has been seen since the last pruning, a row for each check.

    Attributes:
        iteration: how often the net has been pruned, from 1.
        epochs: after which epochs of this iteration it was looked, rising; the last is how many were used.
        losses: what training returned, NaN where it returned None.
        accuracies: on the validation split.
        dense_accuracy: the dense net's.
        mask_distances: the share of the planned entries that differ between the masks drawn at this check and at the
            one before; NaN for the first, and where no rule draws masks. At sparsity s never above 2·min(s, 1 − s).
        mask_turnover: likewise, as a share of the entries that both retain together, in [0, 1] at any sparsity.
        drawn: the masks that pruning would draw now, where a rule needs them.
        flows: one for each monitor.
    """

    iteration: int
    epochs: tuple[int, ...]
    losses: Array
    accuracies: Array
    dense_accuracy: float
    mask_distances: Array
    mask_turnover: Array
    drawn: Mapping[str, Tensor] = field(default_factory=dict)
    flows: tuple[Flow, ...] = ()

    def flow(self, monitor: Monitor) -> Flow:
        """Return what a monitor has said.

        Raises:
            KeyError: it is not among those that were called.
        """
        for flow in self.flows:
            if flow.monitor is monitor:
                return flow
        raise KeyError("The history lacks this monitor. Give it to the rule that needs it, or to monitors=.")


@dataclass(frozen=True, eq=False)
class Stop:
    """A stopping rule that says what it is and what it needs.

    Attributes:
        name: what it is called.
        settings: what it was made with.
        decide: the rule itself.
        monitors: what must be measured for it at every check.
        draws_masks: whether the masks that pruning would draw now must be found at every check.
    """

    name: str
    settings: Mapping[str, Any]
    decide: Rule
    monitors: tuple[Monitor, ...] = ()
    draws_masks: bool = False

    def __call__(self, history: History) -> str | None:
        """Return why to stop, or None."""
        return self.decide(history)

    def identity(self) -> dict[str, Any]:
        """Return what it decides by, as JSON holds it."""
        monitors = [identity(monitor) for monitor in self.monitors]
        return {"name": self.name, "settings": identity(self.settings), "monitors": monitors}


def fixed(epochs: int) -> Stop:
    """Stop after a number of epochs, or at the first check after it."""
    epochs = count(epochs, "epochs", low=1, high=10**9)
    return Stop("fixed", {"epochs": epochs}, lambda history: _if(history.epochs[-1] >= epochs, "fixed"))


def accuracy_back(tolerance: float = 0.0, *, to: float | None = None) -> Stop:
    """Stop once the validation accuracy is back where it was.

        accuracy ≥ a − tolerance

    Args:
        tolerance: ≥ 0, in the units of ``evaluate``.
        to: a; by default the dense net's accuracy, the best of its warm-up.
    """
    tolerance = nonnegative(tolerance, "tolerance")
    to = None if to is None else real_number(to, "to")

    def decide(history: History) -> str | None:
        goal = (history.dense_accuracy if to is None else to) - tolerance
        return _if(history.accuracies[-1] >= goal, "accuracy")

    return Stop("accuracy_back", {"tolerance": tolerance, "to": to}, decide)


def patience(epochs: int, least_gain: float = 0.0) -> Stop:
    """Stop once the best accuracy of the last epochs is no more than ``least_gain`` above the best before them.

    Args:
        epochs: how many, ≥ 1.
        least_gain: ≥ 0, in the units of ``evaluate``.
    """
    epochs, least_gain = count(epochs, "epochs", low=1, high=10**9), nonnegative(least_gain, "least_gain")

    def decide(history: History) -> str | None:
        is_old = np.array(history.epochs) <= history.epochs[-1] - epochs
        old, new = history.accuracies[is_old], history.accuracies[~is_old]
        return _if(bool(len(old)) and new.max() <= old.max() + least_gain, "patience")

    return Stop("patience", {"epochs": epochs, "least_gain": least_gain}, decide)


def flow_back(monitor: Monitor, epsilon: float) -> Stop:
    """Stop once the information flow is within ε of the dense net's.

        ‖F − F_dense‖₂ < ε

    Strict, so that ε = 0 never fires. Of L − 1 entries in [−1, 1] no two vectors are further apart than 2·√(L − 1): an
    ε above that fires at the first check. The distance need not shrink with training; the cap holds where it does not.

    Args:
        monitor: measures F.
        epsilon: ε ≥ 0; ``calibrate_epsilon`` finds one.

    Reference: the stop of Gharatappeh & Yasaei Sekeh 2025 (arXiv 2501.15592).
    """
    return _back("flow", monitor, epsilon)


def gradient_back(monitor: Monitor, epsilon: float) -> Stop:
    """Stop once the gradient flow is within ε of the dense net's, by the distance of ``flow_back``.

    Args:
        monitor: measures it, the same statistic for both nets.
        epsilon: ε ≥ 0.

    Reference: the stop of Gharatappeh & Yasaei Sekeh 2025 (arXiv 2501.15592).
    """
    return _back("gradient", monitor, epsilon)


def masks_stable(threshold: float = 0.1, epochs: int = 5, *, relative: bool = False) -> Stop:
    """Stop once the masks that pruning would draw have hardly changed for a number of successive checks.

        max of the last distances < threshold,   distance = differing entries ÷ all entries

    At sparsity s the distance is never above 2·min(s, 1 − s): a threshold above that fires as soon as there are enough
    checks. ``relative`` divides by the entries that the two masks retain, counted twice, instead. The masks drawn are
    those of the next iteration, and at the last those of one more step that keeps the same fraction, or as little as
    a plan can. Where the next iteration prunes nothing more, as with ``"one-shot"`` until the last, they do not move,
    and the rule fires as soon as there are enough checks.

    Args:
        threshold: > 0; the authors' is 0.1.
        epochs: how many distances in a row; the authors' is 5.
        relative: divide by what is retained.

    Reference: Early-Bird tickets, You et al. 2020 (arXiv 1909.11957), there of channels in dense training.
    """
    threshold = nonnegative(threshold, "threshold")
    if not threshold:
        raise ValueError("threshold=0 is never undercut. Choose threshold > 0.")
    epochs = count(epochs, "epochs", low=1, high=10**9)

    def decide(history: History) -> str | None:
        last = (history.mask_turnover if relative else history.mask_distances)[-epochs:]
        return _if(len(last) == epochs and bool((last < threshold).all()), "early-bird")  # NaN, the first, is not below

    settings = {"threshold": threshold, "epochs": epochs, "relative": relative}
    return Stop("masks_stable", settings, decide, draws_masks=True)


def random_stop(low: int, high: int, seed: int = 0) -> Stop:
    """Stop after a number of epochs drawn anew for each iteration: the control for every rule that claims to know.

    Or at the first check after it.

    Args:
        low: the fewest, ≥ 1.
        high: the most, ≥ low; all between are equally likely.
        seed: of the draws.
    """
    low = count(low, "low", low=1, high=10**9)
    high = count(high, "high", low=low, high=10**9)
    seed = count(seed, "seed", low=0, high=2**63 - 1)

    def decide(history: History) -> str | None:
        drawn = np.random.default_rng([seed, history.iteration]).integers(low, high, endpoint=True)
        return _if(history.epochs[-1] >= drawn, "random")

    return Stop("random_stop", {"low": low, "high": high, "seed": seed}, decide)


def any_of(*rules: Rule) -> Stop:
    """Stop once one of the rules does; all that do are named, joined by " + "."""
    _require_rules(rules)

    def decide(history: History) -> str | None:
        return " + ".join(reason for rule in rules if (reason := reason_of(rule, history)) is not None) or None

    return _composed("any_of", rules, decide)


def all_of(*rules: Rule) -> Stop:
    """Stop once all rules do at the same check; their reasons are joined by " & "."""
    _require_rules(rules)

    def decide(history: History) -> str | None:
        reasons = [reason_of(rule, history) for rule in rules]
        return None if None in reasons else " & ".join(filter(None, reasons))

    return _composed("all_of", rules, decide)


def reason_of(rule: Rule, history: History) -> str | None:
    """Return what a rule says.

    Raises:
        TypeError: it is neither a reason nor None.
    """
    reason: object = rule(history)
    if reason is not None and (not isinstance(reason, str) or not reason):
        raise TypeError(f"stop returned {reason!r}, where a reason to stop or None is expected")
    return reason


def monitors_of(rule: Rule | None) -> tuple[Monitor, ...]:
    """Return what a rule needs measured."""
    return tuple(getattr(rule, "monitors", ()))


def needs_drawn_masks(rule: Rule | None) -> bool:
    """Whether a rule needs the masks that pruning would draw now."""
    return bool(getattr(rule, "draws_masks", False))


def _back(name: str, monitor: Monitor, epsilon: float) -> Stop:
    if not callable(monitor) or not hasattr(monitor, "pairs"):
        raise TypeError(
            f"monitor must be a function of a model with an attribute pairs, got {type(monitor).__name__}. Pass such as"
            " ellq.analysis.FlowMonitor makes."
        )
    epsilon = real_number(epsilon, "epsilon")
    if epsilon < 0:
        raise ValueError(f"epsilon={epsilon:g} is below every distance. Choose epsilon >= 0.")

    def decide(history: History) -> str | None:
        return _if(bool(history.flow(monitor).distances[-1] < epsilon), name)

    return Stop(f"{name}_back", {"epsilon": epsilon}, decide, monitors=(monitor,))


def _composed(name: str, rules: tuple[Rule, ...], decide: Rule) -> Stop:
    monitors: list[Monitor] = []
    for monitor in (monitor for rule in rules for monitor in monitors_of(rule)):
        if not any(monitor is other for other in monitors):
            monitors.append(monitor)
    return Stop(name, {"rules": rules}, decide, tuple(monitors), any(map(needs_drawn_masks, rules)))


def _require_rules(rules: tuple[Rule, ...]) -> None:
    if not rules or not all(map(callable, rules)):
        odd = next((type(rule).__name__ for rule in rules if not callable(rule)), "nothing")
        raise TypeError(f"rules must be functions of a history, at least one; got {odd}.")


def _if(holds: bool | np.bool_, reason: str) -> str | None:
    return reason if holds else None
