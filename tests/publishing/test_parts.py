"""A merge in parts, made by processes of their own, in any order: the bytes of one process, or the right words."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from runs import RECIPES, Stop, folder_bytes, options, small_scene, stop_after
from scenes import recipe, router, write_scene

from bam_merge import MergeOptions
from bam_merge.errors import NonFiniteError, NotYet, OutputError, SyncFailed, VerificationFailed
from bam_merge.planning.make import plan_file
from bam_merge.planning.parts import parts_of
from bam_merge.planning.plan import Plan
from bam_merge.publishing import destination
from bam_merge.publishing.finishing import finish
from bam_merge.publishing.parts import make_part
from bam_merge.publishing.publish import publish
from bam_merge.publishing.staging import Staging


@pytest.fixture
def plan(llamas: Path) -> Plan:
    return plan_file(write_recipe(llamas, output="{path: out, max_shard_size: 60kB}"))


def make_all(plan: Plan, of: int, seed: int = 0, **settings: Any) -> Path:
    numbers = list(range(1, of + 1))
    random.Random(seed).shuffle(numbers)
    for number in numbers:
        make_part(plan, None, number, of, options(**settings)[0])
    return finish(plan, None, options(**settings)[0])


def staging(plan: Plan) -> Path:
    target = destination.target_path(plan, None)
    return target.parent / f".{target.name}.bam-merge"


# ---- the same bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [1, 2, 3, 4])
def test_same_bytes_as_one_process(plan: Plan, llamas: Path, of: int) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", options()[0]))
    assert folder_bytes(make_all(plan, of, verify=True)) == whole
    assert not staging(plan).exists()


def test_as_many_parts_as_files(plan: Plan, llamas: Path) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", options()[0]))
    assert folder_bytes(make_all(plan, len(plan.shards))) == whole


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe(path: Path, tmp_path: Path) -> None:
    """On small models: each in parts as in one process, companions and manifest too."""
    plan = plan_file(small_scene(path, tmp_path))
    of = min(3, len(plan.shards))
    assert of > 1
    whole = folder_bytes(publish(plan, tmp_path / "whole", options()[0]))
    assert folder_bytes(make_all(plan, of)) == whole


def test_aligned_vocabularies(tmp_path: Path) -> None:
    from vocabularies import tokenizer_json

    write_sources(tmp_path, CONFIGS["llama"])
    for name in ("seed", "code", "law"):
        added = ["<code>"] if name == "code" else ["<law>", "<x>"] if name == "law" else []
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer_json(added)))
    text = "tokenizer: {source: union}"
    plan = plan_file(write_recipe(tmp_path, text, output="{path: out, max_shard_size: 20kB}"))
    assert plan.alignment is not None
    whole = folder_bytes(publish(plan, tmp_path / "whole", options()[0]))
    assert folder_bytes(make_all(plan, 4, verify=True)) == whole


@pytest.mark.parametrize("inputs", ["seed", "mixture"])
def test_routers_from_texts_are_made_when_all_parts_are_there(inputs: str, tmp_path: Path) -> None:
    path = recipe(write_scene(tmp_path), router(inputs=inputs), output="{path: out, max_shard_size: 40kB}")
    plan = plan_file(path)
    whole = folder_bytes(publish(plan, tmp_path / "whole", options()[0]))
    for number in (2, 1, 3):
        make_part(plan, None, number, 3, options()[0])

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise Stop

    with pytest.raises(Stop):
        finish(plan, None, options(on_calibrate=stop)[0])
    assert not (tmp_path / "out").exists()
    assert folder_bytes(finish(plan, None, options(verify=True)[0])) == whole


def test_force_replaces_at_the_end_and_not_before(plan: Plan, llamas: Path) -> None:
    other = plan_file(write_recipe(llamas, "random_seed: 5", names=("seed", "code")))
    old = folder_bytes(publish(other, llamas / "out", options()[0]))
    plan = plan_file(write_recipe(llamas, output="{path: out, max_shard_size: 60kB}"))
    with pytest.raises(OutputError, match="out already exists"):
        make_part(plan, None, 1, 2, options()[0])
    make_part(plan, None, 1, 2, options(force=True)[0])
    make_part(plan, None, 2, 2, options(force=True)[0])
    assert folder_bytes(llamas / "out") == old
    with pytest.raises(OutputError, match="out already exists"):
        finish(plan, None, options()[0])
    new = folder_bytes(finish(plan, None, options(force=True)[0]))
    shutil.rmtree(llamas / "out")
    assert new == folder_bytes(publish(plan, None, options()[0]))


# ---- restarted ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 5, 9])
def test_a_part_goes_on_where_it_was_stopped(plan: Plan, llamas: Path, steps: int) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", options()[0]))
    with pytest.raises(Stop):
        make_part(plan, None, 1, 2, MergeOptions(workers=1, progress=stop_after(steps)))
    with pytest.raises(NotYet, match=r"part 1/2 in .* is not complete\. It goes on by: bam-merge .*recipe\.yaml --part 1/2\n"):
        finish(plan, None, options()[0])
    again, said = options()
    result = make_part(plan, None, 1, 2, again)
    assert result is not None and not result.at_once
    tensors = sum(step.file in result.part.files for step in plan.steps)
    assert said == ([f"resuming: {steps} of {tensors} tensors are finished."] if steps else [])
    make_part(plan, None, 2, 2, options()[0])
    assert folder_bytes(finish(plan, None, options()[0])) == whole


def test_a_finished_part_is_digested_and_not_made_again(plan: Plan) -> None:
    first = make_part(plan, None, 1, 2, options()[0])
    written: list[int] = []
    again = make_part(plan, None, 1, 2, options(progress=written.append)[0])
    assert first is not None and again is not None
    assert again.at_once and not first.at_once
    assert again.digests == first.digests
    assert len(written) == 1  # what was there


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "grow"])
def test_what_is_damaged_is_made_again(plan: Plan, llamas: Path, damage: str) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", options()[0]))
    for number in (1, 2):
        make_part(plan, None, number, 2, options()[0])
    file = staging(plan) / "output" / parts_of(plan, 2)[0].files[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    match damage:
        case "flip":
            file.write_bytes(data)
        case "cut":
            file.write_bytes(data[:-1])
        case "grow":
            file.write_bytes(data + b"x")
        case "delete":
            file.unlink()
    said = {
        "flip": None,
        "cut": r"bytes, expected .*though its part is complete\. Make it again by: bam-merge .* --part 1/2",
        "delete": r"is gone, or no file of ours",
    }
    said["grow"] = said["cut"]
    if said[damage] is not None:
        with pytest.raises(OutputError, match=str(said[damage])):
            finish(plan, None, options()[0])
    else:
        with pytest.raises(VerificationFailed):
            finish(plan, None, options(verify=True)[0])
        shutil.rmtree(llamas / "out.failed")
        for number in (1, 2):
            make_part(plan, None, number, 2, options()[0])
    result = make_part(plan, None, 1, 2, options()[0])
    assert result is not None
    assert folder_bytes(finish(plan, None, options(verify=True)[0])) == whole


def test_finish_that_was_killed_is_run_again(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge.publishing import finishing

    whole = folder_bytes(publish(plan, llamas / "whole", options()[0]))
    for number in (1, 2, 3):
        make_part(plan, None, number, 3, options()[0])

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "put_in_place", stop)
        with pytest.raises(Stop):
            finish(plan, None, options()[0])
    assert (staging(plan) / "output" / "bam_merge.json").exists()
    (staging(plan) / "output" / "model-99999-of-99999.safetensors").write_bytes(b"of another plan")
    assert folder_bytes(finish(plan, None, options()[0])) == whole
    again, said = options()
    assert folder_bytes(finish(plan, None, again)) == whole
    assert said == [f"{llamas / 'out'} is already finished, from the same recipe, version and sources."]
    assert make_part(plan, None, 1, 3, options()[0]) is None
    assert not staging(plan).exists()


def test_a_failed_sync_leaves_nothing_to_resume_from(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge.publishing import parts

    def fail(*_: object) -> None:
        raise SyncFailed("no")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "sync_descriptor", fail)
        with pytest.raises(SyncFailed):
            make_part(plan, None, 1, 2, options()[0])
    assert os.listdir(staging(plan) / "parts") == []
    with pytest.raises(OutputError):
        finish(plan, None, options()[0])


# ---- refused, in words -------------------------------------------------------------------------------------------------------


def test_missing_parts_are_named_together_with_the_commands(plan: Plan) -> None:
    with pytest.raises(NotYet, match=r"no part of .*out was made: .* --part 1/N makes the first of N"):
        finish(plan, None, options()[0])
    make_part(plan, None, 2, 3, options()[0])
    with pytest.raises(NotYet) as error:
        finish(plan, None, options()[0])
    assert [problem.rpartition(": ")[2] for problem in error.value.problems] == [
        f"bam-merge {plan.recipe.file} --part {n}/3" for n in (1, 3)
    ]
    assert not destination.target_path(plan, None).exists()


def test_the_command_that_is_named_is_what_a_shell_takes(llamas: Path, tmp_path: Path) -> None:
    odd = tmp_path / "my recipe.yaml"
    odd.write_text(write_recipe(llamas, output="{path: out, max_shard_size: 60kB}").read_text())
    plan = plan_file(odd)
    make_part(plan, llamas / "a b", 1, 2, options()[0])
    with pytest.raises(NotYet) as error:
        finish(plan, llamas / "a b", options()[0])
    assert error.value.problems[0].endswith(f"bam-merge '{odd}' --part 2/2 --output '{llamas / 'a b'}'")


def changed_mtime(folder: Path) -> None:
    os.utime(folder / "code" / "model.safetensors", ns=(1, 10**18))


def changed_size(folder: Path) -> None:
    write_sources(folder, {**CONFIGS["llama"], "vocab_size": 66})


def changed_header(folder: Path) -> None:
    """Another header of the same length, with the old time of change."""
    path = folder / "law" / "model.safetensors"
    status, data = path.stat(), path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(
        {**header, "__metadata__": {"format": "pt"}} if "__metadata__" not in header else header, separators=(",", ":")
    ).encode()
    names = list(header)
    first, second = (names[names.index(n)] for n in ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"))
    swapped = data[8 : 8 + length].replace(first.encode(), b"#").replace(second.encode(), first.encode()).replace(b"#", second.encode())
    assert len(swapped) == length and text
    path.write_bytes(data[:8] + swapped + data[8 + length :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def changed_config(folder: Path) -> None:
    path = folder / "law" / "config.json"
    path.write_text(path.read_text().replace("{", '{"use_cache": false,', 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_mtime, r"was made of other source files: sources\.code: model\.safetensors was changed at another time"),
        (changed_size, r"was made of other source files: sources\.seed: config\.json was not the same, sources\.seed: model\.safetensors had [\d,]+ bytes, here [\d,]+"),
        (changed_header, r"was made of other source files: sources\.law: model\.safetensors had another header"),
        (changed_config, r"was made of other source files: sources\.law: config\.json was not the same"),
        (lambda folder: write_recipe(folder, "random_seed: 9", output="{path: out, max_shard_size: 60kB}"), r"was made of another recipe"),
    ],
)  # fmt: skip
def test_parts_of_other_sources_or_another_recipe(plan: Plan, llamas: Path, change: Callable[[Path], object], said: str) -> None:
    """By the host of a further part before it writes anything, and by that of finish: files that are the same on every host."""
    for number in (1, 2):
        make_part(plan, None, number, 3, options()[0])
    before = folder_bytes(staging(plan) / "output"), folder_bytes(staging(plan) / "parts")
    change(llamas)
    other = plan_file(llamas / "recipe.yaml")
    with pytest.raises(OutputError, match=r"part 1/3 in .* " + said):
        make_part(other, None, 3, 3, options()[0])
    assert (folder_bytes(staging(plan) / "output"), folder_bytes(staging(plan) / "parts")) == before
    with pytest.raises(OutputError, match=rf"part 1/3 in .* was made on {os.uname().nodename} {said.removeprefix('was made ')}") as error:
        finish(other, None, options()[0])
    assert not isinstance(error.value, NotYet)
    assert len(error.value.problems) == 3
    assert not (llamas / "out").exists()


def test_parts_of_another_version(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge.publishing import part_journals

    make_part(plan, None, 1, 2, options()[0])
    monkeypatch.setattr(part_journals, "__version__", "9.9")
    with pytest.raises(OutputError, match=r"part 1/2 in .* was made by version .*, and this is 9\.9\."):
        make_part(plan, None, 2, 2, options()[0])


def test_parts_of_another_number(plan: Plan) -> None:
    make_part(plan, None, 1, 2, options()[0])
    with pytest.raises(OutputError, match=r"has part 1/2, and this is 1/3: parts of another number are other files\. Use --part i/2"):
        make_part(plan, None, 1, 3, options()[0])
    shutil.copy(staging(plan) / "parts" / "00001-of-00002.journal", staging(plan) / "parts" / "00001-of-00003.journal")
    with pytest.raises(OutputError, match=r"has parts of 2 and of 3\. Delete that folder"):
        finish(plan, None, options()[0])


def test_a_part_alone_begins_anew_for_another_recipe(plan: Plan, llamas: Path) -> None:
    """What it wrote before is not written over: a process that still writes it has a file that is gone."""
    make_part(plan, None, 1, 1, options()[0])
    old = os.open(staging(plan) / "output" / plan.shards[0].file, os.O_RDWR)
    other = plan_file(write_recipe(llamas, "random_seed: 9", output="{path: out, max_shard_size: 60kB}"))
    settings, said = options()
    make_part(other, None, 1, 1, settings)
    os.pwrite(old, b"\0" * 1000, plan.shards[0].nbytes - 1000)
    os.close(old)
    assert said == ["the unfinished run was of another recipe, version or set of sources: starting from the beginning."]
    whole = folder_bytes(publish(other, llamas / "whole", options()[0]))
    assert folder_bytes(finish(other, None, options(verify=True)[0])) == whole


def test_parts_and_a_run_of_one_process_keep_apart(plan: Plan, llamas: Path) -> None:
    make_part(plan, None, 1, 2, options()[0])
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"holds parts that were made by --part: bam-merge finish RECIPE makes the result"):
            publish(plan, None, options(resume=resume)[0])
    shutil.rmtree(staging(plan))
    with pytest.raises(Stop):
        publish(plan, None, MergeOptions(workers=1, progress=stop_after(4), verify=False))
    with pytest.raises(OutputError, match=r"has an unfinished run of one process\. Go on with that, by --resume without --part"):
        make_part(plan, None, 1, 2, options()[0])
    publish(plan, None, options(resume=True)[0])


def test_while_one_process_runs(plan: Plan) -> None:
    whole = Staging.open(destination.target_path(plan, None))
    with pytest.raises(NotYet, match=rf"out is being written by another run \(process {os.getpid()}\)\. Wait for it\."):
        make_part(plan, None, 1, 2, options()[0])
    whole.close()


def test_the_same_part_at_once(plan: Plan, run: Callable[..., Any]) -> None:
    """Said by the second, while the first goes on."""
    found: list[BaseException] = []

    def meanwhile(count: int) -> None:
        if count and not found:
            for call in (lambda: make_part(plan, None, 1, 2, options()[0]), lambda: finish(plan, None, options()[0])):
                with pytest.raises(NotYet) as error:
                    call()
                found.append(error.value)
            make_part(plan, None, 2, 2, options()[0])

    make_part(plan, None, 1, 2, MergeOptions(workers=1, progress=meanwhile))
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert str(found[0]) == f"part 1/2 of {destination.target_path(plan, None)} is being written by {holder}. Wait for it."
    assert f"part 1/2 in {staging(plan)} is being written by {holder}. Wait for it." in str(found[1])
    finish(plan, None, options()[0])


def test_a_part_while_another_process_finishes(plan: Plan) -> None:
    for number in (1, 2):
        make_part(plan, None, number, 2, options()[0])
    found: list[str] = []

    def meanwhile(done: int, total: int) -> None:
        if not found:
            for call in (lambda: make_part(plan, None, 1, 2, options()[0]), lambda: finish(plan, None, options()[0])):
                with pytest.raises(NotYet) as error:
                    call()
                found.append(str(error.value))

    finish(plan, None, options(verify=True, on_verify=meanwhile)[0])
    assert "out is being finished by process" in found[0] and "out is being written by process" in found[1]


def test_on_a_file_system_without_locks(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that say who is at work are enough."""
    from bam_merge import system

    whole = folder_bytes(publish(plan, llamas / "whole", options()[0]))
    monkeypatch.setattr(system, "lock", lambda descriptor, shared=False: False)
    refused: list[NotYet] = []

    def meanwhile(count: int) -> None:
        if count and not refused:
            with pytest.raises(NotYet, match=r"part 2/3 of .* is being written by process \d+ on ") as error:
                make_part(plan, None, 2, 3, options()[0])
            refused.append(error.value)

    for number in (2, 3, 1):
        make_part(plan, None, number, 3, MergeOptions(workers=1, progress=meanwhile))
    assert refused
    assert folder_bytes(finish(plan, None, options(verify=True)[0])) == whole


