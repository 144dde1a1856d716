"""What a GGUF file says of the model, held against config.json."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bam_merge.architectures.tables import Engine
from bam_merge.text import printable

EPSILONS = {"rms_norm": "attention.layer_norm_rms_epsilon", "layer_norm": "attention.layer_norm_epsilon"}
"""Where the norms' epsilon stands, by their kind."""


SCALES = {
    "attention.scale": "attention_scale", "embedding_scale": "embedding_scale", "residual_scale": "residual_scale",
    "logit_scale": "logit_scale",
}  # fmt: skip
"""Keys that scale something, and the facts that they hold."""


GATINGS = {"softmax": 1, "sigmoid": 2}
"""What GGUF calls the functions of routers."""


UNSCALED = ("default", "llama3", "dynamic")
"""Kinds of rotary scaling that GGUF has no word for: none, and what stands in a tensor."""


def metadata_problems(fields: Mapping[str, Any], engine: Engine, facts: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How many keys were compared, and what differs: what is missing, has another value, or is not known here."""
    arch, expected, optional = engine.architecture, _expected(engine, facts), _optional(engine, facts)
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


def _expected(engine: Engine, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What must be there, since llama.cpp takes something else where it is not."""
    rope = facts["rope_parameters"]
    norm = "layer_norm" if facts["norm_type"] == "layer_norm" else "rms_norm"
    needed = {
        "block_count": facts["num_hidden_layers"], "context_length": facts["max_position_embeddings"],
        "embedding_length": facts["hidden_size"], "attention.head_count": facts["num_attention_heads"],
        "attention.head_count_kv": facts["num_key_value_heads"], EPSILONS[norm]: facts[f"{norm}_eps"],
        "expert_count": facts["num_experts"], "expert_used_count": facts["num_experts_per_tok"], "rope.freq_base": rope["rope_theta"],
    }  # fmt: skip
    if facts["num_attention_heads"] * facts["head_dim"] != facts["hidden_size"]:
        needed |= {"attention.key_length": facts["head_dim"], "attention.value_length": facts["head_dim"]}
    needed |= {key: value for key, value in _scales(engine, facts).items() if facts.get(SCALES[key]) is not None}
    if facts["sliding"] != "none":
        needed["attention.sliding_window"] = facts["sliding_window"]
    if facts.get("scoring_func", "softmax") != "softmax":
        needed["expert_gating_func"] = GATINGS[facts["scoring_func"]]
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


def _scales(engine: Engine, facts: Mapping[str, Any]) -> dict[str, float]:
    """What scores, embeddings, residuals and logits are multiplied with, or logits divided by."""
    found = {key: facts.get(fact) for key, fact in SCALES.items()}
    scales = {key: 1.0 if value is None else float(value) for key, value in found.items()}
    if found["attention.scale"] is None:
        scales["attention.scale"] = facts["head_dim"] ** -0.5
    if engine.divided_logits:
        scales["logit_scale"] = 1 / scales["logit_scale"]
    return scales


def _optional(engine: Engine, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What may be there, and then must be so."""
    return {
        **_scales(engine, facts), "expert_gating_func": GATINGS[facts.get("scoring_func", "softmax")], "leading_dense_block_count": 0,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in facts["layer_types"] or ()],
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
