"""Cases of the theorems on measures of sparsity; the names as in ``cases_approximation``."""

import numpy as np
from hypothesis import strategies as st

from ellq.theory.axioms import CRITERIA
from strategies import MODERATE, random_vector, vectors

_LOWER, _UPPER = st.one_of(st.floats(0.05, 1), st.just(1.0)), st.one_of(st.floats(1, 8), st.just(1.0))


@st.composite
def _criterion(draw):
    w = draw(vectors(families=MODERATE, nonzero=True))
    p, q = draw(st.tuples(_LOWER, _UPPER).filter(lambda orders: orders[0] < orders[1]))
    entries = st.integers(0, w.size - 1)
    return {
        "w": w,
        "criterion": draw(st.sampled_from(list(CRITERIA))),
        "entry": draw(entries),
        "other": draw(entries),
        "amount": draw(st.floats(1e-9, 1)),
        "p": p,
        "q": q,
    }


def _random_criterion(rng):
    w = random_vector(rng, int(rng.integers(1, 40)), MODERATE)
    if not w.any():
        w[0] = 1.0
    return {
        "w": w,
        "criterion": str(rng.choice(list(CRITERIA))),
        "entry": int(rng.integers(w.size)),
        "other": int(rng.integers(w.size)),
        "amount": float(rng.choice([1.0, rng.uniform(1e-6, 1.0)])),
        "p": float(rng.choice([1.0, rng.uniform(0.05, 1.0)])),
        "q": float(1 + rng.exponential() + 1e-6),
    }


CASES = {"pq-axioms": _criterion()}
RANDOM = {"pq-axioms": _random_criterion}
EXTREMAL = {
    "pq-axioms": {
        "w": np.array([3.0, 2.0, 1.0]),
        "criterion": "D1",
        "entry": 0,
        "other": 2,
        "amount": 1e-3,
        "p": 0.5,
        "q": 2.0,
    }
}
OUTSIDE = [
    ("pq-axioms", {"p": 1.5}, "p ≤ 1 ≤ q"),
    ("pq-axioms", {"q": 0.75}, "p ≤ 1 ≤ q"),
    ("pq-axioms", {"p": 1.0, "q": 1.0}, "p < q"),
    ("pq-axioms", {"q": 501.0}, "to 500"),
    ("pq-axioms", {"w": np.zeros(3)}, "not zero"),
    ("pq-axioms", {"w": np.array([1.0, np.inf, 2.0])}, "finite"),
    ("pq-axioms", {"w": np.array([1.0, 1e-200, 2.0])}, "lie between"),
    ("pq-axioms", {"criterion": "D5"}, "one of D1"),
    ("pq-axioms", {"other": 3}, "indices"),
    ("pq-axioms", {"amount": 1.5}, "at most 1"),
]
