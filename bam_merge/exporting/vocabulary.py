"""The vocabulary of a GGUF file, held against the folder's tokenizer.json: tokens by id, merges, the special ones, the chat template."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bam_merge.checkpoints.folder import Checkpoint, read_small_file
from bam_merge.documents import load_json
from bam_merge.text import printable

TOKENS = "tokenizer.ggml.tokens"


SPACE = "\u2581"
"""What stands for a space in pieces of SentencePiece."""


def vocabulary_problems(fields: Mapping[str, Any], checkpoint: Checkpoint, rows: int) -> Iterator[str]:
    """What differs. A folder whose tokenizer is a file of SentencePiece alone is held to the number of tokens."""
    tokens = fields.get(TOKENS, [])
    if len(tokens) != rows:
        yield f"{TOKENS} has {len(tokens)} tokens, expected one for each of {rows} rows of the embeddings."
        return
    settings = _document(checkpoint, "tokenizer_config.json")
    yield from _templates(fields, checkpoint, settings)
    if "tokenizer.json" not in checkpoint.companions():
        return
    tokenizer = _document(checkpoint, "tokenizer.json")
    known = {number: piece for piece, number in tokenizer["model"]["vocab"].items()} if _by_piece(tokenizer) else {}
    known |= {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens", ())}
    wrong = [number for number, piece in known.items() if number < rows and tokens[number] not in (piece, piece.replace(SPACE, " "))]
    if wrong:
        first = wrong[0]
        found, expected = printable(repr(tokens[first]), 40), printable(repr(known[first]), 40)
        yield f"{len(wrong)} tokens differ, the first is {first}: {found}, expected {expected}."
    merges = [pair if isinstance(pair, str) else " ".join(part.replace(" ", "\u0120") for part in pair) for pair in _merges(tokenizer)]
    if fields.get("tokenizer.ggml.model") == "gpt2" and list(fields.get("tokenizer.ggml.merges", [])) != merges:
        yield "tokenizer.ggml.merges are not those of tokenizer.json."
    yield from _special(fields, tokens, settings)


def _by_piece(tokenizer: Mapping[str, Any]) -> bool:
    return isinstance(tokenizer.get("model", {}).get("vocab"), dict)


def _merges(tokenizer: Mapping[str, Any]) -> Any:
    return tokenizer.get("model", {}).get("merges") or ()


def _special(fields: Mapping[str, Any], tokens: Any, settings: Mapping[str, Any]) -> Iterator[str]:
    """The tokens that begin, end and fill a text."""
    for key, name in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        wanted = settings.get(key)
        wanted = wanted.get("content") if isinstance(wanted, dict) else wanted
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        if wanted is not None and number is not None and tokens[number] != wanted:
            found = printable(repr(tokens[number]), 40)
            yield f"tokenizer.ggml.{name}_token_id is {number}, {found}; tokenizer_config.json has {printable(repr(wanted), 40)}."


def _templates(fields: Mapping[str, Any], checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[str]:
    wanted = settings.get("chat_template")
    if "chat_template.jinja" in checkpoint.companions():
        wanted = read_small_file(checkpoint.path / "chat_template.jinja").decode()
    if isinstance(wanted, str) and fields.get("tokenizer.chat_template") != wanted:
        yield "tokenizer.chat_template is not the folder's."


def _document(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    if name not in checkpoint.companions():
        return {}
    try:
        document = load_json(read_small_file(checkpoint.path / name))
    except (ValueError, json.JSONDecodeError):
        return {}
    return document if isinstance(document, dict) else {}
