"""Makes: the ways in which a recipe can ask for a tensor to be made, and the rules that ask for them."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model

from bam_merge import expressions
from bam_merge.text import printable

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
    """One tensor per expert, each a copy of its own source's."""

    make: Literal["expert"]


class Copy(Strict):
    """The tensor of one source."""

    make: Literal["copy"]
    from_: str = Field(alias="from", description="name of the source")


class Mean(Strict):
    """Uniform mean over the distinct sources among the experts."""

    make: Literal["mean"]


class Linear(Strict):
    """Weighted sum; the weights must sum to one."""

    make: Literal["linear"]
    weights: Weights = Field(description="source: weight")


class Slerp(Strict):
    """Spherical interpolation between two sources."""

    make: Literal["slerp"]
    from_: Annotated[tuple[str, str], Field(strict=False)] = Field(alias="from", description="the two sources: t=0 and t=1")
    t: Fraction


class TaskArithmetic(Strict):
    """base + scale * sum of weighted differences from base."""

    make: Literal["task_arithmetic"]
    base: str
    weights: Weights | None = Field(default=None, description="source: weight of its difference; default 1 for every other expert")
    scale: Finite = 1.0


class Ties(Strict):
    """TIES: trim, elect sign, merge what agrees."""

    make: Literal["ties"]
    base: str
    density: Density = Field(description="share of each difference that is kept, the largest entries")
    weights: PositiveWeights | None = Field(default=None, description="source: weight of its difference, above 0; default 1")
    scale: Finite = 1.0


class DareTies(Strict):
    """DARE then TIES: drop entries at random, rescale, elect sign, merge what agrees."""

    make: Literal["dare_ties"]
    base: str
    density: Density = Field(description="probability that an entry of a difference is kept")
    weights: PositiveWeights | None = Field(default=None, description="source: weight of its difference, above 0; default 1")
    scale: Finite = 1.0


class _Normal(Strict):
    std: Positive = 0.02

    def initialiser(self) -> expressions.Initialiser:
        return expressions.Normal(self.std)


class _Uniform(Strict):
    bound: Positive | None = Field(default=None, description="uniform on [-bound, bound]; default 1/sqrt(hidden_size)")

    def initialiser(self) -> expressions.Initialiser:
        return expressions.Uniform(self.bound)


class _Zeros(Strict):
    def initialiser(self) -> expressions.Initialiser:
        return expressions.Zeros()


class _Orthogonal(Strict):
    gain: Positive = Field(default=1.0, description="length of each row")

    def initialiser(self) -> expressions.Initialiser:
        return expressions.Orthogonal(self.gain)


class Normal(_Normal):
    make: Literal["normal"]


class Uniform(_Uniform):
    make: Literal["uniform"]


class Zeros(_Zeros):
    make: Literal["zeros"]


class Orthogonal(_Orthogonal):
    make: Literal["orthogonal"]


class RouterNormal(_Normal):
    init: Literal["normal"]


class RouterUniform(_Uniform):
    init: Literal["uniform"]


class RouterZeros(_Zeros):
    init: Literal["zeros"]


class RouterOrthogonal(_Orthogonal):
    init: Literal["orthogonal"]


RouterInit = RouterNormal | RouterUniform | RouterZeros | RouterOrthogonal


OneInit = Annotated[RouterInit, Field(discriminator="init")]


class Selector(Strict):
    roles: Names = Field(description="roles or globs such as attn.*; a weight's role covers its bias")
    layers: Integer | str | None = Field(default=None, description='layers such as 3, "0-3", "0,4-7" or "20-" (to the last)')


Merging = Mean | Copy | Linear | Slerp | TaskArithmetic | Ties | DareTies


Initialising = Normal | Uniform | Zeros | Orthogonal


Make = Expert | Merging | Initialising


if TYPE_CHECKING:

    class Rule(Selector):
        """One of `rules`: a make with the roles and layers it is for."""

        make: str
else:  # for every make a class that has the make's keys and the selector's
    Rule = Annotated[
        Union[tuple(create_model(f"{make.__name__}Rule", __base__=(Selector, make)) for make in get_args(Make))],  # noqa: UP007
        Field(discriminator="make"),
    ]


# ---- what one can ask of a make or rule --------------------------------------------------------------------------------


def named_sources(make: Any) -> Iterator[str]:
    """The sources that a make or rule names."""
    if isinstance(make, Copy):
        yield make.from_
    if isinstance(make, Slerp):
        yield from make.from_
    if isinstance(make, TaskArithmetic | Ties | DareTies):
        yield make.base
    yield from getattr(make, "weights", None) or ()


def operands(make: Any, distinct: tuple[str, ...]) -> tuple[str, ...]:
    """The sources that a merging `make` combines, base apart; `distinct` are the distinct sources among the experts."""
    if isinstance(make, Copy):
        return (make.from_,)
    if isinstance(make, Slerp):
        return make.from_
    if isinstance(make, Mean):
        return distinct
    return tuple(make.weights or (name for name in distinct if name != make.base))


def covers(pattern: str, role: str) -> bool:
    """Whether a rule's role pattern covers `role`: by glob, and a weight's pattern covers its bias."""
    return fnmatchcase(role, pattern) or fnmatchcase(role.removesuffix(".bias"), pattern)


def parse_layers(text: int | str | None, count: int) -> range | frozenset[int]:
    """The layer indices that `layers` names, of a model with `count` layers. Raises ValueError."""
    if text is None:
        return range(count)
    chosen: set[int] = set()
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not part.isascii() or not first.isdecimal() or (last and not last.isdecimal()) or len(part) > 20:
            raise ValueError(f'{printable(repr(text))} is no layer range; write 3, "0-3", "0,4-7" or "20-".')
        end = int(last) if last else count - 1 if dash else int(first)
        if int(first) > end:
            raise ValueError(f"{printable(part.strip())!r} is an empty layer range.")
        if end >= count:
            raise ValueError(f"layer {end} does not exist; the model's layers are 0 to {count - 1}.")
        chosen.update(range(int(first), end + 1))
    return frozenset(chosen)


def parse_size(text: int | str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB. Raises ValueError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = str(text).strip()
    unit = number.lstrip("0123456789.")
    try:
        size = int(float(number[: len(number) - len(unit)]) * units[unit.strip().upper()])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{printable(repr(text), 60)} is no size; write for example 5GB, 500MB or 2GiB.") from None
    if not 1 <= size < 2**63:
        raise ValueError(f"{printable(repr(text), 60)} is no size of a file.")
    return size
