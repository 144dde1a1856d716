"""What a part proves of itself, and what finish makes of it: the report of one process, and no wrong byte gets through."""

import json
import os
import random
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from runs import folder_bytes, options
from test_stored_dtypes import stored_as

from bam_merge import expressions
from bam_merge.checkpoints.pieces import Read
from bam_merge.checkpoints.reading import SourceFiles
from bam_merge.errors import CheckpointError, NotYet, OutputError, VerificationFailed
from bam_merge.merging.tensor import TensorWriter
from bam_merge.planning.make import plan_file
from bam_merge.planning.parts import parts_of
from bam_merge.planning.plan import Plan
from bam_merge.publishing.finishing import finish
from bam_merge.publishing.journal import line
from bam_merge.publishing.parts import make_part
from bam_merge.publishing.publish import publish
from bam_merge.verifying import stored
from bam_merge.verifying.report import Report

SMALL = "{path: out, max_shard_size: 60kB}"
METHODS = {
    "bam": ("", "bam"),
    "btx": ("", "btx"),
    "ties": ("shared: {make: ties, base: seed, density: 0.5}", "merge"),
}


@pytest.fixture
def plan(llamas: Path) -> Plan:
    return plan_file(write_recipe(llamas, "", "btx", output=SMALL))


def make(plan: Plan, of: int, **settings: Any) -> None:
    for number in range(1, of + 1):
        make_part(plan, None, number, of, options(verify=True, **settings)[0])


def finished(plan: Plan, level: str = "quick") -> Report:
    """What finish reports, whether or not it publishes."""
    found: list[Report] = []
    with suppress(VerificationFailed):
        finish(plan, None, replace(options()[0], verify=level, on_report=found.append))  # type: ignore[arg-type]
    return found[0]


def document(report: Report) -> dict[str, Any]:
    said = report.document()
    return {**said, "checks": {check["name"]: {**check, "seconds": 0} for check in said["checks"]}}


def folder(plan: Plan) -> Path:
    return Path(plan.recipe.file).parent / ".out.bam-merge"


def proofs(plan: Plan) -> list[Path]:
    return sorted((folder(plan) / "parts").glob("*.proof"))


def count_of_compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    compare = stored._compare

    def counted(path: Path, step: Any, *rest: Any, **named: Any) -> Any:
        seen.append(step.name)
        return compare(path, step, *rest, **named)

    monkeypatch.setattr(stored, "_compare", counted)
    return seen


