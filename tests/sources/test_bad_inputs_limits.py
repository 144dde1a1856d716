"""Inputs that attack: code, links, bombs, names; values that are no numbers; outputs that are inputs; permissions; very many tensors."""

import ctypes
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, Result, write_recipe
from damage import ONE, add, edit_config, edit_tensors, said, shard, spans, tokenizer, tree

from bam_merge.checkpoints.folder import INDEX
from bam_merge.demo.synthetic import write_checkpoint

ESCAPED = r"\x1b[31m"


# ---- code ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bam", "mixtral"])
def test_code_of_a_source_never_reaches_the_output(layout: str, llamas: Path, run: Any) -> None:
    trap = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}, "trust_remote_code": True,
        "_attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel", "_name_or_path": "evil",
        "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
    }  # fmt: skip
    for source in ("seed", "code", "law"):
        edit_config(llamas / source, **trap)
        tokenizer(llamas / source, {"a": 0})
        (llamas / source / "evil.py").write_text("raise SystemExit('evil')")
        (llamas / source / "modeling_bam.py").write_text("raise SystemExit('evil')")
        (llamas / source / "tokenizer_config.json").write_text(
            json.dumps({"model_max_length": 7, "eos_token": "é", "auto_map": trap["auto_map"], "trust_remote_code": True})
        )
        (llamas / source / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "trust_remote_code": True}))
    method = "bam" if layout == "bam" else "btx"
    result: Result = run(write_recipe(llamas, "", method, output=f"{{path: out, layout: {layout}}}"), "--no-verify")
    assert result.status == 0, result.err
    out = llamas / "out"
    everything = b"".join(path.read_bytes() for path in out.iterdir() if path.suffix not in (".md", ".py"))
    for word in (b"evil", b"_attn_implementation", b'"trust_remote_code"'):
        assert word not in everything, word
    config = json.loads((out / "config.json").read_text())
    assert ("auto_map" in config) == (layout == "bam")  # ours, of the files that travel with it
    assert "quantization_config" not in config
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "é"
    assert sorted(path.name for path in out.glob("*.py")) == (["configuration_bam.py", "modeling_bam.py"] if layout == "bam" else [])


def test_a_pickle_beside_the_weights_is_not_opened(llamas: Path, run: Any) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(llamas / "exploded"),)

    import pickle

    for name in ("pytorch_model.bin", "training_args.bin"):
        (llamas / "law" / name).write_bytes(pickle.dumps(Bomb()))
    assert run(write_recipe(llamas), "--no-verify").status == 0
    assert not (llamas / "exploded").exists()


# ---- links and places ------------------------------------------------------------------------------------------------------


def test_links_of_a_hub_cache_are_followed(llamas: Path, run: Any) -> None:
    """models--x/snapshots/REV/FILE -> ../../blobs/DIGEST, as the hub's client lays files out; shards and config alike."""
    blobs, snapshot = llamas / "hub" / "blobs", llamas / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shard(llamas / "law")
    for index, path in enumerate(sorted((llamas / "law").iterdir())):
        path.rename(blobs / f"{index:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{index:040x}")
    (llamas / "law").rmdir()
    (llamas / "law").symlink_to(snapshot)
    assert run("plan", write_recipe(llamas)).status == 0
    assert run("inspect", llamas / "law").status == 0


