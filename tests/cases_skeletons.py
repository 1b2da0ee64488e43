"""Cases of the theorems on the error of skeletons; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st
from scipy.linalg import qr

from ellq.theory.families import gu_eisenstat, wide_kahan
from ellq.theory.id_bounds import pivot_threshold, swap_limit
from strategies import random_features, random_skeleton

NORMS = ("spectral", "frobenius")


def _random_triangular(rng):
    kind = rng.integers(5)
    if kind == 0:
        R = wide_kahan(int(rng.integers(0, 7)), int(rng.integers(1, 5)), rng.choice([0.1, 0.7, 0.99, 0.9999]))
    elif kind == 1:
        R = gu_eisenstat(int(rng.integers(2, 9)), rng.choice([0.1, 0.7, 0.99]))
    elif kind == 2:
        R = np.triu(rng.normal(size=(3, int(rng.integers(3, 6)))))
    else:
        A = random_features(rng)
        R = qr(A, mode="r", pivoting=kind == 3)[0][: A.shape[1]]
        R[0, 0] = R[0, 0] or 1.0
    return R * 10.0 ** rng.uniform(-3, 3)


def _floor(rng):
    A = random_features(rng)
    A /= np.abs(A).max() or 1.0  # what rounding adds to singular values is relative to the largest
    indices = rng.permutation(A.shape[1])[: rng.integers(0, A.shape[1] + 1)]
    T = np.linalg.lstsq(A[:, indices], A, rcond=None)[0] + rng.choice([0.0, 1.0]) * rng.normal()
    return {"features": A, "indices": indices, "interpolation": T, "norm": rng.choice(NORMS)}


def _qrcp(rng):
    R = _random_triangular(rng)
    kept = [k for k in range(R.shape[1] + 1) if pivot_threshold(R, k) < np.inf]
    k = int(rng.choice(kept))
    return {"R": R, "retained": k, "norm": rng.choice(NORMS), "threshold": pivot_threshold(R, k)}


def _strong(rng):
    R = _random_triangular(rng)
    kept = [k for k in range(R.shape[1] + 1) if np.isfinite(swap_limit(R, k))]
    k = int(rng.choice(kept))
    return {"R": R, "retained": k, "norm": rng.choice(NORMS), "limit": swap_limit(R, k) * rng.choice([1.0, 2.0])}


def _pivots(rng):
    R = _random_triangular(rng)
    kept = [k for k in range(len(R)) if k == 0 or np.isfinite(pivot_threshold(R, k + 1))]
    k = int(rng.choice(kept))
    R[0, 0] = max(R[0, 0], np.linalg.norm(R)) if k == 0 else R[0, 0]
    return {"R": R, "retained": k, "side": rng.choice(["lower", "upper"]), "threshold": pivot_threshold(R, k + 1)}


def _volume(rng):
    A = random_features(rng, samples=int(rng.integers(1, 7)), columns=int(rng.integers(1, 6)))
    A[0, 0] = A[0, 0] or 1.0
    return {"features": A, "retained": int(rng.integers(0, max(np.linalg.matrix_rank(A, tol=1e-9), 1)))}


def _leverage(rng):
    A = random_features(rng)
    rank = int(rng.integers(0, A.shape[1] + 1))
    basis = np.linalg.svd(A)[2][:rank].T if rng.random() < 0.7 else np.linalg.qr(rng.normal(size=(A.shape[1], rank)))[0]
    order = rng.permutation(A.shape[1])
    if rng.random() < 0.7:
        order = np.argsort(-(basis**2).sum(axis=1))
    missing = rank - np.cumsum((basis[order] ** 2).sum(axis=1))
    least = int(np.argmax(missing < 0.999)) + 1 if rank else 0
    columns = order[: int(rng.integers(least, A.shape[1] + 1))]
    return {"features": A, "basis": basis, "indices": columns, "norm": rng.choice(NORMS)}


def _sampling(rng):
    A = random_features(rng, samples=int(rng.integers(1, 7)), columns=int(rng.integers(1, 6)))
    A[0, 0] = A[0, 0] or 1.0
    rank = int(rng.integers(1, A.shape[1] + 1))
    basis = np.linalg.svd(A)[2][:rank].T if rng.random() < 0.7 else np.linalg.qr(rng.normal(size=(A.shape[1], rank)))[0]
    return {"features": A, "basis": basis, "draws": int(10 ** rng.uniform(0, 4))}


def _top_singular_vector():
    A = np.random.default_rng(0).normal(size=(20, 5))
    T = np.linalg.lstsq(A[:, :2], A, rcond=None)[0]
    u = np.linalg.svd(A - A[:, :2] @ T)[2][0]
    return {"features": A, "indices": [0, 1], "interpolation": T, "consumer": u}


RANDOM = {
    "risk-empirical": random_skeleton,
    "eckart-young": _floor,
    "qrcp": _qrcp,
    "strong-rrqr": _strong,
    "pivot-ratio": _pivots,
    "volume-sampling": _volume,
    "leverage-columns": _leverage,
    "leverage-sampling": _sampling,
}


def _seeded(draw):
    return st.integers(0, 2**32 - 1).map(lambda seed: draw(np.random.default_rng(seed)))


CASES = {id: _seeded(draw) for id, draw in RANDOM.items()}
EXTREMAL = {
    "risk-empirical": _top_singular_vector(),
    "eckart-young": {
        "features": np.diag([3.0, 2.0, 1.0]),
        "indices": np.array([0, 1]),
        "interpolation": np.eye(3)[:2],
        "norm": "frobenius",
    },
    "qrcp": {"R": wide_kahan(4, 3, 1 - 1e-4), "retained": 4, "norm": "spectral", "threshold": 1 + 1e-9},
    # Two nearly parallel columns of length 1: a swap changes nothing.
    "strong-rrqr": {
        "R": np.array([[1.0, 0.9999], [0.0, (1 - 0.9999**2) ** 0.5]]),
        "retained": 1,
        "norm": "spectral",
        "limit": 1 + 1e-9,
    },
    # Five equal columns and one near them.
    "pivot-ratio": {
        "R": np.outer(np.eye(6)[0], np.ones(6)) + 1e-3 * np.outer(np.eye(6)[1], np.eye(6)[1]),
        "retained": 1,
        "side": "lower",
        "threshold": 1.001,
    },
    "volume-sampling": {"features": np.diag([1e4, 1e4, 1.0, 1.0, 1.0]), "retained": 2},
    "leverage-columns": {
        "features": np.diag([3.0, 2.0, 1.0]),
        "basis": np.eye(3)[:, :2],
        "indices": np.array([0, 1]),
        "norm": "spectral",
    },
    # So many draws that they cost nothing: all of the leverage is in one column.
    "leverage-sampling": {"features": np.diag([2.0, 1.0]), "basis": np.eye(2)[:, :1], "draws": 10**4},
}
OUTSIDE = [
    ("risk-empirical", {"features": np.full((20, 5), np.inf)}, "finite"),
    ("eckart-young", {"features": np.full((3, 3), np.nan)}, "finite"),
    ("eckart-young", {"norm": "nuclear"}, "spectral or frobenius"),
    ("qrcp", {"R": np.ones((7, 7))}, "upper triangular"),
    ("qrcp", {"R": np.zeros((7, 7))}, "not all zeros"),
    ("qrcp", {"retained": 8}, "between none and all"),
    ("qrcp", {"retained": -1}, "between none and all"),
    ("qrcp", {"threshold": 1.0}, "longer than f times"),
    ("qrcp", {"threshold": np.inf}, "longer than f times"),
    ("qrcp", {"R": np.array([[1.0, 2.0], [0.0, 1.0]]), "retained": 1}, "longer than f times"),
    ("qrcp", {"norm": "max"}, "spectral or frobenius"),
    ("strong-rrqr", {"limit": 0.99}, "no swap"),
    ("strong-rrqr", {"limit": np.inf}, "no swap"),
    ("strong-rrqr", {"R": np.array([[0.0, 1.0], [0.0, 1.0]])}, "no swap"),
    ("pivot-ratio", {"retained": 6}, "some pivot is left"),
    ("pivot-ratio", {"side": "left"}, "lower or upper"),
    ("pivot-ratio", {"threshold": 0.9}, "longer than f times"),
    ("volume-sampling", {"features": np.ones((2, 8))}, "at most 7 columns"),
    ("volume-sampling", {"features": np.full((2, 3), 1e-200)}, "1e-100"),
    ("volume-sampling", {"features": np.ones((2, 4))}, "independent"),
    ("volume-sampling", {"retained": 5}, "independent"),
    ("leverage-columns", {"basis": np.ones((3, 2))}, "orthonormal"),
    ("leverage-columns", {"indices": np.array([0])}, "leverage is missing"),
    ("leverage-sampling", {"features": np.ones((2, 8))}, "at most 7 columns"),
    ("leverage-sampling", {"features": np.zeros((2, 2))}, "not all 0"),
    ("leverage-sampling", {"draws": 0}, "1 to 10"),
    ("leverage-sampling", {"basis": np.ones((2, 1))}, "orthonormal"),
    ("leverage-sampling", {"basis": np.eye(2)[:, :0]}, "one vector at least"),
]
