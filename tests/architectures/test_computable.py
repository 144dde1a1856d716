"""What no model can compute with is refused in the plan, not found when everything is written; what is at the edge passes verification."""

from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED, failed

from bam_merge.architectures.computable import ACTIVATION_NAMES
from bam_merge.errors import CheckpointError
from bam_merge.model.model import ACTIVATIONS
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 3.0, 4.0], "rope_theta": 1e4}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **parameters}}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown rotary": ("llama", rope(rope_type="foo"), "rope_type 'foo' is not known here. Known: default, linear, dynamic, yarn, llama3, longrope, proportional."),
    "linear without its factor": ("mistral", rope(rope_type="linear"), "rope_parameters.factor must be a number for rope_type linear, found None."),
    "a factor that is text": ("qwen3", rope(rope_type="linear", factor="2"), "rope_parameters.factor must be a number for rope_type linear, found '2'."),
    "an optional number that is text": ("llama", {"rope_parameters": {**YARN, "beta_fast": "32"}}, "rope_parameters.beta_fast must be a number for rope_type yarn, found '32'."),
    "factor 0": ("qwen2", rope(rope_type="linear", factor=0), "rope_parameters.factor must be above 0 for rope_type linear, found 0."),
    "negative factor": ("llama", rope(rope_type="dynamic", factor=-1.5), "rope_parameters.factor must be above 0 for rope_type dynamic, found -1.5."),
    "base 0": ("llama", {"rope_theta": 0}, "rope_parameters.rope_theta must be above 0 for rope_type default, found 0.0."),
    "negative base": ("cohere", {"rope_theta": -1e4}, "rope_parameters.rope_theta must be above 0 for rope_type default, found -10000.0."),
    "yarn's logarithm of its base": ("llama", {"rope_parameters": {**YARN, "rope_theta": 1.0}}, "rope_parameters.rope_theta must be above 1 for rope_type yarn, found 1.0."),
    "yarn with no turns": ("llama", {"rope_parameters": {**YARN, "beta_slow": -1}}, "rope_parameters.beta_slow must be above 0 for rope_type yarn, found -1."),
    "llama3 with equal bands": ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_parameters.high_freq_factor must be above 1.0 for rope_type llama3, found 1.0."),
    "llama3 with a band of 0": ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 0}}, "rope_parameters.low_freq_factor must be above 0 for rope_type llama3, found 0."),
    "longrope with a factor of 0": ("phi3", {"rope_parameters": {**LONG, "long_factor": [1.0, 0.0, 3.0, 4.0]}}, "rope_parameters.long_factor must be above 0 for rope_type longrope, found 0.0."),
    "longrope with too few factors": ("phi3", {"rope_parameters": {**LONG, "short_factor": [1.0]}}, "rope_parameters.short_factor must be 4 numbers for rope_type longrope, found [1.0]."),
    "longrope from one position": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 1}, "original_max_position_embeddings must be above 1 for rope_type longrope, found 1."),
    "yarn of phi3, which is longrope": ("phi3", {"rope_parameters": YARN, "original_max_position_embeddings": 16}, "rope_parameters.short_factor must be 4 numbers for rope_type longrope, found None."),
    "more rotary channels than there are": ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor must be from 0 to 1, found 1.5."),
    "dynamic over one pair": ("gpt_neox", rope(rope_type="dynamic", factor=2.0, partial_rotary_factor=0.25), "rope_type dynamic needs more than 2 rotating channels, head_dim 8 has 2."),
    "scaling from no limit": ("llama", {**rope(rope_type="llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0), "max_position_embeddings": None}, "max_position_embeddings is missing; rope_type 'llama3' is worked out from it. Add it."),
    "unknown activation": ("llama", {"hidden_act": "snake"}, f"hidden_act 'snake' is not known here. Known: {', '.join(ACTIVATION_NAMES)}."),
    "unknown kind of layer": ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types names 'chunked_attention', which is not known here. Known: full_attention, sliding_attention."),
    "negative eps": ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps must be 0 or more, found -1e-05."),
    "negative eps of a layer norm": ("gpt_neox", {"layer_norm_eps": -0.5}, "layer_norm_eps must be 0 or more, found -0.5."),
}  # fmt: skip


@pytest.mark.parametrize("method", ["bam", "merge"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_in_the_plan(name: str, method: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[name]
    write_sources(tmp_path, {**CONFIGS[family], **changes})
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path, "", method))
    assert f"sources.seed: config.json: {message}" in error.value.problems
    assert all(problem.startswith("sources.seed: config.json: ") for problem in error.value.problems)  # once, not for every source
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", {"rope_theta": 1.0}),
    ("llama", {"rope_theta": 0.5}),
    ("llama", {"rms_norm_eps": 0}),
    ("llama", rope(rope_type="linear", factor=0.5)),
    ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1.5}}),
    ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.001}}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 2}),
    ("gpt_neox", {"rotary_pct": 1.0}),
    ("gpt_neox", {"rotary_pct": 0.0}),
    ("gpt_neox", rope(rope_type="dynamic", factor=2.0, partial_rotary_factor=0.5)),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
])  # fmt: skip
def test_what_is_just_defined_passes_verification(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    write_sources(tmp_path, {**CONFIGS[family], **changes})
    plan = plan_file(write_recipe(tmp_path, "ffn: {top_k: 2}"))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)


def test_problems_of_the_configuration_come_with_those_of_the_comparison(tmp_path: Path) -> None:
    write_sources(tmp_path, {**CONFIGS["llama"], "hidden_act": "snake"}, ("seed", "code"))
    write_sources(tmp_path, {**CONFIGS["llama"], "vocab_size": 65}, ("law",))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    text = "\n".join(error.value.problems)
    assert "sources.seed: config.json: hidden_act 'snake'" in text
    assert "sources.law: vocab_size = 65" in text


def test_the_activations_are_those_that_the_model_computes() -> None:
    assert set(ACTIVATION_NAMES) == set(ACTIVATIONS)
