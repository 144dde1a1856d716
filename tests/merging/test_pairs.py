"""Rows of queries and keys in a layout's order of rotary pairs: which row goes where, in every dtype, and that a wrong order is found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from safetensors.torch import load_file

from bam_merge import MergeOptions, load_recipe, merge, verify
from bam_merge.checkpoints.pieces import Computed, Read, Slice
from bam_merge.expressions import copy_runs
from bam_merge.formulas import Pairs
from bam_merge.planning.make import plan_file
from bam_merge.sources import pairs
from bam_merge.verifying.formulas import moved_rows
from bam_merge.verifying.options import VerifyOptions

SHAPES = {
    "heads that turn whole": Pairs(6, 6, True, 24, 0, 24), "the other way": Pairs(6, 6, False, 24, 0, 24),
    "half of a head": Pairs(8, 4, True, 16, 0, 16), "a part of a fused tensor": Pairs(4, 4, False, 20, 8, 8),
    "a part of each block": Pairs(4, 2, True, 12, 4, 4), "heads that do not turn": Pairs(4, 0, True, 8, 0, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_those_of_the_same_pair(name: str) -> None:
    """By the definition: pair p is rows 2p and 2p + 1 of one order, rows p and half + p of the other."""
    formula = SHAPES[name]
    total, half = 2 * formula.block, formula.turning // 2
    found = [formula.source(row) for row in range(total)]
    assert sorted(found) == list(range(total))
    for row, source in enumerate(found):
        start = row // formula.block * formula.block + formula.first
        place = (row - start) % formula.head
        if not start <= row < start + formula.rows or place >= formula.turning:
            assert source == row
            continue
        base = row - place
        pair, second = (place % half, place // half) if formula.to_halves else (place // 2, place % 2)
        assert source == base + (2 * pair + second if formula.to_halves else pair + half * second)


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_where_it_was(name: str) -> None:
    formula = SHAPES[name]
    back = Pairs(formula.head, formula.turning, not formula.to_halves, formula.block, formula.first, formula.rows)
    assert [formula.source(back.source(row)) for row in range(2 * formula.block)] == list(range(2 * formula.block))


@pytest.mark.parametrize("name", SHAPES)
def test_three_ways_to_the_same_rows(name: str) -> None:
    """Runs of a copy, rows of its proof, and the rows one by one."""
    formula = SHAPES[name]
    total = 2 * formula.block
    of = Read("seed", "w", "F32", (total, 3))
    node = Computed("seed", "w", formula, (of,), "F32", (total, 3))
    expected = [formula.source(row) for row in range(total)]
    runs = list(copy_runs(node, 0, total * 3))
    assert [row for _, first, count in runs for row in range(first // 3, (first + count) // 3)] == expected
    rows = torch.arange(total)[:, None]
    for start in range(total):
        got = moved_rows(formula, [(lambda a, b: rows[a:b], rows[:1])], start, total, total)
        assert got.flatten().tolist() == expected[start:]
    part = Slice(node, 2, formula.first, formula.rows, (2 * formula.rows, 3))
    inside = [row for block in range(2) for row in expected[block * formula.block + formula.first :][: formula.rows]]
    assert [row for _, first, count in copy_runs(part, 0, 6 * formula.rows) for row in range(first // 3, (first + count) // 3)] == inside


def build(folder: Path, family: str, layout: str, dtype: str, text: str, **keys: Any) -> Path:
    write_sources(folder, {**CONFIGS[family], **keys}, dtype=dtype)
    recipe = write_recipe(folder, text, "btx", output=f"{{path: out, layout: {layout}}}")
    return merge(load_recipe(recipe), options=MergeOptions(verify=False))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_a_copy_is_exact_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    out = build(tmp_path, "ernie4_5", "mixtral", dtype, "shared: {make: copy, from: code}")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "code", out))
    name = "model.layers.1.self_attn.k_proj.weight"
    D = CONFIGS["ernie4_5"].get("head_dim", 8)
    heads = before[name].unflatten(0, (-1, D))
    assert torch.equal(after[name], torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).flatten(0, 1))
    assert torch.equal(after["model.layers.1.self_attn.v_proj.weight"], before["model.layers.1.self_attn.v_proj.weight"])
    assert verify(out).ok


def test_the_plan_says_so(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["helium"])
    plan = plan_file(write_recipe(tmp_path, "", "btx", output="{path: out, layout: mixtral}"))
    assert any("mixtral turns the halves of a head together" in note and "helium neighbouring channels" in note for note in plan.notes)
    by_name = {step.name: step.expression for step in plan.steps}
    assert by_name["model.layers.0.self_attn.q_proj.weight"].endswith("[pairs to halves]")
    assert "pairs" not in by_name["model.layers.0.self_attn.v_proj.weight"]
    own = plan_file(write_recipe(tmp_path, "", "btx"))  # layout bam turns them as they are
    assert not any("pairs" in step.expression for step in own.steps)


@pytest.mark.parametrize("wrong", ["turning", "head"])
def test_a_wrong_order_is_found(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is common to a merge and to its proof by rows; what the rows compute is not."""
    right = pairs._in_pairs

    def other(expr: Any, head: int, turning: int, to_halves: bool) -> Any:
        return right(expr, head // 2, turning // 2, to_halves) if wrong == "head" else right(expr, head, turning // 2, to_halves)

    monkeypatch.setattr(pairs, "_in_pairs", other)
    write_sources(tmp_path, CONFIGS["helium"])
    plan = plan_file(write_recipe(tmp_path, "", "btx", output="{path: out, layout: mixtral}"))
    out = merge(plan.recipe, options=MergeOptions(verify=False))
    failed = [check.name for check in verify(out, plan).checks if check.ok is False]
    assert failed == ["rotary order"]


def test_routers_of_texts_see_the_source_as_it_computes(tmp_path: Path) -> None:
    """The seed that texts go through is read with its rows in the layout's order, and turned in that order."""
    write_sources(tmp_path, CONFIGS["ernie4_5"])
    from bam_merge.merging.planned_model import planned_model
    from bam_merge.model.loading import load_model

    plan = plan_file(write_recipe(tmp_path, "", "btx", output="{path: out, layout: mixtral}"))
    ids = torch.arange(3, 27).view(2, 12)
    with planned_model(plan, "code") as found, torch.no_grad():
        got, expected = found.model()(ids), load_model(tmp_path / "code")(ids)
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("layout", ["mixtral", "granitemoe"])
def test_adapters_are_applied_before_rows_are_put(layout: str, tmp_path: Path) -> None:
    """And proved so: at either level, against transformers' order of the base and of the update."""
    from adapter_files import write_adapter

    write_sources(tmp_path, CONFIGS["ernie4_5"], ("seed",), "BF16")
    for number, name in enumerate(("code", "law")):
        write_adapter(tmp_path / name, tmp_path / "seed", seed=number)
    (tmp_path / "recipe.yaml").write_text(
        "method: btx\nsources: {seed: seed, code: {base: seed, adapter: code}, law: {base: seed, adapter: law}}\n"
        f"shared: {{make: copy, from: law}}\noutput: {{path: out, layout: {layout}}}\n"
    )
    out = merge(load_recipe(tmp_path / "recipe.yaml"), options=MergeOptions(verify=False))
    for level in ("quick", "full"):
        report = verify(out, options=VerifyOptions(level=level))
        assert report.ok, [check for check in report.checks if check.ok is False]
    assert {"rotary order", "adapters"} <= {check.name for check in report.checks}


def test_rows_of_one_fused_tensor_are_put(tmp_path: Path) -> None:
    """phi3 has q, k and v in one tensor, and its halves turn; ernie4_5_moe has a tensor for each, and neighbours turn."""
    out = load_file(build(tmp_path, "phi3", "ernie4_5_moe", "BF16", "shared: {make: copy, from: code}") / "model.safetensors")
    fused = load_file(tmp_path / "code" / "model.safetensors")["model.layers.0.self_attn.qkv_proj.weight"]
    H, D = CONFIGS["phi3"]["num_attention_heads"], 8
    q = fused[: H * D].unflatten(0, (H, 2, D // 2))
    assert torch.equal(out["model.layers.0.self_attn.q_proj.weight"], q.transpose(1, 2).flatten(0, 2))
    assert verify(tmp_path / "out").ok
