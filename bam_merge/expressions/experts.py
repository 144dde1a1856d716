"""Records of methods that make experts differ: each makes one expert's tensor of one source's."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from bam_merge.records import About, Method


@dataclass(frozen=True, slots=True)
class Drop(Method):
    """Drop-Upcycling (arXiv 2502.19261, section 3): of f intermediate units, floor(ratio f) are drawn anew, all others are kept.

    The entries of the dropped units, `units` of the tensor ("rows" of gate and up, "columns" of down), become numbers of a normal
    distribution whose mean, and deviation with n - 1, are those that the dropped entries of this tensor had.
    `streams`: which units (one stream for the three tensors of an expert's FFN), and their numbers (one for each tensor).
    A worker keeps where the dropped entries of a chunk are, and their new values in float64.
    """

    ratio: float
    units: Literal["rows", "columns"]
    seed: int
    streams: tuple[str, str]
    name: ClassVar = "drop"
    about: ClassVar = About(elementwise=False, base=False, surveyed=True, operand_bytes=96)

    def arguments(self) -> Iterator[str]:
        yield f"ratio={self.ratio:g}"
        yield f"units={self.units}"

    def dropped(self, units: int) -> int:
        """How many of so many units are drawn anew, the ratio read as the decimal that a recipe holds."""
        return int(Fraction(repr(self.ratio)) * units)


@dataclass(frozen=True, slots=True)
class Noise(Method):
    """x + std n for a share of the entries, each chosen by itself with that probability; n is normal, of mean 0 and deviation 1.

    `streams`: which entries, and their numbers; both by position.
    """

    std: float
    share: float
    seed: int
    streams: tuple[str, str]
    name: ClassVar = "noise"
    about: ClassVar = About(elementwise=False, base=False, surveyed=False, operand_bytes=80)

    def arguments(self) -> Iterator[str]:
        yield f"std={self.std:g}"
        yield f"share={self.share:g}"


@dataclass(frozen=True, slots=True)
class LowRank(Method):
    """base + the best approximation of rank `rank` to x - base: its largest singular values and their vectors (Eckart and Young 1936).

    The whole difference is held in float64 while its vectors are found.
    """

    rank: int
    name: ClassVar = "low_rank"
    about: ClassVar = About(elementwise=False, base=True, surveyed=True, operand_bytes=24)

    def arguments(self) -> Iterator[str]:
        yield f"rank={self.rank}"

    def held(self, shape: tuple[int, ...]) -> int:
        """The difference and its factors, its Gram matrix of the smaller side, and what the eigensolver needs for it."""
        rows, columns = shape
        return 16 * rows * columns + 48 * min(rows, columns) ** 2
