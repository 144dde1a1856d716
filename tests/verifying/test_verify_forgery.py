"""A folder whose manifest was made to match it: what follows from the plan, the seed, the package or the folder tells all the same."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from conftest import write_recipe, write_sources
from proofs import SQUARE, UNPROVED, failed

from bam_merge import MergeOptions
from bam_merge.checkpoints.provenance import sealed
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.verifying.report import Check
from bam_merge.verifying.verification import verify


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Plan]:
    """A merge with companions. What the model computes is not looked at."""
    monkeypatch.setattr("bam_merge.verifying.verification._function", lambda *args: iter(()))
    write_sources(tmp_path, SQUARE)
    (tmp_path / "seed" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "auto_map": 1}, "merges": []}}')
    (tmp_path / "seed" / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    (tmp_path / "seed" / "generation_config.json").write_text('{"eos_token_id": 2}')
    plan = plan_file(write_recipe(tmp_path, output="{path: out, max_shard_size: 60kB}"))
    return publish(plan, None, UNPROVED), plan


def checks(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in verify(folder).checks}


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Change the manifest, and make its digests those of the files that it names."""
    manifest = json.loads((folder / "bam_merge.json").read_text())
    change(manifest)
    manifest["files"] = {name: xxhash.xxh3_128_hexdigest((folder / name).read_bytes()) for name in manifest["files"]}
    (folder / "bam_merge.json").write_bytes(sealed(manifest))


def test_a_good_one_passes_and_its_resealed_copy_too(good: tuple[Path, Plan]) -> None:
    for _ in range(2):
        report = verify(good[0])
        assert report.ok, failed(report)
        assert all(check.ok for check in report.checks)
        reseal(good[0])


