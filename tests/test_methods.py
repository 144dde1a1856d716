"""Merge methods and initialisers: each is four places, none of them can be forgotten, and a toy that has all four merges and verifies."""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import CONFIGS, write_recipe, write_sources
from safetensors.torch import load_file
from test_kernels import BY_HAND, DRAWN_BY_HAND, run
from torch.profiler import ProfilerActivity, profile
from toy_methods import INITIALISER, METHOD, package_with, run_in

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Read
from bam_merge.merging import kernels
from bam_merge.planning.fill import CONSTANTS
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import BASE_MEMORY, chunk_elements
from bam_merge.recipe import makes
from bam_merge.recipe.rules import makes_of
from bam_merge.recipe.schema import schema
from bam_merge.records import INITIALISERS, METHODS, About
from bam_merge.values import streams
from bam_merge.verifying import rederive

REFERENCE = Path(__file__).parents[1] / "docs" / "reference" / "recipe.md"

# ---- a toy ---------------------------------------------------------------------------------------------------------------------

RECIPE = "shared: {make: largest, base: seed, scale: 0.5}\nrouter: {init: signs, step: 0.01}"

RUN = """
import bam_merge.recipe.load
from bam_merge import MergeOptions, load_recipe, make_plan, merge, verify
recipe = load_recipe("recipe.yaml")
plan = make_plan(recipe)
print(*sorted({step.expression for step in plan.steps if step.role in ("head", "router.ffn")}), plan.peak_memory(1), sep="\\n")
merge(recipe, options=MergeOptions(verify=False))
print("merged")
report = verify("out")
print(*(f"{check.name}: {check.detail}" for check in report.failures))
print("verified", report.ok)
"""


def follow(tmp_path: Path, *additions: Mapping[str, str], without: str = "", text: str = RECIPE) -> tuple[str, str]:
    """What planning, merging and verifying with the toys says, on stdout and stderr."""
    write_sources(tmp_path, CONFIGS["llama"])
    write_recipe(tmp_path, text)
    done = run_in(package_with(tmp_path, *additions, without=without), "-c", RUN)
    return done.stdout, done.stderr


def test_a_method_and_an_initialiser_in_four_places(tmp_path: Path) -> None:
    out, err = follow(tmp_path, METHOD, INITIALISER)
    assert out.splitlines()[:2] == ["largest(code, law; base=seed, scale=0.5)", "signs(step=0.01)"]
    assert int(out.splitlines()[2]) > BASE_MEMORY
    assert out.splitlines()[3:] == ["merged", "", "verified True"], err
    found = load_file(tmp_path / "out" / "model.safetensors")
    base, code, law = (load_file(tmp_path / name / "model.safetensors")["lm_head.weight"] for name in ("seed", "code", "law"))
    chosen = torch.where((law - base).abs() > (code - base).abs(), law, code)
    torch.testing.assert_close(found["lm_head.weight"], base + (chosen - base) / 2)
    routers = [value for name, value in found.items() if "router" in name]
    assert routers
    assert all(set(value.abs().flatten().tolist()) == {float(torch.tensor(0.01))} for value in routers)


FORGOTTEN = [
    (METHOD, "recipe/makes/task_vectors.py", "", "shared.make: 'largest' is none of mean, copy, linear"),
    (METHOD, "expressions/task_vectors.py", "", "module 'bam_merge.expressions' has no attribute 'Largest'"),
    (METHOD, "merging/kernels/task_vectors.py", "largest(code, law; base=seed, scale=0.5)", "merging/kernels/ merges by no Largest"),
    (METHOD, "verifying/rederive/task_vectors.py", "merged", "verifying/rederive/ derives no Largest"),
    (INITIALISER, "recipe/makes/initialisers.py", "", "router.init: 'signs' is none of normal, uniform, zeros, orthogonal"),
    (INITIALISER, "expressions/initialisers.py", "", "module 'bam_merge.expressions' has no attribute 'Signs'"),
    (INITIALISER, "values/streams.py", "signs(step=0.01)", "values/streams.py draws no Signs"),
    (INITIALISER, "verifying/rederive/initialisers.py", "merged", "verifying/rederive/ draws no Signs"),
]
"""The toy, the place forgotten, how far it goes, and what is said."""


@pytest.mark.parametrize(("toy", "place", "reached", "said"), FORGOTTEN, ids=lambda value: value if isinstance(value, str) else "")
def test_no_place_can_be_forgotten(toy: Mapping[str, str], place: str, reached: str, said: str, tmp_path: Path) -> None:
    of_method, _, of_initialiser = RECIPE.partition("\n")
    out, err = follow(tmp_path, toy, without=place, text=of_method if toy is METHOD else of_initialiser)
    assert said in err
    assert reached in out
    assert "verified" not in out
    assert ("merged" in out) == (reached == "merged") == (tmp_path / "out").exists()


# ---- what a place must say -----------------------------------------------------------------------------------------------------

PLAIN = About(elementwise=True, base=False, surveyed=False, operand_bytes=8)


