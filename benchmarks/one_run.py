"""Runs one command as a process of its own, then prints its wall time, processor time, peak memory and exit status as JSON.

    python -S -E one_run.py LOG COMMAND...       the command's output goes to the file LOG

Standard library only, and always started afresh: Linux counts what a process held before it executed another program towards
that program's peak, so a benchmark that has held large arrays itself would measure them again in every command.
"""

import json
import os
import sys
import time


def main(log: str, command: list[str]) -> None:
    """Print seconds (wall time), cpu_seconds (of all threads), peak_bytes (largest resident set) and status (or 128 + signal)."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    redirect = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
    start = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=redirect)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # kilobytes, except on macOS
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "status": code if code >= 0 else 128 - code}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
