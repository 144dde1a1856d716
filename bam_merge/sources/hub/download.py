"""Files of the hub into the cache of huggingface_hub: each is whole and what the hub lists before it has its name there.

What came of a file stands beside it as DIGEST.bam-merge.incomplete, and the next run goes on from there: the library's own download
would begin again (2.4, file_download.py: a temporary file with a name of its own, deleted on failure).
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import copy_context
from importlib import import_module
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.folder import MAX_JSON
from bam_merge.errors import CheckpointError
from bam_merge.hub_id import HubId
from bam_merge.sources.hub import words as hub_words
from bam_merge.sources.hub.cache import SMALL_FILES, HubFile, Snapshot, cache_folder, repository_folder
from bam_merge.sources.hub.client import Hub, HubUnreachable, hub, library
from bam_merge.sources.watching import WATCH
from bam_merge.system import sync
from bam_merge.text import printable

AT_ONCE = 4
"""Files that are downloaded at the same time."""


PARTIAL = ".bam-merge.incomplete"


HASHED = 2**23
"""Bytes that are hashed at a time."""


def download(wanted: Iterable[tuple[Snapshot, str]]) -> None:
    """Bring files into the cache that are not there. Raises CheckpointError; what came of them is kept for the next run."""
    missing = [(snapshot, snapshot.files[name]) for snapshot, name in wanted if snapshot.files is not None and not snapshot.is_here(name)]
    if not missing:
        return
    if large := [(snapshot, file) for snapshot, file in missing if file.name in SMALL_FILES and file.size > MAX_JSON]:
        raise CheckpointError(*(f"{snapshot.id}: {file.name} is larger than {MAX_JSON:,} bytes." for snapshot, file in large))
    connection = hub()
    with _written(), ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(copy_context().run, _fetch, connection, snapshot, file) for snapshot, file in missing]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
        finally:
            connection.stop.set()  # to those that still run; all are done where nothing failed
            for job in jobs:
                job.cancel()
    with _written():
        for snapshot in {snapshot.id: snapshot for snapshot, _ in missing}.values():
            _refer(snapshot)


def bytes_missing(wanted: Iterable[tuple[Snapshot, str]]) -> int:
    """Bytes that a download of these files would bring."""
    total = 0
    for snapshot, name in wanted:
        if snapshot.files is not None and not snapshot.is_here(name):
            file = snapshot.files[name]
            total += max(0, file.size - _size(_blob(snapshot.id, file).with_name(file.digest + PARTIAL)))
    return total


def room_problem(needed: int, output: Path | None = None, output_bytes: int = 0) -> str | None:
    """A message where the cache's disk lacks room for so many bytes, with those of an output that goes to the same one."""
    place = _existing(cache_folder())
    shared = output is not None and os.stat(_existing(output)).st_dev == os.stat(place).st_dev
    free, also = shutil.disk_usage(place).free, output_bytes if shared else 0
    return hub_words.no_room(printable(str(cache_folder())), free, needed, also) if needed and needed + also > free else None


# ---- one file --------------------------------------------------------------------------------------------------------------


def _fetch(connection: Hub, snapshot: Snapshot, file: HubFile) -> None:
    """One file: its blob, and its name in the snapshot."""
    blob, pointer = _blob(snapshot.id, file), snapshot.folder / file.name
    if file.xet and _size(blob) != file.size and _has_xet() and not blob.with_name(file.digest + PARTIAL).exists():
        _by_the_library(connection, snapshot.id, file)
        if not _is_what_is_listed(pointer, file):
            for path in (pointer, Path(os.path.realpath(pointer)), blob):
                path.unlink(missing_ok=True)
            raise CheckpointError(hub_words.other_digest(snapshot.id, file.name))
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _locked(snapshot.id, file):
        if _size(blob) != file.size:
            partial = blob.with_name(file.digest + PARTIAL)
            _fill(connection, snapshot.id, file, partial)
            os.replace(partial, blob)
        _point(blob, pointer)


def _fill(connection: Hub, of: HubId, file: HubFile, partial: Path) -> None:
    """Make `partial` the whole file, from what is there of it. Where that is not what the hub lists, once more from the beginning."""
    for again in (True, False):
        connection.again(lambda: _append(connection, of, file, partial), of, lambda: _size(partial))
        if _is_what_is_listed(partial, file):
            return
        partial.unlink()
        if again:
            WATCH.get().advance(-file.size)
    raise CheckpointError(hub_words.other_digest(of, file.name))


