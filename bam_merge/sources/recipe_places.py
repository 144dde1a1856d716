"""Where the models are that a recipe names: found, downloaded, and pinned to a commit."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from bam_merge.address import is_address
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
        known = recipe.known[store.path]
        place = known.recorded if is_address(known.recorded) else f"{MARK}{known.recorded}"
        return replace(find(place, adapter=store.adapter), ranged=known.ranged)
    return find(store.path, recipe.folder, recipe.from_document, store.adapter)


def at_hand(recipe: Recipe, output: Path | None = None, output_bytes: int = 0, ranges: bool = False) -> Recipe:
    """The recipe with every model of the hub that it names downloaded and pinned to its commit, and folders elsewhere to be read there.

    Raises CheckpointError with all problems.

    Room is looked for first, also for an output of so many bytes. With `ranges`, models of the hub are read there too.
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
    found = {text: replace(place, ranged=is_ranged(place, ranges or place.ranged)) for text, place in found.items()}
    bring((place for place in found.values() if not place.ranged), output, output_bytes)
    bring_cards(found.values())
    return pinned(recipe, found)


def is_ranged(place: Found, ranges: bool) -> bool:
    """Whether the weights at a place are read there: those of a folder elsewhere always, those of the hub with `ranges`."""
    return place.elsewhere is not None or (ranges and place.snapshot is not None and place.snapshot.can_be_ranged)


def bring_cards(places: Iterable[Found]) -> None:
    """Bring the cards of the models elsewhere among `places`, which state their licenses. Raises CheckpointError."""
    places = list(places)
    for place in places:
        if place.elsewhere is not None:
            from bam_merge.sources.afar.folder import bring_small

            bring_small(place.elsewhere)
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
    known = {text: (place.recorded, place) for text, place in found.items()}
    return recipe.knowing({text: Known(name, place.path, place.ranged) for text, (name, place) in known.items() if name is not None})


def notes_of(recipe: Recipe, name: str, found: Found) -> list[str]:
    """What a plan has to say of where a source is."""
    snapshot = found.snapshot
    if found.elsewhere is not None:
        return [f"sources.{name}: {note}" for note in found.elsewhere.notes()]
    if snapshot is None:
        return []
    if snapshot.files is None:
        return [f"sources.{name}: {found.recorded} as it is in the cache: {snapshot.note}."]
    if name != recipe.model_store(recipe.seed_name):
        return []
    absent = [item for item in (*snapshot.files, *snapshot.folders) if not (snapshot.folder / item).exists()]
    return [f"sources.{name}: {note}" for note in left_behind(absent)]
