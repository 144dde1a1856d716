"""For tests of routing: texts whose words are token ids, and a tokenizer that reads them."""

from pathlib import Path

import tokenizers
import torch


def words_tokenizer(folder: Path, size: int = 64) -> None:
    """w0 w1 ... are the tokens 0, 1, ..."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def random_ids(count: int, seed: int = 1, size: int = 64) -> list[int]:
    ids: list[int] = torch.randint(size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def write_words(path: Path, ids: list[int]) -> Path:
    path.write_text(" ".join(f"w{i}" for i in ids))
    return path
