"""null in a config.json: what transformers reads in it, key by key and family by family, and what we read."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CONFIGS, write_recipe, write_sources
from damage import edit_config
from test_harmless_keys import CLASSES

from bam_merge.architectures.config import NEUTRAL
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.sources.dense import read_dense

FAMILIES = sorted(CLASSES)


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def loads(config: dict[str, Any]) -> bool:
    """Whether transformers makes a model of this config.json that runs."""
    try:
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, CLASSES[config["model_type"]]).from_dict(dict(config)))
        model(torch.arange(3, 20)[None])
    except Exception:
        return False
    return True


def tried_keys(family: str) -> list[str]:
    own = [field.name for field in fields(getattr(transformers, CLASSES[family]))]
    spelled = ["rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "rope_scaling", "head_dim", "layer_types"]
    bookkeeping = {"transformers_version", "architectures", "id2label", "label2id", "problem_type", "dtype", "return_dict"}
    return [key for key in dict.fromkeys((*own, *spelled)) if key not in bookkeeping]


LENIENT = {"head_dim", "num_key_value_heads", "partial_rotary_factor", "original_max_position_embeddings"}
"""Keys whose null has one possible meaning, which the tensors' shapes prove or all older readers share, though transformers 5.23 stumbles."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_is_read_as_transformers_reads_it(family: str, tmp_path: Path) -> None:
    """What transformers refuses is refused, what it takes is taken; what no forward pass depends on is taken too."""
    whole = {**CONFIGS[family], "num_key_value_heads": 4, "head_dim": 8}  # as they follow from the other sizes
    for key in tried_keys(family):
        config = {**without(whole, key), key: None}
        folder = write_checkpoint(tmp_path / key, whole, random_values(7))
        (folder / "config.json").write_text(json.dumps(config))
        try:
            read_dense("law", folder)
            accepted = True
        except CheckpointError as error:
            accepted = False
            assert all(key in problem and "null" in problem for problem in error.problems), error.problems
        neutral = key in (*NEUTRAL, *read_dense("seed", write_checkpoint(tmp_path / "x", CONFIGS[family], random_values(7))).family.neutral)
        decides = key in ("use_sliding_window", "max_window_layers")  # in the output they are spelled as layer_types
        assert accepted == (loads(config) or (neutral and not decides) or key in LENIENT), key


@pytest.mark.parametrize(("name", "key"), [
    ("llama", "partial_rotary_factor"), ("mistral", "partial_rotary_factor"), ("phi3", "partial_rotary_factor"),
    ("gpt_neox", "partial_rotary_factor"), ("cohere", "use_qk_norm"), ("llama", "head_dim"), ("qwen2", "head_dim"), ("phi3", "sliding_window"),
    ("qwen2", "layer_types"), ("qwen3", "rope_scaling"), ("llama", "rope_parameters"), ("gpt_neox", "rope_scaling"),
    ("llama", "original_max_position_embeddings"), ("llama", "quantization_config"), ("llama", "pretraining_tp"), ("mistral", "use_cache"),
])  # fmt: skip
def test_null_beside_a_source_without_the_key(name: str, key: str, tmp_path: Path, run: Any) -> None:
    """The same model, said in two ways: planned, and the output is what it is without the null."""
    write_sources(tmp_path, CONFIGS[name])
    without_null = run("plan", write_recipe(tmp_path), "--json")
    assert without_null.status == 0, without_null.err
    for holder in ("law", "seed"):
        edit_config(tmp_path / "law", **{key: ...})
        path = tmp_path / holder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
        result = run("plan", write_recipe(tmp_path), "--json")
        assert result.status == 0, result.err
        expected, found = (json.loads(text)["config"] for text in (without_null.out, result.out))
        assert found == expected


@pytest.mark.parametrize(("name", "key", "message"), [
    ("llama", "rms_norm_eps", "rms_norm_eps is null, which is no value of it: transformers does not load such a model. Write the value, or remove the key (llama without it has 1e-06)."),
    ("llama", "rope_theta", "rope_theta is null, which is no value of it: transformers does not load such a model. Write the value, or remove the key."),
    ("gpt_neox", "rotary_pct", "rotary_pct is null, which is no value of it: transformers does not load such a model. Write the value, or remove the key."),
    ("cohere", "tie_word_embeddings", "tie_word_embeddings is null, which is no value of it: transformers does not load such a model. Write the value, or remove the key (cohere without it has true)."),
    ("qwen2", "use_sliding_window", "use_sliding_window is null, which is no value of it: transformers does not load such a model. Write the value, or remove the key (qwen2 without it has false)."),
])  # fmt: skip
def test_a_null_that_means_nothing(name: str, key: str, message: str, tmp_path: Path, run: Any) -> None:
    """Refused even where all sources have it, so that none differs."""
    write_sources(tmp_path, CONFIGS[name], ("seed", "law"))
    for source in ("seed", "law"):
        path = tmp_path / source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    result = run("plan", write_recipe(tmp_path, names=("seed", "law")))
    assert result.status == 2
    assert result.err.splitlines()[:2] == [f"error: sources.seed: config.json: {message}", f"error: sources.law: config.json: {message}"]


def test_rope_theta_null_beside_one_that_counts(llamas: Path, run: Any) -> None:
    edit_config(llamas / "law", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    path = llamas / "law" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": None}))
    assert run("plan", write_recipe(llamas)).status == 0


@pytest.mark.parametrize(("name", "key"), [("mistral", "num_key_value_heads"), ("qwen3", "head_dim"), ("llama", "head_dim")])
def test_what_follows_from_a_null_is_written_down(name: str, key: str, tmp_path: Path, run: Any) -> None:
    """In a dense output: mistral without num_key_value_heads has 8, with null as many as heads; qwen3 without head_dim has 128."""
    config = {**CONFIGS[name], "num_key_value_heads": 4, "head_dim": 8}
    write_sources(tmp_path, config)
    for source in ("seed", "code", "law"):
        path = tmp_path / source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None, "use_cache": None, "rope_scaling": None}))
    result = run("plan", write_recipe(tmp_path, method="merge"), "--json")
    assert result.status == 0, result.err
    written = json.loads(result.out)["config"]
    assert written[key] == config[key]
    assert "use_cache" not in written
    assert "rope_scaling" not in written
    assert loads(written)
