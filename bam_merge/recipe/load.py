"""Reading a recipe: YAML to Recipe, or every problem with its line."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bam_merge.checkpoints.folder import read_small_file
from bam_merge.documents import YAML_MAX_BYTES, YamlError, load_yaml
from bam_merge.documents import Path as DocumentPath
from bam_merge.errors import CheckpointError, ForeignRecipe, RecipeError
from bam_merge.paths import located
from bam_merge.recipe.checks import inconsistencies
from bam_merge.recipe.explain import dotted, explain
from bam_merge.recipe.mergekit import equivalent, is_mergekit
from bam_merge.recipe.schema import Recipe
from bam_merge.text import printable
from bam_merge.validation_words import kind_of

# ---- reading ---------------------------------------------------------------------------------------------------------------


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read the recipe at `path`. Raises RecipeError with every problem, each with line, column and key."""
    file = located(path, error=RecipeError)
    try:
        text = read_small_file(file, YAML_MAX_BYTES).decode()
    except CheckpointError as error:
        raise RecipeError(*error.problems) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{printable(str(path))}: not UTF-8 text (byte {error.start}).") from None
    try:
        document, marks = load_yaml(text)
    except YamlError as error:
        place = f":{error.line}:{error.column}" if error.line else ""
        raise RecipeError(f"{printable(str(path))}{place}: {error}.") from None
    places = {key: f":{mark.line + 1}:{mark.column + 1}" for key, mark in marks.items()}
    return parse_recipe(document, file.parent, str(path), places)


def parse_recipe(document: Any, folder: Path = Path(), file: str = "recipe", places: Mapping[DocumentPath, str] | None = None) -> Recipe:
    """Check a recipe given as plain data. `places` maps paths in the document to ':line:column'. Raises RecipeError."""
    name, places = printable(file), places or {}
    if not isinstance(document, dict):
        raise RecipeError(f"{name}: a recipe is a mapping with method, sources and output; found {kind_of(document)}.")
    if is_mergekit(document):
        raise _foreign(name, document, folder)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(*explain(error, document, name, places, Recipe)) from None
    recipe._folder, recipe._file = folder, name
    problems = [f"{name}{places.get(path, '')}: {dotted(path)}: {text}" for path, text in inconsistencies(recipe)]
    if problems:
        raise RecipeError(*problems)
    return recipe


def _foreign(name: str, document: Mapping[str, Any], folder: Path) -> ForeignRecipe:
    """What is said of a recipe of mergekit, with the equivalent one of ours."""
    found = equivalent(document, folder)
    what = f"{name}: this is a recipe of {found.kind}, and not of bam-merge."
    if found.text is not None:
        more = f", with what is not the same in {len(found.differs)} comments" if len(found.differs) > 1 else ""
        return ForeignRecipe(
            f"{what} One of bam-merge that asks for the same is on standard output{more}: save it, and give that.", instead=found.text
        )
    return ForeignRecipe(what, *(f"{name}: no equivalent here: {text}." for text in found.lacks))
