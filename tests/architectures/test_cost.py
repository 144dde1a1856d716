"""Parameters, cache and FLOPs: the paper's golden numbers, and every family's mixtures against the plans that make them."""

from pathlib import Path

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from test_plan import FOUR, PAPER
from test_roles import edit, mixture, save_public

from bam_merge.architectures.anatomy import open_anatomy
from bam_merge.architectures.cost import Cost, Kind, as_mixture, cost_of
from bam_merge.architectures.flops import Flops
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.errors import CheckpointError
from bam_merge.planning.card import model_card
from bam_merge.planning.make import plan_file

METHODS: dict[Kind, tuple[str, str]] = {
    "expert_kv": ("bam", ""),
    "shared_kv": ("bam", "attention: {kv: shared}"),
    "btx": ("btx", "ffn: {top_k: 1}"),
}


def cost_at(path: Path) -> Cost:
    return cost_of(open_anatomy(path))


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the paper's 590M shapes, their data holes in the files."""
    folder = tmp_path_factory.mktemp("paper")
    for name in FOUR:
        write_checkpoint(folder / name, PAPER, lambda name, shape: None, "BF16")
    return folder


# ---- golden numbers (Tables 7, 9 and 10)


@pytest.mark.parametrize(("kind", "total", "active", "cache"), [
    ("expert_kv", 776_002_560, 662_756_352, 4),
    ("shared_kv", 738_253_824, 625_007_616, 1),
    ("btx", 700_480_512, 587_234_304, 1),
])  # fmt: skip
def test_golden_parameters_and_cache(paper: Path, kind: Kind, total: int, active: int, cache: int) -> None:
    dense = cost_at(paper / "seed")
    assert (dense.parameters, dense.active) == (587_209_728, 587_209_728)
    assert dense.kv_cache_bytes_per_token == 6 * 2 * 1024 * 2
    made = as_mixture(dense, 4, kind)
    assert (made.parameters, made.active) == (total, active)
    assert made.kv_cache_bytes_per_token == cache * dense.kv_cache_bytes_per_token
    assert made.nbytes == 2 * total


def test_golden_flops(paper: Path) -> None:
    dense = cost_at(paper / "seed")
    blocks = {
        "dense": dense.flops(), "bam": as_mixture(dense, 4, "expert_kv").flops(), "btx": as_mixture(dense, 4, "btx").flops(),
        "btx6": as_mixture(dense, 6, "btx", 3).flops(), "shared": as_mixture(dense, 4, "shared_kv").flops(),
    }  # fmt: skip
    assert all(found and len(found) == 6 and len(set(found)) == 1 for found in blocks.values())
    first: dict[str, Flops] = {name: found[0] for name, found in blocks.items() if found}
    assert first["bam"] == Flops(25_165_824, 2_097_152, 8_388_608, 12_582_912, 8192, 8192)
    assert (first["bam"].attention, first["bam"].total) == (35_651_584, 48_250_880)
    assert (first["btx"].attention, first["btx"].total) == (8_912_896, 21_504_000)
    assert first["btx6"].total == 46_673_920
    assert first["shared"].qkv == 2 * (4 + 1 + 1) * 1024**2
    assert first["dense"].total == 8_912_896 + 12_582_912


def test_decoding_sees_the_whole_context(paper: Path) -> None:
    dense = cost_at(paper / "seed")
    prefill, decode = dense.flops(512), dense.flops(512, decode=True)
    assert prefill is not None
    assert decode is not None
    assert (prefill[0].scores, decode[0].scores) == (2 * 512 * 1024, 4 * 512 * 1024)
    assert prefill[0].qkv == decode[0].qkv
    document = dense.document(512)["flops_per_token"]
    assert document["head"] == 2 * 256_000 * 1024
    assert document["total"] == 6 * document["per_layer"]["total"] + document["head"]
    assert document["decode"]["attention"] - document["attention"] == 6 * 2 * 512 * 1024


def test_a_window_bounds_what_is_seen(tmp_path: Path) -> None:
    """mistral here slides over 16 of 64: at the end of a prompt 16 positions, on average 16 - 16^2 / 128."""
    dense = cost_at(write_checkpoint(tmp_path, CONFIGS["mistral"], random_values(1)))
    prefill, decode = dense.flops(64), dense.flops(64, decode=True)
    assert prefill is not None
    assert decode is not None
    assert decode[0].scores == 4 * 16 * 32
    assert prefill[0].scores == int(2 * (16 - 16**2 / 128) * 2 * 32)
    assert dense.flops(16) == cost_at(write_checkpoint(tmp_path / "full", CONFIGS["llama"], random_values(1))).flops(16)


# ---- against the plan, for every family


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_as_mixture_is_what_a_merge_makes(name: str, kind: Kind, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[name])
    method, text = METHODS[kind]
    plan = plan_file(write_recipe(tmp_path, text, method))
    normed_after = plan.models["seed"].facts["post_norms"]
    assert plan.recipe.gates[0] == (2 if normed_after and not text.startswith("ffn") else 1)
    made = as_mixture(cost_at(tmp_path / "seed"), 3, kind, plan.recipe.gates[0])
    assert (made.parameters, made.active) == (plan.parameters, plan.active_parameters)
    assert made.kv_cache_bytes_per_token == plan.cost.kv_cache_bytes_per_token


