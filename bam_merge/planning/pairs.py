"""Rotary pairs: where a layout turns halves of a head and its sources neighbours, or the other way, their rows are put in its order.

A rotary embedding turns channels of a head two by two: neighbours, 2p and 2p + 1, or p and p + half. A model of the one kind is a model of
the other with the rows of its queries and keys in another order, in each head alike: scores are sums over channels, whose order they do
not tell. Nothing is computed, so that it is exact in every dtype.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bam_merge.architectures.tables import Architecture, at_layer
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Computed, Read, Slice, Whole
from bam_merge.expressions import Concat, Expr
from bam_merge.formulas import Pairs
from bam_merge.sources.dense import DenseModel

TURNED = tuple(f"attn.{part}{suffix}" for part in ("q", "k", "q_norm", "k_norm") for suffix in ("", ".bias"))
"""Roles of tensors whose rows are channels of queries or keys."""


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
    kinds = ["neighbouring channels", "the halves of a head"]
    theirs, own = kinds if before.facts["rope_interleaved"] else kinds[::-1]
    return [
        f"output.layout: {layout.name} turns {own} together (rotary embedding), {before.family.name} {theirs}: the rows of q and k are put "
        "in its order in each head, bit for bit; what the model computes stays."
    ]


def _put(model: DenseModel, to_halves: bool) -> DenseModel:
    """The model with its rows in the other order, and facts that say so; as it is, where a tensor has no such rows."""
    tensors = dict(model.tensors)
    for (role, layer), expr in model.tensors.items():
        if role in TURNED:
            facts = at_layer(model.facts, layer)
            turning = int(facts["head_dim"] * _rope(facts, layer)["partial_rotary_factor"])
            put = _in_pairs(expr, facts["head_dim"], turning, to_halves)
            if put is None or (role.partition(".")[2] in ("q_norm", "k_norm") and len(expr.shape) > 1):
                return model
            tensors[role, layer] = put
    return replace(model, tensors=tensors, facts={**model.facts, "rope_interleaved": not to_halves})


def _rope(facts: Mapping[str, Any], layer: int | None) -> Mapping[str, Any]:
    """The rotary embedding of a layer."""
    sliding, types = facts.get("sliding_rope_parameters"), facts.get("layer_types")
    slides = layer is not None and types and types[layer] == "sliding_attention"
    found: Mapping[str, Any] = sliding if sliding and slides else facts["rope_parameters"]
    return found


def _in_pairs(expr: Expr, head: int, turning: int, to_halves: bool) -> Expr | None:
    """`expr` with the rows of its heads in the other order; None where they are no whole rows of whole heads."""
    if isinstance(expr, Concat):
        parts = [_in_pairs(part, head, turning, to_halves) for part in expr.parts]
        there = tuple(part for part in parts if part is not None)
        return replace(expr, parts=there) if expr.groups == 1 and len(there) == len(parts) else None
    if not isinstance(expr, Read | Computed | Slice) or DTYPE_BITS[expr.dtype] < 8 or expr.dtype == "BOOL" or turning % 2 or turning > head:
        return None
    of, first, rows = (expr.of, expr.start, expr.rows) if isinstance(expr, Slice) else (expr, 0, expr.shape[0])
    if rows % head:
        return None
    block = of.shape[0] // (expr.groups if isinstance(expr, Slice) else 1)
    put: Whole = Computed(of.source, of.tensor, Pairs(head, turning, to_halves, block, first, rows), (of,), of.dtype, of.shape)
    return replace(expr, of=put) if isinstance(expr, Slice) else put
