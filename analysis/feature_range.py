"""How large the features of a hidden layer can become, whatever the inputs in a box."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ellq.theory import Array, norm_error, outward

# Of functions that rise everywhere, |g| is largest at an end of an interval.
_RISING = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid)
# The depth of the dip left of 0 of those that do not, rounded up.
_DIPS: dict[type[nn.Module], float] = {nn.GELU: 0.17, nn.SiLU: 0.2785, nn.Mish: 0.3089}
# |g(t)| ≤ |t|, so that ‖g(Wx + v)‖ ≤ ‖Wx + v‖.
_NO_LARGER = (nn.Identity, nn.ReLU, nn.ReLU6, nn.Tanh, nn.GELU, nn.SiLU, nn.Mish, nn.Softsign)


def feature_bounds(layer: nn.Linear, activation: nn.Module, low: float, high: float) -> Array:
    """Bound every feature |g(w·x + v)| over all inputs x whose entries lie in [low, high].

    Exact for each unit up to rounding, where g rises; infinite where g and the box are.

    Args:
        layer: makes the pre-activations.
        activation: g, an element-wise function.
        low: the least entry of an input; may be −∞.
        high: the largest entry; may be ∞.

    Returns:
        One bound per unit, shape (m,).

    Raises:
        ValueError: an activation that is not known here, or low > high.
    """
    if not low <= high:
        raise ValueError(f"low={low:g} exceeds high={high:g}. Pass the least and the largest entry of an input.")
    kind = type(activation)
    if kind not in _RISING and kind not in _DIPS:
        known = ", ".join(each.__name__ for each in (*_RISING, *_DIPS))
        raise ValueError(f"The range of a {kind.__name__} is not known here. Known are {known}.")
    W, v = _as_arrays(layer)
    if math.isfinite(low) and math.isfinite(high):
        centre, radius = (low + high) / 2, (high - low) / 2
        middle, reach = centre * W.sum(axis=1) + v, radius * np.abs(W).sum(axis=1)
        size = (abs(centre) + radius) * np.abs(W).sum(axis=1) + np.abs(v)
        reach = reach + size * norm_error(W.shape[1] + 4, 1.0)
        ends = np.stack([middle - reach, middle + reach])
    else:
        ends = np.stack([np.full(len(W), -math.inf), np.full(len(W), math.inf)])
    with torch.no_grad():
        values: Tensor = activation(torch.from_numpy(ends))
    largest = np.nan_to_num(np.abs(values.numpy()), nan=0.0, posinf=math.inf).max(axis=0)  # GELU(−∞) is −∞·0
    if kind in _DIPS:
        largest = np.maximum(largest, np.where(ends[0] < 0, _DIPS[kind], 0.0))
    return outward(largest, norm_error(4, 1.0))


def feature_norm_bound(layer: nn.Linear, activation: nn.Module, low: float, high: float) -> float:
    """Bound ‖z(x)‖₂, z = g(Wx + v), over all inputs x whose entries lie in [low, high].

        min( √Σ_j sup|z_j|²,  ‖W‖₂·sup‖x‖ + ‖v‖ )        the second where |g(t)| ≤ |t|

    Args:
        layer: makes the pre-activations.
        activation: g, an element-wise function.
        low: the least entry of an input; may be −∞.
        high: the largest entry; may be ∞.

    Returns:
        The bound; infinite where g and the box are.

    Raises:
        ValueError: as ``feature_bounds``.

    Reference: ours.
    """
    each = feature_bounds(layer, activation, low, high)
    bound = float(outward(np.linalg.norm(each), norm_error(each.size, 2.0)))
    if type(activation) in _NO_LARGER and math.isfinite(low) and math.isfinite(high):
        W, v = _as_arrays(layer)
        longest = math.sqrt(W.shape[1]) * max(abs(low), abs(high))
        linear = float(np.linalg.norm(W, 2)) * longest + float(np.linalg.norm(v))
        # A singular value from LAPACK is off by a modest multiple of u·‖W‖; max(shape) covers it.
        bound = min(bound, float(outward(linear, norm_error(max(W.shape), 1.0) + norm_error(v.size + 8, 2.0))))
    return bound


def _as_arrays(layer: nn.Linear) -> tuple[Array, Array]:
    W = layer.weight.detach().to("cpu", torch.float64).numpy()
    v = np.zeros(len(W)) if layer.bias is None else layer.bias.detach().to("cpu", torch.float64).numpy()
    return W, v
