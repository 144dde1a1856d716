"""The command line as a user meets it."""

import ast
import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from damage import as_in_a_terminal

from bam_merge import __version__
from bam_merge.model.loading import load_model

ROOT = Path(__file__).parent.parent


def test_merge_without_the_word_merge(llamas: Path, run: Any) -> None:
    result = run(write_recipe(llamas), "--no-verify")
    assert result.status == 0
    assert result.out.startswith(f"{llamas}/out: ")
    assert result.err == ""  # quiet where stderr is no terminal


def test_a_plain_installation_has_what_the_code_imports() -> None:
    """Third-party imports at the head of modules are dependencies, and not only of an extra. (`exported` runs where transformers is.)"""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {re.split(r"[<>=]", requirement)[0].lower() for requirement in project["dependencies"]}
    imported = set()
    for path in (path for path in (ROOT / "bam_merge").rglob("*.py") if path.parent.name != "exported"):
        for node in ast.parse(path.read_text()).body:
            imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
    ours = {str(name).partition(".")[0] for name in imported} - {*sys.stdlib_module_names, "bam_merge"}
    assert {"torch", "safetensors"} <= ours
    assert {name.replace("yaml", "pyyaml") for name in ours} <= installed


def test_options_may_stand_first(llamas: Path, run: Any) -> None:
    assert run("--output", llamas / "elsewhere", "--workers", 1, write_recipe(llamas), "--no-verify").status == 0
    assert (llamas / "elsewhere" / "config.json").exists()


