"""Layers of one kind that have other sizes than the others: heads, key and value heads, their size, and the width of the FFN."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from proofs import UNPROVED, Forger, failed
from safetensors.torch import save_file
from test_cost import METHODS, cost_at
from test_exported import KINDS, assert_equals_reference, assert_same_tensors, exact, load
from test_model import TOLERANCE, build, distance, ids, stepwise, write_three
from toys import as_toy, toy_family

from bam_merge.architectures.config import describe
from bam_merge.architectures.cost import Kind, as_mixture
from bam_merge.architectures.strict_tables import TableError
from bam_merge.architectures.tables import load_architecture, read_table
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.model.config import model_config
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

__all__ = ["toy_family"]

transformers = pytest.importorskip("transformers")

SIZES = """[sizes.full_attention]
num_attention_heads = "far_heads"
num_key_value_heads = "far_key_value_heads"
head_dim = "far_head_dim"
intermediate_size = "far_width"

[tensors]"""
TOY = as_toy(
    "gemma3_text", "farther", ("[tensors]", SIZES), ('"sliding_window_pattern"]', '"sliding_window_pattern", "far_heads", "far_key_value_heads", "far_head_dim", "far_width"]'),
)  # fmt: skip
FAR = {"far_heads": 8, "far_key_value_heads": 1, "far_head_dim": 16, "far_width": 24}
OWN = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 24}
GEMMA = {key: value for key, value in CONFIGS["gemma3_text"].items() if key != "model_type"}
CONFIG = {"model_type": "farther", **GEMMA, **FAR}


@torch.no_grad()
def test_each_layer_computes_what_transformers_does_with_its_sizes(tmp_path: Path, toy_family: Callable[[str], None]) -> None:
    """Of two Gemma 3 models the layer with a window of one, and that without of the other, which has other sizes."""
    toy_family(TOY)
    torch.manual_seed(0)
    near, far = (
        transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**{**json.loads(json.dumps(GEMMA)), **sizes, "initializer_range": 0.2})
        )
        for sizes in ({}, OWN)
    )
    near.model.layers[1] = far.model.layers[1]
    near.model.rotary_emb.full_attention_inv_freq = far.model.rotary_emb.full_attention_inv_freq
    for parameter in near.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    state = {name: tensor.clone() for name, tensor in near.eval().state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model, expected = load_model(tmp_path), near(input_ids=ids()).logits
    assert float(expected.std()) > 0.1
    assert distance(model(ids()), expected) < TOLERANCE
    assert distance(stepwise(model, ids(), 30), expected) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures(kind: str, tmp_path: Path, toy_family: Callable[[str], None], run: Callable[..., Result]) -> None:
    """Merged, proved, exported, saved again, decoded from a cache."""
    toy_family(TOY)
    write_three(tmp_path, CONFIG)
    method, text = KINDS[kind]
    plan = plan_file(write_recipe(tmp_path, f"{text}\nrouter: {{init: normal, std: 0.5}}", method))
    assert plan.config["sizes_by_kind"] == {"full_attention": OWN}
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)
    folder = build(tmp_path, text, method)
    assert_equals_reference(folder, ids())
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")
    with torch.no_grad():
        whole = exact(model)(ids()).logits
        step = model(ids()[:, :30], use_cache=True)
        later = model(ids()[:, 30:], past_key_values=step.past_key_values, use_cache=True).logits
        assert distance(torch.cat((step.logits, later), 1), whole) < 1e-12
    assert "findings" not in run("inspect", tmp_path / "out").out


@pytest.mark.parametrize("kind", METHODS)
def test_the_cost_is_that_of_each_layer(kind: Kind, tmp_path: Path, toy_family: Callable[[str], None], run: Callable[..., Result]) -> None:
    toy_family(TOY)
    write_sources(tmp_path, CONFIG)
    method, text = METHODS[kind]
    plan = plan_file(write_recipe(tmp_path, text, method))
    dense = cost_at(tmp_path / "seed")
    made = as_mixture(dense, 3, kind, plan.recipe.gates[0])
    assert (made.parameters, made.active) == (plan.parameters, plan.active_parameters)
    assert made.kv_cache_bytes_per_token == plan.cost.kv_cache_bytes_per_token
    assert dense.kv_cache_bytes_per_token == 4 * 2 * (2 * 12 + 1 * 16)
    near, far = dense.flops(8) or ()
    assert (near.qkv, far.qkv) == (2 * 32 * (4 + 2 * 2) * 12, 2 * 32 * (8 + 2 * 1) * 16)
    assert (near.scores / (4 * 12), near.ffn, far.ffn) == (far.scores / (8 * 16), 2 * 3 * 32 * 40, 2 * 3 * 32 * 24)
    text = " ".join(run("inspect", tmp_path / "seed").out.split())
    assert "4 heads of 12, 2 for keys and values (without a window 8 of 16, 1 for keys and values, FFN 24)" in text


def test_a_dense_merge_keeps_its_keys(tmp_path: Path, toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    write_sources(tmp_path, CONFIG)
    plan = plan_file(write_recipe(tmp_path, method="merge"))
    assert {key: plan.config[key] for key in FAR} == FAR
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)


def test_layouts_without_a_word_for_it_refuse(tmp_path: Path, toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    write_sources(tmp_path, CONFIG)
    with pytest.raises(BamMergeError) as error:
        plan_file(write_recipe(tmp_path, method="btx", output="{path: out, layout: mixtral}"))
    assert any("mixtral needs sizes_by_kind = none, this merge has {" in problem for problem in error.value.problems)


@pytest.mark.parametrize(("types", "sizes", "top"), [
    (["sliding_attention"] * 2, None, (4, 2, 12, 40)), (["full_attention"] * 2, None, (8, 1, 16, 24)),
    (["full_attention", "sliding_attention"], {"full_attention": OWN}, (4, 2, 12, 40)),
])  # fmt: skip
def test_one_kind_alone_needs_no_second_sizes(
    types: list[str], sizes: Any, top: tuple[int, ...], toy_family: Callable[[str], None]
) -> None:
    """By both readings."""
    toy_family(TOY)
    config = {**{key: value for key, value in CONFIG.items() if key != "sliding_window_pattern"}, "layer_types": types}
    facts, second = describe(load_architecture("farther"), config, []), model_config(config)
    assert facts["sizes_by_kind"] == second.sizes_by_kind == sizes
    assert tuple(facts[key] for key in OWN) == top
    assert top == (second.num_attention_heads_per_expert, second.num_key_value_heads_per_expert, second.head_dim, second.intermediate_size)


@pytest.mark.parametrize(("keys", "message"), [
    ({"far_head_dim": 0}, "far_head_dim must be a positive integer, found 0."), ({"far_head_dim": "16"}, "far_head_dim must be a positive integer, found '16'."),
    ({"far_key_value_heads": 3}, "of full_attention layers 8 heads are not a multiple of 3 for keys and values."),
    ({"far_head_dim": 20}, "self_attn.q_proj.weight is [128, 32], config.json implies [160, 32]"),
])  # fmt: skip
def test_what_is_wrong_is_said(keys: dict[str, Any], message: str, tmp_path: Path, toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    write_sources(tmp_path, CONFIG)
    path = tmp_path / "law" / "config.json"
    path.write_text(json.dumps({**CONFIG, **keys}))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    assert any(problem.startswith("sources.law") and message in problem for problem in error.value.problems), error.value


def test_an_odd_head_of_one_kind_is_said(tmp_path: Path, toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    write_sources(tmp_path, {**CONFIG, "far_head_dim": 15})
    with pytest.raises(CheckpointError, match="head_dim 15 is odd and all of it rotates"):
        plan_file(write_recipe(tmp_path))


def test_sources_that_differ_are_refused_once(tmp_path: Path, toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    write_sources(tmp_path, CONFIG, ("seed", "code"))
    write_sources(tmp_path, {**CONFIG, "far_width": 48}, ("law",))
    with pytest.raises(CheckpointError) as error:
        plan_file(write_recipe(tmp_path))
    assert [problem for problem in error.value.problems if problem.startswith("sources.law")] == [
        "sources.law: far_width = 48, sources.seed has 24 (config.json). Experts must share it."
    ]


@pytest.mark.parametrize(("wrong", "words"), [
    (None, "is [128, 32], config.json implies [48, 32]"), ({"full_attention": {**OWN, "head_dim": 8}}, "config.json implies [64, 32]"),
    ({"sliding_attention": OWN}, "config.json implies"), ({"full_attention": {"heads": 3}}, "sizes_by_kind has sizes of full_attention and sliding_attention"),
    ({"full_attention": {**OWN, "num_key_value_heads": 3}}, "of full_attention layers 8 attention heads are not a multiple of 3"),
])  # fmt: skip
def test_wrong_sizes_in_a_result_are_found(wrong: Any, words: str, tmp_path: Path, toy_family: Callable[[str], None]) -> None:
    toy_family(TOY)
    write_sources(tmp_path, CONFIG)
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, UNPROVED)
    Forger(folder).config(sizes_by_kind=wrong)
    found = failed(verify(folder, plan))
    assert "sizes_by_kind" in found["config"]
    assert words in found["model"], found


@pytest.mark.parametrize("wrong", [7, [1], {"full_attention": 3}, {"full_attention": {"head_dim": "8"}}])
def test_inspect_says_what_are_no_sizes(wrong: Any, llamas: Path, run: Callable[..., Result]) -> None:
    folder = publish(plan_file(write_recipe(llamas)), None, UNPROVED)
    Forger(folder).config(sizes_by_kind=wrong)
    assert "sizes_by_kind must have sizes by kind of layer, found " in " ".join(run("inspect", folder).out.split())
    with pytest.raises(CheckpointError, match="sizes_by_kind"):
        load_model(folder)


@pytest.mark.parametrize(("text", "message"), [
    ("[sizes.vast]\nhead_dim = \"far\"\n[tensors]", "sizes.vast: no such kind of layer. Known: full_attention, sliding_attention."),
    ("[sizes.full_attention]\nhead_size = \"far\"\n[tensors]", "sizes.full_attention.head_size: unknown key"),
])  # fmt: skip
def test_a_table_that_says_it_wrongly(text: str, message: str) -> None:
    with pytest.raises(TableError) as error:
        read_table(as_toy("gemma3_text", "farther", ("[tensors]", text)), "farther.toml")
    assert message in str(error.value)
