"""The how-tos for those who add something are followed to the letter, in a copy of the repository: what they make must plan, merge, verify."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, ROOT, follow


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The package and its tests, to be changed."""
    for folder in ("bam_merge", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    for name, call in (("bam-merge", "-m bam_merge"), ("python", "")):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        command.chmod(0o755)
    return tmp_path


def run_in(clone: Path, command: str) -> str:
    """What a command prints, messages first; the package is the clone's."""
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "80", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
    return done.stderr + done.stdout


@pytest.mark.parametrize(("page", "commands"), [("add-a-family", 4), ("add-a-layout", 6), ("add-a-method", 5)])
def test_page_is_true(page: str, commands: int, clone: Path) -> None:
    assert follow(DOCS / "how-to" / f"{page}.md", clone, lambda command: run_in(clone, command)) == commands


def test_the_copy_is_what_runs(clone: Path) -> None:
    (clone / "bam_merge" / "_version.py").write_text('__version__ = "0.0.0-copy"\n')
    assert "0.0.0-copy" in run_in(clone, "bam-merge --version")
