"""Checkpoint files as named tensors: safetensors read lazily, PyTorch files read without running their code."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ellq.analysis.weights import unpack_quantised

_TORCH = (".pt", ".pth", ".th", ".bin", ".ckpt")
_INDEX = ".safetensors.index.json"
_ALLOWED = (".safetensors", _INDEX, *_TORCH)
# Where training scripts put the weights; Lightning's is state_dict.
_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
# Formats of a safetensors file that torch can hold; others, such as four-bit floats, have none.
_STORED = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64},
}
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, torch.compile
_ADVICE = "Save model.state_dict() with torch.save, or a safetensors file, instead."


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, torch.Tensor]:
    """Read the named tensors of a checkpoint file, on the CPU, without running any code in it.

    A ``.safetensors`` file, or the ``.safetensors.index.json`` of a sharded one, is read tensor by tensor when
    asked for. The format keeps no order, so names come sorted, numbers in them by value. A PyTorch file is loaded
    at once with ``weights_only=True``, which refuses pickled code; the usual nests (``state_dict``, ``model``, …)
    are opened and what is no tensor is left out. Prefixes that DataParallel and torch.compile add to every name
    are removed.

    Args:
        path: a file ending in .safetensors, .safetensors.index.json, .pt, .pth, .th, .bin or .ckpt.

    Returns:
        Name → tensor.

    Raises:
        TypeError: ``path`` is not a path.
        FileNotFoundError: there is no such file, or a shard is missing.
        IsADirectoryError: ``path`` is a folder.
        ValueError: another ending; an empty, damaged or truncated file; a file that holds pickled objects or
            TorchScript (refused, nothing is executed); or no tensor in it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a file path, got {type(path).__name__}. Pass a str or pathlib.Path.")
    file = Path(path)
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.name.endswith(_ALLOWED))
        hint = f"such as {inside[0]}" if inside else f"ending in one of {', '.join(_ALLOWED)}"
        raise IsADirectoryError(f"{file} is a folder. Name a file inside it, {hint}.")
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist. Check the path.")
    if not file.name.endswith(_ALLOWED):
        raise ValueError(f"{file} has an unknown ending. A checkpoint ends in one of {', '.join(_ALLOWED)}.")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty. Save or download it again.")
    if file.name.endswith(_INDEX):
        return _lazy(file, _shards(file))
    if file.suffix == ".safetensors":
        return _lazy(file, [file])
    return _tensors_in(file, _load_without_code(file))


