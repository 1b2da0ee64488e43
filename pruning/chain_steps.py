"""The steps of a chain: its weight layers and functions, what a function makes of errors at most, and by rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ellq.pruning.traced import symbolic
from ellq.theory import norm_error, outward

# Exact types throughout: a subclass may compute something else.
WeightLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_POOLS: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
AVERAGES: tuple[type[nn.Module], ...] = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_WITHOUT_ROUNDING: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    *MAX_POOLS,
)
# Largest slope of each function, or of one position's output in the largest position's input for averages. GELU's and
# SiLU's and Mish's are rounded up in the last digit.
_LIPSCHITZ: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Dropout: 1.0,
    nn.Dropout1d: 1.0,
    nn.Dropout2d: 1.0,
    nn.Dropout3d: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Hardtanh: 1.0,
    nn.Tanh: 1.0,
    nn.Softsign: 1.0,
    nn.Softplus: 1.0,
    nn.LogSigmoid: 1.0,
    nn.Sigmoid: 0.25,
    nn.GELU: 1.13,
    nn.SiLU: 1.1,
    nn.Mish: 1.09,
    **dict.fromkeys(AVERAGES, 1.0),
}


# Functions in a model's forward that are a module's, called without further arguments.
_CALLS: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((functional.relu, torch.relu, "relu"), nn.ReLU),
    **dict.fromkeys((functional.tanh, torch.tanh, "tanh"), nn.Tanh),
    **dict.fromkeys((functional.sigmoid, torch.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((torch.flatten, "flatten"), nn.Flatten),
}


def steps_of(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the weight layers and functions of a chain in order; refuse what is neither."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(f"Step {prefix!r} carries a forward hook, which may change what it computes. Remove the hook.")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for name, child in module._modules.items():  # named_children would leave out the second use of a module
            assert child is not None
            yield from steps_of(child, f"{prefix}.{name}" if prefix else name)
        return
    if type(module) not in LAYERS:
        slope_of(module)
    yield prefix, module


def chain_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the steps of a Sequential, or of a model of any class that calls one step after the other.

    Of functions in its forward, ``relu``, ``tanh``, ``sigmoid`` and ``flatten`` are steps.
    """
    if isinstance(model, nn.Sequential) or type(model) in LAYERS:
        yield from steps_of(model, "")
        return
    if model._forward_hooks or model._forward_pre_hooks:
        raise ValueError("The model carries a forward hook, which may change what it computes. Remove the hook.")
    last, *nodes = symbolic(copy.deepcopy(model), 1, training=False).nodes
    reached = {last}
    for node in nodes:
        if reached.isdisjoint(node.all_input_nodes) and node.op != "output":
            continue  # what is made of other arguments' defaults
        step = None
        if node.all_input_nodes == [last] and len(last.users) == 1:
            step = model.get_submodule(node.target) if node.op == "call_module" else _step_of_call(node)
        if node.op == "output" and step is not None:
            return
        if step is None:
            raise ValueError(f"The model is no chain of layers: it calls {node.target} on {node.all_input_nodes}.")
        yield from steps_of(step, str(node.target))
        last = node
        reached.add(node)


def _step_of_call(node: fx.Node) -> nn.Module | None:
    """Return the module that does what a node does with its one input; None where there is none."""
    others = dict(node.kwargs) | dict(enumerate(node.args[1:]))
    others.pop("inplace", None)
    kind = _CALLS.get(node.target)
    if kind is nn.Flatten:
        start, end = others.pop("start_dim", others.pop(0, 0)), others.pop("end_dim", others.pop(1, -1))
        return nn.Flatten(start, end) if isinstance(start, int) and isinstance(end, int) and start > 0 else None
    if node.op == "output":
        return nn.Identity() if node.args[0] is node.all_input_nodes[0] else None
    return None if kind is None or others else kind()


