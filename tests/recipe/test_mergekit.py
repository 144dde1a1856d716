"""Recipes of mergekit that are given by mistake: recognised, and said in our words, which plan and give the numbers that they ask for."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, Result, write_sources
from proofs import UNPROVED
from safetensors.torch import load_file
from vocabularies import tokenizer_json

from bam_merge.errors import ForeignRecipe, RecipeError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import load_recipe, parse_recipe
from bam_merge.recipe.mergekit import equivalent, is_mergekit
from bam_merge.recipe.mergekit_settings import _evaluated

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import mergekit_parity

NAMES = ("base", "code", "law", "math")
TIES = """
models:
  - model: base  # no parameters necessary
  - {model: code, parameters: {density: 0.5, weight: 0.5}}
  - {model: law, parameters: {density: 0.5, weight: 0.3}}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
"""
SLERP = """
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: code, layer_range: [0, 4]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float32
"""
LINEAR = "merge_method: linear\nmodels: [{model: code, parameters: {weight: 3}}, {model: law, parameters: {weight: 1}}]\n"
MOE = """
base_model: base
gate_mode: GATE
experts:
  - {source_model: code, positive_prompts: ["def f(x):"]}
  - {source_model: law, positive_prompts: [whereas], negative_prompts: ["def"]}
  - {source_model: code, positive_prompts: [class]}
"""
REMARKS = {
    "path": "# * paths are relative to this file; mergekit's are relative to where it is run.",
    "bfloat16": "# * mergekit computes in bfloat16; here it is float32, rounded once, so the last bits differ.",
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Four small models of four layers, far enough apart for every method to be well defined."""
    write_sources(tmp_path, {**CONFIGS["llama"], "num_hidden_layers": 4}, NAMES)
    for name in NAMES[1:]:
        path = tmp_path / name / "model.safetensors"
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(len(name))
        save_file({key: value + 0.2 * torch.randn(value.shape, generator=generator) for key, value in load_file(path).items()}, path)
    return tmp_path


def converted(folder: Path, text: str, run: Any) -> Path:
    """The recipe that is printed for one of mergekit's, saved; that it plans is checked."""
    (folder / "mergekit.yml").write_text(text)
    result: Result = run("plan", folder / "mergekit.yml")
    assert result.status == 2
    assert result.err.startswith(f"error: {folder}/mergekit.yml: this is a recipe of mergekit") and result.err.count("\n") == 1
    path = folder / "recipe.yaml"
    path.write_text(result.out)
    plan = plan_file(path)
    assert plan.recipe.file == str(path)
    return path


def merged(folder: Path, text: str, run: Any) -> dict[str, torch.Tensor]:
    return load_file(publish(plan_file(converted(folder, text, run)), folder / "out", UNPROVED) / "model.safetensors")


def of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in load_file(folder / name / "model.safetensors").items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double() - expected).abs().max() <= 1e-6 * expected.abs().max())


# ---- what is printed -------------------------------------------------------------------------------------------------------


def test_ties(models: Path, run: Any) -> None:
    path = converted(models, TIES, run)
    lines = path.read_text().splitlines()
    assert lines[0] == "# What a recipe of mergekit (merge_method: ties) asks for, as one of bam-merge."
    assert "# * int8_mask is how mergekit stores its masks, and changes no number: left out." in lines
    assert REMARKS["bfloat16"] in lines and REMARKS["path"] in lines
    assert [line for line in lines if not line.startswith("#")] == [
        "method: merge",
        "sources: {seed: base, code: code, law: law}",
        "shared: {make: ties, base: seed, density: 0.5, weights: {code: 0.5, law: 0.3}}",
        "output: {path: merged, dtype: bfloat16}",
    ]


