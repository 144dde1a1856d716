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
from bam_merge.demo.synthetic import random_values, write_checkpoint
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


# ---- nothing weighs it --------------------------------------------------------------------------------------------------------

OPEN = {"solar_open": "llama", "glm4_moe": "qwen3", "dots1": "qwen3", "hunyuan_v1_moe": "hunyuan_v1_dense", "cohere2_moe": "cohere2"}
"""Layouts whose shared expert has no gate, and a family for each."""
BESIDE = {"hunyuan_v1_moe": "shared_mlp"}
ROUTED = "router: {init: normal, std: 0.5}"


def in_layout(
    folder: Path, layout: str, ffn: str, more: str = "", method: str = "btx", names: tuple[str, ...] = ("seed", "code", "law")
) -> Path:
    gate = "topk_then_sigmoid" if layout in ("solar_open", "glm4_moe", "dots1") else "topk_then_softmax"
    config = CONFIGS[OPEN[layout]] | ({"logit_scale": 0.5} if layout == "cohere2_moe" else {})
    for number, name in enumerate(names):
        write_checkpoint(folder / name, config, random_values(number, 0.2))
    text = f"ffn: {{{ffn}, gate: {gate}}}\n{ROUTED}\n{more}"
    return publish(
        plan_file(write_recipe(folder, text, method, names, f"{{path: out, layout: {layout}}}")), None, MergeOptions(verify="full")
    )


@pytest.mark.parametrize("layout", OPEN)
@torch.no_grad()
def test_a_source_s_ffn_is_added_as_transformers_does(layout: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scale = ", gate_scale: 0.5" if layout in ("solar_open", "glm4_moe", "dots1") else ""
    path = in_layout(tmp_path, layout, f"shared_expert: seed, top_k: 2{scale}", "experts: [code, law]")
    own = load_file(tmp_path / "seed" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    name = f"model.layers.1.mlp.{BESIDE.get(layout, 'shared_experts')}.down_proj.weight"
    assert torch.equal(load_file(path / "model.safetensors")[name], own)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = found.eval()(ids).logits
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(load_model(path)(ids), expected, rtol=1e-4, atol=1e-5)
    report = verify(path)
    assert report.ok, failed(report)


@pytest.mark.parametrize("layout", OPEN)
@torch.no_grad()
def test_what_it_does_to_step_0(layout: str, tmp_path: Path) -> None:
    """Copies of the seed beside the seed: where both are added the FFN counts twice; where they are averaged, or the shared one is zeros, it
    is the seed's."""
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    for shared, copies in (("zeros", True), ("seed", layout == "cohere2_moe")):
        folder = tmp_path / shared
        path = in_layout(folder, layout, f"shared_expert: {shared}, top_k: 2", "experts: [seed, seed, seed]", "sparse_upcycling", ("seed",))
        apart = float((load_model(path)(ids) - load_model(folder / "seed")(ids)).abs().max())
        assert apart < 1e-5 if copies else apart > 0.05


def test_the_plan_says_what_it_does_to_step_0(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    output = "{path: out, layout: solar_open}"
    said = plan_file(
        write_recipe(tmp_path, "ffn: {shared_expert: seed, gate: topk_then_sigmoid, gate_scale: 0.5}", "btx", output=output)
    ).notes
    (note,) = [note for note in said if "shared_expert" in note]
    assert "seed's FFN is added to every token's" in note
    assert (
        "an FFN that equals it counts 1.5 times (gate_scale 0.5 for the chosen experts, and 1), so step 0 is not the dense models'" in note
    )
    quiet = plan_file(write_recipe(tmp_path, "ffn: {gate: topk_then_sigmoid}", "btx", output=output)).notes
    assert not [note for note in quiet if "shared_expert" in note]
    write_sources(tmp_path, CONFIGS["cohere2"])
    limit, note = plan_file(write_recipe(tmp_path, "ffn: {shared_expert: code}", "btx", output="{path: out, layout: cohere2_moe}")).notes
    assert limit == "output.layout: cohere2_moe: shared_experts is 1: llama.cpp was not tried with a shared expert."
    assert note.startswith(
        "ffn.shared_expert: every token gets half of what its experts give and half of what code's FFN gives. Copies of code"
    )


def test_one_that_nobody_asked_for_is_not_there(tmp_path: Path) -> None:
    """In cohere2_moe, which does without."""
    path = in_layout(tmp_path, "cohere2_moe", "top_k: 2")
    assert not [name for name in load_file(path / "model.safetensors") if "shared" in name]
    assert json.loads((path / "config.json").read_text())["num_shared_experts"] == 0


# ---- what verification must catch ----------------------------------------------------------------------------------------------


def another_s(forge: Forger) -> None:
    for part in ("gate", "up", "down"):
        own = load_file(forge.folder.parent / "code" / "model.safetensors")[f"model.layers.1.mlp.{part}_proj.weight"]
        forge.write(f"model.layers.1.mlp.shared_expert.{part}_proj.weight", own)


def doubled(forge: Forger) -> None:
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    forge.write(name, 2 * forge.read(name))


def biased(forge: Forger) -> None:
    forge.write("model.layers.0.mlp.gate.e_score_correction_bias", torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("harm", "checks"), [(doubled, {"copies", "expert isolation", "identity"}), (biased, {"routers"})])
def test_what_glm4_moe_has_besides_is_proved(harm: Any, checks: set[str], tmp_path: Path) -> None:
    path = in_layout(tmp_path, "glm4_moe", "shared_expert: seed, top_k: 1", "experts: [code, law]")
    assert verify(path).ok
    harm(Forger(path))
    assert checks <= failed(verify(path)).keys()


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
    ("ffn: {shared_expert: seed}", "btx", "bam", "ffn.shared_expert: layout bam has no shared expert. Layouts that have one: cohere2_moe, dots1, ernie4_5_moe, glm4_moe, granitemoehybrid_moe, hunyuan_v1_moe, qwen2_moe, qwen3_5_moe, solar_open."),
    ("ffn: {shared_expert: zeros}", "bam", "bam", "ffn.shared_expert: layout bam has no shared expert."),
    ("ffn: {shared_expert: seed}", "merge", "qwen2", "ffn: method merge gives a dense model"),
])  # fmt: skip
def test_refused(text: str, method: str, layout: str, said: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["qwen2"])
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(tmp_path, text, method, output=f"{{path: out, layout: {layout}}}"))
    assert said in str(error.value)


