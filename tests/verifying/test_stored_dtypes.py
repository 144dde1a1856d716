"""Tensors in dtypes that are only ever copied: planned with a note, written as they are, verified as bytes; or refused in the plan."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from proofs import UNPROVED, failed
from safetensors.torch import load_file, save_file

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.header import encode_header, read_header
from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.verifying.verification import verify

FFN, UP = ("gate_proj", "up_proj", "down_proj"), "model.layers.1.mlp.experts.1.up_proj.weight"


def stored_as(path: Path, dtype: str, chosen: Any = lambda name: ".mlp." in name) -> None:
    """Rewrite a float32 file with the chosen tensors in `dtype`: of each the first bytes, whatever they mean."""
    header = read_header(str(path))
    data = path.read_bytes()
    tensors = [(e, dtype if chosen(e.name) else e.dtype) for e in header.tensors]
    text, spans = encode_header((e.name, to, e.shape) for e, to in tensors)
    with open(path, "wb") as stream:
        stream.write(text)
        for (entry, _), (offset, nbytes) in zip(tensors, spans, strict=True):
            stream.seek(offset)
            # of a float32 the third byte, which is no NaN in any dtype once its high bits are cleared
            low = bytes(byte & 0x3B for byte in data[entry.offset : entry.offset + entry.nbytes])
            stream.write(data[entry.offset : entry.offset + nbytes] if nbytes == entry.nbytes else low[:nbytes].ljust(nbytes, b"\1"))


OTHERS = sorted(set(DTYPE_BITS) - {"F64", "F32", "F16", "BF16"})


def merged(folder: Path, dtype: str, method: str, layout: str, chosen: Any = lambda name: ".mlp." in name) -> tuple[Path, Plan]:
    write_sources(folder, CONFIGS["llama"])
    for source in SOURCES:
        stored_as(folder / source / "model.safetensors", dtype, chosen)
    plan = plan_file(write_recipe(folder, "", method, output=f"{{path: out, layout: {layout}}}"))
    return publish(plan, None, UNPROVED), plan


@pytest.mark.parametrize("dtype", OTHERS)
def test_experts_in_any_dtype_are_verified_as_bytes(dtype: str, tmp_path: Path) -> None:
    """The report says what was not computed and why; a byte that differs is found all the same."""
    folder, plan = merged(tmp_path, dtype, "bam", "bam")
    report = verify(folder, plan)
    assert report.ok, failed(report)
    (model,) = [check for check in report.checks if check.name == "model"]
    assert model.ok is None
    assert model.detail.startswith(f"not run: 18 tensors are {dtype} (model.layers.0.mlp.experts.0.gate_proj.weight, ")
    assert "Bytes were compared, and shapes; not expert isolation, identity, logits, " in model.detail
    assert not {"expert isolation", "identity", "causality"} & {check.name for check in report.checks}
    assert any(note.startswith(f"18 tensors are {dtype} (") and "Verification compares their bytes" in note for note in plan.notes)
    step = next(step for step in plan.steps if step.name == UP)
    with open(folder / step.file, "r+b") as stream:
        stream.seek(step.offset + step.nbytes // 2)
        byte = stream.read(1)
        stream.seek(step.offset + step.nbytes // 2)
        stream.write(bytes([byte[0] ^ 1]))
    element = step.nbytes // 2 * 8 // DTYPE_BITS[dtype]
    assert f"{UP} (element {element} is inf roundings off" in failed(verify(folder, plan))["copies"]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "F4"])
@pytest.mark.parametrize("layout", ["mixtral", "bam"])
def test_public_layouts_too_and_by_default(layout: str, dtype: str, tmp_path: Path, run: Any) -> None:
    """In the plan, in a merge that proves itself, and in a verification later, with and without the sources."""
    merged(tmp_path, dtype, "btx", layout)
    shutil.rmtree(tmp_path / "out")
    recipe = tmp_path / "recipe.yaml"
    assert f"18 tensors are {dtype}" in " ".join(run("plan", recipe).out.split())
    result = run(recipe, "--no-verify")
    assert result.status == 0, result.err
    for _ in range(2):
        again = run("verify", tmp_path / "out", "--json")
        assert again.status == 0
        checks = {check["name"]: check for check in json.loads(again.out)["checks"]}
        assert checks["model"]["ok"] is None and dtype in checks["model"]["detail"]
        assert checks["layout"]["ok"] and checks["digests"]["ok"]
        shutil.rmtree(tmp_path / "law", ignore_errors=True)


def test_new_tensors_are_not_of_a_dtype_that_nothing_is_computed_in(tmp_path: Path) -> None:
    """A router takes the final norm's dtype where the embeddings are only copied; where both are, the plan refuses."""
    shared = "shared: {make: copy, from: seed}"
    write_sources(tmp_path, CONFIGS["llama"])
    for source in SOURCES:
        stored_as(tmp_path / source / "model.safetensors", "F8_E4M3", lambda name: "norm" not in name)
    plan = plan_file(write_recipe(tmp_path, shared))
    assert {step.dtype for step in plan.steps if step.role.startswith("router")} == {"F32"}
    folder = publish(plan, None, UNPROVED)
    report = verify(folder, plan)
    assert report.ok, failed(report)
    for source in SOURCES:
        stored_as(tmp_path / source / "model.safetensors", "F8_E4M3", lambda name: "norm" in name)
    with pytest.raises(BamMergeError, match=r"router\.weight would be F8_E4M3, .*nothing can be initialised in that"):
        plan_file(write_recipe(tmp_path, shared))


def test_a_fused_tensor_whose_rows_are_no_whole_bytes_is_not_cut(tmp_path: Path) -> None:
    config = {**CONFIGS["phi3"], "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}
    write_sources(tmp_path, config)
    for source in SOURCES:
        stored_as(tmp_path / source / "model.safetensors", "F6_E2M3", lambda name: "gate_up" in name)
    assert plan_file(write_recipe(tmp_path)).notes  # 36 elements of 6 bits are 27 bytes
    write_sources(tmp_path, {**config, "hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1})
    for source in SOURCES:
        stored_as(tmp_path / source / "model.safetensors", "F6_E2M3", lambda name: "gate_up" in name)
    with pytest.raises(BamMergeError, match=r"rows of \w+:model\.layers\.0\.mlp\.gate_up_proj\.weight \(F6_E2M3\) are not whole bytes"):
        plan_file(write_recipe(tmp_path))


def test_float8_of_torch_is_what_is_copied(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    for source in SOURCES:
        file = tmp_path / source / "model.safetensors"
        save_file({key: value.to(torch.float8_e4m3fn) if ".mlp." in key else value for key, value in load_file(file).items()}, file)
    plan = plan_file(write_recipe(tmp_path))
    found = load_file(publish(plan, None, UNPROVED) / "model.safetensors")[UP]
    expected = load_file(tmp_path / "code" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
