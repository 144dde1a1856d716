"""Carries out a plan: streams every tensor to its planned place with bounded memory, by any number of workers.

Every output's file and offset are fixed by the plan, so workers need no order and the bytes are the same for any number of
them. Plain copies and arithmetic run on chunks. torch is imported by the first worker that computes, while
others already copy.
"""

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from bam_merge import ops
from bam_merge.errors import NonFiniteError, SyncFailed, writing
from bam_merge.plan import CHUNK_ELEMENTS, COPY_BUFFER, Plan, Step
from bam_merge.safetensors_header import DTYPE_BITS
from bam_merge.source_files import SourceFiles, check_unchanged, concat_runs, copy_runs, leaf_runs
from bam_merge.workers import Steps, moves_bytes, one_torch_thread, quick_switching, run_all

if TYPE_CHECKING:
    from torch import Tensor

    from bam_merge.kernels import Chunk

FLUSH_SECONDS = 0.05
"""Pause between two syncs of what the workers have written."""

Progress = Callable[[int], None]
"""Called with the number of output bytes that have just been written."""


@dataclass
class Finished:
    """What is known of a written tensor: its digest, the digests of the source tensors read for it ("source:tensor"), NaN/Inf count."""

    digest: str
    reads: dict[str, str] = field(default_factory=dict)
    nonfinite: int = 0


@dataclass
class Settings:
    """How to run. `on_finished` hears of every written tensor (the journal); `allow_nonfinite` records NaN and Inf, not refuses."""

    workers: int = 2
    progress: Progress = lambda count: None
    on_finished: Callable[[Step, Finished], None] = lambda step, finished: None
    allow_nonfinite: bool = False


def execute(plan: Plan, folder: Path, settings: Settings, done: Iterable[str] = ()) -> dict[str, Finished]:
    """Write the tensors of `plan`, except those named in `done`, into the shard files in `folder`; create what is missing.

    Returns what is known of each tensor written. Raises CheckpointError when a source fails or changes, OutputError when the
    output cannot be written, NonFiniteError when a merge gives NaN or infinity. Files are synced before it returns.
    """
    finished: dict[str, Finished] = {}
    skip = set(done)
    steps = Steps(step for step in plan.steps if step.name not in skip)
    workers, stop, lock = itertools.count(), threading.Event(), threading.Lock()
    outputs = {shard.file: _prepare(folder / shard.file, shard.header, shard.nbytes) for shard in plan.shards}

    def work(single_threaded: Callable[[], None]) -> None:
        step: Step | None = None
        arithmetic_first = next(workers) == 0
        with SourceFiles(plan) as sources:
            while not stop.is_set() and (step := steps.take(step, arithmetic_first)) is not None:
                if not moves_bytes(step):
                    single_threaded()
                result = _Writer(plan, step, sources, outputs[step.file], folder / step.file, settings, stop).run()
                if result is not None:
                    with lock:
                        finished[step.name] = result
                        settings.on_finished(step, result)

    try:
        with (
            one_torch_thread() as single_threaded,
            quick_switching(),
            _written_behind({folder / file: fd for file, fd in outputs.items()}, stop),
        ):
            run_all(partial(work, single_threaded), settings.workers, stop)
        check_unchanged(plan)
        for file, descriptor in outputs.items():
            with writing(folder / file, SyncFailed):
                os.fsync(descriptor)
    finally:
        for descriptor in outputs.values():
            os.close(descriptor)
    return finished


# ---- files -----------------------------------------------------------------------------------------------------------------


