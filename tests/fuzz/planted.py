"""Faults for finished merges: each changes one thing, and mends the manifest's digests where a forger would."""

from collections.abc import Callable

from planted_files import a_link, another_header, companion, configuration, damaged, foreign, manifest, more_or_less
from planted_tensors import (
    a_bit,
    an_element,
    another_recipe,
    another_source,
    exchanged,
    narrowed,
    not_finite,
    rearranged,
    router,
    scaled,
)
from scene import Scene

FAULTS: dict[str, Callable[[Scene], str | None]] = {
    "a bit flipped": a_bit, "an element replaced": an_element, "NaN or infinity": not_finite, "a tensor scaled": scaled, "a tensor rearranged": rearranged,
    "a tensor through a narrower dtype": narrowed, "two tensors exchanged": exchanged, "a tensor of another source": another_source, "a router's row": router,
    "a tensor by another recipe": another_recipe, "another header": another_header, "a tensor more or less": more_or_less,
    "another configuration": configuration, "another companion": companion, "a foreign entry": foreign, "a link in a file's place": a_link,
    "another manifest": manifest, "damage": damaged,
}  # fmt: skip


def plant(scene: Scene, first: int) -> tuple[str, str]:
    """Plant one fault, the kind with the number `first` or the next that is possible here: its kind, and what was done."""
    kinds = list(FAULTS)
    for number in range(first, first + len(kinds)):
        kind = kinds[number % len(kinds)]
        for _ in range(10):
            if said := FAULTS[kind](scene):
                return kind, said
            scene.__post_init__()  # without what a planter had begun
    raise AssertionError("no fault can be planted")
