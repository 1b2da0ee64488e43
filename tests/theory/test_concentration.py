"""How far sampled second moments fall short: formulas, and the guarantee on laws whose samples can all be listed."""

import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.stats import binom

from ellq.theory.concentration import (
    leverages,
    moments_limit,
    relative_shortfall,
    ridged,
    shortfall,
    shortfall_bernstein,
    shortfall_kurtosis,
    size_limit,
)
from ellq.theory.confidence import share_upper_limit
from ellq.theory.theorems_risk import outcomes, shares

SOME = settings(max_examples=80, deadline=None)
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 10**6)
deltas = st.one_of(st.floats(0.001, 0.999), st.sampled_from([1e-300, 1 - 1e-12]))
sizes = st.floats(1e-150, 1e150)


def is_rounded_up(value, exact, room=1e-12):
    return exact <= mpf(value) <= exact * (1 + mpf(room)) + mpf(10) ** -310


# --- formulas -------------------------------------------------------------------------------------------------------


@SOME
@given(m=counts, n=counts, delta=deltas, B=sizes, share=st.floats(0.001, 1.0))
def test_shortfalls_are_their_formulas_rounded_up(m, n, delta, B, share):
    case = {"samples": n, "delta": delta, "radius": B}
    largest = min(share * B * B, 1e300)
    with mp.workdps(60):
        log = mp.log(mpf(m) / mpf(delta))
        for value, given_size in ((largest, largest), (mpf(B) ** 2, None)):
            size = min(mpf(value), mpf(B) ** 2)
            spread = mp.sqrt(2 * mpf(B) ** 2 * size * log / n)
            assert is_rounded_up(shortfall(m, **case, largest=given_size), spread)
            assert is_rounded_up(shortfall_bernstein(m, **case, largest=given_size), spread + 2 * size * log / (3 * n))
        step = mpf(B) * mp.sqrt(log / (2 * n))
        root = min(step + mp.sqrt(mpf(largest) + step**2), mpf(B))
        assert is_rounded_up(size_limit(largest, features=m, samples=n, delta=delta, radius=B), root**2)


@SOME
@given(m=counts, n=counts, delta=deltas, kappa=st.floats(1, 1e6), tau=sizes, stake=st.floats(1e-6, 1 - 1e-6))
def test_relative_shortfalls_are_their_formulas_rounded_up(m, n, delta, kappa, tau, stake):
    growth, price = relative_shortfall(m, samples=n, delta=delta, leverage=tau, stake=stake)
    with mp.workdps(60):
        log, wager = mp.log(mpf(m) / mpf(delta)), mpf(stake)
        assert is_rounded_up(growth, -mp.log(1 - wager) / wager)
        assert is_rounded_up(price, mpf(tau) * log / (wager * n))
        missing = shortfall_kurtosis(m, samples=n, delta=delta, kurtosis=kappa)
        assert is_rounded_up(missing, mp.sqrt(2 * mpf(kappa) * m * log / n))


def test_size_limit_covers_what_it_was_solved_for():
    # ‖Σ‖ = ‖Σ̂‖ + B√(2‖Σ‖L/n) is the worst case on the event.
    for measured in (0.0, 1e-3, 0.5, 3.0):
        size = size_limit(measured, features=9, samples=50, delta=0.1, radius=4.0)
        gap = shortfall(9, samples=50, delta=0.1, radius=4.0, largest=size)
        assert size == pytest.approx(measured + gap, rel=1e-9)
    assert size_limit(5.0, features=9, samples=2, delta=0.1, radius=1.0) == pytest.approx(1)


def test_edges():
    nowhere = {"samples": 1, "delta": 0.5, "radius": 0.0}
    assert shortfall(3, **nowhere) == shortfall_bernstein(3, **nowhere) == 0
    assert shortfall(3, samples=1, delta=0.5, radius=1.0, largest=0.0) == 0
    assert np.isinf(shortfall(3, samples=1, delta=0.5, radius=1e200))
    assert shortfall(3, samples=1, delta=0.5, radius=1e-300) > 0
    assert relative_shortfall(3, samples=1, delta=0.5, leverage=0.0, stake=0.5)[1] == 0


# --- the guarantee, on laws of a few atoms --------------------------------------------------------------------------


def law(rng, m=2, atoms=3):
    Z = rng.normal(size=(atoms, m)) * 10.0 ** rng.uniform(-1, 1, (atoms, 1))
    p = rng.dirichlet(np.ones(atoms))
    return Z, p, (Z * p[:, None]).T @ Z


