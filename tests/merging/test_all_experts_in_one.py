"""Tensors that hold all experts: what is where, read back as as many, proved one after the other, and every damage of them found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe, write_sources
from safetensors.torch import load_file, save_file

from bam_merge import MergeOptions, load_recipe, merge, verify
from bam_merge.architectures.anatomy import open_anatomy
from bam_merge.architectures.strict_tables import TableError
from bam_merge.architectures.tables import load_architecture, read_table
from bam_merge.checkpoints.pieces import numel
from bam_merge.errors import CheckpointError
from bam_merge.inspecting.inspection import inspect
from bam_merge.merging import tensor
from bam_merge.model.loading import open_model
from bam_merge.planning.make import plan_file

NAMES = ("seed", "code", "law")
INPUT, OUTPUT = (f"model.layers.1.block_sparse_moe.{part}_linear.weight" for part in ("input", "output"))


def build(folder: Path, text: str = "", family: str = "granite", method: str = "btx", dtype: str = "F32", **options: Any) -> Path:
    write_sources(folder, CONFIGS[family], NAMES, dtype)
    names = NAMES if method == "btx" else NAMES[:1]
    recipe = write_recipe(folder, text, method, names, f"{{path: out, layout: granitemoe{options.pop('output', '')}}}")
    return merge(load_recipe(recipe), options=MergeOptions(verify=False, **options))


def edit(out: Path, change: Any) -> None:
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_expert_j_is_source_j(dtype: str, tmp_path: Path) -> None:
    out = load_file(build(tmp_path, dtype=dtype) / "model.safetensors")
    for j, name in enumerate(NAMES):
        dense = load_file(tmp_path / name / "model.safetensors")
        gate, up, down = (dense[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        assert torch.equal(out[INPUT][j], torch.cat((gate, up)))
        assert torch.equal(out[OUTPUT][j], down)
    assert out[INPUT].shape == (3, 80, 32)


@pytest.mark.parametrize(("text", "method"), [
    ("", "btx"), ("experts: {make: noise, std: 0.01, count: 3}", "sparse_upcycling"), ("experts: {make: drop, count: 3}", "sparse_upcycling"),
    ("experts: {make: virtual_group, shards: 2, count: 4}", "sparse_upcycling"), ("rules: [{roles: [ffn.up], make: expert}]", "btx"),
])  # fmt: skip
@pytest.mark.parametrize("family", ["granite", "phi3", "llama"])
def test_it_proves_itself(text: str, method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However experts are made; in chunks that end anywhere, and in another dtype."""
    monkeypatch.setattr(tensor, "CHUNK_ELEMENTS", 96)
    for output in ("", ", dtype: bfloat16"):
        report = verify(build(tmp_path / (output[-4:] or "as_is"), text, family, method, output=output))
        assert report.ok, [check for check in report.checks if check.ok is False]


def test_it_is_read_back_as_experts(tmp_path: Path, run: Any) -> None:
    out = build(tmp_path)
    model = open_model(out)
    dense = open_model(tmp_path / "law")
    rows = range(3, 9)
    for part in ("gate", "up", "down"):
        mine, own = f"model.layers.0.mlp.experts.2.{part}_proj.weight", f"model.layers.0.mlp.{part}_proj.weight"
        assert torch.equal(model.read(mine), dense.read(own))
        assert torch.equal(model.read_rows(mine, rows), dense.read_rows(own, rows))
        assert torch.equal(model.read_rows(mine, [7, 0]), dense.read_rows(own, [7, 0]))
    anatomy = open_anatomy(out)
    assert not anatomy.findings
    assert not anatomy.missing
    assert {expert for role, _, expert in anatomy.leaves if role.startswith("ffn.")} == {0, 1, 2}
    assert sum(numel(leaf) for leaf in anatomy.leaves.values()) == sum(entry.numel for entry in anatomy.checkpoint.tensors.values())
    found: Result = run("diff", f"{out}#experts.2", tmp_path / "law", "--only", "ffn.*")
    assert "the same" in found.out
    found = run("diff", f"{out}#experts.2", tmp_path / "code", "--only", "ffn.*")
    assert "different" in found.out


def test_counts_are_those_of_one_tensor_each(tmp_path: Path) -> None:
    """inspect and the plan count as for a layout that has a tensor for each expert."""
    write_sources(tmp_path, CONFIGS["llama"])
    plans = {
        layout: plan_file(write_recipe(tmp_path, "", "btx", output=f"{{path: {layout}, layout: {layout}}}"))
        for layout in ("mixtral", "granitemoe")
    }
    assert plans["granitemoe"].parameters == plans["mixtral"].parameters
    assert plans["granitemoe"].active_parameters == plans["mixtral"].active_parameters
    assert plans["granitemoe"].cost.flops() == plans["mixtral"].cost.flops()
    out = merge(plans["granitemoe"].recipe, options=MergeOptions(verify=False))
    assert inspect(out).cost.document() == plans["mixtral"].cost.document()


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    tensors[INPUT] = tensors[INPUT][[0, 2, 1]].contiguous()


