import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpmath import mpf

import oracles
from ellq.theory import best_term_error, best_term_errors, lq_quasinorm, stechkin_constant
from ellq.theory.input_moments import moment_error, second_moments, unit_error_gram
from ellq.theory.reweighting import hilbert_sampling_bound, reweight, unit_error_resampled
from strategies import MODERATE, quasi_orders, random_features, random_vector, vectors

SOME = settings(max_examples=80, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def whole_moments(rng, d):
    """Second moments that float64 holds exactly: inputs are small integers, some of them equal, opposite or dead."""
    X = rng.integers(-3, 4, size=(int(rng.integers(1, 8)), d)).astype(float)
    for j in range(1, d):
        kind, other = rng.integers(6), int(rng.integers(j))
        X[:, j] = {0: X[:, other], 1: -X[:, other], 2: 0 * X[:, j], 3: abs(X[:, j])}.get(int(kind), X[:, j])
    return X.T @ X


def equicorrelated(d, rho):
    return (1 - rho) * np.eye(d) + rho


@st.composite
def problems(draw, *, families=MODERATE, max_size=12):
    """Weights, exact second moments, and a count."""
    w = draw(vectors(families=families, max_size=max_size))
    G = whole_moments(np.random.default_rng(draw(seeds)), w.size)
    return w, G, draw(st.integers(0, w.size))


def exact(values):
    return [Fraction(float(x)) for x in values]


def exact_form(v, G):
    """vᵀGv in rational arithmetic, for exact v."""
    return sum(a * b * Fraction(float(g)) for a, row in zip(v, G, strict=True) for b, g in zip(v, row, strict=True))


def exact_error(w, weights, G):
    """‖Σ (θ_j − θ̂_j) X_j‖², no rounding."""
    return exact_form([a - b for a, b in zip(exact(w), exact(weights), strict=True)], G)


def removed(w, k, key):
    v = w.copy()
    v[np.argsort(-key, kind="stable")[:k]] = 0
    return v


# --- what is returned -----------------------------------------------------------------------------------------------


@SOME
@given(problem=problems(), data=st.data())
def test_error_covers_the_exact_one_and_stays_within_the_bound(problem, data):
    w, G, k = problem
    heavy = data.draw(st.one_of(st.none(), st.integers(0, k)))
    found = reweight(w, G, k, heavy=heavy)
    assert exact_error(w, found.weights, G) <= Fraction(found.error) ** 2
    assert found.error <= found.bound


@SOME
@given(problem=problems(families=MODERATE), data=st.data())
def test_weights_are_few_and_their_sum_does_not_grow(problem, data):
    w, G, k = problem
    found = reweight(w, G, k, heavy=data.draw(st.one_of(st.none(), st.integers(0, k))))
    assert np.count_nonzero(found.weights) <= k
    assert sum(map(abs, exact(found.weights))) <= sum(map(abs, exact(w)))
    assert (found.weights * w >= 0).all()
    assert 0 <= found.heavy <= k
    assert found.picks.size in (0, k - found.heavy)


@SOME
@given(problem=problems(), data=st.data())
def test_the_heaviest_keep_their_weights_and_the_rest_gets_equal_ones(problem, data):
    w, G, k = problem
    h = data.draw(st.integers(0, k))
    found = reweight(w, G, k, heavy=h)
    live = np.flatnonzero((w != 0) & G.any(axis=1))
    order = live[np.argsort(-np.abs(w[live]), kind="stable")]
    np.testing.assert_array_equal(found.weights[order[:h]], w[order[:h]])
    assert set(found.picks.tolist()) <= set(order[h:].tolist())
    share = np.abs(w[order[h:]]).sum() / max(k - h, 1)
    expected = np.bincount(found.picks, minlength=w.size) * np.sign(w) * share
    np.testing.assert_allclose(np.delete(found.weights, order[:h]), np.delete(expected, order[:h]), rtol=1e-13)


@SOME
@given(problem=problems(), data=st.data())
def test_every_pick_comes_nearest_to_the_share_of_the_tail(problem, data):
    w, G, k = problem
    h = data.draw(st.integers(0, k))
    found = reweight(w, G, k, heavy=h)
    live = np.flatnonzero((w != 0) & G.any(axis=1))
    tail = live[np.argsort(-np.abs(w[live]), kind="stable")][h:]
    mass = sum(abs(Fraction(float(x))) for x in w[tail])
    total = [Fraction(0)] * w.size
    for step, pick in enumerate(found.picks.tolist(), 1):

        def distance(j, total=total, step=step):
            moved = list(total)
            moved[j] += mass * int(np.sign(w[j]))
            for i in tail:
                moved[i] -= step * Fraction(float(w[i]))
            return exact_form(moved, G)

        least = min(distance(j) for j in tail.tolist())
        scale = mass**2 * Fraction(float(np.diag(G).max()))
        assert distance(pick) <= least + scale * Fraction(1, 10**12)
        total[pick] += mass * int(np.sign(w[pick]))


@SOME
@given(problem=problems(), data=st.data())
def test_bound_is_the_formula_rounded_up(problem, data):
    w, G, k = problem
    h = data.draw(st.integers(0, k))
    live = np.flatnonzero((w != 0) & G.any(axis=1))
    order = live[np.argsort(-np.abs(w[live]), kind="stable")]
    tail = np.zeros_like(w)
    tail[order[h:]] = w[order[h:]]
    magnitudes, norm = exact(np.abs(tail)), exact_form(exact(tail), G)
    spread = sum(a * Fraction(float(g)) for a, g in zip(magnitudes, np.diag(G), strict=True))
    square = (sum(magnitudes) * spread - norm) / (k - h) if h < k else norm
    bound = Fraction(reweight(w, G, k, heavy=h).bound)
    scale = sum(magnitudes) ** 2 * Fraction(float(np.abs(G).max()))
    assert square <= bound**2 <= square * (1 + Fraction(1, 10**12)) + scale * Fraction(1, 10**12)
    assert (bound == 0) == (not tail.any())


@SOME
@given(seed=seeds)
def test_measured_moments_are_covered_when_their_error_is_told(seed):
    rng = np.random.default_rng(seed)
    X = random_features(rng)
    w = random_vector(rng, X.shape[1], MODERATE)
    k = int(rng.integers(0, w.size + 1))
    for heavy in (None, int(rng.integers(0, k + 1))):
        found = reweight(w, second_moments(X), k, heavy=heavy, entry_error=moment_error(len(X)))
        change = [a - b for a, b in zip(exact(w), exact(found.weights), strict=True)]
        outputs = [sum(x * v for x, v in zip(exact(row), change, strict=True)) for row in X]
        assert sum(y * y for y in outputs) / len(X) <= Fraction(found.error) ** 2
        assert found.error <= found.bound


# --- how good it is -------------------------------------------------------------------------------------------------


@SOME
@given(problem=problems())
def test_search_is_never_worse_than_dropping_by_weight_or_by_contribution(problem):
    w, G, k = problem
    found = reweight(w, G, k)
    for key in (np.abs(w), np.abs(w) * np.sqrt(np.diag(G))):
        key = np.where(G.any(axis=1), key, 0)
        assert found.error <= unit_error_gram(removed(w, k, key), G) * (1 + 1e-12)


@SOME
@given(problem=problems(), data=st.data())
def test_bounds_from_the_tail_and_from_the_quasinorm_lie_above_in_this_order(problem, data):
    w, G, k = problem
    q = data.draw(st.floats(0.05, 0.99))
    scale = float(np.sqrt(np.diag(G).max()))
    # Rounding of cancelling moments keeps half the digits.
    room = 1e-6 * scale * np.abs(w).sum()
    for heavy in (None, data.draw(st.integers(0, k))):
        proved = reweight(w, G, k, heavy=heavy).bound
        by_tail = unit_error_resampled(w, k, scale=scale, heavy=heavy)
        try:
            by_norm = hilbert_sampling_bound(w, k, q=q, scale=scale, heavy=heavy)
        except OverflowError:
            by_norm = math.inf
        assert proved <= by_tail + room
        assert by_tail <= by_norm * (1 + 1e-9)


def test_no_smaller_bound_serves_one_pick_of_orthonormal_inputs():
    found = reweight(np.ones(200), np.eye(200), 1, heavy=0)
    assert 199 * 200 <= found.error**2 <= 199 * 200 * (1 + 1e-9)
    assert found.error > 0.999999 * found.bound
    assert found.error > 0.99 * unit_error_resampled(np.ones(200), 1, scale=1.0, heavy=0)


def test_equal_inputs_are_represented_by_any_one_of_them():
    w = np.array([3.0, 2.0, 1.0, 0.5])
    found = reweight(w, np.ones((4, 4)), 1)
    assert found.error < 1e-6
    assert found.weights.sum() == pytest.approx(6.5)
    assert unit_error_gram(removed(w, 1, w), np.ones((4, 4))) == pytest.approx(3.5)


def test_dropping_from_correlated_inputs_errs_by_a_share_of_the_tails_sum_whatever_is_kept():
    rng = np.random.default_rng(0)
    for rho in (0.1, 0.5, 1.0):
        w, G = rng.exponential(size=7) ** 2, equicorrelated(7, rho)
        for k in range(8):
            for kept in combinations(range(7), k):
                v = w.copy()
                v[list(kept)] = 0
                assert unit_error_gram(v, G) >= rho**0.5 * best_term_error(w, k, p=1.0)


@pytest.mark.parametrize("q", [0.4, 0.5])
def test_reweighting_reaches_the_rate_that_dropping_from_correlated_inputs_cannot(q):
    d, counts = 400, np.array([8, 16, 32, 64])
    w, G = np.arange(1, d + 1.0) ** (-1 / q), equicorrelated(d, 0.5)
    errors = [reweight(w, G, int(k), heavy=round(k * (2 - 2 * q) / (2 - q))).error for k in counts]
    dropped = [unit_error_gram(removed(w, k, w), G) for k in counts]
    fitted = [np.polyfit(np.log(counts), np.log(e), 1)[0] for e in (errors, dropped)]
    assert fitted[0] == pytest.approx(1 / 2 - 1 / q, abs=0.1)
    assert fitted[1] == pytest.approx(1 - 1 / q, abs=0.1)
    assert (np.array(errors) < dropped).all()


# --- invariances ----------------------------------------------------------------------------------------------------


@SOME
@given(problem=problems(), shift=st.sampled_from([-900, -40, 40, 900]), data=st.data())
def test_scaling_weights_or_inputs_by_powers_of_two_scales_the_answer(problem, shift, data):
    w, G, k = problem
    heavy = data.draw(st.one_of(st.none(), st.integers(0, k)))
    before = reweight(w, G, k, heavy=heavy)
    after = reweight(np.ldexp(w, shift), np.ldexp(G, 80), k, heavy=heavy)
    np.testing.assert_array_equal(after.picks, before.picks)
    np.testing.assert_allclose(after.weights, np.ldexp(before.weights, shift), rtol=1e-15)
    assert after.heavy == before.heavy
    assert after.error == pytest.approx(np.ldexp(before.error, shift + 40), rel=1e-12)
    assert after.bound == pytest.approx(np.ldexp(before.bound, shift + 40), rel=1e-12)


@SOME
@given(seed=seeds, d=st.integers(1, 12))
def test_order_and_common_signs_of_weights_and_inputs_do_not_matter(seed, d):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(20, d)) + rng.normal(size=(20, 1))  # no ties
    w, k = rng.normal(size=d), int(rng.integers(0, d + 1))
    turned, signs = rng.permutation(d), rng.choice([-1.0, 1.0], d)
    before = reweight(w, second_moments(X), k)
    after = reweight((w * signs)[turned], second_moments((X * signs)[:, turned]), k)
    np.testing.assert_allclose(after.weights, (before.weights * signs)[turned], rtol=1e-12)
    assert after.bound == pytest.approx(before.bound, rel=1e-6)


