"""Sharing a budget so that the certified bound on what pruning does to a chain's outputs is least."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from ellq.analysis import as_batches
from ellq.analysis.calibration import as_input
from ellq.pruning.chain_steps import LAYERS, as_double, rms, steps_of, through
from ellq.pruning.largest import Counts, magnitudes
from ellq.pruning.layers import Allocation, Layers, same_reason
from ellq.theory import Array, allocate_retained, order_below_one, power_sums, stechkin_constant

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
        layers: those of a ``Sequential`` that ``chain_bounds`` takes, with calibration inputs; at most 512 are used.
        retained: the total to keep; every unit keeps one at least.
        q: order of the quasi-norm, 0 < q < 1.

    Raises:
        TypeError: not a Sequential.
        ValueError: no calibration inputs, a step whose Lipschitz constant is not known, or a budget below one weight
            for each non-zero unit.

    Reference: ours; statements ``multilayer-units`` and ``linear-unit-l1`` with the sharp Stechkin constant,
    ``allocate_retained`` for the optimum.
    """
    q = order_below_one(q)
    model = layers.model
    if not isinstance(model, nn.Sequential):
        raise TypeError("rule='least_bound' follows errors through a chain. Pass an nn.Sequential.")
    if layers.calibration is None:
        raise ValueError("rule='least_bound' needs inputs. Pass some as the second argument.")
    gains, reach = unit_gains(model, next(iter(as_batches(layers.calibration)))[:_ROWS])
    constant = stechkin_constant(q, 1.0)
    A = []
    for name, layer in zip(layers.names, layers.weights, strict=True):
        if name not in gains:
            raise ValueError(f"Weight {name!r} is not one of a Linear or Conv layer of the chain. Exclude it.")
        norms = np.concatenate([power_sums(block, (q,)).quasinorm(q) for _, block in magnitudes(layer)])
        A.append(gains[name] * reach[name] * constant * norms)
    counts = _allocate(
        np.concatenate(A),
        retained,
        nonzeros=np.concatenate([found.nonzeros for found in layers.surveys]),
        sizes=np.concatenate([np.full(len(found.nonzeros), found.size) for found in layers.surveys]),
        minima=np.concatenate(layers.minima),
        q=q,
    )
    split = np.split(counts, np.cumsum([len(layer) for layer in layers.weights])[:-1])
    return same_reason(split, f"least bound on the outputs' errors, q = {q:g}, with {retained:,} retained")


def _allocate(A: Array, total: int, *, nonzeros: Counts, sizes: Counts, minima: Counts, q: float) -> Counts:
    """Share a total among the units: none of a zero unit, one at least of any other, zeros only when all else is in."""
    if total >= nonzeros.sum():
        room = sizes - nonzeros
        return np.asarray(nonzeros + np.clip(total - nonzeros.sum() - (np.cumsum(room) - room), 0, room))
    low = np.maximum(minima, np.minimum(nonzeros, 1))
    if total < low.sum():
        raise ValueError(
            f"The budget leaves {total} weights for {np.count_nonzero(low)} units, each of which keeps at least one by"
            f" rule='least_bound'. Retain {low.sum()} at least."
        )
    counts = low.copy()
    free = low < nonzeros  # these have the same minimum, unlike units with fewer weights than that
    if free.any():
        left = total - int(low[~free].sum())
        least = int(low[free][0])
        counts[free] = allocate_retained(A[free], left, q=q, p=1.0, sizes=nonzeros[free], least=least)
    return counts


def unit_gains(model: nn.Sequential, inputs: torch.Tensor) -> tuple[dict[str, Array], dict[str, float]]:
    """Return for each weight of a chain what its units' errors are multiplied by, and the size of its inputs.

    Args:
        model: a chain that ``chain_bounds`` takes.
        inputs: shape (n, …), n ≥ 1.

    Returns:
        By the weight's name: g, shape (units,), an error of unit i at all its positions adds at most g_i times itself
        to the sum of the outputs' errors; and B, the largest root mean square of an input over the examples.
    """
    x = as_input(inputs, model).detach().to("cpu", torch.float64)
    errors = torch.zeros_like(x[0])
    own: dict[str, torch.Tensor] = {}
    reach: dict[str, float] = {}
    for name, module in steps_of(model, ""):
        step = as_double(module)
        if isinstance(step, LAYERS):
            weight = f"{name}.weight".removeprefix(".")
            reach[weight] = float(rms(x).max())
            sizes = copy.deepcopy(step).requires_grad_(False)
            sizes.weight.abs_()
            sizes.bias = None
            passed = sizes(errors[None])[0]
            axis = 0 if step.weight.ndim > 2 else -1
            shape = [1] * passed.ndim
            shape[axis] = passed.shape[axis]
            own[weight] = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            errors = passed + own[weight]
        else:
            errors = through(step, errors)
        with torch.no_grad():
            x = step(x)
    grads = torch.autograd.grad(errors.sum(), list(own.values()), allow_unused=True)
    gains = {
        name: np.zeros(leaf.numel()) if grad is None else grad.numpy().ravel()
        for (name, leaf), grad in zip(own.items(), grads, strict=True)
    }
    return gains, reach
