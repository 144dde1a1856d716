"""How a merge is run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from bam_merge.values.threads import default_workers

if TYPE_CHECKING:
    from bam_merge.verifying.report import Report


@dataclass
class MergeOptions:
    """How to run a merge.

    `verify` proves the result before it appears: quick (or true), full, none (or false), computing on `device`, as a pass over the texts of
    routers does; `on_report` is given what that found, `on_verify` hears of work done and of all the work, and `on_calibrate` of the pass.
    `notify` gets one line for each thing worth saying, `progress` the bytes just written, from any worker. `ranges`: the weights of models
    of the hub are read there, by ranges, and not downloaded.
    """

    force: bool = False
    resume: bool = False
    workers: int = field(default_factory=default_workers)
    allow_nonfinite: bool = False
    verify: bool | Literal["quick", "full", "none"] = True
    device: str = "cpu"
    notify: Callable[[str], None] = lambda text: None
    progress: Callable[[int], None] = lambda count: None
    on_report: "Callable[[Report], None]" = lambda report: None
    on_verify: Callable[[int, int], None] = lambda done, total: None
    on_calibrate: Callable[[int, int], None] = lambda done, total: None
    ranges: bool = False

    @property
    def level(self) -> str | None:
        """How deep the proof looks; None where there is to be none."""
        if isinstance(self.verify, bool):
            return "quick" if self.verify else None
        return None if self.verify == "none" else self.verify
