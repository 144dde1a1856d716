"""Do the sources tokenise alike? Models whose token ids mean different words cannot share embeddings."""

from pathlib import Path
from typing import Any

from bam_merge.checkpoint import read_small_file
from bam_merge.dense import DenseModel
from bam_merge.errors import CheckpointError, printable
from bam_merge.strict import load_json


def tokenizer_disagreements(models: list[DenseModel]) -> list[str]:
    """A message for every source whose token ids differ from the first one's. Sources without a tokenizer are not compared."""
    problems = []
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


def _bytes_differ(mine: Path, theirs: Path) -> str:
    return "not the same bytes" if read_small_file(mine) != read_small_file(theirs) else ""


def _ids_differ(mine: Path, theirs: Path) -> str:
    """What differs in the map from token to id or in the merges; '' when only settings such as truncation do."""
    a, b = read_small_file(mine), read_small_file(theirs)
    if a == b:
        return ""
    (my_ids, my_rest), (their_ids, their_rest) = _tokens(mine, a), _tokens(theirs, b)
    for token, identifier in my_ids.items():
        if their_ids.get(token) != identifier:
            return f"token {printable(repr(token))} has id {identifier} here, {their_ids.get(token, 'none')} there"
    if len(my_ids) != len(their_ids):
        return f"{len(my_ids)} tokens here, {len(their_ids)} there"
    return "" if my_rest == their_rest else "the merges are not the same"


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
