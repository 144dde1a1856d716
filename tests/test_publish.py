"""Publishing: absent or complete, resumable, one run at a time; on a full disk, under SIGKILL, with an input that changes."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge import MergeOptions
from bam_merge import execute as execute_module
from bam_merge import publish as publish_module
from bam_merge import staging as staging_module
from bam_merge.errors import BamMergeError, CheckpointError, OutputError, SyncFailed, VerificationFailed
from bam_merge.plan import Plan, plan_file
from bam_merge.publish import publish
from bam_merge.staging import Staging


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def options(**settings: Any) -> tuple[MergeOptions, list[str]]:
    said: list[str] = []
    return MergeOptions(**settings, notify=said.append), said


@pytest.fixture
def plan(llamas: Path) -> Plan:
    return plan_file(write_recipe(llamas, output="{path: out, max_shard_size: 60kB}"))


def test_a_finished_merge_leaves_the_folder_and_nothing_else(plan: Plan, llamas: Path) -> None:
    umask = os.umask(0o027)
    try:
        target = publish(plan, None, MergeOptions())
    finally:
        os.umask(umask)
    assert sorted(path.name for path in llamas.iterdir()) == ["code", "law", "out", "recipe.yaml", "seed"]
    names = {path.name for path in target.iterdir()}
    code = {"configuration_bam.py", "modeling_bam.py"}
    assert names == {"README.md", "bam_merge.json", "config.json", "model.safetensors.index.json", *code, *(s.file for s in plan.shards)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o640}


def test_existing_target_is_refused(plan: Plan, llamas: Path) -> None:
    (llamas / "out").mkdir()
    with pytest.raises(OutputError, match=r"out already exists\. Choose another --output, or replace it as a whole with --force"):
        publish(plan, None, MergeOptions())
    assert list((llamas / "out").iterdir()) == []


def test_force_replaces_the_whole_folder(plan: Plan, llamas: Path) -> None:
    """An older, differently sharded model leaves nothing behind."""
    target = publish(plan, None, MergeOptions())
    (target / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    publish(plan, None, MergeOptions(force=True))
    assert "model-00009-of-00009.safetensors" not in folder_bytes(target)
    assert not (llamas / ".out.bam-merge").exists()


def test_force_does_not_delete_what_is_no_checkpoint(plan: Plan, llamas: Path) -> None:
    (llamas / "out").mkdir()
    (llamas / "out" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="is not a checkpoint folder, so --force will not delete it"):
        publish(plan, None, MergeOptions(force=True))
    assert (llamas / "out" / "thesis.tex").exists()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification that fails."""
    import bam_merge.verification
    from bam_merge.report import Check, Report

    monkeypatch.undo()  # the fixture that leaves verification out
    assert publish_module._prove.__name__ == "_prove"
    monkeypatch.setattr(bam_merge.verification, "verify", lambda folder, plan: Report(checks=[Check("digests", False, "wrong")]))


def test_a_failed_result_takes_nobodys_place(plan: Plan, llamas: Path, failing: None) -> None:
    """Not even a folder that looks like an earlier failed result: it may be a model that was published under that name."""
    (llamas / "out.failed").mkdir()
    (llamas / "out.failed" / "bam_merge.json").write_text("{}")
    for name in ("out.failed-2", "out.failed-3"):
        with pytest.raises(VerificationFailed, match=rf"not published; the result is kept for inspection in {llamas}/{name}"):
            publish(plan, None, MergeOptions())
        assert (llamas / name / "config.json").exists()
    assert (llamas / "out.failed" / "bam_merge.json").read_text() == "{}"
    assert not (llamas / "out").exists()
    assert not (llamas / ".out.bam-merge").exists()


def test_target_that_appears_during_the_run_is_not_replaced(plan: Plan, llamas: Path) -> None:
    settings = MergeOptions(progress=lambda count: (llamas / "out").mkdir(exist_ok=True))
    with pytest.raises(OutputError, match=r"appeared while the merge ran. Nothing was replaced"):
        publish(plan, None, settings)
    assert list((llamas / "out").iterdir()) == []


def test_force_does_not_delete_what_became_something_else(plan: Plan, llamas: Path) -> None:
    """The folder to replace was swapped for somebody's own while the merge ran."""
    target = publish(plan, None, MergeOptions())

    def swap(count: int) -> None:
        if count and not (llamas / "moved").exists():
            target.rename(llamas / "moved")
            target.mkdir()
            (target / "thesis.tex").write_text("years")

    with pytest.raises(OutputError, match=r"out became what is not a checkpoint folder while the merge ran. Nothing was replaced"):
        publish(plan, None, MergeOptions(force=True, workers=1, progress=swap))
    assert (target / "thesis.tex").read_text() == "years"


