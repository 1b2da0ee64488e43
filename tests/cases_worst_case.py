"""Cases of the theorems on the worst input of a set; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import random_chain, random_vector

_SEEDS = st.integers(0, 2**32 - 1)


def _box(rng):
    v = random_vector(rng, int(rng.integers(1, 12)))
    low = rng.normal(size=v.size) * (10.0 ** rng.uniform(-3, 3) if np.abs(v).max() < 1e200 else 1e-4)
    high = low + rng.choice([0.0, 1.0], v.size) * np.abs(low)
    corner = rng.choice([(v > 0), (v < 0)])
    x = np.where(corner, high, low) if rng.random() < 0.5 else np.clip(rng.normal(size=v.size), low, high)
    return {"removed": v, "low": low, "high": high, "x": x}


def _ball(rng):
    v = random_vector(rng, int(rng.integers(1, 12)))
    order = float(rng.choice([1.0, 2.0, np.inf, rng.uniform(1.001, 5.0)]))
    radius = float(10.0 ** rng.uniform(-3, 3)) * (1.0 if np.abs(v).max() < 1e200 else 1e-7)
    x = rng.normal(size=v.size)
    if v.any():
        if order == 1.0:
            x = np.eye(v.size)[np.argmax(np.abs(v))]
        elif rng.random() < 0.7:
            sizes = np.abs(v) / np.abs(v).max()
            x = np.sign(v) * sizes ** (1 / (order - 1) if order < np.inf else 0.0)
    return {"removed": v, "radius": radius, "order": order, "x": x * (radius * (1 - 1e-9)) / np.linalg.norm(x, order)}


def _chain(rng):
    case = random_chain(rng)
    inputs = case.pop("inputs")
    return case | {"low": inputs.min(axis=0), "high": inputs.max(axis=0), "x": inputs}


def _positive_chain():
    # All weights, inputs and biases positive: intervals lose nothing, and the top corner attains every bound.
    layers = [(np.full((3, 4), 0.5), np.ones(3)), (np.full((2, 3), 2.0), np.ones(2))]
    return {"layers": layers, "retained": 2, "low": np.zeros(4), "high": np.ones(4), "x": np.ones((1, 4))}


CASES = {
    id: _SEEDS.map(lambda seed, draw=draw: draw(np.random.default_rng(seed)))
    for id, draw in (("unit-box", _box), ("unit-ball", _ball), ("multilayer-box", _chain))
}
RANDOM = {"unit-box": _box, "unit-ball": _ball, "multilayer-box": _chain}
EXTREMAL = {
    "unit-box": {
        "removed": np.array([2.0, -1.0, 0.5]),
        "low": np.array([-1.0, -2.0, 0.0]),
        "high": np.array([3.0, 1.0, 4.0]),
        "x": np.array([3.0, -2.0, 4.0]),
    },
    "unit-ball": {"removed": np.array([3.0, 4.0]), "radius": 2.0, "order": 2.0, "x": np.array([1.199999, 1.599999])},
    "multilayer-box": _positive_chain(),
}
OUTSIDE = [
    ("unit-box", {"removed": np.full(3, np.inf)}, "finite"),
    ("unit-box", {"x": np.array([3.1, 0.0, 0.0])}, "lies in the box"),
    ("unit-box", {"low": np.full(3, -np.inf)}, "which is finite"),
    ("unit-ball", {"removed": np.full(2, np.nan)}, "finite"),
    ("unit-ball", {"order": 0.5}, "order from 1 to 500"),
    ("unit-ball", {"radius": 1.0}, "lies in the ball"),
    ("unit-ball", {"radius": np.inf}, "which is finite"),
    ("multilayer-box", {"layers": [(np.full((1, 4), np.nan), np.ones(1))]}, "finite"),
    ("multilayer-box", {"retained": -1}, "fewer than 0"),
    ("multilayer-box", {"x": np.full((1, 4), 2.0)}, "lies in the box"),
]
