"""What replacing features by a skeleton can cost the unit that reads them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array, finite_array
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
    A = finite_array(features, "features", ndim=2)
    T = finite_array(interpolation, "interpolation", ndim=2)
    J = np.asarray(indices, dtype=np.intp)
    if T.shape != (J.size, A.shape[1]):
        raise ValueError(f"interpolation has shape {T.shape}, expected {(J.size, A.shape[1])}.")
    return np.asarray(A - finite_array(offset, "offset", ndim=1) - A[:, J] @ T)


def skeleton_output_bound(residual: npt.ArrayLike, consumer: npt.ArrayLike) -> Array:
    """Bound the root mean square change of every output when features are replaced by their skeleton.

        ‖(A − A_J T)u‖ / √n ≤ ‖A − A_J T‖_2 · ‖u‖_2 / √n

    Holds for any skeleton and any T; equality when u is the top right singular vector of the residual. Rounded up.

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
    E = finite_array(residual, "residual", ndim=2)
    U = finite_array(consumer, "consumer", ndim=2)
    if E.shape[1] != U.shape[1]:
        raise ValueError(f"residual has {E.shape[1]} columns but consumer rows have {U.shape[1]} entries.")
    # A singular value from LAPACK is off by a modest multiple of u·‖E‖; max(shape) covers it (Anderson et al. 1999).
    top = float(np.linalg.norm(E, 2)) / np.sqrt(E.shape[0])
    error = norm_error(U.shape[1], 2.0) + norm_error(max(E.shape), 1.0)
    return outward(top * np.linalg.norm(U, axis=1), error)
