"""Opening all sources of a recipe."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bam_merge.checkpoints.kinds import absent
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.files import identity
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import DenseModel, read_dense


def open_sources(recipe: Recipe) -> tuple[dict[str, DenseModel], list[str]]:
    """Every source, and all problems of all of them."""

    def attempt(name: str) -> DenseModel | CheckpointError:
        written = recipe.source(name).path
        place = recipe.located(written)
        try:
            return read_dense(name, place)
        except CheckpointError as error:
            more = "" if os.path.lexists(place) else absent(written, place)
            return CheckpointError(*(f"{problem}{more}" for problem in error.problems))

    with ThreadPoolExecutor(max_workers=4) as pool:
        opened = list(pool.map(attempt, recipe.sources))
    models = {model.name: model for model in opened if isinstance(model, DenseModel)}
    return models, [problem for error in opened if isinstance(error, BamMergeError) for problem in error.problems]


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
