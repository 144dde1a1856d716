"""What is found out of whole tensors, chunk by chunk, in memory that does not grow with them: thresholds, and inner products."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bam_merge.merging.kernels.chunks import Chunk, Chunks

Vectors = Callable[[Chunk], Iterable[Tensor]]
"""The chunks of the vectors in question, made of those of the operands and the base; always as many."""


def kth_largest(chunks: Chunks, vectors: Vectors, ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each vector the magnitudes of its k-th largest elements, for each k of its `ranks` (1 = the largest).

    Exact, in two passes (of float64 four): the bit pattern of a non-negative float orders like its value, so a histogram of its high
    16 bits finds the bin of the k-th largest, one of the next 16 bits in that bin a finer bin, and so on.
    """
    dtype = next(chunks()).operands[0].dtype
    found = [[(0, rank) for rank in of] for of in ranks]  # of each threshold the bits known so far, and its rank among all that have them
    first = dtype.itemsize * 8 - 16
    for shift in range(first, -1, -16):
        counts = [{high: torch.zeros(2**16, dtype=torch.int64) for high, _ in of} for of in found]
        for chunk in chunks():
            for counts_B, x_C in zip(counts, vectors(chunk), strict=True):
                bits_C = x_C.abs().view(_INTEGERS[dtype]) >> shift
                for high, count_B in counts_B.items():
                    count_B += torch.bincount(bits_C if shift == first else bits_C[bits_C >> 16 == high] & 0xFFFF, minlength=2**16)
        found = [
            [((high << 16) | bin_, rank) for high, (bin_, rank) in ((high, _bin_of(by_bits[high], rank)) for high, rank in of)]
            for by_bits, of in zip(counts, found, strict=True)
        ]
    values = [[float(torch.tensor(pattern, dtype=_INTEGERS[dtype]).view(dtype)) for pattern, _ in of] for of in found]
    return [[math.inf if math.isnan(value) else value for value in of] for of in values]  # so many NaN that nothing finite is kept


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _bin_of(counts_B: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th largest element, and its rank inside the bin (1 = the largest)."""
    above_B = counts_B.flip(0).cumsum(0).flip(0)  # elements in this bin or a higher one
    index = int((above_B >= keep).nonzero()[-1])
    return index, keep - int(above_B[index] - counts_B[index])


def gram(chunks: Chunks, vectors: Vectors) -> list[list[float]]:
    """The inner products of the vectors with each other [K][K], in float64."""
    parts: list[list[float]] = []
    for chunk in chunks():
        x_KC = [x_C.double() for x_C in vectors(chunk)]
        parts.append([dot(a_C, b_C) for index, a_C in enumerate(x_KC) for b_C in x_KC[: index + 1]])
        count = len(x_KC)
    sums = iter(map(math.fsum, zip(*parts, strict=True)))
    lower = [[next(sums) for _ in range(index + 1)] for index in range(count)]
    return [[lower[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]


def dot(a_C: Tensor, b_C: Tensor) -> float:
    """The inner product in float64. Of float64 it is summed pairwise, since there the sum's own error would be seen in the result."""
    return float((a_C * b_C).sum() if a_C.dtype == torch.float64 else a_C.double() @ b_C.double())


def cosine(gram_KK: list[list[float]], i: int, j: int) -> float:
    """The cosine of the angle between vectors i and j; 0 where one of them is 0."""
    scale = math.sqrt(gram_KK[i][i]) * math.sqrt(gram_KK[j][j])
    return max(-1.0, min(1.0, gram_KK[i][j] / scale)) if scale > 0 else 0.0
