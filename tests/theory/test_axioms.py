from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ellq.theory import measures
from ellq.theory.axioms import (
    CRITERIA,
    VECTOR_MEASURES,
    Counterexample,
    VectorMeasure,
    axioms_table,
    counterexamples_table,
)
from strategies import MODERATE, vectors

TEXT = (Path(__file__).parents[2] / "docs" / "measures.md").read_text(encoding="utf-8")
CLAIMS = [(row, id) for row in VECTOR_MEASURES for id in CRITERIA if id not in row.fails]
FAILURES = [(row, id) for row in VECTOR_MEASURES for id in row.fails]


def named(claims):
    return pytest.mark.parametrize(("row", "id"), claims, ids=[f"{row.name} {row.orders} {id}" for row, id in claims])


def row_of(name, orders=""):
    return next(row for row in VECTOR_MEASURES if (row.name, row.orders) == (name, orders))


def random_pairs(id, rng, cases):
    """Pairs of a criterion over well separated entries, as two matrices of vectors."""
    d = int(rng.integers(4, 9))
    pairs = []
    while len(pairs) < cases:
        w = rng.choice(np.arange(1.0, 40.0), size=d, replace=False) * rng.choice([0.2, 1.0, 5.0], size=d)
        i, j = rng.permutation(d)[:2]
        if abs(w[i] - w[j]) < 0.1 * max(w[i], w[j]):
            continue
        w *= rng.choice([-1.0, 1.0], size=d)
        pairs.append(CRITERIA[id].pair(w, int(i), int(j), float(rng.choice([0.1, 0.5, 0.7, 1.0]))))
    return tuple(np.stack(side) for side in zip(*pairs, strict=True))


# --- what is claimed to hold ----------------------------------------------------------------------------------------


@named(CLAIMS)
def test_no_random_case_breaks_a_claim(row, id):
    rng = np.random.default_rng(sum(map(ord, row.name + id)))
    for _ in range(10):
        pair = random_pairs(id, rng, 100)
        for example in row.examples:
            assert row.meets(CRITERIA[id], pair, example), (example, pair)


@named(CLAIMS)
@settings(max_examples=30, deadline=None)
@given(w=vectors(min_size=3, families=MODERATE, nonzero=True), amount=st.floats(1e-6, 1), data=st.data())
def test_no_case_of_any_family_turns_a_claim_round(row, id, w, amount, data):
    # Differences may be too small to see here, and the change may do nothing; but never the wrong way round.
    assume(np.count_nonzero(w) > 2)
    i, j = data.draw(st.tuples(*[st.integers(0, w.size - 1)] * 2))
    if id == "D2":
        amount = 2.0 ** -round(50 * amount)  # exact: rounded entries are others, which a near tie shows
    first, second = CRITERIA[id].pair(w / np.abs(w).max(), i, j, amount)
    for example in row.examples:
        if CRITERIA[id].is_strict:
            swapped = row.meets(CRITERIA[id], (second, first), example)
            assert not swapped, (example, first, second)
        else:
            assert row.meets(CRITERIA[id], (first, second), example), (example, first, second)


# --- what is claimed to fail ----------------------------------------------------------------------------------------


@named(FAILURES)
def test_every_counterexample_is_one_for_all_the_orders_named(row, id):
    found = row.fails[id]
    for example in row.examples:
        assert not row.meets(CRITERIA[id], (found.sparser, found.evener), example), example


@named(FAILURES)
def test_every_counterexample_is_a_pair_of_the_criterion(row, id):
    found = row.fails[id]
    sparser, evener = np.array(found.sparser), np.array(found.evener)
    before = evener if id == "P2" else sparser
    after = sparser if id == "P2" else evener
    if id == "D1":
        moved = np.flatnonzero(before != after)
        low, high = sorted(moved, key=lambda i: before[i])
        assert len(moved) == 2
        assert sparser.sum() == pytest.approx(evener.sum(), rel=1e-15)
        assert before[low] < after[low] <= after[high] < before[high]
    elif id in ("D2", "D3"):
        change = after / before if id == "D2" else after - before
        assert change[0] > 0
        assert (change == change[0]).all()
        assert id == "D2" or len(set(before)) > 1
    elif id == "D4":
        np.testing.assert_array_equal(after, np.tile(before, 2))
    elif id == "P1":
        assert (sparser != evener).tolist() == [True, False]
        assert sparser[0] > evener[0] > evener[1] > 0
    else:
        np.testing.assert_array_equal(after, [*before, 0.0])


