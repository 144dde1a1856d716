"""Gemma 4: what its config.json can say in several ways, what of it is refused, and a merge of a model of images around it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from proofs import UNPROVED, failed
from safetensors.torch import load_file, save_file
from test_exported import KINDS, assert_equals_reference
from test_model import TOLERANCE, build, distance, ids, theirs, write_dense, write_three

from bam_merge.architectures.config import describe
from bam_merge.architectures.tables import load_architecture
from bam_merge.errors import CheckpointError
from bam_merge.model.config import model_config
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

transformers = pytest.importorskip("transformers")

FULL, SLIDES = "full_attention", "sliding_attention"
KEYS = CONFIGS["gemma4_text_keys"]
NEWER = {key: value for key, value in KEYS.items() if key not in ("global_head_dim", "num_global_key_value_heads")}
LISTED = {"1": {"head_dim": 10, "num_key_value_heads": 1}}


def edit(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVED"}))


# ---- sizes by kind and by layer ----------------------------------------------------------------------------------------------------


def test_what_transformers_saves_is_the_same_model(tmp_path: Path) -> None:
    """A newer file has the sizes layer by layer: the same facts, the same plan, and the same reading by the reference model."""
    saved = transformers.AutoConfig.for_model(**KEYS).to_dict()
    assert saved["per_layer_config"] == LISTED
    saved = json.loads(json.dumps(saved))
    table, problems = load_architecture("gemma4_text"), list[str]()
    assert describe(table, saved, problems) == describe(table, KEYS, problems)
    assert model_config(saved) == model_config(KEYS)
    assert problems == []
    write_sources(tmp_path, KEYS)
    older = plan_file(write_recipe(tmp_path, method="merge"))
    edit(tmp_path / "seed", per_layer_config=LISTED, global_head_dim="REMOVED", num_global_key_value_heads="REMOVED")
    mixed = plan_file(write_recipe(tmp_path, method="merge"))
    assert mixed.config == older.config
    assert [step.expression for step in mixed.steps] == [step.expression for step in older.steps]
    assert not any("known" in note for note in mixed.notes)


@pytest.mark.parametrize(("listed", "words"), [
    ({"1": {"head_dim": 10, "intermediate_size": 80}}, "per_layer_config gives full_attention layers intermediate_size = 80"),
    ({"0": {"head_dim": 8}, "1": {"head_dim": 10}}, "per_layer_config gives sliding_attention layers head_dim = 8"),
    ({"7": {"head_dim": 10}}, "per_layer_config must have an object for some of the 2 layers"),
    ({"1": {"head_dim": -1}}, "global_head_dim must be a positive integer, found -1"),
    ([10], "per_layer_config must have an object for some of the 2 layers"),
])  # fmt: skip
def test_sizes_that_are_not_those_of_a_kind(listed: Any, words: str) -> None:
    problems: list[str] = []
    describe(load_architecture("gemma4_text"), {**NEWER, "per_layer_config": listed}, problems)
    assert words in "\n".join(problems)


def test_layers_of_one_kind_that_differ() -> None:
    config = {**NEWER, "num_hidden_layers": 3, "layer_types": [SLIDES, FULL, FULL], "per_layer_config": {"1": {"head_dim": 10}}}
    problems: list[str] = []
    describe(load_architecture("gemma4_text"), config, problems)
    assert "per_layer_config gives full_attention layers other sizes in some of them than in others" in problems[0]


def test_fewer_heads_only_where_values_are_keys(tmp_path: Path) -> None:
    """transformers passes over num_global_key_value_heads without attention_k_eq_v; so do both readings."""
    config = {**CONFIGS["gemma4_text"], "num_global_key_value_heads": 1}
    folder = write_dense(tmp_path, config)
    assert load_file(folder / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"].shape == (2 * 10, 32)
    with torch.no_grad():
        assert distance(load_model(folder)(ids()), theirs(folder)(input_ids=ids()).logits) < TOLERANCE


def test_the_last_layer_is_without_a_window_whatever_is_said(tmp_path: Path) -> None:
    config = {**CONFIGS["gemma4_text"], "layer_types": [SLIDES, SLIDES]}
    assert describe(load_architecture("gemma4_text"), config, [])["layer_types"] == [SLIDES, FULL]
    folder = write_dense(tmp_path, config)
    with torch.no_grad():
        assert distance(load_model(folder)(ids()), theirs(folder)(input_ids=ids()).logits) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_all_are_without_a_window(kind: str, tmp_path: Path) -> None:
    """Then all have the sizes of their kind."""
    write_three(tmp_path, {**KEYS, "layer_types": [FULL, FULL], "global_head_dim": 10})
    method, text = KINDS[kind]
    folder = build(tmp_path, text, method)
    report = verify(folder)
    assert report.ok, failed(report)
    assert_equals_reference(folder, ids())


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "embeddings of each layer": ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256 cannot be merged here: every layer has an embedding of each token for itself"),
    "the same, left out": ({"hidden_size_per_layer_input": "REMOVED"}, "hidden_size_per_layer_input = 256, which is meant where it is left out, cannot be merged here"),
    "keys of other layers": ({"num_kv_shared_layers": 1}, "num_kv_shared_layers = 1 cannot be merged here: layers use keys and values of other layers"),
    "sight of what comes": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = \"all\" is not known here, only \"vision\""),
    "a base beside the sets": ({"rope_theta": 5e5}, "rope_theta, which transformers ignores for gemma4_text. Write it into rope_parameters"),
    "an older scaling": ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling, which transformers ignores for gemma4_text"),
    "one set of two": ({"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}}}, "rope_parameters.sliding_attention lacks rope_type, rope_theta"),
    "a set without a base": ({"rope_parameters": {FULL: {"rope_type": "default"}, SLIDES: {"rope_type": "default", "rope_theta": 1e4}}}, "rope_parameters.full_attention lacks rope_theta"),
    "a share that is not read": ({"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, SLIDES: {"rope_type": "default", "rope_theta": 1e4}}}, "rope_parameters.full_attention.partial_rotary_factor = 0.5, which transformers reads of rope_type proportional alone"),
    "no size": ({"global_head_dim": None}, "global_head_dim is null, which is no value of it"),
    "heads that do not divide": ({"num_global_key_value_heads": 3}, "of full_attention layers 4 heads are not a multiple of 3"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused(wrong: str, tmp_path: Path) -> None:
    keys, words = WRONG[wrong]
    write_sources(tmp_path, KEYS)
    edit(tmp_path / "code", **keys)
    with pytest.raises(CheckpointError) as caught:
        plan_file(write_recipe(tmp_path))
    assert words.replace('"', "'") in str(caught.value).replace('"', "'")
    assert "sources.code" in str(caught.value)


def test_no_other_family_turns_in_proportion() -> None:
    problems: list[str] = []
    describe(
        load_architecture("llama"), {**CONFIGS["llama"], "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, problems
    )
    assert problems == ["config.json: rope_type 'proportional' is not known here of llama, only of Gemma 4."]


# ---- as users have it --------------------------------------------------------------------------------------------------------------


def test_it_is_said_what_it_is(tmp_path: Path, run: Callable[..., Result]) -> None:
    write_sources(tmp_path, KEYS, names=("seed",))
    text = " ".join(run("inspect", tmp_path / "seed").out.split())
    for words in (
        "4 heads of 6, 2 for keys and values (without a window 4 of 10, 1 for keys and values)", "values normed",
        "values are keys in layers without a window", "rotary proportional, theta 1,000,000 (10,000 in layers with a window)",
        "layers x a stored number", "norms before and after attention and FFN", "scores x 1",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("outer", ["gemma4", "gemma4_unified"])
def test_a_model_of_images_around_it(outer: str, tmp_path: Path, run: Callable[..., Result]) -> None:
    """Three wrappers as they are published: their text models become a mixture, which is proved and runs."""
    text = {**(KEYS if outer == "gemma4" else CONFIGS["gemma4_unified_text"]), "tie_word_embeddings": True}
    write_three(tmp_path, text)
    for source in ("seed", "code", "law"):
        folder = tmp_path / source
        tensors = load_file(folder / "model.safetensors")
        inner = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
        beside = {"model.embed_vision.embedding_projection.weight": torch.ones(32, 8)}
        save_file({**inner, **beside}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": outer, "text_config": text, "tie_word_embeddings": True}))
    plan = plan_file(write_recipe(tmp_path))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)
    assert plan.config["values_are_keys"] is True
    assert plan.unused["seed"] == {
        "model.embed_vision.embedding_projection.weight": plan.unused["seed"]["model.embed_vision.embedding_projection.weight"]
    }
    assert_equals_reference(tmp_path / "out", ids())
    assert run("verify", tmp_path / "out").status == 0


def test_a_number_of_a_layer_that_is_wrong_is_found(tmp_path: Path) -> None:
    write_three(tmp_path, KEYS)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.layer_scale.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert {"merges"} <= {check.name for check in verify(folder, plan).checks if check.ok is False}
