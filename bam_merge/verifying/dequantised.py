"""The reference model of a source whose weights are 8-bit floats: its values worked out from files and config.json by a reading of its own.

The plan goes from the configuration to the shapes that scales must have; this goes from the scales that are there to what each is for.
Nothing of sources/dequantised.py and of what carries out a plan is imported. A product of an 8-bit float and a float32 is exact in
float64, so one multiplication in float32 is the number that the merge has to round to.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Joined, Slice, instead, stored
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.model.wrapped import text_config, wrapper_of
from bam_merge.values.tensors import STORED_DTYPES

ENDINGS = ("_scale_inv", "_scale")
"""What the names of a weight's scales have after the weight's own."""


@dataclass(frozen=True)
class Dequantised(StoredModel):
    """A stored model, the names of whose scales stand in `scales`. Its leaves have the dtype that the result would be stored in; values
    are float32 (float64 where a scale is), not rounded to it."""

    scales: Mapping[str, str] = field(default_factory=dict)

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        leaf = self.leaves[parameter]
        name = stored(leaf).tensor
        if name not in self.scales:
            return super().read(parameter, dtype)
        value = self._multiplied(name)
        if isinstance(leaf, Slice):
            rows, columns = value.shape
            value = value.view(leaf.groups, rows // leaf.groups, columns)[:, leaf.start : leaf.start + leaf.rows].reshape(-1, columns)
        return value.to(dtype)

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        if stored(self.leaves[parameter]).tensor not in self.scales:
            return super().read_rows(parameter, rows, dtype)
        return self.read(parameter)[list(rows)].to(dtype)

    def _multiplied(self, name: str) -> Tensor:
        quantised, scale = (self._tensor(which) for which in (name, self.scales[name]))
        wide = torch.float64 if scale.dtype == torch.float64 else torch.float32
        value_RC, numbers = quantised.to(wide), scale.to(wide).flatten()
        rows, columns = value_RC.shape
        height, width = _block(self.checkpoint.config, len(numbers), rows, columns)
        across = -(-columns // width)
        for top in range(0, rows, height):
            for place, left in enumerate(range(0, columns, width)):
                value_RC[top : top + height, left : left + width] *= numbers[top // height * across + place]
        return value_RC

    def _tensor(self, name: str) -> Tensor:
        """A stored tensor whole, by the safetensors library; of a file elsewhere, by its bytes."""
        entry = self.checkpoint.tensors[name]
        if self.checkpoint.afar is not None:
            data = bytearray(self.checkpoint.afar[entry.file].read(entry.offset, entry.nbytes))
            return torch.frombuffer(data, dtype=STORED_DTYPES[entry.dtype]).view(entry.shape)
        with safe_open(self.checkpoint.path / self.checkpoint.tensors[name].file, "pt") as file:
            value: Tensor = file.get_tensor(name)
        return value


def dequantised(checkpoint: Checkpoint, head: str | None = None) -> Dequantised:
    """The reference model of a folder whose weights have scales beside them. `head`: as for `stored_model`."""
    scales = {name: scale for name in checkpoint.tensors for scale in _scales(name, checkpoint)}
    beside = set(scales.values()) | {name for name in checkpoint.tensors if not name.endswith((".weight", ".bias"))}
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if name not in beside or _is_buffer(name)}
    config = _plain(checkpoint.config)
    found = stored_model(replace(checkpoint, config=config, tensors=tensors), computes=False, head=head)
    text = config if wrapper_of(config) is None else text_config(config, has_head=True)
    stated = str(text.get("dtype") or text.get("torch_dtype")).removeprefix("torch.")
    dtype = {"float32": "F32", "float16": "F16", "float64": "F64"}.get(stated, "BF16")
    leaves = {
        parameter: leaf
        if isinstance(leaf, Joined) or stored(leaf).tensor not in scales
        else instead(leaf, replace(stored(leaf), dtype=dtype))
        for parameter, leaf in found.leaves.items()
    }
    return Dequantised(checkpoint, found.config, leaves, scales)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and those inside it, without what they say of quantised weights."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return {key: _plain(value) if isinstance(value, dict) and key.endswith("_config") else value for key, value in kept.items()}


def _scales(name: str, checkpoint: Checkpoint) -> Iterator[str]:
    """The scales of a tensor of 8-bit floats."""
    if checkpoint.tensors[name].dtype.startswith("F8_E"):
        yield from (name + ending for ending in ENDINGS if name + ending in checkpoint.tensors)


def _is_buffer(name: str) -> bool:
    """Whether a tensor that is neither a weight nor a bias is one that old files hold, which the tables know."""
    return name.endswith((".inv_freq", ".masked_bias"))


def _block(config: Mapping[str, Any], count: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of what one of `count` scales is for, in a matrix of that size."""
    places = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    found = (place.get(key) for place in places for key in ("quantization_config", "compression_config"))
    settings: Mapping[str, Any] = next((settings for settings in found if settings), {})
    named = [settings.get("weight_block_size")]
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        named += [weights.get("block_structure"), [1, weights.get("group_size")] if weights.get("strategy") == "group" else None]
    block = next((block for block in named if block), None)
    if block is not None:
        return block[0], block[1]
    return (rows, columns) if count == 1 else (rows // count, columns)
