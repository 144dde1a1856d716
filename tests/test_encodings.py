"""Names that are not UTF-8, and streams that lack a name's characters: every command works, or refuses before it begins."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge import merge
from bam_merge.cli import main
from bam_merge.errors import OutputError
from bam_merge.model.tokens import open_tokenizer
from bam_merge.recipe.load import parse_recipe

NOT_UTF8 = os.fsdecode(b"caf\xe9 \xff")
LLAMA = "日本 🦙 é"


@dataclass
class Printed:
    """Exit status, and the bytes on stdout and stderr."""

    status: int
    out: bytes
    err: bytes


Run = Callable[..., Printed]


@pytest.fixture(params=["latin-1", "ascii", "utf-8", "cp1252"])
def printed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line with streams of an encoding, strict as Python makes stdout."""

    def call(*arguments: object) -> Printed:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=request.param, errors="strict") for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["bam-merge", *map(str, arguments)])
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            status = 0
            try:
                main()
            except SystemExit as error:
                status = int(error.code or 0)
            out.flush()
            err.flush()
        return Printed(status, out.buffer.getvalue(), err.buffer.getvalue())  # type: ignore[attr-defined]

    return call


@pytest.mark.parametrize("name", [NOT_UTF8, LLAMA], ids=["not UTF-8", "emoji"])
def test_every_command_in_any_folder_on_any_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Run, name: str) -> None:
    """Sources, recipe, working directory, output, page and text are all of that name."""
    home = tmp_path / name
    home.mkdir()
    monkeypatch.chdir(home)
    write_sources(home, CONFIGS["llama"])
    recipe = write_recipe(home, output="{path: out, max_shard_size: 60kB}").rename(home / f"{name}.yaml")
    *_, written, served, unserved = printed("plan", recipe.name).out.splitlines(keepends=True)
    assert written.startswith(b"output ") and written.endswith(b"free)\n")
    assert served.startswith(b"serves in ") and unserved.startswith(b"not in ") and unserved.endswith(b"\n")
    assert json.loads(printed("plan", recipe.name, "--json").out)["method"] == "bam"
    result = printed(recipe.name, "--output", name, "--workers", 1, "--no-verify")
    assert (result.status, result.err) == (0, b"")
    assert b"30,752 active per token" in result.out
    assert (home / name / "bam_merge.json").exists()
    result = printed(recipe.name, "--output", name)
    assert (result.status, result.err.count(b"already exists. Choose another --output")) == (2, 1)
    assert (
        printed("inspect", name).status
        == printed("inspect", home / name, "--stats").status
        == printed("inspect", "seed", "--json").status
        == 0
    )
    assert printed("verify", name).out.endswith(b"\nverified\n")
    assert json.loads(printed("verify", home / name, "--json").out)["ok"] is True
    os.rename(name, "mixture")
    result = printed("extract", "mixture#experts.law", "law again")
    note = b"bam-merge: sources.law: expert law of a mixture of layout bam, as a llama model\n"
    assert (result.status, result.err) == (0, note + b"bam-merge: verifying\n")
    assert (home / "law again" / "model.safetensors").exists()
    result = printed("extract", "mixture#experts.law", f"{name} law")  # which a recipe can name, and its record, if it is text
    assert (result.status, b"expected text of whole characters" in result.err) == ((2, True) if name == NOT_UTF8 else (0, False))
    assert (home / f"{name} law").exists() == (name != NOT_UTF8)
    for part in (1, 2):
        assert printed(recipe.name, "--output", f"{name} parts", "--part", f"{part}/2").status == 0
    assert printed("finish", recipe.name, "--output", f"{name} parts").status == 0
    assert (home / f"{name} parts" / "bam_merge.json").exists()
    result = printed("diff", home / "seed", home / "law", "--html", f"{name}.html")
    assert (result.status, result.err) == (1, b"")
    assert (home / f"{name}.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert printed("diff", "--seed", home / "seed", home / "law", "--json").status == 1
    assert printed("inspect", home / "none").err.count(b"no such folder") == 1


def test_a_recipe_whose_words_a_stream_lacks(llamas: Path, printed: Run) -> None:
    """In paths and, refused, in a source's name."""
    (llamas / "code").rename(llamas / LLAMA)
    recipe = write_recipe(llamas, output=f"{{path: 'out {LLAMA}'}}")
    recipe.write_text(recipe.read_text().replace("code: code", f"code: {LLAMA}"))
    assert printed(recipe, "--no-verify").status == 0
    assert (llamas / f"out {LLAMA}" / "config.json").exists()
    assert printed("verify", llamas / f"out {LLAMA}").status == 0
    recipe.write_text(recipe.read_text().replace("code:", "code🦙:"))
    result = printed("plan", recipe)
    assert result.status == 2
    assert b"a source's name is letters, digits" in result.err


def test_the_demo_in_any_folder(tmp_path: Path, printed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_merge.demo import demo

    monkeypatch.setattr(demo, "CONFIG", CONFIGS["llama"])
    for name in (NOT_UTF8, LLAMA):
        result = printed("demo", tmp_path / name)
        assert (result.status, b"Traceback" in result.err) == (0, False)
        assert (tmp_path / name / "bam" / "config.json").exists()


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
], ids=["latin-1", "C without UTF-8"])  # fmt: skip
def test_a_merge_as_the_shell_runs_it(llamas: Path, environment: dict[str, str]) -> None:
    """With its verification, in processes of their own: 0, the name escaped where it must be, and never a traceback."""
    recipe = write_recipe(llamas)
    output = os.fsdecode(b"out \xff \xf0\x9f\xa6\x99")
    command = [sys.executable, "-m", "bam_merge", recipe, "--output", llamas / output, "--workers", "1"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **environment})
    assert (done.returncode, done.stderr) == (0, b"bam-merge: verifying\n")
    assert b"/out \\udcff " in done.stdout
    assert b"\nverified: " in done.stdout
    assert (llamas / output / "config.json").exists()


