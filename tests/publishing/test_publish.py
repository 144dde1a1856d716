"""Publishing: absent or complete, never in the place of something else, and durable."""

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from runs import folder_bytes, options, plan

from bam_merge import MergeOptions
from bam_merge.errors import OutputError, VerificationFailed
from bam_merge.planning.plan import Plan
from bam_merge.publishing import renaming
from bam_merge.publishing.publish import publish
from bam_merge.publishing.staging import Staging

__all__ = ["plan"]


def test_a_finished_merge_leaves_the_folder_and_nothing_else(plan: Plan, llamas: Path) -> None:
    umask = os.umask(0o027)
    try:
        target = publish(plan, None, MergeOptions(verify=False))
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
        publish(plan, None, MergeOptions(verify=False))
    assert list((llamas / "out").iterdir()) == []


def test_force_replaces_the_whole_folder(plan: Plan, llamas: Path) -> None:
    """An older, differently sharded model leaves nothing behind."""
    target = publish(plan, None, MergeOptions(verify=False))
    (target / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    publish(plan, None, MergeOptions(force=True, verify=False))
    assert "model-00009-of-00009.safetensors" not in folder_bytes(target)
    assert not (llamas / ".out.bam-merge").exists()


def test_force_does_not_delete_what_is_no_checkpoint(plan: Plan, llamas: Path) -> None:
    (llamas / "out").mkdir()
    (llamas / "out" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="is not a checkpoint folder, so --force will not delete it"):
        publish(plan, None, MergeOptions(force=True, verify=False))
    assert (llamas / "out" / "thesis.tex").exists()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification that fails."""
    import bam_merge.verifying.verification
    from bam_merge.verifying.report import Check, Report

    monkeypatch.setattr(
        bam_merge.verifying.verification,
        "verify_rest",
        lambda found, folder, plan, options: Report(checks=[Check("digests", False, "wrong")]),
    )


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
    settings = MergeOptions(progress=lambda count: (llamas / "out").mkdir(exist_ok=True), verify=False)
    with pytest.raises(OutputError, match=r"appeared while the merge ran. Nothing was replaced"):
        publish(plan, None, settings)
    assert list((llamas / "out").iterdir()) == []


def test_force_does_not_delete_what_became_something_else(plan: Plan, llamas: Path) -> None:
    """The folder to replace was swapped for somebody's own while the merge ran."""
    target = publish(plan, None, MergeOptions(verify=False))

    def swap(count: int) -> None:
        if count and not (llamas / "moved").exists():
            target.rename(llamas / "moved")
            target.mkdir()
            (target / "thesis.tex").write_text("years")

    with pytest.raises(OutputError, match=r"out became what is not a checkpoint folder while the merge ran. Nothing was replaced"):
        publish(plan, None, MergeOptions(force=True, workers=1, progress=swap, verify=False))
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
        publish(plan, None, MergeOptions(workers=1, progress=delete, verify=False))
    assert others[0].is_ours()
    others[0].close()
    assert (llamas / ".out.bam-merge" / "output" / "half").exists()
    assert not (llamas / "out").exists()


def test_run_that_waited_at_the_lock_of_one_that_published(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Staging.open

    def late(target: Path, notify: Any) -> Staging:
        monkeypatch.setattr(Staging, "open", real)
        publish(plan, None, MergeOptions(verify=False))
        return real(target, notify)

    monkeypatch.setattr(Staging, "open", late)
    written: list[int] = []
    with pytest.raises(OutputError, match=r"out already exists"):
        publish(plan, None, MergeOptions(progress=written.append, verify=False))
    assert written == []
    assert not (llamas / ".out.bam-merge").exists()


@pytest.fixture
def without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose rename has no flags."""
    monkeypatch.setattr(renaming, "_rename", lambda old, new, flags: False)


def test_plain_rename_is_said(plan: Plan, llamas: Path, without_flags: None) -> None:
    settings, said = options()
    whole = folder_bytes(publish(plan, None, settings))
    assert said == [f"{llamas}: this file system cannot rename without replacing, so a plain rename."]
    settings, said = options(force=True)
    (llamas / "out" / "pytorch_model.bin").write_text("old")
    assert folder_bytes(publish(plan, None, settings)) == whole
    assert said == [f"{llamas}: this file system cannot exchange two folders, so a plain rename."]
    assert not (llamas / ".out.bam-merge").exists()


def test_plain_rename_replaces_nothing(plan: Plan, llamas: Path, without_flags: None) -> None:
    with pytest.raises(OutputError, match=r"appeared while the merge ran"):
        publish(plan, None, MergeOptions(progress=lambda count: (llamas / "out").mkdir(exist_ok=True), verify=False))
    assert list((llamas / "out").iterdir()) == []


def test_plain_rename_that_fails_half_way_puts_the_old_model_back(
    plan: Plan, llamas: Path, without_flags: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = publish(plan, None, MergeOptions(verify=False))
    (target / "pytorch_model.bin").write_text("old")
    real = os.rename

    def fail(old: Any, new: Any, **folders: int) -> None:
        if Path(old).name == "output":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(old, new, **folders)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OutputError, match="Input/output error when renaming the finished folder"):
        publish(plan, None, MergeOptions(force=True, verify=False))
    assert (target / "pytorch_model.bin").exists()


def test_new_parent_folders_are_made_durable(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    publish(plan, llamas / "a" / "b" / "out", MergeOptions(verify=False))
    assert synced[:2] == [str(llamas), str(llamas / "a")]


@pytest.mark.parametrize("force", [False, True])
def test_published_but_not_known_to_be_durable(plan: Plan, llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    """The folder's last sync fails: the result is there, the exit status is neither success nor that of nothing published."""
    recipe = llamas / "recipe.yaml"
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
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
        result = run(recipe, *(["--force"] if force else []), "--no-verify")
    assert result.status == 3
    assert f"{llamas}/out is published and complete, but may not survive a power cut: " in result.err
    assert folder_bytes(llamas / "out") == whole
    kept = llamas / ".out.bam-merge" / "output" / "config.json"
    assert (kept.exists() and kept.read_text() == "old") == force
    assert (f"What it replaced is kept in {llamas}/.out.bam-merge" in result.err) == force


def test_the_old_model_is_deleted_after_the_new_one_is_durable(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(plan, None, MergeOptions(verify=False))
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
    publish(plan, None, MergeOptions(force=True, verify=False))
    assert done.index("delete config.json") > done.index(f"sync {llamas}")
