"""What pruning a linear unit changes, from the second moments Σ = E[XXᵀ] of its inputs.

Σ is measured on samples (``second_moments``), or known. A measured one is off by rounding; ``moment_error`` says by how
much, and every bound here covers it when told.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ellq.theory.approximation import stechkin_bound
from ellq.theory.arguments import Array, finite_array, nonnegative, refuse_mixed_devices
from ellq.theory.propagation import sample_matrix
from ellq.theory.rounding import norm_error, outward, product_error, product_up

_INDEFINITE = 1e-8  # negative eigenvalues and asymmetry up to this share of the trace are taken for rounding


def second_moments(inputs: npt.ArrayLike) -> Array:
    """Return Σ = XᵀX/n, the second moments of given samples; means are not removed.

    Args:
        inputs: X, shape (n, d), n ≥ 1, finite.

    Returns:
        Σ, shape (d, d), symmetric, in the squared units of the inputs; entry (i, j) is off by at most
        ``moment_error(n)``·√(Σ_ii Σ_jj) where no product of two entries underflows.

    Raises:
        TypeError: ``inputs`` is not numeric.
        ValueError: not a matrix, no samples, or a NaN or infinite entry.
        OverflowError: a moment exceeds float64.

    Reference: by definition.
    """
    X = sample_matrix(inputs)
    with np.errstate(over="ignore", invalid="ignore"):
        moments = X.T @ X / len(X)
    if not np.isfinite(moments).all():
        raise OverflowError(f"A second moment exceeds float64 (largest input {np.abs(X).max():g}). Scale the inputs.")
    return np.asarray(moments)


def moment_error(samples: int) -> float:
    """Bound the rounding of an entry of ``second_moments``, relative to √(Σ_ii Σ_jj), for n samples."""
    # n products and their sum stray by at most n·u·Σ|x_i x_j| ≤ n·u·n√(Σ_ii Σ_jj), by Cauchy and Schwarz.
    return norm_error(samples, 1.0)


def unit_error_gram(removed: npt.ArrayLike, gram: npt.ArrayLike, *, entry_error: float = 0.0) -> float:
    """Bound a linear unit's error by the second moments of its inputs, which give it exactly.

        ‖Σ v_j X_j‖_{L2} = (vᵀΣv)^½ ≤ max_j ‖X_j‖_{L2}·‖v‖_1

    An equality, for any correlation: what is above it is rounding, where the terms cancel at most √((2d + 40)·2⁻⁵³) of
    the right-hand bound (1.6e-7 for d = 100). Rounded up; 0 where v or the moments it meets are.

    Args:
        removed: v, shape (d,), finite.
        gram: Σ, shape (d, d), symmetric, with no negative eigenvalue beyond rounding.
        entry_error: by how much entry (i, j) of ``gram`` may be off, relative to √(Σ_ii Σ_jj): ``moment_error(n)`` for
            ``second_moments`` of n samples; 0 takes ``gram`` as exact.

    Returns:
        The bound, in the units of the unit's output.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, an entry that is not finite, ``entry_error`` < 0, or a matrix that is no
            second-moment matrix.

    Reference: by definition of Σ.
    """
    refuse_mixed_devices(removed=removed, gram=gram)
    v = finite_array(removed, "removed", ndim=1)
    return float(layer_errors(v[None], gram, entry_error=entry_error)[0])


def layer_errors(changes: npt.ArrayLike, gram: npt.ArrayLike, *, entry_error: float = 0.0) -> Array:
    """Bound the error of every unit of a layer by the second moments of the layer's inputs: (δᵀΣδ)^½ for every row δ.

    ``unit_error_gram`` for many rows, Σ checked once. On the dense net's inputs these are the ``local_errors`` that
    ``unit_errors`` carries through a chain.

    Args:
        changes: Δ, one row of changed weights a unit, shape (c, d), finite.
        gram: Σ, shape (d, d), as in ``unit_error_gram``.
        entry_error: as in ``unit_error_gram``.

    Returns:
        The bounds, shape (c,), in the units of the outputs; rounded up, 0 where a row or the moments it meets are.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: as ``unit_error_gram``.

    Reference: by definition of Σ.
    """
    D, S, exponent = _scaled(changes, gram)
    d = D.shape[1]
    error = nonnegative(entry_error, "entry_error")
    # The terms of δᵀΣδ cancel, their rounding does not: it is relative to the sum of magnitudes.
    strays = norm_error(2 * d, 1.0) * _forms(np.abs(D), np.abs(S))
    if error:
        deviations = np.abs(D) @ np.sqrt(np.diag(S))
        strays += error * outward(deviations * deviations, 2 * norm_error(d, 1.0))
    # Underflows: of entries of Δ (each met d times, twice), of Σ, of products. All else is at most 1 in size.
    squares = outward(np.maximum(_forms(D, S), 0.0) + strays, product_error(3), underflows=4 * (d + 1) ** 2)
    with np.errstate(over="ignore"):
        bounds = outward(np.ldexp(np.sqrt(squares), exponent), product_error(1))
    return np.where(D.any(axis=1), bounds, 0.0)


def layer_errors_observed(changes: npt.ArrayLike, gram: npt.ArrayLike) -> Array:
    """Return (δᵀΣδ)^½ for every row δ as computed, rounding not covered; ``layer_errors`` bounds it.

    Args:
        changes: Δ, shape (c, d), finite.
        gram: Σ, shape (d, d), as in ``unit_error_gram``.

    Returns:
        The errors, shape (c,), in the units of the outputs; 0 where rounding makes the square negative.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: as ``unit_error_gram``.

    Reference: by definition of Σ.
    """
    D, S, exponent = _scaled(changes, gram)
    with np.errstate(over="ignore"):
        return np.asarray(np.ldexp(np.sqrt(np.maximum(_forms(D, S), 0.0)), exponent))


def gram_scale(gram: npt.ArrayLike, *, entry_error: float = 0.0) -> float:
    """Bound by how much a linear unit can amplify the Euclidean norm of its weights: √λ_max(Σ).

        ‖Σ v_j X_j‖_{L2} ≤ √Λ·‖v‖_2        Λ ≥ λ_max(Σ)

    The counterpart of ``column_scale`` for ``unit_error_uncorrelated``: for uncorrelated centred inputs it is the
    largest deviation of one of them, and never less than that. The eigenvalue is not trusted but proved: Λ·Id − Σ is
    factored by Cholesky, which can succeed only where Λ is large enough. Time d³. Rounded up; 0 for Σ = 0.

    Args:
        gram: Σ, shape (d, d), as in ``unit_error_gram``.
        entry_error: as in ``unit_error_gram``.

    Returns:
        √Λ, in the units of the inputs.

    Raises:
        TypeError: ``gram`` is not numeric.
        ValueError: not a second-moment matrix, or ``entry_error`` < 0.

    Reference: Higham 2002, Theorem 10.5 (Demmel): where Cholesky succeeds in floating point,
    λ_min(A) ≥ −trace(A)·γ_(d+1)/(1 − γ_(d+1)).
    """
    S, half = moment_matrix(gram)
    error = nonnegative(entry_error, "entry_error")
    d = len(S)
    if not S.any():
        return 0.0
    S, trace = (S + S.T) / 2, float(np.trace(S))  # half the sum, rounded by less than 8u·trace Σ
    # Rounding of the factorisation and of Λ·Id − Σ, relative to trace(Λ·Id − Σ) ≤ d·Λ.
    strays = d * norm_error(d, 1.0)
    try:
        largest = float(np.linalg.eigvalsh(S)[-1]) * (1 + 4 * strays)
        np.linalg.cholesky(largest * np.eye(d) - S)
    except np.linalg.LinAlgError:
        largest = float(np.abs(S).sum(axis=1).max())
    # A matrix whose entry (i, j) is at most ε√(Σ_ii Σ_jj) has no eigenvalue above ε·trace Σ.
    largest += (error + product_error(1)) * trace
    bound = outward(largest, strays + product_error(3), underflows=8 * d * d)
    return float(outward(np.ldexp(np.sqrt(bound), half), product_error(1)))


def unit_error_uncorrelated(w: npt.ArrayLike, retained: int, *, q: float, scale: float) -> float:
    """Bound a linear unit's error after magnitude pruning, inputs uncorrelated or of bounded second moments.

        ‖Σ v_j X_j‖_{L2} ≤ √Λ·c·‖w‖_q·k^(1/2 − 1/q)        c = [(q/2)^(q/2) (1 − q/2)^(1 − q/2)]^(1/q)

    k largest weights kept, Σ ≼ Λ·Id. Half an order of k faster than ``unit_error_lq``, and for q up to 2; but Λ grows
    with correlation, up to d times the largest second moment. Equal weights and orthonormal inputs come arbitrarily
    close. Rounded up.

    Args:
        w: weights before pruning, shape (d,), finite.
        retained: k, 1 ≤ k ≤ d.
        q: order, 0 < q < 2.
        scale: √Λ ≥ 0, in the units of the inputs: ``gram_scale`` of their second moments; for uncorrelated centred
            inputs, their largest standard deviation.

    Returns:
        The bound, in the units of the unit's output.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``q`` outside (0, 2), ``retained`` outside [1, d], ``scale`` < 0, or ``w`` not a finite vector.
        OverflowError: the bound of the tail exceeds float64.

    Reference: the linear-unit theorem of Yang et al. 2022 (arXiv 2206.05604) as reconstructed, case (c); its constant
    from Foucart & Rauhut 2013, Theorem 2.5.
    """
    return product_up(nonnegative(scale, "scale"), stechkin_bound(w, retained, q=q, p=2.0))


def _forms(D: Array, S: Array) -> Array:
    return np.asarray(((D @ S) * D).sum(axis=1))


def _scaled(changes: npt.ArrayLike, gram: npt.ArrayLike) -> tuple[Array, Array, npt.NDArray[np.int32]]:
    """Return rows and Σ with entries of at most 1, and the power of two taken off each row's root of δᵀΣδ by that."""
    refuse_mixed_devices(changes=changes, gram=gram)
    D = finite_array(changes, "changes", ndim=2)
    G = finite_array(gram, "gram", ndim=2)
    S, half = moment_matrix(G)
    if D.shape[1] != len(S):
        raise ValueError(f"gram has shape {S.shape} but each row of changed weights has {D.shape[1]} entries.")
    D = np.where(G.any(axis=0), D, 0.0)  # else a change of what is always 0 would set the scale
    exponent = np.frexp(np.abs(D).max(axis=1, initial=0.0))[1]
    return np.ldexp(D, -exponent[:, None]), S, exponent + half


def moment_matrix(gram: npt.ArrayLike) -> tuple[Array, int]:
    """Return a checked Σ divided by 4^half, so that its entries are at most 1 in size."""
    G = finite_array(gram, "gram", ndim=2)
    if G.shape[0] != G.shape[1] or G.size == 0:
        raise ValueError(f"gram has shape {G.shape}. A second-moment matrix is square, one row per input.")
    half = int(-(-np.frexp(np.abs(G).max())[1] // 2))
    S = np.asarray(np.ldexp(G, -2 * half))
    slack = _INDEFINITE * float(np.trace(S))
    if not S.any():
        return S, half
    if slack <= 0 or np.diag(S).min() < 0:
        raise ValueError("gram has a negative or no diagonal entry. Those are means of squares: pass XᵀX/n.")
    if np.abs(S - S.T).max() > slack:
        raise ValueError("gram is not symmetric. Pass XᵀX/n.")
    try:
        np.linalg.cholesky(S + slack * np.eye(len(S)))
    except np.linalg.LinAlgError:
        raise ValueError("gram has a negative eigenvalue. A second-moment matrix has none: pass XᵀX/n.") from None
    return S, half
