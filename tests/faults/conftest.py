"""The merge that all faults are tried on, and the figures at the end."""

import pytest

from faults.harness import Merge, Points


@pytest.fixture(scope="session")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    return Merge.make(tmp_path_factory.mktemp("faults"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if Points.totals:
        terminalreporter.section("faults: points tried, failures")
        for kind, (tried, failed) in Points.totals.items():
            terminalreporter.write_line(f"{kind:60} {tried:6} {failed:6}")
        tried, failed = (sum(total[index] for total in Points.totals.values()) for index in (0, 1))
        terminalreporter.write_line(f"{'all':60} {tried:6} {failed:6}")
