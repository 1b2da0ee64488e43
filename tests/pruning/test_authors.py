from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ellq
from ellq.pruning import BudgetError
from ellq.pruning.authors import diao2023, diao2023_budget, yang2022, yang2022_budget
from ellq.pruning.layers import Layers
from ellq.theory import effective_count, pq_index

RELAXED = settings(max_examples=30, deadline=None)
weights = st.one_of(st.just(0.0), st.floats(-4, 4, width=16), st.sampled_from([1.0, -1.0, 1e-200, 1e150]))
ORDERS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (1.0, 1.4)]


@st.composite
def arrays(draw, most_units=3, most_weights=6):
    shapes = draw(st.lists(st.tuples(st.integers(1, most_units), st.integers(1, most_weights)), min_size=1, max_size=3))
    return [draw(hnp.arrays(np.float64, shape, elements=weights)) for shape in shapes]


def open_layers(units) -> Layers:
    return Layers.of(units, least=0)


def vectors(units, scope):
    """The vectors of a scope, and for each layer and unit which it belongs to."""
    if scope == "unit":
        return [w for layer in units for w in layer]
    return [layer.ravel() for layer in units] if scope == "layer" else [np.concatenate([w.ravel() for w in units])]


def survivors(w, removed):
    """As the authors: sort, take the entry after the removed ones as pivot, remove what is strictly below."""
    alive = np.sort(np.abs(w[w != 0]))
    pivot = alive[removed] if alive.size else 0.0
    return int((alive >= pivot).sum())


def per_vector(counts, units, scope):
    if scope == "unit":
        return np.concatenate(counts).tolist()
    return [int(c.sum()) for c in counts] if scope == "layer" else [sum(int(c.sum()) for c in counts)]


SCOPES = st.sampled_from(["unit", "layer", "global"])


