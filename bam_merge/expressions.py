"""Expressions: how one output tensor is made from source tensors. Frozen, plain data, no torch.

An expression is a shallow tree: Read, maybe Slice, maybe Merge, maybe Concat; or Init. Its `str` is what plans and
manifests show. The arithmetic that carries them out is in kernels.py, one function per method record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

from bam_merge.checkpoints.pieces import Read, Shape, Slice, leaf_runs, numel

# ---- merge methods: how several tensors become one -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mean:
    """The uniform mean."""


@dataclass(frozen=True, slots=True)
class Linear:
    """sum_i w_i x_i, one weight per operand; the weights sum to one (model soups, arXiv 2203.05482)."""

    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Slerp:
    """Spherical interpolation of two tensors taken as flat vectors, at `t` in [0, 1] (Shoemake, SIGGRAPH 1985)."""

    t: float


@dataclass(frozen=True, slots=True)
class TaskArithmetic:
    """base + scale * sum_i w_i (x_i - base) (arXiv 2212.04089, section 2)."""

    weights: tuple[float, ...]
    scale: float


@dataclass(frozen=True, slots=True)
class Ties:
    """Trim each difference to its `density` largest entries, elect a sign, average what agrees (arXiv 2306.01708, section 4)."""

    density: float
    weights: tuple[float, ...]
    scale: float


@dataclass(frozen=True, slots=True)
class DareTies:
    """Drop entries of each difference at random, rescale by 1/density (arXiv 2311.03099), then elect and average as TIES does.

    `seed` and `names` fix which entries are dropped: one stream per operand, by position.
    """

    density: float
    weights: tuple[float, ...]
    scale: float
    seed: int
    streams: tuple[str, ...]


Method = Mean | Linear | Slerp | TaskArithmetic | Ties | DareTies


ELEMENTWISE = (Mean, Linear, TaskArithmetic)
"""Methods for which merging the parts of a tensor and merging the tensor is the same."""


# ---- initialisers: tensors that no source has --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Normal:
    std: float


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform on [-bound, bound]; bound None is 1/sqrt(columns), as torch.nn.Linear starts."""

    bound: float | None


@dataclass(frozen=True, slots=True)
class Zeros:
    pass


@dataclass(frozen=True, slots=True)
class Ones:
    """Only layouts ask for it, where an engine cannot do with zeros."""


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """Orthonormal rows times `gain`."""

    gain: float


Initialiser = Normal | Uniform | Zeros | Ones | Orthogonal


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
        return f"{method_name(self.method)}({names}{method_arguments(self.method, self.base and self.base[0])}){of}"


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
        return f"{method_name(self.method)}{_init_arguments(self.method)}"


Expr = Read | Slice | Merge | Concat | Init


def method_name(method: Method | Initialiser) -> str:
    return {
        Mean: "mean", Linear: "linear", Slerp: "slerp", TaskArithmetic: "task_arithmetic", Ties: "ties", DareTies: "dare_ties",
        Normal: "normal", Uniform: "uniform", Zeros: "zeros", Ones: "ones", Orthogonal: "orthogonal",
    }[type(method)]  # fmt: skip


def method_arguments(method: Method, base: str | None) -> str:
    """What a method's call shows after its operands: '; base=seed, density=0.5'."""
    shown = [f"base={base}"] if base else []
    if isinstance(method, Slerp):
        shown.append(f"t={method.t:g}")
    if isinstance(method, Ties | DareTies):
        shown.append(f"density={method.density:g}")
    if isinstance(method, Linear) or (isinstance(method, TaskArithmetic | Ties | DareTies) and set(method.weights) != {1.0}):
        shown.append("weights=" + "/".join(f"{weight:g}" for weight in method.weights))
    if isinstance(method, TaskArithmetic | Ties | DareTies) and method.scale != 1.0:
        shown.append(f"scale={method.scale:g}")
    return "; " + ", ".join(shown) if shown else ""


