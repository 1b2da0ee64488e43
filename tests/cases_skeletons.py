"""Cases of the theorems on skeletons; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import random_skeleton


def _top_singular_vector():
    A = np.random.default_rng(0).normal(size=(20, 5))
    T = np.linalg.lstsq(A[:, :2], A, rcond=None)[0]
    u = np.linalg.svd(A - A[:, :2] @ T)[2][0]
    return {"features": A, "indices": [0, 1], "interpolation": T, "consumer": u}


CASES = {"risk-empirical": st.integers(0, 2**32 - 1).map(lambda seed: random_skeleton(np.random.default_rng(seed)))}
RANDOM = {"risk-empirical": random_skeleton}
EXTREMAL = {"risk-empirical": _top_singular_vector()}
OUTSIDE = [("risk-empirical", {"features": np.full((20, 5), np.inf)}, "finite")]
