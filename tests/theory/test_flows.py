"""Flows of two layers against brute force and closed forms, what they ignore, and what they cannot tell."""

import math
import warnings
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from ellq.theory import (
    FLOWS,
    FewSamplesWarning,
    PairSums,
    absolute_correlation,
    canonical_correlations,
    copula_information,
    correlation_information,
    flow_distance_limit,
    gaussian_information,
    hidden_information,
    layer_information,
    linear_cka,
    linear_information,
    pair_moments,
    rms_correlation,
    signed_correlation,
    statement,
    unit_information,
)
from ellq.theory.flows import normal_scores
from ellq.theory.pair_moments import oracle_shrinkage, wishart_bias
from strategies import random_features

SOME = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)
ALL = {
    "signed": signed_correlation,
    "absolute": absolute_correlation,
    "rms": rms_correlation,
    "cka": linear_cka,
    "gaussian": gaussian_information,
    "copula": copula_information,
}
each_flow = pytest.mark.parametrize("kind", ALL)


def layers(seed, *, samples=40, dead=True):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 6, 2)
    X = random_features(rng, samples=samples, columns=int(n)) if dead else rng.normal(size=(samples, n))
    Y = X @ rng.normal(size=(n, m)) * 0.5 / (1 + np.abs(X).max(initial=0)) + rng.normal(size=(samples, m))
    return X, Y


def pearson(X, Y):
    """Correlations from their definition, one pair of columns at a time, 0 for a constant column."""
    R = np.zeros((X.shape[1], Y.shape[1]))
    for i, x in enumerate(X.T):
        for j, y in enumerate(Y.T):
            if np.ptp(x) > 0 and np.ptp(y) > 0:
                R[i, j] = np.corrcoef(x, y)[0, 1]
    return R


def hsic(K, L):
    """The unbiased estimate as Song et al. print it."""
    N = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    inner = np.trace(K @ L) + K.sum() * L.sum() / ((N - 1) * (N - 2)) - 2 * (K @ L).sum() / (N - 2)
    return inner / (N * (N - 3))


# --- definitions ----------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds)
def test_correlation_flows_are_means_over_all_pairs(seed):
    X, Y = layers(seed)
    R, N = pearson(X, Y), len(X)
    assert signed_correlation(X, Y) == pytest.approx(R.mean(), abs=1e-11)
    assert absolute_correlation(X, Y) == pytest.approx(np.abs(R).mean(), abs=1e-11)
    assert rms_correlation(X, Y, corrected=False) == pytest.approx(np.sqrt((R**2).mean()), abs=1e-11)
    corrected = np.where(R == 0, 0.0, R**2 - (1 - R**2) / (N - 2)).mean()
    assert rms_correlation(X, Y) == pytest.approx(np.sqrt(max(corrected, 0)), abs=1e-6)


@SOME
@given(seed=seeds, shift=st.sampled_from([0.0, 1.0, 1e3]))
def test_cka_is_the_ratio_of_the_printed_estimates(seed, shift):
    X, Y = layers(seed, dead=False)
    K, L = X @ X.T, Y @ Y.T
    expected = hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))
    assert linear_cka(X + shift, Y - shift) == pytest.approx(expected, abs=1e-9)
    H = np.eye(len(X)) - 1 / len(X)
    inner = [np.trace(A @ H @ B @ H) for A, B in ((K, L), (K, K), (L, L))]
    expected = inner[0] / math.sqrt(inner[1] * inner[2])
    assert linear_cka(X + shift, Y, unbiased=False) == pytest.approx(expected, abs=1e-9)


def test_the_estimate_of_hsic_is_unbiased_over_all_draws():
    # All ordered draws of 4 from 5 points without repetition: the mean is the population's value for such draws.
    rng = np.random.default_rng(0)
    P, Q = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    draws = [list(draw) for draw in permutations(range(6), 4)]
    small = np.mean([hsic(P[d] @ P[d].T, Q[d] @ Q[d].T) for d in draws])
    assert small == pytest.approx(hsic(P @ P.T, Q @ Q.T), rel=1e-10)


