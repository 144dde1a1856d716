"""Makes that draw a new tensor, which no source has."""

from typing import ClassVar

from pydantic import Field

from bam_merge import expressions
from bam_merge.recipe.makes.kinds import Initialising, Positive


class Normal(Initialising):
    record: ClassVar = expressions.Normal
    std: Positive = Field(default=0.02, description="standard deviation; the mean is 0")

    def initialiser(self) -> expressions.Normal:
        return expressions.Normal(self.std)


class Uniform(Initialising):
    record: ClassVar = expressions.Uniform
    bound: Positive | None = Field(default=None, description="uniform on [-bound, bound]; default 1/sqrt(hidden_size)")

    def initialiser(self) -> expressions.Uniform:
        return expressions.Uniform(self.bound)


class Zeros(Initialising):
    record: ClassVar = expressions.Zeros

    def initialiser(self) -> expressions.Zeros:
        return expressions.Zeros()


class Orthogonal(Initialising):
    record: ClassVar = expressions.Orthogonal
    gain: Positive = Field(default=1.0, description="length of each row")

    def initialiser(self) -> expressions.Orthogonal:
        return expressions.Orthogonal(self.gain)
