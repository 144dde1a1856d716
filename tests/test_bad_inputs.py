"""Bad inputs through the command line: one message with file, tensor or key, what was found and expected; exit 2; nothing written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge.checkpoint import INDEX

LAYER = "model.layers.1.self_attn.k_proj.weight"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> None:
    """Split model.safetensors in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{index + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


ONE = "model.safetensors"
BAD_SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing folder": (shutil.rmtree, "sources.law: {law}: no such folder."),
    "a file for a folder": (lambda law: (shutil.rmtree(law), law.write_text("x")), "sources.law: {law}: not a folder."),
    "no config": (lambda law: (law / "config.json").unlink(), "sources.law: {law}: config.json is missing. Is this a Hugging Face folder?"),
    "config not JSON": (lambda law: (law / "config.json").write_text("{"), "sources.law: {law}/config.json: not valid JSON"),
    "config with duplicates": (lambda law: (law / "config.json").write_text('{"a":1,"a":2}'), "config.json: the key 'a' stands twice"),
    "unknown family": (lambda law: edit_config(law, model_type="gpt2"), "model_type 'gpt2' is not a dense family known here. Known dense families: cohere, gpt_neox, llama"),
    "a mixture as source": (lambda law: edit_config(law, model_type="mixtral"), "model_type 'mixtral' is a mixture already"),
    "quantised": (lambda law: edit_config(law, quantization_config={}), "quantised weights cannot be merged"),
    "hidden_size missing": (lambda law: edit_config(law, hidden_size=...), "config.json: hidden_size must be a positive integer, found None."),
    "heads as text": (lambda law: edit_config(law, num_attention_heads="4"), "num_attention_heads must be a positive integer, found '4'."),
    "a flag as text": (lambda law: edit_config(law, tie_word_embeddings="false"), "config.json: tie_word_embeddings must be true or false, found 'false'."),
    "eps as text": (lambda law: edit_config(law, rms_norm_eps="1e-5"), "config.json: rms_norm_eps must be a number, found '1e-5'."),
    "head_dim as text": (lambda law: edit_config(law, head_dim="8"), "config.json: head_dim must be a positive integer, found '8'."),
    "layer_types that is no list": (lambda law: edit_config(law, layer_types=5), "config.json: layer_types must name the kind of each of the 2 layers, found 5."),
    "layer_types too short": (lambda law: edit_config(law, layer_types=["full_attention"]), "config.json: layer_types must name the kind of each of the 2 layers"),
    "layers without end": (lambda law: edit_config(law, num_hidden_layers=10**12), "config.json: num_hidden_layers 1000000000000, expected at most 10000."),
    "rope per layer type": (lambda law: edit_config(law, rope_parameters={"full_attention": {"rope_theta": 3.0}}), "config.json: rope_parameters has one set per full_attention; llama has one for all layers."),
    "uneven heads": (lambda law: edit_config(law, num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3."),
    "rope not an object": (lambda law: edit_config(law, rope_scaling="linear"), "rope_parameters must be an object, found 'linear'."),
    "no weights": (lambda law: (law / ONE).unlink(), "no weights found; expected model.safetensors or model.safetensors.index.json."),
    "only pickles": (only_pickle, "only pytorch_model.bin present. Pickled weights are never loaded, since loading them runs code. Convert them once:"),
    "missing shard": (lambda law: (shard(law), (law / "model-00002-of-00002.safetensors").unlink()), "1 of 2 files that model.safetensors.index.json names are missing: model-00002-of-00002.safetensors. Is the download complete?"),
    "index missing": (lambda law: (shard(law), (law / INDEX).unlink()), "model.safetensors.index.json is missing, and there is no model.safetensors (found model-00001-of-00002.safetensors"),
    "index and single": (lambda law: (shutil.copy(law / ONE, law / "x"), shard(law), os.rename(law / "x", law / ONE)), "both model.safetensors and model.safetensors.index.json are present. Remove the stale one."),
    "index lists too much": (lambda law: edit_index(law, lambda i: i["weight_map"].update(ghost="model-00001-of-00002.safetensors")), "lists ghost, which no shard holds"),
    "index lists too little": (lambda law: edit_index(law, lambda i: i["weight_map"].pop(LAYER)), f"does not list {LAYER}, which the shards hold"),
    "index misplaces": (lambda law: edit_index(law, lambda i: i["weight_map"].update({LAYER: "model-00001-of-00002.safetensors"})), f"places {LAYER} in the wrong shard"),
    "index climbs out": (lambda law: edit_index(law, lambda i: i["weight_map"].update({LAYER: "../secret.safetensors"})), "weight_map names ../secret.safetensors, which is no plain file in this folder"),
    "index not a map": (lambda law: edit_index(law, lambda i: i.update(weight_map=[1])), "weight_map must be an object"),
    "truncated by one byte": (lambda law: truncate(law / ONE, -1), "lm_head.weight is the first tensor cut short"),
    "truncated in half": (lambda law: truncate(law / ONE, 30_000), "the header promises"),
    "truncated to the header": (lambda law: truncate(law / ONE, 8), "promise a header of"),
    "truncated to seven bytes": (lambda law: truncate(law / ONE, 7), "7 bytes, too short"),
    "empty file": (lambda law: truncate(law / ONE, 0), "0 bytes, too short"),
    "corrupt header length": (lambda law: flip(law / ONE, 6), "promise a header of"),
    "corrupt header text": (lambda law: flip(law / ONE, 8), "does not begin with '{{'"),
    "missing tensor": (lambda law: edit_tensors(law, lambda t: t.pop(LAYER)), f"sources.law: {LAYER} missing: 1 tensor(s). Is the download complete?"),
    "missing head": (lambda law: edit_tensors(law, lambda t: t.pop("lm_head.weight")), "lm_head.weight missing: 1 tensor(s) (config.json has tie_word_embeddings=false, so the head must be there)."),
    "extra tensor": (lambda law: edit_tensors(law, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)})), "model.layers.2.mlp.up_proj.weight: 1 tensor(s) that llama with 2 layers does not have. Nothing is dropped silently"),
    "tensor name with escapes": (lambda law: edit_tensors(law, lambda t: t.update({"a\x1b[31m\nb": torch.zeros(2)})), r"a\x1b[31m\nb: 1 tensor(s) that llama"),
    "undeclared bias": (lambda law: edit_tensors(law, lambda t: t.update({LAYER.replace("weight", "bias"): torch.zeros(16)})), "k_proj.bias is present, but config.json has attention_bias=false, so that transformers would ignore it."),
    "shape mismatch": (lambda law: edit_tensors(law, lambda t: t.update({LAYER: torch.zeros(16, 31)})), f"{LAYER} is [16, 31], config.json implies [16, 32] (K*D, d)."),
    "other vocabulary": (lambda law: (edit_config(law, vocab_size=66), edit_tensors(law, lambda t: t.update({n: torch.zeros(66, 32) for n in ("lm_head.weight", "model.embed_tokens.weight")}))), "sources.law: vocab_size = 66, sources.seed has 64 (config.json). Embeddings are never cut; align the tokenizers first."),
    "other rope_theta": (lambda law: edit_config(law, rope_theta=5e5), "sources.law: rotary embedding differs from sources.seed: rope_theta 500000.0 here, 10000.0 there."),
    "rope scaling": (lambda law: edit_config(law, rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type 'linear' here, 'default' there"),
    "other norm eps": (lambda law: edit_config(law, rms_norm_eps=1e-6), "sources.law: rms_norm_eps = 1e-06, sources.seed has 1e-05 (config.json)."),
    "other activation": (lambda law: edit_config(law, hidden_act="gelu"), "sources.law: hidden_act = 'gelu', sources.seed has 'silu'"),
    "mixed ties": (lambda law: (edit_config(law, tie_word_embeddings=True), edit_tensors(law, lambda t: t.pop("lm_head.weight"))), "sources.law: tie_word_embeddings = True, sources.seed has False (config.json). Tied and untied models cannot be mixed"),
    "unknown key that differs": (lambda law: edit_config(law, residual_multiplier=0.5), "config.json has residual_multiplier = 0.5, sources.seed has None; llama's table does not know this key"),
    "fewer layers": (lambda law: (edit_config(law, num_hidden_layers=1), edit_tensors(law, lambda t: [t.pop(k) for k in list(t) if ".1." in k])), "sources.law: num_hidden_layers = 1, sources.seed has 2"),
    "dangling symlink": (lambda law: ((law / ONE).unlink(), os.symlink("nowhere", law / ONE)), f"{ONE}: a symlink to nowhere, which does not exist."),
    "a folder for a file": (lambda law: ((law / ONE).unlink(), (law / ONE).mkdir()), f"{ONE}: not a regular file."),
    "a FIFO for a file": (lambda law: ((law / ONE).unlink(), os.mkfifo(law / ONE)), f"{ONE}: not a regular file."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source(name: str, llamas: Path, run: Any) -> None:
    damage, message = BAD_SOURCES[name]
    recipe = write_recipe(llamas)
    damage(llamas / "law")
    result = run(recipe)
    assert result.status == 2
    assert message.format(law=llamas / "law") in result.err, result.err
    assert result.out == ""
    assert "\x1b" not in result.err
    assert {path.name for path in llamas.iterdir()} <= {"code", "law", "recipe.yaml", "seed"}


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
        "torch_dtype": "float16",
        "_name_or_path": "x",
        "bos_token_id": 9,
        "max_position_embeddings": 7,
        "initializer_range": 1.0,
    }
    edit_config(llamas / "law", transformers_version="4.0", rope_theta=10000, **changes)
    assert run("plan", write_recipe(llamas)).status == 0


def test_families_are_not_mixed(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"], ("seed", "code"))
    write_sources(tmp_path, CONFIGS["qwen2"], ("law",))
    result = run(write_recipe(tmp_path))
    assert result.status == 2
    assert "sources.law: family qwen2, sources.seed is llama. Experts must be branches of one architecture." in result.err


BAD_REQUESTS: dict[str, tuple[str, str, str, str, str]] = {
    # name: config, method, sections, output, message
    "biases into mixtral": ("llama_biased", "btx", "", "mixtral", "output.layout: mixtral needs attention_bias = false, this merge has true. Use layout: bam."),
    "biases have no place": ("llama_biased", "btx", "", "mixtral", "'attn.q.bias' is a tensor of the sources that layout 'mixtral' has no place for. Use layout: bam."),
    "qk-norm into mixtral": ("qwen3", "btx", "", "mixtral", "mixtral needs qk_norm = false, this merge has true"),
    "parallel block into mixtral": ("cohere", "btx", "", "mixtral", "mixtral needs parallel_block = false, this merge has true"),
    "llama into qwen3_moe": ("llama", "btx", "", "qwen3_moe", "qwen3_moe needs qk_norm = true, this merge has false"),
    "attention experts into mixtral": ("llama", "bam", "ffn: {gate: topk_then_softmax}", "mixtral", "method bam: 'attn.q' asks for one tensor per expert, but layout 'mixtral' stores it shared. Use make: mean, or layout: bam."),
    "soft gates into mixtral": ("llama", "btx", "ffn: {gate: softmax_then_topk}", "mixtral", "mixtral needs norm_topk_prob = true, this merge has false. Use layout: bam (ffn.gate: topk_then_softmax sums to one)."),
    "gate_scale into qwen2_moe": ("qwen2", "btx", "ffn: {gate_scale: 2}", "qwen2_moe", "qwen2_moe needs gate_scale = 1.0, this merge has 2.0"),
    "unknown layout": ("llama", "btx", "", "mixtrl", "output.layout: 'mixtrl' is no layout; did you mean 'mixtral'?"),
    "dense layout for a mixture": ("llama", "btx", "", "llama", "output.layout: llama is a dense family; method btx makes a mixture. Use bam, or method: merge."),
    "mixture layout for a merge": ("llama", "merge", "", "mixtral", "method merge of llama models gives layout llama, not mixtral."),
    "rule that matches nothing": ("llama", "bam", "rules: [{roles: [attn.q_norm], make: mean}]", "bam", "rules[0]: attn.q_norm matches no tensor of this merge."),
    "rule in the shadow": ("llama", "bam", "rules: [{roles: [norm.*], make: mean}, {roles: [norm.ffn], make: copy, from: seed}]", "bam", "rules[1]: norm.ffn never applies: earlier rules make all 2 tensors it matches."),
    "rule for absent routers": ("llama", "btx", "rules: [{roles: [router.attn], make: zeros}]", "bam", "rules[0]: router.attn matches no tensor of this merge."),
    "layers out of range": ("llama", "bam", 'rules: [{roles: [attn.k, attn.v], layers: "0-7", make: mean}]', "bam", "rules[0].layers: layer 7 does not exist; the model's layers are 0 to 1."),
    "k without v": ("llama", "bam", "rules: [{roles: [attn.k], make: mean}]", "bam", "layer 0: attn.v per expert, attn.k shared; an attention expert needs them together."),
    "q without o": ("llama", "bam", "rules: [{roles: [attn.q], make: mean}]", "bam", "layer 0: attn.o per expert, attn.q shared"),
    "attention experts in some layers": ("llama", "bam", "rules: [{roles: [attn.*], layers: 1, make: mean}]", "bam", "attention is per expert in layers 0 and shared in 1; it must be one or the other in all layers."),
    "k and v without q": ("llama", "btx", "rules: [{roles: [attn.k, attn.v], make: expert}]", "bam", "layer 0: attn.k and attn.v are per expert, attn.q and attn.o shared."),
    "FFN averaged": ("llama", "bam", "rules: [{roles: [ffn.*], layers: 0, make: mean}]", "bam", "rules[0]: 'ffn.gate' is made once for all, but layout 'bam' stores one per expert. Use make: expert."),
    "experts of the embeddings": ("llama", "bam", "rules: [{roles: [embed], make: expert}]", "bam", "rules[0]: 'embed' asks for one tensor per expert, but layout 'bam' stores it shared."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(name: str, tmp_path: Path, run: Any) -> None:
    config, method, sections, layout, message = BAD_REQUESTS[name]
    write_sources(tmp_path, CONFIGS[config])
    result = run(write_recipe(tmp_path, sections, method, output=f"{{path: out, layout: {layout}}}"))
    assert result.status == 2
    assert message in result.err, result.err
    assert not (tmp_path / "out").exists()


# ---- the tokenizers


def tokenizer(folder: Path, vocab: dict[str, int], **more: Any) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": []}, "added_tokens": [], **more}))


def test_different_tokenizers_of_the_same_size(llamas: Path, run: Any) -> None:
    tokenizer(llamas / "seed", {"a": 0, "b": 1})
    tokenizer(llamas / "law", {"a": 1, "b": 0})
    result = run(write_recipe(llamas))
    assert result.status == 2
    assert "sources.law: tokenizer.json differs from sources.seed: token 'a' has id 1 here, 0 there." in result.err


def test_tokenizers_that_differ_in_settings_only(llamas: Path, run: Any) -> None:
    tokenizer(llamas / "seed", {"a": 0, "b": 1})
    tokenizer(llamas / "law", {"a": 0, "b": 1}, truncation={"max_length": 7})
    assert run("plan", write_recipe(llamas)).status == 0


def test_tokenizer_that_is_none(llamas: Path, run: Any) -> None:
    tokenizer(llamas / "seed", {"a": 0})
    (llamas / "law" / "tokenizer.json").write_text("[]")
    result = run(write_recipe(llamas))
    assert result.status == 2
    assert "law/tokenizer.json: not a tokenizer file" in result.err


# ---- the output


def test_output_inside_a_source(llamas: Path, run: Any) -> None:
    result = run(write_recipe(llamas, output="{path: law/out}"))
    assert result.status == 2
    assert f"output.path: {llamas}/law/out is inside sources.law" in result.err


@pytest.mark.parametrize("how", ["itself", "symlink", "parent"])
def test_output_is_a_source(llamas: Path, run: Any, how: str) -> None:
    target = {"itself": llamas / "law", "symlink": llamas / "link", "parent": llamas}[how]
    if how == "symlink":
        os.symlink(llamas / "law", target)
    result = run(write_recipe(llamas), "--output", target, "--force")
    assert result.status == 2
    assert "is, or holds, sources." in result.err
    assert (llamas / "law" / "model.safetensors").exists()


def test_output_inside_a_source_through_a_symlink(llamas: Path, run: Any) -> None:
    os.symlink(llamas / "law", llamas / "link")
    result = run(write_recipe(llamas), "--output", llamas / "link" / "out")
    assert result.status == 2
    assert "is inside sources.law" in result.err


def test_one_folder_under_two_names(llamas: Path, run: Any) -> None:
    shutil.rmtree(llamas / "law")
    os.symlink("code", llamas / "law")
    result = run(write_recipe(llamas))
    assert result.status == 2
    assert "sources.law: the same folder as sources.code. Name it once; it may stand several times in experts." in result.err


def test_no_space(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(llamas)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    for arguments in ((), ("--dry-run",)):
        result = run(write_recipe(llamas), *arguments)
        assert result.status == 2
        assert "0.00 GB free, the merge writes 0.00 GB. Free some space, or choose another --output." in result.err


def test_no_write_permission(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answer is simulated."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    result = run(write_recipe(llamas))
    assert result.status == 2
    assert f"no permission to write in {llamas}. Choose another --output." in result.err


def test_parent_is_a_file(llamas: Path, run: Any) -> None:
    result = run(write_recipe(llamas), "--output", llamas / "recipe.yaml" / "out")
    assert result.status == 2
    assert "recipe.yaml is not a folder" in result.err
