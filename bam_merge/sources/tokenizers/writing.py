"""The tokenizer and generation files of an output: a source's as they stand, or with tokens of other sources and another chat template.

Where nothing is added, files are byte for byte what companion() gives. Tokens are only ever added, after all that a tokenizer has: its own
keep their ids, so that settings which name ids stay right.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.folder import VOCABULARIES
from bam_merge.documents import load_json
from bam_merge.sources.companions import companion, read_companion
from bam_merge.sources.tokenizers.alignment import Alignment
from bam_merge.text import count, printable, some

TOKENIZER, SETTINGS, ADDED, SPECIAL = "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"


GENERATION, ID_LISTS = "generation_config.json", ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


DECODER = "added_tokens_decoder"
"""The key of tokenizer_config.json under which added tokens stand by their ids."""


TEKKEN, GROWING = "tekken.json", ("vocab.json", "vocab.txt")


TEMPLATES = ("chat_template.jinja", "chat_template.json")
"""Files that hold a chat template, in the order in which transformers looks for them, before tokenizer_config.json."""


TEMPLATE_KEY = "chat_template"


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""How an added token is matched (the library tokenizers, AddedToken)."""


LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Keys of several special tokens, by older and newer versions of transformers."""


@dataclass(frozen=True)
class Added:
    """A token that the output's tokenizer has of another source: how it is matched, and whether that lists it as special."""

    token: str
    number: int
    flags: Mapping[str, bool]
    listed: bool

    @property
    def entry(self) -> dict[str, Any]:
        """As tokenizer.json has it."""
        return {"id": self.number, "content": self.token, **self.flags}


def companion_documents(
    files: Mapping[str, str], folders: Mapping[str, Path], alignment: Alignment | None, read: Callable[[Path], bytes] = companion
) -> dict[str, bytes]:
    """The bytes of every tokenizer and generation file of the output. `files` says which source gives each, `read` gives one as it may be
    published. Raises CheckpointError."""
    documents = {name: read(folders[source] / name) for name, source in files.items()}
    if alignment is not None and (alignment.template or alignment.giver) != alignment.giver:
        _set_template(documents, folders[str(alignment.template)])
    if alignment is not None and alignment.renumbered and files.get(GENERATION) not in (None, alignment.giver):
        _changed(documents, GENERATION, lambda document: _renumber(document, alignment.renumbered))
    if alignment is not None and alignment.added:
        _add(documents, _added(folders, alignment), alignment, _flags(folders[alignment.giver])[0])
    return documents


def _renumber(document: Any, renumbered: Mapping[int, int | None]) -> None:
    """The ids of generation settings by the result's numbers; those of tokens that it has not are left out."""
    for key in [key for key in document if key.endswith("_token_id") or key in ID_LISTS]:
        value = renumbered_ids(document[key], renumbered)
        if value is None and document[key] is not None:
            del document[key]
        else:
            document[key] = value


def renumbered_ids(value: Any, renumbered: Mapping[int, int | None]) -> Any:
    """Token ids, alone or in lists, by the result's numbers; without those that it has not, None where none is left."""
    if isinstance(value, list):
        kept = [item for item in (renumbered_ids(item, renumbered) for item in value) if item is not None]
        return kept or (None if value else value)
    return renumbered.get(value, value) if type(value) is int else value


def writing_problems(files: Mapping[str, str], folders: Mapping[str, Path], alignment: Alignment, file: str) -> Iterator[str]:
    """What of an alignment cannot be written. `file` is what messages call the recipe."""
    vocabularies = VOCABULARIES.intersection(files)
    if alignment.added and vocabularies == {TEKKEN}:
        tokens = count(len(alignment.added), "token")
        yield (
            f"{file}: tokenizer: {tokens} of other sources cannot be added to {TEKKEN}, the only tokenizer file of "
            f"sources.{alignment.giver}. Put its {TOKENIZER} there, or set tokenizer.source to a source's name."
        )
    if alignment.template is None:
        return
    texts = list(chat_templates(folders[alignment.template]))
    if not texts:
        yield f"{file}: tokenizer.chat_template: sources.{alignment.template} has no chat template."
    lost = [token for token in alignment.sources[alignment.template].lost if any(token in text for text in texts)]
    if lost:
        yield (
            f"{file}: tokenizer.chat_template: the template of sources.{alignment.template} has {some(map(_shown, lost))}, no "
            "token of the result. Set tokenizer.source: union."
        )


def writing_notes(files: Mapping[str, str], alignment: Alignment) -> Iterator[str]:
    """What of added tokens a loader may not see."""
    if alignment.added:
        tokens = f"{count(len(alignment.added), 'token')} of other sources"
        for name in (name for name in files if name in VOCABULARIES and name not in (TOKENIZER, *GROWING)):
            others = TOKENIZER if TOKENIZER in files else f"{ADDED} and {SETTINGS}"
            yield f"{name} stays as it is: {tokens} stand in {others} alone, where a loader of {name} may not look."


def _shown(token: str) -> str:
    return printable(repr(token), 60)


