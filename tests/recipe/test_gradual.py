"""Numbers of a make that are a gradient over the layers: what each layer gets, what is refused, and that the merge and its proof follow."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bam_merge import MergeOptions
from bam_merge.errors import BamMergeError, RecipeError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.recipe.load import parse_recipe
from bam_merge.recipe.makes.gradual import at, knots
from bam_merge.verifying.verification import verify

FIVE = {**CONFIGS["llama"], "num_hidden_layers": 5}


def plan(folder: Path, text: str) -> Plan:
    write_sources(folder, FIVE)
    return plan_file(write_recipe(folder, text, "merge"))


def arguments(plan: Plan, role: str) -> dict[int | None, str]:
    """What the calls of a role's tensors show of their numbers, by layer."""
    return {step.layer: step.expression.partition("; ")[2].partition(")")[0] for step in plan.steps if step.role == role}


def test_a_gradient_over_all_layers(tmp_path: Path) -> None:
    """The embeddings are before the first layer, the last norm and the head behind the last."""
    found = plan(
        tmp_path, "shared: {make: slerp, from: [code, law], t: [0.1, 0.9, 0.3]}\nrules: [{roles: [norm.attn], make: copy, from: seed}]"
    )
    assert arguments(found, "attn.q") == {0: "t=0.1", 1: "t=0.5", 2: "t=0.9", 3: "t=0.6", 4: "t=0.3"}
    assert (arguments(found, "embed"), arguments(found, "norm.final"), arguments(found, "head")) == (
        {None: "t=0.1"},
        {None: "t=0.3"},
        {None: "t=0.3"},
    )


@pytest.mark.parametrize(("layers", "expected"), [
    ('"1-3"', {1: "t=0", 2: "t=0.5", 3: "t=1"}),
    ('"0,2,4"', {0: "t=0", 2: "t=0.5", 4: "t=1"}),
    ("2", {2: "t=1"}),
])  # fmt: skip
def test_a_gradient_over_the_layers_of_a_rule(layers: str, expected: dict[int, str], tmp_path: Path) -> None:
    rule = f"{{roles: [attn.q], layers: {layers}, make: slerp, from: [code, law], t: [0, 1]}}"
    found = arguments(plan(tmp_path, f"rules: [{rule}]"), "attn.q")
    assert {layer: text for layer, text in found.items() if text} == expected


def test_weights_and_several_numbers_each_by_itself(tmp_path: Path) -> None:
    text = "shared: {make: ties, base: seed, density: [0.2, 0.6], weights: {code: [1, 2, 1], law: 0.5}, scale: [1, 0.2]}"
    found = arguments(plan(tmp_path, text), "ffn.up")
    assert found[0] == "base=seed, density=0.2, weights=1/0.5"
    assert found[1] == "base=seed, density=0.3, weights=1.5/0.5, scale=0.8"
    assert found[4] == "base=seed, density=0.6, weights=1/0.5, scale=0.2"


def test_the_merge_follows_and_is_proved(tmp_path: Path) -> None:
    found = plan(tmp_path, "shared: {make: task_arithmetic, base: seed, scale: [0, 1], weights: {code: 1}}")
    folder = publish(found, tmp_path / "out", MergeOptions(verify=False))
    assert verify(folder, found).ok
    ours, seed, code = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "seed", "code"))
    for layer, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert float((ours[name] - (seed[name] + share * (code[name] - seed[name]))).abs().max()) < 1e-7
    assert (folder / "bam_merge.json").read_text().count('"scale": [') == 1
    assert verify(folder).ok  # planned anew from the manifest


def upcycled(folder: Path, experts: str, rules: str = "") -> Plan:
    write_sources(folder, FIVE)
    file = folder / "recipe.yaml"
    file.write_text(f"method: sparse_upcycling\nsources: {{seed: seed}}\nexperts: {experts}\noutput: {{path: out}}\n{rules}")
    return plan_file(file)


