"""A folder's tokenizer in every form it may have, each read to the same: token -> id, and what else decides how text becomes ids."""

import base64
import binascii
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from bam_merge.checkpoints.header import lookalike
from bam_merge.documents import load_json
from bam_merge.sources.companions import CODE_KEYS
from bam_merge.sources.tokenizers.sentencepiece import read_sentencepieces
from bam_merge.text import printable


@dataclass(frozen=True)
class Form:
    """What one file says. `ids` maps tokens to ids and is empty where the file names none; `added` are ids of tokens that were added to a
    finished vocabulary. `order` names and holds what joins pieces: "merges", or "scores". `split` is how text is cut before that.
    `unread` says why a file of another kind than expected could not be read; then only `digest`, of its bytes, is known. `misnumbered`
    says of which added token the library tokenizers has another id than the file; `next_number` is the id that it gives the next one.
    """

    file: str
    digest: str
    ids: Mapping[str, Any] = field(default_factory=dict)
    added: frozenset[int] = frozenset()
    order: tuple[str, Any] | None = None
    split: Any = None
    unread: str = ""
    misnumbered: str = ""
    next_number: int = 0

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """The tokens of every id: more than one where a file gives a token two spellings."""
        return names_by_id(self.ids)

    def is_added(self, number: Any) -> bool:
        """Whether the id is one of `added`; a file may give any value for an id."""
        return type(number) is int and number in self.added


Load = Callable[[bytes], Any]
"""What parses JSON, as load_json does."""


def read_form(name: str, data: bytes, digest: str, load: Load = load_json) -> Form:
    """The form in the file called `name`, one of FORMS. Raises ValueError, in words, for a JSON or text that is no tokenizer."""
    try:
        return FORMS[name](name, load(data) if name.endswith(".json") else data, digest)
    except KeyError as error:
        raise ValueError(f"not a tokenizer file (no {printable(str(error))} where one belongs)") from None
    except (TypeError, IndexError, AttributeError, OverflowError, binascii.Error):
        raise ValueError("not a tokenizer file (something in it is not of the kind that belongs there)") from None


# ---- tokens as bytes -------------------------------------------------------------------------------------------------------


@cache
def byte_letters() -> tuple[str, ...]:
    """The letter by which a byte-level vocabulary writes each byte: itself if printable, else from U+0100 on.

    Source: Radford et al. 2019, the published code of GPT-2 (encoder.py, bytes_to_unicode).
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte) if byte in plain else chr(next(others)) for byte in range(256))


def written(token: bytes) -> str:
    """The token as a byte-level vocabulary writes it."""
    letters = byte_letters()
    return "".join(letters[byte] for byte in token)


def same_token(a: str, b: str) -> bool:
    """Whether two forms mean the same token: the same text, or one writes it in byte-level letters, or as the byte fallback <0x0A>."""
    return a == b or not {a, written(a.encode()), _fallback(a)}.isdisjoint({b, written(b.encode()), _fallback(b)})


def _fallback(token: str) -> str:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return written(bytes.fromhex(token[3:5]))
        except ValueError:
            pass
    return token


# ---- the forms -------------------------------------------------------------------------------------------------------------


def _tokenizer_json(name: str, document: Any, digest: str) -> Form:
    """All tokens, the merges or scores, and how text is cut, of the format of the library tokenizers."""
    model = document["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        ids, scores = dict(vocab), None
    else:
        ids = {entry[0]: index for index, entry in enumerate(vocab)}
        scores = [_float32(entry[1]) for entry in vocab]
    added = {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
    ids.update(added)
    if not all(isinstance(token, str) for token in ids):
        raise ValueError("not a tokenizer file (a token that is no text)")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or ()]
    order = ("scores", (1, scores)) if scores is not None else ("merges", merges)
    known = frozenset(i for i in added.values() if type(i) is int)
    misnumbered, last = _numbered(vocab, added)
    return Form(name, digest, ids, known, order, _split(document, model), misnumbered=misnumbered, next_number=last)


def _numbered(vocab: Any, added: Mapping[str, Any]) -> tuple[str, int]:
    """(the first added token to which the library tokenizers gives another id than the file, in words, or ''; the id of the next one).

    It keeps the id of one that the vocabulary has, and numbers the others from the vocabulary's size on, in the file's order (tokenizers
    0.23, AddedVocabulary.add_tokens).
    """
    known = vocab if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
    text, last = "", len(vocab)
    for token, number in added.items():
        given = known.get(token, last)
        if given != number and not text:
            text = f"{printable(repr(token))} has id {printable(str(number), 40)} in the file, the library tokenizers gives it {given}"
        last = max(last, given + 1) if type(given) is int else last
    return text, last


def _float32(value: Any) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0]) if abs(value) < 3e38 else float(value)


DEFAULTS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "Metaspace": {"replacement": "▁", "prepend_scheme": "always", "split": True},
    "Split": {"invert": False},
    "Digits": {"individual_digits": False},
}
"""Settings that older versions of the library did not write down, and what they mean then."""


def _split(document: Mapping[str, Any], model: Mapping[str, Any]) -> Any:
    """The normalizer, the pre-tokenizer and the model's switches, in one spelling for every version of the library."""
    steps = {key: _steps(document.get(key)) for key in ("normalizer", "pre_tokenizer")}
    switches = {key: model[key] for key in ("ignore_merges", "byte_fallback", "dropout", "continuing_subword_prefix") if model.get(key)}
    return {**steps, **switches}


