"""Every model or state dict as named matrices whose rows are units, read one at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ellq.analysis.unit_rows import to_unit_rows, transposed_groups
from ellq.theory.arguments import Array, refuse_nonfinite

_NEEDS_MODULE = "its effective weight is computed by the model; pass the model instead of its state dict"
_SPECTRAL = "spectral norm by hook; remove it first, or use torch.nn.utils.parametrizations instead"


@dataclass(frozen=True)
class WeightMatrix:
    """One weight tensor, a row per unit.

    Attributes:
        name: the tensor's name in the model, such as ``layer1.0.conv1.weight``.
        shape: the tensor's own shape.
        units: float64, shape (units, entries of each), finite, read-only.
        note: how it was converted, such as ``dequantised from qint8``; empty for plain tensors.
    """

    name: str
    shape: tuple[int, ...]
    units: Array
    note: str = ""


@dataclass(frozen=True)
class Weights:
    """The weights of a source in its own order: iterate to read them, one matrix in memory at a time.

    Attributes:
        names: names of the matrices, in order.
        skipped: name → why it is not measured, for what might be taken for a weight.
        tied: name → the earlier name of the same tensor, which is read once.
    """

    names: tuple[str, ...]
    skipped: Mapping[str, str]
    tied: Mapping[str, str]
    _candidates: tuple[_Candidate, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[WeightMatrix]:
        return (_read(candidate) for candidate in self._candidates)


def weight_matrices(source: nn.Module | Mapping[str, Any], /) -> Weights:
    """Find the weights of a model or state dict and return them as matrices of units, not yet read.

    A weight is a floating tensor with at least two dimensions: a parameter of a model, any entry of a state dict,
    which cannot tell buffers apart. Units lie along its first axis: rows of a Linear, filters of a convolution,
    embeddings, rows of the gates of an RNN. In a model's ConvTranspose the unit is the output channel, which lies
    along the second axis, within groups; a state dict cannot say so, and there the first axis is taken.

    Weights are the effective ones: parametrised weights as the model computes them, in evaluation mode; those of
    ``torch.nn.utils.prune`` times their mask and those of ``torch.nn.utils.weight_norm`` rescaled, from a state
    dict too. Any float format is widened, sparse layouts are filled, quantised tensors dequantised. Tensors with
    fewer than two dimensions (biases, norms) are passed over. The source is not changed.

    Args:
        source: an ``nn.Module``, or a mapping of names to tensors or NumPy arrays.

    Returns:
        The weights, with what was skipped and which names are tied.

    Raises:
        TypeError: ``source`` is neither, or a name in it is not a string.
        ValueError: a weight without data (device meta), not initialised yet, or with no entries; or no weight at
            all. While reading: a weight that holds NaN or an infinite entry.
    """
    if isinstance(source, nn.Module):
        candidates = list(_of_module(source))
    elif isinstance(source, Mapping):
        candidates = list(_of_mapping(source))
    else:
        path = isinstance(source, str | os.PathLike)
        hint = " Use ellq.read_checkpoint(path) to read a file." if path else ""
        raise TypeError(f"model must be an nn.Module or a state dict, got {type(source).__name__}.{hint}")
    chosen: list[_Candidate] = []
    skipped: dict[str, str] = {}
    tied: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for candidate in candidates:
        value = None if candidate.unreadable else (candidate.look or candidate.fetch)()
        reason = candidate.unreadable or _reason_to_skip(value, candidate.name)
        if reason is not None:
            skipped |= {candidate.name: reason} if reason else {}
        elif candidate.identity is not None and candidate.identity in first:
            tied[candidate.name] = first[candidate.identity]
        else:
            first[candidate.identity] = candidate.name
            chosen.append(candidate)
    if not chosen:
        seen = "".join(f" ({name!r} was skipped: {reason})" for name, reason in list(skipped.items())[:1])
        raise ValueError(
            f"model holds no weight matrix{seen}. Pass one with a floating tensor of two dimensions or more."
        )
    return Weights(tuple(c.name for c in chosen), skipped, tied, tuple(chosen))


def unpack_quantised(name: str, value: object) -> tuple[str, object]:
    """Return a quantised Linear's packed entry of a state dict as (name of its weight, weight); others as they are."""
    is_packed = name.endswith("_packed_params") and isinstance(value, tuple) and len(value) > 0
    if is_packed and isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
        owner = name.removesuffix("_packed_params").rstrip(".").removesuffix("_packed_params")
        return f"{owner}weight", value[0]
    return name, value


@dataclass(frozen=True)
class _Candidate:
    """What may be a weight.

    ``fetch`` gives its value afresh, ``look``, where that is cheaper, one of the same type and shape; ``identity`` is
    equal for tied ones, None if unknown.
    """

    name: str
    fetch: Callable[[], object]
    identity: Hashable | None = None
    transposed_groups: int = 0  # of a ConvTranspose; 0 where units lie along the first axis
    unreadable: str = ""
    blocks: tuple[str, ...] = ()  # what equal stretches of the units are, in order
    look: Callable[[], object] | None = None


