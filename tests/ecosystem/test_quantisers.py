"""Quantised mixtures: what quantisers make of the exported model computes about the same, and comes back from a file to the bit.

`make test-ecosystem`; each test skips where its package is not installed. FFN experts are no linear layers, so that bitsandbytes, quanto and
torchao leave them as they are, as they do in other mixtures; llm-compressor takes them apart and quantises them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file
from test_model import build, ids

from bam_merge.demo.synthetic import random_values, write_checkpoint

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default")]

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
"""Four bits are packed in blocks of 64."""
SOFT = "ffn: {top_k: 3, gate: topk_then_softmax}"
"""All experts, so that rounding sends no token elsewhere."""
KINDS = {
    "Expert-KV": ("llama", "bam", SOFT),
    "Shared-KV": ("qwen3", "bam", f"attention: {{kv: shared}}\n{SOFT}"),
    "biases": ("qwen2", "bam", SOFT),
    "BTX": ("llama", "btx", SOFT),
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, method, text = KINDS[request.param]
    for seed, name in enumerate(("seed", "code", "law")):
        config = {**CONFIGS[family], **WIDE, **({"head_dim": 32} if family == "qwen3" else {})}
        write_checkpoint(tmp_path / name, config, random_values(seed, 0.07))
    return build(tmp_path, text, method)


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids()).logits.float()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
QUANTISERS: dict[str, tuple[Callable[[], Any], float]] = {
    "bitsandbytes int8": (lambda: bitsandbytes(load_in_8bit=True), 0.2),
    "bitsandbytes nf4": (lambda: bitsandbytes(**FOUR_BITS), 0.5),
    "torchao int8": (torchao, 0.2),
}
"""How transformers is asked for it, and how far logits may be from those of the model as it was, relative to their norm."""


@pytest.mark.parametrize("name", QUANTISERS)
def test_what_is_quantised_is_saved_and_loaded_again(name: str, folder: Path, tmp_path: Path) -> None:
    config, bound = QUANTISERS[name]
    expected = logits(load(folder, dtype=torch.float32))
    model = load(folder, quantization_config=config(), dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.float32
    model.save_pretrained(
        tmp_path / "saved"
    )  # before it computes: bitsandbytes packs four bits otherwise then, on some processors for good
    found = logits(model)
    assert 0 < apart(found, expected) < bound
    assert torch.equal(logits(load(tmp_path / "saved")), found)
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert not [text for text in names if ".self_attn.experts.0." in text]
    assert any(".self_attn.experts.q_proj." in text for text in names) == (model.config.num_attention_experts > 0)


def test_a_model_that_is_not_quantised_is_saved_by_expert(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_quanto_by_transformers_loads_and_says_that_it_does_not_save(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    expected = logits(load(folder, dtype=torch.float32))
    model = load(folder, quantization_config=QuantoConfig(weights="int8"), dtype=torch.float32)
    assert 0 < apart(logits(model), expected) < 0.2
    with pytest.raises(ValueError, match="quantized with quanto and is not serializable"):
        model.save_pretrained(tmp_path / "saved")


def test_quanto_saves_and_loads(folder: Path, tmp_path: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    model = quanto.QuantizedModelForCausalLM.quantize(load(folder, dtype=torch.float32), weights=quanto.qint8, exclude="lm_head")
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    with init_empty_weights():
        again = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    map_ = json.loads((tmp_path / "saved" / "quanto_qmap.json").read_text())
    quanto.requantize(again, load_file(tmp_path / "saved" / "model.safetensors"), map_)
    assert torch.equal(logits(again.eval()), expected)


def test_llm_compressor_saves_and_loads(folder: Path, tmp_path: Path) -> None:
    """All linear layers in eight bits, FFN experts too; transformers makes numbers of the latter again while it loads."""
    llmcompressor = pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.quantization import QuantizationModifier

    tokenizer(folder)
    model = load(folder, dtype=torch.float32)
    before = logits(model)
    recipe = QuantizationModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"])
    llmcompressor.oneshot(model=model, recipe=recipe, trust_remote_code_model=True)
    expected = logits(model)
    assert 0 < apart(expected, before) < 0.2
    model.save_pretrained(tmp_path / "saved", save_compressed=True)
    assert "model.layers.0.mlp.experts.2.up_proj.weight_packed" in load_file(tmp_path / "saved" / "model.safetensors")
    assert apart(logits(load(tmp_path / "saved")), expected) < 1e-6


def tokenizer(folder: Path) -> None:
    """llm-compressor looks for one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, 64)}}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>"))).save_pretrained(folder)


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "quantise.md"


@pytest.mark.parametrize("package", ["bitsandbytes", "optimum.quanto", "llmcompressor"])
def test_what_the_page_shows_runs(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    (code,) = [text for text in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL) if _uses(text, package)]
    for seed, name in enumerate(("seed", "code", "law")):
        write_checkpoint(tmp_path / name, {**CONFIGS["llama"], **WIDE}, random_values(seed, 0.07))
    tokenizer(build(tmp_path, SOFT).rename(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {})
    assert (tmp_path / "quantised" / "model.safetensors").stat().st_size < 0.9 * (tmp_path / "out" / "model.safetensors").stat().st_size


def _uses(text: str, package: str) -> bool:
    return {"bitsandbytes": "BitsAndBytesConfig"}.get(package, package) in text
