"""The kernels that make experts differ: units drawn anew, noise, differences of low rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.merging.kernels.chunks import Chunk, Chunks, combine, survey
from bam_merge.values.streams import normals, uniforms

# ---- units drawn anew --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dropped:
    """Which units of a tensor are dropped [units], how many are before each [units + 1]; mean and deviation of their entries."""

    which: Tensor
    before: Tensor
    mean: float = 0.0
    std: float = 0.0

    def entries(self, method: expressions.Drop, chunk: Chunk) -> Tensor:
        """Which entries of a chunk [C] belong to dropped units."""
        place_C = torch.arange(chunk.start, chunk.start + len(chunk.operands[0]))
        return self.which[place_C // chunk.columns if method.units == "rows" else place_C % chunk.columns]

    def entries_before(self, method: expressions.Drop, chunk: Chunk) -> int:
        """How many entries of dropped units the tensor has before a chunk, row by row."""
        row, column = divmod(chunk.start, chunk.columns)
        if method.units == "columns":
            return row * int(self.before[-1]) + int(self.before[column])
        return int(self.before[row]) * chunk.columns + (column if self.which[row] else 0)


def dropped_units(method: expressions.Drop, units: int) -> Dropped:
    """The first floor(ratio units) of the units, in the order of their numbers in the stream."""
    order = numpy.argsort(uniforms(method.seed, method.streams[0], 0, units), kind="stable")
    which = torch.zeros(units, dtype=torch.bool)
    which[torch.from_numpy(order[: method.dropped(units)])] = True
    return Dropped(which, torch.cat((torch.zeros(1, dtype=torch.int64), which.cumsum(0))))


@survey.register
def drop_statistics(method: expressions.Drop, chunks: Chunks, numel: int) -> Dropped:
    """Mean and deviation of the dropped entries in float64, in two passes. The deviation of a single entry is 0."""
    columns = next(chunks()).columns
    units = dropped_units(method, numel // columns if method.units == "rows" else columns)

    def entries() -> Iterator[Tensor]:
        return (chunk.operands[0][units.entries(method, chunk)].double() for chunk in chunks())

    count = int(units.before[-1]) * (columns if method.units == "rows" else numel // columns)
    mean = sum(float(x_C.sum()) for x_C in entries()) / count
    squares = sum(float((x_C - mean).square_().sum()) for x_C in entries())
    return Dropped(units.which, units.before, mean, (squares / (count - 1)) ** 0.5 if count > 1 else 0.0)


@combine.register
def drop(method: expressions.Drop, chunk: Chunk, known: Dropped) -> Tensor:
    """The entries of the dropped units become mean + std n, n being the numbers of the stream in the order of the entries."""
    (x_C,) = chunk.operands
    there_C = known.entries(method, chunk)
    count = int(there_C.sum())
    drawn = torch.from_numpy(normals(method.seed, method.streams[1], known.entries_before(method, chunk), count))
    result_C = x_C.clone()
    result_C[there_C] = drawn.mul_(known.std).add_(known.mean).to(x_C.dtype)
    return result_C


# ---- noise -------------------------------------------------------------------------------------------------------------------


@combine.register
def noise(method: expressions.Noise, chunk: Chunk, known: None) -> Tensor:
    """x + std n where the stream's number is below `share`."""
    (x_C,) = chunk.operands
    where = uniforms(method.seed, method.streams[0], chunk.start, len(x_C))
    values = normals(method.seed, method.streams[1], chunk.start, len(x_C))
    noisy_C = torch.from_numpy(values).mul_(method.std).add_(x_C).to(x_C.dtype)
    return torch.where(torch.from_numpy(where < method.share), noisy_C, x_C)


# ---- low rank ----------------------------------------------------------------------------------------------------------------


@survey.register
def low_rank_factors(method: expressions.LowRank, chunks: Chunks, numel: int) -> tuple[Tensor, Tensor] | None:
    """Left [R, r] and right [r, C], whose product is the best approximation of rank r to D = x - base [R, C]; None where D is not finite.

    The vectors are those of the r largest eigenvalues of D D^T, or of D^T D where that is smaller; D is projected on them. In float64.
    """
    difference = torch.empty(numel, dtype=torch.float64)
    for chunk in chunks():
        (x_C,) = chunk.operands
        assert chunk.base is not None
        torch.sub(x_C.double(), chunk.base.double(), out=difference[chunk.start : chunk.start + len(x_C)])
        columns = chunk.columns
    d_RC = difference.view(-1, columns)
    wide = d_RC.shape[0] <= columns
    gram = d_RC @ d_RC.T if wide else d_RC.T @ d_RC
    if not bool(torch.isfinite(gram).all()):
        return None
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -method.rank :].contiguous()
    return (vectors, vectors.T @ d_RC) if wide else (d_RC @ vectors, vectors.T.contiguous())


@combine.register
def low_rank(method: expressions.LowRank, chunk: Chunk, known: tuple[Tensor, Tensor] | None) -> Tensor:
    """base + left right."""
    (x_C,) = chunk.operands
    assert chunk.base is not None
    if known is None:
        return torch.full_like(x_C, torch.nan)
    left_Rr, right_rC = known
    start, stop = chunk.start, chunk.start + len(x_C)
    first, last = start // chunk.columns, -(-stop // chunk.columns)
    update = (left_Rr[first:last] @ right_rC).flatten()[start - first * chunk.columns :][: len(x_C)]
    return (update + chunk.base).to(x_C.dtype)
