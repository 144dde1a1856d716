"""The journals of parts: which tensors each has finished, of which plan and sources, and whether it is complete.

A journal begins with a line that says what it is of, has a line for each tensor, and ends with one that says that all are on the disk.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge._version import __version__
from bam_merge.errors import OutputError
from bam_merge.merging.tensor import Finished
from bam_merge.own_folder import open_file, read_file
from bam_merge.planning.parts import Part
from bam_merge.planning.plan import Plan
from bam_merge.publishing.journal import begun, read_journal
from bam_merge.text import printable, some

NAME = re.compile(r"(\d{5,})-of-(\d{5,})\.(journal|lock|proof)")

FINISH_LOCK = "finish.lock"
"""What the process holds that makes a result of the parts."""


def file_name(number: int, of: int, kind: str) -> str:
    """The name of a part's journal or lock: in one folder, in order."""
    return f"{number:05d}-of-{of:05d}.{kind}"


def header_of(plan: Plan, part: Part) -> dict[str, Any]:
    """What a part's journal begins with. Sources are known by size, time of change and header, which are the same on every host that has
    their file system; device and inode are not."""
    header: dict[str, Any] = {"fingerprint": plan.fingerprint, "version": __version__, "part": str(part), "sources": _sources(plan)}
    if plan.recipe.known:
        header["hub"] = {text: known.recorded for text, known in plan.recipe.known.items()}
    return header


def _sources(plan: Plan) -> dict[str, Any]:
    return {
        name: {
            "config.json": checkpoint.config_digest,
            **{file: [header.identity.size, header.identity.state, header.digest] for file, header in checkpoint.files.items()},
        }
        for name, checkpoint in plan.checkpoints.items()
    }


@dataclass(frozen=True)
class PartJournal:
    """What the journal of part `number` of `of` says: its first line, the tensors, and the host of a part that is complete."""

    number: int
    of: int
    header: Mapping[str, Any]
    finished: Mapping[str, Finished] = field(default_factory=dict)
    host: str | None = None

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def numbers(folder: int, kind: str) -> list[tuple[int, int]]:
    """(number, of) of the parts of which the folder of that descriptor has a file of that kind: "journal", "lock" or "proof"."""
    found = (NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted((int(match[1]), int(match[2])) for match in found if match and match[3] == kind)


def headers(folder: int) -> Iterator[PartJournal]:
    """What the journals in the folder are of, without their tensors; not one that has not got so far as to say."""
    for number, of in numbers(folder, "journal"):
        try:
            with os.fdopen(open_file(file_name(number, of, "journal"), folder, os.O_RDONLY), "rb") as stream:
                header = begun(stream.readline())
        except FileNotFoundError:  # of a process that begins, and was refused
            continue
        if isinstance(header, dict):
            yield PartJournal(number, of, header)


def read_part(number: int, of: int, folder: int) -> PartJournal | None:
    """A part's journal; None where there is none that says what it is of."""
    data = read_file(file_name(number, of, "journal"), folder)
    header = begun(data)
    if not isinstance(header, dict):
        return None
    finished, size = read_journal(data, header, lambda text: None)
    end = begun(data[size:])
    complete = isinstance(end, dict) and end.get("complete") == len(finished) and isinstance(end.get("host"), str)
    return PartJournal(number, of, header, finished, end["host"] if complete else None)


def check_together(other: PartJournal, header: Mapping[str, Any], part: Part, folder: Path) -> None:
    """Raise OutputError when what another journal of the staging folder is of does not go together with `part`, of `header`."""
    shown = printable(str(folder))
    if other.of != part.of:
        raise OutputError(
            f"{shown} has part {other}, and this is {part}: parts of another number are other files. Use --part i/{other.of}, or with "
            f"--ray --parts {other.of}; or delete that folder, and make all parts again."
        )
    if (why := difference(other.header, header)) is not None:
        raise OutputError(
            f"part {other} in {shown} was made {why}. All parts must be of the same: run this one as that one was run; or delete "
            "that folder, and make all parts again."
        )


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """How what a journal is of differs from what it should be of, in words after "was made"; None where it does not."""
    if found.get("version") != expected["version"]:
        return f"by version {printable(str(found.get('version')), 40)}, and this is {expected['version']}"
    if changes := list(_changes(found.get("sources"), expected["sources"])):
        return f"of other source files: {some(changes)}"
    if found.get("fingerprint") != expected["fingerprint"]:
        return "of another recipe, or what it was made of was read otherwise"
    return None


def _changes(there: Any, here: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Which files of the sources were not the same for another process, and how."""
    for source, files in here.items():
        found = there.get(source) if isinstance(there, dict) else None
        for file in sorted({*files, *(found if isinstance(found, dict) else ())}):
            mine, theirs = files.get(file), found.get(file) if isinstance(found, dict) else None
            if mine != theirs:
                yield f"sources.{source}: {file} {_how(theirs, mine)}"


def _how(theirs: Any, mine: Any) -> str:
    if theirs is None or mine is None:
        return "was not there" if theirs is None else "is not here"
    if isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine) == 3:
        if theirs[0] != mine[0]:
            return f"had {theirs[0]:,} bytes, here {mine[0]:,}"
        if theirs[2] != mine[2]:
            return "had another header"
        return "was changed at another time"
    return "was not the same"
