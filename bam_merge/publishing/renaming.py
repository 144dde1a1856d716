"""The rename that makes a folder appear in one step, between folders that are open, replacing nothing or all of the target."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bam_merge import system
from bam_merge.errors import OutputError
from bam_merge.text import printable


class Entry(NamedTuple):
    """An entry: the descriptor of the folder that it is in, its name there, and what messages call it."""

    folder: int
    name: str
    path: Path


def give_name(
    staged: Entry, target: Entry, replace_existing: bool, aside: str = "replaced", notify: Callable[[str], None] = lambda text: None
) -> None:
    """Give the finished folder its final name in one step. An existing target is exchanged, and so lands where the finished one was.

    Where the file system cannot do that, it goes to the name `aside` there first. Raises OutputError.
    """
    shown = printable(str(target.path))
    exchange = replace_existing and _is_there(target)
    try:
        if not _rename(staged, target, exchange):
            what = "exchange two folders" if exchange else "rename without replacing"
            notify(f"{printable(str(target.path.parent))}: this file system cannot {what}, so a plain rename.")
            _plain_rename(staged, target, aside if exchange else None)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(f"{shown} appeared while the merge ran. Nothing was replaced; use --force --resume.") from None
        where = printable(str(staged.path))
        raise OutputError(f"{shown}: {error.strerror} when renaming the finished folder {where} to it.") from error


def _is_there(place: Entry) -> bool:
    try:
        os.stat(place.name, dir_fd=place.folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _rename(old: Entry, new: Entry, exchange: bool) -> bool:
    """In one step: exchange the two, or replace nothing. False where the system or the file system cannot. Raises OSError."""
    return system.rename((old.folder, old.name), (new.folder, new.name), exchange)


def _plain_rename(old: Entry, new: Entry, aside: str | None) -> None:
    """The same in steps: another process may come between them, and the target is absent for a moment when it is replaced."""
    if aside is None:
        if _is_there(new):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(old.name, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder)
        return
    os.rename(new.name, aside, src_dir_fd=new.folder, dst_dir_fd=old.folder)
    try:
        os.rename(old.name, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder)
    except OSError:
        os.rename(aside, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder)
        raise
