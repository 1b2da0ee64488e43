"""FLOPs layer by layer, as this project counts them and as the papers on interpolative decompositions do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ellq.analysis.cost import cost

CONVENTIONS = ("2mac", "chee2021")

_MATRIX_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)


def layer_flops(model: nn.Module, example: Tensor, *, convention: str = "2mac") -> pd.DataFrame:
    """Count the FLOPs and parameters of every layer, for one example.

        2mac       2 per multiply–add of every matrix product and convolution
        chee2021   2 per multiply–add of Linear and convolution modules, 1 per output where they have a bias;
                   2 per element of a BatchNorm2d, 1 per element of a ReLU module, kᵈ per output of a pooling module

    ``2mac`` also counts products that ``forward`` computes itself, so it sums to ``cost(model, example).flops``.
    ``chee2021`` counts modules only: a ReLU called as a function costs nothing. A pooling to a given size, which the
    authors' nets lack, counts its inputs.

    Args:
        model: any module; run once in eval mode, neither changed nor left in another mode.
        example: a batch of inputs; everything is divided by its first dimension.
        convention: one of ``CONVENTIONS``.

    Returns:
        A row per module that is called and has no modules inside, or computes or holds something itself, in running
        order; the last rows are of those that are not called but hold parameters. Columns: ``layer`` (its name; empty
        for the model's own forward), ``kind`` (its type), ``calls``, ``inputs`` and ``outputs`` (the shapes at its
        first call, without the batch), ``flops`` and ``parameters``, a shared one where it is met first.

    Raises:
        ValueError: an unknown convention, or an empty batch.

    Reference: Chee, Renz, Damle & De Sa 2022, the counter in their code.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is unknown. Choose one of {', '.join(CONVENTIONS)}.")
    counts = _run(model, example)
    rows = []
    met: set[int] = set()
    for name, module, count in counts:
        held = {id(p): p.numel() for p in module.parameters(recurse=_is_leaf(module)) if id(p) not in met}
        met |= held.keys()
        flops = (count.products if convention == "2mac" else count.chee2021) // example.shape[0]
        if (count.calls and _is_leaf(module)) or flops or held:
            ran = (count.calls, count.inputs, count.outputs)
            rows.append((name, type(module).__name__, *ran, flops, sum(held.values())))
    return pd.DataFrame(rows, columns=["layer", "kind", "calls", "inputs", "outputs", "flops", "parameters"])


def total_flops(model: nn.Module, example: Tensor, *, convention: str = "2mac") -> int:
    """Count the FLOPs of one example, the sum of ``layer_flops``."""
    return int(layer_flops(model, example, convention=convention)["flops"].sum())


@dataclass
class _Count:
    """What one module did in a forward pass, calls inside it left out; the shapes are for one example."""

    calls: int = 0
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    products: int = 0
    chee2021: int = 0


def _run(model: nn.Module, example: Tensor) -> list[tuple[str, nn.Module, _Count]]:
    """Run the model once; return the count of each module, those called first in running order."""
    counter = FlopCounterMode(display=False)
    modules = {module: name for name, module in model.named_modules() if not _is_parametrization(name)}
    counts: dict[nn.Module, _Count] = {}
    under_way: list[tuple[int, int]] = []  # of each call, the FLOPs before it and those of the calls inside it

    def enter(module: nn.Module, *_: Any) -> None:
        counts.setdefault(module, _Count())
        under_way.append((counter.get_total_flops(), 0))

    def leave(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        before, inside = under_way.pop()
        spent = counter.get_total_flops() - before
        if under_way:
            under_way[-1] = (under_way[-1][0], under_way[-1][1] + spent)
        count, batch = counts[module], example.shape[0]
        count.products += spent - inside
        inputs, outputs = _shape((*args, *named.values())), _shape(result)
        count.chee2021 += _chee2021(module, spent - inside, math.prod(inputs), math.prod(outputs))
        if not count.calls:
            count.inputs, count.outputs = _of_one(inputs, batch), _of_one(outputs, batch)
        count.calls += 1

    hooks = []
    try:
        for module in modules:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True))
        with counter:
            cost(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    for module in modules:
        counts.setdefault(module, _Count())
    return [(modules[module], module, count) for module, count in counts.items()]


def _chee2021(module: nn.Module, products: int, inputs: int, outputs: int) -> int:
    if isinstance(module, _MATRIX_LAYERS):
        return products + (outputs if module.bias is not None else 0)
    if isinstance(module, nn.BatchNorm2d):
        return 2 * outputs
    if isinstance(module, nn.ReLU):
        return outputs
    if isinstance(module, _POOLS):
        axes = int(type(module).__name__[-2])
        size = module.kernel_size
        return outputs * (math.prod(size) if isinstance(size, tuple) else size**axes)
    return inputs if isinstance(module, _ADAPTIVE_POOLS) else 0


def _is_parametrization(name: str) -> bool:
    return "parametrizations" in name.split(".")


def _is_leaf(module: nn.Module) -> bool:
    return all(name == "parametrizations" for name, _ in module.named_children())


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of the first tensor in what a module is given or gives."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((shape for shape in map(_shape, inner) if shape), ())


def _of_one(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    if not shape:
        return ()
    folded = shape[0] // batch  # more than 1 where, say, tokens are folded into the batch
    return shape[1:] if folded == 1 else (folded, *shape[1:])
