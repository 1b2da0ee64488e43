"""Cases of the theorems on the risk of skeletons; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import random_features

RARE = {"atoms": np.array([[1.0], [0.0]]), "weights": np.array([1.0, 249.0]), "samples": 10**10, "delta": 1e-300}
"""A feature that is 1 once in 250, among so many samples that its count is Gaussian as far as 1e-300 reaches."""


def _law(rng):
    atoms = random_features(rng, samples=int(rng.integers(1, 4)), columns=int(rng.integers(1, 5)))
    atoms[0, 0] = atoms[0, 0] or 1.0
    samples = int(rng.integers(1, 30)) if len(atoms) == 3 or rng.random() < 0.5 else int(10 ** rng.uniform(0, 5))
    return {
        "atoms": atoms,
        "weights": rng.uniform(0.01, 1.0, len(atoms)),
        "samples": samples,
        "delta": float(rng.choice([rng.uniform(0.01, 0.99), 10.0 ** -rng.uniform(1, 200)])),
    }


def _relative(rng):
    return _law(rng) | {"stake": float(rng.uniform(0.01, 0.99))}


def _skeleton(rng, m):
    J = rng.permutation(m)[: rng.integers(0, m + 1)]
    T = rng.normal(size=(J.size, m)) * 10.0 ** rng.uniform(-2, 2)
    T[:, J] = np.eye(J.size)
    return {"consumer": rng.normal(size=(int(rng.integers(1, 4)), m)), "indices": J, "interpolation": T}


def _pseudodim(rng):
    law = _law(rng)
    m = law["atoms"].shape[1]
    drawn = [_skeleton(rng, m) for _ in range(int(rng.integers(1, 5)))]
    least = min(np.log2(len(drawn)), m * (m + 1) / 2)
    law["samples"] = max(law["samples"], int(np.ceil(least)))
    return law | {
        "consumer": drawn[0]["consumer"],
        "skeletons": [(skeleton["indices"], skeleton["interpolation"]) for skeleton in drawn],
        "dimension": float(min(max(least, 10.0 ** rng.uniform(-3, 2)), law["samples"])),
    }


def _pointwise(rng):
    return _skeleton(rng, int(rng.integers(1, 9))) | {"radius": float(10.0 ** rng.uniform(-3, 3))}


def _split(rng):
    shape = rng.integers(1, 6, 2)
    dense, labels = rng.normal(size=shape), rng.normal(size=shape)
    factor = 10.0 ** rng.uniform(-3, 3)
    change = (dense - labels if rng.random() < 0.3 else rng.normal(size=shape)) * factor
    return {"dense": dense, "pruned": dense + change, "labels": labels}


def _held_out(rng):
    losses = rng.random(int(rng.integers(1, 4))) * 10.0 ** rng.uniform(-3, 3)
    return {
        "losses": losses,
        "weights": rng.uniform(0.01, 1.0, losses.size),
        "samples": int(rng.integers(1, 8 if losses.size == 3 else 30)),
        "delta": float(rng.uniform(0.01, 0.99)),
    }


RANDOM = {
    "risk-split": _split,
    "risk-pointwise": _pointwise,
    "risk-bernstein": _law,
    "risk-shortfall": _law,
    "risk-relative": _relative,
    "risk-kurtosis": _law,
    "risk-pseudodim": _pseudodim,
    "risk-held-out": _held_out,
}


def _seeded(draw):
    return st.integers(0, 2**32 - 1).map(lambda seed: draw(np.random.default_rng(seed)))


CASES = {id: _seeded(draw) for id, draw in RANDOM.items()}
EXTREMAL = {
    # The change is three times the error of the dense net, everywhere.
    "risk-split": {"dense": np.ones((2, 3)), "pruned": np.full((2, 3), 4.0), "labels": np.zeros((2, 3))},
    "risk-pointwise": {
        "consumer": np.array([[0.0, 1.0]]),
        "indices": np.array([0]),
        "interpolation": np.array([[1.0, 7.0]]),
        "radius": 2.0,
    },
    "risk-bernstein": RARE,
    "risk-shortfall": RARE,
    # No sample is of the rare atom, with a probability just above δ.
    "risk-relative": {
        "atoms": np.array([[1.0], [0.0]]),
        "weights": np.array([0.001, 0.999]),
        "samples": 5,
        "delta": 0.999**5 * (1 - 1e-9),
        "stake": 0.999,
    },
    "risk-kurtosis": RARE,
    # A fair coin, so far out that Hoeffding's inequality is as good as it gets; nothing is kept.
    "risk-pseudodim": {
        "atoms": np.array([[1.0], [0.0]]),
        "weights": np.ones(2),
        "samples": 10**6,
        "delta": 1e-300,
        "consumer": np.array([[2.0]]),
        "skeletons": [(np.arange(0), np.zeros((0, 1)))],
        "dimension": 1e-6,
    },
    # One sample, nearly always 0.
    "risk-held-out": {
        "losses": np.array([0.0, 1.0]),
        "weights": np.array([0.998, 0.002]),
        "samples": 1,
        "delta": 0.999,
    },
}
OUTSIDE = [
    ("risk-split", {"labels": np.full((2, 3), np.nan)}, "finite"),
    ("risk-split", {"labels": np.full((2, 3), 1e150)}, "below 1e140"),
    ("risk-pointwise", {"radius": -1.0}, "finite"),
    ("risk-pointwise", {"consumer": np.array([[np.inf, 1.0]])}, "finite"),
    ("risk-pointwise", {"interpolation": np.array([[2.0, 7.0]])}, "identity on the skeleton"),
    ("risk-bernstein", {"weights": np.array([1.0, 0.0])}, "positive weight"),
    ("risk-bernstein", {"atoms": np.zeros((2, 1))}, "not all 0"),
    ("risk-bernstein", {"atoms": np.array([[1e200], [0.0]])}, "1e-100 to 1e100"),
    ("risk-bernstein", {"samples": 0}, "1 to 10"),
    ("risk-bernstein", {"delta": 1.0}, "between 0 and 1"),
    ("risk-shortfall", {"atoms": np.ones((4, 1)), "weights": np.ones(4)}, "one to three atoms"),
    ("risk-relative", {"atoms": np.ones((3, 1)), "weights": np.ones(3), "samples": 200}, "5000 outcomes"),
    ("risk-relative", {"stake": 1.0}, "share"),
    ("risk-kurtosis", {"delta": 0.0}, "between 0 and 1"),
    ("risk-pseudodim", {"dimension": 2e6}, "0 < p ≤ n"),
    ("risk-pseudodim", {"dimension": 0.0}, "0 < p ≤ n"),
    ("risk-pseudodim", {"skeletons": [(np.arange(0), np.zeros((0, 1)))] * 2}, "at least log₂ N"),
    ("risk-pseudodim", {"skeletons": [(np.arange(1), np.full((1, 1), 2.0))]}, "identity on it"),
    ("risk-pseudodim", {"skeletons": []}, "one of N ≥ 1 skeletons"),
    ("risk-pseudodim", {"consumer": np.ones((1, 2))}, "one column per feature"),
    ("risk-held-out", {"losses": np.array([-1.0, 1.0])}, "≥ 0"),
    ("risk-held-out", {"samples": 61}, "1 to 60"),
]
