"""A second, slow way to the same tensors: whole blocks of rows in float64, read with the safetensors library. One function per record.

verify compares what a merge wrote with this. Nothing that carries out a plan is imported: reading, cutting, thresholds, arithmetic,
elections (election.py) and rounding (rounding.py) are written a second time, from the formulas of expressions.py's records, and where
a function here does what one of the merge does, that is its purpose: a mistake must be made twice to pass. A contract of import-linter
holds it. What both have is what a plan says, not how it is carried out:

* the plan, its expressions and stored pieces as records; `in_float64`, which says what a merge is computed in, and `proportion`, which
  says by which whole weights an election is held;
* the generator of values/streams.py: a plan names a draw by seed and stream, and only the generator itself turns these into numbers. Its
  own tests have a second one;
* how many bits a dtype has (checkpoints/dtypes.py), which its tests compare with torch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy
import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Shape, numel
from bam_merge.values.streams import generator, uniforms
from bam_merge.verifying.election import elect
from bam_merge.verifying.rounding import Derived, Other
from bam_merge.verifying.rows import SourceTensors, concat_runs, is_computed, row_blocks

SURVEY_BINS, SURVEY_SORTED = 2**12, 2**20
"""Bins of a histogram, and the most elements that are sorted, where a whole tensor is searched for a threshold."""


def rederive(expr: expressions.Expr, sources: SourceTensors, known: Mapping[int, Any], start: int, stop: int, dtype: str) -> Derived:
    """Rows [start, stop) of what `expr` means, in float64, with what rounding may make of them on the way to `dtype`."""
    if isinstance(expr, expressions.Init):
        return _initialised(expr, start, stop, dtype)
    if isinstance(expr, expressions.Concat):
        return _joined([rederive(part, sources, known, a, b, dtype) for part, a, b in concat_runs(expr, start, stop)])
    computing = COMPUTING[expressions.in_float64(expr)]
    if isinstance(expr, expressions.Merge):
        derived = _merged(expr, sources, known, start, stop, computing)
    elif not is_computed(expr):
        return Derived(sources.piece(expr, start, stop).double())
    else:
        derived = sources.derived(expr, start, stop)
        derived.slack = (torch.zeros_like(derived.value) if derived.slack is None else derived.slack).add_(computing.least)
    assert derived.slack is not None
    if dtype != "F32" or computing.dtype != "F32":  # the last operation rounds as well as the writer; in float64 ours does too
        derived.slack.add_(derived.value.abs(), alpha=computing.unit)
        for other in derived.others:
            other.slack += other.value.abs() * computing.unit
    return derived


def _merged(
    merge: expressions.Merge, sources: SourceTensors, known: Mapping[int, Any], start: int, stop: int, computing: "Computing"
) -> Derived:
    """Rows [start, stop) of a merge, without the last operation's rounding."""
    operands = [operand for _, operand in (*merge.operands, *((merge.base,) if merge.base else ()))]
    pieces = [sources.either(x, start, stop) if is_computed(x) else (sources.piece(x, start, stop),) for x in operands]
    first = start * math.prod(merge.shape[1:])

    def of(rows: list[Tensor]) -> Derived:
        operands, base = (rows[:-1], rows[-1]) if merge.base else (rows, None)
        return derive(merge.method, Rows(operands, base, known.get(id(merge)), first, computing))

    lows = [either[0] for either in pieces]
    derived = of(lows)
    assert derived.slack is not None
    for index, (low, *high) in enumerate(pieces):  # where it is left in doubt what a computed operand was rounded to
        if high and not torch.equal(low, high[0]):
            derived.slack += (of([*lows[:index], high[0], *lows[index + 1 :]]).value - derived.value).abs().nan_to_num(0.0)
    return derived


@dataclass(frozen=True)
class Computing:
    """What a merge is computed in. `unit` bounds the relative error of one operation, ours in float64 included; `least` an underflow's."""

    dtype: str
    torch: torch.dtype
    unit: float
    least: float


