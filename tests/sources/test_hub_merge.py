"""Merges of models of the hub: the same bytes as of folders, a record that a rerun can go by, and the cache of huggingface_hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from adapter_files import write_adapter
from conftest import CONFIGS, SOURCES, write_recipe, write_sources
from hub_models import acme as acme  # a fixture
from hub_models import hub as hub
from hub_models import write_hub_recipe
from hub_server import Content, FakeHub, Fault
from runs import folder_bytes
from test_hub import commits

import bam_merge
from bam_merge.demo.synthetic import random_values, write_checkpoint
from bam_merge.sources.companions import read_companion
from bam_merge.sources.hub import cache as hub_cache
from bam_merge.sources.hub import download as hub_download
from bam_merge.sources.hub import headers as hub_headers


def merged(run: Any, recipe: Path, *options: str) -> Any:
    result = run("merge", recipe, *options)
    assert result.status == 0, result.err
    return result


def test_a_merge_is_that_of_the_folders(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    result = merged(run, write_hub_recipe(tmp_path, "{seed: acme/seed, code: hf://acme/code, law: {path: acme/law@main}}"))
    assert "downloading 223 kB from http://127.0.0.1:" in result.err and "verified" in result.out
    merged(run, write_recipe(tmp_path / "models"))
    found, wanted = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "models" / "out")
    for name in ("model.safetensors", "config.json"):
        assert found[name] == wanted[name]
    recorded = json.loads(found["bam_merge.json"])
    places = {name: f"acme/{name}@{commit}" for name, commit in commits(acme).items()}
    assert recorded["recipe"]["sources"] == places
    assert {name: source["path"] for name, source in recorded["sources"].items()} == places
    assert acme.url not in found["bam_merge.json"].decode() and str(tmp_path) not in found["bam_merge.json"].decode()
    assert not acme.asked(r"\.(bin|py)") and not [request for request in acme.requests if request.method != "GET"]


def test_python(acme: FakeHub, tmp_path: Path) -> None:
    out = bam_merge.merge(bam_merge.load_recipe(write_hub_recipe(tmp_path)))
    assert bam_merge.verify(out).ok and bam_merge.diff("acme/seed", tmp_path / "models" / "seed").equal
    plan = bam_merge.make_plan(bam_merge.load_recipe(write_hub_recipe(tmp_path, output="other")))
    assert not plan.remotes and plan.recipe.resolved()["sources"] == {n: f"acme/{n}@{c}" for n, c in commits(acme).items()}


def test_verify_downloads_what_the_manifest_names(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the branch has moved, from an empty cache; and from the cache without any hub."""
    merged(run, write_hub_recipe(tmp_path))
    before = commits(acme)
    write_sources(tmp_path / "new", {**CONFIGS["llama"], "rms_norm_eps": 1e-3})
    for name in SOURCES:
        acme.add(f"acme/{name}", tmp_path / "new" / name)
    shutil.rmtree(tmp_path / "cache")
    report = json.loads(run("verify", tmp_path / "out", "--json").out)
    assert report["ok"] and {"name": "sources", "ok": True}.items() <= next(c for c in report["checks"] if c["name"] == "sources").items()
    assert {path.name for path in (tmp_path / "cache" / "hub" / "models--acme--seed" / "snapshots").iterdir()} == {before["seed"]}
    acme.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_cache._LISTINGS.clear()
    report = json.loads(run("verify", tmp_path / "out", "--json").out)
    assert report["ok"] and not acme.requests and "model" not in [check["name"] for check in report["checks"] if check["ok"] is None]


