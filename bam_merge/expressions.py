"""Expressions: how one output tensor is made from source tensors. Frozen, plain data, no torch.

An expression is a shallow tree: Read or Computed, maybe Slice, maybe Merge, maybe Concat; or Init, or Calibrated. Its `str` is what plans
and manifests show. The arithmetic that carries them out is in kernels.py, one function per method record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import ClassVar

from bam_merge.calibrators import HiddenMean as HiddenMean
from bam_merge.calibrators import Ridge as Ridge
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Computed, Piece, Read, Shape, Slice, inputs, leaf_runs, numel, stored, whole
from bam_merge.records import About
from bam_merge.records import Calibrator as Calibrator
from bam_merge.records import Formula as Formula
from bam_merge.records import Initialiser as Initialiser
from bam_merge.records import Method as Method

# ---- merge methods: how several tensors become one -------------------------------------------------------------------


def _weights(weights: tuple[float, ...]) -> str:
    return "weights=" + "/".join(f"{weight:g}" for weight in weights)


def _of_differences(weights: tuple[float, ...], scale: float) -> Iterator[str]:
    """The weights and the scale of a sum of differences, where they are not 1."""
    if set(weights) != {1.0}:
        yield _weights(weights)
    if scale != 1.0:
        yield f"scale={scale:g}"


@dataclass(frozen=True, slots=True)
class Mean(Method):
    """The uniform mean."""

    name: ClassVar = "mean"
    about: ClassVar = About(elementwise=True, base=False, surveyed=False, operand_bytes=8)


@dataclass(frozen=True, slots=True)
class Linear(Method):
    """sum_i w_i x_i, one weight per operand; the weights sum to one (model soups, arXiv 2203.05482)."""

    weights: tuple[float, ...]
    name: ClassVar = "linear"
    about: ClassVar = About(elementwise=True, base=False, surveyed=False, operand_bytes=8)

    def arguments(self) -> Iterator[str]:
        yield _weights(self.weights)


@dataclass(frozen=True, slots=True)
class Slerp(Method):
    """Spherical interpolation of two tensors taken as flat vectors, at `t` in [0, 1] (Shoemake, SIGGRAPH 1985)."""

    t: float
    name: ClassVar = "slerp"
    about: ClassVar = About(elementwise=False, base=False, surveyed=True, operand_bytes=8)

    def arguments(self) -> Iterator[str]:
        yield f"t={self.t:g}"


@dataclass(frozen=True, slots=True)
class TaskArithmetic(Method):
    """base + scale * sum_i w_i (x_i - base) (arXiv 2212.04089, section 2)."""

    weights: tuple[float, ...]
    scale: float
    name: ClassVar = "task_arithmetic"
    about: ClassVar = About(elementwise=True, base=True, surveyed=False, operand_bytes=8)

    def arguments(self) -> Iterator[str]:
        return _of_differences(self.weights, self.scale)


@dataclass(frozen=True, slots=True)
class Ties(Method):
    """Trim each difference to its `density` largest entries, elect a sign, average what agrees (arXiv 2306.01708, section 4).

    A worker keeps every operand's difference, trimmed and weighted, besides.
    """

    density: float
    weights: tuple[float, ...]
    scale: float
    name: ClassVar = "ties"
    about: ClassVar = About(elementwise=False, base=True, surveyed=True, operand_bytes=32)

    def arguments(self) -> Iterator[str]:
        yield f"density={self.density:g}"
        yield from _of_differences(self.weights, self.scale)


@dataclass(frozen=True, slots=True)
class DareTies(Method):
    """Drop entries of each difference at random, rescale by 1/density (arXiv 2311.03099), then elect and average as TIES does.

    `seed` and `streams` fix which entries are dropped: one stream per operand, by position.
    """

    density: float
    weights: tuple[float, ...]
    scale: float
    seed: int
    streams: tuple[str, ...]
    name: ClassVar = "dare_ties"
    about: ClassVar = About(elementwise=False, base=True, surveyed=False, operand_bytes=32)

    def arguments(self) -> Iterator[str]:
        yield f"density={self.density:g}"
        yield from _of_differences(self.weights, self.scale)


# ---- initialisers: tensors that no source has --------------------------------------------------------------------------


NORMAL_REACH = 12.1
"""No sample of numpy's polar method is more standard deviations out: sqrt(-2 ln r2), where r2 is 2**-104 or more."""


