"""How a verification looks in a terminal: checks with value and tolerance, the routers, perplexities."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bam_merge.report import Check, Report

MARKS = {True: Text("ok", "green"), False: Text("FAILED", "bold red"), None: Text("--", "yellow")}


def report_tables(report: Report) -> Iterator[RenderableType]:
    """The tables of a verification, and its verdict as the last line."""
    yield _checks(report.checks)
    for router in ("attention", "ffn"):
        rows = [row for row in report.routing if row["router"] == router]
        if rows:
            yield _routing(router, rows, report.experts)
    if report.perplexity:
        yield _perplexity(report.perplexity)
    failures = sum(1 for _ in report.failures)
    verdict = Text("verified", "bold green") if report.ok else Text(f"{failures} check{'s' if failures > 1 else ''} failed", "bold red")
    yield Text.assemble("\n", verdict)


def _table(title: str | None, *columns: str) -> Table:
    """A table whose first column is to the left, the rest to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _checks(checks: Sequence[Check]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("check", "", "measured", "at most"):
        table.add_column(column, justify="right" if column in ("measured", "at most") else "left", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in checks:
        numbers = ("" if number is None else f"{number:.3g}" for number in (check.value, check.tolerance))
        table.add_row(Text(check.name), MARKS[check.ok], *numbers, Text(check.detail))
    return table


def _routing(router: str, rows: Sequence[dict[str, Any]], experts: Sequence[str]) -> Table:
    names = [f"{index} {name}" for index, name in enumerate(experts)] or [str(index) for index in range(len(rows[0]["gate"]))]
    table = _table(f"\n{router} router: mean gate, and share of the choices", "layer", "entropy", *names)
    for row in rows:
        gates = (f"{gate:.3f} {share:4.0%}" for gate, share in zip(row["gate"], row["share"], strict=True))
        table.add_row(str(row["layer"]), f"{row['entropy']:.3f}", *gates)
    return table


def _perplexity(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("\nperplexity", "text", "tokens", *rows[0]["perplexity"])
    for row in rows:
        values = (f"{value:.2f}" if value < 1e5 else f"{value:.2e}" for value in row["perplexity"].values())
        table.add_row(Text(row["text"]), str(row["tokens"]), *values)
    return table
