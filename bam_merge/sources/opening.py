"""Opening all sources of a recipe."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from bam_merge.checkpoints.adapter_folder import AdapterFolder, open_adapter
from bam_merge.checkpoints.kinds import absent
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.files import identity
from bam_merge.recipe.places import Adapted, Store, adapter_stores, base_store
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.adapter_changes import Opened
from bam_merge.sources.adapters import with_adapters
from bam_merge.sources.dense import DenseModel, read_dense
from bam_merge.sources.dequantised import read_dequantised
from bam_merge.sources.tied_heads import settle_copies
from bam_merge.text import nearest

T = TypeVar("T")


def open_sources(recipe: Recipe) -> tuple[dict[str, DenseModel], list[str]]:
    """Every source, and all problems of all of them."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        opened = list(pool.map(lambda item: _attempt(_open_store, recipe, *item), recipe.stores.items()))
    folders = dict(zip(recipe.stores, opened, strict=True))
    problems = [problem for error in opened if isinstance(error, BamMergeError) for problem in error.problems]
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
    return {name: models[name] for name in recipe.sources if name in models}, list(dict.fromkeys(problems))


def _attempt(open_one: Callable[..., T], *arguments: Any) -> T | CheckpointError:
    try:
        return open_one(*arguments)
    except CheckpointError as error:
        return error


def _open_store(recipe: Recipe, name: str, store: Store) -> DenseModel | AdapterFolder:
    """A folder that tensors are read from, by its headers."""
    path = recipe.located(store.path)
    if not store.adapter:
        try:
            return read_dequantised(name, path) if store.dequantise else read_dense(name, path)
        except CheckpointError as error:
            if os.path.lexists(path):
                raise
            if name in recipe.sources:
                raise CheckpointError(*(f"{problem}{absent(store.path, path)}" for problem in error.problems)) from None
            close = nearest(store.path, recipe.sources)
            raise CheckpointError(*error.problems, f"sources.{name}: {store.path!r} is no source of this recipe{close}") from None
    try:
        return open_adapter(path)
    except CheckpointError as error:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in error.problems)) from None


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
    return with_adapters(name, base, adapters)


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
    yield "base and adapters" if several else "folder", None if None in paths else (*paths, *weights)
    unknown = any(None in some for some in files)
    yield "weight files of base and adapters" if several else "weight files", None if unknown else (*map(frozenset, files), *weights)
