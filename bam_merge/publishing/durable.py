"""Entries of folders brought to the disk: a name that a power cut may undo is no result."""

import os
from pathlib import Path

from bam_merge.errors import SyncFailed
from bam_merge.files import writing
from bam_merge.own_folder import FOLDER
from bam_merge.system import sync


def make_durably(folder: Path) -> None:
    """Make `folder` and its missing parents, each entry on the disk before anything is put in it."""
    if not folder.exists():
        make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    with writing(folder, SyncFailed):
        descriptor = os.open(folder, FOLDER & ~os.O_NOFOLLOW)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def sync_descriptor(folder: int, path: Path) -> None:
    """The same for a folder that is open; `path` is its name."""
    with writing(path, SyncFailed):
        sync(folder)
