"""ckpt-chaos (PyPI), a tool for training checkpoints, ends a run at each of its file events; `make test-faults` installs it.

A merge that is run again hides what the first run left, so it is pointed twice: at the next run, and at the consumer.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_recipe, write_sources

from faults.harness import TINY, Points

CHAOS = Path(__file__).parents[2] / ".venv-faults" / "bin" / "ckpt-chaos"
MERGE = f"{sys.executable} -m bam_merge"
BY_PATH = f"{sys.executable} {Path(__file__).with_name('by_path.py')}"
"""The tool follows files by their paths, see there."""


def chaos(recipe: Path, resume: str, *options: str) -> subprocess.CompletedProcess[str]:
    modes = ["--modes", "before,torn,term,unsynced", "--max-points", "1000", "--work", str(recipe.parent / "chaos")]
    command = shlex.split(f"{BY_PATH} {recipe} --output {{out}}/model --no-verify --resume --workers 1")
    return subprocess.run([CHAOS, "run", "--resume-cmd", resume, *options, *modes, "--", *command], capture_output=True, text=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Copies only, so that no run waits for torch."""
    write_sources(tmp_path, TINY)
    return write_recipe(tmp_path, "shared: {make: copy, from: seed}", "merge", output="{path: out, max_shard_size: 2kB}")


@pytest.mark.faults
@pytest.mark.skipif(not CHAOS.exists(), reason="ckpt-chaos is not installed: make test-faults")
@pytest.mark.parametrize("pointed_at", ["the next run", "the consumer"])
def test_ckpt_chaos(recipe: Path, pointed_at: str) -> None:
    if pointed_at == "the next run":
        resume = f"{MERGE} {recipe} --output {{out}}/model --no-verify --resume"
        done = chaos(recipe, resume, "--result-cmd", f"{sys.executable} -c '{DIGEST}' {{out}}/model")
    else:
        done = chaos(recipe, f"bash -c 'test ! -e {{out}}/model || {MERGE} verify {{out}}/model --recipe {recipe}'")
    verdicts = re.findall(r"^.*#\d+ .*$", done.stdout, re.MULTILINE)
    with Points(f"ckpt-chaos, pointed at {pointed_at}") as points:
        for verdict in verdicts:
            with points.one(verdict):
                assert "PASS" in verdict
    assert done.returncode == 0, done.stdout + done.stderr
    seen = {(name, mode) for name, mode in re.findall(r"#\d+ [\w.]+:(\S+) \[(\w+)\]", done.stdout)}
    made = {"journal", "pid", "output", "config.json", "README.md", "bam_merge.json", "model.safetensors.index.json"}
    shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert {(name, mode) for name in made | shards for mode in ("before", "term", "unsynced")} <= seen, seen  # it sees every file


DIGEST = (
    "import hashlib, pathlib, sys; h = hashlib.sha256(); "
    "[h.update(p.name.encode() + p.read_bytes()) for p in sorted(pathlib.Path(sys.argv[1]).iterdir())]; print(h.hexdigest())"
)
