"""What of a config.json a model can be computed with, beside its rotary embedding: found in the plan, before anything is written."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bam_merge.architectures.rotary import rotary_problems
from bam_merge.architectures.vocabulary import LINEAR
from bam_merge.text import printable

ACTIVATION_NAMES = (
    "silu", "swish", "relu", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_tanh", "gelu_python_tanh",
    "relu2",
)  # fmt: skip
"""The values of `hidden_act` that the reference model knows."""


LAYER_TYPES = ("full_attention", "sliding_attention")


def uncomputable(facts: Mapping[str, Any]) -> Iterator[str]:
    """A message for everything in a model's `facts` that is well-formed and cannot be run, each naming its key."""
    problems: list[str] = []
    for kind, rope in (("full_attention", facts["rope_parameters"]), ("sliding_attention", facts.get("sliding_rope_parameters"))):
        size = (facts.get("sizes_by_kind") or {}).get(kind, {}).get("head_dim", facts["head_dim"])
        problems += rotary_problems(rope or facts["rope_parameters"], size, facts["max_position_embeddings"])
    yield from dict.fromkeys(problems)
    act = facts["hidden_act"]
    if act not in ACTIVATION_NAMES:
        yield f"config.json: hidden_act {printable(repr(act), 60)} is not known here. Known: {', '.join(ACTIVATION_NAMES)}."
    known = (*LAYER_TYPES, LINEAR) if facts.get("linear_num_value_heads") else LAYER_TYPES
    for kind in dict.fromkeys(facts.get("layer_types") or ()):
        if kind not in known:
            yield f"config.json: layer_types names {printable(repr(kind), 60)}, which is not known here. Known: {', '.join(known)}."
    if facts.get("layer_types") and set(facts["layer_types"]) == {LINEAR}:
        yield "config.json: layer_types has no layer with attention; transformers counts a text's tokens by those, and caches none of it."
    scales = ("logit_scale", "attention_scale", "embedding_scale", "residual_scale")
    for key, least in (("rms_norm_eps", 0.0), ("layer_norm_eps", 0.0), *((key, -math.inf) for key in scales)):
        value = facts.get(key)
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
            yield f"config.json: {key} must be {'0 or more' if least == 0 else 'finite'}, found {value}."
    for key in ("attention_softcap", "logit_softcap", "attention_clip"):
        value = facts.get(key)
        if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
            yield f"config.json: {key} must be finite and above 0, found {value}."
