"""A folder that is ours alone, in a place where others may write: made for its owner, checked by its descriptor, never through links.

Everything in it is opened relative to the descriptor, so that nobody who can rename the folder can put another in its place.
"""

import errno
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from bam_merge.errors import OutputError
from bam_merge.text import printable, some

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: a planted FIFO must not hang the run; it changes nothing for regular files."""


STILL_OPEN = (".nfs", ".fuse_hidden")
"""How the names begin that network file systems give to deleted files while somebody has them open."""


PROBE = "probe"
"""A file that is made to see whose files of ours are on this file system, and deleted at once."""


_KINDS = {
    stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def open_folder(name: str, folder: int) -> int:
    """A descriptor of the folder `name` in the folder of descriptor `folder`. Raises OSError, for a symbolic link too."""
    return os.open(name, FOLDER, dir_fd=folder)


def open_file(name: str, folder: int, flags: int, mode: int = 0o666) -> int:
    """A descriptor of the regular file `name`, which has no second name, in the folder of descriptor `folder`.

    Raises OSError, which says so when it is anything else, before a byte of it is changed (so `flags` have no O_TRUNC).
    """
    assert not flags & os.O_TRUNC
    try:
        descriptor = os.open(name, flags | FILE, mode, dir_fd=folder)
    except OSError:
        problem = unlike_a_file(name, folder)
        if problem is None:
            raise
        raise OSError(errno.EPERM, problem) from None
    if problem := _unlike(os.fstat(descriptor)):
        os.close(descriptor)
        raise OSError(errno.EPERM, problem)
    return descriptor


def read_file(name: str, folder: int, limit: int | None = None) -> bytes:
    """The bytes of the file `name`, at most `limit`; none when it is not there. Raises as open_file."""
    try:
        descriptor = open_file(name, folder, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read() if limit is None else stream.read(limit)


def unlike_a_file(name: str, folder: int) -> str | None:
    """What makes `name` no file of ours; None when it is a regular file with one name, or not there."""
    try:
        return _unlike(os.stat(name, dir_fd=folder, follow_symlinks=False))
    except OSError:
        return None


def _unlike(status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return f"is {kind(status)}, expected a file, so nothing was written to it"
    return "is a hard link: the file has another name, so nothing was written to it" if status.st_nlink > 1 else None


def kind(status: os.stat_result) -> str:
    """What stands there, in words."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "something unknown")


def who(user: int) -> str:
    """A user's name and number."""
    try:
        return f"{printable(pwd.getpwuid(user).pw_name)} (user id {user})"
    except KeyError:
        return f"user id {user}"


# ---- whose it is -----------------------------------------------------------------------------------------------------------


def check_own(folder: int, shown: str, made: bool) -> str | None:
    """Raise OutputError unless the folder of that descriptor is this user's and nobody else can write in it.

    `made`: this run has just made it. Returns what is to be said where the file system keeps no permissions.
    """
    status = os.fstat(folder)
    if status.st_uid != os.geteuid() and status.st_uid != owner_of_new_files(folder):
        raise OutputError(_foreign(shown, status))
    if status.st_mode & 0o022 and not made:
        raise OutputError(
            f"{shown} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}), so nothing in it can be trusted. bam-merge makes "
            "it for its owner alone. See what is in it, delete it, and run again; or choose another --output."
        )
    if status.st_mode & 0o077:
        with suppress(OSError):
            os.fchmod(folder, 0o700)
    if os.fstat(folder).st_mode & 0o022:
        return f"{shown}: this file system keeps no permissions, so whoever can write there can change the result while it is made."
    return None


def owner_of_new_files(folder: int) -> int | None:
    """Who owns what this run makes in the folder: not always this user, where a network file system maps all users to one."""
    try:
        descriptor = os.open(PROBE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FILE, 0o600, dir_fd=folder)
    except OSError:
        return None
    owner = os.fstat(descriptor).st_uid
    os.close(descriptor)
    with suppress(OSError):
        os.unlink(PROBE, dir_fd=folder)
    return owner


def _foreign(shown: str, status: os.stat_result) -> str:
    return (
        f"{shown} belongs to {who(status.st_uid)}, and this run to {who(os.geteuid())}. Somebody else's files must not get into the "
        "result, nor yours be written over through them. Choose another --output, or have its owner delete it."
    )


def unlike_own(name: str, parent: int, shown: str) -> str | None:
    """Why `name` in the folder of descriptor `parent` cannot be opened as a folder of ours; None when it looks like one."""
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        owner = who(status.st_uid)
        return (
            f"{shown} is {kind(status)} of {owner}, expected a folder that bam-merge made. It is never followed or written to: delete it, "
            "or choose another --output."
        )
    return _foreign(shown, status) if status.st_uid != os.geteuid() else None


def check_contents(folder: int, shown: str, expected: Mapping[str, int]) -> None:
    """Raise OutputError for what is in the folder and not `expected` there (name: S_IFREG or S_IFDIR): this user's own, with one name."""
    strange = []
    owner = os.fstat(folder).st_uid
    for name in sorted(os.listdir(folder)):
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            kind_here = stat.S_IFREG if name.startswith(STILL_OPEN) else expected.get(name)
            if stat.S_IFMT(status.st_mode) != kind_here:
                strange.append(f"{name} ({kind(status)})")
            elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                strange.append(f"{name} (a hard link)")
            elif stat.S_ISREG(status.st_mode) and status.st_uid != owner:
                strange.append(f"{name} (of {who(status.st_uid)})")
    if strange:
        raise OutputError(
            f"{shown} holds what bam-merge did not put there: {some(strange, 10)}. See what it is, delete the folder, and run again; "
            "or choose another --output."
        )


@contextmanager
def opened_folder(name: str, folder: int) -> Iterator[int]:
    """`open_folder`, closed at the end."""
    descriptor = open_folder(name, folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
