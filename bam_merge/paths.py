"""Paths as users write them: ~ is a home folder, and what no system can open is refused in words."""

import os
import unicodedata
from pathlib import Path

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.text import printable

NAME_BYTES = 255
"""Bytes of the longest name that common file systems take."""


def located(path: str | os.PathLike[str], folder: Path | None = None, error: type[BamMergeError] = CheckpointError) -> Path:
    """The path that a user wrote, relative to `folder`, with ~ expanded. Raises `error` for what can be no path."""
    text = os.fsdecode(path)
    wrong = path_problem(text)
    if wrong:
        raise error(f"{printable(text) or repr(text)}: {wrong}")
    expanded = Path(os.path.expanduser(text))
    if str(expanded).startswith("~"):  # written ./~: whoever looks again must not take it for a home folder
        expanded = (folder or Path()).absolute() / expanded
    return expanded if folder is None else folder / expanded


def path_problem(text: str) -> str | None:
    """Why no file or folder can be called `text`; None where one can. No look is taken at what is there."""
    if not text:
        return "an empty path; write . for the folder itself."
    if "\0" in text:
        return "holds a NUL, which no path has. Correct the path."
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        return f"holds {printable(text[error.start])}, which the names of this file system cannot. Correct the path."
    first = text.partition("/")[0]
    if first.startswith("~") and os.path.expanduser(first).startswith("~"):
        return f"{printable(first)} is the home folder of nobody here. For a name that begins with ~ write ./{printable(first)}."
    return None


def within(inner: Path, outer: Path) -> bool:
    """Whether the folder `inner` is `outer` or below it, by names as they are spelled on the disk; both without links.

    For file systems that find `Model` under `model` too, and give a folder another identity by every spelling.
    """
    depth = len(outer.parts)
    if _folded(inner)[:depth] != _folded(outer):
        return False
    return _spelled(inner).parts[:depth] == _spelled(outer).parts


def _folded(path: Path) -> list[str]:
    return [unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()) for name in path.parts]


def _spelled(path: Path) -> Path:
    """`path` with every name as its folder lists it, where one alone differs from it in case or Unicode's normal form."""
    found = Path(path.anchor)
    for name in path.parts[1:]:
        try:
            names = os.listdir(found)
        except OSError:  # not there, or not to be listed
            names = [name]
        alike = [other for other in names if _folded(Path(other)) == _folded(Path(name))]
        found /= alike[0] if name not in names and len(alike) == 1 else name
    return found


def beside(name: str, before: str = "", after: str = "") -> str:
    """The name of what stands beside `name`: where that would be longer than file systems take, a digest has the place of its end."""
    whole = f"{before}{name}{after}"
    if len(os.fsencode(whole)) <= NAME_BYTES:
        return whole
    import xxhash  # only here: every command needs paths, and few this

    after = f"~{xxhash.xxh3_64_hexdigest(os.fsencode(name))}{after}"
    while len(os.fsencode(f"{before}{name}{after}")) > NAME_BYTES:
        name = name[:-1]
    return f"{before}{name}{after}"


def relative(path: str, folder: Path) -> str:
    """`path` relative to `folder`, for documents that must not hold absolute paths; read again by `located`, it is the same."""
    way = os.path.relpath(located(path, folder), folder)
    return os.path.join(".", way) if way.startswith("~") else way
