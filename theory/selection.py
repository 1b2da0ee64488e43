"""Skeleton rules: which columns to keep, each choice made on what the ones before it could not explain.

All work on second moments G = XᵀX alone. Eliminating column j from G is one step of a pivoted Cholesky
factorisation, which on G is what one step of pivoted QR is on X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
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
    energy = np.diag(G).copy()
    residual = energy.copy()
    targets = None if R is None else _unit_scaled(finite_array(R, "R", ndim=2))
    if targets is not None and len(targets) != m:
        raise ValueError(f"R has {len(targets)} rows but G has {m}. Pass XᵀY with one row per feature.")
    factor = np.zeros((k, m))
    indices = np.empty(k, dtype=np.intp)
    errors = np.zeros(k + 1)
    errors[0] = residual.sum()
    free = residual > 0
    step = 0
    ticks = iter(progress(range(k)))
    next(ticks)
    while step < k and free.any():
        if targets is None:
            score = np.where(free, residual, -np.inf)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                score = np.where(free, (targets * targets).sum(axis=1) / residual, -np.inf)
        j = int(np.argmax(score))
        # Only a small residual can be rounding, unless the combination itself is wild; the solve is not for every step.
        if residual[j] <= 1e-3 * energy[j] and residual[j] <= _rounding(j, energy, factor[:step], indices[:step]):
            free[j] = False  # explained already
            continue
        pivot = np.sqrt(residual[j])
        row = (G[j] - factor[:step, j] @ factor[:step]) / pivot
        row[~free] = 0.0  # chosen or explained: what is left of them is rounding
        row[j] = pivot
        if targets is not None:
            targets -= np.outer(row, targets[j] / pivot)
        residual -= row * row
        residual[j] = 0.0
        np.maximum(residual, 0.0, out=residual)
        free &= residual > _ROUNDING * m * energy
        factor[step], indices[step] = row, j
        step += 1
        next(ticks, None)
        errors[step] = residual[free].sum()
    errors[step + 1 :] = errors[step]
    if step < k:  # the rest explain nothing; the lowest indices make the choice repeatable
        indices[step:] = np.setdiff1d(np.arange(m), indices[:step])[: k - step]
    return Selection(indices, step, factor[:step], errors)


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
