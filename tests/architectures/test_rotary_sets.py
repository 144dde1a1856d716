"""Rotary embeddings of layers with and without a sliding window: every spelling of the two, as transformers reads it, or refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from proofs import UNPROVED, Forger, failed
from test_model import distance, ids, write_three
from test_spellings import edit, theirs
from toys import as_toy, toy_family

from bam_merge.architectures.config import describe
from bam_merge.architectures.rotary_sets import FULL, SLIDING
from bam_merge.architectures.spellings import conflicts
from bam_merge.architectures.tables import load_architecture
from bam_merge.errors import CheckpointError
from bam_merge.model.config import model_config
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.config import meaning
from bam_merge.verifying.verification import verify

__all__ = ["toy_family"]

GEMMA = {key: value for key, value in CONFIGS["gemma3_text"].items() if not key.startswith("rope")}
LINEAR, YARN = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

KEYS: dict[str, tuple[Any, ...]] = {
    "rope_theta": ("", 1e6, 5e5), "rope_local_base_freq": ("", 1e4, 2e3),
    "rope_scaling": ("", None, LINEAR, {"type": "linear", "factor": 8.0}, {**YARN, "rope_theta": 5e5}),
    "rope_parameters": (
        "", None, {FULL: dict(LINEAR), SLIDING: {"rope_type": "default", "rope_theta": 2e3}}, {FULL: {"rope_type": "default", "rope_theta": 5e5}},
        {SLIDING: {"rope_type": "linear", "factor": 2.0}}, {FULL: {"type": "linear", "factor": 8.0}, SLIDING: None}, {FULL: dict(YARN), SLIDING: {"rope_theta": 1e4}},
    ),
}  # fmt: skip


def test_every_combination_of_keys_is_refused_or_read_as_transformers_does() -> None:
    """315 combinations of bases, scaling and nested sets, by both readings."""
    table, read = load_architecture("gemma3_text"), 0
    for values in itertools.product(*KEYS.values()):
        config = GEMMA | {key: value for key, value in zip(KEYS, values, strict=True) if value != ""}
        problems = conflicts(table, config)
        facts = describe(table, config, problems)
        if problems:
            continue
        read += 1
        expected = theirs(config).rope_parameters
        reference = model_config(config)
        for found in (
            (facts["rope_parameters"], facts["sliding_rope_parameters"]),
            (reference.rope_parameters, reference.sliding_rope_parameters),
        ):
            for mine, kind in zip(found, (FULL, SLIDING), strict=True):
                for key in ("rope_type", "rope_theta", "factor"):
                    assert mine is not None
                    assert mine.get(key) == expected[kind].get(key), (key, kind, config)
    assert read > 40


@pytest.mark.parametrize(("keys", "message"), [
    ({"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}, "rope_parameters has rope_type, factor, rope_theta; gemma3_text has one set for full_attention and one for sliding_attention"),
    ({"rope_parameters": {"chunked_attention": {"rope_theta": 1e6}}}, "rope_parameters has chunked_attention; gemma3_text has one set for"),
    ({"rope_parameters": {FULL: [1]}}, "rope_parameters.full_attention must be an object, found [1]."),
    ({"rope_scaling": {FULL: {"rope_type": "linear"}}}, "full_attention in rope_scaling must be a number, text or a list of numbers."),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.type = 'linear': of gemma3_text transformers reads rope_scaling.rope_type alone, which is 'default'."),
    ({"rope_scaling": [1]}, "rope_scaling must be an object, found [1]."),
    ({"rope_scaling": LINEAR, "rope_parameters": {SLIDING: {"rope_theta": 1e4}}}, "rope_scaling belongs to full_attention, which rope_parameters has no set for: transformers does not load such a model."),
    ({"rope_scaling": LINEAR, "rope_parameters": {FULL: {"rope_type": "yarn", "factor": 8.0}}}, "rope_scaling.rope_type = 'linear' and rope_parameters.full_attention has 'yarn': two spellings of one fact that differ"),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": {FULL: {"rope_type": "default"}}}, "rope_scaling.type = 'linear' and rope_parameters.full_attention has 'default'"),
    ({"rope_theta": 5e5, "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e6}}}, "rope_theta = 500000.0 and rope_parameters.full_attention.rope_theta = 1000000.0 are two spellings of the rotary base"),
    ({"rope_local_base_freq": 5e5, "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 1e4}}}, "rope_local_base_freq = 500000.0 and rope_parameters.sliding_attention.rope_theta = 10000.0 are two spellings of the rotary base"),
    ({"rope_theta": None}, "rope_theta is null, which is no value of it"),
    ({"rope_local_base_freq": "1e4"}, "rope_local_base_freq must be a number, found '1e4'."),
    ({"rope_parameters": {SLIDING: {"rope_type": "llama3", "rope_theta": 1e4}}}, "rope_parameters.factor must be a number for rope_type llama3"),
    ({"rope_scaling": {"rope_type": "warp", "factor": 2.0}}, "rope_type 'warp' is not known here."),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not known here, only null"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention = true is not known here, only false"),
])  # fmt: skip
def test_what_is_wrong_is_said(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_sources(tmp_path, GEMMA)
    for source in ("seed", "code", "law"):
        edit(tmp_path / source, **keys)
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    found = [problem for problem in error.value.problems if problem.startswith("sources.seed: config.json: ")]
    assert any(message in problem for problem in found), error.value.problems


def test_another_family_has_one_set(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["ministral"])
    edit(tmp_path / "law", rope_parameters={FULL: {"rope_theta": 1e4}, SLIDING: {"rope_theta": 1e4}})
    with pytest.raises(CheckpointError, match=r"one set per full_attention, sliding_attention; ministral has one for all layers"):
        plan_file(write_recipe(tmp_path))


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as on the hub, as transformers 5": (
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "left out": ({}, {"rope_theta": 1e6, "rope_local_base_freq": 10000}),
    "a set that no layer has": (
        {"layer_types": [SLIDING, SLIDING], "sliding_window_pattern": 6},
        {"layer_types": [SLIDING, SLIDING], "sliding_window_pattern": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "no layer with a window": (
        {"layer_types": [FULL, FULL], "sliding_window_pattern": 1},
        {"layer_types": [FULL, FULL], "sliding_window_pattern": 1, "rope_local_base_freq": 5e5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_two_spellings_are_one_model(case: str, tmp_path: Path) -> None:
    mine, theirs = SAME[case]
    write_sources(tmp_path, GEMMA)
    for source in ("seed", "code", "law"):
        edit(tmp_path / source, **(theirs if source == "law" else mine))
    plan = plan_file(write_recipe(tmp_path))
    assert [note for note in plan.notes if "config.json" in note] == []
    if case in ("a set that no layer has", "no layer with a window"):
        assert "sliding_rope_parameters" not in plan.config
        assert plan.config["rope_parameters"]["rope_theta"] == (1e4 if SLIDING in mine["layer_types"] else 1e6)


@pytest.mark.parametrize(("keys", "named"), [
    ({"rope_local_base_freq": 2e4}, "rotary embedding of layers with a window differs from sources.seed: rope_theta 20000.0 here, 10000.0 there"),
    ({"rope_theta": 2e4}, "rotary embedding differs from sources.seed: rope_theta 20000.0 here, 1000000.0 there"),
    ({"rope_scaling": LINEAR}, "rotary embedding differs from sources.seed: rope_type 'linear' here, 'default' there"),
    ({"rope_parameters": {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}}, "rotary embedding of layers with a window differs from sources.seed: rope_type"),
])  # fmt: skip
def test_sources_that_differ_are_refused_or_accepted(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_sources(tmp_path, GEMMA)
    edit(tmp_path / "law", **keys)
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    assert len([problem for problem in error.value.problems if problem.startswith("sources.law")]) == 1
    assert any(named in problem for problem in error.value.problems)
    plan = plan_file(write_recipe(tmp_path, "accept: {facts: {rope_parameters: seed}}"))
    assert len(plan.accepted) == 1
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)


# ---- what is computed, found and shown -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"sliding_rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"sliding_rope_parameters": None}]
)
def test_a_wrong_set_is_found(wrong: dict[str, Any], tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["gemma3_text"])
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    right = meaning(load_model(folder).config)
    Forger(folder).config(**wrong)
    assert meaning(load_model(folder).config) != right
    found = failed(verify(folder, plan))
    assert "sliding_rope_parameters" in found["config"]
    assert "rotary f" in found["source configs"]
    assert "layer 0, expert 0 (seed)" in found["expert isolation"]


def test_a_set_that_the_plan_misread_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge.sources import dense

    write_sources(tmp_path, CONFIGS["gemma3_text"])
    right = dense.describe
    monkeypatch.setattr(dense, "describe", lambda *args: {**right(*args), "sliding_rope_parameters": None})
    plan = plan_file(write_recipe(tmp_path))
    found = failed(verify(publish(plan, None, UNPROVED), plan))
    assert "seed: rotary f" in found["source configs"]
    assert "layer 0" in found["expert isolation"]


def test_each_kind_of_layer_turns_by_its_own(tmp_path: Path) -> None:
    """Swapped, the two compute something else; and one of two layers alone does too."""
    write_three(tmp_path, CONFIGS["gemma3_text"])
    logits = []
    for base, local in ((1e6, 1e4), (1e4, 1e6), (1e6, 1e6), (1e4, 1e4)):
        edit(tmp_path / "seed", rope_theta=base, rope_local_base_freq=local)
        with torch.no_grad():
            logits.append(load_model(tmp_path / "seed")(ids()))
    assert all(distance(a, b) > 1e-4 for a, b in itertools.combinations(logits, 2))


def test_inspect_shows_both(tmp_path: Path, run: Callable[..., Result]) -> None:
    write_sources(tmp_path, CONFIGS["gemma3_text"], ("seed",))
    text = " ".join(run("inspect", tmp_path / "seed").out.split())
    assert "rotary linear, theta 1,000,000 (10,000 in layers with a window)" in text
    facts = json.loads(run("inspect", tmp_path / "seed", "--json").out)["facts"]
    assert facts["sliding_rope_parameters"]["rope_theta"] == 1e4


OLMO_LIKE = as_toy("qwen3", "olmoish", ('windows = "by layer"', 'windows = "all but each last"\nrotary_by_kind = true'), (
    'sliding_window = 4096, use_sliding_window = false, max_window_layers = 28', 'sliding_window = 8, sliding_window_pattern = 2, rope_theta = 500000.0'
), ('neutral = ["use_sliding_window", "max_window_layers"]', "neutral = []"))  # fmt: skip
"""Scaling in layers without a window only, and one base for both kinds."""


@pytest.mark.parametrize(("keys", "bases", "types"), [
    ({}, (5e5, 5e5), ("default", None)), ({"rope_theta": 5e5, "rope_scaling": YARN}, (5e5, 5e5), ("yarn", "default")),
    ({"rope_parameters": {FULL: {**YARN, "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}}, (1e6, 1e4), ("yarn", "default")),
    ({"rope_theta": 1e6, "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}}, (1e6, 1e4), ("yarn", "default")),
    ({"rope_theta": 1e6}, None, "rope_theta = 1000000.0 is another spelling of the rotary base, which transformers takes from rope_parameters.sliding_attention.rope_theta for olmoish; that is left out, and means 500000.0."),
])  # fmt: skip
def test_a_family_without_a_key_for_the_second_base(
    keys: dict[str, Any], bases: tuple[float, float] | None, types: Any, toy_family: Callable[[str], None]
) -> None:
    toy_family(OLMO_LIKE)
    config = {**CONFIGS["qwen3"], "model_type": "olmoish", **keys}
    problems = conflicts(load_architecture("olmoish"), config)
    facts = describe(load_architecture("olmoish"), config, [])
    if bases is None:
        assert types in problems[0]
        return
    assert problems == []
    assert facts["rope_parameters"]["rope_theta"] == bases[0]
    assert facts["rope_parameters"]["rope_type"] == types[0]
    assert (facts["sliding_rope_parameters"] or facts["rope_parameters"])["rope_theta"] == bases[1]
    assert (facts["sliding_rope_parameters"] or {}).get("rope_type") == types[1]
    reference = model_config(config)
    assert meaning(reference)["rotary frequencies"] == meaning(model_config({**config}))["rotary frequencies"]
    assert (reference.sliding_rope_parameters or {}).get("rope_type") == types[1]
    assert reference.rope_parameters["rope_theta"] == bases[0]