@SOME
@given(problem=problems(), repeats=st.integers(1, 4))
def test_entries_that_are_zero_and_inputs_that_are_dead_change_nothing(problem, repeats):
    w, G, k = problem
    d = w.size
    larger = np.zeros((d + 2 * repeats, d + 2 * repeats))
    larger[:d, :d] = G
    larger[d : d + repeats, d : d + repeats] = 2.0  # live inputs without weight
    weights = np.concatenate([w, np.zeros(repeats), np.full(repeats, 7.0)])  # and weights on dead inputs
    before, after = reweight(w, G, k, heavy=k // 2), reweight(weights, larger, k, heavy=k // 2)
    assume(before.picks.tolist() == after.picks.tolist())  # ties may turn on the order of sums
    assert not after.weights[d:].any()
    np.testing.assert_allclose(after.weights[:d], before.weights, rtol=1e-13)


# --- edges ----------------------------------------------------------------------------------------------------------


def test_nothing_retained_loses_everything_and_all_retained_nothing():
    w, G = np.array([1.0, -2.0, 3.0]), equicorrelated(3, 0.5)
    nothing, everything = reweight(w, G, 0), reweight(w, G, 3)
    assert not nothing.weights.any()
    assert nothing.error == pytest.approx(np.sqrt(w @ G @ w))
    assert everything.weights.tolist() == w.tolist()
    assert everything.error == everything.bound == 0


def test_zero_weights_and_zero_moments_have_no_error():
    for w, G in ((np.zeros(3), np.eye(3)), (np.ones(3), np.zeros((3, 3)))):
        found = reweight(w, G, 1)
        assert not found.weights.any()
        assert found.error == found.bound == 0
    assert reweight([2.0], [[1.0]], 1).weights.tolist() == [2.0]


def test_dead_inputs_do_not_take_a_place():
    G = np.diag([0.0, 1.0, 1.0])
    assert reweight([9.0, 2.0, 1.0], G, 2).weights.tolist() == [0.0, 2.0, 1.0]


def test_large_contributions_of_small_weights_are_found_by_the_search():
    w, G = np.array([10.0, 9.0, 1.0]), np.diag([1e-8, 1e-8, 1e6])
    assert reweight(w, G, 1).weights.tolist() == [0.0, 0.0, 1.0]
    assert reweight(w, G, 1, heavy=1).weights.tolist() == [10.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e300])
