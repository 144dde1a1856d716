"""The errors a user can cause.

Everything wrong with an input is found in one go, so an error carries *all* problems, one message each. A message
names the file, tensor or recipe key, what was found, what was expected, and the way out. The command line prints them
and exits with status 2; any other exception is a bug of ours.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class BamMergeError(Exception):
    """Base of every error a user can cause. `problems` holds one message each, in the order found."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RecipeError(BamMergeError):
    """The recipe is malformed, or asks for what these sources or this layout cannot give."""


class CheckpointError(BamMergeError):
    """A source folder is damaged, incomplete, unsupported, or disagrees with another source."""


class OutputError(BamMergeError):
    """The output cannot be written: it exists, is being written by another run, or there is no space or permission."""


class SyncFailed(OutputError):
    """The system could not bring to the disk what was written. Memory may show what the disk does not have, so none of it is trusted."""


class DurabilityUncertain(OutputError):
    """The result is published and complete, but the system could not say that it would survive a power cut."""


class NonFiniteError(BamMergeError):
    """A merge produced NaN or infinity."""


class VerifyError(BamMergeError):
    """A folder cannot be verified at all. (A check that fails is an answer, not an error.)"""


class VerificationFailed(BamMergeError):
    """A merge's own result did not pass its verification; `problems` are the failed checks."""


_REMEDIES = {
    errno.ENOSPC: " Free some space, then run again with --resume.",
    errno.EDQUOT: " Free some of your quota, then run again with --resume.",
    errno.EFBIG: " The file size limit (ulimit -f) is too small; raise it, or set a smaller output.max_shard_size.",
}


@contextmanager
def writing(path: Path, kind: type[OutputError] = OutputError) -> Iterator[None]:
    """Turns what the system refuses while `path` is written into an OutputError of that kind, with its name and the way out."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise kind(f"{printable(str(path))}: {error.strerror}.{remedy}") from error


def printable(text: str, limit: int = 200) -> str:
    """`text` made safe for a terminal and a log: control and format characters escaped, very long names cut."""
    if len(text) <= limit and text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(text) <= limit else shown[:limit] + f"... ({len(text)} characters)"


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names and how many more there are: 'a, b, c and 7 more'."""
    items = list(names)
    text = ", ".join(printable(name) or "''" for name in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def nearest(word: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' when a valid name is close to `word`, and '' otherwise."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
