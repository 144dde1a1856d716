"""The second way to the methods that merge differences from a base (task vectors)."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.pieces import numel
from bam_merge.values.streams import uniforms
from bam_merge.verifying.election import elect
from bam_merge.verifying.rederive.deriving import COMPUTING, Rows, blocks_of, derive, difference, survey_anew, weighed_sum
from bam_merge.verifying.rederive.thresholds import kth_largest
from bam_merge.verifying.rounding import Derived
from bam_merge.verifying.rows import SourceTensors


@derive.register
def _task_arithmetic(method: expressions.TaskArithmetic, rows: Rows) -> Derived:
    count, deltas, computing = len(rows.operands), rows.deltas, rows.computing
    slack = weighed_sum([abs(method.scale * w) * (count + 4) * computing.unit for w in method.weights], [d.abs() for d in deltas])
    value = rows.start() + method.scale * weighed_sum(method.weights, deltas)
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


@survey_anew.register
def _thresholds(method: expressions.Ties, node: expressions.Merge, sources: SourceTensors) -> list[float]:
    """The magnitude from which each operand's differences are kept."""
    assert node.base is not None
    keep = max(1, math.floor(method.density * numel(node)))
    if keep >= numel(node):
        return [0.0] * len(node.operands)
    return [kth_largest(magnitudes(node, operand, node.base[1], sources), keep) for _, operand in node.operands]


def magnitudes(
    node: expressions.Merge, operand: expressions.Expr, base: expressions.Expr, sources: SourceTensors
) -> Callable[[], Iterator[Tensor]]:
    """Gives the magnitudes of operand - base, rounded as they are computed, block by block, as often as asked."""
    computing = COMPUTING[expressions.in_float64(node)]
    largest = torch.finfo(computing.torch).max  # stands for NaN and infinity, which --allow-nonfinite lets pass

    def blocks() -> Iterator[Tensor]:
        for start, stop in blocks_of(node):
            delta = difference(sources.piece(operand, start, stop), sources.piece(base, start, stop), computing)
            yield delta.abs().nan_to_num(largest, largest).flatten()

    return blocks
