"""What the second way to a method is given and gives back, one function per record; and what these functions share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy
import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Shape
from bam_merge.verifying.rounding import Derived
from bam_merge.verifying.rows import SourceTensors, row_blocks


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


COSINE_ERROR = {"F32": 2.0**-40, "F64": 2.0**-48}
"""How much two correct ways to the cosine of an angle between tensors of a dtype may differ, or, relative to it, to a sum of squares."""


@singledispatch
def draw(method: expressions.Initialiser, random: numpy.random.RandomState, shape: Shape) -> Derived:
    """The whole tensor in float64, one function per record, out of the generator, which is the one thing shared with the merge. Where
    there is no slack, it is the numbers that are drawn and no others."""
    raise NotImplementedError(f"verifying/rederive/ draws no {type(method).__name__}: a function under @draw.register is missing")


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
        return [difference(x, self.base, self.computing) for x in self.operands]

    def start(self) -> Tensor:
        """The base in float64."""
        assert self.base is not None
        return self.base.double()


@singledispatch
def derive(method: expressions.Method, rows: Rows) -> Derived:
    """The merged rows, one function per record. Their `slack` is without the last operation: so many roundings, each relative to what it
    rounds at most."""
    raise NotImplementedError(f"verifying/rederive/ derives no {type(method).__name__}: a function under @derive.register is missing")


@singledispatch
def survey_anew(method: expressions.Method, node: expressions.Merge, sources: SourceTensors) -> Any:
    """What a method must know of whole tensors, for records that say they are `surveyed`, from blocks of rows."""
    raise NotImplementedError(f"verifying/rederive/ surveys no {type(method).__name__}: a function under @survey_anew.register is missing")


@dataclass(frozen=True)
class Written:
    """A tensor that a merge wrote: what gives its rows [start, stop), and its dtype."""

    rows: Callable[[int, int], Tensor]
    dtype: str


@singledispatch
def overall(method: expressions.Method, node: expressions.Merge, sources: SourceTensors, known: Any, written: Written) -> float:
    """How far a written tensor is as a whole from what its method asks for, in units of what rounding it allows: of methods that more than
    one tensor may answer. Of the others its rows tell all."""
    return 0.0


def blocks_of(node: expressions.Merge) -> Iterator[tuple[int, int]]:
    return row_blocks(node.shape, DTYPE_BITS[node.dtype] // 8)


def difference(x: Tensor, base: Tensor, computing: Computing) -> Tensor:
    """x - base as the computing dtype rounds it, in float64."""
    return (x.to(computing.torch) - base.to(computing.torch)).double()


def weighed_sum(weights: Sequence[float], x_K: Sequence[Tensor]) -> Tensor:
    total = x_K[0] * weights[0]
    for weight, x in zip(weights[1:], x_K[1:], strict=True):
        total.add_(x, alpha=weight)
    return total


def weighted(weights: Sequence[float], errors: Sequence[float], rows: Rows) -> Derived:
    """The sum of the operands by weights, each of which may be off by so much."""
    count, x_K, computing = len(rows.operands), rows.wide, rows.computing
    shares = [abs(w) * (count + 1) * computing.unit + error for w, error in zip(weights, errors, strict=True)]
    return Derived(weighed_sum(weights, x_K), weighed_sum(shares, [x.abs() for x in x_K]) + 2 * count * computing.least)