def test_staging_folder_deleted_and_made_anew_during_the_run(plan: Plan, llamas: Path) -> None:
    """What stands there at the end is another run's, unfinished: it must not be published."""
    others: list[Staging] = []

    def delete(count: int) -> None:
        if count and not others:
            shutil.rmtree(llamas / ".out.bam-merge")
            others.append(Staging.open(llamas / "out"))
            others[0].output.mkdir()
            (others[0].output / "half").write_text("")

    with pytest.raises(OutputError, match=r"\.out\.bam-merge was deleted while the merge ran"):
        publish(plan, None, MergeOptions(workers=1, progress=delete))
    assert others[0].is_ours()
    others[0].close()
    assert (llamas / ".out.bam-merge" / "output" / "half").exists()
    assert not (llamas / "out").exists()


def test_run_that_waited_at_the_lock_of_one_that_published(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Staging.open

    def late(target: Path) -> Staging:
        monkeypatch.setattr(Staging, "open", real)
        publish(plan, None, MergeOptions())
        return real(target)

    monkeypatch.setattr(Staging, "open", late)
    written: list[int] = []
    with pytest.raises(OutputError, match=r"out already exists"):
        publish(plan, None, MergeOptions(progress=written.append))
    assert written == []
    assert not (llamas / ".out.bam-merge").exists()


@pytest.fixture
def without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose rename has no flags."""
    monkeypatch.setattr(staging_module, "_rename", lambda old, new, flags: False)


def test_plain_rename_is_said(plan: Plan, llamas: Path, without_flags: None) -> None:
    settings, said = options()
    whole = folder_bytes(publish(plan, None, settings))
    assert said == [f"{llamas}: this file system cannot rename without replacing, so a plain rename."]
    settings, said = options(force=True)
    (llamas / "out" / "old").write_text("")
    assert folder_bytes(publish(plan, None, settings)) == whole
    assert said == [f"{llamas}: this file system cannot exchange two folders, so a plain rename."]
    assert not (llamas / ".out.bam-merge").exists()


def test_plain_rename_replaces_nothing(plan: Plan, llamas: Path, without_flags: None) -> None:
    with pytest.raises(OutputError, match=r"appeared while the merge ran"):
        publish(plan, None, MergeOptions(progress=lambda count: (llamas / "out").mkdir(exist_ok=True)))
    assert list((llamas / "out").iterdir()) == []


def test_plain_rename_that_fails_half_way_puts_the_old_model_back(
    plan: Plan, llamas: Path, without_flags: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = publish(plan, None, MergeOptions())
    (target / "old").write_text("")
    real = os.rename

    def fail(old: Any, new: Any) -> None:
        if Path(old).name == "output":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OutputError, match="Input/output error when renaming the finished folder"):
        publish(plan, None, MergeOptions(force=True))
    assert (target / "old").exists()


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_after(steps: int) -> Any:
    """A progress callback that fails once `steps` pieces are written."""
    seen = 0

    def progress(count: int) -> None:
        nonlocal seen
        seen += count > 0
        if seen > steps:
            raise Stop

    return progress


@pytest.mark.parametrize("steps", range(0, 45, 4))
def test_resume_after_any_number_of_tensors_gives_the_same_bytes(plan: Plan, llamas: Path, steps: int) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    with pytest.raises(Stop):
        publish(plan, None, MergeOptions(workers=1, progress=stop_after(steps)))
    assert not (llamas / "out").exists()
    again, said = options(resume=True)
    assert folder_bytes(publish(plan, None, again)) == whole
    if steps:
        assert said == [f"resuming: {steps} of {len(plan.steps)} tensors are finished."]


def interrupted(plan: Plan, llamas: Path, steps: int = 20) -> Path:
    with pytest.raises(Stop):
        publish(plan, None, MergeOptions(workers=1, progress=stop_after(steps)))
    return llamas / ".out.bam-merge"


def test_without_resume_an_unfinished_run_is_discarded_aloud(plan: Plan, llamas: Path) -> None:
    interrupted(plan, llamas)
    settings, said = options()
    publish(plan, None, settings)
    assert said == ["an unfinished run is discarded; --resume would have continued it."]


def test_resume_does_not_trust_damaged_tensors(plan: Plan, llamas: Path) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    staging = interrupted(plan, llamas)
    for shard in (staging / "output").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True))) == whole


def test_resume_loses_nothing_of_the_journal_when_it_is_killed_at_once(plan: Plan, llamas: Path) -> None:
    staging = interrupted(plan, llamas)
    with pytest.raises(Stop):
        publish(plan, None, MergeOptions(resume=True, workers=1, progress=stop_after(0)))
    again = Staging.open(llamas / "out")
    try:
        journal = (staging / "journal").read_bytes()
        assert len(again.begin(plan, True, False, lambda text: None)) == 20
        assert (staging / "journal").read_bytes() == journal
    finally:
        again.close()


def test_resume_lets_nothing_into_the_result_that_is_not_of_it(plan: Plan, llamas: Path) -> None:
    """Files of a model that --force replaced, whose deletion was cut short; a tokenizer that the seed no longer has."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    staging = interrupted(plan, llamas)
    (staging / "output" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    (staging / "output" / "tokenizer.model").write_bytes(b"stale")
    (staging / "output" / "original").mkdir()
    (staging / "output" / "original" / "params.json").write_text("{}")
    (staging / "output" / "link").symlink_to(llamas / "seed")
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True))) == whole
    assert (llamas / "seed" / "config.json").exists()


