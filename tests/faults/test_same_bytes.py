"""The same bytes whatever the clock, the locale, hash seed, working directory, umask, number of workers, or kind of file system."""

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faults.harness import EXTENT, Child, Merge, Points, contents, thin


def at_time(seconds: float) -> None:
    time.time = lambda: seconds
    time.time_ns = lambda: int(seconds * 10**9)


def on_one_processor() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


SETUPS: dict[str, Callable[[], object]] = {
    "1980": partial(at_time, 315532800.0), "2100": partial(at_time, 4102444800.0),
    "umask 0": partial(os.umask, 0), "umask 077": partial(os.umask, 0o077), "umask 027": partial(os.umask, 0o027),
    "working directory /": partial(os.chdir, "/"), "one processor": on_one_processor,
}  # fmt: skip


@EXTENT
def test_same_bytes_in_any_process(merge: Merge, every: int) -> None:
    with Points("another clock, umask, directory, processor") as points:
        for name, setup in thin(list(SETUPS.items()), every):
            with points.one(name):
                work = merge.work()
                merge.run(work, setup=setup)  # type: ignore[arg-type]
                assert contents(work / "out") == merge.result
                if name.startswith("umask"):
                    mask = int(name.split()[1], 8)
                    assert stat.S_IMODE((work / "out").stat().st_mode) == 0o777 & ~mask
                    assert {stat.S_IMODE(path.stat().st_mode) for path in (work / "out").iterdir()} == {0o666 & ~mask}
                merge.forget(work)


@EXTENT
def test_same_bytes_with_any_number_of_workers(merge: Merge, every: int) -> None:
    with Points("another number of workers") as points:
        for workers in thin([1, 2, 3, 4, 5, 8, 16, 64] * 3, every):
            with points.one(f"{workers} workers"):
                work = merge.work()
                merge.run(work, "--workers", str(workers))
                assert contents(work / "out") == merge.result
                merge.forget(work)


ENVIRONMENTS = {
    **{f"hash seed {seed}": {"PYTHONHASHSEED": seed} for seed in ("0", "1", "4294967295", "random")},
    **{f"locale {name}": {"LC_ALL": name, "PYTHONCOERCECLOCALE": "0"} for name in ("C", "POSIX", "C.UTF-8", "tr_TR.UTF-8")},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "time zone": {"TZ": "Pacific/Kiritimati"}, "optimised": {"PYTHONOPTIMIZE": "2"}, "threads": {"OMP_NUM_THREADS": "8"},
    "no home": {"HOME": "/nonexistent"}, "narrow terminal": {"COLUMNS": "10", "TERM": "dumb"},
}  # fmt: skip


@EXTENT
def test_same_bytes_in_any_environment(merge: Merge, every: int) -> None:
    with Points("another hash seed, locale, environment") as points:
        for name, variables in thin(list(ENVIRONMENTS.items()), every):
            with points.one(name):
                work = merge.work()
                command = [sys.executable, "-m", "bam_merge", *map(str, merge.arguments(work, "--workers", "2"))]
                done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                assert contents(work / "out") == merge.result
                merge.forget(work)


@EXTENT
def test_same_bytes_from_anywhere_to_anywhere(merge: Merge, every: int, tmp_path: Path) -> None:
    """The sources and the recipe moved, touched, linked; the output on another file system."""
    with Points("sources and output elsewhere") as points:
        for way in thin(["moved", "linked", "touched", "another file system"], every):
            with points.one(way):
                work = merge.work()
                sources = work / "elsewhere"
                if way == "linked":
                    sources.mkdir()
                    shutil.copy(merge.recipe, sources)
                    for name in ("seed", "code", "law"):
                        (sources / name).symlink_to(merge.recipe.parent / name)
                else:
                    shutil.copytree(merge.recipe.parent, sources)
                if way == "touched":
                    for path in sources.rglob("*"):
                        os.utime(path, (0, 0))
                home = tmp_path if way == "another file system" else work
                result = Child([sources / "recipe.yaml", "--output", home / "out", "--no-verify"], work / "streams").wait()
                assert result.status == 0, result.err
                assert contents(home / "out") == merge.result
                merge.forget(work)
