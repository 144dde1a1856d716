"""The manifest read back, in both directions, for every kind of expression."""

from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge import expressions
from bam_merge.checkpoints.provenance import fates, origins
from bam_merge.errors import VerifyError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan

RULES = """
rules:
  - {roles: [norm.*], make: copy, from: code}
  - {roles: [embed, head], make: linear, weights: {seed: 0.5, code: 0.25, law: 0.25}}
  - {roles: [attn.k], layers: 1, make: ties, base: seed, density: 0.5}
  - {roles: [attn.v], layers: 1, make: slerp, from: [code, law], t: 0.3}
  - {roles: [attn.q], layers: 0, make: task_arithmetic, base: seed, scale: 0.5}"""


def manifest_of(plan: Plan) -> dict[str, Any]:
    """What a merge would record, less the digests."""
    used: dict[str, dict[str, str]] = {name: {} for name in plan.models}
    for step in plan.steps:
        for read in expressions.reads(step.expr):
            used[read.source][read.tensor] = "digest"
    return {
        "sources": {name: {"files": {"model.safetensors": {"tensors": tensors}}} for name, tensors in used.items()},
        "tensors": {step.name: {"expression": step.expression} for step in plan.steps},
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
    found = origins(manifest_of(plan))
    for step in plan.steps:
        assert set(found[step.name].reads) == {(read.source, read.tensor) for read in expressions.reads(step.expr)}, step.expression


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
    with pytest.raises(VerifyError, match=r"'laws' is no source of this merge; did you mean 'law'.* Its sources: seed, code, law"):
        fates(manifest, "laws:*")
    with pytest.raises(VerifyError, match="'law:nothing' matches no tensor"):
        fates(manifest, "law:nothing")
