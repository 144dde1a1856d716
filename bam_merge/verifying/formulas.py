"""A second way to the tensors that are computed from stored ones: blocks of rows in float64, one function per record of formulas.py.

Beside each value stands a bound for its error: of the stored numbers, which are exact, and of as many float64 operations as there are.
Nothing that carries out a plan is imported (rederive/ says why, and a contract of import-linter holds it).
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from bam_merge import formulas
from bam_merge.records import Formula
from bam_merge.verifying.rounding import Derived, nearest

UNIT = 2.0**-52
"""Bounds the relative error of one operation of float64, ours and theirs together."""


@dataclass(frozen=True)
class Operand:
    """What a computed tensor is made of: rows [start, stop) of it, in its own dtype, and how far each may be off (None: not at all)."""

    shape: tuple[int, ...]
    read: Callable[[int, int], tuple[Tensor, Tensor | None]]

    def rows(self, start: int, stop: int) -> Derived:
        """Rows [start, stop) in float64."""
        value, slack = self.read(start, stop)
        return Derived(value.double(), slack)

    def all(self) -> Derived:
        return self.rows(0, self.shape[0] if self.shape else 1)


@singledispatch
def computed_rows(formula: Formula, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """Rows [start, stop) of the computed tensor in float64, and a bound for the error of two correct ways to them in that arithmetic."""
    raise NotImplementedError(
        f"verifying/formulas.py derives no {type(formula).__name__}: a function under @computed_rows.register is missing"
    )


@computed_rows.register
def _low_rank(formula: formulas.LowRank, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """Every product by itself. What their sums may be off by in whatever order: of an update's element, the sum of its terms'
    magnitudes is at most that of its row's magnitudes times the largest of its column's (Hoelder)."""
    start_RC = inputs[0].rows(start, stop)
    value_RC, bounds, terms = start_RC.value, [], 2
    for index, (scale, a, b) in enumerate(zip(formula.scales, inputs[1::2], inputs[2::2], strict=True)):
        if formula.turned and formula.turned[index]:
            left_Rr, right_rC = a.all().value[:, start:stop].T, b.all().value.T
        else:
            left_Rr, right_rC = b.rows(start, stop).value, a.all().value
        value_RC = (scale * left_Rr @ right_rC).add_(value_RC)
        bounds.append((left_Rr.abs().sum(1) * abs(scale), right_rC.abs().amax(0)))
        terms += 3 + right_rC.shape[0]
    slack_RC = value_RC.abs().mul_(terms * UNIT)  # what there was before is at most the value, and the updates once more
    for left_R, right_C in bounds:
        slack_RC.addr_(left_R, right_C, alpha=2 * terms * UNIT)
    return Derived(value_RC, slack_RC if start_RC.slack is None else slack_RC + start_RC.slack)


@computed_rows.register
def _dora(formula: formulas.Dora, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """The updated rows brought to unit length, and to the trained one."""
    v = _low_rank(formulas.LowRank((formula.adapter,), (formula.scale,)), inputs[:3], start, stop)
    assert v.slack is not None
    m_R1, norm_R1 = inputs[3].rows(start, stop).value.view(-1, 1), v.value.square().sum(1, keepdim=True).sqrt()
    value_RC = v.value / norm_R1 * m_R1
    of_norm_R1 = v.slack.square().sum(1, keepdim=True).sqrt() / norm_R1 + (v.value.shape[1] + 8) * UNIT
    return Derived(value_RC, v.slack * (m_R1 / norm_R1).abs() * (1 + 2 * of_norm_R1) + value_RC.abs() * of_norm_R1)


@computed_rows.register
def _shifted(formula: formulas.Shifted, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    base, shift_R = inputs[0].rows(start, stop), inputs[1].rows(start, stop).value * formula.scale
    slack_R = (base.value.abs() + shift_R.abs()) * (3 * UNIT)
    return Derived(base.value + shift_R, slack_R if base.slack is None else slack_R + base.slack)


@computed_rows.register
def _token_rows(formula: formulas.TokenRows, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """Row by row: the trained one where there is one."""
    base, trained = inputs[0].rows(start, stop), inputs[1].all().value
    place = {row: index for index, row in enumerate(formula.rows)}
    for row in range(start, stop):
        if row in place:
            base.value[row - start] = trained[place[row]]
            if base.slack is not None:
                base.slack[row - start] = 0.0
    return base


@computed_rows.register
def _saved(formula: formulas.Saved, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    return inputs[0].rows(start, stop)


@computed_rows.register
def _columns(formula: formulas.Columns, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """Column by column of the rows."""
    rows = inputs[0].rows(start, stop)
    there = torch.arange(formula.first, formula.stop)
    value = rows.value.index_select(1, there) * formula.scale
    slack = value.abs() * UNIT
    return Derived(value, slack if rows.slack is None else slack + rows.slack.index_select(1, there) * abs(formula.scale))


@computed_rows.register
def _by_token(formula: formulas.ByToken, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """The runs of the table that reach into rows [start, stop), each cut to them; the mean of what stands in them, one below the other."""
    last = bisect_left(formula.runs, stop, key=lambda run: run.first) - 1
    values, slacks = [], []
    while last >= 0 and formula.runs[last].first + formula.runs[last].rows > start:
        first, rows, of = formula.runs[last]
        a, b = max(start, first) - first, min(stop, first + rows) - first
        stacked = [inputs[place].rows(row + a, row + b) for place, row in of]
        if stacked:
            value = torch.stack([part.value for part in stacked]).mean(0)
            slack = torch.stack([part.value.abs() * (UNIT * len(of) * (len(of) > 1)) for part in stacked]).sum(0)
            slack += sum((part.slack for part in stacked if part.slack is not None), torch.zeros_like(slack)) / len(of)
        else:
            value = torch.zeros(b - a, *inputs[0].shape[1:], dtype=torch.float64)
            slack = torch.zeros_like(value)
        values.append(value)
        slacks.append(slack)
        last -= 1
    return Derived(torch.cat(values[::-1]), torch.cat(slacks[::-1]))


def order_of_pairs(formula: formulas.Pairs, rows: int) -> Tensor:
    """The row that each row of the result is: of every block its heads' turning rows, as a table of pairs that is turned on its side."""
    order = torch.arange(rows).view(-1, formula.block)
    heads = order[:, formula.first : formula.first + formula.rows].reshape(len(order), -1, formula.head)
    turning = heads[:, :, : formula.turning]
    table = turning.reshape(*turning.shape[:2], *((-1, 2) if formula.to_halves else (2, -1))).transpose(2, 3).flatten(2)
    heads = torch.cat((table, heads[:, :, formula.turning :]), 2).flatten(1)
    return torch.cat((order[:, : formula.first], heads, order[:, formula.first + formula.rows :]), 1).flatten()


