"""The mutual information of jointly Gaussian layers, in closed form, with a proved error of its evaluation.

A deterministic network has infinite information between its layers; a Gaussian model, or noise, makes it finite. All
values are in nats.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ellq.theory.arguments import Array, count, finite_array, nonnegative, real_number, refuse_mixed_devices
from ellq.theory.rounding import UNIT_ROUNDOFF, norm_error, outward, product_error

_STRAY = 1e-8  # asymmetry and negative eigenvalues of correlations up to this, a unit, are taken for rounding


def correlation_information(r: float) -> float:
    """Return the mutual information of two Gaussian numbers from their correlation.

        f(r) = −½ log(1 − r²)        nats; rising in |r|

    For layers it is a lower bound whatever pair of probes r is the correlation of: statement ``flow-gaussian-chain``.
    Ignores the sign.

    Args:
        r: correlation in [−1, 1].

    Returns:
        f(r), off by at most a few units in the last place; infinite for |r| = 1.

    Raises:
        TypeError: r is not one real number.
        ValueError: r outside [−1, 1].

    Reference: Gelfand & Yaglom 1957.
    """
    size = abs(real_number(r, "r"))
    if size > 1:
        raise ValueError(f"r={r:g} is outside [-1, 1]. Pass a correlation.")
    if size == 1:
        return math.inf
    # Near 1 the square would lose what 1 − r has; near 0 the two logarithms would cancel.
    return -0.5 * (math.log1p(-size * size) if size < 0.5 else math.log1p(-size) + math.log1p(size))


def canonical_correlations(covariance: npt.ArrayLike, units: int) -> Array:
    """Return the canonical correlations of two layers from their joint covariance, in falling order.

        κ = singular values of C_X^(−½) C_XY C_Y^(−½)        I(X; Y) = −½ Σ log(1 − κ_i²) for Gaussian layers

    Unchanged by any invertible linear map of either layer.

    Args:
        covariance: joint covariance, shape (n + m, n + m), symmetric, both layers' blocks positive definite.
        units: n, how many of the units are the first layer's, 1 ≤ n < n + m.

    Returns:
        min(n, m) values in [0, 1]; off by about the condition of the blocks times 2⁻⁵³.

    Raises:
        TypeError: not numeric.
        ValueError: not a covariance matrix, n out of range, or units of a layer that depend on each other.

    Reference: Hotelling 1936.
    """
    C, n = _joint(covariance, units)
    try:
        X, Y = np.linalg.cholesky(C[:n, :n]), np.linalg.cholesky(C[n:, n:])
    except np.linalg.LinAlgError:
        raise ValueError("Units of a layer depend on each other linearly. Drop those that others determine.") from None
    kappa = np.linalg.svd(np.linalg.solve(X, np.linalg.solve(Y, C[n:, :n]).T), compute_uv=False)
    return np.asarray(np.clip(kappa, 0.0, 1.0))


def layer_information(covariance: npt.ArrayLike, units: int) -> float:
    """Bound the mutual information of two jointly Gaussian layers by their covariance, which gives it exactly.

        I(X; Y) = ½[log det C_X + log det C_Y − log det C]

    Unchanged by any invertible linear map of either layer. Rounded up, by about the condition of the correlations times
    2⁻⁵³; 0 for independent layers up to that.

    Args:
        covariance: joint covariance C, shape (n + m, n + m), symmetric, positive definite.
        units: n, how many of the units are the first layer's, 1 ≤ n < n + m.

    Returns:
        The information in nats.

    Raises:
        TypeError: not numeric.
        ValueError: not a covariance matrix, n out of range, or too close to singular for float64, where the information
            is infinite or unknown.

    Reference: Gelfand & Yaglom 1957.
    """
    value, error = layer_information_and_error(covariance, units)
    return float(outward(max(value, 0.0) + error, product_error(1)))


def layer_information_and_error(covariance: npt.ArrayLike, units: int) -> tuple[float, float]:
    """Return the information of ``layer_information`` as computed, and how far that may be from the exact value."""
    C, n = _joint(covariance, units)
    parts = [_log_determinant(part) for part in (C[:n, :n], C[n:, n:], C)]
    value = 0.5 * (parts[0][0] + parts[1][0] - parts[2][0])
    sizes = sum(abs(part[0]) for part in parts)
    return value, 0.5 * sum(part[1] for part in parts) + product_error(4) * sizes


def linear_information(W: npt.ArrayLike, covariance: npt.ArrayLike, noise: npt.ArrayLike) -> float:
    """Bound what a noisy linear layer tells of Gaussian inputs, which is known exactly.

        y = Wx + ε,  x ~ N(0, Σ),  ε ~ N(0, Ω)        I(x; y) = ½[log det(WΣWᵀ + Ω) − log det Ω]

    Rounded up. Grows without limit as the noise vanishes. Removing outputs never raises it, nor does removing inputs
    that are independent (statement ``pruning-mi``); removing single weights of two outputs or more can.

    Args:
        W: weights, shape (m, n), finite; zeros where pruned.
        covariance: Σ of the inputs, shape (n, n), symmetric, positive semi-definite.
        noise: Ω, shape (m, m), symmetric, positive definite; σ²·Id for independent noise.

    Returns:
        The information in nats.

    Raises:
        TypeError: not numeric.
        ValueError: shapes that do not fit, no covariance matrices, or WΣWᵀ + Ω too close to singular for float64.

    Reference: Gelfand & Yaglom 1957; Cover & Thomas 2006, section 9.4.
    """
    value, error = linear_information_and_error(W, covariance, noise)
    return float(outward(max(value, 0.0) + error, product_error(1)))


def linear_information_and_error(
    W: npt.ArrayLike, covariance: npt.ArrayLike, noise: npt.ArrayLike
) -> tuple[float, float]:
    """Return the information of ``linear_information`` as computed, and how far that may be from the exact value."""
    refuse_mixed_devices(W=W, covariance=covariance, noise=noise)
    weights = finite_array(W, "W", ndim=2)
    S, inputs = _in_own_units(covariance, "covariance")
    N, outputs = _in_own_units(noise, "noise")
    m, n = weights.shape
    if len(S) != n or len(N) != m:
        raise ValueError(
            f"W has shape {weights.shape}, but covariance {np.shape(covariance)} and noise {np.shape(noise)}."
            f" Pass ({n}, {n}) and ({m}, {m})."
        )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        A = np.where(np.diag(S) > 0, np.ldexp(weights, inputs - outputs[:, None]), 0.0)
        signal = A @ S @ A.T
        magnitudes = np.abs(A) @ np.abs(S) @ np.abs(A).T
    if not np.isfinite(magnitudes).all():
        raise ValueError("The signal exceeds the noise beyond float64. Pass a larger noise.")
    stray = norm_error(2 * n + 1, 1.0) * magnitudes + product_error(1) * np.abs(N)
    total = (signal + signal.T) / 2 + N
    strengths = _halves(np.diag(total))
    total, stray = (np.ldexp(part, -strengths[:, None] - strengths) for part in (total, stray))
    with_signal, without = _log_determinant(total, float(np.linalg.norm(stray))), _log_determinant(N)
    scale = math.log(2) * float(strengths.sum())
    value = 0.5 * (with_signal[0] - without[0]) + scale
    sizes = abs(with_signal[0]) + abs(without[0]) + abs(scale)
    return value, 0.5 * (with_signal[1] + without[1]) + product_error(4) * sizes


def unit_information(w: npt.ArrayLike, *, scale: float, noise: float) -> float:
    """Bound what one noisy linear unit tells of independent Gaussian inputs of equal variances, known exactly.

        y = w·x + σε,  x ~ N(0, s²·Id)        I(x; y) = ½ log(1 + s²‖w‖²/σ²)

    So of all masks that keep k weights, that of the k largest magnitudes keeps most information: statement
    ``pruning-mi-magnitude``. Rounded up; ignores order and signs.

    Args:
        w: weights, shape (d,), finite.
        scale: s ≥ 0.
        noise: σ > 0, in the units of s·w.

    Returns:
        The information in nats.

    Raises:
        TypeError: not numeric.
        ValueError: s < 0, σ ≤ 0, or w not a finite vector.

    Reference: Shannon 1948, Theorem 17; Cover & Thomas 2006, section 9.1.
    """
    v = finite_array(w, "w", ndim=1)
    s, sigma = nonnegative(scale, "scale"), nonnegative(noise, "noise")
    if sigma == 0:
        raise ValueError("noise=0 makes the information infinite. Pass noise > 0.")
    largest = float(np.abs(v).max(initial=0.0))
    if largest == 0 or s == 0:
        return 0.0
    # In logarithms, so that no square leaves float64: log(1 + e^t) with t = 2·log(s·‖w‖/σ).
    relative = math.log(largest) + 0.5 * math.log(float(np.square(v / largest).sum()))
    parts = (math.log(s), relative, -math.log(sigma))
    t = 2 * sum(parts)
    stray = 2 * (product_error(4) * (sum(map(abs, parts)) + abs(math.log(largest))) + norm_error(v.size, 1.0))
    t += stray
    value = 0.5 * (t + math.log1p(math.exp(-t)) if t > 0 else math.log1p(math.exp(t)))
    return float(outward(value, product_error(4)))


def flow_distance_limit(pairs: int, *, signed: bool = True) -> float:
    """Bound the distance of two flow vectors, whatever the nets.

        ‖Δ − Δ'‖₂ ≤ 2√P        √P for flows in [0, 1]: absolute and rms correlation

    A threshold above it fires at the first check. Attained by flows of 1 and −1, or of 1 and 0. Rounded up.

    Args:
        pairs: P ≥ 1, how many pairs of layers; L − 1 in a chain.
        signed: whether flows may be negative.

    Returns:
        The bound.

    Raises:
        TypeError: P is no whole number.
        ValueError: P < 1.

    Reference: ours; |Δ_l − Δ'_l| ≤ 2, entry by entry.
    """
    P = count(pairs, "pairs", low=1, high=2**53)
    return float(outward((2.0 if signed else 1.0) * math.sqrt(P), product_error(1)))


def hidden_information(information: float, flow: float) -> tuple[Array, int]:
    """Return two Gaussian layers of at least so much information whose correlations are as small as asked for.

        y_1 = ρx_1 + …,  y_2 = −ρx_1 + …,  all else independent;  ρ = √tanh I        n = ⌈√2/flow⌉ units, m = n + 1

    I(X; Y) = ½ log((1 + ρ²)/(1 − ρ²)) = I, while the signed flow is exactly 0 and the absolute and the rms flow are at
    most √2·ρ/√(nm) < ``flow``. So no flow bounds information from above.

    Args:
        information: I > 0 in nats, at most 6, from where on 1 − ρ² is lost in rounding.
        flow: > 0; the matrix has about 2·√2/flow rows, flow ≥ 0.005.

    Returns:
        The joint correlation matrix, shape (n + m, n + m), and n.

    Raises:
        TypeError: not numbers.
        ValueError: out of these ranges.

    Reference: ours.
    """
    target, limit = real_number(information, "information"), real_number(flow, "flow")
    if not 0 < target <= 6:
        raise ValueError(f"information={target:g} is outside (0, 6]. Pass nats that float64 resolves.")
    if not 0.005 <= limit < math.inf:
        raise ValueError(f"flow={limit:g} is outside [0.005, ∞). Pass a larger one, or the matrix is too large.")
    n = max(math.ceil(math.sqrt(2) / limit), 1)
    # A little more than ρ: the information is then not below what was asked for.
    rho = min(math.sqrt(math.tanh(target)) * (1 + 32 * UNIT_ROUNDOFF), 1 - 2 * UNIT_ROUNDOFF)
    C = np.eye(2 * n + 1)
    for place, sign in ((n, 1.0), (n + 1, -1.0)):
        C[0, place] = C[place, 0] = sign * rho
    C[n, n + 1] = C[n + 1, n] = -(rho**2)
    return C, n


def _joint(covariance: npt.ArrayLike, units: int) -> tuple[Array, int]:
    """Return a joint covariance with diagonal from ¼ to 1, by exact powers of two a unit, and n."""
    C, _ = _in_own_units(covariance, "covariance")
    n = count(units, "units", low=1, high=len(C) - 1)
    if np.diag(C).min() <= 0:
        raise ValueError("covariance has a unit of variance 0. Drop it: a constant tells nothing.")
    return C, n


def _in_own_units(covariance: npt.ArrayLike, name: str) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return a checked covariance matrix over 2^(h_i + h_j), exactly, diagonal from ¼ to 1 but for zeros; and h."""
    C = finite_array(covariance, name, ndim=2)
    if C.shape[0] != C.shape[1] or C.size == 0:
        raise ValueError(f"{name} has shape {C.shape}. A covariance matrix is square, one row per unit.")
    if np.diag(C).min() < 0:
        raise ValueError(f"{name} has a negative diagonal entry. Those are variances: pass a covariance matrix.")
    halves = _halves(np.diag(C))
    with np.errstate(over="ignore", under="ignore"):
        S = np.ldexp(C, -halves[:, None] - halves)
    # Beyond 1 lies infinity too, of which the difference would be NaN.
    slack = _STRAY * len(S)
    if np.abs(S).max() > 1 + slack or np.abs(S - S.T).max() > slack or np.linalg.eigvalsh(S)[0] < -slack:
        raise ValueError(f"{name} is not symmetric, or has a negative eigenvalue. Pass a covariance matrix.")
    return np.asarray(S), halves


