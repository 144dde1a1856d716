"""The how-to about several machines is followed, and the core of each scheduler's example is run: its command, as often as it would be."""

import importlib.util
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS, write_sources
from pages import DOCS, ROOT, follow
from runs import folder_bytes

PAGE = DOCS / "how-to" / "several-machines.md"


@pytest.fixture
def here(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the page was followed, with its result as `whole`, and nothing else of the merge."""
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path / "models", CONFIGS["llama"], dtype="BF16")

    def call(command: str) -> str:
        result = run(*shlex.split(command)[1:])
        assert result.status == 0, f"{command}: {result.err}"
        return str(result.err + result.out)

    assert follow(PAGE, tmp_path, call) == 6
    (tmp_path / "out").rename(tmp_path / "whole")
    (tmp_path / "bin").mkdir()
    for name, text in (("bam-merge", f'exec "{sys.executable}" -m bam_merge "$@"'), ("srun", 'exec "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    assert run("recipe.yaml", "--no-verify").status == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole"), "not what one process writes"
    shutil.rmtree(tmp_path / "out")
    return tmp_path


def shell(here: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment, "PATH": f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True)


def finished(here: Path, command: str) -> None:
    done = shell(here, ["sh", "-c", command])
    assert done.returncode == 0, done.stderr
    assert folder_bytes(here / "out") == folder_bytes(here / "whole")


def in_any_order(count: int) -> list[int]:
    return random.Random(count).sample(range(count), count)


def test_slurm(here: Path) -> None:
    """sbatch's body as a loop; and what is submitted after it, once with a part forgotten."""
    text = (here / "merge.sbatch").read_text()
    assert "#SBATCH --array=1-8\n" in text
    after = shlex.split((here / "submit.sh").read_text().splitlines()[1])
    finish = after[after.index("--wrap") + 1]
    for index in in_any_order(8):
        if index == 2:
            early = shell(here, ["sh", "-c", finish])
            assert early.returncode == 4 and "It is made by: bam-merge recipe.yaml --part 3/8" in early.stderr
        settings = {"SLURM_ARRAY_TASK_ID": str(index + 1), "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "2"}
        done = shell(here, ["bash", "merge.sbatch"], **settings)
        assert done.returncode == 0, done.stderr
    finished(here, finish)


def test_kubernetes(here: Path) -> None:
    job = yaml.safe_load((here / "parts.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completionMode"] == "Indexed" and job["completions"] == 8
    (rule,) = job["podFailurePolicy"]["rules"]
    assert 4 not in rule["onExitCodes"]["values"]
    for index in in_any_order(job["completions"]):
        done = shell(here, container["command"], JOB_COMPLETION_INDEX=str(index))
        assert done.returncode == 0, done.stderr
    finished(here, "bam-merge finish recipe.yaml")


@pytest.mark.scale
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'bam-merge[ray]'")
def test_ray(here: Path) -> None:
    from test_ray import cluster

    with cluster() as nodes:
        host, _, port = nodes.address.partition(":")
        script = (here / "on-ray.sh").read_text().replace("6379", port)
        done = shell(here, ["sh", "-c", script], HEAD=host, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
    assert done.returncode == 0, done.stderr
    assert folder_bytes(here / "out") == folder_bytes(here / "whole")
