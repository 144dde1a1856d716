"""Any checkpoint by role: every family, layout and public mixture, whole, damaged, without a config.json, and unknown."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, CONFIGS, GROUPED, write_recipe, write_sources
from safetensors.numpy import load_file, save_file

from bam_merge import MergeOptions, load_recipe, merge
from bam_merge.architectures.anatomy import anatomy, guess, open_anatomy
from bam_merge.architectures.table_files import FOLDERS, table_names
from bam_merge.architectures.tables import architecture_names, architectures, find_by_model_type, load_architecture
from bam_merge.checkpoints.pieces import Joined, Read
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import BamMergeError
from bam_merge.expressions import Concat
from bam_merge.sources.dense import read_dense

MOE = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 5, "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
PUBLIC: dict[str, dict[str, Any]] = {
    "mixtral": {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {**GROUPED, **MOE, "num_experts": 3, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**GROUPED, **MOE, "num_experts": 3, "head_dim": 12, "decoder_sparse_step": 2},
    "glm4_moe": {**GROUPED, **MOE, "n_routed_experts": 3, "first_k_dense_replace": 1, "use_qk_norm": True},
    "dots1": {**GROUPED, **MOE, "n_routed_experts": 3, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "solar_open": {**GROUPED, **MOE, "n_routed_experts": 3, "head_dim": 8},
    "flex_olmo": {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "pad_token_id": None},
    "cohere2_moe": {
        **GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"], "num_shared_experts": 1, "tie_word_embeddings": False,
        "prefix_dense_intermediate_size": 16,
    },
    "hunyuan_v1_moe": {**GROUPED, "num_experts": 3, "moe_topk": 2, "head_dim": 8},
    "olmoe": {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v2": {**MOE, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {**MOE, **LATENT, "q_lora_rank": 10, "n_group": 1, "topk_group": 1},
}  # fmt: skip
"""Small public mixtures, with dense layers and shared experts where they have them."""


def save_public(name: str, folder: Path) -> Path:
    """A tiny public mixture as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**BASE, **PUBLIC[name]})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def mixture(folder: Path, family: str, text: str = "", method: str = "bam", layout: str = "bam") -> Path:
    write_sources(folder, CONFIGS[family])
    return merge(
        load_recipe(write_recipe(folder, text, method, output=f"{{path: out, layout: {layout}}}")), options=MergeOptions(verify=False)
    )


def edit(folder: Path, drop: tuple[str, ...] = (), add: dict[str, Any] | None = None, **config: Any) -> Path:
    """Take tensors out of a folder's only file, add some, and change its config.json."""
    path = folder / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if name not in drop}
    save_file({**tensors, **(add or {})}, path)
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    return folder


# ---- whole models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_families_as_merges_read_them(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS[name], random_values(1))
    found = open_anatomy(tmp_path, "x")
    merged = read_dense("x", tmp_path).tensors
    whole = {site: Joined(expr.parts, expr.shape) if isinstance(expr, Concat) else expr for site, expr in merged.items()}
    assert {(role, layer): leaf for (role, layer, expert), leaf in found.leaves.items()} == whole
    assert set(found.places) == set(found.checkpoint.tensors)
    assert (found.unknown, found.missing, found.findings, dict(found.dropped)) == ((), (), (), {})


