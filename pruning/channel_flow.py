"""Where units go: labels of unit entries, carried through the operations of a traced forward pass.

Every activation gets a tensor of labels of its own shape. A label ≥ 0 names one entry of a layer's output axis,
``PADDING`` a constant put in by padding, ``FIXED`` a value that must stay. Operations that only move values move
their labels, operations on each entry join the labels they bring together, and what mixes units makes them stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional

PADDING = -1
FIXED = -2

_Rule = Callable[..., list[Tensor]]


class Labels:
    """Which labels are one unit, and which units must stay, collected operation by operation."""

    def __init__(self) -> None:
        self._count = 0
        self._pairs: list[Tensor] = []
        self._stuck: list[tuple[Tensor, str]] = []

    def fresh(self, count: int) -> Tensor:
        """Return labels that were never used, shape (count,)."""
        self._count += count
        return torch.arange(self._count - count, self._count)

    def join(self, first: Tensor, second: Tensor) -> None:
        """Make the labels at the same places of two tensors one unit, where both are labels."""
        differ = (first != second) & (first >= 0) & (second >= 0)
        if differ.any():
            pairs = first.expand_as(differ)[differ] * self._count + second.expand_as(differ)[differ]
            pairs = torch.unique(pairs)  # as one number each, which sorts far faster than as columns
            self._pairs.append(torch.stack([pairs // self._count, pairs % self._count]))

    def stick(self, labels: Tensor, reason: str) -> None:
        """Make units stay; the first reason given is the one reported."""
        labels = labels[labels >= 0]
        if len(labels):
            self._stuck.append((torch.unique(labels), reason))

    def units(self) -> tuple[NDArray[np.int64], dict[int, str]]:
        """Return the unit of every label, shape (labels,), and why units stay."""
        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *self._pairs], 1).numpy()
        links = coo_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(self._count, self._count))
        units = connected_components(links, directed=False)[1].astype(np.int64)
        reasons: dict[int, str] = {}
        for labels, reason in self._stuck:
            for unit in np.unique(units[labels.numpy()]).tolist():
                reasons.setdefault(unit, reason)
        return units, reasons


def along(labels: Tensor, axis: int) -> Tensor | None:
    """Return the labels along one axis, or None where they differ along another."""
    rest = [d for d in range(labels.ndim) if d != axis % labels.ndim]
    line = labels[tuple(slice(None) if d == axis % labels.ndim else 0 for d in range(labels.ndim))]
    shape = [-1 if d == axis % labels.ndim else 1 for d in range(labels.ndim)]
    return line if not rest or bool((labels == line.reshape(shape)).all()) else None


def spread(line: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Give a tensor of this shape the same labels along one axis everywhere."""
    sizes = [1] * len(shape)
    sizes[axis] = len(line)
    return line.reshape(sizes).expand(*shape)


def carry(operation: Any, inputs: Sequence[Tensor | None], parameters: Sequence[str | None], labels: Labels) -> Any:
    """Carry labels through one operation.

    Args:
        operation: the node of the autograd graph.
        inputs: the labels of its inputs, in order; None for constants.
        parameters: the name of each input that is a parameter, None for the others.
        labels: collects what is joined and what must stay.

    Returns:
        A list of label tensors, one for each output.
    """
    shapes = [tuple(output.shape) for output in operation._input_metadata]
    name = operation_name(operation)
    known = [x for x in inputs if x is not None]
    if not any((x >= 0).any() for x in known):
        pads = name != "ConstantPadNd" and any((x == PADDING).any() for x in known)
        if not pads:
            return [torch.full((1,) * len(shape), FIXED).expand(shape) for shape in shapes]
    rule: _Rule = _RULES.get(name, _entrywise)
    try:
        outputs = rule(operation, inputs, labels, shapes, parameters)
        if [tuple(x.shape) for x in outputs] == shapes:
            return outputs
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError):
        pass  # not the operation this rule was written for
    for x in known:
        labels.stick(x, f"{name}, outside a layer, reads them")
    return [torch.full((1,) * len(shape), FIXED).expand(shape) for shape in shapes]


def operation_name(operation: Any) -> str:
    """Return what an autograd node is called without the word Backward, such as ``View``."""
    return re.sub(r"Backward\d*$", "", operation.name().rsplit("::", 1)[-1])


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value  # autograd saves negative axes as unsigned numbers


def _only(inputs: Sequence[Tensor | None]) -> Tensor:
    (x,) = (x for x in inputs if x is not None)
    return x


