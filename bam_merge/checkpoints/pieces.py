"""Stored pieces: a tensor as it is in a file, or rows of a fused one, and where their elements are."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

from bam_merge.checkpoints.dtypes import DTYPE_BITS

Shape = tuple[int, ...]


# ---- expressions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """A source's tensor as stored."""

    source: str
    tensor: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.source}:{self.tensor}"


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a fused tensor: its first axis is `groups` equal blocks, of each block rows [start, start + rows)."""

    of: Read
    groups: int
    start: int
    rows: int
    shape: Shape

    @property
    def dtype(self) -> str:
        return self.of.dtype

    def __str__(self) -> str:
        block = self.of.shape[0] // self.groups
        rows = f"{self.start}:{self.start + self.rows}"
        return f"{self.of}[{rows}]" if self.groups == 1 else f"{self.of}[{self.groups} x {rows} of {block}]"


Leaf = Read | Slice


class Shaped(Protocol):
    @property
    def shape(self) -> Shape: ...


def numel(piece: Shaped) -> int:
    """The elements of a stored piece, or of anything else that has a shape."""
    return prod(piece.shape)


def stored(leaf: Leaf) -> Read:
    """The whole tensor that a leaf is, or is cut from."""
    return leaf.of if isinstance(leaf, Slice) else leaf


# ---- where an expression's elements are ----------------------------------------------------------------------------------


def leaf_runs(leaf: Read | Slice, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first element in the stored tensor, count) of the runs that make up elements [start, stop) of `leaf`."""
    if isinstance(leaf, Read):
        yield start, stop - start
        return
    stored = numel(leaf.of)
    block = stored // leaf.groups
    row = block // (leaf.of.shape[0] // leaf.groups)
    size, first = leaf.rows * row, leaf.start * row
    while start < stop:
        group, inside = divmod(start, size)
        count = min(size - inside, stop - start)
        yield group * block + first + inside, count
        start += count


def byte_runs(leaf: Leaf, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The same in bytes: (first byte in the stored tensor, count). Elements smaller than a byte must begin and end with one."""
    bits = DTYPE_BITS[leaf.dtype]
    for first, count in leaf_runs(leaf, start, stop):
        yield first * bits // 8, count * bits // 8
