"""The tokenizers of the sources, opened: every form in every folder, the same bytes read once."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from bam_merge.checkpoints.folder import TOKENIZER_FILES, VOCABULARIES
from bam_merge.checkpoints.header import lookalike
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.sources.companions import companion_notes, read_companion
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.tokenizers.forms import FORMS, Form, Load, read_form
from bam_merge.text import printable, some

GENERATION_CONFIG = "generation_config.json"


@dataclass
class TokenizerFindings:
    """What the sources' tokenizers, and the files that go with them, have wrong (`problems`) and what a plan has to say (`notes`).

    `files` says of each tokenizer and generation file of the output which source gives it; `giver` gives the tokenizer, if any does.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    giver: str = ""


@dataclass(frozen=True)
class Tokenizer:
    """A source's tokenizer: its forms by file name, in the order in which a loader looks for them."""

    source: str
    forms: dict[str, Form]

    @property
    def there(self) -> bool:
        """Whether a file names tokens: what only adds to a tokenizer is none."""
        return not VOCABULARIES.isdisjoint(self.forms)


def open_tokenizers(models: Sequence[DenseModel], giver: str | None = None) -> tuple[TokenizerFindings, list[Tokenizer]]:
    """Every source's tokenizer, none where one cannot be read; and what is wrong with the files that the output takes.

    They are those of `giver`, or of the first of `models` that has a tokenizer. Generation settings stay those of the first, the seed, but
    where a `giver` has its own.
    """
    found = TokenizerFindings()
    for model in models:
        found.problems += [f"sources.{model.name}: {problem}" for problem in _unreadable(model)]
    if found.problems or not models:
        return found, []
    cache: dict[tuple[str, str], Form] = {}
    tokenizers = []
    for model in models:
        may_give = not found.giver and giver in (None, model.name)
        load = _remembering() if may_give else load_json  # a giver's files are looked at twice; parsed, they take much memory
        tokenizers.append(mine := _read(model, cache, found.problems, load))
        if may_give and (mine.there or giver is not None):
            found.giver = model.name
            _take(model, model.checkpoint.companions(), mine, found, load)
    seed = models[0]
    if not found.giver:
        _take(seed, seed.checkpoint.companions(), tokenizers[0], found, load_json)
    elif found.giver != seed.name:
        if giver is None:
            found.files.pop(GENERATION_CONFIG, None)
        own = seed.checkpoint.companions()
        _take(seed, [name for name in own if name == GENERATION_CONFIG and name not in found.files], tokenizers[0], found, load_json)
        if giver is None and (others := [name for name in own if name != GENERATION_CONFIG]):
            found.notes.append(f"sources.{seed.name}: {some(others, 8)} not copied: the tokenizer is that of sources.{found.giver}.")
    if found.problems:
        found.problems = list(dict.fromkeys(found.problems))
        return TokenizerFindings(found.problems), []
    return found, tokenizers


def _remembering() -> Load:
    """load_json that parses the same bytes once."""
    parsed: dict[str, Any] = {}

    def load(data: bytes) -> Any:
        digest = xxhash.xxh3_128_hexdigest(data)
        if digest not in parsed:
            parsed[digest] = load_json(data)
        return parsed[digest]

    return load


def _take(model: DenseModel, names: Sequence[str], mine: Tokenizer, found: TokenizerFindings, load: Load) -> None:
    """The output takes these of a source's files: what it does not get of them, and which cannot be copied at all."""
    found.files.update(dict.fromkeys(names, model.name))
    readable = [name for name in names if name in mine.forms or name not in FORMS]
    try:
        found.notes += [f"sources.{model.name}: {note}" for note in companion_notes(model.checkpoint.path, readable, load)]
    except CheckpointError as error:
        found.problems += [f"sources.{model.name}: {problem}" for problem in error.problems]


def _unreadable(model: DenseModel) -> Iterator[str]:
    """Why files beside the weights that are there cannot be read: a dangling symlink is not the absence of a tokenizer."""
    for name in TOKENIZER_FILES:
        if os.path.lexists(model.checkpoint.path / name):
            try:
                read_companion(model.checkpoint.path / name)
            except CheckpointError as error:
                yield from error.problems


def _read(model: DenseModel, cache: dict[tuple[str, str], Form], problems: list[str], load: Load) -> Tokenizer:
    """The forms in the source's folder, the same bytes read once."""
    forms: dict[str, Form] = {}
    for name in FORMS:
        path = model.checkpoint.path / name
        if not os.path.lexists(path):
            continue
        try:
            data = read_companion(path)
            key = name, xxhash.xxh3_128_hexdigest(data)
            if key not in cache:
                cache[key] = read_form(name, data, key[1], load)
        except CheckpointError as error:
            problems += [f"sources.{model.name}: {problem}" for problem in error.problems]
        except ValueError as error:
            what = lookalike(data) if name.endswith(".json") else ""
            problems.append(f"sources.{model.name}: {printable(str(path))}: {f'this is {what}' if what else error}.")
        else:
            forms[name] = cache[key]
    return Tokenizer(model.name, forms)
