"""Skeleton rules: which columns to keep, each choice made on what the ones before it could not explain.

A rule is a function ``rule(columns, retained) -> Selection`` of second moments or of a triangle with the same ones;
rules that start from another and improve it by swaps are in ``swaps``.
"""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import numpy as np

from ellq.theory.arguments import Array, count
from ellq.theory.array_kinds import beside, namespace
from ellq.theory.columns import Columns, Moments
from ellq.theory.elimination import Progress as Progress
from ellq.theory.elimination import Selection as Selection
from ellq.theory.elimination import eliminate, explain_targets

MOST_EXHAUSTIVE = 14  # columns whose subsets can all be tried
Error = Literal["features", "outputs"]


def pivoted_qr(columns: Columns, retained: int, *, progress: Progress = iter) -> Selection:
    """Choose the column with the largest residual, again and again (Businger–Golub pivoting).

    Ties go to the lowest index. Columns that are combinations of those chosen are taken last.

    Args:
        columns: moments or a triangle of the features, m of them.
        retained: k, 1 ≤ k ≤ m.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection, in order.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m].

    Reference: Businger & Golub 1965; the rule of Chee et al. 2021 (arXiv 2108.00065).
    """
    return eliminate(columns, retained, progress=progress)


def output_aware(columns: Columns, retained: int, *, progress: Progress = iter) -> Selection:
    """Choose the column that most reduces the least-squares error of the targets, again and again.

        j = argmax ‖R̃_j‖² / S_jj        S: Schur complement of XᵀX, R̃: what is left of XᵀY

    For targets Y = XU this is ‖(SU)_j‖²/S_jj. The decrease is exact for the refitted consumer. Ties go to the lowest
    index.

    Args:
        columns: moments or a triangle of the features, m of them, and of the targets.
        retained: k, 1 ≤ k ≤ m.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection, in order.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m], or no targets.

    Reference: orthogonal least squares (Chen, Billings & Luo 1989) with several targets.
    """
    return eliminate(columns, retained, towards=towards(columns, "outputs"), progress=progress)


def residual_trace(columns: Columns, retained: int, *, progress: Progress = iter) -> Selection:
    """Choose the column that most reduces the squared error of all columns together, again and again.

        j = argmax Σ_i S_ij² / S_jj        S: Schur complement of XᵀX

    That is ``output_aware`` with the features themselves as targets. Ties go to the lowest index.

    Args:
        columns: moments or a triangle of the features, m of them.
        retained: k, 1 ≤ k ≤ m.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection, in order.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m].

    Reference: greedy column subset selection (Farahat, Ghodsi & Kamel 2011).
    """
    return eliminate(columns, retained, towards=towards(columns, "features"), progress=progress)


def random_columns(columns: Columns, retained: int, *, seed: int = 0, progress: Progress = iter) -> Selection:
    """Choose uniformly at random among the columns not explained yet, as a baseline.

    Args:
        columns: moments or a triangle of the features, m of them.
        retained: k, 1 ≤ k ≤ m; the same seed gives the same first choices for any k.
        seed: of the order.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection, in order.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m].

    Reference: by definition.
    """
    order = np.random.default_rng(seed).permutation(columns.features)
    priority = beside(towards(columns, "features"), order + 1.0)
    return eliminate(columns, retained, priority=priority, progress=progress)


def leverage(
    columns: Columns, retained: int, *, rank: int | None = None, seed: int = 0, progress: Progress = iter
) -> Selection:
    """Choose at random by leverage scores, without replacement, among the columns not explained yet.

        P(j) ∝ ℓ_j = Σ_(i ≤ r) V_ij²        V: right singular vectors of X

    Columns of score 0 come last. ``leverage_sampling_bound`` bounds the mean squared error where k is several times r.

    Args:
        columns: moments or a triangle of the features, m of them.
        retained: k, 1 ≤ k ≤ m.
        rank: r, 1 ≤ r ≤ m; k if not given.
        seed: of the draw.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection, in order.

    Raises:
        TypeError: ``retained`` or ``rank`` is not a whole number.
        ValueError: ``retained`` or ``rank`` outside [1, m].

    Reference: Drineas, Mahoney & Muthukrishnan 2008, who draw with replacement.
    """
    m = columns.features
    k = count(retained, "retained", low=1, high=m)
    r = k if rank is None else count(rank, "rank", low=1, high=m)
    values = towards(columns, "features")
    xp = namespace(values)
    if isinstance(columns, Moments):
        vectors = xp.linalg.eigh(values)[1].T[-r:]
    else:
        vectors = xp.linalg.svd(values, full_matrices=False)[2][:r]
    # Of exponential waiting times with rates ℓ_j, the shortest k are such a draw.
    waiting = beside(values, np.random.default_rng(seed).exponential(size=m))
    return eliminate(columns, k, priority=(vectors * vectors).sum(axis=0) / waiting, progress=progress)


def exhaustive(columns: Columns, retained: int, *, error: Error = "features", progress: Progress = iter) -> Selection:
    """Choose the k columns with the least error, by trying all sets of k; at most 14 columns.

    Errors within 1e-12 of all there is to explain tie; the first set in lexicographic order is taken. The columns of
    the set are ordered by pivoted QR among them.

    Args:
        columns: moments or a triangle of the features, m ≤ 14 of them, and of the targets.
        retained: k, 1 ≤ k ≤ m.
        error: ``"features"`` for ‖X − X_S T‖_F, ``"outputs"`` for the least-squares error of the targets.
        progress: wraps the range of choices, to show a bar.

    Returns:
        The selection.

    Raises:
        TypeError: ``retained`` is not a whole number.
        ValueError: ``retained`` outside [1, m], m > 14, another word for ``error``, or no targets to judge by.

    Reference: by definition.
    """
    m = columns.features
    k = count(retained, "retained", low=1, high=m)
    if m > MOST_EXHAUSTIVE:
        raise ValueError(
            f"Trying all sets of {m} columns takes too long. Choose swap_refined beyond {MOST_EXHAUSTIVE}."
        )
    towards(columns, error)  # refuses
    # In coordinates of an orthonormal basis of all columns, which leaves their distances what they are.
    host = columns.cpu()
    whole = eliminate(host, m)
    if not whole.rank:
        return eliminate(columns, k, progress=progress)
    X = whole.factor
    Y = X if error == "features" else explain_targets(host, whole)[1]
    lengths = np.sqrt((X * X).sum(axis=0))
    sets = np.array(list(combinations(range(m), k)))
    parts = (X / np.where(lengths > 0, lengths, 1.0)).T[sets].swapaxes(1, 2)
    U, values, _ = np.linalg.svd(parts, full_matrices=False)
    basis = U * (values > (1e-6 if isinstance(columns, Moments) else 1e-12))[:, None, :]  # less is rounding
    explained = ((basis.swapaxes(1, 2) @ Y) ** 2).sum(axis=(1, 2))
    best = int(np.argmax(explained >= explained.max() - 1e-12 * (Y * Y).sum()))
    return eliminate(columns, k, among=sets[best], progress=progress)


def towards(columns: Columns, error: Error) -> Array:
    """Return the targets whose squared error is to be small, as ``eliminate`` takes them."""
    if error not in ("features", "outputs"):
        raise ValueError(f"error={error!r} is unknown. Choose 'features' or 'outputs'.")
    if error == "features":
        return columns.G if isinstance(columns, Moments) else columns.X
    if not columns.targets:
        raise ValueError("There are no targets to choose by. Pass some, or choose a rule that needs none.")
    return columns.R if isinstance(columns, Moments) else columns.Y
