"""Numbers of a recipe that float32 cannot work with are refused in the plan, before anything is written."""

from pathlib import Path

import pytest
from conftest import write_recipe
from pydantic import create_model

from bam_merge.errors import RecipeError
from bam_merge.planning.magnitudes import _factors
from bam_merge.planning.make import plan_file
from bam_merge.recipe import makes


@pytest.mark.parametrize(("key", "text"), [
    ("shared.weights.code", "shared: {make: linear, weights: {seed: 1.0e+300, code: -1.0e+300, law: 1}}"),
    ("shared.scale", "shared: {make: task_arithmetic, base: seed, scale: 1.0e+39}"),
    ("shared.scale", "shared: {make: task_arithmetic, base: seed, scale: -1.0e-31}"),
    ("rules[0].weights.law", "rules: [{roles: [norm.*], make: ties, base: seed, density: 0.5, weights: {code: 1, law: 1.0e-300}}]"),
    ("rules[1].scale", "rules: [{roles: [head], make: mean}, {roles: [embed], make: dare_ties, base: seed, density: 0.5, scale: 1.0e+31}]"),
])  # fmt: skip
def test_factors_that_float32_cannot_hold_are_refused(key: str, text: str, llamas: Path) -> None:
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(llamas, text, "merge"))
    found = [problem for problem in error.value.problems if f"recipe.yaml: {key}: found " in problem]
    assert len(found) == 1
    assert "expected a magnitude from 1e-30 to 1e+30" in found[0]


@pytest.mark.parametrize("scale", ["1.0e+16", "1.0e-16", "1.0e+300"])
def test_a_gate_scale_that_overflows_or_vanishes_is_refused(scale: str, llamas: Path) -> None:
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(llamas, f"ffn: {{gate_scale: {scale}}}"))
    [problem] = error.value.problems
    assert f"ffn.gate_scale: found {float(scale):g}, expected 1e-15 to 1e+15" in problem


def test_factors_at_the_edge_are_planned(llamas: Path) -> None:
    shared = "shared: {make: task_arithmetic, base: seed, scale: 0, weights: {code: 1.0e+30, law: -1.0e-30}}"
    plan_file(write_recipe(llamas, f"{shared}\nffn: {{gate_scale: 1.0e+15}}"))


def test_the_numbers_of_any_make_are_looked_at() -> None:
    """Of a method that is still to come too: whatever key it has, unless its limits keep it within 1."""
    make = create_model("Toy", __base__=makes.Ties, strength=(makes.Finite, 1e39), share=(makes.Density, 1e-39))
    toy = make.model_validate({"make": "ties", "base": "seed", "density": 1e-39, "weights": {"code": 1e31}})
    assert dict(_factors(toy)) == {"weights.code": 1e31, "scale": 1.0, "strength": 1e39}
