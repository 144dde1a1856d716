"""Tiny checkpoints of every family, made from the architecture tables, and the command line in process."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from safetensors.numpy import load_file, save_file

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads of several test processes spin against each other
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is: no test asks a hub but its own, whatever a folder is called

from bam_merge.demo.synthetic import branched_values, random_values, write_checkpoint

BASE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 128, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}

BIASED = {"attention_bias": True, "mlp_bias": True}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
HYBRID = {
    "layer_types": ["attention"] * 2,
    "num_local_experts": 0,
    "shared_intermediate_size": 40,
    "intermediate_size": 24,
    "mamba_n_heads": 8,
}


EXAONE = {"num_layers": 2, "activation_function": "silu", "layer_norm_epsilon": 1e-5}

STAND_INS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "exaone": (
        "llama",
        {"num_layers": "num_hidden_layers", "activation_function": "hidden_act", "layer_norm_epsilon": "rms_norm_eps"},
        {
            "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "transformer.h.": "model.layers.", "attn.attention.out_proj": "self_attn.o_proj",
            "attn.attention": "self_attn", ".ln_1.": ".input_layernorm.", ".ln_2.": ".post_attention_layernorm.", "c_fc_0": "gate_proj", "c_fc_1": "up_proj",
            "c_proj": "down_proj",
        },
    ),
}  # fmt: skip
"""Families that the least transformers has no class of, and what newer ones load them as: model type, keys and names that differ."""


def stand_in(folder: Path) -> Path:
    """A checkpoint as one of a model type that transformers has a class of."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in STAND_INS:
        return folder
    model_type, keys, names = STAND_INS[config["model_type"]]
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    other = folder.with_name(f"{folder.name}_as_{model_type}")
    other.mkdir(exist_ok=True)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = {keys.get(key, key): value for key, value in config.items()}
    width = {"intermediate_size": 4 * config["hidden_size"]}
    (other / "config.json").write_text(json.dumps({**width, **config, "model_type": model_type, "architectures": ["LlamaForCausalLM"]}))
    return other


def without(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


OF_GEMMA4 = {"head_dim": 6, "global_head_dim": 10, "hidden_size_per_layer_input": 0}

SLIDES, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-3,
}  # fmt: skip
"""Sizes of gated delta nets. With a smaller epsilon their norm magnifies the rounding of heads whose query and key stand at right angles."""

