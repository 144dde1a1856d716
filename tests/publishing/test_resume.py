"""What an unfinished run leaves: resumed from where it can be trusted, and locked while a run has it."""

import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from runs import Stop, folder_bytes, interrupted, options, plan, stop_after

from bam_merge import MergeOptions
from bam_merge.checkpoints.provenance import SEAL, sealed
from bam_merge.errors import OutputError
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing import publish as publish_module
from bam_merge.publishing.publish import publish
from bam_merge.publishing.staging import Staging

__all__ = ["plan"]


@pytest.mark.parametrize("steps", range(0, 45, 4))
def test_resume_after_any_number_of_tensors_gives_the_same_bytes(plan: Plan, llamas: Path, steps: int) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    with pytest.raises(Stop):
        publish(plan, None, MergeOptions(workers=1, progress=stop_after(steps), verify=False))
    assert not (llamas / "out").exists()
    again, said = options(resume=True)
    assert folder_bytes(publish(plan, None, again)) == whole
    if steps:
        assert said == [f"resuming: {steps} of {len(plan.steps)} tensors are finished."]


def test_without_resume_an_unfinished_run_is_discarded_aloud(plan: Plan, llamas: Path) -> None:
    interrupted(plan, llamas)
    settings, said = options()
    publish(plan, None, settings)
    assert said == ["an unfinished run is discarded; --resume would have continued it."]


def test_resume_does_not_trust_damaged_tensors(plan: Plan, llamas: Path) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    staging = interrupted(plan, llamas)
    for shard in (staging / "output").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True, verify=False))) == whole


def test_resume_loses_nothing_of_the_journal_when_it_is_killed_at_once(plan: Plan, llamas: Path) -> None:
    staging = interrupted(plan, llamas)
    with pytest.raises(Stop):
        publish(plan, None, MergeOptions(resume=True, workers=1, progress=stop_after(0), verify=False))
    again = Staging.open(llamas / "out")
    try:
        journal = (staging / "journal").read_bytes()
        assert len(again.begin(plan, True, False, lambda text: None)) == 20
        assert (staging / "journal").read_bytes() == journal
    finally:
        again.close()


def test_resume_lets_nothing_into_the_result_that_is_not_of_it(plan: Plan, llamas: Path) -> None:
    """Files of a model that --force replaced, whose deletion was cut short; a tokenizer that the seed no longer has."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    staging = interrupted(plan, llamas)
    (staging / "output" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    (staging / "output" / "tokenizer.model").write_bytes(b"stale")
    (staging / "output" / "original").mkdir()
    (staging / "output" / "original" / "params.json").write_text("{}")
    (staging / "output" / "link").symlink_to(llamas / "seed")
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True, verify=False))) == whole
    assert (llamas / "seed" / "config.json").exists()


def test_deleting_the_staging_folder_begins_with_its_journal(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a kill leaves of it is never resumed from."""
    staging = interrupted(plan, llamas)
    monkeypatch.setattr(Staging, "discard", lambda *args, **options: None)
    lock = Staging.open(llamas / "out")
    lock.remove()
    lock.close()
    assert not (staging / "journal").exists()
    assert (staging / "output").exists()


