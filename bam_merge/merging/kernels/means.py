"""Kernels of the methods that average the tensors themselves."""

from torch import Tensor

from bam_merge import expressions
from bam_merge.merging.kernels.chunks import Chunk, combine, weighted_sum


@combine.register
def mean(method: expressions.Mean, chunk: Chunk, known: None) -> Tensor:
    """(x_1 + ... + x_K) / K, summed in the order of the operands."""
    total_C = chunk.operands[0].clone()
    for x_C in chunk.operands[1:]:
        total_C += x_C
    return total_C.div_(len(chunk.operands))


@combine.register
def linear(method: expressions.Linear, chunk: Chunk, known: None) -> Tensor:
    """sum_i w_i x_i."""
    return weighted_sum(chunk.operands, method.weights)
