"""What a plan cannot see of models whose headers alone were read, and says: heads that tied ones must equal, and large tokenizer files.

A merge downloads first and plans again, so that all of it is seen before a byte is written.
"""

import hashlib
from collections.abc import Iterator, Sequence

from bam_merge.architectures.tables import head_names
from bam_merge.checkpoints.folder import VOCABULARIES
from bam_merge.errors import CheckpointError
from bam_merge.sources.companions import read_companion
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.tokenizers.reading import GENERATION_CONFIG, TokenizerFindings
from bam_merge.text import listed, some

LATER = "when they are downloaded, before the merge"


def unread_heads(models: Sequence[DenseModel]) -> Iterator[str]:
    """Notes on stored heads that are taken to equal the embeddings, until they can be compared."""
    if any(model.facts["tie_word_embeddings"] for model in models):
        for model in models:
            names = [stored for name in head_names(model.family) if (stored := model.naming.names.get(name)) is not None]
            if names and model.checkpoint.remote is not None:
                yield (
                    f"sources.{model.name}: {some(names)} is stored beside tied embeddings, and taken to equal them, for headers alone "
                    f"were read. They are compared {LATER}."
                )


def by_digests(models: Sequence[DenseModel]) -> TokenizerFindings | None:
    """The sources' tokenizer files by their digests alone, where some were not downloaded; None where all are there to be compared."""
    unread = {name for model in models if model.checkpoint.remote is not None for name in model.checkpoint.remote.unread}
    if not unread:
        return None
    found = TokenizerFindings()
    for name in sorted(unread):
        having = [model for model in models if name in model.checkpoint.companions()]
        digests = {_digest(model, name, _length(models, name)) for model in having}
        if len(digests) > 1:
            found.notes.append(f"{name} is not known to be the same file in all sources; its tokens are compared {LATER}.")
        elif len(having) > 1:
            found.notes.append(f"{name} is the same file in {listed([f'sources.{model.name}' for model in having])}, by its digest.")
    giver = next((model for model in models if not VOCABULARIES.isdisjoint(model.checkpoint.companions())), models[0])
    found.files = dict.fromkeys(giver.checkpoint.companions(), giver.name)
    if giver is not models[0]:  # generation settings stay those of the seed
        found.files.pop(GENERATION_CONFIG, None)
        found.files |= {name: models[0].name for name in models[0].checkpoint.companions() if name == GENERATION_CONFIG}
    lack = [model.name for model in models if VOCABULARIES.isdisjoint(model.checkpoint.companions())]
    if lack:
        found.notes.append(f"{listed([f'sources.{name}' for name in lack])}: no tokenizer.")
    if not found.notes:
        found.notes.append(f"tokenizers are compared {LATER}.")
    return found


def _length(models: Sequence[DenseModel], name: str) -> int:
    """The length of the digests by which a file is compared: of the first that the hub lists."""
    remotes = [model.checkpoint.remote for model in models if model.checkpoint.remote is not None]
    return next(len(remote.unread[name]) for remote in remotes if name in remote.unread)


def _digest(model: DenseModel, name: str, length: int) -> str:
    """The digest of a companion: what the hub lists, or by the same rule what is in the folder."""
    if model.checkpoint.remote is not None and name in model.checkpoint.remote.unread:
        return model.checkpoint.remote.unread[name]
    try:
        data = read_companion(model.checkpoint.path / name)
    except CheckpointError:
        return ""  # which the comparison of the merge names
    if length == 64:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
