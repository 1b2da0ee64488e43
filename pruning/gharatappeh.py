"""Information-consistent pruning as the code of Gharatappeh & Yasaei Sekeh (2025) has it, oddities included.

    dense net: warm-up, in calls of two epochs; then for i = 1, …, T
        i > 1: prune by PQ index; weights and biases go back to those after the warm-up
        calls of two epochs until ‖F − F_dense‖₂ < ε, or accuracy ≥ the best of the warm-up, or the cap

Reproduced: two stops, asked for in this order after every call; that the first iteration trains the dense net further;
SAP masks (η = 0, γ = 1, at most 0.9 of the survivors go, over all layers together); that scales and running statistics
of batch norm never go back; that biases do so only the first time (later ones alias the live biases); a threshold of
ε = 1, the default of ``released_flow``, at which the signed flow fires almost at once.

Not reproduced, because ``train``, ``evaluate`` and the monitor are the caller's: accuracy on the test set (pass what
you like, a validation split rather); weight decay in these modes only; signed flows by uncentred float32 moments, NaN
for constant units; in-place activations that alias what a hook stored; gradient flow that compares norms with means of
stale gradients.

Reference: Gharatappeh & Yasaei Sekeh 2025 (arXiv 2501.15592), by the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ellq.analysis.flows import FlowMonitor
from ellq.pruning.plan import Plan
from ellq.pruning.prune import plan
from ellq.pruning.rewinding import Rewinding
from ellq.pruning.stopping import (
    History,
    Rule,
    Stop,
    accuracy_back,
    flow_back,
    monitors_of,
    needs_drawn_masks,
    reason_of,
)

CALL = 2  # epochs


def released_plan(model: nn.Module, *, p: float = 1.0, q: float = 2.0) -> Plan:
    """Plan one round of sparsity-informed adaptive pruning over what survives in a plain model.

    Args:
        model: zeros are what has been removed before.
        p: lower order; the authors used (p, q) = (1, 2) and (½, 1).
        q: higher order.
    """
    return plan(model, rule="diao2023", tol=0.0, p=p, q=q, gamma=1.0, beta=0.9, scope="global", refit="none")


def released_stop(flow: Rule | None) -> Stop:
    """Return the two stops in the order of the code, of which the first that fires is named.

    Args:
        flow: such as ``flow_back`` makes; None for the accuracy alone.
    """
    accuracy = accuracy_back()

    def decide(history: History) -> str | None:
        return (None if flow is None else reason_of(flow, history)) or accuracy(history)

    return Stop("gharatappeh2025", {"flow": flow}, decide, monitors_of(flow), needs_drawn_masks(flow))


def released_flow(inputs: Tensor, epsilon: float = 1.0, *, batch_size: int = 512) -> Stop:
    """Return the stop by the signed flow between layers in the order of registration.

    Args:
        inputs: on which flow is measured; the authors take the whole training set.
        epsilon: ε; the authors' figures use about 0.11, their command line 1.
        batch_size: inputs at once.
    """
    return flow_back(FlowMonitor(inputs, "signed", "released", batch_size=batch_size), epsilon)


def released_rewinding(warm_up: int) -> Rewinding:
    """Return that weights come back every time and biases the first time, those of batch norm included."""
    return Rewinding(warm_up, warm_up, _comes_back)


def require_released(warm_up: int, cap: int, plan_with: object, decided: Mapping[str, Any]) -> dict[str, float]:
    """Return the orders that ``plan_with`` holds.

    Args:
        warm_up: must be made of calls.
        cap: likewise.
        plan_with: None, or a mapping with ``p`` and ``q``.
        decided: arguments that the rule decides by itself, which must be None.

    Raises:
        ValueError: it is otherwise.
    """
    for name, value in decided.items():
        if value is not None:
            raise ValueError(f"{name}= is decided by rule='gharatappeh2025'. Leave it out.")
    for name, epochs in {"warm_up": warm_up, "cap": cap}.items():
        if epochs % CALL or not epochs:
            raise ValueError(
                f"{name}={epochs} is not made of calls of two epochs, as rule='gharatappeh2025' trains. Pass an even"
                " number >= 2."
            )
    orders = {} if plan_with is None else plan_with
    if not isinstance(orders, Mapping) or not set(orders) <= {"p", "q"}:
        raise ValueError("plan_with= holds nothing but p and q for rule='gharatappeh2025'. Leave out the rest.")
    return dict(orders)


def _comes_back(name: str, tensor: Tensor, iteration: int) -> bool:
    # The first iteration prunes nothing: what it trains goes back at the second.
    return tensor.ndim > 1 or (name.rpartition(".")[2] == "bias" and iteration <= 2)
