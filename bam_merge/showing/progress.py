"""How far a merge has come: bars for people, or a line of JSON a second for schedulers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from bam_merge.expressions import Calibrated
from bam_merge.planning.plan import Plan
from bam_merge.process import tell
from bam_merge.showing.plan import merge_progress
from bam_merge.showing.verification import verify_progress

LINE_SECONDS = 1.0
"""The least time between two lines of one stage, but for its first and its last."""


class Shown(NamedTuple):
    """What a merge tells: the bytes just written; work done and all the work of a pass over texts, and of the proof."""

    advance: Callable[[int], None]
    calibrated: Callable[[int, int], None]
    verified: Callable[[int, int], None]


@contextmanager
def shown(plan: Plan, form: str, part: str | None = None) -> Iterator[Shown]:
    """Show how far the merge of `plan` has come, as a "bar" or as "json"; of one `part`, say which."""
    if form == "json":
        merging = Lines("merging", part, sum(step.nbytes for step in plan.steps if not isinstance(step.expr, Calibrated)))
        calibrating, verifying = Lines("calibrating", part), Lines("verifying", part)
        yield Shown(merging.add, calibrating.say, verifying.say)
        return
    with ExitStack() as stack:
        yield Shown(
            stack.enter_context(merge_progress(plan)),
            stack.enter_context(verify_progress("calibrating")),
            stack.enter_context(verify_progress()),
        )


@dataclass
class Lines:
    """Lines of JSON on stderr, of one stage: {"stage", "part", "done", "total"}; bytes where it is "merging", else shares of the work."""

    stage: str
    part: str | None = None
    total: int = 0
    done: int = 0
    said: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """So much more is done. From any thread."""
        with self.lock:
            self._say(self.done + count, self.total)

    def say(self, done: int, total: int) -> None:
        """So much is done of so much."""
        with self.lock:
            self._say(done, total)

    def _say(self, done: int, total: int) -> None:
        ended = done >= total and self.done < total
        self.done, self.total = done, total
        now = time.monotonic()
        if self.said is None or ended or now - self.said >= LINE_SECONDS:
            self.said = now
            part = {"part": self.part} if self.part is not None else {}
            tell(json.dumps({"stage": self.stage, **part, "done": done, "total": total}))
