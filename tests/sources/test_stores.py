"""Models in stores that fsspec opens: its memory stands for all of them, with the errors that the stores' packages raise."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy
import pytest
import yaml
from adapter_files import write_adapter
from conftest import CONFIGS, SOURCES, write_sources
from fsspec.implementations.memory import MemoryFileSystem
from quantised_files import quantise
from vocabularies import three
from web_models import write_away_recipe

from bam_merge.address import Address
from bam_merge.checkpoints.afar import Blocks
from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.publish import publish
from bam_merge.sources import trying
from bam_merge.sources.afar import stores
from bam_merge.sources.afar.folder import resolve
from bam_merge.verifying.afar import StretchesAfar


class Ordered(Exception):
    """Stands for an error of a store's package, by its name and what it carries."""


def error(name: str, **carried: Any) -> Exception:
    made = type(name, (Ordered,), {})("secret-signature")
    for key, value in carried.items():
        setattr(made, key, value)
    return made


class FaultyStore(MemoryFileSystem):
    """fsspec's memory with etags, under another name; `faults` are raised, or change what is read, as long as there are any."""

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    faults: list[tuple[str, Any]] = []  # noqa: RUF012
    etags: dict[str, str] = {}  # noqa: RUF012
    spans: list[tuple[str, int | None, int | None]] = []  # noqa: RUF012

    def _fault(self, path: str) -> Any:
        for index, (pattern, fault) in enumerate(self.faults):
            if re.search(pattern, path):
                del self.faults[index]
                if isinstance(fault, Exception):
                    raise fault
                return fault
        return None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://")))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._fault(f"list {path}")
        return [{**entry, "ETag": f'"{self.etags.get(entry["name"], "one")}"'} for entry in super().ls(path, True)]

    def info(self, path: str, **kwargs: Any) -> Any:
        self._fault(f"info {path}")
        entry = super().info(path)
        return {**entry, "ETag": f'"{self.etags.get(entry["name"], "one")}"'}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        change = self._fault(f"read {path}")
        self.spans.append((path, start, end))
        data = bytes(super().cat_file(path, start, end))
        return data if change is None else change(data, bytes(super().cat_file(path)))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyStore]]:
    """A store with seed, code and law in a bucket."""
    monkeypatch.setattr(trying, "WAITS", (0.01, 0.01, 0.01))
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    for name in ("store", "etags"):
        monkeypatch.setattr(FaultyStore, name, {})
    for name in ("faults", "spans"):
        monkeypatch.setattr(FaultyStore, name, [])
    monkeypatch.setattr(FaultyStore, "pseudo_dirs", [""])
    write_sources(tmp_path / "models", CONFIGS["llama"])
    for name in SOURCES:
        put(name, tmp_path / "models" / name)
    yield FaultyStore


def put(name: str, folder: Path, bucket: str = "/bucket") -> None:
    system = FaultyStore()
    for path in folder.iterdir():
        system.pipe_file(f"{bucket}/{name}/{path.name}", path.read_bytes())


PLACES = {name: f"faulty://bucket/{name}" for name in SOURCES}


def merged(run: Any, recipe: Path, *options: str) -> Any:
    result = run("merge", recipe, *options)
    assert result.status == 0, result.err
    return result


