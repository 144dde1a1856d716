"""A file elsewhere: the calls by which everything that reads of it reaches it."""

from typing import Protocol


class FileAfar(Protocol):
    """A file elsewhere, in the state that it had when it was found. All three raise CheckpointError where there is no answer."""

    @property
    def name(self) -> str:
        """What it is called in messages and records: without user, password, query or signature."""

    @property
    def size_found(self) -> int:
        """Its bytes when it was found."""

    def size(self) -> int:
        """Its bytes, as they are now."""

    def etag(self) -> str:
        """What tells its state now from any other: an etag, a version, a digest. "" where there is nothing of the kind."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset` on, of the state that was found: those of another one are an error."""
