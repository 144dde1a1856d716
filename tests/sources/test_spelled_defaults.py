"""A config.json as short as can be, and the same as transformers writes it, with every default spelled out: one function, that merges."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, STAND_INS, write_recipe, write_sources
from test_public_models import MODELS, WRAPPED
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bam_merge.architectures import rope_function
from bam_merge.architectures.config import describe
from bam_merge.architectures.tables import load_architecture
from bam_merge.architectures.wrappers import unwrap
from bam_merge.errors import BamMergeError
from bam_merge.model.config import model_config
from bam_merge.model.wrapped import text_config
from bam_merge.planning.make import plan_file
from bam_merge.verifying.config import meaning

ROTARY: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn without its context": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
}  # fmt: skip
SPELLED = {
    "yarn": {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "truncate": True},
    "llama3": {"factor": 8.0},
    "linear": {"attention_factor": None},
}
CASES = [
    (family, rotary)
    for family in CONFIGS
    for rotary in ROTARY
    if rotary == "plain" or family in ("llama", "mistral", "qwen2", "qwen3", "cohere")
]


CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
"""Keys whose null is a value of its own: no cap."""


def made_of(config: dict[str, Any]) -> Any:
    """What transformers' class of the model type reads; of one that it has no class of, what the type reads that newer files are saved as."""
    model_type, keys, _ = STAND_INS.get(config["model_type"], (config["model_type"], {}, {}))
    own = {keys.get(key, key): value for key, value in config.items()}
    if model_type != config["model_type"]:
        own = {"intermediate_size": 4 * config["hidden_size"], **own, "model_type": model_type}
    return CONFIG_MAPPING[model_type].from_dict(json.loads(json.dumps(own)))


def spelled_out(config: dict[str, Any]) -> dict[str, Any]:
    """Every key with its value as transformers writes it, under the names of `config`'s model type."""
    _, keys, _ = STAND_INS.get(config["model_type"], ("", {}, {}))
    back = {new: old for old, new in keys.items()}
    written = json.loads(made_of(config).to_json_string(use_diff=False))
    return {**{back.get(key, key): value for key, value in written.items()}, "model_type": config["model_type"]}


def plans(folder: Path, seed: dict[str, Any], law: dict[str, Any]) -> tuple[str, ...]:
    """What the plan of two sources with these config.json files has to note."""
    for name, config in (("seed", seed), ("law", law)):
        (folder / name / "config.json").write_text(json.dumps(config, default=str))
    return plan_file(write_recipe(folder, names=("seed", "law"))).notes


@pytest.mark.parametrize(("family", "rotary"), CASES)
def test_what_transformers_writes_is_what_it_reads(family: str, rotary: str, tmp_path: Path) -> None:
    short = {**CONFIGS[family], **ROTARY[rotary]}
    write_sources(tmp_path, short, ("seed", "law"))
    longs = [spelled_out(short)]
    if short["model_type"] not in STAND_INS:
        made_of(short).save_pretrained(tmp_path / "saved")
        longs.append(json.loads((tmp_path / "saved" / "config.json").read_text()))
    for long in longs:
        for pair in ((short, long), (long, short)):
            assert [note for note in plans(tmp_path, *pair) if "config.json" in note] == []


@pytest.mark.parametrize("family", CONFIGS)
def test_each_default_alone(family: str, tmp_path: Path) -> None:
    """Every key that transformers' class has, at its default, in one source: nothing differs. At null, nothing differs or the key is one of
    those that transformers computes nothing with at null (test_config_nulls.py tries it)."""
    short = CONFIGS[family]
    write_sources(tmp_path, short, ("seed", "law"))
    for key, value in spelled_out(short).items():
        if key in ("model_type", "rope_parameters"):
            continue
        plans(tmp_path, short, {**short, key: value})
        if key in short or value is None:
            continue
        try:
            plans(tmp_path, short, {**short, key: None})
        except BamMergeError as error:
            other = f"sources.law: {key} = null, sources.seed has {value} (config.json). Experts must share it."
            assert str(error) == other if key in CAPS else f"{key} is null, which is no value of it" in str(error)


@pytest.mark.parametrize("rotary", SPELLED)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotary_defaults_spelled_out(family: str, rotary: str, tmp_path: Path) -> None:
    short = {**CONFIGS[family], **ROTARY[rotary]}
    long = {**short, "rope_scaling": {**short["rope_scaling"], **SPELLED[rotary]}, "quantization_config": None, "rope_theta": 10000.0}
    write_sources(tmp_path, short, ("seed", "law"))
    for pair in ((short, long), (long, short)):
        plans(tmp_path, *pair)


@pytest.mark.parametrize("name", [name for name in WRAPPED if MODELS[name]["config"]["model_type"] != "internvl_chat"])
def test_a_wrapper_saved_again_means_the_same(name: str) -> None:
    """As on the hub, flat or nested, and as transformers 5 writes it: the same facts, by the plan's reading and by the reference model's."""
    config = MODELS[name]["config"]
    made = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
    both = [config, json.loads(made.to_json_string(use_diff=False)), json.loads(made.to_json_string(use_diff=True))]
    inside = [unwrap(one) for one in both]
    assert [one.problems for one in inside] == [(), (), ()]
    family = load_architecture(inside[0].config["model_type"])
    problems: list[str] = []
    facts = [describe(family, {**one.config, "tie_word_embeddings": False}, problems) for one in inside]
    assert problems == []
    for one in facts[1:]:
        for key in {*one, *facts[0]} - {"rope_parameters"}:
            assert one[key] == facts[0][key], key
        ropes = [rope_function.effective(of["rope_parameters"], of["max_position_embeddings"]) for of in (one, facts[0])]
        assert rope_function.differences(*ropes) == []
    second = [meaning(model_config(text_config(one, has_head=True))) for one in both]
    assert second[0] == second[1] == second[2]
