"""Reading the sources: positional reads of planned files, and where in them an expression's elements are."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from bam_merge import ops
from bam_merge.checkpoint import Checkpoint
from bam_merge.errors import BamMergeError, CheckpointError, printable
from bam_merge.safetensors_header import FileIdentity, TensorEntry, open_regular

if TYPE_CHECKING:  # who only reads two models needs no recipe, whose library is a third of the start-up
    from bam_merge.plan import Plan

OPEN_FILES = 8
"""Source files that one worker keeps open."""


def available_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SourceFiles:
    """The source files as one worker reads them: positional reads, few open at a time, each checked to be the planned one."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan
        self.open: OrderedDict[tuple[str, str], int] = OrderedDict()

    def __enter__(self) -> "SourceFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def entry(self, read: ops.Read) -> TensorEntry:
        return self.plan.models[read.source].checkpoint.tensors[read.tensor]

    def descriptor(self, read: ops.Read) -> int:
        key = read.source, self.entry(read).file
        if key in self.open:
            self.open.move_to_end(key)
            return self.open[key]
        checkpoint = self.plan.models[read.source].checkpoint
        path = checkpoint.path / key[1]
        descriptor = open_regular(str(path))
        if FileIdentity.of(os.fstat(descriptor)) != checkpoint.files[key[1]].identity:
            os.close(descriptor)
            raise CheckpointError(changed(read.source, path))
        if len(self.open) >= OPEN_FILES:
            os.close(self.open.popitem(last=False)[1])
        self.open[key] = descriptor
        return descriptor

    def read_into(self, read: ops.Read, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` bytes into the tensor."""
        descriptor, start = self.descriptor(read), self.entry(read).offset + offset
        path = self.plan.models[read.source].checkpoint.path / self.entry(read).file
        position = 0
        while position < len(view):
            try:
                count = os.preadv(descriptor, [view[position:]], start + position)
            except OSError as error:
                raise CheckpointError(f"sources.{read.source}: {printable(str(path))}: reading {read.tensor}: {error.strerror}.") from error
            if count == 0:
                raise CheckpointError(changed(read.source, path))
            position += count


def changed(source: str, path: Path) -> str:
    """The message about a source file that is not what it was."""
    return f"sources.{source}: {printable(str(path))} changed while it was being merged. Run again when nothing writes to it."


def check_unchanged(plan: "Plan") -> None:
    """Raise CheckpointError if a source file is no longer the one that was planned with."""
    problems = []
    for name, model in plan.models.items():
        for file, identity in model.checkpoint.identities.items():
            path = model.checkpoint.path / file
            try:
                same = FileIdentity.of(os.stat(path)) == identity
            except OSError:
                same = False
            if not same:
                problems.append(changed(name, path))
    if problems:
        raise CheckpointError(*problems)


def read_runs(checkpoint: Checkpoint, entry: TensorEntry, runs: Iterable[tuple[int, int]], view: memoryview) -> None:
    """Fill `view` with the runs (first byte in the tensor, count) of a stored tensor, one after the other.

    Raises CheckpointError when the file cannot be read, or is no longer the one that was opened.
    """
    path = os.path.join(checkpoint.path, entry.file)
    descriptor, position = open_regular(path), 0
    try:
        if FileIdentity.of(os.fstat(descriptor)) != checkpoint.files[entry.file].identity:
            raise _reopen(path)
        for first, count in runs:
            done = 0
            while done < count:
                got = os.preadv(descriptor, [view[position : position + count - done]], entry.offset + first + done)
                if got == 0:
                    raise _reopen(path)
                done, position = done + got, position + got
    except OSError as error:
        raise CheckpointError(f"{printable(path)}: reading {printable(entry.name)}: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def _reopen(path: str) -> CheckpointError:
    return CheckpointError(f"{printable(path)} changed since it was opened. Open it again when nothing writes to it.")


def digest_range(path: Path, offset: int, nbytes: int) -> str:
    """XXH3-128 of `nbytes` bytes of the file from `offset`. Raises BamMergeError when they are not there."""
    from bam_merge.plan import COPY_BUFFER

    digest = xxhash.xxh3_128()
    view = memoryview(bytearray(min(COPY_BUFFER, max(1, nbytes))))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            position = 0
            while position < nbytes:
                count = os.preadv(descriptor, [view[: min(len(view), nbytes - position)]], offset + position)
                if count == 0:
                    raise BamMergeError(f"{printable(str(path))}: ends at byte {offset + position}, expected {offset + nbytes}.")
                digest.update(view[:count])
                position += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BamMergeError(f"{printable(str(path))}: {error.strerror}.") from error
    return digest.hexdigest()


# ---- where an expression's elements are ----------------------------------------------------------------------------------


def leaf_runs(leaf: ops.Read | ops.Slice, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first element in the stored tensor, count) of the runs that make up elements [start, stop) of `leaf`."""
    if isinstance(leaf, ops.Read):
        yield start, stop - start
        return
    stored = ops.numel(leaf.of)
    block = stored // leaf.groups
    row = block // (leaf.of.shape[0] // leaf.groups)
    size, first = leaf.rows * row, leaf.start * row
    while start < stop:
        group, inside = divmod(start, size)
        count = min(size - inside, stop - start)
        yield group * block + first + inside, count
        start += count


def concat_runs(concat: ops.Concat, start: int, stop: int) -> Iterator[tuple[ops.Expr, int, int]]:
    """(part, first, last) of the stretches of the parts that make up elements [start, stop) of `concat`."""
    sizes = [ops.numel(part) // concat.groups for part in concat.parts]
    group, inside = divmod(start, sum(sizes))
    position = start
    while position < stop:
        for part, size in zip(concat.parts, sizes, strict=True):
            if inside >= size:
                inside -= size
                continue
            count = min(size - inside, stop - position)
            if count > 0:
                yield part, group * size + inside, group * size + inside + count
            position += count
            inside = 0
        group += 1


def copy_runs(expr: ops.Expr, start: int, stop: int) -> Iterator[tuple[ops.Read, int, int]]:
    """(tensor, first element, count) of the stored runs that make up elements [start, stop) of a copying expression."""
    if isinstance(expr, ops.Concat):
        for part, first, last in concat_runs(expr, start, stop):
            yield from copy_runs(part, first, last)
    elif isinstance(expr, ops.Read | ops.Slice):
        for first, count in leaf_runs(expr, start, stop):
            yield (expr.of if isinstance(expr, ops.Slice) else expr), first, count
