"""Sharing a budget so that the certified bound on what pruning does to a chain's outputs is least."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import nn

from ellq.analysis import as_batches
from ellq.analysis.calibration import as_input
from ellq.pruning.budget import refuse_too_small
from ellq.pruning.chain_steps import LAYERS, MAX_POOLS, as_double, chain_of, rms, through
from ellq.pruning.largest import Counts, magnitudes
from ellq.pruning.layers import Allocation, Layers, same_reason
from ellq.pruning.walk import does_not_run
from ellq.theory import Array, allocate_retained, order_below_one, power_sums, stechkin_constant

_ELSE = "rule='ellq', 'exact' or 'flow' work on any network."
_ROWS = 512  # of the calibration inputs, enough for the size of features


def least_bound(layers: Layers, retained: int, *, q: float = 0.5) -> Allocation:
    """Make the certified bound on the errors of all outputs, added up, as small as a budget allows.

        minimise Σ_i A_i·k_i^(1 − 1/q)   subject to Σ k_i = retained,   A_i = g_i·B·c·‖w_i‖_q

    Unit i, keeping its k_i largest weights, errs by at most B·c·‖w_i‖_q·k_i^(1 − 1/q), where B is the largest root mean
    square of an input of its layer and c = ``stechkin_constant(q, 1)``. An error of unit i adds at most g_i times
    itself to the sum of the outputs' errors: g_i sums, over all paths to an output, the product of the magnitudes of
    the dense weights and the activations' slopes. The bound is convex in every k_i, so the steps worth most are taken,
    exactly.

    Args:
        layers: those of a chain of layers (``chain_of``) with calibration inputs; at most 512 are used.
        retained: the total to keep; every unit keeps one at least.
        q: order of the quasi-norm, 0 < q < 1.

    Raises:
        TypeError: a state dict.
        ValueError: no calibration inputs, or such as the model does not run on or that are not finite; no chain, a step
            whose Lipschitz constant is not known, a weight that two steps share, or a maximum over entries whose errors
            differ.
        BudgetError: less than one weight for each non-zero unit.

    Reference: ours; statements ``multilayer-units`` and ``linear-unit-l1`` with the sharp Stechkin constant,
    ``allocate_retained`` for the optimum.
    """
    q = order_below_one(q)
    model = layers.model
    if model is None:
        raise TypeError(f"rule='least_bound' runs the model. Pass the nn.Module, not its state dict. {_ELSE}")
    if layers.calibration is None:
        raise ValueError("rule='least_bound' needs inputs. Pass some as the second argument.")
    inputs = next(iter(as_batches(layers.calibration)))[:_ROWS]
    try:
        gains, reach = unit_gains(model, inputs)
    except ValueError as error:
        raise ValueError(f"rule='least_bound' follows errors through a chain of layers. {error} {_ELSE}") from error
    except RuntimeError as error:  # a layer's own
        raise does_not_run(0, inputs, error) from error
    if not all(map(math.isfinite, reach.values())):
        raise ValueError("Batch 0 of the calibration set gives NaN or infinite inputs of a layer. Pass finite ones.")
    constant = stechkin_constant(q, 1.0)
    A = []
    for name, layer in zip(layers.names, layers.weights, strict=True):
        if name not in gains:
            raise ValueError(f"Weight {name!r} is not one of a Linear or Conv layer of the chain. Exclude it. {_ELSE}")
        norms = np.concatenate([power_sums(block, (q,)).quasinorm(q) for _, block in magnitudes(layer)])
        A.append(gains[name] * reach[name] * constant * norms)
    minima = [
        np.maximum(minimum, np.minimum(found.nonzeros, 1))
        for minimum, found in zip(layers.minima, layers.surveys, strict=True)
    ]
    refuse_too_small(retained, layers.names, minima)
    counts = _allocate(
        np.concatenate(A),
        retained,
        nonzeros=np.concatenate([found.nonzeros for found in layers.surveys]),
        sizes=np.concatenate([np.full(len(found.nonzeros), found.size) for found in layers.surveys]),
        low=np.concatenate(minima),
        q=q,
    )
    split = np.split(counts, np.cumsum([len(layer) for layer in layers.weights])[:-1])
    return same_reason(split, f"least bound on the outputs' errors, q = {q:g}, with {retained:,} retained")


def _allocate(A: Array, total: int, *, nonzeros: Counts, sizes: Counts, low: Counts, q: float) -> Counts:
    """Share a total among the units: none of a zero unit, one at least of any other, zeros only when all else is in."""
    if total >= nonzeros.sum():
        room = sizes - nonzeros
        return np.asarray(nonzeros + np.clip(total - nonzeros.sum() - (np.cumsum(room) - room), 0, room))
    counts = low.copy()
    free = low < nonzeros  # these have the same minimum, unlike units with fewer weights than that
    if free.any():
        left = total - int(low[~free].sum())
        least = int(low[free][0])
        counts[free] = allocate_retained(A[free], left, q=q, p=1.0, sizes=nonzeros[free], least=least)
    return counts


def unit_gains(model: nn.Module, inputs: torch.Tensor) -> tuple[dict[str, Array], dict[str, float]]:
    """Return for each weight of a chain what its units' errors are multiplied by, and the size of its inputs.

    Args:
        model: a chain of layers, see ``chain_of``.
        inputs: shape (n, …), n ≥ 1.

    Returns:
        By the weight's name: g, shape (units,), an error of unit i at all its positions adds at most g_i times itself
        to the sum of the outputs' errors; and B, the largest root mean square of an input over the examples.

    Raises:
        ValueError: no chain, a step whose Lipschitz constant is not known, a weight that two steps share, or a maximum
            over entries whose errors differ.
    """
    x = as_input(inputs, model).detach().to("cpu", torch.float64)
    errors = torch.zeros_like(x[0])
    own: dict[str, torch.Tensor] = {}
    reach: dict[str, float] = {}
    seen: set[int] = set()
    steps = list(chain_of(model))
    last_maximum = max((place for place, (_, module) in enumerate(steps) if type(module) in MAX_POOLS), default=-1)
    for place, (name, module) in enumerate(steps):
        step = as_double(module)
        if isinstance(module, LAYERS) and isinstance(step, LAYERS):
            if id(module.weight) in seen:
                raise ValueError(f"Step {name!r} shares its weight with another, whose errors are not told apart.")
            seen.add(id(module.weight))
            weight = f"{name}.weight".removeprefix(".")
            reach[weight] = float(rms(x).max())
            sizes = copy.deepcopy(step).requires_grad_(False)
            sizes.weight.abs_()
            sizes.bias = None
            if place < last_maximum and isinstance(sizes, nn.modules.conv._ConvNd):
                sizes.padding_mode = "replicate"  # at borders too what errors are inside
            passed = sizes(errors[None])[0]
            axis = 0 if step.weight.ndim > 2 else -1
            shape = [1] * passed.ndim
            shape[axis] = passed.shape[axis]
            some = torch.linspace(1, 2, passed.shape[axis], dtype=torch.float64)  # above 0, where maxima have no slope
            own[weight] = some.reshape(shape).requires_grad_(True)
            errors = passed + own[weight]
        else:
            if type(module) in MAX_POOLS:
                _require_even(errors.detach().flatten(-MAX_POOLS[type(module)]), name)
            errors = through(step, errors)
        with torch.no_grad():
            x = step(x)
    grads = torch.autograd.grad(errors.sum(), list(own.values()), allow_unused=True)
    gains = {
        name: np.zeros(leaf.numel()) if grad is None else grad.numpy().ravel()
        for (name, leaf), grad in zip(own.items(), grads, strict=True)
    }
    return gains, reach


def _require_even(errors: torch.Tensor, name: str) -> None:
    """Refuse a maximum over the last axis where errors differ along it: which is the largest depends on whose err."""
    if (errors.amax(-1) > errors.amin(-1) * (1 + 1e-9)).any():
        raise ValueError(f"Step {name!r} takes maxima over entries of different errors, which are not followed.")
