"""Threads: how many to start, and the memory that each has for itself."""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bam_merge.system import available_processors

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def by_size(items: Sequence[K], work: Callable[[K], T], size: Callable[[K], int], workers: int | None) -> list[T]:
    """What `work` makes of every item, in their order; threads begin with the largest."""
    largest_first = sorted(items, key=size, reverse=True)
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        found = dict(zip(largest_first, pool.map(work, largest_first), strict=True))
    return [found[item] for item in items]


MOST_WORKERS = 8
"""Threads that are started unless a user asks for more: more only compete for the disk."""


def default_workers() -> int:
    """As many workers as this process may use processors, at most MOST_WORKERS."""
    return min(MOST_WORKERS, available_processors())


_of_thread = threading.local()


def scratch(sizes: Sequence[int]) -> list[memoryview]:
    """Memory of this thread's, one piece per size in bytes; a later call gives out the same memory again."""
    kept: list[bytearray] = _of_thread.__dict__.setdefault("kept", [])
    for index, size in enumerate(sizes):
        if index == len(kept):
            kept.append(bytearray(size))
        elif len(kept[index]) < size:
            kept[index] = bytearray(size)
    return [memoryview(block)[:size] for block, size in zip(kept, sizes, strict=False)]