def slope_of(module: nn.Module) -> float:
    """Return the Lipschitz constant of a function; refuse those not known."""
    kind = type(module)
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) and not module.return_indices:
        # The rms of a maximum over m positions can be √m times that of any one of them.
        return math.sqrt(_window(module.kernel_size, MAX_POOLS[kind]))
    if isinstance(module, nn.AvgPool2d | nn.AvgPool3d) and module.divisor_override:
        return _window(module.kernel_size, 2 if isinstance(module, nn.AvgPool2d) else 3) / abs(module.divisor_override)
    if kind is nn.LeakyReLU:
        return max(1.0, abs(float(module.negative_slope)))  # type: ignore[arg-type]
    if kind is nn.ELU:
        return max(1.0, abs(float(module.alpha)))  # type: ignore[arg-type]
    if kind is nn.CELU and float(module.alpha) > 0:  # type: ignore[arg-type]
        return 1.0
    if kind in BATCH_NORMS and module.running_var is not None:
        return float(norm_factors(module).max())
    if kind not in _LIPSCHITZ:
        raise ValueError(f"The chain holds a {kind.__name__}, whose Lipschitz constant is not known here.")
    return _LIPSCHITZ[kind]


def _window(size: int | tuple[int, ...], dims: int) -> int:
    return math.prod(size) if isinstance(size, tuple) else size**dims


def norm_factors(module: nn.Module) -> Tensor:
    """Return what a batch norm multiplies each channel by, in magnitude, rounded up."""
    assert isinstance(module, BATCH_NORMS)
    assert module.running_var is not None
    factors = (module.running_var.double() + module.eps).rsqrt()
    if module.affine:
        factors = factors * module.weight.detach().double().abs()
    return torch.from_numpy(outward(factors.numpy(), norm_error(4, 1.0)))


def rounding_of(module: nn.Module, reach: float, result: float, terms: int) -> float:
    """Bound how far two evaluations of a function can stray together, given the rms of its inputs and outputs."""
    if type(module) in _WITHOUT_ROUNDING:
        return 0.0
    size = slope_of(module) * reach + result
    if isinstance(module, BATCH_NORMS):
        assert module.running_mean is not None
        shift = norm_factors(module) * module.running_mean.abs()
        size += float((shift + module.bias.abs() if module.affine else shift).max())
    # Twice for a pruned net with larger features than the dense one's: see _Change.rounding.
    noise = 4 * norm_error(terms, 1.0) * size
    if isinstance(module, nn.Softplus):
        noise += math.log1p(math.exp(-module.threshold)) / abs(module.beta)  # it jumps where it becomes linear
    return noise


def through(module: nn.Module, errors: Tensor) -> Tensor:
    """Return the errors after a function: averaged by an average, reshaped by a flatten, times the slope by others."""
    kind = type(module)
    if kind in AVERAGES or kind is nn.Flatten:
        passed: Tensor = module(errors[None])[0].abs()
        return passed
    if kind in MAX_POOLS:
        largest: Tensor = module(errors[None])[0]
        return slope_of(module) * largest
    if kind in BATCH_NORMS:
        return errors * norm_factors(module).reshape(-1, *[1] * (errors.ndim - 1))
    return errors * slope_of(module)


def passed_on(layer: WeightLayer, errors: Tensor, own: Tensor) -> Tensor:
    """Return each unit's error after a layer: its own, and those of the units it reads times the weights' magnitudes.

    ``unit_errors`` of the theory, every position of a unit counted as a unit.
    """
    magnitudes = copy.deepcopy(layer)
    magnitudes.weight.abs_()
    magnitudes.bias = None
    return rounded_out(own + magnitudes(errors[None])[0], layer.weight[0].numel() + 4)


def rounded_out(errors: Tensor, terms: int) -> Tensor:
    """Return errors that are no less than the exact ones, each computed from this many terms; 0 stays 0."""
    rounded = torch.from_numpy(outward(errors.numpy(), norm_error(terms, 1.0), terms))
    return torch.where(errors > 0, rounded, 0.0)


def rms(values: Tensor) -> Tensor:
    """Return the root mean square over axis 0, scaled so that squares neither overflow nor vanish."""
    largest = values.abs().amax(0)
    largest = torch.where(largest > 0, largest, 1.0)
    return (values / largest).square().mean(0).sqrt() * largest


def as_double(module: nn.Module) -> nn.Module:
    """Return a copy in float64, on the CPU and in eval mode."""
    return copy.deepcopy(module).to("cpu", torch.float64).eval()
