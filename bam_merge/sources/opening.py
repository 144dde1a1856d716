"""Opening all sources of a recipe."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from bam_merge.checkpoints.adapter_folder import AdapterFolder, open_adapter
from bam_merge.checkpoints.kinds import absent
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.files import identity
from bam_merge.recipe.places import Adapted, Store, adapter_stores, base_store
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.adapters.changes import Opened
from bam_merge.sources.adapters.reading import with_adapters
from bam_merge.sources.dense import DenseModel, read_dense
from bam_merge.sources.dequantised import read_dequantised
from bam_merge.sources.experts import read_expert
from bam_merge.sources.places import Found, bring_manifest, opened
from bam_merge.sources.recipe_places import find_in, notes_of, pinned
from bam_merge.sources.tied_heads import settle_copies
from bam_merge.text import nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """What opening all sources gave: the models, all problems of all of them, what a plan has to say, and the recipe with every model of
    the hub pinned to its commit."""

    recipe: Recipe
    models: Mapping[str, DenseModel]
    problems: list[str]
    notes: list[str]


def open_sources(recipe: Recipe) -> Sources:
    """Every source, as far as it can be opened."""
    places: dict[str, Found] = {}
    jobs = [(copy_context(), *item) for item in recipe.stores.items()]  # the context: who is told of downloads
    with ThreadPoolExecutor(max_workers=4) as pool:
        results = list(pool.map(lambda job: job[0].run(_attempt, _open_store, recipe, job[1], job[2], places), jobs))
    folders = dict(zip(recipe.stores, results, strict=True))
    notes = [note for name in recipe.stores if name in places for note in notes_of(recipe, name, places[name])]
    recipe = pinned(recipe, {recipe.stores[name].path: place for name, place in places.items()})
    problems = [problem for error in folders.values() if isinstance(error, BamMergeError) for problem in error.problems]
    accept = recipe.accept.head if recipe.accept else None
    for name, folder in folders.items():
        if isinstance(folder, DenseModel):
            folders[name], against = settle_copies(folder, accept)  # before an adapter changes one of the two, or both
            problems += against
    models = {name: folder for name, folder in folders.items() if name in recipe.sources and isinstance(folder, DenseModel)}
    waiting = [name for name, source in recipe.sources.items() if isinstance(source, Adapted)]
    while ready := [name for name in waiting if _base(recipe, name, models, folders) is not None]:  # a base may itself be adapted
        for name in ready:
            waiting.remove(name)
            made = _attempt(_adapted, recipe, name, models, folders)
            problems += made.problems if isinstance(made, CheckpointError) else []
            models |= {name: made} if isinstance(made, DenseModel) else {}
    return Sources(recipe, {name: models[name] for name in recipe.sources if name in models}, list(dict.fromkeys(problems)), notes)


def _attempt(open_one: Callable[..., T], *arguments: Any) -> T | CheckpointError:
    try:
        return open_one(*arguments)
    except CheckpointError as error:
        return error


def _open_store(recipe: Recipe, name: str, store: Store, places: dict[str, Found]) -> DenseModel | AdapterFolder:
    """What tensors are read from, by its headers; where it is, is entered in `places`."""
    try:
        place = places[name] = find_in(recipe, store)
        if store.expert is not None:
            bring_manifest(place)
        checkpoint = opened(place, recipe.needs_tokenizers) if place.recorded is not None else None
        if store.adapter:
            return checkpoint if isinstance(checkpoint, AdapterFolder) else open_adapter(place.path)
    except CheckpointError as error:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in error.problems)) from None
    try:
        if store.expert is not None:
            return read_expert(name, place.path, store.expert, store.family, checkpoint)
        return (read_dequantised if store.dequantise else read_dense)(name, place.path, checkpoint)
    except CheckpointError as error:
        if os.path.lexists(place.path):
            raise error if name in recipe.sources else CheckpointError(*map(_of_a_base, error.problems)) from None
        if name in recipe.sources:
            raise CheckpointError(*(f"{problem}{absent(place.path)}" for problem in error.problems)) from None
        close = nearest(store.path, recipe.sources)
        raise CheckpointError(*error.problems, f"sources.{name}: {store.path!r} is no source of this recipe{close}") from None


def _of_a_base(problem: str) -> str:
    """What is said of a base that is no source: where the way out is a key of sources, it has to be one."""
    return f"{problem} (As a source of its own, with a name that base: then has.)" if "dequantise: true" in problem else problem


def _base(recipe: Recipe, name: str, models: dict[str, DenseModel], folders: dict[str, Any]) -> DenseModel | None:
    """The base of the source `name`; None where it could not be opened, or is not made yet."""
    source = recipe.sources[name]
    assert isinstance(source, Adapted)
    base = models.get(source.base) if source.base in recipe.sources else folders[base_store(name)]
    return base if isinstance(base, DenseModel) else None


def _adapted(recipe: Recipe, name: str, models: dict[str, DenseModel], folders: dict[str, Any]) -> DenseModel | None:
    """The source `name`, which is a base with adapters; None where one of these could not be opened."""
    source, base = recipe.sources[name], _base(recipe, name, models, folders)
    assert isinstance(source, Adapted)
    adapters = [
        Opened(store, folders[store], item.weight)
        for store, item in zip(adapter_stores(name, source), source.adapters, strict=True)
        if isinstance(folders[store], AdapterFolder)
    ]
    if base is None or len(adapters) < len(source.adapters):
        return None
    made = with_adapters(name, base, adapters)
    return made if source.base in recipe.sources else replace(made, notes=(*base.checkpoint.notes, *base.notes, *made.notes))


def same_folder(models: list[DenseModel]) -> list[str]:
    """Sources that are one model by identity: a folder under two names, or weight files that are links to the same ones."""
    seen: dict[tuple[str, Any], str] = {}
    problems = []
    for model in models:
        for what, key in _identities(model):
            other = model.name if key is None else seen.setdefault((what, key), model.name)
            if other != model.name:
                problems.append(
                    f"sources.{model.name}: the same {what} as sources.{other}. Name it once; it may stand several times in experts."
                )
                break
    return problems


def _identities(model: DenseModel) -> Iterator[tuple[str, Any]]:
    """(what is the same where this is, its identity): of an adapted model that of its folders together."""
    folders = list(model.stores.values())
    paths = [identity(folder.path) for folder in folders]
    files = [{identity(folder.path / file) for file in folder.files} for folder in folders]
    several, weights = len(folders) > 1, tuple(adapter.weight for adapter in model.adapters)
    yield "base and adapters" if several else "folder", None if None in paths else (*paths, *weights, model.expert)
    unknown = any(None in some for some in files)
    yield (
        "weight files of base and adapters" if several else "weight files",
        None if unknown else (*map(frozenset, files), *weights, model.expert),
    )
