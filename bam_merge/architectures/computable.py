"""What of a config.json the reference model, and transformers, can compute with: found in the plan, before anything is written."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from bam_merge.text import printable

ROPE_TYPES = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "longrope": ("short_factor", "long_factor"),
}  # fmt: skip
"""The values of `rope_type` in a config.json's `rope_parameters`, and the further keys that each needs."""


POSITIVE = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
)  # fmt: skip
"""Keys of `rope_parameters` that must be above 0 where they stand: they are divided by, or their logarithm is taken."""


ACTIVATION_NAMES = ("silu", "swish", "relu", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_tanh")
"""The values of `hidden_act` that the reference model knows."""


LAYER_TYPES = ("full_attention", "sliding_attention")


def uncomputable(facts: Mapping[str, Any]) -> Iterator[str]:
    """A message for everything in a model's `facts` that is well-formed and cannot be run."""
    yield from _rotary(facts["rope_parameters"], facts["head_dim"], facts["max_position_embeddings"])
    act = facts["hidden_act"]
    if act not in ACTIVATION_NAMES:
        yield f"config.json: hidden_act {printable(repr(act), 60)} is not known here. Known: {', '.join(ACTIVATION_NAMES)}."
    for kind in dict.fromkeys(facts.get("layer_types") or ()):
        if kind not in LAYER_TYPES:
            yield f"config.json: layer_types names {printable(repr(kind), 60)}, which is not known here. Known: {', '.join(LAYER_TYPES)}."
    for key in ("rms_norm_eps", "layer_norm_eps"):
        eps = facts.get(key)
        if _is_number(eps) and not 0 <= eps < math.inf:
            yield f"config.json: {key} must be 0 or more, found {eps}."
    scale = facts.get("logit_scale")
    if _is_number(scale) and not math.isfinite(scale):
        yield f"config.json: logit_scale must be finite, found {scale}."


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _rotary(parameters: Mapping[str, Any], head_dim: int, limit: int | None) -> Iterator[str]:
    """What is wrong with `rope_parameters`: unknown, missing or mistyped first, then values that no formula is defined for."""
    rope = {"partial_rotary_factor": 1.0, **parameters}
    kind, share = rope.get("rope_type"), rope["partial_rotary_factor"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        yield f"config.json: rope_type {printable(repr(kind), 60)} is not known here. Known: {', '.join(ROPE_TYPES)}."
    needed = ("rope_theta", "partial_rotary_factor", *ROPE_TYPES.get(str(kind), ()))
    wrong = [key for key in needed if key not in ("short_factor", "long_factor") and not _is_number(rope.get(key))]
    wrong += [key for key in POSITIVE if key not in needed and rope.get(key) is not None and not _is_number(rope[key])]
    for key in wrong:
        yield f"config.json: rope_parameters.{key} must be a number for rope_type {kind}, found {printable(repr(rope.get(key)), 60)}."
    if kind not in ("default", "linear") and limit is None:
        yield f"config.json: max_position_embeddings is missing; rope_type {printable(repr(kind), 60)} is worked out from it. Add it."
    if not _is_number(share):
        return
    pairs = int(head_dim * share) // 2 if math.isfinite(share) else 0
    for key in (key for key in needed if key in ("short_factor", "long_factor")):
        found = rope.get(key)
        if not isinstance(found, list) or len(found) != pairs or not all(map(_is_number, found)):
            yield f"config.json: rope_parameters.{key} must be {pairs} numbers for rope_type {kind}, found {printable(repr(found), 60)}."
            wrong.append(key)
    if not wrong and kind in ROPE_TYPES:
        yield from _undefined(rope, head_dim, limit or 1)


def _undefined(rope: Mapping[str, Any], head_dim: int, limit: int) -> Iterator[str]:
    """Values, all numbers, for which frequencies are not defined (positions.py has the formulas)."""
    kind, share, theta = rope["rope_type"], rope["partial_rotary_factor"], rope["rope_theta"]
    bounds = [("rope_theta", theta, 1 if kind == "yarn" else 0), *((key, rope[key], 0) for key in POSITIVE if rope.get(key) is not None)]
    if kind == "longrope":
        bounds += [(key, value, 0) for key in ("short_factor", "long_factor") for value in rope[key]]
        bounds.append(("original_max_position_embeddings", rope.get("original_max_position_embeddings") or limit, 1))
    if kind == "llama3":
        bounds.append(("high_freq_factor", rope["high_freq_factor"], rope["low_freq_factor"]))
    for key, value, least in dict.fromkeys(bounds):
        if not least < value < math.inf:
            yield f"config.json: rope_parameters.{key} must be above {least} for rope_type {kind}, found {value}."
    if not 0 <= share <= 1:
        yield f"config.json: partial_rotary_factor must be from 0 to 1, found {share}."
    elif kind == "dynamic" and int(head_dim * share) <= 2:
        yield f"config.json: rope_type dynamic needs more than 2 rotary channels, head_dim {head_dim} gives {int(head_dim * share)}."
