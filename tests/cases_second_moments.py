"""Cases of the theorems on units and the second moments of their inputs; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import MODERATE, random_features, random_vector

_SEEDS = st.integers(0, 2**32 - 1)


def _gram(rng):
    v = random_vector(rng, int(rng.integers(1, 12)))
    inputs = random_features(rng, columns=v.size)
    inputs[np.abs(inputs) < 1e-12] = 0.0
    return {"removed": v, "inputs": inputs}


def _uncorrelated(rng):
    w = random_vector(rng, int(rng.integers(1, 12)), MODERATE)
    inputs = random_features(rng, columns=w.size)
    if rng.random() < 0.5:
        inputs = np.linalg.qr(rng.normal(size=(w.size + 3, w.size)))[0] * 10.0 ** rng.uniform(-100, 100)
    inputs[np.abs(inputs) < 1e-12 * np.abs(inputs).max()] = 0.0
    return {"w": w, "retained": int(rng.integers(1, w.size + 1)), "q": float(rng.uniform(0.05, 1.99)), "inputs": inputs}


def _uncentred():
    rng = np.random.default_rng(0)
    return {"removed": rng.normal(size=6), "inputs": rng.normal(size=(40, 6)) + 5.0}


CASES = {
    "linear-unit-gram": _SEEDS.map(lambda seed: _gram(np.random.default_rng(seed))),
    "linear-unit-uncorrelated": _SEEDS.map(lambda seed: _uncorrelated(np.random.default_rng(seed))),
}
RANDOM = {"linear-unit-gram": _gram, "linear-unit-uncorrelated": _uncorrelated}
EXTREMAL = {
    "linear-unit-gram": _uncentred(),
    # Orthonormal inputs, and weights for which the tail's bound is an equality.
    "linear-unit-uncorrelated": {"w": np.ones(100), "retained": 75, "q": 0.5, "inputs": 10.0 * np.eye(100)},
}
OUTSIDE = [
    ("linear-unit-gram", {"removed": np.full(6, np.nan)}, "finite"),
    ("linear-unit-gram", {"inputs": np.full((40, 6), 1e-141)}, "between 1e-140 and 1e140"),
    ("linear-unit-gram", {"inputs": np.full((40, 6), np.inf)}, "between 1e-140 and 1e140"),
    ("linear-unit-uncorrelated", {"q": 2.0}, "0 < q < 2"),
    ("linear-unit-uncorrelated", {"retained": 0}, "between 1 and d"),
    ("linear-unit-uncorrelated", {"w": np.full(100, np.inf)}, "finite"),
    ("linear-unit-uncorrelated", {"inputs": np.full((2, 100), 1e141)}, "between 1e-140 and 1e140"),
]
