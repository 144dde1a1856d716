"""The dense models that a result is compared with: as they are stored, and as the merge's output.dtype makes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bam_merge.architectures.opening import open_folder
from bam_merge.checkpoints.afar import Kept
from bam_merge.checkpoints.dtypes import DTYPE_NAMES
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Leaf
from bam_merge.checkpoints.reading import changed_files, check_unchanged
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.model.model_config import ModelConfig
from bam_merge.planning.plan import Plan
from bam_merge.recipe.places import Adapted as AdaptedSource
from bam_merge.values.tensors import TORCH_DTYPES
from bam_merge.verifying.adapters import Adapted, adapted
from bam_merge.verifying.dequantised import Dequantised, dequantised
from bam_merge.verifying.one_expert import one_expert
from bam_merge.verifying.rounding import nearest

ROUNDED_ELEMENTS = 2**16
"""Elements that are rounded at a time: few enough for a processor's cache."""


@dataclass(frozen=True)
class Converted(StoredModel):
    """A dense model whose weights are rounded to the dtype that the merge was to be written in, by verification's own rounding: what
    the conversion costs is what the user asked for, and all that is left to see is what the merge did. Without a `dtype` each weight is
    rounded to the one that its base stores it in."""

    of: StoredModel | None = None
    dtype: str | None = None

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        assert self.of is not None
        return self._rounded(self.of.read(parameter), parameter, dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        assert self.of is not None
        return self._rounded(self.of.read_rows(parameter, rows), parameter, dtype)

    def _rounded(self, stored: Tensor, parameter: str, dtype: torch.dtype | None) -> Tensor:
        to = self.dtype or self.leaves[parameter].dtype
        if stored.dtype == TORCH_DTYPES[to]:
            return stored.to(dtype)
        flat_n = stored.flatten()
        result_n = torch.empty(len(flat_n), dtype=TORCH_DTYPES[to] if dtype is None else dtype)
        for start in range(0, len(flat_n), ROUNDED_ELEMENTS):
            part = flat_n[start : start + ROUNDED_ELEMENTS]
            result_n[start : start + ROUNDED_ELEMENTS] = nearest(part if part.dtype == torch.float64 else part.float(), to)
        return result_n.reshape(stored.shape)


def open_dense(plan: Plan) -> dict[str, StoredModel]:
    """The reference model of every source. The plan's headers serve once more while the files are those that were planned with; what
    config.json means is read by the reference model's own reading."""
    dense: dict[str, StoredModel] = {}
    kept = Kept()  # layers are read several times
    for name in plan.models:
        _open(plan, name, dense, kept)
    return dense


def _open(plan: Plan, name: str, dense: dict[str, StoredModel], kept: Kept) -> StoredModel:
    """The reference model of one source, entered in `dense`: of an adapter on another source, that one first."""
    if name in dense:
        return dense[name]
    checkpoint, source = plan.models[name].checkpoint, plan.recipe.sources[name]
    if isinstance(source, AdaptedSource) and source.base in plan.recipe.sources:
        found = _open(plan, source.base, dense, kept)
    else:
        if checkpoint.afar is not None:
            check_unchanged({name: checkpoint})
            checkpoint = replace(checkpoint, afar=kept.of(checkpoint.afar))
        elif any(changed_files(checkpoint)):
            checkpoint = open_folder(checkpoint.path)
        said = plan.recipe.source(name)
        opened = dequantised if said.dequantise else stored_model
        if said.expert is not None:
            found = one_expert(checkpoint, str(said.expert), plan.models[name].config)
        else:
            found = opened(checkpoint, head=plan.recipe.accept.head if plan.recipe.accept else None)
    if isinstance(source, AdaptedSource):
        found = adapted(found, [(plan.recipe.located(item.path), item.weight) for item in source.adapters])
    dense[name] = found
    return found


def as_written(dense: dict[str, StoredModel], plan: Plan) -> dict[str, StoredModel]:
    """Dense models as the merge's output.dtype makes them."""
    dtype = DTYPE_NAMES.get(plan.recipe.output.dtype)
    return {
        name: stored if dtype is None and not isinstance(stored, Adapted | Dequantised) else Converted(*_of(stored), stored, dtype)
        for name, stored in dense.items()
    }


def _of(stored: StoredModel) -> tuple[Checkpoint, ModelConfig, Mapping[str, Leaf]]:
    return stored.checkpoint, stored.config, stored.leaves
