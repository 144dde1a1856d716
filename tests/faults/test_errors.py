"""The system refuses: errors of every kind at every system call, a full disk, limits. Our words, our status, and nothing half done."""

import errno
import os
import random
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from faults.harness import CALLS, EXTENT, Merge, Point, Points, calls_of, contents, needs_strace, thin, traced, unfinished

ERRORS = {
    "openat": ("EACCES", "ENOSPC", "EMFILE"), "mkdir": ("ENOSPC", "EROFS"), "mkdirat": ("ENOSPC", "EROFS"), "write": ("EIO", "ENOSPC", "EDQUOT"),
    "pwrite64": ("EIO", "ENOSPC", "EDQUOT", "EFBIG"), "ftruncate": ("EIO", "ENOSPC"), "fallocate": ("ENOSPC", "EDQUOT", "EIO"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"), "fdatasync": ("EIO", "ENOSPC"), "renameat2": ("EIO", "ENOSPC", "EACCES"),
    "unlink": ("EIO", "EACCES"), "unlinkat": ("EIO", "EACCES"), "rmdir": ("EIO",), "flock": ("ENOLCK", "EIO"),
}  # fmt: skip
READS = "pread64,preadv,preadv2,read"


def lied_to(merge: Merge, work: Path, point: Point, error: str, *options: str, verify: bool = False) -> Any:
    child = merge.child(work, *options, thread=point.thread, verify=verify)
    inject = f"inject={point.name}:error={error}:when={point.number}"
    with traced(child, "-o", "/dev/null", "-e", f"trace={point.name}", "-e", inject, "-e", "signal=none"):
        return child.wait()


@needs_strace
@EXTENT
def test_errors_at_every_call(merge: Merge, every: int) -> None:
    work = merge.work()
    found = [
        (point, error)
        for thread in ("main", r"bam-merge_\d+")
        for point in calls_of(merge.arguments(work), thread, merge.home, CALLS, work)
        for error in ERRORS.get(point.name, ("EIO",))
    ]
    with Points("EIO, ENOSPC, EDQUOT, ... at a system call") as points:
        for point, error in thin(found, every):
            with points.one(f"{error} at {point}"):
                work = merge.work()
                result = lied_to(merge, work, point, error)
                result.is_orderly()
                assert (result.status != 2) == (work / "out").exists(), f"status {result.status}: {result.err}"
                if result.status and error != "EACCES":
                    assert os.strerror(getattr(errno, error)) in result.err, result.err
                merge.check(work)


@needs_strace
@EXTENT
def test_errors_while_a_source_is_read(merge: Merge, every: int) -> None:
    sources = merge.recipe.parent
    work = merge.work()
    found = calls_of(merge.arguments(work), r"bam-merge_\d+", merge.home, READS, sources)
    found += calls_of(merge.arguments(work), "main", merge.home, READS, sources)
    with Points("EIO at a read of a source") as points:
        for point in thin(found, every):
            with points.one(str(point)):
                work = merge.work()
                result = lied_to(merge, work, point, "EIO")
                result.is_orderly()
                assert result.status == 2, "went on"
                assert "Input/output error" in result.err, result.err
                merge.check(work)


@needs_strace
@EXTENT
def test_interrupted_calls_are_made_again(merge: Merge, every: int) -> None:
    """EINTR, which a signal whose handler returns leaves behind, is no failure."""
    work = merge.work()
    calls = "openat,write,pwrite64,fsync,fdatasync,fallocate,ftruncate,flock"
    found = calls_of(merge.arguments(work), "main", merge.home, calls, work)
    found += calls_of(merge.arguments(work), r"bam-merge_\d+", merge.home, calls, work)
    found += calls_of(merge.arguments(work), r"bam-merge_\d+", merge.home, READS, merge.recipe.parent)
    with Points("EINTR") as points:
        for point in thin(found, every):
            with points.one(str(point)):
                work = merge.work()
                result = lied_to(merge, work, point, "EINTR")
                assert result.status == 0, result.err
                assert contents(work / "out") == merge.result
                merge.forget(work)


def do_less(seed: int) -> None:
    """Positional reads and writes do a part of what is asked, as they may."""
    chance = random.Random(seed)
    preadv, pwrite = os.preadv, os.pwrite

    def some_read(descriptor: int, views: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [views[0][: chance.randint(1, len(views[0]))]], offset)

    def some_write(descriptor: int, data: memoryview, offset: int) -> int:
        return pwrite(descriptor, data[: chance.randint(1, len(data))], offset)

    os.preadv, os.pwrite = some_read, some_write  # type: ignore[assignment]


@EXTENT
def test_short_reads_and_writes(merge: Merge, every: int) -> None:
    with Points("short reads and writes") as points:
        for seed in range(0, 26, every):
            with points.one(f"seed {seed}"):
                work = merge.work()
                merge.run(work, setup=partial(do_less, seed))
                assert contents(work / "out") == merge.result
                merge.forget(work)


# ---- too little of something ---------------------------------------------------------------------------------------------------


def blind() -> None:
    """The check of free space before the merge sees plenty, as if another process took the rest later."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)  # type: ignore[attr-defined]


@EXTENT
def test_a_disk_that_is_full(merge: Merge, every: int) -> None:
    """Real file systems, from one without room for anything to one where all but the last file fits."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    enough = sum(-(-len(data) // 4096) * 4 for data in merge.result.values()) + 40
    with Points("a full tmpfs") as points:
        for size in range(8, enough, 8 * every):
            with points.one(f"{size} kB"):
                work = merge.work()
                disk = merge.home / "disk"
                disk.mkdir(exist_ok=True)
                if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], capture_output=True).returncode:
                    pytest.skip("no permission to mount a tmpfs here")
                try:
                    result = merge.child(disk, setup=blind).wait()
                    result.is_orderly()
                    assert result.status == 0 or "No space left on device. Free some space" in result.err, result.err
                    merge.consumer(disk)
                    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                    shutil.copytree(disk, work, dirs_exist_ok=True)
                    merge.run(disk, "--resume")
                    assert contents(disk) == {f"out/{name}": data for name, data in merge.result.items()}
                finally:
                    subprocess.run(["umount", disk], check=True)
                merge.check(work)


