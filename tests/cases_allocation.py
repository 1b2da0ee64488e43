"""Cases of the theorem on sharing a number of retained weights; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import random_orders, random_vector


def _shared(rng):
    gains = np.abs(random_vector(rng, int(rng.integers(1, 12))))
    counts = rng.integers(1, 1000, gains.size).astype(float)
    q, p = random_orders(rng)
    if rng.random() < 0.5 and gains.any():  # near the best sharing
        best = np.exp(q * (np.log(np.maximum(gains, 1e-300)) - np.log(gains.max())))
        counts = np.maximum(1000 * best, 1e-3) * np.exp(rng.choice([0.0, 1e-6, 0.1]) * rng.normal(size=gains.size))
    return {"gains": gains, "counts": counts, "q": float(q), "p": float(p)}


CASES = {"allocation": st.integers(0, 2**32 - 1).map(lambda seed: _shared(np.random.default_rng(seed)))}
RANDOM = {"allocation": _shared}
EXTREMAL = {
    "allocation": {"gains": np.array([4.0, 9.0, 1.0]), "counts": np.array([20.0, 30.0, 10.0]), "q": 0.5, "p": 1.0},
}
OUTSIDE = [
    ("allocation", {"gains": np.array([4.0, -9.0, 1.0])}, "not negative"),
    ("allocation", {"gains": np.array([4.0, np.inf, 1.0])}, "finite"),
    ("allocation", {"counts": np.array([4.0, 0.0, 1.0])}, "retains something"),
    ("allocation", {"q": 1.0}, "0 < q < p"),
]
