"""Removing weights one at a time, each row of a layer by itself, so that the least is lost on given inputs.

Row i of a layer errs by (w − w*)ᵀH(w − w*) where w* fits best and H = E[XXᵀ], the same for all rows. Removing weight j
and refitting the others costs w_j²/[H⁻¹]_jj, exactly; the cheapest goes first. This is the optimal brain surgeon run
row by row on a quadratic error, so that its costs are no approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ellq.theory.arguments import Array, finite_array, nonnegative
from ellq.theory.elimination import Progress

if TYPE_CHECKING:
    from torch import Tensor

Counts = npt.NDArray[np.int64]
Kept = npt.NDArray[np.bool_]

_BLOCK = 32  # removals between two updates of all that is left
_BYTES = 2**28  # of inverse matrices held at once
_TYPES = ("float64", "float32")


@dataclass(frozen=True)
class RowPaths:
    """In which order each row loses its weights, and what that costs.

    Attributes:
        order: entries of each row, first removed first, shape (c, d).
        costs: by how much each removal raises the row's squared error when the rest is refitted, shape (c, d), ≥ 0.
    """

    order: npt.NDArray[np.int64]
    costs: Array

    @property
    def errors(self) -> Array:
        """Squared error of every row with 0 … d weights retained, beyond that of the best fit; shape (c, d + 1)."""
        rising = np.cumsum(self.costs, axis=1, dtype=np.float64)
        return np.concatenate([rising[:, ::-1], np.zeros((len(rising), 1))], axis=1)

    def kept(self, retained: npt.ArrayLike) -> Kept:
        """Return which entries stay when row i retains ``retained[i]``; shape (c, d).

        Raises:
            ValueError: not one count in [0, d] for each row.
        """
        c, d = self.order.shape
        counts = np.asarray(retained)
        if counts.shape != (c,) or not ((counts >= 0) & (counts <= d)).all():
            raise ValueError(f"retained must hold {c} counts in [0, {d}].")
        stays = np.arange(d) >= d - counts[:, None]
        kept = np.zeros((c, d), dtype=bool)
        np.put_along_axis(kept, self.order, stays, axis=1)
        return kept


def eliminate_rows(
    gram: npt.ArrayLike, weights: npt.ArrayLike, *, precision: str = "float64", progress: Progress = iter
) -> RowPaths:
    """Remove the weights of each row one at a time, always the one whose loss costs least once the rest is refitted.

        cost_j = w_j²/[H⁻¹]_jj        w ← w − (w_j/[H⁻¹]_jj)·H⁻¹_:j        H⁻¹ ← H⁻¹ − H⁻¹_:j H⁻¹_j:/[H⁻¹]_jj

    The costs of a row add up to the squared error of least squares on what it retains. Ignores signs; scales with
    ``gram`` and with the square of the weights; of equal costs the first entry goes. Greedy: 2^d supports are not
    searched. Time O(c·d³), mostly in matrix products; memory c·d² or 256 MiB, whichever is less.

    Args:
        gram: H, shape (d, d), symmetric positive definite; add a ridge where inputs are dependent.
        weights: w* of each row, the best fit with nothing removed, shape (c, d), finite.
        precision: "float64", or "float32" for half the time; the order is then that of rounded costs.
        progress: wraps the range of groups of rows, to show a bar.

    Returns:
        The order of removal and its costs.

    Raises:
        ValueError: shapes that do not fit, an entry that is not finite, or a ``gram`` that is not positive definite.

    Reference: Hassibi & Stork 1993 (optimal brain surgeon), equations 5 and 6; row by row as Frantar & Alistarh 2022
    (optimal brain compression), Section 4; the blocks are ours.
    """
    import torch

    H, W = finite_array(gram, "gram", ndim=2), finite_array(weights, "weights", ndim=2)
    d = W.shape[1]
    if H.shape != (d, d):
        raise ValueError(f"gram has shape {H.shape} but each row has {d} weights. Pass one row and column for each.")
    if precision not in _TYPES:
        raise ValueError(f"precision={precision!r} is unknown. Choose 'float64' or 'float32'.")
    # In units of each input's and each row's size the order is the same, and single precision has digits for all.
    size = np.sqrt(np.maximum(np.diag(H), 0.0))
    try:
        if not size.all():
            raise scipy.linalg.LinAlgError("an input is 0")
        inverse = scipy.linalg.cho_solve(scipy.linalg.cho_factor(H / size / size[:, None]), np.eye(d))
    except scipy.linalg.LinAlgError as error:
        raise ValueError("gram is not positive definite: some inputs depend on others. Add a ridge.") from error
    kind = torch.float32 if precision == "float32" else torch.float64
    largest, unit = np.abs(W).max(axis=1, keepdims=True, initial=0.0), float(size.max(initial=0.0)) or 1.0
    scale = np.where(largest > 0, largest, 1.0)
    W = W / scale * (size / unit)
    A, rows = torch.from_numpy((inverse + inverse.T) / 2).to(kind), torch.from_numpy(W).to(kind)
    at_once = max(1, _BYTES // (A.element_size() * d * d))
    parts = []
    threads = torch.get_num_threads()
    # One thread: steps are short, and on a busy machine threads wait for each other far longer than they work.
    torch.set_num_threads(1)
    try:
        for group in progress(range(-(-len(W) // at_once))):
            parts.append(_eliminate(A, rows[group * at_once : (group + 1) * at_once]))
    finally:
        torch.set_num_threads(threads)
    order = np.concatenate([part[0].numpy() for part in parts])
    costs = np.concatenate([part[1].double().numpy() for part in parts])
    return RowPaths(order, costs * scale * unit * scale * unit)


def _eliminate(inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Run a group of rows, each on its own copy of the inverse, from which what is removed is cut out by blocks."""
    import torch

    c, d = weights.shape
    A, w = inverse.expand(c, d, d), weights.clone()
    order, costs = torch.empty(c, d, dtype=torch.int64), torch.empty_like(weights)
    alive, row = torch.arange(d).expand(c, d), torch.arange(c)
    tiny = torch.finfo(weights.dtype).tiny
    for start in range(0, d, _BLOCK):
        m = d - start
        steps = min(_BLOCK, m)
        V = A.new_zeros(c, steps, m)  # A − VᵀV is the inverse now
        # Rounding may take the diagonal of what is nearly explained to 0; such an entry is never cheap to keep.
        diagonal = A.diagonal(dim1=1, dim2=2).clamp(min=tiny)
        gone = torch.zeros(c, m, dtype=torch.bool)
        for step in range(steps):
            cost, j = (w * w / diagonal).masked_fill_(gone, torch.inf).min(dim=1)
            order[:, start + step], costs[:, start + step] = alive[row, j], cost
            done = V[:, :step]
            line = A[row, j] - torch.bmm(done[row, :, j][:, None], done)[:, 0]
            pivot = diagonal[row, j]
            w -= (w[row, j] / pivot)[:, None] * line
            V[:, step] = line * pivot.rsqrt()[:, None]
            diagonal -= V[:, step] ** 2
            gone[row, j], w[row, j] = True, 0.0
            diagonal.clamp_(min=tiny)
        left = (~gone).nonzero()[:, 1].view(c, m - steps)
        V = V.gather(2, left[:, None].expand(-1, steps, -1))
        A = A.gather(1, left[:, :, None].expand(-1, -1, m)).gather(2, left[:, None].expand(-1, m - steps, -1))
        A = torch.baddbmm(A, V.transpose(1, 2), V, alpha=-1)
        w, alive = w.gather(1, left), alive.gather(1, left)
    return order, costs.clamp_(min=0)