class TestYang2022KeepM:
    @RELAXED
    @given(arrays(), st.floats(0, 3), st.sampled_from([0.1, 0.5, 0.9]), SCOPES)
    def test_equals_its_formula(self, units, eta, q, scope):
        counts = yang2022(open_layers(units), eta, q=q, scope=scope).counts
        for w, kept in zip(vectors(units, scope), per_vector(counts, units, scope), strict=True):
            allowed = set()
            for error in (-1e-9, 1e-9):
                m = float(effective_count(w, q, 1.0)) * (1 + eta) ** (-1 / (1 - q)) if w.any() else 0.0
                alive = int(np.count_nonzero(w))
                m = min(max(math.ceil(m * (1 + error)), 1), alive) if alive else 0
                allowed.add(survivors(w, alive - m) if alive else 0)
            assert kept in allowed

    @pytest.mark.parametrize("q", [0.1, 0.3, 0.5, 0.9])
    def test_keeps_all_equal_weights_and_none_of_the_zeros(self, q):
        units = np.where(np.arange(60) < np.arange(61)[:, None], -0.3, 0.0)
        assert yang2022(open_layers([units]), 0.0, q=q).counts[0].tolist() == list(range(61))

    def test_weights_equal_to_the_smallest_that_stays_survive(self):
        # N_{½,1} = (Σ√w)²/Σw = 36/12 = 3: the cut lies among the ones, and all three of them stay.
        w = np.array([[9.0, 1.0, 1.0, 1.0]])
        assert float(effective_count(w[0], 0.5, 1.0)) == pytest.approx(3.0)
        assert yang2022(open_layers([w]), 0.0).counts[0].tolist() == [4]
        assert yang2022(open_layers([w]), 10.0).counts[0].tolist() == [1]

    def test_is_the_authors_formula_on_their_net(self):
        rng = np.random.default_rng(0)
        units = [rng.standard_t(3, shape) for shape in [(128, 784), (128, 128), (10, 128)]]
        everything = np.concatenate([w.ravel() for w in units])
        d, q = everything.size, 0.5
        assert d == 118016
        S = np.mean(np.abs(everything)) / np.mean(np.abs(everything) ** q) ** (1 / q)
        m = math.ceil(d * S ** (-q / (1 - q)))
        counts = yang2022(open_layers(units), 0.0, q=q, scope="global").counts
        assert sum(int(c.sum()) for c in counts) == m
        # The next round looks at the survivors only, and removes a larger share of what is left if that is sparser.
        for scope, expected in (("layer", [w.size for w in units]), ("unit", None)):
            own = yang2022(open_layers(units), 0.0, q=q, scope=scope).counts
            for w, kept in zip(units, own, strict=True):
                if expected is not None:
                    S = np.mean(np.abs(w)) / np.mean(np.sqrt(np.abs(w))) ** 2
                    assert int(kept.sum()) == math.ceil(w.size / S)

    @pytest.mark.parametrize("q", [0.2, 0.5])
    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_an_index_over_all_weights_counts_the_removed_ones_too(self, q, scope):
        w = np.random.default_rng(0).standard_t(3, (10, 100))
        w[:, 40:] = 0.0
        S = np.mean(np.abs(w)) / np.mean(np.abs(w) ** q) ** (1 / q)
        counts = yang2022(open_layers([w]), 0.0, q=q, over="all", scope=scope).counts[0]
        assert counts.sum() == math.ceil(400 * S ** (-q / (1 - q)))
        survivors_only = yang2022(open_layers([w]), 0.0, q=q, scope=scope).counts[0]
        assert abs(counts.sum() - 0.4 * survivors_only.sum()) <= 1

    def test_the_logged_runaway_is_of_an_index_over_all_weights(self):
        # S is the ratio of successive counts. Over the survivors it would be S·d/D, that of a trained net throughout.
        logged = np.array([118016, 83363, 48302, 17712, 2477, 45])
        S = logged[:-1] / logged[1:]
        over_survivors = S * logged[:-1] / logged[0]
        assert (np.diff(S) > 0).all()
        assert S[-1] > 50
        assert ((over_survivors > 1.05) & (over_survivors < 1.45)).all()

    @RELAXED
    @given(arrays(), st.tuples(st.floats(0, 5), st.floats(0, 5)))
    def test_keeps_no_more_for_a_larger_eta(self, units, etas):
        few, many = (yang2022(open_layers(units), eta).counts for eta in sorted(etas, reverse=True))
        assert all((a <= b).all() for a, b in zip(few, many, strict=True))

    @pytest.mark.parametrize("scope", ["unit", "layer", "global"])
    def test_solves_for_the_least_eta(self, scope):
        units = [np.random.default_rng(1).standard_normal((20, 30)), np.random.default_rng(2).standard_normal((5, 40))]
        layers = open_layers(units)
        decided = yang2022_budget(layers, 250, scope=scope)
        eta = float(decided.reasons[0].partition("η = ")[2].partition(" ")[0])
        total = sum(int(c.sum()) for c in decided.counts)
        assert 240 < total <= 250
        assert sum(int(c.sum()) for c in yang2022(layers, eta * (1 - 1e-2), scope=scope).counts) >= total
        assert sum(int(c.sum()) for c in yang2022(layers, eta * (1 + 1e-2), scope=scope).counts) <= total

    @pytest.mark.parametrize("rule", [yang2022_budget, diao2023_budget])
    @pytest.mark.parametrize(
        ("scope", "retained", "says"),
        [
            ("unit", 4, r"4 weights for 6 units, each of which keeps at least 1: .* unit 1 of 'layer 1'\."),
            ("layer", 1, r"1 weights for 2 layers, each of which keeps at least 1: .* for layer 'layer 1'\."),
            ("global", 0, r"0 weights for the model, which keeps at least 1\."),
        ],
    )
    def test_a_budget_below_one_weight_a_vector_is_refused_with_the_vector(self, rule, scope, retained, says):
        units = np.split(np.geomspace(1, 1e6, 24).reshape(6, 4), 2)
        with pytest.raises(BudgetError, match=says) as refused:
            rule(open_layers(units), retained, scope=scope)
        if rule is yang2022_budget:
            assert refused.value.nearest == {"unit": 6, "layer": 2, "global": 1}[scope]
        else:  # which comes to a stop before
            assert refused.value.nearest == {"unit": 24, "layer": 10, "global": 5}[scope]


