"""The theorems ellq relies on, each registered with both of its sides, its assumptions and its source."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.approximation import (
    best_term_error,
    best_term_errors,
    retained_necessary,
    retained_sufficient,
    stechkin_bound,
)
from ellq.theory.arguments import Array
from ellq.theory.id_bounds import skeleton_output_bound, skeleton_residual
from ellq.theory.measures import lq_quasinorm, power_sums
from ellq.theory.propagation import (
    chain_error,
    column_scale,
    unit_error_l1,
    unit_error_lq,
    unit_error_observed,
    unit_errors,
)
from ellq.theory.rounding import log_error, norm_error, tail_error
from ellq.theory.statements import Assumption, Case, Statement, register

finite_weights = Assumption("finite", "all weights are finite.", lambda case: bool(np.isfinite(case["w"]).all()))
some_weight = Assumption("non-zero", "some weight is not zero.", lambda case: bool(np.any(case["w"])))
orders_rise_to_p = Assumption("q < p", "0 < q < p < ∞.", lambda case: 0 < case["q"] < case["p"] < np.inf)
orders_rise_to_q = Assumption("p < q", "0 < p < q < ∞.", lambda case: 0 < case["p"] < case["q"] < np.inf)
quasi_order = Assumption("q < 1", "0 < q < 1.", lambda case: 0 < case["q"] < 1)
keeps_some = Assumption(
    "1 ≤ k ≤ d", "between 1 and d entries are kept.", lambda case: 1 <= case["retained"] <= np.size(case["w"])
)
tolerance_is_share = Assumption("0 < tol < 1", "the tolerance is a share.", lambda case: 0 < case["tol"] < 1)


def _draw_best_term(rng: np.random.Generator) -> Case:
    w = families.vector(rng)
    q, p = families.orders(rng)
    return {"w": w, "retained": int(rng.integers(1, w.size + 1)), "q": q, "p": p}


def _draw_retained(rng: np.random.Generator) -> Case:
    w = families.vector(rng)
    p, q = families.orders(rng)
    return {"w": w, "retained": int(rng.integers(1, w.size + 1)), "p": p, "q": q}


def _draw_tolerance(rng: np.random.Generator) -> Case:
    p, q = families.orders(rng)
    return {"w": families.vector(rng), "tol": float(10.0 ** -rng.uniform(0.0, 6.0)), "p": p, "q": q}


def _draw_linear_unit(rng: np.random.Generator) -> Case:
    w = families.vector(rng, largest=100, tame=True)
    retained = int(rng.integers(1, w.size + 1))
    return {
        "w": w,
        "retained": retained,
        "q": float(rng.uniform(0.05, 0.999)),
        "inputs": families.features(rng, w.size),
    }


def _draw_chain(rng: np.random.Generator) -> Case:
    widths = [families.size(rng, 20) for _ in range(int(rng.integers(2, 5)))]
    layers = []
    for before, after in pairwise(widths):
        rows = [families.VECTORS[families.TAME[rng.integers(len(families.TAME))]](rng, before) for _ in range(after)]
        layers.append((np.stack(rows), rng.standard_normal(after) * rng.integers(0, 2)))
    inputs = families.features(rng, widths[0], samples=families.size(rng, 30))
    return {"layers": layers, "retained": int(rng.integers(1, max(widths) + 1)), "inputs": inputs}


def _draw_skeleton(rng: np.random.Generator) -> Case:
    m = families.size(rng, 20)
    features = families.features(rng, m)
    indices = rng.permutation(m)[: int(rng.integers(1, m + 1))]
    T = np.linalg.lstsq(features[:, indices], features, rcond=None)[0]
    return {"features": features, "indices": indices, "interpolation": T, "consumer": rng.standard_normal(m)}


class _Quantity(sympy.Symbol):  # type: ignore[misc]
    """A positive quantity with a name for text and one for LaTeX, such as a norm."""

    def __new__(cls, text: str, latex: str) -> _Quantity:
        made: _Quantity = super().__new__(cls, text, positive=True)
        made.tex = latex
        return made

    def _latex(self, printer: object) -> str:
        return str(self.tex)


p, q, k, N, eta, tol = sympy.symbols("p q k N eta tol", positive=True)
_best_error, _tail_q = _Quantity("σ_k(w)_p", r"\sigma_k(w)_p"), _Quantity("σ_k(w)_q", r"\sigma_k(w)_q")
_norm_q = _Quantity("‖w‖_q", r"\|w\|_q")


def _stechkin_formula() -> sympy.Basic:
    ratio = q / p
    constant = (ratio**ratio * (1 - ratio) ** (1 - ratio)) ** (1 / q)
    return sympy.Le(_best_error, constant * k ** (1 / p - 1 / q) * _norm_q)


STECHKIN = register(
    Statement(
        id="stechkin",
        title="Best k-term error from the ℓq quasi-norm",
        reference="Foucart & Rauhut 2013, Theorem 2.5",
        status="classical",
        assumptions=(finite_weights, orders_rise_to_p, keeps_some),
        observed=lambda w, retained, q, p: best_term_error(w, retained, p=p),
        bound=lambda w, retained, q, p: stechkin_bound(w, retained, q=q, p=p),
        relative_error=lambda w, retained, q, p: tail_error(np.size(w), p),
        formula=_stechkin_formula,
        draw=_draw_best_term,
    )
)


def _mass_ratio(w: Array, retained: int, p: float) -> float:
    if retained >= np.size(w):
        return 0.0
    # Two sums, not the whole less the tail: what is kept may be a small share of it.
    falling = -np.sort(-np.abs(w))
    kept, removed = power_sums(falling[:retained], (p,)), power_sums(falling[retained:], (p,))
    if not removed.nonzeros:
        return 0.0
    return float(removed.sums[p] / kept.sums[p] * 2.0 ** (p * float(removed.exponent - kept.exponent)))


def _necessary_formula() -> sympy.Basic:
    return sympy.Le(N * (1 + eta) ** (-q / (q - p)), k)


RETAINED_NECESSARY = register(
    Statement(
        id="retained-necessary",
        title="Entries that must be kept for a given ratio of removed to kept mass",
        reference="Diao et al. 2023 (arXiv 2302.05601), Theorem 2",
        status="published",
        assumptions=(finite_weights, some_weight, orders_rise_to_q, keeps_some),
        observed=lambda w, retained, p, q: retained_necessary(w, _mass_ratio(w, retained, p), p=p, q=q),
        bound=lambda w, retained, p, q: float(retained),
        # The ratio's own rounding, that of two sums of powers, enters through (1 + η)^(−q/(q−p)).
        relative_error=lambda w, retained, p, q: log_error(2 * (np.size(w) + 16) * q / (q - p)),
        formula=_necessary_formula,
        draw=_draw_retained,
    )
)


def _tail_at_sufficient(w: Array, tol: float, p: float, q: float) -> float:
    enough = math.ceil(min(retained_sufficient(w, tol, p=p, q=q), np.size(w)))
    tails = best_term_errors(w, q)
    return float(tails[enough] / tails[0])


def _sufficient_formula() -> sympy.Basic:
    ratio = p / q
    enough = N * ratio ** (p / (q - p)) * (1 - ratio) * tol ** (-p * q / (q - p))
    return sympy.Implies(sympy.Ge(k, enough), sympy.Le(_tail_q, tol * _norm_q))


RETAINED_SUFFICIENT = register(
    Statement(
        id="retained-sufficient",
        title="Entries that are enough for a relative tail",
        reference="ours, the Stechkin bound solved for k",
        status="ours",
        assumptions=(finite_weights, some_weight, orders_rise_to_q, tolerance_is_share),
        observed=_tail_at_sufficient,
        bound=lambda w, tol, p, q: float(tol),
        relative_error=lambda w, tol, p, q: 2 * tail_error(np.size(w), q),
        formula=_sufficient_formula,
        draw=_draw_tolerance,
    )
)


def _removed(w: Array, retained: int) -> Array:
    v = np.array(w, dtype=np.float64)
    v[np.argsort(-np.abs(v), kind="stable")[:retained]] = 0.0
    return v


def _linear_unit_formula() -> sympy.Basic:
    error, scale = _Quantity("‖f − f̂‖", r"\|f - \hat f\|_{L_2}"), sympy.Symbol("B", positive=True)
    return sympy.Le(error, scale * q * (1 - q) ** (1 / q - 1) * _norm_q * k ** (1 - 1 / q))


LINEAR_UNIT = register(
    Statement(
        id="linear-unit-l1",
        title="Error of a magnitude-pruned linear unit, inputs correlated in any way",
        reference="Yang et al. 2022 (arXiv 2206.05604), linear-unit theorem as reconstructed, case (a)",
        status="reconstructed",
        assumptions=(finite_weights, quasi_order, keeps_some),
        observed=lambda w, retained, q, inputs: unit_error_observed(_removed(w, retained), inputs),
        bound=lambda w, retained, q, inputs: unit_error_lq(w, retained, q=q, scale=float(column_scale(inputs).max())),
        # |fl(Xv) − Xv| ≤ d·u·|X||v| entrywise, whose L2 norm is at most B‖v‖₁ ≤ bound.
        relative_error=lambda w, retained, q, inputs: (
            norm_error(np.size(w), 1.0) + norm_error(np.shape(inputs)[0], 2.0)
        ),
        formula=_linear_unit_formula,
        draw=_draw_linear_unit,
    )
)


def _prune_rows(W: Array, retained: int) -> Array:
    return W - np.stack([_removed(row, retained) for row in W])


def _relu_chain(layers: list[tuple[Array, Array]], inputs: Array) -> list[Array]:
    features = [np.asarray(inputs, dtype=np.float64)]
    for W, b in layers:
        features.append(np.maximum(features[-1] @ W.T + b, 0.0))
    return features


def _chain_observed(layers: list[tuple[Array, Array]], retained: int, inputs: Array) -> float:
    dense = _relu_chain(layers, inputs)[-1]
    pruned = _relu_chain([(_prune_rows(W, retained), b) for W, b in layers], inputs)[-1]
    return float(lq_quasinorm(dense - pruned, 2.0, axis=0).max() / np.sqrt(len(dense)))


def _chain_bound(layers: list[tuple[Array, Array]], retained: int, inputs: Array) -> float:
    features = _relu_chain(layers, inputs)
    scales = [float(column_scale(f).max()) for f in features[:-1]]
    kept = [_prune_rows(W, retained) for W, _ in layers]
    local = [
        max(unit_error_l1(v, scale) for v in W - W_kept)
        for (W, _), W_kept, scale in zip(layers, kept, scales, strict=True)
    ]
    gains = [max(unit_error_l1(row, 1.0) for row in W) for W in kept]
    return chain_error(local, gains, [1.0] * len(layers))[-1]


def _forward_rounding(layers: list[tuple[Array, Array]], inputs: Array, bound: float) -> float:
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


def _multilayer_formula() -> sympy.Basic:
    depth, layer, later = sympy.symbols("L l j", integer=True, positive=True)
    rho = sympy.Symbol("rho", positive=True)
    delta, gain = sympy.IndexedBase("delta"), sympy.IndexedBase("T")
    amplification = rho ** (depth - layer + 1) * sympy.Product(gain[later], (later, layer + 1, depth))
    return sympy.Le(
        _Quantity("‖h_L − ĥ_L‖", r"\|h_L - \hat h_L\|_{L_2}"),
        sympy.Sum(delta[layer] * amplification, (layer, 1, depth)),
    )


MULTILAYER = register(
    Statement(
        id="multilayer",
        title="Error of a chain of pruned layers with ReLU between",
        reference="Yang et al. 2022 (arXiv 2206.05604), multi-layer theorem as reconstructed",
        status="reconstructed",
        assumptions=(
            Assumption(
                "finite",
                "all weights are finite.",
                lambda case: all(np.isfinite(W).all() and np.isfinite(b).all() for W, b in case["layers"]),
            ),
            Assumption("k ≥ 0", "no fewer than 0 entries of each row are kept.", lambda case: case["retained"] >= 0),
        ),
        observed=_chain_observed,
        bound=_chain_bound,
        relative_error=lambda layers, retained, inputs: _forward_rounding(
            layers, inputs, _chain_bound(layers, retained, inputs)
        ),
        formula=_multilayer_formula,
        draw=_draw_chain,
    )
)


def _chain_bound_by_unit(layers: list[tuple[Array, Array]], retained: int, inputs: Array) -> float:
    features = _relu_chain(layers, inputs)
    errors = np.zeros(np.shape(inputs)[1])
    for (W, _), x in zip(layers, features, strict=False):
        kept = _prune_rows(W, retained)
        errors = unit_errors(column_scale(x @ (W - kept).T), kept, errors, 1.0)
    return float(errors.max())


def _multilayer_units_formula() -> sympy.Basic:
    i, j, m = sympy.symbols("i j m", integer=True, positive=True)
    rho = sympy.Symbol("rho", positive=True)
    local, weight, error = sympy.IndexedBase("delta"), sympy.IndexedBase(r"\hat w"), sympy.IndexedBase("e")
    passed_on = sympy.Sum(sympy.Abs(weight[i, j]) * error[j], (j, 1, m))
    return sympy.Le(_Quantity("‖h_i − ĥ_i‖", r"\|h_i - \hat h_i\|_{L_2}"), rho * (local[i] + passed_on))


MULTILAYER_UNITS = register(
    Statement(
        id="multilayer-units",
        title="Error of a chain of pruned layers, unit by unit, from measured errors of single layers",
        reference="ours, sharper than 'multilayer': no maximum over units, local errors measured on dense features",
        status="ours",
        assumptions=MULTILAYER.assumptions,
        observed=_chain_observed,
        bound=_chain_bound_by_unit,
        relative_error=lambda layers, retained, inputs: _forward_rounding(
            layers, inputs, _chain_bound_by_unit(layers, retained, inputs)
        ),
        formula=_multilayer_units_formula,
        draw=_draw_chain,
    )
)


def _risk_formula() -> sympy.Basic:
    n = sympy.Symbol("n", positive=True)
    error, residual = _Quantity("‖(A − A_J·T)u‖", r"\|(A - A_J T)u\|_2"), _Quantity("‖A − A_J·T‖", r"\|A - A_J T\|_2")
    return sympy.Le(error / sympy.sqrt(n), residual * _Quantity("‖u‖", r"\|u\|_2") / sympy.sqrt(n))


RISK_EMPIRICAL = register(
    Statement(
        id="risk-empirical",
        title="Error of a unit whose inputs are replaced by their skeleton",
        reference="Chee et al. 2021 (arXiv 2108.00065), empirical risk bound as reconstructed",
        status="reconstructed",
        assumptions=(
            Assumption("finite", "all features are finite.", lambda case: bool(np.isfinite(case["features"]).all())),
        ),
        observed=lambda features, indices, interpolation, consumer: unit_error_observed(
            consumer, skeleton_residual(features, indices, interpolation, np.zeros(np.shape(features)[1]))
        ),
        bound=lambda features, indices, interpolation, consumer: float(
            skeleton_output_bound(
                skeleton_residual(features, indices, interpolation, np.zeros(np.shape(features)[1])),
                np.asarray(consumer)[None],
            )[0]
        ),
        # Both sides start from the same computed residual E; |fl(Eu) − Eu| ≤ m·u·|E||u| ≤ m^1.5·u·‖E‖₂‖u‖.
        relative_error=lambda features, indices, interpolation, consumer: (
            norm_error(np.shape(features)[1], 1.0) * float(np.sqrt(np.shape(features)[1]))
            + norm_error(np.shape(features)[0], 2.0)
        ),
        formula=_risk_formula,
        draw=_draw_skeleton,
    )
)
