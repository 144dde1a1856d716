"""Files elsewhere: how pieces of them are brought together in few requests, with bounded memory; and whether they are what they were."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bam_merge.checkpoints.file_afar import FileAfar
from bam_merge.checkpoints.header import FileIdentity
from bam_merge.errors import CheckpointError
from bam_merge.text import printable

BLOCK = 2**22
"""Bytes that a merge asks for at a time: a few MB take longer to come than to be asked for."""


HELD = 16 * BLOCK
"""Bytes of blocks that a worker keeps, for operands are read by turns."""


IN_FLIGHT = 2 * BLOCK
"""Bytes of a block while it comes: its pieces, and what is made of them."""


GAP = 2**16
"""Bytes between two runs that are rather read with them than left out by another request."""


TIME = "changed at "
"""What an etag begins with that is only the time of a file's last change: such ones do not go into records."""


AT_ONCE = 8
"""Files that are asked for their state at the same time."""


def fetch(file: FileAfar, runs: Iterable[tuple[int, int]], view: memoryview, base: int = 0) -> None:
    """Fill `view` with runs (first byte after `base`, count), one after the other. Those that lie close together come in one request."""
    done = 0
    together: list[tuple[int, int]] = []

    def bring() -> None:
        nonlocal done
        first = together[0][0]
        data = file.read(base + first, together[-1][0] + together[-1][1] - first)
        for start, count in together:
            view[done : done + count] = data[start - first : start - first + count]
            done += count
        together.clear()

    for first, count in _no_longer_than(BLOCK, runs):
        if together:
            end = sum(together[-1])
            if not (end <= first <= end + GAP and first + count - together[0][0] <= BLOCK):
                bring()
        together.append((first, count))
    if together:
        bring()
    assert done == len(view), "the runs are as long as the view"


def _no_longer_than(most: int, runs: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    for first, count in runs:
        for start in range(first, first + count, most):
            yield start, min(most, first + count - start)


class Blocks:
    """Pieces of tensors elsewhere as one worker of a merge reads them: by blocks, of which the last ones are kept."""

    def __init__(self, operands: int) -> None:
        """`operands`: how many tensors may be read by turns."""
        self.block = max(GAP, min(BLOCK, HELD // max(1, 2 * operands)))
        self.held: OrderedDict[Hashable, bytes] = OrderedDict()
        self.nbytes = 0

    def fill(self, file: FileAfar, span: tuple[int, int], runs: Iterable[tuple[int, int]], view: memoryview) -> None:
        """Fill `view` with runs (first byte, count) of what is in the file's `span` (first byte, count)."""
        done = 0
        for first, count in runs:
            end = first + count
            while first < end:
                number = first // self.block
                start = number * self.block
                data = self._block(file, span, number)
                piece = data[first - start : end - start]
                view[done : done + len(piece)] = piece
                done, first = done + len(piece), first + len(piece)
        assert done == len(view), "the runs are as long as the view"

    def _block(self, file: FileAfar, span: tuple[int, int], number: int) -> bytes:
        key = id(file), span[0], number
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        start = number * self.block
        length = min(self.block, span[1] - start)
        while self.held and self.nbytes + length > HELD:
            self.nbytes -= len(self.held.popitem(last=False)[1])
        data = self.held[key] = file.read(span[0] + start, length)
        self.nbytes += length
        return data


@dataclass
class Kept:
    """Blocks of files that are read again and again, for any number of threads: the last ones that were asked for."""

    held: OrderedDict[Hashable, bytes] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, files: Mapping[str, FileAfar]) -> "dict[str, FileAfar]":
        """The same files, read through what is kept."""
        return {name: _KeptFile(file, self) for name, file in files.items()}

    def block(self, file: FileAfar, number: int) -> bytes:
        key = file.name, number
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        size = file.size_found
        data = file.read(number * BLOCK, min(BLOCK, size - number * BLOCK))
        with self.lock:
            self.held[key] = data
            while len(self.held) > HELD // BLOCK:
                self.held.popitem(last=False)
        return data


@dataclass(frozen=True)
class _KeptFile:
    file: FileAfar
    kept: Kept

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size_found(self) -> int:
        return self.file.size_found

    def size(self) -> int:
        return self.file.size()

    def etag(self) -> str:
        return self.file.etag()

    def read(self, offset: int, length: int) -> bytes:
        if length > BLOCK or offset + length > self.size_found:
            return self.file.read(offset, length)
        first, last = offset // BLOCK, (offset + max(length, 1) - 1) // BLOCK
        data = b"".join(self.kept.block(self.file, number) for number in range(first, last + 1))
        return data[offset - first * BLOCK : offset - first * BLOCK + length]


def changed_afar(name: str, found: FileIdentity, expected: FileIdentity) -> str:
    """The message about a file elsewhere that is not in the state that was planned with."""
    return f"{printable(name)} changed: found {_state(found)}, expected {_state(expected)}. Run again when nothing writes to it."


def _state(of: FileIdentity) -> str:
    if of.etag.startswith(TIME):
        return f"{of.size:,} bytes, {printable(of.etag, 100)}"
    return f"{of.size:,} bytes" + (f" and etag {printable(of.etag, 100)}" if of.etag else "")


def changes_afar(files: Mapping[str, FileAfar], identities: Mapping[str, FileIdentity]) -> list[tuple[str, str]]:
    """(file, message) of the files that are not what they were, or of which that cannot be seen."""

    def look(name: str) -> str:
        file = files[name]
        try:
            now = FileIdentity(file.size(), 0, 0, file.etag())
        except CheckpointError as error:
            return error.problems[0]
        return "" if now == identities[name] else changed_afar(file.name, now, identities[name])

    names = [name for name in identities if name in files]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [(name, problem) for name, problem in zip(names, pool.map(look, names), strict=True) if problem]
