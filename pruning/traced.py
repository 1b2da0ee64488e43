"""A model as a graph of calls, with the shape of every result."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ellq.analysis.nets import ZeroPadShortcut


@dataclass(frozen=True)
class Traced:
    """What a model calls, in order.

    Attributes:
        graph: the calls.
        shapes: of every result that is a tensor.
        output: what the graph computes from the inputs it was traced with.
    """

    graph: fx.Graph
    shapes: dict[fx.Node, tuple[int, ...]]
    output: Any


def trace(model: nn.Module, inputs: Sequence[Tensor], *, training: bool = False) -> Traced:
    """Trace a model symbolically, then run the graph in eval mode for the shapes.

    Args:
        model: the model, used up: a forward may keep the symbols it is fed. Pass a copy.
        inputs: what the model is called with, in order.
        training: trace what the model calls in training mode.

    Returns:
        The graph.

    Raises:
        ValueError: the model cannot be traced, or does not run on the inputs; the line of its code is quoted.
    """
    graph = symbolic(model, len(inputs), training=training)
    run = _Shapes(fx.GraphModule(model.eval(), graph))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            output = run.run(*(x.clone() for x in inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        reason = " ".join(str(error).split("While executing")[0].split()).rstrip(".")
        raise ValueError(
            f"The model does not run in float64 on an example of shape {shapes}: {reason}. Pass inputs the model can"
            " be called on."
        ) from error
    return Traced(graph, {node: run.shapes[node.name] for node in graph.nodes if node.name in run.shapes}, output)


def symbolic(model: nn.Module, arguments: int, *, training: bool) -> fx.Graph:
    """Trace a model without running it; arguments beyond the first few take their defaults."""
    model.train(training)
    parameters = list(inspect.signature(model.forward).parameters.values())[arguments:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        return _Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:
        # The tracer raises whatever the model's own code raises on a symbolic input.
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ValueError(
            f"The model cannot be traced{_place(error)} ({reason}). Compact a submodule with a fixed forward."
        ) from error


def calls(graph: fx.Graph) -> list[str]:
    """Return the calls as text: equal for two models that compute alike, whatever their widths."""
    return [f"{node.target}({node.args}, {node.kwargs})" for node in graph.nodes]


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the CPU, in float64 and eval mode."""
    return copy.deepcopy(model).to("cpu", torch.float64).eval()


class _Tracer(fx.Tracer):
    """Takes torch's own layers as single calls, and the shortcut whose numbers of channels can be changed."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is ZeroPadShortcut or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shapes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        return result


def _place(error: Exception) -> str:
    """Return the line of the model's own code at which the tracer gave up, as `` at file:line `code` ``."""
    torch_folder, own = str(Path(torch.__file__).parent), __file__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torch_folder, own))]
    if not frames or not frames[-1].line:
        return ""
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} `{frames[-1].line}`"
