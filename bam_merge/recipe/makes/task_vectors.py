"""Makes that merge differences from a base (task vectors)."""

from typing import ClassVar, Literal

from pydantic import Field

from bam_merge import expressions
from bam_merge.recipe.makes.gradual import Gradual
from bam_merge.recipe.makes.kinds import Density, Finite, Merging, Weights


class TaskArithmetic(Merging):
    """base + scale * sum of weighted differences from base (arXiv 2212.04089)."""

    record: ClassVar = expressions.TaskArithmetic
    make: Literal["task_arithmetic"]
    base: str = Field(description="the source that differences are taken from")
    weights: Weights | None = Field(default=None, description="source: weight of its difference; default 1 for every other expert")
    scale: Gradual[Finite] = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.TaskArithmetic:
        return expressions.TaskArithmetic(self.weighed(names), self.scale)


class Ties(Merging):
    """TIES (arXiv 2306.01708): trim each difference to its largest entries, elect a sign, average what agrees."""

    record: ClassVar = expressions.Ties
    make: Literal["ties"]
    base: str = Field(description="the source that differences are taken from")
    density: Gradual[Density] = Field(description="share of each difference that is kept, the largest entries")
    weights: Weights | None = Field(
        default=None, description="source: weight of its difference; default 1. One below 0 stands for the opposite difference"
    )
    scale: Gradual[Finite] = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Ties:
        return expressions.Ties(self.density, self.weighed(names), self.scale)


class DareTies(Merging):
    """DARE (arXiv 2311.03099): drop entries of each difference at random and rescale; then elect a sign and average as TIES does."""

    record: ClassVar = expressions.DareTies
    make: Literal["dare_ties"]
    base: str = Field(description="the source that differences are taken from")
    density: Gradual[Density] = Field(description="probability that an entry of a difference is kept")
    weights: Weights | None = Field(
        default=None, description="source: weight of its difference; default 1. One below 0 stands for the opposite difference"
    )
    scale: Gradual[Finite] = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.DareTies:
        streams = tuple(f"dare:{name}:{place}" for name in names)
        return expressions.DareTies(self.density, self.weighed(names), self.scale, random_seed, streams)