def limit(kind: int, amount: int, more: int = 0) -> None:
    """A limit of the process; with `more`, that much above what it has mapped now."""
    if more:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        amount = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(kind, (amount, resource.getrlimit(kind)[1]))


LIMITS = {
    "RLIMIT_FSIZE": (resource.RLIMIT_FSIZE, [(size, 0) for size in range(1000, 40_000, 1000)]),
    "RLIMIT_NOFILE": (resource.RLIMIT_NOFILE, [(files, 0) for files in range(6, 46)]),
    "RLIMIT_AS": (resource.RLIMIT_AS, [(0, more) for more in range(4096, 80_000_000, 2_000_000)]),
}


@EXTENT
@pytest.mark.parametrize("name", LIMITS)
def test_limits(merge: Merge, name: str, every: int) -> None:
    kind, amounts = LIMITS[name]
    failed = 0
    with Points(name) as points:
        for amount, more in thin(amounts, every):
            with points.one(f"{amount or more}"):
                work = merge.work()
                result = merge.child(work, setup=partial(limit, kind, amount, more)).wait()
                result.is_orderly()
                failed += result.status == 2
                merge.check(work)
    assert failed or every > 1, "the limits were all high enough"


@EXTENT
def test_errors_of_a_resumed_run(merge: Merge, every: int) -> None:
    """What an earlier run left cannot be read, or deleted."""
    start = unfinished(merge)
    with Points("leftovers that cannot be read or deleted") as points:
        for call in ("rmtree", "unlink", "preadv", "open")[:: 1 if every == 1 else 2]:
            for options in ((), ("--resume",)):
                with points.one(f"{call} {options}"):
                    work = merge.work(start)
                    result = merge.child(work, *options, setup=partial(fail_below, str(work), call)).wait()
                    result.is_orderly()
                    merge.check(work)


def fail_below(folder: str, call: str) -> None:
    """One call of os or shutil fails for paths below the folder."""
    home = shutil if call == "rmtree" else os
    real = getattr(home, call)

    def fail(path: Any, *args: Any, **options: Any) -> Any:
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        if str(where).startswith(folder):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(where))
        return real(path, *args, **options)

    setattr(home, call, fail)
