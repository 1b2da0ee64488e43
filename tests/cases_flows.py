"""Cases of the theorems on flows between layers; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import random_features, random_vector

_SEEDS = st.integers(0, 2**32 - 1)
_LINKS = ("signed", "absolute", "rms", "largest", "signed-probe", "probe")
_KINDS = ("signed", "absolute", "rms")


def _probe(rng):
    X = random_features(rng, samples=int(rng.integers(2, 25)))
    Y = random_features(rng, samples=len(X)) if rng.random() < 0.5 else X @ rng.normal(size=(X.shape[1], 3)) - 1e3
    return {"X": X, "Y": Y, "side": rng.choice(["above", "below"])}


def _correlation(rng):
    p = int(rng.integers(2, 10))
    factors = rng.normal(size=(p, p)) * 10.0 ** rng.uniform(-2, 2, p)
    if rng.random() < 0.3:
        factors[:] = factors[:1] * rng.choice([-1.0, 1.0], p)[:, None]  # one direction, units of both signs
    factors /= np.linalg.norm(factors, axis=1, keepdims=True)
    share = 10.0 ** -rng.uniform(0, 5)
    C = (1 - share) * factors @ factors.T
    C = (C + C.T) / 2
    np.fill_diagonal(C, 1.0)
    return {"correlation": C, "units": int(rng.integers(1, p)), "link": rng.choice(_LINKS)}


def _hidden(rng):
    return {
        "information": float(rng.uniform(1e-6, 6)),
        "flow": float(rng.uniform(0.02, 1)),
        "kind": rng.choice(_KINDS),
        "claim": rng.choice(["information", "flow"]),
    }


def _unimodular(rng, n):
    M = np.eye(n, dtype=np.int64)
    for _ in range(4):
        i, j = rng.integers(n, size=2)
        if i != j:
            M[i] += rng.integers(-2, 3) * M[j]
    return M * rng.integers(1, 4)


def _hadamard(rng, n):
    H = np.array([[1, 1], [1, -1]])
    return {1: np.array([[3]]), 2: H, 4: np.kron(H, H)}[n] * rng.choice([-1, 1], n)


def _invariance(rng):
    kind = rng.choice([*_KINDS, "cka", "gaussian"])
    n, m = (int(rng.choice([1, 2, 4])) for _ in range(2))
    X = rng.integers(-9, 10, (n + m + 6, n))
    Y = rng.integers(-9, 10, (len(X), m)) + X[:, :1] * 2
    maps = []
    for width in (n, m):
        if kind == "cka":
            maps.append(_hadamard(rng, width))
        elif kind == "gaussian":
            maps.append(_unimodular(rng, width))
        else:
            signs = 1 if kind == "signed" else rng.choice([-1, 1], width)
            maps.append(np.eye(width, dtype=np.int64)[rng.permutation(width)] * rng.integers(1, 1000, width) * signs)
    shifts = [rng.integers(-1000, 1001, width) for width in (n, m)]
    return {"X": X, "Y": Y, "A": maps[0], "B": maps[1], "a": shifts[0], "b": shifts[1], "kind": kind}


def _markov(rng):
    n, m, k = rng.integers(1, 5, 3)
    A, B = rng.integers(-64, 65, (m, n)), rng.integers(-64, 65, (k, m))
    if rng.random() < 0.3:
        B[:] = B[:1]  # one direction only
    noise_y, noise_z = (int(noise) for noise in rng.integers(1, 65, 2))
    return {"A": A, "B": B, "noise_y": noise_y, "noise_z": noise_z, "side": rng.choice(["above", "below"])}


def _pruned(rng):
    W = rng.normal(size=rng.integers(1, 6, 2)) * 10.0 ** rng.uniform(-3, 2)
    m, n = W.shape
    mixing = rng.normal(size=(n, n))
    S = mixing @ mixing.T + 1e-6 * np.eye(n)
    columns = np.ones(n, dtype=bool)
    if rng.random() < 0.5:
        S, columns = np.diag(rng.uniform(0, 5, n)), rng.random(n) < 0.6
    rows = rng.random(m) < 0.6
    return {"W": W, "covariance": (S + S.T) / 2, "noise": float(rng.uniform(0.01, 5)), "rows": rows, "columns": columns}


def _unit(rng):
    w = random_vector(rng, int(rng.integers(1, 30)))
    kept = rng.random(w.size) < rng.random()
    scale, noise = 10.0 ** rng.uniform(-5, 5, 2)
    return {"w": w, "kept": kept, "scale": float(scale), "noise": float(noise)}


def _vectors(rng):
    signed = bool(rng.integers(2))
    low = -1.0 if signed else 0.0
    first, second = rng.uniform(low, 1, (2, int(rng.integers(1, 20))))
    return {"first": np.round(first) if rng.random() < 0.5 else first, "second": second, "signed": signed}


RANDOM = {
    "flow-probe": _probe,
    "flow-gaussian-chain": _correlation,
    "flow-no-upper": _hidden,
    "flow-invariances": _invariance,
    "flow-markov-chain": _markov,
    "pruning-mi": _pruned,
    "pruning-mi-magnitude": _unit,
    "flow-trivial-threshold": _vectors,
}


def _drawn(random):
    return _SEEDS.map(lambda seed: random(np.random.default_rng(seed)))


CASES = {id: _drawn(random) for id, random in RANDOM.items()}

_WHOLE = {
    "X": np.array([[0, 1], [2, 0], [1, 5], [4, 4], [3, 9]]),
    "Y": np.array([[1], [0], [2], [7], [5]]),
    "A": np.array([[0, 2], [3, 0]]),
    "B": np.array([[7]]),
    "a": np.array([5, -1]),
    "b": np.array([100]),
    "kind": "signed",
}
EXTREMAL = {
    "flow-probe": {"X": np.eye(3), "Y": np.eye(3)[:, :1] * 4.0, "side": "above"},
    # One unit a layer: the averages, the largest and the information are the same.
    "flow-gaussian-chain": {"correlation": np.array([[1.0, 0.6], [0.6, 1.0]]), "units": 1, "link": "largest"},
    "flow-no-upper": {"information": 3.0, "flow": 0.1, "kind": "signed", "claim": "information"},
    "flow-invariances": _WHOLE,
    # The second layer passes on nearly all that the first does.
    "flow-markov-chain": {
        "A": np.array([[1]]),
        "B": np.array([[64]]),
        "noise_y": 1,
        "noise_z": 1,
        "side": "above",
    },
    # What is removed carries little.
    "pruning-mi": {
        "W": np.array([[1.0, 2.0], [0.01, 0.0]]),
        "covariance": np.eye(2),
        "noise": 1.0,
        "rows": np.array([True, False]),
        "columns": np.array([True, True]),
    },
    "pruning-mi-magnitude": {
        "w": np.array([3.0, -1.0, 2.0]),
        "kept": np.array([True, False, True]),
        "scale": 1.0,
        "noise": 0.5,
    },
    "flow-trivial-threshold": {"first": np.ones(9), "second": -np.ones(9), "signed": True},
}
OUTSIDE = [
    ("flow-probe", {"X": np.full((3, 3), np.nan)}, "finite matrices"),
    ("flow-probe", {"Y": np.ones((4, 1))}, "same two samples"),
    ("flow-probe", {"X": np.ones((1, 1)), "Y": np.ones((1, 1))}, "two samples"),
    ("flow-probe", {"side": "left"}, "above or below"),
    ("flow-gaussian-chain", {"correlation": np.ones((2, 2))}, "no eigenvalue below"),
    ("flow-gaussian-chain", {"correlation": 2 * np.eye(2)}, "correlation matrix"),
    ("flow-gaussian-chain", {"units": 2}, "each layer has a unit"),
    ("flow-gaussian-chain", {"link": "mean"}, "the link is one of"),
    ("flow-no-upper", {"information": 7.0}, "0 to 6 nats"),
    ("flow-no-upper", {"flow": 0.001}, "from 0.005"),
    ("flow-no-upper", {"kind": "cka"}, "the flow is one of"),
    ("flow-no-upper", {"claim": "both"}, "the claim is"),
    ("flow-invariances", {"X": np.full((5, 2), 0.5)}, "whole numbers"),
    ("flow-invariances", {"a": np.zeros(3, dtype=np.int64)}, "widths"),
    ("flow-invariances", {"A": np.array([[0, -2], [3, 0]])}, "by positive numbers for the signed"),
    ("flow-invariances", {"A": np.array([[1, 1], [0, 1]]), "kind": "rms"}, "permute units"),
    ("flow-invariances", {"A": np.array([[1, 1], [0, 1]]), "kind": "cka"}, "rotate"),
    ("flow-invariances", {"A": np.array([[1, 1], [1, 1]]), "kind": "gaussian"}, "invertible"),
    ("flow-invariances", {"kind": "copula"}, "the flow is known"),
    ("flow-invariances", {"Y": 2 * _WHOLE["X"][:, :1], "kind": "gaussian"}, "linear function of others"),
    ("flow-markov-chain", {"A": np.array([[0.5]])}, "whole numbers"),
    ("flow-markov-chain", {"noise_y": 0}, "variances positive"),
    ("flow-markov-chain", {"B": np.array([[1, 2]])}, "reads what the first makes"),
    ("flow-markov-chain", {"side": "left"}, "above or below"),
    # What float64 cannot tell from singular.
    ("flow-markov-chain", {"A": np.full((64, 64), 64), "B": np.full((64, 64), 64)}, "1e10 times"),
    ("pruning-mi", {"W": np.full((2, 2), np.inf)}, "weights are finite"),
    ("pruning-mi", {"W": np.full((2, 2), 1e200)}, "1e8"),
    ("pruning-mi", {"covariance": np.array([[1.0, 2.0], [2.0, 1.0]])}, "without negative eigenvalues"),
    ("pruning-mi", {"noise": 0.0}, "σ² > 0"),
    ("pruning-mi", {"noise": 1e-9}, "1e8"),
    # Correlated inputs: removing one can raise the information.
    (
        "pruning-mi",
        {"covariance": np.array([[1.0, -0.9], [-0.9, 1.0]]), "columns": np.array([True, False])},
        "inputs are independent",
    ),
    ("pruning-mi-magnitude", {"w": np.full(3, np.nan)}, "finite"),
    ("pruning-mi-magnitude", {"kept": np.ones(2, dtype=bool)}, "the mask says"),
    ("pruning-mi-magnitude", {"noise": 0.0}, "1e-100 to 1e100"),
    ("flow-trivial-threshold", {"signed": False}, "in \\[0, 1\\] where not"),
    ("flow-trivial-threshold", {"second": np.ones(8)}, "as many flows"),
]
