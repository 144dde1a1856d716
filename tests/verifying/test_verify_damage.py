"""`bam-merge verify` on another machine: a copy of the folder, no sources, and one bit flipped somewhere. It is named, every time."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge import MergeOptions
from bam_merge.checkpoints.header import Header, read_header
from bam_merge.checkpoints.provenance import REMEDY, SEAL, read_manifest, sealed
from bam_merge.errors import VerifyError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.publish import publish

COPIES = {
    "bam, sharded": ("bam", "{path: out, layout: bam, max_shard_size: 60kB}"),
    "bam, one file": ("bam", "{path: out, layout: bam}"),
    "mixtral, sharded": ("btx", "{path: out, layout: mixtral, max_shard_size: 60kB}"),
    "mixtral, one file": ("btx", "{path: out, layout: mixtral}"),
}


@pytest.fixture(params=COPIES)
def copy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merged folder elsewhere, its sources gone. What the model computes is not looked at: the bytes alone must tell."""
    method, output = COPIES[request.param]
    write_sources(tmp_path, CONFIGS["llama"])
    (tmp_path / "seed" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}}')
    (tmp_path / "seed" / "generation_config.json").write_text('{"eos_token_id": 2}')
    folder = publish(plan_file(write_recipe(tmp_path, "", method, output=output)), None, MergeOptions(verify=False))
    monkeypatch.setattr("bam_merge.verifying.verification._function", lambda *args: iter(()))
    away = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, away)
    for name in ("seed", "code", "law", "out"):
        shutil.rmtree(tmp_path / name)
    return away


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def verdict(run: Any, folder: Path) -> str:
    """What a verification that must not pass says."""
    result = run("verify", folder, "--json")
    if result.status == 2:
        return str(result.err)
    assert result.status == 1, result
    return "\n".join(f"{check['name']}: {check['detail']}" for check in json.loads(result.out)["checks"] if check["ok"] is False)