def test_names_that_the_locale_has_no_bytes_for(llamas: Path) -> None:
    """Refused with the recipe, and in an index, in words."""
    recipe = write_recipe(llamas, output=f"{{path: 'out {LLAMA}'}}")
    bare = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-m", "bam_merge", recipe], capture_output=True, text=True, env=bare)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "which the names of this file system cannot" in done.stderr
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "modèle.safetensors"}}
    (llamas / "seed" / "model.safetensors").rename(llamas / "seed" / "modèle.safetensors")
    (llamas / "seed" / "model.safetensors.index.json").write_text(json.dumps(index))
    done = subprocess.run([sys.executable, "-m", "bam_merge", "inspect", llamas / "seed"], capture_output=True, text=True, env=bare)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_way_that_the_manifest_cannot_record_is_refused_before_anything_is_written(tmp_path: Path, printed: Run) -> None:
    """From the output back to the recipe, or to a source."""
    home = tmp_path / NOT_UTF8
    write_sources(home, CONFIGS["llama"])
    result = printed(write_recipe(home, output="{path: ../out}"))
    assert result.status == 2
    assert result.err.startswith(
        b"error: output.path: the way back from there to the recipe, ../caf\\udce9 \\udcff, has a name that is not UTF-8"
    )
    assert b"so bam_merge.json cannot record it. Rename that folder" in result.err
    sources = {"seed": f"{NOT_UTF8}/seed", "law": f"{NOT_UTF8}/law"}
    recipe = parse_recipe({"method": "bam", "sources": sources, "output": {"path": "out"}}, tmp_path)
    with pytest.raises(OutputError) as caught:
        merge(recipe)
    assert [problem.split(",")[0] for problem in caught.value.problems] == [
        "sources.seed: the way there from the recipe", "sources.law: the way there from the recipe",
    ]  # fmt: skip
    assert os.listdir(tmp_path) == [NOT_UTF8]
    assert not (home / "out").exists()


def test_a_tokenizer_in_a_folder_that_is_not_utf8(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(made.to_str())
    assert open_tokenizer(folder).encode("b a").ids == [1, 0]
