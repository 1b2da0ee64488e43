"""What replacing features by a skeleton can cost the unit that reads them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array, finite_array, refuse_mixed_devices
from ellq.theory.rounding import norm_error, outward


def skeleton_residual(
    features: npt.ArrayLike, indices: npt.ArrayLike, interpolation: npt.ArrayLike, offset: npt.ArrayLike
) -> Array:
    """Return A − 1·offsetᵀ − A[:, indices] @ T, what the skeleton leaves unexplained.

    Args:
        features: A, shape (n, m), finite.
        indices: the skeleton, shape (k,).
        interpolation: T, shape (k, m).
        offset: constant part, shape (m,).

    Returns:
        The residual, shape (n, m), in the units of the features.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, or a NaN or infinite entry.

    Reference: by definition; Chee et al. 2021 (arXiv 2108.00065).
    """
    refuse_mixed_devices(features=features, interpolation=interpolation, offset=offset)
    A = finite_array(features, "features", ndim=2)
    T = finite_array(interpolation, "interpolation", ndim=2)
    constant = finite_array(offset, "offset", ndim=1)
    J = np.asarray(indices)
    if J.ndim != 1 or (J.size and J.dtype.kind not in "iu"):
        raise TypeError(f"indices must be a list of whole numbers, got {J.dtype} of shape {J.shape}.")
    if T.shape != (J.size, A.shape[1]) or constant.shape != A.shape[1:]:
        raise ValueError(
            f"interpolation and offset have shapes {T.shape} and {constant.shape}; expected"
            f" {(J.size, A.shape[1])} and {A.shape[1:]}."
        )
    J = J.astype(np.intp)
    if J.size and not 0 <= J.min() <= J.max() < A.shape[1]:
        raise ValueError(f"indices reach from {J.min()} to {J.max()}, outside the {A.shape[1]} columns of features.")
    return np.asarray(A - constant - A[:, J] @ T)


def skeleton_output_bound(residual: npt.ArrayLike, consumer: npt.ArrayLike) -> Array:
    """Bound the root mean square change of every output when features are replaced by their skeleton.

        ‖(A − A_J T)u‖ / √n ≤ ‖A − A_J T‖_2 · ‖u‖_2 / √n

    Holds for any skeleton and any T; equality when u is the top right singular vector of the residual. Rounded up; 0
    where the residual or the row is.

    Args:
        residual: A − A_J T over n samples, shape (n, m), finite.
        consumer: rows u of the weights that read the features, shape (c, m), finite.

    Returns:
        One bound per output, shape (c,), in the units of the outputs.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, or a NaN or infinite entry.

    Reference: the empirical risk bound of Chee et al. 2021 (arXiv 2108.00065) as reconstructed, R_ID ≤ ε²M, before
    the norms are replaced by a priori values.
    """
    refuse_mixed_devices(residual=residual, consumer=consumer)
    E = finite_array(residual, "residual", ndim=2)
    U = finite_array(consumer, "consumer", ndim=2)
    if E.shape[1] != U.shape[1]:
        raise ValueError(f"residual has {E.shape[1]} columns but consumer rows have {U.shape[1]} entries.")
    if not E.size:
        raise ValueError(f"residual is empty (shape {E.shape}). Pass at least one sample and one feature.")
    # Scaled by powers of two, so that neither squares nor products leave float64 before the result does.
    e, f = np.frexp(np.abs(E).max())[1], np.frexp(np.abs(U).max(axis=1))[1]
    largest = float(np.linalg.norm(np.ldexp(E, -e), 2)) / np.sqrt(E.shape[0])
    product = largest * np.linalg.norm(np.ldexp(U, -f[:, None]), axis=1)
    # A singular value from LAPACK is off by a modest multiple of u·‖E‖; max(shape) covers it (Anderson et al. 1999).
    error = norm_error(U.shape[1], 2.0) + norm_error(max(E.shape), 1.0)
    with np.errstate(over="ignore"):
        return np.where(product > 0, outward(np.ldexp(product, e + f), error), 0.0)
