"""Rows of computed tensors: what their formulas read of the source files, and the digests of what was read in order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import xxhash
from torch import Tensor

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Computed, Read, Whole, inputs
from bam_merge.merging.formulas import compute
from bam_merge.values.tensors import STORED_DTYPES, buffer

FINITE_ELEMENTS = 2**20
"""Elements that are looked at together for NaN and infinity."""


ReadRuns = Callable[[Read, Iterable[tuple[int, int]], memoryview], None]
"""Fills a buffer with runs (first byte, count) of a stored tensor: SourceFiles.read."""


@dataclass
class InOrder:
    """A digest of a stored tensor that is read from its first byte to its last; of one that is read otherwise it is none."""

    nbytes: int
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    position: int = 0

    def add(self, first: int, data: memoryview) -> None:
        """`data` was read, from byte `first` of the tensor on."""
        if first == self.position:
            self.digest.update(data)
            self.position += len(data)
        else:
            self.position = -1

    @property
    def whole(self) -> str | None:
        return self.digest.hexdigest() if self.position == self.nbytes else None


@dataclass
class StoredRows:
    """One stored tensor as formulas read it."""

    read: Read
    reader: ReadRuns
    order: InOrder | None
    kept: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.read.shape

    def rows(self, start: int, stop: int) -> Tensor:
        return self._runs([(start * self._row, (stop - start) * self._row)]).view(stop - start, *self.shape[1:])

    def take(self, rows: Sequence[int]) -> Tensor:
        return self._runs((row * self._row, self._row) for row in rows).view(len(rows), *self.shape[1:])

    def columns(self, start: int, stop: int) -> Tensor:
        rows, columns = self.shape
        size = DTYPE_BITS[self.read.dtype] // 8
        return self._runs(((row * columns + start) * size, (stop - start) * size) for row in range(rows)).view(rows, stop - start)

    def whole(self) -> Tensor:
        if self.kept is None:
            self.kept = self._runs([(0, prod(self.shape) * DTYPE_BITS[self.read.dtype] // 8)]).view(self.shape).double()
        return self.kept

    @property
    def _row(self) -> int:
        return prod(self.shape[1:]) * DTYPE_BITS[self.read.dtype] // 8

    def _runs(self, runs: Iterable[tuple[int, int]]) -> Tensor:
        runs = list(runs)
        bytes_B, view = buffer(sum(count for _, count in runs))
        self.reader(self.read, runs, view)
        if self.order is not None:
            done = 0
            for first, count in runs:
                self.order.add(first, view[done : done + count])
                done += count
        return bytes_B.view(STORED_DTYPES[self.read.dtype])


class ComputedRows:
    """A computed tensor, its inputs opened; itself an input where another one is made of it."""

    def __init__(self, node: Computed, reader: ReadRuns, orders: dict[Read, InOrder]) -> None:
        self.node = node
        self.inputs = [open_rows(part, reader, orders) for part in node.inputs]
        self.kept: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.node.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is computed to."""
        return torch.float64 if any(read.dtype == "F64" for read in inputs(self.node)) else torch.float32

    def rows(self, start: int, stop: int) -> Tensor:
        return compute(self.node.formula, self.inputs, start, stop).to(self.dtype)

    def take(self, rows: Sequence[int]) -> Tensor:
        return torch.cat([self.rows(row, row + 1) for row in rows])

    def columns(self, start: int, stop: int) -> Tensor:
        return self.whole()[:, start:stop].to(self.dtype)

    def whole(self) -> Tensor:
        if self.kept is None:
            self.kept = self.rows(0, self.shape[0]).double()
        return self.kept

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat."""
        row = max(1, prod(self.shape[1:]))
        first, last = start // row, -(-stop // row)
        return self.rows(first, last).flatten()[start - first * row : stop - first * row]


def open_rows(part: Whole, reader: ReadRuns, orders: dict[Read, InOrder]) -> StoredRows | ComputedRows:
    """A source's tensor for formulas, stored or itself computed. Those in `orders` are digested while they are read."""
    return StoredRows(part, reader, orders.get(part)) if isinstance(part, Read) else ComputedRows(part, reader, orders)


def all_finite(read: Read, reader: ReadRuns) -> bool:
    """Whether a stored tensor holds neither NaN nor infinity."""
    stored, step = StoredRows(read, reader, None), max(1, FINITE_ELEMENTS // max(1, prod(read.shape[1:])))
    blocks = (stored.rows(start, min(read.shape[0], start + step)) for start in range(0, read.shape[0], step))
    return all(bool(torch.isfinite(block.float() if block.element_size() == 1 else block).all()) for block in blocks)
