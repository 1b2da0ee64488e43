from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

import oracles
from ellq.theory.worst_case import (
    IDENTITY,
    RELU,
    SIGMOID,
    TANH,
    Activation,
    chain_error_box,
    worst_case_ball,
    worst_case_box,
)
from strategies import MODERATE, random_chain, vectors

SOME = settings(max_examples=120, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@oracles.precise
def best_corner(v, low, high):
    """The largest |v·x| over all corners of the box, where a convex function has its maximum."""
    terms = [
        (mpf(float(a)) * mpf(float(least)), mpf(float(a)) * mpf(float(most)))
        for a, least, most in zip(v, low, high, strict=True)
    ]
    return max(abs(mp.fsum(corner)) for corner in product(*terms))


@oracles.precise
def dual_norm(v, order):
    sizes = [mpf(abs(float(x))) for x in v]
    if order == 1:
        return max(sizes)
    if order == np.inf:
        return mp.fsum(sizes)
    dual = mpf(order) / (mpf(order) - 1)
    return mp.fsum(x**dual for x in sizes if x) ** (1 / dual)


# --- a box ----------------------------------------------------------------------------------------------------------


@SOME
@given(v=vectors(max_size=6), seed=seeds, size=st.sampled_from([1e-300, 1.0, 1e5]))
def test_box_bound_is_the_best_corner_rounded_up(v, seed, size):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=v.size) * size
    high = low + np.abs(rng.normal(size=v.size)) * size * rng.integers(0, 2, v.size)
    exact, bound = best_corner(v, low, high), worst_case_box(v, low, high)
    reach = mp.fsum(mpf(abs(float(a))) * mpf(float(x)) for a, x in zip(v, np.maximum(abs(low), abs(high)), strict=True))
    assert exact <= mpf(bound)
    # Terms of different sign cancel, their rounding does not; entries of very different size underflow.
    least = mpf(float(np.abs(v).max())) * size * mpf(10) ** -300 + mpf(2) ** -1070
    assert bound == np.inf or mpf(bound) <= exact + reach * mpf(10) ** -14 + least


def test_box_around_zero_gives_the_sum_of_sizes():
    assert worst_case_box([1.0, -2.0, 3.0], -np.ones(3), np.ones(3)) == pytest.approx(6.0, rel=1e-14)


def test_box_of_one_point_gives_its_value():
    assert worst_case_box([1.0, -2.0], [3.0, 1.0], [3.0, 1.0]) == pytest.approx(1.0, rel=1e-14)


@SOME
@given(v=vectors(families=MODERATE), seed=seeds)
def test_a_larger_box_has_no_smaller_bound(v, seed):
    rng = np.random.default_rng(seed)
    low, wider = rng.normal(size=v.size), rng.random(v.size)
    small, large = worst_case_box(v, low, low + 1.0), worst_case_box(v, low - wider, low + 1.0 + wider)
    assert small <= large * (1 + 1e-13)
    assert worst_case_box(-v, low, low + 1.0) == small
    order = rng.permutation(v.size)
    assert worst_case_box(v[order], low[order], low[order] + 1.0) == pytest.approx(small, rel=1e-12)


def test_box_bound_neither_overflows_nor_underflows():
    # The terms exceed float64, their sum does not.
    box = [1e300, 1e300 * (1 - 2.0**-40)]
    assert worst_case_box([1e10, -1e10], box, box) == pytest.approx(1e10 * (box[0] - box[1]), rel=1e-2)
    assert worst_case_box([1e-300], [0.0], [1e300]) == pytest.approx(1.0, rel=1e-14)
    assert worst_case_box([1e300], [0.0], [1e300]) == np.inf
    assert 0 < worst_case_box([1e-300], [0.0], [1e-300]) < 1e-320


def test_box_that_nothing_reaches_costs_exactly_nothing():
    assert worst_case_box([0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]) == 0
    assert worst_case_box([], [], []) == 0


# --- a ball ---------------------------------------------------------------------------------------------------------


