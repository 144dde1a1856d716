"""A family's config.json made of facts alone says these facts again, and whatever a family cannot say is refused by its name."""

from typing import Any

import pytest
from conftest import CONFIGS

from bam_merge.architectures.config import describe
from bam_merge.architectures.dense_config import as_said, dense_config
from bam_merge.architectures.tables import Architecture, find_by_model_type

ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip
MANY: dict[str, dict[str, Any]] = {
    **CONFIGS,
    **{f"llama, {name}": {**CONFIGS["llama"], "rope_parameters": rope} for name, rope in ROPES.items()},
    **{f"llama, {name}, older": {**CONFIGS["llama"], "rope_theta": rope["rope_theta"], "rope_scaling": rope} for name, rope in ROPES.items()},
    "phi3, longrope": {
        **CONFIGS["phi3"], "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 6.0, 9.0]},
    },
    "gpt_neox, half turning": {**CONFIGS["gpt_neox"], "rotary_pct": 0.5, "rotary_emb_base": 500},
    "qwen2, upper layers slide": {**CONFIGS["qwen2"], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3, a window that nothing uses": {**CONFIGS["qwen3"], "sliding_window": 8, "use_sliding_window": False},
    "gemma2, another scale": {**CONFIGS["gemma2"], "query_pre_attn_scalar": 173},
    "llama, relu": {**CONFIGS["llama"], "hidden_act": "relu"},
    "granite, scales of one": {
        **CONFIGS["granite"], "attention_multiplier": 12**-0.5, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    },
}  # fmt: skip


def of(config: dict[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    family, problems = find_by_model_type(config["model_type"]), list[str]()
    assert family is not None
    facts = describe(family, config, problems)
    assert not problems
    return family, facts


@pytest.mark.parametrize("name", MANY)
def test_facts_come_back(name: str) -> None:
    family, facts = of(MANY[name])
    problems: list[str] = []
    again = dense_config(family, facts, {}, problems)
    assert not problems
    found = of(again)[1]
    keys = set(facts) - set(family.function) - set(family.neutral)
    keys -= set() if facts["sliding_window"] else {"layer_types"}
    assert {key: found.get(key) for key in keys} == {key: facts[key] for key in keys}


@pytest.mark.parametrize("name", MANY)
def test_what_another_file_says_is_enough(name: str) -> None:
    """Without the keys that the first file has not, the facts are the same."""
    family, facts = of(MANY[name])
    config = dense_config(family, facts, {}, [])
    fewer = as_said(family, config, facts, lambda key: key in MANY[name])
    again = dense_config(family, of(fewer)[1], {}, [])
    assert again == config
    assert len(fewer) <= len(config)


@pytest.mark.parametrize(
    ("facts", "family", "said"),
    [
        ("qwen3", "llama", "a llama model has qk_norm = false, and this mixture has true."),
        ("cohere", "llama", "a llama model has norm_type = 'rms_norm', and this mixture has 'layer_norm'."),
        ("gemma2", "mistral", "a mistral model has norm_offset = 0, and this mixture has 1."),
        ("mistral", "llama", "a llama model has sliding_window = null, and this mixture has 16."),
        ("llama", "gemma2", "a gemma2 model has norm_offset = 1, and this mixture has 0."),
    ],
)  # fmt: skip
def test_what_a_family_cannot_say_is_named(facts: str, family: str, said: str) -> None:
    table, problems = find_by_model_type(family), list[str]()
    assert table is not None
    assert dense_config(table, of(CONFIGS[facts])[1], {}, problems) == {}
    assert said in problems
