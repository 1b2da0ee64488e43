"""Two versions of a network run side by side, layer by layer, so that each layer meets what those before it became."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor, fx, nn

from ellq.pruning.patches import reads_patches

_SUMS = {operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_}
_IN_PLACE: set[Any] = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
}
_IN_PLACE |= {operator.ipow, operator.setitem}
HELD = 2**28
"""How many bytes of activations of each network stay in memory; the others are mapped from temporary files."""
_TRIED = 8  # inputs on which a trace is held against the model
_SAME = 1e-3  # relative difference of outputs that comes from the order of sums alone


@dataclass(frozen=True)
class Arrival:
    """What a layer meets on the calibration inputs, batch by batch.

    Attributes:
        name: of the layer.
        inputs: what it receives in the network that is being changed.
        targets: what it should give: what the dense network gives there; where it, or its batch norm, ends in a sum
            with a skip path, with what that path has lost so far added, so that the sum is what it was.
        norm: name of the batch norm that alone reads its output; None where something else does, or is not known to.
        maker: the layer that all it receives comes from and that nothing else reads, with what lies between; None where
            there is no such layer, or it is not known.
    """

    name: str
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    norm: str | None
    maker: Maker | None = None


@dataclass(frozen=True)
class Maker:
    """The layer whose outputs, after operations that change no other's, are what one other layer receives.

    Attributes:
        name: of the layer.
        inputs: what it receives in the network that is being changed.
        norm: name of the batch norm that alone reads its output, or None.
        between: what becomes of its outputs until they are received, in the network that is being changed.
        renew: makes the reader's inputs anew, in place, after the layer was changed.
    """

    name: str
    inputs: Sequence[Tensor]
    norm: str | None
    between: Callable[[Tensor], Tensor]
    renew: Callable[[], None]


def walk(
    dense: nn.Module,
    changing: nn.Module,
    batches: Sequence[Tensor],
    layers: Collection[str],
    *,
    makers: bool = False,
) -> Iterator[Arrival]:
    """Yield each layer in the order they run; what is done to it in ``changing`` before the next is asked for counts.

    One forward pass of both networks, without gradients, the activations of all batches side by side; of what is alive
    at one layer, all beyond ``HELD`` bytes for each network lies in temporary files. A network that cannot be traced,
    or whose trace gives other outputs, is run anew for every layer, which takes longer, and skip paths and norms are
    not known then. Layers that run twice, or never, are left out; so are batches that in a network run anew do not
    reach a layer.

    Args:
        dense: what is aimed at, in eval mode.
        changing: a copy of it whose layers are being changed; may be ``dense`` itself where nothing is.
        batches: inputs, each of shape (b, …), on the networks' device and of their type; not changed.
        layers: names of modules that take and give one tensor.
        makers: whether layers' makers are wanted, which keeps what these receive for longer.

    Raises:
        ValueError: no batches, or one that the network does not run on.
    """
    if not batches:
        raise ValueError("The calibration set holds no batches. Pass at least one.")
    graph = _graph(dense, layers)
    if graph is not None and _is_faithful(graph, dense, batches[0][:_TRIED]):
        yield from _traced(graph, dense, changing, batches, layers, makers)
    else:
        yield from _anew(dense, changing, batches, layers)


def layers_met(model: nn.Module, batches: Sequence[Tensor], layers: Collection[str]) -> list[str] | None:
    """Return which layers some batch runs and none runs twice; None where the model runs the same on all inputs."""
    graph = _graph(model, layers)
    if graph is not None and _is_faithful(graph, model, batches[0][:_TRIED]):
        return None
    return _in_order(model, batches, layers)


def norms_of(model: nn.Module) -> dict[str, str] | None:
    """Return which batch norm alone reads each module's output, by name; None where the model cannot be traced."""
    graph = _graph(model, ())
    if graph is None:
        return None
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in nodes)
    found = {str(node.target): _norm_after(node, calls, model) for node in nodes if calls[node.target] == 1}
    return {name: str(norm.target) for name, norm in found.items() if norm is not None}


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm that in eval mode normalises by running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors among a model's outputs: one, or in tuples, lists, dicts and dataclasses."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    elif dataclasses.is_dataclass(outputs):
        outputs = list(vars(outputs).values())
    return [tensor for part in outputs for tensor in tensors_in(part)] if isinstance(outputs, tuple | list) else []


