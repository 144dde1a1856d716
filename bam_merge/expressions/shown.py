"""What plans show of the numbers that several methods have."""

from collections.abc import Iterator


def shown_weights(weights: tuple[float, ...]) -> str:
    return "weights=" + "/".join(f"{weight:g}" for weight in weights)


def of_differences(weights: tuple[float, ...], scale: float) -> Iterator[str]:
    """The weights and the scale of a sum of differences, where they are not 1."""
    if set(weights) != {1.0}:
        yield shown_weights(weights)
    if scale != 1.0:
        yield f"scale={scale:g}"