def _steps(step: Any) -> Any:
    """A step without what is as by default; a sequence of one is that one, a sequence of none is none."""
    if isinstance(step, list):
        return [_steps(item) for item in step]
    if not isinstance(step, dict):
        return step
    step = dict(step)
    for key in ("normalizers", "pretokenizers"):
        if step.get("type") == "Sequence" and isinstance(step.get(key), list):
            parts = [_steps(item) for item in step[key]]
            return parts[0] if len(parts) == 1 else parts or None
    if step.get("type") == "Metaspace":
        step.pop("str_rep", None)
        if (prefix := step.pop("add_prefix_space", None)) is not None:
            step.setdefault("prepend_scheme", "always" if prefix else "never")
    return {**DEFAULTS.get(str(step.get("type")), {}), **{key: value for key, value in step.items() if value is not None}}


def _vocab_json(name: str, document: Any, digest: str) -> Form:
    return Form(name, digest, _ids(document))


def _added_tokens(name: str, document: Any, digest: str) -> Form:
    ids = _ids(document)
    return Form(name, digest, ids, frozenset(ids.values()))


def _ids(document: Any) -> dict[str, int]:
    if not isinstance(document, dict):
        raise ValueError("not a tokenizer file (not a JSON object)")
    ids = {token: number for token, number in document.items() if type(number) is int or token not in CODE_KEYS}
    for token, number in ids.items():
        if not isinstance(token, str):
            raise ValueError("not a tokenizer file (a token that is no text)")
        if type(number) is not int or number < 0:
            raise ValueError(
                f"not a tokenizer file (the id of {printable(repr(token))} is {printable(repr(number), 40)}, no natural number)"
            )
    return ids


def _tokenizer_config(name: str, document: Any, digest: str) -> Form:
    """The added tokens that a tokenizer_config.json numbers, if it does."""
    if not isinstance(document, dict):
        raise ValueError("not a tokenizer file (not a JSON object)")
    ids = {}
    for number, token in (document.get("added_tokens_decoder") or {}).items():
        if not (number.isdecimal() and len(number) < 20):
            raise ValueError(f"added_tokens_decoder: {printable(repr(number), 40)} is no id")
        ids[token["content"]] = int(number)
    return Form(name, digest, _ids(ids), frozenset(ids.values()))


def _lines(data: bytes) -> list[str]:
    """Lines by line feeds alone: a token may hold any other separator."""
    try:
        return [line.removesuffix("\r") for line in data.decode().removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None


def _merges_txt(name: str, data: bytes, digest: str) -> Form:
    lines = _lines(data)
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return Form(name, digest, order=("merges", [line.split(" ") for line in lines if line]))


def _vocab_txt(name: str, data: bytes, digest: str) -> Form:
    return Form(name, digest, {line: index for index, line in enumerate(_lines(data))})


def _tekken(name: str, document: Any, digest: str) -> Form:
    """Mistral's tekken.json: special tokens first, then the vocabulary by rank, as far as the size that its config gives.

    Source: mistral-common, tokens/tokenizers/tekken.py (Tekkenizer.from_file).
    """
    config = document.get("config") or {}
    specials = document.get("special_tokens")
    first = config.get("default_num_special_tokens", len(specials or ()))
    last = config.get("default_vocab_size")
    ids = {token["token_str"]: token["rank"] for token in specials or ()}
    for position, token in enumerate(document["vocab"]):
        number = token.get("rank", position) + first
        if last is None or number < last:
            ids.setdefault(written(base64.b64decode(token["token_bytes"], validate=True)), number)
    _ids(ids)
    return Form(name, digest, ids, split=config.get("pattern"))


def _binary(name: str, data: bytes, digest: str) -> Form:
    """tokenizer.model: a sentencepiece model, or a text of base64 tokens and their ranks (tiktoken's format)."""
    try:
        model = read_sentencepieces(data)
    except ValueError as no_sentencepieces:
        if what := lookalike(data):
            raise ValueError(f"this is {what}") from None
        try:
            return Form(name, digest, _ranks(data))
        except (ValueError, binascii.Error):
            return Form(name, digest, unread=f"as a sentencepiece model: {no_sentencepieces}")
    ids: dict[str, int] = {}
    for index, (piece, _, _) in enumerate(model.pieces):
        ids.setdefault(piece, index)
    order = ("scores", (model.algorithm, [score for _, score, _ in model.pieces]))
    return Form(name, digest, ids, frozenset(), order, (model.normalizer, [kind for _, _, kind in model.pieces]))


def _ranks(data: bytes) -> dict[str, int]:
    ids = {}
    for line in data.splitlines():
        token, rank = line.split()
        ids[written(base64.b64decode(token, validate=True))] = int(rank)
    if not ids:
        raise ValueError("empty")
    return ids


FORMS: dict[str, Callable[[str, Any, str], Form]] = {
    "tokenizer.json": _tokenizer_json,
    "tekken.json": _tekken,
    "tokenizer.model": _binary,
    "tiktoken.model": _binary,
    "vocab.json": _vocab_json,
    "vocab.txt": _vocab_txt,
    "merges.txt": _merges_txt,
    "added_tokens.json": _added_tokens,
    "tokenizer_config.json": _tokenizer_config,
}
"""How each file is read, from its document if it is JSON and else from its bytes. A loader takes the first that is there."""


PARTIAL = frozenset({"merges.txt", "added_tokens.json", "tokenizer_config.json"})
"""Files that add to a tokenizer and are none by themselves."""


def names_by_id(ids: Mapping[str, Any]) -> dict[int, list[str]]:
    """The tokens of every id."""
    names: dict[int, list[str]] = {}
    for token, number in ids.items():
        if type(number) is int:
            names.setdefault(number, []).append(token)
    return names


def as_json(value: Any) -> str:
    """A text by which two settings are compared."""
    return json.dumps(value, sort_keys=True, default=repr)