def does_not_run(number: int, batch: Tensor, error: Exception) -> ValueError:
    """Return the error that says on which batch a model does not run, and why."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ValueError(
        f"The model does not run on batch {number} of the calibration set, of shape {tuple(batch.shape)}: {reason}."
        " Pass inputs the model can be called on."
    )


class _Tracer(fx.Tracer):
    """Looks into torch's own modules where they hold a layer that is asked for."""

    def __init__(self, layers: Collection[str]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_holder = any(name.startswith(f"{module_qualified_name}.") for name in self.layers)
        return super().is_leaf_module(m, module_qualified_name) and not is_holder


def _graph(model: nn.Module, layers: Collection[str]) -> fx.Graph | None:
    """Return a model's calls for one argument, the others at their defaults; None where it cannot be traced."""
    if "" in layers:
        return None  # the model is the layer: there is no call of it
    try:
        others = list(inspect.signature(model.forward).parameters.values())[1:]
        defaults = {p.name: p.default for p in others if p.default is not p.empty}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that the graph cannot check
            return _Tracer(layers).trace(copy.deepcopy(model), concrete_args=defaults or None)
    except Exception:  # whatever the model's own code raises on symbols
        return None


def _is_faithful(graph: fx.Graph, model: nn.Module, batch: Tensor) -> bool:
    """Whether a graph gives a model's outputs: a branch on a type, or a hook of the whole, escapes the tracer."""
    run = _Run(model, [batch])
    found: list[Tensor] = []
    try:
        for node in graph.nodes:
            if node.op == "output":
                found = tensors_in(fx.map_arg(node.args[0], lambda other: run.values[other][0]))
                break
            run.compute(node)
        with torch.no_grad():
            expected = tensors_in(model(batch.clone()))
    except Exception:  # the model's own
        return False
    pairs = zip(expected, found, strict=False)
    return 0 < len(expected) == len(found) and all(_is_same(a, b) for a, b in pairs)


def _is_same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a, b) or bool(((a - b).abs() <= _SAME * a.abs().max()).all())


def _traced(
    graph: fx.Graph,
    dense: nn.Module,
    changing: nn.Module,
    batches: Sequence[Tensor],
    layers: Collection[str],
    makers: bool,
) -> Iterator[Arrival]:
    nodes = list(graph.nodes)
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    used = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}  # other than by a call
    wanted = [node for node in nodes if node.op == "call_module" and node.target in layers]
    wanted = [node for node in wanted if calls[node.target] == 1 and node.target not in used]
    before = _Run(dense, batches)
    after = before if changing is dense else _Run(changing, batches)
    found = {node: _chain(node, calls, dense) for node in wanted} if makers and after is not before else {}
    chains = {node: chain for node, chain in found.items() if chain is not None and chain[0].target not in used}
    after.pinned.update(_source(chain[0]) for chain in chains.values())
    for node in nodes:
        if node.op == "output":
            return
        if node in wanted:
            norm = _norm_after(node, calls, dense)
            maker = _maker(chains[node], calls, after) if node in chains else None
            yield from _arrive(node, norm, nodes, wanted, before, after, maker)
            if node in chains:
                after.unpin(_source(chains[node][0]))
        for run in (before,) if after is before else (before, after):
            run.compute(node)


