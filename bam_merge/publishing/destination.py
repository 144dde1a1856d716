"""Where a result goes, and why it cannot: found before a byte is written."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bam_merge.errors import OutputError
from bam_merge.files import identity
from bam_merge.paths import located, within
from bam_merge.planning.plan import Plan
from bam_merge.publishing.manifest import recipe_folder
from bam_merge.publishing.replacing import why_kept
from bam_merge.publishing.staging import staged_bytes
from bam_merge.recipe.schema import Recipe
from bam_merge.text import printable

SMALL_FILES = 20_000_000
"""Bytes set aside for the files beside the tensors: tokenizer, manifest, index."""


def target_path(plan: Plan, output: str | os.PathLike[str] | None) -> Path:
    """Where the result goes: `output` relative to the working directory, or the recipe's path relative to the recipe.

    Raises OutputError when `output` can be no path.
    """
    return target_of(plan.recipe, output)


def target_of(recipe: Recipe, output: str | os.PathLike[str] | None) -> Path:
    """`target_path` of a recipe that has no plan yet."""
    if output is None:
        return Path(os.path.abspath(located(recipe.output.path, recipe.folder, OutputError)))
    return Path(os.path.abspath(located(output, error=OutputError)))


def misplaced(plan: Plan, target: Path) -> list[str]:
    """Why no result of the plan can stand at `target`, whatever is there now: it overlaps a source, or nobody can mean it."""
    shown = printable(str(target))
    if os.path.lexists(target) and (why := _senseless(target)):
        return [f"{shown} {why}."]
    problems = []
    for name, checkpoint in plan.checkpoints.items():
        source = checkpoint.path.resolve()
        if how := overlap(target, source):
            problems.append(f"output.path: {shown} {how} sources.{name} ({printable(str(source))}). Choose another folder.")
    return problems or list(_unrecorded(plan))


def overlap(target: Path, source: Path) -> str | None:
    """How a result at `target` would overlap the folder `source`, in words between the two; None when it does not."""
    here, path = identity(target), Path(os.path.realpath(target))
    if (here is not None and here in {identity(source), *map(identity, source.parents)}) or within(source, path):
        return "is, or holds,"
    above = {identity(parent) for parent in target.parents} - {None}
    return "is inside" if identity(source) in above or within(path, source) else None


def preflight(plan: Plan, target: Path, force: bool) -> list[str]:
    """Why `target` cannot be written, found before a byte is: misplaced, there already, no permission."""
    return misplaced(plan, target) or occupied(target, force)


def occupied(target: Path, force: bool) -> list[str]:
    """Why nothing can be written at `target`: what stands there, or no permission."""
    shown, problems = printable(str(target)), list[str]()
    if os.path.lexists(target) and (why := _senseless(target)):
        return [f"{shown} {why}."]
    if os.path.lexists(target):
        if not force:
            problems.append(f"{shown} already exists. Choose another --output, or replace it as a whole with --force.")
        elif why := why_kept(target)[0]:
            problems.append(f"{shown} exists and {why}.")
    parent = _existing_parent(target)
    if not parent.is_dir():
        problems.append(f"{printable(str(parent))} is not a folder, so {shown} cannot be made in it.")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"no permission to write in {printable(str(parent))}. Choose another --output.")
    return problems


def _unrecorded(plan: Plan) -> Iterator[str]:
    """The ways between recipe, sources and output that bam_merge.json, which is UTF-8, cannot record."""
    recipe = plan.recipe
    ways = {f"sources.{name}": recipe.relative(store.path) for name, store in recipe.stores.items()}
    for key, way in {**ways, "output.path": recipe_folder(plan)}.items():
        if way != way.encode(errors="replace").decode():
            what = "back from there to the recipe" if key == "output.path" else "there from the recipe"
            yield (
                f"{key}: the way {what}, {printable(way)}, has a name that is not UTF-8, so bam_merge.json cannot record it. Rename that "
                "folder, or have the recipe, its sources and its output.path below it; --output may name any folder."
            )


def space_problem(plan: Plan, target: Path) -> str | None:
    """A message when the file system lacks room for the output; what an unfinished run holds counts as room."""
    kept = plan.calibration.disk if plan.calibration is not None else 0
    return lack_of_space(plan.bytes_written + kept, target, "the merge writes")


def lack_of_space(nbytes: int, target: Path, who_writes: str, held: int | None = None) -> str | None:
    """A message when the file system lacks room for `nbytes` at `target`; what an unfinished run holds (None: all of it) counts as room."""
    parent = _existing_parent(target)
    needed, free = nbytes + SMALL_FILES, shutil.disk_usage(parent).free + (staged_bytes(target) if held is None else held)
    if needed <= free:
        return None
    return (
        f"{printable(str(parent))}: {free / 1e9:.2f} GB free, {who_writes} {nbytes / 1e9:.2f} GB. "
        "Free some space, or choose another --output."
    )


def _existing_parent(target: Path) -> Path:
    return next((parent for parent in target.parents if os.path.lexists(parent)), Path("/"))


def _senseless(target: Path) -> str | None:
    """Why no result can be meant to take the place of `target`, in words that follow its name; None when it can."""
    way_out = "which is never replaced. Name a new folder, as in --output out"
    if target.parent == target:
        return f"is the root of the file system, {way_out}"
    for place, name in ((_working_directory(), "the working directory"), (_home(), "your home folder")):
        if place is not None and _holds(target, place):
            return f"is {'' if os.path.samefile(target, place) else 'a folder above '}{name}, {way_out}"
    return f"is a mount point, {way_out}" if os.path.ismount(target) else None


def _holds(folder: Path, place: Path) -> bool:
    """Whether `place` is `folder` or below it, by identity: names lie where there are links."""
    try:
        here = os.stat(folder)
        return any(os.path.samestat(here, os.stat(above)) for above in (place, *place.parents))
    except OSError:
        return False


def _working_directory() -> Path | None:
    try:
        return Path(os.getcwd())
    except OSError:  # deleted
        return None


def _home() -> Path | None:
    home = os.path.expanduser("~")
    return Path(home) if os.path.isabs(home) else None