@pytest.mark.parametrize(("bases", "body", "said"), [
    ((expressions.Method,), {"about": PLAIN}, "lacks `name"),
    ((expressions.Method,), {"name": "toy"}, "lacks `about"),
    ((expressions.Method,), {"name": "toy", "about": dataclasses.replace(PLAIN, operand_bytes=0)}, "operand_bytes of 8 or more"),
    ((expressions.Method,), {"name": "mean", "about": PLAIN}, "Mean has the name 'mean' already"),
    ((expressions.Ties,), {"name": "toy", "about": PLAIN}, "must be a Method and nothing else"),
    ((expressions.Initialiser,), {"size": lambda self: None}, "lacks `name"),
    ((expressions.Initialiser,), {"name": "toy"}, "lacks `size`"),
    ((expressions.Initialiser,), {"name": "zeros", "size": lambda self: None}, "Zeros has the name 'zeros' already"),
    ((expressions.Normal,), {"name": "toy", "size": lambda self: None}, "must be a Initialiser and nothing else"),
])  # fmt: skip
def test_a_record_that_says_too_little_is_refused(bases: tuple[type, ...], body: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        type("Toy", bases, {"__slots__": (), **body})
    assert not {"toy", "Toy"} & {*METHODS, *INITIALISERS, *(record.__name__ for record in (*METHODS.values(), *INITIALISERS.values()))}


def make_class(base: type, record: Any, **body: Any) -> None:
    given = {} if record is None else {"record": record}
    annotations = {**({"record": ClassVar} if given else {}), **body.pop("annotations", {})}
    type("Toy", (base,), {"__module__": __name__, "__annotations__": annotations, **given, **body})


def nothing(self: Any, *_: Any) -> None:
    return None


@pytest.mark.parametrize(("base", "record", "keys", "said"), [
    (makes.Merging, None, {}, "lacks `record"),
    (makes.Merging, expressions.Mean, {"make": "mean"}, "lacks `method`"),
    (makes.Merging, expressions.Mean, {"make": "toy", "method": nothing}, "must be called mean in a recipe"),
    (makes.Merging, expressions.Ties, {"make": "ties", "method": nothing}, "has no key base, Ties has base=True"),
    (makes.Merging, expressions.Mean, {"make": "mean", "base": str, "method": nothing}, "has a key base, Mean has base=False"),
    (makes.Initialising, None, {}, "lacks `record"),
    (makes.Initialising, expressions.Zeros, {}, "lacks `initialiser`"),
])  # fmt: skip
def test_a_make_that_says_too_little_is_refused(base: type, record: Any, keys: dict[str, Any], said: str) -> None:
    annotations = {key: makes.Literal[value] if key == "make" else value for key, value in keys.items() if key != "method"}  # type: ignore[valid-type]
    with pytest.raises(TypeError, match=said):
        make_class(base, record, annotations=annotations, **({"method": nothing} if "method" in keys else {}))


def of_other_record(self: makes.Merging, *_: Any) -> expressions.Method:
    return expressions.Linear((1.0, 1.0, 1.0))


@pytest.mark.parametrize("method", [nothing, of_other_record])
def test_a_make_that_makes_another_record_is_refused(method: Any, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor of the first of several operands, say, in the place of their mean."""
    monkeypatch.setattr(makes.Mean, "method", method)
    with pytest.raises(TypeError, match=r"MeanRule\.method makes (None|Linear\(.*\)) of 3 operands, and its record is .*Mean"):
        plan_file(write_recipe(llamas))


def test_a_method_that_must_survey_and_does_not_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Surveying:
        about: ClassVar = dataclasses.replace(PLAIN, surveyed=True)

    with pytest.raises(NotImplementedError, match=r"merging/kernels/ surveys no Surveying"):
        kernels.survey(Surveying(), lambda: iter(()), 1)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"verifying/rederive/ surveys no Surveying"):
        rederive.survey_anew(Surveying(), None, None)  # type: ignore[arg-type]


# ---- every method has everything -----------------------------------------------------------------------------------------------


def has(dispatcher: Any, record: type) -> bool:
    """Whether a function is registered for the record itself."""
    return record in dispatcher.registry


def described(value: type) -> bool:
    """Whether a class has a docstring of its own, which is not what dataclass gives it."""
    return bool(value.__doc__) and not str(value.__doc__).startswith(f"{value.__name__}(")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_complete(name: str) -> None:
    record = METHODS[name]
    (make,) = [make for kind in (makes.Merging, makes.Varying) for make in makes_of(kind) if make.record is record]
    assert described(record) and described(make)
    assert has(kernels.combine, record) and has(rederive.derive, record)
    assert has(kernels.survey, record) == has(rederive.survey_anew, record) == record.about.surveyed
    assert record.about.operand_bytes >= 8
    example = BY_HAND[name].method
    assert type(example) is record
    assert (BY_HAND[name].base is not None) == record.about.base
    shown = ", ".join(example.arguments())
    drawn = {"seed", "streams"}  # what follows from the recipe's random_seed, which the manifest has
    for field in dataclasses.fields(example):  # type: ignore[arg-type]
        assert field.name in drawn or f"{field.name}=" in shown, field.name
    places = schema()
    if issubclass(make, makes.Merging):
        assert places["properties"]["shared"]["discriminator"]["mapping"][name] == f"#/$defs/{make.__name__}"
    assert places["properties"]["rules"]["items"]["discriminator"]["mapping"][name] == f"#/$defs/{make.__name__}Rule"
    assert f"\n### {name}\n\n{make.__doc__}\n" in REFERENCE.read_text()


@pytest.mark.parametrize("name", [name for name, record in METHODS.items() if record.about.elementwise])
def test_an_elementwise_method_merges_parts_as_it_merges_the_whole(name: str) -> None:
    method, operands, base, expected = BY_HAND[name]
    parts = [run(method, [x[cut] for x in operands], base and base[cut]) for cut in (slice(0, 1), slice(1, None))]
    assert [*parts[0], *parts[1]] == expected


def most_held(work: Callable[[], Any]) -> int:
    """The most bytes of torch's that `work` has at one time, beside what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    held = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return max(accumulate(held, initial=0))


@pytest.mark.parametrize("name", METHODS)
def test_no_kernel_holds_more_than_the_plan_says(name: str) -> None:
    """Of a chunk of float32: the operands as stored and as widened, and all that survey and kernel make of them."""
    method, operands, base, _ = BY_HAND[name]
    generator, size = torch.Generator().manual_seed(0), 2**17
    x_KC = [torch.randn(size, generator=generator) for _ in operands]
    chunk = kernels.Chunk(0, x_KC, torch.randn(size, generator=generator) if base else None)
    count = len(x_KC) + (base is not None)
    promised = method.about.operand_bytes * count + 16
    known = kernels.survey(method, lambda: iter([chunk]), size)
    surveying = most_held(lambda: kernels.survey(method, lambda: iter([chunk]), size))
    merging = most_held(lambda: kernels.combine(method, chunk, known))
    assert merging >= 4 * size  # the result at least: it is measured
    assert 8 * count + max(surveying, merging) // size <= promised  # a few single numbers apart


def test_a_method_by_rows_is_given_whole_ones_and_the_plan_counts_them(tmp_path: Path) -> None:
    """A row longer than a chunk is a chunk of its own; a tensor of one axis is one row."""
    reads = tuple((name, Read(name, "w", "F32", (3, 50))) for name in ("code", "law"))
    for by, method in (("elements", expressions.Slerp(0.5)), ("rows", expressions.Nuslerp(0.5, "rows"))):
        merge = expressions.Merge(method, reads, None, "F32", (3, 50))
        assert [chunk_elements(merge, most) for most in (1, 70, 120, 1000)] == (
            [1, 70, 120, 1000] if by == "elements" else [50, 50, 100, 1000]
        )
    write_sources(tmp_path, CONFIGS["llama"], names=("code", "law"))
    plan = plan_file(write_recipe(tmp_path, "shared: {make: nuslerp, from: [code, law], t: 0.5}", "merge", ("code", "law")))
    wide = dataclasses.replace(plan.steps[0].expr, shape=(2, 2**20))
    wider = dataclasses.replace(plan, steps=(dataclasses.replace(plan.steps[0], expr=wide), *plan.steps[1:]))
    assert wider.peak_memory(1) - plan.peak_memory(1) == (2**20 - 2**17) * (expressions.Nuslerp.about.operand_bytes * 2 + 16)


@pytest.mark.parametrize("name", INITIALISERS)
def test_every_initialiser_is_complete(name: str) -> None:
    record = INITIALISERS[name]
    assert described(record)
    assert has(streams.drawn, record) and has(rederive.draw, record)
    assert type(DRAWN_BY_HAND[name].method) is record
    shown = ", ".join(DRAWN_BY_HAND[name].method.arguments())
    assert all(f"{field.name}=" in shown for field in dataclasses.fields(record))  # type: ignore[arg-type]
    found = [make for make in makes_of(makes.Initialising) if make.record is record]
    if name in (*CONSTANTS, "grouped") and not found:  # of layouts alone, or of virtual groups
        return
    (make,) = found
    places = schema()
    assert places["properties"]["rules"]["items"]["discriminator"]["mapping"][name] == f"#/$defs/{make.__name__}Rule"
    assert f"Router{make.__name__}" in places["$defs"]
    assert f"\n### {name}\n\n{record.__doc__}\n" in REFERENCE.read_text()


def test_no_make_is_without_a_method() -> None:
    """But those that copy: expert, and copy itself."""
    assert {make.__name__ for make in makes_of(makes.Merging) if make.record is None} == {"Copy"}
    merging, varying = ({make.record for make in makes_of(kind)} - {None} for kind in (makes.Merging, makes.Varying))
    assert merging | varying == set(METHODS.values()) and not merging & varying
    assert set(CONSTANTS) <= set(INITIALISERS)
