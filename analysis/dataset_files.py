"""Readers of image files: IDX, both layouts of CIFAR-10, and zips of class folders. Files in, arrays out.

Nothing is ever unpacked to disk, and nothing that a file holds is executed.
"""

from __future__ import annotations

import gzip
import io
import lzma
import math
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ellq.analysis.progress import track

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

_Batch: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.int64]]  # the images and labels of one file

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_RECORD = 1 + math.prod(_CIFAR_SHAPE)  # a label, then the R, G and B planes
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)


class Examples(NamedTuple):
    """What every reader returns.

    Attributes:
        images: shape (n, channels, h, w), uint8.
        labels: shape (n,), int64, each an index into the classes.
        classes: the names of the classes, by label.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, plain or compressed (``.gz``, ``.xz``).

    Args:
        path: the file.

    Returns:
        The array, in the shape that the file declares.

    Raises:
        ValueError: the file is cut short, or is not an IDX file of unsigned bytes.
    """
    raw = _decompress(path)
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ValueError(
            f"'{path}' begins with {raw[:4].hex(' ')!r}, which is not the magic of an IDX file "
            f"(00 00 08 and the number of axes). Replace the file."
        )
    if raw[2] != 0x08:
        raise ValueError(
            f"'{path}' is an IDX file of type 0x{raw[2]:02x}; only unsigned bytes (0x08) are images or labels. "
            f"Replace the file."
        )
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"'{path}' ends inside its IDX header, after {len(raw)} bytes. Replace the file.")
    shape = tuple(int(length) for length in np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4))
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"'{path}' declares shape {shape}, which is {math.prod(shape)} bytes, but holds {len(raw) - start}. "
            f"Replace the file."
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy()


def read_idx_pair(images: Path, labels: Path, classes: Sequence[str]) -> Examples:
    """Read an IDX file of images and the IDX file of their labels.

    Args:
        images: an IDX file of shape (n, h, w).
        labels: an IDX file of shape (n,).
        classes: the names of the classes, by label.

    Returns:
        The examples, with one channel.

    Raises:
        ValueError: either file is not what it should be, the two disagree on n, or a label names no class.
    """
    pixels, targets = read_idx(images), read_idx(labels)
    for path, array, axes in ((images, pixels, 3), (labels, targets, 1)):
        if array.ndim != axes:
            raise ValueError(f"'{path}' has {array.ndim} axes where {axes} are expected. Replace the file.")
    if len(pixels) != len(targets):
        raise ValueError(
            f"'{images}' holds {len(pixels)} images but '{labels}' holds {len(targets)} labels. Replace both files."
        )
    return _join([(pixels[:, np.newaxis], targets.astype(np.int64))], [labels], tuple(classes))


def read_cifar_binary(paths: Sequence[Path], names: Path | None = None) -> Examples:
    """Read CIFAR-10 batches in the binary layout: a label byte, then 3072 bytes of R, G and B planes.

    Args:
        paths: the batches in order, plain or compressed (``.gz``, ``.xz``).
        names: a text file with the name of one class per line, or None for the official ten.

    Returns:
        The examples of all batches, in order.

    Raises:
        ValueError: a batch is cut short or holds a label that names no class.
    """
    classes = _class_names(names.read_bytes(), names) if names is not None else CIFAR10_CLASSES
    return _join(_read_batches(paths, _binary_batch), paths, classes)


def read_cifar_pickles(paths: Sequence[Path]) -> Examples:
    """Read CIFAR-10 batches in the Python form, admitting only what an array of bytes needs.

    Args:
        paths: the batches in order.

    Returns:
        The examples of all batches, in order.

    Raises:
        ValueError: a file is no such batch, or asks for anything else than an array of bytes.
    """
    return _join(_read_batches(paths, _pickled_batch), paths, CIFAR10_CLASSES)


