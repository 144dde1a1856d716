"""Opening the folder of a model whose architecture may be known here: what its table says that a folder can lack."""

import os
from collections.abc import Mapping
from typing import Any

from bam_merge.architectures.tables import find_by_model_type, head_names
from bam_merge.architectures.wrappers import unwrap
from bam_merge.checkpoints.folder import Checkpoint, open_checkpoint


def open_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """`open_checkpoint` for a model's folder: its index may list a head that no shard holds, where the head is tied."""
    return open_checkpoint(path, tied_heads)


def tied_heads(config: Mapping[str, Any]) -> set[str]:
    """The names of a head that a model of this config.json need not store, since it is the embeddings."""
    inside = unwrap(config)
    table = find_by_model_type(inside.config.get("model_type"), inside.config)
    if table is None:
        return set()
    if inside.wrapper is not None:  # where nothing is said, that no head is stored says it
        return (
            {spelling.rest + name for spelling in inside.wrapper.spellings for name in head_names(table)}
            if inside.ties is not False
            else set()
        )
    if config.get("tie_word_embeddings", table.defaults.get("tie_word_embeddings")) is not True:
        return set()
    return set(head_names(table))
