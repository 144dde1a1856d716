"""What a kernel is given and gives back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from bam_merge import expressions


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, start + C) of every operand and of the base, flat, in the computing dtype.

    `row` is how many elements a row of the tensor has (its last axis); None where the tensor is a single row. Of a method that says it
    works `by_rows` a chunk is whole rows, but for a tensor that is a single one.
    """

    start: int
    operands: list[Tensor]
    base: Tensor | None = None
    row: int | None = None

    @property
    def columns(self) -> int:
        """Elements that belong to one row of a matrix, or to one element of a bias."""
        return self.row or 1

    @property
    def deltas(self) -> Iterator[Tensor]:
        """The task vectors' chunks, one at a time."""
        assert self.base is not None
        return (x_C - self.base for x_C in self.operands)


Chunks = Callable[[], Iterator[Chunk]]
"""Reads the whole tensor once, in order, each time it is called."""


@singledispatch
def survey(method: expressions.Method, chunks: Chunks, numel: int) -> Any:
    """What `combine` must know of the whole tensor, for records that say they are `surveyed`; nothing for the others."""
    if method.about.surveyed:
        raise NotImplementedError(f"merging/kernels/ surveys no {type(method).__name__}: a function under @survey.register is missing")
    return None


@singledispatch
def combine(method: expressions.Method, chunk: Chunk, known: Any) -> Tensor:
    """One chunk of the merged tensor [C]."""
    raise NotImplementedError(f"merging/kernels/ merges by no {type(method).__name__}: a function under @combine.register is missing")


def weighted_sum(terms: Iterator[Tensor] | list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """sum_i w_i x_i. A weight that the terms' dtype cannot hold is multiplied with in float64: what comes of it may be a number."""
    total_C: Tensor | None = None
    for x_C, weight in zip(terms, weights, strict=True):
        if abs(weight) > torch.finfo(x_C.dtype).max:
            x_C, weight = (x_C.double() * weight).to(x_C.dtype), 1.0
        total_C = x_C * weight if total_C is None else total_C.add_(x_C, alpha=weight)
    assert total_C is not None
    return total_C
