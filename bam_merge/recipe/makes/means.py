"""Makes that copy a tensor, or average the tensors themselves."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from bam_merge import expressions
from bam_merge.recipe.makes.kinds import Merging, Weights


class Mean(Merging):
    """Uniform mean over the distinct sources among the experts: one that stands twice does not weigh more."""

    record: ClassVar = expressions.Mean
    make: Literal["mean"]

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Mean | None:
        return expressions.Mean() if len(names) > 1 else None


class Copy(Merging):
    """The tensor of one source, bit for bit."""

    record: ClassVar = None
    make: Literal["copy"]
    from_: str = Field(alias="from", description="name of the source")

    def operands(self, distinct: tuple[str, ...]) -> tuple[str, ...]:
        return (self.from_,)

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> None:
        return None


class Linear(Merging):
    """Weighted sum (model soups, arXiv 2203.05482); the weights must sum to one."""

    record: ClassVar = expressions.Linear
    make: Literal["linear"]
    weights: Weights = Field(description="source: weight")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Linear:
        return expressions.Linear(self.weighed(names))

    def problems(self) -> Iterator[tuple[str, str]]:
        total = sum(self.weights.values())
        if abs(total - 1) > 1e-6:
            yield "weights", f"sum to {total:g}, expected 1, or the tensor's scale would change. (task_arithmetic scales differences.)"