def _changed(documents: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
    """Change a JSON document; one that is not there begins empty, and one that stays the same keeps its bytes."""
    data = documents.get(name, b"{}")
    document = load_json(data)
    change(document)
    if name == TOKENIZER or load_json(data) != document:
        documents[name] = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


# ---- added tokens ------------------------------------------------------------------------------------------------------------


def _added(folders: Mapping[str, Path], alignment: Alignment) -> list[Added]:
    """The tokens to be added, in the order of their ids, as the first source says that names them. One's files are held at a time."""
    found: dict[str, Added] = {}
    for source in alignment.sources:
        flags, listed = _flags(folders[source])
        for token in alignment.added:
            if token in flags and token not in found:
                found[token] = Added(token, alignment.ids[token], flags[token], token in listed)
    return [found.get(token) or Added(token, alignment.ids[token], PLAIN, False) for token in alignment.added]


PLAIN = dict(zip(FLAGS, (False, False, False, True, False), strict=True))
"""How a token is matched of which no file says it."""


def _flags(folder: Path) -> tuple[dict[str, dict[str, bool]], set[str]]:
    """How a folder's added tokens are matched, by tokenizer.json before tokenizer_config.json; and the special tokens that it lists."""
    flags: dict[str, dict[str, bool]] = {}
    listed: set[str] = set()
    for name in (SPECIAL, SETTINGS, TOKENIZER):
        if not (folder / name).is_file():
            continue
        document = load_json(read_companion(folder / name))
        if not isinstance(document, dict):
            continue
        if name != TOKENIZER:
            listed.update(token for key in LISTS for token in map(_text, _items(document.get(key))) if isinstance(token, str))
        entries = document.get("added_tokens") if name == TOKENIZER else (document.get(DECODER) or {}).values()
        for entry in entries or ():
            special = bool(entry.get("special", False))
            flags[entry["content"]] = {**PLAIN, "normalized": not special, **{key: bool(entry[key]) for key in FLAGS if key in entry}}
    return flags, listed


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _add(documents: dict[str, bytes], tokens: list[Added], alignment: Alignment, own: Mapping[str, Mapping[str, bool]]) -> None:
    """Write the tokens into every file that names added ones. Without tokenizer.json one of two has to: transformers 5.23 passes over
    added_tokens.json where tokenizer_config.json numbers tokens, so that this one is begun only where the other is not there.
    """
    numbered = SETTINGS in documents and bool(load_json(documents[SETTINGS]).get(DECODER))
    needed = TOKENIZER not in documents and ADDED not in documents and not numbered
    if TOKENIZER in documents:
        _changed(documents, TOKENIZER, lambda document: _into_tokenizer(document, tokens, alignment, own))
    if ADDED in documents or (needed and SETTINGS not in documents):
        _changed(documents, ADDED, lambda document: document.update((item.token, item.number) for item in tokens))
    if SETTINGS in documents:
        _changed(documents, SETTINGS, lambda document: _into_settings(document, tokens, numbered or needed))
    if SPECIAL in documents and any(item.listed for item in tokens):
        _changed(documents, SPECIAL, lambda document: _into_lists(document, tokens))


def _into_tokenizer(document: Any, tokens: list[Added], alignment: Alignment, own: Mapping[str, Mapping[str, bool]]) -> None:
    """After the tokens that the file has, in the order of their ids; between them what only the files beside it named until now."""
    document["added_tokens"] = entries = list(document.get("added_tokens") or ())
    vocab = document["model"]["vocab"]
    known = {entry["content"] for entry in entries} | (vocab.keys() if isinstance(vocab, dict) else {piece[0] for piece in vocab})
    first = min(item.number for item in tokens)
    named = max((entry["id"] for entry in entries), default=-1)
    between = {n: token for token, n in alignment.ids.items() if named < n < first and token not in known}
    entries += [{"id": n, "content": token, **own.get(token, PLAIN)} for n, token in sorted(between.items())]
    entries += [item.entry for item in tokens]


def _into_settings(document: Any, tokens: list[Added], numbers: bool) -> None:
    if numbers:
        decoder = document.setdefault(DECODER, {})
        decoder.update((str(item.number), {"content": item.token, **item.flags}) for item in tokens)
    if any(key in document for key in LISTS):
        _into_lists(document, tokens)


def _into_lists(document: Any, tokens: list[Added]) -> None:
    """Into the list of special tokens that a file has, or into a new one."""
    listed = [item.token for item in tokens if item.listed]
    key = next((key for key in LISTS if isinstance(document.get(key), list)), None)
    if listed and key is None and not any(key in document for key in LISTS):
        key = LISTS[0]
        document[key] = []
    if key is not None:
        document[key] += [token for token in listed if token not in map(_text, document[key])]


# ---- the chat template -------------------------------------------------------------------------------------------------------


def _set_template(documents: dict[str, bytes], folder: Path) -> None:
    """The chat template of `folder` in the place of the one that is there, wherever each stands."""
    for name in TEMPLATES:
        documents.pop(name, None)
    theirs = {name: companion(folder / name) for name in TEMPLATES if (folder / name).is_file()}
    setting = load_json(companion(folder / SETTINGS)).get(TEMPLATE_KEY) if (folder / SETTINGS).is_file() else None
    documents.update(theirs)

    def change(document: Any) -> None:
        document.pop(TEMPLATE_KEY, None)
        if setting is not None:
            document[TEMPLATE_KEY] = setting

    if setting is not None or (SETTINGS in documents and TEMPLATE_KEY in load_json(documents[SETTINGS])):
        _changed(documents, SETTINGS, change)


def chat_templates(folder: Path) -> Iterator[str]:
    """Every chat template of a folder, as text. Raises CheckpointError."""
    for name in (*TEMPLATES, SETTINGS):
        if not (folder / name).is_file():
            continue
        data = companion(folder / name)
        if name.endswith(".jinja"):
            yield data.decode()
            continue
        value = load_json(data).get(TEMPLATE_KEY)
        for item in value if isinstance(value, list) else _items(value) or [value]:
            text = item.get("template") if isinstance(item, dict) else item
            if isinstance(text, str):
                yield text