@named([(row, id) for row, id in FAILURES if id == "P1"])
@pytest.mark.parametrize("raised", [1e1, 1e3, 1e6, 1e9])
def test_growing_an_entry_never_helps_however_large_it_is(row, id, raised):
    for example in row.examples:
        for more in (1.001, 2.0, 100.0):
            assert not row.meets(CRITERIA[id], (np.array([more * raised, 1.0]), np.array([raised, 1.0])), example)


@named([(row, id) for row, id in FAILURES if row.fails[id].remark == "equal for every vector"])
@settings(max_examples=30, deadline=None)
@given(w=vectors(min_size=3, families=MODERATE, nonzero=True))
def test_an_appended_zero_is_not_seen(row, id, w):
    assume(np.count_nonzero(w) > 2)
    first, second = CRITERIA[id].pair(w / np.abs(w).max(), 0, 0, 1.0)
    for example in row.examples:
        assert not row.meets(CRITERIA[id], (first, second), example)
        assert not row.meets(CRITERIA[id], (second, first), example)


def test_hoyers_sparseness_misses_an_appended_zero_only_for_one_non_zero_entry():
    hoyer, babies = row_of("hoyer", "d ≥ 2"), CRITERIA["P2"]
    rng = np.random.default_rng(0)
    for _ in range(300):
        w = rng.integers(0, 4, size=rng.integers(2, 8)).astype(float)
        if np.count_nonzero(w):
            assert hoyer.meets(babies, babies.pair(w, 0, 0, 1.0), {}) == (np.count_nonzero(w) > 1)


@pytest.mark.parametrize("q", [0.05, 0.2, 0.5, 1.0, 4.0])
def test_the_weak_quasinorm_misses_transfers_beside_a_large_entry_at_every_order(q):
    weak = row_of("weak_quasinorm", "0 < q < ∞")
    large = 2 * 3.0 ** (1 / q)
    assert not weak.meets(CRITERIA["D1"], ([large, 2.0, 1.0], [large, 1.5, 1.5]), {"q": q})


def test_the_share_of_the_effective_count_meets_what_the_count_does_not():
    for p, q in ((0.5, 1.0), (1.0, 2.0)):
        w = np.array([5.0, 2.0, 1.0])
        share = [float(measures.effective_count(v, p, q)) / len(v) for v in (w, np.tile(w, 2), [*w, 0.0])]
        assert share[1] == pytest.approx(share[0])
        assert share[2] < share[0]


# --- negative controls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", list(CRITERIA))
def test_random_cases_catch_a_measure_that_meets_nothing(id):
    norm, counted = row_of("lq_quasinorm", "1 ≤ q < ∞"), row_of("l0_count")
    row, example = (counted, {}) if id == "D3" else (norm, {"q": 2.0})
    assert not row.meets(CRITERIA[id], random_pairs(id, np.random.default_rng(0), 100), example)


def test_random_transfers_find_that_robin_hood_fails_for_orders_above_one():
    above = row_of("pq_index", "1 < p < q")
    pair = random_pairs("D1", np.random.default_rng(0), 2000)
    broken = [not above.meets(CRITERIA["D1"], one, {"p": 1.5, "q": 2.0}) for one in zip(*pair, strict=True)]
    assert 0 < sum(broken) < 2000


def test_a_nan_meets_no_criterion():
    gini = row_of("gini")
    zeros = np.zeros(3), np.zeros(3)
    assert not any(gini.meets(criterion, zeros, {}) for criterion in CRITERIA.values())


