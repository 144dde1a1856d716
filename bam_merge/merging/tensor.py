"""One output tensor, made and written: the unit of a merge."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Computed, Read, Slice, byte_runs, inputs, leaf_runs, numel, whole
from bam_merge.checkpoints.reading import COPY_BUFFER, SourceFiles
from bam_merge.errors import NonFiniteError
from bam_merge.expressions import concat_runs, copy_runs
from bam_merge.files import writing
from bam_merge.merging.outputs import write_all
from bam_merge.planning.plan import CHUNK_ELEMENTS, Plan, Step, chunk_elements, moves_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from bam_merge.merging.kernels import Chunk
    from bam_merge.merging.source_rows import ComputedRows, InOrder

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
    """How to run. `on_finished` hears of every written tensor (the journal); `allow_nonfinite` records NaN and Inf, not refuses.

    `folder` is the descriptor of the output folder, when it was opened already; files are then made in that one, whatever its name.
    """

    workers: int = 2
    progress: Progress = lambda count: None
    on_finished: Callable[[Step, Finished], None] = lambda step, finished: None
    allow_nonfinite: bool = False
    folder: int | None = None


# ---- one tensor ------------------------------------------------------------------------------------------------------------


@dataclass
class TensorWriter:
    """Makes one output tensor."""

    plan: Plan
    step: Step
    sources: SourceFiles
    output: int
    path: Path
    settings: Settings
    stop: threading.Event
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    orders: "dict[Read, InOrder]" = field(default_factory=dict)
    opened: "dict[int, ComputedRows]" = field(default_factory=dict)
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
        reads = {str(read): order.whole for read, order in self.orders.items() if order.whole is not None}
        if isinstance(self.step.expr, Read) and moves_bytes(self.step):
            reads[str(self.step.expr)] = self.digest.hexdigest()
        return Finished(self.digest.hexdigest(), reads, self.nonfinite)

    def copy(self) -> bool:
        """Copy bytes through a buffer that stays in the processor's cache, where the digest finds them too.

        Reading and writing 1 MB at a time takes 0.8 of the time of copy_file_range and a read for the digest; tensors do not lie on
        block boundaries, so there would be nothing to reflink. There NaN and infinity are found too, at a tenth of the time.
        """
        size = DTYPE_BITS[self.step.dtype]
        whole = max(1, size // 8)
        view = memoryview(bytearray(min(max(COPY_BUFFER // whole, 1) * whole, max(1, self.step.nbytes))))
        for read, first, count in copy_runs(self.step.expr, 0, numel(self.step.expr)):
            position, end = first * size // 8, (first + count) * size // 8
            while position < end:
                if self.stop.is_set():
                    return False
                piece = view[: min(len(view), end - position)]
                if read is None:
                    piece[:] = bytes(len(piece))
                else:
                    self.sources.read(read, [(position, len(piece))], piece)
                self._check_copied(piece)
                self._emit(piece)
                position += len(piece)
        return True

    def compute(self) -> bool:
        """Evaluate the expression chunk by chunk."""
        import torch

        from bam_merge.values.streams import initialise
        from bam_merge.values.tensors import encode

        expr = self.step.expr
        if isinstance(expr, expressions.Init):
            dtype = torch.float64 if expr.dtype == "F64" else torch.float32
            values = initialise(expr.method, expr.shape, expr.seed, expr.name, dtype).flatten()
            self._emit(encode(self._checked(values, 0), self.step.dtype))
            return True
        before = 0
        for part in expr.parts if isinstance(expr, expressions.Concat) and expr.stacked else (expr,):  # one expert after the other
            if not self._compute(part, before):
                return False
            before += numel(part)
        return True

    def _compute(self, expr: expressions.Expr, before: int) -> bool:
        """The elements that `expr` makes, which begin at element `before`."""
        from bam_merge.merging.source_rows import InOrder
        from bam_merge.values.tensors import encode

        known = {id(node): self._survey(node) for node in expressions.parts(expr) if isinstance(node, expressions.Merge)}
        total = numel(expr)
        self.opened.clear()
        self.orders |= {read: InOrder(numel(read) * DTYPE_BITS[read.dtype] // 8) for read in _whole_reads(expr)}
        chunk = chunk_elements(expr, CHUNK_ELEMENTS)
        for start in range(0, total, chunk):
            if self.stop.is_set():
                return False
            values_C = self._load(expr, start, min(total, start + chunk), known)
            self._emit(encode(self._checked(values_C, before + start), self.step.dtype))
        return True

    def _survey(self, merge: expressions.Merge) -> object:
        from bam_merge.merging.kernels import survey

        total, chunk = numel(merge), chunk_elements(merge, CHUNK_ELEMENTS)
        return survey(
            merge.method,
            lambda: (self._chunk(merge, s, min(total, s + chunk), {}) for s in range(0, total, chunk)),
            total,
        )

    def _chunk(self, merge: expressions.Merge, start: int, stop: int, known: dict[int, object]) -> "Chunk":
        import torch

        from bam_merge.merging.kernels import Chunk

        dtype = torch.float64 if expressions.in_float64(merge) else torch.float32
        base = self._load(merge.base[1], start, stop, known).to(dtype) if merge.base else None
        row = merge.shape[-1] if len(merge.shape) > 1 else None
        return Chunk(start, [self._load(expr, start, stop, known).to(dtype) for _, expr in merge.operands], base, row)

    def _load(self, expr: expressions.Expr, start: int, stop: int, known: dict[int, object]) -> "Tensor":
        """Elements [start, stop) of `expr`, flat, in the computing dtype."""
        import torch

        from bam_merge.merging.kernels import combine
        from bam_merge.values.tensors import buffer, decode

        match expr:
            case expressions.Merge():
                return combine(expr.method, self._chunk(expr, start, stop, known), known[id(expr)])
            case expressions.Concat():
                return torch.cat([self._load(part, first, last, known) for part, first, last in concat_runs(expr, start, stop)])
            case Computed():
                return self._open(expr).elements(start, stop)
            case Slice(of=Computed() as of):
                return torch.cat([self._open(of).elements(first, first + count) for first, count in leaf_runs(expr, start, stop)])
            case Read() | Slice():
                read = whole(expr)
                assert isinstance(read, Read)
                bytes_B, view = buffer((stop - start) * DTYPE_BITS[read.dtype] // 8)
                self.sources.read(read, byte_runs(expr, start, stop), view)
                if read in self.orders:
                    self.orders[read].add(start * DTYPE_BITS[read.dtype] // 8, view)
                return decode(bytes_B, read.dtype).to(torch.float64 if read.dtype == "F64" else torch.float32)
            case expressions.Init() | expressions.Calibrated():
                raise AssertionError("a new tensor is no operand")

    def _open(self, node: Computed) -> "ComputedRows":
        """A computed tensor with what its formula keeps from one chunk to the next."""
        from bam_merge.merging.source_rows import ComputedRows

        if id(node) not in self.opened:
            self.opened[id(node)] = ComputedRows(node, self.sources.read, self.orders)
        return self.opened[id(node)]

    def _checked(self, values_C: "Tensor", start: int) -> "Tensor":
        """`values_C` in the output's dtype, after counting what is not finite there."""
        import torch

        from bam_merge.values.tensors import rounded

        rounded_C = rounded(values_C, self.step.dtype)
        ends = torch.aminmax(rounded_C) if len(rounded_C) else ()  # NaN if any is; a tenth of the time of looking at every element
        if not all(bool(torch.isfinite(end)) for end in ends):
            bad = (~torch.isfinite(rounded_C)).nonzero()
            first = int(bad[0])
            self._found_nonfinite(len(bad), start + first, bool(torch.isfinite(values_C[first])))
        return rounded_C

    def _check_copied(self, piece: memoryview) -> None:
        """Count what is not finite in a piece that is about to be written as it is."""
        from bam_merge.values.nonfinite import nonfinite_places

        places = nonfinite_places(piece, self.step.dtype)
        if len(places):
            self._found_nonfinite(len(places), self.written * 8 // DTYPE_BITS[self.step.dtype] + int(places[0]), fits=False)

    def _found_nonfinite(self, count: int, index: int, fits: bool) -> None:
        """`fits`: it was finite until it was rounded to the output's dtype."""
        self.nonfinite += count
        if not self.settings.allow_nonfinite:
            if fits or isinstance(self.step.expr, expressions.Init):
                why = f"overflows {self.step.dtype}; choose a wider output.dtype"
            elif found := self._not_finite(self.step.expr, index):
                several = any(isinstance(node, expressions.Merge) for node in expressions.parts(self.step.expr))
                why = "comes from a source" + (f" ({', '.join(dict.fromkeys(map(str, found)))})" if several else "")
            else:
                why = "overflows float32 while it is computed; choose smaller weights, or scale the sources"
            raise NonFiniteError(
                f"{self.step.name}: {count} values from element {index} on are NaN or infinite ({self.step.expression}): it {why}. "
                "With --allow-nonfinite they are written and recorded."
            )

    def _not_finite(self, expr: expressions.Expr, index: int) -> list[Read]:
        """The stored tensors that element `index` of `expr` is made of and that are not finite there. Reads them again, so only on the way
        to an error: digests of what was read are wrong afterwards."""
        import torch

        from bam_merge.merging.source_rows import all_finite

        match expr:
            case Computed() | Slice(of=Computed()):
                return [read for read in inputs(whole(expr)) if not all_finite(read, self.sources.read)]
            case expressions.Merge() if expr.method.about.surveyed:  # one number of the tensor may be in all of the result
                return [read for read in expressions.reads(expr) if not all_finite(read, self.sources.read)]
            case expressions.Concat():
                return [read for part, first, _ in concat_runs(expr, index, index + 1) for read in self._not_finite(part, first)]
            case expressions.Merge():
                found = []
                for _, operand in (*expr.operands, *((expr.base,) if expr.base else ())):
                    stored = next(expressions.computed(operand), None) is None
                    if not stored or not torch.isfinite(self._load(operand, index, index + 1, {})).all():
                        found += self._not_finite(operand, index)
                return found
        return list(expressions.reads(expr))

    def _emit(self, data: memoryview) -> None:
        with writing(self.path):
            write_all(self.output, data, self.step.offset + self.written)
        self.digest.update(data)
        self.written += len(data)
        self.settings.progress(len(data))


def _whole_reads(expr: expressions.Expr) -> set[Read]:
    """The tensors that evaluating `expr` in order may read from first byte to last, once: those that can be digested on the way."""
    if isinstance(expr, Read | Computed | expressions.Merge):
        reads = list(expressions.reads(expr))
        cut = {read for leaf in expressions.leaves(expr) if isinstance(leaf, Slice) for read in inputs(whole(leaf))}
        return {read for read in reads if reads.count(read) == 1} - cut
    return set()
