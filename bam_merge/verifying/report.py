"""What a verification found: checks with their measured values, and what one says of them in JSON."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bam_merge.comparing.drift import Reading

AVERAGE, MERGED, FORCED = "average", "merged", "forced"
"""What is tried beside the sources. Forced: the mixture without its routers, gate 1 for the expert that a text is for in every layer;
what the best routers could do."""


@dataclass(frozen=True)
class Check:
    """One question and its answer. `detail` names tensors and layers when it failed; `value` was measured, `tolerance` allowed.

    `ok` None means that the check could not be made, and `detail` says why. `seconds` are those that it took; of several that one pass
    answers the first has them.
    """

    name: str
    ok: bool | None
    detail: str = ""
    value: float | None = None
    tolerance: float | None = None
    seconds: float | None = None


def timed(checks: Iterable[Check]) -> Iterator[Check]:
    """Each check with the seconds until it was there, if it has none yet."""
    before = time.perf_counter()
    for check in checks:
        yield check if check.seconds is not None else replace(check, seconds=round(time.perf_counter() - before, 4))
        before = time.perf_counter()


@dataclass
class Report:
    """All checks of one verification, and the tables that go with them. `level` is how deep it looked; `experts` are the names of the
    mixture's, by index."""

    level: str = "quick"
    experts: Sequence[str] = ()
    checks: list[Check] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    perplexity: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[str, Any] | None = None
    readings: Sequence[Reading] = ()

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    @property
    def failures(self) -> Iterator[Check]:
        return (check for check in self.checks if check.ok is False)

    def add(self, checks: Iterable[Check]) -> None:
        """Add checks as they are made."""
        self.checks.extend(timed(checks))

    def document(self) -> dict[str, Any]:
        """The report as `verify --json` prints it."""
        document: dict[str, Any] = {
            "ok": self.ok,
            "level": self.level,
            "checks": [
                {
                    "name": check.name, "ok": check.ok, "detail": check.detail, "value": _number(check.value),
                    "tolerance": _number(check.tolerance), "seconds": check.seconds,
                }
                for check in self.checks
            ],
        }  # fmt: skip
        if self.routing:
            document["routing"] = _numbers(self.routing)
        if self.perplexity:
            document["perplexity"] = _numbers(self.perplexity)
        if self.held_out is not None:
            document["held_out"] = {**_numbers(self.held_out), "readings": [reading.document() for reading in self.readings]}
        return document


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they are given as text."""
    return value if value is None or abs(value) < float("inf") else str(value)


def _numbers(value: Any) -> Any:
    """`_number` of all numbers in a document."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return _number(value) if isinstance(value, float) else value
