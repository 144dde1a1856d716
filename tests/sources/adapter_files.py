"""Small LoRA adapters as PEFT would save them, written without it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PEFT = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": "seed",
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 6, "lora_bias": False, "lora_dropout": 0.05,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
"""An adapter_config.json of PEFT 0.21.2."""

PREFIX = "base_model.model."


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def write_adapter(
    folder: Path, base: Path, modules: tuple[str, ...] = ("q_proj", "v_proj"), seed: int = 0, dtype: torch.dtype = torch.float32,
    prefix: str = PREFIX, more: Mapping[str, torch.Tensor] | None = None, ranks: Mapping[str, int] | None = None, **config: Any,
) -> Path:  # fmt: skip
    """An adapter with updates of every module whose name ends in one of `modules`, and `more` tensors."""
    document = {**PEFT, "target_modules": list(modules), **config}
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * 0.1).to(dtype)

    for name, shape in shapes_of(base).items():
        module, _, part = name.rpartition(".")
        if part != "weight" or module.rpartition(".")[2] not in modules:
            continue
        rows, columns = shape
        r = (ranks or {}).get(module, document["r"])
        if "embed" in module.rpartition(".")[2] and "out" not in module:
            tensors[f"{prefix}{module}.lora_embedding_A"] = drawn(r, rows)
            tensors[f"{prefix}{module}.lora_embedding_B"] = drawn(columns, r)
            continue
        tensors[f"{prefix}{module}.lora_A.weight"] = drawn(r, columns)
        tensors[f"{prefix}{module}.lora_B.weight"] = drawn(rows, r)
        if document["use_dora"]:
            tensors[f"{prefix}{module}.lora_magnitude_vector"] = drawn(rows).abs() + 0.5
        if document["lora_bias"]:
            tensors[f"{prefix}{module}.lora_B.bias"] = drawn(rows)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **{prefix + name: value for name, value in (more or {}).items()}}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(document, indent=2, sort_keys=True))
    return folder


def scale_of(config: Mapping[str, Any]) -> float:
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]))
