"""The rounding of the statements, judged by ball arithmetic: bounds never below the exact ones, allowances enough."""

import numpy as np
import pytest
from flint import arb

import balls
from ellq.theory import registry, statement
from ellq.theory.approximation import retained_sufficient

CASES = 200


def _cases(id):
    """Cases of a statement that a few hundred bits can be summed over in no time."""
    seeds, entry = iter(range(100_000)), statement(id)
    found = 0
    while found < CASES:
        case = entry.draw(np.random.default_rng(next(seeds)))
        if sum(np.size(part) for part in case.values() if isinstance(part, np.ndarray)) > 300:
            continue
        try:
            verdict = entry.check(**case)
        except (OverflowError, ValueError):  # beyond float64, or outside the assumptions
            continue
        found += 1
        yield case, verdict


@pytest.mark.parametrize("id", list(balls.SIDES))
def test_rounding_is_covered(id):
    for case, verdict in _cases(id):
        observed, bound = balls.SIDES[id](**case)
        assert not observed > bound, case  # the statement itself, without any rounding
        assert not arb(verdict.bound) < bound, (case, verdict, bound)
        assert not arb(verdict.observed) - arb(verdict.allowance) > observed, (case, verdict, observed)
        # And the other way: what is observed is not rounded away, nor is the bound blown up.
        assert not arb(verdict.bound) > bound * (1 + arb(1e-6)) + arb(1e-300), (case, verdict, bound)


@pytest.mark.parametrize("id", list(balls.SIDES))
def test_a_bound_rounded_down_would_be_seen(id):
    low = 0
    for case, verdict in _cases(id):
        _, bound = balls.SIDES[id](**case)
        low += bool(arb(verdict.bound * (1 - 1e-6)) < bound)
    assert low > CASES / 3


def test_a_sufficient_count_is_never_rounded_down_and_suffices_exactly():
    for case, verdict in _cases("retained-sufficient"):
        w, tol, p, q = case["w"], case["tol"], case["p"], case["q"]
        enough, tail = balls.precisely(_sufficient)(w, tol, p, q)
        assert not arb(retained_sufficient(w, tol, p=p, q=q)) < enough.min(arb(w.size))  # beyond, it says nothing
        assert not tail > tol, (case, tail)
        assert not arb(verdict.observed) - arb(verdict.allowance) > tail


def _sufficient(w, tol, p, q):
    ratio, tolerance = balls.ball(p) / balls.ball(q), balls.ball(tol)
    factor = ratio ** (balls.ball(p) / (balls.ball(q) - balls.ball(p))) * (1 - ratio)
    power = -balls.ball(p) * balls.ball(q) / (balls.ball(q) - balls.ball(p))
    enough = balls.effective_count(w, p, q) * factor * tolerance**power
    kept = min(int(np.ceil(min(retained_sufficient(w, tol, p=p, q=q), len(w)))), len(w))
    return enough, balls.best_term_error(w, kept, q) / balls.quasinorm(w, q)


def test_every_statement_on_vectors_is_judged():
    unjudged = set(registry()) - set(balls.SIDES) - {"retained-sufficient", "risk-empirical"}
    assert not unjudged
