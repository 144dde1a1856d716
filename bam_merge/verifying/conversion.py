"""The dense models that a result is compared with: as they are stored, and as the merge's output.dtype makes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bam_merge.architectures.opening import open_folder
from bam_merge.checkpoints.dtypes import DTYPE_NAMES
from bam_merge.checkpoints.reading import changed_files
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.planning.plan import Plan
from bam_merge.values.tensors import TORCH_DTYPES
from bam_merge.verifying.rounding import nearest


@dataclass(frozen=True)
class Converted(StoredModel):
    """A dense model whose weights are rounded to the dtype that the merge was to be written in, by verification's own rounding: what
    the conversion costs is what the user asked for, and all that is left to see is what the merge did."""

    dtype: str = "F32"

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._rounded(super().read(parameter), dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return self._rounded(super().read_rows(parameter, rows), dtype)

    def _rounded(self, stored: Tensor, dtype: torch.dtype | None) -> Tensor:
        wide = stored if stored.dtype == torch.float64 else stored.float()
        return nearest(wide, self.dtype).to(TORCH_DTYPES[self.dtype] if dtype is None else dtype)


def open_dense(plan: Plan) -> dict[str, StoredModel]:
    """The reference model of every source. The plan's headers serve once more while the files are those that were planned with; what
    config.json means is read by the reference model's own reading."""
    accept = plan.recipe.accept
    head = accept.head if accept is not None else None
    return {
        name: stored_model(open_folder(model.checkpoint.path) if any(changed_files(model.checkpoint)) else model.checkpoint, head=head)
        for name, model in plan.models.items()
    }


def as_written(dense: dict[str, StoredModel], plan: Plan) -> dict[str, StoredModel]:
    """Dense models as the merge's output.dtype makes them."""
    dtype = DTYPE_NAMES.get(plan.recipe.output.dtype)
    if dtype is None:
        return dense
    return {name: Converted(stored.checkpoint, stored.config, stored.leaves, dtype) for name, stored in dense.items()}
