"""Answers to compare the measures with: formulas in 60 digits, and both sides of the criteria in ball arithmetic."""

import numpy as np
from flint import arb
from mpmath import mp, mpf

from oracles import precise, quasinorm


def _falling(w):
    return sorted((abs(mpf(float(x))) for x in w), reverse=True)


@precise
def weak_quasinorm(w, q):
    return max(mpf(i) ** (1 / mpf(q)) * x for i, x in enumerate(_falling(w), start=1))


@precise
def hoyer(w):
    root = mp.sqrt(len(w))
    return (root - quasinorm(w, 1.0) / quasinorm(w, 2.0)) / (root - 1)


@precise
def gini(w):
    sizes = _falling(w)
    return mp.fsum(abs(a - b) for a in sizes for b in sizes) / (2 * len(w) * mp.fsum(sizes))


@precise
def entropy_effective_count(w):
    sizes = [x for x in _falling(w) if x]
    total = mp.fsum(sizes)
    return mp.exp(-mp.fsum(x / total * mp.log(x / total) for x in sizes))


@precise
def tail_index(w, k):
    sizes = _falling(w)
    excess = mp.fsum(mp.log(x / sizes[k]) for x in sizes[:k])
    return k / excess if excess else mp.inf


def pq_axioms(w, criterion, entry, other, amount, p, q):
    """1 − I of the vector a criterion calls sparser and of the other, in balls, the larger first where both agree."""
    before, share = [arb(abs(float(x))) for x in w], arb(float(amount))
    largest, after = arb(float(np.abs(w).max())), list(before)
    if criterion == "D1" and entry != other:
        rich, poor = (entry, other) if abs(w[entry]) >= abs(w[other]) else (other, entry)
        gift = share * (before[rich] - before[poor]) / 2
        after[rich], after[poor] = before[rich] - gift, before[poor] + gift
    elif criterion == "D2":
        after = [share * x for x in before]
    elif criterion == "D3":
        after = [x + share * largest for x in before]
    elif criterion == "D4":
        after = before + before
    elif criterion == "P1":
        after[entry] = 2 * largest
        before = list(after)
        before[entry] = after[entry] * (1 + share)
    elif criterion == "P2":
        before = [*before, arb(0)]
    first, second = (_power_mean(v, p) / _power_mean(v, q) for v in (before, after))
    return (first.max(second), first.min(second)) if criterion in ("D2", "D4") else (first, second)


def _power_mean(balls, order):
    s = arb(float(order))
    return (sum((x**s for x in balls if x > 0), arb(0)) / len(balls)) ** (1 / s)
