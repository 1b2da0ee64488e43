"""Slow or high-precision answers to compare the code with: formulas in 60 digits, subsets by enumeration."""

from itertools import combinations

import numpy as np
from mpmath import mp, mpf

DIGITS = 60


def precise(function):
    """Run a function in 60-digit arithmetic."""

    def run(*args, **kwargs):
        with mp.workdps(DIGITS):
            return function(*args, **kwargs)

    return run


def _power_sum(w, q):
    return mp.fsum(mpf(abs(float(x))) ** mpf(q) for x in w if x)


@precise
def quasinorm(w, q):
    return _power_sum(w, q) ** (1 / mpf(q))


@precise
def sparsity_index(w, q):
    return quasinorm(w, 1.0) / quasinorm(w, q)


@precise
def pq_index(w, p, q):
    return 1 - mpf(len(w)) ** (1 / mpf(q) - 1 / mpf(p)) * quasinorm(w, p) / quasinorm(w, q)


@precise
def effective_count(w, p, q):
    p, q = mpf(p), mpf(q)
    return (quasinorm(w, p) / quasinorm(w, q)) ** (p * q / (q - p))


@precise
def best_term_error(w, k, p):
    return quasinorm(sorted(np.abs(w))[: len(w) - k], p) if k < len(w) else mpf(0)


@precise
def stechkin_bound(w, k, q, p):
    q, p = mpf(q), mpf(p)
    ratio = q / p
    constant = (ratio**ratio * (1 - ratio) ** (1 - ratio)) ** (1 / q)
    return constant * mpf(k) ** (1 / p - 1 / q) * quasinorm(w, q)


@precise
def retained_necessary(w, ratio, p, q):
    exponent = mpf(q) / (mpf(q) - mpf(p))
    return effective_count(w, p, q) * (1 + mpf(ratio)) ** -exponent


@precise
def retained_sufficient(w, tol, p, q):
    p, q, ratio = mpf(p), mpf(q), mpf(p) / mpf(q)
    return effective_count(w, p, q) * ratio ** (p / (q - p)) * (1 - ratio) * mpf(tol) ** (-p * q / (q - p))


def best_error_over_subsets(w, k, p):
    """The least ℓp error of any k-term approximation, by trying every set of k entries."""
    kept = combinations(range(len(w)), k)
    return min(float(quasinorm(np.delete(w, list(subset)), p)) for subset in kept)


def squared_error(X, Y, columns, *, intercept):
    """Σ‖y − ŷ‖² of least squares on some columns, by NumPy's lstsq."""
    A = X[:, columns]
    if intercept:
        A = np.hstack([A, np.ones((len(X), 1))])
    return float(((Y - A @ np.linalg.lstsq(A, Y, rcond=None)[0]) ** 2).sum()) if A.size else float((Y**2).sum())


def greedy_columns(X, Y, k, *, intercept):
    """Forward selection: at each step the column after which least squares is best, by trying all."""
    chosen = []
    for _ in range(k):
        rest = [j for j in range(X.shape[1]) if j not in chosen]
        chosen.append(min(rest, key=lambda j: squared_error(X, Y, [*chosen, j], intercept=intercept)))
    return chosen


def best_columns(X, Y, k, *, intercept):
    """The set of k columns with the least error, by trying all."""
    return min(combinations(range(X.shape[1]), k), key=lambda s: squared_error(X, Y, list(s), intercept=intercept))
