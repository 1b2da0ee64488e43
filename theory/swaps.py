"""Skeleton rules that improve a skeleton by swaps: one column leaves, another takes its place.

All pairs are judged at once from one tableau, the second moments with the chosen columns pivoted out:

    M = [ −G_SS⁻¹   T ]        S: chosen, N: the rest
        [    Tᵀ     C ]        T = G_SS⁻¹ G_SN, C = G_NN − G_NS T

A swap is a principal pivot on two of its indices, a change of rank two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from ellq.theory.arguments import Array, Indices, real_number
from ellq.theory.array_kinds import beside, namespace, on_host, solve_upper
from ellq.theory.columns import Columns, Moments
from ellq.theory.elimination import (
    ROUNDING,
    Progress,
    Selection,
    eliminate,
    explain_targets,
    first_largest,
)
from ellq.theory.selection import Error, output_aware, residual_trace, towards

_FRESH = 32  # swaps until the tableau is computed anew


class Rule(Protocol):
    """A skeleton rule."""

    def __call__(self, columns: Columns, retained: int, /, *, progress: Progress = iter) -> Selection:
        """Choose ``retained`` columns."""


def strong_rrqr(columns: Columns, retained: int, *, f: float = 2.0, progress: Progress = iter) -> Selection:
    """Start from pivoted QR and swap columns until no swap would multiply the volume by more than f.

        vol(S − i + j) / vol(S) = √(T_ij² + (G_SS⁻¹)_ii·C_jj) ≤ f        vol(S) = √det G_SS

    Hence |T_ij| ≤ f, and with c = √(1 + f²k(m − k)): σ_i(X_S) ≥ σ_i(X)/c for i ≤ k, σ_j(X − X_S T) ≤ c·σ_(k+j)(X).
    It ends, for the volume grows with every swap and there are finitely many sets. Redundant columns are left out of
    account: if the columns have rank r < k, the first r chosen are those of k = r.

    Args:
        columns: moments or a triangle of the features, m of them.
        retained: k, 1 ≤ k ≤ m.
        f: the largest entry allowed, > 1; the smaller, the more swaps.
        progress: wraps the range of choices before the swaps, to show a bar.

    Returns:
        The selection, ordered by pivoted QR among its columns.

    Raises:
        TypeError: ``retained`` is not a whole number, or ``f`` no number.
        ValueError: ``retained`` outside [1, m], or ``f`` ≤ 1.

    Reference: Gu & Eisenstat 1996, algorithm 4 and theorem 3.2.
    """
    f = real_number(f, "f")
    if not f > 1:
        raise ValueError(f"f={f:g} is not above 1, so swaps might never end. Choose f > 1, such as 2.")

    def swaps(selection: Selection) -> Iterator[Indices]:
        tableau = _Tableau(columns, selection)
        for _ in range(_FRESH):
            i, j, ratio = tableau.largest(tableau.volume_ratios())
            if ratio <= (f * (1 + 1e-9)) ** 2:
                return
            tableau.exchange(i, j)
            yield tableau.members()

    def smallness(selection: Selection) -> float:
        return -_log_volume(selection)

    return _improve(columns, eliminate(columns, retained, progress=progress), swaps, smallness)


def swap_refined(
    columns: Columns,
    retained: int,
    *,
    start: Rule | None = None,
    error: Error = "features",
    progress: Progress = iter,
) -> Selection:
    """Start from another rule and swap one column at a time, always the best pair, until no swap lowers the error.

    Args:
        columns: moments or a triangle of the features, m of them, and of the targets.
        retained: k, 1 ≤ k ≤ m.
        start: the rule to start from; the greedy one for the same error if not given.
        error: ``"features"`` for ‖X − X_S T‖_F, ``"outputs"`` for the least-squares error of the targets.
        progress: wraps the range of choices before the swaps, to show a bar.

    Returns:
        The selection, a local optimum up to a relative 1e-9 of its squared error, ordered greedily among its columns.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m], another word for ``error``, or no targets to judge by.

    Reference: ours; the swaps of Gu & Eisenstat 1996 with another objective.
    """
    target = towards(columns, error)
    rule = start if start is not None else residual_trace if error == "features" else output_aware
    total = float(_energy(columns).sum()) if error == "features" else float(columns.yy.sum())

    def squared(selection: Selection) -> float:
        path = selection.feature_errors if error == "features" else explain_targets(columns, selection)[2]
        return float(path[-1])

    def swaps(selection: Selection) -> Iterator[Indices]:
        tableau = _Tableau(columns, selection, target)
        now = squared(selection)
        for _ in range(_FRESH):
            i, j, decrease = tableau.largest(tableau.decreases())
            if decrease <= 1e-9 * now + ROUNDING * columns.features * total:
                return
            tableau.exchange(i, j)
            now -= decrease
            yield tableau.members()

    return _improve(columns, rule(columns, retained, progress=progress), swaps, squared, target)


def _improve(
    columns: Columns,
    selection: Selection,
    swaps: Callable[[Selection], Iterator[Indices]],
    cost: Callable[[Selection], float],
    target: Array | None = None,
) -> Selection:
    """Swap until there is no swap left, or none that still helps once everything is computed anew."""
    while selection.rank > 0:
        members = None
        for members in swaps(selection):  # noqa: B007
            pass
        if members is None:
            return selection
        swapped = eliminate(columns, selection.indices.size, among=members, towards=target)
        if swapped.rank < selection.rank or (swapped.rank == selection.rank and cost(swapped) >= cost(selection)):
            return selection  # what seemed to be gained was rounding
        selection = swapped
    return selection


class _Tableau:
    """M, and the rows of the targets Y beside it: G_SS⁻¹XᵀY at S, what is left of XᵀY at N."""

    def __init__(self, columns: Columns, selection: Selection, target: Array | None = None) -> None:
        self._inside = np.zeros(columns.features, dtype=bool)
        S, F = selection.indices[: selection.rank], selection.factor
        self._inside[S] = True
        xp = self._xp = namespace(F)
        self._unresolved = (ROUNDING * columns.features) ** (1 if isinstance(columns, Moments) else 2) * _energy(
            columns
        )
        if isinstance(columns, Moments):
            upper = F[:, S]
            M = columns.G - F.T @ F
            if target is not None:
                explained = solve_upper(upper, target[S], transposed=True)
                targets = target - F.T @ explained
        else:
            Q, upper = xp.linalg.qr(columns.X[:, S])
            F = Q.T @ columns.X
            rest = columns.X - Q @ F
            M = rest.T @ rest
            if target is not None:
                explained = Q.T @ target
                targets = rest.T @ (target - Q @ explained)
        resolved = 1.0 * (M.diagonal() > self._unresolved)
        M *= resolved[:, None] * resolved
        inverse = solve_upper(upper, xp.eye(len(S), dtype=F.dtype, device=F.device))
        M[S] = solve_upper(upper, F)
        M[:, S] = M[S].T
        M[S[:, None], S] = -inverse @ inverse.T
        self._M: Array = M
        if target is not None:
            targets *= resolved[:, None]
            targets[S] = solve_upper(upper, explained)
            self._targets: Array = targets

    def members(self) -> Indices:
        """Return S in increasing order."""
        return np.flatnonzero(self._inside)

    def volume_ratios(self) -> Array:
        """Return the squared factor by which the volume grows if i ∈ S leaves for j ∈ N, a row for each i."""
        S, N = self._inside, ~self._inside
        T, diagonal = self._M[S][:, N], self._M.diagonal()
        ratios: Array = T * T - diagonal[S][:, None] * diagonal[N]
        return ratios

    def decreases(self) -> Array:
        """Return the decrease of the squared error of the targets if i ∈ S leaves for j ∈ N, a row for each i.

        Without i, with w = (G_SS⁻¹)_ii and B its row of coefficients, the error is larger by ‖B‖²/w; then adding j
        takes away ‖R_j + T_ij B/w‖² / (C_jj + T_ij²/w).
        """
        S, N = self._inside, ~self._inside
        T, diagonal = self._M[S][:, N], self._M.diagonal()
        B, R = self._targets[S], self._targets[N]
        w = -diagonal[S][:, None]
        lost = (B * B).sum(axis=1)[:, None]
        gained = (R * R).sum(axis=1) + 2 * (T / w) * (B @ R.T) + (T / w) ** 2 * lost
        left = diagonal[N] + T * T / w
        resolved = left > self._unresolved[N]
        decreases: Array = gained * resolved / self._xp.where(resolved, left, 1.0) - lost / w
        return decreases

    def largest(self, values: Array) -> tuple[int, int, float]:
        """Return the pair i ∈ S, j ∈ N of the largest value, the first of several, and the value; −∞ if N is empty."""
        S, N = np.flatnonzero(self._inside), np.flatnonzero(~self._inside)
        if not N.size:
            return 0, 0, -math.inf
        flat = values.reshape(-1)
        place = first_largest(flat)
        return int(S[place // N.size]), int(N[place % N.size]), float(flat[place])

    def exchange(self, i: int, j: int) -> None:
        """Let i leave S and j enter it."""
        M, pair = self._M, np.array([i, j])
        a, t, s = float(M[i, i]), float(M[i, j]), float(M[j, j])
        inverse = beside(M, [[s, -t], [-t, a]]) / (a * s - t * t)
        signs = beside(M, [-1.0, 1.0])  # i is pivoted back, j forth
        columns = M[:, pair]
        K = columns @ inverse
        M -= K @ columns.T
        M[:, pair] = K * signs
        M[pair] = (K * signs).T
        M[pair[:, None], pair] = -signs[:, None] * inverse * signs
        if hasattr(self, "_targets"):
            rows = self._targets[pair]
            self._targets -= K @ rows
            self._targets[pair] = signs[:, None] * (inverse @ rows)
        self._inside[pair] = [False, True]


def _energy(columns: Columns) -> Array:
    return columns.G.diagonal() if isinstance(columns, Moments) else (columns.X * columns.X).sum(axis=0)


def _log_volume(selection: Selection) -> float:
    pivots = on_host(selection.factor)[np.arange(selection.rank), selection.indices[: selection.rank]]
    return float(np.log(pivots).sum())
