"""Rotary pairs of a layout: its sources' rows of queries and keys are put in the order that it turns them in (sources/pairs.py)."""

from collections.abc import Mapping
from dataclasses import replace

from bam_merge.architectures.tables import Architecture
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.pairs import in_order, order_words


def in_order_of(layout: Architecture, models: Mapping[str, DenseModel]) -> dict[str, DenseModel]:
    """The sources as the layout turns them; as they are, where it turns both ways, or their rows cannot be put in its order."""
    wanted = layout.accepts.get("rope_interleaved")
    if layout.kind != "mixture" or not isinstance(wanted, bool):
        return dict(models)
    put = {name: _put(model, to_halves=not wanted) for name, model in models.items() if model.facts["rope_interleaved"] != wanted}
    return {**models, **put}


def order_note(layout: Architecture, before: DenseModel, after: DenseModel) -> list[str]:
    """What a plan says of it."""
    if before.facts["rope_interleaved"] == after.facts["rope_interleaved"]:
        return []
    theirs, own = (order_words(model.facts["rope_interleaved"]) for model in (before, after))
    return [
        f"output.layout: {layout.name} turns {own} together (rotary embedding), {before.family.name} {theirs}: the rows of q and k are put "
        "in its order in each head, bit for bit; what the model computes stays."
    ]


def _put(model: DenseModel, to_halves: bool) -> DenseModel:
    """The model with its rows in the other order, and facts that say so; as it is, where a tensor has no such rows."""
    tensors = in_order(model.tensors, model.facts, to_halves)
    return model if tensors is None else replace(model, tensors=tensors, facts={**model.facts, "rope_interleaved": not to_halves})
