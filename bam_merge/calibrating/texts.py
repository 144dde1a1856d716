"""Texts that routers are made of, or tried on: which files a recipe means, and their tokens in windows of a fixed length.

A text is a file, a glob, a folder or a list of these; several files take turns, a window of each, so that a text of many files is not that
of its first. Reads no more of a file than the tokens that are wanted can take. No torch.
"""

import codecs
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import combinations
from pathlib import Path
from typing import Any

import xxhash

from bam_merge.checkpoints.header import open_regular
from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.model.tokens import encode
from bam_merge.paths import located
from bam_merge.text import count, nearest, printable, some

WINDOW = 256
"""Tokens that a model sees together, or as many as it has positions for. The first of each is only context: what a model makes of a first
token is unlike all else."""


BYTES_PER_TOKEN = (8, 64)
"""How much of a file is read for each token that is wanted: at first, and where that was too little."""


MOST_FILES = 10_000
"""Files that one text may be of."""


Files = str | Sequence[str]
"""What a recipe has for a text: a file, a folder or a glob, or a list of these."""


Window = tuple[int, ...]
"""Token ids, two or more."""


@dataclass(frozen=True)
class Part:
    """One file of a text, or one prompt: what messages call it, how many bytes of it were read, and their digest (XXH3-128)."""

    name: str
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Text:
    """A text as `windows` of at most WINDOW tokens each, `wanted` tokens of it where it has so many; `further` are windows of the tokens
    after those, for trying out what was made of the first. `parts` are what was read for both, in the order of reading."""

    windows: tuple[Window, ...]
    further: tuple[Window, ...]
    parts: tuple[Part, ...]
    wanted: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))

    @property
    def counted(self) -> int:
        """Tokens that say something of the text: all but the first of each window."""
        return self.tokens - len(self.windows)

    @property
    def digest(self) -> str:
        """XXH3-128 of the token ids, by which two texts are told apart."""
        return xxhash.xxh3_128_hexdigest(repr((self.windows, self.further)).encode())


# ---- which files ---------------------------------------------------------------------------------------------------------------


def find_files(text: Files, folder: Path, where: str) -> list[Path]:
    """The files that a text is of, in a fixed order, each once. `where` is what messages call it. Raises CheckpointError."""
    items = [text] if isinstance(text, str) else list(text)
    if not items:
        raise CheckpointError(f"{where}: an empty list of files. Name a file, a folder or a glob such as law/*.txt.")
    problems: list[str] = []
    found: dict[Path, None] = {}
    for item in items:
        try:
            found.update(dict.fromkeys(_files(item, folder)))
        except BamMergeError as error:
            problems += (f"{where}: {problem}" for problem in error.problems)
    if problems:
        raise CheckpointError(*problems)
    if len(found) > MOST_FILES:
        raise CheckpointError(f"{where}: {len(found):,} files, at most {MOST_FILES:,} are read for one text. Name fewer.")
    return list(found)


