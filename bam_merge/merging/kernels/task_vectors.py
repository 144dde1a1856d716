"""Kernels of the methods that merge differences from a base (task vectors)."""

import math

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.merging.kernels.chunks import Chunk, Chunks, combine, survey, weighted_sum
from bam_merge.values.streams import uniforms


@combine.register
def task_arithmetic(method: expressions.TaskArithmetic, chunk: Chunk, known: None) -> Tensor:
    """base + scale * sum_i w_i (x_i - base) (arXiv 2212.04089, section 2)."""
    assert chunk.base is not None
    return weighted_sum(chunk.deltas, method.weights).mul_(method.scale).add_(chunk.base)


# ---- TIES --------------------------------------------------------------------------------------------------------------------


@survey.register
def ties_thresholds(method: expressions.Ties, chunks: Chunks, numel: int) -> list[float]:
    """For each operand the magnitude of its k-th largest difference, k = floor(density * numel), at least 1.

    Exact, in two passes (of float64 four) and constant memory: the bit pattern of a non-negative float orders like its value, so a
    histogram of its high 16 bits finds the bin of the k-th largest, one of the next 16 bits in that bin a finer bin, and so on.
    """
    keep = max(1, math.floor(method.density * numel))
    if keep >= numel:
        return [0.0] * len(method.weights)
    dtype = next(chunks()).operands[0].dtype
    found = [(0, keep)] * len(method.weights)  # of each operand's threshold the bits known so far, and its rank among all that have them
    first = dtype.itemsize * 8 - 16
    for shift in range(first, -1, -16):
        counts_KB = [torch.zeros(2**16, dtype=torch.int64) for _ in found]
        for chunk in chunks():
            for counts_B, (high, _), d_C in zip(counts_KB, found, chunk.deltas, strict=True):
                bits_C = _bits(d_C) >> shift
                counts_B += torch.bincount(bits_C if shift == first else bits_C[bits_C >> 16 == high] & 0xFFFF, minlength=2**16)
        bins = [_bin_of(counts_B, rank) for counts_B, (_, rank) in zip(counts_KB, found, strict=True)]
        found = [((high << 16) | low, rank) for (high, _), (low, rank) in zip(found, bins, strict=True)]
    values = [float(torch.tensor(pattern, dtype=_INTEGERS[dtype]).view(dtype)) for pattern, _ in found]
    return [math.inf if math.isnan(value) else value for value in values]  # so many NaN that nothing finite is kept


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _bits(d_C: Tensor) -> Tensor:
    return d_C.abs().view(_INTEGERS[d_C.dtype])


def _bin_of(counts_B: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th largest element, and its rank inside the bin (1 = the largest)."""
    above_B = counts_B.flip(0).cumsum(0).flip(0)  # elements in this bin or a higher one
    index = int((above_B >= keep).nonzero()[-1])
    return index, keep - int(above_B[index] - counts_B[index])


@combine.register
def ties(method: expressions.Ties, chunk: Chunk, known: list[float]) -> Tensor:
    """base + scale * disjoint mean of the trimmed task vectors (arXiv 2306.01708, section 4).

    Trim keeps every entry whose magnitude reaches the threshold, equal ones included, as the authors' code does; and NaN, which is
    the caller's to find.
    """
    trimmed = [d_C.masked_fill_(d_C.abs() < least, 0.0) for d_C, least in zip(chunk.deltas, known, strict=True)]
    assert chunk.base is not None
    return _disjoint_mean(trimmed, method.weights, 1.0).mul_(method.scale).add_(chunk.base)


def _disjoint_mean(deltas: list[Tensor], weights: tuple[float, ...], density: float) -> Tensor:
    """Elect the sign of the weighted sum, then average the non-zero entries that have it, by weight, each divided by `density`.

    A difference of negative weight stands for the opposite one, with the weight's magnitude: so it votes, and so it is averaged. 0 where
    none has it, which is where the sum is 0: a tie gives the base. So that it is the formula that makes a tie and not the rounding of
    float32, the sum is of float64 and whole weights, before the division.
    """
    elected_C = torch.zeros_like(deltas[0], dtype=torch.float64)
    for d_C, share in zip(deltas, expressions.proportion(weights), strict=True):
        elected_C += d_C if share == 1 else d_C.double() * share
    lost_C = elected_C.isnan()
    elected_C = elected_C.sign_().to(deltas[0].dtype)
    total_C, mass_C = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for d_C, weight in zip(deltas, weights, strict=True):
        if weight == 0:
            continue
        agrees_C = ((d_C.sign() if weight > 0 else -d_C.sign()) == elected_C) & (d_C != 0)
        total_C += torch.where(agrees_C, (d_C if density == 1 else d_C / density) * weight, 0.0)
        mass_C += agrees_C.to(mass_C.dtype) * abs(weight)
    return torch.where(mass_C != 0, total_C / torch.where(mass_C != 0, mass_C, 1.0), 0.0).masked_fill_(lost_C, math.nan)


@combine.register
def dare_ties(method: expressions.DareTies, chunk: Chunk, known: None) -> Tensor:
    """DARE (arXiv 2311.03099, section 3.2: drop with probability 1 - density, rescale by 1 / density) in the place of TIES's trim."""
    kept = []
    for d_C, stream in zip(chunk.deltas, method.streams, strict=True):
        keep_C = torch.from_numpy(uniforms(method.seed, stream, chunk.start, d_C.numel()) < method.density)
        kept.append(torch.where(keep_C, d_C, 0.0))
    assert chunk.base is not None
    return _disjoint_mean(kept, method.weights, method.density).mul_(method.scale).add_(chunk.base)