@computed_rows.register
def _pairs(formula: formulas.Pairs, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    order = order_of_pairs(formula, inputs[0].shape[0])[start:stop]
    first = int(order.min())
    rows = inputs[0].rows(first, int(order.max()) + 1)
    return Derived(rows.value[order - first], None if rows.slack is None else rows.slack[order - first])


def moved_rows(
    formula: Formula, inputs: Sequence[tuple[Callable[[int, int], Tensor], Tensor]], start: int, stop: int, total: int
) -> Tensor:
    """Rows [start, stop) of `total`, as stored, of a tensor whose rows are rows of its inputs, or zeros: what a copy must hold bit by bit.

    An input is what reads its rows, and one row of zeros.
    """
    if isinstance(formula, formulas.Pairs):
        order, (read, _) = order_of_pairs(formula, total)[start:stop], inputs[0]
        first, last = int(order.min()), int(order.max())
        return read(first, last + 1)[order - first]
    assert isinstance(formula, formulas.ByToken), f"verifying/formulas.py moves no rows by {type(formula).__name__}"
    parts, index = [], bisect_left(formula.runs, start + 1, key=lambda run: run.first) - 1
    while index < len(formula.runs) and formula.runs[index].first < stop:
        first, rows, of = formula.runs[index]
        a, b = max(start, first), min(stop, first + rows)
        if of:
            read, _ = inputs[of[0][0]]
            parts.append(read(of[0][1] + a - first, of[0][1] + b - first))
        else:
            parts.append(inputs[0][1].expand(b - a, *inputs[0][1].shape[1:]))
        index += 1
    return torch.cat(parts)


def roundings(derived: Derived, dtype: str) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` (F32 or F64) that a merge may have gone on with, where the value is known to its slack: the least and the
    largest. Of float32 they are nearly everywhere the same."""
    torch_dtype = {"F32": torch.float32, "F64": torch.float64}[dtype]
    slack = torch.zeros_like(derived.value) if derived.slack is None else derived.slack
    low, high = (nearest(derived.value + side * slack, dtype).to(torch_dtype) for side in (-1, 1))
    return low, high


@computed_rows.register
def _scaled(formula: formulas.Scaled, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """Block by block: the rows and columns of each are multiplied with its one number."""
    weight, scales = inputs
    columns = weight.shape[1]
    across = -(-columns // formula.block[1])
    numbers = scales.all().value.reshape(-1).tolist()
    value_RC = weight.rows(start, stop).value.clone()
    for down in range(start // formula.block[0], -(-stop // formula.block[0])):
        top, bottom = (min(max(edge * formula.block[0], start), stop) - start for edge in (down, down + 1))
        for over in range(across):
            left, right = over * formula.block[1], min(columns, (over + 1) * formula.block[1])
            value_RC[top:bottom, left:right] *= numbers[down * across + over]
    return Derived(value_RC, value_RC.abs() * UNIT)
