"""Following features through a traced model: what each call does to constants, and whom it ties together."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ellq.analysis.nets import ZeroPadShortcut
from ellq.pruning.feature_graph import Feature, Indices, Link, Mask, Network, Reader
from ellq.pruning.hidden_layers import is_elementwise
from ellq.pruning.traced import Traced
from ellq.theory import Array

# Exact types throughout: a subclass may compute something else.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_INSTANCE_NORMS = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
_DROPOUT_FUNCTIONS = {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
}
# Each with how many of the last axes it averages or compares over.
_MAX_POOLS: dict[Any, int] = {
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
    functional.max_pool1d: 1,
    functional.max_pool2d: 2,
    functional.max_pool3d: 3,
}
_AVERAGE_POOLS: dict[Any, int] = {
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    functional.avg_pool1d: 1,
    functional.avg_pool2d: 2,
    functional.avg_pool3d: 3,
}
_ADAPTIVE_POOLS: dict[Any, int] = {
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
    functional.adaptive_avg_pool1d: 1,
    functional.adaptive_avg_pool2d: 2,
    functional.adaptive_avg_pool3d: 3,
    functional.adaptive_max_pool1d: 1,
    functional.adaptive_max_pool2d: 2,
    functional.adaptive_max_pool3d: 3,
}
_MAX_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE_ARGUMENTS = (*_MAX_ARGUMENTS[:4], "ceil_mode", "count_include_pad", "divisor_override")
_CONSTANT_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_OTHER_PADS = (
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)
_UPSAMPLES = {nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, functional.interpolate}
_FLATTENS = {nn.Flatten, torch.flatten, "flatten"}
_VIEWS = {"view", "reshape", torch.reshape}
_MEANS = {torch.mean, "mean"}
_CATS = {torch.cat, torch.concat}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_POINTWISE: set[Any] = {
    *_PRODUCTS,
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.truediv, operator.itruediv),
    *(operator.neg, operator.pow),
    *(torch.add, torch.sub, torch.div, torch.neg, torch.pow, torch.maximum, torch.minimum),
    *(torch.abs, torch.exp, torch.square, torch.sqrt, torch.clamp),
    *("add", "add_", "sub", "sub_", "div", "div_", "neg", "pow", "abs", "exp", "square", "sqrt", "clamp", "clamp_"),
}
_ALIASES: set[Any] = {nn.Flatten, torch.flatten, "flatten", *_VIEWS, operator.getitem, *_DROPOUTS, "contiguous"}


def follow(model: nn.Module, graphs: Sequence[Traced]) -> Network:
    """Follow the features of a model through its graphs.

    Constants are those of eval mode, exact but for rounding in float64, and for any number of examples and size of
    image. What is not understood (attention, recurrent layers, modules called twice, shared parameters, modules with
    hooks) makes what it reads and makes stay.

    Args:
        model: the model, in float64 and eval mode; not changed.
        graphs: its graph in eval mode; and in training mode, where that is another.

    Returns:
        What is known of every feature; ``needed`` is filled in.
    """
    network = Network()
    called_twice, shared = _called_twice(graphs), _shared(model, graphs)
    for traced in graphs:
        walk = _Walk(model, traced, network, called_twice, shared)
        with torch.no_grad(), np.errstate(all="ignore"):  # what overflows is taken to vary
            for node in traced.graph.nodes:
                walk.visit(node)
        network.steps.append(walk.steps)
        _mark_needed(walk.steps)
    return network


def _called_twice(graphs: Sequence[Traced]) -> set[str]:
    counts = [Counter(str(node.target) for node in g.graph.nodes if node.op == "call_module") for g in graphs]
    return {name for count in counts for name, calls in count.items() if calls > 1}


def _shared(model: nn.Module, graphs: Sequence[Traced]) -> set[int]:
    """Return the ids of the parameters that two modules have, or that a forward itself uses."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    used = {str(node.target) for g in graphs for node in g.graph.nodes if node.op == "get_attr"}
    return {key for key, count in owners.items() if count > 1} | {id(parameters.get(name)) for name in used}


def _mark_needed(steps: Sequence[Link | Reader]) -> None:
    for step in reversed(steps):
        rows = step.output.needed & ~step.output.is_constant
        if isinstance(step, Link):
            step.source.needed[step.origin[rows & (step.origin >= 0)]] = True
        elif step.source is not None:
            step.source.needed[step.touches[rows].any(axis=0)] = True


