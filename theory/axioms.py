"""The six criteria of a sparsity measure as checks, and which measure of vectors meets which.

Each criterion changes a vector and says which of the two must measure as sparser, or that both must measure alike.
Measures for which smaller means sparser, such as counts and norms, are judged by their negative. Entries are taken by
their magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from ellq.theory import measures
from ellq.theory.arguments import Array, count, finite_array, real_number

Pair = tuple[Array, Array]  # the vector that must be the sparser, the one that must be the evener
_SAME = 1e-12  # difference below which two scores count as equal, relative where they exceed 1


@dataclass(frozen=True)
class Criterion:
    """A demand on a measure of sparsity.

    Attributes:
        id: D1 … D4, P1, P2.
        name: its name.
        sentence: what it demands.
        is_strict: whether one vector must measure sparser; else both must measure alike.
        change: makes the pair of vectors from magnitudes, two of their indices and an amount in (0, 1].
    """

    id: str
    name: str
    sentence: str
    is_strict: bool
    change: Callable[[Array, int, int, float], Pair]

    def pair(self, w: npt.ArrayLike, entry: int, other: int, amount: float) -> Pair:
        """Return the two vectors the criterion compares, the one that must be the sparser first.

        Args:
            w: vector, shape (d,), finite; its magnitudes are what is changed.
            entry: the entry that D1 takes from or gives to, and that P1 makes large.
            other: the other entry of D1.
            amount: how far to go, in (0, 1]. D1: the share of half the difference of the two entries, from the
                larger to the smaller; D2: the factor; D3: the constant added, beside the largest entry; P1: by how
                much the entry, raised to twice the largest, grows further. D4 and P2 ignore it.

        Returns:
            Two vectors of magnitudes; equal ones where the change does nothing.

        Raises:
            TypeError: an argument is not of its kind.
            ValueError: ``w`` not a finite vector, an index outside it, or ``amount`` outside (0, 1].
        """
        magnitudes = np.abs(finite_array(w, "w", ndim=1))
        last = magnitudes.size - 1
        i, j = count(entry, "entry", low=0, high=last), count(other, "other", low=0, high=last)
        share = real_number(amount, "amount")
        if not 0 < share <= 1:
            raise ValueError(f"amount={share:g} is outside (0, 1]. Choose a share such as amount=0.5.")
        return self.change(magnitudes, i, j, share)


def _robin_hood(w: Array, i: int, j: int, amount: float) -> Pair:
    rich, poor = (i, j) if w[i] >= w[j] else (j, i)
    gift = amount * ((w[rich] - w[poor]) / 2)
    after = w.copy()
    if rich != poor:
        after[rich] -= gift
        after[poor] += gift
    return w, after


def _bill_gates(w: Array, i: int, j: int, amount: float) -> Pair:
    raised, further = w.copy(), w.copy()
    raised[i] = 2 * w.max()
    further[i] = raised[i] + amount * raised[i]
    return further, raised


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        criterion.id: criterion
        for criterion in (
            Criterion(
                "D1",
                "Robin Hood",
                "moving magnitude from a larger to a smaller entry, up to where they meet, makes a vector less sparse.",
                True,
                _robin_hood,
            ),
            Criterion(
                "D2",
                "Scaling",
                "multiplying all entries by one factor changes nothing.",
                False,
                lambda w, i, j, amount: (w, amount * w),
            ),
            Criterion(
                "D3",
                "Rising Tide",
                "adding one constant to all magnitudes makes a vector less sparse, unless they are equal.",
                True,
                lambda w, i, j, amount: (w, w + amount * w.max()),
            ),
            Criterion(
                "D4",
                "Cloning",
                "a vector joined with itself is as sparse.",
                False,
                lambda w, i, j, amount: (w, np.concatenate([w, w])),
            ),
            Criterion(
                "P1",
                "Bill Gates",
                "every entry, but an only non-zero one, makes a vector sparser as it grows from some magnitude on.",
                True,
                _bill_gates,
            ),
            Criterion(
                "P2",
                "Babies",
                "appending a zero makes a vector sparser.",
                True,
                lambda w, i, j, amount: (np.append(w, 0.0), w),
            ),
        )
    }
)
"""The criteria of Hurley & Rickard 2009 (arXiv 0811.4706) by id, in the strict form."""


@dataclass(frozen=True)
class Counterexample:
    """Two vectors that a criterion compares and a measure gets wrong.

    Attributes:
        sparser: the vector the criterion calls sparser.
        evener: the other one.
        remark: how far the failure reaches, if it needs saying.
    """

    sparser: tuple[float, ...]
    evener: tuple[float, ...]
    remark: str = ""


@dataclass(frozen=True)
class VectorMeasure:
    """A measure of vectors over a range of its orders, with its standing on the six criteria.

    Attributes:
        name: of the function in ``measures``.
        orders: the range of orders, in words; empty where it has none.
        sparser: whether larger or smaller values mean sparser.
        examples: orders in that range, at which the claims are tested.
        fails: criterion → counterexample, one for all the examples; the criteria not named are met.
    """

    name: str
    orders: str
    sparser: Literal["larger", "smaller"]
    examples: tuple[Mapping[str, float], ...] = ({},)
    fails: Mapping[str, Counterexample] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fails", MappingProxyType(dict(self.fails)))

    def score(self, w: Array, example: Mapping[str, float]) -> Array:
        """Return the measure of vectors along the last axis, negated where smaller means sparser."""
        value: Array = getattr(measures, self.name)(w, **example)
        return value if self.sparser == "larger" else -value

    def meets(self, criterion: Criterion, pair: Pair, example: Mapping[str, float]) -> bool:
        """Return whether the measure orders every pair of vectors along the last axis as a criterion demands.

        Args:
            criterion: the demand.
            pair: the vectors that must be the sparser, and the others.
            example: the orders of the measure.

        Returns:
            For a strict criterion whether the first measures sparser than the second, else whether both measure
            alike. Scores that differ by less than 1e-12, relatively where they exceed 1, count as alike.
        """
        first, second = (self.score(np.asarray(w, dtype=np.float64), example) for w in pair)
        with np.errstate(invalid="ignore"):
            gap = np.where(first == second, 0.0, first - second)
            is_alike = np.abs(gap) <= _SAME * np.maximum(1.0, np.minimum(np.abs(first), np.abs(second)))
        return bool(np.all(~is_alike & (gap > 0) if criterion.is_strict else is_alike))


_GROWN = Counterexample((8.0, 1.0), (4.0, 1.0), "however large the entry")
_SCALED = Counterexample((2.0, 1.0), (1.0, 0.5))
_DOUBLED = Counterexample((1.0,), (1.0, 1.0))
_PADDED = Counterexample((2.0, 1.0, 0.0), (2.0, 1.0), "equal for every vector")
_LEVELLED = Counterexample((3.0, 1.0), (2.0, 2.0))
_ABOVE_ONE = Counterexample((100.0, 2.0, 1.0), (100.0, 1.5, 1.5), "such vectors exist for all 1 < p < q")
_BELOW_ONE = Counterexample((2.0, 1.0, *[0.01] * 50), (1.5, 1.5, *[0.01] * 50), "such vectors exist for all p < q < 1")

_QUASI_ORDERS = ({"q": 0.1}, {"q": 0.5}, {"q": 0.9})
_AROUND_ONE = ({"p": 0.5, "q": 1.0}, {"p": 1.0, "q": 2.0}, {"p": 0.3, "q": 3.0}, {"p": 0.9, "q": 1.1})
_ABOVE = ({"p": 1.5, "q": 2.0}, {"p": 2.0, "q": 4.0})
_BELOW = ({"p": 0.25, "q": 0.5},)

_COUNT = {"D4": _DOUBLED, "P2": _PADDED}
_NORM = {"D2": _SCALED, "D4": _DOUBLED, "P1": _GROWN, "P2": _PADDED}

VECTOR_MEASURES = (
    VectorMeasure("lq_quasinorm", "0 < q < 1", "smaller", _QUASI_ORDERS, _NORM),
    VectorMeasure(
        "lq_quasinorm", "1 ≤ q < ∞", "smaller", ({"q": 1.0}, {"q": 2.0}, {"q": 5.0}), {"D1": _LEVELLED} | _NORM
    ),
    VectorMeasure(
        "lq_quasinorm",
        "q = ∞",
        "smaller",
        ({"q": np.inf},),
        {"D1": _LEVELLED, "D2": _SCALED, "P1": _GROWN, "P2": _PADDED},
    ),
    VectorMeasure(
        "l0_count",
        "",
        "smaller",
        fails={
            "D1": _LEVELLED,
            "D3": Counterexample((2.0, 1.0), (3.0, 2.0)),
            "D4": _DOUBLED,
            "P1": _GROWN,
            "P2": _PADDED,
        },
    ),
    VectorMeasure(
        "weak_quasinorm",
        "0 < q < ∞",
        "smaller",
        ({"q": 0.5}, {"q": 1.0}, {"q": 2.0}),
        {"D1": Counterexample((1000.0, 2.0, 1.0), (1000.0, 1.5, 1.5), "with a larger first entry for small q")} | _NORM,
    ),
    VectorMeasure("sparsity_index", "0 < q < 1", "larger", _QUASI_ORDERS, _COUNT),
    VectorMeasure("normalised_sparsity_index", "0 < q < 1", "larger", _QUASI_ORDERS),
    VectorMeasure("pq_index", "p ≤ 1 ≤ q", "larger", _AROUND_ONE),
    VectorMeasure("pq_index", "1 < p < q", "larger", _ABOVE, {"D1": _ABOVE_ONE}),
    VectorMeasure("pq_index", "p < q < 1", "larger", _BELOW, {"D1": _BELOW_ONE}),
    VectorMeasure("effective_count", "p ≤ 1 ≤ q", "smaller", _AROUND_ONE, _COUNT),
    VectorMeasure("effective_count", "1 < p < q", "smaller", _ABOVE, {"D1": _ABOVE_ONE} | _COUNT),
    VectorMeasure("effective_count", "p < q < 1", "smaller", _BELOW, {"D1": _BELOW_ONE} | _COUNT),
    VectorMeasure("numerical_sparsity", "", "smaller", fails=_COUNT),
    VectorMeasure("entropy_effective_count", "", "smaller", fails=_COUNT),
    VectorMeasure(
        "hoyer",
        "d ≥ 2",
        "larger",
        fails={
            "D4": Counterexample((2.0, 1.0), (2.0, 1.0, 2.0, 1.0)),
            "P2": Counterexample((1.0, 0.0, 0.0), (1.0, 0.0), "only for one non-zero entry"),
        },
    ),
    VectorMeasure("gini", "", "larger"),
    VectorMeasure(
        "tail_index",
        "1 ≤ k < #non-zeros",
        "smaller",
        ({"k": 1}, {"k": 2}),
        {
            "D1": Counterexample(
                (16.0, 8.0, 4.0, 2.0, 1.0), (16.0, 8.0, 4.0, 1.5, 1.5), "entries below the threshold do not count"
            ),
            "D3": Counterexample((2.0, 2.0, 2.0, 1.0), (3.0, 3.0, 3.0, 2.0), "only for ties from first to threshold"),
            "D4": Counterexample((4.0, 2.0, 1.0), (4.0, 2.0, 1.0, 4.0, 2.0, 1.0), "met if k doubles too"),
            "P2": Counterexample((4.0, 2.0, 1.0, 0.0), (4.0, 2.0, 1.0), "equal for every vector"),
        },
    ),
)
"""Every measure of vectors, by range of orders, with the criteria it fails."""


def axioms_table() -> str:
    """Return which measure meets which criterion, as a table in Markdown."""
    header = ["measure", "orders", "sparser is", *CRITERIA]
    rows = [
        [f"`{row.name}`", row.orders, row.sparser, *("✗" if id in row.fails else "✓" for id in CRITERIA)]
        for row in VECTOR_MEASURES
    ]
    return _markdown(header, rows)


def counterexamples_table() -> str:
    """Return a counterexample to every claim that fails, with the measure's values, as a table in Markdown."""
    header = ["measure", "orders", "fails", "vector", "and", "measure", "and", "remark"]
    rows = []
    for row in VECTOR_MEASURES:
        example = row.examples[0]
        orders = ", ".join(f"{name} = {_number(value)}" for name, value in example.items())
        for id in sorted(row.fails):
            found = row.fails[id]
            values = [abs(float(row.score(np.array(w), example))) for w in (found.sparser, found.evener)]
            vectors = [_vector(w) for w in (found.sparser, found.evener)]
            rows.append([f"`{row.name}`", orders, id, *vectors, *map(_number, values), found.remark])
    return _markdown(header, rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float) -> str:
    return "∞" if np.isinf(value) else f"{value:.5g}"


def _vector(w: tuple[float, ...]) -> str:
    parts: list[str] = []
    for value, run in groupby(w):
        times = len(list(run))
        parts += [f"{value:g} ×{times}"] if times > 4 else [f"{value:g}"] * times
    return f"({', '.join(parts)})"