WAYS = {
    "expert kv": ("bam", "", "bam"), "shared kv": ("bam", "attention: {kv: shared}", "bam"), "btx": ("btx", "", "bam"),
    "mixed": ("bam", "rules: [{roles: [attn.k, attn.v], layers: 1, make: mean}]", "bam"), "mixtral": ("btx", "", "mixtral"),
    "qwen2_moe": ("btx", "", "qwen2_moe"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_mixtures_made_here(way: str, tmp_path: Path) -> None:
    method, text, layout = WAYS[way]
    found = open_anatomy(mixture(tmp_path, "llama", text, method, layout))
    assert (found.unknown, found.missing, found.findings, found.guessed) == ((), (), (), False)
    experts = {expert for role, _, expert in found.leaves if role == "ffn.up"}
    assert experts == {0, 1, 2}
    k = {(layer, expert) for role, layer, expert in found.leaves if role == "attn.k"}
    split = {"expert kv": {0, 1}, "mixed": {0}}.get(way, set())
    assert k == {(layer, expert) for layer in (0, 1) for expert in ((0, 1, 2) if layer in split else (None,))}
    assert found.facts["num_attention_heads"] == 4


@pytest.mark.parametrize("name", PUBLIC)
def test_public_mixtures(name: str, tmp_path: Path) -> None:
    found = open_anatomy(save_public(name, tmp_path))
    assert (found.unknown, found.missing, found.findings) == ((), (), ())
    assert set(found.places) == set(found.checkpoint.tensors)
    assert found.facts["num_experts"] == (4 if name.startswith("deepseek") else 3)
    dense = {layer for role, layer, expert in found.leaves if role == "ffn.up" and expert is None}
    assert dense == (set() if name in ("mixtral", "olmoe", "solar_open", "flex_olmo", "hunyuan_v1_moe") else {0})
    expected = {"deepseek_v2": "attn.kv_b", "deepseek_v3": "attn.q_a_norm", "qwen2_moe": "ffn.shared.router"}
    expected |= dict.fromkeys(("glm4_moe", "dots1", "solar_open"), "router.ffn.bias")
    expected |= dict.fromkeys(("cohere2_moe", "hunyuan_v1_moe"), "ffn.shared.down")
    assert (expected.get(name, "attn.q"), 1, None) in found.leaves


def test_a_table_lies_in_the_folder_of_its_kind() -> None:
    """By which it is found, unread."""
    assert {kind: [name for name in table_names(kind) if load_architecture(name).kind != kind] for kind in FOLDERS} == {
        k: [] for k in FOLDERS
    }
    assert sorted(name for kind in FOLDERS for name in table_names(kind)) == list(table_names())


def test_foreign_tables_are_for_looking_only(tmp_path: Path, run: Any) -> None:
    foreign = {table.name for table in architectures()} - set(architecture_names())
    assert foreign == {"olmoe", "deepseek"}
    write_sources(tmp_path, CONFIGS["llama"])
    result = run("plan", write_recipe(tmp_path, output="{path: out, layout: olmoe}"))
    assert result.status == 2
    assert "output.layout: 'olmoe' is no layout" in result.err
    from bam_merge.model.config import model_config

    with pytest.raises(BamMergeError, match="model_type 'olmoe' is not known here") as error:
        model_config({"model_type": "olmoe"})
    assert "deepseek" not in str(error.value)


@pytest.mark.parametrize("table", architectures(), ids=lambda table: table.name)
def test_no_two_rows_share_a_name(table: Any) -> None:
    names = [name for row in (*table.rows, *table.others) for name in row.names]
    assert len(names) == len(set(names))
    assert all(name.find("{layer}") < name.find("{expert}") for name in names if "{expert}" in name)
    same = [other for other in architectures() if other.told_by and not {*other.model_types}.isdisjoint(table.model_types)]
    config = {other.told_by: 2 if other is table else 0 for other in same}
    assert find_by_model_type(table.model_types[0], config) is load_architecture(table.name)


# ---- damaged, incomplete, unknown ----------------------------------------------------------------------------------------------


def test_what_a_dense_model_lacks_and_has_in_vain(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["phi3"], random_values(1))
    values = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.self_attn.o_proj.weight"
    extra = {
        "model.layers.2.mlp.down_proj.weight": values[lost],
        "scratch": values[lost],
        "model.layers.01.mlp.down_proj.weight": values[lost],
    }
    found = open_anatomy(edit(tmp_path, (lost,), extra, num_key_value_heads=4))
    assert found.missing == (lost,)
    assert set(found.unknown) == {"scratch", "model.layers.01.mlp.down_proj.weight"}
    assert ("attn.q+attn.k+attn.v", 0, None) in found.leaves
    text = "\n".join(found.findings)
    assert "qkv_proj.weight is [64, 32], config.json implies [96, 32]" in text
    assert f"{lost} missing: 1 tensor(s)" in text
    assert "model.layers.2.mlp.down_proj.weight of layers beyond the 2 of config.json: 1 tensor(s)" in text


@pytest.mark.parametrize("odd", ["model.layers.#.mlp.down_proj.weight", "model.layers.{layer}.mlp.down_proj.weight"])
def test_a_name_that_looks_like_a_template_is_a_name(odd: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"], random_values(1))
    value = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    found = open_anatomy(edit(tmp_path, add={odd: value}))
    assert (found.unknown, found.missing) == ((odd,), ())
    assert open_anatomy(tmp_path / "model.safetensors").unknown == (odd,)  # without a config.json


@pytest.mark.parametrize("drop", [
    ("model.layers.1.mlp.experts.2.up_proj.weight",),
    ("model.layers.0.self_attn.experts.1.k_proj.weight", "model.norm.weight"),
    ("model.layers.1.self_attn.router.weight", "lm_head.weight"),
    tuple(f"model.layers.{layer}.mlp.router.weight" for layer in (0, 1)),
])  # fmt: skip
def test_what_a_mixture_lacks(drop: tuple[str, ...], tmp_path: Path) -> None:
    assert set(open_anatomy(edit(mixture(tmp_path, "llama"), drop)).missing) == set(drop)


def test_a_layer_that_is_gone(tmp_path: Path) -> None:
    folder = save_public("qwen2_moe", tmp_path)
    gone = tuple(name for name in load_file(folder / "model.safetensors") if name.startswith("model.layers.1."))
    missing = open_anatomy(edit(folder, gone)).missing
    weights = {name for name in gone if "layernorm" not in name and ".bias" not in name and "shared" not in name}
    assert weights <= set(missing) <= set(gone)


def test_an_unusable_config_leaves_the_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["phi3"], random_values(1))
    found = open_anatomy(edit(tmp_path, hidden_size="large"))
    assert found.facts == {}
    assert any("hidden_size must be a positive integer, found 'large'" in text for text in found.findings)
    assert ("ffn.gate+ffn.up", 1, None) in found.leaves
    assert found.unknown == ()


@pytest.mark.parametrize("model_type", ["mamba", None, 7, ["llama"]])
def test_an_unknown_model_type(model_type: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"], random_values(1))
    found = open_anatomy(edit(tmp_path, model_type=model_type))
    assert (found.architecture, dict(found.leaves)) == (None, {})
    assert set(found.unknown) == set(found.checkpoint.tensors)
    assert "is in no table" in found.findings[0]


def test_scales_of_quantised_weights_have_roles(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"], random_values(1))
    values = load_file(tmp_path / "model.safetensors")
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    found = open_anatomy(edit(tmp_path, add={scale: values["model.norm.weight"]}))
    assert found.places[scale] == ("ffn.up.scale", 0, None)
    assert found.findings == ()


# ---- one file ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "gpt_neox", "phi3", "cohere"])
def test_a_file_alone_is_recognised_by_its_names(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS[name], random_values(1))
    found = open_anatomy(tmp_path / "model.safetensors")
    assert found.guessed
    assert found.architecture is not None
    assert (found.unknown, found.missing) == ((), ())
    if name in ("gpt_neox", "phi3"):
        assert found.architecture.name == name
        assert any(role == "attn.q+attn.k+attn.v" and isinstance(leaf, Read) for (role, _, _), leaf in found.leaves.items())


def test_a_mixture_alone_and_names_of_no_table(tmp_path: Path) -> None:
    found = open_anatomy(mixture(tmp_path, "llama") / "model.safetensors")
    assert found.architecture is not None
    assert found.architecture.name == "bam"
    assert guess({"a": 1, "b.3.c": 2}) is None
    assert anatomy(found.checkpoint).places == found.places
