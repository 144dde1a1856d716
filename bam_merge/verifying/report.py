"""What a verification found: checks with their measured values, and what one says of them in JSON."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One question and its answer. `detail` names tensors and layers when it failed; `value` was measured, `tolerance` allowed.

    `ok` None means that the check could not be made, and `detail` says why.
    """

    name: str
    ok: bool | None
    detail: str = ""
    value: float | None = None
    tolerance: float | None = None


@dataclass
class Report:
    """All checks of one verification, and the tables that go with them. `experts` are the names of the mixture's, by index."""

    experts: Sequence[str] = ()
    checks: list[Check] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    perplexity: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    @property
    def failures(self) -> Iterator[Check]:
        return (check for check in self.checks if check.ok is False)

    def add(self, checks: Iterable[Check]) -> None:
        self.checks.extend(checks)

    def document(self) -> dict[str, Any]:
        """The report as `verify --json` prints it."""
        document: dict[str, Any] = {
            "ok": self.ok,
            "checks": [
                {"name": c.name, "ok": c.ok, "detail": c.detail, "value": _number(c.value), "tolerance": _number(c.tolerance)}
                for c in self.checks
            ],
        }
        if self.routing:
            document["routing"] = self.routing
        if self.perplexity:
            document["perplexity"] = self.perplexity
        return document


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they are given as text."""
    return value if value is None or abs(value) < float("inf") else str(value)
