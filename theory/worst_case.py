"""What pruning can change in the worst case over a set of inputs: a box, a ball, and a box through a chain of layers.

No data, no distribution: the bounds hold for every single input of the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from ellq.theory.arguments import Array, finite_array, nonnegative, real_number, refuse_mixed_devices
from ellq.theory.measures import lq_quasinorm
from ellq.theory.propagation import unit_errors
from ellq.theory.rounding import log_error, norm_error, outward, product_error, product_up

_GREATEST_DUAL = 500.0  # above, ‖v‖_p is bounded by the order that float64 resolves


@dataclass(frozen=True)
class Activation:
    """A non-decreasing element-wise function and its Lipschitz constant.

    Attributes:
        function: evaluates it, with a relative error of at most 8 units of roundoff.
        lipschitz: ρ ≥ 0 with |σ(x) − σ(y)| ≤ ρ·|x − y|.
    """

    function: Callable[[Array], Array]
    lipschitz: float


IDENTITY = Activation(lambda z: z, 1.0)
RELU = Activation(lambda z: np.maximum(z, 0.0), 1.0)
TANH = Activation(np.tanh, 1.0)
SIGMOID = Activation(expit, 0.25)


def worst_case_box(removed: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> float:
    """Return the largest change of a linear unit over a box of inputs.

        max {|v·x| : l ≤ x ≤ u} = |v·m| + |v|·r        m = (l + u)/2,  r = (u − l)/2

    Exact up to rounding, and rounded up; attained in a corner of the box. Scales with v and with the box; ignores a
    common order of v, l and u, and v's sign.

    Args:
        removed: v, the part of the weights that was removed, shape (d,), finite.
        low: l, the least value of each input, shape (d,), finite.
        high: u, the greatest value of each input, shape (d,), finite, none below ``low``.

    Returns:
        The change, in the units of the unit's output; infinite where it exceeds float64.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: shapes that do not fit, an entry that is not finite, or an empty box.

    Reference: classical, the support function of a box.
    """
    refuse_mixed_devices(removed=removed, low=low, high=high)
    v = finite_array(removed, "removed", ndim=1)
    l, u = _box(low, high, v.size)  # noqa: E741
    # By powers of two to at most 1 in size, so that no product leaves float64 before the sum does.
    of_v, of_box = (int(np.frexp(np.max(np.abs(x), initial=0.0))[1]) for x in (v, (l, u)))
    lowest, highest = _affine_range(np.ldexp(v, -of_v)[None], np.zeros(1), np.ldexp(l, -of_box), np.ldexp(u, -of_box))
    if not ((v != 0) & ((l != 0) | (u != 0))).any():
        return 0.0
    with np.errstate(over="ignore"):
        return float(outward(np.ldexp(max(highest[0], -lowest[0]), of_v + of_box), product_error(1)))


def worst_case_ball(removed: npt.ArrayLike, radius: float, order: float) -> float:
    """Return the largest change of a linear unit over a ball of inputs.

        max {|v·x| : ‖x‖_p ≤ R} = R·‖v‖_p*        1/p + 1/p* = 1

    Exact up to rounding, and rounded up: p = 1 gives the largest |v_j|, p = 2 the Euclidean norm, p = ∞ the sum of
    all. Scales with v and R; ignores order and signs. For 1 < p < 500/499 the norm of order 500 stands in for the
    dual one, which is larger by a factor of at most d^(1/500).

    Args:
        removed: v, the part of the weights that was removed, shape (d,), finite.
        radius: R ≥ 0, finite, in the units of the inputs.
        order: p of the ball, 1 ≤ p ≤ ∞.

    Returns:
        The change, in the units of the unit's output; infinite where it exceeds float64.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: ``radius`` negative or infinite, ``order`` < 1, or ``removed`` not a finite vector.
        OverflowError: ‖v‖_p* exceeds float64.

    Reference: Hölder's inequality and its case of equality.
    """
    v = finite_array(removed, "removed", ndim=1)
    R = nonnegative(radius, "radius")
    p = real_number(order, "order")
    if p < 1:
        raise ValueError(f"order={p:g} is below 1. A ball has order 1 <= p <= inf; 2 is the Euclidean one.")
    if not v.any():
        return 0.0
    if p == 1:
        return product_up(R, float(np.abs(v).max()))
    dual = 1.0 if p == np.inf else min(p / (p - 1), _GREATEST_DUAL)
    # ‖v‖_p* moves by at most log(d) relative to a relative change of p*, which is off by a few u.
    error = norm_error(v.size, dual) + log_error(8 * np.log(2 * v.size))
    return product_up(R, float(outward(lq_quasinorm(v, dual), error)))


def chain_error_box(
    layers: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    pruned: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    low: npt.ArrayLike,
    high: npt.ArrayLike,
    *,
    activations: Sequence[Activation],
) -> list[Array]:
    """Bound what pruning a chain of layers changes in every unit, for every input of a box; no data needed.

        e_0 = 0,   e_l = ρ_l·(max {|ΔW_l·h + Δb_l| : h in the box of layer l's dense inputs} + |Ŵ_l|·e_{l−1})

    The dense net's features are enclosed layer by layer (interval arithmetic), as if each could be anywhere in its
    interval whatever the others are: an equality for weights of one sign, looser with every layer for weights of both.
    Rounded up; 0 for a unit that nothing reaches.

    Args:
        layers: (W, b) of each dense layer, shapes (c, m) and (c,); h_l = σ_l(W_l h_{l−1} + b_l).
        pruned: (Ŵ, b̂) of each pruned layer, of the same shapes.
        low: the least value of each input, shape (m_1,), finite.
        high: the greatest value of each input, shape (m_1,), finite, none below ``low``.
        activations: σ_l of each layer: ``RELU``, ``IDENTITY``, ``TANH``, ``SIGMOID`` or another.

    Returns:
        e_1 … e_L, one array of a layer's units each: bounds on |h_l(x) − ĥ_l(x)| for every x in the box.

    Raises:
        TypeError: an argument is not numeric.
        ValueError: sequences of different lengths, shapes that do not fit, an entry that is not finite, an empty box.
        OverflowError: a feature or an error may exceed float64.

    Reference: ours; interval bound propagation (Gowal et al. 2018, arXiv 1810.12715) for the dense features.
    """
    if not len(layers) == len(pruned) == len(activations):
        raise ValueError(
            f"layers, pruned and activations have lengths {len(layers)}, {len(pruned)} and {len(activations)}. Give"
            " one of each per layer."
        )
    bounds: list[Array] = []
    l, u = _box(low, high)  # noqa: E741
    errors = np.zeros(l.size)
    for number, (dense, cut, activation) in enumerate(zip(layers, pruned, activations, strict=True)):
        (W, b), (V, c) = _layer(dense, f"layers[{number}]", l.size), _layer(cut, f"pruned[{number}]", l.size)
        if V.shape != W.shape:
            raise ValueError(f"pruned[{number}] has shape {V.shape}, layers[{number}] {W.shape}. They must agree.")
        with np.errstate(over="ignore", invalid="ignore"):
            lowest, highest = _affine_range(W - V, b - c, l, u)
            is_changed = (W != V).any(axis=1) | (b != c)
            local = np.where(is_changed, np.maximum(highest, -lowest), 0.0)
            _refuse_overflow(local, number)
            errors = unit_errors(local, V, errors, activation.lipschitz)
            l, u = _enclosure(activation, *_affine_range(W, b, l, u))  # noqa: E741
        _refuse_overflow(np.stack([errors, l, u]), number)
        bounds.append(errors)
    return bounds


def _affine_range(W: Array, b: Array, l: Array, u: Array) -> tuple[Array, Array]:  # noqa: E741
    """Return lower and upper bounds of W·x + b over l ≤ x ≤ u, each rounded outward."""
    positive, negative = np.maximum(W, 0.0), np.minimum(W, 0.0)
    reach = np.abs(W) @ np.maximum(np.abs(l), np.abs(u)) + np.abs(b)
    # 2m + 1 terms, and a rounding each of ΔW, Δb and of the last step, which norm_error's margin holds.
    strays = outward(norm_error(2 * l.size + 1, 1.0) * reach, product_error(1), underflows=4 * l.size + 2)
    return positive @ l + negative @ u + b - strays, positive @ u + negative @ l + b + strays


def _enclosure(activation: Activation, low: Array, high: Array) -> tuple[Array, Array]:
    below, above = activation.function(low), activation.function(high)
    return below - outward(np.abs(below) * product_error(2), 0.0), above + outward(
        np.abs(above) * product_error(2), 0.0
    )


def _box(low: npt.ArrayLike, high: npt.ArrayLike, size: int | None = None) -> tuple[Array, Array]:
    l, u = finite_array(low, "low", ndim=1), finite_array(high, "high", ndim=1)  # noqa: E741
    if l.size != u.size or size not in (None, l.size):
        expected = f", expected {size}" if size is not None else ""
        raise ValueError(f"low and high have {l.size} and {u.size} entries{expected}. Give one of each per input.")
    if (l > u).any():
        j = int(np.argmax(l > u))
        raise ValueError(f"low={l[j]:g} exceeds high={u[j]:g} at input {j}. The box is empty: exchange them.")
    return l, u


def _layer(layer: tuple[npt.ArrayLike, npt.ArrayLike], name: str, inputs: int) -> tuple[Array, Array]:
    W, b = finite_array(layer[0], f"{name} weights", ndim=2), finite_array(layer[1], f"{name} bias", ndim=1)
    if W.shape != (b.size, inputs):
        raise ValueError(f"{name} has weights of shape {W.shape}, expected {(b.size, inputs)}: bias by inputs.")
    return W, b


def _refuse_overflow(values: Array, number: int) -> None:
    if not np.isfinite(values).all():
        raise OverflowError(f"Layer {number} may exceed float64 over this box. Make the box or the weights smaller.")
