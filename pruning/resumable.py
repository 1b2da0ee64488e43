"""Runs that a kill at any moment leaves resumable: their file, what identifies their arguments, their random states."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ellq.analysis import write_bytes
from ellq.analysis.digest import digest
from ellq.pruning.snapshot import kind


def write_state(
    file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    """Write the state of a run, whole or not at all.

    Args:
        file: where to.
        tensors: by name; copied to the CPU.
        about: everything else, as JSON holds it.
        arguments: what the run was called with, as ``identity`` gives it.
    """
    # Cloned, because safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = {name: json.dumps(value) for name, value in {"arguments": arguments, **about}.items()}
    write_bytes(file, save(plain, metadata=text))


def read_state(
    file: Path, names: Sequence[str], arguments: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the state that a file holds, None if there is no file; what a kill left half-written beside it is removed.

    Args:
        file: what ``write_state`` wrote.
        names: what it must tell besides tensors.
        arguments: those of this call.

    Returns:
        The tensors, and the rest by name.

    Raises:
        ValueError: it is damaged, or was made with other arguments.
    """
    for partial in file.parent.glob(f".{file.name}.*.tmp"):
        with suppress(OSError):
            partial.unlink()
    if not file.exists():
        return None
    try:
        with safe_open(str(file), framework="pt") as opened:
            text = opened.metadata() or {}
            made_with, about = json.loads(text["arguments"]), {name: json.loads(text[name]) for name in names}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}). Remove it to start again.") from error
    _require_same_arguments(file, made_with, json.loads(json.dumps(arguments)))
    return tensors, about


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under names that begin with a prefix, to keep several sets of them in one file."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _require_same_arguments(file: Path, made_with: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    remedy = "Pass what it was made with, or another folder."
    for name, value in arguments.items():
        had = made_with.get(name)
        if name == "model" and isinstance(had, dict):
            odd = next((key for key in [*value, *had] if value.get(key) != had.get(key)), None)
            if odd is not None:
                raise ValueError(f"{file} was made from another model, which differs at {odd!r}. {remedy}")
        elif had != value:
            raise ValueError(f"{file} was made with {name}={had!r}, this call has {name}={value!r}. {remedy}")


def identity(value: object) -> Any:
    """Return what identifies an argument, as JSON holds it: its content, or the name of a function or a type.

    An object that has a method ``identity`` says it itself; of a dataclass the fields are told, of a module its
    tensors.
    """
    if isinstance(value, type):
        return value.__qualname__
    if callable(own := getattr(value, "identity", None)) and not isinstance(value, nn.Module):
        return [type(value).__qualname__, identity(own())]
    if isinstance(value, functools.partial):
        return [identity(value.func), identity(value.args), identity(value.keywords)]
    if isinstance(value, nn.Module):
        tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        return [type(value).__qualname__, {name: identity(tensor) for name, tensor in tensors.items()}]
    if dataclasses.is_dataclass(value):
        told = {field.name: identity(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, told]
    if isinstance(value, Mapping):
        return {str(key): identity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [identity(inner) for inner in value]
    if isinstance(value, Tensor):
        return f"{kind(value)} {digest(value)[:32]}"
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()[:32]}"
    if isinstance(value, DataLoader):
        data = value.dataset
        content = (
            list(data.tensors) if isinstance(data, TensorDataset) else len(data) if isinstance(data, Sized) else None
        )
        parts = (data, content, value.batch_size, value.drop_last, value.sampler, value.batch_sampler)
        return ["DataLoader", *map(identity, parts)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def encoded(value: object, tensors: dict[str, Tensor]) -> Any:
    """Return nested mappings, lists and tuples of tensors, numbers and texts as JSON holds them.

    Args:
        value: such as an optimiser's ``state_dict()``.
        tensors: takes copies of the tensors, by the names that the result tells.

    Raises:
        TypeError: something else is among them.
    """
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # As pairs, because keys need not be texts: those of torch's optimisers are numbers.
        return {"map": [[key, encoded(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind_of = "list" if isinstance(value, list) else "tuple"
        return {kind_of: [encoded(inner, tensors) for inner in value]}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(
        f"train.state_dict() holds a {type(value).__name__}, which a checkpoint cannot. Hold tensors, numbers, texts,"
        " and mappings, lists and tuples of them."
    )


def decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what ``encoded`` was given; its tensors are copies."""
    if not isinstance(value, dict):
        return value
    ((form, content),) = value.items()
    if form == "tensor":
        return tensors[content].clone()
    if form == "map":
        return {key: decoded(inner, tensors) for key, inner in content}
    items = [decoded(inner, tensors) for inner in content]
    return items if form == "list" else tuple(items)


@contextmanager
def random_state(seed: int, *place: int) -> Iterator[None]:
    """Run under random states that follow from a seed and a place in the run, and restore those that were."""
    derived = np.random.SeedSequence([seed, *place]).generate_state(2)
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the one that users' code draws from
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(derived[0]))
            random.seed(int(derived[1]))
            np.random.seed(derived)  # noqa: NPY002
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def finite_number(value: object, giver: str, what: str) -> float:
    """Return what a user's function gave as a float.

    Args:
        value: a number, or a tensor or array that holds one.
        giver: the function's name, for the error's text.
        what: what the number is, likewise.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN or infinite.
    """
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{giver} returned a {type(value).__name__}, where one number, the {what}, is expected")
    if not math.isfinite(value):
        raise ValueError(f"{giver} returned the {what} {value}")
    return float(value)
