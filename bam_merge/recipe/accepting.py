"""What a recipe may accept of sources that differ: single config keys, single facts, heads beside tied embeddings; each by its name.

Accepted is what a reader of the result has to know. So nothing is accepted by a pattern or all together, and never what sizes follow from.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from bam_merge.architectures.config import ROPE_KEYS
from bam_merge.documents import Path as DocumentPath
from bam_merge.recipe.makes import Names, Strict
from bam_merge.text import nearest, printable


class Accept(Strict):
    """What is refused otherwise."""

    config: Names | None = Field(default=None, description="config.json keys that no table knows and in which the sources differ")
    facts: Annotated[dict[str, str], Field(min_length=1)] | None = Field(
        default=None, description="known facts in which the sources differ a little, each with the source whose value counts for all"
    )
    head: Literal["stored", "tied"] | None = Field(
        default=None,
        description="a stored head that differs from the embeddings although config.json ties them: stored, it counts, and the result is "
        "untied; tied, it is dropped",
    )


@dataclass(frozen=True)
class Acceptable:
    """`keys` of a config.json say the fact: they are taken together, from one source. `parts` are facts that are a part of it."""

    keys: tuple[str, ...]
    parts: tuple[str, ...] = ()


WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


ACCEPTABLE: Mapping[str, Acceptable] = {
    "rms_norm_eps": Acceptable(("rms_norm_eps",)),
    "layer_norm_eps": Acceptable(("layer_norm_eps",)),
    "logit_scale": Acceptable(("logit_scale",)),
    "rope_parameters": Acceptable((*ROPE_KEYS, "max_position_embeddings"), ("rope_type", "max_position_embeddings")),
    "sliding_window": Acceptable(WINDOWS, ("sliding",)),
}
"""Facts that weights can be used with at another value than that they were trained at: a number that each layer computes with, or how far
it looks. (Where the rotary embedding depends on the longest text, that goes with it.)"""


_SIZE = "it is a size: tensors of two sizes cannot be merged, and heads of two sizes are other heads"


_TENSORS = "it decides which tensors there are: what one source has and another lacks cannot be made up"


NEVER: Mapping[str, str] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), f"{_SIZE}, though the tensors may have one shape"),
    **dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias", "use_qk_norm", "qk_norm", "norm_type", "norm_bias"), _TENSORS),
    **dict.fromkeys(("qk_layernorm", "qk_norm_bias"), _TENSORS),
    "vocab_size": "rows of the embeddings are tokens: two vocabularies are aligned token by token, never by their number",
    "tie_word_embeddings": "whether a head is the embeddings is seen in the tensors; write accept: {head: stored} or {head: tied}",
    "hidden_act": "weights that were trained with one activation compute something else with another, in every layer",
    "use_parallel_residual": "it is how a block is wired: no weights of one wiring work in the other",
    "model_type": "experts must be branches of one architecture",
}
"""Why a fact is never accepted, for those that anyone may ask for."""


def accept_problems(accept: Accept | None, sources: Collection[str]) -> Iterator[tuple[DocumentPath, str]]:
    """(path, message) of what the recipe alone shows to be wrong in what it accepts."""
    if accept is None:
        return
    for index, key in enumerate(accept.config or ()):
        known = _fact_of(key)
        if known is not None:
            yield (
                ("accept", "config", index),
                f"{printable(key)} is a known fact; write accept: {{facts: {{{known}: SOURCE}}}}, whose value counts.",
            )
        elif key in NEVER:
            yield ("accept", "config", index), f"{printable(key)} is never accepted: {NEVER[key]}."
        elif key in (accept.config or ())[:index]:
            yield ("accept", "config", index), f"{printable(key)} stands twice. Remove one."
    for fact, source in (accept.facts or {}).items():
        path: DocumentPath = ("accept", "facts", fact)
        if fact not in ACCEPTABLE:
            yield path, _not_acceptable(fact)
        if source not in sources:
            yield path, f"{printable(source)!r} is not among the sources{nearest(source, sources)}"


def _fact_of(key: str) -> str | None:
    """The acceptable fact that a config key says."""
    return next((fact for fact, what in ACCEPTABLE.items() if key in (*what.keys, *what.parts)), None)


def _not_acceptable(fact: str) -> str:
    whole = _fact_of(fact)
    if whole is not None:
        return f"is a part of {whole}, which counts as one whole. Write {whole}."
    if fact in NEVER:
        return f"is never accepted: {NEVER[fact]}."
    close = nearest(fact, ACCEPTABLE)
    return f"is no fact that can be accepted{close or '.'} Known: {', '.join(ACCEPTABLE)}. (Keys that no table knows stand under config.)"
