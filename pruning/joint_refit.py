"""Two layers refitted together: one that reads units, and the one that alone makes them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from ellq.analysis import add_up, joined
from ellq.analysis.distributed import mean_of
from ellq.pruning.layer_problem import SAMPLES
from ellq.pruning.patches import PatchLayer, positions_of
from ellq.pruning.walk import Arrival, Maker

STEPS, PRODUCTS = 3, 8
"""Steps of Gauss and Newton, and products with the Jacobian by which each is found."""
_LEAST = 64  # inputs that are looked at; more where positions are few
_HELD_OUT = 4  # one in so many inputs says how far a step goes
_DAMPING = 1e-3  # of the curvature along the gradient
_WORTH = 0.99  # a step that leaves more of the error is the last

Tensors = list[Tensor]
Examples = Sequence[tuple[Tensor, Tensor]]


@torch.no_grad()
def refit_together_(changing: nn.Module, arrival: Arrival, importance: Tensor) -> bool:
    """Refit a layer and its maker in the changing network, by Gauss–Newton steps on what the layer is to give.

    Both layers' weights and shifts move at once, along what the errors of the outputs say of them; weights of 0 stay 0.
    Each step is the least-squares solution of the network linearised where it is, approached by conjugate gradients and
    shortened until inputs that the step was not found on gain too. Where ``torch.distributed`` is initialised, inputs
    are those of all processes, and the result is the same bits in each.

    Args:
        changing: the network; the two layers, and the running means of the batch norms after them, are changed.
        arrival: of the layer, whose ``maker`` is known; its inputs are made anew.
        importance: by which the error of each output is multiplied, shape (c,).

    Returns:
        Whether anything was changed.
    """
    maker = cast(Maker, arrival.maker)
    pair = _Pair.of(changing, arrival, maker, importance)
    fitted, held = pair.examples(arrival, maker)
    try:
        found = _descended(pair, fitted, held)
    except NotImplementedError:  # torch's: an operation between them has no derivative forwards
        return False
    if found is None:
        return False
    pair.install_(found)
    maker.renew()
    return True


@dataclass(frozen=True)
class _Pair:
    """Two layers as a function of what may change in them.

    Attributes:
        layers: the maker, and the layer.
        norms: the batch norms after them, or None.
        between: from the maker's outputs to the layer's inputs.
        masks: which weights are there.
        scale: by which outputs' errors are multiplied, to be broadcast over outputs.
    """

    layers: tuple[PatchLayer, PatchLayer]
    norms: tuple[nn.Module | None, nn.Module | None]
    between: Callable[[Tensor], Tensor]
    masks: tuple[Tensor, Tensor]
    scale: Tensor

    @classmethod
    def of(cls, changing: nn.Module, arrival: Arrival, maker: Maker, importance: Tensor) -> _Pair:
        names = (maker.name, maker.norm), (arrival.name, arrival.norm)
        first, second = (cast(PatchLayer, changing.get_submodule(name)) for name, _ in names)
        norms = tuple(None if norm is None else changing.get_submodule(norm) for _, norm in names)
        masks = first.weight.detach() != 0, second.weight.detach() != 0
        scale = _along_units(second, importance.to(second.weight))
        return cls((first, second), cast(Any, norms), maker.between, masks, scale)

    def start(self) -> Tensors:
        """Return weights and shifts as they are: for each layer its weight, and a shift of 0 where one can be kept."""
        found = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            weight = layer.weight.detach()
            found += [weight, weight.new_zeros(len(weight) if self._can_shift(layer, norm) else 0)]
        return found

    @staticmethod
    def _can_shift(layer: PatchLayer, norm: nn.Module | None) -> bool:
        return layer.bias is not None or norm is not None

    def __call__(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return the second layer's outputs, times their importance."""
        y = self.given(0, values[0], values[1], x)
        return self.given(1, values[2], values[3], self.between(y)) * self.scale

    def given(self, which: int, weight: Tensor, shift: Tensor, x: Tensor) -> Tensor:
        """Return what one of the layers gives with a weight and a shift."""
        layer = self.layers[which]
        y = cast(Tensor, functional_call(layer, {"weight": weight}, (x,)))
        return y + _along_units(layer, shift) if len(shift) else y

    def examples(self, arrival: Arrival, maker: Maker) -> tuple[Examples, Examples]:
        """Return inputs of the maker and what the layer is to give: to fit, and held out; parts of every batch."""
        totals = sum(len(x) for x in maker.inputs), sum(positions_of(self.layers[1], y) for y in arrival.targets)
        inputs, positions = map(add_up, totals)
        most = max(layer.weight[0].numel() for layer in self.layers)
        share = max(_LEAST, math.ceil(SAMPLES * most * inputs / positions)) / inputs
        counts = [min(len(x), max(2, math.ceil(share * len(x)))) for x in maker.inputs]
        own = joined(torch.cat([x[:n] for n, x in zip(counts, maker.inputs, strict=True)]))
        aims = joined(torch.cat([y[:n] for n, y in zip(counts, arrival.targets, strict=True)])) * self.scale
        apart = joined(torch.cat([torch.arange(n) % _HELD_OUT == _HELD_OUT - 1 for n in counts])).to(own.device)
        found = []
        for chosen in (~apart, apart if bool(apart.any()) else ~apart):
            parts = (torch.split(values[chosen], max(counts)) for values in (own, aims))
            found.append(list(zip(*parts, strict=True)))
        return found[0], found[1]

    def error(self, values: Sequence[Tensor], examples: Examples) -> float:
        """Return the sum of squared errors."""
        return sum(float((self(values, x) - y).double().square().sum()) for x, y in examples)

    def install_(self, values: Sequence[Tensor]) -> None:
        """Write weights and shifts into the network."""
        values = mean_of(values, 1.0)  # processors may round differently
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            weight, shift = values[2 * number : 2 * number + 2]
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.add_(shift)
            elif norm is not None:
                cast(Tensor, norm.running_mean).sub_(shift)


