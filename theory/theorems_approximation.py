"""Theorems on how well a few entries represent a vector, registered with both of their sides."""

from __future__ import annotations

import math

import numpy as np
import sympy

from ellq.theory import families
from ellq.theory.approximation import (
    best_term_error,
    best_term_errors,
    retained_necessary,
    retained_sufficient,
    stechkin_bound,
    stechkin_bound_finite,
    stechkin_bound_weak,
    stechkin_bound_weak_finite,
)
from ellq.theory.arguments import Array
from ellq.theory.notation import (
    N,
    NamedQuantity,
    best_error,
    eta,
    finite_weights,
    k,
    keeps_some,
    norm_q,
    orders_rise_to_p,
    orders_rise_to_q,
    p,
    q,
    some_weight,
    tail_q,
    tol,
    tolerance_is_share,
)
from ellq.theory.power_sums import power_sums
from ellq.theory.rounding import log_error, tail_error
from ellq.theory.statements import Assumption, Case, Statement, register


def _draw_best_term(rng: np.random.Generator) -> Case:
    w = families.vector(rng)
    q, p = families.orders(rng)
    return {"w": w, "retained": int(rng.integers(1, w.size + 1)), "q": q, "p": p}


def _draw_best_term_of_any_count(rng: np.random.Generator) -> Case:
    case = {**_draw_best_term(rng)}
    return case | {"retained": int(rng.integers(0, np.size(case["w"]) + 1))}


def _draw_retained(rng: np.random.Generator) -> Case:
    w = families.vector(rng)
    p, q = families.orders(rng)
    return {"w": w, "retained": int(rng.integers(1, w.size + 1)), "p": p, "q": q}


def _draw_tolerance(rng: np.random.Generator) -> Case:
    p, q = families.orders(rng)
    return {"w": families.vector(rng), "tol": float(10.0 ** -rng.uniform(0.0, 6.0)), "p": p, "q": q}


def _stechkin_formula() -> sympy.Basic:
    ratio = q / p
    constant = (ratio**ratio * (1 - ratio) ** (1 - ratio)) ** (1 / q)
    return sympy.Le(best_error, constant * k ** (1 / p - 1 / q) * norm_q)


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


_keeps_any = Assumption(
    "0 ≤ k ≤ d", "between 0 and d entries are kept.", lambda case: 0 <= case["retained"] <= np.size(case["w"])
)
_norm_weak = NamedQuantity("‖w‖_{q,∞}", r"\|w\|_{q,\infty}")


def _finite_formula() -> sympy.Basic:
    constant = NamedQuantity("max (m − k)^(1/p) m^(−1/q)", r"\max_{k<m\leq n}(m-k)^{1/p}m^{-1/q}")
    return sympy.Le(best_error, constant * norm_q)


STECHKIN_FINITE = register(
    Statement(
        id="stechkin-finite",
        title="Best k-term error from the ℓq quasi-norm, the least constant for the number of non-zeros",
        reference="ours, sharper than 'stechkin' for every k and n",
        status="ours",
        assumptions=(finite_weights, orders_rise_to_p, _keeps_any),
        observed=lambda w, retained, q, p: best_term_error(w, retained, p=p),
        bound=lambda w, retained, q, p: stechkin_bound_finite(w, retained, q=q, p=p),
        relative_error=lambda w, retained, q, p: tail_error(np.size(w), p),
        formula=_finite_formula,
        draw=_draw_best_term_of_any_count,
    )
)


def _weak_formula() -> sympy.Basic:
    return sympy.Le(best_error, (q / (p - q)) ** (1 / p) * k ** (1 / p - 1 / q) * _norm_weak)


STECHKIN_WEAK = register(
    Statement(
        id="stechkin-weak",
        title="Best k-term error from the weak ℓq quasi-norm",
        reference="classical; compare Foucart & Rauhut 2013, section 2.1. Proof in docs/theorems.md",
        status="classical",
        assumptions=(finite_weights, orders_rise_to_p, keeps_some),
        observed=lambda w, retained, q, p: best_term_error(w, retained, p=p),
        bound=lambda w, retained, q, p: stechkin_bound_weak(w, retained, q=q, p=p),
        relative_error=lambda w, retained, q, p: tail_error(np.size(w), p),
        formula=_weak_formula,
        draw=_draw_best_term,
    )
)


def _weak_finite_formula() -> sympy.Basic:
    i, n = sympy.symbols("i n", integer=True, positive=True)
    return sympy.Le(best_error, sympy.Sum(i ** (-p / q), (i, k + 1, n)) ** (1 / p) * _norm_weak)


STECHKIN_WEAK_FINITE = register(
    Statement(
        id="stechkin-weak-finite",
        title="Best k-term error from the weak ℓq quasi-norm, the least constant for the number of non-zeros",
        reference="ours, sharper than 'stechkin-weak' for every k and n",
        status="ours",
        assumptions=(finite_weights, orders_rise_to_p, _keeps_any),
        observed=lambda w, retained, q, p: best_term_error(w, retained, p=p),
        bound=lambda w, retained, q, p: stechkin_bound_weak_finite(w, retained, q=q, p=p),
        relative_error=lambda w, retained, q, p: tail_error(np.size(w), p),
        formula=_weak_finite_formula,
        draw=_draw_best_term_of_any_count,
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
    return sympy.Implies(sympy.Ge(k, enough), sympy.Le(tail_q, tol * norm_q))


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
