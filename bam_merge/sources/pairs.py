"""Rotary pairs: where a layout turns halves of a head and its sources neighbours, or the other way, their rows are put in its order; and
those of an expert, in its family's again.

A rotary embedding turns channels of a head two by two: neighbours, 2p and 2p + 1, or p and p + half. A model of the one kind is a model of
the other with the rows of its queries and keys in another order, in each head alike: scores are sums over channels, whose order they do
not tell. Nothing is computed, so that it is exact in every dtype.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bam_merge.architectures.tables import at_layer
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Computed, Joined, Read, Slice, Whole
from bam_merge.expressions import Concat, Expr
from bam_merge.formulas import Pairs
from bam_merge.sources.dense import Site

TURNED = tuple(f"attn.{part}{suffix}" for part in ("q", "k", "q_norm", "k_norm") for suffix in ("", ".bias"))
"""Roles of tensors whose rows are channels of queries or keys."""


def in_order(tensors: Mapping[Site, Expr], facts: Mapping[str, Any], to_halves: bool) -> dict[Site, Expr] | None:
    """A model's tensors with its rows in the other order: halves of a head together, or else neighbours; None where a tensor has no such
    rows. `facts` say what its heads are."""
    put = {
        (role, layer): row_order(expr, (role, layer), facts, to_halves) if role in TURNED else expr
        for (role, layer), expr in tensors.items()
    }
    found = {site: expr for site, expr in put.items() if expr is not None}
    return found if len(found) == len(put) else None


def row_order(expr: Expr | Joined, site: Site, facts: Mapping[str, Any], to_halves: bool) -> Expr | None:
    """What stands at a site of TURNED with its rows in the other order; None where they are no whole rows of heads."""
    (role, layer), own = site, at_layer(facts, site[1])
    if isinstance(expr, Joined) or (role.partition(".")[2] in ("q_norm", "k_norm") and len(expr.shape) > 1):
        return None
    turning = int(own["head_dim"] * _rope(own, layer)["partial_rotary_factor"])
    return _in_pairs(expr, own["head_dim"], turning, to_halves)


def order_words(interleaved: bool) -> str:
    """What turns together."""
    return "neighbouring channels" if interleaved else "the halves of a head"


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
    back = Pairs(head, turning, not to_halves, block, first, rows)
    if isinstance(of, Computed) and of.formula == back:  # there and back again
        put: Whole = of.inputs[0]
    else:
        put = Computed(of.source, of.tensor, replace(back, to_halves=to_halves), (of,), of.dtype, of.shape)
    return replace(expr, of=put) if isinstance(expr, Slice) else put
