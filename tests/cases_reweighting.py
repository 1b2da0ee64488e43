"""Cases of the theorems on reweighted terms; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import MODERATE, quasi_orders, random_unit, vectors

_scales = st.sampled_from([1e-100, 1.0, 1e100])


@st.composite
def _units(draw, *, has_order=False):
    w = draw(vectors(families=MODERATE)) * draw(_scales)
    retained = draw(st.integers(1, w.size))
    n, seed = draw(st.integers(1, 8)), draw(st.integers(0, 2**32 - 1))
    inputs = np.random.default_rng(seed).normal(size=(n, w.size)) + draw(st.sampled_from([0.0, 10.0]))
    kind = draw(st.integers(0, 3))
    if kind == 0:
        inputs[:] = inputs[:, :1]
    elif kind == 1:
        inputs[:, ::2] *= -1e-3
    elif kind == 2:
        inputs[:, 0] = 0.0
    case = {"w": w, "retained": retained, "heavy": draw(st.integers(0, retained - 1))}
    return case | {"inputs": inputs * draw(_scales)} | ({"q": draw(quasi_orders())} if has_order else {})


def _random_hull(rng):
    case = random_unit(rng)
    return case | {"heavy": int(rng.integers(0, case["retained"]))}


def _random_unit(rng):
    case = _random_hull(rng)
    del case["q"]
    return case


# Orthonormal inputs and equal weights: one pick for a hundred and more leaves nearly all of them.
_apart = {"w": np.ones(200), "retained": 1, "heavy": 0, "inputs": np.eye(200) * 200**0.5}

CASES = {"linear-unit-resampled": _units(), "hilbert-sampling": _units(has_order=True)}
RANDOM = {"linear-unit-resampled": _random_unit, "hilbert-sampling": _random_hull}
EXTREMAL = {"linear-unit-resampled": _apart, "hilbert-sampling": _apart | {"q": 0.9999}}
OUTSIDE = [
    ("linear-unit-resampled", {"heavy": 1}, "fewer weights stay"),
    ("linear-unit-resampled", {"heavy": -1}, "fewer weights stay"),
    ("linear-unit-resampled", {"w": np.full(200, np.nan)}, "finite"),
    ("linear-unit-resampled", {"w": np.full(200, 1e-310)}, "subnormal"),
    ("linear-unit-resampled", {"inputs": np.diag([1e-200] + [1.0] * 199)}, "subnormal"),
    ("hilbert-sampling", {"retained": 201}, "between 1 and d"),
    ("hilbert-sampling", {"retained": 0}, "between 1 and d"),
    ("hilbert-sampling", {"q": 1.0}, "0 < q < 1"),
]