def test_weights_and_sums_hold_from_subnormal_to_huge(scale):
    w = np.array([7.0, 5.0, 3.0, 3.0, 1.0]) * scale
    for heavy in range(3):
        found = reweight(w, np.eye(5), 2, heavy=heavy)
        assert sum(map(abs, exact(found.weights))) <= sum(exact(w))
        assert exact_error(w, found.weights, np.eye(5)) <= Fraction(found.error) ** 2
        assert found.error <= found.bound


def test_entries_of_any_range_side_by_side():
    w = np.array([1e300, 1.0, 1e-300, -1e-300, 1e-310])
    for k in range(6):
        for heavy in (None, *range(k + 1)):
            try:
                found = reweight(w, equicorrelated(5, 0.5), k, heavy=heavy)
            except OverflowError:
                assert heavy == 0
                continue
            assert sum(map(abs, exact(found.weights))) <= sum(map(abs, exact(w)))
            assert exact_error(w, found.weights, equicorrelated(5, 0.5)) <= Fraction(found.error) ** 2


def test_a_weight_beyond_float64_is_refused():
    with pytest.raises(OverflowError, match="exceeds float64"):
        reweight(np.full(10, 1e308), np.eye(10), 1, heavy=0)


def test_progress_sees_every_number_of_heavy_entries_that_is_tried():
    seen = []
    found = reweight(
        np.arange(1.0, 20), equicorrelated(19, 0.5), 8, progress=lambda r: (seen.append(i) or i for i in r)
    )
    assert seen == list(range(len(seen)))
    assert len(seen) >= 9
    assert found.error == reweight(np.arange(1.0, 20), equicorrelated(19, 0.5), 8).error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": [1.0, 2.0]}, "gram has shape"),
        ({"w": [[1.0, 2.0, 3.0]]}, "w has 2 dimensions"),
        ({"w": [1.0, np.nan, 3.0]}, "w holds nan"),
        ({"w": ["a", "b", "c"]}, "w must be"),
        ({"gram": np.ones((2, 3))}, "gram has shape"),
        ({"gram": np.diag([1.0, np.inf, 1.0])}, "gram holds inf"),
        ({"gram": np.diag([1.0, -1.0, 1.0])}, "gram has a negative"),
        ({"gram": np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])}, "negative eigenvalue"),
        ({"gram": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"retained": 4}, "retained=4 is outside"),
        ({"retained": -1}, "retained=-1 is outside"),
        ({"retained": 1.0}, "retained must be a whole number"),
        ({"retained": True}, "retained must be a whole number"),
        ({"heavy": 3}, "heavy=3 is outside"),
        ({"heavy": -1}, "heavy=-1 is outside"),
        ({"heavy": "1"}, "heavy must be a whole number"),
        ({"entry_error": -1e-9}, "entry_error"),
        ({"entry_error": np.nan}, "entry_error"),
    ],
)
def test_reweight_refuses_bad_input_by_name(change, message):
    case = {"w": [1.0, 2.0, 3.0], "gram": np.eye(3), "retained": 2} | change
    with pytest.raises((TypeError, ValueError), match=message):
        reweight(**case)


