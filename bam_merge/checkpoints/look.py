"""A folder by the names in it: what is looked at to say what it is."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.header import open_regular
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.text import printable

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


MOST_NAMES = 10_000
"""Names of a folder that are looked at."""


MOST_JSON = 1_000_000
"""Bytes of a JSON file that are read."""


NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "random_states*", "args.pt", "sampler.bin")
"""Pickled files of training runs that are no weights."""


def pickled(names: Iterable[str]) -> list[str]:
    """Those of a folder's names that are pickled weights."""
    endings = (".bin", ".pt", ".pth")
    return [name for name in names if name.endswith(endings) and not any(fnmatchcase(name, other) for other in NO_WEIGHTS)]


@dataclass(frozen=True)
class Look:
    """A folder by the names in it."""

    path: Path

    @cached_property
    def entries(self) -> Mapping[str, bool]:
        """The names, in order, and whether each is a folder."""
        found: dict[str, bool] = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if len(found) >= MOST_NAMES:
                        break
                    found[entry.name] = entry.is_dir()
        except OSError:
            return {}
        return dict(sorted(found.items()))

    def files(self, *patterns: str) -> list[str]:
        """The files, and links, whose names match one of the patterns."""
        return [name for name, folder in self.entries.items() if not folder and any(fnmatchcase(name, p) for p in patterns)]

    def folders(self, *patterns: str) -> list[str]:
        """The folders whose names match one of the patterns."""
        return [name for name, folder in self.entries.items() if folder and any(fnmatchcase(name, p) for p in patterns)]

    def inner(self, name: str) -> "Look":
        return Look(self.path / name)

    def json(self, name: str) -> dict[str, Any]:
        """A small JSON file's object; {} where there is none that can be read."""
        try:
            descriptor = open_regular(str(self.path / name))
            with os.fdopen(descriptor, "rb") as stream:
                document = load_json(stream.read(MOST_JSON))
        except (CheckpointError, OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}

    @property
    def is_model(self) -> bool:
        """Whether it has what a model's folder has: config.json, and safetensors files or their index."""
        return CONFIG in self.entries and bool(self.entries.keys() & {SINGLE, INDEX})

    @property
    def is_pickled_model(self) -> bool:
        return CONFIG in self.entries and bool(pickled(self.files("pytorch_model*.bin")))


def shown(path: Path) -> str:
    return printable(str(path), 1000)
