"""A second way to the tensors that are computed from stored ones: blocks of rows in float64, one function per record of formulas.py.

Beside each value stands a bound for its error: of the stored numbers, which are exact, and of as many float64 operations as there are.
Nothing that carries out a plan is imported (rederive.py says why, and a contract of import-linter holds it).
"""

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
        return self.rows(0, self.shape[0])


@singledispatch
def computed_rows(formula: Formula, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """Rows [start, stop) of the computed tensor in float64, and a bound for the error of two correct ways to them in that arithmetic."""
    raise NotImplementedError(
        f"verifying/formulas.py derives no {type(formula).__name__}: a function under @computed_rows.register is missing"
    )


@computed_rows.register
def _low_rank(formula: formulas.LowRank, inputs: Sequence[Operand], start: int, stop: int) -> Derived:
    """Every product by itself, and the same of magnitudes, which bounds the error of their sums in whatever order."""
    start_RC = inputs[0].rows(start, stop)
    value_RC, size_RC, terms = start_RC.value.clone(), start_RC.value.abs(), 2
    for index, (scale, a, b) in enumerate(zip(formula.scales, inputs[1::2], inputs[2::2], strict=True)):
        if formula.turned and formula.turned[index]:
            left_Rr, right_rC = a.all().value[:, start:stop].T, b.all().value.T
        else:
            left_Rr, right_rC = b.rows(start, stop).value, a.all().value
        value_RC += scale * (left_Rr @ right_rC)
        size_RC += abs(scale) * (left_Rr.abs() @ right_rC.abs())
        terms += 3 + right_rC.shape[0]
    slack_RC = size_RC * (terms * UNIT)
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


def roundings(derived: Derived, dtype: str) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` (F32 or F64) that a merge may have gone on with, where the value is known to its slack: the least and the
    largest. Of float32 they are nearly everywhere the same."""
    torch_dtype = {"F32": torch.float32, "F64": torch.float64}[dtype]
    slack = torch.zeros_like(derived.value) if derived.slack is None else derived.slack
    low, high = (nearest(derived.value + side * slack, dtype).to(torch_dtype) for side in (-1, 1))
    return low, high
