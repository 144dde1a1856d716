"""A source as a model to compute with, read as the plan says: adapters and scales applied, one row for each token of the result."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from bam_merge.architectures.locate import cells
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Computed, Read, Slice, byte_runs, leaf_runs, stored
from bam_merge.checkpoints.reading import SourceFiles
from bam_merge.expressions import Concat, Expr, concat_runs
from bam_merge.merging.source_rows import ComputedRows
from bam_merge.model.config import model_config
from bam_merge.model.loading import StoredModel, parameter_name
from bam_merge.planning.plan import Plan
from bam_merge.values.tensors import buffer, decode


class _Own(threading.local):
    """What a thread has open: its files, and the computed tensors with what their formulas keep."""

    def __init__(self) -> None:
        self.sources: SourceFiles | None = None
        self.computed: dict[int, ComputedRows] = {}


@dataclass(frozen=True)
class PlannedModel(StoredModel):
    """A model whose parameters are expressions over the stored tensors of a plan's sources. Its `files` are open until it is left."""

    plan: Plan
    made_of: Mapping[str, Expr]
    own: _Own = field(default_factory=_Own)
    files: list[SourceFiles] = field(default_factory=list)

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        expr = self.made_of[parameter]
        return self._elements(expr, 0, prod(expr.shape)).view(expr.shape).to(dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        expr = self.made_of[parameter]
        row = prod(expr.shape[1:])
        spans = [(rows[0], len(rows))] if isinstance(rows, range) else [(index, 1) for index in rows]
        found = [self._elements(expr, first * row, (first + count) * row) for first, count in spans]
        return torch.cat(found).view(len(rows), *expr.shape[1:]).to(dtype)

    def _elements(self, expr: Expr, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat, as stored or as computed."""
        if isinstance(expr, Computed):
            return self._opened(expr).elements(start, stop)
        if isinstance(expr, Slice) and isinstance(expr.of, Computed):
            of = self._opened(expr.of)
            return torch.cat([of.elements(first, first + count) for first, count in leaf_runs(expr, start, stop)])
        if isinstance(expr, Concat):
            return torch.cat([self._elements(part, first, last) for part, first, last in concat_runs(expr, start, stop)])
        assert isinstance(expr, Read | Slice), "a source's tensor"
        read = stored(expr)
        bytes_B, view = buffer((stop - start) * DTYPE_BITS[read.dtype] // 8)
        self._sources().read(read, byte_runs(expr, start, stop), view)
        return decode(bytes_B, read.dtype)

    def _sources(self) -> SourceFiles:
        if self.own.sources is None:
            self.own.sources = SourceFiles(self.plan.checkpoints)
            self.files.append(self.own.sources)
        return self.own.sources

    def _opened(self, node: Computed) -> ComputedRows:
        if id(node) not in self.own.computed:
            self.own.computed = {id(node): ComputedRows(node, self._sources().read, {})}  # of one at a time: formulas keep whole matrices
        return self.own.computed[id(node)]


@contextmanager
def planned_model(plan: Plan, name: str) -> Iterator[PlannedModel]:
    """The reference model of one of a plan's sources. Raises CheckpointError where its configuration gives none."""
    source = plan.models[name]
    found = {}
    for cell in cells(source.family, source.facts["num_hidden_layers"]):
        for role in cell.row.roles:
            if (expr := source.tensors.get((role, cell.layer))) is not None:
                found[parameter_name(role, cell)] = expr
    config = replace(model_config(dict(source.config)), rope_interleaved=source.facts["rope_interleaved"])  # as its rows are put (pairs.py)
    model = PlannedModel(source.checkpoint, config, {}, plan, found)
    try:
        yield model
    finally:
        for files in model.files:
            files.__exit__()
