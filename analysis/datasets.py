"""Labelled images as plain arrays: load them by name, split them by hash, refuse overlap."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ellq.analysis.dataset_sources import CATALOGUE, PARTS, find, zip_names, zip_source

_DIGITS_TRAIN = 0.75  # share of the bundled digits that is its "train"


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images, as they are stored.

    Attributes:
        name: the data set, such as "cifar10".
        part: "train" or "test"; a partition appends its own name, as in "train/calibration".
        images: shape (n, channels, h, w), uint8, in [0, maximum].
        labels: shape (n,), int64, in [0, len(classes)).
        classes: the names of the classes, by label.
        maximum: the stored value that means 1: 255, except 16 for the bundled digits.

    Raises:
        ValueError: the arrays do not have these shapes, types or ranges.
    """

    name: str
    part: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    maximum: int = 255

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                f"images of '{self.name}' have shape {self.images.shape} and type {self.images.dtype}. "
                f"Pass uint8 of shape (n, channels, h, w)."
            )
        if self.labels.shape != (len(self.images),) or self.labels.dtype != np.int64:
            raise ValueError(
                f"labels of '{self.name}' have shape {self.labels.shape} and type {self.labels.dtype}. "
                f"Pass int64 of shape ({len(self.images)},), one for each image."
            )
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(
                f"labels of '{self.name}' lie in [{self.labels.min()}, {self.labels.max()}], but classes "
                f"names {len(self.classes)}. Pass labels in [0, {len(self.classes) - 1}]."
            )
        if not 1 <= self.maximum <= 255 or (self.images.size and self.images.max() > self.maximum):
            raise ValueError(
                f"maximum={self.maximum} of '{self.name}' is outside [1, 255] or below its largest pixel. "
                f"Pass the stored value that means 1."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "x".join(str(length) for length in self.images.shape[1:])
        return f"Dataset('{self.name}', '{self.part}', {len(self)} images {size}, {len(self.classes)} classes)"

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal over the shape, the pixels and the labels, computed at every call."""
        state = hashlib.sha256(repr((self.images.shape, self.maximum)).encode())
        state.update(np.ascontiguousarray(self.images).ravel().data)
        state.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        return state.hexdigest()

    def select(self, indices: ArrayLike) -> Dataset:
        """Take the examples at these indices, in their order.

        Args:
            indices: integers in [−n, n), or a mask of n booleans.

        Returns:
            A data set that shares no memory with this one.

        Raises:
            IndexError: an index is out of range, or these are not indices.
        """
        rows = np.asarray(indices)
        rows = rows.astype(np.int64) if rows.size == 0 and rows.dtype != np.bool_ else rows
        is_mask = rows.dtype == np.bool_ and rows.shape == (len(self),)
        is_list = rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer)
        if not (is_mask or is_list) or (
            is_list and rows.size and not -len(self) <= rows.min() <= rows.max() < len(self)
        ):
            raise IndexError(
                f"indices of shape {rows.shape} and type {rows.dtype} do not index {len(self)} examples. "
                f"Pass integers in [-{len(self)}, {len(self)}), or {len(self)} booleans."
            )
        return self._with(rows, self.part)

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> Tensor:
        """Scale the images to [0, 1], and normalise each channel where asked.

            x = (pixel / maximum − mean) / std

        Args:
            dtype: a floating type.
            mean: subtracted from each channel; one number or one per channel; None for 0.
            std: what each channel is divided by, > 0; one number or one per channel; None for 1.

        Returns:
            A tensor of shape (n, channels, h, w) on the CPU.

        Raises:
            ValueError: dtype is not floating, or mean or std does not fit the channels.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} cannot hold values in [0, 1]. Pass a floating type.")
        # Half precision is reached by one rounding at the end.
        working = dtype if dtype == torch.float64 else torch.float32
        scaled = torch.from_numpy(self.images.copy()).to(working).div_(self.maximum)
        if mean is not None:
            scaled.sub_(self._per_channel("mean", mean, working))
        if std is not None:
            divisor = self._per_channel("std", std, working)
            if not bool((divisor > 0).all()):
                raise ValueError(f"std={std} is not positive. Pass positive numbers.")
            scaled.div_(divisor)
        return scaled.to(dtype)

    def _per_channel(self, name: str, values: float | Sequence[float], dtype: torch.dtype) -> Tensor:
        row = torch.tensor(values, dtype=dtype)
        channels = self.images.shape[1]
        if (row.ndim and row.shape != (channels,)) or not bool(torch.isfinite(row).all()):
            raise ValueError(
                f"{name}={values} does not fit {channels} channels. Pass one finite number, or {channels}."
            )
        return row.reshape(-1, 1, 1)

    def _with(self, rows: NDArray[np.generic], part: str) -> Dataset:
        return Dataset(self.name, part, self.images[rows], self.labels[rows], self.classes, self.maximum)


