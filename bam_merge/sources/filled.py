"""Whether a tensor of a mixture is what a merge fills in where a layout needs one that no source has."""

from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Leaf, numel, stored
from bam_merge.checkpoints.reading import read_piece

BLOCK = 2**20
"""Bytes that are looked at at a time."""


ONE = {"F64": b"\0\0\0\0\0\0\xf0\x3f", "F32": b"\0\0\x80\x3f", "BF16": b"\x80\x3f", "F16": b"\0\x3c"}
"""The number 1 as it is stored."""


def is_filled(checkpoint: Checkpoint, leaf: Leaf, what: str, other: Leaf | None = None) -> bool:
    """Whether a tensor is all zeros, all ones, or `other`'s copy. One that is not at hand yet is taken for it: a merge looks again."""
    numbers = {"zeros": bytes(8), "ones": ONE.get(leaf.dtype)}
    if checkpoint.remote is not None:
        return True
    number = numbers.get(what)
    if number is None and (other is None or (other.shape, other.dtype) != (leaf.shape, leaf.dtype)):
        return False
    entry = checkpoint.tensors[stored(leaf).tensor]
    size = entry.nbytes // max(1, entry.numel)
    for start in range(0, numel(leaf), BLOCK // 8):
        stop = min(start + BLOCK // 8, numel(leaf))
        data, wanted = bytearray((stop - start) * size), bytearray((stop - start) * size)
        read_piece(checkpoint, leaf, memoryview(data), start, stop)
        if number is not None:
            wanted = bytearray(number[:size] * (stop - start))
        elif other is not None:
            read_piece(checkpoint, other, memoryview(wanted), start, stop)
        if data != wanted:
            return False
    return True