def test_deleting_the_staging_folder_begins_with_its_journal(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a kill leaves of it is never resumed from."""
    staging = interrupted(plan, llamas)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    lock = Staging.open(llamas / "out")
    lock.remove()
    lock.close()
    assert not (staging / "journal").exists()
    assert (staging / "output").exists()


def test_resume_with_a_torn_journal(plan: Plan, llamas: Path) -> None:
    """The journal cut at every byte: whatever is left is used or not, the bytes are the same."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    staging = interrupted(plan, llamas, steps=3)
    journal = (staging / "journal").read_bytes()
    shutil.copytree(staging, llamas / "kept")
    for cut in range(0, len(journal), 29):
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(llamas / "kept", staging)
        (staging / "journal").write_bytes(journal[:cut])
        assert folder_bytes(publish(plan, llamas / "out", MergeOptions(resume=True))) == whole
        shutil.rmtree(llamas / "out")


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
    assert result == folder_bytes(publish(other, llamas / "whole", MergeOptions()))


def test_nothing_to_resume(plan: Plan) -> None:
    settings, said = options(resume=True)
    publish(plan, None, settings)
    assert said == ["nothing to resume: starting from the beginning."]


def test_resume_of_a_run_that_was_killed_after_its_rename(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --force: the old model waits in the staging folder to be deleted. There is nothing else to do."""
    publish(plan, None, MergeOptions())
    (llamas / "out" / "old").write_text("")

    def killed(staging: Staging, target: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(publish_module, "_make_durable", killed)
        publish(plan, None, MergeOptions(force=True))
    assert (llamas / ".out.bam-merge" / "output" / "old").exists()
    whole = folder_bytes(llamas / "out")
    written: list[int] = []
    settings, said = options(resume=True, force=True, progress=written.append)
    assert folder_bytes(publish(plan, None, settings)) == whole
    assert said == [f"{llamas}/out is already finished, from the same recipe, version and sources. bam-merge verify checks it."]
    assert written == []
    assert not (llamas / ".out.bam-merge").exists()


def test_resume_of_a_finished_run_that_says_otherwise(plan: Plan, llamas: Path) -> None:
    """Not what this plan gives: a changed source or recipe, a file that is missing or cut, another version."""
    target = publish(plan, None, MergeOptions())
    kept = folder_bytes(target)
    manifest = kept["bam_merge.json"]

    def refused(why: str) -> None:
        try:
            publish(plan_file(llamas / "recipe.yaml"), None, MergeOptions(resume=True))
        except OutputError as error:
            assert "out already exists" in str(error), why
        else:
            pytest.fail(f"{why} was taken for finished")

    os.truncate(target / plan.shards[0].file, 100)
    refused("a cut file")
    (target / plan.shards[0].file).write_bytes(kept[plan.shards[0].file])
    (target / "bam_merge.json").write_bytes(manifest.replace(b'"version": "', b'"version": "9'))
    refused("another version")
    (target / "bam_merge.json").write_bytes(b"{}")
    refused("a damaged manifest")
    (target / "bam_merge.json").write_bytes(manifest)
    assert publish(plan_file(llamas / "recipe.yaml"), None, MergeOptions(resume=True)) == target
    write_recipe(llamas, "random_seed: 5", output="{path: out, max_shard_size: 60kB}")
    refused("another recipe")
    write_recipe(llamas, output="{path: out, max_shard_size: 60kB}")
    source = llamas / "law" / "model.safetensors"
    data = source.read_bytes()
    source.write_bytes(data[:-1] + b"x")
    refused("a source that was written to later")


def test_second_run_of_the_same_target_is_refused(plan: Plan, llamas: Path) -> None:
    staging = Staging.open(llamas / "out")
    try:
        with pytest.raises(OutputError, match=rf"out is being written by another run \(process {os.getpid()}\)\. Wait for it\."):
            publish(plan, None, MergeOptions())
    finally:
        staging.close()
    publish(plan, None, MergeOptions())


def test_a_run_that_ends_while_another_begins(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It deletes the staging folder just after the other one made sure that it is there."""
    real, calls = os.open, 0

    def too_late(path: Any, *args: Any, **options: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.rmdir(path)
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
    with pytest.raises(OutputError, match=r"\.out\.bam-merge: (Not a directory|Too many levels of symbolic links)"):
        publish(plan, None, MergeOptions())
    assert (llamas / "seed" / "config.json").exists()


def test_new_parent_folders_are_made_durable(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    publish(plan, llamas / "a" / "b" / "out", MergeOptions())
    assert synced[:2] == [str(llamas), str(llamas / "a")]


@pytest.mark.parametrize("damage", ["truncate", "rewrite", "replace"])
def test_input_that_changes_during_the_run_is_noticed(plan: Plan, llamas: Path, damage: str) -> None:
    path = llamas / "law" / "model.safetensors"
    data = path.read_bytes()

    def change(count: int) -> None:
        if count and path.exists() and not (llamas / "changed").exists():
            (llamas / "changed").touch()
            if damage == "truncate":
                os.truncate(path, 5000)
            elif damage == "rewrite":
                path.write_bytes(data[:-4] + b"abcd")
            else:
                (llamas / "new").write_bytes(data)
                os.replace(llamas / "new", path)

    with pytest.raises(CheckpointError, match=r"sources\.law: .*model\.safetensors changed while it was being merged"):
        publish(plan, None, MergeOptions(workers=1, progress=change))
    assert not (llamas / "out").exists()


@pytest.mark.parametrize("damage", ["rewrite", "replace", "delete", "appear"])
def test_tokenizer_that_changes_during_the_run_is_noticed(plan: Plan, llamas: Path, damage: str) -> None:
    path = llamas / "seed" / "vocab.txt"
    if damage != "appear":
        path.write_text("one")

    def change(count: int) -> None:
        if count and not (llamas / "changed").exists():
            (llamas / "changed").touch()
            if damage == "delete":
                path.unlink()
            elif damage == "replace":
                (llamas / "new").write_text("two")
                os.replace(llamas / "new", path)
            else:
                path.write_text("two")

    with pytest.raises(CheckpointError, match=r"sources\.seed: .*vocab\.txt changed while it was being merged"):
        publish(plan, None, MergeOptions(workers=1, progress=change))
    assert not (llamas / "out").exists()


def test_source_that_changes_while_the_manifest_is_made(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It digests tensors that were not read whole, after the last tensor was written."""
    real = publish_module.manifest

    def slow(*args: Any) -> Any:
        os.utime(llamas / "law" / "model.safetensors")
        return real(*args)

    monkeypatch.setattr(publish_module, "manifest", slow)
    with pytest.raises(CheckpointError, match=r"sources\.law: .*model\.safetensors changed while it was being merged"):
        publish(plan, None, MergeOptions())
    assert not (llamas / "out").exists()


def test_short_reads_and_writes(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may do less than asked at every call."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][: max(1, len(views[0]) // 3)]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 3)], offset))
    assert folder_bytes(publish(plan, None, MergeOptions())) == whole


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_system_calls(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    """The third call fails: our error with the file's name, no target, and a resumed run gives the same bytes."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    real, count = getattr(os, call), 0

    def fail(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(BamMergeError, match=os.strerror(code)) as caught:
        publish(plan, None, MergeOptions())
    assert ".out.bam-merge/output" in str(caught.value)
    assert not (llamas / "out").exists()
    monkeypatch.undo()
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True))) == whole


def test_a_failed_sync_behind_the_workers_is_fatal(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried again, the workers stop, and the target stays absent."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    calls, failed = 0, threading.Event()

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr("bam_merge.execute.FLUSH_SECONDS", 0)
    with pytest.raises(OutputError, match=r"\.out\.bam-merge/output/model.*Input/output error"):
        publish(plan, None, MergeOptions(workers=1, progress=lambda count: count and failed.wait(60)))
    assert calls == 1
    assert not (llamas / "out").exists()
    monkeypatch.undo()
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True))) == whole


def test_nothing_is_resumed_after_a_failed_sync(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page cache may still show, and digest to, what never reached the disk, and a second fsync would say nothing: all is written again."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    real, written = os.pwrite, 0

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(SyncFailed):
        patch.setattr(os, "fsync", fail)
        publish(plan, None, MergeOptions())

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    settings, said = options(resume=True)
    assert folder_bytes(publish(plan, None, settings)) == whole
    assert said == ["nothing to resume: starting from the beginning."]
    assert written == plan.bytes_written


@pytest.mark.parametrize("force", [False, True])
def test_published_but_not_known_to_be_durable(plan: Plan, llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    """The folder's last sync fails: the result is there, the exit status is neither success nor that of nothing published."""
    recipe = llamas / "recipe.yaml"
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    if force:
        (llamas / "out").mkdir()
        (llamas / "out" / "config.json").write_text("old")
    real = os.fsync

    def fail(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(llamas):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        result = run(recipe, *(["--force"] if force else []))
    assert result.status == 3
    assert f"{llamas}/out is published and complete, but may not survive a power cut: " in result.err
    assert folder_bytes(llamas / "out") == whole
    kept = llamas / ".out.bam-merge" / "output" / "config.json"
    assert (kept.exists() and kept.read_text() == "old") == force
    assert (f"What it replaced is kept in {llamas}/.out.bam-merge" in result.err) == force


def test_the_old_model_is_deleted_after_the_new_one_is_durable(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(plan, None, MergeOptions())
    done: list[str] = []
    real_fsync, real_unlink = os.fsync, os.unlink

    def fsync(descriptor: int) -> None:
        done.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        real_fsync(descriptor)

    def unlink(path: Any, **options: Any) -> None:
        done.append(f"delete {os.fspath(path)}")
        real_unlink(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "unlink", unlink)
    publish(plan, None, MergeOptions(force=True))
    assert done.index("delete config.json") > done.index(f"sync {llamas}")


def test_chunk_of_an_unreadable_source(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"sources\.\w+: .*: reading .*: Input/output error"):
        publish(plan, None, MergeOptions())


SLOW = """
import sys, time
from bam_merge import execute, MergeOptions
from bam_merge.plan import plan_file
from bam_merge.publish import publish
print("started", flush=True)
publish(plan_file(sys.argv[1]), None, MergeOptions(workers=1, resume=True, progress=lambda count: time.sleep(0.01)))
"""


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.25, 0.4])
def test_sigkill_leaves_the_target_absent_and_a_resumed_run_is_the_same(plan: Plan, llamas: Path, delay: float) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(llamas / "recipe.yaml")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (llamas / "out").exists()
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True))) == whole


