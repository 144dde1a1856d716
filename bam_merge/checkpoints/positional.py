"""Positional reads: the one place that knows of short reads, of files that end too early, and of systems without preadv."""

import os
from collections.abc import Iterable

MOST = 2**30
"""Bytes that are asked for in one call: Linux gives 2 GiB at most, macOS refuses more."""


THROUGH = 2**20
"""Bytes that are read at a time where they come by way of an object of their own."""


class FileEnds(EOFError):
    """A file ends at byte `at`, and more was to be read."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


def fill(descriptor: int, runs: Iterable[tuple[int, int]], view: memoryview, base: int = 0) -> None:
    """Fill `view` with runs (first byte after `base`, count) of a file, one after the other.

    Raises FileEnds where the file is too short, OSError where it cannot be read: who calls knows what to say of it.
    """
    read = _preadv if hasattr(os, "preadv") else _pread
    position = 0
    for first, count in runs:
        shift, end = base + first - position, position + count
        while position < end:
            got = read(descriptor, view[position : min(end, position + MOST)], shift + position)
            if not got:
                raise FileEnds(shift + position)
            position += got
    assert position == len(view), "the runs are as long as the view"


def beginning(descriptor: int, most: int) -> bytes:
    """The first bytes of a file: so many, or as many as it has. Raises OSError where they cannot be read."""
    data = bytearray(most)
    try:
        fill(descriptor, [(0, most)], memoryview(data))
    except FileEnds as end:
        return bytes(data[: end.at])
    return bytes(data)


def _preadv(descriptor: int, view: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [view], offset)


def _pread(descriptor: int, view: memoryview, offset: int) -> int:
    """The same for a system that reads only into memory of its own, which is kept small."""
    data = os.pread(descriptor, min(len(view), THROUGH), offset)
    view[: len(data)] = data
    return len(data)
