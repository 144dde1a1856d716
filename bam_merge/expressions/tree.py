"""The tree: how one output tensor is made from source tensors, and what one can ask of that."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Computed, Piece, Read, Shape, Slice, inputs, leaf_runs, numel, stored, whole
from bam_merge.expressions.calibrators import Calibrated
from bam_merge.records import Initialiser, Method


@dataclass(frozen=True, slots=True)
class Merge:
    """`method` over `operands` (each with the name of its source) and, for difference methods, `base`. dtype: the operands'."""

    method: Method
    operands: tuple[tuple[str, "Expr"], ...]
    base: tuple[str, "Expr"] | None
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        names = ", ".join(name for name, _ in self.operands)
        tensors = {str(expr).removeprefix(f"{name}:") for name, expr in self.operands}
        of = f": {next(iter(tensors))}" if len(tensors) == 1 else ": " + ", ".join(str(e) for _, e in self.operands)
        shown = ", ".join([*([f"base={self.base[0]}"] if self.base else []), *self.method.arguments()])
        return f"{self.method.name}({names}{'; ' if shown else ''}{shown}){of}"


@dataclass(frozen=True, slots=True)
class Concat:
    """Fuse parts: block g of the result is block g of every part in turn; the inverse of Slice.

    `stacked`: one part for each expert, whose axis stands before the parts' own in the file; here their rows are one below the other.
    """

    parts: tuple["Expr", ...]
    groups: int
    dtype: str
    shape: Shape
    stacked: bool = False

    def __str__(self) -> str:
        if self.stacked:
            return _stack_shown(self.parts)
        how = f" in {self.groups} blocks" if self.groups > 1 else ""
        return f"concat({', '.join(map(str, self.parts))}){how}"


def _stack_shown(parts: tuple["Expr", ...]) -> str:
    """Each expert's source, and what is taken of it, where it is the same of all."""
    sources = [{read.source for read in reads(part)} for part in parts]
    names = [next(iter(found)) for found in sources if len(found) == 1]
    taken = {str(part).replace(f"{name}:", "") for part, name in zip(parts, names, strict=False)}
    if len(names) == len(parts) and len(taken) == 1:
        return f"stack({', '.join(names)}): {taken.pop()}"
    return f"stack({', '.join(map(str, parts))})"


@dataclass(frozen=True, slots=True)
class Init:
    """A tensor drawn from a generator that is seeded by `seed` and `name` alone."""

    method: Initialiser
    name: str
    seed: int
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        shown = ", ".join(self.method.arguments())
        return f"{self.method.name}({shown})" if shown else self.method.name


Expr = Read | Computed | Slice | Merge | Concat | Init | Calibrated


# ---- what one can ask of an expression ------------------------------------------------------------------------------------


def parts(expr: Expr) -> Iterator[Expr]:
    """`expr` and every expression inside it, outermost first, down to the pieces of sources."""
    yield expr
    match expr:
        case Merge():
            for _, operand in (*expr.operands, *((expr.base,) if expr.base else ())):
                yield from parts(operand)
        case Concat():
            for part in expr.parts:
                yield from parts(part)


def leaves(expr: Expr) -> Iterator[Piece]:
    """The sources' pieces that `expr` is made of, in order of appearance."""
    return (part for part in parts(expr) if isinstance(part, Read | Computed | Slice))


def reads(expr: Expr) -> Iterator[Read]:
    """The stored tensors that `expr` reads, in order of appearance."""
    return (read for leaf in leaves(expr) for read in inputs(whole(leaf)))


def computed(expr: Expr) -> Iterator[Computed]:
    """The tensors inside `expr` that are computed from stored ones, each with those that it is itself made of."""

    def inside(of: Read | Computed) -> Iterator[Computed]:
        if isinstance(of, Computed):
            yield of
            for part in of.inputs:
                yield from inside(part)

    return (node for leaf in leaves(expr) for node in inside(whole(leaf)))


def bytes_read(expr: Expr) -> int:
    """Bytes that are read to make `expr`, each piece once; of what a slice of a computed tensor is made of, the slice's share."""
    total = 0
    for leaf in leaves(expr):
        of = whole(leaf)
        size = sum(numel(read) * DTYPE_BITS[read.dtype] // 8 for read in inputs(of))
        total += size * numel(leaf) // numel(of) if numel(of) else 0
    return total


def is_copy(expr: Expr) -> bool:
    """Whether `expr` only moves bytes."""
    if isinstance(expr, Concat):
        return all(map(is_copy, expr.parts))
    if isinstance(expr, Computed):
        return expr.formula.moves and all(isinstance(part, Read) and part.dtype == expr.dtype for part in expr.inputs)
    return is_copy(expr.of) if isinstance(expr, Slice) else isinstance(expr, Read)


def in_float64(expr: Expr) -> bool:
    """Whether `expr` is computed in float64, which it is where a source is float64; else in float32."""
    return any(read.dtype == "F64" for read in reads(expr))


def proportion(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Whole numbers in the proportion of `weights`, read as the decimals that a recipe holds.

    An elected sign is that of a weighted sum, and 0.2 a + 0.3 a = 0.5 a is a tie, which binary fractions would leave to their
    rounding. Weights whose whole numbers would have more than 28 bits stay as they are: up to there products with float32 are exact
    in float64.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    least = gcd(*whole)
    return weights if not least or max(map(abs, whole)) // least >= 2**28 else tuple(float(number // least) for number in whole)


def concat_runs(concat: Concat, start: int, stop: int) -> Iterator[tuple[Expr, int, int]]:
    """(part, first, last) of the stretches of the parts that make up elements [start, stop) of `concat`."""
    sizes = [numel(part) // concat.groups for part in concat.parts]
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


def copy_runs(expr: Expr, start: int, stop: int) -> Iterator[tuple[Read | None, int, int]]:
    """(tensor, first element, count) of the stored runs that make up elements [start, stop) of a copying expression; None for zeros."""
    if isinstance(expr, Concat):
        for part, first, last in concat_runs(expr, start, stop):
            yield from copy_runs(part, first, last)
    elif isinstance(expr, Computed):
        row = numel(expr) // expr.shape[0]
        for place, of, rows in expr.formula.moved(start // row, -(-stop // row)):
            read = None if place is None else expr.inputs[place]
            assert not isinstance(read, Computed), "rows that are computed are not copied"
            yield read, of * row, rows * row
    elif isinstance(expr, Slice) and isinstance(expr.of, Computed):
        for first, count in leaf_runs(expr, start, stop):
            yield from copy_runs(expr.of, first, first + count)
    elif isinstance(expr, Read | Slice):
        for first, count in leaf_runs(expr, start, stop):
            yield stored(expr), first, count
