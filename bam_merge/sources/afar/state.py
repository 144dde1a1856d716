"""A file elsewhere as it was found, and how it is not."""

from dataclasses import dataclass, field

from bam_merge.checkpoints.header import FileIdentity
from bam_merge.errors import CheckpointError


class Absent(CheckpointError):
    """There is no such file."""


class Hidden(CheckpointError):
    """There may be no such file, or one that nobody here may read: a store that may not be listed says the same of both."""


@dataclass(frozen=True)
class Found:
    """A file by its name in its folder, and its state; with its `first` bytes, where they came with it. `ranges`: some of its bytes can be
    asked for alone, as far as is known."""

    file: str
    size: int
    etag: str
    first: bytes = field(default=b"", repr=False, compare=False)
    ranges: bool = field(default=True, compare=False)

    @property
    def identity(self) -> FileIdentity:
        return FileIdentity(self.size, 0, 0, self.etag)
