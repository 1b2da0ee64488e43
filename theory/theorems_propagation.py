"""Theorems on what pruning a unit, a layer and a chain of layers changes, registered with both of their sides."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.arguments import Array
from ellq.theory.measures import lq_quasinorm
from ellq.theory.notation import (
    NamedQuantity,
    finite_weights,
    k,
    keeps_some,
    norm_q,
    q,
    quasi_order,
)
from ellq.theory.propagation import (
    chain_error,
    column_scale,
    unit_error_l1,
    unit_error_lq,
    unit_error_observed,
    unit_errors,
)
from ellq.theory.rounding import norm_error
from ellq.theory.statements import Assumption, Case, Statement, register

Layers = list[tuple[Array, Array]]
"""(W, b) of each layer of a chain."""


def _draw_linear_unit(rng: np.random.Generator) -> Case:
    w = families.vector(rng, largest=100, tame=True)
    retained = int(rng.integers(1, w.size + 1))
    return {
        "w": w,
        "retained": retained,
        "q": float(rng.uniform(0.05, 0.999)),
        "inputs": families.features(rng, w.size),
    }


def draw_layers(rng: np.random.Generator) -> Layers:
    """Draw a chain of one to three layers."""
    widths = [families.size(rng, 20) for _ in range(int(rng.integers(2, 5)))]
    layers = []
    for before, after in pairwise(widths):
        rows = [families.VECTORS[families.TAME[rng.integers(len(families.TAME))]](rng, before) for _ in range(after)]
        layers.append((np.stack(rows), rng.standard_normal(after) * rng.integers(0, 2)))
    return layers


def _draw_chain(rng: np.random.Generator) -> Case:
    layers = draw_layers(rng)
    widest = max(max(W.shape) for W, _ in layers)
    inputs = families.features(rng, layers[0][0].shape[1], samples=families.size(rng, 30))
    return {"layers": layers, "retained": int(rng.integers(1, widest + 1)), "inputs": inputs}


def removed_by_magnitude(w: Array, retained: int) -> Array:
    """Return w without its ``retained`` largest entries, of ties the first."""
    v = np.array(w, dtype=np.float64)
    v[np.argsort(-np.abs(v), kind="stable")[:retained]] = 0.0
    return v


def _linear_unit_formula() -> sympy.Basic:
    error, scale = NamedQuantity("‖f − f̂‖", r"\|f - \hat f\|_{L_2}"), sympy.Symbol("B", positive=True)
    return sympy.Le(error, scale * q * (1 - q) ** (1 / q - 1) * norm_q * k ** (1 - 1 / q))


LINEAR_UNIT = register(
    Statement(
        id="linear-unit-l1",
        title="Error of a magnitude-pruned linear unit, inputs correlated in any way",
        reference="Yang et al. 2022 (arXiv 2206.05604), linear-unit theorem as reconstructed, case (a)",
        status="reconstructed",
        assumptions=(finite_weights, quasi_order, keeps_some),
        observed=lambda w, retained, q, inputs: unit_error_observed(removed_by_magnitude(w, retained), inputs),
        bound=lambda w, retained, q, inputs: unit_error_lq(w, retained, q=q, scale=float(column_scale(inputs).max())),
        # |fl(Xv) − Xv| ≤ d·u·|X||v| entrywise, whose L2 norm is at most B‖v‖₁ ≤ bound.
        relative_error=lambda w, retained, q, inputs: (
            norm_error(np.size(w), 1.0) + norm_error(np.shape(inputs)[0], 2.0)
        ),
        formula=_linear_unit_formula,
        draw=_draw_linear_unit,
    )
)


def prune_rows(W: Array, retained: int) -> Array:
    """Return W with the ``retained`` largest entries of each row, zeros elsewhere."""
    return W - np.stack([removed_by_magnitude(row, retained) for row in W])


def relu_chain(layers: Layers, inputs: Array) -> list[Array]:
    """Return the inputs and the features after each layer, ReLU after every one."""
    features = [np.asarray(inputs, dtype=np.float64)]
    for W, b in layers:
        features.append(np.maximum(features[-1] @ W.T + b, 0.0))
    return features


def _chain_observed(layers: Layers, retained: int, inputs: Array) -> float:
    dense = relu_chain(layers, inputs)[-1]
    pruned = relu_chain([(prune_rows(W, retained), b) for W, b in layers], inputs)[-1]
    return float(lq_quasinorm(dense - pruned, 2.0, axis=0).max() / np.sqrt(len(dense)))


def _chain_bound(layers: Layers, retained: int, inputs: Array) -> float:
    features = relu_chain(layers, inputs)
    scales = [float(column_scale(f).max()) for f in features[:-1]]
    kept = [prune_rows(W, retained) for W, _ in layers]
    local = [
        max(unit_error_l1(v, scale) for v in W - W_kept)
        for (W, _), W_kept, scale in zip(layers, kept, scales, strict=True)
    ]
    gains = [max(unit_error_l1(row, 1.0) for row in W) for W in kept]
    return chain_error(local, gains, [1.0] * len(layers))[-1]


def forward_rounding(layers: Layers, inputs: Array, bound: float) -> float:
    """Bound the rounding of the observed difference of two ReLU chains, relative to a bound of it."""
    # Forward errors do not shrink with the bound: they scale with the activations, so they are put relative to it.
    # Twice: once for the dense net, once for the pruned net and the products of what was removed, whose row sums add
    # up to the dense net's. Both bounds start from the computed dense features, so those are exact by definition.
    if bound == 0:
        return 0.0
    size, error = float(np.max(np.abs(inputs))), 0.0
    for W, b in layers:
        gain = float(np.abs(W).sum(axis=1).max())
        error = gain * error + norm_error(W.shape[1] + 1, 1.0) * (gain * size + float(np.abs(b).max()))
        size = gain * size + float(np.abs(b).max())
    return 2 * error / bound + norm_error(np.shape(inputs)[0], 2.0)


chain_finite = Assumption(
    "finite",
    "all weights are finite.",
    lambda case: all(np.isfinite(W).all() and np.isfinite(b).all() for W, b in case["layers"]),
)
keeps_none_or_more = Assumption(
    "k ≥ 0", "no fewer than 0 entries of each row are kept.", lambda case: case["retained"] >= 0
)


def _multilayer_formula() -> sympy.Basic:
    depth, layer, later = sympy.symbols("L l j", integer=True, positive=True)
    rho = sympy.Symbol("rho", positive=True)
    delta, gain = sympy.IndexedBase("delta"), sympy.IndexedBase("T")
    amplification = rho ** (depth - layer + 1) * sympy.Product(gain[later], (later, layer + 1, depth))
    return sympy.Le(
        NamedQuantity("‖h_L − ĥ_L‖", r"\|h_L - \hat h_L\|_{L_2}"),
        sympy.Sum(delta[layer] * amplification, (layer, 1, depth)),
    )


MULTILAYER = register(
    Statement(
        id="multilayer",
        title="Error of a chain of pruned layers with ReLU between",
        reference="Yang et al. 2022 (arXiv 2206.05604), multi-layer theorem as reconstructed",
        status="reconstructed",
        assumptions=(
            chain_finite,
            keeps_none_or_more,
        ),
        observed=_chain_observed,
        bound=_chain_bound,
        relative_error=lambda layers, retained, inputs: forward_rounding(
            layers, inputs, _chain_bound(layers, retained, inputs)
        ),
        formula=_multilayer_formula,
        draw=_draw_chain,
    )
)


def _chain_bound_by_unit(layers: Layers, retained: int, inputs: Array) -> float:
    features = relu_chain(layers, inputs)
    errors = np.zeros(np.shape(inputs)[1])
    for (W, _), x in zip(layers, features, strict=False):
        kept = prune_rows(W, retained)
        errors = unit_errors(column_scale(x @ (W - kept).T), kept, errors, 1.0)
    return float(errors.max())


def _multilayer_units_formula() -> sympy.Basic:
    i, j, m = sympy.symbols("i j m", integer=True, positive=True)
    rho = sympy.Symbol("rho", positive=True)
    local, weight, error = sympy.IndexedBase("delta"), sympy.IndexedBase(r"\hat w"), sympy.IndexedBase("e")
    passed_on = sympy.Sum(sympy.Abs(weight[i, j]) * error[j], (j, 1, m))
    return sympy.Le(NamedQuantity("‖h_i − ĥ_i‖", r"\|h_i - \hat h_i\|_{L_2}"), rho * (local[i] + passed_on))


MULTILAYER_UNITS = register(
    Statement(
        id="multilayer-units",
        title="Error of a chain of pruned layers, unit by unit, from measured errors of single layers",
        reference="ours, sharper than 'multilayer': no maximum over units, local errors measured on dense features",
        status="ours",
        assumptions=MULTILAYER.assumptions,
        observed=_chain_observed,
        bound=_chain_bound_by_unit,
        relative_error=lambda layers, retained, inputs: forward_rounding(
            layers, inputs, _chain_bound_by_unit(layers, retained, inputs)
        ),
        formula=_multilayer_units_formula,
        draw=_draw_chain,
    )
)