def test_headers_in_another_order_and_a_wrong_total_size_are_no_harm(llamas: Path, run: Any) -> None:
    """The tensors may stand in the header in any order; of the total_size, the headers are believed, and it is said."""
    spans(lambda records, data: data)(llamas / "code")
    header = json.loads((llamas / "code" / ONE).read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert list(header) != sorted(header)
    shard(llamas / "law")
    index = json.loads((llamas / "law" / INDEX).read_text())
    index["metadata"]["total_size"] = 7
    (llamas / "law" / INDEX).write_text(json.dumps(index))
    result: Result = run("plan", write_recipe(llamas))
    assert result.status == 0
    assert f"sources.law: {INDEX} says total_size 7, the tensors take 72,320 bytes; the headers are believed." in result.out


def test_one_file_under_two_names(llamas: Path, run: Any) -> None:
    """Two folders whose weights are links to one file, hard or symbolic, are one model."""
    for link in (os.link, os.symlink):
        (llamas / "law" / ONE).unlink()
        link(llamas / "code" / ONE, llamas / "law" / ONE)
        assert said(run, llamas, "plan", write_recipe(llamas)) == [
            "sources.law: the same weight files as sources.code. Name it once; it may stand several times in experts."
        ]


def test_an_output_that_holds_links_to_an_input_leaves_it_alone(llamas: Path, run: Any) -> None:
    before = (llamas / "law" / ONE).read_bytes()
    (llamas / "out").mkdir()
    os.link(llamas / "law" / ONE, llamas / "out" / ONE)
    os.link(llamas / "law" / "config.json", llamas / "out" / "config.json")
    assert run(write_recipe(llamas), "--force", "--no-verify").status == 0
    assert (llamas / "law" / ONE).read_bytes() == before != (llamas / "out" / ONE).read_bytes()


def test_an_output_that_is_a_file_or_a_dangling_symlink(llamas: Path, run: Any) -> None:
    recipe = write_recipe(llamas)
    (llamas / "out").write_text("x")
    exists = "HOME/out already exists. Choose another --output, or replace it as a whole with --force."
    assert said(run, llamas, recipe) == [exists]
    assert said(run, llamas, recipe, "--force") == [
        "HOME/out exists and is a file, and --force replaces nothing but a folder. Remove it yourself, or choose another --output."
    ]
    (llamas / "out").unlink()
    (llamas / "out").symlink_to("nowhere")
    assert said(run, llamas, recipe) == [exists]


# ---- recipes ---------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))
RECIPES = {
    "an alias bomb": (BOMB, "HOME/x.yaml:1:34: more than 20,000 values once its aliases are expanded."),
    "an alias of itself": ("method: &a [*a]", "HOME/x.yaml:1:9: nested more than 32 deep."),
    "more than 1 MB": ("#" + "x" * 1_000_001, "HOME/x.yaml: larger than 1,000,000 bytes."),
    "half a million brackets": ("[" * 500_000, "HOME/x.yaml:1:34: nested more than 32 deep, as no recipe is."),
    "300,000 values": ("a: [" + "a," * 300_000 + "]", "HOME/x.yaml:1:39999: more than 20,000 values, as no recipe is."),
    "a tag that makes objects": ("method: !!python/name:os.system x", "HOME/x.yaml:1:9: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'."),
    "a character beyond Unicode": ('method: "\\UFFFFFFFF"', "HOME/x.yaml:1:12: a character or number that does not exist."),
    "a version of 5,000 digits": (f"%YAML 1.{'9' * 5000}\n---\na: 1", "HOME/x.yaml:1:9: a character or number that does not exist."),
    "an integer of 5,000 digits": (f"random_seed: !!int 0x{'f' * 5000}", "HOME/x.yaml:1:14: '0xffffffffffffffffffffffffffffffffffffffffffffffffffffffffff... (5002 characters)' is no int: an int here is a plain decimal number."),
    "a path with a NUL": ('sources: {a: "x\\0y"}', "HOME/x.yaml:1:14: a NUL or half a surrogate pair, which no name and no path has."),
    "a raw escape": ("method: \x1b[31m", "HOME/x.yaml: not valid YAML: unacceptable character #x001b: special characters are not allowed in \"<unicode string>\", position 8."),
    "a shard size without end": ("method: bam\nsources: {a: a, b: b}\noutput: {path: o, max_shard_size: 9e300GB}", "HOME/x.yaml:3:19: output.max_shard_size: '9e300GB' is no size; write for example 5GB, 500MB or 2GiB."),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_attack(name: str, tmp_path: Path, run: Any) -> None:
    text, message = RECIPES[name]
    (tmp_path / "x.yaml").write_text(text)
    for command in (("plan", tmp_path / "x.yaml"), (tmp_path / "x.yaml",)):
        assert said(run, tmp_path, *command) == [message]


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "No such file or directory."),
    (os.mkfifo, "not a regular file."),
    (Path.mkdir, "not a regular file."),
    (lambda path: path.symlink_to("/dev/zero"), "not a regular file."),
    (lambda path: path.symlink_to("nowhere"), "a symlink to nowhere, which does not exist."),
    (lambda path: path.write_bytes(b"method: \xff"), "not UTF-8 text (byte 8)."),
])  # fmt: skip
def test_recipes_that_are_no_text(make: Any, message: str, tmp_path: Path, run: Any) -> None:
    make(tmp_path / "x.yaml")
    assert said(run, tmp_path, "plan", tmp_path / "x.yaml") == [f"HOME/x.yaml: {message}"]


# ---- names -----------------------------------------------------------------------------------------------------------------


