"""The staging folder: a lock, a journal of finished tensors, and the rename that makes the result appear in one step.

The folder is ours alone and is reached by its descriptor (own_folder.py); what is deleted from it is what savers write (replacing.py).
"""

import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, Self

from bam_merge._version import __version__
from bam_merge.checkpoints.reading import digest_range
from bam_merge.errors import BamMergeError, OutputError
from bam_merge.files import writing
from bam_merge.merging.tensor import Finished
from bam_merge.own_folder import (
    PROBE,
    STILL_OPEN,
    check_contents,
    check_own,
    open_file,
    open_folder,
    opened_folder,
    read_file,
    unlike_own,
)
from bam_merge.paths import beside
from bam_merge.planning.plan import Plan
from bam_merge.publishing.durable import make_durably
from bam_merge.publishing.holder import PID, check_no_parts, take, write_pid
from bam_merge.publishing.journal import line, read_journal
from bam_merge.publishing.renaming import Entry, give_name
from bam_merge.publishing.replacing import Which, delete_saved
from bam_merge.text import printable, some

OUTPUT, REPLACED, JOURNAL, STATES, NEW_STATES = "output", "replaced", "journal", "states", "states.new"


PARTS = "parts"
"""The folder of the journals and locks of parts, where several processes make a result."""


PART_FILES = (".journal", ".lock", ".proof")
"""How the names in it end."""


EXPECTED = {
    **dict.fromkeys((OUTPUT, REPLACED, PARTS), stat.S_IFDIR),
    **dict.fromkeys((JOURNAL, STATES, NEW_STATES, PID, PROBE), stat.S_IFREG),
}
"""What a staging folder may hold. `replaced` is the old target where the file system cannot exchange two folders."""


Notify = Callable[[str], None]


def staging_folder(target: Path) -> Path:
    """Where a merge into `target` works until it is finished."""
    return target.parent / beside(target.name, ".", ".bam-merge")


def staged_bytes(target: Path, names: Collection[str] | None = None) -> int:
    """Disk space that an unfinished run of `target` holds, which the next run uses or frees; of the files `names` alone, if given."""
    held = 0
    with suppress(OSError), os.scandir(staging_folder(target) / OUTPUT) as entries:
        for entry in (entry for entry in entries if names is None or entry.name in names):
            with suppress(OSError):  # the run that is about to end moves its files away, one by one or all at once
                status = entry.stat(follow_symlinks=False)
                held += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return held


