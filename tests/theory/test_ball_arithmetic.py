"""The rounding of the statements, judged by ball arithmetic: bounds never below the exact ones, allowances enough."""

import numpy as np
import pytest
from flint import arb

import balls
from ellq.theory import registry, statement
from ellq.theory.approximation import retained_sufficient

CASES = 200
ROOM = {
    "linear-unit-gram": 1e-3,  # second moments lose half the digits
    "linear-unit-uncorrelated": 1e-3,
    "unit-ball": 1e-2,  # dual orders above 500 are measured at 500
    # A determinant's rounding does not shrink with its logarithm.
    **dict.fromkeys(("flow-gaussian-chain", "flow-no-upper", "flow-markov-chain", "pruning-mi"), 1e-3),
}
# Bounds that have no such oracle.
ONE_SIDED = {"multilayer-box", "retained-necessary"}
ONE_SIDED |= {"eckart-young", "qrcp", "strong-rrqr", "volume-sampling", "leverage-columns", "leverage-sampling"}
LOSSY = ("linear-unit-gram", "linear-unit-uncorrelated")


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
        if observed is not None:
            assert not observed > (arb(verdict.bound) if bound is None else bound), case  # without any rounding
            assert not arb(verdict.observed) - arb(verdict.allowance) > observed, (case, verdict, observed)
        if bound is not None:
            assert not arb(verdict.bound) < bound, (case, verdict, bound)
            # And the other way: the bound is not blown up.
            room = ROOM.get(id, 1e-6)
            size = bound if id not in LOSSY else bound + _size(case)
            assert not arb(verdict.bound) > bound + size * arb(room) + arb(1e-300), (case, verdict, bound)


def _size(case):
    """The error if nothing cancelled, which is what rounding is relative to."""
    v, inputs = case.get("removed", case.get("w")), case["inputs"]
    return balls.precisely(lambda: arb(float(np.sum(np.abs(v) * np.sqrt(np.mean(inputs**2, axis=0))))))()


@pytest.mark.parametrize("id", [id for id in balls.SIDES if id not in ONE_SIDED | set(ROOM)])
def test_a_bound_rounded_down_would_be_seen(id):
    low, positive = 0, 0
    for case, verdict in _cases(id):
        _, bound = balls.SIDES[id](**case)
        positive += verdict.bound > 1e-300
        low += bool(arb(verdict.bound * (1 - 1e-6)) < bound)
    assert low > 0.8 * positive > 0


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


def test_every_statement_is_judged():
    assert set(registry()) == {*balls.SIDES, "retained-sufficient"}
