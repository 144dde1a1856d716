"""The output's files for images and videos against the source's whose towers it has: what the rule of publication gives, or none.

Which source that is, and whether there is any, is worked out here from config.json of the output and of the sources.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_merge.architectures.wrappers import Wrapper
from bam_merge.checkpoints.folder import PROCESSOR_FILES, read_small_file
from bam_merge.documents import load_json
from bam_merge.errors import BamMergeError
from bam_merge.model.wrapped import wrapper_of
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.companions import companion
from bam_merge.text import printable, some
from bam_merge.verifying.report import Check


def processor_check(folder: Path, recipe: Recipe, manifest: Mapping[str, Any], changed: Mapping[str, Sequence[str]]) -> Check | None:
    """They are what the sources give. Files that `changed` since the merge are not compared. None where there are none, and where a source
    that is not at hand may give them."""
    names = list(dict.fromkeys((recipe.seed_name, *recipe.sources)))
    folders = {name: recipe.located(recipe.source(name).path) for name in names}
    if not all(path.is_dir() for path in folders.values()):
        return None
    if not any(file in manifest["files"] or any((path / file).is_file() for path in folders.values()) for file in PROCESSOR_FILES):
        return None
    wrapper = _wrapper(folder)
    of = wrapper.written.of if wrapper is not None and wrapper.written is not None else None
    alike = (name for name in names if recipe.source(name).expert is None and _called(folders[name]) == of and of is not None)
    giver = next((name for name in alike if any((folders[name] / file).is_file() for file in PROCESSOR_FILES)), None)
    wrong, stale, compared = list[str](), list[str](), list[str]()
    for file in PROCESSOR_FILES:
        there = file in manifest["files"]
        if giver is None:
            wrong += [f"{file} is for images, and no source in the wrapper of this model has such a file"] if there else []
        elif there or (folders[giver] / file).is_file():
            compared.append(file)
            recorded = manifest["sources"][recipe.model_store(giver)].get("companions") or {}
            into = stale if file in changed.get(giver, ()) or (file not in recorded and not there) else wrong
            into += _differences(folder / file if there else None, folders[giver] / file, giver, stale)
    if wrong:
        return Check("processors", False, some([*wrong, *stale], 4))
    if stale:
        return Check("processors", None, some(stale, 4))
    return Check("processors", True, f"{some(compared)} as in sources.{printable(giver)}") if giver is not None else None


def _differences(written: Path | None, path: Path, giver: str, stale: list[str]) -> Iterator[str]:
    """What of an output's file is not what its source gives; what cannot be read is added to `stale`."""
    try:
        expected = companion(path) if path.is_file() else None
    except BamMergeError as error:
        stale += error.problems
        return
    try:
        found = read_small_file(written) if written is not None else None
    except BamMergeError:  # `files` says so
        return
    if found != expected:
        what = "is not there, though" if found is None else "is there, and not in" if expected is None else "is not that of"
        yield f"{path.name} {what} sources.{printable(giver)}{' has one' if found is None else ''}"


def _called(folder: Path) -> str | None:
    wrapper = _wrapper(folder)
    return None if wrapper is None else wrapper.name


def _wrapper(folder: Path) -> Wrapper | None:
    """What wrapper the model in a folder stands in."""
    try:
        return wrapper_of(load_json(read_small_file(folder / "config.json")))
    except (BamMergeError, ValueError, AttributeError):
        return None
