"""What a folder's tokenizer files say, and which row of a source belongs to which token of a result: verification's own reading.

On purpose a second time, from the formats: sources/tokenizers/forms.py, vocabulary.py and alignment.py read the same for a plan, and a
contract of import-linter keeps them apart. Here one token of every id is enough, and tables are arrays.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from bam_merge.checkpoints.folder import read_small_file
from bam_merge.documents import load_json
from bam_merge.text import printable

NOBODY = -1
"""Stands for a row that a source has not."""


@dataclass(frozen=True)
class Tokens:
    """The token of every id of one folder, and which ids were added to the base vocabulary."""

    text: Mapping[int, str]
    added: frozenset[int]


def tokens_of(folder: Path) -> Tokens | None:
    """The tokens that a folder's files name; None where none does. Raises ValueError, KeyError, ... for files that are no tokenizer, and
    CheckpointError for those that cannot be read."""
    for name, read in READERS.items():
        if (folder / name).is_file() and (found := read(read_small_file(folder / name))) is not None:
            text, added = found
            break
    else:
        return None
    for number, token in _beside(folder):
        if number not in text or meaning(text[number]) != meaning(token):
            text[number] = token
        added.add(number)
    for number, token in text.items():
        if type(number) is not int or number < 0 or not isinstance(token, str):
            raise ValueError(f"{printable(repr(token), 60)} has the id {printable(repr(number), 60)}")
    return Tokens(text, frozenset(added))


Read = tuple[dict[int, str], set[int]]


def _tokenizer_json(data: bytes) -> Read:
    document = load_json(data)
    vocab = document["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], index) for index, entry in enumerate(vocab))
    extra = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or []}
    text: dict[int, str] = {}
    for token, number in pairs:
        if extra.get(token, number) == number:
            text.setdefault(number, token)
    text.update((number, token) for token, number in extra.items())
    return text, set(extra.values())


def _vocab_json(data: bytes) -> Read:
    text: dict[int, str] = {}
    for token, number in load_json(data).items():
        text.setdefault(number, token)
    return text, set()


def _lines(data: bytes) -> Read:
    return {number: line.rstrip("\r") for number, line in enumerate(data.decode().removesuffix("\n").split("\n"))}, set()


def _tekken(data: bytes) -> Read:
    document = load_json(data)
    config, special = document.get("config") or {}, document.get("special_tokens") or []
    text = {entry["rank"]: entry["token_str"] for entry in special}
    shift, size = config.get("default_num_special_tokens", len(special)), config.get("default_vocab_size")
    for index, entry in enumerate(document["vocab"]):
        number = entry.get("rank", index) + shift
        if size is None or number < size:
            text[number] = _in_letters(base64.b64decode(entry["token_bytes"]))
    return text, set()


def _model_file(data: bytes) -> Read | None:
    """A sentencepiece model, or lines of base64 and a rank."""
    try:
        return {
            int(rank): _in_letters(base64.b64decode(token, validate=True)) for token, rank in map(bytes.split, data.splitlines())
        }, set()
    except ValueError:
        pass
    pieces, added = dict[int, str](), set[int]()
    try:
        for field, value in _message(data):
            if field == 1 and isinstance(value, bytes):
                piece = dict(_message(value))
                if piece.get(3) in (3, 4):  # control, user-defined
                    added.add(len(pieces))
                pieces[len(pieces)] = bytes(piece[1]).decode()
    except (ValueError, IndexError, KeyError, TypeError):
        return None
    return pieces, added


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field, value) of a protobuf message."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if not data[at - 1] & 0x80:
                return value

    while at < len(data):
        field, kind = divmod(number(), 8)
        size = {1: 8, 5: 4}.get(kind, 0) if kind != 2 else number()
        if kind == 0:
            yield field, number()
            continue
        if kind not in (1, 2, 5) or at + size > len(data):
            raise ValueError("no protobuf")
        yield field, data[at : at + size]
        at += size


READERS = {
    "tokenizer.json": _tokenizer_json, "tekken.json": _tekken, "tokenizer.model": _model_file, "tiktoken.model": _model_file,
    "vocab.json": _vocab_json, "vocab.txt": _lines,
}  # fmt: skip
"""Whole tokenizers, in the order in which a loader looks for them."""


def _beside(folder: Path) -> Iterator[tuple[int, str]]:
    """(id, token) of what added_tokens.json and tokenizer_config.json add."""
    if (folder / "added_tokens.json").is_file():
        for token, number in load_json(read_small_file(folder / "added_tokens.json")).items():
            if type(number) is int:
                yield number, token
    if (folder / "tokenizer_config.json").is_file():
        settings = load_json(read_small_file(folder / "tokenizer_config.json"))
        for number, entry in (settings.get("added_tokens_decoder") or {}).items():
            yield int(number), entry["content"]


@cache
def _letters() -> dict[str, int]:
    """The byte of every letter of a byte-level vocabulary (GPT-2's encoder.py): printable ones stand for themselves."""
    alone = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in alone]
    return {**{chr(byte): byte for byte in alone}, **{chr(256 + index): byte for index, byte in enumerate(rest)}}


