"""A progress bar for anything that lasts: it appears on stderr after two seconds and leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

_PATIENCE = 2.0  # seconds before a bar is worth showing


def track(items: Iterable[Item], description: str, *, total: int | None = None) -> Iterator[Item]:
    """Yield the items, showing a bar with the time left once two seconds have passed.

    Nothing is shown when stderr is not a terminal. Closing the iterator early removes the bar.

    Args:
        items: what to iterate over.
        description: what is being done, shown before the bar.
        total: the number of items, where ``items`` has no length of its own.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    began = time.monotonic()
    task = bar.add_task(description, total=total)
    shown = False
    try:
        for done, item in enumerate(items):
            if not shown and time.monotonic() - began > _PATIENCE and bar.console.is_terminal:
                bar.start()
                shown = True
            bar.update(task, completed=done)
            yield item
    finally:
        if shown:
            bar.stop()
