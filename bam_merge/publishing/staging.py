"""The staging folder: a lock, a journal of finished tensors, and the rename that makes the result appear in one step."""

import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bam_merge._version import __version__
from bam_merge.checkpoints.reading import digest_range
from bam_merge.errors import BamMergeError, OutputError
from bam_merge.files import delete, identity, make_durably, writing
from bam_merge.merging.tensor import Finished
from bam_merge.planning.plan import Plan
from bam_merge.text import printable


def staging_folder(target: Path) -> Path:
    """Where a merge into `target` works until it is finished."""
    return target.parent / f".{target.name}.bam-merge"


def staged_bytes(target: Path) -> int:
    """Disk space that an unfinished run of `target` holds, which the next run uses or frees."""
    return sum(os.stat(file).st_blocks * 512 for file in (staging_folder(target) / "output").glob("*"))


@dataclass
class Staging:
    """`.NAME.bam-merge` beside the target, locked by this process for as long as `lock` is open."""

    folder: Path
    lock: int
    journal: IO[bytes] | None = None

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @classmethod
    def open(cls, target: Path) -> "Staging":
        """Make and lock the staging folder of `target`. Raises OutputError when another run has it."""
        folder = staging_folder(target)
        with writing(folder):
            make_durably(target.parent)
            while (lock := _lock(folder, target)) is None:
                pass
            (folder / "pid").write_text(f"{os.getpid()}\n")
        return cls(folder, lock)

    def begin(self, plan: Plan, resume: bool, allow_nonfinite: bool, notify: Callable[[str], None]) -> dict[str, Finished]:
        """Start the journal. Returns the tensors that an earlier run of the same plan finished, when resuming; not those with
        NaN or infinity, unless they are allowed in this run too."""
        path = self.folder / "journal"
        header = {"fingerprint": plan.fingerprint, "version": __version__}
        done: dict[str, Finished] = {}
        kept = 0
        if resume:
            journal, kept = _read_journal(path, header, notify)
            done = self._trusted(plan, {name: item for name, item in journal.items() if allow_nonfinite or not item.nonfinite}, notify)
        elif path.exists():
            notify("an unfinished run is discarded; --resume would have continued it.")
        if not done:
            self.forget()
            kept = 0
        with writing(path):
            if done:
                self._clear({shard.file for shard in plan.shards})
            else:
                delete(self.output)
                self.output.mkdir()
            self.journal = open(path, "ab")  # noqa: SIM115 - closed by close()
            os.ftruncate(self.journal.fileno(), kept)  # which, unlike truncate, is made again after EINTR
        if not kept:
            self._append(header)
        return done

    def _clear(self, keep: set[str]) -> None:
        """Delete what is in the output folder but the files to `keep`: nothing gets into the result that this run did not put there."""
        for path in self.output.iterdir():
            if path.name not in keep:
                delete(path)

    def _trusted(self, plan: Plan, journal: dict[str, Finished], notify: Callable[[str], None]) -> dict[str, Finished]:
        """The journal's tensors whose bytes are really there."""
        trusted = {}
        for step in plan.steps:
            finished = journal.get(step.name)
            try:
                if finished and digest_range(self.output / step.file, step.offset, step.nbytes) == finished.digest:
                    trusted[step.name] = finished
            except BamMergeError:
                continue
        if journal:
            notify(f"resuming: {len(trusted)} of {len(plan.steps)} tensors are finished.")
        return trusted

    def record(self, name: str, finished: Finished) -> None:
        self._append({"name": name, "digest": finished.digest, "reads": finished.reads, "nonfinite": finished.nonfinite})

    def _append(self, record: dict[str, Any]) -> None:
        assert self.journal is not None
        with writing(self.folder / "journal"):
            self.journal.write(_line(record))
            self.journal.flush()

    def is_ours(self) -> bool:
        """Whether the folder at our path is still the one that we locked, and not a later one, after somebody deleted ours."""
        return identity(self.folder) == (os.fstat(self.lock).st_dev, os.fstat(self.lock).st_ino)

    def forget(self) -> None:
        """Delete the journal, so that nothing here is resumed from."""
        with writing(self.folder / "journal"):
            (self.folder / "journal").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder and what is in it. The journal goes first: what is left after a kill in the middle must not be resumed from."""
        with suppress(OutputError):
            self.forget()
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Give the lock back. A folder without anything worth keeping goes too."""
        if self.journal is not None:
            with suppress(OSError):  # of a write that failed and was reported
                self.journal.close()
        with suppress(OSError):
            if self.is_ours() and set(os.listdir(self.lock)) <= {"pid"}:
                self.remove()
        os.close(self.lock)


def _lock(folder: Path, target: Path) -> int | None:
    """A descriptor of `folder`, made if it was not there, that holds its lock; None when the run that had it removed it meanwhile."""
    folder.mkdir(exist_ok=True)
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputError(f"{printable(str(target))} is being written by another run{_holder(folder)}. Wait for it.") from None
    if identity(folder) != (os.fstat(lock).st_dev, os.fstat(lock).st_ino):
        os.close(lock)
        return None
    return lock


def _holder(folder: Path) -> str:
    """Who has the lock. It writes its number right after it got the lock, and may be about to."""
    for _ in range(20):
        with suppress(OSError, ValueError):
            process = int((folder / "pid").read_text())
            if _is_alive(process):  # or else it is of a run that died earlier
                return f" (process {process})"
        time.sleep(0.01)
    return ""


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _line(record: dict[str, Any]) -> bytes:
    """A journal's line: length and CRC-32 of the JSON text in hexadecimal, then the text."""
    text = json.dumps(record).encode()
    return b"%08x %08x %s\n" % (len(text), zlib.crc32(text), text)


def _read_journal(path: Path, header: dict[str, Any], notify: Callable[[str], None]) -> tuple[dict[str, Finished], int]:
    """The finished tensors of an earlier run, and the bytes of the journal that say so; nothing when it was of another plan.

    A torn end is ignored.
    """
    records: list[dict[str, Any]] = []
    size = 0
    with writing(path):
        data = path.read_bytes() if path.exists() else b""
    for line in data.split(b"\n")[:-1]:
        text = line[18:]
        if line[:18] != b"%08x %08x " % (len(text), zlib.crc32(text)):
            break
        records.append(json.loads(text))
        size += len(line) + 1
    if not records:
        notify("nothing to resume: starting from the beginning.")
        return {}, 0
    if records[0] != header:
        notify("the unfinished run was of another recipe, version or set of sources: starting from the beginning.")
        return {}, 0
    return {record["name"]: Finished(record["digest"], record["reads"], record["nonfinite"]) for record in records[1:]}, size
