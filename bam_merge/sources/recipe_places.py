"""Where the models are that a recipe names: found, downloaded, and pinned to a commit."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.hub_id import MARK
from bam_merge.recipe.places import Known, Store
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.companions import left_behind
from bam_merge.sources.licenses import CARD, MOST
from bam_merge.sources.places import Found, bring, find


def find_in(recipe: Recipe, store: Store) -> Found:
    """What stands at a place that the recipe names. Raises CheckpointError."""
    if store.path in recipe.known:
        return find(f"{MARK}{recipe.known[store.path].recorded}", adapter=store.adapter)
    return find(store.path, recipe.folder, recipe.from_document, store.adapter)


def at_hand(recipe: Recipe, output: Path | None = None, output_bytes: int = 0) -> Recipe:
    """The recipe with every model of the hub that it names downloaded and pinned to its commit. Raises CheckpointError with all problems.

    Room is looked for first, also for an output of so many bytes.
    """
    found: dict[str, Found] = {}
    problems = []
    for name, store in recipe.stores.items():
        try:
            found[store.path] = find_in(recipe, store)
        except BamMergeError as error:
            problems += [f"sources.{name}: {problem}" for problem in error.problems]
    if problems:
        raise CheckpointError(*problems)
    bring(found.values(), output, output_bytes)
    bring_cards(found.values())
    return pinned(recipe, found)


def bring_cards(places: Iterable[Found]) -> None:
    """Download the cards of the models of the hub among `places`, which state their licenses. Raises CheckpointError."""
    wanted = [
        (snapshot, CARD)
        for snapshot in (place.snapshot for place in places)
        if snapshot is not None and snapshot.files is not None and CARD in snapshot.files and snapshot.files[CARD].size <= MOST
    ]
    if wanted:
        from bam_merge.sources.hub.download import download

        download(wanted)


def pinned(recipe: Recipe, found: Mapping[str, Found]) -> Recipe:
    """The recipe that names every model of the hub in `found` with its commit, and knows where its folder is."""
    return recipe.knowing({text: Known(place.recorded, place.path) for text, place in found.items() if place.recorded is not None})


def notes_of(recipe: Recipe, name: str, found: Found) -> list[str]:
    """What a plan has to say of where a source is."""
    snapshot = found.snapshot
    if snapshot is None:
        return []
    if snapshot.files is None:
        return [f"sources.{name}: {found.recorded} as it is in the cache: {snapshot.note}."]
    if name != recipe.model_store(recipe.seed_name):
        return []
    absent = [item for item in (*snapshot.files, *snapshot.folders) if not (snapshot.folder / item).exists()]
    return [f"sources.{name}: {note}" for note in left_behind(absent)]