class _Walk:
    """One pass through one graph, in order."""

    def __init__(
        self, model: nn.Module, traced: Traced, network: Network, called_twice: set[str], shared: set[int]
    ) -> None:
        self.modules = dict(model.named_modules())
        self.shapes = traced.shapes
        self.network = network
        self.groups = network.groups
        self.features: dict[fx.Node, Feature] = {}
        self.steps: list[Link | Reader] = []
        self.called_twice, self.shared = called_twice, shared

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self._stay(node, "the model's output")
        elif node.op not in ("placeholder", "get_attr"):
            reason = self._refusal(node)
            if reason is None and self._rule(node):
                return
            what = reason or "is not understood"
            label = _label(node, self.modules)
            has_weights = node.op == "call_module" and any(True for _ in self._module(node).parameters())
            if self._stay(node, f"{label} reads it, which {what}") or has_weights:
                self.network.unknown[label] = what

    def _refusal(self, node: fx.Node) -> str | None:
        """Why a module's call is not followed, whatever the module is; None where it is."""
        if node.op != "call_module":
            return None
        module = self._module(node)
        if module._forward_hooks or module._forward_pre_hooks:
            return "has a hook"
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            if str(node.target) in self.called_twice:
                return "is called more than once"
            if any(id(p) in self.shared for p in module.parameters()):
                return "shares a parameter"
        return "mixes its channels" if type(module) in _MIXING else None

    def _stay(self, node: fx.Node, reason: str) -> bool:
        """Make all that a node reads stay as it is; return whether there was anything."""
        sources = [self.features[source] for source in node.all_input_nodes if source in self.features]
        for source in sources:
            source.needed[:] = True
            self.groups.pin(source.groups, reason)
        return bool(sources)

    def _rule(self, node: fx.Node) -> bool:
        """Follow the features through one call; return False, with nothing changed, where that is not known how."""
        if node.op == "call_module":
            module = self._module(node)
            if len(node.all_input_nodes) != 1 or node not in self.shapes:
                return False
            kind: Any = type(module)
            if kind is nn.Linear or kind in CONVOLUTIONS or kind in TRANSPOSED:
                return self._layer(node, module)
        else:
            module, kind = None, node.target
        if not any(source in self.features for source in node.all_input_nodes):
            # Of tensors that are not followed: nothing to do, and nothing to tell but of layers with weights.
            return module is None or kind in NORMS or not any(True for _ in module.parameters())
        if kind == "size" or (kind is getattr and node.args[1] == "shape"):
            return self._size(node)
        if kind == "dim" or (kind is getattr and node.args[1] in ("ndim", "dtype", "device")):
            return True
        if node not in self.shapes:
            return False
        if kind in _CATS:
            return self._cat(node)
        if kind in _POINTWISE:
            return self._pointwise(node, kind)
        source = node.all_input_nodes[0]
        if node.op != "call_module" and (not node.args or node.args[0] is not source):
            return False
        if source not in self.features:
            return False
        if module is not None and (kind in NORMS or (isinstance(module, nn.PReLU) and module.num_parameters > 1)):
            return self._channelwise(node, module)
        if kind is ZeroPadShortcut:
            return self._shortcut(node, module)
        if kind in _DROPOUTS:
            return self._pass_on(node, self.features[source].constants)
        if kind in _DROPOUT_FUNCTIONS:
            return self._dropout(node)
        if is_elementwise(node, self.modules):
            return self._pointwise(node, kind)
        if kind in _FLATTENS:
            return self._reshape(node)
        if kind in _VIEWS:
            return self._view(node)
        if kind is operator.getitem:
            return self._slice(node)
        if kind in _MEANS:
            return self._mean(node)
        if kind in (functional.pad, *_CONSTANT_PADS, *_OTHER_PADS):
            return self._pad(node, module)
        return self._pool(node, kind, module)

    # Layers ----------------------------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, module: nn.Module) -> bool:
        assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        name, source = str(node.target), self.features.get(node.all_input_nodes[0])
        rank = len(self.shapes[node])
        axis = rank - 1 if isinstance(module, nn.Linear) else rank - module.weight.ndim + 1
        weight, groups = by_units(module), 1 if isinstance(module, nn.Linear) else module.groups
        touches = _spread(taps(weight != 0).any(-1).cpu().numpy(), groups)
        if source is not None and source.axis != axis:
            self._stay(node, f"{name!r} reads it along another axis")
            source = None
        is_uniform = isinstance(module, nn.Linear) or _is_uniform(module)
        known = self.network.readers.get(name)
        values = np.full(len(weight), np.nan)
        inputs = np.full(touches.shape[1], np.nan) if source is None else source.constants
        if source is not None and known is not None and known.source is not None:
            source.constants[source.constants != known.source.constants] = (
                np.nan
            )  # in training a constant may be another
        foldable = ~np.isnan(inputs) & (is_uniform | (inputs == 0))
        rows = ~(touches & ~foldable).any(axis=1)
        bias = np.zeros(len(weight)) if module.bias is None else _array(module.bias)
        values[rows] = (bias + _response(weight, groups, foldable, inputs))[rows]
        output = self._new(axis, values) if known is None else self._new(axis, values, known.output.groups)
        if known is not None and source is not None and known.source is not None:
            self.groups.join(source.groups, known.source.groups)
        elif known is not None:
            for feature in (f for f in (source, known.source) if f is not None):
                self.groups.pin(feature.groups, f"{name!r} reads something else in training")
        if groups > 1:
            if source is None:
                self.groups.pin(output.groups, f"{name!r} is grouped, and what it reads stays")
            else:  # a group of filters goes with all that it reads, or stays
                wide, narrow = len(weight) // groups, touches.shape[1] // groups
                first = source.groups[::narrow]
                self.groups.join(output.groups, np.repeat(first, wide))
                self.groups.join(source.groups, np.repeat(first, narrow))
        reader = Reader(name, source, output, touches, is_uniform, self._norm_after(node))
        if known is None:
            self.network.readers[name] = reader
        elif known.norm != reader.norm:
            self.network.readers[name] = replace(known, norm=None)
        self.steps.append(reader)
        self._keep(node, output)
        return True

    def _norm_after(self, node: fx.Node) -> str | None:
        """The norm that alone reads a layer, where a shift of its running mean does what a bias would."""
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or self._refusal(users[0]) is not None:
            return None
        norm = self._module(users[0])
        in_step = len(self.shapes[node]) > 1 and self.shapes[node][1] == getattr(norm, "num_features", None)
        if type(norm) not in NORMS or type(norm) in _INSTANCE_NORMS or norm.running_mean is None or not in_step:
            return None
        return str(users[0].target)

    def _channelwise(self, node: fx.Node, module: nn.Module) -> bool:
        source = self.features[node.all_input_nodes[0]]
        rank, kind = len(self.shapes[node]), type(module)
        if source.axis != 1 or (kind in _INSTANCE_NORMS and rank != _INSTANCE_NORMS[kind] + 2):
            return False
        if isinstance(module, nn.PReLU):
            values = _evaluate(module, source.constants[None])[0]
        else:
            assert isinstance(module, nn.modules.batchnorm._NormBase)
            scale, shift = (None if p is None else _array(p) for p in (module.weight, module.bias))
            if module.running_mean is None or module.running_var is None:
                # A constant is its own mean, and the rest is divided by √eps.
                values = np.where(np.isnan(source.constants), np.nan, 0.0)
            else:
                values = source.constants - _array(module.running_mean)
                values = values / np.sqrt(_array(module.running_var) + module.eps)
            if scale is not None and shift is not None:
                values = np.where(scale == 0, shift, values * scale + shift)
        known = self.network.channelwise.setdefault(str(node.target), source)
        self.groups.join(source.groups, known.groups)
        return self._pass_on(node, values)

    def _shortcut(self, node: fx.Node, module: nn.Module | None) -> bool:
        assert isinstance(module, ZeroPadShortcut)
        source = self.features[node.all_input_nodes[0]]
        if source.axis != 1:
            return False
        origin = np.pad(np.arange(len(source.constants)), (module.before, module.after), constant_values=-1)
        values = np.where(origin < 0, 0.0, source.constants[origin])
        output = self._made_of(node, source, origin, values, self.groups.new(len(origin)))
        known = self.network.shortcuts.setdefault(str(node.target), output)
        self.groups.join(output.groups, known.groups)
        return True

    # Functions of single features ------------------------------------------------------------------------------------

    def _dropout(self, node: fx.Node) -> bool:
        if node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is not False:
            values = self.features[node.all_input_nodes[0]].constants
            is_first = not self.network.steps  # of two graphs the second is of training, where dropout is expected
            return self._pass_on(node, np.where(values == 0, 0.0, np.nan) if is_first else values)
        return self._pass_on(node, self.features[node.all_input_nodes[0]].constants)

    def _pointwise(self, node: fx.Node, kind: Any) -> bool:
        rank = len(self.shapes[node])
        followed = [self.features[source] for source in node.all_input_nodes if source in self.features]
        sizes = {
            (self.features[source].axis - len(self.shapes[source]), len(self.features[source].constants))
            for source in node.all_input_nodes
            if source in self.features
        }
        if len(sizes) != 1:
            return False
        ((from_end, units),) = sizes
        for source in node.all_input_nodes:
            if source not in self.features:
                shape = self.shapes.get(source, ())
                if len(shape) < -from_end or shape[from_end] != units or source.op == "get_attr":
                    return False
                followed.append(self._adopt(source, len(shape) + from_end))
        known = {source: torch.from_numpy(self.features[source].constants.copy()) for source in node.all_input_nodes}

        def value_of(argument: Any) -> Any:
            return known[argument] if isinstance(argument, fx.Node) else argument

        args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
        function = self._module(node) if node.op == "call_module" else kind
        result = getattr(args[0], kind)(*args[1:], **kwargs) if node.op == "call_method" else function(*args, **kwargs)
        values = np.where(np.any([np.isnan(f.constants) for f in followed], axis=0), np.nan, result.numpy())
        if kind in _PRODUCTS:
            values[np.any([f.constants == 0 for f in followed], axis=0)] = 0.0
        output = self._new(rank + from_end, values, followed[0].groups)
        for feature in followed:
            self.groups.join(feature.groups, output.groups)
            self.steps.append(Link(feature, output, np.arange(units)))
        self._keep(node, output)
        return True

    def _pool(self, node: fx.Node, kind: Any, module: nn.Module | None) -> bool:
        source = node.all_input_nodes[0]
        feature, rank = self.features[source], len(self.shapes[source])
        values = feature.constants
        if kind in _UPSAMPLES:
            return feature.axis <= 1 < rank - 1 and self._pass_on(node, values)
        pools = next((p for p in (_MAX_POOLS, _AVERAGE_POOLS, _ADAPTIVE_POOLS) if kind in p), None)
        if pools is None or feature.axis >= rank - pools[kind]:
            return False
        names = _MAX_ARGUMENTS if pools is _MAX_POOLS else _AVERAGE_ARGUMENTS
        settings = dict(zip(names, node.args, strict=False)) | node.kwargs if module is None else vars(module)
        pads = np.any(np.asarray(settings.get("padding") or 0) != 0)
        if pools is _AVERAGE_POOLS:
            is_even = not pads or not settings.get("count_include_pad", True)
            if not is_even or settings.get("divisor_override") is not None:
                values = np.where(values == 0, 0.0, np.nan)
        elif pools is _MAX_POOLS and pads and np.any(np.asarray(settings.get("dilation") or 1) != 1):
            values = np.full_like(values, np.nan)  # a window may hold nothing but padding
        return self._pass_on(node, values)

    # Axes ------------------------------------------------------------------------------------------------------------

    def _size(self, node: fx.Node) -> bool:
        """Whether only sizes of other axes are asked for."""
        source = node.all_input_nodes[0]
        axis, rank = self.features[source].axis, len(self.shapes[source])
        asked = [node.args[1]] if node.target == "size" and len(node.args) > 1 else None
        if asked is None:
            users = [user for user in node.users if user.users]
            if any(user.target is not operator.getitem for user in users):
                return False
            asked = [user.args[1] for user in users]
        return all(isinstance(index, int) and index % rank != axis for index in asked)

    def _reshape(self, node: fx.Node) -> bool:
        source = node.all_input_nodes[0]
        feature, before, after = self.features[source], self.shapes[source], self.shapes[node]
        fits = _axes_after(before, after, feature.axis)
        if len(fits) != 1:
            return False
        block = after[fits[0]] // len(feature.constants)
        origin = np.repeat(np.arange(len(feature.constants)), block)
        self._made_of(node, feature, origin, feature.constants[origin], axis=fits[0])
        return True

    def _view(self, node: fx.Node) -> bool:
        """A view whose width is worked out, not written."""
        source, shape = node.all_input_nodes[0], node.args[1:]
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        fits = _axes_after(self.shapes[source], self.shapes[node], self.features[source].axis)
        if len(fits) != 1 or len(shape) <= fits[0] or shape[fits[0]] != -1:
            return False
        return self._reshape(node)

    def _slice(self, node: fx.Node) -> bool:
        feature = self.features[node.all_input_nodes[0]]
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if not all(part is None or isinstance(part, int | slice) for part in index):
            return False
        places = [place for place, part in enumerate(index) if part is not None]  # of the axes that are there already
        place = places[feature.axis] if len(places) > feature.axis else len(index)
        if place < len(index) and index[place] != slice(None):
            return False
        added = sum(part is None for part in index[:place])
        dropped = sum(isinstance(part, int) for part in index[:place])
        return self._pass_on(node, feature.constants, axis=feature.axis + added - dropped)

    def _mean(self, node: fx.Node) -> bool:
        source = node.all_input_nodes[0]
        feature, rank = self.features[source], len(self.shapes[source])
        given: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = {axis % rank for axis in ([given] if isinstance(given, int) else given or range(rank))}
        if feature.axis in axes:
            return False
        keeps = len(self.shapes[node]) == rank
        axis = feature.axis if keeps else feature.axis - sum(axis < feature.axis for axis in axes)
        return self._pass_on(node, feature.constants, axis=axis)

    def _pad(self, node: fx.Node, module: nn.Module | None) -> bool:
        source = node.all_input_nodes[0]
        feature, rank = self.features[source], len(self.shapes[source])
        settings: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        if module is not None:
            settings = {
                "pad": module.padding,
                "mode": "constant" if type(module) in _CONSTANT_PADS else "other",
                "value": getattr(module, "value", None),
            }
        if not all(isinstance(amount, int) for amount in settings["pad"]):
            return False
        amounts = np.zeros((rank, 2), dtype=np.int64)
        for number, (before, after) in enumerate(zip(settings["pad"][::2], settings["pad"][1::2], strict=True)):
            amounts[rank - 1 - number] = before, after
        before, after = (int(amount) for amount in amounts[feature.axis])
        fills, value = settings.get("mode", "constant") == "constant", float(settings.get("value") or 0.0)
        if min(before, after) < 0 or (not fills and (before or after)):
            return False
        amounts[feature.axis] = 0
        values = feature.constants
        if fills and (amounts > 0).any():
            values = np.where(values == value, values, np.nan)
        origin = np.pad(np.arange(len(values)), (before, after), constant_values=-1)
        padding = self.groups.new(len(origin))
        self.groups.pin(padding[origin < 0], f"{_label(node, self.modules)} adds it")
        self._made_of(node, feature, origin, np.where(origin < 0, value, values[origin]), padding)
        return True

    def _cat(self, node: fx.Node) -> bool:
        parts: Any = node.args[0]
        dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(parts, tuple | list) or not isinstance(dim, int):
            return False
        axis = dim % len(self.shapes[node])
        if any(self.features[part].axis != axis for part in parts if part in self.features):
            return False
        sources = [self.features[part] if part in self.features else self._adopt(part, axis) for part in parts]
        values, groups = (np.concatenate([getattr(s, name) for s in sources]) for name in ("constants", "groups"))
        output = self._new(axis, values, groups)
        start = 0
        for source in sources:
            origin = np.full(len(values), -1)
            origin[start : start + len(source.constants)] = np.arange(len(source.constants))
            self.steps.append(Link(source, output, origin))
            start += len(source.constants)
        self._keep(node, output)
        return True

    # Features --------------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node) -> nn.Module:
        module: nn.Module = self.modules[str(node.target)]
        return module

    def _new(self, axis: int, values: Array, groups: Indices | None = None) -> Feature:
        finite = np.where(np.isfinite(values), values, np.nan)
        own = self.groups.new(len(values)) if groups is None else groups
        return Feature(axis, finite, own, np.zeros(len(values), dtype=bool))

    def _adopt(self, node: fx.Node, axis: int) -> Feature:
        """Take a tensor that is not followed as units that vary and stay."""
        feature = self._new(axis, np.full(self.shapes[node][axis], np.nan))
        self.groups.pin(feature.groups, f"{_label(node, self.modules)} makes it")
        self.features[node] = feature
        return feature

    def _pass_on(self, node: fx.Node, values: Array, *, axis: int | None = None) -> bool:
        source = self.features[node.all_input_nodes[0]]
        self._made_of(node, source, np.arange(len(values)), values, axis=axis)
        return True

    def _made_of(
        self,
        node: fx.Node,
        source: Feature,
        origin: Indices,
        values: Array,
        padding: Indices | None = None,
        *,
        axis: int | None = None,
    ) -> Feature:
        groups = source.groups[origin] if padding is None else np.where(origin < 0, padding, source.groups[origin])
        output = self._new(source.axis if axis is None else axis, values, groups)
        self.steps.append(Link(source, output, origin))
        self._keep(node, output)
        return output

    def _keep(self, node: fx.Node, feature: Feature) -> None:
        if len(node.users) > 1 and _is_overwritten(node, self.modules):
            feature.constants[:] = np.nan  # what another reads may be what was written over it
        self.features[node] = feature