def samples_of(Z, p, n):
    """Every sample of n atoms by counts, with its probability and second moments."""
    listed = outcomes(p, n)
    for c, chance in zip(listed.first, listed.chances, strict=True):
        yield c, chance, (Z * (c / n)[:, None]).T @ Z


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("delta", [0.02, 0.2, 0.8])
def test_true_moments_are_below_every_limit_but_with_probability_delta(seed, delta):
    rng = np.random.default_rng(seed)
    Z, p, S = law(rng)
    n, m = int(rng.integers(5, 40)), 2
    B = np.linalg.norm(Z, axis=1).max() * (1 + 1e-12)
    W = ridged(np.cov(rng.normal(size=(9, 2)).T) + S, 0.1)
    tau = leverages(Z, W).max() * (1 + 1e-9)
    growth, price = relative_shortfall(m, samples=n, delta=delta, leverage=tau, stake=0.5)
    kappa = leverages(Z, S).max()
    missing = shortfall_kurtosis(m, samples=n, delta=delta, kurtosis=kappa)
    failed = np.zeros(4)
    for _, chance, measured in samples_of(Z, p, n):
        size = size_limit(np.linalg.norm(measured, 2) * (1 + 1e-12), features=m, samples=n, delta=delta, radius=B)
        gap = shortfall(m, samples=n, delta=delta, radius=B, largest=size)
        limits = (
            measured + gap * np.eye(m),
            np.eye(m) * size,
            growth * measured + price * W,
            measured / (1 - missing) if missing < 1 else np.eye(m) * 1e9,
        )
        failed += chance * np.array([np.linalg.eigvalsh(limit - S)[0] < -1e-10 * np.trace(S) for limit in limits])
    assert (failed <= delta).all()


def test_measured_moments_alone_fall_short_half_of_the_time():
    # The negative control of the test above.
    Z, p, S = law(np.random.default_rng(3))
    short = sum(chance for _, chance, M in samples_of(Z, p, 30) if np.linalg.eigvalsh(M - S)[0] < 0)
    assert short > 0.4


# --- the limit from held-out samples --------------------------------------------------------------------------------


def test_the_limit_is_the_weighted_moments_and_a_share_of_the_metric():
    rng = np.random.default_rng(0)
    Z, W = rng.normal(size=(50, 3)), ridged(np.diag([1.0, 2.0, 3.0]))
    limit = moments_limit([Z[:20], Z[20:]], W, reach=4.0, delta=0.1, stakes=(0.3, 0.6))
    levels = np.einsum("ij,jk,ik->i", Z, np.linalg.inv(W), Z) / 4.0
    inside = levels <= 1
    for form, stake in zip(limit.forms, (0.3, 0.6), strict=True):
        weights = -np.log1p(-stake * levels[inside]) / (stake * levels[inside])
        price = np.log(2 * 2 * 3 / 0.1) * 4.0 / (stake * 50)
        expected = (Z[inside] * weights[:, None]).T @ Z[inside] / 50 + price * W
        np.testing.assert_allclose(form, expected, rtol=1e-11, atol=1e-13)
    assert limit.samples == 50
    assert 0 < (~inside).sum() < 50
    assert limit.share_outside == share_upper_limit(int((~inside).sum()), 50, delta=0.05)
    q = rng.normal(size=(2, 3))
    assert limit.risk(q) == pytest.approx(min(np.trace(q @ M @ q.T) for M in limit.forms), rel=1e-6)


@SOME
@given(seed=seeds)
def test_the_limit_exceeds_the_measured_risk_and_follows_linear_maps(seed):
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(40, 3)) ** 3
    A = rng.normal(size=(3, 3)) + 2 * np.eye(3)
    W = ridged(Z[:20].T @ Z[:20] / 20, 1e-3)
    Q = rng.normal(size=(2, 3))
    here = moments_limit([Z[20:]], W, reach=50.0, delta=0.1)
    there = moments_limit([Z[20:] @ A.T], A @ W @ A.T, reach=50.0, delta=0.1)
    assert here.share_outside == there.share_outside
    assert there.risk(Q) == pytest.approx(here.risk(Q @ A), rel=1e-4)
    within = leverages(Z[20:], W) <= 50.0
    assert here.risk(Q) >= ((Z[20:][within] @ Q.T) ** 2).sum() / 20


@pytest.mark.parametrize("tail", ["bounded", "heavy"])
def test_the_limit_holds_for_all_changes_at_once_in_nearly_all_samples(tail):
    # The worst change is found on each sample; a finite population makes the truth exact.
    rng, delta, n, runs = np.random.default_rng(5), 0.2, 60, 300
    population = rng.normal(size=(500, 2)) if tail == "bounded" else rng.standard_t(2.5, size=(500, 2))
    W = ridged(population.T @ population / 500)
    level = leverages(population, W)
    reach = level.max() if tail == "bounded" else float(np.quantile(level, 0.97))
    inside = level <= reach
    truth = population[inside].T @ population[inside] / 500
    failed = unweighted = 0
    for _ in range(runs):
        drawn = rng.integers(500, size=n)
        limit = moments_limit([population[drawn]], W, reach=reach, delta=delta)
        below = any(np.linalg.eigvalsh(form - truth)[0] < 0 for form in limit.forms)
        failed += below or (~inside).mean() > limit.share_outside
        kept = population[drawn][inside[drawn]]
        unweighted += np.linalg.eigvalsh(kept.T @ kept / n - truth)[0] < 0
    assert binom.sf(failed - 1, runs, delta) > 1e-9
    assert binom.sf(unweighted - 1, runs, delta) < 1e-9  # the samples alone are caught