def _append(connection: Hub, of: HubId, file: HubFile, partial: Path) -> None:
    with open(partial, "ab") as stream:
        at = stream.tell()
        if at > file.size:
            stream.truncate(at := 0)
        if at == file.size:
            return
        advance = WATCH.get().advance
        with connection.get(connection.file(of, file.name), of, file.name, (at, None) if at else None) as answer:
            if answer.length not in (None, file.size):
                raise CheckpointError(hub_words.other_length(of, file.name, file.size, answer.length or 0))
            if answer.first != at:  # a server that sends whole files only
                if answer.first != 0:
                    raise CheckpointError(hub_words.no_ranges(of, file.name))
                stream.truncate(0)
                advance(-at)
                at = 0
            for piece in answer.pieces():
                at += len(piece)
                if at > file.size:
                    stream.truncate(0)
                    raise CheckpointError(hub_words.other_length(of, file.name, file.size, at))
                stream.write(piece)
                advance(len(piece))
                if connection.stop.is_set():
                    raise HubUnreachable(hub_words.STOPPED)
        if at < file.size:
            raise HubUnreachable(hub_words.broken(of, file.name, "Ended", connection.shown))
        stream.flush()
        sync(stream.fileno())


def _is_what_is_listed(path: Path, file: HubFile) -> bool:
    """Whether the file has the digest that the hub lists: SHA-256, or git's of a blob."""
    if _size(path) != file.size:
        return False
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with open(path, "rb") as stream:
        while piece := stream.read(HASHED):
            digest.update(piece)
    return digest.hexdigest() == file.digest


def _by_the_library(connection: Hub, of: HubId, file: HubFile) -> None:
    """Files in chunks come by hf_xet, through huggingface_hub, which puts them where they belong."""
    hf = library()

    class Bar:
        """What the library takes for its progress bar."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: float | None = 1) -> None:
            WATCH.get().advance(int(count or 0))

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    def call() -> None:
        try:
            hf.hf_hub_download(of.repo, file.name, revision=of.revision, tqdm_class=Bar, endpoint=connection.endpoint)
        except OSError as error:
            if (response := getattr(error, "response", None)) is not None:
                raise connection.refused(response, of, file.name) from None
            if error.errno is not None:
                raise
            raise HubUnreachable(hub_words.broken(of, file.name, type(error).__name__, connection.shown)) from None
        except CheckpointError:
            raise
        except Exception as error:  # hf_xet's own, which are of no common class
            raise HubUnreachable(hub_words.broken(of, file.name, type(error).__name__, connection.shown)) from None

    connection.again(call, of)


def _has_xet() -> bool:
    """Whether the library downloads in chunks here: hf_xet is installed, and not forbidden."""
    return bool(getattr(import_module("huggingface_hub.file_download"), "is_xet_available", bool)())


# ---- the cache's folders -----------------------------------------------------------------------------------------------------


def _blob(of: HubId, file: HubFile) -> Path:
    return repository_folder(of) / "blobs" / file.digest


def _point(blob: Path, pointer: Path) -> None:
    """The file's name in the snapshot, as a link to its blob; where there are no links, the file itself."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not library().constants.HF_HUB_DISABLE_SYMLINKS:
        link = pointer.with_name(f".{pointer.name}.{os.getpid()}.link")
        with suppress(OSError):
            link.unlink(missing_ok=True)
            os.symlink(os.path.relpath(blob, pointer.parent), link)
            os.replace(link, pointer)
            return
    os.replace(blob, pointer)


def _refer(snapshot: Snapshot) -> None:
    """Keep which commit the revision is, for when the hub cannot be asked."""
    if snapshot.asked.commit is None:
        path = repository_folder(snapshot.id) / "refs" / (snapshot.asked.revision or "main")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        new.write_text(str(snapshot.id.revision))
        os.replace(new, path)


@contextmanager
def _locked(of: HubId, file: HubFile) -> Iterator[None]:
    """The lock by which huggingface_hub keeps two processes from downloading the same file."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path = cache_folder() / ".locks" / repository_folder(of).name / f"{file.digest}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path):
        yield


@contextmanager
def _written() -> Iterator[None]:
    """What the system refuses while the cache is written, in words."""
    try:
        yield
    except OSError as error:
        shown = printable(str(cache_folder()))
        way_out = "Free some space there, or set HF_HUB_CACHE to a folder that can be written, on a disk with room"
        raise CheckpointError(f"{shown}, where models of the hub are kept: {error.strerror or type(error).__name__}. {way_out}.") from None


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


__all__ = ["bytes_missing", "download", "room_problem"]