def same_weights(tmp_path: Path, run: Any, sources: dict[str, str] | None = None) -> bool:
    """Whether `out` has the weights that a merge of the folders has."""
    merged(run, write_away_recipe(tmp_path, sources or {name: f"models/{name}" for name in SOURCES}, output="here"), "--no-verify")
    return (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()


def test_a_merge_and_its_proof(store: type[FaultyStore], tmp_path: Path, run: Any) -> None:
    result = merged(run, write_away_recipe(tmp_path, PLACES))
    assert "verified" in result.out and same_weights(tmp_path, run)
    recorded = json.loads((tmp_path / "out" / "bam_merge.json").read_text())["sources"]["law"]
    assert recorded["path"] == "faulty://bucket/law" and recorded["files"]["model.safetensors"]["etag"] == "one"
    assert not [span for span in store.spans if span[1] is None]


def test_folders_by_their_address(tmp_path: Path, run: Any) -> None:
    """Whose times of change are no part of a record, as of any folder."""
    write_sources(tmp_path / "models", CONFIGS["llama"])
    merged(run, write_away_recipe(tmp_path, {name: f"file://{tmp_path}/models/{name}" for name in SOURCES}), "--no-verify")
    assert same_weights(tmp_path, run) and "etag" not in (tmp_path / "out" / "bam_merge.json").read_text()


@pytest.mark.parametrize("whose", ["the merge's", "the proof's"])
def test_a_reader_that_is_wrong_is_found(
    whose: str, store: type[FaultyStore], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge reads blocks, and the proof stretches: one byte that either takes from elsewhere shows."""
    if whose == "the merge's":
        right = Blocks._block

        def wrong(self: Blocks, file: Any, span: tuple[int, int], number: int) -> bytes:
            return right(self, file, (span[0] + 4, span[1] - 4) if file.name.endswith("law/model.safetensors") else span, number) + bytes(4)

        monkeypatch.setattr(Blocks, "_block", wrong)
    else:
        read = StretchesAfar.bytes
        monkeypatch.setattr(StretchesAfar, "bytes", lambda *given: numpy.roll(read(*given), 4))
    result = run("merge", write_away_recipe(tmp_path, PLACES))
    assert result.status == 1 and "was not published" in result.err and not (tmp_path / "out").exists(), result.err


PASSING = {
    "broken": error("ConnectionResetError_"),
    "an error of the system": OSError("secret-signature"),
    "busy": error("HttpError", status=429, headers={"Retry-After": "1"}),
    "down": error("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {}}}),
    "short": lambda data, whole: data[:-1],
    "timeout": error("ReadTimeoutError"),
}


@pytest.mark.parametrize("name", PASSING)
def test_passing_faults_are_tried_again(name: str, store: type[FaultyStore], tmp_path: Path, run: Any) -> None:
    store.faults += [("read .*law/model", PASSING[name])]
    result = merged(run, write_away_recipe(tmp_path, PLACES), "--no-verify")
    assert not store.faults and same_weights(tmp_path, run) and (name != "busy" or "the store asks to wait 1 seconds." in result.err)


LASTING = {
    "no keys": ("list .*law", error("NoCredentialsError"), "faulty://bucket/law: access is refused: there are no keys for it here, or they have expired, or may not read it. Set what fsspec takes for faulty://"),
    "refused": ("read .*law/model", PermissionError("secret-signature"), "faulty://bucket/law/model.safetensors: access is refused"),
    "expired": ("read .*law/model", error("HttpResponseError", status_code=403), "faulty://bucket/law/model.safetensors: access is refused (it answers 403)"),
    "gone": ("read .*law/model", FileNotFoundError("secret-signature"), "faulty://bucket/law/model.safetensors: there is no such file."),
    "whole files": ("read .*law/model", lambda data, whole: whole + bytes(2**15), "faulty://bucket/law/model.safetensors: the server sends whole files where a range of bytes is asked for"),
    "down": ("read .*law/model", error("HttpError", code="500"), "faulty://bucket/law/model.safetensors: the server has a fault of its own (it answers 500)."),
    "short": ("read .*law/model", lambda data, whole: data[:-1], "faulty://bucket/law/model.safetensors: found "),
    "a fault of the package": ("read .*law/model", error("ParamValidationError"), "faulty://bucket/law/model.safetensors: reading it failed (ParamValidationError)."),
    "a package that is missing": ("list .*law", ImportError("secret-signature"), "faulty://bucket/law: folders of faulty:// need a package that is not installed"),
}  # fmt: skip


@pytest.mark.parametrize("name", LASTING)
def test_lasting_faults_are_told(name: str, store: type[FaultyStore], tmp_path: Path, run: Any) -> None:
    pattern, fault, message = LASTING[name]
    store.faults += [(pattern, fault)] * 50
    result = run("plan", write_away_recipe(tmp_path, PLACES))
    assert result.status == 2 and f"sources.law: {message}" in result.err and "secret" not in result.err, result.err
    assert result.err.count("error:") == 1 and "Traceback" not in result.err


def test_a_source_that_changes(store: type[FaultyStore], tmp_path: Path) -> None:
    plan = plan_file(write_away_recipe(tmp_path, PLACES))

    def progress(count: int) -> None:
        store.etags["/bucket/law/model.safetensors"] = "two"

    with pytest.raises(
        CheckpointError, match=r"sources.law: faulty://bucket/law/model.safetensors changed: found .* etag two, expected .* etag one"
    ):
        publish(plan, None, MergeOptions(workers=1, verify=False, progress=progress))
    assert not (tmp_path / "out").exists()


def test_a_source_that_shrinks(store: type[FaultyStore], tmp_path: Path) -> None:
    plan = plan_file(write_away_recipe(tmp_path, PLACES))
    path = "/bucket/law/model.safetensors"

    def notify(text: str) -> None:
        if "by ranges" in text:
            FaultyStore().pipe_file(path, bytes(20_000))
            store.etags[path] = "two"

    with pytest.raises(CheckpointError, match=r"law/model.safetensors changed: found 20,000 bytes and etag two, expected"):
        publish(plan, None, MergeOptions(workers=1, verify=False, notify=notify))


WRONG = {
    "a typo": ("faulty://bucket/lav", "faulty://bucket/lav: no such folder, or nothing in it; did you mean 'law'?"),
    "the folder above": ("faulty://bucket", "config.json is missing there: give the address of the folder that holds it. There are folders in it: "),
    "a folder of gguf": ("faulty://bucket/gguf", "config.json is missing there: there are GGUF files, which are never merged."),
    "pickles": ("faulty://bucket/pickles", "no weights there; expected model.safetensors or model.safetensors.index.json. Of pytorch_model.bin nothing is read"),
    "an adapter": ("faulty://bucket/adapter", "this is an adapter (adapter_config.json). Write {base: MODEL, adapter: faulty://bucket/adapter} for a source."),
    "a shard that is missing": ("faulty://bucket/sharded", "faulty://bucket/sharded: 1 of 2 files that model.safetensors.index.json names are missing there: b.safetensors."),
    "an index that leads out": ("faulty://bucket/outside", "faulty://bucket/outside/model.safetensors.index.json: weight_map names ../../x, which is no plain file in this folder."),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_places(name: str, store: type[FaultyStore], tmp_path: Path, run: Any) -> None:
    system, config = FaultyStore(), (tmp_path / "models" / "law" / "config.json").read_bytes()
    weights = (tmp_path / "models" / "law" / "model.safetensors").read_bytes()
    system.pipe_file("/bucket/gguf/model.gguf", b"GGUF")
    system.pipe_file("/bucket/adapter/adapter_config.json", b"{}")
    for folder, file in (("pickles", "pytorch_model.bin"), ("sharded", "a.safetensors"), ("outside", "a.safetensors")):
        system.pipe_file(f"/bucket/{folder}/config.json", config)
        system.pipe_file(f"/bucket/{folder}/{file}", weights)
    for folder, other in (("sharded", "b.safetensors"), ("outside", "../../x")):
        index = {"weight_map": {"x": "a.safetensors", "y": other}}
        system.pipe_file(f"/bucket/{folder}/model.safetensors.index.json", json.dumps(index).encode())
    place, message = WRONG[name]
    result = run("plan", write_away_recipe(tmp_path, {**PLACES, "law": place}))
    assert result.status == 2 and message in result.err, result.err
    assert "bam-merge-" not in result.err


def test_adapters(store: type[FaultyStore], tmp_path: Path, run: Any) -> None:
    write_adapter(tmp_path / "models" / "lora", tmp_path / "models" / "seed")
    put("lora", tmp_path / "models" / "lora")
    recipe = tmp_path / "adapted.yaml"
    text = "method: btx\nsources:\n  seed: {0}/seed\n  code: {{base: seed, adapter: {0}/lora}}\noutput: {{path: {1}}}\n"
    recipe.write_text(text.format("faulty://bucket", "out"))
    assert "verified" in merged(run, recipe).out
    recipe.write_text(text.format("models", "here"))
    merged(run, recipe, "--no-verify")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()


def test_8_bit_floats_and_vocabularies_that_differ(tmp_path: Path, run: Any) -> None:
    """What reads tensors by ways of its own, in a merge and in its proof."""
    write_sources(tmp_path / "models", CONFIGS["llama"])
    quantise(tmp_path / "models" / "law", "blocks")
    text = "method: bam\nsources: {{seed: {0}seed, law: {{path: {0}law, dequantise: true}}}}\noutput: {{path: {1}, dtype: bfloat16}}\n"
    recipe = tmp_path / "recipe.yaml"
    for place, output in ((f"file://{tmp_path}/models/", "out"), ("models/", "here")):
        recipe.write_text(text.format(place, output))
        merged(run, recipe, *(() if output == "out" else ("--no-verify",)))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()
    recipe = three(tmp_path / "three")
    merged(run, recipe, "--no-verify")
    away = tmp_path / "away.yaml"
    document = yaml.safe_load(recipe.read_text())
    places = {name: f"file://{tmp_path}/three/{place}" for name, place in document["sources"].items()}
    away.write_text(json.dumps({**document, "sources": places, "output": {"path": "aligned"}}))
    merged(run, away)
    there, here = tmp_path / "aligned", tmp_path / "three" / document["output"]["path"]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (there / name).read_bytes() == (here / name).read_bytes()


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs"), ("abfs", "adlfs")])
def test_packages_that_are_not_installed(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(
        CheckpointError, match=f"{scheme}://bucket/x: folders of {scheme}:// need the package {package}: pip install {package}"
    ):
        resolve(Address(scheme, "bucket/x"))


@pytest.mark.parametrize(
    "command",
    [
        "route X --text t",
        "refresh X",
        "calibrate X --texts a=t",
        "push X me/x",
        "convert X out",
        "extract models/seed#experts.a X",
        "demo X",
    ],
)
def test_what_must_be_here(command: str, run: Any) -> None:
    result = run(*command.replace("X", "s3://me:hunter2@bucket/x").split())
    assert result.status == 2 and "hunter2" not in result.err
    assert "an address (s3://...): this must be a folder of this machine." in result.err


def test_states_of_stores() -> None:
    """Etags as listings and answers have them; a time where there is nothing better."""
    assert stores._found("x", {"size": 3, "ETag": '"abc"', "LastModified": 7}).etag == "abc"
    assert stores._found("x", {"size": 3, "etag": "abc", "generation": "17"}).etag == "17"
    assert stores._found("x", {"size": 3, "mtime": 1.5}).etag == "changed at 1.5"
    assert stores._found("x", {"size": None}).identity.etag == ""
