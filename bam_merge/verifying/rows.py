"""Rows of stored tensors: the reader of verification, which shares no code with that of a merge."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.file_afar import FileAfar
from bam_merge.checkpoints.pieces import Computed, Piece, Read, Shape, Slice, Whole, inputs, stored, whole
from bam_merge.errors import CheckpointError
from bam_merge.planning.plan import Plan
from bam_merge.system import MOST_BYTES, name_of
from bam_merge.text import printable, some
from bam_merge.values.tensors import STORED_DTYPES
from bam_merge.verifying.afar import StretchesAfar
from bam_merge.verifying.formulas import Operand, computed_rows, moved_rows, roundings
from bam_merge.verifying.rounding import Derived

ROWS_BYTES = 2**18
"""Bytes of one source tensor, as stored, that are compared at a time: few enough for what is made of them in float64 to stay in a
processor's cache."""


COPIED_BYTES = 2**20
"""The same where nothing is computed."""


class RowReader:
    """Rows of tensors in safetensors files, for any number of threads.

    Headers are parsed here, on purpose not by checkpoints/header.py, and hold what the safetensors library finds; bytes are read, and not
    mapped: the pages of a map cost more than the copy.
    """

    def __init__(self) -> None:
        self._headers: dict[Path, tuple[Mapping[str, Any], int]] = {}
        self._lock = threading.Lock()
        self._afar = StretchesAfar()

    def read_afar(self, file: FileAfar, tensor: str, start: int, stop: int, dtype: str, row: Shape | None = None) -> Tensor:
        """The same of a file elsewhere."""
        tensors, begin = self._afar.header(file)
        first, last = (begin + at for at in tensors.get(tensor, {}).get("data_offsets", (0, 0)))

        def read(at: int, count: int) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]":
            return self._afar.bytes(file, (first, last), at, count)

        return _rows(file.name, tensor, tensors.get(tensor, {}), (start, stop), dtype, row, read)

    def read(self, path: Path, tensor: str, start: int, stop: int, dtype: str, row: Shape | None = None) -> Tensor:
        """Rows [start, stop) of a stored tensor, in its own dtype; of elements smaller than a byte, and of truth values, the bytes.

        `row` is the shape of one, where its first axes are taken as one, that of rows.
        Raises CheckpointError where the file cannot be read, or has no such rows.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._read(descriptor, path, tensor, start, stop, dtype, row)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{printable(str(path))}: {error.strerror}.") from error

    def _read(self, descriptor: int, path: Path, tensor: str, start: int, stop: int, dtype: str, of: Shape | None) -> Tensor:
        with self._lock:
            if path not in self._headers:
                self._headers[path] = _header(descriptor, path)
            tensors, begin = self._headers[path]
        entry = tensors.get(tensor, {})

        def read(at: int, count: int) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]":
            return _bytes(descriptor, path, begin + entry["data_offsets"][0] + at, count)

        return _rows(str(path), tensor, entry, (start, stop), dtype, of, read)


def _rows(
    path: str,
    tensor: str,
    entry: Mapping[str, Any],
    rows: tuple[int, int],
    dtype: str,
    of: Shape | None,
    read: Callable[[int, int], "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]"],
) -> Tensor:
    """Rows of a tensor of which its file's header has `entry`, and `read` gives bytes (first in the tensor, count)."""
    if entry.get("dtype") != dtype:
        raise CheckpointError(f"{printable(path)} changed since it was opened: {printable(tensor)} is no {dtype} tensor any more.")
    shape, bits = entry["shape"], DTYPE_BITS[dtype]
    if of is not None and len(shape) > len(of) + 1:
        shape = [math.prod(shape[: len(shape) - len(of)]), *of]
    start, stop = rows if shape else (0, 1)  # one number has no rows
    row = math.prod(shape[1:]) * bits
    first, last = start * row // 8, -(-stop * row // 8)
    bytes_B = torch.from_numpy(read(first, last - first))
    if bits < 8 or dtype == "BOOL":
        return bytes_B
    return bytes_B.view(STORED_DTYPES[dtype]).view(stop - start, *shape[1:]) if shape else bytes_B.view(STORED_DTYPES[dtype])[0]


def _header(descriptor: int, path: Path) -> tuple[Mapping[str, Any], int]:
    """What a file says of its tensors, and where they begin."""
    length = int.from_bytes(_bytes(descriptor, path, 0, 8).tobytes(), "little")
    tensors = {name: entry for name, entry in json.loads(_bytes(descriptor, path, 8, length).tobytes()).items() if name != "__metadata__"}
    try:
        with safe_open(_name(path, descriptor), "pt") as library:
            names = set(library.keys())
    except SafetensorError:  # an older library does not know every dtype
        names = set(tensors)
    if names != tensors.keys():
        other = some(sorted(names ^ tensors.keys()))
        raise CheckpointError(f"{printable(str(path))}: the safetensors library finds other tensors than its header names: {other}.")
    return tensors, 8 + length


