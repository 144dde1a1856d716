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
    all_turned = formula.turned or (False,) * len(formula.scales)
    for scale, turned, a, b in zip(formula.scales, all_turned, inputs[1::2], inputs[2::2], strict=True):
        if turned:
            total_RC.addmm_(a.columns(start, stop).double().T, b.whole().T, alpha=scale)
        else:
            total_RC.addmm_(b.rows(start, stop).double(), a.whole(), alpha=scale)
    return total_RC


@compute.register
def dora(formula: formulas.Dora, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """m_i V_i / |V_i| with V = W + s B A (DoRA, arXiv 2402.09353, equation 5)."""
    w, a, b, m = inputs
    v_RC = w.rows(start, stop).double().addmm_(b.rows(start, stop).double(), a.whole(), alpha=formula.scale)
    factor_R = m.rows(start, stop).double() / torch.linalg.vector_norm(v_RC, dim=1)
    return v_RC.mul_(factor_R[:, None])


@compute.register
def shifted(formula: formulas.Shifted, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """b + s c."""
    return inputs[0].rows(start, stop).double().add_(inputs[1].rows(start, stop).double(), alpha=formula.scale)


@compute.register
def token_rows(formula: formulas.TokenRows, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """W, and in the place of some of its rows those of D."""
    total_RC = inputs[0].rows(start, stop).double()
    there = [(row - start, place) for place, row in enumerate(formula.rows) if start <= row < stop]
    if there:
        rows, places = zip(*there, strict=True)
        total_RC[list(rows)] = inputs[1].take(places).double()
    return total_RC


@compute.register
def saved(formula: formulas.Saved, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """The stored numbers."""
    return inputs[0].rows(start, stop).double()


@compute.register
def scaled(formula: formulas.Scaled, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """w_ij times the scale of its block: each row takes those of its block row, each one as often as its block has columns."""
    weight, scales = inputs
    height, width = formula.block
    grid_GH = scales.whole().reshape(formula.grid(weight.shape))
    factors_RH = grid_GH[torch.arange(start, stop) // height]
    factors_RC = factors_RH.repeat_interleave(min(width, weight.shape[1]), dim=1)[:, : weight.shape[1]]
    return weight.rows(start, stop).double().mul_(factors_RC)


@compute.register
def columns(formula: formulas.Columns, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """Some of the columns, scaled."""
    return inputs[0].rows(start, stop)[:, formula.first : formula.stop].double().mul_(formula.scale)


@compute.register
def pairs(formula: formulas.Pairs, inputs: Sequence[Input], start: int, stop: int) -> Tensor:
    """Rows of the same heads, in another order."""
    order = [formula.source(row) for row in range(start, stop)]
    first = min(order)
    return inputs[0].rows(first, max(order) + 1)[[row - first for row in order]].double()


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
