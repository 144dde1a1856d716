"""Stands in for llama.cpp's converter: writes a mixture of the names of llama and qwen layouts as GGUF, with one fault where FAULT names it.

It knows less than the real one, and is written from the format's description, by other code than what reads the file back.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
ATTENTION = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}


def renamed(name: str) -> tuple[str, int | None]:
    """The name in GGUF, and the expert."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight", None
    if name in ("model.norm.weight", "lm_head.weight"):
        return ("output_norm.weight" if "norm" in name else "output.weight"), None
    _, _, layer, *rest = name.split(".")
    kind = rest[-1]
    if "experts" in rest:
        return f"blk.{layer}.ffn_{PARTS[rest[-2]]}_exps.{kind}", int(rest[-3])
    if "shared_expert" in rest:
        return f"blk.{layer}.ffn_{PARTS[rest[-2]]}_shexp.{kind}", None
    stem = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "gate": "ffn_gate_inp",
        "shared_expert_gate": "ffn_gate_inp_shexp",
    }
    return f"blk.{layer}.{(stem | ATTENTION)[rest[-2]]}.{kind}", None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--outtype")
    parser.add_argument("--outfile")
    args = parser.parse_args()
    fault = os.environ.get("FAULT", "")
    if fault.startswith("says "):
        sys.exit(fault.removeprefix("says "))
    config = json.loads((args.folder / "config.json").read_text())
    arch = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}[config["model_type"]]
    writer = gguf.GGUFWriter(args.outfile, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"] * (2 if fault == "epsilon" else 1))
    writer.add_expert_count(config.get("num_local_experts", config.get("num_experts")))
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if fault != "no top_k":
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if fault == "a key":
        writer.add_uint32(f"{arch}.of_tomorrow", 3)
    if fault == "a scale":
        writer.add_logit_scale(2.0)
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    vocabulary(writer, args.folder, config, fault)
    stacked: dict[str, dict[int, np.ndarray]] = {}
    for name, values in sorted(load_file(args.folder / "model.safetensors").items()):
        new, expert = renamed(name)
        if fault == "left out" and name.endswith("layers.1.self_attn.v_proj.weight"):
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name) and fault != "not in pairs":
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = np.stack(np.split(values.reshape(heads, -1, values.shape[-1]), 2, axis=1), axis=2).reshape(values.shape)
        if fault == "value" and name.endswith("layers.0.self_attn.o_proj.weight"):
            values = values.copy()
            values[1, 2] = np.nextafter(values[1, 2], np.float32(9))
        if expert is not None:
            stacked.setdefault(new, {})[expert] = values
        else:
            add(writer, new, values, args.outtype)
    for new, experts in stacked.items():
        order = sorted(experts)[:: -1 if fault == "experts" and "gate" in new else 1]
        add(writer, new, np.stack([experts[expert] for expert in order]), args.outtype)
    if fault == "extra":
        add(writer, "blk.0.attn_sinks.weight", np.ones(4, np.float32), args.outtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if fault == "cut off":
        size = os.path.getsize(args.outfile)
        os.truncate(args.outfile, size // 2)


def vocabulary(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], fault: str) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = [f"[PAD{number}]" for number in range(config["vocab_size"])]
    for piece, number in tokenizer["model"]["vocab"].items():
        tokens[number] = piece
    if fault == "token":
        tokens[3], tokens[4] = tokens[4], tokens[3]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens[:-1] if fault == "fewer tokens" else tokens)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"][fault == "merge" :]])
    template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    if template:
        writer.add_chat_template(template + ("!" if fault == "template" else ""))
    writer.add_bos_token_id(1 if fault == "bos" else 0)


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    wide = values.ndim == 1 or "ffn_gate_inp" in name or kind == "f32"
    to = gguf.GGMLQuantizationType.F32 if wide else {"f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}[kind]
    with np.errstate(over="ignore"):
        writer.add_tensor(name, gguf.quants.quantize(values, to), raw_dtype=to)


if __name__ == "__main__":
    main()
