"""Writing that happens wholly or not at all: a reader never sees half a file or half a folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all.

    Args:
        path: the file; missing folders above it are created, an existing file is replaced.
        text: its content, line ends kept as they are.

    Returns:
        The path that was written.

    Raises:
        OSError: the place cannot be written (PermissionError, NotADirectoryError, IsADirectoryError, …).
    """
    return write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file, whole or not at all: under a temporary name in the same folder, then renamed.

    Links are followed. What is no regular file (a pipe, ``/dev/stdout``) is written to directly.

    Args:
        path: the file; missing folders above it are created, an existing file is replaced.
        content: its bytes.

    Returns:
        The path that was written.

    Raises:
        OSError: the place cannot be written (PermissionError, NotADirectoryError, IsADirectoryError, …).
    """
    named, target = Path(path), Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{named} is a folder. Name a file inside it.")
    temporary = _temporary_sibling(target)
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return named
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(named, error) from error
        raise
    return named


@contextmanager
def new_folder(path: str | os.PathLike[str], *, replaces: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends, and vanishes if the block fails.

    The place is checked before the block starts, so that hours of work do not end at a read-only disk. An
    existing folder is moved aside just before the rename and removed after it.

    Args:
        path: the folder to make; missing folders above it are created.
        replaces: names that an existing folder may hold, which are then replaced all together.

    Yields:
        The temporary folder, beside ``path``; write everything into it.

    Raises:
        FileExistsError: ``path`` is a file, or holds a name that is not in ``replaces``.
        OSError: the place cannot be written (PermissionError, NotADirectoryError, …), or ``path`` cannot be
            replaced as a whole, being a mount point or the current folder.
    """
    named, target = Path(path), Path(os.path.realpath(path))
    _refuse_foreign(named, target, replaces)
    temporary = _temporary_sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise _cannot_write(named, error) from error
    try:
        yield temporary
        _refuse_foreign(named, target, replaces)
        _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; what was there is removed only once the new folder stands."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = _temporary_sibling(target)
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_foreign(named: Path, target: Path, replaces: Collection[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{named} is a file, not a folder. Choose another folder.")
    foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in replaces)
    if foreign:
        raise FileExistsError(
            f"{named} holds {foreign[0]!r}, which is not ours to replace"
            f" ({len(foreign)} such entries). Choose another folder."
        )
    if target.is_mount() or target == Path(os.path.realpath(os.curdir)):
        raise OSError(
            f"{named} is a mount point or the current folder and cannot be replaced. Choose a folder inside it."
        )


def _temporary_sibling(target: Path) -> Path:
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")


def _cannot_write(named: Path, error: OSError) -> OSError:
    """Return an error of the same type whose text is one sentence naming the path."""
    reason = (error.strerror or str(error)).lower()
    # mkdir says "file exists" where a regular file stands in place of a folder
    kind = NotADirectoryError if isinstance(error, FileExistsError) else type(error)
    return kind(f"{named} cannot be written: {reason}. Choose a place that can.")


def json_text(content: Any, path: str | os.PathLike[str] | None = None) -> str:
    """Return content as JSON, and write it to a path if one is given, whole or not at all."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    if path is not None:
        write_text(path, text)
    return text
