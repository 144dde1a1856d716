"""The gates of FFN experts where a recipe says nothing of them, and what a plan says of gates under which a router learns little."""

from collections.abc import Iterator, Mapping
from typing import Any

from bam_merge.recipe.schema import Ffn, Recipe


def with_gates(recipe: Recipe, facts: Mapping[str, Any]) -> Recipe:
    """`recipe` with the gates that suit sources with these facts, where it leaves them open.

    A norm after the FFN takes away whatever its input is multiplied with: N(p y) = N(y). One gate has then no effect, and its router
    no gradient; of two it is their ratio that counts. So such a mixture has two experts per token, whose gates sum to one.
    """
    ffn = recipe.ffn or Ffn()
    if recipe.method == "merge" or not facts.get("post_norms") or ffn.top_k == 1:
        return recipe
    settled = {"top_k": ffn.top_k or 2 * recipe.shards, "gate": ffn.gate or "topk_then_softmax"}
    return recipe.model_copy(update={"ffn": ffn.model_copy(update=settled)})


def gating_notes(recipe: Recipe, facts: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says of the gates of a mixture."""
    top_k, renormalised = recipe.gates
    if top_k == 1 and renormalised:
        yield "ffn: top_k 1 with renormalised gates: the gate is always 1, so the router gets no gradient from the language-model loss."
    if not facts.get("post_norms"):
        return
    if top_k == 1 and not renormalised:
        yield (
            "ffn: top_k 1: a norm stands after the FFN and takes its gate away, so the router gets almost no gradient from the "
            "language-model loss. Leave top_k and gate out, or use top_k: 2 with gate: topk_then_softmax."
        )
    elif recipe.method == "bam" and (top_k, renormalised) == (2, True):
        yield (
            "ffn: 2 experts per token, whose gates sum to one: a norm stands after the FFN and takes away what gates sum to, so with "
            "1 expert, bam's default elsewhere, the router would get almost no gradient from the language-model loss."
        )
    if (recipe.ffn or Ffn()).gate_scale != 1:
        yield "ffn.gate_scale: a norm stands after the FFN and takes it away. Leave it at 1."
