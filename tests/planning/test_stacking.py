"""Layers of sources behind one another (output.layers): what they become, what of config.json follows them, what is refused and found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from proofs import Forger, failed
from safetensors.torch import load_file

from bam_merge import MergeOptions, load_model, verify
from bam_merge.errors import BamMergeError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import load_recipe
from bam_merge.recipe.rules import list_layers
from bam_merge.verifying.stack import origins

LAYERS = '[{from: seed, layers: "0-2"}, {from: code, layers: "1-"}, {from: seed, layers: 3}]'
ORIGINS = [("seed", 0), ("seed", 1), ("seed", 2), ("code", 1), ("code", 2), ("code", 3), ("seed", 3)]


def deep(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The configuration with four layers."""
    lists = {key: (value * 2)[:4] for key, value in config.items() if key in ("layer_types", "no_rope_layers")}
    return {**config, **lists, "num_hidden_layers": 4, **changes}


def stacked(folder: Path, config: dict[str, Any], layers: str = LAYERS, text: str = "", **options: Any) -> tuple[Path, Plan]:
    write_sources(folder, deep(config), names=("seed", "code"))
    plan = plan_file(write_recipe(folder, text, "merge", ("seed", "code"), output=f"{{path: out, layers: {layers}}}"))
    return publish(plan, None, MergeOptions(**options)), plan


def test_every_layer_is_that_of_its_source(tmp_path: Path) -> None:
    path, plan = stacked(tmp_path, CONFIGS["llama"], verify="full")
    found = load_file(path / "model.safetensors")
    own = {name: load_file(tmp_path / name / "model.safetensors") for name in ("seed", "code")}
    for place, (source, layer) in enumerate(ORIGINS):
        for rest in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            assert torch.equal(found[f"model.layers.{place}.{rest}"], own[source][f"model.layers.{layer}.{rest}"])
    assert torch.equal(found["model.embed_tokens.weight"], own["seed"]["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], own["seed"]["lm_head.weight"])
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 7
    assert set(plan.unused["code"].values()) >= {"output.layers has no layer 0 of code"}
    (check,) = [check for check in verify(path).checks if check.name == "layers"]
    assert check.ok and check.detail.startswith("all 7 are the layers of their sources")


def test_embeddings_are_of_the_first_and_the_head_is_of_the_last_one(tmp_path: Path) -> None:
    """As mergekit has it; a rule, or `shared`, says otherwise."""
    layers = '[{from: seed, layers: "0-1"}, {from: code, layers: "2-3"}]'
    path, _ = stacked(tmp_path / "a", CONFIGS["llama"], layers)
    found = load_file(path / "model.safetensors")
    own = {name: load_file(tmp_path / "a" / name / "model.safetensors") for name in ("seed", "code")}
    assert torch.equal(found["model.embed_tokens.weight"], own["seed"]["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], own["code"]["lm_head.weight"])
    assert torch.equal(found["model.norm.weight"], own["code"]["model.norm.weight"])
    _, plan = stacked(tmp_path / "b", CONFIGS["llama"], layers, "shared: {make: mean}\nrules: [{roles: [head], make: copy, from: seed}]")
    made = {step.role: step.expression for step in plan.steps if step.layer is None}
    assert made == {"embed": "mean(seed, code)", "norm.final": "mean(seed, code)", "head": "seed:lm_head.weight"}
    assert verify(tmp_path / "b" / "out").ok


def test_one_source_can_be_repeated(tmp_path: Path) -> None:
    """Depth up-scaling as SOLAR has it (arXiv 2312.15166): the first layers, then the last ones, with an overlap."""
    write_sources(tmp_path, deep(CONFIGS["llama_tied"]), names=("seed",))
    output = '{path: out, layers: [{from: seed, layers: "0-2"}, {from: seed, layers: "1,1,2-3"}]}'
    path = publish(plan_file(write_recipe(tmp_path, "", "merge", ("seed",), output=output)), None, MergeOptions())
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 7
    assert origins(load_recipe(tmp_path / "recipe.yaml"), {"seed": 4}) == [("seed", n) for n in (0, 1, 2, 1, 1, 2, 3)]
    assert "lm_head.weight" not in load_file(path / "model.safetensors")


def test_sources_of_different_depths(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], names=("seed",))
    write_sources(tmp_path, deep(CONFIGS["llama"]), names=("x", "code"))
    output = '{path: out, layers: [{from: seed, layers: "0-1"}, {from: code, layers: "2-3"}]}'
    path = publish(plan_file(write_recipe(tmp_path, "", "merge", ("seed", "code"), output=output)), None, MergeOptions())
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 4
    assert verify(path).ok


WINDOWED = [
    "ministral",
    "ministral_sliding",
    "cohere2",
    "cohere2_biased",
    "smollm3",
    "smollm3_sliding",
    "starcoder2",
    "cwm_biased",
    "mistral",
]


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_and_turning_layers_follow(family: str, tmp_path: Path) -> None:
    path, _ = stacked(tmp_path, CONFIGS[family], verify="full")
    mine, theirs = (load_model(folder) for folder in (path, tmp_path / "seed"))
    for place, (_, layer) in enumerate(ORIGINS):
        attention, own = mine.model.layers[place].self_attn, theirs.model.layers[layer].self_attn
        assert (attention.window, attention.rotates) == (own.window, own.rotates)


@pytest.mark.parametrize("family", ["llama", "ministral", "smollm3", "cohere2"])
def test_transformers_computes_the_layers_in_that_order(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path, _ = stacked(tmp_path, CONFIGS[family])
    found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(ids), found(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_numbers_in_order_as_often_as_they_stand() -> None:
    assert list_layers("4,0-2,2", 8) == [4, 0, 1, 2, 2]
    assert list_layers(" 6-", 8) == [6, 7]


# ---- what is refused ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ('[{from: seed, layers: "0-4"}, {from: code, layers: 0}]', "", "output.layers[0].layers: of seed: layer 4 does not exist; the model's layers are 0 to 3."),
    ('[{from: seed, layers: "2-1"}]', "", "output.layers[0].layers: '2-1' is an empty layer range."),
    ('[{from: seed, layers: "0-1"}, {from: cod, layers: 0}]', "", "output.layers[1].from: 'cod' is not among the sources"),
    ("[]", "", "output.layers: found [], expected at least 1 entry."),
    ("[{from: seed}]", "", "output.layers[0].layers: is required and missing"),
    ('[{from: seed, layers: "0-1"}]', "rules: [{roles: [attn.*], make: mean}]", "rules[0]: output.layers says what every layer is"),
    ('[{from: seed, layers: "0-1"}]', "rules: [{roles: [embed], layers: 0, make: mean}]", "rules[0]: output.layers says what every layer is"),
    ('[{from: seed, layers: "0-1"}]', "", "sources.code: never used"),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "text", "said"), REFUSED)
def test_refused(layers: str, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BamMergeError) as error:
        stacked(tmp_path, CONFIGS["llama"], layers, text)
    assert said in str(error.value)


def test_other_methods_put_no_layers_behind_one_another(llamas: Path) -> None:
    with pytest.raises(BamMergeError, match=r"output.layers: layers are put behind one another by method merge; bam makes experts"):
        plan_file(write_recipe(llamas, output='{path: out, layers: [{from: seed, layers: "0-1"}]}'))


def test_families_that_differ_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], names=("seed",))
    write_sources(tmp_path, CONFIGS["qwen2"], names=("x", "code"))
    output = '{path: out, layers: [{from: seed, layers: "0-1"}, {from: code, layers: "0-1"}]}'
    with pytest.raises(BamMergeError, match=r"sources.code: family qwen2, sources.seed is llama"):
        plan_file(write_recipe(tmp_path, "", "merge", ("seed", "code"), output=output))


def test_what_is_no_matter_of_layers_is_refused_as_ever(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], names=("seed",))
    write_sources(tmp_path, {**deep(CONFIGS["llama"]), "rms_norm_eps": 1e-6}, names=("x", "code"))
    output = '{path: out, layers: [{from: seed, layers: "0-1"}, {from: code, layers: "0-1"}]}'
    with pytest.raises(BamMergeError) as error:
        plan_file(write_recipe(tmp_path, "", "merge", ("seed", "code"), output=output))
    assert "rms_norm_eps" in str(error.value) and "num_hidden_layers" not in str(error.value)


