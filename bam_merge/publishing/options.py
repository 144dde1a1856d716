"""How a merge is run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bam_merge.values.threads import default_workers

if TYPE_CHECKING:
    from bam_merge.verifying.report import Report


@dataclass
class MergeOptions:
    """How to run a merge. `verify` proves the result before it appears; `on_report` is given what that found. `notify` gets one line for
    each thing worth saying, `progress` the bytes just written, from any worker.
    """

    force: bool = False
    resume: bool = False
    workers: int = field(default_factory=default_workers)
    allow_nonfinite: bool = False
    verify: bool = True
    notify: Callable[[str], None] = lambda text: None
    progress: Callable[[int], None] = lambda count: None
    on_report: "Callable[[Report], None]" = lambda report: None
