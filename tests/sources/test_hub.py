"""Models of the hub as sources: planned by their headers, downloaded for a merge, pinned to their commits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCES
from hub_models import LLAMA_70B, large, write_hub_recipe
from hub_models import acme as acme  # a fixture
from hub_models import hub as hub
from hub_server import Content, FakeHub, Repo

import bam_merge
from bam_merge.checkpoints.header import encode_header


def commits(fake: FakeHub) -> dict[str, str]:
    return {name: fake.repos[f"acme/{name}"].refs["main"] for name in SOURCES}


# ---- headers ---------------------------------------------------------------------------------------------------------------


def test_a_plan_reads_headers(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    """The plan is that of the folders, and of the weights no more was read than their beginning."""
    recipe = write_hub_recipe(tmp_path, "{seed: acme/seed, code: hf://acme/code, law: acme/law@main}")
    (tmp_path / "folders").mkdir()
    local = tmp_path / "folders" / "recipe.yaml"
    local.write_text(recipe.read_text().replace("hf://acme/", "acme/").replace("acme/law@main", "acme/law").replace("acme", "../models"))
    found, wanted = (json.loads(run("plan", path, "--json").out) for path in (recipe, local))
    assert found.pop("hub") == {
        name: {"model": f"acme/{name}@{commit}", "download": found_size(acme, name)} for name, commit in commits(acme).items()
    }
    assert found == wanted
    weights = acme.asked("resolve/.*safetensors$") + [request for request in acme.requests if request.store]
    assert len(weights) == 6 and {request.span for request in weights} == {"bytes=0-16383"}
    assert not acme.asked(r"\.(bin|py)")
    shown = run("plan", recipe).out
    for name, commit in commits(acme).items():
        assert re.search(rf"^hub +{name}: acme/{name}@{commit}, 74\.4 kB of 74\.8 kB to download$", shown, re.M)


def found_size(fake: FakeHub, name: str) -> int:
    return fake.repos[f"acme/{name}"].commits[commits(fake)[name]]["model.safetensors"].length


@pytest.mark.parametrize("place", ["acme/seed", "acme/seed@main", "hf://acme/seed", "hf://models/acme/seed@main"])
def test_inspect(acme: FakeHub, tmp_path: Path, run: Any, place: str) -> None:
    found, wanted = (json.loads(run("inspect", path, "--json").out) for path in (place, tmp_path / "models" / "seed"))
    assert found.pop("path") == f"acme/seed@{commits(acme)['seed']}"
    del wanted["path"]
    assert found == wanted
    assert acme.sent(r"safetensors|\?X-Signature") == 16384


def test_inspect_stats_downloads(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    found, wanted = (json.loads(run("inspect", path, "--stats", "--json").out) for path in ("acme/seed", tmp_path / "models" / "seed"))
    assert found.pop("path") != wanted.pop("path") and found == wanted


def test_a_70b_model_reads_under_5_mb(hub: FakeHub, tmp_path: Path, run: Any) -> None:
    """80 layers in 30 files, with a tokenizer of 9 MB, twice: the whole plan, and the published count of parameters."""
    tokenizer = Content(b'{"model": {"vocab": {}}}', 9_085_657)
    settings = Content(json.dumps({"added_tokens_decoder": {}, "note": "x" * 50_000}).encode())
    more = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    for name in ("seed", "code"):
        config = {**LLAMA_70B, "_name_or_path": name}
        hub.repos[f"acme/{name}"] = Repo()
        hub.repos[f"acme/{name}"].commit(large(config, 30, **more))
    found = json.loads(run("inspect", "acme/seed", "--json").out)
    assert found["parameters"]["total"] == 70_553_706_496 and found["layers"] == 80
    inspected = hub.sent()
    assert 0 < inspected < 1_000_000
    hub.requests.clear()
    shown = run("plan", write_hub_recipe(tmp_path, "{seed: acme/seed, code: acme/code}"))
    assert shown.status == 2 and "GB free" in shown.err  # no disk of a test has room for the result
    assert "tokenizer.json is the same file in sources.seed and sources.code, by its digest." in shown.out
    assert re.search("hub +seed: .*, 141 GB of 141 GB to download", shown.out)
    assert 0 < hub.sent() < 5_000_000
    assert not hub.asked("tokenizer.json$")


def test_tokenizers_that_differ_are_compared_at_the_merge(hub: FakeHub, tmp_path: Path, run: Any) -> None:
    for name in ("seed", "code"):
        hub.repos[f"acme/{name}"] = Repo()
        tokenizer = Content(name.encode(), 9_085_657)
        hub.repos[f"acme/{name}"].commit(large({**LLAMA_70B, "num_hidden_layers": 2}, 2, **{"tokenizer.json": tokenizer}))
    out = run("plan", write_hub_recipe(tmp_path, "{seed: acme/seed, code: acme/code}")).out
    assert "tokenizer.json is not known to be the same file in all sources; its tokens are compared when they are downloaded" in out
    assert "tokenizer    of seed" in out


# ---- adapters --------------------------------------------------------------------------------------------------------------


def test_an_adapter(hub: FakeHub, tmp_path: Path) -> None:
    """By its headers, then whole: of an adapter's repository two files are read, whatever else it has."""
    from bam_merge.sources.places import bring, find, opened

    header, spans = encode_header([("base_model.model.q_proj.lora_A.weight", "F32", (4, 8000))])
    weights = Content(header + bytes(spans[0][1]))
    files = {
        "adapter_config.json": b'{"r": 4}',
        "adapter_model.safetensors": weights,
        "tokenizer.json": b"{}",
        "adapter_model.bin": b"\x80",
    }
    hub.repos["acme/lora"] = Repo()
    commit = hub.repos["acme/lora"].commit(files)  # type: ignore[arg-type]
    found = find("acme/lora", adapter=True)
    checkpoint = opened(found)
    assert found.recorded == f"acme/lora@{commit}" and checkpoint.config == {"r": 4}
    assert [entry.shape for entry in checkpoint.tensors.values()] == [(4, 8000)]
    assert checkpoint.remote is not None and checkpoint.remote.missing == weights.length and not checkpoint.remote.unread
    bring([found])
    assert sorted(path.name for path in found.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not hub.asked("tokenizer|bin")
    assert find("acme/lora", adapter=True).snapshot.complete  # type: ignore[union-attr]


def test_an_adapter_for_a_model_and_a_model_for_an_adapter(acme: FakeHub, tmp_path: Path, run: Any) -> None:
    from bam_merge.sources.places import find, opened

    acme.repos["acme/lora"] = Repo()
    acme.repos["acme/lora"].commit({"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    result = run("plan", write_hub_recipe(tmp_path, "{seed: acme/seed, code: acme/lora}"))
    what = (
        "config.json is missing on the hub: this is an adapter (adapter_config.json). Write {base: MODEL, adapter: acme/lora} for a source."
    )
    assert result.status == 2 and f"sources.code: acme/lora@{acme.repos['acme/lora'].refs['main']}: {what}" in result.err
    with pytest.raises(bam_merge.CheckpointError, match=r"adapter_config\.json is missing on the hub: this is a model of its own"):
        opened(find("acme/seed", adapter=True))