# --- bounds before anything is measured -----------------------------------------------------------------------------


@SOME
@given(w=vectors(), scale=st.sampled_from([0.0, 1e-3, 1.0, 40.0]), data=st.data())
def test_resampled_bound_is_the_exact_one_rounded_up(w, scale, data):
    k = data.draw(st.integers(0, w.size))
    assume(np.abs(w).max() < 1e300)
    each = []
    for h in range(k + 1):
        exact_bound = mpf(scale) * oracles.best_term_error(w, h, 1.0) / mpf(max(k - h, 1)) ** 0.5
        bound = mpf(unit_error_resampled(w, k, scale=scale, heavy=h))
        assert exact_bound * (1 - mpf(10) ** -14) <= bound <= exact_bound * (1 + mpf(10) ** -11) + mpf(2) ** -1060
        each.append(float(bound))
    assert unit_error_resampled(w, k, scale=scale) == min(each)


@SOME
@given(w=vectors(families=MODERATE, nonzero=True), q=st.floats(0.1, 0.99), data=st.data())
def test_hull_bound_is_the_exact_one_rounded_up(w, q, data):
    k, n = data.draw(st.integers(0, w.size)), int(np.count_nonzero(w))
    norm, each = oracles.quasinorm(w, q), []
    for h in range(k + 1):
        constant = max((mpf(m - h) * mpf(m) ** (-1 / mpf(q)) for m in range(h + 1, n + 1)), default=mpf(0))
        exact_bound = constant * norm / mpf(max(k - h, 1)) ** 0.5
        bound = mpf(hilbert_sampling_bound(w, k, q=q, scale=1.0, heavy=h))
        assert exact_bound * (1 - mpf(10) ** -14) <= bound <= exact_bound * (1 + mpf(10) ** -9)
        each.append(float(bound))
    assert hilbert_sampling_bound(w, k, q=q, scale=1.0) == min(each)