def test_experts_that_differ_by_layers(tmp_path: Path) -> None:
    """A share of 0 is the source's tensor as it is: no call, and the last layer's bytes are the seed's."""
    found = upcycled(tmp_path, "{count: 2, make: drop, ratio: [1, 0.5, 0]}")
    shares = {0: "ratio=1", 1: "ratio=0.75", 2: "ratio=0.5", 3: "ratio=0.25"}
    assert arguments(found, "ffn.down") == {layer: f"{text}, units=columns" for layer, text in shares.items()} | {4: ""}
    folder = publish(found, tmp_path / "out", MergeOptions(verify=False))
    assert verify(folder, found).ok and verify(folder).ok
    ours, seed = load_file(folder / "model.safetensors"), load_file(tmp_path / "seed" / "model.safetensors")
    units = FIVE["intermediate_size"]
    for layer, drawn in enumerate((units, units * 3 // 4, units // 2, units // 4, 0)):
        there = seed[f"model.layers.{layer}.mlp.up_proj.weight"]
        assert int((ours[f"model.layers.{layer}.mlp.experts.1.up_proj.weight"] != there).any(1).sum()) == drawn


def test_noise_by_the_layers_of_a_rule(tmp_path: Path) -> None:
    rules = "rules: [{roles: [ffn.*], layers: '1-3', make: noise, std: [0.01, 0.03], share: [1, 0]}]"
    found = upcycled(tmp_path, "[seed, seed]", rules)
    assert arguments(found, "ffn.up") == {0: "", 1: "std=0.01, share=1", 2: "std=0.02, share=0.5", 3: "", 4: ""}
    assert verify(publish(found, tmp_path / "out", MergeOptions(verify=False)), found).ok


@pytest.mark.parametrize(("experts", "said"), [
    ("{count: 2, make: drop, ratio: [0.5, 1.5]}", "experts.ratio[1]: found 1.5, expected at most 1"),
    ("{count: 2, make: drop, ratio: []}", "experts.ratio: found [], expected at least 1 entry"),
    ("{count: 2, make: noise, std: [0.1, 0]}", "experts.std[1]: found 0, expected more than 0"),
    ("{count: 2, make: noise, std: [1, 1.0e+39]}", "experts.std: found 1e+39, expected a magnitude"),
])  # fmt: skip
def test_what_is_refused_of_experts_that_differ(experts: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BamMergeError) as error:
        upcycled(tmp_path, experts)
    assert said in str(error.value)


@pytest.mark.parametrize(("text", "said"), [
    ("{make: slerp, from: [code, law], t: []}", "shared.t: found [], expected at least 1 entry"),
    ("{make: slerp, from: [code, law], t: [0.1, 1.5]}", "shared.t[1]: found 1.5, expected at most 1"),
    ("{make: slerp, from: [code, law], t: [0.1, x]}", "shared.t[1]: found 'x', expected a number"),
    ("{make: slerp, from: [code, law], t: [[0, 1]]}", "shared.t[0]: found [0, 1], expected a number"),
    ("{make: ties, base: seed, density: [0.5, 0]}", "shared.density[1]: found 0, expected more than 0"),
    ("{make: linear, weights: {code: [0, 1], law: [1, 0.2, 0]}}", "shared.weights: 0.5 of the way through the layers: sum to 0.7, expected 1"),
    ("{make: task_arithmetic, base: seed, scale: [1, 1.0e+39]}", "shared.scale: found 1e+39, expected a magnitude"),
    ("{make: task_arithmetic, base: seed, weights: {code: [1, 1.0e+39]}}", "shared.weights.code: found 1e+39, expected a magnitude"),
])  # fmt: skip
def test_what_is_refused(text: str, said: str, llamas: Path) -> None:
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(llamas, f"shared: {text}", "merge"))
    assert [said in problem for problem in error.value.problems] == [True]


def test_weights_that_sum_to_one_everywhere(llamas: Path) -> None:
    plan_file(write_recipe(llamas, "shared: {make: linear, weights: {code: [0.1, 0.9], law: [0.9, 0.5, 0.1]}}", "merge"))


numbers = st.lists(st.integers(-1000, 1000).map(lambda value: value / 100), min_size=1, max_size=6)


@given(numbers, st.fractions(0, 1))
def test_a_gradient_is_straight_between_its_numbers(values: list[float], place: Fraction) -> None:
    """Against the formula of a straight line; at a number it is that number itself."""
    gradient: Any = tuple(values)
    found = at({"t": gradient, "name": "code", "from": ("code", "law")}, place)
    assert (found["name"], found["from"]) == ("code", ("code", "law"))
    exact = [Fraction(round(value * 100), 100) for value in values]
    steps = len(values) - 1
    expected = next(
        (a + (b - a) * (place * steps - i) for i, (a, b) in enumerate(pairwise(exact)) if i <= place * steps <= i + 1),
        exact[0],
    )
    assert found["t"] == float(expected)
    for knot in knots({"t": gradient}):
        assert at(gradient, knot) == values[int(knot * steps)]


def test_a_recipe_without_lists_is_recorded_as_before() -> None:
    recipe = parse_recipe({
        "method": "merge", "sources": {"seed": "a", "code": "b", "law": "c"}, "output": {"path": "out"},
        "shared": {"make": "ties", "base": "seed", "density": 0.5, "weights": {"code": 1, "law": 0.5}},
    })  # fmt: skip
    assert recipe.resolved()["shared"] == {
        "make": "ties",
        "base": "seed",
        "density": 0.5,
        "weights": {"code": 1.0, "law": 0.5},
        "scale": 1.0,
    }