@dataclass(frozen=True)
class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors that are read from their safetensors file each time they are asked for.

    Attributes:
        places: name → (file, name in that file).
        kinds: name → (the file's name of its format, such as BF16, and its shape).
    """

    places: Mapping[str, tuple[Path, str]]
    kinds: Mapping[str, tuple[str, tuple[int, ...]]]

    def __getitem__(self, name: str) -> torch.Tensor:
        file, stored = self.places[name]
        # Opened each time: an open file keeps the pages of all that was read from it.
        handle: Any = safe_open(file, framework="pt", device="cpu")
        tensor: torch.Tensor = handle.get_tensor(stored)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.places  # a Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def stand_in(self, name: str) -> torch.Tensor:
        """Return a tensor of the format and shape of the one of that name, which takes no memory and is not read."""
        stored_as, shape = self.kinds[name]
        if stored_as not in _STORED:
            return self[name]  # torch may know it all the same
        return torch.empty((), dtype=_STORED[stored_as]).expand(shape)

    def __repr__(self) -> str:
        return f"LazyTensors({len(self)} tensors)"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, any stretch of which can be read without the rest.

    Attributes:
        file: where it lies.
        offset: of its first byte in the file.
        stored_as: the file's name of its format, such as BF16.
        shape: its shape.
    """

    file: Path
    offset: int
    stored_as: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """Its format in torch; None where torch has no such format."""
        return _STORED.get(self.stored_as)

    @property
    def size(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the entries from ``start`` to ``stop`` of the flat tensor, mapped from the file.

        Memory is taken as entries are looked at, and given back with the tensor. Writing to it changes no file.

        Raises:
            TypeError: torch has no such format.
            ValueError: the file ends too early.
        """
        if self.dtype is None:
            raise TypeError(f"{self.file} stores a tensor as {self.stored_as}, which torch cannot hold.")
        end, width = self.size if stop is None else stop, self.dtype.itemsize
        if end <= start:
            return torch.empty(0, dtype=self.dtype)
        first = self.offset + start * width
        aligned = first - first % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as stream:
            try:
                length = self.offset + end * width - aligned
                mapped = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=aligned)
            except ValueError:
                raise ValueError(f"{self.file} ends too early. Save or download it again.") from None
        return torch.frombuffer(mapped, dtype=self.dtype, count=end - start, offset=first - aligned)


def stored_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Return where each tensor of a safetensors checkpoint lies, reading nothing but the headers.

    Args:
        path: a file ending in .safetensors or .safetensors.index.json.

    Returns:
        Name → place, with the names and the order of ``read_checkpoint``.

    Raises:
        TypeError, FileNotFoundError, IsADirectoryError: as ``read_checkpoint``.
        ValueError: another format, or a damaged file.
    """
    lazy = read_checkpoint(path) if str(path).endswith((".safetensors", _INDEX)) or Path(path).is_dir() else None
    if not isinstance(lazy, LazyTensors):
        raise ValueError(f"{path} is no safetensors file. Only those can be read in stretches.")
    file = Path(path)
    places: dict[str, StoredTensor] = {}
    for shard in _shards(file) if file.name.endswith(_INDEX) else [file]:
        # safe_open has checked the header: its size in eight bytes, then JSON, then the data.
        with shard.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                offset = 8 + size + entry["data_offsets"][0]
                places[name] = StoredTensor(shard, offset, entry["dtype"], tuple(entry["shape"]))
    return {name: places[stored] for name, (_, stored) in lazy.places.items()}


def _lazy(file: Path, shards: Iterable[Path]) -> LazyTensors:
    stored: dict[str, Path] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards:
        try:
            handle: Any = safe_open(shard, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(
                f"{shard} is truncated or no safetensors file ({error}). Save or download it again."
            ) from None
        for name in handle.keys():  # noqa: SIM118 -- no mapping
            part = handle.get_slice(name)
            stored[name], kinds[name] = shard, (part.get_dtype(), tuple(part.get_shape()))
    if not stored:
        raise ValueError(f"{file} holds no tensors. Choose a checkpoint with weights.")
    names = sorted(stored, key=_natural)
    shown = dict(zip(_unwrapped(names), names, strict=True))
    places = {short: (stored[name], name) for short, name in shown.items()}
    return LazyTensors(places, {short: kinds[name] for short, name in shown.items()})


def _shards(index: Path) -> list[Path]:
    """Return the files a sharded checkpoint's index names, all beside it."""
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        foreign = [name for name in listed if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{index} is not the index of a sharded checkpoint. Name the .safetensors file itself."
        ) from None
    if foreign:
        raise ValueError(f"{index} names a shard outside its folder, {foreign[0]!r}. Put all shards beside it.")
    shards = [index.with_name(name) for name in sorted(listed)]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} does not exist, though {index.name} names it. Download every shard.")
    return shards


def _load_without_code(file: Path) -> object:
    """Load a PyTorch file with the unpickler that refuses everything but tensors and plain containers."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"PK"):
        _refuse_broken_archive(file)
    elif not start.startswith(b"\x80"):
        what = "text" if _is_text(start) else "something else"
        raise ValueError(f"{file} holds {what}, not a PyTorch checkpoint. Save or download it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols and quantised storage
            content: object = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
        named = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{file} was refused: besides tensors it holds Python objects{named}, as a whole pickled model does;"
            f" nothing was executed. {_ADVICE}"
        ) from None
    except MemoryError:
        raise
    # A cut pickle fails wherever the cut is: EOFError, KeyError, RuntimeError, struct.error, …
    except Exception as error:
        raise ValueError(
            f"{file} is truncated or damaged ({type(error).__name__}). Save or download it again."
        ) from None
    return content


def _refuse_broken_archive(file: Path) -> None:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is truncated: its archive has no end. Save or download it again.")
    with zipfile.ZipFile(file) as archive:
        members = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in members):
        raise ValueError(f"{file} is a TorchScript archive, which holds code; nothing was executed. {_ADVICE}")


def _is_text(start: bytes) -> bool:
    return all(byte in b"\t\n\r" or byte >= 32 for byte in start)


def _tensors_in(file: Path, content: object) -> dict[str, torch.Tensor]:
    """Open the nests around a state dict and keep its tensors."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if isinstance(content, torch.Tensor):
        raise ValueError(f"{file} holds one tensor without a name. Save a dict such as {{'weight': tensor}} instead.")
    values = content if isinstance(content, Mapping) else {}
    named = dict(unpack_quantised(str(name), value) for name, value in values.items())
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        entries = f" besides {', '.join(map(repr, list(named)[:5]))}" if named else ""
        raise ValueError(f"{file} holds no tensors{entries}. {_ADVICE}")
    return dict(zip(_unwrapped(tensors), tensors.values(), strict=True))


def _unwrapped(names: Iterable[str]) -> list[str]:
    """Return the names without the prefixes of wrapping modules that all of them share."""
    short = list(names)
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in short)), None):
        short = [name.removeprefix(prefix) for name in short]
    return short


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sorting key that puts layer.2 before layer.10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
