"""How close a matrix is to low rank: the smooth counts of its singular values.

Each is a measure of ``measures`` taken of the singular values σ_1 ≥ σ_2 ≥ … of every matrix along the last two axes,
in float64, after division by a power of two near the largest entry. A convolution's weights (out, in, height, width)
are a matrix only after ``reshape(out, −1)``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array, finite_array, tensor_for_tensor
from ellq.theory.measures import effective_count, entropy_effective_count


@tensor_for_tensor
def stable_rank(W: npt.ArrayLike) -> Array:
    """Return the stable rank of every matrix along the last two axes.

        srank(W) = ‖W‖_F² / ‖W‖_2² = Σσ_i² / σ_1²        1 ≤ srank ≤ rank W

    Equal to the rank where all non-zero singular values are equal. Ignores scale, transposition, rotations of either
    side, in particular the order and signs of rows and columns, and appended zero rows and columns; [W W] has the
    same stable rank, the block diagonal of m copies m times as much. 0 for the zero matrix.

    Args:
        W: real array or tensor of shape (…, m, n), m, n ≥ 1, finite.

    Returns:
        Array of shape (…), values in [1, min(m, n)], or 0; off by at most about (m + n)·2⁻⁵³ relatively.

    Raises:
        TypeError: ``W`` is not numeric.
        ValueError: fewer than two dimensions, an empty axis, or a NaN or infinite entry.

    Reference: Rudelson & Vershynin 2007, section 1, as numerical rank.
    """
    s = _singular_values(W)
    with np.errstate(invalid="ignore"):
        rank = ((s / s[..., :1]) ** 2).sum(axis=-1)
    return np.where(s[..., 0] > 0, np.minimum(rank, s.shape[-1]), 0.0)


@tensor_for_tensor
def effective_rank(W: npt.ArrayLike) -> Array:
    """Return the effective rank of every matrix along the last two axes.

        erank(W) = exp(−Σ π_i log π_i),   π_i = σ_i/Σσ_j        1 ≤ erank ≤ rank W

    ``entropy_effective_count`` of the singular values, with the invariances of ``stable_rank``: ignores scale,
    transposition, rotations and appended zero rows and columns; [W W] has the same, the block diagonal of m copies m
    times as much. 0 for the zero matrix.

    Args:
        W: real array or tensor of shape (…, m, n), m, n ≥ 1, finite.

    Returns:
        Array of shape (…), values in [1, min(m, n)], or 0. Rounding makes the singular values beyond the rank about
        2⁻⁵³·σ_1 instead of 0, which adds about 1e-14 for each.

    Raises:
        TypeError: ``W`` is not numeric.
        ValueError: fewer than two dimensions, an empty axis, or a NaN or infinite entry.

    Reference: Roy & Vetterli 2007, Definition 1.
    """
    return entropy_effective_count(_singular_values(W))


@tensor_for_tensor
def participation_rank(W: npt.ArrayLike) -> Array:
    """Return the participation ratio of the squared singular values of every matrix along the last two axes.

        (Σσ_i²)² / Σσ_i⁴ = ‖W‖_F⁴ / ‖WᵀW‖_F²        srank ≤ … ≤ erank ≤ rank W

    ``effective_count`` of the singular values for p = 2, q = 4, with the invariances of ``stable_rank``. For W of
    centred samples it is the participation ratio of their covariance, a usual measure of their dimension. 0 for the
    zero matrix.

    Args:
        W: real array or tensor of shape (…, m, n), m, n ≥ 1, finite.

    Returns:
        Array of shape (…), values in [1, min(m, n)], or 0.

    Raises:
        TypeError: ``W`` is not numeric.
        ValueError: fewer than two dimensions, an empty axis, or a NaN or infinite entry.

    Reference: Gao et al. 2017 (bioRxiv 214262), participation ratio.
    """
    return effective_count(_singular_values(W), 2.0, 4.0)


def _singular_values(W: npt.ArrayLike) -> Array:
    """Return the falling singular values of every matrix, divided by a power of two near its largest entry."""
    array = finite_array(W, "W")
    if array.ndim < 2 or 0 in array.shape[-2:]:
        raise ValueError(f"W has shape {array.shape}. Pass matrices along the last two axes, of one entry or more.")
    exponent = np.frexp(np.abs(array).max(axis=(-2, -1), keepdims=True))[1]
    return np.linalg.svd(np.ldexp(array, -exponent), compute_uv=False)
