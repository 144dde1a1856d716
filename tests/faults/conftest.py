"""The merge that all faults are tried on, and the figures at the end."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.harness import Merge, Points, start_server, strace_problem


@pytest.fixture(scope="session")
def merge() -> Iterator[Merge]:
    """In memory where there is such a file system: what a kill leaves behind is the same, and a sync takes no time."""
    shared = Path("/dev/shm")
    start_server()
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None, prefix="bam-merge-faults-") as home:
        yield Merge.make(Path(home))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if Points.totals:
        terminalreporter.section("faults: points tried, failures")
        for kind, (tried, failed) in Points.totals.items():
            terminalreporter.write_line(f"{kind:60} {tried:6} {failed:6}")
        tried, failed = (sum(total[index] for total in Points.totals.values()) for index in (0, 1))
        terminalreporter.write_line(f"{'all':60} {tried:6} {failed:6}")
        if why := strace_problem():
            terminalreporter.write_line(f"skipped, what traces system calls: {why}")
