"""How a verification looks in a terminal: checks with value and tolerance, the routers, perplexities."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bam_merge.process import progress_console
from bam_merge.showing.held_out import held_out_tables, readings_table
from bam_merge.showing.terminal import Terminal, grid, heading
from bam_merge.text import count, printable, short
from bam_merge.verifying.report import AVERAGE, FORCED, MERGED, Check, Report

if TYPE_CHECKING:
    from rich.progress import TaskID

OWN = "own model"
"""A text's own source, where no text is of another."""


MARKS = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("--", "yellow")}


def report_tables(report: Report, terminal: Terminal) -> Iterator[RenderableType]:
    """The tables of a verification, and its verdict as the last line."""
    yield _checks(report.checks)
    for router in ("attention", "ffn"):
        rows = [row for row in report.routing if row["router"] == router]
        if rows:
            yield heading(f"{router} router", "mean gate of each expert, and its share of the tokens' choices")
            yield _routing(rows, report.experts)
    yield from text_tables(report, terminal)
    failures = sum(1 for _ in report.failures)
    open_ = [check.name for check in report.checks if check.ok is None]
    if failures:
        yield Text(f"\n{count(failures, 'check')} failed", "bold red")
    elif open_:
        yield Text(f"\nverified as far as it could be; not checked: {', '.join(open_)}", "bold yellow")
    else:
        yield Text("\nverified", "bold green")


def text_tables(report: Report, terminal: Terminal) -> Iterator[RenderableType]:
    """What was measured on texts: the routers, perplexities, and what they mean."""
    if report.held_out is not None:
        yield from held_out_tables(report.held_out, report.experts, terminal)
    if report.perplexity:
        forced = any(FORCED in row["perplexity"] for row in report.perplexity)
        yield heading("perplexity", "forced: gate 1 for the expert that the text is for, what the best routers could do" if forced else "")
        yield _perplexity(report.perplexity)
    if report.readings:
        yield from readings_table(report.readings)


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
    alone = all("domain" in row and {*row["perplexity"]} <= {row["domain"], AVERAGE, MERGED, FORCED} for row in rows)
    shown = [{(OWN if alone and name == row.get("domain") else name): value for name, value in row["perplexity"].items()} for row in rows]
    models = list(dict.fromkeys(name for found in shown for name in found))
    named = any("domain" in row for row in rows)
    table = grid("left", *["left"] * named, *["right"] * (1 + len(models)), header=("text", *["for"] * named, "tokens", *models))
    for row, found in zip(rows, shown, strict=True):
        values = ("" if name not in found else f"{found[name]:.2f}" if found[name] < 1e5 else f"{found[name]:.2e}" for name in models)
        domain = [Text(printable(row.get("domain", "")))] * named
        table.add_row(Text(printable(row["text"])), *domain, str(row["tokens"]), *values)
    return table


def verdict_text(report: Report) -> str:
    """One line on a verification that passed, or on what it could not check."""
    passed = sum(check.ok is True for check in report.checks)
    open_ = [f"{check.name}: {check.detail}" for check in report.checks if check.ok is None]
    return "; ".join([f"verified: {count(passed, 'check')} passed", *open_])


@contextmanager
def verify_progress(what: str = "verifying") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with time left, from the first word of work done until all is; silent where stderr is not a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = progress_console()
    started: list[tuple[Progress, TaskID]] = []

    def advance(done: int, total: int) -> None:
        if not console.is_terminal:
            return
        if not started:
            columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            progress = Progress(*columns, console=console, transient=True)
            started.append((progress, progress.add_task(what, total=total)))
            progress.start()
        started[0][0].update(started[0][1], completed=done, total=total)
        if done >= total:  # another one may follow
            started[0][0].stop()

    try:
        yield advance
    finally:
        for progress, _ in started:
            progress.stop()
