"""Eliminating columns one at a time: the part all skeleton rules share.

On moments G = XᵀX a step is one of a pivoted Cholesky factorisation, in blocks, so that most of the work is matrix
products. On a triangle it is one of Gram–Schmidt with reorthogonalisation. Both give the rows of the factor that
pivoted QR of X has. Arrays may be NumPy's or torch tensors, which stay on their device: what is done to them is
common to both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg.blas

from ellq.theory.arguments import Array, Indices, count, is_tensor
from ellq.theory.array_kinds import blas_threads, namespace, on_host, solve_upper, zeros
from ellq.theory.columns import Columns, Moments, Triangle

Progress = Callable[[range], Iterable[int]]
Mask = npt.NDArray[np.bool_]

ROUNDING = 8 * float(np.finfo(np.float64).eps)
_BLOCK = 64  # choices between two updates of all that is left
_TIE = 1e-12


@dataclass(frozen=True)
class Selection:
    """The columns a rule chose and the factor that explains the others by them.

    Attributes:
        indices: chosen columns in order of choice, shape (k,).
        rank: how many of them were independent to working precision; later ones explain nothing new.
        factor: rows of the factor, shape (rank, m): G ≈ factorᵀ·factor, and ``factor[:, indices[:rank]]`` is upper
            triangular. A tensor where the columns are.
        errors: ‖X − X_S T‖_F after 0 … k choices, shape (k + 1,).
    """

    indices: Indices
    rank: int
    factor: Array
    errors: Array

    @property
    def feature_errors(self) -> Array:
        """Return the squares of the errors, which leave float64 where X is beyond 1e±154."""
        with np.errstate(over="ignore"):
            return np.asarray(self.errors**2)

    def first(self, k: int) -> Selection:
        """Return what the rule had chosen after k choices.

        Raises:
            TypeError: ``k`` is not a whole number.
            ValueError: ``k`` outside [0, number of choices].
        """
        k = count(k, "k", low=0, high=self.indices.size)
        rank = min(k, self.rank)
        return Selection(self.indices[:k], rank, self.factor[:rank], self.errors[: k + 1])


def eliminate(
    columns: Columns,
    retained: int,
    *,
    towards: Array | None = None,
    priority: Array | None = None,
    among: Indices | None = None,
    progress: Progress = iter,
) -> Selection:
    """Choose columns one at a time, each time that of the highest score among those not explained yet.

    The score is the length of the residual, if nothing else is given. Scores within a relative 1e-12 tie, and the
    lowest index of them is taken. When all is explained, the lowest indices make up the number.

    Args:
        columns: the data.
        retained: k, 1 ≤ k ≤ m.
        towards: score by the decrease of the squared error of these targets: XᵀY for moments, Y for a triangle.
        priority: fixed scores > 0 instead, shape (m,).
        among: choose only among these columns, as long as one of them is unexplained.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection, in order.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m].
    """
    k = count(retained, "retained", low=1, high=columns.features)
    # One thread: short steps gain little from more, and wait long for each other on a busy machine.
    with blas_threads(1) as threads:
        return _eliminate(columns, k, towards, priority, among, progress, threads)


def _eliminate(
    columns: Columns,
    k: int,
    towards: Array | None,
    priority: Array | None,
    among: Indices | None,
    progress: Progress,
    threads: int,
) -> Selection:
    m = columns.features
    left: _Complement | _Remainder = _Complement(columns) if isinstance(columns, Moments) else _Remainder(columns, k)
    xp, residual = left.xp, left.residual
    energy, lengths = residual + 0.0, residual**0.5
    targets = None if towards is None else _Targets(left, towards)
    open_: Mask = xp.ones_like(residual, dtype=xp.bool) if among is None else _mask(residual, among)
    free: Mask = residual > 0
    factor, upper = zeros(residual, k, m), _Upper(residual, k)
    errors = zeros(residual, k + 1)
    errors[0] = residual.sum()
    indices = np.empty(k, dtype=np.intp)
    start = step = 0
    ticks = iter(progress(range(k)))
    next(ticks)
    while step < k:
        scores = priority if priority is not None else residual if targets is None else targets.gains(free)
        scores = xp.where(free & open_, scores, -1.0)
        j = first_largest(scores)
        if scores[j] < 0:
            if bool(open_.all()):
                break
            open_ |= True  # none of those asked for is left that explains anything
            continue
        squared, own = float(residual[j]), float(energy[j])
        # Only a small residual can be rounding, unless the combination itself is wild; the solve is not for every step.
        if squared <= left.suspect * own:
            t = upper.solve(factor[:step, j])
            # The factor is exact for columns, or moments, that are off by rounding; so the residual of x_j − Σ t_s x_s,
            # the best combination, is off by as many times (‖x_j‖ + Σ|t_s|‖x_s‖)².
            reach = math.sqrt(own) + float(abs(t) @ lengths[indices[:step]])
            if squared <= left.noise * reach * reach:
                free[j], residual[j] = False, 0.0  # explained already
                continue
        row = left.row(j, factor[start:step])
        row *= free  # what is left of those chosen or explained is rounding
        if targets is not None:
            targets.explain(j, row, factor[start:step])
        factor[step], indices[step] = row, j
        step += 1
        upper.append(factor[:step, j])
        left.explain(j, factor[start:step], free)
        free = residual > left.noise * energy
        residual *= free
        errors[step] = residual.sum()
        next(ticks, None)
        if step - start == _BLOCK or (targets is not None and targets.is_stale):
            with blas_threads(threads):
                left.settle(factor[start:step])
                free &= residual > left.noise * energy
                residual *= free
                if targets is not None:
                    targets.settle(factor[start:step])
            start = step
    errors[step + 1 :] = errors[step]
    if step < k:  # the rest explain nothing; the lowest indices make the choice repeatable
        indices[step:] = np.setdiff1d(np.arange(m), indices[:step])[: k - step]
    # Squared lengths are recomputed at times; where that lifts their sum, it is by rounding.
    falling = np.minimum.accumulate(on_host(errors))
    factor, unit = factor[:step], left.unit
    return Selection(indices, step, factor if unit == 1 else factor * unit, np.sqrt(falling) * unit)


def explain_targets(columns: Columns, selection: Selection) -> tuple[Array, Array, Array]:
    """Return what the chosen columns explain of the targets, and what that leaves.

    Args:
        columns: the data.
        selection: made on them.

    Returns:
        R11, shape (rank, rank), upper triangular, of the first ``rank`` chosen columns X_S = Q·R11; QᵀY, shape
        (rank, c); and Σ‖y − ŷ‖² of least squares with the first 0 … k columns, shape (k + 1,). On a triangle no error
        is a difference, so that small ones keep their digits.
    """
    rank, chosen = selection.rank, selection.indices[: selection.rank]
    if isinstance(columns, Moments):
        upper = selection.factor[:, chosen]
        explained = solve_upper(upper, columns.R[chosen], transposed=True)
        gains = on_host((explained * explained).sum(axis=1))
        left = float(columns.yy.sum()) - np.concatenate([[0.0], np.cumsum(gains)])
    else:
        xp = namespace(columns.X)
        Q, upper = xp.linalg.qr(columns.X[:, chosen])
        signs = 1.0 - 2.0 * (upper.diagonal() < 0)
        Q, upper = Q * signs, upper * signs[:, None]  # as in the factor
        explained = Q.T @ columns.Y
        rest = columns.Y - Q @ explained
        outside = max(float((columns.yy - (columns.Y * columns.Y).sum(axis=0)).sum()), 0.0)
        gains = on_host((explained * explained).sum(axis=1))
        left = outside + float((rest * rest).sum()) + np.concatenate([np.cumsum(gains[::-1])[::-1], [0.0]])
    errors = np.full(selection.indices.size + 1, left[-1])
    errors[: rank + 1] = left
    return upper, explained, np.minimum.accumulate(np.maximum(errors, 0.0))


class _Complement:
    """What is left of moments: the Schur complement as of the last block, and its diagonal as of now."""

    def __init__(self, columns: Moments) -> None:
        self.xp = namespace(columns.G)
        self.unit = _binary_scale(float(columns.G.diagonal().max()) ** 0.5)
        self._schur = columns.G * (1 / self.unit) * (1 / self.unit)
        self.residual: Array = self._schur.diagonal() + 0.0
        self.noise = ROUNDING * columns.features
        self.suspect = 1e-3

    def row(self, j: int, done: Array) -> Array:
        """Return the row of the factor for column j; ``done`` are those of the block so far."""
        pivot = float(self.residual[j]) ** 0.5
        row: Array = (self._schur[j] - done[:, j] @ done) / pivot
        row[j] = pivot
        return row

    def explain(self, j: int, done: Array, free: Mask) -> None:
        """Take the last row of ``done``, that of column j, out of the residuals."""
        self.residual -= done[-1] * done[-1]
        self.residual[j] = 0.0

    def settle(self, done: Array) -> None:
        """End a block."""
        if self.xp is not np:
            self._schur -= done.T @ done
        else:  # in place; seen from Fortran, a symmetric matrix is what it was
            scipy.linalg.blas.dgemm(-1.0, done.T, done.T, beta=1.0, c=self._schur.T, trans_b=1, overwrite_c=1)

    def towards(self, targets: Array) -> Array:
        """Return XᵀY of the targets to begin with."""
        return targets + 0.0

    def towards_left(self, moments: Array, done: Array, explained: Array) -> Array:
        """Return XᵀY of what is left, after a block that explained this of the targets."""
        moments -= done.T @ explained
        return moments


class _Remainder:
    """What is left of a triangle: of X what is orthogonal to all chosen, as of the last block, and its squared lengths.

    The lengths are kept up to date by subtraction; where that would lose digits they are computed anew.
    """

    def __init__(self, columns: Triangle, retained: int) -> None:
        self.xp = namespace(columns.X)
        self.unit = _binary_scale(float(abs(columns.X).max()) if len(columns.X) else 0.0)
        self._left = columns.X * (1 / self.unit)
        self._basis = zeros(self._left, retained, len(self._left))
        self._begun = self._steps = 0  # of the basis, at the block's start and now
        self.residual: Array = (self._left * self._left).sum(axis=0)
        self._computed = self.residual + 0.0  # when they were last computed from X
        self._targets = self._left[:, :0]
        self.noise = (ROUNDING * columns.features) ** 2
        self.suspect = 1e-3 * ROUNDING * columns.features

    def row(self, j: int, done: Array) -> Array:
        """Return the row of the factor for column j; ``done`` are those of the block so far."""
        before = self._basis[: self._steps]
        q = self._left[:, j] - done[:, j] @ before[self._begun :]
        q = q - (before @ q) @ before  # again: rounding left some of it along those before
        pivot = float(q @ q) ** 0.5
        q = q / pivot
        self._basis[self._steps] = q
        self._steps += 1
        row: Array = q @ self._left
        row[j] = pivot
        return row

    def explain(self, j: int, done: Array, free: Mask) -> None:
        """Take the last row of ``done``, that of column j, out of the residuals."""
        self.residual -= done[-1] * done[-1]
        self.residual[j] = self._computed[j] = 0.0
        stale = free & (self.residual < 1e-6 * self._computed)
        if bool(stale.any()):
            which = self.xp.where(stale)[0]
            rest = self._left[:, which] - self._basis[self._begun : self._steps].T @ done[:, which]
            self.residual[which] = self._computed[which] = (rest * rest).sum(axis=0)

    def settle(self, done: Array) -> None:
        """End a block."""
        block = self._basis[self._begun : self._steps]
        self._left -= block.T @ done
        self._targets -= block.T @ (block @ self._targets)
        self._begun = self._steps
        self._computed = (self._left * self._left).sum(axis=0) * (self.residual > 0)
        self.residual[:] = self._computed

    def towards(self, targets: Array) -> Array:
        """Return XᵀY of the targets to begin with."""
        self._targets = targets + 0.0
        return self._left.T @ self._targets

    def towards_left(self, moments: Array, done: Array, explained: Array) -> Array:
        """Return XᵀY of what is left."""
        return self._left.T @ self._targets


class _Targets:
    """What the chosen columns leave unexplained of the targets' moments R, (m, c), and its squared row norms.

    Within a block only the norms are kept up to date, by products of the rows of R at the block's start, so that the
    work is done by matrix products at its end:  R̃_j ← R̃_j − f_j·t,  t = R̃_p/pivot  for the chosen column p.
    """

    def __init__(self, columns: _Complement | _Remainder, targets: Array) -> None:
        # Scores are squares, compared only with each other: a power of two keeps them within float64.
        size = float(abs(targets).max()) if math.prod(targets.shape) else 0.0
        self._columns = columns
        self._left = columns.towards(targets * (1 / _binary_scale(size)))
        m, c = self._left.shape
        self._step = 0  # within the block
        self._explained = zeros(self._left, _BLOCK, c)  # t of each step of the block
        self._products = zeros(self._left, _BLOCK, m)  # left @ t of each
        self._candidates: dict[int, Array] = {}
        self._is_wide = c > _BLOCK
        self._settle_norms()

    def _settle_norms(self) -> None:
        self._norms: Array = (self._left * self._left).sum(axis=1)
        self._largest = float(self._norms.max())

    @property
    def is_stale(self) -> bool:
        """Whether the norms fell so far that differences of what they were would lose digits."""
        return float(self._norms.max()) < 1e-3 * self._largest

    def gains(self, free: Mask) -> Array:
        """Return by how much each free column would reduce the squared error of the targets."""
        xp, residual = self._columns.xp, self._columns.residual
        gains: Array = self._norms / xp.where(free, residual, 1.0)
        if self._is_wide and not self._candidates:
            # One product for all columns likely to be chosen in this block costs less than one for each.
            likely = xp.argsort(xp.where(free, -gains, 1.0), stable=True)[: 3 * _BLOCK]
            self._candidates = dict(zip(likely.tolist(), self._left[likely] @ self._left.T, strict=True))
        return gains

    def explain(self, p: int, row: Array, done: Array) -> None:
        """Take the chosen column's share out of the norms; ``done`` are the rows of the block before this one."""
        own = self._candidates.get(p)
        if own is None:
            own = self._left @ self._left[p]
        pivot = float(row[p])
        earlier, shares = self._explained[: self._step], done[:, p]
        t = (self._left[p] - shares @ earlier) / pivot
        product = (own - shares @ self._products[: self._step]) / pivot
        left = product - (earlier @ t) @ done  # R̃·t, the block's rows having had their share
        self._norms += row * (row * (t @ t) - 2 * left)
        self._norms[p] = 0.0
        self._norms *= self._norms > 0
        self._explained[self._step], self._products[self._step] = t, product
        self._step += 1

    def settle(self, done: Array) -> None:
        """End a block: bring the moments up to date and start from them."""
        self._left = self._columns.towards_left(self._left, done, self._explained[: self._step])
        self._step, self._candidates = 0, {}
        self._settle_norms()