@SOME
@given(seed=seeds, rate=st.floats(0.01, 1.0))
def test_gaussian_information_is_that_of_the_shrunk_correlations(seed, rate):
    X, Y = layers(seed, dead=False)
    n = X.shape[1]
    C = (1 - rate) * np.corrcoef(np.hstack([X, Y]).T) + rate * np.eye(n + Y.shape[1])
    assert gaussian_information(X, Y, shrinkage=rate) == pytest.approx(layer_information(C, n), abs=1e-10)


@SOME
@given(seed=seeds)
def test_the_shrinkage_is_the_published_rule(seed):
    X, Y = layers(seed, dead=False)
    S = np.atleast_2d(np.corrcoef(np.hstack([X, Y]).T))
    n, p = mpf(len(X) - 1), mpf(len(S))
    trace, square = mp.fsum(map(mpf, np.diag(S))), mp.fsum(mpf(s) ** 2 for s in S.ravel())
    rule = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    assert oracle_shrinkage(S, len(X)) == pytest.approx(float(min(rule, 1)), rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert gaussian_information(X, Y) == pytest.approx(
            gaussian_information(X, Y, shrinkage=float(min(rule, 1))), abs=1e-10
        )


@SOME
@given(seed=seeds)
def test_copula_information_is_gaussian_of_the_scores(seed):
    X, Y = layers(seed)
    assert copula_information(X, Y) == gaussian_information(normal_scores(X), normal_scores(Y))


def test_ties_share_a_score_and_scores_are_normal_quantiles():
    scores = normal_scores([[1.0], [5.0], [5.0], [9.0]])[:, 0]
    assert scores[1] == scores[2] == pytest.approx(0, abs=1e-15)
    assert (scores[0], scores[3]) == pytest.approx((-0.8416212335729143, 0.8416212335729143), rel=1e-12)  # Φ⁻¹(1/5)


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_estimates_approach_the_closed_form_of_a_noisy_linear_layer():
    rng = np.random.default_rng(0)
    W, sigma = rng.normal(size=(4, 5)), 0.7
    exact = linear_information(W, np.eye(5), sigma**2 * np.eye(4))
    X = rng.normal(size=(200_000, 5))
    Y = X @ W.T + sigma * rng.normal(size=(200_000, 4))
    for estimate in (gaussian_information(X, Y), gaussian_information(X, Y, shrinkage=0), copula_information(X, Y)):
        assert estimate == pytest.approx(exact, abs=0.02)
    # A rising map of each unit leaves the copula's where it was, and not the Gaussian's.
    assert copula_information(np.exp(X), Y**3) == pytest.approx(exact, abs=0.02)
    assert gaussian_information(np.exp(X), Y**3, shrinkage=0) < 0.8 * exact
    joint = np.block([[np.eye(5), W.T], [W, W @ W.T + sigma**2 * np.eye(4)]])
    assert layer_information(joint, 5) == pytest.approx(exact, rel=1e-11)
    kappa = canonical_correlations(joint, 5)
    assert -0.5 * np.log1p(-(kappa**2)).sum() == pytest.approx(exact, rel=1e-11)


def test_subtracting_the_bias_makes_the_estimate_right_on_average():
    rng = np.random.default_rng(1)
    N, n, m = 20, 4, 3
    exact, raw, corrected = m * 0.5 * math.log(1.25), [], []
    for _ in range(3000):
        X = rng.normal(size=(N, n))
        Y = 0.5 * X[:, :m] + rng.normal(size=(N, m))
        raw.append(gaussian_information(X, Y, shrinkage=0, corrected=False))
        corrected.append(gaussian_information(X, Y, shrinkage=0))
    error = np.std(raw) / math.sqrt(len(raw))
    assert abs(np.mean(corrected) - exact) < 4 * error
    assert np.mean(raw) - exact > 20 * error
    assert wishart_bias(n, m, N) == pytest.approx(np.mean(raw) - exact, abs=4 * error)


@pytest.mark.parametrize(("n", "m"), [(3, 2), (1, 1), (6, 5)])
def test_the_bias_is_about_half_the_products_of_widths_over_samples(n, m):
    assert wishart_bias(n, m, 10**6) == pytest.approx(n * m / 2e6, rel=1e-4)


def test_corrected_squares_have_mean_zero_on_independent_layers():
    rng = np.random.default_rng(2)
    squares, raw = [], []
    for _ in range(2000):
        moments = pair_moments(rng.normal(size=(6, 3)), rng.normal(size=(6, 2)))
        R2 = moments.correlations**2
        squares.append((R2 - (1 - R2) / 4).mean())
        raw.append(R2.mean())
    assert abs(np.mean(squares)) < 4 * np.std(squares) / math.sqrt(len(squares))
    assert np.mean(raw) == pytest.approx(1 / 5, rel=0.03)


def test_unbiased_cka_of_independent_layers_is_zero_where_the_biased_is_near_one():
    rng = np.random.default_rng(3)
    pairs = [(rng.normal(size=(20, 300)), rng.normal(size=(20, 300))) for _ in range(60)]
    unbiased = [linear_cka(X, Y) for X, Y in pairs]
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / math.sqrt(len(unbiased)) < 0.1
    with pytest.warns(FewSamplesWarning, match="tends to 1"):
        assert linear_cka(*pairs[0], unbiased=False) > 0.8


@SOME
@given(r=st.floats(-1 + 1e-12, 1 - 1e-12))
def test_information_of_a_correlation_is_the_formula(r):
    with mp.workdps(60):
        exact = -mp.log(1 - mpf(r) ** 2) / 2
    assert correlation_information(r) == pytest.approx(float(exact), rel=1e-14)


@SOME
@given(seed=seeds)
def test_layer_information_is_not_below_the_exact_value(seed):
    rng = np.random.default_rng(seed)
    p = int(rng.integers(2, 7))
    A = rng.normal(size=(p, p + 1))
    sizes = 2.0 ** rng.integers(-150, 150, p)
    C = A @ A.T + 1e-3 * np.eye(p)
    C = (C + C.T) / 2
    n = int(rng.integers(1, p))
    with mp.workdps(80):
        M = mp.matrix(C.tolist())
        X, Y = M[:n, :n], M[n:, n:]
        exact = (mp.log(mp.det(X)) + mp.log(mp.det(Y)) - mp.log(mp.det(M))) / 2
        bound = mpf(layer_information(C * sizes[:, None] * sizes, n))  # exact powers of two
        assert exact <= bound <= exact + mpf(10) ** -8


@SOME
@given(seed=seeds)
def test_linear_information_is_not_below_the_exact_value(seed):
    rng = np.random.default_rng(seed)
    m, n = rng.integers(1, 5, 2)
    W = rng.normal(size=(m, n)) * 10.0 ** rng.uniform(-3, 2, (m, 1))
    A = rng.normal(size=(n, n))
    S, N = A @ A.T, np.diag(10.0 ** rng.uniform(-2, 2, m))
    S = (S + S.T) / 2
    with mp.workdps(80):
        total = mp.matrix(W.tolist()) * mp.matrix(S.tolist()) * mp.matrix(W.tolist()).T + mp.matrix(N.tolist())
        exact = (mp.log(mp.det(total)) - mp.log(mp.det(mp.matrix(N.tolist())))) / 2
        bound = mpf(linear_information(W, S, N))
        assert exact <= bound <= exact + mpf(10) ** -7


def test_units_of_any_size_meet_in_one_layer():
    rng = np.random.default_rng(0)
    W, A = rng.normal(size=(3, 4)), rng.normal(size=(4, 4))
    S, N = A @ A.T, np.diag(rng.uniform(1, 2, 3))
    S = (S + S.T) / 2
    plain, joint = linear_information(W, S, N), layer_information(S, 2)
    inputs, outputs = 2.0 ** np.array([-490, -3, 30, 490]), 2.0 ** np.array([400, -1, -400])
    sized = S * inputs[:, None] * inputs  # exact powers of two
    W = W * outputs[:, None] / inputs
    assert linear_information(W, sized, N * outputs[:, None] * outputs) == pytest.approx(plain, rel=1e-12)
    assert layer_information(sized, 2) == pytest.approx(joint, rel=1e-12)
    # A small input beside a large one that is not read; and inputs that do not vary.
    tiny = linear_information([[0.0, 1e149]], np.diag([1e300, 1e-300]), [[1.0]])
    assert tiny == pytest.approx(0.5 * math.log1p(1e-2), rel=1e-9)
    assert linear_information([[1e200]], [[0.0]], [[1e-300]]) < 1e-12


@SOME
@given(seed=seeds, power=st.integers(-290, 290))
def test_unit_information_is_not_below_the_exact_value(seed, power):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=int(rng.integers(1, 9))) * 10.0**power
    scale, noise = (float(v) for v in 10.0 ** rng.uniform(-9, 9, 2))
    with mp.workdps(80):
        square = mp.fsum(mpf(float(x)) ** 2 for x in w)
        exact = mp.log1p(mpf(scale) ** 2 * square / mpf(noise) ** 2) / 2
        bound = mpf(unit_information(w, scale=scale, noise=noise))
        assert exact <= bound <= exact * (1 + mpf(10) ** -9) + mpf(10) ** -320


