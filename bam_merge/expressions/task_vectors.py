"""Records of methods that merge differences from a base (task vectors)."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor
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


@dataclass(frozen=True, slots=True)
class DareLinear(Method):
    """base + scale * sum_i w_i d_i / density, of every difference d_i the entries that are not dropped at random (arXiv 2311.03099).

    `seed` and `streams` fix which entries are dropped: one stream per operand, by position.
    """

    density: float
    weights: tuple[float, ...]
    scale: float
    seed: int
    streams: tuple[str, ...]
    name: ClassVar = "dare_linear"
    about: ClassVar = About(elementwise=False, base=True, surveyed=False, operand_bytes=16)

    def arguments(self) -> Iterator[str]:
        yield f"density={self.density:g}"
        yield from of_differences(self.weights, self.scale)


@dataclass(frozen=True, slots=True)
class Breadcrumbs(Method):
    """base + scale * sum_i w_i d_i, of every difference d_i without its largest and its smallest entries (arXiv 2312.06795, section 3).

    The largest are a share `gamma`; of the others the largest are kept, so many that they are a share `density` of all. Where fewer are
    left than that, fewer of the largest go. Of equal magnitudes at either end all are kept.
    """

    density: float
    gamma: float
    weights: tuple[float, ...]
    scale: float
    name: ClassVar = "breadcrumbs"
    about: ClassVar = About(elementwise=False, base=True, surveyed=True, operand_bytes=32)

    def arguments(self) -> Iterator[str]:
        yield f"density={self.density:g}"
        yield f"gamma={self.gamma:g}"
        yield from of_differences(self.weights, self.scale)

    def kept(self, numel: int) -> tuple[int, int]:
        """[first, last) of the places that are kept of `numel` magnitudes in rising order; at least one."""
        keep = max(1, floor(self.density * numel)) if self.density < 1 else numel
        first = max(0, numel - keep - floor(self.gamma * numel))
        return first, first + keep


@dataclass(frozen=True, slots=True)
class Della(Method):
    """Drop entries of each difference at random, the small ones rather than the large ones; then elect and average as TIES does.

    (arXiv 2406.11617, section 3.) An entry of rank r among the n magnitudes of its row, from 0, equal ones with the mean of their ranks, is
    kept with probability p = density + epsilon (2 r / (n - 1) - 1), and divided by p. With density 1 all are kept; the one entry of a row
    has p = density. `seed` and `streams` fix which entries are dropped: one stream per operand, by position.
    """

    density: float
    epsilon: float
    weights: tuple[float, ...]
    scale: float
    seed: int
    streams: tuple[str, ...]
    name: ClassVar = "della"
    about: ClassVar = About(elementwise=False, base=True, surveyed=True, operand_bytes=40, by_rows=True)

    def arguments(self) -> Iterator[str]:
        yield f"density={self.density:g}"
        yield f"epsilon={self.epsilon:g}"
        yield from of_differences(self.weights, self.scale)


@dataclass(frozen=True, slots=True)
class Ram(Method):
    """base + the mean of those differences that are larger than `epsilon`, entry by entry (arXiv 2601.13572).

    So what only one model learned is kept whole, and not divided by the number of models.
    """

    epsilon: float
    name: ClassVar = "ram"
    about: ClassVar = About(elementwise=True, base=True, surveyed=False, operand_bytes=16)

    def arguments(self) -> Iterator[str]:
        yield f"epsilon={self.epsilon:g}"


@dataclass(frozen=True, slots=True)
class Sce(Method):
    """Select, calculate, erase (arXiv 2408.07990, section 3.3): base + a mean of differences by weights that follow from the tensor.

    Of the entries in which the models differ the share `density` with the largest variance over the models is selected (with 1 all
    entries); model i weighs sum of d_i^2 over the selected; of every entry those that have the sign of the sum are averaged.
    """

    density: float
    name: ClassVar = "sce"
    about: ClassVar = About(elementwise=False, base=True, surveyed=True, operand_bytes=32)

    def arguments(self) -> Iterator[str]:
        yield f"density={self.density:g}"


STOCK_LEAST = 1e-6
"""Where 1 + (N - 1) c is less, Model Stock's share has no bound: differences that cancel each other."""


@dataclass(frozen=True, slots=True)
class ModelStock(Method):
    """t mean(x_1 ... x_N) + (1 - t) base, t = N c / (1 + (N - 1) c), c the mean cosine between two differences (arXiv 2403.19522).

    t is 1 where all differences point the same way, 0 where they are orthogonal (a difference that is 0 is orthogonal to all), and 0 too
    where they cancel, so that t would be unbounded; one that is alone points its own way.
    """

    name: ClassVar = "model_stock"
    about: ClassVar = About(elementwise=False, base=True, surveyed=True, operand_bytes=32)
