"""Do the plan's updates and the second reading of the adapters give the same weights?

Of an expert's tensors expert isolation shows it. What all experts share, and a dense result, has no expert to be compared with, and that
such tensors follow from the plan proves nothing of what the plan made of adapter_config.json; so there every tensor that an adapter changes
is compared with the reference model's own.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bam_merge.architectures.locate import Cell
from bam_merge.checkpoints.pieces import Read, Slice
from bam_merge.expressions import Concat, Expr
from bam_merge.model.loading import StoredModel, parameter_name
from bam_merge.planning.plan import Plan
from bam_merge.sources.dense import DenseModel
from bam_merge.verifying.measuring import Worst
from bam_merge.verifying.report import Check
from bam_merge.verifying.rows import RowReader, SourceTensors, row_blocks

TOLERANCE = 2.0**-20
"""Largest difference, relative to the largest number of the tensor, that two ways to a sum in float32 may have."""


def same_updates(plan: Plan, dense: Mapping[str, StoredModel]) -> Iterator[Check]:
    """Every tensor of a source that is not its base's own, nor an expert's, against the reference model of base and adapters."""
    isolated = {(role, step.layer) for step in plan.steps if step.is_experts for role in step.role.split("+")}
    worst, count = Worst("adapters", TOLERANCE), 0
    sources = SourceTensors(plan, RowReader())
    for name, model in plan.models.items():
        if not model.adapters:
            continue
        for (role, layer), expr in model.tensors.items():
            row = next(row for row in model.family.rows if role in row.roles)
            parameter = parameter_name(role, Cell(row, layer))
            if not _is_the_bases(expr, model) and (role, layer) not in isolated:
                count += 1
                worst.add(apart_by(sources, expr, dense[name], parameter), f"sources.{name}: {parameter}")
    if count:
        yield worst.check(f"{count} tensors are what the adapters' own files make of their bases")


def _is_the_bases(expr: Expr, model: DenseModel) -> bool:
    if isinstance(expr, Concat):
        return all(_is_the_bases(part, model) for part in expr.parts)
    of = expr.of if isinstance(expr, Slice) else expr
    return isinstance(of, Read) and of.source == model.store_name


def apart_by(sources: SourceTensors, expr: Expr, dense: StoredModel, parameter: str) -> float:
    """The largest difference of what the plan has of a source and a parameter of its model, relative to the largest number."""
    whole = dense.read(parameter) if isinstance(dense.leaves[parameter], Slice) else None
    largest, size = 0.0, 1e-30
    for start, stop in row_blocks(expr.shape, 8):
        rows = whole[start:stop] if whole is not None else dense.read_rows(parameter, range(start, stop))
        off, block = _of_block(sources.piece(expr, start, stop).double(), rows.double())
        largest, size = max(largest, off), max(size, block)
    return largest / size


def _of_block(mine: Tensor, theirs: Tensor) -> tuple[float, float]:
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    off = (mine - theirs).abs().masked_fill(same, 0.0).nan_to_num(torch.inf, torch.inf)
    return float(off.max()), float(theirs.abs().nan_to_num(0.0, 0.0).max())
