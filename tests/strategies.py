"""Hypothesis strategies shared by the tests: vectors of many families, orders, feature matrices, ReLU chains."""

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

_SEEDS = st.integers(0, 2**32 - 1)


def _normal(rng, size):
    return rng.normal(size=size)


def _laplace(rng, size):
    return rng.laplace(size=size)


def _heavy(rng, size):
    return rng.standard_t(1.5, size=size)


def _power_law(rng, size):
    return np.arange(1, size + 1.0) ** -rng.uniform(0.1, 5.0)


def _one_spike(rng, size):
    w = rng.normal(size=size) * 10.0 ** rng.uniform(-20, 0)
    w[rng.integers(size)] = 1.0
    return w


def _one_hot(rng, size):
    return np.eye(size)[rng.integers(size)] * rng.normal()


def _flat(rng, size):
    return np.full(size, rng.lognormal()) * rng.choice([-1.0, 1.0], size)


def _two_level(rng, size):
    return np.where(rng.random(size) < rng.random(), 1.0, 10.0 ** rng.uniform(-12, 0))


def _near_equal(rng, size):
    return 1.0 + rng.integers(-4, 5, size) * 2.0**-52


def _ties(rng, size):
    return rng.integers(-3, 4, size).astype(float)


def _zeros(rng, size):
    return np.zeros(size)


def _subnormal(rng, size):
    return rng.integers(-1000, 1001, size) * 2.0**-1074


def _wide(rng, size):
    return rng.choice([-1.0, 1.0], size) * 10.0 ** rng.uniform(-300, 300, size)


def _tiny(rng, size):
    return rng.normal(size=size) * 1e-300


def _huge(rng, size):
    return rng.uniform(-1, 1, size=size) * 1e300


MODERATE = (_normal, _laplace, _heavy, _power_law, _one_spike, _one_hot, _flat, _two_level, _near_equal, _ties)
EXTREME = (_zeros, _subnormal, _wide, _tiny, _huge)


def random_vector(rng, size, families=MODERATE + EXTREME):
    """A vector of a family chosen by ``rng``."""
    return families[rng.integers(len(families))](rng, size)


@st.composite
def vectors(draw, *, min_size=1, max_size=30, families=MODERATE + EXTREME, nonzero=False):
    """A vector: most often of a family, else any finite floats (when extreme ones are allowed)."""
    size = draw(st.integers(min_size, max_size))
    if set(EXTREME) & set(families) and draw(st.integers(0, 3)) == 0:
        w = draw(hnp.arrays(np.float64, size, elements=st.floats(-1e300, 1e300)))
    else:
        w = draw(st.sampled_from(families))(np.random.default_rng(draw(_SEEDS)), size)
    if nonzero and not w.any():
        w[0] = 1.0
    return w


def quasi_orders():
    """q with 0 < q < 1, both ends included as far as float64 resolves them."""
    return st.one_of(st.floats(0.05, 0.95), st.sampled_from([1e-3, 0.01, 0.1, 0.5, 0.9, 1 - 1e-9]))


@st.composite
def rising_orders(draw, low=0.02, high=8.0):
    """Two orders, the first below the second; some nearly equal, some far apart."""
    first = draw(st.one_of(st.floats(low, high / 2), st.sampled_from([0.5, 1.0, 2.0, low])))
    factor = draw(st.one_of(st.floats(1.01, 4.0), st.sampled_from([2.0, 1 + 1e-9, 1.5])))
    return first, first * factor


def random_orders(rng):
    """Two orders, the first below the second."""
    first = 10.0 ** rng.uniform(-1.5, 0.6)
    return first, first * rng.choice([1 + 1e-9, 2.0, rng.uniform(1.001, 5.0)])


def random_features(rng, *, samples=None, columns=None):
    """A matrix (n, m) whose columns may repeat, be multiples or sums of others, be constant, or be dead."""
    n = samples or int(rng.integers(1, 25))
    m = columns or int(rng.integers(1, 9))
    X = rng.normal(size=(n, m)) * 10.0 ** rng.uniform(-3, 3, m)
    for j in range(1, m):
        kind, other = rng.integers(8), int(rng.integers(j))
        if kind == 0:
            X[:, j] = X[:, other]
        elif kind == 1:
            X[:, j] = 3.7 * X[:, other]
        elif kind == 2:
            X[:, j] = X[:, other] + X[:, 0]
        elif kind == 3:
            X[:, j] = 0.0
        elif kind == 4:
            X[:, j] = 5.0
        elif kind == 5:
            X[:, j] = np.maximum(X[:, j], 0.0)
    return X[:, rng.permutation(m)]


def features(**sizes):
    """Feature matrices with duplicates and dead columns."""
    return _SEEDS.map(lambda seed: random_features(np.random.default_rng(seed), **sizes))


def random_chain(rng):
    """Layers ``[(W, b), …]`` of a ReLU chain, inputs for it, and a count of retained entries a row."""
    widths = rng.integers(1, 7, rng.integers(2, 5))
    scale = 10.0 ** rng.uniform(-3, 3)
    layers = []
    for narrow, wide in pairwise(widths):
        W = np.stack([random_vector(rng, narrow, MODERATE) for _ in range(wide)]) * scale
        layers.append((W, rng.normal(size=wide) * rng.choice([0.0, 1.0, 10.0])))
    inputs = rng.normal(size=(int(rng.integers(1, 9)), widths[0])) + rng.choice([0.0, 5.0])
    return {"layers": layers, "retained": int(rng.integers(0, widths.max() + 1)), "inputs": inputs}


def relu_chains():
    """ReLU chains with inputs and a count of retained entries a row."""
    return _SEEDS.map(lambda seed: random_chain(np.random.default_rng(seed)))


def random_unit(rng, families=MODERATE):
    """A vector, a count to retain, an order below 1, and inputs with any correlation."""
    w = random_vector(rng, int(rng.integers(1, 30)), families)
    mixing = rng.choice([0.0, 1.0]) * np.eye(w.size) + rng.choice([0.0, 1.0])
    inputs = rng.normal(size=(int(rng.integers(1, 9)), w.size)) @ mixing * 10.0 ** rng.uniform(-3, 3)
    return {"w": w, "retained": int(rng.integers(1, w.size + 1)), "q": float(rng.uniform(0.05, 0.95)), "inputs": inputs}


def random_skeleton(rng):
    """Features, some of their columns, any interpolation matrix, and a unit that reads them."""
    A = random_features(rng)
    m = A.shape[1]
    indices = rng.permutation(m)[: rng.integers(1, m + 1)]
    T = np.linalg.lstsq(A[:, indices], A, rcond=None)[0] + rng.choice([0.0, 1e-8, 1.0]) * rng.normal(
        size=(len(indices), m)
    )
    return {"features": A, "indices": indices, "interpolation": T, "consumer": random_vector(rng, m, MODERATE)}