def _of_module(model: nn.Module) -> Iterator[_Candidate]:
    hidden: set[str] = set()  # folders of parametrisations, whose inner tensors are no weights
    for path, module in model.named_modules(remove_duplicate=False):
        if any(parent in hidden for parent in _parents(path)):
            continue
        prefix = f"{path}." if path else ""
        groups = transposed_groups(module)
        if parametrize.is_parametrized(module):
            hidden.add(f"{prefix}parametrizations")
            for name in module.parametrizations:
                fetch = functools.partial(_effective, module, name)
                own_groups = groups if name == "weight" else 0
                yield _Candidate(
                    prefix + name, fetch, _computed(module, name), own_groups, blocks=_blocks(module, name)
                )
        own: dict[str, Any] = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        passing: set[str] = getattr(module, "_non_persistent_buffers_set", set())
        for candidate in _resolved(own | buffers, prefix):
            local = candidate.name.removeprefix(prefix)
            if local in buffers:
                if _dimensions(buffers[local]) >= 2 and local not in passing:
                    yield replace(candidate, unreadable="a buffer, not a parameter")
            elif isinstance(module, nn.MultiheadAttention) and local in ("bias_k", "bias_v"):
                continue  # biases, though of three dimensions
            else:
                own_groups = groups if local == "weight" else 0
                yield replace(candidate, transposed_groups=own_groups, blocks=_blocks(module, local))
        if _is_quantised(module):
            if callable(weight := getattr(module, "weight", None)):
                yield _Candidate(f"{prefix}weight", weight, (id(module), "weight"))
            else:
                yield _Candidate(path, lambda: None, unreadable="packed weights that cannot be read")


def _computed(module: nn.Module, name: str) -> Hashable:
    """Return what is equal for weights computed from the same tensors by the same parametrisations."""
    inner: Any = module.parametrizations[name]  # type: ignore[index]
    return tuple(map(id, (*inner, *inner.parameters(recurse=False), *inner.buffers(recurse=False))))


def _blocks(module: nn.Module, name: str) -> tuple[str, ...]:
    """Return what the equal stretches of a packed weight's rows are: projections of attention, gates of an RNN."""
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return ("query", "key", "value")
    if name.startswith(("weight_ih", "weight_hh")):
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            return ("input gate", "forget gate", "cell", "output gate")
        if isinstance(module, nn.GRU | nn.GRUCell):
            return ("reset gate", "update gate", "new")
    return ()


def _of_mapping(state: Mapping[str, Any]) -> Iterator[_Candidate]:
    for name in state:
        if not isinstance(name, str):
            raise TypeError(f"Names in a state dict must be strings, got {type(name).__name__} {name!r}.")
    yield from _resolved(state, "")


def _resolved(state: Mapping[str, Any], prefix: str) -> Iterator[_Candidate]:
    """Yield the entries of a mapping as candidates, those that make up one weight together as one."""
    consumed: set[str] = set()
    made: dict[str, _Candidate] = {}
    stand_in = getattr(state, "stand_in", None)  # of tensors in a file, each use of which reads it
    value_of = state.__getitem__ if stand_in is None else stand_in
    for name in state:
        base, _, kind = name.rpartition("_")
        combine: Callable[[torch.Tensor, torch.Tensor], object]
        if base in state:  # a weight of its own stands there, so the others only look like its parts
            continue
        if kind == "orig" and f"{base}_mask" in state:
            parts, combine = (name, f"{base}_mask"), _masked
        elif kind == "g" and _is_weight_norm(state, name, f"{base}_v"):
            parts, combine = (name, f"{base}_v"), _rescaled
        elif kind == "orig" and f"{base}_u" in state:
            made[name] = _Candidate(prefix + base, lambda: None, unreadable=_SPECTRAL)
            consumed |= {f"{base}_u", f"{base}_v"}
            continue
        else:
            continue
        fetch = functools.partial(_combined, state, parts, combine)
        identities = tuple(_identity(state, part) for part in parts)
        made[name] = _Candidate(prefix + base, fetch, None if None in identities else identities)
        consumed |= set(parts)
    for name in state:
        if name in made:
            yield made[name]
        elif name not in consumed:
            fetch = functools.partial(_entry, state, name)
            shown, _ = unpack_quantised(name, value_of(name)) if name.endswith("_packed_params") else (name, None)
            inner = "parametrizations" in name.split(".")[:-1]
            yield _Candidate(
                prefix + shown,
                fetch,
                _identity(state, name),
                unreadable=_NEEDS_MODULE if inner and _dimensions(value_of(name)) >= 2 else "",
                look=None if stand_in is None else functools.partial(stand_in, name),
            )