def _init_arguments(method: Initialiser) -> str:
    match method:
        case Normal(std):
            return f"(std={std:g})"
        case Uniform(bound):
            return f"(bound={bound:g})" if bound is not None else ""
        case Orthogonal(gain):
            return f"(gain={gain:g})" if gain != 1.0 else ""
        case Zeros() | Ones():
            return ""


# ---- what one can ask of an expression ------------------------------------------------------------------------------------


def parts(expr: Expr) -> Iterator[Expr]:
    """`expr` and every expression inside it, outermost first."""
    yield expr
    match expr:
        case Merge():
            for _, operand in (*expr.operands, *((expr.base,) if expr.base else ())):
                yield from parts(operand)
        case Concat():
            for part in expr.parts:
                yield from parts(part)


def leaves(expr: Expr) -> Iterator[Read | Slice]:
    """The stored pieces that `expr` reads, in order of appearance."""
    return (part for part in parts(expr) if isinstance(part, Read | Slice))


def reads(expr: Expr) -> Iterator[Read]:
    """The stored tensors that `expr` reads, in order of appearance."""
    return (leaf.of if isinstance(leaf, Slice) else leaf for leaf in leaves(expr))


def is_copy(expr: Expr) -> bool:
    """Whether `expr` only moves bytes."""
    return isinstance(expr, Read | Slice) or (isinstance(expr, Concat) and all(map(is_copy, expr.parts)))


def in_float64(expr: Expr) -> bool:
    """Whether `expr` is computed in float64, which it is where a source is float64; else in float32."""
    return any(leaf.dtype == "F64" for leaf in leaves(expr))


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


def fuse(pieces: tuple[Expr, ...], groups: int) -> Expr:
    """Concat of `pieces`, simplified: slices that make up a whole tensor again become that tensor, and an element-wise
    merge of such slices becomes the merge of the whole tensors."""
    first = pieces[0]
    shape = (sum(part.shape[0] for part in pieces), *first.shape[1:])
    if all(isinstance(part, Slice) for part in pieces):
        slices = [part for part in pieces if isinstance(part, Slice)]
        if len({part.of for part in slices}) == 1 and _tiles(slices, groups):
            return slices[0].of
    merges = [part for part in pieces if isinstance(part, Merge)]
    if len(merges) == len(pieces) and _same_elementwise(merges):
        operands = tuple(
            (name, fuse(tuple(merge.operands[i][1] for merge in merges), groups)) for i, (name, _) in enumerate(merges[0].operands)
        )
        bases = [merge.base for merge in merges if merge.base]
        base = (bases[0][0], fuse(tuple(expr for _, expr in bases), groups)) if bases else None
        return Merge(merges[0].method, operands, base, first.dtype, shape)
    return Concat(pieces, groups, first.dtype, shape)


def _tiles(slices: list[Slice], groups: int) -> bool:
    position = 0
    for part in slices:
        if part.groups != groups or part.start != position:
            return False
        position += part.rows
    return position * groups == slices[0].of.shape[0]


def _same_elementwise(merges: list[Merge]) -> bool:
    first = merges[0]
    names = [name for name, _ in first.operands]
    return isinstance(first.method, ELEMENTWISE) and all(
        merge.method == first.method
        and [name for name, _ in merge.operands] == names
        and (merge.base is None) == (first.base is None)
        and (merge.base is None or first.base is None or merge.base[0] == first.base[0])
        for merge in merges
    )


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


def copy_runs(expr: Expr, start: int, stop: int) -> Iterator[tuple[Read, int, int]]:
    """(tensor, first element, count) of the stored runs that make up elements [start, stop) of a copying expression."""
    if isinstance(expr, Concat):
        for part, first, last in concat_runs(expr, start, stop):
            yield from copy_runs(part, first, last)
    elif isinstance(expr, Read | Slice):
        for first, count in leaf_runs(expr, start, stop):
            yield (expr.of if isinstance(expr, Slice) else expr), first, count
