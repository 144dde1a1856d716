"""What a recipe may write: every make of makes/, as `shared`, as a rule with roles and layers, as `router`; and ranges and sizes."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union

from pydantic import Discriminator, Field, Tag, create_model

from bam_merge.checkpoints.provenance import MOST_EXPERTS
from bam_merge.recipe import makes
from bam_merge.recipe.makes import Expert, Initialising, Integer, Merging, Names, Strict, Varying, VirtualGroup
from bam_merge.recipe.makes.data_routers import FromTexts
from bam_merge.text import printable

T = TypeVar("T", bound=Strict)


def makes_of(kind: type[T]) -> Iterator[type[T]]:
    """Every make of a kind that a file of makes/ defines, in their order."""
    for make in kind.__subclasses__():
        if make.__module__.startswith(f"{makes.__name__}."):
            yield make
            yield from makes_of(make)


class Selector(Strict):
    roles: Names = Field(description="roles or globs such as attn.*; a weight's role covers its bias")
    layers: Integer | str | None = Field(default=None, description='layers such as 3, "0-3", "0,4-7" or "20-" (to the last)')


RouterMake = TypeVar("RouterMake", Initialising, FromTexts)


def _named(make: type[RouterMake], key: str, prefix: str = "") -> type[RouterMake]:
    """A make of routers as it stands in a recipe: `key` says which it is."""
    name: Any = (Literal[make.record.name], ...)
    return create_model(prefix + make.__name__, __base__=make, **{key: name})


MERGING = tuple(makes_of(Merging))


VARYING = tuple(makes_of(Varying))


INITIALISING = tuple(_named(make, "make") for make in makes_of(Initialising))


FROM_TEXTS = tuple(_named(make, "make") for make in makes_of(FromTexts) if make.record.name not in {"mean"})
"""Of the makes from texts those that a rule can ask for: there `mean` is that of the sources' tensors."""


ROUTER_INITS: dict[str, type[Strict]] = {
    **{make.record.name: _named(make, "init", "Router") for make in makes_of(Initialising)},
    **{make.record.name: _named(make, "init", "Router") for make in makes_of(FromTexts)},
}
"""What `router` may be, by init."""


class Copies(Strict):
    """Experts that are all made of one dense model."""

    count: Annotated[int, Field(ge=2, le=MOST_EXPERTS)] = Field(description="how many experts")


def _counted(make: Any) -> type[Copies]:
    return create_model(f"{make.__name__}Copies", __base__=(Copies, make))


COPIES: dict[str, type[Copies]] = {
    "expert": _counted(Expert), **{make.record.name: _counted(make) for make in VARYING if not make.record.about.base},
    "virtual_group": _counted(VirtualGroup),
}  # fmt: skip
"""What `experts` may be besides a list, by make."""


def _form_of_experts(value: Any) -> str | None:
    if isinstance(value, Copies):
        return str(getattr(value, "make"))  # noqa: B009
    return "list" if not isinstance(value, dict) else str(value["make"]) if "make" in value else None


if TYPE_CHECKING:
    AnyMerging = Merging
    OneInit = Initialising | FromTexts

    AnyExperts = Names | Copies

    class Rule(Selector):
        """One of `rules`: a make with the roles and layers it is for."""

        make: str
else:
    AnyMerging = Annotated[Union[MERGING], Field(discriminator="make")]  # noqa: UP007
    OneInit = Annotated[Union[tuple(ROUTER_INITS.values())], Field(discriminator="init")]  # noqa: UP007
    AnyExperts = Annotated[
        Union[tuple(Annotated[form, Tag(name)] for name, form in (("list", Names), *COPIES.items()))],  # noqa: UP007
        Discriminator(_form_of_experts),
    ]
    RULING = (Expert, *MERGING, *VARYING, *INITIALISING, *FROM_TEXTS)  # for each a class that has the make's keys and the selector's
    Rule = Annotated[
        Union[tuple(create_model(f"{make.__name__}Rule", __base__=(Selector, make)) for make in RULING)],  # noqa: UP007
        Field(discriminator="make"),
    ]


# ---- what one can ask of a rule ----------------------------------------------------------------------------------------


def covers(pattern: str, role: str) -> bool:
    """Whether a rule's role pattern covers `role`: by glob, and a weight's pattern covers its bias."""
    return fnmatchcase(role, pattern) or fnmatchcase(role.removesuffix(".bias"), pattern)


def parse_layers(text: int | str | None, count: int) -> range | frozenset[int]:
    """The layer indices that `layers` names, of a model with `count` layers. Raises ValueError."""
    return range(count) if text is None else frozenset(list_layers(text, count))


def list_layers(text: int | str, count: int) -> list[int]:
    """The same in the order in which they are named, as often as they are."""
    chosen: list[int] = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not part.isascii() or not first.isdecimal() or (last and not last.isdecimal()) or len(part) > 20:
            raise ValueError(f'{printable(repr(text))} is no layer range; write 3, "0-3", "0,4-7" or "20-".')
        end = int(last) if last else count - 1 if dash else int(first)
        if int(first) > end:
            raise ValueError(f"{printable(part.strip())!r} is an empty layer range.")
        if end >= count:
            raise ValueError(f"layer {end} does not exist; the model's layers are 0 to {count - 1}.")
        chosen += range(int(first), end + 1)
    return chosen


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