@pytest.mark.parametrize(("dtype", "kv", "row"), [  # 2 layers of 3 experts with 2 heads of 8 each for keys and values
    ("float32", "expert", "768 bytes per token in float32, 3 times a dense model's 256"),
    ("bfloat16", "expert", "384 bytes per token in bfloat16, 3 times a dense model's 128"),
    ("float16", "shared", "128 bytes per token in float16, 1 times a dense model's 128"),
])  # fmt: skip
def test_the_card_says_what_a_token_leaves_in_the_cache(dtype: str, kv: str, row: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    text = f"attention: {{kv: {kv}}}"
    card = model_card(plan_file(write_recipe(tmp_path, text, output=f"{{path: out, dtype: {dtype}}}")))
    assert f"| KV cache | {row} |" in card


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "cohere_qk_norm", "qwen2"])
def test_a_merged_folder_costs_what_was_foretold(name: str, kind: Kind, tmp_path: Path) -> None:
    method, text = METHODS[kind]
    stored = cost_at(mixture(tmp_path, name, text, method))
    made = as_mixture(cost_at(tmp_path / "seed"), 3, kind)
    assert stored.by_role == {role: count for role, count in made.by_role.items() if count}
    assert stored.document() == made.document() | {"parameters": stored.document()["parameters"]}
    assert stored.active == made.active


def test_routing_decides_what_is_active(tmp_path: Path) -> None:
    soft = cost_at(mixture(tmp_path / "a", "llama"))
    top = cost_at(mixture(tmp_path / "b", "llama", "attention: {routing: top_k, top_k: 1}"))
    attention = sum(count for role, count in soft.by_role.items() if role in ("attn.q", "attn.k", "attn.v", "attn.o"))
    assert soft.active is not None
    assert top.active is not None
    assert soft.active - top.active == attention * 2 // 3
    assert top.parameters == soft.parameters
    for cost in (soft, top):
        assert cost.active_by_role is not None and sum(cost.active_by_role.values()) == cost.active
    assert (top.active_by_role or {})["attn.q"] * 3 == soft.by_role["attn.q"] == (soft.active_by_role or {})["attn.q"]


# ---- public mixtures, and what cannot be known


def test_qwen2_moe_with_a_dense_layer_and_a_shared_expert(tmp_path: Path) -> None:
    cost = cost_at(save_public("qwen2_moe", tmp_path))
    blocks = cost.flops()
    assert blocks is not None
    assert (blocks[0].ffn, blocks[0].router) == (2 * 3 * 32 * 40, 0)
    assert (blocks[1].ffn, blocks[1].router) == (2 * 3 * 32 * (2 * 12 + 16) + 2 * 32, 2 * 3 * 32)
    assert isinstance(cost.document()["flops_per_token"]["per_layer"]["total"], int | float)


def test_latent_attention(tmp_path: Path) -> None:
    """DeepSeek caches kv_lora_rank + qk_rope_head_dim values per layer, and scores take 10 per head for keys, 5 for values."""
    cost = cost_at(save_public("deepseek_v3", tmp_path))
    assert cost.kv_cache_bytes_per_token == 2 * (8 + 4) * 4
    blocks = cost.flops(100)
    assert blocks is not None
    assert blocks[0].scores == 100 * 4 * (10 + 5)
    assert blocks[0].qkv == 2 * (10 * 32 + 40 * 10 + 12 * 32 + 44 * 8)


def test_without_a_config_a_mixture_has_no_active_parameters(tmp_path: Path) -> None:
    folder = mixture(tmp_path, "llama")
    whole, alone = cost_at(folder), cost_at(folder / "model.safetensors")
    assert alone.parameters == whole.parameters
    assert (alone.active, alone.flops(), alone.document()["flops_per_token"]) == (None, None, None)
    assert alone.kv_cache_bytes_per_token == whole.kv_cache_bytes_per_token


def test_an_unknown_model_is_counted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["llama"], random_values(1))
    known, unknown = cost_at(tmp_path), cost_at(edit(tmp_path, model_type="mamba"))
    assert unknown.parameters == known.parameters
    assert unknown.by_role == {"unknown": known.parameters}
    assert (unknown.flops(), unknown.kv_cache_bytes_per_token) == (None, None)


def test_what_as_bam_refuses(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a mixture already"):
        as_mixture(cost_at(mixture(tmp_path, "llama")), 4, "btx")
    dense = cost_at(tmp_path / "seed")
    with pytest.raises(CheckpointError, match="--top-k is 3, expected 1 to the number of experts, 2"):
        as_mixture(dense, 2, "btx", 3)
    with pytest.raises(CheckpointError, match="attention and FFN are known by role"):
        as_mixture(cost_at(edit(tmp_path / "seed", model_type="mamba")), 2, "btx")
    with pytest.raises(CheckpointError, match="needs the embeddings"):
        as_mixture(cost_at(edit(tmp_path / "code", ("model.embed_tokens.weight",))), 2, "btx")