@SOME
@given(
    v=vectors(),
    radius=st.sampled_from([0.0, 1e-5, 1.0, 1e5]),
    order=st.one_of(st.floats(1.01, 10.0), st.sampled_from([1.0, 2.0, 1.0 + 2.0**-7, 1e300, np.inf])),
)
def test_ball_bound_is_the_dual_norm_rounded_up(v, radius, order):
    exact = dual_norm(v, order) * mpf(radius)
    assume(exact < 1e307)
    bound = mpf(worst_case_ball(v, radius, order))
    assert exact <= bound <= exact * (1 + mpf(10) ** -12) + mpf(2) ** -1070 * (1 + mpf(radius))
    assert (bound == 0) == (exact == 0)


@pytest.mark.parametrize("order", [1 + 2.0**-52, 1.0001, 500 / 499])
def test_ball_of_order_near_one_is_bounded_by_the_norm_of_order_500(order):
    v = np.random.default_rng(0).normal(size=50)
    assert dual_norm(v, order) <= worst_case_ball(v, 1.0, order) <= float(dual_norm(v, order)) * 50 ** (1 / 500)


def test_known_balls():
    v = [3.0, -4.0]
    for order, expected in ((1.0, 8.0), (2.0, 10.0), (np.inf, 14.0)):
        assert worst_case_ball(v, 2.0, order) == pytest.approx(expected, rel=1e-14)


def test_the_cube_is_a_box_and_a_ball():
    v = np.random.default_rng(1).normal(size=30)
    assert worst_case_ball(v, 2.0, np.inf) == pytest.approx(worst_case_box(v, np.full(30, -2.0), np.full(30, 2.0)))


# --- chains ---------------------------------------------------------------------------------------------------------


def run(layers, activations, x):
    for (W, b), activation in zip(layers, activations, strict=True):
        x = activation.function(x @ np.asarray(W).T + b)
        yield x


@settings(max_examples=100, deadline=None)
@given(seed=seeds)
def test_no_input_of_the_box_exceeds_the_chain_bound(seed):
    rng = np.random.default_rng(seed)
    case = random_chain(rng)
    layers, inputs = case["layers"], case["inputs"]
    cut = [(W * (rng.random(W.shape) < 0.7), b + rng.choice([0.0, 0.1]) * rng.normal(size=b.size)) for W, b in layers]
    activations = [(RELU, IDENTITY, TANH, SIGMOID)[rng.integers(4)] for _ in layers]
    low, high = inputs.min(axis=0), inputs.max(axis=0)
    corners = np.where(rng.random((20, low.size)) < 0.5, low, high)
    x = np.vstack([inputs, corners])
    bounds = chain_error_box(layers, cut, low, high, activations=activations)
    scale = max(float(np.abs(W).sum(axis=1).max()) for W, _ in layers) + 10.0
    for bound, h, g in zip(bounds, run(layers, activations, x), run(cut, activations, x), strict=True):
        assert (np.abs(h - g) <= bound + 1e-13 * (scale ** len(layers)) * 100).all()


def test_chain_bound_is_the_recursion_by_hand():
    W1, W2 = np.array([[1.0, -2.0], [0.5, 1.0]]), np.array([[3.0, -1.0]])
    V1, V2 = np.array([[0.0, -2.0], [0.5, 1.0]]), np.array([[3.0, 0.0]])
    zero = np.zeros
    bounds = chain_error_box(
        [(W1, zero(2)), (W2, zero(1))], [(V1, zero(2)), (V2, zero(1))], [-1.0, 0.0], [2.0, 1.0],
        activations=[RELU, IDENTITY],
    )  # fmt: skip
    # Layer 1 loses x_1 in [−1, 2]; its second unit lies in [0, 2], which layer 2 loses besides 3 times the first.
    np.testing.assert_allclose(bounds[0], [2.0, 0.0], rtol=1e-13)
    np.testing.assert_allclose(bounds[1], [2.0 + 3 * 2.0], rtol=1e-13)
    assert bounds[0][1] == 0


def test_chain_of_one_linear_layer_is_the_box_bound():
    rng = np.random.default_rng(2)
    W, V, low = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), rng.normal(size=5)
    bound = chain_error_box([(W, np.ones(3))], [(V, np.ones(3))], low, low + 1, activations=[IDENTITY])[0]
    assert bound == pytest.approx([worst_case_box(row, low, low + 1) for row in W - V], rel=1e-13)


def test_changed_bias_is_a_change():
    bound = chain_error_box([([[1.0]], [2.0])], [([[1.0]], [0.5])], [0.0], [1.0], activations=[IDENTITY])[0]
    assert bound == pytest.approx([1.5], rel=1e-14)


