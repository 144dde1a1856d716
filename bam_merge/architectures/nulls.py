"""Keys of a config.json that are null: which mean the default, which something of their own, and which nothing at all.

What transformers 5.23 does with a null was tried for every key of every family (tests/architectures/test_config_nulls.py tries it again).
"""

from collections.abc import Mapping
from typing import Any

from bam_merge.architectures.rotary_sets import FULL, set_of
from bam_merge.architectures.tables import Architecture
from bam_merge.validation_words import shown

MEANT = ("head_dim", "layer_types", "num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""null is a value of its own: follows from the other sizes, or no window, or no cap."""


UNSET = ("partial_rotary_factor", "use_qk_norm", "original_max_position_embeddings", "rope_scaling", "rope_parameters")
"""null is as if the key were not there."""


ROPE_SPELLINGS = {"rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
"""Keys beside rope_parameters whose null counts where rope_parameters has no value of its own, and the value's key there."""


KEPT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "max_position_embeddings", "sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
"""Keys whose null is written into an output; any other key is left out there, since some readers refuse it."""


def without_nulls(family: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """`config` without the keys whose null means their default. A null that means nothing is a problem."""
    known = {key: value for key, value in config.items() if not (value is None and key in UNSET)}
    for key in ("rope_scaling", "rope_parameters"):
        rope = known.get(key)
        if isinstance(rope, dict) and "truncate" in rope and rope["truncate"] is None:
            known[key] = {**rope, "truncate": False}  # transformers asks whether it is true, and null is not
    inner = known.get("rope_scaling") or known.get("rope_parameters")
    if family.quirks.rotary_by_kind:
        inner = set_of(known, FULL)[0]
    for key, word in ROPE_SPELLINGS.items():
        if key in known and known[key] is None:
            needed = key in (*family.defaults, family.quirks.rotary_base, family.quirks.rotary_share)
            if needed and not (isinstance(inner, dict) and inner.get(word) is not None):
                problems.append(meaningless(family, key))
            del known[key]
    for key in (*family.defaults, family.quirks.activation, "tie_word_embeddings"):
        of_types = key == "sliding_window_pattern" and family.quirks.pattern_is_text and known.get("layer_types")
        if key in known and known[key] is None and key not in MEANT and not of_types:
            problems.append(meaningless(family, key))
            del known[key]
    return known


def meaningless(family: Architecture, key: str) -> str:
    """What is said of a key whose null means nothing."""
    default = family.defaults.get(key)
    way = f"remove the key ({family.name} without it has {shown(default)})" if default is not None else "remove the key"
    return f"config.json: {key} is null, which is no value of it: transformers does not load such a model. Write the value, or {way}."