def test_nan_is_finished_only_where_it_is_allowed(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    write_sources(tmp_path, CONFIGS["llama"])
    tensors = load_file(tmp_path / "law" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "law" / "model.safetensors")
    plan = plan_file(write_recipe(tmp_path, output="{path: out, max_shard_size: 60kB}"))
    number = next(
        part.number
        for part in parts_of(plan, 2)
        if any(s.file in part.files for s in plan.steps if s.name == "model.layers.1.mlp.experts.2.up_proj.weight")
    )
    with pytest.raises(NonFiniteError):
        make_part(plan, None, number, 2, options()[0])
    for each in (1, 2):
        make_part(plan, None, each, 2, options(allow_nonfinite=True)[0])
    with pytest.raises(OutputError, match=rf"part {number}/2 was made with --allow-nonfinite, and 1 tensor of it"):
        finish(plan, None, options()[0])
    whole = folder_bytes(publish(plan, tmp_path / "whole", options(allow_nonfinite=True)[0]))
    assert folder_bytes(finish(plan, None, options(allow_nonfinite=True)[0])) == whole


def test_room_is_looked_for_by_part(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other parts hold is no room of this one's."""
    make_part(plan, None, 1, 2, options()[0])
    second = parts_of(plan, 2)[1]

    def free(nbytes: int) -> None:
        monkeypatch.setattr(destination.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, nbytes))  # type: ignore[attr-defined]

    free(destination.SMALL_FILES + second.nbytes - 1)
    with pytest.raises(OutputError, match=r"GB free, this part writes .* GB\. Free some space"):
        make_part(plan, None, 2, 2, options()[0])
    free(destination.SMALL_FILES + second.nbytes)
    make_part(plan, None, 2, 2, options()[0])
    free(destination.SMALL_FILES)
    finish(plan, None, options()[0])


def test_a_folder_of_parts_that_is_no_folder_or_a_link(plan: Plan, llamas: Path) -> None:
    staging(plan).mkdir(mode=0o700)
    (staging(plan) / "parts").symlink_to(llamas / "seed")
    with pytest.raises(OutputError, match="holds what bam-merge did not put there: parts"):
        make_part(plan, None, 1, 2, options()[0])
    (staging(plan) / "parts").unlink()
    (staging(plan) / "parts").mkdir()
    (staging(plan) / "parts" / "00001-of-00002.lock").symlink_to(llamas / "recipe.yaml")
    before = (llamas / "recipe.yaml").read_bytes()
    with pytest.raises(OutputError, match="is a symbolic link, expected a file"):
        make_part(plan, None, 1, 2, options()[0])
    assert (llamas / "recipe.yaml").read_bytes() == before


# ---- the command line --------------------------------------------------------------------------------------------------------


def test_commands_and_statuses(llamas: Path, run: Callable[..., Any]) -> None:
    path = write_recipe(llamas, output="{path: out, max_shard_size: 60kB}")
    for wrong, said in (
        ("3", "write i/n"),
        ("0/3", "numbered from 1"),
        ("4/3", "numbered from 1"),
        ("a/b", "write i/n"),
        ("²/3", "write i/n"),
    ):
        result = run(path, "--part", wrong)
        assert result.status == 2 and said in result.err
    result = run(path, "--part", "1/999")
    assert result.status == 2 and "999 parts were asked for" in result.err
    assert run("finish", path).status == 4
    first = run(path, "--part", "1/2", "--progress", "json")
    assert first.status == 0
    assert "part 1/2: " in first.out and first.out.endswith(f"When all parts are made: bam-merge finish {path}\n")
    lines = [json.loads(line) for line in first.err.splitlines() if line.startswith("{")]
    assert lines[-1]["done"] == lines[-1]["total"] > 0
    assert {(line["stage"], line["part"]) for line in lines} == {("merging", "1/2"), ("verifying", "1/2")}
    missing = run("finish", path)
    assert missing.status == 4 and f"It is made by: bam-merge {path} --part 2/2" in missing.err
    assert run("merge", path, "--part", "2/2", "--resume").status == 0
    again = run(path, "--part", "2/2")
    assert again.status == 0 and "part 2/2 was finished already: " in again.out
    done = run("finish", path, "--progress", "json")
    assert done.status == 0 and "verified: " in done.out
    stages = [json.loads(line) for line in done.err.splitlines() if line.startswith("{")]
    assert {line["stage"] for line in stages} == {"verifying"} and stages[-1]["done"] == stages[-1]["total"]
    assert run("finish", path).status == 0
    assert sorted(os.listdir(llamas)) == ["code", "law", "out", "recipe.yaml", "seed"]


def test_dry_run_lists_the_parts(llamas: Path, run: Callable[..., Any]) -> None:
    path = write_recipe(llamas, output="{path: out, max_shard_size: 60kB}")
    assert "1/2: " in run(path, "--part", "2/2", "--dry-run").out
    assert not (llamas / ".out.bam-merge").exists()


def test_plans_are_compared_by_what_they_are_of(plan: Plan) -> None:
    """A plan that says the same of everything but its fingerprint was read otherwise."""
    make_part(plan, None, 1, 2, options()[0])
    with pytest.raises(OutputError, match="was made of another recipe, or what it was made of was read otherwise"):
        make_part(replace(plan, fingerprint="0" * 32), None, 2, 2, options()[0])
