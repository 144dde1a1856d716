"""Makes that merge differences from a base (task vectors)."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from bam_merge import expressions
from bam_merge.recipe.makes.gradual import Gradual
from bam_merge.recipe.makes.kinds import Density, Finite, Fraction, Merging, Positive, Weights


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


class DareLinear(Merging):
    """DARE (arXiv 2311.03099): drop entries of each difference at random and rescale; then add them up as task arithmetic does."""

    record: ClassVar = expressions.DareLinear
    make: Literal["dare_linear"]
    base: str = Field(description="the source that differences are taken from")
    density: Gradual[Density] = Field(description="probability that an entry of a difference is kept")
    weights: Weights | None = Field(default=None, description="source: weight of its difference; default 1 for every other expert")
    scale: Gradual[Finite] = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.DareLinear:
        streams = tuple(f"dare:{name}:{place}" for name in names)
        return expressions.DareLinear(self.density, self.weighed(names), self.scale, random_seed, streams)


class Breadcrumbs(Merging):
    """Model Breadcrumbs (arXiv 2312.06795): task arithmetic without the largest and the smallest entries of each difference."""

    record: ClassVar = expressions.Breadcrumbs
    make: Literal["breadcrumbs"]
    base: str = Field(description="the source that differences are taken from")
    density: Gradual[Density] = Field(description="share of each difference that is kept")
    gamma: Gradual[Fraction] = Field(default=0.01, description="share of each difference that is dropped as outliers, the largest entries")
    weights: Weights | None = Field(default=None, description="source: weight of its difference; default 1 for every other expert")
    scale: Gradual[Finite] = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Breadcrumbs:
        return expressions.Breadcrumbs(self.density, self.gamma, self.weighed(names), self.scale)


class Della(Merging):
    """DELLA (arXiv 2406.11617): as dare_ties, and the larger an entry is among those of its row, the likelier it is kept."""

    record: ClassVar = expressions.Della
    make: Literal["della"]
    base: str = Field(description="the source that differences are taken from")
    density: Gradual[Density] = Field(description="mean probability that an entry of a difference is kept; with 1 all are")
    epsilon: Gradual[Fraction] = Field(
        default=0.15,
        description="a row's smallest entry is kept with probability density - epsilon, its largest with density + epsilon",
    )
    weights: Weights | None = Field(
        default=None, description="source: weight of its difference; default 1. One below 0 stands for the opposite difference"
    )
    scale: Gradual[Finite] = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Della:
        streams = tuple(f"della:{name}:{place}" for name in names)
        return expressions.Della(self.density, self.epsilon, self.weighed(names), self.scale, random_seed, streams)

    def problems(self) -> Iterator[tuple[str, str]]:
        least, most = self.density - self.epsilon, self.density + self.epsilon
        if self.density < 1 and not 0 < least <= most <= 1:
            yield (
                "epsilon",
                f"entries would be kept with probabilities from {least:g} to {most:g}, which must lie above 0, and at most at 1. "
                f"With density {self.density:g} epsilon is less than {min(self.density, 1 - self.density):g}.",
            )


class Ram(Merging):
    """Reinforced agent merging (arXiv 2601.13572): the mean of the differences that are not near 0, entry by entry."""

    record: ClassVar = expressions.Ram
    make: Literal["ram"]
    base: str = Field(description="the source that differences are taken from")
    epsilon: Gradual[Positive] = Field(default=1e-5, description="a difference up to so much, either way, is none")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Ram:
        return expressions.Ram(self.epsilon)


class Sce(Merging):
    """SCE (arXiv 2408.07990): select the entries that differ most between the models, weigh the models by them, elect a sign, average."""

    record: ClassVar = expressions.Sce
    least: ClassVar = 2
    make: Literal["sce"]
    base: str = Field(description="the source that differences are taken from")
    density: Gradual[Density] = Field(description="share of the entries in which the models differ that is selected; with 1 every entry is")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Sce:
        return expressions.Sce(self.density)


class ModelStock(Merging):
    """Model Stock (arXiv 2403.19522): the mean, moved towards the base as far as the differences from it disagree. No number to choose."""

    record: ClassVar = expressions.ModelStock
    least: ClassVar = 2
    make: Literal["model_stock"]
    base: str = Field(description="the source that differences are taken from")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.ModelStock:
        return expressions.ModelStock()
