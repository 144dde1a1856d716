"""Two runs of one target at once, what earlier runs of another recipe left, and journals that are cut or damaged at every byte."""

import random
import shutil
import time
from functools import partial

import pytest
from conftest import write_recipe

from bam_merge.planning.make import plan_file
from bam_merge.publishing.staging import Staging
from faults.harness import EXTENT, Merge, Points, contents, digests, stop_writing, thin, unfinished


@EXTENT
@pytest.mark.parametrize("options", [(), ("--resume",), ("--force",)], ids=["fresh", "resume", "force"])
def test_two_runs_at_once(merge: Merge, options: tuple[str, ...], every: int) -> None:
    """One wins, and the other says whose the target is, or that it is there; with --force or --resume it may also go after it."""
    chance = random.Random(len(options))
    with Points(f"two runs at once {' '.join(options)}".strip()) as points:
        for _ in range(max(2, 50 // every)):
            delay = chance.uniform(0, 0.2)
            with points.one(f"{delay * 1000:.0f} ms apart"):
                work = merge.work()
                first = merge.child(work, *options, thread="main")
                second = merge.child(work, *options, thread="main", streams="second")
                pids = first.pid, second.pid
                first.go()
                time.sleep(delay)
                second.go()
                results = [first.wait(), second.wait()]
                statuses = sorted(result.status for result in results)
                assert statuses == [0, 2] or (options and statuses == [0, 0]), [result.err for result in results]
                for result, other in zip(results, reversed(pids), strict=True):
                    said = (f"out is being written by another run (process {other}). Wait for it.", "out already exists")
                    assert result.status == 0 or any(text in result.err for text in said), result.err
                assert contents(work) == {f"out/{name}": data for name, data in merge.result.items()}
                assert digests(merge.recipe.parent) == merge.inputs
                merge.forget(work)


@EXTENT
def test_what_a_run_of_another_recipe_left(merge: Merge, every: int) -> None:
    """However far it had come."""
    other = write_recipe(merge.home, "random_seed: 5", output="{path: out, max_shard_size: 1kB}")
    other.write_text(
        other.read_text().replace(": seed", ": sources/seed").replace(": code", ": sources/code").replace(": law", ": sources/law")
    )
    with Points("staging of another recipe") as points:
        for count in thin(list(range(1, 36)), every):
            with points.one(f"killed at write {count}"):
                work = merge.work()
                merge.child(work, setup=partial(stop_writing, count), recipe=other).wait()
                merge.check(work)


@EXTENT
def test_a_journal_cut_at_every_byte(merge: Merge, every: int) -> None:
    """What is left of it is a beginning of what it said, and new entries follow that."""
    start = unfinished(merge)
    plan = plan_file(merge.recipe)
    journal = (start / ".out.bam-merge" / "journal").read_bytes()
    lines = journal.splitlines(keepends=True)
    with Points("a journal cut at a byte") as points:
        for cut in thin(list(range(len(journal) + 1)), every):
            with points.one(f"byte {cut}"):
                work = merge.work(start)
                (work / ".out.bam-merge" / "journal").write_bytes(journal[:cut])
                whole = journal[:cut].count(b"\n")
                staging = Staging.open(work / "out")
                done = staging.begin(plan, resume=True, allow_nonfinite=False, notify=lambda text: None)
                staging.close()
                assert len(done) == max(0, whole - 1)
                assert (work / ".out.bam-merge" / "journal").read_bytes() == b"".join(lines[: max(1, whole)])
                merge.forget(work)


@EXTENT
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_runs_with_a_damaged_journal(merge: Merge, damage: str, every: int) -> None:
    start = unfinished(merge)
    journal = (start / ".out.bam-merge" / "journal").read_bytes()
    chance = random.Random(1)
    with Points(f"a run with a {damage} journal") as points:
        for _ in range(max(2, 60 // every)):
            place = chance.randrange(len(journal))
            with points.one(f"byte {place}"):
                work = merge.work(start)
                data = bytearray(journal if damage == "flipped" else journal[:place])
                if damage == "flipped":
                    data[place] ^= 1 << chance.randrange(8)
                (work / ".out.bam-merge" / "journal").write_bytes(data)
                merge.check(work)


@EXTENT
def test_damaged_staged_tensors(merge: Merge, every: int) -> None:
    """Any bit of what an unfinished run wrote may have changed, or files may be missing, cut or longer."""
    start = unfinished(merge)
    chance = random.Random(2)
    with Points("a damaged staged file") as points:
        for number in range(max(2, 60 // every)):
            with points.one(f"{number}"):
                work = merge.work(start)
                shard = chance.choice(sorted((work / ".out.bam-merge" / "output").glob("*.safetensors")))
                data = bytearray(shard.read_bytes())
                place = chance.randrange(len(data))
                match number % 4:
                    case 0:
                        data[place] ^= 1 << chance.randrange(8)
                        shard.write_bytes(data)
                    case 1:
                        shard.write_bytes(data[:place])
                    case 2:
                        shard.write_bytes(data + b"x" * place)
                    case _:
                        shard.unlink()
                merge.check(work)


def test_unfinished_is_what_it_says(merge: Merge) -> None:
    """The loops above begin from a run that had finished something."""
    start = unfinished(merge)
    assert 5 < (start / ".out.bam-merge" / "journal").read_bytes().count(b"\n") < len(plan_file(merge.recipe).steps)
    shutil.rmtree(start)
