"""The manifest read back, in both directions, for every kind of expression."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge import MergeOptions, expressions
from bam_merge.checkpoints.provenance import MANIFEST_FORMAT, SEAL, fates, origins, sealed
from bam_merge.errors import VerifyError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

RULES = """
rules:
  - {roles: [norm.*], make: copy, from: code}
  - {roles: [embed, head], make: linear, weights: {seed: 0.5, code: 0.25, law: 0.25}}
  - {roles: [attn.k], layers: 1, make: ties, base: seed, density: 0.5}
  - {roles: [attn.v], layers: 1, make: slerp, from: [code, law], t: 0.3}
  - {roles: [attn.q], layers: 0, make: task_arithmetic, base: seed, scale: 0.5}"""


def of_format_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as the first versions wrote it: expressions alone."""
    tensors = {name: {key: value for key, value in record.items() if key != "reads"} for name, record in manifest["tensors"].items()}
    return {**manifest, "format": 1, "tensors": tensors}


def manifest_of(plan: Plan) -> dict[str, Any]:
    """What a merge would record, less the digests."""
    used: dict[str, dict[str, str]] = {name: {} for name in plan.models}
    for step in plan.steps:
        for read in expressions.reads(step.expr):
            used[read.source][read.tensor] = "digest"
    return {
        "format": MANIFEST_FORMAT,
        "sources": {name: {"files": {"model.safetensors": {"tensors": tensors}}} for name, tensors in used.items()},
        "tensors": {step.name: {"expression": step.expression, "reads": step.reads} for step in plan.steps},
        "unused": {name: dict(reasons) for name, reasons in plan.unused.items()},
    }


@pytest.mark.parametrize(("method", "text"), [
    ("bam", ""), ("btx", ""), ("merge", ""), ("merge", RULES), ("merge", "shared: {make: ties, base: seed, density: 0.5}"),
    ("merge", RULES + "\n"), ("bam", "rules: [{roles: [attn.k, attn.v], layers: 1, make: mean}]"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "cohere"])
def test_the_reads_of_every_expression(name: str, method: str, text: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS[name])
    plan = plan_file(write_recipe(tmp_path, text, method, output="{path: out, dtype: bfloat16}"))
    manifest = manifest_of(plan)
    found, old = origins(manifest), origins(of_format_1(manifest))
    for step in plan.steps:
        expected = tuple(dict.fromkeys((read.source, read.tensor) for read in expressions.reads(step.expr)))
        assert found[step.name].reads == expected, step.expression
        assert set(old[step.name].reads) == set(expected), step.expression


def test_reads_are_not_looked_for_in_expressions(tmp_path: Path) -> None:
    """A method that is made later, with whatever words it shows, is found by what it reads."""
    write_sources(tmp_path, CONFIGS["llama"])
    manifest = manifest_of(plan_file(write_recipe(tmp_path)))
    for record in manifest["tensors"].values():
        record["expression"] = "a method of tomorrow"
    (up,) = fates(manifest, "law:model.layers.1.mlp.up_proj.weight")
    assert up["made"] == [{"name": "model.layers.1.mlp.experts.2.up_proj.weight", "expression": "a method of tomorrow"}]


def test_a_folder_of_format_1_can_be_verified_and_asked(tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    folder = publish(plan_file(write_recipe(tmp_path)), None, MergeOptions())
    path = folder / "bam_merge.json"
    question = ("inspect", folder, "--where", "law:model.layers.1.mlp.up_proj.weight", "--json")
    new = json.loads(run(*question).out)
    document = {key: value for key, value in json.loads(path.read_text()).items() if key != SEAL}
    path.write_bytes(sealed(of_format_1(document)))
    said = "bam_merge.json is of format 1, which records no reads"
    old = json.loads(run(*question).out)
    assert old["where"] == new["where"]
    assert [found for found in old["findings"] if said in found] and not [found for found in new["findings"] if said in found]
    assert {record["name"]: record["reads"] for record in old["tensors"]} == {record["name"]: record["reads"] for record in new["tensors"]}
    report = verify(folder)
    assert report.ok
    checks = {check.name: check for check in report.checks}
    assert checks["provenance"].ok and checks["reads"].ok is None and said in checks["reads"].detail
    assert not [check for check in report.checks if check.ok is None and check.name != "reads"]
    result = run(tmp_path / "recipe.yaml", "--resume")  # it is not what this version would write
    assert result.status == 2 and "out already exists" in result.err
    path.write_bytes(sealed({**of_format_1(document), "format": 3}))
    result = run("verify", folder)
    assert result.status == 2
    assert "format 3, this version reads 1 and 2: it was written by a newer bam-merge, which can read it." in result.err


def test_sources_that_spell_a_tensor_differently(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["gpt_neox"], ("seed", "code"))
    write_sources(tmp_path, CONFIGS["gpt_neox"], ("law",), spelling=1)
    found = origins(manifest_of(plan_file(write_recipe(tmp_path, method="merge"))))
    assert found["embed_out.weight"].reads == (("seed", "embed_out.weight"), ("code", "embed_out.weight"), ("law", "lm_head.weight"))


def test_what_became_of_a_tensor(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    manifest = manifest_of(plan_file(write_recipe(tmp_path, "rules: [{roles: [norm.final], make: copy, from: seed}]")))
    (up,) = fates(manifest, "law:model.layers.1.mlp.up_proj.weight")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert up["made"] == [{"name": name, "expression": "law:model.layers.1.mlp.up_proj.weight"}]
    (norm,) = fates(manifest, "code:model.norm.weight")
    assert (norm["made"], norm["unused"]) == ([], "rules[0] makes norm.final without code")
    everywhere = fates(manifest, "model.embed_tokens.*")
    assert [record["source"] for record in everywhere] == ["seed", "code", "law"]
    assert {record["made"][0]["expression"] for record in everywhere} == {"mean(seed, code, law)"}


def test_bad_questions(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    manifest = manifest_of(plan_file(write_recipe(tmp_path)))
    with pytest.raises(VerifyError, match=r"'laws' is no source of this merge; did you mean 'law'\? Its sources: seed, code, law"):
        fates(manifest, "laws:*")
    with pytest.raises(VerifyError, match="'law:nothing' matches no tensor"):
        fates(manifest, "law:nothing")
