"""What can be known before a byte is written: where the result goes, and why it could not."""

import os
import shutil
from pathlib import Path

from bam_merge.errors import OutputError
from bam_merge.files import identity
from bam_merge.planning.plan import Plan
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.staging import staged_bytes
from bam_merge.text import printable

SMALL_FILES = 20_000_000
"""Bytes set aside for the files beside the tensors: tokenizer, manifest, index."""


def target_path(plan: Plan, output: str | os.PathLike[str] | None) -> Path:
    """Where the result goes: `output` relative to the working directory, or the recipe's path relative to the recipe."""
    return Path(os.path.abspath(output if output is not None else plan.recipe.located(plan.recipe.output.path)))


# ---- before anything is written ------------------------------------------------------------------------------------------


def check_target(plan: Plan, target: Path, options: MergeOptions) -> None:
    """Raise OutputError when `target` cannot be written."""
    problems = preflight(plan, target, force=options.force) or list(filter(None, [space_problem(plan, target)]))
    if problems:
        raise OutputError(*problems)


def preflight(plan: Plan, target: Path, force: bool) -> list[str]:
    """Why `target` cannot be written, found before a byte is: it exists, it overlaps a source, no permission."""
    shown = printable(str(target))
    problems = []
    here = identity(target)
    above = {identity(parent) for parent in target.parents} - {None}
    for name, model in plan.models.items():
        source = model.checkpoint.path.resolve()
        if here is not None and here in {identity(source), *map(identity, source.parents)}:
            problems.append(f"output.path: {shown} is, or holds, sources.{name} ({printable(str(source))}). Choose another folder.")
        elif identity(source) in above:
            problems.append(f"output.path: {shown} is inside sources.{name} ({printable(str(source))}). Choose another folder.")
    if problems:
        return problems
    if os.path.lexists(target):
        if not force:
            problems.append(f"{shown} already exists. Choose another --output, or replace it as a whole with --force.")
        elif not replaceable(target):
            problems.append(f"{shown} exists and is not a checkpoint folder, so --force will not delete it. Remove it yourself.")
    parent = _existing_parent(target)
    if not parent.is_dir():
        problems.append(f"{printable(str(parent))} is not a folder, so {shown} cannot be made in it.")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"no permission to write in {printable(str(parent))}. Choose another --output.")
    return problems


def space_problem(plan: Plan, target: Path) -> str | None:
    """A message when the file system lacks room for the output; what an unfinished run holds counts as room."""
    parent = _existing_parent(target)
    needed, free = plan.bytes_written + SMALL_FILES, shutil.disk_usage(parent).free + staged_bytes(target)
    if needed <= free:
        return None
    return (
        f"{printable(str(parent))}: {free / 1e9:.2f} GB free, the merge writes {plan.bytes_written / 1e9:.2f} GB. "
        "Free some space, or choose another --output."
    )


def _existing_parent(target: Path) -> Path:
    return next((parent for parent in target.parents if os.path.lexists(parent)), Path("/"))


def replaceable(target: Path) -> bool:
    """Whether --force may delete `target`: a folder that is empty or holds a checkpoint."""
    if target.is_symlink() or not target.is_dir():
        return False
    names = os.listdir(target)
    return not names or "config.json" in names
