"""What a rotary position embedding must be to be computed: by a config.json's `rope_parameters` alone, for the plan and for loading."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from bam_merge.text import printable

ROPE_TYPES = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "longrope": ("short_factor", "long_factor"), "proportional": (),
}  # fmt: skip
"""The values of `rope_type` in a config.json's `rope_parameters`, and the further keys that each needs."""


OPTIONAL = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings")
"""Keys that are numbers where they are present."""


POSITIVE = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
)  # fmt: skip
"""Keys that must be above 0 where they stand: they are divided by, or their logarithm is taken. A beta of 0 is transformers' default."""


def rotary_problems(rope: Mapping[str, Any], head_dim: int, max_positions: int | None) -> Iterator[str]:
    """A message for everything that keeps positions from being computed, each naming its key.

    `rope` is config.json's `rope_parameters` in the spelling of transformers 5, `head_dim` the channels of a head.
    """
    rope = {"partial_rotary_factor": 1.0, **rope}
    before = list(_mistyped(rope, head_dim))
    kind, most = rope.get("rope_type"), max_positions
    if kind not in ("default", "linear", "proportional") and most is None:
        before.append(f"config.json: max_position_embeddings is missing; rope_type {printable(repr(kind))} is worked out from it. Add it.")
    yield from before
    if not before:
        yield from _unusable(rope, head_dim, most)


def _mistyped(rope: Mapping[str, Any], head_dim: int) -> Iterator[str]:
    kind, share = rope.get("rope_type"), rope["partial_rotary_factor"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        yield f"config.json: rope_type {printable(repr(kind))} is not known here. Known: {', '.join(ROPE_TYPES)}."
    needed = ("rope_theta", "partial_rotary_factor", *ROPE_TYPES.get(str(kind), ()))
    for key in (*needed, *(key for key in OPTIONAL if key not in needed and rope.get(key) is not None)):
        pairs = (int(head_dim * share) + 1) // 2 if key in ("short_factor", "long_factor") and _is_number(share) else None
        found = rope.get(key)
        fine = isinstance(found, list) and len(found) == pairs and all(map(_is_number, found)) if pairs is not None else _is_number(found)
        if not fine:
            what = "a number" if pairs is None else f"{pairs} numbers"
            yield f"config.json: rope_parameters.{key} must be {what} for rope_type {kind}, found {printable(repr(found))}."


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` can be computed with: a number of any size that float64 holds."""
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))


def _unusable(rope: Mapping[str, Any], head_dim: int, most: int | None) -> Iterator[str]:
    """What has the right types and still divides by zero, or turns channels that are not there."""
    kind, share, theta = rope["rope_type"], rope["partial_rotary_factor"], rope["rope_theta"]
    rotary = int(head_dim * share)
    if not 0 <= share <= 1:
        yield f"config.json: partial_rotary_factor must be from 0 to 1, found {share}."
    elif (rotary == head_dim or kind == "proportional") and head_dim % 2:  # an odd part of a head is rounded up to the next pair
        yield (
            f"config.json: head_dim {head_dim} is odd and all of it rotates, but rotary embeddings turn channels in pairs; transformers "
            "computes no such model either. Correct head_dim (or hidden_size and num_attention_heads)."
        )
    elif kind == "dynamic" and rotary == 2:
        yield f"config.json: rope_type dynamic needs more than 2 rotating channels, head_dim {head_dim} has {rotary}."
    if kind == "default":
        bounds = [("rope_theta", theta, 0)]
    else:
        bounds = [("rope_theta", theta, 1 if kind == "yarn" else 0)]
        bounds += [(key, rope[key], 0) for key in POSITIVE if rope.get(key) or (rope.get(key) == 0 and not key.startswith("beta_"))]
        bounds += [(key, value, 0) for key in ("short_factor", "long_factor") if kind == "longrope" for value in rope[key]]
    if kind == "llama3":
        bounds.append(("high_freq_factor", rope["high_freq_factor"], rope["low_freq_factor"]))
    low = [(key, value, least) for key, value, least in dict.fromkeys(bounds) if value <= least]
    for key, value, least in low:
        yield f"config.json: rope_parameters.{key} must be above {least} for rope_type {kind}, found {value}."
    original = rope.get("original_max_position_embeddings") or most or 1
    if (
        kind == "longrope"
        and not low
        and original <= 1
        and not rope.get("attention_factor")
        and (rope.get("factor") or (most or 1) / original) > 1
    ):
        yield f"config.json: original_max_position_embeddings must be above 1 for rope_type longrope, found {original}."