def test_linear_is_divided_by_its_weights(models: Path, run: Any) -> None:
    found = merged(models, LINEAR, run)
    text = (models / "recipe.yaml").read_text()
    assert "shared: {make: linear, weights: {code: 0.75, law: 0.25}}" in text
    assert "mergekit divides by the sum of the weights; here they are written as shares of it" in text
    code, law = of(models, "code"), of(models, "law")
    assert all(close(found[name], (3 * code[name] + law[name]) / 4) for name in found)


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.1, 0.7, 0.3), (1 / 3, 1 / 7, 10), (1e-3, 5, 2)])
def test_shares_sum_to_one_whatever_the_weights(weights: tuple[float, ...], models: Path, run: Any) -> None:
    listed = [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(NAMES[1:], weights, strict=True)]
    found = merged(models, yaml.safe_dump({"merge_method": "linear", "models": listed}), run)
    parts = [of(models, name) for name in NAMES[1:]]
    for name, tensor in found.items():
        assert close(tensor, sum(w * part[name] for w, part in zip(weights, parts, strict=True)) / sum(weights))  # type: ignore[arg-type]


def test_a_gradient_by_filters_is_the_same_for_every_tensor(models: Path, run: Any) -> None:
    """mergekit's most copied recipe: five values over the layers, other ones for attention and FFN."""
    found = merged(models, SLERP, run)
    text = (models / "recipe.yaml").read_text()
    assert "  - {roles: [attn.*], layers: '0', make: copy, from: seed}\n" in text
    assert "shared: {make: slerp, from: [seed, code], t: 0.5}\n" in text
    settings = yaml.safe_load(SLERP)["parameters"]["t"]
    base, code = of(models, "base"), of(models, "code")
    for name, tensor in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        t = _evaluated(settings, name, 0.0 if layer is None else layer / 3)  # as mergekit 0.1.5 has it
        a, b = base[name].flatten(), code[name].flatten()
        angle = torch.arccos((a @ b / a.norm() / b.norm()).clamp(-1, 1))
        expected = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        assert close(tensor.flatten(), expected), (name, t)


def test_settings_are_looked_up_as_mergekit_does() -> None:
    """The first filter that is in the name counts, a list is a line through its values, and what no filter covers has the default."""
    assert _evaluated([0, 0.5, 0.3, 0.7, 1], "x", 0.5) == pytest.approx(0.3)
    assert _evaluated([0, 1], "x", 0.25) == 0.25 and _evaluated([2], "x", 0.7) == 2
    assert _evaluated([0.1, 0.2, 0.4], "x", 1.0) == 0.4
    conditions = [{"filter": "mlp", "value": 1}, {"filter": "*", "value": [2, 4]}, {"value": 9}]
    assert (_evaluated(conditions, "a.mlp.b", 0.5), _evaluated(conditions, "a.b", 0.5)) == (1, 3)
    assert _evaluated([{"filter": "mlp", "value": 1}], "a.b", 0.5) is None
    assert _evaluated({"filter": "q_proj", "value": 7}, "self_attn.q_proj.weight", 0) == 7


def test_a_models_own_parameters_count_before_the_common_ones(models: Path, run: Any) -> None:
    text = """
models: [{model: code, parameters: {weight: [{filter: mlp, value: [0, 0.6]}, {value: 2}]}}, {model: law}]
merge_method: task_arithmetic
base_model: base
parameters: {weight: 0.5, lambda: 0.5}
"""
    found = merged(models, text, run)
    base, code, law = (of(models, name) for name in ("base", "code", "law"))
    for name, tensor in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        weight = 0.6 * layer / 3 if ".mlp." in name else 2
        expected = base[name] + 0.5 * (weight * (code[name] - base[name]) + 0.5 * (law[name] - base[name]))
        assert close(tensor, expected), name


def test_normalised_task_arithmetic_and_one_model_that_is_not(models: Path, run: Any) -> None:
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: code, parameters: {weight: 1}}, {model: law, parameters: {weight: 3}}]\nparameters: {normalize: true}\n"
    found = merged(models, text, run)
    base, code, law = (of(models, name) for name in ("base", "code", "law"))
    assert all(close(found[n], base[n] + (code[n] - base[n]) / 4 + 3 * (law[n] - base[n]) / 4) for n in found)
    shutil.rmtree(models / "out")
    text = "merge_method: dare_ties\nbase_model: base\nmodels: [{model: code, parameters: {weight: 0.5, density: 1.0}}]\n"
    found = merged(models, text, run)
    assert all(close(found[n], base[n] + 0.5 * (code[n] - base[n])) for n in found)


