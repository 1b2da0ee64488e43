"""Cases of the theorems on best k-term approximation.

CASES draws by hypothesis, RANDOM by a generator for long attacks; EXTREMAL attains each bound within 1 %; OUTSIDE
changes an extremal case so that it misses an assumption, with a part of the sentence that says so.
"""

from functools import partial

import numpy as np
from hypothesis import strategies as st

from ellq.theory.approximation import extremal_vector, extremal_vector_weak
from strategies import random_orders, random_vector, rising_orders, vectors

_shares = st.floats(1e-6, 1 - 1e-6)


@st.composite
def _stechkin(draw, least=1):
    w, (q, p) = draw(vectors()), draw(rising_orders())
    return {"w": w, "retained": draw(st.integers(least, w.size)), "q": q, "p": p}


@st.composite
def _necessary(draw):
    w, (p, q) = draw(vectors(nonzero=True)), draw(rising_orders())
    return {"w": w, "retained": draw(st.integers(1, w.size)), "p": p, "q": q}


@st.composite
def _sufficient(draw):
    w, (p, q) = draw(vectors(nonzero=True)), draw(rising_orders())
    return {"w": w, "tol": draw(_shares), "p": p, "q": q}


def _random(rng, *, orders, has_tolerance=False):
    w = random_vector(rng, int(rng.integers(1, 200) if rng.random() < 0.2 else rng.integers(1, 20)))
    if not w.any():
        w[0] = 1.0
    low, high = random_orders(rng)
    case = {"w": w, **dict(zip(orders, (float(low), float(high)), strict=True))}
    return case | ({"tol": rng.uniform()} if has_tolerance else {"retained": int(rng.integers(1, w.size + 1))})


CASES = {
    "stechkin": _stechkin(),
    "stechkin-finite": _stechkin(least=0),
    "stechkin-weak": _stechkin(),
    "stechkin-weak-finite": _stechkin(least=0),
    "retained-necessary": _necessary(),
    "retained-sufficient": _sufficient(),
}
RANDOM = {
    "stechkin": partial(_random, orders=("q", "p")),
    "stechkin-finite": partial(_random, orders=("q", "p")),
    "stechkin-weak": partial(_random, orders=("q", "p")),
    "stechkin-weak-finite": partial(_random, orders=("q", "p")),
    "retained-necessary": partial(_random, orders=("p", "q")),
    "retained-sufficient": partial(_random, orders=("p", "q"), has_tolerance=True),
}
EXTREMAL = {
    "stechkin": {"w": np.ones(100), "retained": 75, "q": 0.5, "p": 2.0},
    "stechkin-finite": {"w": extremal_vector(3, 5, q=1.5, p=2.0), "retained": 3, "q": 1.5, "p": 2.0},
    "stechkin-weak": {"w": extremal_vector_weak(1000, q=0.5), "retained": 100, "q": 0.5, "p": 2.0},
    "stechkin-weak-finite": {"w": extremal_vector_weak(7, q=0.5), "retained": 2, "q": 0.5, "p": 1.0},
    "retained-necessary": {"w": np.ones(200), "retained": 200, "p": 0.5, "q": 1.0},
    "retained-sufficient": {"w": np.ones(4000), "tol": 0.5**0.5, "p": 1.0, "q": 2.0},
}
OUTSIDE = [
    ("stechkin", {"q": 2.0}, "0 < q < p"),
    ("stechkin", {"q": 0.0}, "0 < q < p"),
    ("stechkin", {"retained": 0}, "between 1 and d"),
    ("stechkin", {"retained": 101}, "between 1 and d"),
    ("stechkin", {"w": np.full(100, np.nan)}, "finite"),
    ("stechkin-finite", {"q": 2.0}, "0 < q < p"),
    ("stechkin-finite", {"retained": -1}, "between 0 and d"),
    ("stechkin-finite", {"retained": 6}, "between 0 and d"),
    ("stechkin-weak", {"retained": 0}, "between 1 and d"),
    ("stechkin-weak", {"p": 0.5}, "0 < q < p"),
    ("stechkin-weak-finite", {"retained": 8}, "between 0 and d"),
    ("stechkin-weak-finite", {"w": np.full(7, np.inf)}, "finite"),
    ("retained-necessary", {"p": 1.0}, "0 < p < q"),
    ("retained-necessary", {"w": np.zeros(200)}, "not zero"),
    ("retained-sufficient", {"tol": 1.0}, "share"),
    ("retained-sufficient", {"tol": 0.0}, "share"),
]