COMPUTING = {
    False: Computing("F32", torch.float32, 2.0**-24 * (1 + 2.0**-20), 2.0**-149),
    True: Computing("F64", torch.float64, 2.0**-52 * (1 + 2.0**-20), 2.0**-1074),
}
"""By whether a source is float64."""


def _joined(parts: list[Derived]) -> Derived:
    """The parts one below the other."""
    slacks = [torch.zeros_like(part.value) if part.slack is None else part.slack for part in parts]
    exact = all(part.slack is None for part in parts)
    result = Derived(torch.cat([part.value for part in parts]), None if exact else torch.cat(slacks))
    place = 0
    for part in parts:
        result.others += [Other(other.index + place, other.value, other.slack) for other in part.others]
        place += part.value.numel()
    return result


# ---- new tensors -------------------------------------------------------------------------------------------------------------


def _initialised(init: expressions.Init, start: int, stop: int, dtype: str) -> Derived:
    """Rows [start, stop) of a tensor that no source has."""
    computing = COMPUTING[init.dtype == "F64"]
    drawn = draw(init.method, generator(init.seed, init.name), init.shape)
    value = drawn.value[start:stop]
    if drawn.slack is None:
        return Derived(value.to(computing.torch).double())
    slack = drawn.slack[start:stop] + computing.least
    return Derived(value, slack if dtype == computing.dtype == "F32" else slack + value.abs() * computing.unit)


@singledispatch
def draw(method: expressions.Initialiser, random: numpy.random.RandomState, shape: Shape) -> Derived:
    """The whole tensor in float64, one function per record, out of the generator, which is the one thing shared with the merge. Where
    there is no slack, it is the numbers that are drawn and no others."""
    raise NotImplementedError(f"verifying/rederive.py draws no {type(method).__name__}: a function under @draw.register is missing")


@draw.register
def _normal(method: expressions.Normal, random: numpy.random.RandomState, shape: Shape) -> Derived:
    return Derived(torch.from_numpy(random.standard_normal(shape)) * method.std)


@draw.register
def _uniform(method: expressions.Uniform, random: numpy.random.RandomState, shape: Shape) -> Derived:
    bound = method.bound if method.bound is not None else shape[-1] ** -0.5
    return Derived((torch.from_numpy(random.random_sample(shape)) * 2 - 1) * bound)


@draw.register
def _zeros(method: expressions.Zeros, random: numpy.random.RandomState, shape: Shape) -> Derived:
    return Derived(torch.zeros(shape, dtype=torch.float64))


@draw.register
def _ones(method: expressions.Ones, random: numpy.random.RandomState, shape: Shape) -> Derived:
    return Derived(torch.ones(shape, dtype=torch.float64))


@draw.register
def _orthogonal(method: expressions.Orthogonal, random: numpy.random.RandomState, shape: Shape) -> Derived:
    """By the definition (Gram and Schmidt), twice over for the digits that the first time loses."""
    drawn_RC = torch.from_numpy(random.standard_normal(shape))
    rows_RC = torch.zeros_like(drawn_RC)
    for row, rest_C in enumerate(drawn_RC.clone()):
        for _ in range(2):
            rest_C -= (rows_RC[:row] @ rest_C) @ rows_RC[:row]
        rows_RC[row] = rest_C / rest_C.norm()
    error = float(torch.linalg.cond(drawn_RC)) * shape[-1] * 2.0**-52  # of two correct ways to the factor Q (Higham 2002, section 19.9)
    return Derived(rows_RC * method.gain, torch.full_like(rows_RC, method.gain * error))


