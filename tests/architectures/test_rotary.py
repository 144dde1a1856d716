"""Rotary embeddings that cannot be computed are refused in the plan; those that depend on the length are verified within it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED, failed
from torch import Tensor

from bam_merge.architectures.rotary import rotary_problems
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import load_model
from bam_merge.model.positions import Cache
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.options import VerifyOptions
from bam_merge.verifying.report import Check
from bam_merge.verifying.verification import verify


def proved(folder: Path, config: dict[str, Any], method: str = "bam") -> dict[str, Check]:
    """The checks of a merge of three models of this configuration."""
    write_sources(folder, config)
    plan = plan_file(write_recipe(folder, "", method))
    return {check.name: check for check in verify(publish(plan, None, UNPROVED), plan, options=VerifyOptions("full")).checks}


# ---- heads of an odd size


@pytest.mark.parametrize("head_dim", [1, 3, 7, 9])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "cohere", "gpt_neox", "phi3"])
def test_a_head_that_rotates_whole_must_be_even(family: str, head_dim: int, tmp_path: Path, run: Any) -> None:
    """Half-split or interleaved: transformers refuses such a configuration, or ends in an error of shapes."""
    sizes = {"head_dim": head_dim} if family == "qwen3" else {"hidden_size": 4 * head_dim, "rotary_pct": 1.0}
    write_sources(tmp_path, {**{k: v for k, v in CONFIGS[family].items() if k != "head_dim"}, **sizes})
    result = run("plan", write_recipe(tmp_path))
    assert result.status == 2
    assert result.err.startswith(f"error: sources.seed: config.json: head_dim {head_dim} is odd and all of it rotates")
    assert len(result.err.splitlines()) == 1  # all sources are so, and it is said once
    assert not (tmp_path / "out").exists()


PARTS = {
    ("gpt_neox", 7, 0.75): 5,
    ("gpt_neox", 5, 0.5): 2,
    ("gpt_neox", 7, 0.9): 6,
    ("phi3", 7, 0.75): 5,
    ("phi3", 7, 0.5): 3,
    ("phi3", 9, 0.9): 8,
}


@pytest.mark.parametrize(("family", "head_dim", "share"), PARTS)
def test_an_odd_part_of_a_head_is_rounded_up_to_the_next_pair(family: str, head_dim: int, share: float, tmp_path: Path) -> None:
    """As transformers does, whose logits ours are; and verification finds nothing wrong with it."""
    transformers = pytest.importorskip("transformers")
    assert int(head_dim * share) == PARTS[family, head_dim, share]
    key = "rotary_pct" if family == "gpt_neox" else "partial_rotary_factor"
    checks = proved(tmp_path, {**CONFIGS[family], "hidden_size": 4 * head_dim, key: share})
    assert all(check.ok is not False for check in checks.values()), checks
    ids = torch.arange(3, 20).view(1, -1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "seed", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "seed")(ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


# ---- what else cannot be computed

THETA = {"rope_theta": 1e4}
BAD: dict[str, tuple[dict[str, Any], int | None, str]] = {
    # rope_parameters, max_position_embeddings, the message; heads have 8 channels
    "no such type": ({"rope_type": "spiral", **THETA}, 128, "rope_type 'spiral' is not known here. Known: default, linear, "),
    "no factor": ({"rope_type": "linear", **THETA}, 128, "rope_parameters.factor must be a number for rope_type linear, found None."),
    "no length": ({"rope_type": "dynamic", "factor": 2.0, **THETA}, None, "max_position_embeddings is missing; rope_type 'dynamic' is worked out"),
    "too few factors": ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4, **THETA}, 128, "rope_parameters.short_factor must be 4 numbers"),
    "a length as text": ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "64", **THETA}, 128, "original_max_position_embeddings must be a number for rope_type yarn, found '64'."),
    "more than the head": ({"rope_type": "default", "partial_rotary_factor": 1.5, **THETA}, 128, "partial_rotary_factor must be from 0 to 1, found 1.5."),
    "less than nothing": ({"rope_type": "default", "partial_rotary_factor": -0.5, **THETA}, 128, "partial_rotary_factor must be from 0 to 1, found -0.5."),
    "one pair, dynamic": ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.25, **THETA}, 128, "rope_type dynamic needs more than 2 rotating channels, head_dim 8 has 2."),
    "theta 0": ({"rope_type": "default", "rope_theta": 0.0}, 128, "rope_theta must be above 0 for rope_type default, found 0.0."),
    "theta 1, yarn": ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, 128, "rope_theta must be above 1 for rope_type yarn, found 1.0."),
    "factor 0": ({"rope_type": "linear", "factor": 0, **THETA}, 128, "rope_parameters.factor must be above 0 for rope_type linear, found 0."),
    "one position": ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "original_max_position_embeddings": 1, **THETA}, 128, "original_max_position_embeddings must be above 1 for rope_type longrope, found 1."),
    "no middle": ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, **THETA}, 128, "rope_parameters.high_freq_factor must be above 4.0 for rope_type llama3, found 4.0."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_positions_that_cannot_be_computed(name: str, tmp_path: Path) -> None:
    rope, most, message = BAD[name]
    (problem,) = rotary_problems(rope, 8, most)
    assert message in problem and problem.startswith("config.json: ")
    family = "phi3" if "partial_rotary_factor" in rope else "llama"  # llama turns whole heads, whatever the share says
    config = {**CONFIGS[family], "rope_parameters": rope, "max_position_embeddings": most}
    write_sources(tmp_path, config)
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    assert list(error.value.problems) == [f"sources.seed: {problem}"]


@pytest.mark.parametrize("rope", [
    {"rope_type": [1], **THETA}, {"rope_type": None, **THETA}, {"rope_type": "default", "rope_theta": float("inf")},
    {"rope_type": "default", "partial_rotary_factor": 10**400, **THETA}, {"rope_type": "linear", "factor": True, **THETA}, {},
])  # fmt: skip
def test_no_value_is_too_strange_for_a_message(rope: dict[str, Any]) -> None:
    problems = list(rotary_problems(rope, 8, 128))
    assert problems and all(problem.startswith("config.json: ") for problem in problems)


@pytest.mark.parametrize("rope", [
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1, "attention_factor": None, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2] * 4, "original_max_position_embeddings": 1, "attention_factor": 1.5},
    {"rope_type": "linear", "factor": 4},
])  # fmt: skip
def test_positions_that_can(rope: dict[str, Any], tmp_path: Path) -> None:
    assert not list(rotary_problems({**THETA, **rope}, 8, 128))
    checks = proved(tmp_path, {**CONFIGS["llama"], "rope_parameters": {**THETA, **rope}})
    assert all(check.ok is not False for check in checks.values()), checks


# ---- frequencies that depend on the length


def dynamic(limit: int) -> dict[str, Any]:
    return {**CONFIGS["llama"], "max_position_embeddings": limit, "rope_scaling": {"type": "dynamic", "factor": 4.0}}


def longrope(limit: int) -> dict[str, Any]:
    scaling = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [3.0, 4.0, 5.0, 6.0]}
    return {**CONFIGS["phi3"], "original_max_position_embeddings": limit, "rope_scaling": scaling}


@pytest.mark.parametrize("method", ["bam", "btx"])
@pytest.mark.parametrize(("config", "span"), [
    (dynamic(2), 2), (dynamic(8), 8), (dynamic(16), 16), (dynamic(17), 17), (dynamic(23), 23), (dynamic(24), 24), (dynamic(128), 24),
    (longrope(2), 24), (longrope(15), 24), (longrope(16), 16), (longrope(23), 23), (longrope(24), 24),
])  # fmt: skip
def test_cached_decoding_is_compared_within_the_limit(config: dict[str, Any], span: int, method: str, tmp_path: Path) -> None:
    """Of the 24 tokens of the sample, 16 come first. The two parts are of one kind where both are within the limit, or both beyond."""
    checks = proved(tmp_path, config, method)
    assert all(check.ok is not False for check in checks.values()), checks
    check = checks["cached decoding"]
    assert check.ok is True and check.value is not None and check.value < 1e-4
    assert check.detail.startswith("equals the full forward" if span == 24 else f"equals the full forward of {span} tokens (")
    assert ("scaling changes the frequencies of longer sequences" in check.detail) == (span < 24)


def test_where_every_token_changes_the_frequencies_it_says_so(tmp_path: Path) -> None:
    check = proved(tmp_path, dynamic(1))["cached decoding"]
    assert (check.ok, check.detail) == (
        None,
        "not run: dynamic scaling changes the frequencies of longer sequences from the second token on",
    )


@pytest.mark.parametrize("config", [dynamic(8), longrope(16), CONFIGS["llama"]])
def test_a_cache_that_forgets_is_still_found(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path, config)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    real = Cache.extend

    def forgets(self: Cache, layer: int, name: str, new_BT: Tensor) -> Tensor:
        known = (layer, name) in self.tensors
        all_BS = real(self, layer, name, new_BT)
        return torch.cat((all_BS[:, :1] * 0, all_BS[:, 1:]), 1) if known and name.startswith("v") else all_BS

    monkeypatch.setattr(Cache, "extend", forgets)
    assert set(failed(verify(folder, plan))) == {"cached decoding"}
