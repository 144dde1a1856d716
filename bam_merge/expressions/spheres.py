"""Records of methods that take tensors for flat vectors, and average their directions on the sphere."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bam_merge.records import About, Method


@dataclass(frozen=True, slots=True)
class Slerp(Method):
    """Spherical interpolation of two tensors taken as flat vectors, at `t` in [0, 1] (Shoemake, SIGGRAPH 1985)."""

    t: float
    name: ClassVar = "slerp"
    about: ClassVar = About(elementwise=False, base=False, surveyed=True, operand_bytes=8)

    def arguments(self) -> Iterator[str]:
        yield f"t={self.t:g}"


@dataclass(frozen=True, slots=True)
class Nuslerp(Method):
    """Spherical interpolation at `t` in [0, 1] of two tensors as flat vectors, or of each row (the last axis) by itself: `by`."""

    t: float
    by: str
    name: ClassVar = "nuslerp"
    about: ClassVar = About(elementwise=False, base=False, surveyed=True, operand_bytes=32, by_rows=True)

    def arguments(self) -> Iterator[str]:
        yield f"t={self.t:g}"
        yield f"by={self.by}"


@dataclass(frozen=True, slots=True)
class Karcher(Method):
    """The Riemannian (Karcher) mean of the directions of tensors as flat vectors, of the mean of their lengths.

    It is the direction with the least sum of squared angles to them (Karcher, 1977); of two tensors of one length, slerp at 1/2. A tensor
    that is 0 has no direction and length 0. Directions that do not all lie within 90 degrees of their sum need have no mean: then the mean.
    """

    name: ClassVar = "karcher"
    about: ClassVar = About(elementwise=False, base=False, surveyed=True, operand_bytes=32)
