"""The staging folder: a lock, a journal of finished tensors, and the rename that makes the result appear in one step."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bam_merge import __version__
from bam_merge.errors import BamMergeError, OutputError, printable, writing
from bam_merge.execute import Finished
from bam_merge.plan import Plan
from bam_merge.source_files import digest_range


def identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


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
            target.parent.mkdir(parents=True, exist_ok=True)
            while True:
                folder.mkdir(exist_ok=True)
                lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    raise OutputError(f"{printable(str(target))} is being written by another run{_holder(folder)}. Wait for it.") from None
                if identity(folder) == (os.fstat(lock).st_dev, os.fstat(lock).st_ino):
                    break
                os.close(lock)  # that run finished and removed the folder between our two calls
            (folder / "pid").write_text(f"{os.getpid()}\n")
        return cls(folder, lock)

    def begin(self, plan: Plan, resume: bool, allow_nonfinite: bool, notify: Callable[[str], None]) -> dict[str, Finished]:
        """Start the journal. Returns the tensors that an earlier run of the same plan finished, when resuming; not those with
        NaN or infinity, unless they are allowed in this run too."""
        path = self.folder / "journal"
        header = {"fingerprint": plan.fingerprint, "version": __version__}
        done: dict[str, Finished] = {}
        if resume:
            journal = _read_journal(path, header, notify)
            done = self._trusted(plan, {name: item for name, item in journal.items() if allow_nonfinite or not item.nonfinite}, notify)
        elif self.output.exists():
            notify("an unfinished run is discarded; --resume would have continued it.")
        with writing(path):
            if not done and self.output.exists():
                shutil.rmtree(self.output)
            self.output.mkdir(exist_ok=True)
            self.journal = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._append(header)
        for name, finished in done.items():
            self.record(name, finished)
        return done

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
        line = json.dumps(record).encode()
        with writing(self.folder / "journal"):
            self.journal.write(b"%08x %s\n" % (zlib.crc32(line), line))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
        os.close(self.lock)


def _holder(folder: Path) -> str:
    try:
        return f" (process {int((folder / 'pid').read_text())})"
    except (OSError, ValueError):
        return ""


def _read_journal(path: Path, header: dict[str, Any], notify: Callable[[str], None]) -> dict[str, Finished]:
    """The finished tensors of an earlier run; nothing when it was of another plan. A torn end is ignored."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        notify("nothing to resume: starting from the beginning.")
        return {}
    for line in path.read_bytes().split(b"\n"):
        checksum, _, body = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body) or not body:
            break
        records.append(json.loads(body))
    if not records or records[0] != header:
        notify("the unfinished run was of another recipe, version or set of sources: starting from the beginning.")
        return {}
    return {record["name"]: Finished(record["digest"], record["reads"], record["nonfinite"]) for record in records[1:]}


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- the atomic appearance ---------------------------------------------------------------------------------------------------

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2


def appear(staged: Path, target: Path, replace_existing: bool) -> None:
    """Give the finished folder its final name in one step. An existing target is exchanged, and so lands in the staging folder."""
    exchange = replace_existing and os.path.lexists(target)
    try:
        _rename(staged, target, _EXCHANGE if exchange else _NOREPLACE)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(
                f"{printable(str(target))} appeared while the merge ran. Nothing was replaced; use --force --resume."
            ) from None
        raise OutputError(f"{printable(str(target))}: {error.strerror} when renaming the finished folder {staged} to it.") from error


def _rename(old: Path, new: Path, flags: int) -> None:
    """renameat2(2), which os.rename lacks: plain rename silently replaces an empty folder, and cannot exchange two."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    # A kernel or file system without it: two steps, with the target absent in between when it is replaced.
    if flags == _EXCHANGE:
        aside = old.with_name("replaced")
        os.rename(new, aside)
    elif os.path.lexists(new):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(old, new)
