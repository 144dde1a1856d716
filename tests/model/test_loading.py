"""Folders as the reference model: every parameter is the tensor it should be, block by block or whole, and bad folders are explained."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import CONFIGS, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.architectures.tables import load_architecture
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.model.__main__ import run as generate
from bam_merge.model.config import model_config
from bam_merge.model.loading import load_model, open_model

IDS = torch.arange(3, 27).view(2, 12)
LAYOUTS = {"llama": "mixtral", "qwen2": "qwen2_moe", "qwen3_biased": "qwen3_moe", "qwen3_5_text": "qwen3_5_moe"}

WAYS = {
    "expert kv": ("bam", ""),
    "shared kv": ("bam", "attention: {kv: shared}"),
    "shared kv in layer 1": ("bam", "rules: [{roles: [attn.k, attn.v], layers: 1, make: mean}]"),
    "top 2": ("bam", "attention: {routing: top_k, top_k: 2}"),
    "btx": ("btx", ""),
    "sparse upcycling": ("sparse_upcycling", "experts: [seed, seed]"),
    "soup": ("merge", ""),
}


def merged(folder: Path, config: dict[str, Any], method: str = "bam", text: str = "", layout: str | None = None) -> Path:
    names = ("seed",) if method == "sparse_upcycling" else ("seed", "code", "law")
    write_sources(folder, config, names)
    return merge(
        load_recipe(write_recipe(folder, text, method, names, f"{{path: out{f', layout: {layout}' if layout else ''}}}")),
        options=MergeOptions(verify=False),
    )


def edit(folder: Path, **keys: Any) -> Path:
    """Change config.json; None removes a key."""
    config = {**json.loads((folder / "config.json").read_text()), **keys}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


# ---- what is read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_parameters_are_the_tensors_of_a_bam_folder(way: str, tmp_path: Path) -> None:
    method, text = WAYS[way]
    folder = merged(tmp_path, CONFIGS["llama_biased"], method, text)
    stored, loaded = load_file(folder / "model.safetensors"), load_model(folder).state_dict()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_of_every_family_have_bam_names(family: str, tmp_path: Path) -> None:
    """Fused and differently named tensors too: an expert of the mixture is the source, part by part."""
    folder = merged(tmp_path, CONFIGS[family])
    stored, dense = load_file(folder / "model.safetensors"), load_model(tmp_path / "code").state_dict()
    assert set(stored) == set(load_model(folder).state_dict())
    assert {name.replace("experts.1.", "") for name in stored if "experts.1." in name} <= set(dense)
    assert all(torch.equal(stored[name], dense[name.replace("experts.1.", "")]) for name in stored if "experts.1." in name)


@pytest.mark.parametrize("name", [*CONFIGS, *LAYOUTS.values(), "bam"])
@torch.no_grad()
def test_block_by_block_is_the_whole_model(name: str, tmp_path: Path) -> None:
    """Never more than one block in memory, from several files, and logits a few vocabulary rows at a time."""
    if name in CONFIGS:
        folder = write_checkpoint(tmp_path, CONFIGS[name], random_values(1, 0.2), "BF16", shards=3, spelling=1)
    else:
        family = next((family for family, layout in LAYOUTS.items() if layout == name), "cohere_qk_norm")
        folder = merged(tmp_path, CONFIGS[family], "bam" if name == "bam" else "btx", "", name)
    stored = open_model(folder)
    x_BTD, positions_BT = stored.embed(IDS), torch.arange(12).expand(2, -1)
    for layer in range(stored.config.num_hidden_layers):
        x_BTD = stored.block(layer)(x_BTD, positions_BT).hidden
    whole = load_model(folder)
    assert float((stored.head(x_BTD) - whole(IDS)).abs().max()) < 1e-6
    assert {key: tuple(value.shape) for key, value in stored.tensors()} == {
        key: tuple(value.shape) for key, value in whole.state_dict().items()
    }
    assert all(key.startswith("model.layers.1.") for key, _ in stored.tensors("model.layers.1."))


def test_the_head_in_pieces_is_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = open_model(write_checkpoint(tmp_path, CONFIGS["cohere"], random_values(1)))
    x_BTD = torch.randn(1, 3, 32)
    whole = stored.head(x_BTD)
    monkeypatch.setattr("bam_merge.model.loading.HEAD_ROWS", 7)
    assert torch.allclose(stored.head(x_BTD), whole, atol=1e-7)


def test_dtypes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIGS["phi3"], random_values(1), "BF16")
    assert {value.dtype for _, value in open_model(folder).tensors()} == {torch.bfloat16}
    assert {value.dtype for value in load_model(folder, torch.float64).state_dict().values()} == {torch.float64}


def test_transformers_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    load_model(write_checkpoint(tmp_path, CONFIGS["gpt_neox"], random_values(1)))


# ---- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "message"), [
    ({"model_type": "mamba"}, r"config\.json: model_type 'mamba' is not known here\. Known: arcee, bam, cohere"),
    ({"model_type": None}, "model_type None is not known here"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights are not read"),
    ({"num_experts": "3"}, "num_experts must be an integer, found '3'"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4, expected 1 to num_experts = 3"),
    ({"attention_kv": "both"}, "attention_kv must be expert or shared, found 'both'"),
    ({"hidden_act": "swoosh"}, "hidden_act 'swoosh' is not known here. Known: silu"),
    ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers is 2"),
    ({"layer_types": ["full_attention", "chunked"]}, r"layer_types\.1 must be"),
    ({"head_dim": 0}, "must be positive"),
    ({"num_key_value_heads_per_expert": 3}, "4 attention heads .* are not a multiple of 3"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "rope_type 'spiral' is not known here. Known: default, linear"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, r"rope_parameters\.factor must be a number for rope_type linear, found None"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": "all"}}, "partial_rotary_factor must be a number"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1], "long_factor": [1, 1, 1, 1]}}, "short_factor must be 4 numbers"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}, "max_position_embeddings": None}, "max_position_embeddings is missing"),
    ({"num_hidden_layers": 3, "layer_types": None}, r"model\.layers\.2\..*missing: 25 tensor\(s\) that config\.json implies"),
    ({"num_hidden_layers": 1, "layer_types": None}, r"model\.layers\.1\..*present: 25 tensor\(s\) that config\.json does not imply"),
    ({"attention_kv": "shared"}, r"model\.layers\.0\.self_attn\.k_proj\.weight, .* missing: 4 tensor"),
    ({"intermediate_size": 41}, r"gate_proj\.weight is \[40, 32\], config\.json implies \[41, 32\]"),
    ({"vocab_size": 65}, r"model\.embed_tokens\.weight is \[64, 32\], config\.json implies \[65, 32\]"),
])  # fmt: skip
def test_bad_bam_folders(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = edit(merged(tmp_path, CONFIGS["llama"]), **keys)
    with pytest.raises(CheckpointError, match=message) as error:
        open_model(folder)
    assert all(problem.startswith(str(folder)) for problem in error.value.problems)


@pytest.mark.parametrize(("family", "keys", "message"), [
    ("qwen2", {"num_experts": None}, "num_experts missing; qwen2_moe needs it"),
    ("qwen2", {"qkv_bias": "yes"}, "attention_bias must be true or false, found 'yes'"),
    ("qwen2", {"use_sliding_window": True, "layer_types": None}, "layer_types does not say which layers slide"),
    ("qwen2", {"num_attention_heads": None}, "num_attention_heads must be a positive integer"),
    ("qwen2", {"shared_expert_intermediate_size": 32}, r"shared_expert\.gate_proj\.weight is \[64, 32\], config\.json implies \[32, 32\]"),
    ("llama", {"num_local_experts": 4}, r"experts\.3\.w1\.weight, .* missing"),
    ("qwen3_biased", {"attention_bias": False}, r"self_attn\.q_proj\.bias.* config\.json does not imply"),
])  # fmt: skip
def test_bad_mixtures(family: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = merged(tmp_path, CONFIGS[family], "btx", "", LAYOUTS[family])
    with pytest.raises(CheckpointError, match=message):
        open_model(edit(folder, **keys))


@pytest.mark.parametrize(("family", "left_out"), [
    ("llama", ["rms_norm_eps", "hidden_act"]),
    ("qwen2", ["qkv_bias", "use_sliding_window", "norm_topk_prob", "rms_norm_eps", "hidden_act"]),
    ("qwen3_biased", ["use_sliding_window", "norm_topk_prob", "rms_norm_eps", "hidden_act"]),
])  # fmt: skip
def test_a_key_left_out_means_what_transformers_means(family: str, left_out: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = json.loads((merged(tmp_path, CONFIGS[family], "btx", "", LAYOUTS[family]) / "config.json").read_text())
    default = transformers.AutoConfig.for_model(LAYOUTS[family])
    written = {**config, **{key: getattr(default, key) for key in left_out}}
    assert model_config({key: value for key, value in config.items() if key not in left_out}) == model_config(written)


OTHERS = {
    "solar_open": "llama", "glm4_moe": "qwen2", "dots1": "qwen3_biased", "flex_olmo": "olmo2", "cohere2_moe": "cohere2",
    "hunyuan_v1_moe": "hunyuan_v1_dense",
}  # fmt: skip
"""Layouts with other routers, shared experts or blocks, and a family for each."""


def merged_in(layout: str, folder: Path) -> Path:
    sigmoid = load_architecture(layout).accepts.get("scoring_func") == "sigmoid"
    return merged(folder, CONFIGS[OTHERS[layout]], "btx", "ffn: {gate: topk_then_sigmoid, gate_scale: 2.5}" if sigmoid else "", layout)


SIGMOID = ["rms_norm_eps", "hidden_act", "attention_bias", "norm_topk_prob", "routed_scaling_factor", "tie_word_embeddings"]


@pytest.mark.parametrize(("layout", "left_out"), [
    ("solar_open", [*SIGMOID, "n_shared_experts"]), ("glm4_moe", [*SIGMOID, "n_shared_experts", "use_qk_norm"]), ("dots1", SIGMOID),
    ("flex_olmo", ["rms_norm_eps", "hidden_act", "attention_bias", "norm_topk_prob"]),
    ("cohere2_moe", ["layer_norm_eps", "hidden_act", "attention_bias", "logit_scale", "expert_selection_fn", "norm_topk_prob", "num_shared_experts",
                     "shared_expert_combination_strategy", "tie_word_embeddings", "mlp_layer_types"]),
    ("hunyuan_v1_moe", ["rms_norm_eps", "hidden_act", "attention_bias", "tie_word_embeddings"]),
])  # fmt: skip
def test_of_other_layouts_too_a_key_left_out_means_what_transformers_means(layout: str, left_out: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = json.loads((merged_in(layout, tmp_path) / "config.json").read_text())
    default = transformers.AutoConfig.for_model(layout)
    assert set(left_out) - {"expert_selection_fn"} <= config.keys()  # which stands there where it is sigmoid
    for key in left_out:
        written = {**config, key: getattr(default, key)}
        assert model_config({name: value for name, value in config.items() if name != key}) == model_config(written), key


@pytest.mark.parametrize(("layout", "keys", "message"), [
    ("solar_open", {"n_shared_experts": "one"}, "n_shared_experts must be an integer, 0 or more, found 'one'"),
    ("solar_open", {"n_shared_experts": 2}, r"shared_experts\.gate_proj\.weight is \[40, 32\], config\.json implies \[80, 32\]"),
    ("solar_open", {"n_shared_experts": 0}, r"shared_experts\.gate_proj\.weight.* config\.json does not imply"),
    ("glm4_moe", {"n_group": 2}, "n_group = 2 is not known here, only 1"),
    ("glm4_moe", {"use_qk_norm": True}, r"self_attn\.q_norm\.weight.* missing"),
    ("glm4_moe", {"num_local_experts": 4}, "n_routed_experts = 3 and num_local_experts = 4 are two spellings of the number of experts"),
    ("dots1", {"n_shared_experts": None}, "n_shared_experts"),
    ("dots1", {"routed_scaling_factor": "big"}, "gate_scale must be a number, found 'big'"),
    ("cohere2_moe", {"expert_selection_fn": "tanh"}, "expert_selection_fn must be softmax or sigmoid, found 'tanh'"),
    ("cohere2_moe", {"norm_topk_prob": False}, "norm_topk_prob = false is not known here, only true"),
    ("cohere2_moe", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 is not known here, only null"),
    ("cohere2_moe", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "its configuration class passes over it. Write rope_parameters."),
    ("cohere2_moe", {"layer_types": None}, "layer_types is missing"),
    ("hunyuan_v1_moe", {"moe_topk": None}, "moe_topk"),
    ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, "num_experts_per_tok must be an integer"),
])  # fmt: skip
def test_bad_mixtures_in_other_layouts(layout: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = merged_in(layout, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_model(edit(folder, **keys))


def test_num_local_experts_is_num_experts(tmp_path: Path) -> None:
    """As transformers 5 spells it when it saves a Qwen3-MoE."""
    folder = merged(tmp_path, CONFIGS["qwen3"], "btx", "", "qwen3_moe")
    expected = open_model(folder).config
    assert open_model(edit(folder, num_experts=None, num_local_experts=3)).config == expected


def test_fused_tensors_of_the_wrong_size(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIGS["phi3"], random_values(1))
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight is \[64, 32\], config\.json implies \[48, 32\]"):
        open_model(edit(folder, num_key_value_heads=1))


def test_two_spellings_and_unreadable_dtypes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, CONFIGS["gpt_neox"], random_values(1)) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["embed_out.weight"].clone()}, path)
    with pytest.raises(CheckpointError, match=r"embed_out\.weight and lm_head\.weight are two spellings"):
        open_model(tmp_path)
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"stored as F8_E4M3: 28 tensor\(s\); the reference model computes with F64, F32, F16, BF16"):
        open_model(tmp_path)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    stored = open_model(write_checkpoint(tmp_path, CONFIGS["llama"], random_values(1)))
    os.utime(tmp_path / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed since it was opened"):
        stored.block(0)


def test_config_without_a_folder() -> None:
    config = model_config(CONFIGS["qwen3"])
    assert (config.qk_norm, config.head_dim, config.num_key_value_heads_per_expert, config.num_experts) == (True, 12, 2, 0)
    assert model_config({**CONFIGS["llama"], "rope_scaling": {"type": "linear", "factor": 2.0}}).rope_parameters["factor"] == 2.0


# ---- python -m bam_merge.model ---------------------------------------------------------------------------------------------


def test_generating_on_its_own(tmp_path: Path) -> None:
    folder = str(merged(tmp_path, CONFIGS["llama"]))
    result = CliRunner().invoke(generate, [folder, "--ids", "5 9 11", "--tokens", "4"])
    assert result.exit_code == 0
    assert [int(word) for word in result.output.split()] == load_model(folder).generate(torch.tensor([[5, 9, 11]]), 4)[0].tolist()


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "Give --prompt or --ids"),
    (["--prompt", "a"], "no tokenizer.json"),
    (["--ids", "one"], "not a list of token ids"),
    (["--ids", "64"], "token ids below 64"),
])  # fmt: skip
def test_generating_on_its_own_explains_itself(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(generate, [str(write_checkpoint(tmp_path, CONFIGS["llama"], random_values(1))), *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_generating_on_its_own_prints_as_bam_merge_does(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CONFIGS["llama"], random_values(1))
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bam_merge.model", str(folder), "--ids", "5", "--tokens", "1"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device.\n")


def test_generating_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(write_checkpoint(tmp_path, CONFIGS["llama"], random_values(1)) / "tokenizer.json"))
    result = CliRunner().invoke(generate, [str(tmp_path), "--prompt", "w5 w6", "--tokens", "3", "--temperature", "1", "--seed", "7"])
    expected = load_model(tmp_path).generate(torch.tensor([[5, 6]]), 3, temperature=1.0, seed=7)[0].tolist()
    assert result.output.split() == [f"w{i}" for i in expected]