MORE: dict[str, dict[str, Any]] = {
    "granite": {"model_type": "granite", **BASE, **GROUPED, **GRANITE, "head_dim": 12},
    "granite_biased": {"model_type": "granite", **BASE, **GROUPED, **GRANITE, **BIASED, "tie_word_embeddings": True},
    "granite_plain": {"model_type": "granite", **BASE, "num_attention_heads": 8},
    "hyperclovax": {"model_type": "hyperclovax", **BASE, **GROUPED, **GRANITE, "logits_scaling": 0.5, "head_dim": 12},
    "hyperclovax_biased": {"model_type": "hyperclovax", **BASE, **GROUPED, **BIASED, "use_post_norm": False, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **BASE, **GROUPED, "head_dim": 12},
    "gemma_biased": {"model_type": "gemma", **BASE, "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True, "hidden_act": "gelu", "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", **BASE, **GROUPED, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma2_uncapped": {"model_type": "gemma2", **BASE, "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": [FULL, SLIDES], "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    "gemma3_text": {"model_type": "gemma3_text", **BASE, **GROUPED, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3_text_biased": {"model_type": "gemma3_text", **BASE, "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True, "sliding_window": 8, "layer_types": [FULL, SLIDES], "rope_parameters": {FULL: {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 16}, SLIDES: {"rope_type": "default", "rope_theta": 1e3}}, "final_logit_softcapping": 4.0, "tie_word_embeddings": False},
    "gemma4_text": {"model_type": "gemma4_text", **BASE, **GROUPED, **OF_GEMMA4, "sliding_window": 8, "layer_types": [SLIDES, FULL], "final_logit_softcapping": 5.0, "rope_parameters": {FULL: {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25}, SLIDES: {"rope_type": "default", "rope_theta": 1e3}}},
    "gemma4_text_keys": {"model_type": "gemma4_text", **BASE, **GROUPED, **OF_GEMMA4, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "attention_bias": True, "sliding_window": 8, "layer_types": [SLIDES, FULL], "tie_word_embeddings": False},
    "gemma4_unified_text": {"model_type": "gemma4_unified_text", **BASE, **GROUPED, "head_dim": 6, "global_head_dim": 10, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 8, "layer_types": [SLIDES, FULL]},
    "smollm3": {"model_type": "smollm3", **BASE, **GROUPED, "no_rope_layers": [1, 0]},
    "smollm3_sliding": {"model_type": "smollm3", **BASE, **GROUPED, **BIASED, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8, "tie_word_embeddings": False},
    "seed_oss": {"model_type": "seed_oss", **BASE, **GROUPED, "head_dim": 12},
    "seed_oss_biased": {"model_type": "seed_oss", **BASE, **GROUPED, "head_dim": 12, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "ministral": {"model_type": "ministral", **BASE, **GROUPED, "head_dim": 8, "sliding_window": 8, "layer_types": [SLIDES, FULL]},
    "ministral_sliding": {"model_type": "ministral", **BASE, **GROUPED, "sliding_window": 8, "head_dim": 12, "tie_word_embeddings": True},
    "cohere2": {"model_type": "cohere2", **BASE, **GROUPED, "sliding_window": 8, "sliding_window_pattern": 2},
    "cohere2_biased": {"model_type": "cohere2", **BASE, **GROUPED, "sliding_window": 8, "layer_types": [FULL, SLIDES], "attention_bias": True, "tie_word_embeddings": False},
    "arcee": {"model_type": "arcee", **BASE, **GROUPED, "head_dim": 12},
    "arcee_biased": {"model_type": "arcee", **BASE, **GROUPED, **BIASED, "tie_word_embeddings": True},
    "nemotron": {"model_type": "nemotron", **BASE, **GROUPED, "head_dim": 12},
    "nemotron_biased": {"model_type": "nemotron", **BASE, **GROUPED, **BIASED, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    "ernie4_5": {"model_type": "ernie4_5", **BASE, **GROUPED, "head_dim": 12},
    "ernie4_5_biased": {"model_type": "ernie4_5", **BASE, **GROUPED, "head_dim": 12, "use_bias": True, "tie_word_embeddings": False},
    "helium": {"model_type": "helium", **BASE, **GROUPED, "head_dim": 8},
    "helium_biased": {"model_type": "helium", **BASE, **GROUPED, **BIASED, "head_dim": 8, "tie_word_embeddings": True},
    "starcoder2": {"model_type": "starcoder2", **BASE, **GROUPED, "sliding_window": 8},
    "starcoder2_unbiased": {"model_type": "starcoder2", **BASE, **GROUPED, "head_dim": 12, "use_bias": False, "tie_word_embeddings": False},
    "phi": {"model_type": "phi", **BASE, **GROUPED, "head_dim": 12},
    "phi_tied": {"model_type": "phi", **BASE, "partial_rotary_factor": 0.25, "tie_word_embeddings": True},
    "stablelm": {"model_type": "stablelm", **BASE, **GROUPED},
    "stablelm_qk_norm": {"model_type": "stablelm", **BASE, **GROUPED, "use_parallel_residual": True, "qk_layernorm": True},
    "stablelm_parallel": {"model_type": "stablelm", **BASE, **GROUPED, "use_parallel_residual": True, "use_qkv_bias": True, "tie_word_embeddings": True},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", **BASE, **GROUPED, "head_dim": 12, "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "hunyuan_v1_dense_biased": {"model_type": "hunyuan_v1_dense", **BASE, **GROUPED, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "ministral3": {"model_type": "ministral3", **BASE, **GROUPED, "head_dim": 12, "rope_parameters": GROWING},
    "ministral3_sliding": {"model_type": "ministral3", **BASE, **GROUPED, "head_dim": 8, "sliding_window": 8, "rope_parameters": GROWING, "tie_word_embeddings": True},
    "cwm": {"model_type": "cwm", **BASE, **GROUPED, "head_dim": 12, "sliding_window": 8, "rope_parameters": LLAMA3},
    "cwm_biased": {"model_type": "cwm", **BASE, **GROUPED, "head_dim": 8, "mlp_bias": True, "sliding_window": 8, "layer_types": [SLIDES, FULL], "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "internlm3": {"model_type": "internlm3", **BASE, **GROUPED, "head_dim": 12, "qkv_bias": True, "bias": True},
    "internlm3_tied": {"model_type": "internlm3", **BASE, **GROUPED, "head_dim": 8, "tie_word_embeddings": True},
    "iquestcoder": {"model_type": "iquestcoder", **BASE, **GROUPED, "head_dim": 12},
    "iquestcoder_biased": {"model_type": "iquestcoder", **BASE, **GROUPED, **BIASED, "head_dim": 8, "tie_word_embeddings": True},
    "phi_qk_norm": {"model_type": "phi", **BASE, **GROUPED, "qk_layernorm": True},
    "glm4": {"model_type": "glm4", **BASE, **GROUPED, "head_dim": 12},
    "glm4_unbiased": {"model_type": "glm4", **BASE, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": False, "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2", **BASE, **GROUPED, "head_dim": 12},
    "olmo2_biased": {"model_type": "olmo2", **BASE, "attention_bias": True, "tie_word_embeddings": True},
    "exaone4": {"model_type": "exaone4", **BASE, **GROUPED, "head_dim": 12, "sliding_window": 8, "sliding_window_pattern": 2},
    "exaone4_full": {"model_type": "exaone4", **BASE, **GROUPED, "sliding_window": None, "layer_types": [FULL, FULL], "tie_word_embeddings": True},
    "exaone": {"model_type": "exaone", **without(BASE, "num_hidden_layers"), **EXAONE, **GROUPED, "rope_scaling": LLAMA3, "tie_word_embeddings": False},
    "exaone_tied": {"model_type": "exaone", **without(BASE, "num_hidden_layers", "intermediate_size"), **EXAONE, "head_dim": 12, "tie_word_embeddings": True},
    "olmo3": {"model_type": "olmo3", **BASE, **GROUPED, "head_dim": 12, "sliding_window": 8, "layer_types": [SLIDES, FULL], "rope_parameters": {FULL: {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}, SLIDES: {"rope_type": "default", "rope_theta": 5e5}}},
    "olmo3_biased": {"model_type": "olmo3", **BASE, "attention_bias": True, "sliding_window": 8, "tie_word_embeddings": True},
    "olmo": {"model_type": "olmo", **BASE, **GROUPED},
    "olmo_clipped": {"model_type": "olmo", **BASE, **GROUPED, "head_dim": 12, "clip_qkv": 0.5, "attention_bias": True, "tie_word_embeddings": True},
    "jais2": {"model_type": "jais2", **BASE, **GROUPED, "head_dim": 12},
    "jais2_unbiased": {"model_type": "jais2", **BASE, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
    "vaultgemma": {"model_type": "vaultgemma", **BASE, **GROUPED, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "vaultgemma_uncapped": {"model_type": "vaultgemma", **BASE, **GROUPED, "head_dim": 8, "sliding_window": 8, "layer_types": [FULL, SLIDES], "attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    "glm": {"model_type": "glm", **BASE, **GROUPED, "head_dim": 12},
    "glm_unbiased": {"model_type": "glm", **BASE, **GROUPED, "head_dim": 8, "attention_bias": False, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    "granitemoehybrid": {"model_type": "granitemoehybrid", **BASE, **GROUPED, **GRANITE, **HYBRID, "position_embedding_type": "rope"},
    "granitemoehybrid_nope": {"model_type": "granitemoehybrid", **BASE, **GROUPED, **GRANITE, **HYBRID, "layer_types": ["attention", FULL], "attention_bias": True, "tie_word_embeddings": True},
    "qwen3_5_text": {"model_type": "qwen3_5_text", **BASE, **GROUPED, **DELTA, "head_dim": 16, "layer_types": [FULL, LINEAR]},
    "qwen3_5_text_biased": {"model_type": "qwen3_5_text", **BASE, **GROUPED, **DELTA, "head_dim": 8, "layer_types": [FULL, LINEAR], "attention_bias": True, "partial_rotary_factor": 0.5, "linear_num_key_heads": 4, "linear_conv_kernel_dim": 3, "tie_word_embeddings": True},
    "falcon": {"model_type": "falcon", **without(BASE, "intermediate_size"), "ffn_hidden_size": 40},
    "falcon_grouped": {"model_type": "falcon", **without(BASE, "intermediate_size"), "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "tie_word_embeddings": False},
    "falcon_one_norm": {"model_type": "falcon", **without(BASE, "intermediate_size"), "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "falcon_sequential": {"model_type": "falcon", **without(BASE, "intermediate_size"), "ffn_hidden_size": 40, "multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False},
}  # fmt: skip
"""Families that are unlike the first ones in single traits: flags on and off, heads that are not the width, tied and untied."""


def pytest_configure(config: pytest.Config) -> None:
    """transformers copies the model code of a checkpoint to HF_MODULES_CACHE, read when it is imported: a folder of this run."""
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["HF_MODULES_CACHE"] = folder.name


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **BASE, **GROUPED, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "llama_biased": {"model_type": "llama", **BASE, **GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", **BASE, **GROUPED, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **BASE, **GROUPED, "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", **BASE, **GROUPED},
    "qwen3": {"model_type": "qwen3", **BASE, **GROUPED, "head_dim": 12},
    "qwen3_biased": {"model_type": "qwen3", **BASE, **GROUPED, "head_dim": 12, "attention_bias": True},
    "cohere": {"model_type": "cohere", **BASE, **GROUPED},
    "cohere_qk_norm": {"model_type": "cohere", **BASE, **GROUPED, "use_qk_norm": True, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", **BASE},
    "gpt_neox_sequential": {"model_type": "gpt_neox", **BASE, "use_parallel_residual": False, "attention_bias": False},
    "phi3": {"model_type": "phi3", **BASE, **GROUPED},
    **MORE,
}  # fmt: skip
"""A small model of every family and variant. hidden and intermediate sizes differ, so that a swap shows."""

NO_CLASS = {"exaone"}
"""Model types that have no class of their own in transformers."""

CHEAP = ("test_architectures.py", "test_dense_models_compute_what_transformers_does")
"""What is tried for all of them always: tables, facts and logits against transformers."""

WHOLE = ("test_every_family.py", "test_older_files.py")
"""Files whose every case is one of many: of the first families too."""


def tried_family(item: pytest.Item) -> str | None:
    """The model type that a case is about, where it is one of many of its kind: of a family of `MORE`, or in a file of `WHOLE`."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    types = [CONFIGS[value]["model_type"] if value in CONFIGS else value for value in values if isinstance(value, str)]
    late = {config["model_type"] for config in (CONFIGS if any(file in item.nodeid for file in WHOLE) else MORE).values()}
    return next((kind for kind in types if kind in late), None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What every family and variant goes through is for `-m families`; one case of each test and family, always the same, is for all runs."""
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        kind = None if any(cheap in item.nodeid for cheap in CHEAP) else tried_family(item)
        if kind is not None:
            item.add_marker("families")
            cases.setdefault((item.nodeid.partition("[")[0], kind), []).append(item)
    for same in cases.values():
        min(same, key=lambda item: crc32(item.nodeid.encode())).add_marker("sampled")


@dataclass
class Result:
    """What a command gave: exit status, stdout, stderr."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""
    from bam_merge.cli import main

    def call(*args: object) -> Result:
        monkeypatch.setattr("sys.argv", ["bam-merge", *map(str, args)])
        status = 0
        try:
            main()
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


SOURCES = ("seed", "code", "law")


def write_sources(folder: Path, config: dict[str, Any], names: tuple[str, ...] = SOURCES, dtype: str = "F32", **options: Any) -> None:
    """A seed and branches of it, below `folder`."""
    for branch, name in enumerate(names):
        values = random_values(7) if branch == 0 else branched_values(7, branch)
        write_checkpoint(folder / name, config, values, dtype, **options)


def write_recipe(folder: Path, text: str = "", method: str = "bam", names: tuple[str, ...] = SOURCES, output: str = "{path: out}") -> Path:
    """A recipe over the sources in `folder`, with `text` as further sections."""
    path = folder / "recipe.yaml"
    sources = ", ".join(f"{name}: {name}" for name in names)
    path.write_text(f"method: {method}\nsources: {{{sources}}}\n{text}\noutput: {output}\n")
    return path


@pytest.fixture
def llamas(tmp_path: Path) -> Path:
    """Three llama sources in a fresh folder."""
    write_sources(tmp_path, CONFIGS["llama"])
    return tmp_path