def test_dead_and_repeated_features_do_no_harm():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 1))
    Z = np.hstack([x, x, np.zeros_like(x)])
    limit = moments_limit([Z[100:]], ridged(Z[:100].T @ Z[:100] / 100), reach=30.0, delta=0.1)
    assert limit.risk([[1.0, -1.0, 0.0]]) < 1e-4
    assert limit.risk([[1.0, 1.0, 0.0]]) > 4 * (x[100:] ** 2).mean()
    assert limit.risk(np.zeros((1, 3))) == 0


def test_leverages_are_the_quadratic_form_and_average_to_the_rank():
    rng = np.random.default_rng(2)
    Z = rng.normal(size=(30, 4))
    assert leverages(Z, Z.T @ Z / 30).mean() == pytest.approx(4, rel=1e-12)
    W = Z.T @ Z
    np.testing.assert_allclose(leverages(Z, W), np.einsum("ij,jk,ik->i", Z, np.linalg.inv(W), Z), rtol=1e-10)


def test_ridged_adds_a_share_of_the_mean_eigenvalue():
    np.testing.assert_allclose(ridged(np.diag([1.0, 0.0]), 0.1), np.diag([1.05, 0.05]))


# --- the samples of a law of a few atoms ----------------------------------------------------------------------------


def test_listed_outcomes_are_the_multinomial_law():
    for weights, n in (([1.0], 4), ([1.0, 2.0], 50), ([0.2, 0.3, 0.5], 12)):
        listed = outcomes(np.array(weights), n)
        assert (listed.first.sum(axis=1) == n).all()
        assert len({tuple(c) for c in listed.first}) == len(listed.first)
        assert listed.chances.sum() == pytest.approx(1, rel=1e-10)
        np.testing.assert_allclose(listed.chances @ listed.first / n, shares(weights), rtol=1e-9)


@pytest.mark.parametrize("delta", [1e-200, 1e-6, 0.3])
def test_blocks_of_outcomes_give_nearly_the_quantile_and_never_more(delta):
    p, n = 0.01, 10**8
    found = outcomes(np.array([p, 1 - p]), n).quantile(lambda c: p - c[:, 0] / n, delta)
    exact = p - binom.ppf(delta, n, p) / n if delta > 1e-100 else np.sqrt(2 * p * np.log(1 / delta) / n)
    assert found <= exact * (1 + 1e-9)
    assert found > 0.95 * exact


# --- bad input ------------------------------------------------------------------------------------------------------

GOOD = {"samples": 10, "delta": 0.1, "radius": 1.0}
WRONG = [
    ({"samples": 0}, "samples=0"),
    ({"delta": 1.0}, "delta=1"),
    ({"radius": -1.0}, "radius=-1"),
    ({"largest": -1.0}, "largest=-1"),
]


@pytest.mark.parametrize(("bound", "change"), list(product((shortfall, shortfall_bernstein), WRONG)))
def test_shortfalls_refuse_bad_numbers(bound, change):
    arguments, word = change
    with pytest.raises(ValueError, match=word):
        bound(3, **GOOD | arguments)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: shortfall(0, **GOOD), "features=0"),
        (lambda: size_limit(-1.0, features=2, **GOOD), "measured=-1"),
        (lambda: shortfall_kurtosis(2, samples=3, delta=0.1, kurtosis=0.9), "kurtosis=0.9"),
        (lambda: relative_shortfall(2, samples=3, delta=0.1, leverage=-1.0, stake=0.5), "leverage=-1"),
        (lambda: relative_shortfall(2, samples=3, delta=0.1, leverage=1.0, stake=1.0), "stake=1"),
        (lambda: ridged(np.ones((2, 3))), "shape (2, 3)"),
        (lambda: ridged(np.zeros((2, 2))), "trace 0"),
        (lambda: ridged(np.eye(2), 0.0), "ridge is 0"),
        (lambda: leverages(np.ones((2, 3)), np.eye(2)), "3 columns"),
        (lambda: leverages(np.ones((2, 2)), -np.eye(2)), "not positive definite"),
        (lambda: leverages(np.ones((2, 2)), np.ones((2, 3))), "shape (2, 3)"),
    ],
)
def test_bad_numbers_are_refused(call, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        call()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"batches": []}, "no samples"),
        ({"batches": [np.ones((2, 3))]}, "batch 0 has 3 columns"),
        ({"batches": [np.ones((2, 2)), np.full((2, 2), np.inf)]}, "batch 1 holds inf"),
        ({"metric": np.zeros((2, 2))}, "not positive definite"),
        ({"reach": 0.0}, "reach=0"),
        ({"reach": np.inf}, "reach=inf"),
        ({"delta": 0.0}, "delta=0"),
        ({"stakes": ()}, "stakes is empty"),
        ({"stakes": (0.5, 1.0)}, "stakes=1"),
    ],
)
def test_moments_limit_refuses_bad_input(change, word):
    case = {"batches": [np.ones((3, 2))], "metric": np.eye(2), "reach": 9.0, "delta": 0.1} | change
    batches, metric = case.pop("batches"), case.pop("metric")
    with pytest.raises(ValueError, match=re.escape(word)):
        moments_limit(batches, metric, **case)
