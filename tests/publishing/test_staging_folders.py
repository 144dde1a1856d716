"""A staging folder that somebody else planted, or could write in, gets nothing into a result and nothing overwritten."""

import os
import random
import shutil
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from damage import deadline
from planting import KINDS, MODES, PLACES, Victim, attacked, begun, clear, plant, plant_any
from runs import folder_bytes, interrupted, options
from runs import plan as plan  # a fixture

from bam_merge import MergeOptions, own_folder
from bam_merge.errors import OutputError
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.publishing.staging import Staging

NOBODY = 65534


@pytest.fixture
def victim(llamas: Path) -> Victim:
    return Victim.make(llamas / "victim")


@pytest.fixture
def expected(plan: Plan, llamas: Path) -> dict[str, bytes]:
    return folder_bytes(publish(plan, llamas / "whole", MergeOptions(verify=False)))


def made_anew(staging: Path, unfinished: Path) -> None:
    if staging.is_symlink() or staging.is_file() or (staging.exists() and not staging.is_dir()):
        staging.unlink()
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(staging.parent / "out", ignore_errors=True)
    shutil.copytree(unfinished, staging)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_entry_at_every_place(plan: Plan, llamas: Path, victim: Victim, expected: dict[str, bytes], kind: str) -> None:
    """Into nothing, and into what a run of the same plan left, which --resume goes on with."""
    staging = interrupted(plan, llamas)
    shutil.copytree(staging, llamas / "unfinished")
    for place in PLACES:
        for resume in (False, True):
            made_anew(staging, llamas / "unfinished")
            if not resume:
                shutil.rmtree(staging)
            plant(staging, place, kind, victim)
            said = attacked(plan, llamas / "out", victim, expected, resume)
            if (place in ("", "pid", "journal", "stranger") and "link" in kind) or (kind in ("FIFO", "socket") and "/" not in place):
                assert ".out.bam-merge" in said, f"{place}: not refused"


def test_any_mixture_of_entries_modes_and_bytes(plan: Plan, llamas: Path, victim: Victim, expected: dict[str, bytes]) -> None:
    """60 random staging folders; `attacked` holds what must be true of each."""
    chance = random.Random(11)
    staging = interrupted(plan, llamas)
    shutil.copytree(staging, llamas / "unfinished")
    outcomes = set()
    for _ in range(60):
        made_anew(staging, llamas / "unfinished")
        for _ in range(chance.randint(0, 2)):
            plant(staging, chance.choice(PLACES[1:]), chance.choice(list(KINDS)), victim)
        if chance.random() < 0.3 and (staging / "journal").is_file():
            data = bytearray((staging / "journal").read_bytes() or b"x")
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            (staging / "journal").unlink()
            (staging / "journal").write_bytes(data)
        staging.chmod(chance.choice([0o700, *MODES]))
        outcomes.add(bool(attacked(plan, llamas / "out", victim, expected, chance.random() < 0.5)))
        staging.chmod(0o700) if staging.is_dir() else None
    assert outcomes == {False, True}


def test_hundreds_of_staging_folders(plan: Plan, llamas: Path, victim: Victim) -> None:
    """As far as a run looks at what it finds, which is where it can be fooled."""
    chance = random.Random(12)
    staging = interrupted(plan, llamas)
    shutil.copytree(staging, llamas / "unfinished")
    outcomes = []
    for number in range(400):
        if number % 4 == 0:
            made_anew(staging, llamas / "unfinished")
        plant_any(staging, victim, chance)
        outcomes.append(bool(begun(plan, llamas / "out", victim, chance.random() < 0.5)))
        if outcomes[-1]:
            clear(staging)
    assert 80 < sum(outcomes) < 320


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o707, 0o1777, 0o720])
def test_a_folder_that_others_can_write_in_is_refused(plan: Plan, llamas: Path, mode: int, resume: bool) -> None:
    """They may have exchanged what is in it."""
    staging = interrupted(plan, llamas)
    before = folder_bytes(staging / "output")
    staging.chmod(mode)
    with pytest.raises(OutputError, match=rf"\.out\.bam-merge can be written by others \(mode {mode:04o}\).*delete it, and run again; or"):
        publish(plan, None, MergeOptions(resume=resume, verify=False))
    assert folder_bytes(staging / "output") == before
    assert stat.S_IMODE(staging.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o750])
def test_a_folder_that_others_can_only_read_is_gone_on_with_and_closed(plan: Plan, llamas: Path, mode: int) -> None:
    staging = interrupted(plan, llamas)
    staging.chmod(mode)
    again = Staging.open(llamas / "out")
    assert stat.S_IMODE(staging.stat().st_mode) == 0o700
    assert len(again.begin(plan, True, False, lambda text: None)) == 20
    again.close()


