"""The numbers of docs/errata.md, in whole numbers, fractions and balls."""

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
from flint import arb, ctx, fmpq

from ellq.theory import pq_index

TEXT = (Path(__file__).parents[2] / "docs" / "errata.md").read_text(encoding="utf-8")


# --- 1. the PQ index and Robin Hood ---------------------------------------------------------------------------------

FOURTH_POWERS = [158**4, 59**4, *[1] * 1000], [134**4, 133**4, *[1] * 1000]
TRANSFERS = [
    ("3/2", "2", ["100", "2", "1"], ["100", "1.5", "1.5"]),
    ("3/2", "2", ["100", "2", "1"], ["100", "1.6", "1.4"]),
    ("2", "4", ["100", "2", "1"], ["100", "1.5", "1.5"]),
    ("1/4", "1/2", ["2", "1", *["0.01"] * 50], ["1.5", "1.5", *["0.01"] * 50]),
    ("1/4", "1/2", *FOURTH_POWERS),
]


def evenness(w, p, q):
    """1 − I of fractions, as a ball."""
    p, q = (arb(fmpq(s.numerator, s.denominator)) for s in (Fraction(p), Fraction(q)))
    entries = [arb(fmpq(x.numerator, x.denominator)) for x in map(Fraction, w)]
    means = [(sum((x**s for x in entries), arb(0)) / len(entries)) ** (1 / s) for s in (p, q)]
    return means[0] / means[1]


@pytest.fixture(autouse=True)
def _two_hundred_bits():
    old, ctx.prec = ctx.prec, 200
    yield
    ctx.prec = old


@pytest.mark.parametrize(("p", "q", "before", "after"), TRANSFERS)
def test_a_transfer_raises_the_pq_index(p, q, before, after):
    before, after = [Fraction(x) for x in before], [Fraction(x) for x in after]
    assert sum(before) == sum(after)
    (rich, less), (poor, more) = sorted(((a, b) for a, b in zip(before, after, strict=True) if a != b), reverse=True)
    assert poor < more <= less < rich
    assert evenness(after, p, q) < evenness(before, p, q)


@pytest.mark.parametrize(("p", "q", "before", "after"), TRANSFERS)
def test_the_printed_values_are_those_of_the_exact_index_and_of_ours(p, q, before, after):
    row = re.search(rf"(?m)^\| {p}, {q} \| .*{_printed(after)} \| (\S+) \| (\S+) \|$", TEXT)
    for w, printed in zip((before, after), row.groups(), strict=True):
        assert abs(1 - evenness(w, p, q) - arb(printed)) < arb("5.1e-7")
        ours = float(pq_index([float(Fraction(x)) for x in w], float(Fraction(p)), float(Fraction(q))))
        assert ours == pytest.approx(float(printed), abs=5.1e-7)


def _printed(w):
    if len(w) == 3:
        return re.escape(f"({', '.join(w)})")
    return re.escape("(1.5, 1.5, 0.01 ×50)" if w[0] == "1.5" else "(134⁴, 133⁴, 1 ×1000)")


def test_the_counterexample_for_two_and_four_in_fractions():
    before, after = [100, 2, 1], [100, Fraction(3, 2), Fraction(3, 2)]
    ratio = [Fraction(sum(x**2 for x in w)) ** 2 / sum(x**4 for x in w) for w in (before, after)]
    assert ratio[1] < ratio[0]


def test_the_counterexample_for_a_quarter_and_a_half_in_whole_numbers():
    before, after = FOURTH_POWERS
    assert sum(before) == sum(after)
    roots = [[math.isqrt(math.isqrt(x)) for x in w] for w in (before, after)]
    assert all(root**4 == x for w, v in zip((before, after), roots, strict=True) for x, root in zip(w, v, strict=True))
    ratio = [Fraction(sum(v) ** 2, sum(x**2 for x in v)) for v in roots]
    assert ratio[1] < ratio[0]


@pytest.mark.parametrize(("p", "q"), [("5/4", "4/3"), ("3/2", "2"), ("2", "3"), ("3", "12"), ("11/10", "6/5")])
def test_above_one_every_pair_of_orders_has_a_counterexample(p, q):
    # As in the proof: (x, 2, 1) with x large, the last two levelled.
    x = Fraction(10**9)
    assert evenness([x, Fraction(3, 2), Fraction(3, 2)], p, q) < evenness([x, 2, 1], p, q)


