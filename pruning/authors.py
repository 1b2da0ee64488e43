"""The adaptive rules of Yang et al. (2022) and Diao et al. (2023) as the authors' code has them, oddities included.

Both take a vector of d surviving weights, find how many of them count by its PQ index, and remove the smallest of the
others. The vector is a unit, a layer, or all layers together: the rule's scope. Weights that are 0 have been removed
before. What is removed is below the smallest that stays, strictly, so weights equal to it survive: more may stay than
the formula says. Nothing guards a layer, or a unit in the wider scopes, from losing all it has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ellq.pruning.budget import BudgetError, refuse_too_small
from ellq.pruning.largest import Counts, magnitudes
from ellq.pruning.layers import Allocation, Layers
from ellq.theory import Array, PowerSums, join, open_fraction, order_below_one, power_sums
from ellq.theory.arguments import nonnegative, rising_orders

SCOPES = ("unit", "layer", "global")
VARIANTS = ("keep-m", "capped")
OVER = ("survivors", "all")
_M = "⌈N(1+η)^(−1/(1−q))⌉"
_STRONGEST = 2.0**40
_WIDEST = 800.0  # log of a factor that takes every count to all there is; its inverse takes every count to one
_Solved = Callable[..., Allocation]  # a rule for a budget, of which only retained= is left to be given


def yang2022(
    layers: Layers,
    eta: float,
    *,
    q: float = 0.5,
    variant: str = "keep-m",
    over: str = "survivors",
    c: float = 5.0,
    beta: float = 0.9,
    scope: str = "unit",
) -> Allocation:
    """Keep what the sparsity index of every unit, layer or model says, in one round.

        m = ⌈d·S^(−q/(1−q))·(1 + η)^(−1/(1−q))⌉ = ⌈N_{q,1}·(1 + η)^(−1/(1−q))⌉,   S = 1/(1 − I_{q,1})

    Variant ``"keep-m"`` keeps m. Variant ``"capped"`` takes m at η = 0 and removes ⌊d·min(c·(1 − m/d), β)⌋.

    N is the same whether removed weights count as zeros of the vector or not; S is not. The authors' logged run of
    ``"keep-m"`` fits an S over all D weights beside a d of survivors, which makes m = ⌈N·d/D·…⌉: it removes the more,
    the more has been removed (``over="all"``).

    Args:
        layers: what is decided on.
        eta: η ≥ 0, removed ÷ kept ℓq mass for which m is *necessary*; it is not sufficient. 0 for ``"capped"``.
        q: order, 0 < q < 1.
        variant: ``"keep-m"`` or ``"capped"``.
        over: for ``"keep-m"``: take S over the ``"survivors"`` or over ``"all"`` weights, those that are 0 included.
        c: for ``"capped"``: how hard to prune; the authors tried 1, 3, 5, 7, 9.
        beta: for ``"capped"``: the most a round removes of a vector.
        scope: ``"unit"``, ``"layer"`` or ``"global"``.

    Raises:
        ValueError: an argument out of range.

    Reference: Yang et al. 2022 (arXiv 2206.05604), as in the authors' code of May 2022.
    """
    _require(variant, VARIANTS, "variant")
    q = order_below_one(q)
    if variant == "capped":
        if eta:
            raise ValueError(f"tol={eta:g} has no place in variant='capped', which takes m at η = 0. Pass tol=0.")
        return diao2023(layers, 0.0, p=q, q=1.0, gamma=c, beta=beta, scope=scope)
    state = _Survivors.of(layers, scope)
    found = _kept_m(state, _count_at_zero(state, q, over), -math.log1p(eta) / (1 - q))
    return found.allocation(f"{_M}, η = {eta:.4g}")


def yang2022_budget(
    layers: Layers,
    retained: int,
    *,
    q: float = 0.5,
    variant: str = "keep-m",
    over: str = "survivors",
    c: float = 5.0,
    beta: float = 0.9,
    scope: str = "unit",
) -> Allocation:
    """Keep at most a number of weights by the rule of ``yang2022``.

    Variant ``"keep-m"``: in one round, at the least η for which the m sum to at most the budget; a negative η only
    scales the m up; where weights equal to those that stay would exceed the budget, at a larger one. Variant
    ``"capped"``: in rounds, as ``diao2023_budget``.

    Args:
        layers: what is decided on.
        retained: the most that may be kept.
        q: see ``yang2022``.
        variant: see ``yang2022``.
        over: see ``yang2022``.
        c: see ``yang2022``.
        beta: see ``yang2022``.
        scope: see ``yang2022``.

    Raises:
        ValueError: an argument out of range.
        BudgetError: less than one weight for each vector that has any.

    Reference: the rule of Yang et al. 2022; solving it for a budget is ours.
    """
    _require(variant, VARIANTS, "variant")
    q = order_below_one(q)
    if variant == "capped":
        return diao2023_budget(layers, retained, p=q, q=1.0, gamma=c, beta=beta, scope=scope)
    again = functools.partial(yang2022_budget, layers, q=q, variant=variant, over=over, scope=scope)
    state = _survivors(layers, retained, scope, again)
    N = _count_at_zero(state, q, over)

    factor = _largest(_WIDEST, lambda factor: int(_m(N, state.sizes, factor).sum()) <= retained)
    found = _kept_m(state, N, factor)
    if found.total > retained:  # weights equal to the smallest that stay do so too
        fewest = _kept_m(state, N, -_WIDEST)
        if fewest.total > retained:
            stuck = fewest.name_of(int(np.argmax(fewest.sizes > 1)))
            obstacle = f"leaves {retained} weights, and the largest of {stuck} are equal, which stay together"
            raise _refused(retained, obstacle, fewest.total, again)
        factor = _largest(factor, lambda factor: _kept_m(state, N, factor).total <= retained)
        found = _kept_m(state, N, factor)
    eta = math.expm1(min(-factor * (1 - q), 700.0))
    return found.allocation(f"{_M}, η = {eta:.4g} for {retained:,} retained")


def diao2023(
    layers: Layers,
    eta: float,
    *,
    p: float = 0.5,
    q: float = 1.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    scope: str = "global",
) -> Allocation:
    """Remove what the PQ index of every unit, layer or model says: one round of sparsity-informed adaptive pruning.

        r = ⌈d·(1 + η)^(−q/(q−p))·(1 − I_{p,q})^(pq/(q−p))⌉,   removed = ⌊d·min(γ·(1 − r/d), β)⌋

    The authors' code lifts r to a whole number, their paper does not. In the paper a round is followed by retraining
    from the initial weights.

    Args:
        layers: what is decided on.
        eta: η ≥ 0, removed ÷ kept ℓp mass for which r is necessary; the authors' default is 0.
        p: lower order, > 0.
        q: higher order; the authors used (½, 1) and (1, 2).
        gamma: γ > 0, how hard to prune.
        beta: β in (0, 1), the most a round removes of a vector.
        scope: ``"unit"``, ``"layer"`` or ``"global"``.

    Raises:
        ValueError: an argument out of range.

    Reference: Diao et al. 2023 (arXiv 2302.05601), Algorithm 1, and the authors' code.
    """
    round_ = _Round.of(eta, p, q, gamma, beta)
    state = _Survivors.of(layers, scope)
    removed = round_.removed(state, 1.0)
    return state.without(removed).allocation(f"{round_}, one round by {scope}")


def diao2023_budget(
    layers: Layers,
    retained: int,
    *,
    eta: float = 0.0,
    p: float = 0.5,
    q: float = 1.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    scope: str = "global",
) -> Allocation:
    """Keep at most a number of weights by repeating the round of ``diao2023``, without retraining between.

    Every round looks at the survivors of the one before. In the last, γ is lowered so that no more goes than must;
    where a round removes nothing, because what survives is too even or too little, γ is doubled. Equal weights go
    together, so that more may go than must.

    Args:
        layers: what is decided on.
        retained: the most that may be kept.
        eta: see ``diao2023``.
        p: see ``diao2023``.
        q: see ``diao2023``.
        gamma: see ``diao2023``.
        beta: see ``diao2023``.
        scope: see ``diao2023``.

    Raises:
        ValueError: an argument out of range.
        BudgetError: less than one weight for each vector that has any, or what no γ reaches.

    Reference: the rule of Diao et al. 2023; repeating it until a budget is met is ours.
    """
    round_ = _Round.of(eta, p, q, gamma, beta)
    again = functools.partial(diao2023_budget, layers, eta=eta, p=p, q=q, gamma=gamma, beta=beta, scope=scope)
    state = _survivors(layers, retained, scope, again)
    rounds, share, is_stuck = 0, 1.0, False  # share of γ
    while (left := state.total) > retained:
        removed = round_.removed(state, share)
        if left - int(removed.sum()) < retained and not is_stuck:
            low = 0.0  # where too little goes
            for _ in range(60):
                middle = (low + share) / 2
                fits = left - int(round_.removed(state, middle).sum()) <= retained
                low, share = (low, middle) if fits else (middle, share)
            removed = round_.removed(state, share)
        state = state.without(removed)
        rounds += 1
        is_stuck = state.total == left
        if is_stuck:
            share *= 2
            if share > _STRONGEST:
                obstacle = (
                    f"cannot be met: the rule by {scope} comes to a stop at {left} weights, above the {retained} asked"
                    f" for, where all that survives of {state.name_of(int(np.argmax(state.sizes > 1)))} counts by its"
                    " PQ index, or is equal"
                )
                raise _refused(retained, obstacle, left, again)
    last = f", γ·{share:.3g} in the last" if share != 1 else ""
    return state.allocation(f"{round_}, {rounds} round{'' if rounds == 1 else 's'} by {scope}{last}")


def _survivors(layers: Layers, retained: int, scope: str, rule: _Solved) -> _Survivors:
    """Return all weights; refuse to retain fewer than one of each vector that has any."""
    state = _Survivors.of(layers, scope)
    vectors = [len(layer) if scope == "unit" else 1 for layer in layers.weights] if scope != "global" else [1]
    minima = np.split(np.minimum(state.sizes, 1), np.cumsum(vectors)[:-1])
    try:
        refuse_too_small(retained, layers.names, minima, vector=scope)
    except BudgetError as error:
        raise _refused(retained, error.obstacle, int(error.nearest), rule) from None
    return state


def _largest(limit: float, is_within: Callable[[float], bool]) -> float:
    """Return the largest log of a factor on N, up to a limit, that is within a budget."""
    low, high = -_WIDEST, limit
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if is_within(middle) else (low, middle)
    return low


def _refused(retained: int, obstacle: str, nearest: int, rule: _Solved) -> BudgetError:
    """Return that a budget cannot be met; of what can be it is known that it is not below ``nearest``."""
    try:
        rule(retained=nearest)
    except BudgetError as error:
        nearest = int(error.nearest)
    return BudgetError(f"retained={retained}", obstacle, nearest, f"Choose retained >= {nearest}.")


@dataclass(frozen=True)
class _Round:
    """The settings of a round."""

    eta: float
    p: float
    q: float
    gamma: float
    beta: float

    @staticmethod
    def of(eta: float, p: float, q: float, gamma: float, beta: float) -> _Round:
        p, q = rising_orders(p, q, ("p", "q"))
        gamma = nonnegative(gamma, "gamma")
        if not gamma:
            raise ValueError("gamma=0 removes nothing. Choose gamma > 0.")
        return _Round(nonnegative(eta, "eta"), p, q, gamma, open_fraction(beta, "beta"))

    def removed(self, state: _Survivors, share: float) -> Counts:
        """Return how many of each vector's survivors go, with γ times a share."""
        d, N = state.sizes, state.effective(self.p, self.q)
        r = _m(N, d, -self.q / (self.q - self.p) * math.log1p(self.eta))
        # γ(d − r) rather than d·γ(1 − r/d), whose rounding would at times remove one too few; the same for β.
        wanted = np.minimum(self.gamma * share * (d - r), self.beta * d)
        return np.asarray(np.minimum(np.floor(wanted * (1 + 1e-12)).astype(np.int64), np.maximum(d - 1, 0)))

    def __str__(self) -> str:
        return f"PQ index p = {self.p:g}, q = {self.q:g}, η = {self.eta:g}, γ = {self.gamma:g}, β = {self.beta:g}"


