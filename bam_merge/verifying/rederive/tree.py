"""Rows of what an expression means: its tree, from the sources' pieces up."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.verifying.rederive.deriving import COMPUTING, Computing, Rows, derive, survey_anew
from bam_merge.verifying.rederive.initialisers import initialised
from bam_merge.verifying.rounding import Derived, Other
from bam_merge.verifying.rows import SourceTensors, concat_runs, is_computed


def rederive(expr: expressions.Expr, sources: SourceTensors, known: Mapping[int, Any], start: int, stop: int, dtype: str) -> Derived:
    """Rows [start, stop) of what `expr` means, in float64, with what rounding may make of them on the way to `dtype`."""
    if isinstance(expr, expressions.Init):
        return initialised(expr, start, stop, dtype)
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
    merge: expressions.Merge, sources: SourceTensors, known: Mapping[int, Any], start: int, stop: int, computing: Computing
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


def survey_all(expr: expressions.Expr, sources: SourceTensors) -> dict[int, Any]:
    """What `survey_anew` gives for every merge in `expr` whose method surveys, by the identity of the Merge."""
    merges = (node for node in expressions.parts(expr) if isinstance(node, expressions.Merge))
    return {id(node): survey_anew(node.method, node, sources) for node in merges if node.method.about.surveyed}
