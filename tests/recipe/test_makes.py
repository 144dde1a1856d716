"""What is said of the keys of makes for shared tensors: their bounds, what goes together, and how many sources a method needs."""

from pathlib import Path

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge.errors import RecipeError
from bam_merge.planning.make import plan_file


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("makes")
    write_sources(folder, CONFIGS["llama"])
    return folder


@pytest.mark.parametrize(("shared", "said"), [
    ("{make: della, base: seed, density: 0.1}", "shared.epsilon: entries would be kept with probabilities from -0.05 to 0.25, which must lie above 0, and at most at 1. With density 0.1 epsilon is less than 0.1."),
    ("{make: della, base: seed, density: 0.9}", "shared.epsilon: entries would be kept with probabilities from 0.75 to 1.05"),
    ("{make: della, base: seed, density: [0.5, 0.95]}", "shared.epsilon: 1 of the way through the layers: entries would be kept"),
    ("{make: della, base: seed}", "shared.density: is required and missing"),
    ("{make: della, base: seed, density: 0}", "shared.density: found 0, expected more than 0"),
    ("{make: breadcrumbs, base: seed, density: 0.5, gamma: 1.5}", "shared.gamma: found 1.5, expected at most 1"),
    ("{make: breadcrumbs, base: seed, density: 0.5, gama: 0.1}", "shared.gama: unknown key; did you mean 'gamma'?"),
    ("{make: ram, base: seed, epsilon: 0}", "shared.epsilon: found 0, expected more than 0"),
    ("{make: ram, base: seed, epsilon: 1.0e-40}", "shared.epsilon: found 1e-40, expected a magnitude from 1e-30"),
    ("{make: sce, base: seed, density: 1.5}", "shared.density: found 1.5, expected at most 1"),
    ("{make: sce, density: 0.5}", "shared.base: is required and missing"),
    ("{make: model_stock, base: seed, weights: {code: 1}}", "shared.weights: unknown key"),
    ("{make: karcher, base: seed}", "shared.base: unknown key"),
    ("{make: nuslerp, from: [code, code], t: 0.5}", "shared.from: nuslerp needs two different sources"),
    ("{make: nuslerp, from: [code, law], t: 0.5, by: columns}", "shared.by: found 'columns', expected tensor or rows"),
    ("{make: dare_linear, base: sead, density: 0.5}", "shared: names the source 'sead', which is not among the sources; did you mean 'seed'?"),
])  # fmt: skip
def test_what_is_refused(shared: str, said: str, sources: Path) -> None:
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(sources, f"shared: {shared}", "merge"))
    assert any(said in problem for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize("make", ["{make: model_stock, base: seed}", "{make: sce, base: seed, density: 0.5}"])
def test_methods_that_compare_sources_need_two(make: str, sources: Path) -> None:
    with pytest.raises(RecipeError) as error:
        plan_file(write_recipe(sources, f"shared: {make}", "merge", ("seed", "code")))
    name = make.split()[1].rstrip(",")
    (problem,) = error.value.problems
    assert (
        f"shared: {name} needs 2 sources or more beside the base, found code alone. Name others in experts, or use task_arithmetic."
        in problem
    )


@pytest.mark.parametrize("make", [
    "{make: della, base: seed, density: 1}", "{make: della, base: seed, density: 0.5, epsilon: 0}", "{make: della, base: seed, density: 0.5, epsilon: 0.49}",
    "{make: ram, base: seed}", "{make: breadcrumbs, base: seed, density: 1, gamma: 0.5}", "{make: dare_linear, base: seed, density: 0.1}",
])  # fmt: skip
def test_one_source_beside_the_base_will_do_for_the_others(make: str, sources: Path) -> None:
    plan = plan_file(write_recipe(sources, f"shared: {make}", "merge", ("seed", "code")))
    assert all(step.expression.startswith(make.split()[1].rstrip(",") + "(code; base=seed") for step in plan.steps)


def test_a_karcher_mean_of_one_source_is_that_one(sources: Path) -> None:
    """As the mean is: in Sparse Upcycling, where all experts are one model."""
    plan = plan_file(write_recipe(sources, "experts: [seed, seed]\nshared: {make: karcher}", "sparse_upcycling", ("seed",)))
    assert {step.expression for step in plan.steps if step.role == "embed"} == {"seed:model.embed_tokens.weight"} or {
        step.expression for step in plan.steps if step.role == "embed"
    } == {"seed"}
