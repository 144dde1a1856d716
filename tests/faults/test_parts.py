"""Parts and finish, killed at every system call and at any time, and run twice at once: the bytes of one process in the end."""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.harness import CALLS, EXTENT, Child, Merge, Point, Points, Result, calls_of, contents, digests, needs_strace, thin, traced
from faults.test_errors import ERRORS

OF = 3
"""Parts of the merge that faults are tried on."""

THREADS = ("main", r"bam-merge_\d+")

PROVED = pytest.mark.parametrize("proved", [pytest.param(False, id="alone"), pytest.param(True, id="proved")])
"""A part alone, and one that proves itself; finish alone, and finish that takes over what holds and proves the rest."""


def part(merge: Merge, work: Path, number: int, **options: object) -> Child:
    return merge.child(work, "--part", f"{number}/{OF}", streams=f"part{number}", **options)  # type: ignore[arg-type]


def finish(merge: Merge, work: Path, *options: str, thread: str | None = None, streams: str = "finish", verify: bool = False) -> Child:
    arguments = ["finish", *merge.arguments(work, *options, verify=verify)]
    return Child(arguments, merge.home / f"{streams}-{work.name}", None, thread)


def check(merge: Merge, work: Path, proved: bool = False) -> None:
    """After a fault: the target is absent or complete, no source changed; all parts again, in any order, then finish, give the bytes."""
    merge.consumer(work)
    there = (work / "out").exists()
    assert digests(merge.recipe.parent) == merge.inputs, "a source changed"
    for number in random.sample(range(1, OF + 1), OF):
        result = part(merge, work, number, verify=proved).wait()
        assert result.status == 0, f"status {result.status} of part {number}: {result.err}"
    result = finish(merge, work, verify=proved).wait()
    assert result.status == 0, f"status {result.status} of finish: {result.err}"
    assert there or proved == ("verified" in result.out), result.out
    assert contents(work / "out") == merge.result, "other bytes"
    assert [path.name for path in work.iterdir()] == ["out"], f"left over: {list(work.iterdir())}"
    merge.forget(work)


def with_parts(merge: Merge, *numbers: int, proved: bool = False) -> Path:
    work = merge.work()
    for number in numbers:
        assert part(merge, work, number, verify=proved).wait().status == 0
    return work


def kill(child: Child, point: Point) -> None:
    with traced(child, "-o", "/dev/null", "-e", f"trace={point.name}", "-e", f"inject={point.name}:signal=KILL:when={point.number}"):
        result = child.wait()
    assert result.status == -signal.SIGKILL, f"status {result.status}, not killed: {result.err}"


def points_of(merge: Merge, start: Path, arguments: Callable[[Path], list[object]], threads: tuple[str, ...] = THREADS) -> list[Point]:
    points = []
    for thread in threads:
        work = merge.work(start)
        points += calls_of(arguments(work), thread, merge.home, CALLS, work)
        merge.forget(work)
    return points


@needs_strace
@EXTENT
@PROVED
def test_sigkill_at_every_call_of_a_part(merge: Merge, every: int, proved: bool) -> None:
    start = with_parts(merge, 1, proved=proved)
    with Points("SIGKILL at a system call, --part") as points:
        found = points_of(merge, start, lambda work: merge.arguments(work, "--part", f"2/{OF}", verify=proved))
        assert proved == any(point.what.endswith(".proof") for point in found), "a proof where none was asked for, or none"
        for point in thin(found, every):
            with points.one(str(point)):
                work = merge.work(start)
                kill(part(merge, work, 2, thread=point.thread, verify=proved), point)
                check(merge, work, proved)


@needs_strace
@EXTENT
@PROVED
def test_sigkill_at_every_call_of_finish(merge: Merge, every: int, proved: bool) -> None:
    start = with_parts(merge, 1, 2, 3, proved=proved)
    with Points("SIGKILL at a system call, finish") as points:
        found = points_of(merge, start, lambda work: ["finish", *merge.arguments(work, verify=proved)], ("main",))
        assert any(point.name == "renameat2" for point in found)
        for point in thin(found, every):
            with points.one(str(point)):
                work = merge.work(start)
                kill(finish(merge, work, thread="main", verify=proved), point)
                check(merge, work, proved)