def _in_letters(data: bytes) -> str:
    letter = {byte: letter for letter, byte in _letters().items()}
    return "".join(letter[byte] for byte in data)


def meaning(token: str) -> frozenset[bytes]:
    """The bytes that a piece may stand for: its own, those of its letters, or the byte that <0x0A> names."""
    found = {token.encode(errors="surrogatepass")}
    if all(letter in _letters() for letter in token):
        found.add(bytes(_letters()[letter] for letter in token))
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        found.add(bytes.fromhex(token[3:5]))
    return frozenset(found)


# ---- one row for each token ----------------------------------------------------------------------------------------------------


def places(result: Tokens, source: Tokens) -> dict[int, int]:
    """For every id of the source the id of the same token in the result; ids without one are left out.

    A base piece is the same piece where both call it by the same bytes; any other token is known by its text.
    """
    by_text: dict[str, int] = {}
    for number in sorted(result.text):
        by_text.setdefault(result.text[number], number)
    found = {}
    for number, token in source.text.items():
        here = result.text.get(number)
        if here is not None and (here == token or not meaning(here).isdisjoint(meaning(token))):
            found[number] = number
        elif token in by_text:
            found[number] = by_text[token]
    return found


def own_rows(result: Tokens, source: Tokens, rows: int, size: int) -> "NDArray[numpy.int64]":
    """For each of the result's `size` rows the row of a source with `rows` of the same token, or the padding of that number [size]."""
    table = numpy.full(size, NOBODY, numpy.int64)
    free = numpy.ones(max(size, rows), bool)
    for numbers in (result.text, source.text):
        free[[number for number in numbers if number < len(free)]] = False
    padding = numpy.flatnonzero(free[: min(rows, size)])
    table[padding] = padding
    for number, place in places(result, source).items():
        if number < rows and place < size:
            table[place] = number
    return table


def donors(table: Mapping[str, "NDArray[numpy.int64]"], name: str, missing: str) -> dict[str, "NDArray[numpy.bool_]"]:
    """For each source the rows of the result in which it stands in for what `name` lacks (mean: every source that has it, alike)."""
    lacks = table[name] == NOBODY
    has = {other: lacks & (rows != NOBODY) for other, rows in table.items()}
    if missing == "zeros":
        return {other: numpy.zeros_like(mask) for other, mask in has.items()}
    if missing in has:
        first = has[missing]
        return {other: first if other == missing else mask & ~first for other, mask in has.items()}
    return has


def same_document(found: Any, expected: Any) -> bool:
    """Whether two JSON values are the same, 1 and true apart."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def lost_tokens(result: Tokens, source: Tokens, rows: int) -> Sequence[str]:
    """The tokens of a source that have a row there and no id in the result."""
    known = places(result, source)
    return [token for number, token in source.text.items() if number < rows and number not in known]