def by_units(module: nn.Linear | nn.modules.conv._ConvNd) -> Tensor:
    """Return a layer's weight as (out, in ÷ groups, …)."""
    weight = module.weight.detach()
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight
    return swapped(weight, module.groups)


def swapped(weight: Tensor, groups: int) -> Tensor:
    """Return a transposed convolution's weight with the axes of inputs and outputs exchanged; its own inverse."""
    rows, columns, *taps = weight.shape
    blocks = weight.reshape(groups, rows // groups, columns, *taps).transpose(1, 2)
    return blocks.reshape(groups * columns, rows // groups, *taps)


def taps(weight: Tensor) -> Tensor:
    """Return a weight of shape (out, in, …) as (out, in, k): one entry of a Linear, k of a convolution."""
    return weight.reshape(*weight.shape[:2], math.prod(weight.shape[2:]))


def _spread(touches: Mask, groups: int) -> Mask:
    """Return which of all inputs each output reads, from which of its own group's."""
    rows, columns = touches.shape
    spread = np.zeros((groups, rows // groups, groups, columns), dtype=bool)
    for group, block in enumerate(np.split(touches, groups)):
        spread[group, :, group] = block
    return spread.reshape(rows, groups * columns)


def _response(weight: Tensor, groups: int, chosen: Mask, values: Array) -> Array:
    """Return what the chosen constant inputs add to every output, away from zero padding."""
    blocks = zip(weight.chunk(groups), np.split(chosen, groups), np.split(values, groups), strict=True)
    return np.concatenate([_array(taps(w[:, torch.from_numpy(c).to(w.device)]).sum(-1)) @ v[c] for w, c, v in blocks])


def _is_uniform(module: nn.modules.conv._ConvNd) -> bool:
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return False  # inner positions too are reached by different numbers of weights
    if module.padding_mode != "zeros" or module.padding == "valid":
        return True
    if module.padding == "same":
        return all(size == 1 for size in module.kernel_size)
    return not any(module.padding)


def _evaluate(function: Callable[[Tensor], Tensor], values: Array) -> Array:
    result: Array = function(torch.from_numpy(values.copy())).numpy()
    return np.where(np.isnan(values), np.nan, result)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().to("cpu", torch.float64).numpy()
    return array


def _axes_after(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> list[int]:
    """Return the axes of a reshaped tensor along which one axis lies in whole blocks; one, unless sizes are 1."""
    return [
        b
        for b in range(len(after))
        if math.prod(after[:b]) == math.prod(before[:axis])
        and after[b] % before[axis] == 0
        and (after[b] // before[axis]) * math.prod(after[b + 1 :]) == math.prod(before[axis + 1 :])
    ]


def _is_overwritten(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether something that reads a node, or a view of it, works in place."""
    for user in node.users:
        module = modules[str(user.target)] if user.op == "call_module" else None
        is_method = user.op == "call_method" and str(user.target).endswith("_")
        if is_method or getattr(module, "inplace", False) or user.kwargs.get("inplace") is True:
            return True
        kind: Any = user.target if module is None else type(module)
        if kind in _ALIASES and _is_overwritten(user, modules):
            return True
    return False


def _label(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{str(node.target)!r} ({type(modules[str(node.target)]).__name__})"
    if node.op == "call_function":
        return f"{getattr(node.target, '__name__', node.name)}()"
    return f".{node.target}()" if node.op == "call_method" else f"{str(node.target)!r}"