def _moves(move: Callable[[Tensor, Any], Tensor | Sequence[Tensor]]) -> _Rule:
    """Make a rule of an operation that only moves values: the same operation on the labels."""

    def rule(
        operation: Any, inputs: Sequence[Tensor | None], _labels: Labels, shapes: Any, _names: Any
    ) -> list[Tensor]:
        moved = move(_only(inputs), operation)
        outputs = [moved] if isinstance(moved, Tensor) else list(moved)
        return [x.reshape(shape) for x, shape in zip(outputs, shapes, strict=True)]

    return rule


def _entrywise(
    operation: Any, inputs: Sequence[Tensor | None], labels: Labels, shapes: Any, parameters: Sequence[str | None]
) -> list[Tensor]:
    (shape,) = shapes
    known = [x for x in inputs if x is not None]
    if len(known) == 1 and known[0].ndim == len(shape) and not _expands(known[0].shape, shape):
        return [_resampled(known[0], shape, labels, operation_name(operation))]
    merged: Tensor = torch.full((1,) * len(shape), PADDING)
    for x in known:
        labels.join(merged, x)
        merged = torch.maximum(merged, x)
    varies = [d - len(shape) for d in range(len(shape)) if not _constant(merged, d)]
    for other, parameter in zip(inputs, parameters, strict=True):
        if other is not None and other.numel() > 1 and (other == FIXED).any():
            held = (other == FIXED) & (merged >= 0)
            if any(other.ndim >= -d and other.shape[d] > 1 for d in varies):
                by = f"parameter {parameter!r}" if parameter else "channels that stay"
                labels.stick(merged.expand_as(held)[held], f"{operation_name(operation)} joins them with {by}")
                merged = torch.where(held, PADDING, merged)
    fixed = torch.stack([(x == FIXED).broadcast_to(shape) for x in known if x.numel() > 1] or [torch.zeros(shape) > 0])
    merged = merged.broadcast_to(shape)
    return [torch.where(fixed.any(0) & (merged < 0), FIXED, merged)]


def _expands(before: Sequence[int], after: Sequence[int]) -> bool:
    return all(b in (1, a) for b, a in zip(before, after, strict=True))


def _constant(x: Tensor, axis: int) -> bool:
    return bool((x == x.narrow(axis, 0, 1)).all())


def _gathered(x: Tensor, axes: Sequence[int], labels: Labels, reason: str) -> Tensor:
    """Reduce axes to length one; labels that differ along them are mixed, so their units stay."""
    first = x
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    mixed = (x != first).any(dim=tuple(axes), keepdim=True) if axes else torch.zeros_like(first, dtype=torch.bool)
    labels.stick(x[mixed.expand_as(x)], reason)
    return torch.where(mixed, FIXED, first)


def _resampled(x: Tensor, shape: Sequence[int], labels: Labels, name: str) -> Tensor:
    axes = [d for d in range(x.ndim) if x.shape[d] != shape[d]]
    return _gathered(x, axes, labels, f"{name} mixes them").expand(*shape)


