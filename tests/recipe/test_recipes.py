"""Every recipe in recipes/ is planned, and merges."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_adapter
from conftest import CONFIGS, write_sources

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
FOUR = ("seed", "code", "law", "math")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_plans_and_merges(recipe: Path, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path / "checkpoints", CONFIGS["llama"], FOUR)
    for number, name in enumerate(FOUR[1:]):
        write_adapter(tmp_path / "checkpoints" / "adapters" / name, tmp_path / "checkpoints" / "seed", seed=number)
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


def test_all_are_there() -> None:
    assert {path.stem for path in RECIPES} == {
        "bam_adapters", "bam_expert_kv", "bam_shared_kv", "bam_top2_attention", "bam_top2_ffn", "btx", "btx_mixtral", "btx_6_experts_top3", "drop_upcycling", "sparse_upcycling", "soup", "ties", "task_arithmetic", "bar",
    }  # fmt: skip
