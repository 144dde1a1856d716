"""Hostile staging folders: what another user may have put there before a run, and whom it is aimed at."""

import os
import random
import shutil
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from damage import deadline

from bam_merge.errors import BamMergeError
from bam_merge.planning.plan import Plan
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.publish import publish
from bam_merge.publishing.staging import Staging


@dataclass
class Victim:
    """A folder of ours that no run may touch: what links are aimed at."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Victim":
        (folder / "inside").mkdir(parents=True)
        (folder / "file").write_text("years of work")
        (folder / "inside" / "config.json").write_text('{"model_type": "llama"}')
        (folder / "inside" / "model.safetensors").write_bytes(b"weights")
        return cls(folder)

    def state(self) -> list[tuple[str, int, int, bytes]]:
        """Name, mode, modification time and bytes of everything."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            status = path.lstat()
            data = path.read_bytes() if path.is_file() else b""
            found.append((str(path), status.st_mode, status.st_mtime_ns, data))
        return found


def clear(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _file_link(place: Path, victim: Victim) -> None:
    place.symlink_to(victim.folder / "file")


def _folder_link(place: Path, victim: Victim) -> None:
    place.symlink_to(victim.folder / "inside")


def _weights_link(place: Path, victim: Victim) -> None:
    place.symlink_to(victim.folder / "inside" / "model.safetensors")


def _dangling_link(place: Path, victim: Victim) -> None:
    place.symlink_to(victim.folder / "made-by-the-run")


def _loop(place: Path, victim: Victim) -> None:
    place.symlink_to(place.name)


def _hard_link(place: Path, victim: Victim) -> None:
    os.link(victim.folder / "file", place)


def _fifo(place: Path, victim: Victim) -> None:
    os.mkfifo(place)


def _socket(place: Path, victim: Victim) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # the name of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    finally:
        os.chdir(here)


def _folder(place: Path, victim: Victim) -> None:
    place.mkdir()
    (place / "thesis.tex").write_text("years")


def _file(place: Path, victim: Victim) -> None:
    place.write_bytes(b"\x00\xff not what is expected\n" * 3)


def _empty_file(place: Path, victim: Victim) -> None:
    place.touch()


KINDS: dict[str, Callable[[Path, Victim], None]] = {
    "link to a file": _file_link, "link to a folder": _folder_link, "link to weights": _weights_link, "dangling link": _dangling_link,
    "link to itself": _loop, "hard link": _hard_link, "FIFO": _fifo, "socket": _socket, "folder": _folder, "file": _file,
    "empty file": _empty_file,
}  # fmt: skip
"""What may stand in an entry's place."""

PLACES = (
    "", "pid", "journal", "output", "replaced", "probe", "output/model.safetensors", "output/model-00001-of-00004.safetensors",
    "output/config.json", "output/bam_merge.json", "output/tokenizer.json", "output/additional_chat_templates", "stranger",
)  # fmt: skip
"""Where, in the staging folder; the first is the folder itself."""

MODES = (0o700, 0o755, 0o770, 0o777, 0o1777)


def plant(staging: Path, place: str, kind: str, victim: Victim) -> None:
    """Put an entry of that kind at `place` in `staging`, for whatever is there; folders on the way are made."""
    where = staging / place if place else staging
    if staging.is_symlink() or not staging.is_dir():
        clear(staging)
        staging.mkdir(mode=0o700)
        staging.chmod(0o700)
    if place and (where.parent.is_symlink() or not where.parent.is_dir()):
        clear(where.parent)
        where.parent.mkdir()
    clear(where)
    KINDS[kind](where, victim)


def plant_any(staging: Path, victim: Victim, chance: random.Random) -> None:
    """Up to three entries of any kind at any place, a damaged journal, any mode: over what is there already."""
    for _ in range(chance.randint(0, 3)):
        plant(staging, chance.choice(PLACES if chance.random() < 0.1 else PLACES[1:]), chance.choice(list(KINDS)), victim)
    if not staging.is_dir() or staging.is_symlink():
        return
    journal = staging / "journal"
    if chance.random() < 0.3 and (journal.is_symlink() or not journal.is_dir()):
        data = bytearray((journal.is_file() and not journal.is_symlink() and journal.read_bytes()) or b"x")
        data[chance.randrange(len(data)) :] = chance.randbytes(chance.randint(0, 40))
        clear(journal)
        journal.write_bytes(data)
    staging.chmod(chance.choice(MODES if chance.random() < 0.3 else MODES[:2]))


def begun(plan: Plan, target: Path, victim: Victim, resume: bool) -> str:
    """As `attacked`, but the run gets only as far as its first tensor: a thousandth of a second. Returns what the refusal said."""
    before = victim.state()
    said = ""
    with deadline():
        try:
            staging = Staging.open(target)
            try:
                done = staging.begin(plan, resume, False, lambda text: None)
                there = {name: os.stat(name, dir_fd=staging.files, follow_symlinks=False) for name in os.listdir(staging.files)}
                finished = {step.file for step in plan.steps if step.name in done}
                assert finished <= there.keys() <= {shard.file for shard in plan.shards}, "something was let into the result"
                assert all(stat.S_ISREG(status.st_mode) and status.st_nlink == 1 for status in there.values())
                assert os.fstat(staging.lock).st_mode & 0o077 == 0
            finally:
                staging.close()
        except BamMergeError as error:
            said = str(error)
            assert str(target.parent) in said, "refused without its name"
    assert victim.state() == before, "what is not the run's was touched"
    return said


def attacked(plan: Plan, target: Path, victim: Victim, expected: dict[str, bytes], resume: bool, force: bool = False) -> str:
    """Run into what was planted: refused in words, or exactly the right result; the victim as it was. Returns what the refusal said."""
    before = victim.state()
    said = ""
    with deadline():
        try:
            publish(plan, target, MergeOptions(workers=1, resume=resume, force=force, verify=False))
        except BamMergeError as error:
            said = str(error)
            assert said.strip(), "refused without a word"
            assert not target.exists(), f"refused, and published: {said}"
        else:
            made = {path.name: path.read_bytes() for path in target.iterdir()}
            assert made == expected, f"other bytes than without an attack: {sorted(made.keys() ^ expected.keys())}"
            assert not any(path.is_symlink() for path in target.iterdir())
    assert victim.state() == before, "what is not the run's was touched"
    return said