@pytest.mark.parametrize(("q", "k"), [(0.5, 3), (0.5, 30), (2 / 3, 40), (0.8, 12), (0.9, 11)])
def test_hull_bound_is_twice_the_orthonormal_one_where_the_best_number_of_heavy_entries_is_whole(q, k):
    h = k * (2 - 2 * q) / (2 - q)
    assert h == pytest.approx(round(h))
    w = np.random.default_rng(k).exponential(size=2000) ** 4
    closed = 2 * stechkin_constant(q, 2.0) * k ** (1 / 2 - 1 / q) * float(lq_quasinorm(w, q))
    bound = hilbert_sampling_bound(w, k, q=q, scale=1.0, heavy=round(h))
    assert 0.98 * closed < bound <= closed * (1 + 1e-9)


@SOME
@given(q=st.floats(0.05, 0.95), k=st.integers(1, 100), seed=seeds)
def test_hull_bound_of_a_rounded_number_of_heavy_entries_is_near_the_closed_form(q, k, seed):
    ideal = k * (2 - 2 * q) / (2 - q)
    assume(ideal > 1)
    w = np.random.default_rng(seed).exponential(size=150) ** 4
    norm = math.exp(float(np.log(np.sum(w**q))) / q)
    closed = 2 * stechkin_constant(q, 2.0) * k ** (1 / 2 - 1 / q) * norm * (1 - 1 / ideal) ** (1 - 1 / q)
    assert hilbert_sampling_bound(w, k, q=q, scale=1.0) <= closed * (1 + 1e-9)


