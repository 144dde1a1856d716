"""The models, recipes and merges that the benchmarks work on: four Llama-shaped models of 1.1 billion parameters, or a share of that."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy
from common import bam_merge
from paired import Command

from bam_merge.demo.synthetic import Values, write_checkpoint

NAMES = ("seed", "code", "law", "math")
LAYERS, VOCABULARY = 22, 32_000

FULL_DISK = 26e9
"""Bytes of disk that scale 1 needs at once: the inputs, the output that cp copies from, and the output being written."""

FULL_MEMORY = 17e9
"""Bytes of page cache that scale 1 needs for a warm run: what a merge reads and what it writes."""

SCALES = (1.0, 0.5, 0.25, 0.1, 0.05)
"""What the default of --scale is chosen from."""


# ---- models ----------------------------------------------------------------------------------------------------------------


def llama(**sizes: int) -> dict[str, Any]:
    """A Llama config.json: the shape of the benchmark's models, with `sizes` in the place of its own."""
    return {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": LAYERS,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **sizes,
    }  # fmt: skip


def scaled(scale: float) -> dict[str, Any]:
    """The benchmark's model with `scale` times the layers and the vocabulary, so about `scale` times the bytes."""
    return llama(num_hidden_layers=max(1, round(LAYERS * scale)), vocab_size=max(256, round(VOCABULARY * scale)))


def wide(factor: float) -> dict[str, Any]:
    """A model of two layers whose matrices have about `factor` times the elements of the benchmark's."""
    side = factor**0.5
    return llama(
        hidden_size=64 * max(1, round(2048 * side / 64)),  # a multiple of 64, so that 32 heads have an even size
        intermediate_size=64 * max(1, round(5632 * side / 64)),
        vocab_size=64 * max(4, round(VOCABULARY * side / 64)),
        num_hidden_layers=2,
    )


def llama_70b() -> dict[str, Any]:
    """Llama 3 70B's shape."""
    return llama(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256
    )


def repeated_block(seed: int) -> Values:
    """Every tensor is the same block of random numbers, over and over: as incompressible for a merge, and quick to make."""
    block = numpy.random.default_rng(seed).standard_normal(2**20, dtype="f4") * numpy.float32(0.02)
    return lambda name, shape: numpy.resize(block, prod(shape))


def holes(name: str, shape: tuple[int, ...]) -> None:
    """Values of a sparse checkpoint: all zeros, and no disk space."""


def write_models(folder: Path, config: Mapping[str, Any], names: Sequence[str], sparse: bool, shards: int = 1) -> dict[str, str]:
    """Write models called `names` into `folder`, unless an earlier run with --keep left them. Returns a recipe's `sources`."""
    marker = folder / "made.json"
    made = json.dumps([dict(config), list(names), sparse, shards])
    if not marker.exists() or marker.read_text() != made:
        shutil.rmtree(folder, ignore_errors=True)
        for seed, name in enumerate(names):
            print(f"writing {folder.name}/{name}", file=sys.stderr)
            write_checkpoint(folder / name, config, holes if sparse else repeated_block(seed), "BF16", shards)
        marker.write_text(made)
    return {name: str(folder / name) for name in names}


def default_scale(work: Path) -> float:
    """The largest scale for which disk and page cache suffice, with a fifth of each to spare."""
    disk, physical = shutil.disk_usage(work).free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next((s for s in SCALES if s * FULL_DISK < 0.8 * disk and s * FULL_MEMORY < 0.8 * physical), SCALES[-1])


# ---- merges ----------------------------------------------------------------------------------------------------------------


def btx_recipe(sources: Mapping[str, str], layout: str = "mixtral") -> dict[str, Any]:
    """BTX, two experts per token."""
    ffn = {"top_k": 2, "gate": "topk_then_softmax"}
    return {"method": "btx", "sources": dict(sources), "ffn": ffn, "output": {"path": "unused", "layout": layout}}


def bam_recipe(sources: Mapping[str, str]) -> dict[str, Any]:
    """BAM Expert-KV: every model's whole attention and FFN become experts."""
    attention, ffn = {"kv": "expert", "routing": "soft"}, {"top_k": 1, "gate": "softmax_then_topk"}
    return {"method": "bam", "sources": dict(sources), "attention": attention, "ffn": ffn, "output": {"path": "unused"}}


def ties_recipe(sources: Mapping[str, str]) -> dict[str, Any]:
    """A dense TIES merge onto the seed, which reads every operand three times."""
    shared = {"make": "ties", "base": "seed", "density": 0.5}
    return {"method": "merge", "sources": dict(sources), "shared": shared, "output": {"path": "unused"}}


def merge_command(label: str, recipe: Path, sources: Mapping[str, str], target: Path) -> Command:
    """A merge by bam-merge into `target`, without the verification that follows it: what is compared with cp is the merge alone."""
    argv: list[str | Path] = [bam_merge(), "merge", recipe, "--output", target, "--no-verify"]
    return Command(label, argv, [Path(folder) for folder in sources.values()], target)
