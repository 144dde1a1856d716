"""Opening all sources of a recipe."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.files import identity
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import DenseModel, read_dense
from bam_merge.sources.places import Found, opened
from bam_merge.sources.recipe_places import find_in, notes_of, pinned


@dataclass(frozen=True)
class Opened:
    """What opening all sources gave: the models, all problems of all of them, what a plan has to say, and the recipe with every model of
    the hub pinned to its commit."""

    recipe: Recipe
    models: Mapping[str, DenseModel]
    problems: list[str]
    notes: list[str]


def open_sources(recipe: Recipe) -> Opened:
    """Every source, as far as it can be opened."""
    found: dict[str, Found] = {}

    def attempt(name: str) -> DenseModel | CheckpointError:
        try:
            place = found[name] = find_in(recipe, recipe.stores[name])
            checkpoint = opened(place, recipe.needs_tokenizers) if place.snapshot is not None else None
        except CheckpointError as error:
            return CheckpointError(*(f"sources.{name}: {problem}" for problem in error.problems))
        try:
            return read_dense(name, place.path, checkpoint)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(max_workers=4) as pool:
        jobs = [pool.submit(copy_context().run, attempt, name) for name in recipe.sources]
    results = [job.result() for job in jobs]
    models = {model.name: model for model in results if isinstance(model, DenseModel)}
    problems = [problem for error in results if isinstance(error, BamMergeError) for problem in error.problems]
    notes = [note for name in recipe.sources if name in found for note in notes_of(recipe, name, found[name])]
    return Opened(pinned(recipe, {recipe.stores[name].path: place for name, place in found.items()}), models, problems, notes)


def same_folder(models: list[DenseModel]) -> list[str]:
    """Sources that are one model by identity: a folder under two names, or weight files that are links to the same ones."""
    seen: dict[tuple[str, Any], str] = {}
    problems = []
    for model in models:
        folder = model.checkpoint.path
        files = {identity(folder / file) for file in model.checkpoint.files}
        for what, key in (("folder", identity(folder)), ("weight files", None if None in files else frozenset(files))):
            other = model.name if key is None else seen.setdefault((what, key), model.name)
            if other != model.name:
                problems.append(
                    f"sources.{model.name}: the same {what} as sources.{other}. Name it once; it may stand several times in experts."
                )
                break
    return problems
