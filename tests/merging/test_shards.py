"""Fine-grained experts (virtual groups, arXiv 2410.07524): at step 0 the shards of an FFN are the FFN. What verification must catch of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import Forger, failed
from safetensors.torch import load_file

from bam_merge import MergeOptions, inspect, load_model, verify
from bam_merge.errors import RecipeError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish

GROUP = "experts: {count: 12, make: virtual_group, shards: 4}"


def grouped(folder: Path, config: dict[str, Any], text: str = GROUP, layout: str = "bam", dtype: str = "F32", **options: Any) -> Path:
    write_sources(folder, config, names=("seed",), dtype=dtype)
    output = f"{{path: out, layout: {layout}}}"
    return publish(plan_file(write_recipe(folder, text, "sparse_upcycling", ("seed",), output)), None, MergeOptions(**options))


IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("family", "layout"), [
    ("llama", "bam"), ("llama_biased", "bam"), ("phi3", "bam"), ("gpt_neox", "bam"), ("starcoder2", "bam"), ("cohere", "bam"),
    ("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("llama", "solar_open"), ("qwen3", "dots1"), ("olmo2", "flex_olmo"),
    ("cohere2", "cohere2_moe"), ("hunyuan_v1_dense", "hunyuan_v1_moe"),
])  # fmt: skip
def test_virtual_groups_compute_the_dense_model(family: str, layout: str, tmp_path: Path) -> None:
    """Whatever the router says: a token gets one copy of each shard. The weights of the last matrix are times the shards, biases are not."""
    text = f"{GROUP}\nffn: {{gate: topk_then_sigmoid}}" if layout in ("solar_open", "dots1") else GROUP
    path = grouped(tmp_path, CONFIGS[family], text, layout, verify="full")
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(IDS), load_model(tmp_path / "seed")(IDS), rtol=1e-4, atol=1e-5)
    (identity,) = [check for check in verify(path).checks if check.name == "identity"]
    assert identity.detail.startswith("the 4 shards of seed under these routers are the dense model exactly")


@pytest.mark.parametrize(("shards", "top_k"), [(2, 2), (2, 4), (5, 5), (5, 10), (8, 16)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_any_number_of_shards_and_of_groups_per_token(shards: int, top_k: int, dtype: str, tmp_path: Path) -> None:
    text = f"experts: {{count: {2 * shards}, make: virtual_group, shards: {shards}}}\nffn: {{top_k: {top_k}}}"
    path = grouped(tmp_path, CONFIGS["llama"], text, dtype=dtype)
    near = 1e-5 if dtype == "F32" or shards & (shards - 1) == 0 else 1e-2  # five times a number of bfloat16 is rounded
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(IDS), load_model(tmp_path / "seed")(IDS), rtol=1e-4, atol=near)


def test_with_gates_that_do_not_sum_to_one_the_ffn_is_scaled_by_their_sum(tmp_path: Path) -> None:
    path = grouped(tmp_path, CONFIGS["llama"], f"{GROUP}\nffn: {{top_k: 4, gate: softmax_then_topk}}")
    (identity,) = [check for check in verify(path).checks if check.name == "identity"]
    assert "its FFN times 0.3" in identity.detail  # a third, of three groups' copies


def test_each_expert_is_its_shard_and_router_groups_are_alike(tmp_path: Path) -> None:
    """Expert e is of shard e // copies, as the paper's figure 3 has it."""
    found, own = load_file(grouped(tmp_path, CONFIGS["llama"]) / "model.safetensors"), load_file(tmp_path / "seed" / "model.safetensors")
    for expert in range(12):
        units = slice(expert // 3 * 10, expert // 3 * 10 + 10)
        name = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(found[f"{name}.up_proj.weight"], own["model.layers.1.mlp.up_proj.weight"][units])
        assert torch.equal(found[f"{name}.down_proj.weight"], own["model.layers.1.mlp.down_proj.weight"][:, units] * 4)
    router = found["model.layers.1.mlp.router.weight"].view(4, 3, -1)
    assert all(torch.equal(router[0], router[group]) for group in range(4))
    assert not torch.equal(router[0, 0], router[0, 1])


def test_transformers_computes_the_dense_model_of_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = grouped(tmp_path, CONFIGS["llama"], "experts: {count: 10, make: virtual_group, shards: 5}", layout="mixtral")
    found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, load_model(tmp_path / "seed")(IDS), rtol=1e-4, atol=1e-5)