def _halves(variances: Array) -> npt.NDArray[np.int64]:
    """Return h such that variances·4^(−h) lie from ¼ to 1."""
    return np.asarray(-(-np.frexp(variances)[1] // 2), dtype=np.int64)


def _log_determinant(S: Array, stray: float = 0.0) -> tuple[float, float]:
    """Return log det of a positive definite matrix of entries at most about 1, and how far it may be off.

    Cholesky factors S + E exactly, ‖E‖_F ≤ γ_(p+1)·tr S (Higham 2002, Theorem 10.3). With θ = ‖E‖_F/λ_min ≤ ¼, log det
    moves by at most Σ −log(1 − |λ_i(S^(−½)ES^(−½))|) ≤ 1.2·√p·θ.

    Args:
        S: shape (p, p), nearly symmetric.
        stray: how far S may be from the matrix meant, in the Frobenius norm.
    """
    p, trace = len(S), float(np.trace(S))
    symmetric = (S + S.T) / 2
    stray += float(np.linalg.norm(S - S.T)) / 2 + norm_error(p + 2, 1.0) * trace
    least = float(np.linalg.eigvalsh(symmetric)[0]) - norm_error(p, 1.0) * trace
    if not least > 4 * stray:
        raise ValueError(
            "The covariance is singular to float64, so that the information is infinite or unknown. Drop units that"
            " others determine, or add noise."
        )
    logarithms = 2 * np.log(np.diag(np.linalg.cholesky(symmetric)))
    error = 1.2 * math.sqrt(p) * stray / least + norm_error(p, 1.0) * float(np.abs(logarithms).sum())
    return float(logarithms.sum()), float(outward(error, product_error(4)))