def _reason_to_skip(value: object, name: str) -> str | None:
    """Return None for a weight, '' for what is passed over in silence, else why it is not measured."""
    if not isinstance(value, torch.Tensor | np.ndarray):
        return f"{type(value).__name__}, not a tensor"
    if isinstance(value, torch.Tensor):
        if is_lazy(value):
            raise ValueError(f"Weight {name!r} is not initialised. Run one forward pass first.")
        is_float = value.is_quantized or (value.is_floating_point() and _widens(value.dtype))
    else:
        is_float = value.dtype.kind == "f"
    if value.ndim < 2:
        return ""
    if not is_float:
        return f"dtype {value.dtype} is not a real floating type"
    if isinstance(value, torch.Tensor) and value.is_meta:
        raise ValueError(f"Weight {name!r} has no data (device meta). Load the weights first.")
    if 0 in value.shape:
        raise ValueError(f"Weight {name!r} has no entries (shape {tuple(value.shape)}). Remove that layer first.")
    return None


def _read(candidate: _Candidate) -> WeightMatrix:
    value = candidate.fetch()
    note = ""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        if tensor.is_quantized:
            note = f"dequantised from {str(tensor.dtype).removeprefix('torch.')}"
            tensor = tensor.dequantize()
        elif tensor.layout != torch.strided:
            note = f"filled from layout {str(tensor.layout).removeprefix('torch.')}"
            tensor = tensor.to_dense()
        array: Array = tensor.to(torch.float64).resolve_neg().numpy()
    else:
        array = np.asarray(value, dtype=np.float64)
    refuse_nonfinite(array, f"Weight {candidate.name!r}")
    if candidate.blocks:
        each = len(array) // len(candidate.blocks)
        parts = (f"{i * each}–{(i + 1) * each - 1} {name}" for i, name in enumerate(candidate.blocks))
        note = "; ".join(filter(None, (note, f"units {', '.join(parts)}")))
    units = to_unit_rows(array, candidate.transposed_groups)
    units.flags.writeable = False  # a float64 weight is not copied
    return WeightMatrix(candidate.name, tuple(array.shape), units, note)


def _effective(module: nn.Module, name: str) -> object:
    """Return a parametrised weight in evaluation mode, where spectral norm and the like do not update themselves."""
    training = [m for m in module.parametrizations[name].modules() if m.training]  # type: ignore[index,union-attr]
    try:
        for inner in training:
            inner.training = False
        with torch.no_grad():
            return getattr(module, name)
    finally:
        for inner in training:
            inner.training = True


def _combined(
    state: Mapping[str, Any], parts: tuple[str, str], combine: Callable[[torch.Tensor, torch.Tensor], object]
) -> object:
    first, second = (_as_tensor(state[part]) for part in parts)
    with torch.no_grad():
        return combine(first, second)


def _masked(original: torch.Tensor, mask: torch.Tensor) -> object:
    """Return the product that ``torch.nn.utils.prune`` computes."""
    return original * mask.to(original.dtype)


def _rescaled(g: torch.Tensor, v: torch.Tensor) -> object:
    """Return g · v/‖v‖, the norm over the axes along which g does not vary."""
    axes = [axis for axis, size in enumerate(g.shape) if size == 1]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))


def _is_weight_norm(state: Mapping[str, Any], g: str, v: str) -> bool:
    if v not in state or not (_dimensions(state[g]) == _dimensions(state[v]) >= 2):
        return False
    sizes = list(zip(state[g].shape, state[v].shape, strict=True))
    return all(a in (1, b) for a, b in sizes) and sum(a != 1 for a, _ in sizes) <= 1 and any(a != b for a, b in sizes)


def _identity(state: Mapping[str, Any], name: str) -> Hashable | None:
    """Return what is equal for entries that share their memory; None if the mapping makes its values afresh."""
    if hasattr(state, "stand_in"):
        return None
    value = state[name]
    if state[name] is not value:
        return None
    if isinstance(value, np.ndarray):
        return ("numpy", value.ctypes.data, value.shape, value.strides, value.dtype.str)
    if isinstance(value, torch.Tensor) and not is_lazy(value) and not value.is_meta:
        if value.layout != torch.strided:
            return id(value)
        place = (value.device, value.untyped_storage().data_ptr(), value.storage_offset())
        return (*place, tuple(value.shape), value.stride(), value.dtype)
    return None


def _is_quantised(module: nn.Module) -> bool:
    home = type(module).__module__
    is_packed_rnn = home.endswith("dynamic.modules.rnn") and hasattr(module, "_all_weight_values")
    return home.startswith("torch.ao.nn.quantized") and (
        is_packed_rnn or (hasattr(module, "_packed_params") and callable(getattr(module, "weight", None)))
    )


@functools.cache
def _widens(dtype: torch.dtype) -> bool:
    """Whether torch can turn this float format into float64; it cannot for packed four-bit floats."""
    try:
        torch.ones(1).to(dtype).to(torch.float64)
    except (RuntimeError, TypeError):
        return False
    return True


def _as_tensor(value: object) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _entry(state: Mapping[str, Any], name: str) -> object:
    return unpack_quantised(name, state[name])[1]


def _dimensions(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return 0 if is_lazy(value) else value.dim()
    return value.ndim if isinstance(value, np.ndarray) else 0


def _parents(path: str) -> Iterator[str]:
    """Yield a path and every path above it: a.b.c, a.b, a."""
    while path:
        yield path
        path = path.rpartition(".")[0]
