"""The mathematics of tensors that are computed from stored ones, one small pure function per record of formulas.py.

A function makes rows [start, stop) of the result in float64, whose rounding is the caller's. Inputs give their rows in their own dtype;
what is small enough to be kept they give whole, in float64. Shapes: R rows and C columns of the result, r the rank of an update.
"""

from collections.abc import Sequence
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor

from bam_merge import formulas
from bam_merge.records import Formula


class Input(Protocol):
    """A tensor that a computed one is made of."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), in the tensor's own dtype."""

    def take(self, rows: Sequence[int]) -> Tensor:
        """Rows at any places, in this order, in the tensor's own dtype."""

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of a matrix, in its own dtype."""

    def whole(self) -> Tensor:
        """All of it in float64: read once, and kept."""


@singledispatch
def compute(formula: Formula, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the computed tensor, in float64."""
    raise NotImplementedError(f"merging/formulas.py computes no {type(formula).__name__}: a function under @compute.register is missing")


@compute.register
def low_rank(formula: formulas.LowRank, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """W + sum_i s_i B_i A_i, or the transposed updates (LoRA, arXiv 2106.09685, section 4.1)."""
    total_RC = inputs[0].rows(start, stop).double()
    for scale, a, b in zip(formula.scales, inputs[1::2], inputs[2::2], strict=True):
        if formula.transposed:
            total_RC.addmm_(a.columns(start, stop).double().T, b.whole().T, alpha=scale)
        else:
            total_RC.addmm_(b.rows(start, stop).double(), a.whole(), alpha=scale)
    return total_RC


@compute.register
def by_token(formula: formulas.ByToken, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """Rows of the inputs by the table; where it names several, their mean."""
    parts = []
    for run in formula.within(start, stop):
        rows = [inputs[place].rows(row, row + run.rows).double() for place, row in run.of]
        total = rows[0] if rows else torch.zeros(run.rows, *inputs[0].shape[1:], dtype=torch.float64)
        for more in rows[1:]:
            total += more
        parts.append(total.div_(len(rows)) if len(rows) > 1 else total)
    return torch.cat(parts)
