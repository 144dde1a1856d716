"""Every recipe in recipes/ is planned, and merges."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from adapter_files import write_adapter
from conftest import CONFIGS, write_sources
from scenes import FOUR, LETTERS, write_read_texts

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_plans_and_merges(recipe: Path, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path / "checkpoints", CONFIGS["llama"], FOUR)
    for number, name in enumerate(FOUR[1:]):
        write_adapter(tmp_path / "checkpoints" / "adapters" / name, tmp_path / "checkpoints" / "seed", seed=number)
    write_read_texts(tmp_path)
    (tmp_path / "recipes").mkdir()
    copy = shutil.copy(recipe, tmp_path / "recipes")
    planned = run("plan", copy)
    assert planned.status == 0, planned.err
    assert not (tmp_path / "out").exists()
    merged = run(copy)
    assert merged.status == 0, merged.err
    assert (tmp_path / "out" / recipe.stem / "bam_merge.json").exists()


def test_the_issue_of_six_experts(tmp_path: Path, run: Any) -> None:
    """The paper's Table 5: the seed stands three times and weighs once."""
    write_sources(tmp_path / "checkpoints", CONFIGS["llama"], FOUR)
    (tmp_path / "recipes").mkdir()
    copy = shutil.copy(RECIPES[0].with_name("btx_6_experts_top3.yaml"), tmp_path / "recipes")
    text = run("plan", copy).out
    assert "{seed,code,law,math,seed,seed}:model.layers.{layer}.mlp.up_proj.weight" in text
    assert "mean(seed, code, law, math)" in text


@pytest.mark.parametrize("name", ["bam_untrained", "btx_untrained"])
def test_the_untrained_ones_go_where_they_should(name: str, tmp_path: Path, run: Any) -> None:
    """Held-out text of a domain, in the mixture: most of its tokens to the domain's expert; and what is shared is moved from the seed."""
    import torch

    from bam_merge import load_model
    from bam_merge.model.tokens import encode, open_tokenizer

    write_sources(tmp_path / "checkpoints", CONFIGS["llama"], FOUR)
    write_read_texts(tmp_path)
    (tmp_path / "recipes").mkdir()
    merged = run(shutil.copy(RECIPES[0].with_name(f"{name}.yaml"), tmp_path / "recipes"))
    assert merged.status == 0, merged.err
    said = json.loads((tmp_path / "out" / name / "bam_merge.json").read_text())
    assert said["tensors"]["model.norm.weight"]["expression"].startswith("task_arithmetic(code, law, math; base=seed)")
    assert said["recipe"]["ffn"] == {"top_k": 2, "gate": "topk_then_softmax", "gate_scale": 1.0}
    model, record = load_model(tmp_path / "out" / name), []
    letters = Random(1)
    text = "".join(letters.choice(LETTERS["code"]) for _ in range(200))
    model(torch.tensor([encode(open_tokenizer(tmp_path / "out" / name), text)[:100]]), record=record)
    gates = [gates for block in record for gates in (block.attention_gates, block.ffn_gates) if gates is not None]
    assert len(gates) == (4 if name == "bam_untrained" else 2)
    shares = [float((each[0, 1:].argmax(-1) == FOUR.index("code")).float().mean()) for each in gates]
    assert min(shares) > 0.4 and sum(shares) / len(shares) > 0.55, shares  # 0.25 by chance


def test_all_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} == {
        "bam_adapters", "bam_expert_kv", "bam_shared_kv", "bam_top2_attention", "bam_top2_ffn", "bam_untrained", "btx", "btx_untrained", "btx_mixtral", "btx_6_experts_top3", "drop_upcycling", "sparse_upcycling", "soup", "ties", "task_arithmetic", "bar",
    }  # fmt: skip


def test_training_from_routers_of_texts_is_training_otherwise_the_same() -> None:
    """And starts from what the recipe of that name makes."""
    folder = RECIPES[0].parent / "train"
    fresh, made = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("smollm2", "smollm2_untrained"))
    recipe = yaml.safe_load(RECIPES[0].with_name("bam_untrained.yaml").read_text())
    assert (folder / made["model"]).resolve() == (RECIPES[0].parent / recipe["output"]["path"]).resolve()
    assert made["output"] != fresh["output"]
    for config in (fresh, made):
        del config["model"], config["output"]
    assert made == fresh
