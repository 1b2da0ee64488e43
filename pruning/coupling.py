"""Who must be cut together: groups of channels that several layers make, carry and read, each checked by cutting it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ellq.analysis import add_up
from ellq.pruning.channel_flow import FIXED, Labels, along, carry, spread
from ellq.pruning.surgery import CHANNELWISE, CONVOLUTIONS, channels, cut_channels_


@dataclass(frozen=True)
class Member:
    """Where the units of a group lie in one layer.

    Attributes:
        module: name of the layer.
        side: "out" where its outputs are the units, "in" where it reads them, "both" where it carries them channel
            by channel or conv group by conv group: norms, PReLU, depthwise and grouped convolutions.
        entries: shape (units, r), which entries of the layer's channel axis belong to each unit, rising.
        inputs: shape (units, s), the same of the input axis of a grouped convolution, whose ``entries`` are of its
            output axis; None for every other layer.
    """

    module: str
    side: str
    entries: NDArray[np.int64]
    inputs: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Units that can be removed, and every layer that must be cut when one is.

    Attributes:
        name: of the first layer that makes them, in running order.
        units: how many there are.
        members: the layers, in running order.
    """

    name: str
    units: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> tuple[Member, ...]:
        """The layers that make the units."""
        return tuple(member for member in self.members if member.side == "out")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The layers that read the units."""
        return tuple(member for member in self.members if member.side == "in")

    @property
    def channelwise(self) -> tuple[Member, ...]:
        """The layers between that carry the units."""
        return tuple(member for member in self.members if member.side == "both")


@dataclass(frozen=True)
class Coupling:
    """The groups of a model, in running order of their first producers, and what stays dense.

    Attributes:
        groups: disjoint; each was checked.
        left: layer → why units it makes are in no group.
    """

    groups: tuple[ChannelGroup, ...]
    left: Mapping[str, str]


def channel_groups(model: nn.Module, example: Tensor, *, groups: Sequence[ChannelGroup] | None = None) -> Coupling:
    """Find the groups of channels that can be removed together from a model in evaluation mode.

    Which layers make what is found by running a copy once on the example, so control flow is followed as the example
    takes it. Every group is then checked on a copy in double precision: with a random half of its units removed, the
    outputs must be what they are when the readers' weights for those units are zero instead; and all groups must
    pass together. What fails stays dense, with the reason.

    Args:
        model: the model; only looked at. Whatever its mode, it is looked at in evaluation mode.
        example: a batch it accepts; a few examples are enough.
        groups: the groups, instead of those found; for models whose structure cannot be followed.

    Returns:
        The groups, and why the units of other layers stay.

    Raises:
        ValueError: the model cannot be copied or run, or its operations cannot be followed; its outputs are not
            finite; a given group fails its check.
        TypeError: example is not a tensor.
    """
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a batch as one tensor, got {type(example).__name__}.")
    with _quiet():
        net, example, tolerance = _runnable_copy(model, example)
        bench = _Bench(net, example, tolerance)
        return _verified(bench, _follow(net, example)) if groups is None else _given(net, bench, groups)


def holding(model: nn.Module, coupling: Coupling, batches: Sequence[Tensor], met: Collection[str]) -> Coupling:
    """Return a coupling without the groups whose cut does not hold whichever way a model's inputs go.

    For models whose control flow depends on their inputs: other inputs than the example may run other layers, which
    read units too. Where ``torch.distributed`` is initialised, of the inputs of all processes.

    Args:
        model: the model; only looked at.
        coupling: as one example shows it.
        batches: on which every group is checked again.
        met: the layers that are run, and by no batch twice.
    """
    why: dict[str, str] = {}
    for group in coupling.groups:
        missed = [member.module for member in group.consumers if member.module not in met]
        if missed:
            why[group.name] = f"no batch runs {missed[0]!r}, which reads them, or one runs it twice"
    with _quiet():
        for number, batch in enumerate(batches):
            bench = _Bench(*_runnable_copy(model, batch))
            groups = [group for group in coupling.groups if group.name not in why]
            if not groups or bench.complaint(groups, thorough=False) is None:
                continue
            alone = {group.name: bench.complaint([group], thorough=False) for group in groups}
            together = None if any(alone.values()) else "they cannot be removed together"
            for name, complaint in alone.items():
                if complaint or together:
                    why[name] = f"on batch {number} of the calibration set {complaint or together}"
    left = dict(coupling.left)
    groups = []
    for group in coupling.groups:
        if add_up(float(group.name in why)) > 0:
            _leave_(left, group, why.get(group.name, "other processes cannot cut them"))
        else:
            groups.append(group)
    return Coupling(tuple(groups), left)


class _Bench:
    """A copy of the model on which cuts are tried and undone."""

    def __init__(self, net: nn.Module, example: Tensor, tolerance: float) -> None:
        self.net, self.example, self.tolerance = net, example, tolerance
        self._modules = dict(net.named_modules())
        self.dense = self._outputs()
        if not self.dense:
            raise ValueError("The model returns no floating-point numbers that cuts could be checked by.")
        if not all(torch.isfinite(x).all() for x in self.dense):
            raise ValueError(
                f"The model's outputs on the example are not finite{self._culprit()}. Mend the weights or the example"
                " first."
            )

    def complaint(self, groups: Sequence[ChannelGroup], *, thorough: bool = True) -> str | None:
        """Say how removing units of all groups differs from zeroing what reads them; None when it does not.

        Once a random half is removed; if thorough, then also the units whose number has its first bit set, its second,
        and so on: any two units are told apart by one of these.
        """
        random = np.random.default_rng(0)
        halves = [np.sort(random.permutation(group.units)[: max(1, group.units // 2)]) for group in groups]
        complaint = self._difference(groups, halves)
        most = max((group.units - 1).bit_length() for group in groups)
        for bit in range(most if thorough else 0):
            if complaint is None:
                bits = [bit % max(1, (group.units - 1).bit_length()) for group in groups]
                halves = [np.flatnonzero(~np.arange(g.units) >> b & 1) for g, b in zip(groups, bits, strict=True)]
                complaint = self._difference(groups, halves)
        return complaint

    def _difference(self, groups: Sequence[ChannelGroup], halves: Sequence[NDArray[np.int64]]) -> str | None:
        kept = dict(zip((group.name for group in groups), halves, strict=True))
        names = {member.module for group in groups for member in group.members}
        saved = {name: _contents(self._modules[name]) for name in names if name in self._modules}
        try:
            cut_channels_(self.net, [(group, kept[group.name]) for group in groups])
        except ValueError as error:
            return _first_line(error)
        try:
            small = self._outputs()
        except Exception as error:
            return f"the model does not run without some of them ({_first_line(error)})"
        finally:
            for name, contents in saved.items():
                _restore_(self._modules[name], contents)
        try:
            with torch.no_grad():
                for group in groups:
                    gone = np.setdiff1d(np.arange(group.units), kept[group.name])
                    for member in group.consumers:
                        weight = self._modules[member.module].weight.clone()
                        weight[:, torch.from_numpy(member.entries[gone].ravel()).to(weight.device)] = 0
                        self._modules[member.module]._parameters["weight"] = nn.Parameter(weight)
            full = self._outputs()
        finally:
            for name, contents in saved.items():
                _restore_(self._modules[name], contents)
        if [x.shape for x in small] != [x.shape for x in full]:
            return "the shape of the outputs changes when some of them are removed"
        for a, b, dense in zip(small, full, self.dense, strict=True):
            if not bool(((a - b).abs() <= self.tolerance * dense.abs().max()).all()):
                return "removing some of them changes the outputs otherwise than zeroing what reads them"
        return None

    def _culprit(self) -> str:
        """Name the first layer that gives values that are not finite."""
        if not torch.isfinite(self.example).all():
            return ": the example itself holds such values"
        found: list[str] = []

        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not all(torch.isfinite(x).all() for x in _tensors(output)):
                found.append(names[module])

        names = {module: name for name, module in self._modules.items() if name and not list(module.children())}
        hooks = [module.register_forward_hook(look) for module in names]
        try:
            self._outputs()
        finally:
            for hook in hooks:
                hook.remove()
        return f": {found[0]!r} is the first layer that gives such values" if found else ""

    def _outputs(self) -> list[Tensor]:
        torch.default_generator.manual_seed(0)
        with torch.no_grad():
            return [
                x.detach().clone()
                for x in _tensors(self.net(self.example.clone()))
                if x.is_floating_point() and x.numel()
            ]


def _verified(bench: _Bench, found: Coupling) -> Coupling:
    left = dict(found.left)
    groups: list[ChannelGroup] = []
    for group in found.groups:
        complaint = bench.complaint([group], thorough=False)
        if complaint is None:
            groups.append(group)
        else:
            _leave_(left, group, complaint)
    if groups and bench.complaint(groups) is not None:
        together: list[ChannelGroup] = []
        for group in groups:
            complaint = bench.complaint([*together, group])
            if complaint is None:
                together.append(group)
            else:
                _leave_(left, group, complaint)
        groups = together
    return Coupling(tuple(groups), left)


def _leave_(left: dict[str, str], group: ChannelGroup, reason: str) -> None:
    for member in group.producers:
        left.setdefault(member.module, reason)


def _given(net: nn.Module, bench: _Bench, groups: Sequence[ChannelGroup]) -> Coupling:
    twice = [name for name, count in Counter(group.name for group in groups).items() if count > 1]
    if twice:
        raise ValueError(f"groups= holds two groups called {twice[0]!r}. Give each its own name.")
    for group in groups:
        complaint = bench.complaint([group])
        if complaint is not None:
            raise ValueError(f"Group {group.name!r} of groups= cannot be cut: {complaint}. Correct its members.")
    complaint = bench.complaint(groups) if len(groups) > 1 else None
    if complaint is not None:
        raise ValueError(f"The groups of groups= cannot be cut together: {complaint}. Correct their members.")
    made = {member.module for group in groups for member in group.producers}
    others = [n for n, m in net.named_modules() if type(m) in _PRODUCERS and n not in made]
    return Coupling(tuple(groups), dict.fromkeys(others, "it is in none of groups="))


_PRODUCERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
_KNOWN = (
    *_PRODUCERS,
    *CHANNELWISE,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.LSTM,
    nn.MultiheadAttention,
)
"""Layers the graph library takes for one operation by itself."""


def _follow(net: nn.Module, example: Tensor) -> Coupling:
    """Carry unit labels through the graph of one forward pass and gather them into groups."""
    flow = _Flow(net)
    flow.run(example)
    return flow.groups()


@dataclass
class _Input:
    """A tensor a layer was called with: the operation it came from, None where none did, and its shape."""

    operation: Any
    number: int
    shape: tuple[int, ...]


@dataclass
class _Place:
    """The labels of one side of a layer, in running order."""

    module: str
    side: str
    line: Tensor
    inputs: Tensor | None = None


class _Flow:
    """One forward pass of a copy, traced, and the labels carried through it."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._modules = dict(net.named_modules())
        self._unfit = _why_unfit(net)
        self._labels = Labels()
        self._calls: dict[str, list[list[_Input]]] = {}  # in running order
        self._values: dict[Any, list[Tensor]] = {}
        self._places: list[_Place] = []
        self._left: dict[str, str] = {}
        self._used: set[str] = set()  # layers whose parameters are used by operations outside them

    def run(self, example: Tensor) -> None:
        outputs, made = self._trace(example)
        makers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
        for name, calls in self._calls.items():
            if len(calls) > 1:
                self._unfit[name] = f"is called {len(calls)} times"
            if name in self._unfit and isinstance(self._modules[name], makers):
                self._left[name] = f"it {self._unfit[name]}"
        owners = {
            id(parameter): (name, f"{name}.{key}".lstrip("."))
            for name, module in self._modules.items()
            for key, parameter in module._parameters.items()
        }
        for operation in self._in_order(outputs, made):
            variable = getattr(operation, "variable", None)
            if operation in made:
                self._values[operation] = self._pass_layer(made[operation], operation)
            elif variable is not None:
                self._used.add(owners[id(variable)][0])
                self._values[operation] = [torch.full(tuple(variable.shape), FIXED)]
            else:
                sources = operation.next_functions
                variables = [getattr(source, "variable", None) for source, _ in sources]
                names = [None if v is None else owners[id(v)][1] for v in variables]
                inputs = [None if source is None else self._values[source][number] for source, number in sources]
                self._values[operation] = carry(operation, inputs, names, self._labels)
        for x in outputs:
            self._labels.stick(self._values[x.grad_fn][x.output_nr], "they are the model's outputs")
        for place in self._places:
            if place.module in self._used:
                self._labels.stick(place.line, f"the model itself uses the parameters of {place.module!r}")

    def _trace(self, example: Tensor) -> tuple[list[Tensor], dict[Any, str]]:
        """Run the model once; return the outputs, and of each layer called once the operation that made its output.

        The graph library traces and tells which layer made which operation. Its maps of channels are not used: they
        guess the channel axis from the sizes of layers.
        """
        from torch_pruning import DependencyGraph
        from torch_pruning.ops import DummyPruner

        names = {module: name for name, module in self._modules.items()}
        ran: list[str] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            ran.append(names[module])
            if _is_layer(module):
                inputs = [_Input(x.grad_fn, x.output_nr, tuple(x.shape)) for x in _tensors((args, kwargs))]
                self._calls.setdefault(names[module], []).append(inputs)

        def leave(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            # Autograd rewrites the history of a view that is changed in place, and the layer would be lost from it.
            return output.clone() if isinstance(output, Tensor) and output._is_view() else None

        outputs: list[Tensor] = []

        def keep(output: Any) -> list[Tensor]:
            outputs.extend(x for x in _tensors(output) if x.grad_fn is not None)
            return outputs

        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in self._modules.values()]
        handles += [module.register_forward_hook(leave) for module in self._modules.values() if _is_layer(module)]
        graph = DependencyGraph()
        unknown = {type(m): DummyPruner() for m in self._modules.values() if _is_layer(m) and not isinstance(m, _KNOWN)}
        try:
            graph.build_dependency(
                self._net,
                example,
                forward_fn=lambda net, batch: net(batch.clone()),
                output_transform=keep,
                customized_pruners=unknown,
                verbose=False,
            )
        except Exception as error:
            # The library's own maps of channels, which it makes once it has traced, fail on some models. Ours do not
            # need them.
            if not hasattr(graph, "module2node"):
                where = f" in module {ran[-1]!r}" if ran and ran[-1] else ""
                raise ValueError(
                    f"The model's operations cannot be followed ({_first_line(error)}{where})."
                    " Pass the groups as groups=."
                ) from error
        finally:
            for handle in handles:
                handle.remove()
        if not outputs:
            raise ValueError(
                "The model's operations cannot be followed: its outputs have no gradients, for example because forward"
                " runs under no_grad. Pass the groups as groups=."
            )
        layers = {node.grad_fn: names[node.module] for node in graph.module2node.values() if node.module in names}
        return outputs, {operation: name for operation, name in layers.items() if len(self._calls.get(name, ())) == 1}

    def _in_order(self, outputs: Sequence[Tensor], made: Mapping[Any, str]) -> list[Any]:
        """Return the operations behind the outputs, each after its inputs; a layer counts as one operation."""
        order: list[Any] = []
        seen: set[Any] = set()
        stack: list[tuple[Any, bool]] = [(x.grad_fn, False) for x in outputs]
        while stack:
            operation, done = stack.pop()
            if done:
                order.append(operation)
            elif operation not in seen:
                seen.add(operation)
                stack.append((operation, True))
                if operation in made:
                    sources = [x.operation for x in self._calls[made[operation]][0]]
                else:
                    sources = [source for source, _ in operation.next_functions]
                stack += [(source, False) for source in sources if source is not None]
        return order

    def _pass_layer(self, name: str, operation: Any) -> list[Tensor]:
        shape, *others = (tuple(output.shape) for output in operation._input_metadata)
        rest = [torch.full(other, FIXED) for other in others]
        module = self._modules[name]
        inputs = [self._value(x) for x in self._calls[name][0]]
        if name in self._unfit:
            for x in inputs:
                self._labels.stick(x, f"layer {name!r} {self._unfit[name]}")
            return [torch.full(shape, FIXED), *rest]
        x = inputs[0]
        if isinstance(module, CHANNELWISE):
            if channels(module, "out") > 1 or not isinstance(module, nn.PReLU):
                self._pass_channelwise(module, name, self._line(x, _channel_axis(module, x.ndim)))
            return [x.reshape(shape), *rest]
        made = self._labels.fresh(channels(module, "out"))
        if isinstance(module, nn.Embedding):
            self._places.append(_Place(name, "out", made))
        else:
            line = self._line(x, _channel_axis(module, x.ndim))
            groups = int(getattr(module, "groups", 1))
            if groups != 1:
                self._couple(line.reshape(groups, -1), made.reshape(groups, -1), name)
                self._places.append(_Place(name, "both", made, line))
            else:
                self._places += [_Place(name, "in", line), _Place(name, "out", made)]
        return [spread(made, _channel_axis(module, len(shape)), shape), *rest]

    def _value(self, x: _Input) -> Tensor:
        return torch.full(x.shape, FIXED) if x.operation is None else self._values[x.operation][x.number]

    def _line(self, x: Tensor, axis: int) -> Tensor:
        """Return the labels along a layer's channel axis; those at one channel are one unit."""
        line = along(x, axis)
        if line is not None:
            return line
        rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
        least, line = rows.min(1).values, rows.max(1).values
        self._labels.join(line[:, None], rows)
        self._labels.stick(rows[least < 0], "they share a channel with values that stay")
        return torch.where(least < 0, FIXED, line)

    def _pass_channelwise(self, module: nn.Module, name: str, line: Tensor) -> None:
        if isinstance(module, nn.GroupNorm):
            self._couple(line.reshape(module.num_groups, -1), None, name)
        self._places.append(_Place(name, "both", line))

    def _couple(self, line: Tensor, made: Tensor | None, name: str) -> None:
        """Make the channels of each group one unit, which stays when some of them do."""
        together = line if made is None else torch.cat([line, made], 1)
        self._labels.join(line.max(1, keepdim=True).values, together)
        if made is not None:
            self._labels.join(made[:, :1], made)
        stays = (line < 0).any(1)
        self._labels.stick(together[stays], f"layer {name!r} groups them with channels that stay")

    def groups(self) -> Coupling:
        """Gather the labels into groups: units that lie in the same layers in the same way."""
        units, stuck = self._labels.units()
        running = {name: number for number, name in enumerate(self._calls)}
        self._places.sort(key=lambda place: running[place.module])
        where: dict[int, dict[int, tuple[list[int], list[int]]]] = defaultdict(dict)
        for number, place in enumerate(self._places):
            for axis, line in enumerate((place.line, place.inputs)):
                for entry, label in enumerate([] if line is None else line.tolist()):
                    if label >= 0:
                        where[int(units[label])].setdefault(number, ([], []))[axis].append(entry)
        alike: dict[Any, list[dict[int, tuple[list[int], list[int]]]]] = defaultdict(list)
        left = dict(self._left)
        for name, module in self._modules.items():
            if type(module) in _PRODUCERS and name not in self._calls:
                used = name in self._used
                left[name] = "the model uses its parameters without calling it" if used else "it is not called"
        for unit, lies in where.items():
            sides = {self._places[number].side for number in lies}
            reason = stuck.get(unit)
            if reason is None and "in" not in sides:
                reason = "no layer reads them"
            if reason is None and "out" in sides:
                alike[tuple((number, *map(len, lies[number])) for number in sorted(lies))].append(lies)
                continue
            for place in (self._places[number] for number in lies):
                if place.side == "out" or place.inputs is not None:
                    left.setdefault(place.module, reason or "no layer makes them")
        placed = {place.module for place in self._places}
        for name in self._calls:
            if type(self._modules[name]) in _PRODUCERS and name not in placed:
                left.setdefault(name, "its outputs go where they cannot be followed")
        groups = []
        for signature, members in alike.items():
            numbers = [number for number, *_ in signature]
            first = next(number for number in numbers if self._places[number].side == "out")
            name = self._places[first].module
            if len(members) == 1:
                left.setdefault(name, "all that can go is one unit")
                continue
            members.sort(key=lambda lies, first=first: lies[first][0])  # type: ignore[misc]
            found = tuple(self._member(number, [lies[number] for lies in members]) for number in numbers)
            groups.append((first, found[numbers.index(first)].entries.min(), ChannelGroup(name, len(members), found)))
        groups.sort(key=lambda item: item[:2])
        return Coupling(_with_own_names([group for *_, group in groups]), left)

    def _member(self, number: int, lies: list[tuple[list[int], list[int]]]) -> Member:
        place = self._places[number]
        inputs = None if place.inputs is None else np.array([entries for _, entries in lies], dtype=np.int64)
        return Member(place.module, place.side, np.array([entries for entries, _ in lies], dtype=np.int64), inputs)


