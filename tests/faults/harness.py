"""Runs of the command line that can be killed or lied to, quickly: forked from a server that has imported all that a merge needs."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import pytest
import xxhash
from conftest import write_recipe, write_sources

FORKS = multiprocessing.get_context("forkserver")
"""The server imports what a run imports, once; a run is a fork of it."""
PRELOAD = [
    "faults.harness",
    "bam_merge.cli",
    "bam_merge.publishing.finishing",
    "bam_merge.publishing.parts",
    "bam_merge.publishing.publish",
    "bam_merge.showing.progress",
    "bam_merge.verifying.verification",
    "bam_merge.showing.plan",
    "rich.progress",
]


def start_server() -> None:
    FORKS.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # the server does not take over sys.path
        forkserver.ensure_running()


EXTENT = pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.faults, id="all"), pytest.param(29, id="some")])
"""A loop over all points, for `make test-faults`, and over one in 29, for `make test`."""

# ---- what is counted ---------------------------------------------------------------------------------------------------------


class Points:
    """The points of one kind of fault. A point that fails does not end the loop over the others; the end of the block reports them."""

    totals: ClassVar[dict[str, list[int]]] = {}

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.failures: list[str] = []
        self.tried = 0

    def __enter__(self) -> "Points":
        return self

    @contextmanager
    def one(self, label: str) -> Iterator[None]:
        self.tried += 1
        try:
            yield
        except AssertionError as error:
            self.failures.append(f"{label}: {error}")

    def __exit__(self, kind: object, *_: object) -> None:
        total = self.totals.setdefault(self.kind, [0, 0])
        total[0] += self.tried
        total[1] += len(self.failures)
        if kind is None:
            assert self.tried, f"{self.kind}: no point was tried"
            assert not self.failures, f"{len(self.failures)} of {self.tried} points failed\n" + "\n".join(self.failures[:5])


def thin(points: list[Any], every: int) -> list[Any]:
    """One point in `every`, always the same ones."""
    return points if every == 1 else random.Random(0).sample(points, max(1, len(points) // every))


# ---- a run -------------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Exit status (minus the signal, if one ended it), stdout, stderr."""

    status: int
    out: str
    err: str

    def is_orderly(self) -> None:
        """Our words and our status, whatever happened."""
        assert "Traceback" not in self.err, self.err
        assert self.status in (0, 2, 3), f"status {self.status}: {self.err}"
        assert (self.status == 0) == ("error:" not in self.err), self.err


def _main(arguments: list[str], streams: Path, setup: Callable[[], None] | None, thread: str | None, gate: Connection | None) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(streams / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.argv = ["bam-merge", *arguments]
    sys.dont_write_bytecode = True
    from bam_merge.cli import main

    if setup is not None:
        setup()
    status = 0
    try:
        if gate is not None and thread is not None:
            _stop_at(thread, gate)
        main()
    except SystemExit as error:
        status = int(error.code or 0)
    except KeyboardInterrupt:  # before the command line had begun, or after it had ended
        os._exit(130)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _stop_at(thread: str, gate: Connection) -> None:
    """Say which thread has the name, when it begins, and wait for the word to go on."""

    def stop() -> None:
        gate.send(threading.get_native_id())
        gate.recv()

    if thread == "main":
        stop()
        return
    run = threading.Thread.run

    def stopped(self: threading.Thread) -> None:
        if re.fullmatch(thread, self.name):
            stop()
        run(self)

    threading.Thread.run = stopped  # type: ignore[method-assign]


class Child:
    """A run of the command line in a forked process. With `thread` it stops where the thread of that name begins, until `go`."""

    def __init__(self, arguments: list[Any], streams: Path, setup: Callable[[], None] | None = None, thread: str | None = None) -> None:
        self.streams = streams
        streams.mkdir(exist_ok=True)
        self.gate, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=_main, args=([str(argument) for argument in arguments], streams, setup, thread, theirs))
        self.process.start()
        theirs.close()
        self.tid = self.gate.recv() if thread else 0

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def go(self) -> None:
        self.gate.send(True)

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self) -> Result:
        self.process.join(120)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError("the run did not end within two minutes")
        self.gate.close()
        status = self.process.exitcode
        self.process.close()
        return Result(status, (self.streams / "stdout").read_text(), (self.streams / "stderr").read_text())