# ---- merges ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The same rows of every operand and of the base, as stored; `first` counts the elements before them.

    `known` is what `survey_anew` gave. Roundings are measured by `computing`.
    """

    operands: list[Tensor]
    base: Tensor | None
    known: Any
    first: int
    computing: Computing

    @property
    def wide(self) -> list[Tensor]:
        """The operands in float64."""
        return [x.double() for x in self.operands]

    @property
    def deltas(self) -> list[Tensor]:
        """operand - base in float64: one operation, whose rounding IEEE 754 fixes. What follows is defined on the rounded differences."""
        assert self.base is not None
        return [_difference(x, self.base, self.computing) for x in self.operands]

    def start(self) -> Tensor:
        """The base in float64."""
        assert self.base is not None
        return self.base.double()


@singledispatch
def derive(method: expressions.Method, rows: Rows) -> Derived:
    """The merged rows, one function per record. Their `slack` is without the last operation: so many roundings, each relative to what it
    rounds at most."""
    raise NotImplementedError(f"verifying/rederive.py derives no {type(method).__name__}: a function under @derive.register is missing")


@derive.register
def _mean(method: expressions.Mean, rows: Rows) -> Derived:
    count, x_K = len(rows.operands), rows.wide
    slack = _sum([1.0] * count, [x.abs() for x in x_K]).mul_((count - 1) / count * rows.computing.unit)
    return Derived(_sum([1.0] * count, x_K).div_(count), slack)


@derive.register
def _linear(method: expressions.Linear, rows: Rows) -> Derived:
    return _weighted(method.weights, (0.0,) * len(method.weights), rows)


@derive.register
def _slerp(method: expressions.Slerp, rows: Rows) -> Derived:
    weights, errors = rows.known
    return _weighted(weights, errors, rows)


def _weighted(weights: Sequence[float], errors: Sequence[float], rows: Rows) -> Derived:
    """The sum of the operands by weights, each of which may be off by so much."""
    count, x_K, computing = len(rows.operands), rows.wide, rows.computing
    shares = [abs(w) * (count + 1) * computing.unit + error for w, error in zip(weights, errors, strict=True)]
    return Derived(_sum(weights, x_K), _sum(shares, [x.abs() for x in x_K]) + 2 * count * computing.least)


@derive.register
def _task_arithmetic(method: expressions.TaskArithmetic, rows: Rows) -> Derived:
    count, deltas, computing = len(rows.operands), rows.deltas, rows.computing
    slack = _sum([abs(method.scale * w) * (count + 4) * computing.unit for w in method.weights], [d.abs() for d in deltas])
    value = rows.start() + method.scale * _sum(method.weights, deltas)
    return Derived(value, slack + 2 * (count + 1) * (1 + abs(method.scale)) * computing.least)


@derive.register
def _ties(method: expressions.Ties, rows: Rows) -> Derived:
    kept = [d.masked_fill(d.abs() < least, 0.0) for d, least in zip(rows.deltas, rows.known, strict=True)]
    return elect(method, kept, rows.start(), rows.computing.unit, rows.computing.least)


@derive.register
def _dare_ties(method: expressions.DareTies, rows: Rows) -> Derived:
    start = rows.start()
    masks = (torch.from_numpy(uniforms(method.seed, s, rows.first, start.numel()) < method.density) for s in method.streams)
    kept = [d.where(mask.view(d.shape), 0.0) for d, mask in zip(rows.deltas, masks, strict=True)]
    return elect(method, kept, start, rows.computing.unit, rows.computing.least)


def _difference(x: Tensor, base: Tensor, computing: Computing) -> Tensor:
    """x - base as the computing dtype rounds it, in float64."""
    return (x.to(computing.torch) - base.to(computing.torch)).double()


def _sum(weights: Sequence[float], x_K: Sequence[Tensor]) -> Tensor:
    total = x_K[0] * weights[0]
    for weight, x in zip(weights[1:], x_K[1:], strict=True):
        total.add_(x, alpha=weight)
    return total


@singledispatch
def survey_anew(method: expressions.Method, node: expressions.Merge, sources: SourceTensors) -> Any:
    """What a method must know of whole tensors, for records that say they are `surveyed`, from blocks of rows."""
    raise NotImplementedError(
        f"verifying/rederive.py surveys no {type(method).__name__}: a function under @survey_anew.register is missing"
    )


def survey_all(expr: expressions.Expr, sources: SourceTensors) -> dict[int, Any]:
    """What `survey_anew` gives for every merge in `expr` whose method surveys, by the identity of the Merge."""
    merges = (node for node in expressions.parts(expr) if isinstance(node, expressions.Merge))
    return {id(node): survey_anew(node.method, node, sources) for node in merges if node.method.about.surveyed}


@survey_anew.register
def _thresholds(method: expressions.Ties, node: expressions.Merge, sources: SourceTensors) -> list[float]:
    """The magnitude from which each operand's differences are kept."""
    assert node.base is not None
    keep = max(1, math.floor(method.density * numel(node)))
    if keep >= numel(node):
        return [0.0] * len(node.operands)
    return [kth_largest(_differences(node, operand, node.base[1], sources), keep) for _, operand in node.operands]


