"""The second way to what makes experts differ: which units are dropped, and low rank by singular values."""

import math
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.values.streams import generator, uniforms
from bam_merge.verifying.rederive.deriving import COMPUTING, Rows, Written, blocks_of, derive, overall, survey_anew
from bam_merge.verifying.rounding import Derived, half_ulp
from bam_merge.verifying.rows import SourceTensors

SUMMED = 2.0**-40
"""How far, relative to what is added up, two sums in float64 of as many numbers as a tensor has may be apart; with room."""


BLOCK = 2**14
"""Normal numbers of one generator: those of number b in a stream called `name` are of the generator called `name:b`."""


def _normals(seed: int, name: str, start: int, count: int) -> numpy.ndarray[Any, Any]:
    """Numbers [start, start + count) of a stream, each block drawn as far as it is needed."""
    found = numpy.empty(count)
    place = 0
    while place < count:
        block, first = divmod(start + place, BLOCK)
        last = min(BLOCK, first + count - place)
        found[place : place + last - first] = generator(seed, f"{name}:{block}").standard_normal(last)[first:]
        place += last - first
    return found


# ---- units drawn anew --------------------------------------------------------------------------------------------------------


class Redrawn(NamedTuple):
    """Which units are dropped; mean and deviation of their entries, and how far both may be off."""

    which: Tensor
    mean: float
    std: float
    mean_off: float
    std_off: float


def dropped_units(method: expressions.Drop, units: int) -> Tensor:
    """Which units are dropped: those whose number in the stream is not above the k-th smallest, k the units to be dropped."""
    numbers, count = torch.from_numpy(uniforms(method.seed, method.streams[0], 0, units)), method.dropped(units)
    return numbers <= float(numbers.kthvalue(count).values) if count else torch.zeros(units, dtype=torch.bool)


@survey_anew.register
def _redrawn(method: expressions.Drop, node: expressions.Merge, sources: SourceTensors) -> Redrawn:
    """From sums and sums of squares of the dropped rows, or columns, of every block."""
    rows, columns = node.shape[0], math.prod(node.shape[1:])
    which = dropped_units(method, rows if method.units == "rows" else columns)
    ((_, operand),) = node.operands
    sums: list[tuple[float, float, int]] = []
    for start, stop in blocks_of(node):
        block = sources.piece(operand, start, stop).double()
        there = block[which[start:stop]] if method.units == "rows" else block[:, which]
        sums.append((float(there.sum()), float(there.square().sum()), there.numel()))
    total, squares, counts = (math.fsum(part) if numpy.isfinite(part).all() else math.nan for part in zip(*sums, strict=True))
    mean = total / counts
    variance = max(0.0, squares - counts * mean * mean) / (counts - 1) if counts > 1 else 0.0
    size = math.sqrt(squares / counts)
    mean_off, std = SUMMED * size, math.sqrt(variance)
    return Redrawn(which, mean, std, mean_off, min(SUMMED * size * size / std, 2.0**-20 * size) if std else 2.0**-20 * size * (counts > 1))


@derive.register
def _drop(method: expressions.Drop, rows: Rows) -> Derived:
    """Row by row of gate and up, column by column of down: a matrix of the numbers that are drawn in the place of what is dropped."""
    redrawn: Redrawn = rows.known
    (value,) = rows.wide
    slack, columns = torch.zeros_like(value), math.prod(value.shape[1:])
    first = rows.first // columns
    if method.units == "rows":
        chosen = redrawn.which[first : first + len(value)]
        count, before = int(chosen.sum()) * columns, int(redrawn.which[:first].sum()) * columns
        place: tuple[Tensor | slice, ...] = (chosen,)
    else:
        width = int(redrawn.which.sum())
        count, before = len(value) * width, first * width
        place = (slice(None), redrawn.which)
    drawn = torch.from_numpy(_normals(method.seed, method.streams[1], before, count)).view(value[place].shape)
    value[place] = redrawn.mean + redrawn.std * drawn
    slack[place] = redrawn.mean_off + redrawn.std_off * drawn.abs()
    return Derived(value, slack)