def sparsegpt_rows(gram: npt.ArrayLike, weights: npt.ArrayLike, sparsity: float, *, block: int = 128) -> Array:
    """Prune all rows of a layer from the first column to the last, each column's loss made up by those after it.

    Of every ``block`` columns the fraction ``sparsity`` with the least w²/U_jj² goes, over all rows together; U is the
    upper Cholesky factor of H⁻¹. In all round(c·d·sparsity) weights go, to a whole number in each block.

    Args:
        gram: H, shape (d, d), symmetric positive definite; the authors add 1 % of the mean diagonal.
        weights: shape (c, d), finite.
        sparsity: fraction of each block to remove, in [0, 1).
        block: columns whose mask is chosen at once, ≥ 1.

    Returns:
        The new weights, shape (c, d), 0 where removed.

    Raises:
        ValueError: shapes that do not fit, an argument out of range, or a ``gram`` that is not positive definite.

    Reference: Frantar & Alistarh 2023 (SparseGPT), Algorithm 1.
    """
    H, W = finite_array(gram, "gram", ndim=2), finite_array(weights, "weights", ndim=2).copy()
    d = W.shape[1]
    if H.shape != (d, d):
        raise ValueError(f"gram has shape {H.shape} but each row has {d} weights. Pass one row and column for each.")
    if not 0 <= sparsity < 1 or block < 1:
        raise ValueError(f"sparsity={sparsity:g} must lie in [0, 1) and block={block} be at least 1.")
    try:
        inverse = scipy.linalg.cho_solve(scipy.linalg.cho_factor(H), np.eye(d))
        U = scipy.linalg.cholesky(inverse)
    except scipy.linalg.LinAlgError as error:
        raise ValueError("gram is not positive definite: some inputs depend on others. Add a ridge.") from error
    total = round(W.size * sparsity)
    for start in range(0, d, block):
        stop = min(start + block, d)
        scores = (W[:, start:stop] / np.diag(U)[start:stop]) ** 2
        gone = np.zeros(scores.size, dtype=bool)
        share = total * stop // d - total * start // d
        gone[np.argsort(scores, axis=None, kind="stable")[:share]] = True
        losses = np.zeros_like(scores)
        for j, removed in zip(range(start, stop), gone.reshape(scores.shape).T, strict=True):
            loss = np.where(removed, W[:, j], 0.0) / U[j, j]
            W[:, j:stop] -= np.outer(loss, U[j, j:stop])
            W[removed, j] = 0.0
            losses[:, j - start] = loss
        W[:, stop:] -= losses @ U[start:stop, stop:]
    return W


