"""How a verification looks in a terminal: checks with value and tolerance, the routers, perplexities."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bam_merge.showing.terminal import grid, heading
from bam_merge.text import count, printable, short
from bam_merge.verifying.report import Check, Report

MARKS = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("--", "yellow")}


def report_tables(report: Report) -> Iterator[RenderableType]:
    """The tables of a verification, and its verdict as the last line."""
    yield _checks(report.checks)
    for router in ("attention", "ffn"):
        rows = [row for row in report.routing if row["router"] == router]
        if rows:
            yield heading(f"{router} router", "mean gate of each expert, and its share of the tokens' choices")
            yield _routing(rows, report.experts)
    if report.perplexity:
        yield heading("perplexity")
        yield _perplexity(report.perplexity)
    failures = sum(1 for _ in report.failures)
    open_ = [check.name for check in report.checks if check.ok is None]
    if failures:
        yield Text(f"\n{count(failures, 'check')} failed", "bold red")
    elif open_:
        yield Text(f"\nverified as far as it could be; not checked: {', '.join(open_)}", "bold yellow")
    else:
        yield Text("\nverified", "bold green")


def _checks(checks: Sequence[Check]) -> Table:
    table = grid("left", "left", "right", "right", "left", header=("check", "", "measured", "at most", ""))
    for check in checks:
        numbers = ("" if number is None else short(number) for number in (check.value, check.tolerance))
        table.add_row(check.name, Text(*MARKS[check.ok]), *numbers, Text(printable(check.detail, 4000)))
    return table


def _routing(rows: Sequence[dict[str, Any]], experts: Sequence[str]) -> Table:
    names = [f"{index} {name}" for index, name in enumerate(experts)] or [str(index) for index in range(len(rows[0]["gate"]))]
    table = grid("left", *["right"] * (1 + len(names)), header=("layer", "entropy", *names))
    for row in rows:
        gates = (f"{gate:.3f} {share:4.0%}" for gate, share in zip(row["gate"], row["share"], strict=True))
        table.add_row(str(row["layer"]), f"{row['entropy']:.3f}", *gates)
    return table


def _perplexity(rows: Sequence[dict[str, Any]]) -> Table:
    models = list(rows[0]["perplexity"])
    table = grid("left", *["right"] * (1 + len(models)), header=("text", "tokens", *models))
    for row in rows:
        values = (f"{value:.2f}" if value < 1e5 else f"{value:.2e}" for value in row["perplexity"].values())
        table.add_row(Text(printable(row["text"])), str(row["tokens"]), *values)
    return table


def verdict_text(report: Report) -> str:
    """One line on a verification that passed, or on what it could not check."""
    passed = sum(check.ok is True for check in report.checks)
    open_ = [f"{check.name}: {check.detail}" for check in report.checks if check.ok is None]
    return "; ".join([f"verified: {count(passed, 'check')} passed", *open_])