FILES = {
    "tokenizer.json": ('"a": 0', '"b": 0', "companions", "tokenizer.json is not what sources.seed gives: model differ"),
    "tokenizer_config.json": ("{", '{"\\u0061uto_map": {"AutoTokenizer": "evil.T"}, ', "code", "tokenizer_config.json has auto_map"),
    "generation_config.json": ("2", "3", "companions", "generation_config.json is not what sources.seed gives: eos_token_id differ"),
    "modeling_bam.py": ("import torch", "import os, torch", "code", "modeling_bam.py is not the model code of bam-merge"),
    "configuration_bam.py": ('"""', '"""X', "code", "configuration_bam.py is not the model code of bam-merge"),
    "README.md": ("merged by", "made by", "card", "README.md, line 7: found"),
    "config.json": ('"gate_scale": 1.0', '"gate_scale": true', "config", "gate_scale is True"),
    "model.safetensors.index.json": ('"total_size": ', '"total_size": 1', "provenance", "index.json: expected metadata"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_forged_file_is_named(name: str, good: tuple[Path, Plan]) -> None:
    old, new, check, words = FILES[name]
    path = good[0] / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    reseal(good[0])
    found = failed(verify(good[0]))
    assert words in found[check], found
    assert "files" not in found


def first(manifest: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = next(iter(manifest["tensors"].values()))
    return record


def copied(manifest: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = next(item for item in manifest["tensors"].values() if item["expression"].startswith("seed:"))
    return record


def weights(manifest: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = manifest["sources"]["law"]["files"]["model.safetensors"]
    return record


ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an expression": (lambda m: first(m).update(expression="mean(seed, code)"), "expression is"),
    "what was read": (lambda m: first(m)["reads"].pop(), "reads is"),
    "what was read more": (
        lambda m: first(m)["reads"].append({"source": "law", "tensor": "x"}),
        "reads law:x, of which no source's record",
    ),
    "what was read before": (lambda m: m.update(format=1), "reads is"),
    "what a copy read": (lambda m: copied(m)["reads"][0].update(source="code"), "is a copy of seed:"),
    "a source's path": (lambda m: m["sources"]["law"].update(path="elsewhere"), "but in the manifest's own recipe"),
    "a source's header": (lambda m: weights(m).update(header="0" * 32), "sources.law: "),
    "a source's size": (lambda m: weights(m).update(bytes=7), "saved again since the merge"),
    "a source's digest": (lambda m: weights(m).update(digest="0" * 32), "is not that of its header and tensors"),
    "a tensor's digest": (lambda m: weights(m)["tensors"].update({"lm_head.weight": "0" * 32}), "sources.law: "),
    "a source's config": (lambda m: m["sources"]["law"].update(config="0" * 32), "sources.law: config.json is not the file"),
    "an entry more": (lambda m: m.update(author="x"), "author: no manifest has such entries"),
    "the seed of chance": (lambda m: m["recipe"].update(random_seed=5), "router.weight (element "),
    "the method": (lambda m: m["recipe"].update(method="btx"), "its recipe is none"),
    "a rule": (lambda m: m["recipe"].update(rules=[{"roles": ["nothing"], "make": "mean"}]), "its recipe "),
    "parameters": (lambda m: m["parameters"].update(active=1), "1 active parameters, the plan has"),
    "no parameters": (lambda m: m.update(parameters=[1]), "parameters are [1]"),
    "unused": (lambda m: m.update(unused={"law": {"x": "y"}}), "unused is"),
    "nonfinite": (lambda m: first(m).update(nonfinite=3), "has 0 values that are NaN or infinite, the manifest says 3"),
    "the way to the recipe": (lambda m: m.update(recipe_folder="../x/y"), "recipe_folder"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_forged_entry_is_named(name: str, good: tuple[Path, Plan]) -> None:
    change, words = ENTRIES[name]
    reseal(good[0], change)
    found = failed(verify(good[0]))
    assert words in found["routers" if "router" in words else "provenance"], found


def test_changed_sources_are_named_and_the_output_is_not_accused(good: tuple[Path, Plan]) -> None:
    folder, _ = good
    seed = folder.parent / "seed"
    config = json.loads((seed / "config.json").read_text())
    for source in ("seed", "code", "law"):
        (folder.parent / source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    (seed / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    report = verify(folder)
    found = {check.name: check for check in report.checks}
    assert report.ok, failed(report)
    detail = found["sources"].detail
    assert "seed/config.json (rms_norm_eps), code/config.json (rms_norm_eps)" in detail and "seed/tokenizer_config.json" in detail
    assert found["sources"].ok is found["config"].ok is found["companions"].ok is None
    assert "rms_norm_eps is 1e-05, the sources and the recipe give 0.001" in found["config"].detail
    assert found["companions"].detail.startswith("sources.seed changed since the merge: tokenizer_config.json")


FOREIGN = {
    "custom_generate/generate.py": "code, which a loader may run",
    "additional_chat_templates/x.jinja": "what a loader may read",
    "evil.so": "code", "evil.so.1": "code", "evil.PY": "code", ".evil.py": "code", ".hidden": "", "a/b/c/d.pyc": "code",
    "pytorch_model.BIN": "a pickle", "x.gguf": "weights", "CONFIG.json": "some file systems take it for config.json",
    ".git/hooks/x": "git's own folder", "e\x1b[31m.py": "code", ".cache/huggingface/evil.py": "code",
}  # fmt: skip


def test_whatever_is_not_of_the_merge_is_named(good: tuple[Path, Plan], run: Any) -> None:
    folder, _ = good
    for name, kind in FOREIGN.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        detail = checks(folder)["files"].detail
        shown = ".git" if name.startswith(".git") else name.replace("\x1b", r"\x1b")
        assert f"{shown}: not of this merge: remove it" in detail and kind in detail, (name, detail)
        path.unlink()
        while path.parent != folder:
            path = path.parent
            path.rmdir()
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("/nowhere")
    os.mkfifo(folder / "fifo")
    (Path(os.fsdecode(bytes(folder) + b"/\xff.py"))).write_bytes(b"")
    result = run("verify", folder)
    out = " ".join(result.out.split())
    assert result.status == 1
    for words in ("empty/: not of this merge", "link: not of this merge", "neither a file nor a folder", r"\udcff.py"):
        assert words in out


def test_what_tools_leave_is_said_and_no_failure(good: tuple[Path, Plan]) -> None:
    folder, _ = good
    for name in (".gitattributes", ".DS_Store", ".cache/huggingface/download/config.json.metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    found = checks(folder)
    assert found["files"].ok is True and found["other files"].ok is None
    assert ".DS_Store (the macOS Finder's)" in found["other files"].detail
    (folder / ".gitattributes").unlink()
    (folder / ".gitattributes").symlink_to("config.json")
    assert ".gitattributes: not of this merge: remove it (a link" in checks(folder)["files"].detail


def test_a_link_for_a_file_of_the_merge(good: tuple[Path, Plan]) -> None:
    folder, _ = good
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")
    assert "config.json is a link to ../config.json, which is not of this folder" in checks(folder)["files"].detail
    cache = folder.parent / "models--a--b"
    snapshot = cache / "snapshots" / "main"
    snapshot.parent.mkdir(parents=True)
    (cache / "blobs").mkdir()
    folder.rename(snapshot)
    (folder.parent / "config.json").rename(cache / "blobs" / "0")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/0")
    assert checks(snapshot)["files"].ok is True


def test_code_listed_in_the_manifest_and_named_by_the_config(good: tuple[Path, Plan]) -> None:
    """Without sources too."""
    folder, _ = good
    (folder / "evil.py").write_text("")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation": "a/b"}))
    reseal(folder, lambda m: m["files"].update({"evil.py": ""}))
    (folder.parent / "law").rename(folder.parent / "away")
    found = failed(verify(folder))
    assert "evil.py: in the manifest, but no file that bam-merge" in found["files"]
    assert "auto_map is {'AutoModel': 'evil.Model'}" in found["code"] and "has _attn_implementation" in found["code"]


def test_another_version_is_said(good: tuple[Path, Plan]) -> None:
    folder, _ = good
    (folder / "modeling_bam.py").write_text("# older")
    reseal(folder, lambda m: m.update(version="0.0.1"))
    found = checks(folder)
    assert found["code"].ok is None
    assert "modeling_bam.py written by bam-merge 0.0.1" in found["code"].detail


@pytest.mark.parametrize("place", ["absolute", "../elsewhere/out", "."])
def test_wherever_the_output_is_the_way_back_is_right(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_merge.verifying.verification._function", lambda *args: iter(()))
    home = tmp_path / "a" / "b"
    write_sources(home, SQUARE)
    path = str(tmp_path / "abs" / "out") if place == "absolute" else f"{place}/out"
    folder = publish(plan_file(write_recipe(home, output=f"{{path: {path}}}")), None, UNPROVED)
    report = verify(folder)
    assert all(check.ok for check in report.checks), report.checks


def test_infinities_that_were_allowed_are_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path, SQUARE)
    for source in ("seed", "code", "law"):
        path = tmp_path / source / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-4] + b"\x00\x00\x80\x7f")  # +inf, the last value of the last tensor, which is averaged
    plan = plan_file(write_recipe(tmp_path))
    folder = publish(plan, None, MergeOptions(verify=False, allow_nonfinite=True))
    found = {check.name: check for check in verify(folder).checks}
    assert found["provenance"].ok and found["model"].ok is None
