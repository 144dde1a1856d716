"""A source's tensors: as they are in a file, computed from what is in files, or rows of a fused one; and where their elements are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.records import Formula

Shape = tuple[int, ...]


# ---- expressions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """A source's tensor as stored; of one that holds all experts, its first two axes may be taken as one, that of rows."""

    source: str
    tensor: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.source}:{self.tensor}"


@dataclass(frozen=True, slots=True)
class Computed:
    """A source's tensor that no file holds: `formula` computes it, row by row, from `inputs`. It stands wherever a Read stands.

    Its value is that of float64 arithmetic, rounded once to float32 (or float64, where an input is float64); what is made of it is
    computed from that, as from a stored number. `dtype` is the one in which the source would store it, had it been saved.
    """

    source: str
    tensor: str
    formula: Formula
    inputs: tuple["Read | Computed", ...]
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return self.formula.shown([str(part) for part in self.inputs])


Whole = Read | Computed
"""A source's whole tensor."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a fused tensor: its first axis is `groups` equal blocks, of each block rows [start, start + rows)."""

    of: Whole
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
        of = f"({self.of})" if isinstance(self.of, Computed) else str(self.of)
        return f"{of}[{rows}]" if self.groups == 1 else f"{of}[{self.groups} x {rows} of {block}]"


@dataclass(frozen=True, slots=True)
class Joined:
    """One tensor that a file holds in several, one after the other along its first axis."""

    of: tuple[Read, ...]
    shape: Shape

    @property
    def dtype(self) -> str:
        return self.of[0].dtype


Leaf = Read | Computed | Slice | Joined
"""What is stored of a role, where nothing is computed: of a folder that is looked at as it is. What is Computed here has the rows of one
stored tensor in another order."""


Piece = Whole | Slice
"""What a source has of a role."""


class Shaped(Protocol):
    @property
    def shape(self) -> Shape: ...


def numel(piece: Shaped) -> int:
    """The elements of a stored piece, or of anything else that has a shape."""
    return prod(piece.shape)


def whole(piece: Piece) -> Whole:
    """The whole tensor that a piece is, or is cut from."""
    return piece.of if isinstance(piece, Slice) else piece


def every_stored(leaf: Leaf) -> tuple[Read, ...]:
    """All stored tensors that hold something of a leaf."""
    return leaf.of if isinstance(leaf, Joined) else (stored(leaf),)


def stored(leaf: Leaf) -> Read:
    """The stored tensor that a leaf is, or is cut from; of several that are joined the first."""
    of = leaf.of[0] if isinstance(leaf, Joined) else whole(leaf)
    if isinstance(of, Computed):
        assert of.formula.moves and len(of.inputs) == 1, "a tensor that is computed is stored nowhere"
        return stored(of.inputs[0])
    return of


def instead(piece: Piece, of: Whole) -> Piece:
    """`piece` with `of` in the place of the whole tensor that it is, or is cut from."""
    return replace(piece, of=of) if isinstance(piece, Slice) else of


def inputs(of: Whole) -> Iterator[Read]:
    """The stored tensors that a source's tensor is made of, in order: itself, or what it is computed from."""
    if isinstance(of, Read):
        yield of
    else:
        for part in of.inputs:
            yield from inputs(part)


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


def byte_runs(leaf: Piece, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The same in bytes: (first byte in the stored tensor, count). Elements smaller than a byte must begin and end with one."""
    bits = DTYPE_BITS[leaf.dtype]
    for first, count in _stored_runs(leaf, start, stop):
        yield first * bits // 8, count * bits // 8


def _stored_runs(leaf: Piece, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first element in the stored tensor, count) of the runs that make up elements [start, stop) of rows of it in whatever order."""
    if isinstance(leaf, Computed):
        row = numel(leaf) // leaf.shape[0]
        for at in range(start // row, -(-stop // row)):
            first, last = max(start, at * row), min(stop, (at + 1) * row)
            ((_, of, _),) = leaf.formula.moved(at, at + 1)
            yield from _stored_runs(leaf.inputs[0], of * row + first - at * row, of * row + last - at * row)
    elif isinstance(leaf, Slice) and isinstance(leaf.of, Computed):
        for first, count in leaf_runs(leaf, start, stop):
            yield from _stored_runs(leaf.of, first, first + count)
    else:
        yield from leaf_runs(leaf, start, stop)


def in_tensors(leaf: Leaf, start: int, stop: int) -> Iterator[tuple[Read, int, int]]:
    """(stored tensor, first byte in it, count) of the runs that make up elements [start, stop) of a leaf, joined or not."""
    if isinstance(leaf, Joined):
        position = 0
        for part in leaf.of:
            first, last = max(start - position, 0), min(stop - position, numel(part))
            yield from ((part, byte, count) for byte, count in (byte_runs(part, first, last) if first < last else ()))
            position += numel(part)
    else:
        yield from ((stored(leaf), byte, count) for byte, count in byte_runs(leaf, start, stop))
