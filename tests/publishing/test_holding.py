"""Who is at work: told apart by process on one host, by signs of life on another."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bam_merge import system
from bam_merge.errors import NotYet, OutputError
from bam_merge.publishing import holding
from bam_merge.publishing.holding import Hold, holder_of

NAME = "00003-of-00008.lock"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def take(folder: int, tmp_path: Path, patience: float = 0) -> Hold:
    return Hold.take(NAME, folder, tmp_path / NAME, "part 3/8 of out", patience)


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def plant(tmp_path: Path, age: float = 0, **changes: Any) -> None:
    """The file of a holder that has no lock of the system: one of another host, or where there are none."""
    host, machine = system.machine()
    record = {"host": host, "machine": machine, "process": os.getpid(), "started": system.started(os.getpid()), "token": "x", **changes}
    (tmp_path / NAME).write_text(json.dumps(record))
    then = time.time() - age
    os.utime(tmp_path / NAME, (then, then))


def test_held_and_let_go(folder: int, tmp_path: Path) -> None:
    hold = take(folder, tmp_path)
    hold.check()
    me = f"process {os.getpid()} on {os.uname().nodename}"
    assert holder_of(NAME, folder) == me
    with pytest.raises(NotYet, match=rf"part 3/8 of out is being written by {me}\. Wait for it\."):
        take(folder, tmp_path)
    hold.release()
    assert holder_of(NAME, folder) is None
    assert not (tmp_path / NAME).exists()
    take(folder, tmp_path).release()


def test_the_file_says_host_process_and_boot(folder: int, tmp_path: Path) -> None:
    hold = take(folder, tmp_path)
    record = json.loads((tmp_path / NAME).read_text())
    hold.release()
    assert (record["host"], record["process"]) == (os.uname().nodename, os.getpid())
    assert record["machine"].split()[0] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert record["started"] == system.started(os.getpid()) != ""


def test_a_dead_process_of_this_host_is_taken_over_from_at_once(folder: int, tmp_path: Path) -> None:
    plant(tmp_path, process=dead_process())
    assert holder_of(NAME, folder) is None
    take(folder, tmp_path).release()


def test_another_process_that_got_the_number_of_a_dead_one(folder: int, tmp_path: Path) -> None:
    plant(tmp_path, started="1")
    assert holder_of(NAME, folder) is None
    take(folder, tmp_path).release()


def test_a_live_process_of_this_host_where_there_are_no_locks(folder: int, tmp_path: Path) -> None:
    plant(tmp_path, age=10**6)
    assert holder_of(NAME, folder) == f"process {os.getpid()} on {os.uname().nodename}"
    with pytest.raises(NotYet, match=r"being written by process \d+ on .*run again 60 s after it went, or delete .*00003-of-00008\.lock"):
        take(folder, tmp_path)


@pytest.mark.parametrize("other", [{"host": "elsewhere", "machine": "of another kernel"}, {"machine": "the boot before"}])
def test_a_process_elsewhere_counts_as_long_as_it_gives_signs_of_life(folder: int, tmp_path: Path, other: dict[str, str]) -> None:
    """Its number says nothing here, be it that of a live process or of a dead one."""
    for process in (os.getpid(), dead_process()):
        plant(tmp_path, age=50, process=process, **other)
        before = (tmp_path / NAME).stat().st_mtime_ns
        assert holder_of(NAME, folder) is not None
        with pytest.raises(NotYet):
            take(folder, tmp_path)
        assert (tmp_path / NAME).stat().st_mtime_ns == before, "looking is no sign of life"
        plant(tmp_path, age=70, process=process, **other)
        assert holder_of(NAME, folder) is None
        take(folder, tmp_path).release()


def test_a_sign_of_life_now_and_then(folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "BEAT_SECONDS", 0.01)
    hold = take(folder, tmp_path)
    os.utime(tmp_path / NAME, (1, 1))
    until = time.monotonic() + 10
    while (tmp_path / NAME).stat().st_mtime < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / NAME).stat().st_mtime > 2
    hold.release()


def test_one_that_was_taken_for_dead_says_so_and_leaves_the_others_file(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "BEAT_SECONDS", 0.01)
    hold = take(folder, tmp_path)
    plant(tmp_path, token="another's")
    until = time.monotonic() + 10
    while not hold.lost and time.monotonic() < until:
        time.sleep(0.01)
    assert hold.lost
    with pytest.raises(OutputError, match=r"is no longer of this process: another took it for dead, after 60 s without a sign of life"):
        hold.check()
    hold.release()
    assert (tmp_path / NAME).exists()


def test_patience(folder: int, tmp_path: Path) -> None:
    plant(tmp_path, age=holding.STALE_SECONDS - 0.3, host="elsewhere")
    with pytest.raises(NotYet):
        take(folder, tmp_path)
    take(folder, tmp_path, patience=5).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"process": "x"}', '{"process": null}', "\0" * 100, "[" * 3000])
def test_half_a_file_or_nonsense_names_nobody(folder: int, tmp_path: Path, text: str) -> None:
    """Who was killed while it wrote its name had not begun."""
    (tmp_path / NAME).write_text(text)
    assert holder_of(NAME, folder) is None
    take(folder, tmp_path).release()


def test_without_locks_of_the_system(folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "lock", lambda descriptor, shared=False: False)
    hold = take(folder, tmp_path)
    with pytest.raises(NotYet, match=rf"is being written by process {os.getpid()} on"):
        take(folder, tmp_path)
    hold.release()
    take(folder, tmp_path).release()


def test_without_what_tells_kernels_apart(folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system without /proc: a process of the same host's name is looked for by its number."""
    monkeypatch.setattr(system, "machine", lambda: ("mac", ""))
    plant(tmp_path, process=dead_process(), started="")
    take(folder, tmp_path).release()
    plant(tmp_path, host="other mac", process=dead_process(), started="")
    with pytest.raises(NotYet):
        take(folder, tmp_path)
