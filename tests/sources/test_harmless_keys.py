"""Config keys that change nothing: each tried against transformers in every family, and sources that differ in them merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CONFIGS, write_recipe, write_sources
from damage import edit_config

from bam_merge.architectures.config import COMMON_FUNCTION, IGNORED, NEUTRAL, ROPE_KEYS
from bam_merge.architectures.tables import dense_families
from bam_merge.sources.harmless import Harmless, find, harmless_keys, is_harmless

CLASSES = {
    "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "gpt_neox": "GPTNeoXConfig",
    "phi3": "Phi3Config", "cohere": "CohereConfig",
}  # fmt: skip
SAMPLES: dict[str, Any] = {
    "attn_implementation": "sdpa", "experts_implementation": "eager", "num_labels": 5, "classifier_dropout": 0.5, "hidden_dropout": 0.5,
    "resid_pdrop": 0.5, "embd_pdrop": 0.5, "keys_to_ignore_at_inference": ["a"], "name_or_path": "a/b", "loss_type": "ForCausalLM",
    "attention_probs_dropout_prob": 0.5, "gradient_checkpointing": True, "tie_last_hidden_states": True, "init_std": 0.5,
    "initializer_factor": 2.0, "cache_implementation": "dynamic", "unsloth_*": "2025.3.19", "transformers.js_config": {"dtype": "q4"},
}  # fmt: skip
"""Values for the keys that transformers wants of a certain type; the others are tried at 3."""


def known(family: str) -> set[str]:
    """The keys that are no unknown ones in this family."""
    table = next(item for item in dense_families() if item.name == family)
    return {*COMMON_FUNCTION, *ROPE_KEYS, *NEUTRAL, *IGNORED, *table.function, *table.neutral}


def logits(config: dict[str, Any]) -> torch.Tensor:
    made = getattr(transformers, CLASSES[config["model_type"]]).from_dict(dict(config))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # not as the model begins: that is what some of the keys are for
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model(torch.arange(3, 43)[None]).logits


def reads(config: dict[str, Any], key: str, value: Any) -> bool:
    """Whether transformers computes something else with this key, or does not get that far."""
    try:
        return not torch.equal(logits({**config, key: value}), logits(config))
    except Exception as error:  # of settings that are no longer the same for all layers, of a class that transformers does not export
        return "per-layer" in str(error)


def tried(item: Harmless) -> tuple[Any, ...]:
    return item.values if item.values is not None else (SAMPLES.get(item.key, 3),)


@pytest.mark.parametrize("family", CLASSES)
def test_transformers_computes_the_same_with_them(family: str) -> None:
    """All keys together, at every value that is called harmless: bit for bit the same logits."""
    plain = CONFIGS[family]
    expected = logits(plain)
    keys = [item for item in harmless_keys().values() if item.key not in known(family) and item.key != "quantization_config"]
    assert len(keys) > 100
    for round_ in range(max(len(tried(item)) for item in keys)):
        more = {item.key.replace("*", "version"): tried(item)[min(round_, len(tried(item)) - 1)] for item in keys}
        assert torch.equal(logits({**plain, **more}), expected)


def test_is_causal_matters() -> None:
    assert not torch.equal(logits({**CONFIGS["llama"], "is_causal": False}), logits(CONFIGS["llama"]))
    assert is_harmless("is_causal", True)
    assert not is_harmless("is_causal", False)
    assert not is_harmless("is_causal", None)  # getattr(config, "is_causal", True) of null is no


@pytest.mark.parametrize(("name", "key", "value", "reason"), [
    ("llama", "is_causal", False, "is_causal = false: transformers then lets each token attend to those after it too, which cannot be merged."),
    ("mistral", "is_causal", None, "is_causal = null: transformers then lets each token attend to those after it too, which cannot be merged."),
    ("llama", "per_layer_config", {"0": {"rms_norm_eps": 0.5}}, 'per_layer_config = {"0": {"rms_norm_eps": 0.5}}: transformers then gives single layers other sizes and settings, which cannot be merged.'),
])  # fmt: skip
def test_a_key_that_transformers_reads_and_no_layout_says(name: str, key: str, value: Any, reason: str, tmp_path: Path, run: Any) -> None:
    """Refused although no source differs."""
    assert reads(CONFIGS[name], key, value)
    write_sources(tmp_path, CONFIGS[name], ("seed", "law"))
    for source in ("seed", "law"):
        path = tmp_path / source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    result = run("plan", write_recipe(tmp_path, names=("seed", "law")))
    assert result.status == 2
    expected = [f"error: sources.{source}: config.json: {reason} Remove the key if it is a mistake." for source in ("seed", "law")]
    assert result.err.splitlines()[:2] == expected


@pytest.mark.parametrize("keys", [{"is_causal": True}, {"per_layer_config": None}, {"per_layer_config": {}}])
def test_but_not_where_it_says_nothing(keys: dict[str, Any], llamas: Path, run: Any) -> None:
    for source in ("seed", "code", "law"):
        path = llamas / source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    assert run("plan", write_recipe(llamas)).status == 0


def test_every_generation_parameter_of_transformers_is_known() -> None:
    parameters = transformers.GenerationConfig._get_default_generation_params()
    assert [key for key in parameters if find(key) is None and key not in NEUTRAL] == []


def test_each_key_has_a_reason_and_is_no_key_of_the_function() -> None:
    functions = {*COMMON_FUNCTION, *ROPE_KEYS}
    for item in harmless_keys().values():
        assert len(item.reason) > 20
        assert item.key not in functions
        assert item.values is None or item.values


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("use_mrope", False, True), ("use_mrope", True, False), ("use_mrope", None, True), ("use_mrope", 0, False), ("unsloth_fixed", True, True),
    ("unsloth_version", "2026.1", True), ("transformers.js_config", {"dtype": "q4"}, True), ("max_length", 20, True),
    ("residual_multiplier", 0.5, False), ("residual_multiplier", None, True), ("attention_bias", True, False), ("activation", "gelu", False),
    ("quantization_config", {}, True), ("quantization_config", {"quant_method": "fp8"}, False), ("full_attn_mod", True, False),
])  # fmt: skip
def test_table(key: str, value: Any, expected: bool) -> None:
    assert is_harmless(key, value) is expected


# ---- merging ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("keys", [
    {"use_mrope": False}, {"unsloth_version": "2025.3.19", "unsloth_fixed": True}, {"transformers.js_config": {"dtype": "q4"}},
    {"max_length": 4096, "temperature": 0.7, "do_sample": True, "top_p": 0.9}, {"max_sequence_length": 128}, {"quantization_config": None},
    {"quantization_config": {}}, {"num_labels": 2, "tie_encoder_decoder": False, "bad_words_ids": None}, {"residual_multiplier": None},
    {"activation": "swiglu"}, {"activation": "silu"},
])  # fmt: skip
@pytest.mark.parametrize("where", ["seed", "law"])
def test_a_harmless_key_of_one_source(name: str, keys: dict[str, Any], where: str, tmp_path: Path, run: Any) -> None:
    """Accepted, whichever source has it; not in the output, and nothing to note."""
    write_sources(tmp_path, CONFIGS[name])
    path = tmp_path / where / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    result = run("plan", write_recipe(tmp_path), "--json")
    assert result.status == 0, result.err
    plan = json.loads(result.out)
    assert set(plan["config"]).isdisjoint(keys)
    assert plan["notes"] == []


@pytest.mark.parametrize(("here", "there", "message"), [
    ({"use_mrope": True}, {}, "config.json has use_mrope = true, sources.seed has none; it changes nothing only at false. Make them agree, or accept it: accept: {config: [use_mrope]}."),
    ({}, {"use_mrope": True}, "config.json has no use_mrope, sources.seed has use_mrope = true; it changes nothing only at false. Make them agree, or accept it: accept: {config: [use_mrope]}."),
    ({"use_mrope": True}, {"use_mrope": False}, "config.json has use_mrope = true, sources.seed has false; it changes nothing only at false. Make them agree, or accept it: accept: {config: [use_mrope]}."),
    ({"activation": "gelu"}, {}, "config.json has activation = 'gelu', sources.seed has none; it changes nothing only at 'swiglu' or 'silu'. Make them agree, or accept it: accept: {config: [activation]}."),
    ({"my_key": 1}, {"my_key": 2}, "config.json has my_key = 1, sources.seed has 2; llama's table does not know this key, so it may matter. Make them agree, or accept it: accept: {config: [my_key]}."),
    ({"my_key": {"a": 1, "b": [1] * 99}}, {"my_key": {"a": 2, "b": [1] * 99}}, "config.json has my_key.a = 1, sources.seed has 2; llama's table does not know this key, so it may matter. Make them agree, or accept it: accept: {config: [my_key]}."),
    ({"my_key": [0] * 99}, {"my_key": [0] * 97 + [1, 2]}, "config.json has my_key[97] = 0, sources.seed has 1, and 1 more of its entries differ; llama's table does not know this key, so it may matter. Make them agree, or accept it: accept: {config: [my_key]}."),
    ({"unslotted": 1}, {}, "config.json has unslotted = 1, sources.seed has none; llama's table does not know this key, so it may matter. Make them agree, or accept it: accept: {config: [unslotted]}."),
    ({"dual_chunk_attention_config": {"chunk_size": 4}}, {}, 'config.json has dual_chunk_attention_config = {"chunk_size": 4}, sources.seed has none; llama\'s table does not know this key, so it may matter. Make them agree, or accept it: accept: {config: [dual_chunk_attention_config]}.'),
])  # fmt: skip
def test_what_may_matter_is_refused(here: dict[str, Any], there: dict[str, Any], message: str, llamas: Path, run: Any) -> None:
    edit_config(llamas / "law", **here)
    for name in ("seed", "code"):
        edit_config(llamas / name, **there)
    result = run("plan", write_recipe(llamas))
    assert result.status == 2
    assert result.err.splitlines() == [f"error: sources.law: {message}"]
