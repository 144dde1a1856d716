"""Makes that give every expert a tensor of its own, made of one source's."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from bam_merge import expressions
from bam_merge.recipe.makes.gradual import Gradual
from bam_merge.recipe.makes.kinds import Count, Fraction, Graded, Positive, Strict

UNITS: dict[str, Literal["rows", "columns"]] = {
    "ffn.gate": "rows", "ffn.gate.bias": "rows", "ffn.up": "rows", "ffn.up.bias": "rows", "ffn.down": "columns",
}  # fmt: skip
"""Where the intermediate units of an FFN are in its tensors. Its last bias has none: it belongs to the hidden size."""


class Varying(Graded):
    """A make that makes one tensor per expert, each of its own source's, or of the one that `from` names; its other keys say how."""

    record: ClassVar[type[expressions.Method]]
    """The method's record."""

    suits: ClassVar[tuple[str, ...]] = ("attn", "ffn")
    """The groups of roles that it is for."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a make that says less than is asked of it, or other than its record."""
        if not hasattr(cls, "record"):
            raise TypeError(f"{cls.__name__} lacks `record: ClassVar = expressions....`, the record of its method")
        if get_args(cls.model_fields["make"].annotation) != (cls.record.name,):
            raise TypeError(f"{cls.__name__} must be called {cls.record.name} in a recipe, as its record is in a plan")
        if cls.record.about.base != ("base" in cls.model_fields):
            raise TypeError(f"{cls.__name__} and {cls.record.__name__} disagree in whether there is a base")
        if cls.vary is Varying.vary:
            raise TypeError(f"{cls.__name__} lacks `vary`, which makes its record")

    from_: str | None = Field(default=None, alias="from", description="the source of every expert; default: each expert's own")

    @property
    def from_base(self) -> str | None:
        """The source from which differences are taken, if they are."""
        base: str | None = getattr(self, "base", None)
        return base

    @property
    def named(self) -> tuple[str, ...]:
        """The sources that the recipe names in it."""
        return tuple(name for name in (self.from_, self.from_base) if name is not None)

    def vary(self, role: str, shape: tuple[int, ...], place: str, random_seed: int) -> expressions.Method | None:
        """The record by which a tensor of this role and shape is made; None where it is the source's as it is.

        `place` is layer and expert: with role and `random_seed` what a method that draws numbers has to tell its streams apart.
        """
        raise NotImplementedError

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of what is wrong with the values of its own keys together, each being right."""
        yield from ()


class VirtualGroup(Strict):
    """Fine-grained experts (arXiv 2410.07524): the FFN's units in equal shards, copies of each; the routers start so that a token gets one
    copy of each shard, which together are the dense FFN."""

    make: Literal["virtual_group"]
    from_: str | None = Field(default=None, alias="from", description="the source of every expert")
    shards: Annotated[int, Field(ge=2, le=4096)] = Field(
        description="into how many the FFN is split; count is a multiple of it, and so is top_k"
    )


class Drop(Varying):
    """Drop-Upcycling (arXiv 2502.19261): a share of each expert's FFN units is drawn anew, with the mean and deviation that they had."""

    record: ClassVar = expressions.Drop
    suits: ClassVar = ("ffn",)
    make: Literal["drop"]
    ratio: Gradual[Fraction] = Field(
        default=0.5, description="share of the units that are drawn anew, rounded down: the same in gate, up and down"
    )

    def vary(self, role: str, shape: tuple[int, ...], place: str, random_seed: int) -> expressions.Drop | None:
        units = UNITS.get(role)
        if units is None:
            return None
        record = expressions.Drop(self.ratio, units, random_seed, (f"drop:units:{place}", f"drop:{role}:{place}"))
        return record if record.dropped(shape[0] if units == "rows" else shape[1]) else None


class Noise(Varying):
    """Normal noise on a share of the entries, other ones in every expert."""

    record: ClassVar = expressions.Noise
    make: Literal["noise"]
    std: Gradual[Positive] = Field(default=0.02, description="standard deviation of the noise; its mean is 0")
    share: Gradual[Fraction] = Field(default=0.5, description="probability that an entry gets noise")

    def vary(self, role: str, shape: tuple[int, ...], place: str, random_seed: int) -> expressions.Noise | None:
        streams = (f"noise:where:{role}:{place}", f"noise:{role}:{place}")
        return expressions.Noise(self.std, self.share, random_seed, streams) if self.share else None


class LowRank(Varying):
    """The base, and of each expert's difference from it the best approximation of a rank: an expert that compresses."""

    record: ClassVar = expressions.LowRank
    make: Literal["low_rank"]
    base: str = Field(description="the source that differences are taken from")
    rank: Count = Field(description="singular values of each difference that are kept; a tensor with no more has all of it, bit for bit")

    def vary(self, role: str, shape: tuple[int, ...], place: str, random_seed: int) -> expressions.LowRank | None:
        return expressions.LowRank(self.rank) if len(shape) == 2 and self.rank < min(shape) else None

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.from_ == self.base:
            yield "from", "is the base too; its difference from itself is zero. Name another, or use make: copy."