@dataclass
class Staging:
    """`.NAME.bam-merge` beside the target, locked by this process for as long as `lock` is open.

    `lock`, `parent` and `files` are descriptors of that folder, of the one that it and the target are in, and of `output` in it.
    """

    folder: Path
    target: Path
    parent: int
    lock: int
    notify: Notify
    files: int = -1
    journal: IO[bytes] | None = None

    @property
    def output(self) -> Path:
        """The name of what is being made; it is written through `files`."""
        return self.folder / OUTPUT

    @classmethod
    def open(cls, target: Path, notify: Notify = lambda text: None, shared: bool = False, parts: bool = False) -> Self:
        """Make and lock the staging folder of `target`. Raises OutputError when another run has it, or it is not ours alone.

        `shared`: with those that make other parts of the same result. `parts`: what parts left there is expected, else an error.
        """
        folder = staging_folder(target)
        with writing(folder):
            make_durably(target.parent)
            parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with suppress(FileNotFoundError):
                    os.stat(target.name, dir_fd=parent, follow_symlinks=False)  # a name that is too long is told now, not at the end
                while (lock := _lock(parent, folder, target, notify, shared)) is None:
                    pass
                try:
                    if not parts and PARTS in os.listdir(lock):
                        check_no_parts(PARTS, lock, folder)
                    if not shared:
                        write_pid(lock)
                except BaseException:
                    os.close(lock)
                    raise
            except BaseException:
                os.close(parent)
                raise
        return cls(folder, target, parent, lock, notify)

    def begin(self, plan: Plan, resume: bool, allow_nonfinite: bool, notify: Notify) -> dict[str, Finished]:
        """Start the journal. Returns the tensors that an earlier run of the same plan finished, when resuming; not those with
        NaN or infinity, unless they are allowed in this run too."""
        path = self.folder / JOURNAL
        header: dict[str, Any] = {"fingerprint": plan.fingerprint, "version": __version__}
        if plan.recipe.known:
            header["hub"] = {text: known.recorded for text, known in plan.recipe.known.items()}
        done: dict[str, Finished] = {}
        sound: frozenset[str] = frozenset()
        kept = 0
        if resume:
            with writing(path):
                journal, kept = read_journal(read_file(JOURNAL, self.lock), header, notify)
                sound = self.sound({shard.file for shard in plan.shards})
            done = self._trusted(
                plan, {name: item for name, item in journal.items() if allow_nonfinite or not item.nonfinite}, sound, notify
            )
        elif JOURNAL in os.listdir(self.lock):
            notify("an unfinished run is discarded; --resume would have continued it.")
        if not done:
            self.forget()
            kept = 0
        with writing(self.output):
            if done:
                self._delete(self.files, None, sound)
            else:
                self._begin_output()
        with writing(path):
            self.journal = os.fdopen(open_file(JOURNAL, self.lock, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
            os.ftruncate(self.journal.fileno(), kept)  # which, unlike truncate, is made again after EINTR
        if not kept:
            self._append(header)
        return done

    def begin_afresh(self) -> None:
        """Start with an empty output folder, for what is made in one go and never resumed."""
        if JOURNAL in os.listdir(self.lock):
            self.notify("an unfinished run is discarded; --resume would have continued it.")
        self.forget()
        with writing(self.output):
            self._begin_output()

    def _begin_output(self) -> None:
        """A new, empty output folder. Its mode is by the umask, as it will be published; until then nobody gets through ours."""
        self._close_files()
        self.discard(OUTPUT)
        os.mkdir(OUTPUT, dir_fd=self.lock)
        self.files = open_folder(OUTPUT, self.lock)

    def sound(self, names: set[str]) -> frozenset[str]:
        """Those of the files in the output folder that this user made and that have no other name. Opens the folder."""
        owner = os.fstat(self.lock).st_uid
        self._close_files()
        try:
            self.files = open_folder(OUTPUT, self.lock)
        except FileNotFoundError:
            return frozenset()
        if os.fstat(self.files).st_uid != owner:  # a folder that --force replaced: its owner may still have it open
            return frozenset()
        found = {name: os.stat(name, dir_fd=self.files, follow_symlinks=False) for name in os.listdir(self.files) if name in names}
        return frozenset(n for n, s in found.items() if stat.S_ISREG(s.st_mode) and s.st_nlink == 1 and s.st_uid == owner)

    def _trusted(self, plan: Plan, journal: dict[str, Finished], sound: frozenset[str], notify: Notify) -> dict[str, Finished]:
        """The journal's tensors whose bytes are really there, in files of ours."""
        trusted = {}
        for step in plan.steps:
            finished = journal.get(step.name)
            try:
                if finished and step.file in sound:
                    digest = digest_range(self.output / step.file, step.offset, step.nbytes, self.files)
                    if digest == finished.digest:
                        trusted[step.name] = finished
            except BamMergeError:
                continue
        if journal:
            notify(f"resuming: {len(trusted)} of {len(plan.steps)} tensors are finished.")
        return trusted

    def record(self, name: str, finished: Finished) -> None:
        self._append({"name": name, "digest": finished.digest, "reads": finished.reads, "nonfinite": finished.nonfinite})

    def _append(self, record: dict[str, Any]) -> None:
        assert self.journal is not None
        with writing(self.folder / JOURNAL):
            self.journal.write(line(record))
            self.journal.flush()

    def is_ours(self) -> bool:
        """Whether the folder at our path is still the one that we locked, and not a later one, after somebody deleted ours."""
        return _stands_there(self.folder.name, self.parent, self.lock)

    def forget(self) -> None:
        """Delete the journal, and what a pass over texts kept, so that nothing here is resumed from."""
        for name in (JOURNAL, STATES, NEW_STATES):
            with writing(self.folder / name), suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.lock)

    # ---- the end -----------------------------------------------------------------------------------------------------------

    def appear(self, target: Path, replace_existing: bool) -> None:
        """Give the finished folder its final name, beside this one, in one step. An existing target lands in this folder."""
        if replace_existing:
            with writing(self.folder / REPLACED):
                self.discard(REPLACED)  # of a run that was killed there
        give_name(Entry(self.lock, OUTPUT, self.output), Entry(self.parent, target.name, target), replace_existing, REPLACED, self.notify)

    def discard(self, name: str, checked: Mapping[str, Which] | None = None) -> None:
        """Delete the folder `name` in this one: the files `checked` (None: what savers write); all else is kept, aloud. Raises OSError."""
        try:
            with opened_folder(name, self.lock) as folder:
                self._delete(folder, checked)
        except FileNotFoundError:
            return
        os.rmdir(name, dir_fd=self.lock)

    def _delete(self, folder: int, checked: Mapping[str, Which] | None, keep: frozenset[str] = frozenset()) -> None:
        foreign, failure = delete_saved(folder, checked, keep)
        self._keep(foreign, folder)
        if failure is not None:
            raise failure

    def _keep(self, names: list[str], folder: int) -> None:
        """Move what is not ours to delete out of the folder of that descriptor, to a new one beside the target."""
        if not names:
            return
        kept = next(kept for kept in free_names(self.target.name, ".kept") if _make(kept, self.parent))
        with opened_folder(kept, self.parent) as new:
            for name in names:
                os.rename(name, name, src_dir_fd=folder, dst_dir_fd=new)
        shown = printable(str(self.target.with_name(kept)))
        what = "not a saved model's, or not there when the folder that was replaced was checked"
        self.notify(f"{some(names, 10)}: {what}; kept in {shown}.")

    def remove(self, checked: Mapping[str, Which] | None = None) -> None:
        """Delete the folder and what is in it; of a replaced one only the files `checked`.

        The journal goes first: what is left after a kill in the middle must not be resumed from.
        """
        self._close_files()
        self._close_journal()
        try:
            self.forget()
            self._discard_parts()
            for name in (OUTPUT, REPLACED):
                self.discard(name, checked)
            for name in os.listdir(self.lock):
                if name in (PROBE, PID) or name.startswith(STILL_OPEN):
                    os.unlink(name, dir_fd=self.lock)
            if self.is_ours():
                os.rmdir(self.folder.name, dir_fd=self.parent)
        except (OSError, OutputError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            self.notify(f"{printable(str(self.folder))} could not be deleted whole ({why}). Nothing uses what is left of it.")

    def _discard_parts(self) -> None:
        """Delete the journals and locks of parts, and their folder. Raises OSError where something else is in it."""
        with suppress(FileNotFoundError), opened_folder(PARTS, self.lock) as folder:
            for name in os.listdir(folder):
                if name.endswith(PART_FILES):
                    os.unlink(name, dir_fd=folder)
            os.rmdir(PARTS, dir_fd=self.lock)

    def close(self) -> None:
        """Give the lock back. A folder without anything worth keeping goes too."""
        self._close_journal()
        with suppress(OSError):
            if self.is_ours() and set(os.listdir(self.lock)) <= {PID, PROBE}:
                self.remove()
        self._close_files()
        os.close(self.lock)
        os.close(self.parent)

    def _close_journal(self) -> None:
        if self.journal is not None:
            with suppress(OSError):  # of a write that failed and was reported
                self.journal.close()

    def _close_files(self) -> None:
        if self.files >= 0:
            os.close(self.files)
            self.files = -1


def free_names(name: str, after: str) -> Iterator[str]:
    """NAME and `after`, then with -2, -3, ... at the end. What stands under one of them may be somebody's."""
    return (beside(name, after=after if n == 1 else f"{after}-{n}") for n in count(1))


def _make(name: str, parent: int) -> bool:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def _lock(parent: int, folder: Path, target: Path, notify: Notify, shared: bool = False) -> int | None:
    """A descriptor of `folder`, made if it was not there, that holds its lock; None when the run that had it removed it meanwhile."""
    shown, made = printable(str(folder)), True
    try:
        os.mkdir(folder.name, 0o700, dir_fd=parent)
    except FileExistsError:
        made = False
    try:
        lock = open_folder(folder.name, parent)
    except FileNotFoundError:
        return None
    except OSError:
        if problem := unlike_own(folder.name, parent, shown):
            raise OutputError(problem) from None
        raise
    try:
        remark = check_own(lock, shown, made)
        take(lock, folder, target, made, shared)
        if not _stands_there(folder.name, parent, lock):
            os.close(lock)
            return None
        check_contents(lock, shown, EXPECTED)
    except BaseException:
        os.close(lock)
        raise
    if remark:
        notify(remark)
    return lock


def _stands_there(name: str, parent: int, folder: int) -> bool:
    try:
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(folder))
