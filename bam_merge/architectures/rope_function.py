"""Rotary embeddings as functions: what `rope_parameters` compute, with the defaults filled in, so that two spellings can be compared.

Source: transformers' modeling_rope_utils.py (5.23): which key each rope type reads, and what stands for one that is left out.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

READ: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"),
}
"""What decides the function of each rope type, besides rope_theta and partial_rotary_factor, once everything is filled in."""


WORDS = {"rope_type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim", *(key for keys in READ.values() for key in keys)}
"""Every key that some rope type reads. One that the type at hand does not read changes nothing; any other key may matter."""


def effective(rope: Mapping[str, Any], max_position_embeddings: int | None) -> dict[str, Any]:
    """What `rope` (a model's rope_parameters in the spelling of transformers 5) computes: equal for equal functions.

    Defaults are filled in, keys that the type does not read are left out, keys that no type reads are kept as they are.
    """
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in READ:
        return dict(rope)
    values = {"rope_type": kind, **{key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}}
    values.update({key: value for key, value in rope.items() if key not in WORDS})
    filled = {**rope, "max_position_embeddings": max_position_embeddings}
    filled["original_max_position_embeddings"] = original = rope.get("original_max_position_embeddings") or max_position_embeddings
    if kind in ("yarn", "longrope"):
        factor = rope.get("factor")
        if not factor and _is_number(original) and original and _is_number(max_position_embeddings):
            factor = max_position_embeddings / original
        filled.update(factor=factor, attention_factor=_attention_factor(rope, kind, factor, original))
        filled.update(
            beta_fast=rope.get("beta_fast") or 32, beta_slow=rope.get("beta_slow") or 1, truncate=bool(rope.get("truncate", True))
        )
    if kind == "proportional":
        filled["factor"] = rope.get("factor", 1.0)
    if kind == "linear" and rope.get("factor") == 1:  # positions divided by one
        return {**values, "rope_type": "default"}
    return {**values, **{key: filled.get(key) for key in READ[kind]}}


def _attention_factor(rope: Mapping[str, Any], kind: str, factor: Any, original: Any) -> Any:
    """The factor on cosines and sines that is meant where none is given; None where it cannot be worked out."""
    given = rope.get("attention_factor")
    if given is not None:
        return given

    def term(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    try:
        if kind == "longrope":
            return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            return term(rope["mscale"]) / term(rope["mscale_all_dim"])
        return term(1)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys in which two effective embeddings differ. A factor worked out and the same one written down may differ by their rounding."""
    return [key for key in dict.fromkeys((*mine, *theirs)) if not _same(key, mine.get(key), theirs.get(key))]


def _same(key: str, mine: Any, theirs: Any) -> bool:
    if key == "attention_factor" and _is_number(mine) and _is_number(theirs):
        return math.isclose(mine, theirs, rel_tol=1e-7)  # less than the rounding of the float32 in which it is multiplied
    return bool(mine == theirs)


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)
