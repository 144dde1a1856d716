"""Adapters against PEFT itself: what a merge gives is PEFT's merge_and_unload, within one rounding. `make test-ecosystem`.

PEFT merges in float64 here, so that its own roundings are none of the difference.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_sources
from safetensors.torch import load_file

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.verifying.rounding import half_ulp

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default")]

QV = {"target_modules": ["q_proj", "v_proj"]}
ENDS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", QV),
    "rslora": ("llama", {**QV, "use_rslora": True}),
    "dora": ("llama", {**QV, "use_dora": True}),
    "dora_rslora_phi3": ("phi3", {"target_modules": ["qkv_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "all_linear_biased": ("llama_biased", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "regex": ("llama", {"target_modules": r".*layers\.1\.(self_attn\.(q|o)_proj|mlp\.up_proj)"}),
    "full_names": ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.gate_proj"]}),
    "exclude_regex": ("llama", {**QV, "exclude_modules": r".*\.0\..*q_proj"}),
    "ranks": ("llama", {**QV, "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 7}, "alpha_pattern": {r"0\.self_attn\.v_proj": 5}}),
    "ranks_rslora": ("llama", {**QV, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 9}, "use_rslora": True}),
    "layers": ("llama", {**QV, "layers_to_transform": [1]}),
    "one_layer": ("llama", {**QV, "layers_to_transform": 0, "layers_pattern": "layers"}),
    "fan_in_fan_out": ("llama", {**QV, "fan_in_fan_out": True}),
    "bias_all": ("llama_biased", {**QV, "bias": "all"}),
    "bias_lora_only": ("llama_biased", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "bias_of_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense"], "bias": "all"}),
    "lora_bias": ("llama_biased", {**QV, "lora_bias": True}),
    "norms_saved": ("llama", {**QV, "modules_to_save": ["input_layernorm", "norm"]}),
    "mlp_saved": ("llama_biased", {**QV, "modules_to_save": ["mlp"]}),
    "head_saved": ("llama", {**QV, "modules_to_save": ["lm_head"]}),
    "head_saved_tied": ("llama_tied", {**QV, "modules_to_save": ["lm_head"]}),
    "embeddings_saved": ("llama", {**QV, "modules_to_save": ["embed_tokens"]}),
    "embeddings_saved_tied": ("llama_tied", {**QV, "modules_to_save": ["embed_tokens"]}),
    "both_saved_tied": ("llama_tied", {**QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embeddings_beside": ("llama", {**QV, "embeddings": True}),
    "embeddings_beside_tied": ("llama_tied", {**QV, "embeddings": True}),
    "ends": ("llama", ENDS),
    "ends_tied": ("llama_tied", ENDS),
    "embeddings_tied": ("llama_tied", {"target_modules": ["embed_tokens"]}),
    "head_tied": ("llama_tied", {"target_modules": ["lm_head"], "use_dora": True}),
    "head_and_saved_embeddings_tied": ("llama_tied", {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}),
    "tokens": ("llama", {**QV, "trainable_token_indices": [7, 3]}),
    "tokens_tied": ("llama_tied", {**QV, "trainable_token_indices": {"embed_tokens": [1, 5]}}),
    "tokens_of_both": ("llama_biased", {**QV, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [1]}}),
    "gaussian": ("qwen2", {**QV, "init_lora_weights": "gaussian"}),
    "orthogonal": ("qwen2", {**QV, "init_lora_weights": "orthogonal"}),
    "mica": ("qwen2", {**QV, "init_lora_weights": "mica"}),
    "velora": ("qwen2", {**QV, "velora_config": {}}),
    "fused_phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "fused_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense_4h_to_h", "lm_head"]}),
    "cohere": ("cohere", {"target_modules": "all-linear", "use_rslora": True}),
    "qwen3": ("qwen3_biased", {"target_modules": "all-linear", "bias": "all"}),
    "mistral": ("mistral", {"target_modules": ["gate_proj", "embed_tokens"]}),
}  # fmt: skip
"""Family, and what LoraConfig is given."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(key, "1")
    torch.manual_seed(0)


