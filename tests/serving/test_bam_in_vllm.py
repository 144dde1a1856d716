"""Layout bam in vLLM in other ways than the plainest: cut over processes, compiled, a prompt in parts; and what it refuses, in words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPTS, TOKENS, Made, compared, run_engine, said

pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("default")]

TRACED = {"enforce_eager": False, "compilation_config": {"mode": 3, "backend": "eager"}}
"""torch.compile's graph, without its code. A pipeline on a CPU needs it: vLLM makes a stage's place for its input when it warms up."""
WAYS: dict[str, dict[str, Any]] = {
    "two processes, each a part of every layer": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "two processes, each half of the layers": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", **TRACED},
    "compiled": {"enforce_eager": False},
    "a prompt in parts": {"max_num_batched_tokens": 8, "enable_chunked_prefill": True, "max_num_seqs": 2},
}
NAMES = ("bam, Expert-KV", "bam, Shared-KV", "bam, keys shared in some layers", "bam without attention experts", "bam of granite")
EVERY = ("bam, Expert-KV", "bam, keys shared in some layers", "bam of granite")
"""Mixtures with experts of attention; and one whose embeddings are scaled, which the second half of a pipeline must not do."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_every_way_gives_the_tokens_of_transformers(
    way: str, name: str, made: Mapping[str, Made], vllm_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "compiled" and name not in EVERY:
        pytest.skip("compiling takes minutes")
    monkeypatch.setenv("VLLM_MORE", json.dumps(WAYS[way]))
    item = made[name]
    line = run_engine(vllm_python, "in_vllm.py", [[str(item.folder), item.reference.ids, TOKENS, True]], tmp_path)[str(item.folder)]
    found = said(line)
    assert found is not None, line
    same, apart = compared(found, item.reference)
    assert (same, apart < 1e-4) == (len(PROMPTS) * TOKENS, True), (same, apart)


REFUSED = {
    "bam, gelu": "its FFN experts compute silu, not hidden_act = 'gelu'",
    "bam, biases of the FFN": "its FFN experts have no biases",
    "bam of gpt_neox": "its FFN experts have a gate",
    "bam, dynamic": "rope_type dynamic depends on the length of each sequence",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_would_compute_otherwise_is_refused(name: str, made: Mapping[str, Made], vllm_python: Path, tmp_path: Path) -> None:
    item = made[name]
    (line,) = run_engine(vllm_python, "in_vllm.py", [[str(item.folder), item.reference.ids, TOKENS, True]], tmp_path).values()
    assert "vLLM would not compute this model as transformers does" in line["failed"]
    assert REFUSED[name] in line["failed"]


@pytest.mark.parametrize("name", ["bam of olmo2"])
def test_heads_that_cannot_be_cut_are_refused(
    name: str, made: Mapping[str, Made], vllm_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MORE", json.dumps(WAYS["two processes, each a part of every layer"]))
    item = made[name]
    run_engine(vllm_python, "in_vllm.py", [[str(item.folder), item.reference.ids, TOKENS, True]], tmp_path)
    assert "norms of queries and keys for 'all heads' cannot be cut (tensor_parallel_size = 2)" in (tmp_path / "in_vllm.py.log").read_text()
