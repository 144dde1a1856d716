"""Texts that a mixture is tried on, and what its routers did with those whose expert is known: accuracy, load and entropy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_merge.calibrating.corpus import Corpus
from bam_merge.calibrating.texts import WINDOW, Files, Reading, Window, find_files, read_text
from bam_merge.errors import CheckpointError
from bam_merge.model.routes import Choices
from bam_merge.model.tokens import open_tokenizer
from bam_merge.text import nearest, printable

TOKENS = 2048
"""Tokens of a domain's text that are read."""


TRIED_WINDOWS = 2
"""Windows of each text that routers are tried on at the end of a merge, which is not to take much longer for it."""


@dataclass(frozen=True)
class HeldOut:
    """A text as batches [B, T] of sequences, in the text's order. `domain`: the name of the expert that is to take it, where that is known,
    and `experts` the indices of those that are called so. `seen`: the routers were made of it, so that it is not held out at all."""

    name: str
    batches: Sequence[Tensor]
    domain: str | None = None
    experts: tuple[int, ...] = ()
    seen: bool = False

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    @property
    def scored(self) -> Tensor:
        """Which tokens count in figures [M]: not the first of a sequence, which nothing is before."""
        return torch.cat([(torch.arange(batch.numel()) % batch.shape[1]) != 0 for batch in self.batches])

    @property
    def lengths(self) -> list[int]:
        """Of each sequence."""
        return [batch.shape[1] for batch in self.batches for _ in range(len(batch))]


def read_domains(folder: Path, domains: Mapping[str, Files], names: Sequence[str]) -> list[HeldOut]:
    """The first TOKENS tokens of each domain's text, by the folder's tokenizer. `names` are the experts', by index.

    Raises CheckpointError with every problem: a domain that no expert is called by, a text that cannot be read, or is too short.
    """
    if not domains:
        return []
    problems: list[str] = []
    found: list[HeldOut] = []
    tokenizer = open_tokenizer(folder)
    for domain, files in domains.items():
        where = f"--texts {printable(domain)}"
        try:
            experts = own_experts(domain, names, where)
            paths = find_files(files, Path(), where)
            text = read_text(paths, Reading(tokenizer, TOKENS), where)
        except CheckpointError as error:
            problems += error.problems
        else:
            shown = paths[0].name if len(paths) == 1 else f"{domain} ({len(paths)} files)"
            found.append(HeldOut(shown, batches_of(text.windows), domain, experts))
    if problems:
        raise CheckpointError(*problems)
    return found


def further_texts(corpora: Mapping[str, Corpus], names: Sequence[str]) -> list[HeldOut]:
    """What follows in the texts that routers were made of, or where nothing does their beginnings: of the first place in the recipe that
    has texts."""
    for corpus in corpora.values():
        return [
            HeldOut(
                text.parts[0].name if len(text.parts) == 1 else f"{name} ({len(text.parts)} files)",
                batches_of((text.further or text.windows)[:TRIED_WINDOWS]), name,
                tuple(index for index, other in enumerate(names) if other == name), not text.further,
            )
            for name, text in corpus.texts.items()
        ]  # fmt: skip
    return []


def tokens_tried(manifest: Mapping[str, Any]) -> int:
    """How many tokens `further_texts` has of a merge with this manifest, at most."""
    for place in manifest.get("calibration", {}).get("texts", {}).values():
        return sum(min(text["further"] or text["tokens"], TRIED_WINDOWS * WINDOW) for text in place["texts"].values())
    return 0


def tokens_made_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """For each source the tokens of the text that its routers' rows were made of, the fewest of any; empty where none was."""
    found: dict[str, int] = {}
    for place in manifest.get("calibration", {}).get("texts", {}).values():
        for name, text in place["texts"].items():
            found[name] = min(text["tokens"], found.get(name, text["tokens"]))
    return found


def own_experts(domain: str, names: Sequence[str], where: str) -> tuple[int, ...]:
    """The indices of the experts that are called `domain`, or the one with that number. Raises CheckpointError where there is none; a dense
    result has none."""
    found = tuple(index for index, name in enumerate(names) if name == domain)
    if not found and domain.isdecimal() and domain.isascii() and int(domain) < len(names):
        found = (int(domain),)
    if names and not found:
        there = ", ".join(dict.fromkeys(map(printable, names)))
        raise CheckpointError(f"{where}: no expert is called so{nearest(domain, names) or '.'} Experts: {there}.")
    return found


def batches_of(windows: Sequence[Window], most: int = 4) -> list[Tensor]:
    """Windows as batches of those of one length that follow each other, at most so many together."""
    batches: list[list[Window]] = []
    for window in windows:
        if batches and len(batches[-1]) < most and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.tensor(batch) for batch in batches]


# ---- what the routers did ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routed:
    """What every router did with the texts whose expert is known, `choices` as texts, then routers layer by layer."""

    names: tuple[str, ...]
    texts: Sequence[HeldOut]
    choices: Sequence[Sequence[Choices]]

    def document(self) -> dict[str, Any]:
        """The key `held_out` of a report: figures by layer and router, every text counting as much as any other, and over the layers."""
        sites = [self._site(place) for place in range(len(self.choices[0]))]
        return {
            "texts": [{"text": text.name, "domain": text.domain, "tokens": text.tokens, "held_out": not text.seen} for text in self.texts],
            "chance": sum(len(text.experts) for text in self.texts) / len(self.texts) / len(self.names),
            "overall": [self._overall(router, sites) for router in dict.fromkeys(site["router"] for site in sites)],
            "routers": sites,
        }

    def _site(self, place: int) -> dict[str, Any]:
        rows = [self._row(text, found[place]) for text, found in zip(self.texts, self.choices, strict=True)]
        first = self.choices[0][place]
        return {"layer": first.layer, "router": first.router, **_mean(rows), "of": rows}

    def _row(self, text: HeldOut, found: Choices) -> dict[str, Any]:
        scored = text.scored
        firsts = torch.bincount(found.experts_MK[scored, 0], minlength=len(self.names)).double()
        ends = torch.tensor(text.lengths).cumsum(0).tolist()
        spans = [slice(end - length, end) for end, length in zip(ends, text.lengths, strict=True)]
        right = [int(found.first_counts(span).argmax()) in text.experts for span in spans]
        return {
            "domain": text.domain,
            "accuracy": found.accuracy(text.experts, scored),
            "windows": sum(right) / len(right),
            "entropy": found.entropy,
            "load": list(found.share),
            "first": (firsts / firsts.sum()).tolist(),
        }

    def _overall(self, router: str, sites: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Means over the layers, in all and for each text: `first` is then the share of each domain's tokens that each expert takes."""
        own = [site for site in sites if site["router"] == router]
        rows = [
            {"domain": text.domain, **_mean([site["of"][index] for site in own])} for index, text in enumerate(self.texts)
        ]  # fmt: skip
        return {"router": router, **_mean(own), "of": rows}


KEYS = ("accuracy", "windows", "entropy", "load", "first")


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of figures, and of lists of them entry by entry."""
    found: dict[str, Any] = {}
    for key in KEYS:
        values = [row[key] for row in rows]
        listed = isinstance(values[0], list)
        found[key] = [math.fsum(column) / len(rows) for column in zip(*values, strict=True)] if listed else math.fsum(values) / len(rows)
    return found
