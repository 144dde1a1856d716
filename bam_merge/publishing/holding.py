"""A file that says who is at work on something, on whatever host: who made it holds it, and touches it as long as it lives.

Locks of the system tell between processes of one host, and not always between hosts that share a file system, so the file says more: host,
process, and the boot of the host's kernel. A holder of this host that is dead is taken over from at once; one of another host when it gave
no sign of life for STALE_SECONDS of the file system's own clock. Should one come back that was only stopped, it finds that the file is no
longer its own, and ends; what it wrote until then are the bytes that the other one writes.
"""

import json
import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge import system
from bam_merge.errors import NotYet, OutputError
from bam_merge.own_folder import open_file, read_file
from bam_merge.text import printable

BEAT_SECONDS, STALE_SECONDS = 5.0, 60.0
"""How often a holder touches its file, and after how long without that one of another host counts as dead."""


MOST = 4096
"""Bytes that are read of such a file."""


@dataclass
class Hold:
    """The file `name` in the folder of descriptor `folder`, which messages call `shown`, held by this process until `release`."""

    name: str
    folder: int
    shown: str
    descriptor: int
    token: str
    lost: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    @classmethod
    def take(cls, name: str, folder: int, path: Path, what: str, patience: float = 0) -> "Hold":
        """Hold the file. Raises NotYet, which begins with `what` ("part 3/8 of out"), when another process does, and still after
        `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            try:
                if (taken := _take(name, folder, what, str(path))) is not None:
                    break
            except NotYet:
                if time.monotonic() >= until:
                    raise
                time.sleep(min(1.0, max(0.01, until - time.monotonic())))
        hold = cls(name, folder, printable(str(path)), *taken)
        hold.thread = threading.Thread(target=hold._beat, name="bam-merge-hold", daemon=True)
        hold.thread.start()
        return hold

    def check(self) -> None:
        """Raise OutputError when another process took over, because it took this one for dead."""
        if self.lost or self._holder().get("token") != self.token:
            self.lost = True
            raise OutputError(
                f"{self.shown} is no longer of this process: another took it for dead, after {STALE_SECONDS:.0f} s without a sign of life, "
                "and went on in its place."
            )

    def release(self) -> None:
        """Let others have it. The file goes too, if it is still ours."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
        with suppress(OSError):
            if self._holder().get("token") == self.token:
                os.unlink(self.name, dir_fd=self.folder)
        os.close(self.descriptor)

    def _holder(self) -> dict[str, Any]:
        return _read(self.name, self.folder)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file system that does not answer may answer again
                os.utime(self.descriptor)
                self.lost = self.lost or self._holder().get("token") != self.token


def holder_of(name: str, folder: int) -> str | None:
    """Who holds the file, in words; None when nobody does that is alive."""
    try:
        descriptor = open_file(name, folder, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        system.lock(descriptor, shared=True)
        record = _read(name, folder)
        return _words(record) if _is_alive(record, descriptor) else None
    except BlockingIOError:
        return _words(_read(name, folder))
    finally:
        os.close(descriptor)


def _take(name: str, folder: int, what: str, path: str) -> tuple[int, str] | None:
    """A descriptor of the file, and the token in it; None when its holder removed it meanwhile."""
    descriptor = open_file(name, folder, os.O_RDWR | os.O_CREAT)
    try:
        try:
            system.lock(descriptor)
        except BlockingIOError:
            raise NotYet(f"{what} is being written by {_words(_read(name, folder))}. Wait for it.") from None
        if not _stands_there(name, folder, descriptor):
            os.close(descriptor)
            return None
        record = _read(name, folder)
        if _is_alive(record, descriptor):
            raise NotYet(
                f"{what} is being written by {_words(record)}. Wait for it; or, if that is gone for good, run again {STALE_SECONDS:.0f} s "
                f"after it went, or delete {printable(path)}."
            )
        token = secrets.token_hex(16)
        _write(descriptor, token)
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    return descriptor, token


def _write(descriptor: int, token: str) -> None:
    host, machine = system.machine()
    process = os.getpid()
    record = {"host": host, "machine": machine, "process": process, "started": system.started(process), "token": token}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
    system.sync(descriptor)


def _read(name: str, folder: int) -> dict[str, Any]:
    """What the file says; nothing when it is not there, or empty, or was not written whole."""
    try:
        record = json.loads(read_file(name, folder, MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _words(record: dict[str, Any]) -> str:
    host, process = record.get("host"), record.get("process")
    return f"process {printable(str(process), 20)} on {printable(str(host), 100)}" if process and host else "another process"


def _is_alive(record: dict[str, Any], descriptor: int) -> bool:
    """Whether the holder that the file names is at work. Nobody is named in a file that was made just now, or in half of one."""
    if not isinstance(record.get("process"), int):
        return False
    if (record.get("host"), record.get("machine")) == system.machine():
        began = system.started(record["process"])
        return began is not None and began == record.get("started")
    before = os.fstat(descriptor)
    os.utime(descriptor)  # what the clock of the file system says now
    now = os.fstat(descriptor).st_mtime_ns
    os.utime(descriptor, ns=(before.st_atime_ns, before.st_mtime_ns))
    return now - before.st_mtime_ns < STALE_SECONDS * 1e9


def _stands_there(name: str, folder: int, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False
