"""Durable writes and atomic appearance: fsync, folders, and the rename that makes a result appear in one step."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bam_merge.errors import OutputError, SyncFailed
from bam_merge.text import printable

_REMEDIES = {
    errno.ENOSPC: " Free some space, then run again with --resume.",
    errno.EDQUOT: " Free some of your quota, then run again with --resume.",
    errno.EFBIG: " The file size limit (ulimit -f) is too small; raise it, or set a smaller output.max_shard_size.",
}


# ---- the atomic appearance ---------------------------------------------------------------------------------------------------

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2


@contextmanager
def writing(path: Path, kind: type[OutputError] = OutputError) -> Iterator[None]:
    """Turns what the system refuses while `path` is written into an OutputError of that kind, with its name and the way out."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise kind(f"{printable(str(path))}: {error.strerror}.{remedy}") from error


def write_file(path: Path, data: bytes) -> None:
    with writing(path), open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        with writing(path, SyncFailed):
            os.fsync(stream.fileno())


def identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def make_durably(folder: Path) -> None:
    """Make `folder` and its missing parents, each entry on the disk before anything is put in it."""
    if not folder.exists():
        make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def delete(path: Path) -> None:
    """Delete a file, a folder with all in it, or a symlink, never what it points to; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    with writing(folder, SyncFailed):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def appear(staged: Path, target: Path, replace_existing: bool, notify: Callable[[str], None] = lambda text: None) -> None:
    """Give the finished folder its final name in one step. An existing target is exchanged, and so lands in the staging folder."""
    exchange = replace_existing and os.path.lexists(target)
    try:
        if not _rename(staged, target, _EXCHANGE if exchange else _NOREPLACE):
            what = "exchange two folders" if exchange else "rename without replacing"
            notify(f"{printable(str(target.parent))}: this file system cannot {what}, so a plain rename.")
            _plain_rename(staged, target, exchange)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(
                f"{printable(str(target))} appeared while the merge ran. Nothing was replaced; use --force --resume."
            ) from None
        raise OutputError(f"{printable(str(target))}: {error.strerror} when renaming the finished folder {staged} to it.") from error


def _rename(old: Path, new: Path, flags: int) -> bool:
    """renameat2(2), which os.rename lacks: plain rename silently replaces an empty folder, and cannot exchange two.

    False where the kernel or the file system does not have it. Raises OSError.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def _plain_rename(old: Path, new: Path, exchange: bool) -> None:
    """The same in steps: another process may come between them, and the target is absent for a moment when it is replaced."""
    if not exchange:
        if os.path.lexists(new):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(old, new)
        return
    aside = old.with_name("replaced")
    delete(aside)  # of a run that was killed here
    os.rename(new, aside)
    try:
        os.rename(old, new)
    except OSError:
        os.rename(aside, new)
        raise