# ---- noise -------------------------------------------------------------------------------------------------------------------


@derive.register
def _noise(method: expressions.Noise, rows: Rows) -> Derived:
    (value,) = rows.wide
    count = value.numel()
    chosen = torch.from_numpy(uniforms(method.seed, method.streams[0], rows.first, count)).view(value.shape) < method.share
    added = torch.from_numpy(_normals(method.seed, method.streams[1], rows.first, count)).view(value.shape).mul_(method.std)
    added.masked_fill_(~chosen, 0.0)
    return Derived(value + added, (value.abs() + added.abs()) * 2.0**-50 * chosen)


# ---- low rank ----------------------------------------------------------------------------------------------------------------


class Approximated(NamedTuple):
    """The best approximation of a difference [R, C], and the norm of what it leaves out; how far two ways to each may be apart."""

    update: Tensor
    off: float
    rest: float
    rest_off: float


@survey_anew.register
def _approximated(method: expressions.LowRank, node: expressions.Merge, sources: SourceTensors) -> Approximated:
    """By the singular value decomposition of the difference itself, in numpy's LAPACK. (The merge has eigenvectors of its Gram matrix.)

    A subspace turns by at most what the Gram matrix is off over the gap of its eigenvalues (Davis and Kahan 1970): where the singular
    value after the last that is kept is hardly smaller, several approximations are as good, and `rest` alone tells.
    """
    ((_, operand),) = node.operands
    assert node.base is not None
    blocks = [
        sources.piece(operand, start, stop).double() - sources.piece(node.base[1], start, stop).double() for start, stop in blocks_of(node)
    ]
    difference = torch.cat(blocks).view(node.shape[0], -1)
    if not bool(torch.isfinite(difference).all()):
        return Approximated(torch.full_like(difference, torch.nan), 0.0, math.nan, 0.0)
    left, values, right = numpy.linalg.svd(difference.numpy(), full_matrices=False)
    update = torch.from_numpy((left[:, : method.rank] * values[: method.rank]) @ right[: method.rank])
    rest, largest = float(numpy.sqrt(numpy.square(values[method.rank :]).sum())), float(values[0])
    return Approximated(update, _off(values.tolist(), method.rank), rest, _turned(len(values)) * largest)


def _turned(count: int) -> float:
    """The share of its largest eigenvalue that a Gram matrix with so many may be off, with room."""
    return 2.0**-48 * math.sqrt(count)


def _off(values: list[float], rank: int) -> float:
    """How far two ways to the best approximation may be apart, of a difference with these singular values."""
    largest, kept, after = values[0], values[rank - 1], values[rank] if rank < len(values) else 0.0
    share = _turned(len(values))
    turned = share * largest * largest / (kept - after) if kept > after else math.inf
    return share * largest + min(turned, 2 * (kept + math.sqrt(share) * largest))


@overall.register
def _as_near_as_its_rank_allows(
    method: expressions.LowRank, node: expressions.Merge, sources: SourceTensors, known: Approximated, written: Written
) -> float:
    """No matrix of rank r is nearer to the difference than the singular values beyond the r-th say (Eckart and Young 1936), and the
    written one is as near, but for what rounding it has added."""
    ((_, operand),) = node.operands
    left = rounding = 0.0
    for start, stop in blocks_of(node):
        rows = written.rows(start, stop).double()
        left += float((sources.piece(operand, start, stop).double() - rows).square().sum())
        step = half_ulp(rows.abs(), written.dtype) + rows.abs() * COMPUTING[expressions.in_float64(node)].unit
        rounding += float(step.square().sum())
    return abs(math.sqrt(left) - known.rest) / (math.sqrt(rounding) + known.rest_off) if math.isfinite(left) and rounding else 0.0


@derive.register
def _low_rank(method: expressions.LowRank, rows: Rows) -> Derived:
    found: Approximated = rows.known
    start = rows.start()
    first = rows.first // found.update.shape[1]
    value = start + found.update[first : first + len(start)].view(start.shape)
    return Derived(value, torch.full_like(value, found.off) + value.abs() * 2.0**-50)
