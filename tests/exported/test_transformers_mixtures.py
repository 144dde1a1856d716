"""FFN mixtures in public layouts, loaded by transformers' own classes: no key missing or unexpected, and the dense function kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SOURCES, stand_in, write_recipe, write_sources
from test_exported import assert_same_tensors

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.architectures.tables import load_architecture
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.model.loading import open_model
from bam_merge.verifying.config import meaning

transformers = pytest.importorskip("transformers")

CASES = {
    "llama in mixtral": ("llama", "mixtral", "ffn: {top_k: 2}"),
    "llama tied in mixtral": ("llama_tied", "mixtral", "ffn: {top_k: 3}"),
    "mistral in mixtral": ("mistral", "mixtral", "ffn: {top_k: 1}"),
    "phi3 in mixtral": ("phi3", "mixtral", "ffn: {top_k: 2}"),
    "qwen2 in qwen2_moe": ("qwen2", "qwen2_moe", "ffn: {top_k: 2}"),
    "llama in qwen2_moe": ("llama", "qwen2_moe", "ffn: {top_k: 2}"),
    "llama tied in qwen2_moe": ("llama_tied", "qwen2_moe", "ffn: {top_k: 3}"),
    "mistral in qwen2_moe": ("mistral", "qwen2_moe", "ffn: {top_k: 1}"),
    "phi3 in qwen2_moe": ("phi3", "qwen2_moe", "ffn: {top_k: 2}"),
    "qwen3 in qwen3_moe": ("qwen3", "qwen3_moe", "ffn: {top_k: 2}"),
    "qwen3 biased in qwen3_moe": ("qwen3_biased", "qwen3_moe", "ffn: {top_k: 2}"),
    "qwen3_5 in qwen3_5_moe": ("qwen3_5_text", "qwen3_5_moe", "ffn: {top_k: 2}"),
    "qwen3_5 biased and tied in qwen3_5_moe": ("qwen3_5_text_biased", "qwen3_5_moe", "ffn: {top_k: 3}"),
    "granite in granitemoe": ("granite", "granitemoe", "ffn: {top_k: 2}"),
    "llama in granitemoe": ("llama", "granitemoe", "ffn: {top_k: 3}"),
    "ernie4_5 in granitemoe": ("ernie4_5", "granitemoe", "ffn: {top_k: 1}"),
    "ernie4_5 in ernie4_5_moe": ("ernie4_5", "ernie4_5_moe", "ffn: {top_k: 2}"),
    "llama in ernie4_5_moe": ("llama", "ernie4_5_moe", "ffn: {top_k: 3}"),
    "phi3 in ernie4_5_moe": ("phi3", "ernie4_5_moe", "ffn: {top_k: 1}"),
    "granite in granitemoehybrid_moe": ("granite", "granitemoehybrid_moe", "ffn: {top_k: 2}"),
    "granitemoehybrid in granitemoehybrid_moe": ("granitemoehybrid", "granitemoehybrid_moe", "ffn: {top_k: 3}"),
    "layers that do not rotate in granitemoehybrid_moe": ("granitemoehybrid_nope", "granitemoehybrid_moe", "ffn: {top_k: 2}"),
    "helium in mixtral": ("helium", "mixtral", "ffn: {top_k: 2}"),
    "qwen3 in mellum": ("qwen3", "mellum", "ffn: {top_k: 2}"),
    "qwen3 with windows in mellum": ("qwen3 with windows", "mellum", "ffn: {top_k: 2}"),
    "seed_oss in qwen2_moe": ("seed_oss", "qwen2_moe", "ffn: {top_k: 2}"),
    "ministral with windows in qwen2_moe": ("ministral_sliding", "qwen2_moe", "ffn: {top_k: 2}"),
    "llama in solar_open": ("llama", "solar_open", "ffn: {top_k: 2, gate: topk_then_sigmoid}"),
    "llama tied in glm4_moe": ("llama_tied", "glm4_moe", "ffn: {top_k: 3, gate: topk_then_sigmoid}"),
    "qwen2 in glm4_moe": ("qwen2", "glm4_moe", "ffn: {top_k: 2, gate: topk_then_sigmoid}"),
    "qwen3 in glm4_moe": ("qwen3", "glm4_moe", "ffn: {top_k: 1, gate: topk_then_sigmoid}"),
    "qwen3 in dots1": ("qwen3", "dots1", "ffn: {top_k: 2, gate: topk_then_sigmoid}"),
    "qwen3 biased in dots1": ("qwen3_biased", "dots1", "ffn: {top_k: 2, gate: topk_then_sigmoid}"),
    "olmo2 in flex_olmo": ("olmo2", "flex_olmo", "ffn: {top_k: 2}"),
    "olmo3, all layers full, in flex_olmo": ("olmo3, all layers full", "flex_olmo", "ffn: {top_k: 2}"),
    "cohere2 in cohere2_moe": ("cohere2", "cohere2_moe", "ffn: {top_k: 2}"),
    "cohere2 in cohere2_moe, sigmoids": ("cohere2_biased", "cohere2_moe", "ffn: {top_k: 2, gate: topk_then_sigmoid}"),
    "hunyuan_v1_dense in hunyuan_v1_moe": ("hunyuan_v1_dense", "hunyuan_v1_moe", "ffn: {top_k: 2}"),
    "gemma4 in gemma4": ("gemma4_text", "gemma4", "ffn: {top_k: 2}"),
    "gemma4, values are keys, in gemma4": ("gemma4_text_keys", "gemma4", "ffn: {top_k: 3}"),
    "gemma4 unified in gemma4": ("gemma4_unified_text", "gemma4", "ffn: {top_k: 1, gate: topk_then_softmax}"),
}
FULL = {"olmo3, all layers full": {**CONFIGS["olmo3"], "layer_types": ["full_attention"] * 2}}
WINDOWS = {**CONFIGS["qwen3"], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
FAMILIES = {**CONFIGS, **FULL, "qwen3 with windows": WINDOWS}


def load(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model: Any, length: int = 24) -> torch.Tensor:
    ids = torch.arange(3, 3 + 2 * length).view(2, length) % 64
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", CASES)
def test_copies_of_one_model_compute_what_it_computes(name: str, tmp_path: Path) -> None:
    """Renormalised gates sum to one: N equal FFN experts are the dense FFN, whatever the router."""
    family, layout, ffn = CASES[name]
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = {**FAMILIES[family], "rope_parameters": {"full_attention": rope} if family in FULL else rope}
    config |= {"logit_scale": 0.5} if "cohere" in family else {}
    config.pop("rope_scaling", None)
    config = config if layout != "gemma4" else CONFIGS[family]  # which has two sets
    write_checkpoint(tmp_path / "seed", config, random_values(3, 0.2))
    text = f"experts: [seed, seed, seed]\n{ffn}\nrouter: {{init: normal, std: 0.5}}"
    recipe = write_recipe(tmp_path, text, "sparse_upcycling", ("seed",), f"{{path: out, layout: {layout}}}")
    mixture = load(merge(load_recipe(recipe), options=MergeOptions(verify=False)))
    assert mixture.config.model_type in load_architecture(layout).model_types
    dense = load(tmp_path / "seed")
    assert float((logits(mixture) - logits(dense)).abs().max()) < 1e-5
    assert float(logits(dense).std()) > 0.1  # a function worth comparing


@pytest.mark.parametrize("name", CASES)
def test_btx_uses_each_expert(name: str, tmp_path: Path) -> None:
    """With different experts, forcing the router to expert e and taking the shared tensors from model e gives model e."""
    family, layout, ffn = CASES[name]
    write_sources(tmp_path, FAMILIES[family]) if layout != "gemma4" else write_large(tmp_path, FAMILIES[family])
    gate = ", gate: topk_then_sigmoid" if "sigmoid" in ffn else ""
    for expert, source in enumerate(("seed", "code", "law")):
        text = f"ffn: {{top_k: 1{gate}}}\nshared: {{make: copy, from: {source}}}\nrouter: {{init: zeros}}"
        recipe = write_recipe(tmp_path, text, "btx", output=f"{{path: out{expert}, layout: {layout}}}")
        mixture = load(merge(load_recipe(recipe), options=MergeOptions(verify=False)))
        with torch.no_grad():  # every token to `expert`, for hidden states of either sign: the last expert that a tie leaves
            for layer in mixture.model.layers:
                rotate_experts(experts_of(layer), expert)
        assert float((logits(mixture) - logits(load(tmp_path / source))).abs().max()) < 1e-5


def write_large(folder: Path, config: dict[str, Any]) -> None:
    """Sources whose FFNs give enough for a second norm to be the first: what is beside the epsilon of a norm is another function."""
    for seed, source in enumerate(SOURCES):
        write_checkpoint(folder / source, config, random_values(seed, 0.3))


def experts_of(layer: Any) -> Any:
    return next(module for name, module in layer.named_modules() if f".{name}".endswith(".experts"))


@pytest.mark.parametrize("name", CASES)
def test_saving_gives_the_same_tensors_back(name: str, tmp_path: Path) -> None:
    """Under the same names, byte for byte; and what was saved is the same model, for transformers and for the reference model."""
    family, layout, ffn = CASES[name]
    write_sources(tmp_path, FAMILIES[family])
    recipe = write_recipe(tmp_path, f"{ffn}\nrouter: {{init: normal, std: 0.5}}", "btx", output=f"{{path: out, layout: {layout}}}")
    folder = merge(load_recipe(recipe), options=MergeOptions(verify=False))
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    if name not in (
        "mistral in qwen2_moe",
        "ministral with windows in qwen2_moe",
    ):  # beside whose layer_types its class saves a number of layers that says otherwise
        assert meaning(open_model(tmp_path / "saved").config) == meaning(open_model(folder).config)


def rotate_experts(experts: Any, chosen: int) -> None:
    """Put expert `chosen` in every place: with zero routers top-1 then takes it, whichever place a tie picks."""
    for parameter in experts.parameters():
        parameter.copy_(parameter[chosen].expand_as(parameter))


def test_qwen2_moe_keeps_gates_that_are_not_renormalised(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["qwen2"])
    recipe = write_recipe(tmp_path, "ffn: {top_k: 1, gate: softmax_then_topk}", "btx", output="{path: out, layout: qwen2_moe}")
    folder = merge(load_recipe(recipe), options=MergeOptions(verify=False))
    config = json.loads((folder / "config.json").read_text())
    assert config["norm_topk_prob"] is False
    assert load(folder).config.norm_topk_prob is False


def test_zero_shared_expert_adds_nothing(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["qwen2"])
    model = load(
        merge(load_recipe(write_recipe(tmp_path, "", "btx", output="{path: out, layout: qwen2_moe}")), options=MergeOptions(verify=False))
    )
    for layer in model.model.layers:
        assert not any(parameter.any() for parameter in layer.mlp.shared_expert.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_soup_loads_as_its_family(name: str, tmp_path: Path) -> None:
    """The uniform average of copies of one model is that model; the class and every key are the family's."""
    write_checkpoint(tmp_path / "a", CONFIGS[name], random_values(3, 0.2))
    write_checkpoint(tmp_path / "b", CONFIGS[name], random_values(3, 0.2))
    soup = merge(load_recipe(write_recipe(tmp_path, "", "merge", ("a", "b"))), options=MergeOptions(verify=False))
    assert torch.equal(logits(load(stand_in(soup))), logits(load(stand_in(tmp_path / "a"))))


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
])  # fmt: skip
@pytest.mark.parametrize("old_spelling", [False, True])
def test_rotary_scaling_reaches_the_mixture(tmp_path: Path, rope: dict[str, Any], old_spelling: bool) -> None:
    spelled = {"rope_parameters": rope}
    if old_spelling:
        spelled = {"rope_theta": 1e4, "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    write_checkpoint(tmp_path / "seed", {**CONFIGS["llama"], **spelled}, random_values(3, 0.2))
    recipe = write_recipe(tmp_path, "experts: [seed, seed]", "sparse_upcycling", ("seed",), "{path: out, layout: mixtral}")
    mixture = load(merge(load_recipe(recipe), options=MergeOptions(verify=False)))
    assert float((logits(mixture) - logits(load(tmp_path / "seed"))).abs().max()) < 1e-5
