"""Bytes to torch and back: the dtypes of safetensors, and buffers that files can be read into without a copy."""

import torch
from torch import Tensor

from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPES
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Leaf, numel
from bam_merge.checkpoints.reading import read_piece

STORED_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype.torch) for name, dtype in DTYPES.items() if dtype.torch and hasattr(torch, dtype.torch)
}
"""What this torch has, which may be too old for the newest 8-bit floats."""


TORCH_DTYPES = {name: STORED_DTYPES[name] for name in ARITHMETIC_DTYPES}
"""The dtypes that arithmetic is done with. Others are only ever copied."""


def buffer(nbytes: int) -> tuple[Tensor, memoryview]:
    """A byte tensor [nbytes] and the memory behind it, for preadv and pwrite."""
    bytes_B = torch.empty(nbytes, dtype=torch.uint8)
    return bytes_B, memoryview(bytes_B.numpy().data)


def decode(bytes_B: Tensor, dtype: str) -> Tensor:
    """The elements that the bytes hold, sharing their memory: [nbytes] -> [nbytes / itemsize]."""
    return bytes_B.view(TORCH_DTYPES[dtype])


def read_tensor(checkpoint: Checkpoint, leaf: Leaf) -> Tensor:
    """A stored piece [*leaf.shape], in its own dtype. Raises CheckpointError when it cannot be read."""
    bytes_B, view = buffer(numel(leaf) * TORCH_DTYPES[leaf.dtype].itemsize)
    read_piece(checkpoint, leaf, view)
    return decode(bytes_B, leaf.dtype).reshape(leaf.shape)


def rounded(values: Tensor, dtype: str) -> Tensor:
    """`values` rounded once to `dtype`, to nearest, ties to even.

    torch narrows float64 to 16 bits by way of float32, which rounds twice. Where the way is inexact, the float32 is made the odd one of
    the two neighbours, whose later rounding is that of the value itself (Boldo and Melquiond 2008, rounding to odd).
    """
    if values.dtype != torch.float64 or dtype not in ("F16", "BF16"):
        return values.to(TORCH_DTYPES[dtype])
    near = values.float()
    inexact = (near.double() != values) & ~values.isnan()
    beyond = near.double().abs() > values.abs()
    odd = (near.view(torch.int32) - beyond.int()) | inexact.int()
    return odd.view(torch.float32).to(TORCH_DTYPES[dtype])


def encode(values: Tensor, dtype: str) -> memoryview:
    """The bytes of `values`, flattened and rounded once to `dtype` (to nearest, ties to even), little-endian."""
    return memoryview(rounded(values.reshape(-1), dtype).contiguous().view(torch.uint8).numpy().data)
