"""Threads that each run torch alone: many small operations side by side, without waiting for one another."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4  # items handed out per thread before a result is waited for

_lock = threading.Lock()
_pools = 0
_before = 1


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 0) -> Iterator[Result]:
    """Yield ``function(item)`` for every item, in order, computed by several threads.

    Inside, torch uses one thread an operation: splitting each small operation over all processors costs more than it
    saves, above all when they are busy with other work. Few items are taken ahead of the results. The first
    exception is raised where its result would come.

    Args:
        function: what to compute; it may call torch and NumPy, which let other threads run meanwhile.
        items: what to compute it of.
        threads: how many; 0 for as many as torch uses.
    """
    import torch

    count = threads or torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with _restored_threads(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= _AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _restored_threads() -> Iterator[None]:
    """Undo at the end what ``set_num_threads`` in a thread changes for threads yet to come."""
    import torch

    global _pools, _before
    with _lock:
        if _pools == 0:
            _before = torch.get_num_threads()
        _pools += 1
    try:
        yield
    finally:
        with _lock:
            _pools -= 1
            if _pools == 0:
                torch.set_num_threads(_before)
