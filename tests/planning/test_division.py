"""A plan in parts: whole files, balanced by bytes, the same for everybody."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from hypothesis import given
from hypothesis import strategies as st

from bam_merge.errors import RecipeError
from bam_merge.planning.make import plan_file
from bam_merge.planning.parts import parts_document, parts_of, plan_of
from bam_merge.planning.plan import Plan, Shard


@pytest.fixture(scope="module")
def plan(llamas_once: Path) -> Plan:
    return plan_file(write_recipe(llamas_once, output="{path: out, max_shard_size: 30kB}"))


@pytest.fixture(scope="module")
def llamas_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llamas")
    write_sources(folder, CONFIGS["llama"])
    return folder


def test_every_file_is_in_one_part(plan: Plan) -> None:
    assert len(plan.shards) > 6
    for number in range(1, len(plan.shards) + 1):
        parts = parts_of(plan, number)
        assert [str(part) for part in parts] == [f"{index}/{number}" for index in range(1, number + 1)]
        files = [file for part in parts for file in part.files]
        assert sorted(files) == [shard.file for shard in plan.shards]
        assert sum(part.nbytes for part in parts) == plan.bytes_written
        assert all(part.files and list(part.files) == sorted(part.files) for part in parts)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60), st.integers(1, 60))
def test_no_two_parts_differ_by_more_than_the_largest_file(sizes: list[int], number: int) -> None:
    shards = tuple(Shard(f"{index:05d}", b"", size) for index, size in enumerate(sizes))
    if number > len(sizes):
        return
    blank = Plan.__new__(Plan)
    object.__setattr__(blank, "shards", shards)
    found = [part.nbytes for part in parts_of(blank, number)]
    assert max(found) - min(found) <= max(sizes)
    assert min(len(part.files) for part in parts_of(blank, number)) >= 1
    assert sum(found) == sum(sizes)


def test_the_order_of_what_is_known_does_not_matter(plan: Plan) -> None:
    """Files of one size go by their place."""
    again = replace(plan, shards=tuple(replace(shard) for shard in plan.shards))
    assert parts_of(plan, 4) == parts_of(again, 4)


def test_a_part_has_the_tensors_of_its_files(plan: Plan) -> None:
    parts = [plan_of(plan, part) for part in parts_of(plan, 3)]
    names = [step.name for part in parts for step in part.steps]
    assert sorted(names) == sorted(step.name for step in plan.steps)
    for part in parts:
        assert {step.file for step in part.steps} == {shard.file for shard in part.shards}
        assert part.fingerprint == plan.fingerprint
    assert [part.bytes_read for part in parts] == [record["bytes_read"] for record in parts_document(plan, 3)]


def test_listed_by_the_command(plan: Plan, llamas_once: Path, run: Any) -> None:
    recipe = llamas_once / "recipe.yaml"
    document = json.loads(run("plan", recipe, "--json", "--parts", "3").out)
    assert document["parts"] == parts_document(plan, 3)
    assert "parts" not in json.loads(run("plan", recipe, "--json").out)
    text = run("plan", recipe, "--parts", "3").out
    assert "part         1/3: " in text
    assert "             3/3: " in text


def test_more_parts_than_files(plan: Plan, llamas_once: Path, run: Any) -> None:
    files = len(plan.shards)
    result = run("plan", llamas_once / "recipe.yaml", "--parts", files + 1)
    assert result.status == 2
    assert f"{files + 1} parts were asked for, and the result has {files} files; a part is whole files. Use {files} or fewer" in result.err
    assert "or a smaller output.max_shard_size: 20kB gives about" in result.err
    assert "nothing was written" not in result.out
    with pytest.raises(RecipeError, match=r"there are \d+ tensors, and a tensor is in one file"):
        parts_of(plan, len(plan.steps) + 1)


def test_the_size_that_is_named_gives_enough_files(tmp_path: Path) -> None:
    write_sources(tmp_path, CONFIGS["llama"])
    whole = plan_file(write_recipe(tmp_path))
    assert len(whole.shards) == 1
    for number in random.Random(0).sample(range(2, len(whole.steps)), 6):
        with pytest.raises(RecipeError) as error:
            parts_of(whole, number)
        said = str(error.value)
        assert "the result has 1 file; a part is whole files. Use 1" in said
        if "max_shard_size: " in said:
            size = said.partition("max_shard_size: ")[2].partition(" ")[0]
            smaller = plan_file(write_recipe(tmp_path, output=f"{{path: out, max_shard_size: {size}}}"))
            assert len(parts_of(smaller, number)) == number