@EXTENT
@PROVED
def test_parts_killed_at_any_time(merge: Merge, every: int, proved: bool) -> None:
    chance = random.Random(3)
    with Points("parts killed at a random time") as points:
        for _ in range(max(2, 40 // every)):
            delay = chance.uniform(0, 0.3 if proved else 0.15)
            with points.one(f"after {delay:.3f} s"):
                work = merge.work()
                children = [part(merge, work, number, thread="main", verify=proved) for number in (1, 2, 3)]
                for child in children:
                    child.go()
                time.sleep(delay)
                for child in chance.sample(children, 2):
                    child.signal(chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
                for child in children:
                    result = child.wait()
                    assert "Traceback" not in result.err, result.err
                    assert result.status in (0, -9, 143, 130, -15, -2), f"status {result.status}: {result.err}"
                check(merge, work, proved)


@EXTENT
def test_one_part_twice_at_once(merge: Merge, every: int) -> None:
    """One makes it; the other says who does, or finds it made."""
    chance = random.Random(4)
    with Points("a part twice at once") as points:
        for _ in range(max(2, 50 // every)):
            delay = chance.uniform(0, 0.1)
            with points.one(f"{delay * 1000:.0f} ms apart"):
                work = merge.work()
                first, second = (merge.child(work, "--part", f"1/{OF}", thread="main", streams=name) for name in ("first", "second"))
                pids = first.pid, second.pid
                first.go()
                time.sleep(delay)
                second.go()
                results = [first.wait(), second.wait()]
                for result, other in zip(results, reversed(pids), strict=True):
                    assert result.status in (0, 4), result.err
                    assert result.status == 0 or "is being written by " in result.err, result.err
                    assert result.status == 0 or f"process {other} on" in result.err or "another process" in result.err, result.err
                assert 0 in [result.status for result in results]
                check(merge, work)


@EXTENT
def test_finish_at_once_with_parts_and_itself(merge: Merge, every: int) -> None:
    chance = random.Random(5)
    with Points("finish at once with a part and itself") as points:
        for _ in range(max(2, 30 // every)):
            delay = chance.uniform(0, 0.1)
            with points.one(f"{delay * 1000:.0f} ms apart"):
                work = with_parts(merge, 1, 2, 3)
                children = [finish(merge, work, thread="main", streams=name) for name in ("one", "two")] + [
                    part(merge, work, 2, thread="main")
                ]
                for child in chance.sample(children, 3):
                    child.go()
                    time.sleep(delay / 2)
                for child in children:
                    result = child.wait()
                    assert "Traceback" not in result.err, result.err
                    assert result.status in (0, 4), f"status {result.status}: {result.err}"
                merge.consumer(work)
                result = finish(merge, work).wait()
                assert result.status == 0, result.err
                assert contents(work / "out") == merge.result
                merge.forget(work)


@EXTENT
def test_a_forgotten_part(merge: Merge, every: int) -> None:
    with Points("a part forgotten") as points:
        for number in range(1, OF + 1):
            with points.one(f"part {number}"):
                work = with_parts(merge, *(set(range(1, OF + 1)) - {number}))
                result = finish(merge, work).wait()
                assert result.status == 4 and f"--part {number}/{OF} --output {work / 'out'}" in result.err, result.err
                assert not (work / "out").exists()
                check(merge, work)


@EXTENT
def test_journals_of_parts_cut_or_flipped(merge: Merge, every: int) -> None:
    """At any byte: the part is not taken for complete, or its tensors are digested again, and the bytes are the same."""
    start = with_parts(merge, 1, 2, 3)
    journal = (start / ".out.bam-merge" / "parts" / "00002-of-00003.journal").read_bytes()
    chance = random.Random(6)
    with Points("a part's journal cut or flipped") as points:
        for index in range(max(3, 60 // every)):
            place = chance.randrange(len(journal))
            with points.one(f"byte {place}"):
                work = merge.work(start)
                data = bytearray(journal if index % 2 else journal[:place])
                if index % 2:
                    data[place] ^= 1 << chance.randrange(8)
                (work / ".out.bam-merge" / "parts" / "00002-of-00003.journal").write_bytes(data)
                result = finish(merge, work).wait()
                assert result.status == 4 and "part 2/3" in result.err, f"status {result.status}: {result.err}"
                check(merge, work)


def lied_to(child: Child, point: Point, error: str) -> Result:
    with traced(
        child,
        "-o",
        "/dev/null",
        "-e",
        f"trace={point.name}",
        "-e",
        f"inject={point.name}:error={error}:when={point.number}",
        "-e",
        "signal=none",
    ):
        return child.wait()


@needs_strace
@EXTENT
@PROVED
def test_errors_at_every_call_of_a_part_and_of_finish(merge: Merge, every: int, proved: bool) -> None:
    """A part that says it is made is; one that is not says why, and is made by a later process."""
    begun, made = with_parts(merge, 1, proved=proved), with_parts(merge, 1, 2, 3, proved=proved)
    found = [
        (kind, point, error)
        for kind, start, words, threads in (
            ("part", begun, ["--part", f"2/{OF}"], THREADS),
            ("finish", made, [], ("main",)),
        )
        for point in points_of(
            merge,
            start,
            lambda work, kind=kind, words=words: [*(["finish"] if kind == "finish" else []), *merge.arguments(work, *words, verify=proved)],
            threads,
        )
        for error in ERRORS.get(point.name, ("EIO",))
    ]
    with Points("EIO, ENOSPC, ... at a system call, --part and finish") as points:
        for kind, point, error in thin(found, every):
            with points.one(f"{kind}: {error} at {point}"):
                work = merge.work(begun if kind == "part" else made)
                if kind == "part":
                    child = part(merge, work, 2, thread=point.thread, verify=proved)
                else:
                    child = finish(merge, work, thread="main", verify=proved)
                result = lied_to(child, point, error)
                result.is_orderly()
                if kind == "finish":
                    assert (result.status != 2) == (work / "out").exists(), f"status {result.status}: {result.err}"
                if result.status and error != "EACCES":
                    assert os.strerror(getattr(errno, error)) in result.err, result.err
                check(merge, work, proved)
