"""Where a result cannot go: in or over a source, without space or permission."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

# ---- the output


def test_output_inside_a_source(llamas: Path, run: Any) -> None:
    result = run(write_recipe(llamas, output="{path: law/out}"))
    assert result.status == 2
    assert f"output.path: {llamas}/law/out is inside sources.law" in result.err


@pytest.mark.parametrize("how", ["itself", "symlink", "parent"])
def test_output_is_a_source(llamas: Path, run: Any, how: str) -> None:
    target = {"itself": llamas / "law", "symlink": llamas / "link", "parent": llamas}[how]
    if how == "symlink":
        os.symlink(llamas / "law", target)
    result = run(write_recipe(llamas), "--output", target, "--force")
    assert result.status == 2
    assert "is, or holds, sources." in result.err
    assert (llamas / "law" / "model.safetensors").exists()


def test_output_inside_a_source_through_a_symlink(llamas: Path, run: Any) -> None:
    os.symlink(llamas / "law", llamas / "link")
    result = run(write_recipe(llamas), "--output", llamas / "link" / "out")
    assert result.status == 2
    assert "is inside sources.law" in result.err


def test_one_folder_under_two_names(llamas: Path, run: Any) -> None:
    shutil.rmtree(llamas / "law")
    os.symlink("code", llamas / "law")
    result = run(write_recipe(llamas))
    assert result.status == 2
    assert "sources.law: the same folder as sources.code. Name it once; it may stand several times in experts." in result.err


def test_no_space(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(llamas)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    for arguments in ((), ("--dry-run",)):
        result = run(write_recipe(llamas), *arguments)
        assert result.status == 2
        assert "0.00 GB free, the merge writes 0.00 GB. Free some space, or choose another --output." in result.err


def test_no_write_permission(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answer is simulated."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    result = run(write_recipe(llamas))
    assert result.status == 2
    assert f"no permission to write in {llamas}. Choose another --output." in result.err


def test_parent_is_a_file(llamas: Path, run: Any) -> None:
    result = run(write_recipe(llamas), "--output", llamas / "recipe.yaml" / "out")
    assert result.status == 2
    assert "recipe.yaml is not a folder" in result.err
