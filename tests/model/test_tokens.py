"""A tokenizer.json that its own library cannot use, or breaks at, is named as such; verification does without it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, write_recipe, write_sources
from proofs import UNPROVED

from bam_merge import merge, verify
from bam_merge.errors import CheckpointError
from bam_merge.model.tokens import encode, open_tokenizer
from bam_merge.recipe.load import load_recipe

UNUSABLE: dict[str, dict[str, Any]] = {
    "a merge whose result is no token, at which the library panics": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": ["a b"]},
    "a prefix that is longer than the tokens": {"type": "BPE", "continuing_subword_prefix": "##", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
    "a token for unknown words that is none": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "unk_token": "x"},
    "no token for unknown words": {"type": "Unigram", "vocab": [["a", -1.0]]},
    "no such model": {"type": "Magic"},
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_tokenizer_that_its_library_cannot_use(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": UNUSABLE[name]}))
    with pytest.raises(CheckpointError) as error:
        encode(open_tokenizer(tmp_path), "a zebra")
    assert "token" in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("name", ["a merge whose result is no token, at which the library panics", "no token for unknown words"])
def test_verification_takes_random_tokens_then(name: str, tmp_path: Path) -> None:
    """And a text that was to be read is refused."""
    write_sources(tmp_path, CONFIGS["llama"], names=("seed", "code"))
    (tmp_path / "seed" / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": UNUSABLE[name]}))
    folder = merge(load_recipe(write_recipe(tmp_path, names=("seed", "code"))), options=UNPROVED)
    report = verify(folder)
    assert report.ok
    (said,) = (check.detail for check in report.checks if "random tokens" in check.detail)
    assert "tokenizer" in said
    (tmp_path / "text.txt").write_text("a zebra\n" * 20)
    with pytest.raises(CheckpointError, match="tokenizer"):
        verify(folder, texts=[tmp_path / "text.txt"])
