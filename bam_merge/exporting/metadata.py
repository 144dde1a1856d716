"""What a GGUF file says of the model, held against config.json."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bam_merge.text import printable

UNSCALED = ("default", "llama3", "dynamic")
"""Kinds of rotary scaling that GGUF has no word for: none, and what stands in a tensor."""


def metadata_problems(fields: Mapping[str, Any], arch: str, facts: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How many keys were compared, and what differs: what is missing, has another value, or is not known here."""
    expected, optional = _expected(facts), _optional(facts)
    found = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    problems = []
    if fields.get("general.architecture") != arch:
        problems.append(f"general.architecture is {printable(repr(fields.get('general.architecture')), 60)}, expected {arch!r}.")
    for key, value in expected.items():
        if key not in found:
            problems.append(f"{arch}.{key} is missing, expected {value}.")
    for key, value in found.items():
        if key not in expected and key not in optional:
            problems.append(f"{arch}.{key} = {printable(repr(value), 60)} stands for nothing in config.json that is known here.")
        elif not _same(value, {**optional, **expected}[key]):
            problems.append(f"{arch}.{key} is {printable(repr(value), 60)}, expected {({**optional, **expected})[key]}.")
    return len(found) + 1, problems


def _expected(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What must be there, since llama.cpp takes something else where it is not."""
    rope = facts["rope_parameters"]
    needed = {
        "block_count": facts["num_hidden_layers"], "context_length": facts["max_position_embeddings"],
        "embedding_length": facts["hidden_size"], "attention.head_count": facts["num_attention_heads"],
        "attention.head_count_kv": facts["num_key_value_heads"], "attention.layer_norm_rms_epsilon": facts["rms_norm_eps"],
        "expert_count": facts["num_experts"], "expert_used_count": facts["num_experts_per_tok"], "rope.freq_base": rope["rope_theta"],
    }  # fmt: skip
    if facts["num_attention_heads"] * facts["head_dim"] != facts["hidden_size"]:
        needed |= {"attention.key_length": facts["head_dim"], "attention.value_length": facts["head_dim"]}
    if facts["rope_type"] not in UNSCALED:
        needed |= dict(_scaling(rope))
    return needed


def _scaling(rope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The rotary scaling that a file must have."""
    yield "rope.scaling.type", rope["rope_type"]
    yield "rope.scaling.factor", rope["factor"]
    if rope["rope_type"] == "yarn":
        yield "rope.scaling.original_context_length", rope["original_max_position_embeddings"]
        names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        yield from ((f"rope.scaling.{name}", rope[key]) for key, name in names.items() if rope.get(key) is not None)


def _optional(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What may be there, and then must be so."""
    return {
        "vocab_size": facts["vocab_size"], "feed_forward_length": facts["intermediate_size"],
        "expert_feed_forward_length": facts["intermediate_size"], "rope.dimension_count": facts["head_dim"],
        "attention.key_length": facts["head_dim"], "attention.value_length": facts["head_dim"],
        "expert_shared_feed_forward_length": facts.get("shared_expert_intermediate_size"), "rope.scaling.type": "none",
        "expert_weights_norm": facts.get("norm_topk_prob"), "attention.sliding_window": facts.get("sliding_window"),
    }  # fmt: skip


def _same(found: Any, expected: Any) -> bool:
    """Whether a number is stored as float32 has it; anything else, whether it is equal."""
    if isinstance(expected, float | int) and isinstance(found, float) and not isinstance(expected, bool):
        return bool(np.float32(found) == np.float32(expected))
    return bool(found == expected)
