"""Represent all columns by a few of them: the interpolation matrix, and the refit of what reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from ellq.theory.accumulators import Gram
from ellq.theory.arguments import Array, Indices
from ellq.theory.selection import Selection


@dataclass(frozen=True)
class Skeleton:
    """X ≈ 1·offsetᵀ + X[:, indices] @ interpolation, and what that costs at every k along the way.

    Attributes:
        indices: the skeleton, in order of choice, shape (k,).
        interpolation: T, shape (k, m), with T[:, indices] = I.
        offset: constant part, shape (m,); 0 without an intercept and at the skeleton.
        feature_errors: ‖X − 1·offsetᵀ − X_S T‖_F² with 0 … k columns, shape (k + 1,).
    """

    indices: Indices
    interpolation: Array
    offset: Array
    feature_errors: Array


@dataclass(frozen=True)
class Refit:
    """Y ≈ 1·interceptᵀ + X[:, indices] @ coefficients by least squares, with its error at every k.

    Attributes:
        indices: the skeleton, in order of choice, shape (k,).
        coefficients: shape (k, c).
        intercept: shape (c,); 0 where none was asked for.
        errors: Σ‖y − ŷ‖² with the first 0 … k columns of the skeleton, shape (k + 1,).
    """

    indices: Indices
    coefficients: Array
    intercept: Array
    errors: Array


def interpolate(gram: Gram, selection: Selection, *, intercept: bool) -> Skeleton:
    """Express every feature by the chosen ones, with least squares over the accumulated samples.

    Features that are exact combinations of the skeleton are met to rounding, zero features get a zero column.

    Args:
        gram: moments of the features.
        selection: made on the same moments, centred if ``intercept``.
        intercept: whether a constant column may be used.

    Returns:
        The skeleton.

    Raises:
        ValueError: ``gram`` is empty.

    Reference: Chee et al. 2021 (arXiv 2108.00065): T = R11⁻¹[R11 R12]Πᵀ; the constant column is ours.
    """
    gram.require_samples()
    chosen, rank = selection.indices, selection.rank
    m = gram.x_mean.size
    T = np.zeros((chosen.size, m))
    if rank:
        T[:rank] = solve_triangular(selection.factor[:, chosen[:rank]], selection.factor)
    T[:, chosen] = np.eye(chosen.size)
    offset = gram.x_mean - gram.x_mean[chosen] @ T if intercept else np.zeros(m)
    offset[chosen] = 0.0
    return Skeleton(chosen, T, offset, selection.feature_errors)


def refit(gram: Gram, selection: Selection, *, intercept: bool, present: Array | None = None) -> Refit:
    """Solve for the weights that reproduce the targets from the chosen features alone.

    Chosen features that the samples cannot tell apart from others (dead ones, duplicates) keep their present weights,
    so that one which only comes alive on other inputs still counts; the rest are solved for what remains.

    Args:
        gram: moments of features and targets.
        selection: made on the same moments, centred if ``intercept``.
        intercept: whether a constant may be added to each target.
        present: the weights that read the features now, shape (m, c); 0 if not given.

    Returns:
        The least-squares solution, and its squared error after each choice.

    Raises:
        ValueError: ``gram`` is empty, or ``present`` has another shape than (m, c).

    Reference: normal equations through the factor of ``selection``.
    """
    G, R, yy = gram.moments(centred=intercept)
    if present is not None and present.shape != R.shape:
        raise ValueError(f"present has shape {present.shape}, expected {R.shape}: one row per feature.")
    chosen, rank = selection.indices, selection.rank
    independent, redundant = chosen[:rank], chosen[rank:]
    errors = np.full(chosen.size + 1, float(yy.sum()))
    coefficients = np.zeros((chosen.size, R.shape[1]))
    if present is not None:
        coefficients[rank:] = present[redundant]
    if rank:
        upper = selection.factor[:, independent]
        explained = solve_triangular(upper, R[independent], trans="T")
        coefficients[:rank] = solve_triangular(upper, explained)
        if present is not None and redundant.size:
            taken_over = solve_triangular(upper, G[np.ix_(independent, redundant)], trans="T")
            coefficients[:rank] -= solve_triangular(upper, taken_over) @ present[redundant]
        gains = np.concatenate([(explained**2).sum(axis=1), np.zeros(chosen.size - rank)])
        errors[1:] = np.maximum(errors[0] - np.cumsum(gains), 0.0)
    shift = gram.y_mean - gram.x_mean[chosen] @ coefficients if intercept else np.zeros(R.shape[1])
    return Refit(chosen, coefficients, shift, errors)
