"""Makes that average directions on the sphere."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bam_merge import expressions
from bam_merge.recipe.makes.gradual import Gradual
from bam_merge.recipe.makes.kinds import Fraction, Merging


class Slerp(Merging):
    """Spherical interpolation between two sources."""

    record: ClassVar = expressions.Slerp
    make: Literal["slerp"]
    from_: Annotated[tuple[str, str], Field(strict=False)] = Field(alias="from", description="the two sources: t=0 and t=1")
    t: Gradual[Fraction] = Field(description="where on the arc between them: 0 is the first, 1 the second")

    def operands(self, distinct: tuple[str, ...]) -> tuple[str, ...]:
        return self.from_

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Slerp:
        return expressions.Slerp(self.t)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.from_[0] == self.from_[1]:
            yield "from", "slerp needs two different sources."


class Nuslerp(Merging):
    """Spherical interpolation between two sources, of whole tensors, as slerp, or of every row by itself."""

    record: ClassVar = expressions.Nuslerp
    make: Literal["nuslerp"]
    from_: Annotated[tuple[str, str], Field(strict=False)] = Field(alias="from", description="the two sources: t=0 and t=1")
    t: Gradual[Fraction] = Field(description="where on the arc between them: 0 is the first, 1 the second")
    by: Literal["tensor", "rows"] = Field(default="tensor", description="what has an angle: the whole tensor, or each row of its last axis")

    def operands(self, distinct: tuple[str, ...]) -> tuple[str, ...]:
        return self.from_

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Nuslerp:
        return expressions.Nuslerp(self.t, self.by)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.from_[0] == self.from_[1]:
            yield "from", "nuslerp needs two different sources."


class Karcher(Merging):
    """Karcher mean over the distinct sources among the experts: the mean of their directions on the sphere, of their mean length."""

    record: ClassVar = expressions.Karcher
    make: Literal["karcher"]

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Karcher | None:
        return expressions.Karcher() if len(names) > 1 else None
