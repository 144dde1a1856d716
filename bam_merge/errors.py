"""The errors a user can cause.

Everything wrong with an input is found in one go, so an error carries *all* problems, one message each. A message
names the file, tensor or recipe key, what was found, what was expected, and the way out. The command line prints them
and exits with status 2; any other exception is a bug of ours.
"""


class BamMergeError(Exception):
    """Base of every error a user can cause. `problems` holds one message each, in the order found."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RecipeError(BamMergeError):
    """The recipe is malformed, or asks for what these sources or this layout cannot give."""


class ForeignRecipe(RecipeError):
    """The recipe is another program's. `instead` is an equivalent one of ours; None where there is none."""

    def __init__(self, *problems: str, instead: str | None = None) -> None:
        super().__init__(*problems)
        self.instead = instead


class CheckpointError(BamMergeError):
    """A source folder is damaged, incomplete, unsupported, or disagrees with another source."""


class OutputError(BamMergeError):
    """The output cannot be written: it exists, is being written by another run, or there is no space or permission."""


class SyncFailed(OutputError):
    """The system could not bring to the disk what was written. Memory may show what the disk does not have, so none of it is trusted."""


class DurabilityUncertain(OutputError):
    """The result is published and complete, but the system could not say that it would survive a power cut."""


class Busy(OutputError):
    """Another run in one process writes there."""


class NotYet(OutputError):
    """Nothing is wrong with the input: another process is at work there, or parts that others make are not there yet."""


class NonFiniteError(BamMergeError):
    """A merge produced NaN or infinity."""


class VerifyError(BamMergeError):
    """A folder cannot be verified at all. (A check that fails is an answer, not an error.)"""


class VerificationFailed(BamMergeError):
    """A merge's own result did not pass its verification; `problems` are the failed checks."""