@SOME
@given(q=quasi_orders(), k=st.integers(1, 40))
def test_hull_bound_covers_the_resampled_tail_of_a_power_law(q, k):
    w = np.arange(1, 61.0) ** (-1 / max(q, 0.2))
    try:
        bound = hilbert_sampling_bound(w, k, q=q, scale=1.0)
    except OverflowError:
        return
    tails = best_term_errors(w, 1.0)[: k + 1] / np.sqrt(np.maximum(k - np.arange(k + 1), 1))
    assert tails.min() <= bound


def test_bounds_before_measuring_have_edges():
    for bound in (unit_error_resampled, lambda w, k, **options: hilbert_sampling_bound(w, k, q=0.5, **options)):
        assert bound(np.zeros(3), 1, scale=1.0) == 0
        assert bound([3.0], 1, scale=1.0) == 0
        assert bound([3.0, 4.0], 1, scale=0.0) == 0
        assert bound([3.0, 4.0], 0, scale=2.0) >= 14
        assert bound([5e-324, 5e-324], 1, scale=1.0) >= 5e-324
    with pytest.raises(OverflowError, match="exceeds float64"):
        hilbert_sampling_bound(np.ones(2000), 1, q=0.005, scale=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": [np.inf, 1.0]}, "w holds inf"),
        ({"w": [[1.0]]}, "dimensions"),
        ({"retained": 3}, "retained=3"),
        ({"retained": 1.0}, "retained must be"),
        ({"heavy": 2}, "heavy=2"),
        ({"scale": -1.0}, "scale=-1"),
        ({"scale": "1"}, "scale must be"),
    ],
)
def test_bounds_before_measuring_refuse_bad_input_by_name(change, message):
    case = {"w": [1.0, 2.0], "retained": 1, "scale": 1.0} | change
    for bound, options in ((unit_error_resampled, {}), (hilbert_sampling_bound, {"q": 0.5})):
        with pytest.raises((TypeError, ValueError), match=message):
            bound(**case, **options)


@pytest.mark.parametrize("q", [0.0, 1.0, 1.5, -1.0, np.nan, None])
def test_hull_bound_refuses_an_order_outside_zero_and_one(q):
    with pytest.raises((TypeError, ValueError), match="q"):
        hilbert_sampling_bound([1.0, 2.0], 1, q=q, scale=1.0)


def test_the_bound_covers_moments_that_are_off_by_the_stated_error():
    # Independent inputs of equal weight: every pick is as bad as the average, so the bound is attained on true moments.
    d, off = 5, 0.01
    said = np.eye(d) + off * (1 - np.eye(d))
    true = math.sqrt(d**2 - d)
    assert reweight(np.ones(d), said, 1, heavy=0).bound < true
    assert reweight(np.ones(d), said, 1, heavy=0, entry_error=off).bound >= true
