"""Small models whose weights are 8-bit floats with scales beside them, as several tools store them."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import CONFIGS, write_sources
from safetensors.torch import load_file, save_file

BLOCK = (16, 24)
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {**FLOAT, "strategy": strategy, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }


STYLES: dict[str, tuple[dict[str, Any], str, Any, Any]] = {
    "blocks": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}, "weight_scale_inv", lambda r, c: BLOCK, None),
    "blocks of compressed-tensors": (compressed("block", block_structure=list(BLOCK)), "weight_scale", lambda r, c: BLOCK, None),
    "groups": (compressed("group", group_size=16), "weight_scale", lambda r, c: (1, 16), None),
    "rows": (compressed("channel"), "weight_scale", lambda r, c: (1, c), None),
    "rows without a second axis": ({"quant_method": "fbgemm_fp8"}, "weight_scale", lambda r, c: (1, c), lambda s: s.flatten()),
    "tensors": (compressed("tensor"), "weight_scale", lambda r, c: (r, c), lambda s: s.reshape(1)),
    "tensors, a number": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", lambda r, c: (r, c), lambda s: s.reshape(())),
    "tensors of fp8": ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, "weight_scale_inv", lambda r, c: (r, c), lambda s: s.reshape(())),
}  # fmt: skip
"""(what config.json says, what scales are called, the block that each is for, how its shape is stored)."""


def quantise(
    folder: Path, style: str, dtype: torch.dtype = torch.float8_e4m3fn, scale: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Store the projections of a small model so. Returns what its tensors stand for, in float64."""
    settings, ending, block_of, reshaped = STYLES[style]
    path = folder / "model.safetensors"
    stored, meant = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in load_file(path).items():
        if tensor.dim() != 2 or "embed" in name or "head" in name:
            stored[name], meant[name] = tensor, tensor.double()
            continue
        height, width = block_of(*tensor.shape)
        grid = torch.zeros(-(-tensor.shape[0] // height), -(-tensor.shape[1] // width))
        quantised, value = torch.zeros(tensor.shape, dtype=dtype), torch.zeros(tensor.shape, dtype=torch.float64)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                number = (tensor[at].float().abs().max() / torch.finfo(dtype).max * (1 + i + 3 * j)).to(scale)
                grid[i, j] = number.float()
                quantised[at] = (tensor[at].float() / number.float()).to(dtype)
                value[at] = quantised[at].double() * number.double()
        stored[name], meant[name] = quantised, value
        stored[f"{name.removesuffix('weight')}{ending}"] = (reshaped or (lambda s: s))(grid).to(scale).contiguous()
    save_file(stored, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return meant


def quantised_sources(folder: Path, style: str = "blocks", family: str = "llama", **options: Any) -> dict[str, torch.Tensor]:
    """seed, code and law in bfloat16, and law as 8-bit floats; what law's tensors stand for."""
    write_sources(folder, CONFIGS[family], dtype="BF16")
    return quantise(folder / "law", style, **options)


def dequantising(
    folder: Path, text: str = "", method: str = "bam", output: str = "{path: out}", sources: str = "seed: seed, code: code"
) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"method: {method}\nsources: {{{sources}, law: {{path: law, dequantise: true}}}}\n{text}\noutput: {output}\n")
    return path
