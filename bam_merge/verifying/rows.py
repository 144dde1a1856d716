"""Rows of stored tensors by the safetensors library: the reader of verification, which shares no code with that of a merge."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Computed, Read, Shape, Slice, Whole, inputs
from bam_merge.planning.plan import Plan
from bam_merge.system import name_of
from bam_merge.verifying.formulas import Operand, computed_rows, moved_rows, roundings
from bam_merge.verifying.rounding import Derived

ROWS_BYTES = 2**20
"""Bytes of one source tensor, as stored, that are compared at a time."""


MAPPED_BYTES = 2**23
"""Bytes that are read of a file before it is opened anew."""


class RowReader:
    """Rows of tensors in safetensors files, by the safetensors library; for one thread.

    The library maps files, and the pages that were read of an open map count as this process's memory: so a file is closed after
    MAPPED_BYTES.
    """

    def __init__(self) -> None:
        self._open: dict[Path, tuple[Any, int]] = {}

    def read(self, path: Path, tensor: str, start: int, stop: int, dtype: str) -> Tensor:
        """Rows [start, stop) of a stored tensor, in its own dtype; of elements smaller than a byte, which the library does not know, and
        of truth values, which it may make 0 and 1, the bytes."""
        if DTYPE_BITS[dtype] < 8 or dtype == "BOOL":
            return _stored_bytes(path, tensor, start, stop, DTYPE_BITS[dtype])
        reader, count = self._open.pop(path) if path in self._open else (_opened(path), 0)
        rows: Tensor = reader.get_slice(tensor)[start:stop].clone()
        if count + rows.nbytes < MAPPED_BYTES:
            self._open[path] = (reader, count + rows.nbytes)
        return rows


def _stored_bytes(path: Path, tensor: str, start: int, stop: int, bits: int) -> Tensor:
    """The bytes in which rows [start, stop) of a tensor with elements of so many bits lie. On purpose not by checkpoints/reading.py."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[tensor]
        row = math.prod(entry["shape"][1:]) * bits
        first, last = start * row // 8, -(-stop * row // 8)
        stream.seek(8 + length + entry["data_offsets"][0] + first)
        return torch.frombuffer(bytearray(stream.read(last - first)), dtype=torch.uint8)


def _opened(path: Path) -> Any:
    """The library's reader of a file. It takes only names that are UTF-8, so another is named by a descriptor."""
    if os.fsencode(path) == str(path).encode(errors="replace"):
        return safe_open(path, "pt")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return safe_open(name_of(descriptor), "pt")
    finally:
        os.close(descriptor)


class SourceTensors:
    """Row blocks of a plan's source tensors."""

    def __init__(self, plan: Plan, reader: RowReader) -> None:
        self.checkpoints, self.reader = plan.checkpoints, reader

    def rows(self, read: Read, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a stored tensor, in its own dtype."""
        checkpoint = self.checkpoints[read.source]
        return self.reader.read(checkpoint.path / checkpoint.tensors[read.tensor].file, read.tensor, start, stop, read.dtype)

    def computed(self, node: Computed, start: int, stop: int) -> Derived:
        """Rows [start, stop) of a computed tensor, before it is rounded."""
        return computed_rows(node.formula, [self._operand(part) for part in node.inputs], start, stop)

    def _operand(self, part: Whole) -> Operand:
        def read(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
            if isinstance(part, Read):
                return self.rows(part, start, stop), None
            low, high = self.either(part, start, stop)
            return low, (high.double() - low.double()).abs()

        return Operand(part.shape, read)

    def _moved(self, part: Whole) -> tuple[Callable[[int, int], Tensor], Tensor]:
        assert isinstance(part, Read)
        return partial(self.rows, part), torch.zeros_like(self.rows(part, 0, 1))

    def piece(self, expr: expressions.Expr, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a source's piece, or of several fused: as stored, or in the dtype that it is computed to."""
        return self.either(expr, start, stop)[0]

    def either(self, expr: expressions.Expr, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """`piece`, twice: the least and the largest that rounding may have made of a computed one; of what is stored the same."""
        if isinstance(expr, Read):
            rows = self.rows(expr, start, stop)
            return rows, rows
        if isinstance(expr, Computed) and expressions.is_copy(expr):
            rows = moved_rows(expr.formula, [self._moved(part) for part in expr.inputs], start, stop)
            return rows, rows
        if isinstance(expr, Computed):
            return roundings(self.computed(expr, start, stop), computing_dtype(expr))
        if isinstance(expr, Slice):
            block = expr.of.shape[0] // expr.groups
            runs = _runs([expr.rows], start, stop)
            pieces = [self.either(expr.of, g * block + expr.start + a, g * block + expr.start + b) for g, _, a, b in runs]
        else:
            assert isinstance(expr, expressions.Concat)
            pieces = [self.either(part, a, b) for part, a, b in concat_runs(expr, start, stop)]
        low, high = (torch.cat(side) for side in zip(*pieces, strict=True))
        return low, high

    def derived(self, piece: expressions.Expr, start: int, stop: int) -> Derived:
        """Rows [start, stop) of a computed tensor, or of a slice of one, before they are rounded."""
        if isinstance(piece, Computed):
            return self.computed(piece, start, stop)
        assert isinstance(piece, Slice)
        assert isinstance(piece.of, Computed)
        block = piece.of.shape[0] // piece.groups
        runs = _runs([piece.rows], start, stop)
        parts = [self.computed(piece.of, g * block + piece.start + a, g * block + piece.start + b) for g, _, a, b in runs]
        slacks = [torch.zeros_like(part.value) if part.slack is None else part.slack for part in parts]
        return Derived(torch.cat([part.value for part in parts]), torch.cat(slacks))


def is_computed(expr: expressions.Expr) -> bool:
    """Whether anything that `expr` is fused of is not what files hold."""
    if isinstance(expr, expressions.Concat):
        return any(map(is_computed, expr.parts))
    node = expr.of if isinstance(expr, Slice) else expr
    return isinstance(node, Computed) and not expressions.is_copy(node)


def computing_dtype(node: Computed) -> str:
    """The dtype that a computed tensor is rounded to: float64 where something that it is made of is."""
    return "F64" if any(read.dtype == "F64" for read in inputs(node)) else "F32"


def _runs(rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Where rows [start, stop) of a fused tensor come from, whose blocks hold `rows[i]` rows of part i: (block, part, first, last).

    On purpose a second time, by rows: the merge cuts by elements (pieces.leaf_runs, expressions.concat_runs).
    """
    block = sum(rows)
    while start < stop:
        group, offset = divmod(start, block)
        part = 0
        while offset >= rows[part]:
            offset, part = offset - rows[part], part + 1
        count = min(rows[part] - offset, stop - start)
        yield group, part, offset, offset + count
        start += count


def concat_runs(expr: expressions.Concat, start: int, stop: int) -> Iterator[tuple[expressions.Expr, int, int]]:
    """(part, first row, last row) of the pieces that make up rows [start, stop) of `expr`, in order."""
    rows = [part.shape[0] // expr.groups for part in expr.parts]
    for group, part, first, last in _runs(rows, start, stop):
        yield expr.parts[part], group * rows[part] + first, group * rows[part] + last


def row_blocks(shape: Shape, itemsize: float) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of about ROWS_BYTES."""
    step = max(1, ROWS_BYTES // max(1, int(itemsize * math.prod(shape[1:]))))
    yield from ((start, min(shape[0], start + step)) for start in range(0, shape[0], step))