@pytest.mark.parametrize("name", ["demo", "plan", "merge", "x.yaml"])
def test_option_values_may_be_any_word(llamas: Path, run: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A folder named like a command, or like a recipe, is no command and no recipe."""
    monkeypatch.chdir(llamas)
    recipe = write_recipe(llamas).name
    for arguments in ((recipe, "--output", name), ("--output", name, "--force", recipe)):
        assert run(*arguments, "--no-verify").status == 0
        assert (llamas / name / "config.json").exists()


def test_python_cli_py_in_a_checkout(llamas: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "cli.py", write_recipe(llamas), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "method       bam, layout bam" in done.stdout
    assert not (llamas / "out").exists()


def test_dry_run_is_plan(llamas: Path, run: Any) -> None:
    recipe = write_recipe(llamas)
    assert run(recipe, "--dry-run", "--workers", 2).out.split("peak memory")[0] == run("plan", recipe).out.split("peak memory")[0]


def test_plan_of_chosen_tensors(llamas: Path, run: Any) -> None:
    recipe = write_recipe(llamas)
    lines = run("plan", recipe, "--tensors", "*layers.1*router*").out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == ["model.layers.1.self_attn.router.weight", "model.layers.1.mlp.router.weight"]
    assert "no tensor matches 'x*'" in run("plan", recipe, "--tensors", "x*").out


def test_plan_json_is_one_document(llamas: Path, run: Any) -> None:
    document = json.loads(run("plan", write_recipe(llamas), "--json").out)
    assert {"method", "layout", "parameters", "bytes", "peak_memory", "shards", "tensors", "config"} <= set(document)
    first = document["tensors"][0]
    assert {"name", "role", "layer", "expert", "dtype", "shape", "expression", "reads"} == set(first)
    assert first["reads"] == [{"source": source, "tensor": "model.embed_tokens.weight"} for source in ("seed", "code", "law")]


@pytest.mark.parametrize(("arguments", "message"), [
    (["plna", "x"], "'plna' is neither a command nor a recipe file (.yaml); did you mean 'plan'?"),
    (["plna", "x.yaml"], "'plna' is neither a command nor a recipe file (.yaml); did you mean 'plan'?"),
    (["plan"], "Missing argument 'RECIPE'"),
    (["plan", "x.yaml", "--jsno"], "--json"),
    (["none.yaml"], "none.yaml: No such file or directory."),
    (["x.yaml", "--workers", "0"], "0 is not in the range 1<=x<=64"),
])  # fmt: skip
def test_usage_errors(arguments: list[str], message: str, run: Any) -> None:
    result = run(*arguments)
    assert result.status == 2
    assert message in result.err
    assert result.out == ""


def test_version_and_help(run: Any) -> None:
    assert __version__ in run("--version").out
    assert "bam-merge RECIPE.yaml" in run("--help").out
    for command in ("merge", "plan", "schema", "demo"):
        assert run(command, "--help").status == 0


def test_demo(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "demo"
    result = run("demo", folder)
    assert result.status == 0, result.err
    assert "19,807,488 parameters" in result.out
    made = list(map(int, result.out.splitlines()[-1].split()))
    assert made[:5] == [1, 2, 3, 5, 8]
    assert len(made) == 5 + 12
    again = load_model(folder / "bam").generate(torch.tensor([made[:5]]), 12)
    assert again[0].tolist() == made
    assert json.loads((folder / "bam" / "config.json").read_text())["num_attention_experts"] == 4
    again = run("demo", folder)
    assert again.status == 2
    assert "holds an earlier demo. Choose another folder, or replace it with --force." in again.err
    assert run("demo", folder, "--force").status == 0


def test_demo_does_not_touch_a_folder_in_use(tmp_path: Path, run: Any) -> None:
    (tmp_path / "file").write_text("x")
    assert "is not empty and holds no earlier demo" in run("demo", tmp_path).err


def test_closed_stdout_is_no_traceback(llamas: Path) -> None:
    recipe = write_recipe(llamas)
    done = subprocess.run(f"{sys.executable} -m bam_merge plan {recipe} --json | head -c 1", shell=True, capture_output=True, text=True)
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr


def test_full_stdout_is_no_traceback(llamas: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "bam_merge", "schema"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def shell(command: str) -> tuple[int, str]:
    """Exit status of bam-merge in a shell command, which names it $B, and its stderr."""
    text = f"B='{sys.executable} -m bam_merge'; set -o pipefail; {command}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_full_stdout_of_a_merge_says_that_it_is_published(llamas: Path) -> None:
    status, said = shell(f"$B {write_recipe(llamas)} --no-verify >/dev/full")
    assert (status, said) == (2, f"error: standard output: No space left on device. {llamas}/out is published and complete.\n")
    assert (llamas / "out" / "config.json").exists()


@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_stdout_is_an_error_before_anything_is_done(llamas: Path, streams: str) -> None:
    """The first file opened would take its number, and get what a library prints."""
    status, said = shell(f"$B {write_recipe(llamas)} {streams}")
    assert status == 2
    assert said == ("" if "2>" in streams else "error: standard output is closed; redirect it to /dev/null when it is not wanted.\n")
    assert not (llamas / "out").exists()


@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", "2>&1 >/dev/null | true"])
def test_messages_that_cannot_be_shown_stop_nothing(llamas: Path, streams: str) -> None:
    assert shell(f"$B {write_recipe(llamas)} --no-verify --resume {streams}")[0] == 0
    assert (llamas / "out" / "config.json").exists()


def test_answer_that_nobody_reads_to_the_end_is_still_the_answer(llamas: Path) -> None:
    assert shell(f"$B diff {llamas}/seed {llamas}/seed --json | true") == (0, "")
    assert shell(f"$B diff {llamas}/seed {llamas}/law --json | true") == (1, "")


def test_too_little_memory_is_said(llamas: Path) -> None:
    status, said = shell(f"ulimit -v 400000; $B {write_recipe(llamas)} --workers 1 --no-verify")
    assert status == 2
    assert "error: not enough memory (" in said
    assert not (llamas / "out").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_end_a_run_orderly(llamas: Path, number: int, status: int) -> None:
    slow = """
import time
from contextlib import contextmanager
from bam_merge import cli
from bam_merge.showing import plan as render

def advance(count):
    print(".", end="", flush=True)
    time.sleep(0.1)

@contextmanager
def progress(plan):
    yield advance

render.merge_progress = progress
cli.main()
"""
    command = [sys.executable, "-c", slow, write_recipe(llamas), "--workers", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal)
    assert child.stdout is not None
    child.stdout.read(3)
    child.send_signal(number)
    _, said = child.communicate()
    assert child.returncode == status
    assert "what is finished is kept; run again with --resume to go on." in said
    assert "Traceback" not in said
    assert not (llamas / "out").exists()
    assert shell(f"$B {write_recipe(llamas)} --resume --no-verify")[1].startswith("bam-merge: resuming: ")


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "stopped"), (signal.SIGINT, 130, "interrupted"), (0, 1, "Traceback")]
)
def test_a_signal_that_compiled_code_made_an_error_of(number: int, status: int, word: str) -> None:
    """As pydantic_core does, of whatever is raised while it builds a validator. Without a signal it is an error as any other."""
    body = f"""
import click, os
from bam_merge.process import run_command
def build():
    try:
        os.kill(os.getpid(), {int(number)})
        [None for _ in range(10)]
    except BaseException:
        pass
    raise ValueError("Error building a validator: Stopped: 15")
run_command(click.Command("build", callback=build))
"""
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, preexec_fn=as_in_a_terminal)
    assert (done.returncode, word in done.stderr) == (status, True)
    assert ("Traceback" in done.stderr) == (number == 0)


def test_ignored_sighup_stays_ignored(llamas: Path) -> None:
    check = "import signal, sys; from bam_merge.process import stop_on_signals; stop_on_signals(); sys.exit(signal.getsignal(1) != signal.SIG_IGN)"
    assert subprocess.run(["bash", "-c", f"trap '' HUP; {sys.executable} -c '{check}'"]).returncode == 0


def test_progress_shows_on_a_terminal(llamas: Path) -> None:
    import pty

    read, write = pty.openpty()
    child = subprocess.Popen([sys.executable, "-m", "bam_merge", write_recipe(llamas)], stderr=write, stdout=subprocess.DEVNULL)
    import os

    os.close(write)
    shown = b""
    try:
        while chunk := os.read(read, 1024):
            shown += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(read)
    assert child.wait() == 0
    assert b"merging" in shown


def test_help_imports_nothing_that_starts_slowly() -> None:
    code = (
        "import sys; sys.argv = ['bam-merge', '--help']\n"
        "from bam_merge.cli import main\n"
        "main()\n"
        "print({'torch', 'numpy', 'pydantic', 'rich', 'yaml', 'safetensors', 'xxhash'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: bam-merge" in done.stdout and done.stdout.splitlines()[-1] == "set()"


def test_copies_are_made_without_torch(llamas: Path) -> None:
    """Its import takes longer than a small part does, and where something is computed it is to fall to one worker, while others copy."""
    recipe = write_recipe(llamas, "shared: {make: copy, from: code}", "merge", output="{path: out, max_shard_size: 60kB}")
    for arguments in (["--part", "1/2", "--no-verify"], ["--output", str(llamas / "whole"), "--no-verify"]):
        code = (
            f"import sys; sys.argv = ['bam-merge', {str(recipe)!r}, *{arguments!r}]\n"
            "from bam_merge.cli import main\n"
            "main()\n"
            "print({'torch'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "set()", arguments


def test_every_argument_of_a_command_has_a_type() -> None:
    """The functions behind the commands take what click gives them by name: no `**options`, and no Any."""
    for node in ast.parse((ROOT / "bam_merge" / "cli.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert node.args.kwarg is None and node.args.vararg is None, node.name
            assert not [name.id for name in ast.walk(node) if isinstance(name, ast.Name) and name.id == "Any"], node.name