def test_an_unchanged_chain_has_exactly_no_error():
    layers = random_chain(np.random.default_rng(3))["layers"]
    d = layers[0][0].shape[1]
    assert all(
        not e.any() for e in chain_error_box(layers, layers, -np.ones(d), np.ones(d), activations=[RELU] * len(layers))
    )


def test_lipschitz_constant_multiplies():
    half = Activation(lambda z: z / 2, 0.5)
    layers, cut = [([[2.0]], [0.0])], [([[0.0]], [0.0])]
    whole, halved = (chain_error_box(layers, cut, [0.0], [1.0], activations=[a])[0] for a in (IDENTITY, half))
    assert halved == pytest.approx(whole / 2)


@pytest.mark.parametrize("activation", [RELU, IDENTITY, TANH, SIGMOID])
def test_activations_rise_by_no_more_than_their_constant(activation):
    z = np.linspace(-20, 20, 4001)
    rise = np.diff(activation.function(z))
    assert (rise >= 0).all()
    assert rise.max() <= activation.lipschitz * 0.01 * (1 + 1e-9)


@pytest.mark.parametrize(("activation", "exact"), [(TANH, mp.tanh), (SIGMOID, lambda z: 1 / (1 + mp.exp(-z)))])
def test_activations_are_as_accurate_as_stated(activation, exact):
    z = np.concatenate([np.random.default_rng(4).normal(size=300) * 10.0, [-700.0, 1e-300, 700.0]])
    with mp.workdps(60):
        for x, y in zip(z, activation.function(z), strict=True):
            assert abs(mpf(float(y)) - exact(mpf(float(x)))) <= 8 * mpf(2) ** -53 * abs(exact(mpf(float(x))))


def test_chain_beyond_float64_is_refused():
    layers = [(np.full((1, 1), 1e200), np.zeros(1))] * 2
    with pytest.raises(OverflowError, match=r"Layer 1 may exceed float64"):
        chain_error_box(layers, layers, [0.0], [1.0], activations=[RELU] * 2)
    with pytest.raises(OverflowError, match=r"Layer 0 may exceed float64"):
        chain_error_box([([[1e300]], [0.0])], [([[0.0]], [0.0])], [0.0], [1e300], activations=[RELU])


# --- bad input ------------------------------------------------------------------------------------------------------

ONE = [(np.eye(2), np.zeros(2))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: worst_case_box([1.0], [1.0], [0.0]), "The box is empty"),
        (lambda: worst_case_box([1.0], [-np.inf], [0.0]), "low holds -inf"),
        (lambda: worst_case_box([1.0], [0.0], [np.nan]), "high holds nan"),
        (lambda: worst_case_box([np.nan], [0.0], [1.0]), "removed holds nan"),
        (lambda: worst_case_box([1.0], [0.0, 0.0], [1.0, 1.0]), "expected 1"),
        (lambda: worst_case_box([1.0], 0.0, 1.0), "dimensions"),
        (lambda: worst_case_ball([1.0], np.inf, 2.0), "radius=inf"),
        (lambda: worst_case_ball([1.0], -1.0, 2.0), "radius=-1"),
        (lambda: worst_case_ball([1.0], 1.0, 0.9), "order=0.9 is below 1"),
        (lambda: worst_case_ball([1.0], 1.0, np.nan), "order is NaN"),
        (lambda: worst_case_ball([np.inf], 1.0, 2.0), "removed holds inf"),
        (lambda: chain_error_box(ONE, [], [0, 0], [1, 1], activations=[RELU]), "lengths 1, 0 and 1"),
        (lambda: chain_error_box(ONE, ONE, [0, 0], [1, 1], activations=[]), "lengths 1, 1 and 0"),
        (lambda: chain_error_box(ONE, ONE, [0], [1], activations=[RELU]), "expected \\(2, 1\\)"),
        (lambda: chain_error_box(ONE, [(np.ones((1, 2)), [0.0])], [0, 0], [1, 1], activations=[RELU]), "must agree"),
        (
            lambda: chain_error_box(ONE, [(np.full((2, 2), np.inf), [0.0, 0.0])], [0, 0], [1, 1], activations=[RELU]),
            "weights holds inf",
        ),
        (lambda: chain_error_box(ONE, ONE, [2, 0], [1, 1], activations=[RELU]), "The box is empty"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
