"""Verification of merges with adapters: what changed since is named, what is forged is found, by readings of its own."""

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, write_adapter
from conftest import CONFIGS, write_sources
from proofs import UNPROVED, Forger, failed
from safetensors.torch import load_file, save_file

from bam_merge.merging import source_rows as merging_rows
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.sources.adapters.config import AdapterConfig
from bam_merge.verifying import adapters
from bam_merge.verifying.verification import verify

MADE = "model.layers.1.self_attn.experts.1.q_proj.weight"
FACTOR = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A merge of a llama and two adapters on it, not proved."""
    write_sources(tmp_path, CONFIGS["llama"], ("seed",), "BF16")
    for number, name in enumerate(("code", "law")):
        write_adapter(tmp_path / name, tmp_path / "seed", seed=number)
    (tmp_path / "recipe.yaml").write_text(
        "method: bam\nsources: {seed: seed, code: {base: seed, adapter: code}, law: {base: seed, adapter: law}}\noutput: {path: out}\n"
    )
    return publish(plan_file(tmp_path / "recipe.yaml"), None, UNPROVED)


def changed(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def details(folder: Path) -> dict[str, tuple[bool | None, str]]:
    return {check.name: (check.ok, check.detail) for check in verify(folder).checks}


def test_as_it_was_merged(merged: Path) -> None:
    found = details(merged)
    assert [name for name, (ok, _) in found.items() if ok is not True] == []
    assert found["sources"] == (True, "3 folders, as they were merged")


def test_an_update_left_out_is_found(merged: Path) -> None:
    """The base's bytes in the place of the sum: by the tensors, and by what the model computes."""
    forge = Forger(merged)
    forge.write(MADE, forge.read("model.layers.1.self_attn.experts.0.q_proj.weight"))
    found = failed(verify(merged))
    assert MADE in found["merges"]
    assert "expected seed:model.layers.1.self_attn.q_proj.weight + lora(code)" in found["merges"]
    assert "layer 1, expert 1 (code)" in found["expert isolation"]


def test_experts_of_two_adapters_swapped(merged: Path) -> None:
    Forger(merged).swap(MADE, MADE.replace("experts.1", "experts.2"))
    found = failed(verify(merged))
    assert "layer 1, expert 1 (code): attention" in found["expert isolation"]
    assert "layer 1, expert 2 (law): attention" in found["expert isolation"]


@pytest.mark.parametrize("factor", [0.99, 1.01, 2.0])
def test_another_scale_is_found(merged: Path, factor: float) -> None:
    """Every number of one tensor off by a part of its update."""
    forge, base = Forger(merged), Forger(merged).read("model.layers.1.self_attn.experts.0.q_proj.weight").float()
    update = forge.read(MADE).float() - base
    forge.write(MADE, (base + factor * update).bfloat16())
    assert {"merges", "expert isolation"} <= failed(verify(merged)).keys()


def test_an_adapter_that_changed_is_named(merged: Path) -> None:
    """Its header as it was: only values tell."""
    changed(merged.parent / "code/adapter_model.safetensors", lambda tensors: tensors[FACTOR].mul_(1.5))
    found = details(merged)
    assert found["merges"][0] is False
    assert f"+ lora(code); code:{FACTOR}"[:40] in found["merges"][1]


def test_an_adapter_that_was_trained_on_is_named(merged: Path) -> None:
    """Another rank: another header. What does not depend on it is compared all the same."""
    write_adapter(merged.parent / "code", merged.parent / "seed", r=2, seed=5)
    report = verify(merged)
    assert report.ok, report.failures
    found = details(merged)
    assert found["sources"][0] is None
    assert "changed since the merge, so digests only: " in found["sources"][1]
    assert "code/adapter_config.json (r)" in found["sources"][1]
    assert "code/adapter_model.safetensors" in found["sources"][1]


def test_a_configuration_that_changed_is_named(merged: Path) -> None:
    """The same tensors, another alpha: what the plan would make now is not what was made."""
    file = merged.parent / "law/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 99}))
    report = verify(merged)
    assert report.ok, report.failures
    assert "law/adapter_config.json (lora_alpha)" in details(merged)["sources"][1]