def test_unit_information_is_the_linear_layers():
    w = np.array([0.3, -2.0, 1.0])
    assert unit_information(w, scale=2.0, noise=0.5) == pytest.approx(
        linear_information(w[None], 4 * np.eye(3), [[0.25]]), rel=1e-12
    )
    assert unit_information(np.zeros(3), scale=1.0, noise=1.0) == 0


# --- what a flow ignores --------------------------------------------------------------------------------------------


@each_flow
@SOME
@given(seed=seeds)
def test_order_of_units_and_samples_and_shifts_do_not_matter(kind, seed):
    X, Y = layers(seed)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(X))
    moved = ALL[kind](X[rows][:, rng.permutation(X.shape[1])] - 3.0, Y[rows][:, rng.permutation(Y.shape[1])] + 10.0)
    assert moved == pytest.approx(ALL[kind](X, Y), abs=1e-7)


@pytest.mark.parametrize("kind", ["signed", "absolute", "rms", "gaussian", "copula"])
@pytest.mark.parametrize("power", [-1000, -300, 300, 1000])
def test_scales_of_units_do_not_matter_even_extreme_ones(kind, power):
    X, Y = layers(5, dead=False)
    scales = 2.0 ** np.linspace(power, 0, X.shape[1])
    scales = 2.0 ** np.round(np.log2(scales)).astype(int)
    expected = ALL[kind](X, Y)
    assert ALL[kind](X * scales, Y * 2.0 ** (power // 2)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("power", [-1000, -300, 300, 1000])
def test_cka_ignores_the_scale_of_a_layer_even_an_extreme_one(power):
    X, Y = layers(6, dead=False)
    assert linear_cka(X * 2.0**power, Y * 2.0**-power) == pytest.approx(linear_cka(X, Y), rel=1e-12)


@pytest.mark.parametrize("kind", ["absolute", "rms", "gaussian", "copula"])
def test_the_sign_of_a_unit_does_not_matter(kind):
    X, Y = layers(7, dead=False)
    flipped = X * np.where(np.arange(X.shape[1]) == 0, -1, 1)
    assert ALL[kind](flipped, Y) == pytest.approx(ALL[kind](X, Y), rel=1e-9)


def test_the_sign_of_a_unit_changes_the_signed_flow_of_the_same_function():
    # tanh is odd: flip a hidden unit and the weights that read it, and the outputs stay.
    rng = np.random.default_rng(8)
    W, U, x = rng.normal(size=(3, 4)), rng.normal(size=(2, 3)), rng.normal(size=(50, 4))
    signs = np.array([-1.0, 1.0, 1.0])
    outputs, flows = [], []
    for S in (np.ones(3), signs):
        hidden = x @ (S[:, None] * W).T
        outputs.append(np.tanh(hidden) @ (U * S).T)
        flows.append((signed_correlation(hidden, outputs[-1]), absolute_correlation(hidden, outputs[-1])))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-14)
    assert abs(flows[0][0] - flows[1][0]) > 0.02
    assert flows[0][1] == pytest.approx(flows[1][1], abs=1e-12)


@SOME
@given(seed=seeds)
def test_rotations_leave_cka_and_invertible_maps_the_information(seed):
    X, Y = layers(seed, dead=False)
    rng = np.random.default_rng(seed)
    n = X.shape[1]
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    assert linear_cka(7 * X @ Q, Y) == pytest.approx(linear_cka(X, Y), abs=1e-9)
    M = Q @ np.diag(10.0 ** rng.uniform(-2, 2, n))
    information = gaussian_information(X, Y, shrinkage=0)
    assert gaussian_information(X @ M, Y, shrinkage=0) == pytest.approx(information, abs=1e-7)
    # Units twice or sums of others add nothing: the information is of the directions a layer has.
    doubled = np.hstack([X, X[:, :1], X.sum(axis=1, keepdims=True)])
    assert gaussian_information(doubled, Y, shrinkage=0) == pytest.approx(information, abs=1e-7)


# --- dead units, one unit, few samples ------------------------------------------------------------------------------


@each_flow
@pytest.mark.parametrize("value", [0.0, 0.1, 1e300, -7.3e-300])
def test_a_constant_layer_has_zero_flow(kind, value):
    Y = np.random.default_rng(0).normal(size=(30, 3))
    X = np.full((30, 2), value)
    assert ALL[kind](X, Y) == 0
    assert ALL[kind](Y, X) == 0


@pytest.mark.parametrize("kind", ["signed", "absolute"])
def test_a_dead_unit_counts_as_zero_in_the_mean(kind):
    X, Y = layers(11, dead=False)
    dead = np.hstack([X, np.full((len(X), X.shape[1]), 0.3)])
    assert ALL[kind](dead, Y) == pytest.approx(ALL[kind](X, Y) / 2, rel=1e-12)


def test_a_unit_that_wanders_by_roundings_of_its_dtype_is_dead():
    rng = np.random.default_rng(12)
    X = (1 + 1e-7 * rng.integers(-1, 2, (200, 3))).astype(np.float32)
    Y = X + 0.0
    assert absolute_correlation(X, Y) == 0
    # The same values, if they are meant, are not.
    assert absolute_correlation(X.astype(np.float64), Y.astype(np.float64)) > 0.2


@each_flow
def test_a_single_unit_a_layer_is_enough(kind):
    rng = np.random.default_rng(13)
    x = rng.normal(size=(100, 1))
    y = x + rng.normal(size=(100, 1))
    r = float(pearson(x, y)[0, 0])
    got = ALL[kind](x, y)
    expected = {"signed": r, "absolute": abs(r), "rms": abs(r), "cka": r**2}
    if kind in expected:
        assert got == pytest.approx(expected[kind], abs=0.02)
    else:
        assert got == pytest.approx(correlation_information(r), abs=0.1)


def test_estimates_that_are_not_valid_on_few_samples_say_so_and_which_are():
    rng = np.random.default_rng(14)
    X, Y = rng.normal(size=(10, 8)), rng.normal(size=(10, 8))
    with pytest.raises(ValueError, match=r"too few for 8 \+ 8 independent units.*signed, absolute and rms"):
        gaussian_information(X, Y, shrinkage=0)
    with pytest.warns(FewSamplesWarning, match="10 samples for layers of 8 and 8 units.*stay valid"):
        gaussian_information(X, Y, shrinkage=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for flow in (signed_correlation, absolute_correlation, rms_correlation, linear_cka):
            assert np.isfinite(flow(X, Y))


def test_a_deterministic_layer_has_infinite_information_unless_shrunk():
    X = np.random.default_rng(15).normal(size=(100, 3))
    assert gaussian_information(X, 2 * X[:, :1] - X[:, 1:2], shrinkage=0) == math.inf
    assert 0 < gaussian_information(X, 2 * X[:, :1] - X[:, 1:2]) < math.inf


@SOME
@given(seed=seeds, rate=st.floats(0.001, 1.0))
def test_shrinking_never_raises_the_information(seed, rate):
    X, Y = layers(seed, dead=False)
    less = gaussian_information(X, Y, shrinkage=rate)
    assert less <= gaussian_information(X, Y, shrinkage=0, corrected=False) + 1e-10
    assert less >= gaussian_information(X, Y, shrinkage=min(1.0, 2 * rate)) - 1e-10


@each_flow
@pytest.mark.parametrize(
    ("X", "Y", "sentence"),
    [
        (np.zeros((5, 2)), np.zeros((4, 2)), "X has 5 samples but Y has 4"),
        (np.zeros((1, 2)), np.zeros((1, 2)), "at least two samples"),
        (np.zeros((5, 0)), np.zeros((5, 2)), "at least two samples of at least one unit"),
        (np.zeros(5), np.zeros((5, 2)), "X has 1 dimensions"),
        (np.ones((5, 2)), np.full((5, 2), np.nan), "Y holds nan"),
        (np.ones((5, 2)), np.full((5, 2), np.inf), "Y holds inf"),
    ],
)
def test_unfit_layers_are_refused_by_name(kind, X, Y, sentence):
    with pytest.raises(ValueError, match=sentence):
        ALL[kind](X, Y)


def test_text_and_objects_are_refused():
    with pytest.raises(TypeError, match="X must be an array of real numbers"):
        signed_correlation([["a"], ["b"]], [[1.0], [2.0]])


def test_too_few_samples_for_a_correction_are_refused():
    X = np.array([[1.0], [2.0]])
    with pytest.raises(ValueError, match="at least 3 samples, got 2"):
        rms_correlation(X, X)
    assert rms_correlation(X, X, corrected=False) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 4 samples, got 2"):
        linear_cka(X, X)
    with pytest.raises(ValueError, match=r"shrinkage=1.5 is outside"):
        gaussian_information(X, X, shrinkage=1.5)


def test_tensors_give_what_arrays_give():
    X, Y = layers(16)
    for flow in ALL.values():
        assert flow(torch.tensor(X, requires_grad=True), torch.tensor(Y)) == flow(X, Y)


# --- sums over batches ----------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted), shift=st.sampled_from([0.0, 100.0]))
def test_sums_over_batches_give_every_flow(seed, cuts, shift):
    X, Y = layers(seed)
    X = X / np.where(np.abs(X).max(axis=0) > 0, np.abs(X).max(axis=0), 1) + shift
    sums = PairSums(X.shape[1], Y.shape[1])
    for x, y in zip(np.split(X, cuts), np.split(Y, cuts), strict=True):
        sums.update(x, torch.tensor(y) if seed % 2 else y)
    assert sums.samples == len(X)
    moments = sums.moments(least_spread=1e-12)
    for kind, flow in FLOWS.items():
        assert flow(moments) == pytest.approx(ALL[kind](X, Y), abs=1e-6), kind
    unbiased = moments.cka(), moments.gaussian(shrinkage=0.3)
    assert unbiased == pytest.approx((linear_cka(X, Y), gaussian_information(X, Y, shrinkage=0.3)), abs=1e-7)


@SOME
@given(seed=seeds, cut=st.integers(0, 40))
def test_sums_merge_in_any_order(seed, cut):
    X, Y = layers(seed)
    X = X / np.where(np.abs(X).max(axis=0) > 0, np.abs(X).max(axis=0), 1)
    parts = []
    for part in (slice(cut), slice(cut, None)):
        sums = PairSums(X.shape[1], Y.shape[1])
        sums.update(X[part], Y[part])
        parts.append(sums)
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert merged.samples == len(X)
        assert merged.moments().cka() == pytest.approx(linear_cka(X, Y), abs=1e-8)
        assert merged.moments().absolute() == pytest.approx(absolute_correlation(X, Y), abs=1e-8)


def test_sums_refuse_other_layers_and_unfit_batches():
    sums = PairSums(2, 3)
    with pytest.raises(ValueError, match="x has shape \\(5, 3\\), expected \\(b, 2\\)"):
        sums.update(np.ones((5, 3)), np.ones((5, 3)))
    with pytest.raises(ValueError, match="x has 5 rows but y has 4"):
        sums.update(np.ones((5, 2)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="Cannot merge"):
        sums.merge(PairSums(3, 2))
    with pytest.raises(ValueError, match="0 samples have no correlations"):
        sums.moments()
    with pytest.raises(ValueError, match="nan"):
        sums.update(np.full((5, 2), np.nan), np.ones((5, 3)))
    assert sums.samples == 0


# --- what a flow cannot tell, and what pruning can do ---------------------------------------------------------------


def test_no_signed_flow_and_infinite_information():
    X = np.random.default_rng(17).normal(size=(500, 2))
    Y = np.hstack([X, -X])
    assert signed_correlation(X, Y) == pytest.approx(0, abs=1e-15)
    assert gaussian_information(X, Y, shrinkage=0) == math.inf


@pytest.mark.parametrize("flow", [0.5, 0.05, 0.01])
def test_any_information_hides_behind_any_small_flow(flow):
    C, n = hidden_information(5.0, flow)
    R = C[:n, n:]
    assert R.mean() == 0
    assert np.abs(R).mean() <= math.sqrt((R**2).mean()) <= flow
    assert layer_information(C, n) == pytest.approx(5.0, abs=1e-5)


def test_masks_of_single_weights_can_raise_the_information():
    noise = 0.1 * np.eye(2)
    assert linear_information(np.ones((2, 2)), np.eye(2), noise) == pytest.approx(1.857, abs=5e-4)
    assert linear_information(np.eye(2), np.eye(2), noise) == pytest.approx(2.398, abs=5e-4)


def test_removing_a_correlated_input_can_raise_the_information():
    C = np.array([[1.0, -0.9], [-0.9, 1.0]])
    assert linear_information([[1.0, 1.0]], C, [[1.0]]) == pytest.approx(0.091, abs=5e-4)
    assert linear_information([[1.0, 0.0]], C, [[1.0]]) == pytest.approx(0.347, abs=5e-4)


def test_magnitude_is_the_best_mask_of_every_size_by_brute_force():
    w = np.random.default_rng(18).normal(size=7)
    for k in range(8):
        informations = {
            kept: unit_information(w[list(kept)] if kept else np.zeros(1), scale=1.3, noise=0.4)
            for kept in combinations(range(7), k)
        }
        best = tuple(sorted(np.argsort(-np.abs(w))[:k].tolist()))
        assert informations[best] == max(informations.values())


def test_information_of_a_scalar_chain_is_of_the_product_of_correlations():
    a, b = 0.8, -0.6
    C = np.array([[1, a, a * b], [a, 1, b], [a * b, b, 1]])
    ends = layer_information(C[np.ix_([0, 2], [0, 2])], 1)
    assert ends == pytest.approx(correlation_information(a * b), rel=1e-12)
    assert ends <= min(correlation_information(a), correlation_information(b))


def test_a_threshold_above_the_limit_fires_whatever_the_nets():
    assert flow_distance_limit(4) == pytest.approx(4)
    assert flow_distance_limit(4, signed=False) == pytest.approx(2)
    with pytest.raises(ValueError, match="pairs=0"):
        flow_distance_limit(0)


def test_the_probe_is_not_the_flow_with_another_normalisation():
    # A negative control of the identity: averages of raw units, not standardised ones, give another number.
    X, Y = layers(19, dead=False)
    X, Y = X * np.arange(1, X.shape[1] + 1), Y
    raw = np.cov(X.mean(axis=1), Y.mean(axis=1), bias=True)[0, 1]
    assert abs(raw - signed_correlation(X, Y)) > 1e-3
    assert statement("flow-probe").check(X=X, Y=Y, side="above").holds


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: correlation_information(1.5), "r=1.5 is outside"),
        (lambda: layer_information(np.ones((2, 2)), 1), "singular to float64"),
        (lambda: layer_information(np.diag([1.0, 0.0]), 1), "variance 0"),
        (lambda: layer_information(np.eye(2), 2), "units=2 is outside"),
        (lambda: layer_information([[1.0, 2.0], [2.0, 1.0]], 1), "negative eigenvalue"),
        (lambda: canonical_correlations(np.ones((3, 3)), 2), "depend on each other"),
        (lambda: linear_information(np.ones((2, 2)), np.eye(3), np.eye(2)), r"Pass \(2, 2\) and \(2, 2\)"),
        (lambda: linear_information(np.ones((1, 1)), [[1.0]], [[0.0]]), "singular to float64"),
        (lambda: linear_information(np.ones((1, 1)), [[-1.0]], [[1.0]]), "covariance has a negative diagonal"),
        (lambda: linear_information(np.ones((2, 1)), [[1.0]], [[1.0, 0.5], [0.0, 1.0]]), "noise is not symmetric"),
        (lambda: linear_information([[1e200]], [[1.0]], [[1.0]]), "exceeds the noise beyond float64"),
        (lambda: layer_information(np.ones((2, 3)), 1), r"covariance has shape \(2, 3\)"),
        (lambda: unit_information([1.0], scale=1.0, noise=0.0), "noise=0"),
        (lambda: hidden_information(9.0, 0.1), "information=9 is outside"),
        (lambda: hidden_information(1.0, 0.0), "flow=0 is outside"),
    ],
)
def test_unfit_arguments_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
    assert correlation_information(-1) == math.inf