def read_cifar_archive(path: Path, stems: Sequence[str]) -> Examples:
    """Read CIFAR-10 batches straight from the official tar.gz of either layout.

    Args:
        path: the archive; its folders do not matter.
        stems: the batches in order, without ``.bin``: ``("data_batch_1", …)`` or ``("test_batch",)``.

    Returns:
        The examples of all batches, in order.

    Raises:
        ValueError: the archive is damaged or lacks a batch.
    """
    wanted = {*stems, *(f"{stem}.bin" for stem in stems), "batches.meta.txt"}
    found: dict[str, bytes] = {}
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:*") as archive:
                for member in track(archive, f"reading {path.name}"):
                    name = PurePosixPath(member.name).name
                    content = archive.extractfile(member) if name in wanted and member.isfile() else None
                    if content is not None:
                        found.setdefault(name, content.read())
        except _UNREADABLE as error:
            raise ValueError(f"'{path}' is not a complete tar archive ({error}). Replace the file.") from error
    suffix = ".bin" if f"{stems[0]}.bin" in found else ""
    lacking = [stem + suffix for stem in stems if stem + suffix not in found]
    if lacking:
        raise ValueError(f"'{path}' holds no {', '.join(lacking)}. Replace it by the official archive.")
    parse = _binary_batch if suffix else _pickled_batch
    places = [path / (stem + suffix) for stem in stems]
    names = found.get("batches.meta.txt")
    classes = CIFAR10_CLASSES if names is None else _class_names(names, path / "batches.meta.txt")
    batches = [parse(found[stem + suffix], place) for stem, place in zip(stems, places, strict=True)]
    return _join(batches, places, classes)


def read_class_zip(path: Path, classes: Sequence[str] | None = None) -> Examples:
    """Read a zip whose members are ``split/class/NNNN.jpg`` (or ``.png``), in order of their names.

    The images are grey where all of them are, else in colour. Hidden files and files outside the class
    folders are skipped.

    Args:
        path: the zip.
        classes: the names of the classes in the order of their labels; None for the sorted names of the zip.

    Returns:
        The examples, with their classes.

    Raises:
        ValueError: the zip or an image is damaged, the sizes differ, a class is unknown, or there is none.
    """
    with _open_zip(path) as archive:
        members = _class_members(archive, path)
        names = tuple(classes) if classes is not None else tuple(sorted(set(members.values())))
        unknown = sorted(set(members.values()) - set(names))
        if unknown:
            raise ValueError(f"'{path}' holds class {unknown[0]!r}, which is not among {', '.join(names)}.")
        ordered = sorted(members)
        images = [_decode(archive, member, path) for member in track(ordered, f"decoding {path.name}")]
    for member, image in zip(ordered, images, strict=True):
        if image.shape[1:] != images[0].shape[1:]:
            raise ValueError(
                f"Image '{member}' in '{path}' is {_size(image)} where '{ordered[0]}' is {_size(images[0])}. "
                f"Bring all images to one size."
            )
    channels = max(len(image) for image in images)
    stacked = np.empty((len(images), channels, *images[0].shape[1:]), dtype=np.uint8)
    for row, image in zip(stacked, images, strict=True):
        row[:] = image  # a grey image among coloured ones is repeated over the channels
    indices = {name: index for index, name in enumerate(names)}
    labels = np.array([indices[members[member]] for member in ordered], dtype=np.int64)
    return Examples(stacked, labels, names)


def class_folders(path: Path) -> tuple[str, ...]:
    """List the classes in a zip of class folders, sorted by name.

    Args:
        path: the zip.

    Raises:
        ValueError: the file is no zip, or holds no class folder.
    """
    with _open_zip(path) as archive:
        return tuple(sorted(set(_class_members(archive, path).values())))


def _decompress(path: Path) -> bytes:
    with path.open("rb") as file:
        try:
            if path.suffix == ".gz":
                return gzip.GzipFile(fileobj=file).read()
            if path.suffix == ".xz":
                return lzma.LZMAFile(file).read()
        except _UNREADABLE as error:
            raise ValueError(
                f"'{path}' is not a complete {path.suffix[1:]} file ({error}). Replace the file."
            ) from error
        return file.read()


def _class_names(text: bytes, path: Path) -> tuple[str, ...]:
    names = tuple(line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip())
    if not names:
        raise ValueError(f"'{path}' names no class. Write one name per line, or remove the file.")
    return names


def _read_batches(paths: Sequence[Path], parse: Callable[[bytes, Path], _Batch]) -> list[_Batch]:
    if not paths:
        raise ValueError("paths is empty. Pass at least one batch.")
    with ThreadPoolExecutor() as pool:  # decompression, which is all the time it takes, leaves Python free
        raws = track(pool.map(_decompress, paths), "reading CIFAR-10", total=len(paths))
        return [parse(raw, path) for raw, path in zip(raws, paths, strict=True)]


def _binary_batch(raw: bytes, path: Path) -> _Batch:
    if not raw or len(raw) % _CIFAR_RECORD:
        raise ValueError(
            f"'{path}' holds {len(raw)} bytes, which is not a whole number of records of {_CIFAR_RECORD}. "
            f"Replace the file."
        )
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE), records[:, 0].astype(np.int64)


