"""A source, or the target, changes while the merge runs, at every moment of it."""

import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from faults.harness import EXTENT, Child, Merge, Points, contents, digests, thin

MOMENTS = range(1, 110)
"""Calls of preadv, pwrite and fsync before the change, the plan's own not counted; a run makes about a hundred."""


def at(moment: int, change: Callable[[], None]) -> None:
    """Do `change` just before the `moment`th call that reads, writes or syncs, from when the plan is made."""
    from bam_merge.publishing import publish

    calls, planned = itertools.count(1), False
    carry_out = publish.publish

    def begun(*arguments: Any) -> Any:
        nonlocal planned
        planned = True
        return carry_out(*arguments)

    publish.publish = begun

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if planned and next(calls) == moment:
                with suppress(FileExistsError):  # too late to appear
                    change()
            return real(*arguments)

        return call

    for name in ("preadv", "pwrite", "fsync"):
        setattr(os, name, watched(getattr(os, name)))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def rewrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with open(path, "r+b") as stream:
        stream.write(data)


def replace(path: Path) -> None:
    data = path.read_bytes()
    (path.parent / "new").write_bytes(data[:-4] + b"abcd")
    (path.parent / "new").rename(path)


def delete(path: Path) -> None:
    path.unlink()


CHANGES = {
    "truncated": (truncate, "law/model.safetensors"),
    "rewritten": (rewrite, "law/model.safetensors"),
    "replaced": (replace, "seed/model.safetensors"),
    "deleted": (delete, "code/model.safetensors"),
    "tokenizer rewritten": (rewrite, "seed/vocab.txt"),
    "tokenizer deleted": (delete, "seed/vocab.txt"),
}


@EXTENT
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_changes_during_the_run(merge: Merge, change: str, every: int) -> None:
    """The run says so and publishes nothing; or it was over by then. What is made of the changed sources is made of them alone."""
    call, name = CHANGES[change]
    with Points(f"a source is {change}" if " " not in change else f"the {change}") as points:
        for moment in thin(list(MOMENTS)[::2], every):
            with points.one(f"call {moment}"):
                work = merge.work()
                sources = work / "sources"
                shutil.copytree(merge.recipe.parent, sources)
                arguments = [sources / "recipe.yaml", "--output", work / "out", "--workers", "1", "--no-verify"]
                streams = merge.home / f"streams-{work.name}"
                result = Child(arguments, streams, partial(at, moment, partial(call, sources / name))).wait()
                result.is_orderly()
                if result.status:
                    found = (" changed while it was being merged", ": No such file or directory")
                    assert any(f"{sources / name}{text}" in result.err for text in found), result.err
                merge.consumer(work)
                assert (work / "out").exists() == (result.status == 0)
                if call not in (truncate, delete):
                    same_from_what_is_there_now(work, sources, streams)
                merge.forget(work)


def same_from_what_is_there_now(work: Path, sources: Path, streams: Path) -> None:
    """Going on with --resume and beginning anew give the same."""
    shutil.rmtree(work / "out", ignore_errors=True)
    for options in (["--output", work / "fresh"], ["--output", work / "out", "--resume"]):
        result = Child([sources / "recipe.yaml", "--no-verify", *options], streams).wait()
        assert result.status == 0, result.err
    assert contents(work / "fresh") == contents(work / "out")


def someones_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years")


def someones_model(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")


APPEARANCES: dict[str, Callable[[Path], None]] = {
    "a folder": someones_folder, "an empty folder": Path.mkdir, "a file": Path.touch, "a model": someones_model,
    "a dangling symlink": partial(Path.symlink_to, target="nowhere"),
}  # fmt: skip


@EXTENT
@pytest.mark.parametrize("what", APPEARANCES)
def test_the_target_appears_during_the_run(merge: Merge, what: str, every: int) -> None:
    with Points(f"{what} appears at the target") as points:
        for moment in thin(list(MOMENTS)[::4], every):
            with points.one(f"call {moment}"):
                work = merge.work()
                result = merge.child(work, setup=partial(at, moment, partial(APPEARANCES[what], work / "out"))).wait()
                result.is_orderly()
                if result.status == 0:  # it was over by then
                    assert not os.path.lexists(work / "out") or contents(work / "out") == merge.result
                else:
                    assert "out appeared while the merge ran. Nothing was replaced" in result.err, result.err
                    expected = {"a folder": {"thesis.tex": b"years"}, "a model": {"config.json": b"{}"}}.get(what, {})
                    assert os.path.lexists(work / "out")
                    assert (contents(work / "out") if (work / "out").is_dir() else {}) == expected
                assert digests(merge.recipe.parent) == merge.inputs
                merge.forget(work)