def _with_own_names(groups: list[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Tell groups apart that start in one layer: the second is called ``layer#2``."""
    seen: Counter[str] = Counter()
    named = []
    for group in groups:
        seen[group.name] += 1
        number = seen[group.name]
        named.append(group if number == 1 else dataclasses.replace(group, name=f"{group.name}#{number}"))
    return tuple(named)


def _channel_axis(module: nn.Module, ndim: int) -> int:
    if isinstance(module, nn.Linear | nn.Embedding):
        return ndim - 1
    if isinstance(module, nn.Conv1d | nn.InstanceNorm1d):
        return ndim - 2
    if isinstance(module, nn.Conv2d | nn.InstanceNorm2d):
        return ndim - 3
    if isinstance(module, nn.Conv3d | nn.InstanceNorm3d):
        return ndim - 4
    return min(1, ndim - 1)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one operation to us, to be followed through or named as what stops us."""
    ours = type(module).__module__.startswith("torch.nn") or "norm" in type(module).__name__.lower()
    return isinstance(module, _KNOWN) or (ours and bool(module._parameters) and not list(module.children()))


def _why_unfit(net: nn.Module) -> dict[str, str]:
    """Say of each layer that units must not be followed through why not."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in net.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    unfit = {}
    for name, module in net.named_modules():
        if not _is_layer(module):
            continue
        shared = [
            other for p in module._parameters.values() for other in owners[id(p)] if other != name and p is not None
        ]
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            unfit[name] = f"normalises over them ({type(module).__name__})"
        elif type(module) not in (*_PRODUCERS, *CHANNELWISE):
            unfit[name] = f"is a {type(module).__name__}, which cannot be cut"
        elif any(hooks):
            unfit[name] = "has hooks"
        elif shared:
            unfit[name] = f"shares parameters with {shared[0]!r}"
        elif any(key in vars(module) for key in ("weight", "bias")):
            unfit[name] = "computes its weight from others"
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            unfit[name] = "has max_norm"
    return unfit


def _runnable_copy(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor, float]:
    """Copy a model in evaluation mode, in double precision where it runs in that, with its tolerance."""
    failure: Exception | None = None
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        try:
            net = copy.deepcopy(model).eval().to(dtype)
        except Exception as error:
            raise ValueError(
                f"The model cannot be copied ({_first_line(error)}). Remove what is not a plain value."
            ) from error
        batch = example.detach().to(dtype) if example.is_floating_point() else example.detach()
        try:
            with torch.no_grad():
                net(batch.clone())
        except Exception as error:
            failure = error
            continue
        for parameter in net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return net, batch, tolerance
    assert failure is not None
    raise ValueError(
        f"The model does not run on the example ({_first_line(failure)}). Pass a batch it accepts."
    ) from failure


def _contents(module: nn.Module) -> dict[str, Any]:
    return {key: dict(value) if key in ("_parameters", "_buffers") else value for key, value in vars(module).items()}


def _restore_(module: nn.Module, contents: Mapping[str, Any]) -> None:
    vars(module).update(
        {key: dict(value) if key in ("_parameters", "_buffers") else value for key, value in contents.items()}
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping | type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for item in value for x in _tensors(item)] if isinstance(value, list | tuple) else []


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the state of random numbers, gradients and the fused transformer path, and the library's warnings."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
