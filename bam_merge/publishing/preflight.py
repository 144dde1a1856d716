"""What can be known before a byte is written: where the result goes, and why it could not."""

from pathlib import Path

from bam_merge.errors import OutputError
from bam_merge.planning.plan import Plan
from bam_merge.publishing.destination import preflight, space_problem
from bam_merge.publishing.options import MergeOptions

# ---- before anything is written ------------------------------------------------------------------------------------------


def check_target(plan: Plan, target: Path, options: MergeOptions) -> None:
    """Raise OutputError when `target` cannot be written."""
    problems = preflight(plan, target, force=options.force) or list(filter(None, [space_problem(plan, target)]))
    if problems:
        raise OutputError(*problems)