@pytest.mark.parametrize(("p", "q"), [("1/4", "1/2"), ("1/2", "3/4"), ("1/10", "9/10"), ("2/3", "3/4")])
def test_below_one_every_pair_of_orders_has_a_counterexample(p, q):
    # (2, 1) beside m entries ε, the two levelled; the sums are taken without listing the m entries.
    p, q = Fraction(p), Fraction(q)
    orders = [arb(fmpq(s.numerator, s.denominator)) for s in (p, q)]
    change = [2 * arb("1.5") ** s - arb(2) ** s - 1 for s in orders]
    threshold = (orders[0] * change[1] / (orders[1] * change[0])) ** (1 / (orders[1] - orders[0]))
    small, many = threshold / 2, arb(10) ** 40

    def log_ratio(first, second):
        logs = [(first**s + second**s + many * small**s).log() / s for s in orders]
        return logs[0] - logs[1]

    ctx.prec = 600
    assert log_ratio(arb("1.5"), arb("1.5")) < log_ratio(arb(2), arb(1))
    small = 2 * threshold  # and not far above the threshold, with as many entries
    assert log_ratio(arb("1.5"), arb("1.5")) > log_ratio(arb(2), arb(1))


@pytest.mark.parametrize(("p", "q"), [("1/2", "1"), ("1", "2"), ("1/3", "3")])
def test_between_the_same_transfers_lower_the_index(p, q):
    for _, _, before, after in TRANSFERS:
        assert evenness(after, p, q) > evenness(before, p, q)


# --- 2. two gaps in a proof -----------------------------------------------------------------------------------------


def test_keeping_and_sampling_may_take_two_m_minus_one_terms():
    # q = ½, t = 1, so ‖θ‖_q ≤ t reads Σ√θ ≤ 1; the square roots are fractions.
    m, roots = 4, [Fraction(4, 15)] * 3 + [Fraction(1, 25)] * 5
    assert sum(roots) == 1
    theta = [root**2 for root in roots]
    assert theta == [Fraction(16, 225)] * 3 + [Fraction(1, 625)] * 5
    threshold = Fraction(1, m**2)
    kept, rest = [x for x in theta if x > threshold], [x for x in theta if x <= threshold]
    assert threshold == Fraction(1, 16)
    assert len(kept) == m - 1
    assert sum(rest) <= Fraction(1, m)  # D = t·m^(1−1/q)
    assert len(kept) + m == 2 * m - 1 > m
    hit = rest[0] * m  # each sample is a given one of the rest with probability |θ_j|/D, D = 1/m
    assert math.perm(len(rest), m) * hit**m == 120 * Fraction(4, 625) ** 4 > 0
    assert "120·(4/625)⁴" in TEXT
    assert f"{2 ** (1 / 0.5 - 1 / 2):.2f} for q = ½, r = 2" in TEXT


def test_samples_of_weight_d_over_m_may_exceed_the_radius():
    m, theta = 2, [Fraction(81, 100), Fraction(1, 100)]
    assert sum(Fraction(math.isqrt(x.numerator), math.isqrt(x.denominator)) for x in theta) == 1
    assert [x > Fraction(1, m**2) for x in theta] == [True, False]
    mass = Fraction(1, m)
    hit = theta[1] / mass  # a sample is of the second coefficient with this probability, else nothing
    assert hit**m == Fraction(1, 2500)
    assert theta[0] + m * (mass / m) > 1
    assert "1/2500" in TEXT


# --- 3. keep m, zeros beside survivors -------------------------------------------------------------------------------

LOGGED = [118016, 83363, 48302, 17712, 2477, 45]


def test_the_logged_indices_times_the_fraction_of_survivors_are_those_of_trained_nets():
    indices = [Fraction(d, m) for d, m in itertools.pairwise(LOGGED)]
    over_survivors = [index * Fraction(d, LOGGED[0]) for index, d in zip(indices, LOGGED, strict=False)]
    assert " → ".join(map(str, LOGGED)) in TEXT
    for (d, m), index in zip(itertools.pairwise(LOGGED), indices, strict=True):
        assert f"{d}/{m} = {float(index):#.4g}" in TEXT
    told = ", ".join(f"{float(index):#.4g}" for index in over_survivors)
    assert told in " ".join(TEXT.split())
    assert all(1 <= index < Fraction(3, 2) for index in over_survivors)


@pytest.mark.parametrize("zeros", [0, 7, 1000])
def test_an_index_over_all_weights_beside_a_count_of_survivors_removes_more_the_more_zeros_there_are(zeros):
    w = [16, 9, 4, 4, 1]  # for q = ½: S = d/N, N = (Σ√w)²/Σw
    effective = Fraction(sum(map(math.isqrt, w)) ** 2, sum(w))
    index = (len(w) + zeros) / effective
    assert (len(w) + zeros) / index == effective  # the rule as written
    assert len(w) / index == effective * Fraction(len(w), len(w) + zeros)  # as logged