def make_foreign(staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the folder belong to somebody else; who is not root becomes somebody else instead."""
    if os.geteuid() == 0:
        os.chown(staging, NOBODY, NOBODY)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)
        monkeypatch.setattr(own_folder, "owner_of_new_files", lambda folder: other)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", ["nothing", "an unfinished run"])
def test_a_folder_of_somebody_else_is_refused(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch, left: str, resume: bool) -> None:
    staging = llamas / ".out.bam-merge"
    if left == "nothing":
        staging.mkdir(mode=0o700)
    else:
        interrupted(plan, llamas)
    entries = sorted(os.listdir(staging))
    make_foreign(staging, monkeypatch)
    with pytest.raises(
        OutputError, match=r"\.out\.bam-merge belongs to .*user id \d+.*Choose another --output, or have its owner delete it"
    ):
        publish(plan, None, MergeOptions(resume=resume, verify=False))
    assert sorted(os.listdir(staging)) == entries
    assert not (llamas / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_files_of_somebody_else_are_not_resumed_from(plan: Plan, llamas: Path, expected: dict[str, bytes]) -> None:
    """In a folder that is ours now: the journal is refused, staged files are written anew."""
    staging = interrupted(plan, llamas)
    for path in (staging / "output").iterdir():
        os.chown(path, NOBODY, NOBODY)
    settings, said = options(resume=True)
    target = publish(plan, None, settings)
    assert said == [f"resuming: 0 of {len(plan.steps)} tensors are finished."]
    assert folder_bytes(target) == expected
    assert {path.stat().st_uid for path in target.iterdir()} == {0}
    shutil.rmtree(target)
    staging = interrupted(plan, llamas)
    os.chown(staging / "output", NOBODY, NOBODY)
    assert publish(plan, None, MergeOptions(resume=True, verify=False)).stat().st_uid == 0
    shutil.rmtree(target)
    staging = interrupted(plan, llamas)
    os.chown(staging / "journal", NOBODY, NOBODY)
    with pytest.raises(OutputError, match=r"holds what bam-merge did not put there: journal \(of .*65534\)"):
        publish(plan, None, MergeOptions(resume=True, verify=False))


def test_a_network_file_system_that_maps_all_users_to_one(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run makes there is not its user's by number, and yet its own."""
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    interrupted(plan, llamas)
    assert publish(plan, None, MergeOptions(resume=True, verify=False)).is_dir()
    assert not (llamas / ".out.bam-merge").exists()


def test_a_file_system_without_permissions_is_said(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder just made is used, since nothing else is to be had there; one that was there is refused."""
    monkeypatch.setattr(os, "fchmod", lambda descriptor, mode: None)
    (llamas / "folder").mkdir()
    (llamas / "folder").chmod(0o777)
    descriptor = os.open(llamas / "folder", own_folder.FOLDER)
    try:
        assert "this file system keeps no permissions" in (own_folder.check_own(descriptor, "x", made=True) or "")
        with pytest.raises(OutputError, match=r"x can be written by others \(mode 0777\)"):
            own_folder.check_own(descriptor, "x", made=False)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_closed_while_it_is_made_and_by_the_umask_when_published(plan: Plan, llamas: Path, umask: int) -> None:
    seen = set()

    def look(count: int) -> None:
        seen.add(stat.S_IMODE((llamas / ".out.bam-merge").stat().st_mode))

    before = os.umask(umask)
    try:
        target = publish(plan, None, MergeOptions(progress=look, verify=False))
    finally:
        os.umask(before)
    assert seen == {0o700}
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("verify", [False, True])
def test_a_folder_that_is_put_in_place_of_ours_while_the_merge_runs(
    plan: Plan, llamas: Path, victim: Victim, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """Who can write beside it can rename it: the run goes on in its own, and publishes nothing."""
    before = victim.state()
    staging = llamas / ".out.bam-merge"

    def swap(count: int) -> None:
        if count and not (llamas / "moved").exists():
            staging.rename(llamas / "moved")
            plant(staging, "output", "link to a folder", victim)

    with deadline(), pytest.raises(OutputError, match=r"\.out\.bam-merge was deleted while the merge ran\. Nothing was published"):
        publish(plan, None, MergeOptions(workers=1, progress=swap, verify=verify))
    assert victim.state() == before
    assert not (llamas / "out").exists()
    assert (llamas / "moved" / "output" / "model-00001-of-00004.safetensors").exists()
    assert os.listdir(staging) == ["output"]


def test_a_link_that_appears_inside_while_the_merge_runs(plan: Plan, llamas: Path, victim: Victim) -> None:
    """Not even where a file is about to be made, by whoever got in."""
    before = victim.state()

    def link(count: int) -> None:
        place = llamas / ".out.bam-merge" / "output" / "config.json"
        if count and not place.is_symlink():
            place.symlink_to(victim.folder / "file")

    with pytest.raises(OutputError, match=r"output/config\.json: (is a symbolic link, expected a file|File exists)"):
        publish(plan, None, MergeOptions(workers=1, progress=link, verify=False))
    assert victim.state() == before
    assert not (llamas / "out").exists()


def test_links_to_big_files_are_no_room(plan: Plan, llamas: Path) -> None:
    """What an unfinished run holds counts as free, and only that."""
    from bam_merge.publishing.staging import staged_bytes

    output = interrupted(plan, llamas) / "output"
    held = staged_bytes(llamas / "out")
    assert held >= sum(path.stat().st_blocks * 512 for path in output.iterdir()) > 0
    (output / "big").symlink_to(llamas / "seed" / "model.safetensors")
    (output / "nowhere").symlink_to(llamas / "none")
    assert staged_bytes(llamas / "out") == held


def test_what_a_run_that_ends_takes_away_is_no_room(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It publishes, or deletes, its files while they are added up: no error, and the others count."""
    from bam_merge.publishing.staging import staged_bytes

    output = interrupted(plan, llamas) / "output"
    files = sorted(output.glob("*.safetensors"))
    rest = sum(path.stat().st_blocks * 512 for path in files[:-1])
    real = os.scandir

    def listed(path: Any) -> Any:
        entries = list(real(path))
        files[-1].unlink()
        return nullcontext(entries)

    monkeypatch.setattr(os, "scandir", listed)
    assert staged_bytes(llamas / "out") == rest > 0
    monkeypatch.undo()
    output.rename(llamas / "elsewhere")
    assert staged_bytes(llamas / "out") == 0


def test_the_holder_is_not_read_through_a_link(llamas: Path, victim: Victim) -> None:
    (victim.folder / "file").write_text("1\n")
    lock = Staging.open(llamas / "out")
    try:
        plant(lock.folder, "pid", "link to a file", victim)
        with deadline(), pytest.raises(OutputError, match=r"out is being written by another run\. Wait for it\."):
            Staging.open(llamas / "out")
        plant(lock.folder, "pid", "FIFO", victim)
        with deadline(), pytest.raises(OutputError, match=r"out is being written by another run\. Wait for it\."):
            Staging.open(llamas / "out")
    finally:
        lock.close()


def test_a_failed_result_goes_through_no_planted_name(plan: Plan, llamas: Path, victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, files and folders at NAME.failed, NAME.failed-2, ... stay what they are."""
    import bam_merge.verifying.verification
    from bam_merge.errors import VerificationFailed
    from bam_merge.verifying.report import Check, Report

    monkeypatch.setattr(
        bam_merge.verifying.verification,
        "verify_rest",
        lambda found, folder, plan, options: Report(checks=[Check("digests", False, "wrong")]),
    )
    before = victim.state()
    (llamas / "out.failed").symlink_to(victim.folder / "inside")
    (llamas / "out.failed-2").symlink_to(victim.folder / "nowhere")
    (llamas / "out.failed-3").write_text("mine")
    with pytest.raises(VerificationFailed, match=r"kept for inspection in .*/out\.failed-4"):
        publish(plan, None, MergeOptions())
    assert victim.state() == before
    assert (llamas / "out.failed-4" / "config.json").is_file()
    assert (llamas / "out.failed-3").read_text() == "mine"


def test_descriptors_are_given_back(plan: Plan, llamas: Path, victim: Victim) -> None:
    """After a success, a refusal and a failure."""

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    publish(plan, llamas / "first", MergeOptions(verify=False))
    before = count()
    publish(plan, llamas / "second", MergeOptions(verify=False))
    interrupted(plan, llamas)
    publish(plan, None, MergeOptions(resume=True, verify=False))
    plant(llamas / ".third.bam-merge", "pid", "link to a file", victim)
    with pytest.raises(OutputError):
        publish(plan, llamas / "third", MergeOptions(verify=False))
    assert count() == before


def test_names_that_network_file_systems_leave_are_no_strangers(plan: Plan, llamas: Path, victim: Victim) -> None:
    """Unless they are links: then somebody planted them."""
    staging = interrupted(plan, llamas)
    plant(staging, ".nfs000000000123", "file", victim)
    assert publish(plan, None, MergeOptions(resume=True, verify=False)).is_dir()
    assert not staging.exists()
    plant(llamas / ".other.bam-merge", ".nfs000000000123", "link to a file", victim)
    with pytest.raises(OutputError, match=r"did not put there: \.nfs000000000123 \(a symbolic link\)"):
        publish(plan, llamas / "other", MergeOptions(verify=False))


def test_errors_say_the_whole_name(plan: Plan, llamas: Path, run: Any, victim: Victim) -> None:
    plant(llamas / ".out.bam-merge", "journal", "dangling link", victim)
    from conftest import write_recipe

    result = run(write_recipe(llamas), "--resume")
    assert result.status == 2
    assert result.err.startswith(f"error: {llamas}/.out.bam-merge holds what bam-merge did not put there: journal (a symbolic link). ")
    assert "or choose another --output" in result.err