def test_resume_with_a_torn_journal(plan: Plan, llamas: Path) -> None:
    """The journal cut at every byte: whatever is left is used or not, the bytes are the same."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    staging = interrupted(plan, llamas, steps=3)
    journal = (staging / "journal").read_bytes()
    shutil.copytree(staging, llamas / "kept")
    for cut in range(0, len(journal), 29):
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(llamas / "kept", staging)
        (staging / "journal").write_bytes(journal[:cut])
        assert folder_bytes(publish(plan, llamas / "out", MergeOptions(resume=True, verify=False))) == whole
        shutil.rmtree(llamas / "out")


@pytest.mark.parametrize("text", [
    b"[]", b"{}", b"null", b'"x"', b"1", b"not JSON", b"[" * 100_000, b'{"name": "x"}', b"\xff",
    b'{"name": 1, "digest": "", "reads": {}, "nonfinite": 0}', b'{"name": "x", "digest": "", "reads": [], "nonfinite": 0}',
    b'{"name": "x", "digest": "", "reads": {"a": 1}, "nonfinite": 0}',
])  # fmt: skip
@pytest.mark.parametrize("where", ["first", "later", "last"])
def test_a_journal_that_nobody_of_us_wrote(plan: Plan, llamas: Path, text: bytes, where: str) -> None:
    """Its checksums are right. It is believed up to there, and what follows is appended to that."""
    path = interrupted(plan, llamas, steps=6) / "journal"
    lines = path.read_bytes().splitlines(keepends=True)
    place = {"first": 0, "later": 3, "last": len(lines)}[where]
    lines.insert(place, b"%08x %08x %s\n" % (len(text), zlib.crc32(text), text))
    path.write_bytes(b"".join(lines))
    staging = Staging.open(llamas / "out")
    done = staging.begin(plan, True, False, lambda text: None)
    staging.close()
    assert len(done) == max(0, place - 1)
    if place:
        assert path.read_bytes() == b"".join(lines[:place])


@pytest.mark.parametrize("change", ["recipe", "source"])
def test_resume_starts_over_when_the_inputs_are_others(plan: Plan, llamas: Path, change: str) -> None:
    interrupted(plan, llamas)
    if change == "recipe":
        other = plan_file(write_recipe(llamas, "random_seed: 5", output="{path: out, max_shard_size: 60kB}"))
    else:
        write_sources(llamas, CONFIGS["llama"], ("law",))
        other = plan_file(llamas / "recipe.yaml")
    settings, said = options(resume=True)
    result = folder_bytes(publish(other, None, settings))
    assert said == ["the unfinished run was of another recipe, version or set of sources: starting from the beginning."]
    assert result == folder_bytes(publish(other, llamas / "whole", MergeOptions(verify=False)))


def test_nothing_to_resume(plan: Plan) -> None:
    settings, said = options(resume=True)
    publish(plan, None, settings)
    assert said == ["nothing to resume: starting from the beginning."]


def test_resume_of_a_run_that_was_killed_after_its_rename(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --force: the old model waits in the staging folder to be deleted. There is nothing else to do."""
    publish(plan, None, MergeOptions(verify=False))
    (llamas / "out" / "pytorch_model.bin").write_text("old")

    def killed(staging: Staging, target: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(publish_module, "_make_durable", killed)
        publish(plan, None, MergeOptions(force=True, verify=False))
    assert (llamas / ".out.bam-merge" / "output" / "pytorch_model.bin").exists()
    whole = folder_bytes(llamas / "out")
    written: list[int] = []
    settings, said = options(resume=True, force=True, progress=written.append)
    assert folder_bytes(publish(plan, None, settings)) == whole
    assert said == [f"{llamas}/out is already finished, from the same recipe, version and sources. bam-merge verify checks it."]
    assert written == []
    assert not (llamas / ".out.bam-merge").exists()


def test_resume_of_a_finished_run_that_says_otherwise(plan: Plan, llamas: Path) -> None:
    """Not what this plan gives: a changed source or recipe, a file that is missing or cut, another version."""
    target = publish(plan, None, MergeOptions(verify=False))
    kept = folder_bytes(target)
    manifest = kept["bam_merge.json"]

    def refused(why: str) -> None:
        try:
            publish(plan_file(llamas / "recipe.yaml"), None, MergeOptions(resume=True, verify=False))
        except OutputError as error:
            assert "out already exists" in str(error), why
        else:
            pytest.fail(f"{why} was taken for finished")

    os.truncate(target / plan.shards[0].file, 100)
    refused("a cut file")
    (target / plan.shards[0].file).write_bytes(kept[plan.shards[0].file])
    document = {key: value for key, value in json.loads(manifest).items() if key != SEAL}
    (target / "bam_merge.json").write_bytes(sealed({**document, "version": "9"}))
    refused("another version")
    (target / "bam_merge.json").write_bytes(b"{}")
    refused("a damaged manifest")
    (target / "bam_merge.json").write_bytes(manifest)
    assert publish(plan_file(llamas / "recipe.yaml"), None, MergeOptions(resume=True, verify=False)) == target
    write_recipe(llamas, "random_seed: 5", output="{path: out, max_shard_size: 60kB}")
    refused("another recipe")
    write_recipe(llamas, output="{path: out, max_shard_size: 60kB}")
    for name in ("seed/vocab.txt", "seed/generation_config.json", "law/vocab.txt"):  # which no tensor depends on
        (llamas / name).write_text("{}")
        refused(f"another {name}")
        (llamas / name).unlink()
    assert publish(plan_file(llamas / "recipe.yaml"), None, MergeOptions(resume=True)) == target
    source = llamas / "law" / "model.safetensors"
    data = source.read_bytes()
    source.write_bytes(data[:-1] + b"x")
    refused("a source that was written to later")


def test_second_run_of_the_same_target_is_refused(plan: Plan, llamas: Path) -> None:
    staging = Staging.open(llamas / "out")
    try:
        with pytest.raises(OutputError, match=rf"out is being written by another run \(process {os.getpid()}\)\. Wait for it\."):
            publish(plan, None, MergeOptions(verify=False))
    finally:
        staging.close()
    publish(plan, None, MergeOptions(verify=False))


def test_a_run_that_ends_while_another_begins(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It deletes the staging folder just after the other one made sure that it is there."""
    real, calls = os.open, 0

    def too_late(path: Any, *args: Any, **options: Any) -> int:
        nonlocal calls
        if path == ".out.bam-merge":
            calls += 1
            if calls == 1:
                os.rmdir(path, **options)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", too_late)
    lock = Staging.open(llamas / "out")
    monkeypatch.undo()
    assert lock.is_ours()
    lock.close()


def test_holder_is_not_a_run_that_died_earlier(llamas: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    lock = Staging.open(llamas / "out")
    try:
        (lock.folder / "pid").write_text(f"{child.pid}\n")
        with pytest.raises(OutputError, match=r"out is being written by another run\. Wait for it\."):
            Staging.open(llamas / "out")
        (lock.folder / "pid").write_text("1\n")
        with pytest.raises(OutputError, match=r"another run \(process 1\)"):
            Staging.open(llamas / "out")
    finally:
        lock.close()


def test_staging_folder_without_anything_in_it_goes(llamas: Path) -> None:
    Staging.open(llamas / "out").close()
    assert not (llamas / ".out.bam-merge").exists()


def test_staging_folder_is_no_symlink(plan: Plan, llamas: Path) -> None:
    (llamas / ".out.bam-merge").symlink_to(llamas / "seed")
    with pytest.raises(OutputError, match=r"\.out\.bam-merge is a symbolic link of .*, expected a folder that bam-merge made"):
        publish(plan, None, MergeOptions(verify=False))
    assert (llamas / "seed" / "config.json").exists()
