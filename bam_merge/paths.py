"""Paths as users write them: ~ is a home folder, and what no system can open is refused in words."""

import os
from pathlib import Path

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.text import printable


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


def relative(path: str, folder: Path) -> str:
    """`path` relative to `folder`, for documents that must not hold absolute paths; read again by `located`, it is the same."""
    way = os.path.relpath(located(path, folder), folder)
    return os.path.join(".", way) if way.startswith("~") else way