def test_an_adapter_that_is_gone(merged: Path) -> None:
    (merged.parent / "law/adapter_config.json").unlink()
    (merged.parent / "law/adapter_model.safetensors").unlink()
    (merged.parent / "law").rmdir()
    report = verify(merged)
    assert report.ok
    assert details(merged)["sources"][1].startswith("not at hand, so digests only: sources.law: ")


@pytest.mark.parametrize(
    ("forgery", "words"),
    [
        (lambda m: m["sources"]["code"].update(path="law"), "sources are "),
        (lambda m: m["recipe"]["sources"].update(code={"base": "seed", "adapter": "law"}), "sources are "),
        (lambda m: m["sources"]["code"]["files"]["adapter_model.safetensors"]["tensors"].pop(FACTOR), "the digest of adapter_model.safetensors"),
        (lambda m: m["tensors"][MADE].update(expression="seed:model.layers.1.self_attn.q_proj.weight + lora(law)"), "the plan gives"),
        (lambda m: m["tensors"][MADE]["reads"].pop(), "reads is"),
    ],
)  # fmt: skip
def test_a_forged_record_is_found(merged: Path, forgery: Callable[[dict[str, Any]], Any], words: str) -> None:
    Forger(merged).record(forgery)
    assert words in failed(verify(merged))["provenance"]


def test_a_resumed_run_notices_an_adapter(merged: Path) -> None:
    """A finished result is left as it is only while its adapters are those that were merged; other ones make another run."""
    from bam_merge.publishing.publish import is_result

    plan = plan_file(merged.parent / "recipe.yaml")
    assert is_result(plan, merged, allow_nonfinite=False)
    file = merged.parent / "law/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 99}))
    other = plan_file(merged.parent / "recipe.yaml")
    assert other.fingerprint != plan.fingerprint
    assert not is_result(other, merged, allow_nonfinite=False)


MISREADINGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the scale": lambda patch: patch.setattr(AdapterConfig, "scale", lambda self, *names: 1.001 * self.lora_alpha / self.r),
    "the sign": lambda patch: patch.setattr(AdapterConfig, "scale", lambda self, *names: -self.lora_alpha / self.r),
    "one layer": lambda patch: patch.setattr(
        AdapterConfig, "scale", lambda self, *names: self.lora_alpha / self.r * (2 if ".1." in names[0] else 1)
    ),
    "the kernel": lambda patch: patch.setattr(merging_rows, "compute", lambda formula, inputs, start, stop: inputs[0].rows(start, stop)),
}


@pytest.mark.parametrize("misreading", MISREADINGS)
@pytest.mark.parametrize("method", ["bam", "btx", "merge"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_the_plan_misreads_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misreading: str, method: str, family: str
) -> None:
    """A fault of the first reading, or of the kernel, shows in what the second makes of the same files; in dense results too."""
    write_sources(tmp_path, CONFIGS[family], ("seed",), "F32")
    write_adapter(tmp_path / "code", tmp_path / "seed", ("q_proj", "qkv_proj", "down_proj"))
    shared = "shared: {make: copy, from: code}\n" if method == "merge" else ""
    (tmp_path / "recipe.yaml").write_text(
        f"method: {method}\nsources: {{seed: seed, code: {{base: seed, adapter: code}}}}\n{shared}output: {{path: out}}\n"
    )
    MISREADINGS[misreading](monkeypatch)
    plan = plan_file(tmp_path / "recipe.yaml")
    found = failed(verify(publish(plan, None, UNPROVED), plan))
    if (method, family) == ("btx", "llama") and misreading != "the kernel":  # attention is shared, and FFNs are the experts'
        assert "self_attn.q_proj" in found["adapters"]
    if misreading == "the kernel":
        assert "merges" in found
    else:
        assert ("expert isolation" if method == "bam" else "adapters") in found
    monkeypatch.undo()
    plan = plan_file(tmp_path / "recipe.yaml")
    report = verify(publish(plan, tmp_path / "right", UNPROVED), plan)
    assert report.ok, report.failures
    assert ("adapters" in {check.name for check in report.checks}) == (method != "bam")


def test_it_reads_adapters_by_code_of_its_own() -> None:
    tree = ast.parse(inspect.getsource(adapters))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {
        module for module in imported if module and module.startswith(("bam_merge.sources", "bam_merge.merging", "bam_merge.formulas"))
    }
