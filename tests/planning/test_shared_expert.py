"""An expert of every token (ffn.shared_expert), in layouts that have one."""

import json
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

LAYOUT = "{path: out, layout: qwen2_moe}"
SHARED = "experts: [code, law]\nffn: {shared_expert: seed}"


def merged(
    folder: Path, text: str = SHARED, family: str = "qwen2", names: tuple[str, ...] = ("seed", "code", "law"), **options: Any
) -> Path:
    write_sources(folder, CONFIGS[family])
    return publish(plan_file(write_recipe(folder, text, "btx", names, LAYOUT)), None, MergeOptions(**options))


@pytest.mark.parametrize("family", ["qwen2", "llama", "llama_tied"])
def test_the_shared_expert_is_the_source_s_ffn(family: str, tmp_path: Path) -> None:
    path = merged(tmp_path, family=family, verify="full")
    found, own = load_file(path / "model.safetensors"), load_file(tmp_path / "seed" / "model.safetensors")
    for part in ("gate", "up", "down"):
        for layer in (0, 1):
            ours = found[f"model.layers.{layer}.mlp.shared_expert.{part}_proj.weight"]
            assert torch.equal(ours, own[f"model.layers.{layer}.mlp.{part}_proj.weight"])
    assert json.loads((path / "config.json").read_text())["shared_expert_intermediate_size"] == 40
    assert json.loads((path / "bam_merge.json").read_text())["recipe"]["ffn"]["shared_expert"] == "seed"
    (identity,) = [check for check in verify(path).checks if check.name == "identity"]
    assert "beside the shared expert, which is seed's FFN" in identity.detail


def test_its_gate_starts_as_a_router_does(tmp_path: Path) -> None:
    """Of zeros, which llama.cpp divides by, the layout's own ones."""
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    drawn = load_file(merged(tmp_path / "a", f"{SHARED}\nrouter: {{init: normal, std: 0.5}}") / "model.safetensors")[name]
    assert drawn.shape == (1, 32) and float(drawn.std()) == pytest.approx(0.5, rel=0.4)
    fixed = load_file(merged(tmp_path / "b", f"{SHARED}\nrouter: {{init: zeros}}") / "model.safetensors")[name]
    assert torch.equal(fixed, torch.ones(1, 32))


def test_transformers_computes_what_we_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = merged(tmp_path, f"{SHARED}\nrouter: {{init: normal, std: 0.5}}")
    found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, load_model(path)(ids), rtol=1e-4, atol=1e-5)


def test_zeros_are_what_it_is_without_a_word(tmp_path: Path) -> None:
    said = load_file(merged(tmp_path / "a", "ffn: {shared_expert: zeros}") / "model.safetensors")
    silent = load_file(merged(tmp_path / "b", "") / "model.safetensors")
    assert said.keys() == silent.keys() and all(torch.equal(said[name], silent[name]) for name in said)
    assert not said["model.layers.0.mlp.shared_expert.up_proj.weight"].any()


def test_a_source_that_is_only_the_shared_expert_is_used(tmp_path: Path) -> None:
    text = "experts: [code, law]\nffn: {shared_expert: seed}\nshared: {make: copy, from: code}"
    assert verify(merged(tmp_path, text)).ok


def test_the_cost_counts_it(tmp_path: Path) -> None:
    found, dense = inspect(merged(tmp_path)), inspect(tmp_path / "seed")
    assert found.cost.by_role["ffn.shared.up"] == dense.cost.by_role["ffn.up"]
    made = inspect(tmp_path / "seed", as_bam=2, top_k=2, shared_expert=True).mixtures["btx"]
    for role in ("ffn.shared.gate", "ffn.shared.up", "ffn.shared.down", "ffn.shared.router", "ffn.up", "router.ffn"):
        assert made.by_role[role] == found.cost.by_role[role]
        assert (made.active_by_role or {})[role] == (found.cost.active_by_role or {})[role]


# ---- what verification must catch ----------------------------------------------------------------------------------------------


def another_s(forge: Forger) -> None:
    for part in ("gate", "up", "down"):
        own = load_file(forge.folder.parent / "code" / "model.safetensors")[f"model.layers.1.mlp.{part}_proj.weight"]
        forge.write(f"model.layers.1.mlp.shared_expert.{part}_proj.weight", own)


def gate_and_up(forge: Forger) -> None:
    forge.swap(*(f"model.layers.1.mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up")))


@pytest.mark.parametrize("harm", [another_s, gate_and_up])
def test_a_shared_expert_that_is_another_is_found(harm: Any, tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False)
    assert verify(path).ok
    harm(Forger(path))
    found = failed(verify(path))
    assert {"copies", "expert isolation", "identity"} <= found.keys()
    assert "layer 1, shared expert (seed)" in found["expert isolation"]


# ---- what is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "method", "layout", "said"), [
    ("ffn: {shared_expert: sed}", "btx", "qwen2_moe", "ffn.shared_expert: 'sed' is not among the sources"),
    ("ffn: {shared_expert: seed}", "btx", "bam", "ffn.shared_expert: layout bam has no shared expert. Layouts that have one: cohere2_moe, dots1, glm4_moe, hunyuan_v1_moe, qwen2_moe, solar_open."),
    ("ffn: {shared_expert: zeros}", "bam", "bam", "ffn.shared_expert: layout bam has no shared expert."),
    ("ffn: {shared_expert: seed}", "merge", "qwen2", "ffn: method merge gives a dense model"),
])  # fmt: skip
def test_refused(text: str, method: str, layout: str, said: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["qwen2"])
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(tmp_path, text, method, output=f"{{path: out, layout: {layout}}}"))
    assert said in str(error.value)
