"""The output files of a merge: made at full size, written at planned places, brought to the disk while it runs."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bam_merge.errors import SyncFailed
from bam_merge.files import writing
from bam_merge.own_folder import open_file
from bam_merge.system import MOST_BYTES, reserve, start_sync

FLUSH_SECONDS = 0.05
"""Pause between two syncs of what the workers have written."""


# ---- files -----------------------------------------------------------------------------------------------------------------


def prepare(path: Path, header: bytes, nbytes: int, folder: int | None = None) -> int:
    """Open the output file with its header written and its space reserved; what it already holds stays. Never through a link."""
    with writing(path):
        if folder is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        else:
            descriptor = open_file(path.name, folder, os.O_RDWR | os.O_CREAT)
        try:
            if os.fstat(descriptor).st_size != nbytes:
                os.ftruncate(descriptor, nbytes)
            reserve(descriptor, nbytes)
            write_all(descriptor, memoryview(header), 0)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


@contextmanager
def written_behind(outputs: Mapping[Path, int], stop: threading.Event) -> Iterator[None]:
    """Sync the files again and again in a thread of its own, so that the disk works while the processors do and the last sync is short.

    A sync that fails is fatal, and not tried again: what it could not write may be gone from memory. It stops the workers.
    """
    ended, failures = threading.Event(), list[tuple[Path, OSError]]()

    def flush() -> None:
        while not ended.wait(FLUSH_SECONDS):
            for path, descriptor in outputs.items():
                try:
                    start_sync(descriptor)
                except OSError as error:
                    failures.append((path, error))
                    stop.set()
                    return

    thread = threading.Thread(target=flush, name="bam-merge-flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for path, error in failures:  # whatever else went wrong
            with writing(path, SyncFailed):
                raise error


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + MOST_BYTES], offset + done)
