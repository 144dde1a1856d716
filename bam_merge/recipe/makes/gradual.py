"""Numbers of a make that may change from layer to layer: one number, or a list that is a gradient over the layers.

The list's numbers stand at equal distances from the first layer to the last one that the make is for; between two of them the number
lies on the straight line. What is before the layers (the embeddings) has the first number, what is behind them (norm.final, head) the last.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction as Exact
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

from pydantic import Discriminator, Field, Tag

T = TypeVar("T")

if TYPE_CHECKING:
    Gradual = Annotated[T, "the method's own code sees one number"]
else:

    class Gradual:
        """`Gradual[Number]`: a Number, or a list of them. A make that planning asks for its method has numbers alone (`Merging.at`)."""

        def __class_getitem__(cls, number: Any) -> Any:
            one = Annotated[number, Tag("number")]
            several = Annotated[tuple[number, ...], Field(strict=False, min_length=1), Tag("list")]
            return Annotated[Union[one, several], Discriminator(_form)]  # noqa: UP007


def _form(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "number"


def lists_in(values: Mapping[str, Any]) -> Iterator[tuple[float, ...]]:
    """Every gradient among the values of a make, those of single sources' weights included."""
    for value in values.values():
        if isinstance(value, dict):
            yield from lists_in(value)
        elif _is_gradient(value):
            yield value


def _is_gradient(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and not any(isinstance(item, str) for item in value)


def at(value: Any, place: Exact) -> Any:
    """`value` with a number in the place of every gradient: where one is, `place` of the way from its first number to its last.

    The numbers are the decimals that the recipe holds: half way from 0.1 to 0.3 is 0.2.
    """
    if isinstance(value, dict):
        return {name: at(item, place) for name, item in value.items()}
    if not _is_gradient(value):
        return value
    below, part = divmod(place * (len(value) - 1), 1)
    first, second = value[int(below)], value[min(int(below) + 1, len(value) - 1)]
    return float((1 - part) * Exact(repr(first)) + part * Exact(repr(second)))


def knots(values: Mapping[str, Any]) -> list[Exact]:
    """The places where a number of any gradient stands: what is straight between them and right at them is right everywhere."""
    return sorted({Exact(index, max(1, len(value) - 1)) for value in lists_in(values) for index in range(len(value))})


def shown(value: float | tuple[float, ...]) -> str:
    """A number or a gradient, for people: as a recipe has it."""
    return f"[{', '.join(f'{number:g}' for number in value)}]" if isinstance(value, tuple) else f"{value:g}"
