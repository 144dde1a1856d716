"""Bytes to torch and back: the dtypes of safetensors, and buffers that files can be read into without a copy."""

import torch
from torch import Tensor

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that arithmetic is done with. Others are only ever copied."""


def buffer(nbytes: int) -> tuple[Tensor, memoryview]:
    """A byte tensor [nbytes] and the memory behind it, for preadv and pwrite."""
    bytes_B = torch.empty(nbytes, dtype=torch.uint8)
    return bytes_B, memoryview(bytes_B.numpy().data)


def decode(bytes_B: Tensor, dtype: str) -> Tensor:
    """The elements that the bytes hold, sharing their memory: [nbytes] -> [nbytes / itemsize]."""
    return bytes_B.view(TORCH_DTYPES[dtype])


def encode(values: Tensor, dtype: str) -> memoryview:
    """The bytes of `values`, flattened and rounded once to `dtype` (to nearest, ties to even), little-endian."""
    return memoryview(values.reshape(-1).to(TORCH_DTYPES[dtype]).contiguous().view(torch.uint8).numpy().data)
