"""Dense models as a merge's output.dtype makes them, for comparison with what was written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bam_merge.model.loading import StoredModel
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
