"""Whole processes that take turns, and the table of their times: the conditions of merge.py's docstring."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from common import Run, markdown_table, run


@dataclass(frozen=True)
class Command:
    """What to run. `reads` are the folders it reads, `writes` the one it makes; `allowed` the exit statuses that are no failure."""

    label: str
    argv: Sequence[str | Path]
    reads: Sequence[Path] = ()
    writes: Path | None = None
    allowed: Sequence[int] = (0,)


@dataclass
class Row:
    """One line of a table: wall and processor times in seconds, peaks in bytes; per other command the ratios of the wall times."""

    label: str
    seconds: list[float]
    cpu_seconds: list[float]
    peak_bytes: list[int]
    ratios: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Table:
    """A section's result."""

    title: str
    rows: list[Row]


def warm(folder: Path) -> None:
    """Read every file in `folder` into the page cache."""
    view = memoryview(bytearray(2**23))
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(view):
                    pass


def clear(folder: Path | None) -> None:
    """Delete an output, and whatever else its making left beside it."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_name(f".{folder.name}.bam-merge"), ignore_errors=True)


def measure(command: Command, keep: bool = False) -> Run:
    """One run under the conditions of the module's docstring; its output is deleted afterwards unless `keep`."""
    clear(command.writes)
    os.sync()
    for folder in command.reads:
        warm(folder)
    result = run(command.argv, command.allowed)
    if not keep:
        clear(command.writes)
    return result


def alternate(commands: Sequence[Command], rounds: int, anchors: Sequence[str]) -> list[Row]:
    """Run the commands in turn, `rounds` times. Ratios are taken to the commands labelled in `anchors`."""
    runs: dict[str, list[Run]] = {command.label: [] for command in commands}
    for index in range(rounds):
        first = index % len(commands)
        for command in [*commands[first:], *commands[:first]]:
            result = measure(command)
            runs[command.label].append(result)
            print(f"  {command.label}: {result.seconds:.2f} s", file=sys.stderr)
    rows = []
    for label, results in runs.items():
        ratios = {
            anchor: [one.seconds / other.seconds for one, other in zip(results, runs[anchor], strict=True)]
            for anchor in anchors
            if anchor != label
        }
        seconds, cpu_seconds = [one.seconds for one in results], [one.cpu_seconds for one in results]
        rows.append(Row(label, seconds, cpu_seconds, [one.peak_bytes for one in results], ratios))
    return rows


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and from the smallest to the largest."""
    if not values:
        return ""
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def table_text(table: Table) -> str:
    """A section's table in markdown."""
    anchors = list(dict.fromkeys(anchor for row in table.rows for anchor in row.ratios))
    rows = [
        [
            row.label,
            spread(row.seconds),
            *(spread(row.ratios.get(anchor, [])) for anchor in anchors),
            f"{median(row.cpu_seconds):.2f}",
            f"{max(row.peak_bytes) / 1e6:,.0f}",
        ]
        for row in table.rows
    ]
    header = [table.title, "wall time, s", *(f"ratio to {anchor}" for anchor in anchors), "processor time, s", "peak memory, MB"]
    return markdown_table(header, rows)