# ---- strace ------------------------------------------------------------------------------------------------------------------

CALLS = (
    "openat,mkdir,write,writev,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,flock,"
    "copy_file_range,sendfile,fchmod,mkdirat"
)
"""The system calls that create, write, sync, lock, rename or delete."""


@cache
def strace_problem() -> str | None:
    """Why a running process cannot be traced here; None when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    sleeper = subprocess.Popen(["sleep", "60"])
    strace = subprocess.Popen(["strace", "-e", "trace=none", "-p", str(sleeper.pid)], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    said = strace.stderr.readline().strip()
    sleeper.kill()
    sleeper.wait()
    strace.communicate()
    return None if "attached" in said else f"{said} (as root it may be allowed)"


needs_strace = pytest.mark.skipif(strace_problem() is not None, reason=str(strace_problem()))


@contextmanager
def traced(child: Child, *options: str) -> Iterator[None]:
    """strace on the child's stopped thread, and on no other."""
    strace = subprocess.Popen(["strace", "-y", "-p", str(child.tid), *options], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    said = strace.stderr.readline()
    assert "attached" in said, said
    try:
        child.go()
        yield
    finally:
        strace.stderr.close()
        strace.wait(120)


@dataclass(frozen=True)
class Point:
    """The `number`th call of `name` in a thread."""

    thread: str
    name: str
    number: int
    what: str

    def __str__(self) -> str:
        return f"{self.thread}: {self.name} {self.number} ({self.what})"


def calls_of(arguments: list[Any], thread: str, scratch: Path, calls: str, within: Path, changing: bool = True) -> list[Point]:
    """Every one of the `calls` that a run's thread makes on files below `within`; an openat only where it creates."""
    child = Child(arguments, scratch / "streams", thread=thread)
    with traced(child, "-o", str(scratch / "trace"), "-s", "0", "-e", f"trace={calls}", "-e", "signal=none"):
        result = child.wait()
    assert result.status == 0, result.err
    numbers: dict[str, int] = {}
    points = []
    shutil.rmtree(arguments[arguments.index("--output") + 1], ignore_errors=True)  # a part alone makes none
    for line in (scratch / "trace").read_text().splitlines():
        if (match := re.match(r"(\w+)\((.*)\) += ", line)) is None:
            continue
        name, text = match.groups()
        numbers[name] = numbers.get(name, 0) + 1
        path = re.search(rf"{re.escape(str(within))}/?([^\">]*)", text)
        if path and not (changing and name == "openat" and "O_CREAT" not in text):
            points.append(Point(thread, name, numbers[name], path[1]))
    return points


# ---- the merge ---------------------------------------------------------------------------------------------------------------

TINY = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 16, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def digests(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, modification time and mode of every file: what an input must keep."""
    return {
        str(path.relative_to(folder)): (xxhash.xxh3_128_hexdigest(path.read_bytes()), path.stat().st_mtime_ns, path.stat().st_mode)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass
class Merge:
    """Three tiny sources, a recipe of sharded output, what it must give, and what its sources are."""

    home: Path
    recipe: Path
    result: dict[str, bytes] = field(default_factory=dict)
    inputs: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    runs: int = 0

    @classmethod
    def make(cls, home: Path) -> "Merge":
        sources = home / "sources"
        write_sources(sources, TINY)
        (sources / "seed" / "vocab.txt").write_text("a\nb\n")
        recipe = write_recipe(sources, output="{path: out, max_shard_size: 2kB}")
        merge = cls(home, recipe)
        merge.inputs = digests(sources)
        work = merge.work()
        merge.run(work, verify=True)
        merge.result = contents(work / "out")
        return merge

    def work(self, start: Path | None = None) -> Path:
        """A new folder for the output, as `start` is."""
        self.runs += 1
        work = self.home / f"work{self.runs}"
        if start is None:
            work.mkdir()
        else:
            shutil.copytree(start, work, symlinks=True)
        return work

    def arguments(self, work: Path, *options: str, verify: bool = False) -> list[Any]:
        return [self.recipe, "--output", work / "out", "--workers", "1", *([] if verify else ["--no-verify"]), *options]

    def child(
        self,
        work: Path,
        *options: str,
        setup: Callable[[], None] | None = None,
        thread: str | None = None,
        verify: bool = False,
        streams: str = "streams",
        recipe: Path | None = None,
    ) -> Child:
        arguments = [recipe or self.recipe, *self.arguments(work, *options, verify=verify)[1:]]
        return Child(arguments, self.home / f"{streams}-{work.name}", setup, thread)

    def run(self, work: Path, *options: str, verify: bool = False, setup: Callable[[], None] | None = None) -> Result:
        """A run that must succeed."""
        result = self.child(work, *options, setup=setup, verify=verify).wait()
        assert result.status == 0, f"status {result.status}: {result.err}"
        return result

    def check(self, work: Path, *options: str, old: dict[str, bytes] | None = None) -> None:
        """After a fault: the consumer's view, the inputs, then runs from the start and with --resume, on a copy each. Deletes the copies.

        `old` is what stood at the target before, and stands there still if the new result does not.
        """
        self.consumer(work, old)
        assert digests(self.recipe.parent) == self.inputs, "a source changed"
        again, resumed = self.work(work), self.work(work)
        children = self.child(again, *options), self.child(resumed, *options, "--resume")
        fresh, resume = (child.wait() for child in children)
        fresh.is_orderly()
        if fresh.status == 2:
            assert "out already exists" in fresh.err, fresh.err
            assert (work / "out").exists(), "refused, with nothing there"
        assert resume.status == 0, f"status {resume.status} of --resume: {resume.err}"
        for folder in (again, resumed):
            assert contents(folder / "out") == self.result, "a later run gave other bytes"
        assert os.listdir(resumed) == ["out"], f"left over: {os.listdir(resumed)}"
        assert digests(self.recipe.parent) == self.inputs, "a source changed"
        self.forget(work, again, resumed)

    def consumer(self, work: Path, old: dict[str, bytes] | None = None) -> None:
        """The target is absent (or what it was before), or complete."""
        there = contents(work / "out") if (work / "out").exists() else None
        assert there in (old, self.result), "the target is neither absent nor complete"

    def forget(self, *works: Path) -> None:
        for work in works:
            shutil.rmtree(work)
            for streams in self.home.glob(f"*-{work.name}"):
                shutil.rmtree(streams)


# ---- what an earlier run left ------------------------------------------------------------------------------------------------


def with_old_model(merge: Merge) -> Path:
    """An output folder with the model of another recipe, in more files than the new one."""
    start = merge.work()
    other = write_recipe(merge.home, "random_seed: 5", names=("seed", "code"), output="{path: out, max_shard_size: 1kB}")
    other.write_text(other.read_text().replace(": seed", ": sources/seed").replace(": code", ": sources/code"))
    result = Child([other, "--output", start / "out", "--no-verify"], merge.home / "streams-old").wait()
    assert result.status == 0, result.err
    assert contents(start / "out") != merge.result
    return start


def unfinished(merge: Merge) -> Path:
    """An output folder in which a run was killed after it had finished about a third of the tensors."""
    start = merge.work()
    child = merge.child(start, setup=partial(stop_writing, 12), thread="main")
    child.go()
    assert child.wait().status == -signal.SIGKILL
    assert (start / ".out.bam-merge" / "journal").read_bytes().count(b"\n") > 5
    return start


def stop_writing(count: int) -> None:
    """SIGKILL at the `count`th positional write."""
    real = os.pwrite
    calls = iter(range(1, count))

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(descriptor, data, offset)

    os.pwrite = pwrite
