"""SIGKILL at every system call that creates, writes, syncs, locks, renames or deletes, and at any time."""

import random
import signal
import time
from pathlib import Path

import pytest

from faults.harness import (
    CALLS,
    EXTENT,
    Merge,
    Point,
    Points,
    calls_of,
    contents,
    needs_strace,
    thin,
    traced,
    unfinished,
    with_old_model,
)

FLUSH = "bam-merge-flush"
THREADS = ("main", r"bam-merge_\d+", FLUSH)


def killed_at(merge: Merge, work: Path, point: Point, *options: str) -> None:
    child = merge.child(work, *options, thread=point.thread)
    with traced(child, "-o", "/dev/null", "-e", f"trace={point.name}", "-e", f"inject={point.name}:signal=KILL:when={point.number}"):
        result = child.wait()
    if point.thread != FLUSH or result.status != 0:  # its syncs come as time allows; the run may end first
        assert result.status == -signal.SIGKILL, f"status {result.status}, not killed"


def points_of(merge: Merge, start: Path | None, *options: str) -> list[Point]:
    points = []
    for thread in THREADS:
        work = merge.work(start)
        found = calls_of(merge.arguments(work, *options), thread, merge.home, CALLS, work)
        merge.forget(work)
        points += found[:3] if thread == FLUSH else found
    return points


@needs_strace
@EXTENT
def test_sigkill_at_every_call(merge: Merge, every: int) -> None:
    with Points("SIGKILL at a system call, new target") as points:
        for point in thin(points_of(merge, None), every):
            with points.one(str(point)):
                work = merge.work()
                killed_at(merge, work, point)
                merge.check(work)


@needs_strace
@EXTENT
def test_sigkill_at_every_call_when_a_model_is_replaced(merge: Merge, every: int) -> None:
    """From the exchange to the deletion of the old model: one or the other is there, whole, all the time."""
    start = with_old_model(merge)
    old = contents(start / "out")
    with Points("SIGKILL at a system call, --force") as points:
        found = points_of(merge, start, "--force")
        exchange = next(index for index, point in enumerate(found) if point.name == "renameat2")
        end = next(index for index, point in enumerate(found) if point.thread != "main")
        for point in thin(found[exchange:end], every):
            with points.one(str(point)):
                work = merge.work(start)
                killed_at(merge, work, point, "--force")
                merge.check(work, "--force", old=old)


@needs_strace
@EXTENT
def test_sigkill_at_every_call_of_a_resumed_run(merge: Merge, every: int) -> None:
    start = unfinished(merge)
    with Points("SIGKILL at a system call, --resume") as points:
        for point in thin(points_of(merge, start, "--resume"), every):
            with points.one(str(point)):
                work = merge.work(start)
                killed_at(merge, work, point, "--resume")
                merge.check(work)


STATUSES = {signal.SIGKILL: 137, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGPIPE: 0}


@EXTENT
@pytest.mark.parametrize("number", STATUSES)
def test_signals_at_any_time(merge: Merge, number: signal.Signals, every: int) -> None:
    chance = random.Random(number)
    begin = time.monotonic()
    work = merge.work()
    merge.run(work)
    duration = time.monotonic() - begin
    merge.forget(work)
    with Points(f"{number.name} at a random time") as points:
        for _ in range(max(1, 40 // every)):
            delay = chance.uniform(0, duration)
            with points.one(f"after {delay:.3f} s"):
                work = merge.work()
                child = merge.child(work, thread="main")
                child.go()
                time.sleep(delay)
                child.signal(number)
                result = child.wait()
                assert result.status in (0, -number, STATUSES[number]), f"status {result.status}: {result.err}"
                if result.status > 0:
                    assert not result.err or result.err.endswith(("bam-merge: stopped.\n", "bam-merge: interrupted.\n")), result.err
                    assert "Traceback" not in result.err, result.err
                merge.check(work)
