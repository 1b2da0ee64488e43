"""Both sides of the statements in ball arithmetic (python-flint): enclosures that hold whatever the rounding.

``SIDES[id](**case)`` gives (observed, bound) as balls of some 400 bits.
"""

import numpy as np
from flint import arb, ctx

BITS = 400


def precisely(function):
    """Run a function in ball arithmetic of ``BITS`` bits."""

    def run(*args, **kwargs):
        old, ctx.prec = ctx.prec, BITS
        try:
            return function(*args, **kwargs)
        finally:
            ctx.prec = old

    return run


def ball(value):
    """A float as a ball without radius."""
    return arb(float(value))


def largest(balls):
    """An enclosure of the largest of some balls."""
    result = arb(0)
    for one in balls:
        result = result.max(one)
    return result


def power_sum(w, q):
    return sum((abs(ball(x)) ** ball(q) for x in w if x), arb(0))


def quasinorm(w, q):
    total = power_sum(w, q)
    return total ** (1 / ball(q)) if total > 0 else arb(0)


def falling(w):
    return sorted((abs(float(x)) for x in w), reverse=True)


def best_term_error(w, k, p):
    return quasinorm(falling(w)[k:], p)


def effective_count(w, p, q):
    p_sum, q_sum, p, q = power_sum(w, p), power_sum(w, q), ball(p), ball(q)
    return ((q * p_sum.log() - p * q_sum.log()) / (q - p)).exp()


def log_stechkin_constant(q, p):
    ratio = ball(q) / ball(p)
    return (ratio * ratio.log() + (1 - ratio) * (1 - ratio).log()) / ball(q)


def stechkin_bound(w, k, q, p):
    return log_stechkin_constant(q, p).exp() * ball(k) ** (1 / ball(p) - 1 / ball(q)) * quasinorm(w, q)


def root_mean_square(values):
    values = list(values)
    return (sum((v * v for v in values), arb(0)) / len(values)).sqrt()


def products(matrix, vector):
    return [sum((a * b for a, b in zip(row, vector, strict=True)), arb(0)) for row in matrix]


def balls(array):
    """An array of floats as nested lists of balls."""
    return [balls(part) for part in array] if np.ndim(array) else ball(array)


def columns(rows):
    return list(zip(*rows, strict=True))


def removed(w, k):
    """What magnitude pruning removes of w, the first of equal magnitudes kept."""
    kept = set(sorted(range(len(w)), key=lambda i: -abs(float(w[i])))[:k])
    return [arb(0) if i in kept else ball(x) for i, x in enumerate(w)]


def _stechkin(w, retained, q, p):
    return best_term_error(w, retained, p), stechkin_bound(w, retained, q, p)


def _necessary(w, retained, p, q):
    order = falling(w)
    eta = power_sum(order[retained:], p) / power_sum(order[:retained], p)
    p, q = ball(p), ball(q)
    return effective_count(w, float(p), float(q)) * (1 + eta) ** (-q / (q - p)), ball(retained)


def _linear_unit(w, retained, q, inputs):
    scale = largest(root_mean_square(column) for column in columns(balls(inputs)))
    bound = scale * stechkin_bound(w, retained, q, 1.0) if any(w) else arb(0)
    return root_mean_square(products(balls(inputs), removed(w, retained))), bound


def relu_features(layers, rows):
    """Features after every layer of a ReLU chain, inputs first; each a list of rows."""
    features = [rows]
    for W, b in layers:
        made = [[total + offset for total, offset in zip(products(W, row), b, strict=True)] for row in features[-1]]
        features.append([[value.max(arb(0)) for value in row] for row in made])
    return features


def _chains(layers, retained, inputs):
    dense = [(balls(W), balls(b)) for W, b in layers]
    gone = [[removed(row, retained) for row in W] for W, _ in layers]
    kept = [
        ([[a - v for a, v in zip(*rows, strict=True)] for rows in zip(W, V, strict=True)], b)
        for (W, b), V in zip(dense, gone, strict=True)
    ]
    features = relu_features(dense, balls(inputs))
    ends = zip(features[-1], relu_features(kept, balls(inputs))[-1], strict=True)
    apart = [[a - c for a, c in zip(*pair, strict=True)] for pair in ends]
    return largest(root_mean_square(column) for column in columns(apart)), features, gone, [W for W, _ in kept]


def _multilayer(layers, retained, inputs):
    observed, features, gone, kept = _chains(layers, retained, inputs)
    error = arb(0)
    for V, W, rows in zip(gone, kept, features, strict=False):
        scale = largest(root_mean_square(column) for column in columns(rows))
        local = largest(scale * sum((abs(v) for v in row), arb(0)) for row in V)
        error = largest(sum((abs(a) for a in row), arb(0)) for row in W) * error + local
    return observed, error


def _multilayer_units(layers, retained, inputs):
    observed, features, gone, kept = _chains(layers, retained, inputs)
    errors = [arb(0)] * np.shape(inputs)[1]
    for V, W, rows in zip(gone, kept, features, strict=False):
        local = [root_mean_square(products(rows, v)) for v in V]
        passed_on = products([[abs(a) for a in row] for row in W], errors)
        errors = [a + b for a, b in zip(local, passed_on, strict=True)]
    return observed, largest(errors)


SIDES = {
    "stechkin": _stechkin,
    "retained-necessary": _necessary,
    "linear-unit-l1": _linear_unit,
    "multilayer": _multilayer,
    "multilayer-units": _multilayer_units,
}
SIDES = {id: precisely(sides) for id, sides in SIDES.items()}
