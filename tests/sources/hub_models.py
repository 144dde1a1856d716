"""For tests of models of the hub: a hub of three small ones, and models as large as real ones of which only headers are anywhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from conftest import CONFIGS, SOURCES, write_sources
from hub_server import Content, FakeHub, serving

from bam_merge.architectures.config import describe
from bam_merge.architectures.locate import applies, cells, shape_of
from bam_merge.architectures.tables import load_architecture
from bam_merge.checkpoints.header import encode_header
from bam_merge.sources.hub import cache as hub_cache
from bam_merge.sources.hub import client as hub_client

TOKEN = "hf_planted" + "Qz7" * 9

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
"""The sizes of Llama 3 70B, which has 70,553,706,496 parameters."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, empty as yet, that this process and those it starts ask; their cache is in `tmp_path`."""
    constants = huggingface_hub.constants
    with serving() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "cache" / "token"))
        for name, value in {"HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(hub_client, "WAITS", (0.01, 0.01, 0.01))
        hub_cache._LISTINGS.clear()
        yield fake
        huggingface_hub.close_session()


@pytest.fixture
def acme(hub: FakeHub, tmp_path: Path) -> FakeHub:
    """The hub with acme/seed, acme/code and acme/law; each has files that nobody may ask for."""
    write_sources(tmp_path / "models", CONFIGS["llama"])
    never = {"pytorch_model.bin": b"\x80pickle", "modeling_evil.py": b"raise SystemExit", "training_args.bin": b"\x80"}
    for name in SOURCES:
        hub.add(f"acme/{name}", tmp_path / "models" / name, **never)  # type: ignore[arg-type]
    return hub


def large(config: dict[str, Any], shards: int, dtype: str = "BF16", **more: Content) -> dict[str, bytes | Content]:
    """The files of a model as large as `config` says, its weights' headers in place and the rest nowhere."""
    table = load_architecture(config["model_type"])
    problems: list[str] = []
    facts = describe(table, config, problems)
    assert not problems
    tensors = [
        (cell.names[0], dtype, shape_of(cell.row, facts))
        for cell in cells(table, config["num_hidden_layers"])
        if cell.row.roles and applies(cell, facts)
    ]
    files: dict[str, bytes | Content] = {"config.json": json.dumps(config).encode(), **more}
    weight_map, total = {}, 0
    for index in range(shards):
        part = tensors[index::shards]
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        header, spans = encode_header(part)
        files[name] = Content(header, spans[-1][0] + spans[-1][1])
        weight_map |= {tensor: name for tensor, _, _ in part}
        total += sum(span for _, span in spans)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
    return files


def write_hub_recipe(
    folder: Path, sources: str = "{seed: acme/seed, code: acme/code, law: acme/law}", text: str = "", output: str = "out"
) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"method: bam\nsources: {sources}\n{text}\noutput: {{path: {output}}}\n")
    return path