def test_shards_beside_one_whole_ffn(tmp_path: Path) -> None:
    """Of as many shards' width where a key says how many experts wide it is; where none does, it is refused."""
    shards = "experts: {count: 8, make: virtual_group, shards: 4}\nffn: {shared_expert: seed, gate: GATE}"
    write_sources(tmp_path, CONFIGS["llama"])
    text = shards.replace("GATE", "topk_then_sigmoid")
    plan = plan_file(write_recipe(tmp_path, text, "sparse_upcycling", ("seed",), "{path: out, layout: glm4_moe}"))
    assert (plan.config["n_shared_experts"], plan.config["moe_intermediate_size"]) == (4, 10)
    assert verify(publish(plan, None, MergeOptions())).ok
    write_sources(tmp_path, CONFIGS["hunyuan_v1_dense"])
    text = shards.replace("GATE", "topk_then_softmax")
    with pytest.raises(
        RecipeError, match=r"ffn\.shared_expert: layout hunyuan_v1_moe has one as wide as an expert, and experts are here shards"
    ):
        plan_file(write_recipe(tmp_path, text, "sparse_upcycling", ("seed",), "{path: out, layout: hunyuan_v1_moe}"))
    plan = plan_file(
        write_recipe(tmp_path, text.replace("seed,", "zeros,"), "sparse_upcycling", ("seed",), "{path: out, layout: hunyuan_v1_moe}")
    )
    assert {step.shape for step in plan.steps if step.role == "ffn.shared.up"} == {(10, 32)}


def test_one_expert_is_compared_without_it(tmp_path: Path, run: Any) -> None:
    path = merged(tmp_path)
    result = run("diff", f"{path}#experts.1", tmp_path / "law", "--only", "ffn.*")
    assert result.status == 0, result.out
    assert "the shared expert's" in result.out
