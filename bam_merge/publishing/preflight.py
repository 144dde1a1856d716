"""What can be known before a byte is written: where the result goes, and why it could not."""

from pathlib import Path

from bam_merge.errors import OutputError
from bam_merge.planning.plan import Plan
from bam_merge.publishing.destination import lack_of_space, preflight, space_problem
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.staging import staged_bytes

# ---- before anything is written ------------------------------------------------------------------------------------------


def check_target(plan: Plan, target: Path, options: MergeOptions) -> None:
    """Raise OutputError when `target` cannot be written."""
    problems = preflight(plan, target, force=options.force) or list(filter(None, [space_problem(plan, target)]))
    if problems:
        raise OutputError(*problems)


def part_space_problem(mine: Plan, target: Path) -> str | None:
    """A message when the file system lacks room for the files of a part; what is there of them counts as room."""
    held = staged_bytes(target, {shard.file for shard in mine.shards})
    return lack_of_space(mine.bytes_written, target, "this part writes", held)
