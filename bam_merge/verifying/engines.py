"""Will engines beside transformers compute what the folder says? From the folder alone, by what its layout's table knows of them."""

from collections.abc import Iterator

from bam_merge.architectures.config import facts_of
from bam_merge.architectures.tables import Row, find_by_model_type
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.reading import blocks
from bam_merge.text import some
from bam_merge.verifying.report import Check

WAY_OUT = "transformers computes the model as it should. An older bam-merge wrote it so: merge again"


PIECE = 2**20
"""Bytes of a tensor that are read at a time."""


def engines(checkpoint: Checkpoint) -> Iterator[Check]:
    """Every tensor without which an engine computes something else is there, and none has zeros that it cannot compute with.

    Nothing is yielded for a layout of which no such tensor is known, or where config.json does not describe a model.
    """
    layout = find_by_model_type(checkpoint.config.get("model_type"), checkpoint.config)
    needed = [row for row in layout.rows if row.without] if layout else []
    facts = facts_of(layout, checkpoint.config, []) if layout and needed else {}
    if not facts:
        return
    faults: dict[str, list[str]] = {}
    for row in needed:
        for layer in range(facts["num_hidden_layers"]) if row.per_layer else (None,):
            fault = _fault(checkpoint, row, row.name(layer))
            if fault:
                faults.setdefault(f"{fault}: {row.without}", []).append(row.name(layer))
    detail = "; ".join(f"{some(names)} {fault}" for fault, names in faults.items())
    yield Check("engines", not faults, f"{detail}. {WAY_OUT}" if faults else f"{len(needed)} roles that engines need are there")


def _fault(checkpoint: Checkpoint, row: Row, name: str) -> str | None:
    entry = checkpoint.tensors.get(name)
    if entry is None:
        return "missing"
    return "all zeros" if row.make == "ones" and _all_zeros(checkpoint, entry) else None


def _all_zeros(checkpoint: Checkpoint, entry: TensorEntry) -> bool:
    """Whether every byte of a stored tensor, of whatever dtype and shape, is zero."""
    return not any(map(any, blocks(checkpoint, entry, memoryview(bytearray(min(entry.nbytes, PIECE))))))
