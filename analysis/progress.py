"""A progress bar for anything that lasts: it appears on stderr after two seconds and leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

_PATIENCE = 2.0  # seconds before a bar is worth showing
_shown: list[Progress] = []  # the one bar on the screen, if any; bars inside it stay silent


def track(
    items: Iterable[Item],
    description: str,
    *,
    total: int | None = None,
    describe: Callable[[Item], str] | None = None,
    patience: float = _PATIENCE,
) -> Iterator[Item]:
    """Yield the items, showing a bar with the time left once two seconds have passed.

    Nothing is shown when stderr is not a terminal, or while another bar is. Closing the iterator early removes the bar.

    Args:
        items: what to iterate over.
        description: what is being done, shown before the bar.
        total: the number of items, where ``items`` has no length of its own.
        describe: says what is being done with an item, in place of ``description``.
        patience: seconds to wait before a bar is shown.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    began = time.monotonic()
    task = bar.add_task(description, total=total)
    try:
        for done, item in enumerate(items):
            late = time.monotonic() - began >= patience
            if late and not _shown and bar.console.is_terminal:
                _shown.append(bar)
                bar.start()
            bar.update(task, completed=done, description=describe(item) if describe else description)
            yield item
    finally:
        if bar in _shown:
            _shown.remove(bar)
            bar.stop()