def regions(path: Path, header: Header) -> Iterator[tuple[int, str]]:
    """A byte of every region of a shard, and the tensor that it is in: the length, the header's text, every fifth tensor."""
    begin = min(entry.offset for entry in header.tensors)
    yield from ((place, "") for place in range(0, 8, 3))
    yield from ((place, "") for place in range(8, begin, max(1, begin // 12)))
    yield path.read_bytes().index(b'"pt"') + 1, ""
    for entry in header.tensors[::5]:
        yield entry.offset + entry.nbytes // 2, entry.name
    yield path.stat().st_size - 1, header.tensors[-1].name


def test_a_good_copy_passes_without_its_sources(copy: Path, run: Any) -> None:
    result = run("verify", copy, "--json")
    assert result.status == 0, result
    checks = {check["name"]: check for check in json.loads(result.out)["checks"]}
    assert checks["sources"]["ok"] is None
    assert all(checks[name]["ok"] for name in ("files", "headers", "layout", "digests"))


def test_a_bit_of_a_shard(copy: Path, run: Any) -> None:
    for path in sorted(copy.glob("*.safetensors")):
        good = path.read_bytes()
        for place, tensor in list(regions(path, read_header(str(path)))):
            path.write_bytes(flip(good, place))
            said = verdict(run, copy)
            assert path.name in said and tensor in said, (place, said)
            if tensor:
                assert f"digests: {tensor} in {path.name}: bytes changed since the merge: {REMEDY}" in said
        path.write_bytes(good)
    assert run("verify", copy).status == 0


def test_a_bit_of_any_other_file(copy: Path, run: Any) -> None:
    others = [path for path in sorted(copy.iterdir()) if path.suffix != ".safetensors" and path.name != "bam_merge.json"]
    assert {"README.md", "config.json", "tokenizer.json", "generation_config.json"} <= {path.name for path in others}
    for path in others:
        good = path.read_bytes()
        for place in (0, len(good) // 3, len(good) // 2, len(good) - 1):
            path.write_bytes(flip(good, place))
            assert f"files: {path.name} is not as it was written: {REMEDY}" in verdict(run, copy), place
        path.write_bytes(good)


def test_a_bit_of_the_manifest(copy: Path, run: Any) -> None:
    """Also where it stays good JSON: in the recipe, an expression, a source's digest, or the manifest's own."""
    path = copy / "bam_merge.json"
    good = path.read_bytes()
    for place in range(0, len(good), 97):
        path.write_bytes(flip(good, place))
        with pytest.raises(VerifyError, match=r"bam_merge\.json"):
            read_manifest(copy)
    for word in (b'"random_seed": 0', b"mean(seed", b'"header": "', b'"version": "', f'"{SEAL}": "'.encode(), SEAL.encode()):
        place = good.index(word) + len(word) - 1
        path.write_bytes(good[:place] + (b"1" if good[place : place + 1] != b"1" else b"2") + good[place + 1 :])
        said = verdict(run, copy)
        assert str(path) in said, word
    path.write_bytes(good.replace(b'"random_seed": 0', b'"random_seed": 7'))
    assert f"bam_merge.json: not as it was written: its {SEAL} is not that of its own bytes: {REMEDY}." in verdict(run, copy)
    path.write_bytes(good[:-1])
    assert REMEDY in verdict(run, copy)
    path.write_bytes(good)
    assert run("verify", copy).status == 0


def test_missing_and_unexpected_files_and_tensors(copy: Path, run: Any) -> None:
    for path in [path for path in sorted(copy.iterdir()) if path.name != "bam_merge.json"]:
        path.rename(copy.parent / "away")
        assert path.name in verdict(run, copy)
        (copy.parent / "away").rename(path)
    for name in (
        "tokenizer.model",
        "modeling_evil.py",
        "pytorch_model.bin",
        "adapter_config.json",
        "model-9.safetensors",
        "chat_template.jinja",
    ):
        (copy / name).write_bytes(b"x")
        assert f"files: {name}: not of this merge: remove it" in verdict(run, copy)
        (copy / name).unlink()
    path = sorted(copy.glob("*.safetensors"))[0]
    good = path.read_bytes()
    name = read_header(str(path)).tensors[0].name
    path.write_bytes(good.replace(f'"{name}"'.encode(), f'"{name[:-1]}X"'.encode()))
    said = verdict(run, copy)
    assert (f"{name} missing" in said and f"{name[:-1]}X not in the manifest" in said) or f"lists {name}, which no shard holds" in said


def test_the_manifest_of_a_stranger_is_read_with_care(copy: Path, run: Any) -> None:
    """One that is sealed, but says what no merge writes: no path is followed, no control character printed, no traceback."""
    good = json.loads((copy / "bam_merge.json").read_text())
    first = next(iter(good["tensors"]))

    def forged(change: Callable[[dict[str, Any]], Any]) -> str:
        document = json.loads(json.dumps(good))
        change(document)
        (copy / "bam_merge.json").write_bytes(sealed(document))
        said = verdict(run, copy)
        shown = run("verify", copy)
        assert all(line.isprintable() for line in (said + shown.out + shown.err).split("\n"))
        return said

    assert "missing or damaged" in forged(lambda m: m["files"].update({"../../../etc/passwd": "0"}))
    assert "missing or damaged" in forged(lambda m: m["shards"].update({"/etc/passwd": {"bytes": 1, "header": ""}}))
    assert "missing or damaged" in forged(lambda m: m["recipe"].update(experts=5))
    assert "missing or damaged" in forged(lambda m: m["tensors"][first].update(nonfinite="x"))
    assert "missing or damaged" in forged(lambda m: m["sources"]["law"].update(files={"x": {}}))
    assert "not in the manifest" in forged(lambda m: m["tensors"].pop(first))
    assert r"\x1b[31m missing" in forged(lambda m: m["tensors"].update({"\x1b[31m": m["tensors"][first]}))
    assert r"F\x1b" in forged(lambda m: m["tensors"][first].update(dtype="F\x1b"))
    assert forged(lambda m: (m.update(recipe_folder="\x1b]0;x\x07"), m["files"].update({"config.json": "\x1b"})))
