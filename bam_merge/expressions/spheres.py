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