def _files(item: str, folder: Path) -> list[Path]:
    """The files that one word of a recipe means: itself, those in the folder, or those that match."""
    path = located(item, folder)
    if path.is_dir():
        files = sorted(_below(path))
        if not files:
            raise CheckpointError(f"{printable(item)}: the folder holds no file. Put texts there, or name a file.")
        return files
    if os.path.lexists(path):
        return [path]
    if has_magic(item):
        matches = sorted(glob(str(located(item)), root_dir=folder, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [folder / match for match in matches if (folder / match).is_file()]
        if not files:
            raise CheckpointError(f"{printable(item)}: matches no file in {printable(str(folder.absolute()))}.")
        return files
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = nearest(path.name, beside)
    raise CheckpointError(f"{printable(item)}: no such file or folder{close or '. Paths are relative to the recipe.'}")


def _below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and in the folders in it, without those that are hidden."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in files if not name.startswith("."))


# ---- their tokens --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How a text is read: by which tokenizers.Tokenizer (model/tokens.py), how many tokens of it and how many `further` ones, and how many
    in a window; files are named relative to `folder` in what is recorded of them, or by their last name."""

    tokenizer: Any
    tokens: int
    further: int = 0
    window: int = WINDOW
    folder: Path | None = None


def read_text(files: Sequence[Path], reading: Reading, where: str) -> Text:
    """The first tokens of a text of some files, a window of each in turn. `where` is what messages call it.

    Raises CheckpointError for a file that cannot be read or is no text, and for a text that has too little.
    """
    text = _gathered([_Stream(path, reading, _shown(path, reading.folder), where) for path in files], reading)
    if not text.counted:
        names = some(part.name for part in text.parts)
        what = "is empty" if not any(part.nbytes for part in text.parts) else "has no token after the first"
        raise CheckpointError(f"{where}: {names} {what}. Give a text of some hundred words or more.")
    return text


def unreadable(files: Sequence[Path], wanted: int, folder: Path, where: str) -> Iterator[str]:
    """What is wrong with the files of a text of so many tokens, as far as that can be told without a tokenizer: of those that are read in
    any case, each of which has a window at most."""
    beginnings = []
    for path in files[: -(-wanted // WINDOW)]:
        try:
            data, whole = _beginning(path, BYTES_PER_TOKEN[0] * WINDOW)
            beginnings.append(_decoded(data, whole, path))
        except CheckpointError as error:
            yield from (f"{where}: {problem}" for problem in error.problems)
    if len(beginnings) == len(files) and not any(beginnings):
        yield f"{where}: {some(_shown(path, folder) for path in files)} is empty. Give a text of some hundred words or more."


def read_prompts(prompts: Sequence[str], reading: Reading, where: str) -> Text:
    """The first tokens of prompts that stand in a recipe, each a text by itself. Raises CheckpointError."""
    if not prompts:
        raise CheckpointError(f"{where}: an empty list of prompts. Write some that are typical of the expert's work.")
    streams = [_Stream(prompt, reading, f"prompt {index + 1}", where) for index, prompt in enumerate(prompts)]
    text = _gathered(streams, reading)
    empty = [str(index + 1) for index, stream in enumerate(streams) if stream.seen and not stream.ids]
    if empty:
        raise CheckpointError(f"{where}: prompt {some(empty)} has no token. Write words, or remove it.")
    return text


def equal_texts(texts: Mapping[str, Text]) -> Iterator[tuple[str, str]]:
    """The pairs of names whose texts have the same tokens."""
    for (a, one), (b, other) in combinations(texts.items(), 2):
        if one.windows == other.windows:
            yield a, b


def shorter(text: Text) -> str | None:
    """What is to be said of a text that has fewer tokens than were wanted; None where it has enough."""
    if text.tokens >= text.wanted:
        return None
    return f"{count(text.tokens, 'token')} in {count(len(text.parts), 'file')}, fewer than the {text.wanted:,} wanted"


def _shown(path: Path, folder: Path | None) -> str:
    """A file as documents name it that must not hold absolute paths."""
    return os.path.relpath(path, folder) if folder is not None else path.name


class _Stream:
    """The windows of one file, or of one prompt, read when the first is asked for."""

    def __init__(self, source: Path | str, reading: Reading, name: str, where: str) -> None:
        self.source, self.reading, self.name, self.where = source, reading, name, where
        self.ids: list[int] = []
        self.seen = False
        self.part = Part(name, 0, "")

    def window(self, index: int) -> Window:
        """Window `index`; fewer than two tokens where there are no more."""
        if not self.seen:
            self.seen = True
            try:
                self._read()
            except CheckpointError as error:
                raise CheckpointError(*(f"{self.where}: {problem}" for problem in error.problems)) from None
        length = self.reading.window
        return tuple(self.ids[index * length : (index + 1) * length])

    def _read(self) -> None:
        most = self.reading.tokens + self.reading.further
        if isinstance(self.source, str):
            data = self.source.encode("utf-8", "surrogatepass")
            self.ids = encode(self.reading.tokenizer, self.source)
            self.ids *= 2 if len(self.ids) == 1 else 1  # a word that is one token is said twice, so that it counts once
        else:
            self.ids, data = first_tokens(self.source, most, lambda text: encode(self.reading.tokenizer, text))
        self.part = Part(self.name, len(data), xxhash.xxh3_128_hexdigest(data))


def first_tokens(path: Path, most: int, encoded: Callable[[str], Sized], factors: Iterable[int] = BYTES_PER_TOKEN) -> tuple[Any, bytes]:
    """What `encoded` makes of the beginning of a file, and the bytes of that: more than `most` tokens, or all that are in the file or in
    the last of `factors` bytes for each of them.

    Raises CheckpointError for a file that cannot be read, or is no text in UTF-8.
    """
    for factor in factors:
        data, whole = _beginning(path, factor * most + WINDOW)
        found = encoded(_decoded(data, whole, path))
        if whole or len(found) > most:
            break
    return found, data


def _beginning(path: Path, nbytes: int) -> tuple[bytes, bool]:
    """The first bytes of a file, and whether they are all of it. Raises CheckpointError."""
    descriptor = open_regular(str(path))
    try:
        with os.fdopen(descriptor, "rb") as stream:
            data = stream.read(nbytes + 1)
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))}: {error.strerror}.") from error
    return data[:nbytes], len(data) <= nbytes


def _decoded(data: bytes, whole: bool, path: Path) -> str:
    """The text that the first bytes of a file are; a character that they cut in two is left out. Raises CheckpointError."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{printable(str(path))}: not UTF-8 text (byte {error.start}). Give plain text.") from None
    if "\0" in text:
        raise CheckpointError(f"{printable(str(path))}: holds NUL characters, so it is no text (character {text.index(chr(0))}).")
    return text


def _gathered(streams: Sequence[_Stream], reading: Reading) -> Text:
    """Windows of every stream in turn, until there are tokens enough, and then until there are the further ones."""
    windows = _in_turns(streams, reading.window)
    first, further = (tuple(_up_to(wanted, windows)) for wanted in (reading.tokens, reading.further))
    parts = tuple(stream.part for stream in streams if stream.seen)
    return Text(first, further, parts, reading.tokens)


def _up_to(wanted: int, windows: Iterator[Window]) -> Iterator[Window]:
    """Windows of so many tokens together, as far as there are."""
    while wanted > 1 and (window := next(windows, None)) is not None:
        yield window[:wanted]
        wanted -= len(window[:wanted])


def _in_turns(streams: Sequence[_Stream], length: int) -> Iterator[Window]:
    index, left = 0, list(streams)
    while left:
        for stream in list(left):
            window = stream.window(index)
            if len(window) > 1:
                yield window
            if len(window) < length:
                left.remove(stream)
        index += 1
