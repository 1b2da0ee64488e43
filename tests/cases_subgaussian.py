"""Cases of the theorem on sub-Gaussian inputs; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import MODERATE, random_vector

_LAWS = (
    ("gaussian", "any"),
    ("gaussian", "independent"),
    ("signs", "any"),
    ("signs", "independent"),
    ("uniform", "any"),
)


def _unit(rng):
    law, dependence = _LAWS[rng.integers(len(_LAWS))]
    return {
        "removed": random_vector(rng, int(rng.integers(1, 11 if law == "signs" else 30)), MODERATE),
        "sigma": float(10.0 ** rng.uniform(-3, 3)) * float(rng.random() < 0.95),
        "delta": float(rng.choice([rng.uniform(1e-3, 1 - 1e-3), 10.0 ** -rng.uniform(0.01, 299), 1 - 1e-12])),
        "law": law,
        "dependence": dependence,
    }


CASES = {
    "linear-unit-subgaussian": st.integers(0, 2**32 - 1).map(lambda seed: _unit(np.random.default_rng(seed))),
}
RANDOM = {"linear-unit-subgaussian": _unit}
EXTREMAL = {
    # So far out the Gaussian tail is e^(−t²/2) up to a factor that the root of its logarithm hardly sees.
    "linear-unit-subgaussian": {
        "removed": np.array([1.0, -2.0, 3.0]),
        "sigma": 2.0,
        "delta": 1e-300,
        "law": "gaussian",
        "dependence": "any",
    },
}
OUTSIDE = [
    ("linear-unit-subgaussian", {"removed": np.full(3, np.nan)}, "finite"),
    ("linear-unit-subgaussian", {"sigma": -1.0}, "0 ≤ σ"),
    ("linear-unit-subgaussian", {"delta": 1.0}, "between 0 and 1"),
    ("linear-unit-subgaussian", {"law": "cauchy"}, "quantiles are known"),
    ("linear-unit-subgaussian", {"law": "uniform", "dependence": "independent"}, "quantiles are known"),
    ("linear-unit-subgaussian", {"removed": np.ones(13), "law": "signs", "dependence": "independent"}, "at most 12"),
]
