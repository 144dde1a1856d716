"""A merge that fails: changed inputs, refusing system calls, full disks, limits, interrupts. Nothing is published, in words."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from runs import folder_bytes, options, plan

from bam_merge import MergeOptions
from bam_merge.errors import BamMergeError, CheckpointError, OutputError, SyncFailed
from bam_merge.planning.plan import Plan
from bam_merge.publishing import companions as companions_module
from bam_merge.publishing.publish import publish

__all__ = ["plan"]


@pytest.mark.parametrize("damage", ["truncate", "rewrite", "replace", "rewrite, with its times", "replace, with its times"])
def test_input_that_changes_during_the_run_is_noticed(plan: Plan, llamas: Path, damage: str) -> None:
    path = llamas / "law" / "model.safetensors"
    data, before = path.read_bytes(), path.stat()

    def change(count: int) -> None:
        if count and path.exists() and not (llamas / "changed").exists():
            (llamas / "changed").touch()
            if damage == "truncate":
                os.truncate(path, 5000)
            elif damage.startswith("rewrite"):
                path.write_bytes(data[:-4] + b"abcd")
            else:
                (llamas / "new").write_bytes(data)
                os.replace(llamas / "new", path)
            if damage.endswith("times"):
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(CheckpointError, match=r"sources\.law: .*model\.safetensors changed while it was being merged"):
        publish(plan, None, MergeOptions(workers=1, progress=change, verify=False))
    assert not (llamas / "out").exists()


def test_the_same_files_seen_from_another_host(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file system that both have mounted: device numbers and inodes are a host's own, and the plan was made by another one."""
    other = {call: getattr(os, call) for call in ("stat", "fstat", "lstat")}

    def elsewhere(call: str) -> Any:
        def status(*args: Any, **options: Any) -> os.stat_result:
            found = other[call](*args, **options)
            values = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
            return os.stat_result((found[0], found.st_ino + 1, found.st_dev + 1, *found[3:]), values)

        return status

    for call in other:
        monkeypatch.setattr(os, call, elsewhere(call))
    assert os.stat(llamas).st_dev == other["stat"](llamas).st_dev + 1
    publish(plan, None, MergeOptions())


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
        publish(plan, None, MergeOptions(workers=1, progress=change, verify=False))
    assert not (llamas / "out").exists()


def test_source_that_changes_while_the_manifest_is_made(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It digests tensors that were not read whole, after the last tensor was written."""
    real = companions_module.manifest

    def slow(*args: Any) -> Any:
        os.utime(llamas / "law" / "model.safetensors")
        return real(*args)

    monkeypatch.setattr(companions_module, "manifest", slow)
    with pytest.raises(CheckpointError, match=r"sources\.law: .*model\.safetensors changed while it was being merged"):
        publish(plan, None, MergeOptions(verify=False))
    assert not (llamas / "out").exists()


def test_a_system_without_preadv(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pread takes its place, and may do less than asked as well."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions()))
    pread, calls = os.pread, 0

    def short(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal calls
        calls += 1
        return pread(descriptor, max(1, count // 3), offset)

    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(os, "pread", short)
    assert folder_bytes(publish(plan, None, MergeOptions())) == whole
    assert calls > 100


def test_short_reads_and_writes(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may do less than asked at every call."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][: max(1, len(views[0]) // 3)]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 3)], offset))
    assert folder_bytes(publish(plan, None, MergeOptions(verify=False))) == whole


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_system_calls(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    """The third call fails: our error with the file's name, no target, and a resumed run gives the same bytes."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    real, count = getattr(os, call), 0

    def fail(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(BamMergeError, match=os.strerror(code)) as caught:
        publish(plan, None, MergeOptions(verify=False))
    assert ".out.bam-merge/output" in str(caught.value)
    assert not (llamas / "out").exists()
    monkeypatch.undo()
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True, verify=False))) == whole


def test_a_failed_sync_behind_the_workers_is_fatal(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried again, the workers stop, and the target stays absent."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    calls, failed = 0, threading.Event()

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr("bam_merge.merging.outputs.FLUSH_SECONDS", 0)
    with pytest.raises(OutputError, match=r"\.out\.bam-merge/output/model.*Input/output error"):
        publish(plan, None, MergeOptions(workers=1, progress=lambda count: count and failed.wait(60), verify=False))
    assert calls == 1
    assert not (llamas / "out").exists()
    monkeypatch.undo()
    assert folder_bytes(publish(plan, None, MergeOptions(resume=True, verify=False))) == whole


def test_nothing_is_resumed_after_a_failed_sync(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page cache may still show, and digest to, what never reached the disk, and a second fsync would say nothing: all is written again."""
    whole = folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))
    real, written = os.pwrite, 0

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(SyncFailed):
        patch.setattr(os, "fsync", fail)
        publish(plan, None, MergeOptions(verify=False))

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    settings, said = options(resume=True)
    assert folder_bytes(publish(plan, None, settings)) == whole
    assert said == ["nothing to resume: starting from the beginning."]
    assert written == plan.bytes_written


def test_chunk_of_an_unreadable_source(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"sources\.\w+: .*: reading .*: Input/output error"):
        publish(plan, None, MergeOptions(verify=False))


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
    real, calls = os.pwrite, iter(range(5))

    def interrupt(descriptor: int, data: memoryview, offset: int) -> int:
        if next(calls, None) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background commands ignore
    try:
        result = run(write_recipe(llamas))
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status == 130
    assert "what is finished is kept; run again with --resume to go on." in result.err
    assert "interrupted." in result.err
    assert not (llamas / "out").exists()