@dataclass(frozen=True, slots=True)
class Normal(Initialiser):
    """Normally distributed, of mean 0 and standard deviation `std`."""

    std: float
    name: ClassVar = "normal"

    def arguments(self) -> Iterator[str]:
        yield f"std={self.std:g}"

    def size(self) -> tuple[str, float, float]:
        return "std", self.std, NORMAL_REACH * self.std


@dataclass(frozen=True, slots=True)
class Uniform(Initialiser):
    """Uniform on [-bound, bound]; the default bound is 1/sqrt(columns), as torch.nn.Linear starts."""

    bound: float | None
    name: ClassVar = "uniform"

    def arguments(self) -> Iterator[str]:
        if self.bound is not None:
            yield f"bound={self.bound:g}"

    def size(self) -> tuple[str, float, float] | None:
        return None if self.bound is None else ("bound", self.bound, self.bound)


@dataclass(frozen=True, slots=True)
class Zeros(Initialiser):
    """All 0."""

    name: ClassVar = "zeros"

    def size(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Ones(Initialiser):
    """All 1. Only layouts ask for it, where an engine cannot do with zeros."""

    name: ClassVar = "ones"

    def size(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Orthogonal(Initialiser):
    """Orthonormal rows times `gain`."""

    gain: float
    name: ClassVar = "orthogonal"

    def arguments(self) -> Iterator[str]:
        if self.gain != 1.0:
            yield f"gain={self.gain:g}"

    def size(self) -> tuple[str, float, float]:
        return "gain", self.gain, self.gain

    def misfit(self, rows: int, columns: int) -> str | None:
        if rows <= columns:
            return None
        return (
            f"orthogonal: {rows} experts, hidden_size is {columns}: at most {columns} rows of {columns} numbers can be orthogonal. "
            f"Use at most {columns} experts, or init: normal."
        )


# ---- expressions -----------------------------------------------------------------------------------------------------------


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
    """Fuse parts: block g of the result is block g of every part in turn; the inverse of Slice."""

    parts: tuple["Expr", ...]
    groups: int
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        how = f" in {self.groups} blocks" if self.groups > 1 else ""
        return f"concat({', '.join(map(str, self.parts))}){how}"


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


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A router whose row j is made for the text of source `names[j]`; `of` is the place in the recipe that says which text that is.

    `inputs` says whose hidden states those are: the seed's or the mixture's. `tokens` of each text are wanted.
    """

    method: Calibrator
    names: tuple[str, ...]
    of: str
    tokens: int
    inputs: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        shown = [f"tokens={self.tokens}", *self.method.arguments(), *([f"inputs={self.inputs}"] if self.inputs != "seed" else [])]
        return f"{self.method.name}({', '.join(dict.fromkeys(self.names))}; {', '.join(shown)})"


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
    return isinstance(expr, Read | Slice) and isinstance(whole(expr), Read)


def in_float64(expr: Expr) -> bool:
    """Whether `expr` is computed in float64, which it is where a source is float64; else in float32."""
    return any(read.dtype == "F64" for read in reads(expr))


def proportion(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Whole numbers in the proportion of positive `weights`, read as the decimals that a recipe holds.

    An elected sign is that of a weighted sum, and 0.2 a + 0.3 a = 0.5 a is a tie, which binary fractions would leave to their
    rounding. Weights whose whole numbers would have more than 28 bits stay as they are: up to there products with float32 are exact
    in float64.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    least = gcd(*whole)
    return weights if max(whole) // least >= 2**28 else tuple(float(number // least) for number in whole)


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
    elif isinstance(expr, Read | Slice):
        for first, count in leaf_runs(expr, start, stop):
            yield stored(expr), first, count
