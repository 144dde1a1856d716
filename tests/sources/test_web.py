"""Models on servers of the web: the same bytes as of folders, by few requests; every fault is tried again, or told in words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, SOURCES, write_sources
from hub_models import LLAMA_70B, large
from hub_server import Content, Fault
from runs import folder_bytes
from web_models import shelf as shelf  # fixtures
from web_models import web as web
from web_models import write_away_recipe
from web_server import FakeWeb

import bam_merge
from bam_merge.checkpoints import afar
from bam_merge.errors import CheckpointError
from bam_merge.planning.make import plan_file
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.publish import publish
from bam_merge.sources import trying

RECIPES = {
    "bam": ("bam", ""),
    "btx": ("btx", ""),
    "shared kv": ("bam", "attention: {kv: shared}\n"),
    "ties": ("merge", "shared: {make: ties, base: seed, density: 0.5}\n"),
    "slerp": ("merge", "rules: [{roles: ['attn.*'], make: slerp, from: [code, law], t: 0.3}]\n"),
}


def places(web: FakeWeb) -> dict[str, str]:
    return {name: f"{web.url}/{name}" for name in SOURCES}


def local(folder: Path) -> dict[str, str]:
    return {name: f"models/{name}" for name in SOURCES}


def merged(run: Any, recipe: Path, *options: str) -> Any:
    result = run("merge", recipe, *options)
    assert result.status == 0, result.err
    return result


# ---- the same bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_is_that_of_the_folders(name: str, shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    method, text = RECIPES[name]
    proof = () if name in ("bam", "ties") else ("--no-verify",)
    result = merged(run, write_away_recipe(tmp_path, places(shelf), method, text), *proof)
    assert ("verified" in result.out) is not bool(
        proof
    ) and "reading the weights of seed, code and law where they are, by ranges" in result.err
    merged(run, write_away_recipe(tmp_path, local(tmp_path), method, text, "here"), "--no-verify")
    found, wanted = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "here")
    for file in ("model.safetensors", "config.json"):
        assert found[file] == wanted[file]
    assert not shelf.asked(r"\.(bin|py)$")
    there, here = (json.loads(both["bam_merge.json"]) for both in (found, wanted))
    assert there["recipe"]["sources"] == places(shelf) and there["tensors"] == here["tensors"]
    for source, record in there["sources"].items():
        etag = shelf.etag(f"{source}/model.safetensors")
        file = dict(record["files"]["model.safetensors"])
        assert file.pop("etag") == etag and file == here["sources"][source]["files"]["model.safetensors"]


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "qwen3", "gemma2"])
def test_families(family: str, web: FakeWeb, tmp_path: Path, run: Any) -> None:
    """Fused and interleaved tensors, tied heads, norms of their own."""
    write_sources(tmp_path / "models", CONFIGS[family])
    for name in SOURCES:
        web.put(name, tmp_path / "models" / name)
    merged(run, write_away_recipe(tmp_path, places(web)), *(() if family == "gpt_neox" else ("--no-verify",)))
    merged(run, write_away_recipe(tmp_path, local(tmp_path), output="here"), "--no-verify")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()


def test_blocks_of_every_size(shelf: FakeWeb, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs over the edges of blocks, blocks that are let go and asked for again."""
    merged(run, write_away_recipe(tmp_path, local(tmp_path), output="here"), "--no-verify")
    wanted = (tmp_path / "here" / "model.safetensors").read_bytes()
    for block, held in ((1000, 3000), (333, 400), (10**6, 10**7)):
        monkeypatch.setattr(afar, "BLOCK", block)
        monkeypatch.setattr(afar, "HELD", held)
        monkeypatch.setattr(afar, "GAP", 7)
        merged(run, write_away_recipe(tmp_path, places(shelf)), "--force", "--workers", "2", "--no-verify")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted


