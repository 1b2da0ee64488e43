"""Who must be cut together: the hidden layers whose units one Linear makes and one other Linear reads."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional

_ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Softsign,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Identity,
    nn.Dropout,
)
_ELEMENTWISE_FUNCTIONS = {
    functional.relu,
    functional.relu6,
    functional.leaky_relu,
    functional.elu,
    functional.celu,
    functional.selu,
    functional.gelu,
    functional.silu,
    functional.mish,
    functional.sigmoid,
    functional.logsigmoid,
    functional.tanh,
    functional.softplus,
    functional.softsign,
    functional.hardtanh,
    functional.hardswish,
    functional.hardsigmoid,
    functional.dropout,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
}
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous"}


@dataclass(frozen=True)
class HiddenLayer:
    """Units that can be removed: the Linear that makes them and the only one that reads them.

    Attributes:
        producer: name of the Linear whose rows are the units.
        consumer: name of the Linear whose columns read them, after element-wise functions only.
        units: how many there are.
    """

    producer: str
    consumer: str
    units: int


def hidden_layers(model: nn.Module) -> list[HiddenLayer]:
    """Find every ``Linear → element-wise functions → Linear`` of a model, in the order they run.

    The model's graph is traced symbolically, so functions called in ``forward`` count as well as modules. Left out,
    because cutting them would be wrong: units read by anything else besides the consumer (a residual path, an
    output), in training or in evaluation; layers called more than once; and layers whose parameters another layer
    or ``forward`` itself uses.

    Args:
        model: the model; only looked at.

    Returns:
        The hidden layers; empty when there are none.

    Raises:
        ValueError: the model cannot be traced, for example because its control flow depends on the data.
    """
    # A copy, for tracing runs the model's own code, which may keep the symbols it is fed.
    traced = copy.deepcopy(model)
    in_training = _found(traced.train())
    return [layer for layer in _found(traced.eval()) if layer in in_training]


def same_computation(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models call the same layers and functions with the same constants, whatever their widths.

    False for a ``forward`` that computes with the width of a layer, when the widths differ.
    """
    calls = []
    for model in (copy.deepcopy(first), copy.deepcopy(second)):
        nodes = [node for mode in (True, False) for node in _trace(model.train(mode)).nodes]
        calls.append([(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in nodes])
    return calls[0] == calls[1]


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return fx.symbolic_trace(model).graph
    except Exception as error:
        # The tracer raises whatever the model's own code raises on a symbolic input.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"The model cannot be traced ({reason}). Prune a submodule with a fixed forward.") from error


def _found(model: nn.Module) -> list[HiddenLayer]:
    graph = _trace(model)
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(p) for module in set(modules.values()) for p in module.parameters(recurse=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners.update(id(parameters.get(str(node.target))) for node in graph.nodes if node.op == "get_attr")
    found = []
    for node in graph.nodes:
        producer = _plain_linear(node, modules)
        if producer is None:
            continue
        step = node
        while len(step.users) == 1:
            step = next(iter(step.users))
            if not is_elementwise(step, modules):
                break
        consumer = _plain_linear(step, modules)
        if step is node or consumer is None:
            continue
        names = (str(node.target), str(step.target))
        if any(calls[name] > 1 for name in names):
            continue
        if any(owners[id(p)] > 1 for module in (producer, consumer) for p in module.parameters()):
            continue
        found.append(HiddenLayer(*names, units=producer.out_features))
    return found


def _plain_linear(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Linear | None:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    # A subclass may compute something else, and a parametrised Linear is a subclass.
    return module if type(module) is nn.Linear else None


def is_elementwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a call maps each entry by itself, the same way at every place."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.PReLU):
            return module.num_parameters == 1
        return type(module) in _ELEMENTWISE_MODULES
    if node.op == "call_function":
        return node.target in _ELEMENTWISE_FUNCTIONS
    return node.op == "call_method" and node.target in _ELEMENTWISE_METHODS
