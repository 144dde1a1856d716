"""For the tests of publishing: a plan of several files, and runs of it that are interrupted."""

from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

from bam_merge import MergeOptions
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def options(verify: bool = False, **settings: Any) -> tuple[MergeOptions, list[str]]:
    """Options of a merge, which is not verified unless the test is about that; and what the run said."""
    said: list[str] = []
    return MergeOptions(**settings, notify=said.append, verify=verify), said


@pytest.fixture
def plan(llamas: Path) -> Plan:
    return plan_file(write_recipe(llamas, output="{path: out, max_shard_size: 60kB}"))


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


def interrupted(plan: Plan, llamas: Path, steps: int = 20) -> Path:
    with pytest.raises(Stop):
        publish(plan, None, MergeOptions(workers=1, progress=stop_after(steps), verify=False))
    return llamas / ".out.bam-merge"