def test_diff_inspect_and_extract(shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    assert run("diff", f"{shelf.url}/seed", tmp_path / "models" / "seed").status == 0
    assert run("diff", f"{shelf.url}/seed", f"{shelf.url}/law/").status == 1
    assert run("diff", "--seed", f"{shelf.url}/seed", f"{shelf.url}/law", f"{shelf.url}/code").status in (0, 1)
    found = json.loads(run("inspect", f"{shelf.url}/seed", "--json", "--stats").out)
    here = json.loads(run("inspect", tmp_path / "models" / "seed", "--json", "--stats").out)
    assert {**found, "path": ""} == {**here, "path": ""} and found["path"] == f"{shelf.url}/seed"
    merged(run, write_away_recipe(tmp_path, local(tmp_path), "btx", "ffn: {top_k: 2}"), "--no-verify")
    shelf.put("mix", tmp_path / "out")
    result = run("extract", f"{shelf.url}/mix#experts.code", tmp_path / "code")
    assert result.status == 0 and "verified" in result.out, result.err
    run("extract", f"{tmp_path / 'out'}#experts.code", tmp_path / "same")
    assert (tmp_path / "code" / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()
    refused = run("verify", f"{shelf.url}/mix")
    assert refused.status == 2 and f"{shelf.url}/mix: read as a whole, so it must be a folder here." in refused.err


# ---- how little is asked for -------------------------------------------------------------------------------------------------


def test_a_plan_of_a_large_model_costs_kilobytes(web: FakeWeb, tmp_path: Path, run: Any) -> None:
    """Two models of 141 GB, of which little but headers is anywhere."""
    files = large(LLAMA_70B, 30)
    for name in ("seed", "code"):
        for file, item in files.items():
            web.files[f"{name}/{file}"] = item if isinstance(item, Content) else Content(item)
    recipe = write_away_recipe(tmp_path, {name: f"{web.url}/{name}" for name in ("seed", "code")})
    plan = plan_file(recipe)
    shards = [request for request in web.requests if re.search(r"safetensors$", request.path)]
    assert web.sent() < 2_500_000 and len(shards) <= 2 * 2 * 30
    assert plan.bytes_read > 141e9 and plan.peak_memory(8) - plan.peak_memory(7) > afar.HELD
    web.answered.clear()
    found = json.loads(run("inspect", f"{web.url}/seed", "--json").out)
    assert found["parameters"]["total"] == 70_553_706_496 and web.sent() < 1_200_000
    document = json.loads(run("plan", recipe, "--json").out)
    assert document["elsewhere"]["seed"]["address"] == f"{web.url}/seed" and document["elsewhere"]["code"]["bytes"] > 141e9


def test_requests_of_a_merge_are_few_and_large(web: FakeWeb, tmp_path: Path, run: Any) -> None:
    write_sources(tmp_path / "models", {**CONFIGS["llama"], "hidden_size": 64, "intermediate_size": 512, "vocab_size": 4096})
    for name in SOURCES:
        web.put(name, tmp_path / "models" / name)
    plan = plan_file(write_away_recipe(tmp_path, places(web)))
    web.answered.clear()
    publish(plan, None, MergeOptions(workers=1, verify=False))
    spans = [request.span for request in web.asked("model.safetensors") if request.span and not request.span.startswith("bytes=0-")]
    assert web.sent("model.safetensors") < 2.2 * plan.bytes_read and len(spans) < 4 * sum(
        len(m.checkpoint.tensors) for m in plan.models.values()
    )


# ---- faults ------------------------------------------------------------------------------------------------------------------

PASSING = {
    "busy": Fault("safetensors", 2, status=429, headers={"retry-after": "1"}),
    "down": Fault("safetensors", 3, status=503),
    "cut": Fault("safetensors", 2, cut=500),
    "reset": Fault("safetensors", 2, cut=500, reset=True),
    "a config cut": Fault("config.json", 1, cut=10),
}


@pytest.mark.parametrize("name", PASSING)
def test_passing_faults_are_tried_again(name: str, shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    fault = PASSING[name]
    shelf.faults.append(Fault(**vars(fault)))
    merged(run, write_away_recipe(tmp_path, local(tmp_path), output="here"), "--no-verify")
    result = merged(run, write_away_recipe(tmp_path, places(shelf)), "--no-verify")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()
    assert not shelf.faults[0].times
    assert name != "busy" or "the server asks to wait 1 seconds." in result.err


LASTING = {
    "busy": (Fault("law/model.safetensors$", status=429, headers={"retry-after": "9999"}), "URL/law/model.safetensors: too many requests from here (429), and it asks to wait 9999 seconds. Run again later."),
    "down": (Fault("law/model.safetensors$", status=500), "URL/law/model.safetensors: the server has a fault of its own (it answers 500)."),
    "cut": (Fault("law/model.safetensors$", cut=50), "URL/law/model.safetensors: the connection broke off"),
    "shorter than it says": (Fault("law/model.safetensors$", length=100), "URL/law/model.safetensors: "),
    "whole files": (Fault("law/model.safetensors$", whole=True), "URL/law/model.safetensors: the server sends whole files where a range of bytes is asked for, so that it cannot be read here. Copy the folder to this machine"),
    "forbidden": (Fault("law/", status=403), "URL/law/config.json: access is refused (it answers 403): there are no keys for it here, or they have expired, or may not read it. Set user and password of this server in ~/.netrc."),
    "not known": (Fault("law/", status=401), "URL/law/config.json: access is refused (it answers 401)"),
    "gone": (Fault("law/", status=404), "URL/law: config.json is missing there: give the address of the folder that holds it."),
    "an odd answer": (Fault("law/", status=418), "URL/law/config.json: the server refuses the request (it answers 418)."),
    "no weights": (Fault("law/model.safetensors$", status=404), "URL/law: no weights there; expected model.safetensors or model.safetensors.index.json."),
    "compressed": (Fault("law/model.safetensors$", headers={"content-encoding": "gzip"}), "URL/law/model.safetensors: the server sends it compressed"),
    "a page": (Fault("a^"), "URL/law/config.json: this is an HTML or XML page, probably a failed download"),
}  # fmt: skip


@pytest.mark.parametrize("name", LASTING)
def test_lasting_faults_are_told(name: str, shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    fault, message = LASTING[name]
    shelf.faults.append(Fault(**vars(fault)))
    if name == "a page":
        shelf.files["law/config.json"] = Content(b"<html>sign in</html>")
    result = run("plan", write_away_recipe(tmp_path, places(shelf)))
    assert result.status == 2 and f"sources.law: {message.replace('URL', shelf.url)}" in result.err, result.err
    assert "secret" not in result.err and "Traceback" not in result.err and not (tmp_path / "out").exists()


LATER = {
    "whole files": (Fault("law/model.safetensors$", whole=True), "the server sends whole files where a range of bytes is asked for"),
    "other bytes than asked for": (
        Fault("law/model.safetensors$", status=206, headers={"content-range": "bytes 7-9/10"}),
        "URL/law/model.safetensors",
    ),
    "cut for ever": (Fault("law/model.safetensors$", cut=50), "the connection broke off"),
    "expired": (Fault("law/model.safetensors$", status=403), "access is refused (it answers 403)"),
    "deleted": (Fault("law/model.safetensors$", status=404), "URL/law/model.safetensors: there is no such file."),
}


@pytest.mark.parametrize("name", LATER)
def test_faults_in_the_middle_of_a_merge(name: str, shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    """After the plan: nothing appears, what is done is kept, and --resume goes on when the fault is gone."""
    fault, message = LATER[name]
    recipe = write_away_recipe(tmp_path, places(shelf), output="out")
    plan = plan_file(recipe)
    seen = []

    def progress(count: int) -> None:
        seen.append(count)
        if len(seen) == 10:
            shelf.faults.append(Fault(**vars(fault)))

    with pytest.raises(CheckpointError) as caught:
        publish(plan, None, MergeOptions(workers=1, progress=progress, verify=False))
    problem = caught.value.problems[0]
    assert problem.startswith("sources.law: ") and message.replace("URL", shelf.url) in problem, problem
    assert not (tmp_path / "out").exists()
    shelf.faults.clear()
    merged(run, recipe, "--resume", "--no-verify")
    merged(run, write_away_recipe(tmp_path, local(tmp_path), output="here"), "--no-verify")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "here" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["etag", "content", "size", "weak", "dated"])
def test_a_source_that_changes_is_an_error(how: str, shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    """Between the plan and the merge, and at its end: which file, what was found and what expected."""
    path = "law/model.safetensors"
    shelf.etags[path] = {"weak": 'W/"one"', "dated": None}.get(how, '"one"')
    recipe = write_away_recipe(tmp_path, places(shelf))
    plan = bam_merge.make_plan(bam_merge.load_recipe(recipe))

    def change() -> None:
        data = shelf.files[path].data
        if how in ("content", "etag", "weak"):
            shelf.files[path] = Content(data[:-1] + b"x") if how == "content" else shelf.files[path]
            shelf.etags[path] = 'W/"two"' if how == "weak" else '"two"'
        else:
            shelf.files[path] = Content(data + bytes(8))

    def early(text: str) -> None:
        if "by ranges" in text:
            change()

    with pytest.raises(CheckpointError) as caught:
        publish(plan, None, MergeOptions(workers=1, verify=False, notify=early))
    problem = caught.value.problems[0]
    size = f"{shelf.files[path].length:,} bytes"
    assert problem.startswith(f"sources.law: {shelf.url}/{path} changed: found {size}"), problem
    assert "expected 74," in problem and (how == "dated" or (("two" in problem or how == "size") and "one" in problem))
    assert not (tmp_path / "out").exists()
    if how in ("etag", "content"):  # and the unfinished run is not gone on with
        merged(run, recipe, "--resume", "--no-verify")


def test_a_source_that_changes_after_it_was_read(shelf: FakeWeb, tmp_path: Path) -> None:
    plan = plan_file(write_away_recipe(tmp_path, places(shelf)))
    total, written = sum(step.nbytes for step in plan.steps), 0

    def progress(count: int) -> None:
        nonlocal written
        written += count
        if written == total:
            shelf.etags["seed/model.safetensors"] = '"another"'

    with pytest.raises(CheckpointError, match=r'seed/model.safetensors changed: found .* etag "another", expected'):
        publish(plan, None, MergeOptions(workers=1, verify=False, progress=progress))
    assert not (tmp_path / "out").exists()


# ---- what was made stays true ------------------------------------------------------------------------------------------------


def test_verify_afterwards(shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    """From the manifest: as merged; of a source that changed; and without the sources."""
    merged(run, write_away_recipe(tmp_path, places(shelf)), "--no-verify")
    (tmp_path / "away").mkdir()
    moved = (tmp_path / "out").rename(tmp_path / "away" / "out")
    report = json.loads(run("verify", moved, "--json").out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] and checks["sources"]["ok"] and checks["copies"]["ok"] and checks["merges"]["ok"]
    data = shelf.files["law/model.safetensors"].data
    shelf.files["law/model.safetensors"] = Content(data[:-4] + b"\0\0\0\0")
    report = json.loads(run("verify", moved, "--json").out)
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["sources"]["ok"] is not True or not report["ok"]
    shelf.files["law/model.safetensors"] = Content(data)
    shelf.faults.append(Fault("law/", status=403))
    report = json.loads(run("verify", moved, "--json").out)
    checks = {check["name"]: check for check in report["checks"]}
    assert (
        report["ok"]
        and checks["sources"]["ok"] is None
        and f"{shelf.url}/law/config.json: access is refused" in checks["sources"]["detail"]
    )


def test_parts(shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    """Processes that share nothing but the address make the same plan of it."""
    text = "# parts"
    recipe = write_away_recipe(tmp_path, places(shelf), text=text)
    recipe.write_text(recipe.read_text().replace("path: out}", "path: out, max_shard_size: 60kB}"))
    for number in (2, 1, 3):
        assert run("merge", recipe, "--part", f"{number}/3").status == 0
    result = run("finish", recipe, "--no-verify")
    assert result.status == 0, result.err
    run("merge", recipe, "--output", tmp_path / "one", "--no-verify")
    assert {k: v for k, v in folder_bytes(tmp_path / "one").items() if k.endswith("safetensors")} == {
        k: v for k, v in folder_bytes(tmp_path / "out").items() if k.endswith("safetensors")
    }


def test_a_part_of_another_state_is_refused(shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    recipe = write_away_recipe(tmp_path, places(shelf))
    recipe.write_text(recipe.read_text().replace("path: out}", "path: out, max_shard_size: 60kB}"))
    assert run("merge", recipe, "--part", "1/3").status == 0
    shelf.etags["law/model.safetensors"] = '"another"'
    result = run("merge", recipe, "--part", "2/3")
    assert result.status == 2 and "sources.law: model.safetensors was changed at another time" in result.err


def test_nothing_to_do_when_it_is_finished(shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    recipe = write_away_recipe(tmp_path, places(shelf))
    merged(run, recipe, "--no-verify")
    assert "already finished, from the same recipe" in merged(run, recipe, "--resume").err
    shelf.etags["law/model.safetensors"] = '"another"'
    assert "already exists" in run("merge", recipe, "--resume").err


# ---- keys --------------------------------------------------------------------------------------------------------------------


def test_keys_of_the_server_go_to_it_alone(shelf: FakeWeb, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ~/.netrc; not where it leads elsewhere, and into no record, card, journal or message."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HF_TOKEN", "hf_planted")  # which is the hub's, and goes to nobody else
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    shelf.elsewhere = "model.safetensors$"
    result = merged(run, write_away_recipe(tmp_path, places(shelf)))
    assert {request.token for request in shelf.requests if not request.store} == {"Basic bWU6aHVudGVyMg=="}
    assert {request.token for request in shelf.requests if request.store} == {None}
    text = result.err + result.out + "".join(path.read_bytes().decode(errors="replace") for path in (tmp_path / "out").iterdir())
    assert not [word for word in ("hf_planted", "hunter2", "bWU6", "secret-signature") if word in text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://me:hunter2@example.org/x", "an address of the web with a user or a password in it"),
        ("https://example.org/x?sig=hunter2", "an address with a query or a fragment, which may be a signature"),
        ("s3://key:hunter2@bucket/x", "an address of s3:// with a password in it"),
        ("s3://bucket/x?X-Amz-Signature=hunter2", "an address with a query or a fragment"),
        ("https://example.org/model.gguf", "Download the model and give its folder"),
        ("s3://bucket/model.gguf", "a GGUF file, which is never merged"),
        ("s3://bucket/model.safetensors", "the address of a file. Give that of the folder"),
        ("zip://x::s3://bucket/x.zip", "no address of a folder"),
        ("s3://", "s3://: no address of a folder. Write s3://PLACE/FOLDER."),
        ("memry://bucket/x", "memry://bucket/x: nothing is known of such addresses; did you mean 'memory'?"),
    ],
)
def test_addresses_that_are_none(text: str, message: str, tmp_path: Path, run: Any) -> None:
    for result in (run("inspect", text), run("plan", write_away_recipe(tmp_path, {"seed": text, "code": "code"}))):
        assert result.status == 2 and message in result.err and "hunter2" not in result.err + result.out, result.err


def test_output_elsewhere_is_refused(shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    result = run("plan", write_away_recipe(tmp_path, places(shelf), output="s3out").rename(tmp_path / "r.yaml"))
    assert result.status == 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe.read_text().replace("path: s3out", "path: s3://bucket/out"))
    result = run("plan", recipe)
    assert result.status == 2 and "output.path: found 's3://bucket/out': results are written into folders of this machine." in result.err


def test_what_cannot_be_seen_is_said(shelf: FakeWeb, tmp_path: Path, run: Any) -> None:
    """Stores that may not be listed say 403 of what is not there; files may have no etag."""
    shelf.forbidden = r"(tokenizer|vocab|merges|chat_template|README|LICENSE|added_|special_|generation_|bam_merge|tekken|tiktoken|index)"
    shelf.etags |= {f"{name}/{file}": None for name in SOURCES for file in ("config.json", "model.safetensors")}
    result = merged(run, write_away_recipe(tmp_path, places(shelf)), "--no-verify")
    assert "is refused (403), so that they are taken not to be there" in result.err
    assert "gives its files neither etag nor version nor time of change" in result.err


def test_the_wait_that_a_server_asks_for() -> None:
    assert trying.wait_of({"retry-after": "7"}) == 7 and trying.wait_of({}) is None
    assert trying.wait_of({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 1 and trying.wait_of({"retry-after": "soon"}) is None