def _pickled_batch(raw: bytes, path: Path) -> _Batch:
    try:
        batch = _ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
        pixels, labels = (batch.get(key, batch.get(key.decode())) for key in (b"data", b"labels"))
        images = pixels.array().reshape(-1, *_CIFAR_SHAPE)
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise ValueError("its labels are not a list of integers")
        classes = np.array(labels, dtype=np.int64)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"'{path}' is not a CIFAR-10 batch ({error}). Replace the file.") from error
    if len(classes) != len(images):
        raise ValueError(f"'{path}' holds {len(images)} images but {len(classes)} labels. Replace the file.")
    return images, classes


def _join(batches: Sequence[_Batch], paths: Sequence[Path], classes: tuple[str, ...]) -> Examples:
    for (_, labels), path in zip(batches, paths, strict=True):
        if labels.size and not 0 <= labels.min() <= labels.max() < len(classes):
            wrong = labels[(labels < 0) | (labels >= len(classes))][0]
            raise ValueError(f"'{path}' holds label {wrong}, but there are {len(classes)} classes. Replace the file.")
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return Examples(images, labels, classes)


class _PickledDtype:
    """Stands in for numpy.dtype while a pickle is read."""

    def __init__(self, code: object, *_: object) -> None:
        self.is_bytes = code in ("u1", b"u1")

    def __setstate__(self, state: object) -> None:
        """Byte order says nothing about single bytes."""


class _PickledArray:
    """Stands in for a numpy array while a pickle is read, so that numpy itself never trusts the file."""

    def __init__(self, *_: object) -> None:
        self.content: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.content = (raw, dtype, shape, "F" if is_fortran else "C")

    def array(self) -> NDArray[np.uint8]:
        raw, dtype, shape, order = self.content
        if not (isinstance(dtype, _PickledDtype) and dtype.is_bytes and isinstance(raw, bytes | bytearray)):
            raise ValueError("its array is not of unsigned bytes")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order=order)


def _latin_bytes(text: str, encoding: str) -> bytes:  # how Python 3 writes bytes in an old protocol
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


def _in_band_array(raw: bytes, dtype: object, shape: object, order: object) -> _PickledArray:
    array = _PickledArray()
    array.content = (raw, dtype, shape, order)
    return array


_ADMITTED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.numeric", "_frombuffer"): _in_band_array,
    ("numpy._core.numeric", "_frombuffer"): _in_band_array,
    ("_codecs", "encode"): _latin_bytes,
}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows arrays of bytes and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ADMITTED[module, name]


def _open_zip(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is not a file. Name a zip of class folders.")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        raise ValueError(f"'{path}' is not a complete zip file ({error}). Replace the file.") from error


def _class_members(archive: zipfile.ZipFile, path: Path) -> dict[str, str]:
    """Map every image in the zip to its class."""
    classes: dict[str, str] = {}
    splits = set()
    for member in archive.infolist():
        parts = PurePosixPath(member.filename).parts
        if ".." in parts or member.filename.startswith(("/", "\\")) or "\\" in member.filename:
            raise ValueError(f"Member {member.filename!r} of '{path}' points outside the zip. Rename it.")
        is_hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
        if member.is_dir() or is_hidden or len(parts) < 2:
            continue
        if len(parts) > 3 or PurePosixPath(parts[-1]).suffix.lower() not in (".jpg", ".jpeg", ".png"):
            raise ValueError(
                f"Member {member.filename!r} of '{path}' is not an image named split/class/NNNN.jpg or .png. "
                f"Rename or remove it."
            )
        classes[member.filename] = parts[-2]
        splits.add(parts[:-2])
    if not classes:
        raise ValueError(f"'{path}' holds no class: no image is named split/class/NNNN.jpg or .png.")
    if len(splits) > 1:
        found = ", ".join(sorted("/".join(split) or "no folder" for split in splits))
        raise ValueError(f"'{path}' mixes splits ({found}). Write one zip for each.")
    return classes


def _decode(archive: zipfile.ZipFile, member: str, path: Path) -> NDArray[np.uint8]:
    """Decode one image to (channels, h, w)."""
    try:
        with Image.open(io.BytesIO(archive.read(member)), formats=("JPEG", "PNG")) as image:
            mode = {"1": "L", "L": "L", "RGB": "RGB"}.get(image.mode)
            if mode is None:
                raise ValueError(f"its mode {image.mode} is neither grey nor RGB of 8 bits")
            pixels = np.asarray(image.convert(mode), dtype=np.uint8)
    except Exception as error:  # a damaged image can raise anything
        raise ValueError(f"Image '{member}' in '{path}' cannot be read ({error}). Replace or remove it.") from error
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"
