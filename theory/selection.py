"""Skeleton rules: which columns to keep, each choice made on what the ones before it could not explain.

All work on second moments G = XᵀX alone. Eliminating column j from G is one step of a pivoted Cholesky
factorisation, which on G is what one step of pivoted QR is on X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

from ellq.theory.arguments import Array, Indices, count, finite_array

Progress = Callable[[range], Iterable[int]]


@dataclass(frozen=True)
class Selection:
    """The columns a rule chose and the factor that explains the others by them.

    Attributes:
        indices: chosen columns in order of choice, shape (k,).
        rank: how many of them were independent to working precision; later ones explain nothing new.
        factor: rows of the pivoted Cholesky factor, shape (rank, m): G ≈ factorᵀ·factor.
        feature_errors: ‖X − X_S T‖_F² after 0 … k choices, shape (k + 1,).
    """

    indices: Indices
    rank: int
    factor: Array
    feature_errors: Array

    def first(self, k: int) -> Selection:
        """Return what the rule had chosen after k choices.

        Raises:
            TypeError: ``k`` is not a whole number.
            ValueError: ``k`` outside [0, number of choices].
        """
        k = count(k, "k", low=0, high=self.indices.size)
        rank = min(k, self.rank)
        return Selection(self.indices[:k], rank, self.factor[:rank], self.feature_errors[: k + 1])


def pivoted_qr(G: Array, retained: int, *, progress: Progress = iter) -> Selection:
    """Choose the column with the largest residual, again and again (Businger–Golub pivoting).

    Ties go to the lowest index. Columns that are combinations of those chosen are taken last.

    Args:
        G: XᵀX, shape (m, m), symmetric positive semidefinite.
        retained: k, 1 ≤ k ≤ m.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection, in order.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m], or ``G`` not a finite square matrix.

    Reference: Businger & Golub 1965; the rule of Chee et al. 2021 (arXiv 2108.00065).
    """
    return _eliminate(G, None, retained, progress)


def output_aware(G: Array, R: Array, retained: int, *, progress: Progress = iter) -> Selection:
    """Choose the column that most reduces the least-squares error of the targets, again and again.

        j = argmax ‖(R̃)_j‖² / S_jj        S: Schur complement of G, R̃ = S-step residual of R = XᵀY

    The decrease is exact for the refitted consumer. Ties go to the lowest index.

    Args:
        G: XᵀX, shape (m, m), symmetric positive semidefinite.
        R: XᵀY, shape (m, c).
        retained: k, 1 ≤ k ≤ m.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection, in order.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m], or ``G`` or ``R`` not finite matrices that fit.

    Reference: orthogonal least squares (Chen, Billings & Luo 1989) with several targets.
    """
    return _eliminate(G, R, retained, progress)


def _eliminate(G: Array, R: Array | None, retained: int, progress: Progress) -> Selection:
    G = finite_array(G, "G", ndim=2)
    m = G.shape[0]
    if G.shape != (m, m):
        raise ValueError(f"G has shape {G.shape}. Pass a square matrix XᵀX.")
    k = count(retained, "retained", low=1, high=m)
    targets = None
    if R is not None:
        R = finite_array(R, "R", ndim=2)
        if len(R) != m:
            raise ValueError(f"R has {len(R)} rows but G has {m}. Pass XᵀY with one row per feature.")
        targets = _Targets(_unit_scaled(R))
    energy = np.diag(G).copy()
    residual = energy.copy()
    complement = G.copy()  # of the columns chosen before this block
    factor = np.zeros((k, m))
    indices = np.empty(k, dtype=np.intp)
    errors = np.zeros(k + 1)
    errors[0] = residual.sum()
    free = residual > 0
    start = step = 0
    ticks = iter(progress(range(k)))
    next(ticks)
    while step < k and free.any():
        j = _first_largest(np.where(free, residual if targets is None else targets.gains(residual, free), -np.inf))
        # Only a small residual can be rounding, unless the combination itself is wild; the solve is not for every step.
        if residual[j] <= 1e-3 * energy[j] and residual[j] <= _rounding(j, energy, factor[:step], indices[:step]):
            free[j] = False  # explained already
            continue
        pivot = np.sqrt(residual[j])
        row = (complement[j] - factor[start:step, j] @ factor[start:step]) / pivot
        row[~free] = 0.0  # chosen or explained: what is left of them is rounding
        row[j] = pivot
        if targets is not None:
            targets.explain(j, row, factor[start:step])
        residual -= row * row
        residual[j] = 0.0
        np.maximum(residual, 0.0, out=residual)
        free &= residual > _ROUNDING * m * energy
        factor[step], indices[step] = row, j
        step += 1
        next(ticks, None)
        errors[step] = residual[free].sum()
        if step - start == _BLOCK or (targets is not None and targets.is_stale):
            done = factor[start:step]
            complement -= done.T @ done
            if targets is not None:
                targets.settle(done)
            start = step
    errors[step + 1 :] = errors[step]
    if step < k:  # the rest explain nothing; the lowest indices make the choice repeatable
        indices[step:] = np.setdiff1d(np.arange(m), indices[:step])[: k - step]
    return Selection(indices, step, factor[:step], errors)


class _Targets:
    """What the chosen columns leave unexplained of the targets' moments R, (m, c), and its squared row norms.

    Within a block only the norms are kept up to date, by products of the rows of R at the block's start, so that the
    work is done by matrix products at its end:  R̃_j ← R̃_j − f_j·t,  t = R̃_p/pivot  for the chosen column p.
    """

    def __init__(self, R: Array) -> None:
        m, c = R.shape
        self._left = R.copy()
        self._step = 0  # within the block
        self._explained = np.empty((_BLOCK, c))  # t of each step of the block
        self._products = np.empty((_BLOCK, m))  # left @ t of each
        self._candidates: dict[int, Array] = {}
        self._is_wide = c > _BLOCK
        self._settle_norms()

    def _settle_norms(self) -> None:
        self._norms = np.einsum("ij,ij->i", self._left, self._left)
        self._largest = self._norms.max(initial=0.0)

    @property
    def is_stale(self) -> bool:
        """Whether the norms fell so far that differences of what they were would lose digits."""
        return bool(self._norms.max(initial=0.0) < 1e-3 * self._largest)

    def gains(self, residual: Array, free: npt.NDArray[np.bool_]) -> Array:
        """Return by how much each column would reduce the squared error of the targets."""
        gains = np.zeros_like(residual)
        np.divide(self._norms, residual, out=gains, where=free)
        if self._is_wide and not self._candidates:
            # One product for all columns likely to be chosen in this block costs less than one for each.
            likely = np.argsort(-gains, kind="stable")[: 3 * _BLOCK]
            self._candidates = dict(zip(likely.tolist(), (self._left[likely] @ self._left.T), strict=True))
        return gains

    def explain(self, p: int, row: Array, done: Array) -> None:
        """Take the chosen column's share out of the norms; ``done`` are the rows of the block so far."""
        own = self._candidates.get(p)
        if own is None:
            own = self._left @ self._left[p]
        earlier, shares = self._explained[: self._step], done[:, p]
        t = (self._left[p] - shares @ earlier) / row[p]
        product = (own - shares @ self._products[: self._step]) / row[p]
        left = product - (earlier @ t) @ done  # R̃·t, the block's rows having had their share
        self._norms += row * (row * (t @ t) - 2 * left)
        self._norms[p] = 0.0
        np.maximum(self._norms, 0.0, out=self._norms)
        self._explained[self._step], self._products[self._step] = t, product
        self._step += 1

    def settle(self, done: Array) -> None:
        """End a block: bring the moments up to date and start from them."""
        self._left -= done.T @ self._explained[: self._step]
        self._step, self._candidates = 0, {}
        self._settle_norms()


def _first_largest(scores: Array) -> int:
    # What is larger by rounding alone counts as a tie, so that the choice does not depend on how sums were taken.
    top = scores.max()
    return int(np.argmax(scores >= top - _TIE * abs(top)))


_BLOCK = 64  # choices between two updates of all that is left
_TIE = 1e-12
_ROUNDING = 8 * float(np.finfo(np.float64).eps)


def _rounding(j: int, energy: Array, factor: Array, chosen: Indices) -> float:
    # The factor is exact for moments off by a few m·ε‖x_i‖‖x_j‖. That moves the residual of x_j − Σ t_s x_s, the
    # best combination, by as many (‖x_j‖ + Σ|t_s|‖x_s‖)².
    lengths = np.sqrt(energy)
    t = solve_triangular(factor[:, chosen], factor[:, j]) if len(chosen) else np.zeros(0)
    return float(_ROUNDING * len(energy) * (lengths[j] + np.abs(t) @ lengths[chosen]) ** 2)


def _unit_scaled(R: Array) -> Array:
    # Scores are squares, compared only with each other: a power of two keeps them within float64.
    return np.asarray(np.ldexp(R, -np.frexp(np.abs(R).max(initial=0.0))[1]))