class TestCapped:
    @RELAXED
    @given(arrays(), st.sampled_from([1.0, 3.0, 5.0, 7.0, 9.0]), st.sampled_from([0.2, 0.5, 0.8]), SCOPES)
    def test_equals_its_formula(self, units, c, q, scope):
        counts = yang2022(open_layers(units), 0.0, q=q, variant="capped", c=c, scope=scope).counts
        for w, kept in zip(vectors(units, scope), per_vector(counts, units, scope), strict=True):
            d = int(np.count_nonzero(w))
            allowed = set()
            for error in (-1e-9, 1e-9):
                m = min(math.ceil(float(effective_count(w, q, 1.0)) * (1 + error)), d) if d else 0
                allowed.add(survivors(w, math.floor(d * min(c * (1 - m / d), 0.9) + 1e-9)) if d else 0)
            assert kept in allowed

    def test_never_removes_more_than_nine_tenths(self):
        w = np.concatenate([[1e6], np.random.default_rng(0).random(99)])[None]
        assert yang2022(open_layers([w]), 0.0, variant="capped", c=9).counts[0].tolist() == [10]
        assert yang2022(open_layers([w]), 0.0, variant="capped", c=9, beta=0.5).counts[0].tolist() == [50]

    def test_takes_m_at_eta_zero_only(self):
        with pytest.raises(ValueError, match="tol=0"):
            yang2022(open_layers([np.ones((2, 3))]), 0.5, variant="capped")


class TestDiao2023:
    def test_at_one_half_and_one_the_removed_share_is_the_index(self):
        # (Σ√w)²/Σw = (1 + 2 + 3 + 4)²/30 = 10/3 of d = 4, so I = 1 − (10/3)/4 = 1/6 and r/d = 5/6.
        w = np.array([1.0, 4.0, 9.0, 16.0])
        assert float(pq_index(w, 0.5, 1.0)) == pytest.approx(1 / 6)
        many = np.tile(w, (1, 30)) * (1 + 1e-15 * np.arange(120))
        assert float(pq_index(many[0], 0.5, 1.0)) == pytest.approx(1 / 6, rel=1e-6)
        assert diao2023(open_layers([many]), 0.0).counts[0].tolist() == [100]

    def test_at_one_and_two_the_kept_share_is_the_square(self):
        # ‖w‖_1²/‖w‖_2² = 100/30 of d = 4: (1 − I)² = (10/3)/4 = 5/6 too.
        many = np.tile(np.array([1.0, 2.0, 3.0, 4.0]), (1, 30)) * (1 + 1e-15 * np.arange(120))
        assert diao2023(open_layers([many]), 0.0, p=1.0, q=2.0).counts[0].tolist() == [100]

    def test_eta_gamma_and_beta_as_in_the_formula(self):
        many = np.tile(np.array([1.0, 4.0, 9.0, 16.0]), (1, 30)) * (1 + 1e-15 * np.arange(120))
        # η = 1 at (½, 1): r = 100·2^−2 = 25.
        assert diao2023(open_layers([many]), 1.0).counts[0].tolist() == [25]
        assert diao2023(open_layers([many]), 0.0, gamma=3.0).counts[0].tolist() == [60]
        assert diao2023(open_layers([many]), 0.0, gamma=9.0).counts[0].tolist() == [12]
        assert diao2023(open_layers([many]), 0.0, gamma=9.0, beta=0.5).counts[0].tolist() == [60]

    @RELAXED
    @given(arrays(), st.sampled_from(ORDERS), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([1.0, 3.0]), SCOPES)
    def test_equals_its_formula(self, units, orders, eta, gamma, scope):
        p, q = orders
        counts = diao2023(open_layers(units), eta, p=p, q=q, gamma=gamma, scope=scope).counts
        for w, kept in zip(vectors(units, scope), per_vector(counts, units, scope), strict=True):
            alive = w[w != 0]
            d = alive.size
            if not d:
                assert kept == 0
                continue
            share = (1 + eta) ** (-q / (q - p)) * (1 - float(pq_index(alive, p, q))) ** (p * q / (q - p))
            allowed = set()
            for error in (-1e-9, 1e-9):
                r = min(max(math.ceil(d * share * (1 + error)), 1), d)
                allowed.add(survivors(w, math.floor(d * min(gamma * (1 - r / d), 0.9) + 1e-9)))
            assert kept in allowed

    def test_whole_layers_may_go_by_the_global_scope(self):
        units = [np.full((2, 50), 1e-6), np.random.default_rng(0).random((2, 50)) + 0.5]
        assert diao2023(open_layers(units), 0.0, gamma=3.0, scope="global").counts[0].tolist() == [0, 0]

    def test_an_asked_minimum_stays_all_the_same(self):
        units = [np.full((2, 50), 1e-6), np.random.default_rng(0).random((2, 50)) + 0.5]
        assert diao2023(Layers.of(units, least=2), 0.0, gamma=3.0, scope="global").counts[0].tolist() == [2, 2]

    def test_a_zero_unit_keeps_nothing_and_an_even_one_everything(self):
        assert diao2023(open_layers([np.array([[0.0] * 9, [2.0] * 9])]), 0.0, scope="unit").counts[0].tolist() == [0, 9]


