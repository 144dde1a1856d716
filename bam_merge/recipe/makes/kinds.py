"""What every make is: its keys are strict, and it says which record it makes; and the types of its numbers."""

from collections.abc import Iterator
from fractions import Fraction as Exact
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field

from bam_merge import expressions
from bam_merge.recipe.makes.gradual import Gradual, at, knots

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


Finite = Annotated[float, Field(allow_inf_nan=False)]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Count = Annotated[int, Field(ge=1, lt=2**63)]


Integer = Annotated[int, Field(lt=2**63)]


Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


Weights = dict[str, Gradual[Finite]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


# ---- makes: how a tensor is made ---------------------------------------------------------------------------------------


class Expert(Strict):
    """One tensor per expert, each its own source's, bit for bit."""

    make: Literal["expert"]


class Graded(Strict):
    """A make whose numbers may be gradients over the layers."""

    @property
    def knots(self) -> list[Exact]:
        """The places, from 0 (the first layer) to 1 (the last), where numbers of its gradients stand; none where it is the same in all."""
        return knots(dict(self))

    def at(self, place: Exact) -> Self:
        """The make as it is at a place in the layers: with numbers alone."""
        return self.model_copy(update=at(dict(self), place))


class Merging(Graded):
    """A make that makes one tensor of several. One with a `base` is for methods of differences, one with `weights` names its operands."""

    record: ClassVar[type[expressions.Method] | None]
    """The method's record; None for what only copies."""

    least: ClassVar[int] = 1
    """How many sources the method needs, the base apart."""

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
