"""Do the sources tokenise alike? Models whose token ids mean different words cannot share embeddings."""

import json
import os
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.folder import TOKENIZER_FILES, read_small_file
from bam_merge.checkpoints.header import open_regular
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.sources.dense import DenseModel
from bam_merge.text import printable


def tokenizer_disagreements(models: list[DenseModel]) -> list[str]:
    """A message for every source whose token ids differ from the first one's, or whose files beside the weights cannot be read.

    Sources without a tokenizer are not compared.
    """
    problems = [f"sources.{model.name}: {problem}" for model in models for problem in _unreadable(model.checkpoint.path)]
    if problems:
        return problems
    first, *others = models
    for file, compare in (("tokenizer.json", _ids_differ), ("tokenizer.model", _bytes_differ)):
        if not (first.checkpoint.path / file).is_file():
            continue
        for model in others:
            path = model.checkpoint.path / file
            if path.is_file():
                try:
                    difference = compare(path, first.checkpoint.path / file)
                except CheckpointError as error:
                    problems += [f"sources.{model.name}: {problem}" for problem in error.problems]
                    continue
                if difference:
                    problems.append(
                        f"sources.{model.name}: {file} differs from sources.{first.name}: {difference}. "
                        "The embeddings would be averaged over different words; align the tokenizers first."
                    )
    return problems


def _unreadable(folder: Path) -> list[str]:
    """Why files beside the weights that are there cannot be read: a dangling symlink is not the absence of a tokenizer."""
    problems: list[str] = []
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name):
            try:
                os.close(open_regular(str(folder / name)))
            except CheckpointError as error:
                problems += error.problems
    return problems


def companion(path: Path) -> bytes:
    """A tokenizer or generation file as the output gets it: byte for byte, but for keys that make a loader run code.

    Raises CheckpointError.
    """
    data = read_small_file(path)
    if path.suffix != ".json" or not any(key.encode() in data for key in CODE_KEYS):
        return data
    try:
        document = load_json(data)
    except ValueError as error:
        raise CheckpointError(f"{printable(str(path))}: {error}.") from None
    if not isinstance(document, dict) or not document.keys() & CODE_KEYS:
        return data
    kept = {key: value for key, value in document.items() if key not in CODE_KEYS}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


CODE_KEYS = {"auto_map", "trust_remote_code"}
"""Keys of a tokenizer's configuration by which transformers loads code, of this folder or of any repository."""


def _bytes_differ(mine: Path, theirs: Path) -> str:
    return "not the same bytes" if read_small_file(mine) != read_small_file(theirs) else ""


def _ids_differ(mine: Path, theirs: Path) -> str:
    """What differs in the map from token to id or in the merges; '' when only settings such as truncation do."""
    a, b = read_small_file(mine), read_small_file(theirs)
    if a == b:
        return ""
    (my_ids, my_rest), (their_ids, their_rest) = _tokens(mine, a), _tokens(theirs, b)
    for token in my_ids:
        if token not in their_ids or their_ids[token] != my_ids[token]:
            return f"token {printable(repr(token))} has id {_id(my_ids, token)} here, {_id(their_ids, token)} there"
    if len(my_ids) != len(their_ids):
        return f"{len(my_ids)} tokens here, {len(their_ids)} there"
    return "" if my_rest == their_rest else "the merges are not the same"


def _id(ids: dict[str, int], token: str) -> str:
    return printable(str(ids.get(token, "none")), 40)


def _tokens(path: Path, data: bytes) -> tuple[dict[str, int], Any]:
    """All token ids of a tokenizer.json, and its merges."""
    try:
        document = load_json(data)
        model = document["model"]
        vocab = model["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
        ids.update({token["content"]: token["id"] for token in document.get("added_tokens") or ()})
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or ()]
        return ids, merges
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{printable(str(path))}: not a tokenizer file ({type(error).__name__}: {printable(str(error))}).") from None
