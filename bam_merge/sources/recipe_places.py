"""Where the models are that a recipe names: found, downloaded, and pinned to a commit."""

from collections.abc import Mapping
from pathlib import Path

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.hub_id import MARK
from bam_merge.recipe.places import Known
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.places import Found, bring, find


def find_in(recipe: Recipe, text: str) -> Found:
    """What stands at a place that the recipe names. Raises CheckpointError."""
    if text in recipe.known:
        return find(f"{MARK}{recipe.known[text].recorded}")
    return find(text, recipe.folder, recipe.from_document)


def at_hand(recipe: Recipe, output: Path | None = None, output_bytes: int = 0) -> Recipe:
    """The recipe with every model of the hub that it names downloaded and pinned to its commit. Raises CheckpointError with all."""
    found: dict[str, Found] = {}
    problems = []
    for key, text in recipe.places.items():
        try:
            found[text] = find_in(recipe, text)
        except BamMergeError as error:
            problems += [f"{key}: {problem}" for problem in error.problems]
    if problems:
        raise CheckpointError(*problems)
    bring(found.values(), output, output_bytes)
    return pinned(recipe, found)


def pinned(recipe: Recipe, found: Mapping[str, Found]) -> Recipe:
    """The recipe that names every model of the hub in `found` with its commit, and knows where its folder is."""
    return recipe.knowing({text: Known(place.recorded, place.path) for text, place in found.items() if place.recorded is not None})


def notes_of(name: str, found: Found) -> list[str]:
    """What a plan has to say of where a source is."""
    if found.snapshot is not None and found.snapshot.note:
        return [f"sources.{name}: {found.recorded} as it is in the cache: {found.snapshot.note}."]
    return []
