"""Durable writes and atomic appearance: fsync, folders, and the rename that makes a result appear in one step."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bam_merge.errors import OutputError, SyncFailed
from bam_merge.own_folder import open_file
from bam_merge.system import sync
from bam_merge.text import printable

_RESUMED = " with --resume"

_REMEDIES = {
    errno.ENOSPC: f" Free some space, then run again{_RESUMED}.",
    errno.EDQUOT: f" Free some of your quota, then run again{_RESUMED}.",
    errno.EFBIG: " The file size limit (ulimit -f) is too small; raise it, or set a smaller output.max_shard_size.",
}


@contextmanager
def writing(path: Path, kind: type[OutputError] = OutputError) -> Iterator[None]:
    """Turns what the system refuses while `path` is written into an OutputError of that kind, with its name and the way out."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise kind(f"{printable(str(path))}: {error.strerror}.{remedy}") from error


@contextmanager
def begun_anew() -> Iterator[None]:
    """For a command that is not gone on with where it broke off: the way out is to run it again, and no --resume."""
    try:
        yield
    except OutputError as error:
        error.problems = tuple(text.replace(f"run again{_RESUMED}.", "run again.") for text in error.problems)
        error.args = ("\n".join(error.problems),)
        raise


def write_file(path: Path, data: bytes, folder: int) -> None:
    """Write `path`, which is in the folder of that descriptor and was not there."""
    with writing(path), os.fdopen(open_file(path.name, folder, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as stream:
        stream.write(data)
        stream.flush()
        with writing(path, SyncFailed):
            sync(stream.fileno())


def identity(path: Path) -> tuple[int, int] | None:
    """Which file or folder stands at `path` on this host, now; None when nothing does, or the system will not say."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def mode_of_new_files() -> int:
    """The mode that the umask leaves to a new file. It can only be read by setting it, so not while threads make files."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