def train(base: Path, out: Path, scale: float = 0.1, embeddings: bool | str = "auto", **config: Any) -> Path:
    """An adapter on `base` as PEFT saves it, with something in every trainable number."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(out, save_embedding_layers=embeddings)
    return out


def merged_by_peft(base: Path, adapters: dict[Path, float]) -> dict[str, torch.Tensor]:
    """The weights that merge_and_unload gives, in float64; a head that is tied to the embeddings left out."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [f"a{index}" for index in range(len(adapters))]
    for name, path in zip(names, adapters, strict=True):
        if name == "a0":
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    model = model.to(torch.float64)
    if len(adapters) > 1:
        model.add_weighted_adapter(names, list(adapters.values()), "all", combination_type="cat")
        model.set_adapter("all")
    model = model.merge_and_unload()
    weights = dict(model.state_dict())
    head = model.get_output_embeddings().weight
    if head.data_ptr() == model.get_input_embeddings().weight.data_ptr():
        weights = {name: value for name, value in weights.items() if name not in ("lm_head.weight", "embed_out.weight")}
    return weights


def merged_here(folder: Path, source: str, dtype: str) -> dict[str, torch.Tensor]:
    path = folder / f"{dtype}.yaml"
    path.write_text(
        f"method: merge\nsources: {{code: {source}}}\nshared: {{make: copy, from: code}}\noutput: {{path: out-{dtype}, dtype: {dtype}}}\n"
    )
    return load_file(merge(load_recipe(path), options=MergeOptions()) / "model.safetensors")  # verified before it appears


def assert_one_rounding(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: str) -> None:
    expected = {"embed_out.weight" if name == "lm_head.weight" and "embed_out.weight" in found else name: v for name, v in expected.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        allowed = half_ulp(value, dtype) * (1 + 1e-6) + value.abs() * (2.0**-24 if dtype != "F32" else 0)
        off = (found[name].double() - value).abs() - allowed
        assert float(off.max()) <= 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_peft(tmp_path: Path, variant: str) -> None:
    family, config = VARIANTS[variant]
    write_sources(tmp_path, CONFIGS[family], ("seed",))
    train(tmp_path / "seed", tmp_path / "adapter", **config)
    expected = merged_by_peft(tmp_path / "seed", {tmp_path / "adapter": 1.0})
    assert_one_rounding(merged_here(tmp_path, "{base: seed, adapter: adapter}", "float32"), expected, "F32")
    assert_one_rounding(merged_here(tmp_path, "{base: seed, adapter: adapter}", "bfloat16"), expected, "BF16")


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora", "head_saved", "ends_tied", "bias_all"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_equal_to_peft_on_16_bits(tmp_path: Path, variant: str, dtype: str) -> None:
    """The base and the adapter stored in 16 bits, as they mostly are: the sum in float32, rounded once."""
    family, config = VARIANTS[variant]
    write_sources(tmp_path, CONFIGS[family], ("seed",), dtype)
    train(tmp_path / "seed", tmp_path / "adapter", **config)
    expected = merged_by_peft(tmp_path / "seed", {tmp_path / "adapter": 1.0})
    assert_one_rounding(merged_here(tmp_path, "{base: seed, adapter: adapter}", "source"), expected, dtype)


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    """PEFT's add_weighted_adapter, of ranks that differ."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed",))
    train(tmp_path / "seed", tmp_path / "a", **QV)
    train(tmp_path / "seed", tmp_path / "b", r=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    expected = merged_by_peft(tmp_path / "seed", {tmp_path / "a": 0.7, tmp_path / "b": 1.5})
    found = merged_here(tmp_path, "{base: seed, adapter: [{path: a, weight: 0.7}, {path: b, weight: 1.5}]}", "float32")
    assert_one_rounding(found, expected, "F32")


def test_every_key_of_peft_is_known() -> None:
    """LoraConfig has no key that adapter_config.json's reading does not know."""
    from peft import LoraConfig

    from bam_merge.sources.adapters.config import HARMLESS, KINDS, REFUSED

    keys = json.loads(json.dumps(LoraConfig(target_modules=["q_proj"]).to_dict(), default=list)).keys()
    assert keys <= {*KINDS, *HARMLESS, *REFUSED, "peft_type", "init_lora_weights"}


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_inits_that_change_the_base(tmp_path: Path, init: str) -> None:
    """Refused as they are; PEFT's conversion makes a plain adapter of them, which is merged."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from bam_merge.errors import CheckpointError

    write_sources(tmp_path, CONFIGS["llama"], ("seed",))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "seed"), LoraConfig(r=4, init_lora_weights=init, **QV))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"init_lora_weights is .* changed the base's weights"):
        merged_here(tmp_path, "{base: seed, adapter: adapter}", "float32")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "initial")
    found = merged_here(tmp_path, "{base: seed, adapter: adapter}", "float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "seed", dtype=torch.float64)
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").to(torch.float64).merge_and_unload().state_dict()
    assert_one_rounding(found, dict(expected), "F32")