@pytest.mark.parametrize(("gate", "router", "remark"), [
    ("random", "router: {init: normal, std: 1.0}", ""),
    ("uniform_random", "router: {init: uniform}", ""),
    ("hidden", "router: {init: normal, std: 0.02}", "gate_mode hidden makes the routers of the hidden states of the prompts in every layer; here they start at random"),
    ("cheap_embed", "router: {init: normal, std: 0.02}", "gate_mode cheap_embed makes the routers of the embeddings of the prompts, the same in every layer; here they"),
])  # fmt: skip
def test_a_mixture(gate: str, router: str, remark: str, models: Path, run: Any) -> None:
    found = merged(models, MOE.replace("GATE", gate), run)
    text = (models / "recipe.yaml").read_text()
    assert "experts: [code, law, code]\nshared: {make: copy, from: seed}\nffn: {top_k: 2, gate: topk_then_softmax}\n" in text
    assert router in text and "layout: mixtral" in text
    assert remark in " ".join(line.removeprefix("#").strip().removeprefix("* ") for line in text.splitlines())
    assert ("prompts" in text) == bool(remark)
    base, law = of(models, "base"), of(models, "law")
    assert torch.equal(found["model.layers.3.self_attn.q_proj.weight"].double(), base["model.layers.3.self_attn.q_proj.weight"])
    assert torch.equal(found["model.layers.2.input_layernorm.weight"].double(), base["model.layers.2.input_layernorm.weight"])
    assert torch.equal(found["model.layers.1.block_sparse_moe.experts.1.w2.weight"].double(), law["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize("gate", ["hidden", "cheap_embed"])
def test_a_mixture_whose_routers_are_made_of_the_prompts(gate: str, models: Path, run: Any) -> None:
    """Where the base model has a tokenizer to read them with: one row for an expert that stands twice, of the prompts of both."""
    for name in ("base", "code", "law"):
        (models / name / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    text = (
        MOE.replace("GATE", gate)
        .replace("def f(x):", "ab cd")
        .replace("[whereas]", "[gh, gh gh]")
        .replace('["def"]', "[ab]")
        .replace("[class]", "[b]")
    )
    found = merged(models, text, run)
    text = (models / "recipe.yaml").read_text()
    assert "router: {init: mean, prompts: {code: [ab cd, b], law: [gh, gh gh]}, negative_prompts: {law: [ab]}}" in text
    said = " ".join(line.removeprefix("#").strip() for line in text.splitlines())
    assert "has one row here, of the prompts of both" in said and "its rows have length 1" in said and "start at random" not in said
    gate_NxD = found["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(gate_NxD[0], gate_NxD[2]) and not torch.equal(gate_NxD[0], gate_NxD[1])


def test_dare_says_that_it_draws(models: Path, run: Any) -> None:
    text = TIES.replace("merge_method: ties", "merge_method: dare_ties")
    path = converted(models, text, run)
    assert "DARE draws at random which entries it drops" in path.read_text()
    assert "make: dare_ties, base: seed, density: 0.5, weights: {code: 0.5, law: 0.3}" in path.read_text()


def test_names_paths_and_what_stands_beside(tmp_path: Path) -> None:
    """Ids of the hub with odd names, an adapter behind a plus, two of one name, and what is not carried over."""
    document = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in ("org/A b@main", "other/A b", "~/seed", "x+adapters/y", "/abs/z")],
        "tokenizer_source": "union", "chat_template": "chatml", "out_dtype": "float16", "random_seed": 7,
    }  # fmt: skip
    found = equivalent(document, tmp_path)
    assert found.lacks == [] and found.text is not None
    recipe = yaml.safe_load(found.text)
    assert recipe["sources"] == {
        "A-b": "org/A b@main",
        "A-b-2": "other/A b",
        "seed-2": "~/seed",
        "y": {"base": "x", "adapter": "adapters/y"},
        "z": "/abs/z",
    }
    assert recipe["output"] == {"path": "merged", "dtype": "float16"} and recipe["random_seed"] == 7
    assert [text.partition(" is not carried")[0] for text in found.differs if "not carried" in text] == [
        "tokenizer_source: union",
        "chat_template",
    ]
    parse_recipe(recipe)


def test_layers_behind_one_another(tmp_path: Path) -> None:
    """mergekit's ranges end before their last number; ours with it."""
    ranges = [("org/a", [0, 24]), ("org/b", [8, 32]), ("org/a", [5, 6])]
    slices = [{"sources": [{"model": model, "layer_range": of}]} for model, of in ranges]
    found = equivalent({"merge_method": "passthrough", "dtype": "bfloat16", "base_model": "org/b", "slices": slices}, tmp_path)
    assert found.lacks == [] and found.text is not None
    recipe = yaml.safe_load(found.text)
    assert recipe["sources"] == {"seed": "org/b", "a": "org/a"}
    assert recipe["output"]["layers"] == [{"from": "a", "layers": "0-23"}, {"from": "seed", "layers": "8-31"}, {"from": "a", "layers": "5"}]
    assert parse_recipe(recipe).output.layers is not None


def test_long_sections_stand_on_lines_of_their_own() -> None:
    listed = [{"model": f"organisation/a-model-with-a-long-name-{n}", "parameters": {"weight": 1.0}} for n in range(5)]
    text = equivalent({"merge_method": "linear", "models": listed}).text
    assert text is not None and "sources:\n  a-model-with-a-long-name-0: organisation/a-model-with-a-long-name-0\n" in text
    assert max(map(len, text.splitlines())) < 300
    parse_recipe(yaml.safe_load(text))


# ---- what has no equivalent --------------------------------------------------------------------------------------------------


def listed(*models: str, **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": model, "parameters": parameters} for model in models]


LACKS: dict[str, tuple[dict[str, Any], str]] = {
    "passthrough of nothing": ({"merge_method": "passthrough", "models": listed("a")}, "passthrough needs slices, each with one model and its layer_range"),
    "passthrough of two": ({"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}]}, "slice 0 must have one source"),
    "passthrough of no layer": ({"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [2, 2]}]}]}, "layer_range [2, 2] of slice 0; expected two numbers"),
    "passthrough with a scale": ({"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"scale": 0.5}}]}]}, "parameters of slice 0 (scale), which multiply layers"),
    "an unknown method": ({"merge_method": "nearswap", "models": listed("a")}, "merge_method 'nearswap'; the methods with an equivalent are linear, slerp, task_arithmetic, ties, dare_ties, dare_linear, breadcrumbs, della, model_stock, sce, ram, nuslerp, karcher, passthrough"),
    "a method with a typo": ({"merge_method": "lineer", "models": listed("a", weight=1)}, "merge_method 'lineer'; did you mean 'linear'; the methods"),
    "several slices": ({"merge_method": "linear", "slices": [{"sources": []}, {"sources": []}]}, "several slices, which put layers of models behind one another"),
    "layers that are not all": ({"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [2, 4]}]}]}, "layer_range [0, 2], [2, 4]: other layers than all of every model"),
    "modules": ({"merge_method": "linear", "modules": {}, "models": listed("a", weight=1)}, "modules, which merge the parts of a model apart"),
    "weights without a sum of one": ({"merge_method": "linear", "models": listed("a", "b", weight=1), "parameters": {"normalize": False}}, "linear with normalize: false and weights that sum to 2, which scales every tensor; here they sum to one"),
    "weights that cancel": ({"merge_method": "linear", "models": [*listed("a", weight=1), *listed("b", weight=-1)]}, "weights that sum to zero"),
    "no weight": ({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}, "weight of a, b must be a number, found None"),
    "slerp of three": ({"merge_method": "slerp", "base_model": "a", "models": listed("a", "b", "c"), "parameters": {"t": 0.5}}, "slerp needs base_model and one other model, found 3 model(s)"),
    "slerp beyond the end": ({"merge_method": "slerp", "base_model": "a", "models": listed("b"), "parameters": {"t": 1.5}}, "t = 1.5; here it is from 0 to 1"),
    "a gradient of nobody knows how many layers": ({"merge_method": "slerp", "base_model": "a", "models": listed("b"), "parameters": {"t": [0, 1]}}, "a gradient over the layers, and nothing says how many there are: write layer_range"),
    "densities that differ": ({"merge_method": "ties", "base_model": "a", "models": [*listed("b", weight=1, density=0.5), *listed("c", weight=1, density=0.3)]}, "densities that differ (b 0.5, c 0.3); here all have one"),
    "negative weights": ({"merge_method": "ties", "base_model": "a", "models": listed("b", weight=-1)}, "negative weights of ties: mergekit divides by the sum of the weights as they are, here it is that of their magnitudes"),
    "sums that are not divided": ({"merge_method": "dare_ties", "base_model": "a", "models": listed("b", "c", weight=1, density=0.5)}, "dare_ties with normalize: false (its default): mergekit adds up the differences whose sign agrees, here they are averaged. Set normalize: true"),
    "no base": ({"merge_method": "ties", "models": listed("b", "c", weight=1)}, "ties needs base_model and other models"),
    "a density of nothing": ({"merge_method": "ties", "base_model": "a", "models": listed("b", weight=1, density=0)}, "density = 0; here it is above 0, and at most 1"),
    "another dtype": ({"merge_method": "linear", "dtype": "int8", "models": listed("a", "b", weight=1)}, "dtype 'int8'; here it is float32, float16, bfloat16"),
    "a key of nobody": ({"merge_method": "linear", "models": listed("a", weight=1), "tokeniser_source": "base"}, "the key 'tokeniser_source', which mergekit does not have; did you mean 'tokenizer_source'"),
    "a slice with a base": ({"merge_method": "linear", "slices": [{"base_model": "a", "sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1}}]}]}, "base_model or parameters of a slice; write them at the top"),
    "a model that is a number": ({"merge_method": "linear", "models": [{"model": 3}]}, "a model must be a path or an id, found 3"),
    "models that are none": ({"merge_method": "linear", "models": "a"}, "models must be a list of {model: ..., parameters: ...}"),
    "nothing": ({"merge_method": "linear", "models": []}, "there are no models in it"),
    "shared experts": ({"base_model": "a", "experts": [{"source_model": "b"}, {"source_model": "c"}], "shared_experts": [{"source_model": "a"}]}, "shared_experts: experts of every token"),
    "a scaled expert": ({"base_model": "a", "gate_mode": "random", "experts": [{"source_model": "b", "residual_scale": 0.1}, {"source_model": "c"}]}, "residual_scale of an expert, which scales the expert's output"),
    "deepseek": ({"base_model": "a", "architecture": "deepseek", "gate_mode": "random", "experts": [{"source_model": "b"}, {"source_model": "c"}]}, "architecture 'deepseek'; the layouts with an equivalent are mixtral, qwen3, qwen3_moe"),
    "a gate of nobody": ({"base_model": "a", "gate_mode": "randon", "experts": [{"source_model": "b"}, {"source_model": "c"}]}, "gate_mode 'randon'; did you mean 'random'; known are"),
    "experts of no base": ({"gate_mode": "random", "experts": [{"source_model": "b"}, {"source_model": "c"}]}, "base_model is missing, the model that all but the FFNs is of"),
    "more per token than there are": ({"base_model": "a", "gate_mode": "random", "experts_per_token": 3, "experts": [{"source_model": "b"}, {"source_model": "c"}]}, "experts_per_token 3 of 2 experts"),
}  # fmt: skip


@pytest.mark.parametrize("name", LACKS)
def test_what_has_no_equivalent_is_named(name: str, tmp_path: Path, run: Any) -> None:
    document, message = LACKS[name]
    (tmp_path / "m.yml").write_text(yaml.safe_dump(document))
    result: Result = run("plan", tmp_path / "m.yml")
    assert (result.status, result.out) == (2, "")
    first, *others = [line.removeprefix(f"error: {tmp_path}/m.yml: ") for line in result.err.splitlines()]
    assert first.startswith("this is a recipe of mergekit")
    assert any(line.startswith(f"no equivalent here: {message}") for line in others), others
    with pytest.raises(ForeignRecipe) as caught:
        load_recipe(tmp_path / "m.yml")
    assert caught.value.instead is None and len(caught.value.problems) > 1


def test_our_own_recipes_are_none_of_mergekits() -> None:
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")):
        assert not is_mergekit(yaml.safe_load(path.read_text())), path
    for document in (
        {},
        [],
        "x",
        {"method": "bam"},
        {"sources": {}, "merge_method": "x"},
        {"experts": ["a"]},
        {"models": {"a": 1}},
        {"base_model": "x"},
    ):
        assert not is_mergekit(document)
    with pytest.raises(RecipeError, match="unknown key"):
        parse_recipe({"method": "merge", "sources": {"a": "a"}, "merge_method": "ties", "output": {"path": "x"}})


# ---- the cases that are compared with mergekit itself ------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*mergekit_parity.ALIKE, *mergekit_parity.CONVERTED], ids=lambda case: case.name)
def test_what_is_compared_with_mergekit_is_what_is_printed(case: Any, tmp_path: Path) -> None:
    """`make test-mergekit` runs these in both tools: the recipe that is printed for mergekit's is the one that was compared with it."""
    mergekit_parity.write_models(tmp_path / "models")
    text = equivalent(case.theirs(tmp_path / "models"), tmp_path).text
    assert text is not None
    recipe = {**yaml.safe_load(text), "output": {"path": "out"}}
    plan = plan_file(_written(tmp_path / "printed.yaml", recipe))
    if case.shared:
        ours = plan_file(_written(tmp_path / "ours.yaml", case.ours("models", "out2")))
        mine, theirs = ([(step.name, step.expression.replace(" as F32", "")) for step in p.steps] for p in (plan, ours))
        assert mine == theirs
    else:
        assert len({step.expression.partition(":")[0] for step in plan.steps}) >= 1 and plan.steps


def _written(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_gradient_has_its_first_number_in_head_and_last_norm_too(models: Path, run: Any) -> None:
    """As mergekit 0.1.5 has it, which `make test-mergekit` compares; a gradient of our own has its last there."""
    text = "merge_method: slerp\nbase_model: base\nmodels: [{model: base}, {model: code}]\nparameters: {t: [0.1, 0.7]}\n"
    plan = plan_file(converted(models, text, run))
    shown = {(step.role, step.layer): step.expression for step in plan.steps}
    for place in (("embed", None), ("norm.final", None), ("head", None), ("attn.q", 0)):
        assert "t=0.1" in shown[place]
    assert "t=0.3)" in shown["attn.q", 1] and "t=0.7" in shown["attn.q", 3]


NEW = {
    "model_stock": ({}, {}, "{make: model_stock, base: seed}"),
    "sce": ({}, {"select_topk": 0.3}, "{make: sce, base: seed, density: 0.3}"),
    "ram": ({}, {}, "{make: ram, base: seed, epsilon: 1.0e-05}"),
    "breadcrumbs": ({"weight": 0.5, "density": 0.6}, {"lambda": 0.7}, "{make: breadcrumbs, base: seed, density: 0.6, gamma: 0.01, weights: {code: 0.5, law: 0.5}, scale: 0.7}"),
    "dare_linear": ({"weight": 1, "density": 0.6}, {"normalize": True}, "{make: dare_linear, base: seed, density: 0.6, weights: {code: 0.5, law: 0.5}}"),
    "della": ({"weight": 1, "density": 0.6, "epsilon": 0.2}, {}, "{make: della, base: seed, density: 0.6, epsilon: 0.2, weights: {code: 1, law: 1}}"),
}  # fmt: skip


@pytest.mark.parametrize("method", NEW)
def test_methods_of_differences(method: str, models: Path, run: Any) -> None:
    own, common, expected = NEW[method]
    listed_models = [{"model": name, "parameters": own} for name in ("code", "law")]
    document = {"merge_method": method, "base_model": "base", "models": listed_models, "parameters": common}
    found = yaml.safe_load(converted(models, yaml.safe_dump(document), run).read_text())
    assert found["shared"] == yaml.safe_load(expected)
    assert found["sources"] == {"seed": "base", "code": "code", "law": "law"}


def test_methods_on_the_sphere(models: Path, run: Any) -> None:
    pair = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("code", 1), ("law", 3))]
    for flat, by in (({}, {}), ({"nuslerp_flatten": False}, {"by": "rows"})):
        found = yaml.safe_load(
            converted(models, yaml.safe_dump({"merge_method": "nuslerp", "models": pair, "parameters": flat}), run).read_text()
        )
        assert found["shared"] == {"make": "nuslerp", "from": ["code", "law"], "t": 0.75, **by}
    found = yaml.safe_load(
        converted(models, yaml.safe_dump({"merge_method": "karcher", "models": listed("code", "law", "math")}), run).read_text()
    )
    assert (found["shared"], list(found["sources"])) == ({"make": "karcher"}, ["code", "law", "math"])


@pytest.mark.parametrize(("document", "message"), [
    ({"merge_method": "model_stock", "base_model": "a", "models": listed("b")}, "model_stock needs base_model and two other models"),
    ({"merge_method": "model_stock", "base_model": "a", "models": listed("b", "c"), "parameters": {"filter_wise": True}}, "filter_wise: true"),
    ({"merge_method": "ram", "base_model": "a", "models": listed("b"), "parameters": {"epsilon": 0}}, "epsilon = 0; here it is above 0"),
    ({"merge_method": "sce", "models": listed("b", "c")}, "sce needs base_model"),
    ({"merge_method": "nuslerp", "base_model": "a", "models": listed("b", "c", weight=1)}, "nuslerp with a base_model"),
    ({"merge_method": "nuslerp", "models": listed("b", "c", "d", weight=1)}, "nuslerp needs two models, found 3"),
    ({"merge_method": "nuslerp", "models": listed("b", "c", weight=1), "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}}, "nuslerp_row_wise: true"),
    ({"merge_method": "karcher", "base_model": "a", "models": listed("b", "c")}, "karcher with a base_model that is not among the models"),
    ({"merge_method": "della", "base_model": "a", "models": listed("b", weight=1, density=0.9)}, "density 0.9 with epsilon 0.15"),
    ({"merge_method": "breadcrumbs", "base_model": "a", "models": listed("b", weight=1, density=0.9), "parameters": {"rescale": True}}, "breadcrumbs with rescale: true"),
    ({"merge_method": "breadcrumbs", "base_model": "a", "models": [*listed("b", weight=1, gamma=0.1), *listed("c", weight=1, gamma=0.2)]}, "gamma that differs between the models"),
])  # fmt: skip
def test_what_the_methods_here_have_not(document: Any, message: str, tmp_path: Path) -> None:
    assert any(text.startswith(message) for text in equivalent(document, tmp_path).lacks), equivalent(document, tmp_path).lacks


NORM = "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: FILTER, value: 0.2}, {value: 0.5}]}}, {model: b, parameters: {weight: [{filter: FILTER, value: 0.8}, {value: 0.5}]}}]\n"


@pytest.mark.parametrize(("family", "wanted", "lacking"), [
    ("llama", "post_attention_layernorm", None),
    ("phi3", "mlp", None),
    ("phi3", "q_proj", "model.layers.{layer}.self_attn.qkv_proj.weight, which is attn.q"),
    ("gemma2", "mlp", "model.layers.{layer}.post_attention_layernorm.weight, which is norm.attn.post"),
    ("olmo2", "post_attention_layernorm", "model.layers.{layer}.post_attention_layernorm.weight, which is norm.attn.post"),
])  # fmt: skip
def test_filters_by_names_that_mean_other_tensors(family: str, wanted: str, lacking: str | None, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path, CONFIGS[family], ("a", "b"))
    (tmp_path / "m.yml").write_text(NORM.replace("FILTER", wanted))
    result: Result = run("plan", tmp_path / "m.yml")
    assert result.status == 2
    assert ("no equivalent here" in result.err) == (lacking is not None), result.err
    assert lacking is None or f"filters and gradients for models whose names mean other tensors than Llama's: {lacking}" in result.err
