"""What is a model, but not one that can be merged with the others; and what may differ."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from damage import LAYER, Damage, add, deadline, edit_config, edit_tensors, said, tokenizer

# ---- what is a model, but not one that can be merged with the others -------------------------------------------------------

UNFIT: dict[str, tuple[Damage, str]] = {
    "8 a tensor missing": (lambda law: edit_tensors(law, lambda t: t.pop(LAYER)), "sources.law: model.layers.1.self_attn.k_proj.weight missing: 1 tensor(s). Is the download complete?"),
    "8 the head missing": (lambda law: edit_tensors(law, lambda t: t.pop("lm_head.weight")), "sources.law: lm_head.weight missing: 1 tensor(s) (config.json has tie_word_embeddings=false, so the head must be there). Is the download complete?"),
    "8 a tensor too much": (lambda law: add(law, "model.layers.2.mlp.up_proj.weight"), "sources.law: model.layers.2.mlp.up_proj.weight: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "8 a bias that config.json denies": (lambda law: edit_tensors(law, lambda t: t.update({LAYER.replace("weight", "bias"): torch.zeros(16)})), "sources.law: model.layers.1.self_attn.k_proj.bias is present, but config.json has attention_bias=false, so that transformers would ignore it. Correct config.json or remove the tensor."),
    "8 another shape": (lambda law: edit_tensors(law, lambda t: t.update({LAYER: torch.zeros(16, 31)})), "sources.law: model.layers.1.self_attn.k_proj.weight is [16, 31], config.json implies [16, 32] (K*D, d)."),
    "8 another dtype": (lambda law: edit_tensors(law, lambda t: t.update({LAYER: t[LAYER].half()})), "HOME/recipe.yaml: output.dtype: source keeps what is stored, but the sources disagree: seed:model.layers.1.self_attn.k_proj.weight is F32; law:model.layers.1.self_attn.k_proj.weight is F16. Set dtype: bfloat16 (or another)."),
    "8 another vocabulary": (lambda law: (edit_config(law, vocab_size=66), edit_tensors(law, lambda t: t.update({n: torch.zeros(66, 32) for n in ("lm_head.weight", "model.embed_tokens.weight")}))), "sources.law: vocab_size = 66, sources.seed has 64 (config.json). Embeddings are never cut; align the tokenizers first: tokenizer: {source: union} in the recipe does it, by token."),
    "8 other heads": (lambda law: edit_config(law, num_attention_heads=2, num_key_value_heads=1, head_dim=16), "sources.law: num_attention_heads = 2, sources.seed has 4 (config.json). Experts must share it.\nsources.law: num_key_value_heads = 1, sources.seed has 2 (config.json). Experts must share it.\nsources.law: head_dim = 16, sources.seed has 8 (config.json). Experts must share it."),
    "8 uneven heads": (lambda law: edit_config(law, num_key_value_heads=3), "sources.law: config.json: num_attention_heads 4 is not a multiple of num_key_value_heads 3."),
    "8 another rope_theta": (lambda law: edit_config(law, rope_theta=5e5), "sources.law: rotary embedding differs from sources.seed: rope_theta 500000.0 here, 10000.0 there. Experts must share it, or the recipe accepts one for all: accept: {facts: {rope_parameters: seed}}."),
    "8 rope scaling": (lambda law: edit_config(law, rope_scaling={"rope_type": "linear", "factor": 2.0, "x\x1b": "y\x1b"}), "sources.law: rotary embedding differs from sources.seed: rope_type 'linear' here, 'default' there; x\\x1b 'y\\x1b' here, none there. Experts must share it, or the recipe accepts one for all: accept: {facts: {rope_parameters: seed}}."),
    "8 rope per kind of layer": (lambda law: edit_config(law, rope_parameters={"full_attention": {"rope_theta": 3.0}}), "sources.law: config.json: rope_parameters has one set per full_attention; llama has one for all layers."),
    "8 another norm's eps": (lambda law: edit_config(law, rms_norm_eps=1e-6), "sources.law: rms_norm_eps = 1e-06, sources.seed has 1e-05 (config.json). Experts must share it, or the recipe accepts one for all: accept: {facts: {rms_norm_eps: seed}}."),
    "8 another activation": (lambda law: edit_config(law, hidden_act="g\x1b[31m"), "sources.law: hidden_act = 'g\\x1b[31m', sources.seed has 'silu' (config.json). Experts must share it."),
    "8 heads tied": (lambda law: (edit_config(law, tie_word_embeddings=True), edit_tensors(law, lambda t: t.pop("lm_head.weight"))), "sources.law: tie_word_embeddings = true, sources.seed has false (config.json). Tied and untied models cannot be mixed; untie the others first (save lm_head as a copy), or accept: {head: stored}."),
    "8 fewer layers": (lambda law: (edit_config(law, num_hidden_layers=1), edit_tensors(law, lambda t: [t.pop(k) for k in list(t) if ".1." in k])), "sources.law: num_hidden_layers = 1, sources.seed has 2 (config.json). Experts must share it."),
    "8 a key that no table knows": (lambda law: edit_config(law, residual_multiplier=0.5), "sources.law: config.json has residual_multiplier = 0.5, sources.seed has none; llama's table does not know this key, so it may matter. Make them agree, or accept it: accept: {config: [residual_multiplier]}."),
    "8 many differences at once": (lambda law: (edit_config(law, rms_norm_eps=1e-6, rope_theta=1.0, hidden_act="gelu", m=1), tokenizer(law, {"b": 0})), "sources.law: hidden_act = 'gelu', sources.seed has 'silu' (config.json). Experts must share it.\nsources.law: rms_norm_eps = 1e-06, sources.seed has 1e-05 (config.json). Experts must share it, or the recipe accepts one for all: accept: {facts: {rms_norm_eps: seed}}.\nsources.law: rotary embedding differs from sources.seed: rope_theta 1.0 here, 10000.0 there. Experts must share it, or the recipe accepts one for all: accept: {facts: {rope_parameters: seed}}.\nsources.law: config.json has m = 1, sources.seed has none; llama's table does not know this key, so it may matter. Make them agree, or accept it: accept: {config: [m]}."),
    "8 another family": (lambda law: write_sources(law.parent, CONFIGS["mistral"], ("law",)), "sources.law: family mistral, sources.seed is llama. Experts must be branches of one architecture."),
    "8 an unknown family": (lambda law: edit_config(law, model_type="gpt2"), "sources.law: model_type 'gpt2' is not a dense family known here: its positions are learned and added to the embeddings, and only rotary ones are computed here. Known dense families: arcee, cohere, cohere2, cwm, ernie4_5, exaone, exaone4, falcon, gemma, gemma2, gemma3_text, gemma4_text, gemma4_unified_text, glm, glm4, gpt_neox, granite, granitemoehybrid, helium, hunyuan_v1_dense, hyperclovax, internlm3, iquestcoder, jais2, llama, ministral, ministral3, mistral, nemotron, olmo, olmo2, olmo3, phi, phi3, qwen2, qwen3, qwen3_5_text, seed_oss, smollm3, stablelm, starcoder2, vaultgemma."),
    "8 a mixture already": (lambda law: edit_config(law, model_type="mixtral"), "sources.law: model_type 'mixtral' is a mixture already. One of its experts can be a source: write #experts.0, or another number, behind its place."),
    "8 quantised": (lambda law: edit_config(law, quantization_config={"quant_method": "fp8"}), "sources.law: config.json has a quantization_config; quantised weights cannot be merged. Use the full-precision model."),
    "8 a size missing": (lambda law: edit_config(law, hidden_size=...), "sources.law: config.json: hidden_size must be a positive integer, found null."),
    "8 a size as text": (lambda law: edit_config(law, num_attention_heads="4\x1b"), "sources.law: config.json: num_attention_heads must be a positive integer, found '4\\x1b'."),
    "8 a size beyond any model's": (lambda law: edit_config(law, intermediate_size=2**31), "sources.law: config.json: intermediate_size must be a positive integer, found 2147483648."),
    "8 a flag as text": (lambda law: edit_config(law, tie_word_embeddings="false"), "sources.law: config.json: tie_word_embeddings must be true or false, found 'false'."),
    "8 eps as text": (lambda law: edit_config(law, rms_norm_eps="1e-5"), "sources.law: config.json: rms_norm_eps must be a number, found '1e-5'."),
    "8 layers without end": (lambda law: edit_config(law, num_hidden_layers=10**12), "sources.law: config.json: num_hidden_layers must be a positive integer, found 1000000000000."),
    "8 layer_types too short": (lambda law: edit_config(law, layer_types=["full_attention"]), "sources.law: config.json: layer_types must name the kind of each of the 2 layers, found ['full_attention']."),
    "8 rope as text": (lambda law: edit_config(law, rope_scaling="linear"), "sources.law: config.json: rope_parameters must be an object, found 'linear'."),
    "8 a window as text": (lambda law: edit_config(law, sliding_window="16"), "sources.law: config.json: sliding_window must be a positive integer, found '16'."),
    "8 an object for a token id": (lambda law: edit_config(law, eos_token_id={"auto_map": "x"}), "sources.law: config.json: eos_token_id must be a number, text or a list of numbers, found {'auto_map': 'x'}."),
    "8 other words for the same ids": (lambda law: (tokenizer(law.parent / "seed", {"a": 0, "b": 1}), tokenizer(law, {"a": "\x1b[31m", "b": 0})), "sources.law: tokenizer.json differs from sources.seed: token 'a' has id \\x1b[31m here, 0 there. The embeddings would be averaged over different words; align the tokenizers first."),
    "8 other merges": (lambda law: (tokenizer(law.parent / "seed", {"a": 0}), tokenizer(law, {"a": 0}, merges=["a a"])), "sources.law: tokenizer.json differs from sources.seed: the merges are not the same (both have 1 token; the base vocabularies differ, so that no recipe can align them). The embeddings would be averaged over different words; align the tokenizers first."),
    "8 a tokenizer that is none": (lambda law: (tokenizer(law.parent / "seed", {"a": 0}), (law / "tokenizer.json").write_text("[]")), "sources.law: HOME/law/tokenizer.json: not a tokenizer file (something in it is not of the kind that belongs there)."),
    "11 a tensor called ../../x": (lambda law: add(law, "../../x"), "sources.law: ../../x: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor called /etc/passwd": (lambda law: add(law, "/etc/passwd"), "sources.law: /etc/passwd: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor with ESC in its name": (lambda law: add(law, "a\x1b[31mred\x1b]0;title\x07\x9b1m"), "sources.law: a\\x1b[31mred\\x1b]0;title\\x07\\x9b1m: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor with a newline in its name": (lambda law: add(law, "a\nerror: b"), "sources.law: a\\nerror: b: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor with a direction mark in its name": (lambda law: add(law, "a\u202eb"), "sources.law: a\\u202eb: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor without a name": (lambda law: add(law, ""), "sources.law: '': 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor with a name of 100 kB": (lambda law: add(law, "x" * 100_000), "sources.law: " + "x" * 200 + "... (100000 characters): 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "11 a tensor called __metadata": (lambda law: add(law, "__metadata"), "sources.law: __metadata: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently: remove them, or correct config.json."),
    "14 a dangling tokenizer": (lambda law: os.symlink("../../blobs/2", law / "tokenizer.json"), "sources.law: HOME/law/tokenizer.json: a symlink to ../../blobs/2, which does not exist."),
    "14 a FIFO for a tokenizer": (lambda law: os.mkfifo(law / "tokenizer_config.json"), "sources.law: HOME/law/tokenizer_config.json: not a regular file."),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit(name: str, llamas: Path, run: Any) -> None:
    """A merge is refused, all reasons together; inspect describes the model as far as it goes, diff says that the two differ."""
    damage, message = UNFIT[name]
    recipe = write_recipe(llamas)
    damage(llamas / "law")
    for merging in ((recipe,), ("plan", recipe)):
        assert said(run, llamas, *merging) == message.split("\n")
    for command in (("inspect", llamas / "law"), ("diff", llamas / "seed", llamas / "law")):
        with deadline():
            result: Result = run(*command)
        if command[0] == "diff" and name == "8 an unknown family":  # whose tensors have no roles
            assert result.status == 2 and "there is nothing to compare" in result.err
        else:
            assert (result.status, result.err) == (1 if command[0] == "diff" else 0, ""), command
        assert all(line.isprintable() for line in result.out.split("\n"))


def test_problems_of_all_sources_are_reported_together(llamas: Path, run: Any) -> None:
    edit_config(llamas / "code", rms_norm_eps=1e-6, rope_theta=3.0)
    edit_config(llamas / "law", hidden_act="gelu")
    result = run(write_recipe(llamas))
    assert result.err.count("error:") == 3
    assert "3 problems; nothing was written." in result.err


def test_sources_and_rules_are_reported_together(llamas: Path, run: Any) -> None:
    """A missing source does not hide that others disagree, nor a disagreement that a rule matches nothing."""
    recipe = write_recipe(llamas, "rules: [{roles: [attn.q_norm], make: mean}]", output="{path: out, layout: mixtrl}")
    edit_config(llamas / "code", rms_norm_eps=1e-6)
    result = run(recipe)
    for message in ("'mixtrl' is no layout", "rules[0]: attn.q_norm matches no tensor", "sources.code: rms_norm_eps"):
        assert message in result.err
    shutil.rmtree(llamas / "law")
    result = run(recipe)
    for message in ("'mixtrl' is no layout", "law: no such folder", "sources.code: rms_norm_eps"):
        assert message in result.err


def test_what_may_differ_does_not_matter(llamas: Path, run: Any) -> None:
    changes = {
        "use_cache": False,
        "dtype": "float16",
        "torch_dtype": "torch.float16",
        "_name_or_path": "x",
        "bos_token_id": 9,
        "max_position_embeddings": 7,
        "initializer_range": 1.0,
    }
    edit_config(llamas / "law", transformers_version="4.0", rope_theta=10000, **changes)
    assert run("plan", write_recipe(llamas)).status == 0


def test_tokenizers_that_differ_in_settings_only(llamas: Path, run: Any) -> None:
    tokenizer(llamas / "seed", {"a": 0, "b": 1})
    tokenizer(llamas / "law", {"a": 0, "b": 1}, truncation={"max_length": 7})
    assert run("plan", write_recipe(llamas)).status == 0
