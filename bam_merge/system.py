"""What operating systems do differently: every call that one of them lacks, and what takes its place, chosen here and nowhere else.

Which calls there are is looked up at every use, so that a test can take one away. Everything here raises OSError.
"""

import ctypes
import errno
import fcntl
import os
import resource

_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What a kernel or a file system says that lacks a call. On macOS the last two differ."""


MOST_BYTES = 1 << 30
"""Bytes that one read or write is asked for: Linux moves at most 2**31 - 4096 and says so, macOS refuses more than 2**31 - 1."""


# ---- reaching the disk -----------------------------------------------------------------------------------------------------


def sync(descriptor: int) -> None:
    """fsync(2) as Linux means it: down to the medium. macOS leaves the bytes in the drive's cache, unless F_FULLFSYNC asks for more."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno not in _CANNOT | {errno.ENOTTY}:  # network file systems have fsync alone
                raise
    os.fsync(descriptor)


def start_sync(descriptor: int) -> None:
    """fdatasync(2): what was written goes to the disk now, so that a `sync` to come is short. macOS has fsync alone."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def reserve(descriptor: int, nbytes: int) -> None:
    """Have the file system set the space aside, so that a full disk shows now and not at the last tensor. Not on macOS."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise


# ---- locks and names -------------------------------------------------------------------------------------------------------


def lock(descriptor: int, shared: bool = False) -> bool:
    """Lock the open file or folder against others until it is closed. False where there are no locks.

    `shared`: against those alone that want it for themselves. Raises BlockingIOError when another has it.
    """
    if not hasattr(fcntl, "flock"):
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def rename(old: tuple[int, str], new: tuple[int, str], exchange: bool) -> bool:
    """Rename between open folders, (descriptor, name) each: exchange the two, or replace nothing. False where neither can be had.

    os.rename lacks both, and silently replaces an empty folder: this is renameat2(2) on Linux, renameatx_np(2) on macOS.
    """
    library = ctypes.CDLL(None, use_errno=True)
    for name, exchanging, without_replacing in (("renameat2", 2, 1), ("renameatx_np", 2, 4)):
        call = getattr(library, name, None)
        if call is not None:
            flags = exchanging if exchange else without_replacing
            if call(old[0], os.fsencode(old[1]), new[0], os.fsencode(new[1]), flags) == 0:
                return True
            code = ctypes.get_errno()
            if code not in _CANNOT:
                raise OSError(code, os.strerror(code))
    return False


def name_new(old: str, new: str | os.PathLike[str]) -> None:
    """Give the file `old` the name `new`, replacing nothing. Where there are no hard links, another process may come in between."""
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in _CANNOT | {errno.EPERM}:
            raise
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(old, new)


def path_of(descriptor: int) -> str | None:
    """The path, without links and as it is spelled on the disk, of an open file or folder; None where the system does not tell."""
    try:
        if hasattr(fcntl, "F_GETPATH"):
            return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return None


def name_of(descriptor: int) -> str:
    """A path that opens the open file again, for libraries that take nothing but a name."""
    linux = f"/proc/self/fd/{descriptor}"
    return linux if os.path.lexists(linux) else f"/dev/fd/{descriptor}"


# ---- which process ---------------------------------------------------------------------------------------------------------


def machine() -> tuple[str, str]:
    """This host's name, and what tells its processes from all others': the boot of its kernel with the namespace of process ids.

    The second is empty where the system does not tell.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return os.uname().nodename, f"{stream.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, ValueError):
        return os.uname().nodename, ""


def started(process: int) -> str | None:
    """When a process of this machine began, in ticks since the boot, for numbers are given out again. None: there is none, or it is dead
    and not yet taken note of. Empty where the system does not tell."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's
        pass
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as stream:
            state, *fields = stream.read().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return None if state in ("Z", "X") else fields[18]


# ---- processors ------------------------------------------------------------------------------------------------------------


def available_processors() -> int:
    """Processors that this process may use. macOS knows only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- memory ------------------------------------------------------------------------------------------------------------------


def give_back_from(nbytes: int) -> bool:
    """Have pieces of memory of `nbytes` and more go back to the system as soon as they are free. False where the C library cannot be asked.

    glibc begins so, at 128 kB, but keeps what it gave back once: up to 32 MB it then cuts such pieces out of what it holds, which thus
    grows to twice of what is used, by holes that nothing fits. A size that is set stays (mallopt(3), M_MMAP_THRESHOLD).
    """
    mallopt = getattr(ctypes.CDLL(None, use_errno=True), "mallopt", None)
    return mallopt is not None and mallopt(-3, nbytes) == 1


# ---- confinement -------------------------------------------------------------------------------------------------------------


def cut_network() -> bool:
    """Leave the network, by a namespace of this process's own. False where the system does not let it. Before any thread is started."""
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    if unshare is None:
        return False
    new_user, new_network = 0x10000000, 0x40000000
    return unshare(new_network) == 0 or (os.geteuid() != 0 and unshare(new_user | new_network) == 0)


def address_space() -> int | None:
    """Bytes of addresses that this process has; None where the system does not tell, and so cannot be asked to keep a limit."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def lower_limit(name: str, most: int, more: int = 0) -> None:
    """Lower a limit of this process and its children (setrlimit(2)), by its name without RLIMIT_. One that is lower already stays.

    `more`: how much further the hard limit is, at which the system kills and says nothing.
    """
    which = getattr(resource, f"RLIMIT_{name}", None)
    if which is None:
        return
    _, hard = resource.getrlimit(which)
    soft, last = (most if hard == resource.RLIM_INFINITY else min(most, hard) for most in (most, most + more))
    try:
        resource.setrlimit(which, (soft, last))
    except ValueError as error:  # macOS, for addresses
        raise OSError(errno.EINVAL, str(error)) from None