def _along_units(layer: PatchLayer, values: Tensor) -> Tensor:
    """Return one value for each unit so that it is broadcast over a layer's outputs."""
    return values if isinstance(layer, nn.Linear) else values.reshape(-1, *[1] * (layer.weight.ndim - 2))


def _descended(pair: _Pair, fitted: Examples, held: Examples) -> Tensors | None:
    """Return the values after the steps that gain; None where the first does not."""
    values, error = pair.start(), pair.error(pair.start(), held)
    found = None
    for _ in range(STEPS):
        step = _step(pair, values, fitted)
        for length in (1.0, 0.5, 0.25):
            tried = [value + length * change for value, change in zip(values, step, strict=True)]
            left = pair.error(tried, held)
            if left < error:
                break
        else:
            return found
        is_last = left > _WORTH * error
        found, values, error = tried, tried, left
        if is_last:
            break
    return found


def _step(pair: _Pair, values: Tensors, examples: Examples) -> Tensors:
    """Return the change that makes the linearised errors small, damped, by conjugate gradients.

    Changes of a weight count relative to its layer's weights, those of a shift relative to the layer's outputs.
    """
    scales = _scales(pair, values, examples)

    def pair_at(x: Tensor, changes: Sequence[Tensor]) -> Tensor:
        return pair([v + s * c for v, s, c in zip(values, scales, changes, strict=True)], x)

    zero = [torch.zeros_like(value) for value in values]

    def product(direction: Tensors) -> tuple[Tensors, float]:
        """Return JᵀJ·d and ‖J·d‖²."""
        total, square = [torch.zeros_like(value) for value in values], 0.0
        for x, _ in examples:
            outputs = partial(pair_at, x)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)  # torch's own, once
                _, along = cast("tuple[Tensor, Tensor]", jvp(outputs, (zero,), (direction,)))
            _, back = cast("tuple[Tensor, Any]", vjp(outputs, zero))
            total = [t + b for t, b in zip(total, back(along)[0], strict=True)]
            square += float(along.double().square().sum())
        return total, square

    residual = [torch.zeros_like(value) for value in values]
    for x, y in examples:
        given, back = cast("tuple[Tensor, Any]", vjp(partial(pair_at, x), zero))
        residual = [r + b for r, b in zip(residual, back((y - given).detach())[0], strict=True)]
    direction, solution = residual, zero
    square, damping = _dot(residual, residual), 0.0
    for number in range(PRODUCTS):
        if square == 0:
            break
        along, curvature = product(direction)
        length = _dot(direction, direction)
        if number == 0:
            damping = _DAMPING * curvature / length
        curvature += damping * length
        if not curvature > 0:
            break
        rate = square / curvature
        solution = [s + rate * d for s, d in zip(solution, direction, strict=True)]
        residual = [r - rate * (a + damping * d) for r, a, d in zip(residual, along, direction, strict=True)]
        before, square = square, _dot(residual, residual)
        direction = [r + (square / before) * d for r, d in zip(residual, direction, strict=True)]
    return [scale * change for scale, change in zip(scales, solution, strict=True)]


def _scales(pair: _Pair, values: Tensors, examples: Examples) -> Tensors:
    """Return by what a change of each value is multiplied; 0 where a weight is not there."""
    squares, counts = [0.0, 0.0], [0, 0]
    for x, _ in examples:
        y = pair.given(0, values[0], values[1], x)
        for which, outputs in enumerate((y, pair.given(1, values[2], values[3], pair.between(y)))):
            squares[which] += float(outputs.double().square().sum())
            counts[which] += outputs.numel()
    found = []
    for mask, weight, shift, square, count in zip(pair.masks, values[::2], values[1::2], squares, counts, strict=True):
        size = weight[mask].square().mean().sqrt() if bool(mask.any()) else weight.new_zeros(())
        found += [mask * size, torch.full_like(shift, math.sqrt(square / count))]
    return found


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
