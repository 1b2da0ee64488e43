"""Two versions of a network run side by side, layer by layer, so that each layer meets what those before it became."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

_SUMS = {operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Arrival:
    """What a layer meets on the calibration inputs, batch by batch.

    Attributes:
        name: of the layer.
        inputs: what it receives in the network that is being changed.
        targets: what it should give: what the dense network gives there; where its batch norm ends in a sum with a skip
            path, with what that path has lost so far added, so that the sum is what it was.
        norm: name of the batch norm that alone reads its output; None where something else does, or is not known to.
    """

    name: str
    inputs: list[Tensor]
    targets: list[Tensor]
    norm: str | None


def walk(
    dense: nn.Module, changing: nn.Module, batches: Sequence[Tensor], layers: Collection[str]
) -> Iterator[Arrival]:
    """Yield each layer in the order they run; what is done to it in ``changing`` before the next is asked for counts.

    One forward pass of both networks, without gradients, the activations of all batches side by side:
    the memory is that of what is alive at one layer. A network that cannot be traced is run anew for every layer, which
    takes longer, and skip paths are not known then. Layers that run twice, or never, are left out.

    Args:
        dense: what is aimed at, in eval mode.
        changing: a copy of it whose layers are being changed; may be ``dense`` itself where nothing is.
        batches: inputs, each of shape (b, …), on the networks' device and of their type.
        layers: names of modules that take and give one tensor.

    Raises:
        ValueError: the network does not run on a batch.
    """
    try:
        graph = fx.Tracer().trace(copy.deepcopy(dense))
        walker = _traced(graph, dense, changing, batches, layers)
    except Exception:
        walker = _anew(dense, changing, batches, layers)
    try:
        yield from walker
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"The model does not run on calibration inputs of shape {tuple(batches[0].shape)}:"
            f" {' '.join(str(error).split()).rstrip('.')}. Pass inputs the model can be called on."
        ) from error


def _traced(
    graph: fx.Graph, dense: nn.Module, changing: nn.Module, batches: Sequence[Tensor], layers: Collection[str]
) -> Iterator[Arrival]:
    nodes = list(graph.nodes)
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    before = _Run(dense, batches)
    after = before if changing is dense else _Run(changing, batches)
    for node in nodes:
        if node.op == "output":
            return
        if node.op == "call_module" and node.target in layers and calls[node.target] == 1:
            yield from _arrive(nodes, node, calls, dense, before, after)
        for run in {id(before): before, id(after): after}.values():
            run.compute(node)


def _arrive(
    nodes: list[fx.Node], node: fx.Node, calls: Counter[Any], dense: nn.Module, before: _Run, after: _Run
) -> Iterator[Arrival]:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if not isinstance(source, fx.Node):
        return
    inputs = after.compute(source)
    targets = before.compute(node)
    norm = _norm_after(node, calls, dense)
    if norm is None:
        yield Arrival(str(node.target), inputs, targets, None)
        return
    module: Any = dense.get_submodule(str(norm.target))
    other = _joined(nodes, node, norm, dense) if before is not after else None
    if other is not None:
        scale = (module.running_var + module.eps).rsqrt() * (1.0 if module.weight is None else module.weight)
        scale = scale.reshape(-1, *[1] * (targets[0].ndim - 2))
        lost = [a - b for a, b in zip(before.compute(other), after.compute(other), strict=True)]
        # A channel that the norm switches off cannot make up for anything.
        weight = torch.where(scale.abs() > 1e-6, 1 / scale, 0.0)
        if lost[0].shape == targets[0].shape:
            targets = [target + drift * weight for target, drift in zip(targets, lost, strict=True)]
    yield Arrival(str(node.target), inputs, targets, str(norm.target))


def norms_of(model: nn.Module) -> dict[str, str] | None:
    """Return which batch norm alone reads each module's output, by name; None where the model cannot be traced."""
    try:
        graph = fx.Tracer().trace(copy.deepcopy(model))
    except Exception:
        return None
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in nodes)
    found = {str(node.target): _norm_after(node, calls, model) for node in nodes if calls[node.target] == 1}
    return {name: str(norm.target) for name, norm in found.items() if norm is not None}


def _norm_after(node: fx.Node, calls: Counter[Any], model: nn.Module) -> fx.Node | None:
    """Return the call of a batch norm with running statistics that alone reads a node, and runs once."""
    norm = _only_user(node)
    if norm is None or norm.op != "call_module" or calls[norm.target] != 1:
        return None
    module: Any = model.get_submodule(str(norm.target))
    return norm if isinstance(module, _NORMS) and module.running_var is not None else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _joined(nodes: list[fx.Node], layer: fx.Node, norm: fx.Node, model: nn.Module) -> fx.Node | None:
    """Return the other side of the sum that alone reads the norm, if it can be computed before the layer is changed."""
    join = _only_user(norm)
    if join is None or not (join.target in _SUMS or (join.op == "call_method" and join.target in ("add", "add_"))):
        return None
    sides = [side for side in join.args if isinstance(side, fx.Node)]
    if len(sides) != 2 or sides.count(norm) != 1 or join.kwargs:
        return None
    other = sides[1 - sides.index(norm)]
    start, stop = nodes.index(layer), nodes.index(join)
    if any(_is_in_place(node, model) for node in nodes[start:stop]) or layer in _ancestors(other):
        return None
    return other


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _is_in_place(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or node.target in (operator.iadd, operator.imul) or bool(node.kwargs.get("inplace"))


@dataclass
class _Run:
    """One network's values so far, for all batches; what nothing needs any more is let go."""

    model: nn.Module
    batches: Sequence[Tensor]
    values: dict[fx.Node, list[Any]] = field(default_factory=dict)
    waiting: dict[fx.Node, int] = field(default_factory=dict)

    def compute(self, node: fx.Node) -> list[Any]:
        """Return the values of a node, computing first what they need."""
        if node in self.values:
            return self.values[node]
        sources = node.all_input_nodes
        for source in sources:
            self.compute(source)
        with torch.no_grad():
            found = [self._one(node, number) for number in range(len(self.batches))]
        self.values[node], self.waiting[node] = found, len(node.users)
        for source in sources:
            self.waiting[source] -= 1
            if self.waiting[source] == 0:
                self.values[source] = []  # computed, and gone
        return found

    def _one(self, node: fx.Node, number: int) -> Any:
        if node.op == "placeholder":
            is_first = next(iter(node.graph.nodes)) is node
            return self.batches[number] if is_first else node.args[0]
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.model)

        def own(other: fx.Node) -> Any:
            return self.values[other][number]

        args, kwargs = fx.map_arg(node.args, own), fx.map_arg(node.kwargs, own)
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)


class _ReachedError(Exception):
    """Ends a forward pass once the layer that was asked for has been met."""


def _anew(
    dense: nn.Module, changing: nn.Module, batches: Sequence[Tensor], layers: Collection[str]
) -> Iterator[Arrival]:
    for name in _in_order(dense, batches[0], layers):
        inputs = [_met(changing, name, batch) for batch in batches]
        met = inputs if changing is dense else [_met(dense, name, batch) for batch in batches]
        layer = dense.get_submodule(name)
        with torch.no_grad():
            targets = [layer(x) for x in met]
        yield Arrival(name, inputs, targets, None)


def _in_order(model: nn.Module, batch: Tensor, layers: Collection[str]) -> list[str]:
    """Return the layers that a forward pass runs exactly once, in order."""
    order: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name in layers
    ]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, times in Counter(order).items() if times == 1]


def _met(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args or tuple(kwargs.values()))[0].clone())
        raise _ReachedError

    hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(batch)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return seen[0]