def _prepare(path: Path, header: bytes, nbytes: int) -> int:
    """Open the output file with its header written and its space reserved; what it already holds stays."""
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(descriptor).st_size != nbytes:
                os.ftruncate(descriptor, nbytes)
            _reserve(descriptor, nbytes)
            _write_all(descriptor, memoryview(header), 0)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _reserve(descriptor: int, nbytes: int) -> None:
    """Have the file system set the space aside, so that a full disk shows now and not at the last tensor."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what file systems say that cannot
                raise


@contextmanager
def _written_behind(outputs: Mapping[Path, int], stop: threading.Event) -> Iterator[None]:
    """Sync the files again and again in a thread of its own, so that the disk works while the processors do and the last sync is short.

    A sync that fails is fatal, and not tried again: what it could not write may be gone from memory. It stops the workers.
    """
    ended, failures = threading.Event(), list[tuple[Path, OSError]]()

    def flush() -> None:
        while not ended.wait(FLUSH_SECONDS):
            for path, descriptor in outputs.items():
                try:
                    getattr(os, "fdatasync", os.fsync)(descriptor)
                except OSError as error:
                    failures.append((path, error))
                    stop.set()
                    return

    thread = threading.Thread(target=flush, name="bam-merge-flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for path, error in failures:  # whatever else went wrong
            with writing(path, SyncFailed):
                raise error


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


# ---- one tensor ------------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Makes one output tensor."""

    plan: Plan
    step: Step
    sources: SourceFiles
    output: int
    path: Path
    settings: Settings
    stop: threading.Event
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    read_digests: dict[ops.Read, xxhash.xxh3_128] = field(default_factory=dict)
    written: int = 0
    nonfinite: int = 0

    def run(self) -> Finished | None:
        """The finished tensor, or None when another worker's failure stopped this one."""
        if moves_bytes(self.step):
            whole = self.copy()
        else:
            whole = self.compute()
        if not whole:
            return None
        reads = {str(read): digest.hexdigest() for read, digest in self.read_digests.items()}
        if isinstance(self.step.expr, ops.Read) and moves_bytes(self.step):
            reads[str(self.step.expr)] = self.digest.hexdigest()
        return Finished(self.digest.hexdigest(), reads, self.nonfinite)

    def copy(self) -> bool:
        """Copy bytes through a buffer that stays in the processor's cache, where the digest finds them too.

        Reading and writing 1 MB at a time takes 0.8 of the time of copy_file_range and a read for the digest; tensors do not lie on
        block boundaries, so there would be nothing to reflink.
        """
        size = DTYPE_BITS[self.step.dtype]
        view = memoryview(bytearray(min(COPY_BUFFER, max(1, self.step.nbytes))))
        for read, first, count in copy_runs(self.step.expr, 0, ops.numel(self.step.expr)):
            position, end = first * size // 8, (first + count) * size // 8
            while position < end:
                if self.stop.is_set():
                    return False
                piece = view[: min(len(view), end - position)]
                self.sources.read_into(read, position, piece)
                self._emit(piece)
                position += len(piece)
        return True

    def compute(self) -> bool:
        """Evaluate the expression chunk by chunk."""
        from bam_merge.kernels import initialise
        from bam_merge.tensors import encode

        expr = self.step.expr
        if isinstance(expr, ops.Init):
            self._emit(encode(initialise(expr.method, expr.shape, expr.seed, expr.name), self.step.dtype))
            return True
        known = {id(node): self._survey(node) for node in ops.parts(expr) if isinstance(node, ops.Merge)}
        total = ops.numel(expr)
        self.read_digests = {leaf: xxhash.xxh3_128() for leaf in _whole_reads(expr)}
        for start in range(0, total, CHUNK_ELEMENTS):
            if self.stop.is_set():
                return False
            values_C = self._load(expr, start, min(total, start + CHUNK_ELEMENTS), known)
            self._emit(encode(self._checked(values_C, start), self.step.dtype))
        return True

    def _survey(self, merge: ops.Merge) -> object:
        from bam_merge.kernels import survey

        total = ops.numel(merge)
        return survey(
            merge.method,
            lambda: (self._chunk(merge, s, min(total, s + CHUNK_ELEMENTS), {}) for s in range(0, total, CHUNK_ELEMENTS)),
            total,
        )

    def _chunk(self, merge: ops.Merge, start: int, stop: int, known: dict[int, object]) -> "Chunk":
        from bam_merge.kernels import Chunk

        base = self._load(merge.base[1], start, stop, known) if merge.base else None
        return Chunk(start, [self._load(expr, start, stop, known) for _, expr in merge.operands], base)

    def _load(self, expr: ops.Expr, start: int, stop: int, known: dict[int, object]) -> "Tensor":
        """Elements [start, stop) of `expr`, flat, in the computing dtype."""
        import torch

        from bam_merge.kernels import combine
        from bam_merge.tensors import buffer, decode

        match expr:
            case ops.Merge():
                return combine(expr.method, self._chunk(expr, start, stop, known), known[id(expr)])
            case ops.Concat():
                return torch.cat([self._load(part, first, last, known) for part, first, last in concat_runs(expr, start, stop)])
            case ops.Read() | ops.Slice():
                read = expr.of if isinstance(expr, ops.Slice) else expr
                itemsize = DTYPE_BITS[read.dtype] // 8
                bytes_B, view = buffer((stop - start) * itemsize)
                position = 0
                for first, count in leaf_runs(expr, start, stop):
                    self.sources.read_into(read, first * itemsize, view[position : position + count * itemsize])
                    position += count * itemsize
                if read in self.read_digests:
                    self.read_digests[read].update(view)
                return decode(bytes_B, read.dtype).to(torch.float64 if read.dtype == "F64" else torch.float32)
            case ops.Init():
                raise AssertionError("an initialised tensor is no operand")

    def _checked(self, values_C: "Tensor", start: int) -> "Tensor":
        """`values_C` in the output's dtype, after counting what is not finite there."""
        import torch

        from bam_merge.tensors import TORCH_DTYPES

        rounded_C = values_C.to(TORCH_DTYPES[self.step.dtype])
        ends = torch.aminmax(rounded_C) if len(rounded_C) else ()  # NaN if any is; a tenth of the time of looking at every element
        if not all(bool(torch.isfinite(end)) for end in ends):
            bad = (~torch.isfinite(rounded_C)).nonzero()
            self.nonfinite += len(bad)
            if not self.settings.allow_nonfinite:
                index = start + int(bad[0])
                overflow = bool(torch.isfinite(values_C[int(bad[0])]))
                why = f"overflows {self.step.dtype}; choose a wider output.dtype" if overflow else "comes from a source"
                raise NonFiniteError(
                    f"{self.step.name}: {len(bad)} values from element {index} on are NaN or infinite ({self.step.expression}): it {why}. "
                    "With --allow-nonfinite they are written and recorded."
                )
        return rounded_C

    def _emit(self, data: memoryview) -> None:
        with writing(self.path):
            _write_all(self.output, data, self.step.offset + self.written)
        self.digest.update(data)
        self.written += len(data)
        self.settings.progress(len(data))


def _whole_reads(expr: ops.Expr) -> set[ops.Read]:
    """The tensors that evaluating `expr` in order reads from first byte to last, once: those that can be digested on the way."""
    if isinstance(expr, ops.Read):
        return {expr}
    if isinstance(expr, ops.Merge):
        leaves = list(ops.leaves(expr))
        return {leaf for leaf in leaves if isinstance(leaf, ops.Read) and leaves.count(leaf) == 1}
    return set()
