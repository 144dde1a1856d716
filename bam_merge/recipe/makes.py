"""Makes: the ways in which a recipe can ask for a tensor to be made. A class defined here is offered by every recipe (rules.py)."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from bam_merge import expressions

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


Finite = Annotated[float, Field(allow_inf_nan=False)]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Count = Annotated[int, Field(ge=1, lt=2**63)]


Integer = Annotated[int, Field(lt=2**63)]


Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


Weights = dict[str, Finite]


PositiveWeights = dict[str, Positive]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


# ---- makes: how a tensor is made ---------------------------------------------------------------------------------------


class Expert(Strict):
    """One tensor per expert, each its own source's, bit for bit."""

    make: Literal["expert"]


class Merging(Strict):
    """A make that makes one tensor of several. One with a `base` is for methods of differences, one with `weights` names its operands."""

    record: ClassVar[type[expressions.Method] | None]
    """The method's record; None for what only copies."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a make that says less than is asked of it, or other than its record."""
        if not hasattr(cls, "record"):
            raise TypeError(f"{cls.__name__} lacks `record: ClassVar = expressions....`, the record of its method")
        if cls.record is None:
            return
        if get_args(cls.model_fields["make"].annotation) != (cls.record.name,):
            raise TypeError(f"{cls.__name__} must be called {cls.record.name} in a recipe, as its record is in a plan")
        needed, key = cls.record.about.base, "base" in cls.model_fields
        if needed != key:
            raise TypeError(f"{cls.__name__} has {'a' if key else 'no'} key base, {cls.record.__name__} has base={needed}")
        if cls.method is Merging.method:
            raise TypeError(f"{cls.__name__} lacks `method`, which makes its record")

    def operands(self, distinct: tuple[str, ...]) -> tuple[str, ...]:
        """The sources that are combined, base apart; `distinct` are the distinct sources among the experts."""
        return tuple(getattr(self, "weights", None) or (name for name in distinct if name != self.from_base))

    @property
    def from_base(self) -> str | None:
        """The source from which differences are taken, if they are."""
        base: str | None = getattr(self, "base", None)
        return base

    @property
    def named(self) -> tuple[str, ...]:
        """The sources that the recipe names in it: the base, and the operands that it has whatever the experts are."""
        return (*([self.from_base] if self.from_base else []), *self.operands(()))

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Method | None:
        """The record by which the operands `names` are merged; None where the one operand is the result as it is.

        `place` is role and layer of the tensor: with `random_seed` what a method that draws numbers has to tell its streams apart.
        """
        raise NotImplementedError

    def weighed(self, names: tuple[str, ...]) -> tuple[float, ...]:
        """The weight of each operand; 1 where the recipe gives none."""
        weights = getattr(self, "weights", None) or {}
        return tuple(weights.get(name, 1.0) for name in names)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of what is wrong with the values of its own keys together, each being right."""
        yield from ()


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


class Slerp(Merging):
    """Spherical interpolation between two sources."""

    record: ClassVar = expressions.Slerp
    make: Literal["slerp"]
    from_: Annotated[tuple[str, str], Field(strict=False)] = Field(alias="from", description="the two sources: t=0 and t=1")
    t: Fraction = Field(description="where on the arc between them: 0 is the first, 1 the second")

    def operands(self, distinct: tuple[str, ...]) -> tuple[str, ...]:
        return self.from_

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Slerp:
        return expressions.Slerp(self.t)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.from_[0] == self.from_[1]:
            yield "from", "slerp needs two different sources."


class TaskArithmetic(Merging):
    """base + scale * sum of weighted differences from base (arXiv 2212.04089)."""

    record: ClassVar = expressions.TaskArithmetic
    make: Literal["task_arithmetic"]
    base: str = Field(description="the source that differences are taken from")
    weights: Weights | None = Field(default=None, description="source: weight of its difference; default 1 for every other expert")
    scale: Finite = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.TaskArithmetic:
        return expressions.TaskArithmetic(self.weighed(names), self.scale)


class Ties(Merging):
    """TIES (arXiv 2306.01708): trim each difference to its largest entries, elect a sign, average what agrees."""

    record: ClassVar = expressions.Ties
    make: Literal["ties"]
    base: str = Field(description="the source that differences are taken from")
    density: Density = Field(description="share of each difference that is kept, the largest entries")
    weights: PositiveWeights | None = Field(default=None, description="source: weight of its difference, above 0; default 1")
    scale: Finite = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.Ties:
        return expressions.Ties(self.density, self.weighed(names), self.scale)


class DareTies(Merging):
    """DARE (arXiv 2311.03099): drop entries of each difference at random and rescale; then elect a sign and average as TIES does."""

    record: ClassVar = expressions.DareTies
    make: Literal["dare_ties"]
    base: str = Field(description="the source that differences are taken from")
    density: Density = Field(description="probability that an entry of a difference is kept")
    weights: PositiveWeights | None = Field(default=None, description="source: weight of its difference, above 0; default 1")
    scale: Finite = Field(default=1.0, description="multiplies what is added to the base")

    def method(self, names: tuple[str, ...], place: str, random_seed: int) -> expressions.DareTies:
        streams = tuple(f"dare:{name}:{place}" for name in names)
        return expressions.DareTies(self.density, self.weighed(names), self.scale, random_seed, streams)


# ---- initialisers: what no source has --------------------------------------------------------------------------------------


class Initialising(Strict):
    """A make that draws a new tensor: `make` in a rule, `init` in the router section; both are named as its record is (rules.py)."""

    record: ClassVar[type[expressions.Initialiser]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse one that says less than is asked of it."""
        if not hasattr(cls, "record"):
            raise TypeError(f"{cls.__name__} lacks `record: ClassVar = expressions....`, the record of the initialiser")
        if cls.initialiser is Initialising.initialiser:
            raise TypeError(f"{cls.__name__} lacks `initialiser`, which makes its record")

    def initialiser(self) -> expressions.Initialiser:
        raise NotImplementedError


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
