"""Findings as lines for a terminal."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType

from bam_merge.comparing.findings import Finding
from bam_merge.showing.terminal import heading, line
from bam_merge.text import count, printable

SHOWN = 20
"""Tensors that are listed unless all are asked for."""


def apart(findings: Sequence[Finding], every: bool) -> Iterator[RenderableType]:
    """What tells folders apart besides values; a few of each kind."""
    if not findings:
        return
    yield heading("apart from values")
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    for kind, members in kinds.items():
        shown = members if every else members[:SHOWN]
        yield from (line(finding.text, "yellow" if finding.counts else "dim") for finding in shown)
        if len(shown) < len(members):
            yield line(f"and {len(members) - len(shown):,} more of {kind} (--all lists them)", "dim", 4)


def ignored(reasons: Mapping[str, str], every: bool) -> Iterator[RenderableType]:
    """What was not compared, and why."""
    if not reasons:
        return
    yield heading("not compared", count(len(reasons), "tensor"))
    if every:
        yield from (line(f"{printable(name)}: {printable(reason)}", "dim") for name, reason in reasons.items())
    else:
        yield from (line(f"{number:,}  {printable(reason)}", "dim") for reason, number in Counter(reasons.values()).items())
