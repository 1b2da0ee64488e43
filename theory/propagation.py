"""What pruning a unit, a layer and a chain of layers can change in the outputs.

Errors are measured in L2 over a distribution of inputs (root mean square), which may be that of a data set. A unit is
f(X) = Σ_j w_j X_j + b; pruning removes part v of w and leaves the bias alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ellq.theory.approximation import stechkin_bound
from ellq.theory.arguments import Array, finite_array, nonnegative, order_below_one, refuse_mixed_devices
from ellq.theory.measures import lq_quasinorm
from ellq.theory.rounding import norm_error, outward, product_error, product_up


def unit_error_observed(removed: npt.ArrayLike, inputs: npt.ArrayLike) -> float:
    """Return the root mean square change of a linear unit over given inputs: (mean (Xv)²)^½.

    Args:
        removed: v, the part of the weights that was removed, shape (d,).
        inputs: X, shape (n, d), n ≥ 1.

    Returns:
        The error, in the units of the unit's output; infinite beyond float64.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: wrong dimensions, no samples, or a NaN or infinite entry.

    Reference: by definition.
    """
    refuse_mixed_devices(removed=removed, inputs=inputs)
    v = finite_array(removed, "removed", ndim=1)
    X = sample_matrix(inputs)
    if X.shape[1] != v.size:
        raise ValueError(f"inputs has {X.shape[1]} columns but removed has {v.size} entries.")
    # By powers of two to at most 1 in size, so that no product leaves float64 before the mean does.
    of_v, of_X = (int(np.frexp(np.abs(part).max(initial=0.0))[1]) for part in (v, X))
    change = lq_quasinorm(np.ldexp(X, -of_X) @ np.ldexp(v, -of_v), 2.0) / np.sqrt(len(X))
    with np.errstate(over="ignore"):
        return float(np.ldexp(change, of_v + of_X))


def unit_error_l1(removed: npt.ArrayLike, scale: float) -> float:
    """Bound a linear unit's error by the ℓ1 norm of what was removed.

        ‖Σ v_j X_j‖_{L2} ≤ B·‖v‖_1        B ≥ max_j ‖X_j‖_{L2}

    Holds for any correlation of the inputs; equality when all inputs are equal and v has one sign. Rounded up.

    Args:
        removed: v, shape (d,), finite.
        scale: B ≥ 0, in the units of the inputs.

    Returns:
        The bound, in the units of the unit's output; infinite beyond float64.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``scale`` < 0, or ``removed`` not a finite vector.

    Reference: triangle inequality; the linear-unit theorem of Yang et al. 2022 as reconstructed, case (a).
    """
    v = finite_array(removed, "removed", ndim=1)
    with np.errstate(over="ignore"):
        size = float(outward(np.abs(v).sum(), norm_error(v.size, 1.0))) if v.any() else 0.0
    return product_up(nonnegative(scale, "scale"), size)


def unit_error_lq(w: npt.ArrayLike, retained: int, *, q: float, scale: float) -> float:
    """Bound a linear unit's error after magnitude pruning by the ℓq quasi-norm of its weights.

        ‖Σ v_j X_j‖_{L2} ≤ B·c·‖w‖_q·k^(1 − 1/q)        c = q(1 − q)^(1/q − 1)

    k largest weights kept, B ≥ max_j ‖X_j‖_{L2}, any correlation of the inputs. The rate k^(1−1/q) is sharp when
    inputs are equal; the faster k^(1/2−1/q) needs uncorrelated inputs or reweighted survivors. Rounded up.

    Args:
        w: weights before pruning, shape (d,), finite.
        retained: k, 1 ≤ k ≤ d.
        q: order, 0 < q < 1.
        scale: B ≥ 0, in the units of the inputs.

    Returns:
        The bound, in the units of the unit's output.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``q`` outside (0, 1), ``retained`` outside [1, d], ``scale`` < 0, or ``w`` not a finite vector.
        OverflowError: the bound of the tail exceeds float64.

    Reference: the linear-unit theorem of Yang et al. 2022 (arXiv 2206.05604) as reconstructed, case (a); its
    constant ours, by ``stechkin_constant(q, 1)``.
    """
    return product_up(nonnegative(scale, "scale"), stechkin_bound(w, retained, q=order_below_one(q), p=1.0))


def chain_error(
    local_errors: Sequence[npt.ArrayLike], gains: Sequence[npt.ArrayLike], lipschitz: Sequence[npt.ArrayLike]
) -> list[float]:
    """Bound how errors made in each layer of a chain add up at its later layers.

        E_0 = 0,   E_l = ρ_l·(T_l·E_{l−1} + δ_l)

    E_l bounds, for every unit after layer l's activation, the L2 distance between dense and pruned net. Rounded up.

    Args:
        local_errors: δ_l ≥ 0 for each layer: the largest L2 error of one unit's pre-activation caused by changing
            that layer's weights alone, on the dense net's inputs to it.
        gains: T_l ≥ 0: the largest ℓ1 norm of a row of the *pruned* layer.
        lipschitz: ρ_l ≥ 0: Lipschitz constant of what follows the layer (activation, pooling), 1 for none.

    Returns:
        E_1 … E_L, in the units of the activations; infinite beyond float64.

    Raises:
        ValueError: sequences of different lengths, or a negative or non-finite entry.

    Reference: the multi-layer theorem of Yang et al. 2022 (arXiv 2206.05604) as reconstructed.
    """
    if not len(local_errors) == len(gains) == len(lipschitz):
        raise ValueError(
            f"local_errors, gains and lipschitz have lengths {len(local_errors)}, {len(gains)} and"
            f" {len(lipschitz)}. Give one of each per layer."
        )
    bounds: list[float] = []
    error = 0.0
    for delta, gain, rho in zip(local_errors, gains, lipschitz, strict=True):
        change = product_up(nonnegative(gain, "gains"), error) + nonnegative(delta, "local_errors")
        error = product_up(nonnegative(rho, "lipschitz"), change)
        bounds.append(error)
    return bounds


def unit_errors(local_errors: npt.ArrayLike, weights: npt.ArrayLike, errors: npt.ArrayLike, lipschitz: float) -> Array:
    """Bound the error of every unit of a layer from the errors of the units it reads.

        e'_i = ρ·(δ_i + Σ_j |ŵ_ij|·e_j)

    ``chain_error`` unit by unit: never larger, since it replaces no unit's error by the largest. Rounded up.

    Args:
        local_errors: δ ≥ 0, shape (c,): each unit's L2 error from changing the layer's weights alone, on the dense
            net's inputs to it.
        weights: ŵ of the *pruned* layer, shape (c, m).
        errors: e ≥ 0 of the units read, shape (m,).
        lipschitz: ρ ≥ 0 of what follows the layer.

    Returns:
        e', shape (c,), in the units of the activations; infinite beyond float64.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, an entry that is not finite, or a negative error.

    Reference: ours; the triangle inequality before the maximum over units is taken.
    """
    refuse_mixed_devices(local_errors=local_errors, weights=weights, errors=errors)
    delta = finite_array(local_errors, "local_errors", ndim=1)
    W = finite_array(weights, "weights", ndim=2)
    e = finite_array(errors, "errors", ndim=1)
    if W.shape != (delta.size, e.size):
        raise ValueError(f"weights has shape {W.shape}, expected {(delta.size, e.size)}.")
    if delta.min(initial=0.0) < 0 or e.min(initial=0.0) < 0:
        raise ValueError("local_errors and errors must not be negative. They are bounds of root mean squares.")
    rho = nonnegative(lipschitz, "lipschitz")
    is_reached = (delta > 0) | ((W != 0) @ (e > 0))
    # Rounded up before ρ multiplies it, since each of the products may underflow.
    with np.errstate(over="ignore", invalid="ignore"):
        change = outward(delta + np.abs(W) @ e, norm_error(e.size + 1, 1.0), underflows=e.size + 1)
        return np.where(is_reached & (rho > 0), outward(rho * change, product_error(1)), 0.0)


def column_scale(inputs: npt.ArrayLike) -> Array:
    """Return ‖X_j‖_{L2} of every input over given samples: the root mean square of each column.

    Args:
        inputs: X, shape (n, d), n ≥ 1, finite.

    Returns:
        Array of shape (d,), rounded up, in the units of the inputs; 0 for a column of zeros.

    Raises:
        TypeError: ``inputs`` is not numeric.
        ValueError: not a matrix, no samples, or a NaN or infinite entry.
        OverflowError: a column's ‖X_j‖_2 exceeds float64.

    Reference: by definition.
    """
    X = sample_matrix(inputs)
    norms = lq_quasinorm(X, 2.0, axis=0)
    return np.where(norms > 0, outward(norms / np.sqrt(len(X)), norm_error(len(X), 2.0), underflows=2), 0.0)


def sample_matrix(inputs: npt.ArrayLike) -> Array:
    """Return ``inputs`` as a matrix of at least one sample; refuse anything else by name."""
    X = finite_array(inputs, "inputs", ndim=2)
    if len(X) == 0:
        raise ValueError(f"inputs has no samples (shape {X.shape}). Pass at least one row.")
    return X