class _Upper:
    """An upper triangular matrix that grows by a column at a time."""

    def __init__(self, like: Array, size: int) -> None:
        self._steps = 0
        # BLAS solves with packed columns where they are; part of a square array would be copied each time.
        self._is_packed = not is_tensor(like)
        self._entries = zeros(like, size * (size + 1) // 2) if self._is_packed else zeros(like, size, size)

    def append(self, column: Array) -> None:
        """Add a column of one entry more than the last."""
        begin = self._steps * (self._steps + 1) // 2
        self._steps += 1
        if self._is_packed:
            self._entries[begin : begin + self._steps] = column
        else:
            self._entries[: self._steps, self._steps - 1] = column

    def solve(self, b: Array) -> Array:
        """Return the solution of upper @ x = b."""
        if not self._steps:
            return b
        if not self._is_packed:
            return solve_upper(self._entries[: self._steps, : self._steps], b)
        x: Array = scipy.linalg.blas.dtpsv(self._steps, self._entries, b)
        return x


def first_largest(scores: Array) -> int:
    """Return the first index whose score is the largest up to rounding."""
    # What is larger by rounding alone counts as a tie, so that the choice does not depend on how sums were taken.
    top = float(scores.max())
    return int(namespace(scores).where(scores >= top - _TIE * abs(top))[0][0])


def _mask(like: Array, indices: Indices) -> Mask:
    mask: Mask = zeros(like, len(like)) > 0
    mask[indices] = True
    return mask


def _binary_scale(size: float) -> float:
    """Return a power of two near ``size``, whose square and inverse are within float64."""
    return math.ldexp(1.0, min(max(math.frexp(size)[1], -500), 500))