def test_the_cost_card_and_inspect_count_shards(tmp_path: Path) -> None:
    """12 experts of a quarter hold three dense FFNs; 8 of them, by default two of each shard, compute two."""
    path = grouped(tmp_path, CONFIGS["llama"])
    found, dense = inspect(path), inspect(tmp_path / "seed")
    assert found.cost.by_role["ffn.up"] == 3 * dense.cost.by_role["ffn.up"]
    assert (found.cost.active_by_role or {})["ffn.up"] == 2 * dense.cost.by_role["ffn.up"]
    assert found.document()["facts"]["intermediate_size"] == 10
    card = (path / "README.md").read_text()
    assert "| FFN experts | 12 of seed, virtual_group (shards: 4) (expert 0 to 11); 8 per token;" in card
    assert "| expert width | 10 units, a shard of the dense FFN's 40 |" in card


@pytest.mark.parametrize("family", ["llama_biased", "gpt_neox"])
def test_inspect_as_bam_knows_shards_before_there_is_a_mixture(family: str, tmp_path: Path) -> None:
    path = grouped(tmp_path, CONFIGS[family])
    made = inspect(tmp_path / "seed", as_bam=3, top_k=8, shards=4).mixtures["btx"]
    found = inspect(path).cost
    assert (made.by_role, made.active_by_role, made.flops()) == (found.by_role, found.active_by_role, found.flops())


def test_shards_that_no_ffn_has_are_refused(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"], names=("seed",))
    result = run("inspect", tmp_path / "seed", "--as-bam", 2, "--shards", 3)
    assert result.status == 2 and "--shards is 3, and an FFN of 40 units does not go into that many. Use a divisor." in result.err
    shown = run("inspect", tmp_path / "seed", "--as-bam", 2, "--shards", 4, "--top-k", 8, "--shared-expert").out
    assert "of 4 shards each top 8 and one of every token" in " ".join(shown.split())


# ---- what verification must catch ----------------------------------------------------------------------------------------------


def swapped_shards(forge: Forger) -> None:
    """Each expert is a shard still, but one shard stands in the places of two."""
    for part in ("gate", "up", "down"):
        other = forge.read(f"model.layers.1.mlp.experts.3.{part}_proj.weight")
        for expert in range(3):
            forge.write(f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight", other)


def unscaled(forge: Forger) -> None:
    for expert in range(12):
        name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        forge.write(name, forge.read(name) / 4)


def routers_of_their_own(forge: Forger) -> None:
    name = "model.layers.1.mlp.router.weight"
    rows = forge.read(name)
    forge.write(name, torch.cat((-rows[:3], rows[3:])))


@pytest.mark.parametrize(("harm", "checks"), [
    (swapped_shards, {"copies", "merges", "expert isolation", "identity"}),
    (unscaled, {"merges", "expert isolation", "identity"}),
    (routers_of_their_own, {"routers", "identity"}),
])  # fmt: skip
def test_what_is_not_the_dense_model_is_found(harm: Any, checks: set[str], tmp_path: Path) -> None:
    path = grouped(tmp_path, CONFIGS["llama"], f"{GROUP}\nffn: {{top_k: 4}}", verify=False)
    assert verify(path).ok
    harm(Forger(path))
    assert checks <= failed(verify(path)).keys()


# ---- what is refused -------------------------------------------------------------------------------------------------------------

REFUSED = [
    ("experts: {count: 12, make: virtual_group}", "experts.shards: is required and missing"),
    ("experts: {count: 10, make: virtual_group, shards: 4}", "experts.count: found 10, expected two or more copies of each of the 4 shards"),
    ("experts: {count: 4, make: virtual_group, shards: 4}", "experts.count: found 4, expected two or more copies of each of the 4 shards"),
    ("experts: {count: 6, make: virtual_group, shards: 3}", "experts.shards: intermediate_size 40 does not go into 3 equal shards."),
    (f"{GROUP}\nffn: {{top_k: 6}}", "ffn.top_k: found 6, expected a multiple of the 4 shards"),
    (f"{GROUP}\nffn: {{top_k: 16}}", "ffn.top_k: 16 experts per token of only 12."),
    (f"{GROUP}\nrules: [{{roles: [ffn.up], make: noise}}]", "rules[0]: experts that are shards of the FFN are made of all of it"),
    ("experts: {count: 12, make: virtual_group, shards: 4, from: sed}", "experts.from: 'sed' is not among the sources"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        grouped(tmp_path, CONFIGS["llama"], text)
    assert said in str(error.value)
    assert "top_k" in said or "ffn.top_k" not in str(error.value), "a number that the recipe does not have"
