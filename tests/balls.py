"""Both sides of the statements in ball arithmetic (python-flint): enclosures that hold whatever the rounding.

``SIDES[id](**case)`` gives (observed, bound) as balls of some 400 bits; a side that has no such oracle is None.
"""

import numpy as np
from flint import arb, ctx

import oracles_flows
import oracles_measures
import oracles_skeletons
from ellq.theory import skeleton_residual
from ellq.theory.input_moments import second_moments
from ellq.theory.reweighting import reweight

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


def _finite(w, retained, q, p):
    n, weight = np.count_nonzero(w), arb(0)
    for m in range(retained + 1, n + 1):
        weight = weight.max(ball(m - retained) ** (1 / ball(p)) * ball(m) ** (-1 / ball(q)))
    return best_term_error(w, retained, p), weight * quasinorm(w, q)


def weak_quasinorm(w, q):
    return largest(ball(i) ** (1 / ball(q)) * ball(x) for i, x in enumerate(falling(w), 1) if x)


def _weak(w, retained, q, p):
    constant = (ball(q) / (ball(p) - ball(q))) ** (1 / ball(p)) * ball(retained) ** (1 / ball(p) - 1 / ball(q))
    return best_term_error(w, retained, p), constant * weak_quasinorm(w, q)


def _weak_finite(w, retained, q, p):
    powers = (ball(i) ** (-ball(p) / ball(q)) for i in range(retained + 1, np.count_nonzero(w) + 1))
    total = sum(powers, arb(0))
    constant = total ** (1 / ball(p)) if total > 0 else arb(0)
    return best_term_error(w, retained, p), constant * weak_quasinorm(w, q)


def _norm(values, q):
    total = sum((value ** ball(q) for value in values if value > 0), arb(0))
    return total ** (1 / ball(q)) if total > 0 else arb(0)


def _gram(removed, inputs):
    error = root_mean_square(products(balls(inputs), balls(removed)))
    return error, error


def _stretch(matrix, direction):
    """‖M v‖/‖v‖: never above the largest singular value, and as good as it where v is a computed singular vector."""
    v = balls(direction)
    length = sum((x * x for x in v), arb(0)).sqrt()
    return sum((x * x for x in products(matrix, v)), arb(0)).sqrt() / length


def _uncorrelated(w, retained, q, inputs):
    top = np.linalg.svd(inputs / max(np.abs(inputs).max(), 1e-300))[2][0]
    scale = _stretch(balls(inputs), top) / ball(len(inputs)).sqrt()
    bound = scale * stechkin_bound(w, retained, q, 2.0) if any(w) else arb(0)
    return root_mean_square(products(balls(inputs), removed(w, retained))), bound


def _risk(features, indices, interpolation, consumer):
    residual = skeleton_residual(features, indices, interpolation, np.zeros(np.shape(features)[1]))
    top = np.linalg.svd(residual)[2][0]
    length = sum((ball(x) ** 2 for x in consumer), arb(0)).sqrt()
    bound = _stretch(balls(residual), top) * length / ball(len(residual)).sqrt()
    return root_mean_square(products(balls(residual), balls(consumer))), bound


def _subgaussian(removed, sigma, delta, law, dependence):
    sizes = [abs(ball(x)) for x in removed]
    norm = _norm(sizes, 1.0 if dependence == "any" else 2.0)
    bound = ball(sigma) * norm * (2 * (2 / ball(delta)).log()).sqrt()
    if law == "gaussian":
        return None, bound
    if dependence == "any":
        quantile = arb(1) if law == "signs" else arb(3).sqrt() * (1 - ball(delta))
        return ball(sigma) * norm * quantile, bound
    sums = [arb(0)]
    for x in balls(removed):
        sums = [total + sign * x for total in sums for sign in (1, -1)]
    ranked = sorted((abs(total) for total in sums), key=float, reverse=True)
    return ball(sigma) * ranked[int(delta * len(ranked))], bound


def _dot(v, x):
    return abs(sum((a * b for a, b in zip(balls(v), balls(x), strict=True)), arb(0)))


def _box(removed, low, high, x):
    corners = [[b if (v > 0) == up else a for v, a, b in zip(removed, low, high, strict=True)] for up in (True, False)]
    return _dot(removed, x), _dot(removed, corners[0]).max(_dot(removed, corners[1]))


def _ball(removed, radius, order, x):
    sizes = [abs(ball(v)) for v in removed]
    if order == 1.0:
        dual = largest(sizes)
    else:
        total = sum(sizes, arb(0))
        conjugate = ball(order) / (ball(order) - 1) if order < np.inf else arb(1)
        top = largest(sizes)
        powers = sum(((size / top) ** conjugate for size in sizes if size > 0), arb(0))
        dual = total if order == np.inf else top * powers ** (1 / conjugate)
    return _dot(removed, x), ball(radius) * dual


def _multilayer_box(layers, retained, low, high, x):
    dense = [(balls(W), balls(b)) for W, b in layers]
    kept = []
    for (W, b), (rows, _) in zip(dense, layers, strict=True):
        gone = [removed(row, retained) for row in rows]
        kept.append(([[a - v for a, v in zip(*pair, strict=True)] for pair in zip(W, gone, strict=True)], b))
    ends = zip(relu_features(dense, balls(x))[-1], relu_features(kept, balls(x))[-1], strict=True)
    return largest(abs(a - c) for pair in ends for a, c in zip(*pair, strict=True)), None


def _allocation(gains, counts, q, p):
    power, pairs = 1 / ball(p) - 1 / ball(q), [(ball(a), ball(k)) for a, k in zip(gains, counts, strict=True) if a]
    total = sum((ball(k) for k in counts), arb(0))
    return _norm(balls(gains), q) * total**power, _norm([a * k**power for a, k in pairs], p)


def _resampled(w, retained, heavy, inputs):
    moments = second_moments(np.ldexp(inputs, -int(np.frexp(np.abs(inputs).max())[1])))
    weights = reweight(w, moments, retained, heavy=heavy).weights
    gone = [ball(a) - ball(b) for a, b in zip(w, weights, strict=True)]
    scale = largest(root_mean_square(column) for column in columns(balls(inputs)))
    bound = scale * sum((ball(x) for x in falling(w)[heavy:]), arb(0)) / ball(retained - heavy).sqrt()
    return root_mean_square(products(balls(inputs), gone)), bound


def _hilbert(w, retained, heavy, q, inputs):
    observed, _ = _resampled(w, retained, heavy, inputs)
    scale = largest(root_mean_square(column) for column in columns(balls(inputs)))
    tail = _finite(w, heavy, q, 1.0)[1]
    return observed, scale * tail / ball(retained - heavy).sqrt()


SIDES = {
    "stechkin": _stechkin,
    "stechkin-finite": _finite,
    "stechkin-weak": _weak,
    "stechkin-weak-finite": _weak_finite,
    "retained-necessary": _necessary,
    "pq-axioms": oracles_measures.pq_axioms,
    "allocation": _allocation,
    "linear-unit-l1": _linear_unit,
    "linear-unit-gram": _gram,
    "linear-unit-uncorrelated": _uncorrelated,
    "linear-unit-subgaussian": _subgaussian,
    "linear-unit-resampled": _resampled,
    "hilbert-sampling": _hilbert,
    "unit-box": _box,
    "unit-ball": _ball,
    "multilayer": _multilayer,
    "multilayer-units": _multilayer_units,
    "multilayer-box": _multilayer_box,
    "risk-empirical": _risk,
    **oracles_skeletons.SIDES,
    **oracles_flows.SIDES,
}
SIDES = {id: precisely(sides) for id, sides in SIDES.items()}
