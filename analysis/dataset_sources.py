"""Where data sets lie on this machine, and where the official files are downloaded from."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import pooch

from ellq.analysis.dataset_files import (
    Examples,
    class_folders,
    read_cifar_archive,
    read_cifar_binary,
    read_cifar_pickles,
    read_class_zip,
    read_idx_pair,
)
from ellq.analysis.progress import track

PARTS = ("train", "test")

Reader = Callable[[], Examples]
"""Reads one part of a data set whose files have been found."""


@dataclass(frozen=True)
class Remote:
    """One official file: its name in the cache, its SHA-256, and the addresses that serve it."""

    file: str
    sha256: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """How one data set is found, read and downloaded.

    Attributes:
        find: looks for a part in one folder; a reader, or None where the files are not there.
        folders: the folders tried below every root, in order; the first is also its name in the cache.
        expected: the files a part consists of, as a sentence may name them.
        remotes: the files to download for each part; empty where there is no public address.
    """

    find: Callable[[Path, str], Reader | None]
    folders: tuple[str, ...]
    expected: Mapping[str, str]
    remotes: Mapping[str, tuple[Remote, ...]] = field(default_factory=dict)


def search_roots(root: str | Path | None = None) -> tuple[Path, ...]:
    """List the folders that may hold data sets, in the order they are searched.

    Args:
        root: a folder to search first; None for the one that the environment variable ELLQ_DATA names.

    Returns:
        The folder given or named, if any, and then ellq's cache.

    Raises:
        FileNotFoundError: the folder given, or the one ELLQ_DATA names, does not exist.
    """
    named = root if root is not None else os.environ.get("ELLQ_DATA") or None
    if named is None:
        return (cache_folder(),)
    folder = Path(named).expanduser()
    if not folder.is_dir():
        argument = "root" if root is not None else "ELLQ_DATA"
        raise FileNotFoundError(f"{argument}='{named}' is not a folder. Name the folder that holds the data sets.")
    return (folder, cache_folder())


def cache_folder() -> Path:
    """Name the folder that downloads go to; it need not exist."""
    return Path(pooch.os_cache("ellq"))


def zip_source(name: str) -> Source:
    """Describe a data set given as ``name/train.zip`` and ``name/test.zip`` of class folders."""
    return Source(find=_find_zip, folders=(name,), expected={part: f"{part}.zip" for part in PARTS})


def zip_names(root: str | Path | None = None) -> tuple[str, ...]:
    """List the folders below the search roots that hold a ``train.zip`` or a ``test.zip``, sorted."""
    zips = (path for folder in search_roots(root) for part in PARTS for path in folder.glob(f"*/{part}.zip"))
    return tuple(sorted({path.parent.name for path in zips}))


def find(name: str, source: Source, part: str, *, root: str | Path | None = None, download: bool) -> Reader:
    """Find one part of a data set, downloading it where allowed and needed.

    Args:
        name: the data set, for messages.
        source: how it is found.
        part: "train" or "test".
        root: the folder to search first; see `search_roots`.
        download: whether the official files may be downloaded into the cache.

    Returns:
        A function that reads the part.

    Raises:
        FileNotFoundError: it is nowhere, and was not or could not be downloaded.
        ValueError: every address that answered served a file with the wrong SHA-256.
    """
    roots = search_roots(root)
    places = [folder / below for folder in roots for below in source.folders]
    for place in places:
        reader = source.find(place, part)
        if reader is not None:
            return reader
    remotes = source.remotes.get(part, ())
    failures, alternative = "", ""
    if remotes and download:
        reader, failures = _download(source, part, remotes)
        if reader is not None:
            return reader
    elif remotes:
        alternative = ", or pass download=True"
    raise FileNotFoundError(
        f"Data set '{name}', part '{part}', is in none of {', '.join(str(place) for place in places)}: "
        f"each was searched for {source.expected[part]}. {failures}"
        f"Set ELLQ_DATA to the folder that holds '{source.folders[0]}'{alternative}."
    )


def _download(source: Source, part: str, remotes: tuple[Remote, ...]) -> tuple[Reader | None, str]:
    """Fetch the files into the cache; a reader, or None and a sentence on what failed."""
    folder = cache_folder() / source.folders[0]
    for remote in remotes:
        failures: list[Exception] = []
        for url in remote.urls:
            try:
                pooch.get_logger().setLevel("WARNING")  # our own messages say what is fetched
                pooch.retrieve(url, f"sha256:{remote.sha256}", fname=remote.file, path=folder, downloader=_fetch)
                break
            except (OSError, ValueError, HTTPException) as error:
                failures.append(error)
        else:
            told = "; ".join(f"{url}: {error}" for url, error in zip(remote.urls, failures, strict=True))
            if any(isinstance(error, ValueError) for error in failures):
                raise ValueError(
                    f"'{remote.file}' was downloaded with the wrong SHA-256 and discarded ({told}). "
                    f"Try again later, or place the official file in '{folder}'."
                ) from failures[-1]
            return None, f"The download of '{remote.file}' failed ({told}). "
    reader = source.find(folder, part)
    assert reader is not None, "what was downloaded is what is looked for"
    return reader, ""


def _fetch(url: str, output: str | Path, _: object) -> None:
    """Stream one address into a file behind a progress bar, as pooch asks of a downloader."""
    request = urllib.request.Request(url, headers={"User-Agent": "ellq"})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except HTTPError as error:
        error.close()  # it holds the connection
        raise
    with answer, Path(output).open("wb") as file:
        size, piece = int(answer.headers.get("Content-Length", 0)), 1 << 16
        pieces = iter(partial(answer.read, piece), b"")
        for content in track(pieces, f"downloading {url}", total=-(-size // piece) or None):
            file.write(content)


def _present(folder: Path, name: str, *suffixes: str) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)


def _all_present(folder: Path, names: tuple[str, ...], *suffixes: str) -> list[Path] | None:
    paths = [_present(folder, name, *suffixes) for name in names]
    return [path for path in paths if path is not None] if None not in paths else None


_IDX_STEMS = {"train": "train", "test": "t10k"}
_IDX_FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "kmnist": "KMNIST/raw"}


def _find_idx(classes: tuple[str, ...], folder: Path, part: str) -> Reader | None:
    stem = _IDX_STEMS[part]
    paths = _all_present(folder, (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"), "", ".gz")
    return partial(read_idx_pair, paths[0], paths[1], classes) if paths is not None else None


_CIFAR_STEMS = {"train": tuple(f"data_batch_{batch}" for batch in range(1, 6)), "test": ("test_batch",)}


def _find_cifar(folder: Path, part: str) -> Reader | None:
    stems = _CIFAR_STEMS[part]
    binary = _all_present(folder, tuple(f"{stem}.bin" for stem in stems), "", ".gz", ".xz")
    if binary is not None:
        return partial(read_cifar_binary, binary, _present(folder, "batches.meta", ".txt"))
    pickles = _all_present(folder, stems, "")
    if pickles is not None:
        return partial(read_cifar_pickles, pickles)
    archive = _present(folder, "cifar-10-", "binary.tar.gz", "python.tar.gz")
    return partial(read_cifar_archive, archive, stems) if archive is not None else None


def _find_zip(folder: Path, part: str) -> Reader | None:
    path = _present(folder, part, ".zip")
    if path is None:
        return None

    def read() -> Examples:
        # Both zips name the classes: a class absent from one part must not shift the labels of the other.
        zips = [zipped for zipped in (folder / f"{each}.zip" for each in PARTS) if zipped.is_file()]
        return read_class_zip(path, sorted({name for zipped in zips for name in class_folders(zipped)}))

    return read


def _idx_source(
    name: str, classes: tuple[str, ...], hashes: Mapping[str, tuple[str, str]], bases: tuple[str, ...]
) -> Source:
    """Describe a relative of MNIST by its classes, the SHA-256 of (images, labels) per part, and its mirrors."""
    files = {
        part: tuple(f"{stem}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        for part, stem in _IDX_STEMS.items()
    }
    remotes = {
        part: tuple(
            Remote(file, sha256, tuple(base + file for base in bases))
            for file, sha256 in zip(files[part], hashes[part], strict=True)
        )
        for part in PARTS
    }
    expected = {part: " and ".join(files[part]) + " (or without .gz)" for part in PARTS}
    return Source(partial(_find_idx, classes), (name, _IDX_FOLDERS[name]), expected, remotes)


_CIFAR10_BINARY = Remote(
    "cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://cave.cs.toronto.edu/kriz/cifar-10-binary.tar.gz",
    ),
)

CATALOGUE: Mapping[str, Source] = {
    "mnist": _idx_source(
        "mnist",
        tuple("0123456789"),
        {
            "train": (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            "test": (
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        },
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
    ),
    "fashion-mnist": _idx_source(
        "fashion-mnist",
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        {
            "train": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            "test": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        },
        (
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
    ),
    "kmnist": _idx_source(
        "kmnist",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        {
            "train": (
                "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
                "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            ),
            "test": (
                "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
                "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
            ),
        },
        (
            "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ),
    ),
    "cifar10": Source(
        find=_find_cifar,
        folders=(
            *("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"),
            *("cifar10/cifar-10-batches-bin", "cifar10/cifar-10-batches-py", "."),
        ),
        expected={
            "train": "data_batch_1.bin to data_batch_5.bin (or .bin.gz, .bin.xz), the Python form data_batch_1 to "
            "data_batch_5, cifar-10-binary.tar.gz or cifar-10-python.tar.gz",
            "test": "test_batch.bin (or .bin.gz, .bin.xz), the Python form test_batch, cifar-10-binary.tar.gz or "
            "cifar-10-python.tar.gz",
        },
        remotes=dict.fromkeys(PARTS, (_CIFAR10_BINARY,)),
    ),
    "cifar10-jpeg": zip_source("cifar10-jpeg"),
}