def test_infinite_scores_are_compared():
    tail = row_of("tail_index", "1 ≤ k < #non-zeros")
    flat, steep = np.array([2.0, 2.0, 2.0]), np.array([4.0, 2.0, 1.0])
    assert tail.meets(CRITERIA["P1"], (steep, flat), {"k": 1})
    assert not tail.meets(CRITERIA["P1"], (flat, steep), {"k": 1})
    assert tail.meets(CRITERIA["D2"], (flat, 2 * flat), {"k": 1})


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "table"), [("axioms", axioms_table), ("counterexamples", counterexamples_table)])
def test_the_documentation_shows_the_table(name, table):
    begin, end = TEXT.index(f"<!-- {name} -->") + len(f"<!-- {name} -->"), TEXT.index(f"<!-- /{name} -->")
    assert TEXT[begin:end].strip() == table().strip()


def test_every_measure_of_vectors_has_a_row():
    public = {name for name, value in vars(measures).items() if hasattr(value, "__wrapped__")}
    assert {row.name for row in VECTOR_MEASURES} == public - {"is_softly_sparse"}


def test_the_table_is_frozen():
    with pytest.raises(AttributeError):
        VECTOR_MEASURES[0].name = "other"
    with pytest.raises(AttributeError):
        Counterexample((1.0,), (1.0,)).remark = "other"
    with pytest.raises(TypeError):
        VectorMeasure("gini", "", "larger").fails["D1"] = Counterexample((1.0,), (1.0,))


# --- the changes ----------------------------------------------------------------------------------------------------


def test_each_criterion_changes_a_vector_as_it_says():
    pairs = {id: criterion.pair([4.0, -2.0, 1.0], 0, 2, 0.5) for id, criterion in CRITERIA.items()}
    expected = {
        "D1": ([4.0, 2.0, 1.0], [3.25, 2.0, 1.75]),
        "D2": ([4.0, 2.0, 1.0], [2.0, 1.0, 0.5]),
        "D3": ([4.0, 2.0, 1.0], [6.0, 4.0, 3.0]),
        "D4": ([4.0, 2.0, 1.0], [4.0, 2.0, 1.0, 4.0, 2.0, 1.0]),
        "P1": ([12.0, 2.0, 1.0], [8.0, 2.0, 1.0]),
        "P2": ([4.0, 2.0, 1.0, 0.0], [4.0, 2.0, 1.0]),
    }
    for id, (sparser, evener) in expected.items():
        np.testing.assert_array_equal(pairs[id][0], sparser)
        np.testing.assert_array_equal(pairs[id][1], evener)


def test_robin_hood_takes_from_the_larger_entry_whichever_comes_first():
    forth, back = (CRITERIA["D1"].pair([1.0, 5.0], *entries, 1.0)[1] for entries in ((0, 1), (1, 0)))
    np.testing.assert_array_equal(forth, [3.0, 3.0])
    np.testing.assert_array_equal(back, forth)
    np.testing.assert_array_equal(CRITERIA["D1"].pair([1.0, 5.0], 1, 1, 1.0)[1], [1.0, 5.0])


@pytest.mark.parametrize("id", list(CRITERIA))
def test_a_change_leaves_its_vector_alone(id):
    w = np.array([1.0, 3.0])
    CRITERIA[id].pair(w, 0, 1, 0.5)
    np.testing.assert_array_equal(w, [1.0, 3.0])


def test_entries_and_amounts_outside_are_refused():
    for entry, other, amount in ((2, 0, 0.5), (0, -1, 0.5), (0, 1, 0.0), (0, 1, 1.5)):
        with pytest.raises(ValueError, match=r"entry=2|other=-1|amount="):
            CRITERIA["D1"].pair([1.0, 2.0], entry, other, amount)
    with pytest.raises(TypeError, match="entry"):
        CRITERIA["D1"].pair([1.0, 2.0], 0.5, 1, 0.5)


def test_ids_are_in_the_order_of_the_paper():
    assert list(CRITERIA) == ["D1", "D2", "D3", "D4", "P1", "P2"]
    assert all(criterion.id == id and criterion.sentence.endswith(".") for id, criterion in CRITERIA.items())
    assert all(first.name != second.name for first, second in pairwise(CRITERIA.values()))
