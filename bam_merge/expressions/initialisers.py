"""Records of initialisers: how tensors are drawn that no source has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bam_merge.records import Initialiser

NORMAL_REACH = 12.1
"""No sample of numpy's polar method is more standard deviations out: sqrt(-2 ln r2), where r2 is 2**-104 or more."""


@dataclass(frozen=True, slots=True)
class Normal(Initialiser):
    """Normally distributed, of mean 0 and standard deviation `std`."""

    std: float
    name: ClassVar = "normal"

    def arguments(self) -> Iterator[str]:
        yield f"std={self.std:g}"

    def size(self) -> tuple[str, float, float]:
        return "std", self.std, NORMAL_REACH * self.std


@dataclass(frozen=True, slots=True)
class Uniform(Initialiser):
    """Uniform on [-bound, bound]; the default bound is 1/sqrt(columns), as torch.nn.Linear starts."""

    bound: float | None
    name: ClassVar = "uniform"

    def arguments(self) -> Iterator[str]:
        if self.bound is not None:
            yield f"bound={self.bound:g}"

    def size(self) -> tuple[str, float, float] | None:
        return None if self.bound is None else ("bound", self.bound, self.bound)


@dataclass(frozen=True, slots=True)
class Zeros(Initialiser):
    """All 0."""

    name: ClassVar = "zeros"

    def size(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Ones(Initialiser):
    """All 1. Only layouts ask for it, where an engine cannot do with zeros."""

    name: ClassVar = "ones"

    def size(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Grouped(Initialiser):
    """The rows that `of` draws, `groups` times below one another. Only virtual groups ask for it (arXiv 2410.07524, section 2.3)."""

    of: Initialiser
    groups: int
    name: ClassVar = "grouped"

    def arguments(self) -> Iterator[str]:
        yield f"of={self.of.name}"
        yield from self.of.arguments()
        yield f"groups={self.groups}"

    def size(self) -> tuple[str, float, float] | None:
        return self.of.size()

    def misfit(self, rows: int, columns: int) -> str | None:
        return self.of.misfit(self.drawn(rows), columns)

    def drawn(self, rows: int) -> int:
        """How many of so many rows are drawn."""
        return -(-rows // self.groups)


@dataclass(frozen=True, slots=True)
class Orthogonal(Initialiser):
    """Orthonormal rows times `gain`."""

    gain: float
    name: ClassVar = "orthogonal"

    def arguments(self) -> Iterator[str]:
        if self.gain != 1.0:
            yield f"gain={self.gain:g}"

    def size(self) -> tuple[str, float, float]:
        return "gain", self.gain, self.gain

    def misfit(self, rows: int, columns: int) -> str | None:
        if rows <= columns:
            return None
        return (
            f"orthogonal: {rows} experts, hidden_size is {columns}: at most {columns} rows of {columns} numbers can be orthogonal. "
            f"Use at most {columns} experts, or init: normal."
        )