def test_few_open_files_are_enough(llamas: Path) -> None:
    """40 shards a source under ulimit -n 64."""
    for source in ("seed", "code", "law"):
        shutil.rmtree(llamas / source)
    write_sources(llamas, CONFIGS["llama"], shards=20)
    recipe = write_recipe(llamas)
    command = f"ulimit -n 64; exec {sys.executable} -m bam_merge {recipe} --workers 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (llamas / "out" / "config.json").exists()


def test_file_size_limit_is_explained(llamas: Path) -> None:
    recipe = write_recipe(llamas)
    command = f"trap '' XFSZ; ulimit -f 20; exec {sys.executable} -m bam_merge {recipe}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "File too large. The file size limit (ulimit -f) is too small" in done.stderr
    assert not (llamas / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_full(llamas: Path) -> None:
    """A real file system with too little room: the plan refuses; with the check fooled, the run fails in words and resumes."""
    small = llamas / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs here")
    try:
        recipe = write_recipe(llamas, output="{path: small/out}")
        done = subprocess.run([sys.executable, "-m", "bam_merge", recipe], capture_output=True, text=True)
        assert done.returncode == 2
        assert "GB free, the merge writes" in done.stderr
        blind = "import shutil, sys; shutil.disk_usage = lambda p: type('U', (), {'free': 10**12}); from bam_merge.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", blind, recipe], capture_output=True, text=True)
        assert done.returncode == 2
        assert "No space left on device. Free some space, then run again with --resume." in done.stderr
        assert not (small / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=40m", small], check=True)
        done = subprocess.run([sys.executable, "-m", "bam_merge", recipe, "--resume"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads((small / "out" / "config.json").read_text())["model_type"] == "bam"
    finally:
        subprocess.run(["umount", small], check=True)


def test_interrupt_says_how_to_go_on(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(execute_module, "wait", interrupt)
    result = run(write_recipe(llamas))
    assert result.status == 130
    assert "what is finished is kept; run again with --resume to go on." in result.err
    assert "interrupted." in result.err
    assert not (llamas / "out").exists()
