"""`python tests/faults/by_path.py ARGUMENT ...` is `python -m bam_merge ARGUMENT ...`, with files named by their paths.

bam-merge names what it writes relative to descriptors of folders. Python's audit events show those names alone, so a tool that follows the
events of a folder by its path sees none of them. Here each such call is made with the whole path, and is otherwise the same.
"""

import os
from collections.abc import Callable
from typing import Any

from bam_merge.cli import main


def _whole(name: Any, folder: int | None) -> Any:
    return name if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(name))


def _by_path(call: Callable[..., Any]) -> Callable[..., Any]:
    def named(name: Any, *arguments: Any, dir_fd: int | None = None, **options: Any) -> Any:
        return call(_whole(name, dir_fd), *arguments, **options)

    return named


def _both_by_path(call: Callable[..., Any]) -> Callable[..., Any]:
    def named(old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, **options: Any) -> Any:
        return call(_whole(old, src_dir_fd), _whole(new, dst_dir_fd), **options)

    return named


if __name__ == "__main__":
    for name in ("open", "mkdir", "unlink", "rmdir"):
        setattr(os, name, _by_path(getattr(os, name)))
    for name in ("rename", "replace", "link"):
        setattr(os, name, _both_by_path(getattr(os, name)))
    main()
