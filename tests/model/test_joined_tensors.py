"""A tensor that files hold in several, one for each head: StableLM 2 12B's norms of queries and keys."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SOURCES, Result, write_recipe, write_sources
from proofs import UNPROVED, failed
from safetensors.torch import load_file, save_file
from test_exported import KINDS, assert_equals_reference, assert_same_tensors, load
from test_model import TOLERANCE, build, distance, ids, theirs, write_three

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.model.loading import load_model
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

pytest.importorskip("transformers")

CONFIG = CONFIGS["stablelm_qk_norm"]
Q = "model.layers.1.self_attn.q_layernorm.norms.{}.weight"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mixture(kind: str, tmp_path: Path) -> None:
    """Each expert has the norms of its own heads, in one vector; the exported model the same, and it saves what it read."""
    write_three(tmp_path, CONFIG)
    method, text = KINDS[kind]
    folder = build(tmp_path, text, method)
    report = verify(folder)
    assert report.ok, failed(report)
    merged, norms = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.experts.2.q_norm.weight"
    if method == "bam":
        own = load_file(tmp_path / "law" / "model.safetensors")
        assert torch.equal(merged[norms], torch.cat([own[Q.format(head)] for head in range(4)]))
    assert_equals_reference(folder, ids())
    load(folder).save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")


@pytest.mark.parametrize("shared", ["{make: mean}", "{make: ties, base: seed, density: 0.5}", "{make: slerp, from: [code, law], t: 0.5}"])
def test_a_dense_merge_writes_them_apart_again(shared: str, tmp_path: Path) -> None:
    write_three(tmp_path, CONFIG)
    plan = plan_file(write_recipe(tmp_path, f"shared: {shared}", "merge"))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    sources = [load_file(tmp_path / source / "model.safetensors") for source in SOURCES]
    assert merged.keys() == sources[0].keys()
    if "mean" in shared:
        for head in range(4):
            assert torch.equal(merged[Q.format(head)], sum(source[Q.format(head)] for source in sources) / torch.tensor(3.0))
    with torch.no_grad():
        expected = theirs(tmp_path / "out")(input_ids=ids()).logits
        assert distance(load_model(tmp_path / "out")(ids()), expected) < TOLERANCE


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a head without": (lambda tensors: tensors.pop(Q.format(2)), f"{Q.format(2)} missing: 1 tensor(s)."),
    "a head too many": (lambda tensors: tensors.update({Q.format(4): torch.ones(8)}), f"{Q.format(4)}: 1 tensor(s) that stablelm with 2 layers"),
    "another size": (lambda tensors: tensors.update({Q.format(1): torch.ones(7)}), f"{Q.format(1)} is F32 [7], expected F32 [8]"),
    "another dtype": (lambda tensors: tensors.update({Q.format(1): torch.ones(8).bfloat16()}), f"{Q.format(1)} is BF16 [8], expected F32 [8]"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_one_that_is_not_as_the_others(wrong: str, tmp_path: Path, run: Callable[..., Result]) -> None:
    write_sources(tmp_path, CONFIG)
    edit, words = WRONG[wrong]
    change(tmp_path / "code", edit)
    with pytest.raises(BamMergeError) as caught:
        plan_file(write_recipe(tmp_path))
    assert words in str(caught.value)
    with pytest.raises(CheckpointError) as also:
        load_model(tmp_path / "code")
    assert words.split(" ")[0].rstrip(":") in str(also.value)
    assert words.split(" ")[0].rstrip(":") in run("inspect", tmp_path / "code").out or wrong == "another dtype"


@pytest.mark.parametrize("way", ["two heads exchanged", "another expert's"])
def test_wrong_norms_are_found(way: str, tmp_path: Path) -> None:
    write_three(tmp_path, CONFIG)
    plan = plan_file(write_recipe(tmp_path))
    folder, mine, other = publish(plan, None, UNPROVED), *(f"model.layers.1.self_attn.experts.{e}.q_norm.weight" for e in (0, 1))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[mine] = tensors[other].clone() if way != "two heads exchanged" else tensors[mine].view(4, 8)[[1, 0, 2, 3]].flatten()

    change(folder, edit)
    found = {check.name for check in verify(folder, plan).checks if check.ok is False}
    assert {"copies", "expert isolation"} <= found


def test_two_models_are_compared_head_by_head(tmp_path: Path, run: Callable[..., Result]) -> None:
    write_sources(tmp_path, CONFIG)
    (tmp_path / "twin").mkdir()
    for file in ("model.safetensors", "config.json"):
        (tmp_path / "twin" / file).write_bytes((tmp_path / "code" / file).read_bytes())
    assert run("diff", tmp_path / "code", tmp_path / "twin").status == 0
    change(tmp_path / "twin", lambda tensors: tensors[Q.format(3)].add_(1.0))
    result = run("diff", tmp_path / "code", tmp_path / "twin", "--json")
    assert result.status == 1
    assert '"role": "attn.q_norm"' in result.out
    assert run("diff", "--seed", tmp_path / "seed", tmp_path / "code", tmp_path / "law").status in (0, 1)
