"""Tiny checkpoints of every family, made from the architecture tables, and the command line in process."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads of several test processes spin against each other
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is: no test asks a hub but its own, whatever a folder is called

from bam_merge.demo.synthetic import branched_values, random_values, write_checkpoint

BASE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 128, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **BASE, **GROUPED, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "llama_biased": {"model_type": "llama", **BASE, **GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", **BASE, **GROUPED, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **BASE, **GROUPED, "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", **BASE, **GROUPED},
    "qwen3": {"model_type": "qwen3", **BASE, **GROUPED, "head_dim": 12},
    "qwen3_biased": {"model_type": "qwen3", **BASE, **GROUPED, "head_dim": 12, "attention_bias": True},
    "cohere": {"model_type": "cohere", **BASE, **GROUPED},
    "cohere_qk_norm": {"model_type": "cohere", **BASE, **GROUPED, "use_qk_norm": True, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", **BASE},
    "gpt_neox_sequential": {"model_type": "gpt_neox", **BASE, "use_parallel_residual": False, "attention_bias": False},
    "phi3": {"model_type": "phi3", **BASE, **GROUPED},
}  # fmt: skip
"""A small model of every family and variant. hidden and intermediate sizes differ, so that a swap shows."""


def pytest_configure(config: pytest.Config) -> None:
    """transformers copies the model code of a checkpoint to HF_MODULES_CACHE, read when it is imported: a folder of this run."""
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["HF_MODULES_CACHE"] = folder.name


@dataclass
class Result:
    """What a command gave: exit status, stdout, stderr."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""
    from bam_merge.cli import main

    def call(*args: object) -> Result:
        monkeypatch.setattr("sys.argv", ["bam-merge", *map(str, args)])
        status = 0
        try:
            main()
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


SOURCES = ("seed", "code", "law")


def write_sources(folder: Path, config: dict[str, Any], names: tuple[str, ...] = SOURCES, dtype: str = "F32", **options: Any) -> None:
    """A seed and branches of it, below `folder`."""
    for branch, name in enumerate(names):
        values = random_values(7) if branch == 0 else branched_values(7, branch)
        write_checkpoint(folder / name, config, values, dtype, **options)


def write_recipe(folder: Path, text: str = "", method: str = "bam", names: tuple[str, ...] = SOURCES, output: str = "{path: out}") -> Path:
    """A recipe over the sources in `folder`, with `text` as further sections."""
    path = folder / "recipe.yaml"
    sources = ", ".join(f"{name}: {name}" for name in names)
    path.write_text(f"method: {method}\nsources: {{{sources}}}\n{text}\noutput: {output}\n")
    return path


@pytest.fixture
def llamas(tmp_path: Path) -> Path:
    """Three llama sources in a fresh folder."""
    write_sources(tmp_path, CONFIGS["llama"])
    return tmp_path
