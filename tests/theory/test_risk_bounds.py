"""The risk of a skeleton on unseen inputs: identities, order of bounds, and the guarantee on finite populations."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.stats import binom

from ellq.theory import Gram, moment_error, second_moments
from ellq.theory.concentration import relative_shortfall, ridged, shortfall, size_limit
from ellq.theory.confidence import mean_upper_limit, share_upper_limit
from ellq.theory.risk_bounds import (
    empirical_risk,
    feature_moments,
    output_change,
    pseudodim_quadratic,
    pseudodim_remembered,
    risk_bernstein,
    risk_held_out,
    risk_kurtosis,
    risk_pointwise,
    risk_pointwise_published,
    risk_pseudodim,
    risk_relative,
    risk_shortfall,
    risk_split,
    risk_whole,
)

SOME = settings(max_examples=100, deadline=None)
seeds = st.integers(0, 2**32 - 1)
risks = st.one_of(st.just(0.0), st.floats(1e-300, 1e290))
ALL_AT_ONCE = (risk_bernstein, risk_shortfall, risk_relative)
each_bound = pytest.mark.parametrize("bound", ALL_AT_ONCE)


def skeleton(rng, m=None):
    """A consumer, a skeleton and an interpolation matrix that is the identity on it."""
    m = m or int(rng.integers(1, 8))
    J = rng.permutation(m)[: rng.integers(0, m + 1)]
    T = rng.normal(size=(J.size, m)) * 10.0 ** rng.uniform(-2, 2)
    T[:, J] = np.eye(J.size)
    return rng.normal(size=(int(rng.integers(1, 5)), m)), J, T


# --- the split ------------------------------------------------------------------------------------------------------


@SOME
@given(a=risks, b=risks)
def test_split_is_the_square_of_the_sum_of_roots_rounded_up(a, b):
    with mp.workdps(60):
        exact = mpf(a) + mpf(b) + 2 * mp.sqrt(mpf(a) * mpf(b))
        assert exact <= mpf(risk_split(a, b)) <= exact * (1 + mpf(10) ** -12)
    assert risk_split(a, b) == risk_split(b, a)


@SOME
@given(seed=seeds)
def test_split_bounds_the_risk_of_the_pruned_net(seed):
    rng = np.random.default_rng(seed)
    dense, pruned, y = rng.normal(size=(3, 9, 2)) * 10.0 ** rng.uniform(-2, 2, (3, 1, 1))
    risk = [((a - b) ** 2).sum(axis=1).mean() for a, b in ((pruned, dense), (dense, y), (pruned, y))]
    assert risk[2] <= risk_split(risk[0], risk[1]) * (1 + 1e-12)


def test_split_at_the_ends():
    assert risk_split(0.0, 3.0) == risk_split(3.0, 0.0) == 3
    assert risk_split(1.0, 4.0) == pytest.approx(9, rel=1e-13)
    assert risk_split(1e300, 1e300) == pytest.approx(4e300)
    assert np.isinf(risk_split(1e308, 1e308))


# --- the change and its empirical risk ------------------------------------------------------------------------------


@SOME
@given(seed=seeds, has_shift=st.booleans())
def test_change_is_the_difference_of_the_outputs(seed, has_shift):
    rng = np.random.default_rng(seed)
    U, J, _ = skeleton(rng)
    W, Z = rng.normal(size=(len(U), J.size)), rng.normal(size=(11, U.shape[1]))
    shift = rng.normal(size=len(U)) if has_shift else None
    Q = output_change(U, J, W, shift=shift)
    after = Z[:, J] @ W.T + (shift if has_shift else 0.0)
    ones = np.hstack([Z, np.ones((11, 1))]) if has_shift else Z
    np.testing.assert_allclose(ones @ Q.T, after - Z @ U.T, atol=1e-12)


@SOME
@given(seed=seeds, constant=st.booleans())
def test_empirical_risk_is_the_mean_square_over_the_samples(seed, constant):
    rng = np.random.default_rng(seed)
    m, n = int(rng.integers(1, 6)), int(rng.integers(1, 30))
    Z, Q = rng.normal(size=(n, m)) + rng.choice([0.0, 3.0]), rng.normal(size=(3, m + constant))
    gram = Gram(m, 0)
    for part in np.array_split(Z, 3):
        gram.update(part, np.zeros((len(part), 0)))
    ones = np.hstack([Z, np.ones((n, 1))]) if constant else Z
    moments = feature_moments(gram, constant=constant)
    np.testing.assert_allclose(moments, second_moments(ones), rtol=1e-10, atol=1e-12)
    expected = ((ones @ Q.T) ** 2).sum(axis=1).mean()
    assert empirical_risk(Q, moments) == pytest.approx(expected, rel=1e-9)
    assert empirical_risk(Q, second_moments(ones), entry_error=moment_error(n)) >= expected


def test_empirical_risk_of_no_change_is_zero():
    assert empirical_risk(np.zeros((2, 3)), np.eye(3)) == 0
    assert empirical_risk([[1.0, -1.0]], np.ones((2, 2))) < 1e-13
    assert empirical_risk([[1e100]], [[1e100]]) == pytest.approx(1e300)


# --- one input ------------------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds)
def test_pointwise_bounds_hold_and_ours_is_never_above_the_published(seed):
    rng = np.random.default_rng(seed)
    U, J, T = skeleton(rng)
    B = 10.0 ** rng.uniform(-2, 2)
    Q = output_change(U, J, U @ T.T)
    ours, published = risk_pointwise(U, T, B), risk_pointwise_published(U, T, B)
    assert np.linalg.norm(Q, 2) ** 2 * B**2 <= ours * (1 + 1e-9)
    assert ours <= published * (1 + 1e-12)
    assert published <= 4 * min(U.shape) * ours * (1 + 1e-9)


@SOME
@given(seed=seeds)
def test_the_complement_of_an_oblique_projector_has_its_norm(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 8))
    J = rng.permutation(m)[: rng.integers(1, m)]
    T = rng.normal(size=(J.size, m))
    T[:, J] = np.eye(J.size)
    P = np.zeros((m, m))
    P[J] = T
    assert np.linalg.norm(np.eye(m) - P, 2) == pytest.approx(np.linalg.norm(T, 2), rel=1e-9)
    u = np.linalg.svd(np.eye(m) - P)[2][:1]
    Q = output_change(u, J, u @ T.T)
    assert np.linalg.norm(Q, 2) ** 2 == pytest.approx(risk_pointwise(u, T, 1.0), rel=1e-9)


def test_pointwise_at_the_ends():
    assert risk_pointwise([[3.0]], np.zeros((0, 1)), 2.0) == pytest.approx(36)
    assert risk_pointwise([[0.0]], [[1.0]], 2.0) == risk_pointwise([[1.0]], [[1.0]], 0.0) == 0
    assert risk_pointwise([[1e-200]], [[1.0]], 1e200) == pytest.approx(1)
    assert risk_pointwise_published([[1e-200]], [[1.0]], 1e200) == pytest.approx(4)


# --- all changes at once --------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, delta=st.floats(1e-12, 0.999))
def test_bounds_are_the_empirical_risk_and_a_shortfall(seed, delta):
    rng = np.random.default_rng(seed)
    Q, n, B = rng.normal(size=(2, 3)), int(rng.integers(1, 10**6)), 10.0 ** rng.uniform(-3, 3)
    emp, size = 10.0 ** rng.uniform(-9, 3), float((Q**2).sum())
    case = {"radius": B, "samples": n, "delta": delta}
    share = np.log(3 / delta) / n
    bernstein = emp + size * B**2 * (np.sqrt(2 * share) + 2 / 3 * share)
    assert risk_bernstein(Q, emp, **case) == pytest.approx(bernstein, rel=1e-12)
    assert risk_bernstein(Q, emp, **case) >= bernstein * (1 - 1e-15)
    assert risk_shortfall(Q, emp, **case) == pytest.approx(emp + size * shortfall(3, **case), rel=1e-12)
    measured = rng.random() * B**2
    limit = size_limit(measured, features=3, **case)
    expected = emp + size * shortfall(3, **case, largest=limit)
    assert risk_shortfall(Q, emp, **case, measured=measured) == pytest.approx(expected, rel=1e-9)
    assert risk_shortfall(Q, emp, **case, measured=measured) <= risk_shortfall(Q, emp, **case) * (1 + 1e-12)
    assert risk_shortfall(Q, emp, **case) <= risk_bernstein(Q, emp, **case)
    pairs = [relative_shortfall(3, samples=n, delta=delta / 2, leverage=B**2, stake=stake) for stake in (0.2, 0.8)]
    expected = min(growth * emp + price * size for growth, price in pairs)
    assert risk_relative(Q, emp, **case, stakes=(0.2, 0.8)) == pytest.approx(expected, rel=1e-12)


@each_bound
@SOME
@given(seed=seeds, shift=st.integers(-300, 300))
def test_bounds_trade_scale_between_change_and_features_and_fall_with_samples(bound, seed, shift):
    rng = np.random.default_rng(seed)
    Q, case = rng.normal(size=(2, 4)), {"samples": 500, "delta": 0.1}
    first = bound(Q, 0.5, radius=3.0, **case)
    scaled = bound(np.ldexp(Q, shift), 0.5, radius=np.ldexp(3.0, -shift), **case)
    assert scaled == pytest.approx(first, rel=1e-12)
    assert bound(Q[:, ::-1], 0.5, radius=3.0, **case) == pytest.approx(first, rel=1e-12)
    assert bound(Q, 0.5, radius=3.0, samples=5000, delta=0.1) < first
    assert bound(Q, 0.5, radius=3.0, samples=500, delta=0.01) > first
    assert bound(Q, 0.6, radius=3.0, **case) > first


@each_bound
def test_bounds_without_change_or_radius_are_the_empirical_risk(bound):
    case = {"samples": 5, "delta": 0.1}
    assert bound(np.zeros((2, 3)), 0.0, radius=2.0, **case) == bound(np.ones((2, 3)), 0.0, radius=0.0, **case) == 0
    assert bound(np.ones((1, 1)), 1e300, radius=1.0, **case) >= 1e300
    assert np.isinf(bound(np.full((1, 1), 1e200), 1.0, radius=1e200, **case))


def test_relative_bound_is_far_below_the_others_where_the_empirical_risk_is_small():
    case = {"radius": 1.0, "samples": 60_000, "delta": 0.05}
    assert risk_relative(np.eye(4), 0.0, **case) < 0.03 * risk_shortfall(np.eye(4), 0.0, **case)


@pytest.mark.parametrize(("kurtosis", "samples"), [(3.0, 10**6), (1.0, 5000)])
def test_kurtosis_bound_is_a_multiple_of_the_empirical_risk(kurtosis, samples):
    missing = np.sqrt(2 * kurtosis * 20 * np.log(20 / 0.1) / samples)
    bound = risk_kurtosis(3.0, features=20, samples=samples, delta=0.1, kurtosis=kurtosis)
    assert bound == pytest.approx(3.0 / (1 - missing), rel=1e-12)
    assert risk_kurtosis(0.0, features=20, samples=samples, delta=0.1, kurtosis=kurtosis) == 0
    assert risk_kurtosis(1.0, features=20, samples=100, delta=0.1, kurtosis=kurtosis) == np.inf


def worst_gap(S, M, B, case):
    """The largest ratio of true risk to bound over single changes, each direction tried with its own bound."""
    directions = np.linalg.eigh(S - M)[1].T
    return max(
        (q @ S @ q) / min(bound(q[None], float(q @ M @ q), radius=B, **case) for bound in ALL_AT_ONCE)
        for q in directions
    )


def test_bounds_hold_for_the_worst_change_found_on_the_samples_in_nearly_all_runs():
    rng, delta, n, runs = np.random.default_rng(7), 0.2, 40, 300
    population = np.maximum(rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3)), 0.0) * rng.exponential(size=(200, 1))
    S, B = population.T @ population / 200, float(np.linalg.norm(population, axis=1).max()) * (1 + 1e-12)
    failed = without = 0
    for _ in range(runs):
        Z = population[rng.integers(200, size=n)]
        M = Z.T @ Z / n
        failed += worst_gap(S, M, B, {"samples": n, "delta": delta / 3}) > 1
        without += np.linalg.eigvalsh(S - M)[-1] > 0
    assert binom.sf(failed - 1, runs, delta) > 1e-9
    assert binom.sf(without - 1, runs, delta) < 1e-9


# --- one change, held-out samples -----------------------------------------------------------------------------------


def test_held_out_risk_is_the_betting_limit_of_the_losses():
    rng = np.random.default_rng(0)
    Q, Z = rng.normal(size=(2, 3)), rng.normal(size=(80, 3))
    B = float(np.quantile(np.linalg.norm(Z, axis=1), 0.9))
    inside = np.linalg.norm(Z, axis=1) <= B
    found = risk_held_out(Q, Z, radius=B, delta=0.1, candidates=5)
    largest = np.linalg.norm(Q, 2) ** 2 * B**2
    losses = ((Z @ Q.T) ** 2).sum(axis=1) * inside
    assert found.risk == pytest.approx(mean_upper_limit(losses, largest=largest, delta=0.01), rel=1e-9)
    assert found.share_outside == share_upper_limit(int((~inside).sum()), 80, delta=0.05)
    # In the metric of the moments themselves: the same reach for all linear maps.
    W = ridged(Z.T @ Z / 80)
    A = rng.normal(size=(3, 3)) + 2 * np.eye(3)
    here = risk_held_out(Q @ A, Z, radius=2.5, delta=0.1, metric=W)
    there = risk_held_out(Q, Z @ A.T, radius=2.5, delta=0.1, metric=A @ W @ A.T)
    assert here.risk == pytest.approx(there.risk, rel=1e-7)
    assert here.share_outside == there.share_outside


@pytest.mark.parametrize("shift", [-700, -500, 400])
def test_held_out_risk_at_any_scale(shift):
    rng = np.random.default_rng(1)
    Q, Z = rng.normal(size=(2, 3)), rng.normal(size=(30, 3))
    first = risk_held_out(Q, Z, radius=9.0, delta=0.1)
    scaled = risk_held_out(np.ldexp(Q, -shift), np.ldexp(Z, shift), radius=np.ldexp(9.0, shift), delta=0.1)
    assert scaled.risk == pytest.approx(first.risk, rel=1e-12)
    assert scaled.share_outside == first.share_outside
    assert risk_held_out(np.zeros((2, 3)), Z, radius=9.0, delta=0.1).risk == 0


def test_held_out_risk_fails_with_probability_at_most_delta():
    rng, delta, runs = np.random.default_rng(2), 0.3, 400
    population, Q = rng.standard_t(3, size=(300, 2)), rng.normal(size=(2, 2))
    B = float(np.quantile(np.linalg.norm(population, axis=1), 0.98))
    inside = np.linalg.norm(population, axis=1) <= B
    truth = (((population @ Q.T) ** 2).sum(axis=1) * inside).mean()
    failed = below = 0
    for _ in range(runs):
        drawn = rng.integers(300, size=50)
        found = risk_held_out(Q, population[drawn], radius=B, delta=delta)
        failed += found.risk < truth or found.share_outside < (~inside).mean()
        below += (((population[drawn] @ Q.T) ** 2).sum(axis=1) * inside[drawn]).mean() < truth
    assert binom.sf(failed - 1, runs, delta) > 1e-9
    assert binom.sf(below - 1, runs, delta) < 1e-9


def test_risk_on_all_inputs_adds_what_is_assumed_of_the_rest():
    assert risk_whole(1.0, 0.1, largest=5.0) == pytest.approx(1.5, rel=1e-12)
    assert risk_whole(1.0, 0.01, kurtosis=4.0) == pytest.approx(1 / 0.8, rel=1e-12)
    assert risk_whole(1.0, 0.01, largest=1e9, kurtosis=4.0) == risk_whole(1.0, 0.01, kurtosis=4.0)
    assert risk_whole(1.0, 0.3, kurtosis=4.0) == np.inf
    assert risk_whole(1.0, 0.0, largest=9.0) == risk_whole(1.0, 0.0, kurtosis=9.0) == 1
    assert risk_whole(0.0, 0.5, largest=0.0) == 0


@SOME
@given(seed=seeds)
def test_risk_on_all_inputs_holds_for_the_exact_kurtosis(seed):
    rng = np.random.default_rng(seed)
    Z, q = rng.standard_t(3, size=(40, 3)), rng.normal(size=3)
    losses = (Z @ q) ** 2
    inside = losses <= np.quantile(losses, 0.95)
    kurtosis = (losses**2).mean() / losses.mean() ** 2
    bound = risk_whole((losses * inside).mean(), (~inside).mean(), kurtosis=kurtosis)
    assert losses.mean() <= bound * (1 + 1e-12)
    assert losses.mean() <= risk_whole((losses * inside).mean(), (~inside).mean(), largest=losses.max()) * (1 + 1e-12)


# --- the published form ---------------------------------------------------------------------------------------------


@SOME
@given(seed=seeds, delta=st.floats(1e-12, 0.999))
def test_published_form_is_its_formula_and_far_above_ours(seed, delta):
    rng = np.random.default_rng(seed)
    U, J, T = skeleton(rng)
    m, n = U.shape[1], int(rng.integers(1000, 10**7))
    case = {"radius": 2.0, "samples": n, "delta": delta}
    p = pseudodim_quadratic(m)
    M = 4.0 * (U**2).sum() * (1 + (np.linalg.norm(T, 2) if J.size else 0.0)) ** 2
    expected = 0.5 + M * (np.sqrt(2 * p * np.log(np.e * n / p)) + np.sqrt(np.log(1 / delta) / 2)) / np.sqrt(n)
    bound = risk_pseudodim(U, T, 0.5, **case, dimension=p)
    assert expected * (1 - 1e-14) <= bound <= expected * (1 + 1e-12)
    assert risk_bernstein(output_change(U, J, U @ T.T), 0.5, **case) <= bound


def test_pseudo_dimensions():
    assert pseudodim_remembered(784, 128) == pytest.approx(784 * 128 * np.log(784 * 128), rel=1e-12)
    assert pseudodim_remembered(784, 128, zeta=0.5) == pytest.approx(pseudodim_remembered(784, 128) / 2)
    assert pseudodim_quadratic(128) == 8256


# --- bad input ------------------------------------------------------------------------------------------------------

GOOD = {"radius": 1.0, "samples": 10, "delta": 0.1}


@each_bound
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"radius": -1.0}, "radius=-1"),
        ({"samples": 0}, "samples=0"),
        ({"delta": 0.0}, "delta=0"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"empirical": -1.0}, "empirical=-1"),
        ({"empirical": np.inf}, "empirical=inf"),
        ({"changes": [[np.nan]]}, "changes holds nan"),
        ({"changes": [1.0]}, "changes has 1 dimensions"),
    ],
)
def test_bounds_refuse_bad_numbers(bound, change, word):
    case = {"changes": [[1.0]], "empirical": 0.5} | GOOD | change
    with pytest.raises(ValueError, match=word):
        bound(case.pop("changes"), case.pop("empirical"), **case)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: risk_split(-1.0, 0.0), "change_risk=-1"),
        (lambda: risk_split(0.0, np.inf), "dense_risk=inf"),
        (lambda: output_change(np.ones((1, 3)), [3], np.ones((1, 1))), "from 3 to 3"),
        (lambda: output_change(np.ones((1, 3)), [0, 0], np.ones((1, 2))), "twice"),
        (lambda: output_change(np.ones((1, 3)), [0], np.ones((1, 2))), "expected (1, 1)"),
        (lambda: output_change(np.ones((1, 3)), [0], np.ones((1, 1)), shift=[1.0, 2.0]), "shift has 2"),
        (lambda: feature_moments(Gram(2, 0)), "empty"),
        (lambda: empirical_risk(np.ones((1, 3)), np.eye(2)), "3 entries"),
        (lambda: risk_pointwise(np.ones((1, 3)), np.ones((1, 2)), 1.0), "interpolation has 2"),
        (lambda: risk_pointwise_published(np.ones((1, 3)), np.ones((1, 3)), -1.0), "radius=-1"),
        (lambda: risk_relative([[1.0]], 0.5, **GOOD, stakes=()), "stakes is empty"),
        (lambda: risk_relative([[1.0]], 0.5, **GOOD, stakes=(1.0,)), "stake=1"),
        (lambda: risk_shortfall([[1.0]], 0.5, **GOOD, measured=-1.0), "measured=-1"),
        (lambda: risk_kurtosis(1.0, features=2, samples=9, delta=0.1, kurtosis=0.5), "kurtosis=0.5"),
        (lambda: risk_kurtosis(-1.0, features=2, samples=9, delta=0.1, kurtosis=3), "empirical=-1"),
        (lambda: risk_held_out([[1.0]], np.ones((0, 1)), radius=1.0, delta=0.1), "shape (0, 1)"),
        (lambda: risk_held_out([[1.0]], np.ones((2, 2)), radius=1.0, delta=0.1), "shape (2, 2)"),
        (lambda: risk_held_out([[1.0]], [[1.0]], radius=0.0, delta=0.1), "radius=0"),
        (lambda: risk_held_out([[1.0]], [[1.0]], radius=1.0, delta=0.1, candidates=0), "candidates=0"),
        (lambda: risk_held_out([[1.0]], [[1.0]], radius=1.0, delta=0.1, metric=[[0.0]]), "positive definite"),
        (lambda: risk_whole(1.0, 0.1), "Neither largest nor kurtosis"),
        (lambda: risk_whole(1.0, 1.1, largest=1.0), "share_outside=1.1"),
        (lambda: risk_whole(1.0, 0.1, kurtosis=0.5), "kurtosis=0.5"),
        (lambda: risk_pseudodim([[1.0]], [[1.0]], 0.0, **GOOD, dimension=11.0), "dimension=11"),
        (lambda: risk_pseudodim([[1.0]], [[1.0]], 0.0, **GOOD, dimension=0.0), "dimension=0"),
        (lambda: pseudodim_remembered(1, 1), "dm < 2"),
        (lambda: pseudodim_remembered(2, 2, zeta=0.0), "zeta=0"),
        (lambda: pseudodim_quadratic(0), "width=0"),
    ],
)
def test_bad_input_is_refused(call, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: risk_split("1", 0.0),
        lambda: output_change(np.ones((1, 3)), [0.5], np.ones((1, 1))),
        lambda: risk_bernstein([[1.0]], 0.5, radius=1.0, samples=1.5, delta=0.1),
        lambda: risk_held_out([[1.0]], [["a"]], radius=1.0, delta=0.1),
        lambda: pseudodim_quadratic(1.5),
    ],
)
def test_what_is_no_number_is_refused(call):
    with pytest.raises(TypeError):
        call()
