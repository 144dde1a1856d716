"""Kernels of the methods that average directions on the sphere."""

import math

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.merging.kernels.chunks import Chunk, Chunks, combine, survey, weighted_sum


@survey.register
def slerp_weights(method: expressions.Slerp, chunks: Chunks, numel: int) -> tuple[float, float]:
    """The two weights sin((1-t) a) / sin a and sin(t a) / sin a, with a the angle between the operands.

    Dot products in float64, so the angle is good to about 1e-8; below that, or at opposite directions, where the arc is not
    defined, the straight line 1-t, t.
    """
    dots: list[tuple[float, float, float]] = []
    for chunk in chunks():
        a_C, b_C = chunk.operands
        dots.append((_dot(a_C, b_C), _dot(a_C, a_C), _dot(b_C, b_C)))
    total = math.fsum if a_C.dtype == torch.float64 else sum
    dot, norm_a, norm_b = map(total, zip(*dots, strict=True))
    scale = math.sqrt(norm_a) * math.sqrt(norm_b)
    angle = math.acos(max(-1.0, min(1.0, dot / scale))) if scale > 0 else 0.0
    if math.sin(angle) < 1e-7:
        return 1 - method.t, method.t
    return math.sin((1 - method.t) * angle) / math.sin(angle), math.sin(method.t * angle) / math.sin(angle)


def _dot(a_C: Tensor, b_C: Tensor) -> float:
    """The inner product in float64. Of float64 it is summed pairwise, since there the sum's own error would be seen in the result."""
    return float((a_C * b_C).sum() if a_C.dtype == torch.float64 else a_C.double() @ b_C.double())


@combine.register
def slerp(method: expressions.Slerp, chunk: Chunk, known: tuple[float, float]) -> Tensor:
    """w_a a + w_b b with the weights of `slerp_weights` (Shoemake 1985)."""
    return weighted_sum(chunk.operands, known)