# ---- the same report ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "level"), [*((name, "quick") for name in METHODS), ("btx", "full")])
def test_the_report_is_that_of_one_process(method: str, level: str, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, name = METHODS[method]
    plan = plan_file(write_recipe(llamas, keys, name, output=SMALL))
    reports: list[Report] = []
    publish(plan, None, replace(options()[0], verify=level, on_report=reports.append))  # type: ignore[arg-type]
    whole = (llamas / "out").rename(llamas / "whole")
    of = min(3, len(plan.shards))
    make(plan, of)
    assert len(proofs(plan)) == of
    seen = count_of_compared(monkeypatch)
    assert document(finished(plan, level)) == document(reports[0])
    assert seen == []  # all was proved
    assert folder_bytes(llamas / "out") == folder_bytes(whole)


def test_what_no_part_proved_is_proved_by_finish(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    make_part(plan, None, 1, 2, options()[0])
    result = make_part(plan, None, 2, 2, options(verify=True)[0])
    assert result is not None and result.proved
    assert [path.name for path in proofs(plan)] == ["00002-of-00002.proof"]
    seen = count_of_compared(monkeypatch)
    assert finished(plan).ok
    assert sorted(seen) == sorted(step.name for step in plan.steps if step.file in parts_of(plan, 2)[0].files)


def test_a_proof_is_left_by_a_part_that_was_made_already_and_not_twice(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    make_part(plan, None, 1, 2, options()[0])
    seen = count_of_compared(monkeypatch)
    for _ in range(2):
        again = make_part(plan, None, 1, 2, options(verify=True)[0])
        assert again is not None and again.at_once and again.proved
    assert sorted(seen) == sorted(again.digests)


def test_progress_ends_at_the_end(plan: Plan) -> None:
    told: list[tuple[int, int]] = []
    make_part(plan, None, 1, 2, replace(options(verify=True)[0], on_verify=lambda done, total: told.append((done, total))))
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# ---- what it must catch --------------------------------------------------------------------------------------------------------


def flip(plan: Plan, name: str, byte: int = -1) -> None:
    """Change a byte of a written tensor where it lies."""
    step = next(step for step in plan.steps if step.name == name)
    path = folder(plan) / "output" / step.file
    data = bytearray(path.read_bytes())
    data[step.offset + byte % step.nbytes] ^= 0x40
    path.write_bytes(data)


def victims(plan: Plan) -> list[str]:
    """A copy, what is averaged, and a router."""
    kinds: dict[str, str] = {}
    for step in plan.steps:
        kinds.setdefault(str(stored._kind(step)), step.name)
    assert kinds.keys() == {"copies", "merges", "routers"}
    return sorted(kinds.values())


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_byte_changed_after_its_proof(plan: Plan, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """finish says what one process says: its own words without any proof are those with them."""
    name = victims(plan)[kind]
    said = []
    for proved in (True, False):
        make(plan, 2)
        flip(plan, name, 1)
        if not proved:
            for path in proofs(plan):
                path.unlink()
        seen = count_of_compared(monkeypatch)
        report = finished(plan)
        assert seen == [name] if proved else set(seen) > {name}
        monkeypatch.undo()
        assert not (folder(plan).parent / "out").exists()
        said.append(document(report))
    assert said[0] == said[1]
    assert not said[0]["ok"]
    failed = {check["name"]: check["detail"] for check in said[0]["checks"].values() if check["ok"] is False}
    assert name in failed["digests"]
    assert any(name in failed.get(check, "") for check in ("copies", "merges", "routers"))


def wrong_byte(name: str) -> Callable[..., None]:
    emit = TensorWriter._emit

    def other(self: TensorWriter, data: memoryview) -> None:
        if self.step.name == name:
            data = memoryview(bytearray(data))
            data[1] ^= 0x40
        emit(self, data)

    return other


def wrong_value(of: Read | None) -> Callable[..., None]:
    read = SourceFiles.read

    def other(self: SourceFiles, wanted: Read, runs: Any, view: memoryview) -> None:
        read(self, wanted, runs, view)
        if wanted == of:
            view[1] ^= 0x40

    return other


@pytest.mark.parametrize("sabotage", ["byte", "source"])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_sabotage_is_caught_by_the_part_and_by_finish_in_the_same_words(
    plan: Plan, llamas: Path, kind: int, sabotage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = victims(plan)[kind]
    if sabotage == "source" and "router" in name:
        name = next(step.name for step in plan.steps if "lm_head" in step.name)
    of = next(step for step in plan.steps if step.name == name)
    read = next(expressions.reads(of.expr), None)
    broken = (TensorWriter, "_emit", wrong_byte(name)) if sabotage == "byte" else (SourceFiles, "read", wrong_value(read))
    number = next(part.number for part in parts_of(plan, 2) if of.file in part.files)

    with monkeypatch.context() as patch:
        patch.setattr(*broken)
        with pytest.raises(VerificationFailed) as whole:
            publish(plan, llamas / "whole", options(verify=True)[0])
        with pytest.raises(VerificationFailed) as part:
            make_part(plan, None, number, 2, options(verify=True)[0])
        words = [problem for problem in whole.value.problems if re.match("copies|merges|routers", problem)]
        assert words
        if sabotage == "byte":
            assert part.value.problems[:-1] == tuple(words)
        else:  # one source's tensor goes into several: a part has its own
            assert all(re.match("copies|merges", problem) for problem in part.value.problems[:-1])
        assert f"part {number}/2 of " in part.value.problems[-1] and "counts as not made. Run again." in part.value.problems[-1]
        with pytest.raises(NotYet, match="no part was made"):
            finish(plan, None, options()[0])
        make_part(plan, None, number, 2, options()[0])  # without proof
    make_part(plan, None, 3 - number, 2, options(verify=True)[0])
    with pytest.raises(VerificationFailed) as end:
        finish(plan, None, options(verify=True)[0])
    found = [problem for problem in end.value.problems if re.match("copies|merges|routers", problem)]
    assert found == words if sabotage == "byte" else found
    assert not (llamas / "out").exists()


def test_a_source_changed_in_place_with_its_old_times_after_the_proof(plan: Plan, llamas: Path) -> None:
    """Size, header and time of change are the old ones: its ctime tells, and finish compares again."""
    make(plan, 2)
    path = llamas / "code" / "model.safetensors"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = finished(plan_file(Path(plan.recipe.file)))
    failed = {check.name: check.detail for check in report.failures}
    open_ = [check.detail for check in report.checks if check.ok is None]
    assert "changed since the merge" in " ".join([*failed.values(), *open_])
    assert not (report.ok and not open_)


def test_a_source_that_changes_while_a_part_is_proved(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = stored._compare

    def touched(*arguments: Any, **named: Any) -> Any:
        os.utime(llamas / "law" / "model.safetensors", ns=(1, 10**18))
        return compare(*arguments, **named)

    monkeypatch.setattr(stored, "_compare", touched)
    with pytest.raises(CheckpointError, match=r"sources\.law: .* changed while it was being merged"):
        make_part(plan, None, 1, 2, options(verify=True)[0])
    assert proofs(plan) == []


def test_a_file_that_is_exchanged_while_a_part_is_proved(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = stored._compare
    name = victims(plan)[0]

    def flipped(path: Path, step: Any, *rest: Any, **named: Any) -> Any:
        if step.name == name:
            flip(plan, name, 1)
        return compare(path, step, *rest, **named)

    number = next(part.number for part in parts_of(plan, 2) if next(s for s in plan.steps if s.name == name).file in part.files)
    monkeypatch.setattr(stored, "_compare", flipped)
    with pytest.raises(VerificationFailed, match=name):
        make_part(plan, None, number, 2, options(verify=True)[0])
    assert proofs(plan) == []


# ---- proofs that are not what they say ---------------------------------------------------------------------------------------


def test_torn_and_flipped_proofs_count_as_none(plan: Plan, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folder_bytes(publish(plan, llamas / "whole", options()[0]))
    make(plan, 2)
    good = proofs(plan)[0].read_bytes()
    chance = random.Random(1)
    from bam_merge.publishing import part_proofs

    read = os.open(folder(plan) / "parts", os.O_RDONLY)
    part = parts_of(plan, 2)[0]
    assert part_proofs.read_proof(plan, part, read) is not None
    for index in range(60):
        place = chance.randrange(len(good))
        data = bytearray(good if index % 2 else good[:place])
        if index % 2:
            data[place] ^= 1 << chance.randrange(8)
        proofs(plan)[0].write_bytes(data)
        assert part_proofs.read_proof(plan, part, read) is None, f"byte {place}"
    os.close(read)
    seen = count_of_compared(monkeypatch)
    assert finished(plan).ok and len(seen) == sum(step.file in part.files for step in plan.steps)
    assert folder_bytes(llamas / "out") == whole


def records(path: Path) -> list[Any]:
    return [json.loads(text[18:]) for text in path.read_bytes().splitlines()]


def rewritten(path: Path, change: Callable[[list[Any]], None]) -> None:
    found = records(path)
    change(found)
    path.write_bytes(b"".join(map(line, found)))


FORGERIES: dict[str, Callable[[list[Any]], None]] = {
    "error": lambda found: found[1].update(error=1.5),
    "NaN": lambda found: found[1].update(error=float("nan")),
    "words": lambda found: found[1].update(error="0"),
    "another plan": lambda found: found[0]["proof"].update(fingerprint="0" * 32),
    "another version": lambda found: found[0]["proof"].update(version="0"),
    "another part": lambda found: found[0]["proof"].update(part="2/2"),
    "another ctime": lambda found: found[0]["identities"]["law"].update({"model.safetensors": [1, 2, 3]}),
    "no end": lambda found: found.pop(),
    "a line less": lambda found: found.pop(1) and None,
    "a line that is nothing": lambda found: found.insert(1, 7),
    "no digest": lambda found: found[1].pop("digest") and None,
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_proof_of_something_else_counts_as_none(forgery: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    make(plan, 2)
    rewritten(proofs(plan)[0], FORGERIES[forgery])
    seen = count_of_compared(monkeypatch)
    assert finished(plan).ok
    assert len(seen) == sum(step.file in parts_of(plan, 2)[0].files for step in plan.steps)


def test_a_digest_of_other_bytes_proves_nothing_of_these(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    make(plan, 2)
    rewritten(proofs(plan)[0], lambda found: found[1].update(digest="0" * 32))
    name = records(proofs(plan)[0])[1]["name"]
    seen = count_of_compared(monkeypatch)
    assert finished(plan).ok and seen == [name]


def test_a_digest_of_a_source_that_is_not_as_recorded_is_read_again(plan: Plan) -> None:
    make(plan, 2)
    for path in proofs(plan):
        rewritten(path, lambda found: [one.update(digest="0" * 32) for one in found[1:] if "source" in one] and None)
    assert any("source" in one for path in proofs(plan) for one in records(path))
    assert finished(plan).ok


def test_a_folder_in_the_place_of_a_proof(plan: Plan) -> None:
    make_part(plan, None, 1, 2, options()[0])
    (folder(plan) / "parts" / "00001-of-00002.proof").mkdir()
    with pytest.raises(OutputError, match=r"00001-of-00002\.proof.*"):
        make_part(plan, None, 1, 2, options(verify=True)[0])


def test_rows_that_share_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of 41 elements of half a byte, read a few at a time, are not the tensor's bytes in order: its digest is another reading's."""
    config = {**CONFIGS["llama"], "intermediate_size": 41}
    write_sources(tmp_path, config)
    for source in SOURCES:
        stored_as(tmp_path / source / "model.safetensors", "F4")
    plan = plan_file(write_recipe(tmp_path, "", "btx", output="{path: out, max_shard_size: 30kB}"))
    monkeypatch.setattr(stored, "COPIED_BYTES", 60)
    make(plan, 2)
    assert any(step.dtype == "F4" and step.shape[1] == 41 for step in plan.steps)
    seen = count_of_compared(monkeypatch)
    assert finished(plan).ok and seen == []