def test_two_sizes_of_windows_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["mistral"], names=("seed",))
    write_sources(tmp_path, {**CONFIGS["mistral"], "sliding_window": 8}, names=("x", "code"))
    output = '{path: out, layers: [{from: seed, layers: "0-1"}, {from: code, layers: "0-1"}]}'
    with pytest.raises(
        BamMergeError, match=r"config.json has one size of sliding windows for all layers, these have 16 in layers of seed; 8"
    ):
        plan_file(write_recipe(tmp_path, "", "merge", ("seed", "code"), output=output))


def test_layers_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"], names=("seed",))
    write_sources(tmp_path, CONFIGS["llama"], names=("x", "code"), dtype="BF16")
    output = '{path: out, layers: [{from: seed, layers: "0-1"}, {from: code, layers: "0-1"}]DTYPE}'
    with pytest.raises(BamMergeError, match=r"output.dtype: source keeps what is stored, but the layers disagree: .* is F32; .* is BF16"):
        plan_file(write_recipe(tmp_path, "", "merge", ("seed", "code"), output=output.replace("DTYPE", "")))
    plan = plan_file(write_recipe(tmp_path, "", "merge", ("seed", "code"), output=output.replace("DTYPE", ", dtype: bfloat16")))
    assert verify(publish(plan, None, MergeOptions())).ok


def test_an_order_that_no_config_can_say_is_refused(tmp_path: Path) -> None:
    """mistral has a window in every layer or in none: a layer of each cannot stand in one model."""
    write_sources(tmp_path, CONFIGS["mistral"], names=("seed",))
    write_sources(tmp_path, {**CONFIGS["mistral"], "sliding_window": None}, names=("x", "code"))
    output = '{path: out, layers: [{from: seed, layers: "0-1"}, {from: code, layers: "0-1"}]}'
    with pytest.raises(BamMergeError, match=r"a config.json of mistral cannot say these layers \(sliding windows in layers \{0-1\}"):
        plan_file(write_recipe(tmp_path, "", "merge", ("seed", "code"), output=output))


# ---- what verification must catch ----------------------------------------------------------------------------------------------


def swapped_layers(forge: Forger) -> None:
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        forge.swap(*(f"model.layers.{layer}.{name}.weight" for layer in (1, 3)))


def a_window(forge: Forger) -> None:
    types = json.loads((forge.folder / "config.json").read_text())["layer_types"]
    forge.config(layer_types=["sliding_attention" if kind == "full_attention" else "full_attention" for kind in types])


@pytest.mark.parametrize("harm", [swapped_layers, a_window])
def test_a_layer_that_is_another_one_is_found(harm: Any, tmp_path: Path) -> None:
    path, _ = stacked(tmp_path, CONFIGS["ministral"], verify=False)
    assert verify(path).ok
    harm(Forger(path))
    found = failed(verify(path))
    assert "layers" in found
    assert "is not layer" in found["layers"]
