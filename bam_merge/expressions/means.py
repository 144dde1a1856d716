"""Records of methods that average the tensors themselves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bam_merge.expressions.shown import shown_weights
from bam_merge.records import About, Method


@dataclass(frozen=True, slots=True)
class Mean(Method):
    """The uniform mean."""

    name: ClassVar = "mean"
    about: ClassVar = About(elementwise=True, base=False, surveyed=False, operand_bytes=8)


@dataclass(frozen=True, slots=True)
class Linear(Method):
    """sum_i w_i x_i, one weight per operand; the weights sum to one (model soups, arXiv 2203.05482)."""

    weights: tuple[float, ...]
    name: ClassVar = "linear"
    about: ClassVar = About(elementwise=True, base=False, surveyed=False, operand_bytes=8)

    def arguments(self) -> Iterator[str]:
        yield shown_weights(self.weights)