def _reduced(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    dims = getattr(operation, "_saved_dim", None)
    x = _only(inputs)
    if isinstance(dims, int):
        dims = (dims,)
    axes = range(x.ndim) if not dims else sorted({_signed(d) % x.ndim for d in dims})
    gathered = _gathered(x, list(axes), labels, f"{operation_name(operation)} mixes them")
    return [gathered.reshape(shape) for shape in shapes]


def _mixed(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    x = _only(inputs)
    gathered = _gathered(x, [_signed(operation._saved_dim) % x.ndim], labels, f"{operation_name(operation)} mixes them")
    return [gathered.expand_as(x)]


def _normalised(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    labels.stick(inputs[0], f"{operation_name(operation)} mixes them")
    return [torch.full(shape, FIXED) for shape in shapes]


def _joined(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    (shape,) = shapes
    axis = _signed(operation._saved_dim) % len(shape)
    if operation_name(operation) == "Stack":
        inputs = [None if x is None else x.unsqueeze(axis) for x in inputs]
    rest = shape[axis] - sum(x.shape[axis] for x in inputs if x is not None)
    constants = sum(x is None for x in inputs)
    sizes = list(shape)
    sizes[axis] = rest // max(constants, 1)
    if constants > 1 and operation_name(operation) != "Stack":
        raise RuntimeError("which constant has how many channels is not known")
    return [torch.cat([torch.full(sizes, FIXED) if x is None else x for x in inputs], axis)]


def _split(x: Tensor, operation: Any) -> Sequence[Tensor]:
    axis = _signed(operation._saved_dim) % x.ndim
    return torch.split(x, [output.shape[axis] for output in operation._input_metadata], axis)


def _sliced(x: Tensor, operation: Any) -> Tensor:
    axis = _signed(operation._saved_dim) % x.ndim
    start, end, step = (_signed(v) for v in (operation._saved_start, operation._saved_end, operation._saved_step))
    return x[(slice(None),) * axis + (slice(start, end, step),)]


def _gated(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    first, second = _only(inputs).chunk(2, _signed(operation._saved_dim))
    labels.join(first, second)
    return [torch.maximum(first, second)]


def _product(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    """Carry labels through a matrix product, whose other factor has none, along the axis that is not summed over."""
    (shape,) = shapes
    *others, left, right = inputs
    name = operation_name(operation)
    for x in others:
        if x is not None:
            labels.stick(x, f"{name}, outside a layer, adds them")
    has = [x is not None and bool((x >= 0).any()) for x in (left, right)]
    if all(has):
        for x in (left, right):
            labels.stick(x, "they are multiplied with each other, as attention's queries and keys are")
        return [torch.full(shape, FIXED)]
    x, axis = (left, -1) if has[0] else (right, -2)
    return [_gathered(x, [x.ndim + axis], labels, f"{name}, outside a layer, mixes them").expand(*shape)]


def _attended(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    for x in inputs[:2]:
        if x is not None:
            labels.stick(x, "attention multiplies queries and keys with each other")
    value = inputs[2]
    gathered = _gathered(value, [value.ndim - 2], labels, "attention mixes them")
    rest = [torch.full(shape, FIXED) for shape in shapes[1:]]
    return [gathered.expand(*shapes[0]), *rest]


def _opaque(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    raise RuntimeError("its inputs may look as if they were taken entry by entry")


def _viewed(operation: Any, inputs: Any, labels: Labels, shapes: Any, parameters: Any) -> list[Tensor]:
    """Carry labels through a view; where it splits an axis in two, all along the first part are one unit.

    So the channels of attention heads go from every head at once, which a view of the kind (…, heads, -1) allows.
    """
    (shape,) = shapes
    x = _only(inputs)
    y = x.reshape(shape)
    axis = next((d for d, (b, a) in enumerate(zip(x.shape, shape, strict=False)) if b != a), None)
    splits = axis is not None and len(shape) == x.ndim + 1 and x.shape[axis] == shape[axis] * shape[axis + 1]
    if splits and axis is not None and not _constant(x, axis):
        labels.join(y.narrow(axis, 0, 1), y)
    return [y]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("Convolution", "CudnnConvolution", "MkldnnConvolution"), _opaque),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "ReshapeCopy", "Unsqueeze", "Squeeze"), _viewed),
    "Transpose": _moves(lambda x, op: x.transpose(_signed(op._saved_dim0), _signed(op._saved_dim1))),
    "T": _moves(lambda x, op: x.t()),
    "Permute": _moves(lambda x, op: x.permute(*(_signed(d) for d in op._saved_dims))),
    **dict.fromkeys(("Split", "SplitWithSizes"), _moves(_split)),
    "Unbind": _moves(lambda x, op: x.unbind(_signed(op._saved_dim))),
    "Slice": _moves(_sliced),
    "Select": _moves(lambda x, op: x.select(_signed(op._saved_dim), _signed(op._saved_index))),
    "Index": _moves(lambda x, op: x[tuple(slice(None) if i is None else i.cpu() for i in op._saved_indices)]),
    "IndexSelect": _moves(lambda x, op: x.index_select(_signed(op._saved_dim), op._saved_index.cpu())),
    "ConstantPadNd": _moves(lambda x, op: functional.pad(x, [_signed(p) for p in op._saved_pad], value=PADDING)),
    "Flip": _moves(lambda x, op: x.flip([_signed(d) for d in op._saved_dims])),
    "Repeat": _moves(lambda x, op: x.repeat(*op._saved_repeats)),
    "PixelShuffle": _moves(lambda x, op: functional.pixel_shuffle(x.double(), op._saved_upscale_factor).long()),
    **dict.fromkeys(("Cat", "Stack"), _joined),
    "Glu": _gated,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Cumsum"), _mixed),
    **dict.fromkeys(("NativeLayerNorm", "FusedRmsNorm", "NativeGroupNorm", "NativeBatchNorm"), _normalised),
    **dict.fromkeys(
        ("Mean", "Sum", "Amax", "Amin", "Max", "Min", "Norm", "LinalgVectorNorm", "Prod", "Var", "Std", "Logsumexp"),
        _reduced,
    ),
    **dict.fromkeys(("Mm", "Bmm", "Addmm", "Baddbmm"), _product),
    **dict.fromkeys(
        (
            "ScaledDotProductFlashAttentionForCpu",
            "ScaledDotProductFlashAttention",
            "ScaledDotProductEfficientAttention",
            "ScaledDotProductCudnnAttention",
            "ScaledDotProductFusedAttentionOverrideable",
        ),
        _attended,
    ),
}
