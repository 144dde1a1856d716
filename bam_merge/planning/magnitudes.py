"""Numbers of a recipe that are finite and that float32 arithmetic cannot work with: refused before anything is computed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from bam_merge.recipe.makes import Merging, Varying

if TYPE_CHECKING:
    from bam_merge.recipe.schema import Recipe

LEAST, MOST = 1e-30, 1e30
"""Factors of weights that neither vanish nor overflow in float32, with room for what they are multiplied with."""


GATE_LEAST, GATE_MOST = 1e-15, 1e15
"""Factors of a hidden state, whose square must be a float32 for the next norm, and beside which the FFN must not vanish."""


def out_of_range(recipe: "Recipe") -> Iterator[str]:
    """A message, beginning with the recipe's key, for every weight, scale and gate_scale that no sum in float32 can hold."""
    for where, make in (
        ("shared", recipe.shared),
        *((f"rules[{index}]", rule) for index, rule in enumerate(recipe.rules)),
        ("experts", recipe.experts),
    ):
        for key, value in _factors(make):
            if value and not LEAST <= abs(value) <= MOST:
                yield f"{where}.{key}: found {value:g}, expected a magnitude from {LEAST:g} to {MOST:g}, or sums in float32 lose it."
    scale = recipe.ffn.gate_scale if recipe.ffn else 1.0
    if not GATE_LEAST <= scale <= GATE_MOST:
        yield (
            f"ffn.gate_scale: found {scale:g}, expected {GATE_LEAST:g} to {GATE_MOST:g}: it multiplies the FFN's output in float32. "
            "It compensates gates, so it is at most the number of experts."
        )


def _factors(make: Any) -> Iterator[tuple[str, float]]:
    """What a merge multiplies with: its weights, and every number that nothing limits from above."""
    if isinstance(make, Merging | Varying):
        for name, weight in (getattr(make, "weights", None) or {}).items():
            yield from ((f"weights.{name}", value) for value in _numbers(weight))
        for key, info in type(make).model_fields.items():
            if not any(hasattr(limit, "le") for limit in (*info.metadata, *_limits(info.annotation))):
                yield from ((key, value) for value in _numbers(getattr(make, key)))


def _numbers(value: Any) -> Iterator[float]:
    """A number, or those of a gradient over the layers."""
    yield from (item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, float))


def _limits(annotation: Any) -> Iterator[Any]:
    """What limits the numbers of a type that is a number or a list of them."""
    for item in getattr(annotation, "__metadata__", ()):
        yield from getattr(item, "metadata", (item,))
    for part in get_args(annotation):
        yield from _limits(part)