def load(name: str, part: str = "train", *, root: str | Path | None = None, download: bool = True) -> Dataset:
    """Load one part of a data set by name.

    The files are looked for below ``root``, or else below the folder that the environment variable ELLQ_DATA
    names; then in ellq's cache; then they are downloaded into that cache and checked by SHA-256.

    The bundled digits need no file. They have no official split: an example is in "train" or "test" by a hash
    of its pixels, about 75 to 25, and keeps the values 0 to 16 that it is published with.

    Args:
        name: "digits", "mnist", "fashion-mnist", "kmnist", "cifar10", "cifar10-jpeg", or the name of a folder
            that holds ``train.zip`` and ``test.zip`` with members ``split/class/NNNN.jpg`` or ``.png``.
        part: "train" or "test".
        root: the folder to search instead of ELLQ_DATA.
        download: whether missing files may be downloaded.

    Returns:
        The part.

    Raises:
        ValueError: unknown name or part, or a file that is damaged.
        FileNotFoundError: the files are nowhere, and were not or could not be downloaded.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r} is not a part of '{name}'. Choose 'train' or 'test'.")
    if name == "digits":
        return _digits(part)
    source = CATALOGUE.get(name)
    if source is None and name in zip_names(root):
        source = zip_source(name)
    if source is None:
        names = known_names(root)
        near = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=3) or names
        raise ValueError(
            f"name={name!r} is not a known data set. Did you mean {' or '.join(repr(known) for known in near)}? "
            f"A folder of your own needs train.zip and test.zip with members split/class/NNNN.jpg or .png."
        )
    examples = find(name, source, part, root=root, download=download)()
    return Dataset(name, part, examples.images, examples.labels, examples.classes)


def known_names(root: str | Path | None = None) -> tuple[str, ...]:
    """List the names `load` knows: the catalogue, and every zipped folder below ``root`` or ELLQ_DATA."""
    return tuple(dict.fromkeys(("digits", *CATALOGUE, *zip_names(root))))


def partition(dataset: Dataset, /, **shares: float) -> dict[str, Dataset]:
    """Split a data set by a hash of each image, such as ``partition(train, fit=0.7, calibration=0.3)``.

    Where an example goes depends on its pixels and the shares alone: not on the order, not on the other examples,
    not on its label. Equal images always go together, so the parts never overlap. The sizes follow the shares
    only on average. A part can be split again: each level ("train", "train/fit", …) draws afresh.

    Args:
        dataset: what to split.
        **shares: the name and the share of each part, positive, summing to 1. Their order matters.

    Returns:
        The parts by name, in the order given, each with its examples in their original order.

    Raises:
        ValueError: a share is not positive, or they do not sum to 1.
    """
    wrong = {name: share for name, share in shares.items() if not share > 0}
    if wrong or not math.isclose(math.fsum(shares.values()), 1, rel_tol=0, abs_tol=1e-9):
        raise ValueError(f"shares {shares} sum to {math.fsum(shares.values()):g}. Pass positive shares that sum to 1.")
    draws = _draws(dataset.images, level=dataset.part.count("/") + 1)
    ends = np.cumsum(list(shares.values()))[:-1]  # the last part takes the rest: rounding loses nobody
    parts = np.searchsorted(ends, draws, side="right")
    return {
        name: dataset._with(np.flatnonzero(parts == index), f"{dataset.part}/{name}")
        for index, name in enumerate(shares)
    }


def refuse_overlap(**sets: Dataset) -> None:
    """Raise unless no image is in two of these sets, such as ``refuse_overlap(calibration=a, certification=b)``.

    Args:
        **sets: two or more data sets, by the names the message will use. Labels are ignored.

    Raises:
        ValueError: two sets share an image, or fewer than two sets were given.
    """
    if len(sets) < 2:
        raise ValueError(f"sets holds {len(sets)}; only two or more can overlap. Pass each set by name.")
    seen = {name: set(_hashes(dataset.images, level=0)) for name, dataset in sets.items()}
    names = list(seen)
    for index, second in enumerate(names):
        for first in names[:index]:
            shared = len(seen[first] & seen[second])
            if shared:
                raise ValueError(
                    f"Sets '{first}' and '{second}' share {shared} {'example' if shared == 1 else 'examples'}. "
                    f"Take both from one partition(...), or drop the shared examples from either."
                )


def _hashes(images: NDArray[np.uint8], *, level: int) -> list[bytes]:
    """Hash the bytes of every image to 16 bytes; each level is a hash function of its own."""
    rows = np.ascontiguousarray(images).reshape(len(images), math.prod(images.shape[1:]))
    salt = level.to_bytes(16, "little")
    return [hashlib.blake2b(row.data, digest_size=16, salt=salt).digest() for row in rows]


def _draws(images: NDArray[np.uint8], *, level: int) -> NDArray[np.float64]:
    """Turn every image into a number in [0, 1), uniform over images."""
    words = np.frombuffer(b"".join(_hashes(images, level=level)), dtype="<u8").reshape(-1, 2)
    return (words[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _digits(part: str) -> Dataset:
    from sklearn.datasets import load_digits  # takes a second to import

    bundled = load_digits()
    images = bundled.images.astype(np.uint8)[:, np.newaxis]
    is_train = _draws(images, level=0) < _DIGITS_TRAIN
    chosen = is_train if part == "train" else ~is_train
    labels = bundled.target.astype(np.int64)
    classes = tuple(str(digit) for digit in bundled.target_names)
    return Dataset("digits", part, images[chosen], labels[chosen], classes, maximum=16)