def one_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[OUTPUT][2, 5, 7] += 1


@pytest.mark.parametrize(("damage", "words"), [(swapped, "element 2560 is"), (one_number, f"element {2 * 1280 + 5 * 40 + 7} is")])
def test_damage_is_found_where_it_is(damage: Any, words: str, tmp_path: Path) -> None:
    out = build(tmp_path)
    edit(out, damage)
    failed = {check.name: check.detail for check in verify(out).checks if check.ok is False}
    assert {"digests", "copies", "expert isolation"} <= failed.keys()
    assert words in failed["copies"]


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    """The count is of the whole tensor, the element is where it is in it."""
    write_sources(tmp_path, CONFIGS["granite"])
    path = tmp_path / "law" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 3] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    for dtype in ("source", "bfloat16"):
        recipe = write_recipe(tmp_path, "", "btx", output=f"{{path: out, layout: granitemoe, dtype: {dtype}}}")
        with pytest.raises(Exception, match=f"{2 * 1280 + 3} on are NaN") as error:
            merge(load_recipe(recipe), options=MergeOptions(verify=False))
        assert OUTPUT in str(error.value)
        assert "comes from a source" in str(error.value)


@pytest.mark.parametrize(("keys", "words"), [
    ({"num_local_experts": 2}, "is [3, 80, 32], config.json implies [2, 80, 32]"), ({"intermediate_size": 41}, "is [3, 80, 32], config.json implies [3, 82, 32]"),
])  # fmt: skip
def test_a_config_that_says_otherwise(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    out = build(tmp_path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **keys}))
    with pytest.raises(CheckpointError) as error:
        open_model(out)
    assert any(words in problem for problem in error.value.problems)


def test_one_that_is_missing_is_named_once(tmp_path: Path) -> None:
    out = build(tmp_path)
    edit(out, lambda tensors: tensors.pop(INPUT))
    assert open_anatomy(out).missing == (INPUT,)
    with pytest.raises(CheckpointError, match=r"input_linear\.weight missing: 1 tensor"):
        open_model(out)


@pytest.mark.parametrize(("row", "words"), [
    ('{ role = "ffn.down", name = "m.{layer}.w", axis = "experts" }', "axis: 'experts' is not possible"),
    ('{ role = "ffn.down", name = "m.{layer}.{expert}.w", axis = "expert" }', "{expert} is of one expert's tensor"),
    ('{ roles = ["ffn.gate", "ffn.up"], name = "m.{layer}.w", axis = "expert", parts = ["f", "f"], groups = "2" }', "each expert's rows are one block"),
])  # fmt: skip
def test_a_table_that_says_it_wrongly(row: str, words: str) -> None:
    head = 'name = "x"\nkind = "mixture"\nmodel_types = ["x"]\nclass = "X"\n'
    with pytest.raises(TableError, match=r"x\.toml: tensors\.rows\[0\]") as error:
        read_table(f"{head}[tensors]\nrows = [{row}]", "x.toml")
    assert words in str(error.value)
    assert load_architecture("granitemoe").rows  # one that says it well


def test_copies_of_an_expert_are_named(tmp_path: Path) -> None:
    """Though they are in one tensor: of upcycled experts the second and third are the first; of different ones none is."""
    assert inspect(build(tmp_path / "a", "experts: [seed, seed, seed]", method="sparse_upcycling"), stats=True).values.clones == [
        ("ffn", 1, 0),
        ("ffn", 2, 0),
    ]
    assert inspect(build(tmp_path / "b"), stats=True).values.clones == []


@pytest.mark.parametrize(("family", "layout"), [("granite", "granitemoehybrid_moe"), ("llama", "ernie4_5_moe")])
def test_a_sources_ffn_as_the_experts_of_every_token(family: str, layout: str, tmp_path: Path) -> None:
    """Fused in the one, by itself in the other: transformers and the reference model compute the same, and it proves itself."""
    transformers = pytest.importorskip("transformers")
    write_sources(tmp_path, CONFIGS[family], NAMES)
    recipe = write_recipe(tmp_path, "ffn: {shared_expert: law}", "btx", NAMES, f"{{path: out, layout: {layout}}}")
    out = merge(load_recipe(recipe), options=MergeOptions(verify=False))
    assert verify(out).ok
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        assert float((model.eval()(input_ids=ids).logits - open_model(out).model()(ids)).abs().max()) < 1e-5
