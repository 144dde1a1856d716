"""Paths as users write them, everywhere one is given: ~ is a home folder, and what can be no path is refused in words."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCES, write_recipe

import bam_merge
from bam_merge.errors import BamMergeError, CheckpointError, RecipeError, VerifyError
from bam_merge.paths import located, path_problem, relative
from bam_merge.recipe.load import load_recipe, parse_recipe
from bam_merge.verifying.perplexity import read_texts


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


NO_PATHS = {
    "": "an empty path; write . for the folder itself.",
    "\0": "\\x00: holds a NUL, which no path has. Correct the path.",
    "a\0b": "a\\x00b: holds a NUL, which no path has.",
    "a\ud800": "a\\ud800: holds \\ud800, which the names of this file system cannot. Correct the path.",
    "~nobody-of-this-name/x": "~nobody-of-this-name is the home folder of nobody here. For a name that begins with ~ write ./~nobody-of-this-name.",
}
READERS: dict[str, tuple[Callable[[str], Any], type[BamMergeError]]] = {
    "load_recipe": (load_recipe, RecipeError),
    "inspect": (bam_merge.inspect, CheckpointError),
    "load_model": (bam_merge.load_model, CheckpointError),
    "verify": (bam_merge.verify, VerifyError),
    "diff": (lambda path: bam_merge.diff(path, path), CheckpointError),
    "inspect of an expert": (lambda path: bam_merge.inspect(f"{path}#experts.0"), CheckpointError),
    "extract": (lambda path: bam_merge.extract(f"{path}#experts.0", "never"), CheckpointError),
    "diff of an expert": (lambda path: bam_merge.diff(f"{path}#0", f"{path}#1"), CheckpointError),
}


@pytest.mark.parametrize("path", NO_PATHS)
@pytest.mark.parametrize("reader", READERS)
def test_what_can_be_no_path(reader: str, path: str) -> None:
    read, error = READERS[reader]
    with pytest.raises(error) as caught:
        read(path)
    assert NO_PATHS[path].rpartition(": ")[2] in str(caught.value)
    assert len(caught.value.problems) == 1
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", NO_PATHS)
def test_what_can_be_no_path_of_a_recipe(path: str) -> None:
    """Both are said at once, and before any file is looked at."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"method": "btx", "sources": {"a": path, "b": "x"}, "output": {"path": "\0"}})
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["sources.a", "output.path"]
    assert NO_PATHS[path].rpartition(": ")[2] in caught.value.problems[0]
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("path", NO_PATHS)
def test_what_can_be_no_text(path: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        read_texts(tmp_path, [path, tmp_path])
    assert NO_PATHS[path] in str(caught.value)
    assert f"{tmp_path}: Is a directory." in caught.value.problems


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_where_a_file_belongs_and_the_other_way_round(reader: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no header")
    read, error = READERS[reader]
    for path in (tmp_path, tmp_path / "x", tmp_path / "x" / "y", tmp_path / ("n" * 300)):
        with pytest.raises((error, CheckpointError)) as caught:
            read(str(path))
        assert str(caught.value).replace("\n", "").isprintable()


def test_names_that_are_not_utf8(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that only reads works in a folder whose name no encoding knows, and messages escape it."""
    strange = llamas.parent / os.fsdecode(b"caf\xe9")
    llamas.rename(strange)
    recipe = write_recipe(strange)
    for command in (("plan", recipe), ("inspect", strange / "law"), ("diff", strange / "law", strange / "law")):
        result = run(*command)
        assert result.status == 0, result.err
    (strange / "law" / "config.json").unlink()
    result = run("plan", recipe)
    assert result.status == 2
    assert "caf\\udce9/law: config.json is missing." in result.err
    assert run("verify", strange).status == 2
    assert run("plan", strange / os.fsdecode(b"\xff.yaml")).err.endswith("\\udcff.yaml: No such file or directory.\n")


# ---- the home folder -------------------------------------------------------------------------------------------------------


def test_the_home_folder_in_a_recipe(llamas: Path, home: Path, run: Any) -> None:
    """Sources and output; the manifest leads back to them without naming a home folder."""
    for name in SOURCES:
        shutil.move(llamas / name, home / name)
    (llamas / "r.yaml").write_text("method: btx\nsources: {seed: ~/seed, code: ~/code, law: home/law}\noutput: {path: ~/merged}\n")
    result = run(llamas / "r.yaml", "--no-verify")
    assert result.status == 0, result.err
    assert not (llamas / "~").exists()
    manifest = json.loads((home / "merged" / "bam_merge.json").read_text())
    assert manifest["recipe"]["sources"] == {"seed": "home/seed", "code": "home/code", "law": "home/law"}
    assert manifest["recipe"]["output"]["path"] == "home/merged"
    assert manifest["recipe_folder"] == "../.."
    report = bam_merge.verify(home / "merged")
    assert report.ok
    assert next(check for check in report.checks if check.name == "sources").detail == "3 folders, as they were merged"


def test_the_home_folder_given_to_a_command(llamas: Path, home: Path, run: Any) -> None:
    shutil.move(llamas / "seed", home / "seed")
    shutil.move(llamas / "code", home / "code")
    assert run("inspect", "~/seed").status == 0
    assert run("diff", "~/seed", "~/seed/model.safetensors").status == 0
    assert run("diff", "--seed", "~/seed", "~/code").status in (0, 1)
    (home / "r.yaml").write_text("method: btx\nsources: {seed: seed, code: code}\noutput: {path: out}\n")
    assert run("~/r.yaml", "--no-verify").status == 0
    assert (home / "out" / "config.json").exists()
    assert bam_merge.verify("~/out").ok


def test_a_folder_that_is_called_so(llamas: Path, home: Path, run: Any) -> None:
    """./~ is a folder of that name, in the recipe and in the manifest that is read again."""
    shutil.move(llamas / "law", llamas / "~")
    (llamas / "r.yaml").write_text("method: btx\nsources: {seed: seed, code: code, law: ./~}\noutput: {path: ./~out}\n")
    assert run(llamas / "r.yaml", "--no-verify").status == 0
    recipe = json.loads((llamas / "~out" / "bam_merge.json").read_text())["recipe"]
    assert (recipe["sources"]["law"], recipe["output"]["path"]) == ("./~", "./~out")
    assert bam_merge.verify(llamas / "~out").ok
    assert list(home.iterdir()) == []


def test_located(home: Path) -> None:
    assert located("~/a") == home / "a"
    assert located("~") == home
    assert located("a", Path("/x")) == Path("/x/a")
    assert located("~/a", Path("/x")) == home / "a"
    assert located("./~", Path("/x")) == Path("/x/~")
    assert located(Path("a~b")) == Path("a~b")
    assert located(b"~/caf\xe9") == home / os.fsdecode(b"caf\xe9")  # type: ignore[arg-type]
    assert relative("~/a", home.parent) == "home/a"
    assert relative("./~", Path("/x")) == "./~"
    assert path_problem("~root/x") is None
    assert path_problem("a/~nobody-of-this-name") is None