def _blocks(node: expressions.Merge) -> Iterator[tuple[int, int]]:
    return row_blocks(node.shape, DTYPE_BITS[node.dtype] // 8)


ANGLE_ERROR = 2.0**-50
"""How much two correct ways to the cosine of an angle between tensors may differ."""


@survey_anew.register
def _slerp_weights(method: expressions.Slerp, node: expressions.Merge, sources: SourceTensors) -> tuple[list[float], list[float]]:
    """The two weights, and how much each may differ for the rounding of the angle: near opposite tensors that is a lot."""
    t = method.t
    sums: list[list[float]] = []
    for start, stop in _blocks(node):
        a, b = (sources.piece(operand, start, stop).double().flatten() for _, operand in node.operands)
        sums.append([float((x * y).sum()) for x, y in ((a, b), (a, a), (b, b))])
    ab, aa, bb = map(math.fsum, zip(*sums, strict=True))
    cosine = ab / (math.sqrt(aa) * math.sqrt(bb)) if aa and bb else 1.0

    def at(cosine: float) -> tuple[float, float]:
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        if math.sin(angle) < 1e-7:
            return 1 - t, t
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    weights = at(cosine)
    around = [at(cosine - ANGLE_ERROR), at(cosine + ANGLE_ERROR)]
    return list(weights), [max(abs(other[i] - weights[i]) for other in around) for i in (0, 1)]


def _differences(
    node: expressions.Merge, operand: expressions.Expr, base: expressions.Expr, sources: SourceTensors
) -> Callable[[], Iterator[Tensor]]:
    """Gives the magnitudes of operand - base, rounded as they are computed, block by block, as often as asked."""
    computing = COMPUTING[expressions.in_float64(node)]
    largest = torch.finfo(computing.torch).max  # stands for NaN and infinity, which --allow-nonfinite lets pass

    def blocks() -> Iterator[Tensor]:
        for start, stop in _blocks(node):
            delta = _difference(sources.piece(operand, start, stop), sources.piece(base, start, stop), computing)
            yield delta.abs().nan_to_num(largest, largest).flatten()

    return blocks


def kth_largest(blocks: Callable[[], Iterator[Tensor]], k: int) -> float:
    """The k-th largest of all elements of the blocks, none of them negative.

    Exact in bounded memory: the range that holds it is cut into equal bins again and again, until what is left in it can be sorted
    or is all the same. (The merge counts bit patterns.)
    """
    low, high = 0.0, max(float(block.max()) for block in blocks())
    while low < high:

        def binned(block: Tensor, low: float = low, high: float = high) -> tuple[Tensor, Tensor]:
            inside = block[(block >= low) & (block <= high)]
            return inside, ((inside.double() - low) / (high - low) * SURVEY_BINS).long().clamp_(max=SURVEY_BINS - 1)  # rises with the value

        counts = torch.stack([torch.bincount(binned(block)[1], minlength=SURVEY_BINS) for block in blocks()]).sum(0)
        above = counts.flip(0).cumsum(0).flip(0)  # elements of this bin or a higher one
        chosen = int((above >= k).nonzero()[-1])
        k -= int(above[chosen] - counts[chosen])
        kept = (inside[bins == chosen] for inside, bins in map(binned, blocks()))
        if counts[chosen] <= SURVEY_SORTED:
            return float(torch.cat(list(kept)).sort(descending=True).values[k - 1])
        ends = [(float(values.min()), float(values.max())) for values in kept if len(values)]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    return low
