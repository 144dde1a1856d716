"""Quantised models, with the configurations and sizes of public ones: named, counted as what they stand for, refused with the way out."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_sources
from damage import edit_config, edit_tensors, said

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import family_tensors
from bam_merge.architectures.quantisation import quantisation
from bam_merge.architectures.tables import find_by_model_type, load_architecture
from bam_merge.checkpoints.header import encode_header
from bam_merge.inspecting.inspection import inspect

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PHI3_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}

Stored = Iterator[tuple[str, str, tuple[int, ...]]]


def awq(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.qweight", "I32", (columns, rows // 8)
    yield f"{stem}.qzeros", "I32", (columns // 128, rows // 8)
    yield f"{stem}.scales", "F16", (columns // 128, rows)


def gptq(bits: int = 4) -> Callable[[str, int, int], Stored]:
    def stored(stem: str, rows: int, columns: int) -> Stored:
        yield f"{stem}.qweight", "I32", (columns * bits // 32, rows)
        yield f"{stem}.qzeros", "I32", (columns // 128, rows * bits // 32)
        yield f"{stem}.scales", "F16", (columns // 128, rows)
        yield f"{stem}.g_idx", "I32", (columns,)

    return stored


def nf4(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.weight", "U8", (rows * columns // 2, 1)
    yield f"{stem}.weight.absmax", "U8", (rows * columns // 64,)
    yield f"{stem}.weight.nested_absmax", "F32", (rows * columns // 64 // 256,)
    yield f"{stem}.weight.quant_map", "F32", (16,)
    yield f"{stem}.weight.quant_state.bitsandbytes__nf4", "U8", (78,)


def int8(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.weight", "I8", (rows, columns)
    yield f"{stem}.SCB", "F32", (rows,)
    yield f"{stem}.weight_format", "U8", ()


def packed(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.weight_packed", "I32", (rows, columns // 8)
    yield f"{stem}.weight_scale", "BF16", (rows, columns // 128)
    yield f"{stem}.weight_shape", "I64", (2,)


def mlx(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.weight", "U32", (rows, columns // 8)
    yield f"{stem}.scales", "BF16", (rows, columns // 64)
    yield f"{stem}.biases", "BF16", (rows, columns // 64)


def hqq(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.W_q", "U8", (rows * columns // 128, 64)
    yield f"{stem}.scale", "F16", (rows * columns // 64, 1)
    yield f"{stem}.zero", "F16", (rows * columns // 64, 1)


def fp8(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.weight", "F8_E4M3", (rows, columns)
    yield f"{stem}.weight_scale_inv", "BF16", (-(-rows // 128), -(-columns // 128))


def aqlm(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.codes", "I16", (rows, columns // 8, 1)
    yield f"{stem}.codebooks", "F16", (1, 65536, 1, 8)
    yield f"{stem}.scales", "F16", (rows, 1, 1, 1)


def torchao(stem: str, rows: int, columns: int) -> Stored:
    yield f"{stem}.weight_qdata", "U8", (rows, columns // 2)
    yield f"{stem}.weight_scale", "BF16", (rows, columns // 128)


PUBLIC: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[str, int, int], Stored], int, str]] = {
    "Meta-Llama-3-8B AWQ": (LLAMA_8B, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, awq, 8_030_261_248, "AWQ, 4 bits in groups of 128"),
    "Qwen2.5-7B-Instruct-AWQ": (QWEN_7B, {"quant_method": "awq", "bits": 4, "group_size": 128}, awq, 7_615_616_512, "AWQ, 4 bits in groups of 128"),
    "Qwen2.5-7B-Instruct-GPTQ-Int8": (QWEN_7B, {"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False}, gptq(8), 7_615_616_512, "GPTQ, 8 bits in groups of 128"),
    "Mistral-7B GPTQ of 4 bits": (MISTRAL_7B, {"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq(), 7_241_732_096, "GPTQ, 4 bits in groups of 32"),
    "Mistral-7B GPTQ without groups": (MISTRAL_7B, {"quant_method": "gptq", "bits": 4, "group_size": -1}, gptq(), 7_241_732_096, "GPTQ, 4 bits"),
    "Llama-3-8B bnb-4bit": (LLAMA_8B, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, nf4, 8_030_261_248, "bitsandbytes nf4, 4 bits in groups of 64"),
    "Llama-3-8B bnb-8bit": (LLAMA_8B, {"quant_method": "bitsandbytes", "load_in_8bit": True}, int8, 8_030_261_248, "bitsandbytes int8, 8 bits"),
    "Llama-3-8B w4a16": (LLAMA_8B, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128, "type": "int"}}}}, packed, 8_030_261_248, "compressed-tensors pack-quantized, 4 bits in groups of 128"),
    "Qwen3-8B-FP8": (QWEN3_8B, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, fp8, 8_190_735_360, "FP8 in blocks of 128 x 128, 8 bits"),
    "Mistral-7B HQQ": (MISTRAL_7B, {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, hqq, 7_241_732_096, "HQQ, 4 bits in groups of 64"),
    "Mistral-7B AQLM": (MISTRAL_7B, {"quant_method": "aqlm", "nbits_per_codebook": 16, "num_codebooks": 1, "in_group_size": 8}, aqlm, 7_241_732_096, "AQLM, 16 bits in groups of 8"),
    "Llama-3-8B torchao": (LLAMA_8B, {"quant_method": "torchao", "quant_type": "int4_weight_only"}, torchao, 8_030_261_248, "torchao int4_weight_only, 4 bits"),
    "Phi-3-mini AWQ, fused": (PHI3_MINI, {"quant_method": "awq", "bits": 4, "group_size": 128}, awq, 3_821_079_552, "AWQ, 4 bits in groups of 128"),
    "Llama-3-8B MLX": (LLAMA_8B, {"bits": 4, "group_size": 64}, mlx, 8_030_261_248, "MLX, 4 bits in groups of 64"),
}  # fmt: skip
"""(config, what it says of quantised weights, how a projection is stored, the published count of parameters, what is said)."""


def sparse(folder: Path, config: dict[str, Any], tensors: Stored) -> Path:
    """A folder with a file of true size, of which only the header is written."""
    folder.mkdir(parents=True)
    header, spans = encode_header(sorted(tensors))
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(header)
        os.truncate(stream.fileno(), max(offset + nbytes for offset, nbytes in spans))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantised_tensors(config: dict[str, Any], store: Callable[[str, int, int], Stored]) -> Stored:
    family = find_by_model_type(config["model_type"])
    assert family is not None
    for name, shape in family_tensors(family, describe(family, config, [])):
        if name.endswith("_proj.weight") and len(shape) == 2:
            yield from store(name.removesuffix(".weight"), *shape)
        else:
            yield name, "BF16", shape


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_are_named_and_counted(name: str, tmp_path: Path, run: Any) -> None:
    config, settings, store, parameters, words = PUBLIC[name]
    key = "quantization" if "quant_method" not in settings else "quantization_config"
    folder = sparse(tmp_path / "model", {**config, key: settings}, quantised_tensors(config, store))
    found = inspect(folder)
    assert found.cost.parameters == found.cost.active == parameters
    assert found.anatomy.unknown == found.anatomy.missing == ()
    document = found.document()
    assert document["quantisation"]["method"] == settings.get("quant_method", "mlx")
    assert found.nbytes < 2 * parameters and document["flops_per_token"]["total"] > 0
    (finding,) = found.findings
    assert finding.startswith(f"config.json has a {key} ({words}): values are those of the quantised weights as stored")
    assert "take the 16-bit original" in finding
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: sparse_upcycling\nsources: {seed: model}\nexperts: [seed, seed]\noutput: {path: out}\n")
    (line,) = said(run, tmp_path, "plan", recipe)
    assert line.startswith(f"sources.seed: config.json has a {key} ({words})")
    way_out = "sources: {seed: {path: ..., dequantise: true}}" if store is fp8 else "Use the 16-bit model that it was made from."
    assert way_out in line


def test_a_public_mixture_is_counted_by_what_is_stored(tmp_path: Path) -> None:
    """Mixtral-8x7B AWQ: 46.7 billion, of which a token goes through 12.9."""
    experts = load_architecture("mixtral")
    sizes = {"d": 4096, "f": 14336}

    def tensors() -> Stored:
        for name, dtype, shape in quantised_tensors({**MIXTRAL, "model_type": "mistral"}, awq):
            if ".mlp." not in name:
                yield name, dtype, shape
        for layer in range(32):
            yield f"model.layers.{layer}.block_sparse_moe.gate.weight", "BF16", (8, sizes["d"])
            for expert in range(8):
                for part, (rows, columns) in {"w1": ("f", "d"), "w2": ("d", "f"), "w3": ("f", "d")}.items():
                    yield from awq(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}", sizes[rows], sizes[columns])

    assert experts.kind == "mixture"
    found = inspect(
        sparse(tmp_path / "model", {**MIXTRAL, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, tensors())
    )
    assert (found.cost.parameters, found.cost.active) == (46_702_792_704, 12_879_925_248)
    assert found.anatomy.unknown == found.anatomy.missing == ()
    assert found.cost.flops() is not None


def test_of_an_unknown_architecture_too(tmp_path: Path) -> None:
    """gpt-oss-like: two weights in a byte, and scales that are no parameters."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8", (4, 64, 2, 16)), ("model.layers.0.mlp.experts.gate_up_proj_scales", "U8", (4, 64, 2)),
        ("model.embed_tokens.weight", "BF16", (10, 64)), ("a.q_proj.qweight", "I32", (8, 8)), ("a.q_proj.scales", "F16", (8,)),
    ]  # fmt: skip
    found = inspect(sparse(tmp_path / "model", {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, iter(tensors)))
    assert found.cost.parameters == 4 * 64 * 2 * 32 + 640 + 8 * 8 * 8
    assert "MXFP4, 4 bits in groups of 32" in found.findings[0]


@pytest.mark.parametrize(("settings", "words"), [
    ({"quant_method": "eetq", "weights": "int8"}, "EETQ int8, 8 bits"),
    ({"quant_method": "quanto", "weights": "int4"}, "quanto int4, 4 bits"),
    ({"quant_method": "auto-round", "bits": 2, "group_size": 32}, "AutoRound, 2 bits in groups of 32"),
    ({"quant_method": "exl2", "bits": 4.65}, "ExLlamaV2, 4.65 bits"),
    ({"quant_method": "bitnet"}, "BitNet, 2 bits"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4"),
    ({"quant_method": "made-up\x1b", "bits": 3}, "'made-up\\x1b', 3 bits"),
    ({"load_in_4bit": True}, "bitsandbytes fp4, 4 bits in groups of 64"),
    ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "torchao default"),
    ("nonsense", "'str'"),
])  # fmt: skip
def test_every_method_has_words(settings: Any, words: str) -> None:
    found = quantisation({"quantization_config": settings})
    assert found is not None and found.words() == words
    assert quantisation({"quantization_config": None}) is quantisation({"quantization_config": {}}) is quantisation({}) is None
    assert quantisation({"quantization": {"x": 1}}) is None


def test_scales_that_differ_are_found(tmp_path: Path, run: Any) -> None:
    """Quantised models are compared as they are stored, what stands beside the weights too."""
    import torch

    write_sources(tmp_path, CONFIGS["llama"], ("seed", "law"))
    for name in ("seed", "law"):
        edit_config(tmp_path / name, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 8})
        edit_tensors(tmp_path / name, lambda t: (t.pop("model.layers.0.mlp.up_proj.weight"), t.update({
            "model.layers.0.mlp.up_proj.qweight": torch.ones(32, 5, dtype=torch.int32), "model.layers.0.mlp.up_proj.scales": torch.ones(4, 40), "model.layers.0.mlp.up_proj.qzeros": torch.ones(4, 5, dtype=torch.int32),
        })))  # fmt: skip
    only = ("--only", "*layers.0.mlp.up_proj*")
    assert run("diff", tmp_path / "seed", tmp_path / "law", *only).status == 0
    edit_tensors(tmp_path / "law", lambda t: t["model.layers.0.mlp.up_proj.scales"].mul_(2))
    result = run("diff", tmp_path / "seed", tmp_path / "law", *only)
    assert result.status == 1 and "up_proj.scales" in result.out