class TestDiao2023Budget:
    @pytest.mark.parametrize("scope", ["unit", "layer", "global"])
    @pytest.mark.parametrize("retained", [2990, 2000, 600])
    def test_repeats_rounds_until_just_enough_went(self, scope, retained):
        rng = np.random.default_rng(0)
        units = [rng.standard_t(3, (10, 200)), rng.standard_t(3, (5, 200))]
        decided = diao2023_budget(open_layers(units), retained, scope=scope)
        total = sum(int(c.sum()) for c in decided.counts)
        assert retained - 15 <= total <= retained

    def test_of_one_round_is_that_round(self):
        rng = np.random.default_rng(0)
        layers = open_layers([rng.standard_t(3, (10, 200))])
        once = diao2023(layers, 0.0, scope="layer").counts[0]
        again = diao2023_budget(layers, int(once.sum()), scope="layer")
        assert again.counts[0].tolist() == once.tolist()
        assert "1 round by layer" in again.reasons[0]

    def test_removes_equal_weights_together_where_some_of_them_must_go(self):
        decided = diao2023_budget(open_layers([np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 9.0]])]), 5)
        assert decided.counts[0].tolist() == [1]

    @pytest.mark.parametrize(
        ("scope", "stuck"),
        [("unit", r"unit 1 of 'layer 1'"), ("layer", "layer 'layer 1'"), ("global", "the model")],
    )
    def test_says_when_and_where_it_comes_to_a_stop(self, scope, stuck):
        ones = [np.array([[1.0, 0.0]]), np.array([[0.0] * 10, [1.0] * 10, [1.0] * 10])]
        says = rf"comes to a stop at 21 weights, above the 10 asked for, where all that survives of {stuck} counts"
        with pytest.raises(BudgetError, match=says) as refused:
            diao2023_budget(open_layers(ones), 10, scope=scope)
        assert refused.value.nearest == 21


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([yang2022_budget, diao2023_budget]),
    st.lists(hnp.arrays(np.float64, (2, 6), elements=st.sampled_from([0, 1, 1, 2, 2, 9])), min_size=1, max_size=2),
    SCOPES,
    st.integers(0, 20),
)
def test_a_budget_is_kept_with_equal_weights_too_or_the_nearest_can_be_met(rule, units, scope, retained):
    try:
        found = rule(open_layers(units), retained, scope=scope)
    except BudgetError as error:
        refused, retained = retained, int(error.nearest)
        assert refused < retained
        found = rule(open_layers(units), retained, scope=scope)
    assert sum(int(c.sum()) for c in found.counts) <= retained


@pytest.mark.parametrize(
    ("rule", "arguments", "says"),
    [
        (yang2022, {"q": 1.0}, "q=1 is outside"),
        (yang2022, {"variant": "keep"}, "variant='keep' is unknown. Choose one of 'keep-m', 'capped'"),
        (yang2022, {"scope": "neuron"}, "scope='neuron' is unknown. Choose one of 'unit', 'layer', 'global'"),
        (diao2023, {"p": 1.0, "q": 1.0}, "p=1 is not below q=1"),
        (diao2023, {"gamma": 0.0}, "gamma=0 removes nothing"),
        (diao2023, {"gamma": -1.0}, "gamma=-1"),
        (diao2023, {"beta": 1.0}, "beta=1 is outside"),
        (diao2023, {"scope": "row"}, "scope='row'"),
    ],
)
def test_settings_out_of_range_are_refused(rule, arguments, says):
    with pytest.raises(ValueError, match=says):
        rule(open_layers([np.ones((2, 3))]), 0.0, **arguments)


@pytest.mark.parametrize("rule", ["yang2022", "diao2023"])
def test_a_budget_knows_no_minimum_of_units(rule):
    net = torch.nn.Sequential(torch.nn.Linear(20, 8))
    with pytest.raises(ValueError, match="knows no least="):
        ellq.plan(net, rule=rule, nonzeros=80, least=2)


def test_numpy_settings_are_written():
    net = torch.nn.Sequential(torch.nn.Linear(20, 8))
    made = ellq.plan(net, rule="synflow", rounds=np.int64(2), sparsity=0.5)
    assert ellq.Plan.from_json(made.to_json()).settings["rounds"] == 2
