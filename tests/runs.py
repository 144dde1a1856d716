"""For the tests of publishing: a plan of several files, and runs of it that are interrupted."""

from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_adapter
from conftest import CONFIGS, write_recipe, write_sources
from scenes import FOUR, write_read_texts

from bam_merge import MergeOptions
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def small_scene(path: Path, folder: Path) -> Path:
    """One of RECIPES in `folder`, with small files, and small models and texts for it."""
    (folder / "recipes").mkdir()
    write_sources(folder / "checkpoints", CONFIGS["llama"], FOUR)
    for number, name in enumerate(FOUR[1:]):
        write_adapter(folder / "checkpoints" / "adapters" / name, folder / "checkpoints" / "seed", seed=number)
    write_read_texts(folder)
    copy = folder / "recipes" / path.name
    copy.write_text(in_small_files(path.read_text()))
    return copy


def in_small_files(text: str) -> str:
    """The recipe with small files."""
    lines = []
    for line in text.splitlines():
        if line.startswith("output:"):
            line = line.rstrip().removesuffix("}") + ", max_shard_size: 40kB}" if line.rstrip().endswith("}") else line
        lines.append(line)
    return "\n".join(lines) + "\n"


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
