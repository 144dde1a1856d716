"""Rotary embeddings of the sources: equal where transformers computes the same, however they are spelled, and refused where not."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CONFIGS, write_recipe, write_sources
from damage import edit_config
from test_harmless_keys import CLASSES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bam_merge.architectures import rope_function
from bam_merge.model.positions import ROPE_TYPES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
MAX = 128

SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "beta_fast and beta_slow": ("llama", YARN, {**YARN, "beta_fast": 32, "beta_slow": 1}),
    "beta_fast as a float": ("qwen2", YARN, {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}),
    "betas of nothing": ("llama", YARN, {**YARN, "beta_fast": None, "beta_slow": 0}),
    "truncate": ("qwen3", YARN, {**YARN, "truncate": True}),
    "truncate null is no": ("qwen3", {**YARN, "truncate": False}, {**YARN, "truncate": None}),
    "attention_factor": ("llama", YARN, {**YARN, "attention_factor": 0.1 * math.log(4) + 1}),
    "attention_factor in float32": ("mistral", YARN, {**YARN, "attention_factor": 1.1386294}),
    "attention_factor null": ("llama", YARN, {**YARN, "attention_factor": None}),
    "mscale of one without the other": ("llama", YARN, {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}),
    "mscale": ("llama", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, {**YARN, "attention_factor": (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)}),
    "everything spelled out": ("qwen2", YARN, {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": 0.1 * math.log(4) + 1, "mscale": None}),
    "factor null": ("llama", YARN, {**YARN, "factor": None}),
    "original of yarn": ("qwen3", {**YARN, "original_max_position_embeddings": MAX}, {"rope_type": "yarn", "factor": 4.0}),
    "original of llama3": ("llama", LLAMA3, {**LLAMA3, "original_max_position_embeddings": MAX}),
    "keys that llama3 does not read": ("llama", LLAMA3, {**LLAMA3, "attention_factor": 2.0, "beta_fast": 7}),
    "keys that linear does not read": ("llama", {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2, "original_max_position_embeddings": 32}),
    "keys that dynamic does not read": ("llama", {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}),
    "linear by one": ("gpt_neox", {"rope_type": "default"}, {"rope_type": "linear", "factor": 1.0}),
    "default with a factor": ("cohere", {"rope_type": "default"}, {"rope_type": "default", "factor": 4.0}),
    "attention_factor of longrope": ("phi3", LONG, {**LONG, "attention_factor": 1.0}),
}  # fmt: skip
DIFFERENT: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "beta_fast": ("llama", YARN, {**YARN, "beta_fast": 16}, "beta_fast 16 here, 32 there"),
    "truncate": ("llama", YARN, {**YARN, "truncate": False}, "truncate false here, true there"),
    "truncate null": ("llama", YARN, {**YARN, "truncate": None}, "truncate false here, true there"),
    "attention_factor": ("llama", YARN, {**YARN, "attention_factor": 1.139}, "attention_factor 1.139 here, 1.138629436111989 there"),
    "factor": ("qwen2", YARN, {**YARN, "factor": 2.0, "attention_factor": 0.1 * math.log(4) + 1}, "factor 2.0 here, 4.0 there"),
    "original": ("qwen2", YARN, {**YARN, "original_max_position_embeddings": 64}, "original_max_position_embeddings 64 here, 32 there"),
    "llama3's original": ("llama", LLAMA3, {**LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings 64 here, 128 there"),
    "one of long lists": ("phi3", LONG, {**LONG, "long_factor": [2.0, 2.0, 3.0, 4.0]}, "long_factor[2] 3.0 here, 2.0 there, and 1 more of its entries differ"),
    "type": ("llama", {"rope_type": "default"}, YARN, "rope_type 'yarn' here, 'default' there"),
    "a key that nobody knows": ("llama", YARN, {**YARN, "spiral": 2}, "spiral 2 here, none there"),
}  # fmt: skip


def cosines(family: str, rope: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """What transformers computes: the frequencies of a short and of a long sequence, and the factor."""
    config = getattr(transformers, CLASSES[family]).from_dict({**config_of(family), "rope_parameters": dict(rope)})
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        model = transformers.AutoModel.from_config(config)
        return model.rotary_emb.inv_freq, 1.0
    short, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=8)
    long, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=100_000)
    return torch.cat([short, long]), factor


def config_of(family: str) -> dict[str, Any]:
    sizes = {"max_position_embeddings": MAX, **({"original_max_position_embeddings": MAX} if family == "phi3" else {})}
    return {**CONFIGS[family], **sizes}


def planned(tmp_path: Path, run: Any, family: str, first: dict[str, Any], other: dict[str, Any]) -> Any:
    write_sources(tmp_path, config_of(family), ("seed", "law"))
    for name, rope in (("seed", first), ("law", other)):
        edit_config(tmp_path / name, rope_scaling=rope)
    return run("plan", write_recipe(tmp_path, names=("seed", "law")))


@pytest.mark.parametrize("name", SAME)
def test_the_same_embedding_spelled_in_two_ways(name: str, tmp_path: Path, run: Any) -> None:
    family, first, other = SAME[name]
    (one, factor), (two, same_factor) = cosines(family, first), cosines(family, other)
    assert torch.equal(one, two[: len(one)])
    assert factor == pytest.approx(same_factor, rel=1e-7)
    result = planned(tmp_path, run, family, first, other)
    assert result.status == 0, result.err


@pytest.mark.parametrize("name", DIFFERENT)
def test_embeddings_that_differ(name: str, tmp_path: Path, run: Any) -> None:
    """One message, with the values that count: defaults are filled in."""
    family, first, other, message = DIFFERENT[name]
    result = planned(tmp_path, run, family, first, other)
    assert result.status == 2
    text = f"error: sources.law: rotary embedding differs from sources.seed: {message}. Experts must share it"
    text += "." if "partial_rotary_factor" in message else ", or the recipe accepts one for all: accept: {facts: {rope_parameters: seed}}."
    assert result.err.splitlines() == [text]


def test_the_reference_model_knows_the_same_types() -> None:
    assert rope_function.READ.keys() == ROPE_TYPES.keys()


@pytest.mark.parametrize("rope", [
    {"rope_type": "spiral", "turns": 3}, {"rope_type": [1]}, {**YARN, "factor": "4"}, {**YARN, "original_max_position_embeddings": "32"},
    {"rope_type": "yarn", "original_max_position_embeddings": []}, {**LONG, "original_max_position_embeddings": 1},
    {**YARN, "mscale": "1", "mscale_all_dim": "1"}, {"rope_type": "longrope"},
])  # fmt: skip
def test_what_cannot_be_computed_is_equal_to_itself_alone(rope: dict[str, Any]) -> None:
    """Whether it can be computed is asked elsewhere; here nothing may be raised."""
    whole = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, **rope}
    one, two = rope_function.effective(whole, 128), rope_function.effective({**whole, "rope_theta": 1e5}, None)
    assert rope_function.differences(one, one) == []
    assert "rope_theta" in rope_function.differences(one, two)


@pytest.mark.parametrize("rope", [YARN, {**LONG, "factor": 2.0}, LLAMA3, {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_a_limit_alone_is_no_difference(rope: dict[str, Any]) -> None:
    whole = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 32, **rope}
    assert rope_function.differences(rope_function.effective(whole, 128), rope_function.effective(whole, 256)) == []


@pytest.mark.parametrize(("rope", "key"), [
    ({"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings"), ({**LONG, "original_max_position_embeddings": 64}, "attention_factor"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 32}, "factor"), (LLAMA3, "original_max_position_embeddings"),
])  # fmt: skip
def test_a_limit_that_the_embedding_is_worked_out_from_is_one(rope: dict[str, Any], key: str) -> None:
    whole = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, **rope}
    assert key in rope_function.differences(rope_function.effective(whole, 128), rope_function.effective(whole, 256))
