"""Records of methods that merge differences from a base (task vectors)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bam_merge.expressions.shown import of_differences
from bam_merge.records import About, Method


@dataclass(frozen=True, slots=True)
class TaskArithmetic(Method):
    """base + scale * sum_i w_i (x_i - base) (arXiv 2212.04089, section 2)."""

    weights: tuple[float, ...]
    scale: float
    name: ClassVar = "task_arithmetic"
    about: ClassVar = About(elementwise=True, base=True, surveyed=False, operand_bytes=8)

    def arguments(self) -> Iterator[str]:
        return of_differences(self.weights, self.scale)


@dataclass(frozen=True, slots=True)
class Ties(Method):
    """Trim each difference to its `density` largest entries, elect a sign, average what agrees (arXiv 2306.01708, section 4).

    A difference of negative weight stands for the opposite one, with the weight's magnitude.
    A worker keeps every operand's difference, trimmed and weighted, besides.
    """

    density: float
    weights: tuple[float, ...]
    scale: float
    name: ClassVar = "ties"
    about: ClassVar = About(elementwise=False, base=True, surveyed=True, operand_bytes=32)

    def arguments(self) -> Iterator[str]:
        yield f"density={self.density:g}"
        yield from of_differences(self.weights, self.scale)


@dataclass(frozen=True, slots=True)
class DareTies(Method):
    """Drop entries of each difference at random, rescale by 1/density (arXiv 2311.03099), then elect and average as TIES does.

    `seed` and `streams` fix which entries are dropped: one stream per operand, by position.
    """

    density: float
    weights: tuple[float, ...]
    scale: float
    seed: int
    streams: tuple[str, ...]
    name: ClassVar = "dare_ties"
    about: ClassVar = About(elementwise=False, base=True, surveyed=False, operand_bytes=32)

    def arguments(self) -> Iterator[str]:
        yield f"density={self.density:g}"
        yield from of_differences(self.weights, self.scale)