def _bytes(descriptor: int, path: Path, offset: int, count: int) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]":
    """`count` bytes of a file from `offset` on."""
    data = numpy.empty(count, numpy.uint8)
    view, done = memoryview(data.data), 0
    while done < count:
        piece = view[done : done + MOST_BYTES]
        if hasattr(os, "preadv"):
            got = os.preadv(descriptor, [piece], offset + done)
        else:
            read = os.pread(descriptor, len(piece), offset + done)
            got = len(read)
            piece[:got] = read
        if not got:
            raise CheckpointError(f"{printable(str(path))} changed since it was opened: it ends at byte {offset + done}.")
        done += got
    return data


def _name(path: Path, descriptor: int) -> str:
    """The name by which the library opens a file. It takes only names that are UTF-8, so another is named by its descriptor."""
    return str(path) if os.fsencode(path) == str(path).encode(errors="replace") else name_of(descriptor)


class SourceTensors:
    """Row blocks of a plan's source tensors."""

    def __init__(self, plan: Plan, reader: RowReader) -> None:
        self.checkpoints, self.reader = plan.checkpoints, reader

    def rows(self, read: Read, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a stored tensor, in its own dtype."""
        checkpoint = self.checkpoints[read.source]
        if checkpoint.afar is not None:
            file = checkpoint.afar[checkpoint.tensors[read.tensor].file]
            return self.reader.read_afar(file, read.tensor, start, stop, read.dtype, read.shape[1:])
        path = checkpoint.path / checkpoint.tensors[read.tensor].file
        return self.reader.read(path, read.tensor, start, stop, read.dtype, read.shape[1:])

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
            rows = moved_rows(expr.formula, [self._moved(part) for part in expr.inputs], start, stop, expr.shape[0])
            return rows, rows
        if isinstance(expr, Computed):
            return roundings(self.computed(expr, start, stop), computing_dtype(expr))
        if isinstance(expr, Slice):
            pieces = [self.either(expr.of, first, last) for first, last in leaf_rows(expr, start, stop)]
        else:
            assert isinstance(expr, expressions.Concat)
            pieces = [self.either(part, a, b) for part, a, b in concat_runs(expr, start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        low, high = (torch.cat(side) for side in zip(*pieces, strict=True))
        return low, high

    def derived(self, piece: expressions.Expr, start: int, stop: int) -> Derived:
        """Rows [start, stop) of a computed tensor, or of a slice of one, before they are rounded."""
        if isinstance(piece, Computed):
            return self.computed(piece, start, stop)
        assert isinstance(piece, Slice)
        assert isinstance(piece.of, Computed)
        parts = [self.computed(piece.of, first, last) for first, last in leaf_rows(piece, start, stop)]
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


Stretch = tuple[str, str, int, int]
"""Rows [start, stop) of a source's stored tensor: (source, tensor, start, stop)."""


def stretches(expr: expressions.Expr, start: int, stop: int) -> Iterator[Stretch]:
    """Where rows [start, stop) of what only moves bytes are stored, in order."""
    if isinstance(expr, expressions.Concat):
        for part, first, last in concat_runs(expr, start, stop):
            yield from stretches(part, first, last)
    else:
        assert isinstance(expr, Read | Slice) and isinstance(whole(expr), Read)
        read = stored(expr)
        yield from ((read.source, read.tensor, first, last) for first, last in leaf_rows(expr, start, stop))


def leaf_rows(leaf: Piece, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, last) of the rows that rows [start, stop) of a leaf are, in order, of the whole tensor that it is or is cut from."""
    stop = leaf.shape[0] if stop is None else stop
    if not isinstance(leaf, Slice):
        yield start, stop
        return
    block = leaf.of.shape[0] // leaf.groups
    for group, _, first, last in _runs([leaf.rows], start, stop):
        yield group * block + leaf.start + first, group * block + leaf.start + last


def row_blocks(shape: Shape, itemsize: float, nbytes: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of about `nbytes`, ROWS_BYTES if none are given."""
    step = max(1, (nbytes or ROWS_BYTES) // max(1, int(itemsize * math.prod(shape[1:]))))
    yield from ((start, min(shape[0], start + step)) for start in range(0, shape[0], step))