def test_verify_without_hub_and_cache_says_so(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(run, write_hub_recipe(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_cache._LISTINGS.clear()
    report = json.loads(run("verify", tmp_path / "out", "--json").out)
    sources = next(check for check in report["checks"] if check["name"] == "sources")
    assert sources["ok"] is None and "not at hand" in sources["detail"] and "HF_HUB_OFFLINE" in sources["detail"]


def test_a_folder_of_a_manifest_is_never_asked_of_the_hub(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """A manifest that names the folder acme/seed, which is gone, does not mean the model of that name."""
    shutil.copytree(tmp_path / "models", tmp_path / "acme")
    recipe = write_hub_recipe(tmp_path)
    merged(run, recipe)
    assert not acme.requests
    assert (
        "note         sources.seed, sources.code and sources.law are folders; a model of the hub would be hf://acme/seed."
        in run("plan", recipe).out
    )
    shutil.rmtree(tmp_path / "acme")
    report = json.loads(run("verify", tmp_path / "out", "--json").out)
    sources = next(check for check in report["checks"] if check["name"] == "sources")
    assert sources["ok"] is None and "no such folder" in sources["detail"] and not acme.requests


def test_offline(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what is in the cache, whole models only; what is not there is named."""
    recipe = write_hub_recipe(tmp_path)
    run("plan", recipe)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_cache._LISTINGS.clear()
    result = run("plan", recipe)
    assert result.status == 2 and result.err.count(") lacks the weights of it, and the Hugging Face hub is not asked") == 3
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    merged(run, recipe)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_cache._LISTINGS.clear()
    acme.requests.clear()
    result = run("plan", recipe)
    assert result.status == 0 and "as it is in the cache: the Hugging Face hub is not asked, for HF_HUB_OFFLINE is set." in result.out
    merged(run, recipe, "--output", str(tmp_path / "again"))
    assert folder_bytes(tmp_path / "again")["model.safetensors"] == folder_bytes(tmp_path / "out")["model.safetensors"]
    assert not acme.requests


def test_no_network_is_as_offline(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_hub_recipe(tmp_path)
    merged(run, recipe)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    result = run("plan", recipe)
    assert result.status == 0 and result.out.count("http://127.0.0.1:9 could not be reached.") == 3


def test_the_library_finds_what_was_downloaded(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """huggingface_hub's own functions read our cache, and we read one that they filled."""
    run("inspect", "acme/seed", "--stats")
    names = ["config.json", "model.safetensors"]
    folder = huggingface_hub.snapshot_download("acme/seed", local_files_only=True, allow_patterns=names)
    assert sorted(os.listdir(folder)) == names
    assert huggingface_hub.try_to_load_from_cache("acme/seed", "model.safetensors") == f"{folder}/model.safetensors"
    wanted = folder_bytes(tmp_path / "models" / "seed")
    assert {name: (Path(folder) / name).read_bytes() for name in names} == {name: wanted[name] for name in names}
    info = huggingface_hub.scan_cache_dir()
    assert [(repo.repo_id, repo.nb_files) for repo in info.repos] == [("acme/seed", 2)] and not info.warnings
    huggingface_hub.snapshot_download("acme/code", allow_patterns=names)
    acme.requests.clear()
    assert run("inspect", "acme/code", "--stats").status == 0 and not acme.asked("resolve")


# ---- cut and resumed -------------------------------------------------------------------------------------------------------


def seed_only(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("method: sparse_upcycling\nsources: {seed: acme/seed}\nexperts: [seed, seed]\noutput: {path: out}\n")
    return path


@pytest.mark.parametrize("reset", [False, True])
def test_a_download_that_is_cut_goes_on(acme: FakeHub, tmp_path: Path, run: Any, reset: bool) -> None:
    """Every 20 kB the connection breaks: each request goes on where the one before ended."""
    acme.faults.append(Fault(r"\?X-Signature", cut=20_000, reset=reset))
    recipe = seed_only(tmp_path)
    result = run("merge", recipe)
    assert result.status == 0, result.err
    starts = [int(request.span[6:-1]) for request in acme.requests if request.store and request.span and request.span.endswith("-")]
    assert starts == sorted(set(starts)) and len(starts) >= 3
    if not reset:  # of a connection that is reset, less may have come than was sent
        assert starts == [20_000, 40_000, 60_000]


def test_a_download_that_failed_goes_on_in_the_next_run(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    recipe = seed_only(tmp_path)
    acme.faults += [Fault(r"\?X-Signature", times=1), Fault(r"\?X-Signature", times=1, cut=30_000), Fault(r"\?X-Signature", status=503)]
    result = run("merge", recipe)
    assert (
        result.status == 2
        and "the hub has a fault of its own (it answers 503). Run again later; what was downloaded is kept." in result.err
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    blobs = tmp_path / "cache" / "hub" / "models--acme--seed" / "blobs"
    assert [path.stat().st_size for path in blobs.glob("*.incomplete")] == [30_000]
    acme.faults.clear()
    acme.requests.clear()
    assert run("plan", recipe).out.count("44.4 kB of 74.8 kB to download") == 1
    assert run("merge", recipe).status == 0
    assert [request.span for request in acme.requests if request.store][-1] == "bytes=30000-"
    assert not list(blobs.glob("*.incomplete"))


def test_a_merge_that_is_killed_while_it_downloads(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    acme.faults += [Fault(r"\?X-Signature", times=1), Fault(r"\?X-Signature", times=1, cut=20_000), Fault(r"\?X-Signature", pause=3)]
    process = subprocess.Popen([sys.executable, "-m", "bam_merge", "merge", str(seed_only(tmp_path))], stderr=subprocess.DEVNULL)
    blobs = tmp_path / "cache" / "hub" / "models--acme--seed" / "blobs"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size == 20_000 for path in blobs.glob("*.incomplete")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    acme.faults.clear()
    acme.requests.clear()
    assert run("merge", tmp_path / "recipe.yaml", "--resume").status == 0
    assert [request.span for request in acme.requests if request.store][-1] == "bytes=20000-"


def test_resume_takes_the_commits_of_the_unfinished_run(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch moved since: a run that resumes goes on with what it began with, and a new one takes what is there now."""
    import runs

    recipe = bam_merge.load_recipe(write_hub_recipe(tmp_path))
    before = commits(acme)
    with pytest.raises(runs.Stop):
        bam_merge.merge(recipe, options=bam_merge.MergeOptions(workers=1, progress=runs.stop_after(20), verify=False))
    write_sources(tmp_path / "new", CONFIGS["llama"], dtype="F16")
    for name in SOURCES:
        acme.add(f"acme/{name}", tmp_path / "new" / name)
    result = merged(run, tmp_path / "recipe.yaml", "--resume")
    assert "resuming: " in result.err and f"acme/seed is taken as the unfinished run took it: acme/seed@{before['seed']}." in result.err
    assert json.loads((tmp_path / "out" / "bam_merge.json").read_text())["sources"]["law"]["path"] == f"acme/law@{before['law']}"
    merged(run, tmp_path / "recipe.yaml", "--force")
    assert json.loads((tmp_path / "out" / "bam_merge.json").read_text())["sources"]["law"]["path"] == f"acme/law@{commits(acme)['law']}"


def test_a_branch_that_moves_between_plan_and_download(acme: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was planned is what is downloaded."""
    plan = bam_merge.make_plan(bam_merge.load_recipe(write_hub_recipe(tmp_path)))
    before = commits(acme)
    write_sources(tmp_path / "new", CONFIGS["llama_biased"])
    for name in SOURCES:
        acme.add(f"acme/{name}", tmp_path / "new" / name)
    from bam_merge.publishing.publish import publish

    out = publish(plan, None, bam_merge.MergeOptions())
    assert json.loads((out / "bam_merge.json").read_text())["sources"]["seed"]["path"] == f"acme/seed@{before['seed']}"


# ---- what else a merge needs -------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    monkeypatch.setattr("bam_merge.publishing.destination.SMALL_FILES", 0)
    result = run("merge", write_hub_recipe(tmp_path))
    assert result.status == 2
    assert (
        "400 kB free, the download takes 223 kB, and the output on the same disk 190 kB. Free some space, or set HF_HUB_CACHE" in result.err
    )
    assert not [request for request in acme.requests if request.store and request.span != "bytes=0-16383"]


def test_a_place_that_cannot_be_written_is_told_before_the_download(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    (tmp_path / "out").mkdir()
    result = run("merge", write_hub_recipe(tmp_path))
    assert result.status == 2 and "already exists" in result.err
    assert not [request for request in acme.requests if request.store and request.span != "bytes=0-16383"]


def test_tied_heads_are_compared_at_the_merge(hub: FakeHub, tmp_path: Path, run: Any) -> None:
    """A stored head beside tied embeddings: the plan says that it was not read; the merge reads it, and refuses one that differs."""
    for name, seed in (("seed", 7), ("code", 8)):
        folder = tmp_path / "models" / name
        write_checkpoint(folder, {**CONFIGS["llama"], "tie_word_embeddings": False}, random_values(seed), "F32")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        hub.add(f"acme/{name}", folder)
    recipe = write_hub_recipe(tmp_path, "{seed: acme/seed, code: acme/code}")
    shown = run("plan", recipe)
    assert shown.status == 0
    assert (
        "sources.seed: lm_head.weight is stored beside tied embeddings, and taken to equal them, for headers alone were read." in shown.out
    )
    result = run("merge", recipe)
    assert result.status == 2 and "lm_head.weight, which differs from model.embed_tokens.weight" in result.err
    assert not (tmp_path / "out").exists()


def test_files_in_chunks_come_by_the_library(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf_xet, in whose place stands one that reads the file; what comes is compared with the digest that the hub lists."""
    weights = (tmp_path / "models" / "seed" / "model.safetensors").read_bytes()
    acme.add("acme/seed", tmp_path / "models" / "seed", **{"model.safetensors": Content(weights, xet=True)})
    came: list[bytes] = [weights[:-1] + b"?", weights]

    def xet_get(*, incomplete_path: Path, tqdm_class: Any, **_: Any) -> None:
        with tqdm_class(total=len(weights)) as bar:
            incomplete_path.write_bytes(came.pop(0))
            bar.update(len(weights))
            bar.set_postfix_str("fast")

    monkeypatch.setattr("huggingface_hub.file_download.xet_get", xet_get)
    result = run("inspect", "acme/seed", "--stats")
    assert result.status == 2 and "model.safetensors: what was downloaded is not what the hub lists (another digest)" in result.err
    assert not list((tmp_path / "cache" / "hub").rglob("model.safetensors"))
    assert run("inspect", "acme/seed", "--stats").status == 0 and not came
    huggingface_hub.close_session()


def test_the_shared_store_of_the_cache(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """huggingface_hub 2.4 keeps files in chunks once for all models: a blob is then a link into hub/blobs/XX/DIGEST."""
    (tmp_path / "models" / "seed" / "generation_config.json").write_text('{"do_sample": true}')
    acme.add("acme/seed", tmp_path / "models" / "seed")
    merged(run, write_hub_recipe(tmp_path))
    cache = tmp_path / "cache" / "hub"
    for blob in list((cache / "models--acme--seed" / "blobs").iterdir()):
        store = cache / "blobs" / blob.name[:2] / blob.name.ljust(64, "0")
        store.parent.mkdir(parents=True, exist_ok=True)
        blob.rename(store)
        blob.symlink_to(os.path.relpath(store, blob.parent))
    merged(run, tmp_path / "recipe.yaml", "--force")
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"do_sample": true}'
    assert json.loads(run("verify", tmp_path / "out", "--json").out)["ok"]
    folder = next((cache / "models--acme--seed" / "snapshots").iterdir())
    assert read_companion(folder / "generation_config.json") == b'{"do_sample": true}'
    for outside in (cache / "blobs" / "ab" / "plain", cache / "blobs" / "ab" / ("c" * 64), cache / "models--x--y" / ("a" * 64)):
        outside.parent.mkdir(parents=True, exist_ok=True)
        outside.write_text("{}")
        (folder / "chat_template.json").unlink(missing_ok=True)
        (folder / "chat_template.json").symlink_to(outside)
        with pytest.raises(bam_merge.CheckpointError, match="leads out of the model's folder"):
            read_companion(folder / "chat_template.json")


def test_a_cache_without_links(acme: FakeHub, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS", True)
    merged(run, write_hub_recipe(tmp_path))
    found = sorted((tmp_path / "cache" / "hub" / "models--acme--seed" / "snapshots").rglob("*.*"))
    assert [path.name for path in found] == ["config.json", "model.safetensors"] and not any(path.is_symlink() for path in found)
    acme.requests.clear()
    assert run("plan", tmp_path / "recipe.yaml").out.count("in the cache") == 3 and not acme.asked("resolve")


def test_two_at_once(acme: FakeHub, tmp_path: Path) -> None:
    """Two processes download the same models: each file comes once, or goes on from what the other left."""
    acme.faults.append(Fault(r"\?X-Signature", pause=0.2))
    command = [sys.executable, "-m", "bam_merge", "inspect", "acme/seed", "--stats", "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and acme.sent(r"\?X-Signature") == 74_416


def test_what_the_output_does_not_get_is_said(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    more = {"tokenizer.model.v3": b"x", "additional_chat_templates/tool.jinja": b""}
    acme.add("acme/seed", tmp_path / "models" / "seed", **more)  # type: ignore[arg-type]
    recipe = write_hub_recipe(tmp_path)
    notes = json.loads(run("plan", recipe, "--json").out)["notes"]
    assert "sources.seed: additional_chat_templates/ is not copied: the output has the default chat template alone." in notes
    assert any(note.startswith("sources.seed: tokenizer.model.v3 not copied, and not compared") for note in notes)
    result = merged(run, recipe)
    assert all(result.err.count(note) == 1 for note in notes)


# ---- what was merged, on the hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def published(acme: FakeHub, tmp_path: Path, run: Any) -> FakeHub:
    """The hub with acme/mix, a merge of its models."""
    merged(run, write_hub_recipe(tmp_path))
    acme.add("acme/mix", tmp_path / "out", **{".gitattributes": b"*.safetensors filter=lfs"})  # type: ignore[arg-type]
    return acme


def test_verify_of_the_hub(published: FakeHub, run: Any) -> None:
    """All but the card and the code, which are not downloaded and said not to be compared."""
    report = json.loads(run("verify", "acme/mix", "--json").out)
    checks = {check["name"]: check["ok"] for check in report["checks"]}
    assert report["ok"] and checks["digests"] and checks["copies"] and checks["identity"] and checks["provenance"]
    assert [name for name, ok in checks.items() if ok is None] == ["not downloaded", "other files", "code", "card"]
    assert not published.asked(r"acme/mix/resolve/.*\.(py|md)$")


def test_verify_of_the_hub_finds_what_is_not_of_the_merge(published: FakeHub, tmp_path: Path, run: Any) -> None:
    published.add("acme/mix", tmp_path / "out", **{"evil.py": b"raise SystemExit", "custom_generate/generate.py": b""})  # type: ignore[arg-type]
    report = json.loads(run("verify", "acme/mix", "--json").out)
    files = next(check for check in report["checks"] if check["name"] == "files")
    assert not report["ok"] and "evil.py: not of this merge: remove it (code, which a loader may run)" in files["detail"]
    assert "custom_generate/: not of this merge" in files["detail"]


def test_inspect_and_diff_of_a_mixture_on_the_hub(published: FakeHub, tmp_path: Path, run: Any) -> None:
    found = json.loads(run("inspect", "acme/mix", "--json").out)
    assert found["experts"]["names"] == list(SOURCES) and any(tensor["expression"] for tensor in found["tensors"])
    result = run("diff", "acme/mix#code", "acme/code", "--json", "--only", "attn.*", "--only", "ffn.*")
    assert json.loads(result.out)["verdicts"] == {"identical": 14}, result.out
    drift = run("diff", "--seed", "acme/seed", "acme/code", tmp_path / "models" / "law")
    assert drift.status in (0, 1) and "code" in drift.out


def test_a_large_manifest_is_read_where_it_is_needed(published: FakeHub, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_headers, "MOST_SMALL", 1000)
    found = json.loads(run("inspect", "acme/mix", "--json").out)
    assert any("bam_merge.json was not read, for it is large" in finding for finding in found["findings"])
    assert not published.asked("acme/mix/resolve/.*bam_merge.json")
    result = run("inspect", "acme/mix", "--where", "code:model.layers.1.self_attn.q_proj.weight")
    assert result.status == 0 and "model.layers.1.self_attn.experts.1.q_proj.weight" in result.out
    weights = published.asked("acme/mix/resolve/.*safetensors")
    assert {request.span for request in weights} == {"bytes=0-16383"}
    assert "acme/seed has no bam_merge.json" in run("inspect", "acme/seed", "--where", "x:*").err


def test_verify_of_a_model_that_is_no_merge(acme: FakeHub, run: Any) -> None:
    result = run("verify", "acme/seed")
    assert result.status == 2 and "no bam_merge.json on the hub, so this is not what bam-merge wrote." in result.err
    assert acme.sent(r"\?X-Signature") == 0


# ---- adapters --------------------------------------------------------------------------------------------------------------


def test_adapters_and_bases_of_the_hub(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """An adapter on a model of the hub, planned by its headers, is what it is in folders; the manifest pins both."""
    models = tmp_path / "models"
    adapter = write_adapter(models / "lora", models / "seed", r=400)
    acme.add("acme/lora", adapter, **{"adapter_model.bin": b"\x80", "tokenizer.json": b"{}"})  # type: ignore[arg-type]
    recipe = write_hub_recipe(
        tmp_path, "{seed: acme/seed, code: {base: seed, adapter: acme/lora}, law: {base: acme/law, adapter: hf://acme/lora@main}}"
    )
    shown = run("plan", recipe)
    assert shown.status == 0, shown.err
    assert "+ lora(code)" in shown.out
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert 0 < acme.sent(r"\?X-Signature") < size
    merged(run, recipe)
    local = models / "recipe.yaml"
    local.write_text(
        "method: bam\nsources: {seed: seed, code: {base: seed, adapter: lora}, law: {base: ./law, adapter: lora}}\noutput: {path: out}\n"
    )
    merged(run, local)
    assert folder_bytes(tmp_path / "out")["model.safetensors"] == folder_bytes(models / "out")["model.safetensors"]
    recorded = json.loads((tmp_path / "out" / "bam_merge.json").read_text())
    lora, law = (f"acme/{name}@{acme.repos[f'acme/{name}'].refs['main']}" for name in ("lora", "law"))
    assert recorded["recipe"]["sources"]["law"] == {"base": law, "adapter": lora}
    assert recorded["sources"]["code"]["path"] == lora
    shutil.rmtree(tmp_path / "cache")
    assert json.loads(run("verify", tmp_path / "out", "--json").out)["ok"]
    assert not acme.asked("acme/lora/resolve/.*(bin|tokenizer)")