def test_control_characters_are_escaped_wherever_names_are_printed(llamas: Path, run: Any, tmp_path: Path) -> None:
    red = "\x1b[31m\u202e<script>|`*x*"
    (llamas / "law").rename(llamas / f"law{red}")
    (llamas / f"code{red}").mkdir()
    recipe = llamas / f"r{red}.yaml"
    recipe.write_text(json.dumps({"method": "bam", "sources": {"seed": "seed", "law": f"law{red}"}, "output": {"path": f"out{red}"}}))
    outputs = [
        run("plan", recipe),
        run("plan", recipe, "--json"),
        run(recipe, "--no-verify"),
        run(recipe, "--no-verify"),
        run("verify", llamas / f"out{red}"),
    ]
    outputs += [run("inspect", llamas / f"law{red}"), run("inspect", llamas / f"law{red}", "--json"), run("plan", llamas / f"no{red}.yaml")]
    outputs += [run("diff", llamas / "seed", llamas / f"law{red}"), run("diff", llamas / "seed", llamas / f"code{red}")]
    add(llamas / f"law{red}", red)
    page = llamas / "page.html"
    outputs += [
        run("plan", recipe),
        run("inspect", llamas / f"law{red}"),
        run("diff", llamas / "seed", llamas / f"law{red}", "--html", page),
    ]
    assert [result.status for result in outputs] == [0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 2, 0, 1]
    for result in outputs:
        assert all(line.isprintable() for line in (result.out + result.err).split("\n")), result
    card = (llamas / f"out{red}" / "README.md").read_text()
    assert all(line.isprintable() for line in card.split("\n"))
    told, fence, recipe = card.partition("\n## Recipe\n\n```yaml\n")  # a fence longer than any run in a name: inside is no Markdown
    assert fence and "<script>" not in told and recipe.count("```") == 1 and recipe.endswith("\n```\n")
    text = page.read_text()
    assert red not in text and "\x1b" not in text and "\u202e" not in text and "<script>|" not in text


# ---- values ----------------------------------------------------------------------------------------------------------------

VALUES = {
    "NaN": (torch.nan, "float32", "1 value that is not finite, the first at element 37"),
    "infinity": (torch.inf, "float32", "1 value that is not finite, the first at element 37"),
    "overflow of float16": (3e5, "float16", "1 value that is not finite, the first at element 37"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_not_finite(name: str, llamas: Path, run: Any) -> None:
    """Found while merging, so after the plan: the target does not appear; --allow-nonfinite records them."""
    value, dtype, _ = VALUES[name]
    edit_tensors(llamas / "law", lambda tensors: tensors["model.norm.weight"].view(-1)[7:8].fill_(value))
    recipe = write_recipe(llamas, output=f"{{path: out, dtype: {dtype}}}")
    result: Result = run(recipe)
    assert (result.status, result.out) == (2, "")
    assert "error: model.norm.weight: 1 " in result.err and "--allow-nonfinite" in result.err, result.err
    assert "7" in result.err
    assert not (llamas / "out").exists()
    assert run(recipe, "--allow-nonfinite", "--no-verify").status == 0
    manifest = json.loads((llamas / "out" / "bam_merge.json").read_text())
    assert manifest["tensors"]["model.norm.weight"]["nonfinite"] == 1


# ---- permissions -------------------------------------------------------------------------------------------------------------


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def obey_permissions() -> None:
    """Give up what lets root read and write whatever it likes."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise PermissionError("this root may not give up its capabilities")


def as_a_user(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as one whom permissions bind; skip where that cannot be."""
    command = [sys.executable, "-B", "-m", "bam_merge", *map(str, arguments)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=obey_permissions)
    except subprocess.SubprocessError as error:
        pytest.skip(str(error))


UNREADABLE = {
    "weights": (ONE, "sources.law: HOME/law/model.safetensors: Permission denied."),
    "config.json": ("config.json", "sources.law: HOME/law/config.json: Permission denied."),
    "the folder": (".", "sources.law: HOME/law/config.json: Permission denied.\nsources.law: HOME/law: Permission denied."),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_may_not_be_read(name: str, llamas: Path) -> None:
    file, message = UNREADABLE[name]
    recipe, path = write_recipe(llamas), llamas / "law" / file
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    try:
        done = as_a_user("plan", recipe)
    finally:
        path.chmod(before)
    assert (done.returncode, done.stdout) == (2, "")
    found = [line.removeprefix("error: ").replace(str(llamas), "HOME") for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert found == message.split("\n")


def test_a_parent_that_is_read_only_or_missing(llamas: Path) -> None:
    """A missing parent is made; where the nearest that exists may not be written, that is said before anything is."""
    recipe = write_recipe(llamas)
    before = tree(llamas)
    llamas.chmod(0o555)
    try:
        for output in ("out", "missing/out"):
            done = as_a_user(recipe, "--output", llamas / output)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr == f"error: no permission to write in {llamas}. Choose another --output.\n"
    finally:
        llamas.chmod(0o755)
    assert tree(llamas) == before


# ---- very many -----------------------------------------------------------------------------------------------------------------

VAST = {
    **CONFIGS["llama_biased"], "hidden_size": 4, "intermediate_size": 2, "num_hidden_layers": 6_250, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 4,
}  # fmt: skip


def test_100_000_tensors_in_1_000_shards_with_64_open_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "seed", VAST, lambda name, shape: None, "BF16", shards=1000)
    shutil.copytree(tmp_path / "seed", tmp_path / "code")
    recipe = write_recipe(tmp_path, names=("seed", "code"))

    def limited(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "bam_merge", *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=600,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert "layers.{0-6249}" in limited("plan", recipe)
    document = json.loads(limited("inspect", tmp_path / "code", "--json"))
    assert (len(document["tensors"]), len(document["files"]), document["findings"]) == (100_003, 1000, [])
