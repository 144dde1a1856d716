"""A model of the hub whose weights are read where they are, by ranges, at its commit: nothing of them is kept on this machine."""

from dataclasses import dataclass, replace

from bam_merge.checkpoints.file_afar import FileAfar
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.sources.hub.cache import HubFile, Snapshot
from bam_merge.sources.hub.client import Hub, hub
from bam_merge.sources.hub.headers import open_headers


@dataclass(frozen=True)
class HubWeights:
    """A file of weights at a commit, whose content never changes: who sends another is refused by the digest that the hub lists."""

    connection: Hub
    snapshot: Snapshot
    file: HubFile

    @property
    def name(self) -> str:
        return f"{self.snapshot.id}/{self.file.name}"

    @property
    def size_found(self) -> int:
        return self.file.size

    def size(self) -> int:
        return self.file.size

    def etag(self) -> str:
        return self.file.digest

    def read(self, offset: int, length: int) -> bytes:
        if not length:
            return b""
        return self.connection.span(self.snapshot.id, self.file.name, offset, length, self.file.size, self.file.digest)


def open_ranged(snapshot: Snapshot) -> Checkpoint:
    """The checkpoint of a model of the hub, its small files downloaded, and its tensors to be read by ranges. Raises CheckpointError."""
    checkpoint, connection, listed = open_headers(snapshot, tokenizers=True), hub(), snapshot.files
    assert listed is not None
    files = {
        name: replace(header, identity=replace(header.identity, etag=listed[name].digest)) for name, header in checkpoint.files.items()
    }
    afar: dict[str, FileAfar] = {name: HubWeights(connection, snapshot, listed[name]) for name in files}
    return replace(checkpoint, files=files, remote=None, afar=afar)
