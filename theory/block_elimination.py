"""Removing blocks of columns one at a time, such as all kernel positions of a channel, so that the least is lost.

Targets Y are fitted by columns X with squared error ‖Y − XW‖_F². Removing block b and refitting the others costs
tr(W_bᵀ([H⁻¹]_bb)⁻¹W_b), H = E[XXᵀ], exactly; the cheapest goes first. One path gives the whole error curve. Where
several layers read the same units, their costs add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ellq.theory.arguments import Array, Indices, count, finite_array
from ellq.theory.array_kinds import blas_threads
from ellq.theory.elimination import Progress

_RENEWED = 16  # removals after which squares are summed anew, for their updates cancel


@dataclass(frozen=True)
class BlockPath:
    """In which order blocks go, and what that costs.

    Attributes:
        order: blocks, first removed first, shape (m,).
        costs: by how much each removal raises the squared error once the rest is refitted, shape (m,), ≥ 0.
    """

    order: Indices
    costs: Array

    @property
    def errors(self) -> Array:
        """Squared error with 0 … m blocks retained, beyond that of the fit with all; shape (m + 1,)."""
        return np.concatenate([np.cumsum(self.costs)[::-1], [0.0]])

    def retained(self, k: int) -> Indices:
        """Return the k blocks that stay, rising.

        Raises:
            TypeError: ``k`` is not a whole number.
            ValueError: ``k`` outside [0, m].
        """
        k = count(k, "k", low=0, high=self.order.size)
        return np.sort(self.order[self.order.size - k :])


@dataclass(frozen=True)
class BlockFit:
    """One fit of targets by columns, some of which are in blocks.

    Attributes:
        gram: H, shape (d, d), symmetric positive definite; add a ridge where columns are dependent.
        weights: W, the best fit with all columns, shape (d, c), finite. To weight targets unequally, scale its columns.
        columns: which columns each block has, shape (m, b), each at most once; the others always stay.
    """

    gram: npt.ArrayLike
    weights: npt.ArrayLike
    columns: npt.ArrayLike

    @staticmethod
    def in_order(gram: npt.ArrayLike, weights: npt.ArrayLike, *, block: int) -> BlockFit:
        """Return the fit whose block j has the columns j·block … (j + 1)·block − 1.

        Raises:
            TypeError: ``block`` is not a whole number.
            ValueError: ``block`` is no divisor of d.
        """
        d = len(np.asarray(weights))
        b = count(block, "block", low=1, high=max(d, 1))
        if d % b:
            raise ValueError(f"weights of {d} rows and block={b} do not fit: choose a divisor of {d}.")
        return BlockFit(gram, weights, np.arange(d).reshape(-1, b))


def eliminate_blocks(fits: BlockFit | Sequence[BlockFit], *, least: int = 0, progress: Progress = iter) -> BlockPath:
    """Remove blocks of columns one at a time, always the one whose loss costs least once the rest is refitted.

        cost_b = Σ_fits tr(W_bᵀ ([H⁻¹]_bb)⁻¹ W_b)
        W ← W − [H⁻¹]_:b ([H⁻¹]_bb)⁻¹ W_b        H⁻¹ ← H⁻¹ − [H⁻¹]_:b ([H⁻¹]_bb)⁻¹ [H⁻¹]_b:

    The costs add up to the squared errors of least squares on what stays, beyond those of all. Scales with ``gram`` and
    with the square of the weights; of equal costs the first block goes. Greedy: the 2^m choices are not searched. The
    downdates of H⁻¹ are a Cholesky factorisation of it, of which only what the next step needs is computed: time
    O(d³ + m·d·c·b), memory O(d²).

    Args:
        fits: one, or those of all that read the same m blocks.
        least: how many blocks stay to the end; their order is then by position and their costs are 0.
        progress: wraps the range of removals, to show a bar.

    Returns:
        The order and its costs.

    Raises:
        TypeError: ``least`` is not a whole number.
        ValueError: no fits, shapes that do not fit, an entry that is not finite, a column in two blocks, or a ``gram``
            that is not positive definite.

    Reference: Hassibi & Stork 1993 for single weights; by blocks as Kurtić, Frantar & Alistarh 2023 (ZipLM),
    equations 2 and 3; several readers: ours.
    """
    states = [_State(fit) for fit in ([fits] if isinstance(fits, BlockFit) else fits)]
    if not states:
        raise ValueError("fits is empty. Pass at least one.")
    m = len(states[0].columns)
    if any(len(state.columns) != m for state in states):
        raise ValueError(f"fits have {sorted({len(state.columns) for state in states})} blocks; all need the same.")
    stays = count(least, "least", low=0, high=m)
    order, costs = np.empty(m, dtype=np.intp), np.zeros(m)
    is_left = np.ones(m, dtype=bool)
    with blas_threads(1):  # many small steps: threads cost more than they bring, and far more on a busy machine
        for step in progress(range(m - stays)):
            losses = np.where(is_left, sum(state.losses() for state in states), np.inf)
            j = int(np.argmin(losses))
            order[step], costs[step] = j, max(float(losses[j]), 0.0)
            is_left[j] = False
            for state in states:
                state.remove_(j)
    order[m - stays :] = np.flatnonzero(is_left)
    return BlockPath(order, costs)


class _State:
    """What is left of one fit: H⁻¹ as it was, the factor of what has been taken from it, and the weights."""

    def __init__(self, fit: BlockFit) -> None:
        H, W = finite_array(fit.gram, "gram", ndim=2), finite_array(fit.weights, "weights", ndim=2)
        self.columns = np.asarray(fit.columns, dtype=np.intp)
        d, used = len(W), self.columns.ravel()
        if H.shape != (d, d) or self.columns.ndim != 2 or (used.size and not 0 <= used.min() <= used.max() < d):
            raise ValueError(
                f"gram {H.shape}, weights {W.shape} and columns {self.columns.shape} do not fit: (d, d), (d, c), and"
                " (m, b) numbers in [0, d)."
            )
        if len(np.unique(used)) < used.size:
            raise ValueError("columns names a column twice. Give every column to one block at most.")
        unit, scale = float(np.diag(H).max(initial=0.0)) or 1.0, float(np.abs(W).max(initial=0.0)) or 1.0
        self.unit = unit * scale * scale
        try:
            inverse = scipy.linalg.cho_solve(scipy.linalg.cho_factor(H / unit), np.eye(d))
        except scipy.linalg.LinAlgError as error:
            raise ValueError("gram is not positive definite: some columns depend on others. Add a ridge.") from error
        self.inverse, self.W = (inverse + inverse.T) / 2, np.ascontiguousarray(W / scale)
        # Column by column, so that what is there so far lies together.
        self.factor = np.empty((d, used.size), order="F")
        self.done = 0
        self.diagonal = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]  # (m, b, b)
        self.alive = np.ones(len(self.columns), dtype=bool)
        self.squares = np.einsum("dc,dc->d", self.W, self.W)  # of rows, for blocks of one column

    def losses(self) -> Array:
        alive = np.flatnonzero(self.alive)
        found = np.zeros(len(self.columns))
        if self.columns.shape[1] == 1:
            found[alive] = np.maximum(self.squares[self.columns[alive, 0]], 0.0) / self.diagonal[alive, 0, 0]
        else:
            parts = self.W[self.columns[alive]]  # (left, b, c)
            found[alive] = np.einsum("jbc,jbc->j", parts, np.linalg.solve(self.diagonal[alive], parts))
        return found * self.unit

    def remove_(self, j: int) -> None:
        own, b = self.columns[j], self.columns.shape[1]
        past = self.factor[:, : self.done]
        column = self.inverse[:, own] - past @ past[own].T  # (d, b) of the inverse that is left
        block = (column[own] + column[own].T) / 2
        change = np.linalg.solve(block, self.W[own])
        if b == 1:  # ‖w − a·v‖² = ‖w‖² − 2a⟨w, v⟩ + a²‖v‖²
            a, v = column[:, 0], change[0]
            self.squares += a * (a * (v @ v) - 2 * (self.W @ v))
        # In place, one pass: W is Fortran-ordered as seen through its transpose.
        scipy.linalg.blas.dgemm(-1.0, change.T, column.T, beta=1.0, c=self.W.T, overwrite_c=True)
        if self.done % _RENEWED == 0:
            self.squares = np.einsum("dc,dc->d", self.W, self.W)
        root = np.linalg.cholesky(block)
        new = scipy.linalg.solve_triangular(root, column.T, lower=True).T
        self.factor[:, self.done : self.done + b] = new
        self.done += b
        self.alive[j] = False
        parts = new[self.columns]  # (m, b, b)
        self.diagonal -= parts @ parts.swapaxes(1, 2)


def fit_columns(
    gram: npt.ArrayLike, moments: npt.ArrayLike, columns: Sequence[int] | Indices, *, ridge: float = 0.0
) -> Array:
    """Fit targets by least squares with some columns.

        W_S = (H_SS + λI)⁻¹ R_S

    Args:
        gram: H, shape (d, d), symmetric positive semidefinite.
        moments: R = E[X Yᵀ], shape (d, c).
        columns: S, those that stay, in [0, d).
        ridge: λ ≥ 0.

    Returns:
        Their weights, in the order of ``columns``, shape (k, c); those of least length where columns depend on each
        other and there is no ridge.

    Raises:
        ValueError: shapes that do not fit, an entry that is not finite, or a column that is not there.

    Reference: classical.
    """
    H, R = finite_array(gram, "gram", ndim=2), finite_array(moments, "moments", ndim=2)
    S = np.asarray(columns, dtype=np.intp)
    if H.shape != (len(R), len(R)):
        raise ValueError(f"gram {H.shape} and moments {R.shape} do not fit: (d, d) and (d, c).")
    if S.size and not 0 <= S.min() <= S.max() < len(R):
        raise ValueError(f"columns holds numbers in [{S.min()}, {S.max()}]; there are {len(R)}.")
    own = H[np.ix_(S, S)] + ridge * np.eye(S.size)
    try:
        return np.asarray(scipy.linalg.cho_solve(scipy.linalg.cho_factor(own), R[S]))
    except scipy.linalg.LinAlgError:
        return np.asarray(scipy.linalg.lstsq(own, R[S])[0])
