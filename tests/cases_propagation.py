"""Cases of the theorems on pruned units, layers and chains; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from strategies import quasi_orders, random_chain, random_unit, relu_chains, vectors


@st.composite
def _units(draw):
    w = draw(vectors())
    n, seed = draw(st.integers(1, 8)), draw(st.integers(0, 2**32 - 1))
    inputs = np.random.default_rng(seed).normal(size=(n, w.size)) + draw(st.sampled_from([0.0, 10.0]))
    if draw(st.booleans()):
        inputs[:] = inputs[:, :1]
    inputs *= draw(st.sampled_from([1e-200, 1.0, 1e3])) if np.abs(w).max() < 1e200 else 1e-200
    return {"w": w, "retained": draw(st.integers(1, w.size)), "q": draw(quasi_orders()), "inputs": inputs}


def _flat_chain():
    # All weights, inputs and biases positive: nothing cancels, ReLU changes nothing, and the bounds are equalities.
    layers = [(np.full((3, 4), 0.5), np.ones(3)), (np.full((2, 3), 2.0), np.ones(2))]
    return {"layers": layers, "retained": 2, "inputs": np.ones((5, 4))}


CASES = {"linear-unit-l1": _units(), "multilayer": relu_chains(), "multilayer-units": relu_chains()}
RANDOM = {"linear-unit-l1": random_unit, "multilayer": random_chain, "multilayer-units": random_chain}
EXTREMAL = {
    "linear-unit-l1": {"w": np.ones(100), "retained": 50, "q": 0.5, "inputs": np.ones((3, 100))},
    "multilayer": _flat_chain(),
    "multilayer-units": _flat_chain(),
}
OUTSIDE = [
    ("linear-unit-l1", {"q": 1.0}, "0 < q < 1"),
    ("linear-unit-l1", {"w": np.full(100, np.inf)}, "finite"),
    ("multilayer", {"layers": [(np.full((1, 4), np.nan), np.ones(1))]}, "finite"),
    ("multilayer", {"retained": -1}, "fewer than 0"),
    ("multilayer-units", {"layers": [(np.ones((1, 4)), np.array([np.inf]))]}, "finite"),
]
