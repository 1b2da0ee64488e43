"""Removing blocks of columns one at a time, such as all kernel positions of a channel, so that the least is lost.

Targets Y are fitted by columns X with squared error ‖Y − XW‖_F². Removing block b and refitting the others costs
tr(W_bᵀ([H⁻¹]_bb)⁻¹W_b), H = E[XXᵀ], exactly; the cheapest goes first. One path gives the whole error curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ellq.theory.arguments import Array, Indices, count, finite_array
from ellq.theory.elimination import Progress


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


def eliminate_blocks(
    gram: npt.ArrayLike, weights: npt.ArrayLike, *, block: int, least: int = 0, progress: Progress = iter
) -> BlockPath:
    """Remove blocks of columns one at a time, always the one whose loss costs least once the rest is refitted.

        cost_b = tr(W_bᵀ ([H⁻¹]_bb)⁻¹ W_b)
        W ← W − [H⁻¹]_:b ([H⁻¹]_bb)⁻¹ W_b        H⁻¹ ← H⁻¹ − [H⁻¹]_:b ([H⁻¹]_bb)⁻¹ [H⁻¹]_b:

    The costs add up to the squared error of least squares on what stays, beyond that of all. Scales with ``gram`` and
    with the square of the weights; of equal costs the first block goes. To weight targets unequally, scale their
    columns of ``weights``. Greedy: the 2^m choices are not searched. Time O(d³ + d·c·m), memory O(d²).

    Args:
        gram: H, shape (d, d), symmetric positive definite; add a ridge where columns are dependent. The columns of
            block j are j·block … (j + 1)·block − 1.
        weights: W, the best fit with all blocks, shape (d, c), finite.
        block: columns of each block, ≥ 1, a divisor of d.
        least: how many blocks stay to the end; their order is then by position and their costs are 0.
        progress: wraps the range of removals, to show a bar.

    Returns:
        The order and its costs.

    Raises:
        TypeError: ``block`` or ``least`` is not a whole number.
        ValueError: shapes that do not fit, an entry that is not finite, or a ``gram`` that is not positive definite.

    Reference: Hassibi & Stork 1993 for single weights; by blocks as Kurtić, Frantar & Alistarh 2023 (ZipLM),
    equations 2 and 3.
    """
    H, W = finite_array(gram, "gram", ndim=2), finite_array(weights, "weights", ndim=2).copy()
    d = len(W)
    b = count(block, "block", low=1, high=max(d, 1))
    if H.shape != (d, d) or d % b:
        raise ValueError(f"gram {H.shape}, weights {W.shape} and block={b} do not fit: (d, d), (d, c), a divisor of d.")
    m = d // b
    stays = count(least, "least", low=0, high=m)
    unit, scale = float(np.diag(H).max(initial=0.0)) or 1.0, float(np.abs(W).max(initial=0.0)) or 1.0
    try:
        inverse = scipy.linalg.cho_solve(scipy.linalg.cho_factor(H / unit), np.eye(d))
    except scipy.linalg.LinAlgError as error:
        raise ValueError("gram is not positive definite: some columns depend on others. Add a ridge.") from error
    inverse, W = (inverse + inverse.T) / 2, W / scale
    alive = np.arange(m)
    order, costs = np.empty(m, dtype=np.intp), np.zeros(m)
    for step in progress(range(m - stays)):
        left = len(alive)
        blocks = inverse.reshape(left, b, left, b)[np.arange(left), :, np.arange(left)]
        parts = W.reshape(left, b, -1)
        solved = np.linalg.solve(blocks, parts)
        losses = np.einsum("jbc,jbc->j", parts, solved)
        j = int(np.argmin(losses))
        order[step], costs[step] = alive[j], max(float(losses[j]), 0.0)
        keep = np.delete(np.arange(left * b), slice(j * b, (j + 1) * b))
        column = inverse[keep][:, j * b : (j + 1) * b]
        W = W[keep] - column @ solved[j]
        inverse = inverse[np.ix_(keep, keep)] - column @ np.linalg.solve(blocks[j], column.T)
        inverse = (inverse + inverse.T) / 2
        alive = np.delete(alive, j)
    order[m - stays :] = alive
    return BlockPath(order, costs * unit * scale * scale)


def fit_blocks(
    gram: npt.ArrayLike, moments: npt.ArrayLike, retained: Sequence[int] | Indices, *, block: int, ridge: float = 0.0
) -> Array:
    """Fit targets by least squares with the columns of some blocks.

        W_S = (H_SS + λI)⁻¹ R_S

    Args:
        gram: H, shape (d, d), symmetric positive semidefinite.
        moments: R = E[X Yᵀ], shape (d, c).
        retained: the blocks that stay, in [0, d/block).
        block: columns of each block.
        ridge: λ ≥ 0.

    Returns:
        The weights of the retained blocks' columns, in the order of ``retained``, shape (k·block, c); those of least
        length where columns depend on each other and there is no ridge.

    Raises:
        ValueError: shapes that do not fit, an entry that is not finite, or a block that is not there.

    Reference: classical.
    """
    H, R = finite_array(gram, "gram", ndim=2), finite_array(moments, "moments", ndim=2)
    S = np.asarray(retained, dtype=np.intp)
    if H.shape != (len(R), len(R)) or len(R) % block:
        raise ValueError(
            f"gram {H.shape}, moments {R.shape} and block={block} do not fit: (d, d), (d, c), divisor of d."
        )
    if S.size and not 0 <= S.min() <= S.max() < len(R) // block:
        raise ValueError(f"retained holds blocks in [{S.min()}, {S.max()}]; there are {len(R) // block}.")
    columns = (S[:, None] * block + np.arange(block)).ravel()
    own = H[np.ix_(columns, columns)] + ridge * np.eye(columns.size)
    try:
        return np.asarray(scipy.linalg.cho_solve(scipy.linalg.cho_factor(own), R[columns]))
    except scipy.linalg.LinAlgError:
        return np.asarray(scipy.linalg.lstsq(own, R[columns])[0])