def _source(node: fx.Node) -> Any:
    """Return what a layer is called with."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()))


def _chain(reader: fx.Node, calls: Counter[Any], model: nn.Module) -> list[fx.Node] | None:
    """Return the call of the layer that alone makes what a layer receives, and the calls between, in order."""
    chain: list[fx.Node] = []
    node = _source(reader)
    while isinstance(node, fx.Node) and len(node.users) == 1 and len(node.all_input_nodes) == 1:
        if _is_in_place(node, model) or (node.op == "call_module" and calls[node.target] > 1):
            return None
        chain.insert(0, node)
        if node.op == "call_module" and reads_patches(model.get_submodule(str(node.target))):
            return chain if isinstance(_source(node), fx.Node) else None
        node = node.all_input_nodes[0]
    return None


def _maker(chain: list[fx.Node], calls: Counter[Any], after: _Run) -> Maker:
    layer, source = chain[0], _source(chain[0])
    norm = _norm_after(layer, calls, after.model)

    def between(y: Any) -> Tensor:
        for node in chain[1:]:
            y = _called(node, after.model, dict.fromkeys(node.all_input_nodes, y).__getitem__)
        return cast(Tensor, y)

    def renew() -> None:
        with torch.no_grad():
            module = after.model.get_submodule(str(layer.target))
            values = after.values[chain[-1]]
            for number, x in enumerate(after.values[source]):
                values[number].copy_(between(module(x)))

    return Maker(str(layer.target), after.values[source], None if norm is None else str(norm.target), between, renew)


def _arrive(
    node: fx.Node,
    norm: fx.Node | None,
    nodes: list[fx.Node],
    wanted: list[fx.Node],
    before: _Run,
    after: _Run,
    maker: Maker | None,
) -> Iterator[Arrival]:
    source = _source(node)
    if not isinstance(source, fx.Node):
        return
    inputs: Sequence[Tensor] = after.compute(source)
    targets: Sequence[Tensor] = before.compute(node)
    if isinstance(before.model.get_submodule(str(node.target)), nn.Linear) and targets[0].ndim != 2:
        norm = None  # it takes another axis than that of the units for channels
    other = _joined(nodes, node, norm or node, wanted, before.model) if before is not after else None
    if other is not None:
        pairs = list(zip(before.compute(other), after.compute(other), strict=True))
        if isinstance(pairs[0][0], Tensor) and pairs[0][0].shape == targets[0].shape:
            weight = (
                1.0 if norm is None else _inverse_scale(before.model.get_submodule(str(norm.target)), targets[0].ndim)
            )
            targets = _Carried(targets, pairs, weight)
    yield Arrival(str(node.target), inputs, targets, None if norm is None else str(norm.target), maker)


@dataclass(frozen=True)
class _Carried(Sequence[Tensor]):
    """Targets with what the other side of a sum has lost, each made when it is asked for."""

    targets: Sequence[Tensor]
    sides: Sequence[tuple[Tensor, Tensor]]
    weight: Tensor | float

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> list[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        dense, changed = self.sides[place]
        return self.targets[place] + (dense - changed) * self.weight

    def __len__(self) -> int:
        return len(self.targets)


def _inverse_scale(norm: Any, ndim: int) -> Tensor:
    """Return by what a change after a batch norm is multiplied to get the change before it that makes it."""
    scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    scale = scale.detach().reshape(-1, *[1] * (ndim - 2))
    # A channel that the norm switches off cannot make up for anything.
    return torch.where(scale.abs() > 1e-6, 1 / scale, 0.0)


def _norm_after(node: fx.Node, calls: Counter[Any], model: nn.Module) -> fx.Node | None:
    """Return the call of a batch norm with running statistics that alone reads a node, and runs once."""
    norm = _only_user(node)
    if norm is None or norm.op != "call_module" or calls[norm.target] != 1:
        return None
    return norm if keeps_statistics(model.get_submodule(str(norm.target))) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _joined(
    nodes: list[fx.Node], layer: fx.Node, last: fx.Node, wanted: list[fx.Node], model: nn.Module
) -> fx.Node | None:
    """Return the other side of the sum that alone reads ``last``, if it can be computed before the layer is changed.

    ``last`` is the layer, or the norm after it.
    """
    join = _only_user(last)
    if join is None or not (join.target in _SUMS or (join.op == "call_method" and join.target in ("add", "add_"))):
        return None
    sides = [side for side in join.args if isinstance(side, fx.Node)]
    if len(sides) != 2 or sides.count(last) != 1 or join.kwargs:
        return None
    other = sides[1 - sides.index(last)]
    start, stop = nodes.index(layer), nodes.index(join)
    needed = {other, *_ancestors(other)}
    # What is still to be changed must not be computed yet; the last layer before the sum makes up for both.
    if any(_is_in_place(node, model) for node in nodes[start:stop]) or needed.intersection(
        node for node in nodes[start:stop] if node in wanted
    ):
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
    says_so = node.kwargs.get("inplace") is True or any(value is True for value in node.args)
    return name.endswith("_") or node.target in _IN_PLACE or says_so


@dataclass
class _Run:
    """One network's values so far, for all batches; what nothing needs any more is let go."""

    model: nn.Module
    batches: Sequence[Tensor]
    values: dict[fx.Node, list[Any]] = field(default_factory=dict)
    waiting: dict[fx.Node, int] = field(default_factory=dict)
    pinned: Counter[fx.Node] = field(default_factory=Counter)  # how often more than there are users
    held: dict[fx.Node, int] = field(default_factory=dict)  # bytes in memory

    def compute(self, node: fx.Node) -> list[Any]:
        """Return the values of a node, computing first what they need."""
        if node in self.values:
            return self.values[node]
        sources = node.all_input_nodes
        for source in sources:
            self.compute(source)
        self.held[node] = 0
        with torch.no_grad():
            found = [self._kept(node, number, self._one(node, number)) for number in range(len(self.batches))]
        self.waiting[node] = len(node.users) + self.pinned[node]
        self.values[node] = found
        for source in sources:
            self.waiting[source] -= 1
        for gone in (other for other in (node, *sources) if self.waiting[other] == 0):
            self._let_go(gone)
        return found

    def unpin(self, node: fx.Node) -> None:
        """Let go of values that were kept for longer than what reads them needs."""
        self.waiting[node] -= 1
        if self.waiting[node] == 0:
            self._let_go(node)

    def _let_go(self, node: fx.Node) -> None:
        self.values[node] = []  # computed, and gone
        self.held[node] = 0

    def _kept(self, node: fx.Node, number: int, value: Any) -> Any:
        """Return a value, mapped from a file where the memory for activations is used up.

        One that shares the memory of what it was made of stays where it is: what is changed in place is so in both.
        """
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
            return value
        sources = (self.values[source][number] for source in node.all_input_nodes)
        is_shared = any(isinstance(source, Tensor) and _is_shared(source, value) for source in sources)
        if value.nbytes == 0 or is_shared or sum(self.held.values()) + value.nbytes <= HELD:
            self.held[node] += value.nbytes
            return value
        with tempfile.TemporaryFile() as file:  # the mapping outlives it
            place = np.memmap(file, np.uint8, "w+", shape=(value.nbytes,))
        return torch.from_numpy(place).view(value.dtype).reshape(value.shape).copy_(value)

    def _one(self, node: fx.Node, number: int) -> Any:
        if node.op == "placeholder":
            # A copy of the batch: what reads it may work in place.
            is_first = next(iter(node.graph.nodes)) is node
            return self.batches[number].clone() if is_first else node.args[0]

        def own(other: fx.Node) -> Any:
            return self.values[other][number]

        try:
            return _called(node, self.model, own)
        except Exception as error:  # the model's own
            raise does_not_run(number, self.batches[number], error) from error


