"""Who has a staging folder: its lock, and the number of the process in it."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from bam_merge import system
from bam_merge.errors import Busy, NotYet, OutputError
from bam_merge.own_folder import open_file, read_file
from bam_merge.text import printable

PID = "pid"


def take(lock: int, folder: Path, target: Path, made: bool, shared: bool = False) -> None:
    """Lock the staging folder `folder`, whose descriptor is `lock`, until that is closed. Raises OutputError when another run has it.

    Where there are no locks, a folder is its maker's: `made` says that this run has just made it, which only one run can. One that is
    `shared` by parts has locks of theirs in it.
    """
    try:
        locked = system.lock(lock, shared)
    except BlockingIOError:
        kind = NotYet if shared else Busy
        raise kind(f"{printable(str(target))} is being written by another run{_holder(lock)}. Wait for it.") from None
    if not locked and not made and not shared:
        raise OutputError(
            f"{printable(str(folder))} is there{_holder(lock)}, and this file system has no locks to tell whether a run writes in it. "
            "When none does, delete that folder and run again; or choose another --output."
        )


def check_no_parts(name: str, lock: int, folder: Path) -> None:
    """Remove the folder of parts `name` from a staging folder where nothing is in it, else raise OutputError."""
    try:
        os.rmdir(name, dir_fd=lock)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise OutputError(
            f"{printable(str(folder))} holds parts that were made by --part: bam-merge finish RECIPE makes the result of them. Or delete "
            "that folder, and run again."
        ) from None


def write_pid(lock: int) -> None:
    descriptor = open_file(PID, lock, os.O_WRONLY | os.O_CREAT)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    finally:
        os.close(descriptor)


def _holder(lock: int) -> str:
    """Who has the lock. It writes its number right after it got the lock, and may be about to."""
    for _ in range(20):
        with suppress(OSError, ValueError):
            process = int(read_file(PID, lock, 20))
            if system.started(process) is not None:  # or else it is of a run that died earlier
                return f" (process {process})"
        time.sleep(0.01)
    return ""
