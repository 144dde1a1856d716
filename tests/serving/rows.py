"""What is served: merges of small random models with a pretrained model's tokenizer, and of that model's own branches where they are there.

A row says how a merge is made. What an engine must then do with it is not said here: the plan says it, and is held to it.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.demo.synthetic import branched_values, random_values, write_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 49152, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Of the small models; 49,152 tokens are what the tokenizer of SmolLM2 has."""

NAMES = ("seed", "code", "law", "math")
RAW, RENORMALISED = "ffn: {top_k: 2, gate: softmax_then_topk}", "ffn: {top_k: 2, gate: topk_then_softmax}"
SIGMOID = "ffn: {top_k: 2, gate: topk_then_sigmoid}"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PRETRAINED = "smollm2"


def scaled(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, **more}}


LLAMA_3 = scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
WINDOW = {"sliding_window": 8}
GRANITE = {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
COHERE = {"sliding_window_pattern": 2, "logit_scale": 0.5}
GELU = {"hidden_act": "gelu"}


FULL_AND_SLIDING = {
    "head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 2, "sliding_window": 8, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 49152, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A merge: the sources' `family`, with these keys otherwise, the `layout`, and the rest of the recipe as `text`."""

    family: str
    layout: str
    text: str = RENORMALISED
    keys: dict[str, Any] = field(default_factory=dict)
    method: str = "btx"
    names: tuple[str, ...] = NAMES


TIED = {"tie_word_embeddings": True}
WIDE_HEADS = {"head_dim": 64}
EXPERT_KV, SHARED_KV = (f"attention: {{kv: {kv}}}\n{RENORMALISED}" for kv in ("expert", "shared"))
MIXED_KV = "rules: [{roles: [attn.k, attn.v, attn.k_norm], layers: 0-1, make: mean}]"
MIXED = {"use_sliding_window": True, "max_window_layers": 2, **WINDOW}

ROWS: dict[str, Row] = {
    "mixtral": Row("llama", "mixtral"),
    "mixtral, tied": Row("llama", "mixtral", keys=TIED),
    "mixtral, one expert": Row("llama", "mixtral", "ffn: {top_k: 1, gate: topk_then_softmax}"),
    "mixtral of mistral": Row("mistral", "mixtral", keys={"sliding_window": None}),
    "mixtral of mistral, window": Row("mistral", "mixtral", keys=WINDOW),
    "mixtral, wide heads": Row("llama", "mixtral", keys=WIDE_HEADS),
    "mixtral, gelu": Row("llama", "mixtral", keys=GELU),
    "mixtral, llama3": Row("llama", "mixtral", keys=LLAMA_3),
    "mixtral, linear": Row("llama", "mixtral", keys=scaled("linear")),
    "mixtral, yarn": Row("llama", "mixtral", keys=scaled("yarn", original_max_position_embeddings=512)),
    "mixtral, yarn, attention_factor": Row("llama", "mixtral", keys=scaled("yarn", original_max_position_embeddings=512, attention_factor=0.7)),
    "mixtral, yarn, mscale": Row("llama", "mixtral", keys=scaled("yarn", original_max_position_embeddings=512, mscale=0.5, mscale_all_dim=1.0)),
    "mixtral, yarn, truncate": Row("llama", "mixtral", keys=scaled("yarn", original_max_position_embeddings=512, truncate=False)),
    "mixtral, yarn, beta": Row("llama", "mixtral", keys=scaled("yarn", original_max_position_embeddings=512, beta_fast=16.0, beta_slow=2.0)),
    "mixtral, dynamic": Row("llama", "mixtral", keys=scaled("dynamic")),
    "qwen3_moe": Row("qwen3", "qwen3_moe"),
    "qwen3_moe, tied": Row("qwen3", "qwen3_moe", keys=TIED),
    "qwen3_moe, raw": Row("qwen3", "qwen3_moe", RAW),
    "qwen3_moe, llama3": Row("qwen3", "qwen3_moe", keys=LLAMA_3),
    "qwen3_moe, wide heads": Row("qwen3", "qwen3_moe", keys=WIDE_HEADS),
    "qwen3_moe, biased": Row("qwen3", "qwen3_moe", keys={"attention_bias": True}),
    "qwen3_moe, window": Row("qwen3", "qwen3_moe", keys={**MIXED, "max_window_layers": 0}),
    "qwen3_moe, shards": Row("qwen3", "qwen3_moe", "experts: {count: 4, make: virtual_group, shards: 2}", method="sparse_upcycling", names=("seed",)),
    "qwen2_moe, raw": Row("qwen2", "qwen2_moe", RAW),
    "qwen2_moe, tied, raw": Row("qwen2", "qwen2_moe", RAW, TIED),
    "qwen2_moe, renormalised": Row("qwen2", "qwen2_moe"),
    "qwen2_moe of llama, raw": Row("llama", "qwen2_moe", RAW),
    "qwen2_moe of llama, renormalised": Row("llama", "qwen2_moe"),
    "qwen2_moe of mistral, raw": Row("mistral", "qwen2_moe", RAW, {"sliding_window": None}),
    "qwen2_moe, shared expert": Row("qwen2", "qwen2_moe", f"{RAW[:-1]}, shared_expert: seed}}"),
    "qwen2_moe, windows in some layers": Row("qwen2", "qwen2_moe", RAW, MIXED),
    "qwen2_moe, wide heads": Row("llama", "qwen2_moe", RAW, WIDE_HEADS),
    "qwen2_moe, llama3": Row("llama", "qwen2_moe", RAW, LLAMA_3),
    "granitemoe": Row("granite", "granitemoe", keys=GRANITE),
    "granitemoe of llama, tied": Row("llama", "granitemoe", keys=TIED),
    "granitemoehybrid_moe": Row("granite", "granitemoehybrid_moe", keys=GRANITE),
    "ernie4_5_moe": Row("ernie4_5", "ernie4_5_moe"),
    "ernie4_5_moe of llama": Row("llama", "ernie4_5_moe"),
    "cohere2_moe": Row("cohere2", "cohere2_moe", keys={**COHERE, **WINDOW}),
    "cohere2_moe, sigmoid": Row("cohere2", "cohere2_moe", SIGMOID, keys={**COHERE, **WINDOW}),
    "glm4_moe of llama": Row("llama", "glm4_moe", SIGMOID),
    "glm4_moe of qwen3, shared expert": Row("qwen3", "glm4_moe", f"{SIGMOID[:-1]}, shared_expert: seed}}"),
    "solar_open": Row("llama", "solar_open", SIGMOID),
    "dots1": Row("qwen3", "dots1", SIGMOID),
    "hunyuan_v1_moe": Row("hunyuan_v1_dense", "hunyuan_v1_moe"),
    "flex_olmo": Row("olmo2", "flex_olmo"),
    "gemma4": Row("gemma4_text", "gemma4", keys=FULL_AND_SLIDING),
    "bam, Expert-KV": Row("llama", "bam", EXPERT_KV, method="bam"),
    "bam, Shared-KV": Row("llama", "bam", SHARED_KV, method="bam"),
    "bam, keys shared in some layers": Row("llama", "bam", f"{EXPERT_KV}\n{MIXED_KV}", method="bam"),
    "bam, the paper's gates": Row("llama", "bam", "ffn: {top_k: 1, gate: softmax_then_topk}", method="bam"),
    "bam, gate_scale": Row("llama", "bam", "ffn: {top_k: 2, gate: softmax_then_topk, gate_scale: 1.5}", method="bam"),
    "bam, sigmoid": Row("llama", "bam", f"attention: {{kv: expert}}\n{SIGMOID}", method="bam"),
    "bam, top-2 attention": Row("llama", "bam", "attention: {routing: top_k, top_k: 2}", method="bam"),
    "bam without attention experts": Row("llama", "bam"),
    "bam, tied": Row("llama", "bam", EXPERT_KV, TIED, "bam"),
    "bam of qwen2": Row("qwen2", "bam", EXPERT_KV, method="bam"),
    "bam of qwen3": Row("qwen3", "bam", MIXED_KV, method="bam"),
    "bam of mistral, window": Row("mistral", "bam", EXPERT_KV, WINDOW, "bam"),
    "bam of cohere": Row("cohere", "bam", MIXED_KV, {"logit_scale": 0.5, "use_qk_norm": True}, "bam"),
    "bam of granite": Row("granite", "bam", MIXED_KV, {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0, "attention_multiplier": 0.2}, "bam"),
    "bam of olmo2": Row("olmo2", "bam", MIXED_KV, method="bam"),
    "bam of glm4": Row("glm4", "bam", MIXED_KV, {"head_dim": 64}, "bam"),
    "bam of smollm3": Row("smollm3", "bam", MIXED_KV, {"no_rope_layer_interval": 2}, "bam"),
    "bam of gemma2, silu": Row("gemma2", "bam", MIXED_KV, {"hidden_activation": "silu", "head_dim": 64, "query_pre_attn_scalar": 64, **WINDOW}, "bam"),
    "bam of gemma2": Row("gemma2", "bam", MIXED_KV, {"head_dim": 64, "query_pre_attn_scalar": 64, **WINDOW}, "bam"),
    "bam of gemma4, silu, heads alike": Row("gemma4_text", "bam", MIXED_KV, {**FULL_AND_SLIDING, "global_head_dim": 32, "hidden_activation": "silu"}, "bam"),
    "bam, gelu": Row("llama", "bam", EXPERT_KV, GELU, "bam"),
    "bam, biases of the FFN": Row("llama", "bam", EXPERT_KV, {"mlp_bias": True}, "bam"),
    "bam of gpt_neox": Row("gpt_neox", "bam", EXPERT_KV, {"num_key_value_heads": 4}, "bam"),
    "bam, dynamic": Row("llama", "bam", EXPERT_KV, scaled("dynamic"), "bam"),
    "bam, llama3": Row("llama", "bam", EXPERT_KV, LLAMA_3, "bam"),
    "smollm2, mixtral": Row(PRETRAINED, "mixtral"),
    "smollm2, qwen2_moe": Row(PRETRAINED, "qwen2_moe", RAW),
    "smollm2, bam": Row(PRETRAINED, "bam", EXPERT_KV, method="bam"),
    "smollm2, bam, Shared-KV": Row(PRETRAINED, "bam", SHARED_KV, method="bam"),
}  # fmt: skip
"""Every row of what is served, by a name."""


def make(row: Row, folder: Path, pretrained: Path) -> Path:
    """The merged folder of a row, below `folder`; `pretrained` has the model `seed`, whose tokenizer all have, and perhaps its branches."""
    folder.mkdir(parents=True)
    options = MergeOptions(verify="none")
    places = {name: name for name in row.names}
    for branch, name in enumerate(row.names):
        if row.family == PRETRAINED:
            places[name] = str(pretrained / name)
            continue
        values = random_values(7) if branch == 0 else _branch(branch)
        write_checkpoint(folder / name, {"model_type": row.family, **SIZES, **row.keys}, values)
        for file in TOKENIZER:
            if (pretrained / "seed" / file).exists():
                shutil.copy(pretrained / "seed" / file, folder / name)
    recipe = folder / "recipe.yaml"
    routers = "" if "router:" in row.text else "router: {init: normal, std: 0.3}"
    recipe.write_text(
        f"method: {row.method}\nsources: {{{', '.join(f'{name}: {path}' for name, path in places.items())}}}\n{row.text}\n{routers}\n"
        f"output: {{path: out, layout: {row.layout}}}\n"
    )
    return merge(load_recipe(recipe), options=options)


def _branch(number: int) -> Any:
    """A model that is some way from the seed, so that its experts differ."""
    return branched_values(7, number, 0.03)
