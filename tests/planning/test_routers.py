"""How routers start: what a recipe can ask for, what is refused before anything is written, and that what is planned passes verification."""

import math
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from proofs import UNPROVED, failed

from bam_merge.errors import BamMergeError, RecipeError
from bam_merge.expressions import NORMAL_REACH, Init, Normal, Orthogonal
from bam_merge.planning.make import plan_file
from bam_merge.planning.router_check import LARGEST_SUM, router_problem
from bam_merge.publishing.publish import publish
from bam_merge.values.streams import initialise
from bam_merge.verifying.verification import verify

NARROW = {**CONFIGS["llama"], "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
FOUR, FIVE = "experts: [seed, code, law, seed]\n", "experts: [seed, code, law, seed, seed]\n"


def problems(folder: Path, text: str, method: str = "bam", output: str = "{path: out}") -> list[str]:
    if not (folder / "seed").exists():
        write_sources(folder, NARROW)
    try:
        plan_file(write_recipe(folder, text, method, output=output))
    except RecipeError as error:
        return [problem.removeprefix(f"{folder}/recipe.yaml: ") for problem in error.problems]
    return []


TOO_MANY = "orthogonal: 5 experts, hidden_size is 4: at most 4 rows of 4 numbers can be orthogonal. Use at most 4 experts, or init: normal."


@pytest.mark.parametrize(("router", "key"), [
    ("router: {init: orthogonal}", "router"),
    ("router: {init: orthogonal, gain: 0.1}", "router"),
    ("router: {ffn: {init: orthogonal}}", "router.ffn"),
    ("router: {attention: {init: orthogonal}, ffn: {init: zeros}}", "router.attention"),
    ("rules: [{roles: [router.*], layers: 1, make: orthogonal}]", "rules[0]"),
    ("router: {init: orthogonal}\nrules: [{roles: [router.*], layers: 0, make: zeros}]", "router"),
])  # fmt: skip
def test_more_orthogonal_rows_than_columns_are_refused(router: str, key: str, tmp_path: Path) -> None:
    assert problems(tmp_path, FIVE + router) == [f"{key}: {TOO_MANY}"]
    assert problems(tmp_path, FOUR + router) == []


@pytest.mark.parametrize(("method", "router"), [
    ("btx", "router: {attention: {init: orthogonal}}"),
    ("bam", "router: {init: orthogonal}\nrules: [{roles: [router.*], make: normal}]"),
])  # fmt: skip
def test_what_no_router_starts_as_is_not_refused(method: str, router: str, tmp_path: Path) -> None:
    assert problems(tmp_path, FIVE + router, method) == []


def test_as_many_orthogonal_rows_as_columns_pass_verification(tmp_path: Path) -> None:
    write_sources(tmp_path, NARROW)
    plan = plan_file(write_recipe(tmp_path, FOUR + "router: {init: orthogonal, gain: 3}"))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)
    rows = initialise(Orthogonal(3.0), (4, 4), 0, "any").double()
    assert torch.allclose(rows @ rows.T, 9 * torch.eye(4, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize(("router", "dtype", "found"), [
    ("{init: normal, std: 6000}", "float16", "std 6000: values of up to 7.26e+04, and a router in F16 computes with up to 6.55e+04."),
    ("{init: normal, std: 1e-8}", "float16", "std 1e-08: below 5.96e-08, the smallest number of F16: values would be 0."),
    ("{init: uniform, bound: 65505}", "float16", "bound 65505: values of up to 6.55e+04, and a router in F16 computes with up to 6.55e+04."),
    ("{init: orthogonal, gain: 1e5}", "float16", "gain 100000: values of up to 1e+05,"),
    ("{init: normal, std: 1e300}", "source", "std 1e+300: values of up to 1.21e+301, and a router in F32 computes with up to 3.4e+30."),
    ("{init: normal, std: 1e-60}", "bfloat16", "std 1e-60: below 9.18e-41, the smallest number of BF16: values would be 0."),
    ("{init: uniform, bound: 1e-310}", "float32", "bound 1e-310: below 1.4e-45, the smallest number of F32: values would be 0."),
    ("{init: orthogonal, gain: 1e38}", "bfloat16", "gain 1e+38: values of up to 1e+38, and a router in BF16 computes with up to 3.4e+30."),
])  # fmt: skip
def test_what_the_output_cannot_hold_is_refused(router: str, dtype: str, found: str, tmp_path: Path) -> None:
    [problem] = problems(tmp_path, f"router: {router}", output=f"{{path: out, dtype: {dtype}}}")
    assert problem.startswith(f"router: {found}")


@pytest.mark.parametrize("router", ["{init: normal, std: 5000}", "{init: uniform, bound: 65504}", "{init: orthogonal, gain: 65504}",
                                    "{init: normal, std: 1e-6}", "{init: uniform, bound: 1e-7}", "{init: zeros}"])  # fmt: skip
def test_what_it_just_holds_passes_verification(router: str, tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    plan = plan_file(write_recipe(tmp_path, f"router: {router}", output="{path: out, dtype: float16}"))
    report = verify(publish(plan, None, UNPROVED), plan)
    assert report.ok, failed(report)


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "-.inf", "1e999", "true", "'0.1'", "[0.1]", "null"])
@pytest.mark.parametrize(("init", "key"), [("normal", "std"), ("uniform", "bound"), ("orthogonal", "gain")])
def test_no_scale_but_a_finite_number_above_zero(init: str, key: str, value: str, tmp_path: Path) -> None:
    found = problems(tmp_path, f"router: {{init: {init}, {key}: {value}}}")
    if (init, value) == ("uniform", "null"):  # the default, 1/sqrt(hidden size)
        assert found == []
    else:
        assert len(found) == 1
        assert f"router.{key}: found" in found[0]


def test_the_reach_of_normal_numbers_covers_what_is_drawn() -> None:
    values = initialise(Normal(1.0), (1000, 1000), 0, "any")
    assert 4 < float(values.abs().max()) < NORMAL_REACH


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("F64", torch.float32), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
def test_the_range_of_every_dtype_is_torchs(dtype: str, torch_dtype: torch.dtype) -> None:
    """float64 ones are drawn in float32."""
    info = torch.finfo(torch_dtype)
    least, largest = info.smallest_normal * info.eps, min(info.max, LARGEST_SUM)

    def problem(gain: float) -> str | None:
        return router_problem(Init(Orthogonal(gain), "router", 0, dtype, (2, 4)), dtype)

    assert problem(least) is None is problem(largest)
    assert "values would be 0" in (problem(math.nextafter(least, 0)) or "")
    assert "Use a smaller gain" in (problem(math.nextafter(largest, math.inf)) or "")


def test_what_a_layout_says_of_routers_from_texts_is_possible(tmp_path: Path) -> None:
    """gemma4's routers see what no text shows here; every way out that the message names is one."""
    write_sources(tmp_path, CONFIGS["gemma4_text"])
    for name in SOURCES:
        (tmp_path / f"{name}.txt").write_text("some words of text " * 40)
    texts = ", ".join(f"{name}: {name}.txt" for name in SOURCES)

    def recipe(router: str, layout: str = "gemma4") -> Path:
        return write_recipe(tmp_path, f"router: {router}\nffn: {{top_k: 2}}", "btx", output=f"{{path: out, layout: {layout}}}")

    with pytest.raises(BamMergeError) as error:
        plan_file(recipe(f"{{init: ridge, texts: {{{texts}}}}}"))
    (said,) = [problem for problem in error.value.problems if "gemma4's routers see" in problem]
    words = said.partition("Use router.init: ")[2].partition(", or layout: bam.")[0].replace(" or ", ", ").split(", ")
    assert words == ["normal", "uniform", "zeros", "orthogonal"]
    for word in words:
        assert plan_file(recipe(f"{{init: {word}}}")).layout.name == "gemma4"