@dataclass(frozen=True, eq=False)
class _Survivors:
    """The weights that are left of every vector: those not below its cut.

    Attributes:
        layers: all weights.
        scope: what a vector is.
        vector: for each layer the number of the vector that each unit belongs to, shape (units,).
        cuts: of every vector, in the magnitudes' own units.
        sizes: of every vector, how many of its weights are left.
    """

    layers: Layers
    scope: str
    vector: list[Counts]
    cuts: Array
    sizes: Counts

    @staticmethod
    def of(layers: Layers, scope: str) -> _Survivors:
        _require(scope, SCOPES, "scope")
        units = [len(layer) for layer in layers.weights]
        if scope == "unit":
            vector = np.split(np.arange(sum(units)), np.cumsum(units)[:-1])
        else:
            vector = [np.full(n, i if scope == "layer" else 0) for i, n in enumerate(units)]
        nonzeros = np.concatenate([found.nonzeros for found in layers.surveys])
        sizes = np.bincount(np.concatenate(vector), weights=nonzeros).astype(np.int64)
        return _Survivors(layers, scope, vector, np.zeros(sizes.size), sizes)

    @property
    def total(self) -> int:
        """How many weights are left."""
        return int(self.sizes.sum())

    @functools.lru_cache(maxsize=2)  # noqa: B019 -- a round asks many times for the same; few states live at once
    def effective(self, p: float, q: float) -> Array:
        """Return N_{p,q} = d·(1 − I_{p,q})^(pq/(q−p)) of the survivors of each vector; 0 of one with none.

        Whether removed weights are counted changes I, not N.
        """
        units: list[PowerSums] = []
        for layer, vector in zip(self.layers.weights, self.vector, strict=True):
            parts = [
                power_sums(np.where(block >= self.cuts[vector[rows]][:, None], block, 0.0), (p, q))
                for rows, block in magnitudes(layer)
            ]
            units.append(join(parts))
        every = join(units)
        if every.size.size == self.cuts.size:
            return every.effective_count(p, q)
        if self.cuts.size == 1:
            return every.pooled().effective_count(p, q)
        return join([layer.pooled() for layer in units]).effective_count(p, q)

    def without(self, removed: Counts) -> _Survivors:
        """Remove the smallest survivors of each vector, as many as given, except those equal to the next larger."""
        cuts = self.cuts.copy()
        if self.cuts.size == sum(map(len, self.vector)):
            for layer, vector in zip(self.layers.weights, self.vector, strict=True):
                for rows, block in magnitudes(layer):
                    own = vector[rows]
                    block.sort(axis=1)
                    place = np.minimum(block.shape[1] - self.sizes[own] + removed[own], block.shape[1] - 1)
                    cuts[own] = np.take_along_axis(block, place[:, None], axis=1)[:, 0]
        else:
            for number in range(self.cuts.size):
                if removed[number]:
                    left = self._left(number)
                    cuts[number] = np.partition(left, removed[number])[removed[number]]
        sizes = np.bincount(
            np.concatenate(self.vector), weights=np.concatenate(self._counts(cuts)), minlength=cuts.size
        )
        return replace(self, cuts=cuts, sizes=sizes.astype(np.int64))

    def name_of(self, number: int) -> str:
        """Return what an error calls a vector."""
        if self.scope == "global":
            return "the model"
        name, own = next(
            (name, own) for name, own in zip(self.layers.names, self.vector, strict=True) if own[-1] >= number
        )
        return f"unit {number - own[0]} of {name!r}" if self.scope == "unit" else f"layer {name!r}"

    def _left(self, number: int) -> Array:
        """Return the survivors of one vector, a layer or all."""
        parts = [
            block[(block >= self.cuts[number]) & (block > 0)]
            for layer, vector in zip(self.layers.weights, self.vector, strict=True)
            if vector[0] == number
            for _, block in magnitudes(layer)
        ]
        return np.concatenate(parts)

    def _counts(self, cuts: Array) -> list[Counts]:
        """Count the survivors of each unit."""
        counts = []
        for layer, vector in zip(self.layers.weights, self.vector, strict=True):
            parts = [
                np.count_nonzero((block >= cuts[vector[rows]][:, None]) & (block > 0), axis=1)
                for rows, block in magnitudes(layer)
            ]
            counts.append(np.concatenate(parts))
        return counts

    def allocation(self, reason: str) -> Allocation:
        """Return what each unit keeps: its survivors, or its minimum if that is more."""
        counts = [np.maximum(c, low) for c, low in zip(self._counts(self.cuts), self.layers.minima, strict=True)]
        return Allocation(counts, [reason] * len(counts))


def _count_at_zero(state: _Survivors, q: float, over: str) -> Array:
    """Return what m is at η = 0: N_{q,1}, times d/D where S is taken over all D weights of a vector."""
    N = state.effective(q, 1.0)
    if _require(over, OVER, "over") == "survivors":
        return N
    sizes = [np.full(len(found.nonzeros), found.size) for found in state.layers.surveys]
    D = np.bincount(np.concatenate(state.vector), weights=np.concatenate(sizes))
    return np.asarray(N * state.sizes / D)


def _m(N: Array, sizes: Counts, log_factor: float) -> Counts:
    """Return ⌈N·factor⌉, at least 1 where there is anything, at most the size."""
    # A count that is whole but for rounding must not be lifted to the next.
    real = np.exp(np.minimum(np.log(np.maximum(N, 1e-300)) + log_factor, 80.0)) * (1 - 1e-12)
    return np.clip(np.ceil(np.minimum(real, sizes)).astype(np.int64), np.minimum(sizes, 1), sizes)


def _kept_m(state: _Survivors, N: Array, log_factor: float) -> _Survivors:
    return state.without(state.sizes - _m(N, state.sizes, log_factor))


def _require(value: str, allowed: tuple[str, ...], name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, allowed))}.")
    return value
