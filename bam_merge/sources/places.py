"""What a place is, and how it is opened: a folder, a model of the Hugging Face hub, or a folder elsewhere.

A folder wins: org/name is a model of the hub where no such folder is; hf://org/name always is one. Any other address is a folder elsewhere.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bam_merge.address import address
from bam_merge.architectures.anatomy import Anatomy, anatomy, open_anatomy
from bam_merge.architectures.opening import open_folder
from bam_merge.checkpoints.adapter_folder import open_adapter
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.provenance import MANIFEST
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.hub_id import HubId, hub_id
from bam_merge.paths import located
from bam_merge.sources.watching import WATCH
from bam_merge.text import human_bytes, nearest, printable

if TYPE_CHECKING:  # what speaks to the hub is imported where a place is none of this machine's
    from bam_merge.sources.afar.folder import Elsewhere
    from bam_merge.sources.hub.cache import Snapshot


@dataclass(frozen=True)
class Found:
    """What stands at a place: a folder, a snapshot of the hub, or a folder elsewhere. `ranged`: its weights are read where they are."""

    path: Path
    snapshot: "Snapshot | None" = None
    elsewhere: "Elsewhere | None" = None
    ranged: bool = False

    @property
    def recorded(self) -> str | None:
        """The model of the hub with its commit, or the address, as documents name it; None for a folder."""
        if self.elsewhere is not None:
            return str(self.elsewhere)
        return None if self.snapshot is None else str(self.snapshot.id)


def find(
    text: str | os.PathLike[str],
    home: Path | None = None,
    recorded: bool = False,
    adapter: bool = False,
    error: type[BamMergeError] = CheckpointError,
) -> Found:
    """What stands at the place `text`, relative to `home`. Raises `error` for what can be no place, CheckpointError for a model of the hub
    that is not to be had.

    `recorded`: it comes from a document, which names a model of the hub with its commit, so that anything else is a folder. `adapter`: an
    adapter is looked for, and not a model.
    """
    text = os.fsdecode(text)
    if (away := address(text, error)) is not None:
        from bam_merge.sources.afar.folder import resolve as resolve_elsewhere

        found = resolve_elsewhere(away, adapter)
        return Found(found.folder, elsewhere=found)
    wanted = hub_id(text, error)
    if wanted is None:
        return Found(located(text, home, error))
    if not wanted.marked:
        path = located(text, home, error)
        if os.path.lexists(path):
            return Found(path)
        if recorded and wanted.commit is None:
            return Found(path)
    from bam_merge.sources.hub.cache import NotInCache, resolve

    try:
        snapshot = resolve(wanted, adapter)
    except NotInCache:  # no doubt that it is one
        raise
    except CheckpointError as problem:
        if wanted.marked or wanted.revision is not None:
            raise type(problem)(*(_of(wanted, text) for text in problem.problems)) from None
        raise type(problem)(_neither(path, problem)) from None
    return Found(snapshot.folder, snapshot)


def _of(wanted: HubId, problem: str) -> str:
    """A problem as one of this model, in a sentence."""
    named = problem if problem.startswith(wanted.repo) else f"{wanted}: {problem}"
    return named if named.endswith((".", "?")) else f"{named}."


def _neither(path: Path, error: CheckpointError) -> str:
    """What is said of org/name that is no folder, and no model of the hub that could be had: either may have been meant."""
    from bam_merge.sources.hub.client import HubUnreachable

    try:
        close = nearest(path.name, sorted(os.listdir(path.parent)))
    except OSError:
        close = ""
    why = error.problems[0]
    what = "and whether it is a model of the hub could not be seen" if isinstance(error, HubUnreachable) else "and"
    end = "" if why.endswith((".", "?")) else "."
    return f"{printable(str(path))}: no such folder{close.removesuffix('?')}, {what}{':' if what != 'and' else ''} {why}{end}"


def opened(found: Found, tokenizers: bool = False) -> Checkpoint:
    """The checkpoint at a place; of a model of the hub that is not in the cache, its headers. Raises CheckpointError.

    With `tokenizers`, all files beside the weights are there.
    """
    snapshot = found.snapshot
    if found.elsewhere is not None:
        from bam_merge.sources.afar.folder import open_elsewhere

        return open_elsewhere(found.elsewhere, tokenizers, found.ranged)
    if found.ranged and snapshot is not None and snapshot.can_be_ranged:
        from bam_merge.sources.hub.ranged import open_ranged

        return open_ranged(snapshot)
    if snapshot is None or snapshot.files is None or snapshot.complete:
        return open_adapter(found.path) if snapshot is not None and snapshot.adapter else open_folder(found.path)
    from bam_merge.sources.hub.headers import open_headers

    return open_headers(snapshot, tokenizers)


def look(path: str | os.PathLike[str], values: bool = False, manifest: bool = False, ranges: bool = False) -> tuple[Anatomy, str]:
    """What is at a place, and how it is called; with `values`, so that its tensors can be read; with `manifest`, the record of its merge.

    Of a model of the hub a large manifest is else left there, which is a finding. With `ranges`, its tensors are read where they are.
    Raises CheckpointError.
    """
    found = find(path)
    snapshot = found.snapshot
    if found.elsewhere is not None:
        if manifest:
            bring_manifest(found)
        return anatomy(opened(replace(found, ranged=values))), str(found.recorded)
    if ranges and values:
        return anatomy(opened(replace(found, ranged=True))), str(found.recorded)
    if snapshot is None:
        return open_anatomy(path), str(path)
    if values:
        bring([found])
    elif manifest:
        bring_manifest(found)
    checkpoint = opened(found)
    if checkpoint.remote is not None and snapshot.has(MANIFEST) and not snapshot.is_here(MANIFEST):
        left = f"{MANIFEST} was not read, for it is large: how the tensors were made is not known. --where and --stats read it."
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, left))
    return anatomy(checkpoint), str(found.recorded)


def bring_manifest(found: Found) -> None:
    """Download the record of the merge that made a model elsewhere, if there is one. Raises CheckpointError."""
    if found.elsewhere is not None:
        from bam_merge.sources.afar.folder import bring_small

        bring_small(found.elsewhere)
    if found.snapshot is not None and found.snapshot.has(MANIFEST):
        from bam_merge.sources.hub.download import download

        download([(found.snapshot, MANIFEST)])


def local(path: str | os.PathLike[str], error: type[BamMergeError], needs: str) -> "tuple[Path, Snapshot | None]":
    """The folder at a place, downloaded where it is a model of the hub. Raises `error` where that has no file `needs`, CheckpointError
    where it cannot be had."""
    found = find(path, error=error)
    if found.elsewhere is not None:
        raise error(f"{found.recorded}: read as a whole, so it must be a folder here. Copy it to this machine, and give that.")
    if found.snapshot is not None:
        if not found.snapshot.has(needs):
            raise error(f"{found.recorded}: no {needs} on the hub, so this is not what bam-merge wrote.")
        bring([found])
    return found.path, found.snapshot


def bring(places: Iterable[Found], output: Path | None = None, output_bytes: int = 0) -> None:
    """Download what is not in the cache of the models of the hub among `places`, to be read as folders. Raises CheckpointError.

    Room is looked for first, also for an output of so many bytes.
    """
    found = [place.snapshot for place in places if place.snapshot is not None and place.snapshot.files is not None]
    snapshots = {(snapshot.id, snapshot.adapter): snapshot for snapshot in found}
    if not snapshots:
        return
    from bam_merge.sources.hub.client import hub
    from bam_merge.sources.hub.download import bytes_missing, download, room_problem

    small = [(snapshot, name) for snapshot in snapshots.values() for name in snapshot.small_files()]
    download(small)
    wanted = [(snapshot, name) for snapshot in snapshots.values() for name in snapshot.wanted()]
    missing = bytes_missing(wanted)
    if not missing:
        download(wanted)  # whole, and without its name
        return
    if problem := room_problem(missing, output, output_bytes):
        raise CheckpointError(problem)
    watch = WATCH.get()
    names = ", ".join(str(snapshot.id) for snapshot in snapshots.values())
    watch.notify(f"downloading {human_bytes(missing)} from {hub().shown}: {names}")
    watch.begin(missing)
    try:
        download(wanted)
    except KeyboardInterrupt:
        watch.notify("what was downloaded is kept; run again to go on.")
        raise
