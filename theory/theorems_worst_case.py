"""Theorems on what pruning changes in the worst case over a set of inputs, registered with both of their sides."""

from __future__ import annotations

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.arguments import GREATEST_ORDER, Array
from ellq.theory.measures import lq_quasinorm
from ellq.theory.notation import NamedQuantity
from ellq.theory.propagation import unit_error_l1
from ellq.theory.rounding import norm_error
from ellq.theory.statements import Assumption, Case, Statement, register
from ellq.theory.theorems_propagation import (
    Layers,
    chain_finite,
    draw_layers,
    forward_rounding,
    keeps_none_or_more,
    prune_rows,
    relu_chain,
)
from ellq.theory.worst_case import RELU, chain_error_box, worst_case_ball, worst_case_box

_change = NamedQuantity("|f(x) − f̂(x)|", r"|f(x) - \hat f(x)|")
_j, _d = sympy.symbols("j d", integer=True, positive=True)
_v = sympy.IndexedBase("v")

finite_removed = Assumption(
    "finite", "what was removed is finite.", lambda case: bool(np.isfinite(case["removed"]).all())
)
in_box = Assumption(
    "l ≤ x ≤ u",
    "the input lies in the box, which is finite.",
    lambda case: bool(
        np.isfinite([case["low"], case["high"]]).all()
        and np.all((case["low"] <= case["x"]) & (case["x"] <= case["high"]))
    ),
)


def _dot(removed: Array, x: Array) -> float:
    return float(abs(np.dot(removed, x)))


def _dot_rounding(removed: Array, x: Array, bound: float) -> float:
    """Bound |fl(v·x) − v·x| relative to a bound of it: d·u·Σ|v_j x_j|, which does not shrink where terms cancel."""
    return norm_error(removed.size, 1.0) * unit_error_l1(removed * x, 1.0) / bound if bound > 0 else 0.0


def _draw_box(rng: np.random.Generator) -> Case:
    v = families.vector(rng, largest=100, tame=True)
    ends = np.sort(rng.standard_normal((2, v.size)) + rng.choice([0.0, 10.0]), axis=0)
    low, high = ends * 10.0 ** rng.uniform(-3, 3, v.size)
    if rng.random() < 0.5:  # the corner where the bound is attained
        x = np.where((v > 0) == (rng.random() < 0.5), high, low)
    else:
        x = np.clip(low + rng.random(v.size) * (high - low), low, high)
    return {"removed": v, "low": low, "high": high, "x": x}


def _box_formula() -> sympy.Basic:
    low, high = sympy.IndexedBase("l"), sympy.IndexedBase("u")
    middle = sympy.Sum(_v[_j] * (low[_j] + high[_j]) / 2, (_j, 1, _d))
    return sympy.Le(_change, sympy.Abs(middle) + sympy.Sum(sympy.Abs(_v[_j]) * (high[_j] - low[_j]) / 2, (_j, 1, _d)))


UNIT_BOX = register(
    Statement(
        id="unit-box",
        title="Change of a pruned linear unit for any input of a box",
        reference="classical, the support function of a box",
        status="classical",
        assumptions=(finite_removed, in_box),
        observed=lambda removed, low, high, x: _dot(removed, x),
        bound=lambda removed, low, high, x: worst_case_box(removed, low, high),
        relative_error=lambda removed, low, high, x: _dot_rounding(removed, x, worst_case_box(removed, low, high)),
        formula=_box_formula,
        draw=_draw_box,
    )
)


def _draw_ball(rng: np.random.Generator) -> Case:
    v = families.vector(rng, largest=100, tame=True)
    order = float(rng.choice([1.0, 2.0, np.inf, 1.0 + 10.0 ** rng.uniform(-4, 2)]))
    x = rng.standard_normal(v.size)
    if rng.random() < 0.5:  # the direction in which the bound is attained
        if order == 1.0:
            x = np.where(np.arange(v.size) == np.argmax(np.abs(v)), 1.0, 0.0)
        else:
            x = np.sign(v) * (np.abs(v) / np.abs(v).max()) ** (0.0 if order == np.inf else min(1 / (order - 1), 500.0))
    radius = 10.0 ** rng.uniform(-3, 3)
    return {"removed": v, "radius": radius, "order": order, "x": x * (radius * (1 - 1e-9) / _size(x, order))}


