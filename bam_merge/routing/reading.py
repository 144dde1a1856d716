"""Texts as a mixture reads them: the token ids in windows, and the part of the text that each token stands for."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_merge.calibrating.texts import first_tokens
from bam_merge.errors import CheckpointError
from bam_merge.model.routes import Windows
from bam_merge.model.tokens import open_tokenizer, pieces_of
from bam_merge.paths import located
from bam_merge.text import printable

WINDOW = 256
"""Tokens that are computed as one sequence."""


BATCH = 4
"""Sequences that are computed at a time."""


@dataclass(frozen=True)
class GivenText:
    """A file of text, and the expert that is to take it, by its name, where that is known."""

    file: Path
    domain: str | None = None


@dataclass(frozen=True)
class ReadText:
    """The first tokens of a text. `pieces` put together are the text, as far as it was read; a token that adds nothing to it, such as
    one that marks the beginning, has an empty one."""

    given: GivenText
    ids: tuple[int, ...]
    pieces: tuple[str, ...]

    @property
    def windows(self) -> Windows:
        """Batches [B, T] of sequences: whole windows, then what is left."""
        whole = len(self.ids) // WINDOW * WINDOW
        return list(_batches(torch.tensor(self.ids[:whole]).view(-1, WINDOW), torch.tensor(self.ids[whole:])[None]))

    @property
    def scored(self) -> Tensor:
        """Which tokens count in figures [M]: not the first of a window, which nothing is before."""
        return torch.arange(len(self.ids)) % WINDOW != 0


def _batches(whole_WT: Tensor, rest_1T: Tensor) -> Iterator[Tensor]:
    if len(whole_WT):
        yield from torch.split(whole_WT, BATCH)
    if rest_1T.shape[1]:
        yield rest_1T


def read_texts(folder: Path, texts: Sequence[GivenText], tokens: int, vocabulary: int) -> list[ReadText]:
    """The first `tokens` tokens of each text, by the folder's tokenizer. Raises CheckpointError with the problems of all."""
    problems: list[str] = []
    found: list[ReadText] = []
    tokenizer: Any = None
    try:
        tokenizer = open_tokenizer(folder)
    except CheckpointError as error:
        problems += error.problems
    for given in texts:
        where = printable(os.fsdecode(given.file))
        try:
            if (text := _read(given, tokenizer, tokens)) is None:
                continue
        except CheckpointError as error:
            problems += error.problems
        else:
            if len(text.ids) < 2:
                problems.append(f"{where}: {len(text.ids)} token(s), at least 2 are needed. Give a longer text.")
            elif max(text.ids) >= vocabulary:
                what = f"tokenizer.json gives the id {max(text.ids)}, the model has {vocabulary} embeddings"
                problems.append(f"{where}: {what}: they do not belong together.")
            found.append(text)
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    return found


def _read(given: GivenText, tokenizer: Any, tokens: int) -> ReadText | None:
    """No more of the file is read than is needed: what ends in the middle of a word may end in other tokens."""

    def encoded(text: str) -> list[tuple[int, str]]:
        return list(zip(*pieces_of(tokenizer, text), strict=True)) if tokenizer is not None else []

    found = first_tokens(located(given.file), tokens, encoded, (8**power for power in count(1)))[0][:tokens]
    return None if tokenizer is None else ReadText(given, tuple(id_ for id_, _ in found), tuple(piece for _, piece in found))
