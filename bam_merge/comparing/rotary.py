"""Models that turn other rotary pairs, compared in one order: rows of q and k of the same function stand otherwise in them."""

from collections.abc import Sequence
from dataclasses import replace

from bam_merge.checkpoints.pieces import Leaf
from bam_merge.comparing.sides import Place, Side
from bam_merge.sources.pairs import TURNED, row_order

SAYS = "rope_interleaved"


def in_one_order(sides: Sequence[Side]) -> tuple[Side, ...]:
    """All of them in the order of the first one's pairs, where both say what theirs is, and rows of heads can be told."""
    first, *others = sides
    return first, *(_as_first(first, side) for side in others)


def _as_first(first: Side, side: Side) -> Side:
    facts, wanted = side.anatomy.facts, first.anatomy.facts.get(SAYS)
    if wanted is None or facts.get(SAYS) in (None, wanted) or side.anatomy.quantised or first.anatomy.quantised:
        return side
    put: dict[Place, Leaf] = {}
    for (role, layer, expert), leaf in side.leaves.items():
        if role in TURNED:
            turned = row_order(leaf, (role, layer), facts, to_halves=not wanted)
            if not isinstance(turned, Leaf):
                return side
            put[role, layer, expert] = turned
    return replace(side, leaves={**side.leaves, **put}, turned=True) if put else side
