"""For the tests of verification: a merge that passes, forgeries of it, and what fails of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from conftest import CONFIGS, write_recipe, write_sources

from bam_merge import MergeOptions
from bam_merge.checkpoints.header import read_header
from bam_merge.checkpoints.provenance import sealed
from bam_merge.planning.make import plan_file
from bam_merge.planning.plan import Plan
from bam_merge.publishing.publish import publish
from bam_merge.values.tensors import TORCH_DTYPES
from bam_merge.verifying.report import Report

E1 = "model.layers.1.self_attn.experts.1."
SQUARE = {**CONFIGS["llama"], "num_key_value_heads": 4}  # q, k and o are all [32, 32]
UNPROVED = MergeOptions(verify=False)


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.failures}


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, Plan]:
    write_sources(tmp_path, SQUARE)
    plan = plan_file(write_recipe(tmp_path))
    return publish(plan, None, UNPROVED), plan


class Forger:
    """Changes a merged folder and mends the digests in its manifest, so that only what the tensors and config mean can tell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "bam_merge.json"
        self.manifest = json.loads(self.path.read_text())

    def read(self, name: str) -> torch.Tensor:
        entry = self.entry(name)
        data = bytearray((self.folder / entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes])
        return torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def entry(self, name: str) -> Any:
        file = self.manifest["tensors"][name]["file"]
        return next(e for e in read_header(str(self.folder / file)).tensors if e.name == name)

    def write(self, name: str, value: torch.Tensor) -> None:
        entry = self.entry(name)
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert len(data) == entry.nbytes
        with open(self.folder / entry.file, "r+b") as stream:
            stream.seek(entry.offset)
            stream.write(data)
        self.manifest["tensors"][name]["digest"] = xxhash.xxh3_128_hexdigest(data)
        self.path.write_bytes(sealed(self.manifest))

    def swap(self, a: str, b: str) -> None:
        first, second = self.read(a), self.read(b)
        self.write(a, second)
        self.write(b, first)

    def config(self, **changes: Any) -> None:
        self.file("config.json", json.dumps({**json.loads((self.folder / "config.json").read_text()), **changes}))

    def file(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        self.manifest["files"][name] = xxhash.xxh3_128_hexdigest(text.encode())
        self.path.write_bytes(sealed(self.manifest))

    def record(self, change: Callable[[dict[str, Any]], Any]) -> None:
        change(self.manifest)
        self.path.write_bytes(sealed(self.manifest))


def swap_ffns(forge: Forger) -> None:
    for part in ("gate", "up", "down"):
        forge.swap(*(f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in (0, 1)))