def _called(node: fx.Node, model: nn.Module, own: Callable[[fx.Node], Any]) -> Any:
    """Return what a node gives, from the values of others."""
    args, kwargs = fx.map_arg(node.args, own), fx.map_arg(node.kwargs, own)
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(model)
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function(*args, **kwargs)


def _is_shared(a: Tensor, b: Tensor) -> bool:
    return a.layout == torch.strided and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class _ReachedError(Exception):
    """Ends a forward pass once the layer that was asked for has been met."""


def _anew(
    dense: nn.Module, changing: nn.Module, batches: Sequence[Tensor], layers: Collection[str]
) -> Iterator[Arrival]:
    for name in _in_order(dense, batches, layers):
        inputs, targets = [], []
        for number, batch in enumerate(batches):
            aim = _met(dense, name, batch, number)
            own = aim if changing is dense else _met(changing, name, batch, number)
            # Which way an input goes may depend on its values.
            if aim is not None and own is not None and aim[0].shape == own[0].shape:
                inputs.append(own[0])
                targets.append(aim[1])
        if inputs:
            yield Arrival(name, inputs, targets, None)


def _in_order(model: nn.Module, batches: Sequence[Tensor], layers: Collection[str]) -> list[str]:
    """Return the layers that some forward pass runs and none runs twice, in order."""
    ran: list[str] = []
    most: dict[str, int] = {}
    for number, batch in enumerate(batches):
        ran.clear()
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
            for name in layers
        ]
        try:
            with torch.no_grad():
                model(batch.clone())
        except Exception as error:  # the model's own
            raise does_not_run(number, batch, error) from error
        finally:
            for hook in hooks:
                hook.remove()
        for name, times in Counter(ran).items():
            most[name] = max(times, most.get(name, 0))
    return [name for name, times in most.items() if times == 1]


def _met(model: nn.Module, name: str, batch: Tensor, number: int) -> tuple[Tensor, Tensor] | None:
    """Return what a layer receives and gives on a batch; None where it is not reached."""
    seen: list[tuple[Tensor, Tensor]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append(((args or tuple(kwargs.values()))[0], output))
        raise _ReachedError

    hook = model.get_submodule(name).register_forward_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(batch.clone())
    except _ReachedError:
        pass
    except Exception as error:  # the model's own
        raise does_not_run(number, batch, error) from error
    finally:
        hook.remove()
    return seen[0] if seen else None
