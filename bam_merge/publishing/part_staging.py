"""The staging folder as the process of one part has it, beside those of other parts: its own files, its own journal, its own lock."""

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_merge import system
from bam_merge.errors import NotYet, OutputError
from bam_merge.files import writing
from bam_merge.merging.tensor import Finished
from bam_merge.own_folder import open_file, open_folder, read_file
from bam_merge.planning.parts import Part
from bam_merge.planning.plan import Plan
from bam_merge.publishing.durable import sync_descriptor
from bam_merge.publishing.holding import Hold, holder_of
from bam_merge.publishing.journal import read_journal
from bam_merge.publishing.part_journals import FINISH_LOCK, PartJournal, check_together, file_name, header_of, headers
from bam_merge.publishing.replacing import Which
from bam_merge.publishing.staging import JOURNAL, OUTPUT, PARTS, Staging
from bam_merge.text import printable


@dataclass
class PartStaging(Staging):
    """The staging folder, shared with those that make other parts. `parts` is the descriptor of the folder of journals and locks."""

    parts: int = -1
    hold: Hold | None = None

    @classmethod
    def join(cls, target: Path, part: Part, notify: Any, patience: float = 0) -> "PartStaging":
        """Make what is missing of the staging folder, and hold the part in it. Raises NotYet when another process does, OutputError when
        the folder is not ours alone, or has an unfinished run of one process."""
        staging = cls.open(target, notify, shared=True, parts=True)
        try:
            with writing(staging.folder / PARTS):
                with suppress(FileExistsError):
                    os.mkdir(PARTS, 0o700, dir_fd=staging.lock)
                staging.parts = open_folder(PARTS, staging.lock)
            what, lock = f"part {part} of {printable(str(target))}", file_name(part.number, part.of, "lock")
            with writing(staging.folder / PARTS / lock):
                staging.hold = Hold.take(lock, staging.parts, staging.folder / PARTS / lock, what, patience)
                finishing = holder_of(FINISH_LOCK, staging.parts)
            if finishing:
                raise NotYet(f"{printable(str(target))} is being finished by {finishing}. There is nothing to do for {what}.")
            if JOURNAL in os.listdir(staging.lock):
                raise OutputError(
                    f"{printable(str(staging.folder))} has an unfinished run of one process. Go on with that, by --resume without --part; "
                    "or delete that folder, and run again."
                )
        except BaseException:
            staging.close()
            raise
        return staging

    @property
    def journal_name(self) -> str:
        assert self.hold is not None
        return self.hold.name.removesuffix("lock") + JOURNAL

    @property
    def journal_path(self) -> Path:
        return self.folder / PARTS / self.journal_name

    def begin_part(self, plan: Plan, part: Part, mine: Plan, allow_nonfinite: bool) -> dict[str, Finished]:
        """Start the part's journal, or go on with it. Returns the tensors that an earlier process finished, whose bytes are there.

        Raises OutputError for parts of another plan, other sources, another version or another number of parts: files of one could take
        the place of another's.
        """
        header = header_of(plan, part)
        with writing(self.journal_path):
            data = read_file(self.journal_name, self.parts)
            journal, kept = read_journal(data, header, self.notify) if data else ({}, 0)
            self.check_others(header, part, headers(self.parts))
            self.journal = os.fdopen(open_file(self.journal_name, self.parts, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
            if not kept:
                os.ftruncate(self.journal.fileno(), 0)
                self._append(header)
            self._sync_journal()
        try:
            self.check_others(header, part, headers(self.parts))  # those that began meanwhile see ours, or we theirs
        except OutputError:
            if not kept:
                os.unlink(self.journal_name, dir_fd=self.parts)
            raise
        with writing(self.output):
            with suppress(FileExistsError):
                os.mkdir(OUTPUT, dir_fd=self.lock)
            sound = self.sound(set(part.files))
            if self.files < 0 or os.fstat(self.files).st_uid != os.fstat(self.lock).st_uid:
                raise OutputError(f"{printable(str(self.output))} is not this user's. Delete {printable(str(self.folder))}, and run again.")
        wanted = {name: item for name, item in journal.items() if allow_nonfinite or not item.nonfinite}
        done = self._trusted(mine, wanted, sound, self.notify)
        with writing(self.journal_path):
            first = len(read_file(self.journal_name, self.parts).partition(b"\n")[0]) + 1
            os.ftruncate(self.journal.fileno(), kept if done else first)
        with writing(self.output):
            self._unlink(set(part.files) - (sound if done else frozenset()))
        return done

    def _unlink(self, names: Iterable[str]) -> None:
        """Delete files of this part in which nothing is trusted: should a process that was taken for dead still write, it is not there."""
        for name in names:
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(name, dir_fd=self.files, follow_symlinks=False).st_mode):
                    raise OutputError(f"{printable(str(self.output / name))} is a folder, expected a file. See what it is, and delete it.")
                os.unlink(name, dir_fd=self.files)

    def check_others(self, header: Mapping[str, Any], part: Part, others: Iterable[PartJournal]) -> None:
        """Raise OutputError when there are parts that do not go together with this one."""
        for other in others:
            if other.of != part.of or other.number != part.number:
                check_together(other, header, part, self.folder)

    def record(self, name: str, finished: Finished) -> None:
        """In the part's journal. What `finish` makes of texts is kept by its own states, and in no part's journal."""
        if self.hold is not None and self.hold.lost:
            self.hold.check()
        if self.journal is not None:
            super().record(name, finished)

    def complete(self, tensors: int) -> None:
        """Say in the journal that all is on the disk: so it must be when this is called."""
        assert self.hold is not None
        self.hold.check()
        self._append({"complete": tensors, "host": system.machine()[0]})
        self._sync_journal()

    def _sync_journal(self) -> None:
        assert self.journal is not None
        sync_descriptor(self.journal.fileno(), self.journal_path)
        sync_descriptor(self.parts, self.folder / PARTS)

    def forget(self) -> None:
        """Delete the part's journal, so that nothing is resumed from it; of a finish, what a pass over texts kept."""
        if self.journal is None:
            super().forget()
            return
        with writing(self.journal_path), suppress(FileNotFoundError):
            os.unlink(self.journal_name, dir_fd=self.parts)

    def keep_only(self, names: Iterable[str]) -> None:
        """Delete from the output folder what is none of these files: what another plan's parts, or a finish that was killed, left."""
        with writing(self.output):
            self._delete(self.files, None, frozenset(names))

    def remove(self, checked: Mapping[str, Which] | None = None) -> None:
        """As for one process. The lock goes first, for a network file system keeps what is deleted while it is open."""
        self._release()
        super().remove(checked)

    def _release(self) -> None:
        hold, self.hold = self.hold, None
        if hold is not None:
            hold.release()

    def close(self) -> None:
        """Let others have the part. The folder stays, with what they made."""
        self._close_journal()
        self._close_files()
        self._release()
        if self.parts >= 0:
            os.close(self.parts)
        os.close(self.lock)
        os.close(self.parent)
