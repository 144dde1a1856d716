"""Reading stored tensors: pieces of files that are still the ones that were opened."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import xxhash

from bam_merge.checkpoints.afar import BLOCK, Blocks, changes_afar, fetch
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import FileIdentity, TensorEntry, open_regular
from bam_merge.checkpoints.pieces import Joined, Leaf, Read, byte_runs, in_tensors, numel, stored
from bam_merge.checkpoints.positional import FileEnds, fill
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.text import printable

COPY_BUFFER = 2**20
"""Bytes that a worker's plain copy holds at a time."""


OPEN_FILES = 8
"""Source files that one worker keeps open."""


class SourceFiles:
    """The source files as one worker reads them: positional reads, few open at a time, each checked to be the planned one; of files
    elsewhere, by blocks."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        self.checkpoints = checkpoints
        self.open: OrderedDict[tuple[str, str], int] = OrderedDict()
        self.blocks = Blocks(len(checkpoints))

    def __enter__(self) -> "SourceFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def entry(self, read: Read) -> TensorEntry:
        return self.checkpoints[read.source].tensors[read.tensor]

    def descriptor(self, read: Read) -> int:
        key = read.source, self.entry(read).file
        if key in self.open:
            self.open.move_to_end(key)
            return self.open[key]
        checkpoint = self.checkpoints[read.source]
        path = checkpoint.path / key[1]
        descriptor = open_regular(str(path))
        if FileIdentity.of(os.fstat(descriptor)) != checkpoint.files[key[1]].identity:
            os.close(descriptor)
            raise CheckpointError(changed(read.source, path))
        if len(self.open) >= OPEN_FILES:
            os.close(self.open.popitem(last=False)[1])
        self.open[key] = descriptor
        return descriptor

    def read(self, read: Read, runs: Iterable[tuple[int, int]], view: memoryview) -> None:
        """Fill `view` with the runs (first byte in the tensor, count) of a stored tensor, one after the other."""
        entry, afar = self.entry(read), self.checkpoints[read.source].afar
        if afar is not None:
            with of_source(read.source):
                self.blocks.fill(afar[entry.file], (entry.offset, entry.nbytes), runs, view)
            return
        descriptor = self.descriptor(read)
        try:
            fill(descriptor, runs, view, entry.offset)
        except FileEnds:
            raise CheckpointError(changed(read.source, self._path(read))) from None
        except OSError as error:
            where = f"sources.{read.source}: {printable(str(self._path(read)))}"
            raise CheckpointError(f"{where}: reading {read.tensor}: {error.strerror}.") from error

    def _path(self, read: Read) -> Path:
        return self.checkpoints[read.source].path / self.entry(read).file


def changed(source: str, path: Path) -> str:
    """The message about a source file that is not what it was."""
    return f"sources.{source}: {printable(str(path))} changed while it was being merged. Run again when nothing writes to it."


@contextmanager
def of_source(source: str) -> Iterator[None]:
    """Says of a problem inside which source it is of."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(*(f"sources.{source}: {problem}" for problem in error.problems)) from None


def check_unchanged(checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise CheckpointError if a source file is no longer the one that was planned with."""
    problems = []
    for name, checkpoint in checkpoints.items():
        if checkpoint.afar is None:
            problems += [changed(name, path) for path in changed_files(checkpoint)]
        else:
            problems += [f"sources.{name}: {problem}" for _, problem in changes_afar(checkpoint.afar, checkpoint.identities)]
    if problems:
        raise CheckpointError(*problems)


def changed_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The weight files that are no longer those that were opened."""
    if checkpoint.afar is not None:
        yield from (checkpoint.path / file for file, _ in changes_afar(checkpoint.afar, checkpoint.identities))
        return
    for file, identity in checkpoint.identities.items():
        path = checkpoint.path / file
        try:
            same = FileIdentity.of(os.stat(path)) == identity
        except OSError:
            same = False
        if not same:
            yield path


def read_runs(checkpoint: Checkpoint, entry: TensorEntry, runs: Iterable[tuple[int, int]], view: memoryview) -> None:
    """Fill `view` with the runs (first byte in the tensor, count) of a stored tensor, one after the other.

    Raises CheckpointError when the file cannot be read, or is no longer the one that was opened.
    """
    if checkpoint.afar is not None:
        fetch(checkpoint.afar[entry.file], runs, view, entry.offset)
        return
    path = os.path.join(checkpoint.path, entry.file)
    descriptor = open_regular(path)
    try:
        if FileIdentity.of(os.fstat(descriptor)) != checkpoint.files[entry.file].identity:
            raise _reopen(path)
        fill(descriptor, runs, view, entry.offset)
    except FileEnds:
        raise _reopen(path) from None
    except OSError as error:
        raise CheckpointError(f"{printable(path)}: reading {printable(entry.name)}: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def read_piece(checkpoint: Checkpoint, leaf: Leaf, view: memoryview, start: int = 0, stop: int | None = None) -> None:
    """Fill `view` with the bytes of elements [start, stop) of a stored piece, to its end if no `stop` is given.

    Raises CheckpointError when the file cannot be read, or is no longer the one that was opened.
    """
    if isinstance(leaf, Joined):
        done = 0
        for read, byte, count in in_tensors(leaf, start, numel(leaf) if stop is None else stop):
            read_runs(checkpoint, checkpoint.tensors[read.tensor], [(byte, count)], view[done : done + count])
            done += count
        return
    runs = byte_runs(leaf, start, numel(leaf) if stop is None else stop)
    read_runs(checkpoint, checkpoint.tensors[stored(leaf).tensor], runs, view)


def blocks(checkpoint: Checkpoint, entry: TensorEntry, view: memoryview) -> Iterator[memoryview]:
    """The bytes of a whole stored tensor in order, as many at a time as `view` holds, in which they are. Raises as read_runs does."""
    for first in range(0, entry.nbytes, max(1, len(view))):
        piece = view[: entry.nbytes - first]
        read_runs(checkpoint, entry, [(first, len(piece))], piece)
        yield piece


def _reopen(path: str) -> CheckpointError:
    return CheckpointError(f"{printable(path)} changed since it was opened. Open it again when nothing writes to it.")


def digest_tensor(checkpoint: Checkpoint, entry: TensorEntry) -> str:
    """XXH3-128 of a stored tensor. Raises BamMergeError when it cannot be read."""
    if checkpoint.afar is None:
        return digest_range(checkpoint.path / entry.file, entry.offset, entry.nbytes)
    digest = xxhash.xxh3_128()
    for piece in blocks(checkpoint, entry, memoryview(bytearray(min(BLOCK, max(1, entry.nbytes))))):
        digest.update(piece)
    return digest.hexdigest()


def digest_range(path: Path, offset: int, nbytes: int, folder: int | None = None) -> str:
    """XXH3-128 of `nbytes` bytes of the file from `offset`. Raises BamMergeError when they are not there.

    With the descriptor of its folder the file is opened in that one, and not through a link.
    """

    digest = xxhash.xxh3_128()
    view = memoryview(bytearray(min(COPY_BUFFER, max(1, nbytes))))
    try:
        if folder is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            for position in range(0, nbytes, len(view)):
                piece = view[: nbytes - position]
                fill(descriptor, [(position, len(piece))], piece, offset)
                digest.update(piece)
        finally:
            os.close(descriptor)
    except FileEnds as end:
        raise BamMergeError(f"{printable(str(path))}: ends at byte {end.at}, expected {offset + nbytes}.") from None
    except OSError as error:
        raise BamMergeError(f"{printable(str(path))}: {error.strerror}.") from error
    return digest.hexdigest()
