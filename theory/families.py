"""Families of vectors and matrices that bounds are attacked with: random, structured, and near the extremes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import qr

from ellq.theory.arguments import Array

Draw = Callable[[np.random.Generator, int], Array]


def _gaussian(rng: np.random.Generator, d: int) -> Array:
    return rng.standard_normal(d)


def _laplace(rng: np.random.Generator, d: int) -> Array:
    return rng.laplace(size=d)


def _heavy_tail(rng: np.random.Generator, d: int) -> Array:
    return rng.standard_t(rng.uniform(0.5, 5.0), size=d)


def _power_law(rng: np.random.Generator, d: int) -> Array:
    falling = np.arange(1, d + 1, dtype=np.float64) ** -rng.uniform(0.1, 8.0)
    return np.asarray(falling * rng.choice([-1.0, 1.0], size=d))


def _geometric(rng: np.random.Generator, d: int) -> Array:
    return np.asarray(rng.uniform(0.05, 0.999) ** np.arange(d, dtype=np.float64))


def _one_spike(rng: np.random.Generator, d: int) -> Array:
    w = rng.standard_normal(d) * 10.0 ** rng.uniform(-12, 0)
    w[rng.integers(d)] = 1.0
    return np.asarray(w)


def _flat(rng: np.random.Generator, d: int) -> Array:
    return np.full(d, 10.0 ** rng.uniform(-3, 3))


def _flat_support(rng: np.random.Generator, d: int) -> Array:
    # Equal magnitudes on a part of the entries: what the sharp Stechkin bound is nearly attained by.
    w = np.zeros(d)
    w[: rng.integers(1, d + 1)] = 1.0
    return w


def _two_level(rng: np.random.Generator, d: int) -> Array:
    w = np.full(d, 10.0 ** rng.uniform(-6, 0))
    w[: rng.integers(0, d + 1)] = 1.0
    return w


def _near_equal(rng: np.random.Generator, d: int) -> Array:
    return np.asarray(1.0 + rng.standard_normal(d) * 10.0 ** rng.uniform(-16, -2))


def _ties(rng: np.random.Generator, d: int) -> Array:
    return rng.integers(-3, 4, size=d).astype(np.float64)


def _subnormal(rng: np.random.Generator, d: int) -> Array:
    return np.asarray(rng.integers(0, 1000, size=d) * 5e-324)


def _huge_range(rng: np.random.Generator, d: int) -> Array:
    return np.asarray(10.0 ** rng.uniform(-290, 290, size=d) * rng.choice([-1.0, 1.0], size=d))


def _huge(rng: np.random.Generator, d: int) -> Array:
    return rng.standard_normal(d) * 1e300 / d


VECTORS: dict[str, Draw] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "heavy tail": _heavy_tail,
    "power law": _power_law,
    "geometric": _geometric,
    "one spike": _one_spike,
    "flat": _flat,
    "flat support": _flat_support,
    "two levels": _two_level,
    "near equal": _near_equal,
    "ties": _ties,
    "subnormal": _subnormal,
    "huge range": _huge_range,
    "huge": _huge,
}
"""Vectors of d entries by family; each may hold zeros, none NaN or infinity."""

TAME = (
    "gaussian",
    "laplace",
    "power law",
    "geometric",
    "one spike",
    "flat",
    "flat support",
    "two levels",
    "near equal",
)
"""Families whose squares and products stay far from overflow and underflow."""


def size(rng: np.random.Generator, largest: int = 300) -> int:
    """Draw a number of entries, small ones as often as large ones."""
    return int(np.exp(rng.uniform(0.0, np.log(largest + 1.0))))


def vector(rng: np.random.Generator, *, largest: int = 300, tame: bool = False) -> Array:
    """Draw a vector that is not all zeros, of a random family and size."""
    names = TAME if tame else tuple(VECTORS)
    w = VECTORS[names[rng.integers(len(names))]](rng, size(rng, largest))
    if not w.any():
        w[rng.integers(w.size)] = 1.0
    return w


def features(rng: np.random.Generator, d: int, *, samples: int = 0) -> Array:
    """Draw samples of d features, shape (n, d): independent, correlated, equal, rank-deficient, with dead columns."""
    n = samples or size(rng, 60)
    kind = rng.integers(5)
    if kind == 0:
        X = rng.standard_normal((n, d))
    elif kind == 1:
        X = np.repeat(rng.standard_normal((n, 1)), d, axis=1)  # equal inputs: where ℓ1 bounds are attained
    elif kind == 2:
        r = int(rng.integers(1, d + 1))
        X = np.maximum(rng.standard_normal((n, r)) @ rng.standard_normal((r, d)), 0.0)
    elif kind == 3:
        X = rng.random((n, d)) * 10.0 ** rng.uniform(-3, 3, size=d)
    else:
        X = rng.integers(0, 2, size=(n, d)).astype(np.float64)
    X[:, rng.random(d) < 0.1] = 0.0
    return np.asarray(X)


def orders(rng: np.random.Generator, *, largest: float = 4.0, smallest: float = 0.05) -> tuple[float, float]:
    """Draw two rising orders."""
    low, high = sorted(rng.uniform(smallest, largest, size=2))
    return float(low), float(high + 1e-3)


def kahan(n: int, cosine: float) -> Array:
    """Return the Kahan matrix, upper triangular of n columns, which column pivoting leaves as it is.

        diag(1, s, …, s^(n−1))·(Id − c·strictly upper ones)        s² + c² = 1

    The columns all have length 1, and so have those of every R22 up to s^k: all pivots tie. Its last singular value is
    nearly 2^(n−1) times below its last pivot as c → 1. Reference: Kahan 1966.
    """
    sine = np.sqrt((1 - cosine) * (1 + cosine))
    return np.asarray(sine ** np.arange(n)[:, None] * (np.eye(n) - cosine * np.triu(np.ones((n, n)), 1)))


def wide_kahan(k: int, rest: int, cosine: float) -> Array:
    """Return the first k columns of a Kahan matrix, and ``rest`` times the next one.

    Where column pivoting is furthest from the singular values: the least upper bound of Kawamura & Suda 2021 is
    approached as c → 1.
    """
    R = np.zeros((k + rest, k + rest))
    R[: k + 1, : k + 1] = kahan(k + 1, cosine)
    R[:, k:] = R[:, k : k + 1]
    return R


def gu_eisenstat(k: int, cosine: float) -> Array:
    """Return the Gu–Eisenstat matrix of k + 2 columns, k ≥ 2, which column pivoting leaves as it is.

    A Kahan block of k − 1 columns, and three columns of equal small size, the last of which depends on the block as one
    more Kahan column would: R11⁻¹R12 grows like 2^k. Reference: Gu & Eisenstat 1996 (doi 10.1137/0917055).
    """
    block = kahan(k, cosine)[: k - 1]
    small = 1 / (np.sqrt(k) * np.linalg.norm(np.linalg.inv(block[:, : k - 1]), axis=1).max())
    small = min(small, ((1 - cosine) * (1 + cosine)) ** ((k - 1) / 2))  # else the last column would be the longest
    R = small * np.eye(k + 2)
    R[: k - 1, : k - 1], R[: k - 1, -1] = block[:, : k - 1], block[:, -1]
    return np.asarray(R)


def triangular(rng: np.random.Generator, largest: int = 12) -> Array:
    """Draw an upper triangular factor, columns in the order of column pivoting: of features, graded, near the worst."""
    kind, m = rng.integers(6), size(rng, largest)
    cosine = float(1 - 10.0 ** -rng.uniform(0.05, 4))
    if kind == 0:
        return kahan(m, cosine)
    if kind == 1:
        return wide_kahan(m - 1, int(rng.integers(1, 4)), cosine)
    if kind == 2:
        return gu_eisenstat(max(m, 2), cosine)
    if kind == 3:
        A = features(rng, m)
    elif kind == 4:  # a spectrum that falls fast, directions at random
        A = rng.standard_normal((m, m)) * _geometric(rng, m)[:, None] @ rng.standard_normal((m, m))
    else:  # nearly equal columns
        A = np.ones((m, m)) + np.eye(m) * 10.0 ** -rng.uniform(0, 6)
    factor: Array = qr(A, mode="r", pivoting=True)[0]
    return factor[:m]