def fit_rows(gram: npt.ArrayLike, moments: npt.ArrayLike, kept: npt.ArrayLike, *, ridge: float = 0.0) -> Array:
    """Fit each row by least squares with the entries it retains.

        w_S = (H_SS + λI)⁻¹ R_S

    Args:
        gram: H, shape (d, d), symmetric positive semidefinite.
        moments: R = E[Y Xᵀ], shape (c, d).
        kept: which entries each row retains, boolean, shape (c, d).
        ridge: λ ≥ 0.

    Returns:
        The weights, shape (c, d), 0 where not retained. Where retained inputs depend on each other and there is no
        ridge, those of least length.

    Raises:
        ValueError: shapes that do not fit, an entry that is not finite, or ``ridge`` < 0.

    Reference: classical.
    """
    H, R = finite_array(gram, "gram", ndim=2), finite_array(moments, "moments", ndim=2)
    S = np.asarray(kept)
    if S.shape != R.shape or S.dtype != np.bool_ or H.shape != (R.shape[1], R.shape[1]):
        raise ValueError(f"gram {H.shape}, moments {R.shape} and kept {S.shape} do not fit: (d, d), (c, d) and (c, d).")
    damped = H + nonnegative(ridge, "ridge") * np.eye(len(H))
    fitted = np.zeros(R.shape)
    for weights, targets, stays in zip(fitted, R, S, strict=True):
        own = np.flatnonzero(stays)
        if not own.size:
            continue
        block = damped[np.ix_(own, own)]
        try:
            weights[own] = scipy.linalg.cho_solve(scipy.linalg.cho_factor(block), targets[own])
        except scipy.linalg.LinAlgError:
            weights[own] = scipy.linalg.lstsq(block, targets[own])[0]
    return fitted


def row_errors(gram: npt.ArrayLike, moments: npt.ArrayLike, energy: npt.ArrayLike, weights: npt.ArrayLike) -> Array:
    """Return the mean squared error E(y_i − w_iᵀX)² of every row.

        e_i = E[y_i²] − 2 w_iᵀR_i + w_iᵀHw_i

    A difference: errors below about 1e-15 of E[y_i²] are rounding, and none is below 0.

    Args:
        gram: H = E[XXᵀ], shape (d, d).
        moments: R = E[Y Xᵀ], shape (c, d).
        energy: E[y_i²], shape (c,), ≥ 0.
        weights: shape (c, d).

    Returns:
        The errors, shape (c,), ≥ 0.

    Raises:
        ValueError: shapes that do not fit, or an entry that is not finite.

    Reference: classical.
    """
    H, R = finite_array(gram, "gram", ndim=2), finite_array(moments, "moments", ndim=2)
    y, W = finite_array(energy, "energy", ndim=1), finite_array(weights, "weights", ndim=2)
    if H.shape != (R.shape[1], R.shape[1]) or y.shape != (len(R),) or W.shape != R.shape:
        raise ValueError(
            f"gram {H.shape}, moments {R.shape}, energy {y.shape} and weights {W.shape} do not fit: (d, d), (c, d),"
            " (c,) and (c, d)."
        )
    return np.asarray(np.maximum(y + np.einsum("ij,ij->i", W @ H - 2 * R, W), 0.0))