def _size(x: Array, order: float) -> float:
    return float(np.abs(x).max() if order == np.inf else lq_quasinorm(x, order))


def _ball_formula() -> sympy.Basic:
    radius, order = sympy.symbols("R p", positive=True)
    total = sympy.Sum(sympy.Abs(_v[_j]) ** (order / (order - 1)), (_j, 1, _d))
    return sympy.Le(_change, radius * total ** (1 - 1 / order))


UNIT_BALL = register(
    Statement(
        id="unit-ball",
        title="Change of a pruned linear unit for any input of a ball",
        reference="classical, Hölder's inequality",
        status="classical",
        assumptions=(
            finite_removed,
            Assumption(
                "1 ≤ p",
                f"the ball has an order from 1 to {GREATEST_ORDER:g}, or ∞.",
                lambda case: 1 <= case["order"] <= GREATEST_ORDER or case["order"] == np.inf,
            ),
            Assumption(
                "‖x‖_p ≤ R",
                "the input lies in the ball, which is finite.",
                lambda case: bool(_size(case["x"], case["order"]) <= case["radius"] < np.inf),
            ),
        ),
        observed=lambda removed, radius, order, x: _dot(removed, x),
        bound=lambda removed, radius, order, x: worst_case_ball(removed, radius, order),
        # The computed ‖x‖_p is within R, the exact one within R·(1 + its rounding).
        relative_error=lambda removed, radius, order, x: (
            _dot_rounding(removed, x, worst_case_ball(removed, radius, order))
            + (0.0 if order == np.inf else norm_error(np.size(x), order))
        ),
        formula=_ball_formula,
        draw=_draw_ball,
    )
)


def _draw_chain_box(rng: np.random.Generator) -> Case:
    layers = draw_layers(rng)
    d = layers[0][0].shape[1]
    low, high = np.sort(rng.standard_normal((2, d)) + rng.choice([0.0, 5.0]), axis=0)
    x = low + rng.random((families.size(rng, 20), d)) * (high - low)
    x[0] = high
    widest = max(W.shape[1] for W, _ in layers)
    return {
        "layers": [(np.abs(W), b) for W, b in layers] if rng.random() < 0.3 else layers,  # one sign: equality
        "retained": int(rng.integers(0, widest + 1)),
        "low": low,
        "high": high,
        "x": np.clip(x, low, high),
    }


def _box_observed(layers: Layers, retained: int, low: Array, high: Array, x: Array) -> float:
    pruned = [(prune_rows(W, retained), b) for W, b in layers]
    return float(np.abs(relu_chain(layers, x)[-1] - relu_chain(pruned, x)[-1]).max())


def _box_bound(layers: Layers, retained: int, low: Array, high: Array, x: Array) -> float:
    pruned = [(prune_rows(W, retained), b) for W, b in layers]
    return float(chain_error_box(layers, pruned, low, high, activations=[RELU] * len(layers))[-1].max())


def _chain_box_formula() -> sympy.Basic:
    i, j, m = sympy.symbols("i j m", integer=True, positive=True)
    rho = sympy.Symbol("rho", positive=True)
    weight, error = sympy.IndexedBase(r"\hat w"), sympy.IndexedBase("e")
    own = NamedQuantity("max |Δw_i·h|", r"\max_{l \leq h \leq u} |\Delta w_i \cdot h|")
    passed_on = sympy.Sum(sympy.Abs(weight[i, j]) * error[j], (j, 1, m))
    return sympy.Le(NamedQuantity("|h_i − ĥ_i|", r"|h_i - \hat h_i|"), rho * (own + passed_on))


MULTILAYER_BOX = register(
    Statement(
        id="multilayer-box",
        title="Change of a chain of pruned layers for any input of a box, without data",
        reference="ours, with interval bound propagation (Gowal et al. 2018, arXiv 1810.12715) for the dense features",
        status="ours",
        assumptions=(chain_finite, keeps_none_or_more, in_box),
        observed=_box_observed,
        bound=_box_bound,
        relative_error=lambda layers, retained, low, high, x: forward_rounding(
            layers, x, _box_bound(layers, retained, low, high, x)
        ),
        formula=_chain_box_formula,
        draw=_draw_chain_box,
    )
)
