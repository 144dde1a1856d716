"""Folders of pickled weights: which of their files hold the weights, by their names."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from bam_merge.checkpoints.folder import CONFIG, INDEX, SINGLE, is_plain_name, json_object, read_small_file
from bam_merge.checkpoints.header import FileIdentity
from bam_merge.checkpoints.kinds import other_kind
from bam_merge.checkpoints.look import pickled
from bam_merge.converting.child import Contents
from bam_merge.errors import CheckpointError
from bam_merge.text import printable, some

PICKLED_INDEX = "pytorch_model.bin.index.json"


PICKLED_ADAPTER = "adapter_model.bin"


SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.(bin|pt|pth)")


@dataclass
class Source:
    """A folder of pickled weights: its files, each open, and what is in them."""

    folder: Path
    names: tuple[str, ...]
    config: dict[str, Any]
    config_name: str
    listed: Mapping[str, str] | None
    open: dict[str, int] = field(default_factory=dict)
    identities: dict[str, FileIdentity] = field(default_factory=dict)
    contents: dict[str, Contents] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        return self.config_name == ADAPTER_CONFIG

    def where(self, name: str) -> str:
        return printable(str(self.folder / name))


def find_source(path: Path) -> Source:
    """The folder, or the one file, of pickled weights at `path`. Raises CheckpointError."""
    folder, only = (path, None) if path.is_dir() else (path.parent, path.name)
    where = printable(str(path))
    if not os.path.exists(path):
        raise CheckpointError(f"{where}: no such folder.")
    if only is not None and not pickled([only]):
        raise CheckpointError(f"{where}: no file of pickled weights (.bin, .pt, .pth). Give the folder, or such a file.")
    there = _listing(folder)
    adapter = ADAPTER_CONFIG in there and PICKLED_ADAPTER in there and only in (None, PICKLED_ADAPTER)
    if only is None and set(there) & ({ADAPTER_WEIGHTS} if adapter else {SINGLE, INDEX}):
        raise CheckpointError(f"{where}: has safetensors files already, so there is nothing to convert. Use it as it is.")
    name = PICKLED_ADAPTER if adapter else only
    config_name = ADAPTER_CONFIG if adapter else CONFIG
    names, listed = ((name,), None) if name else _weight_files(folder, there)
    if config_name not in there:
        other = other_kind(folder)
        if other:
            raise CheckpointError(other)
        raise CheckpointError(f"{printable(str(folder))}: config.json is missing. Put the model's there, beside {some(names)}.")
    config = json_object(folder / config_name, read_small_file(folder / config_name))
    return Source(folder, names, config, config_name, listed)


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{printable(str(folder))}: {error.strerror}.") from None


def _weight_files(folder: Path, there: list[str]) -> tuple[tuple[str, ...], Mapping[str, str] | None]:
    """The files that hold the weights, in order; with an index also what it says is in which."""
    where = printable(str(folder))
    if PICKLED_INDEX in there:
        weight_map = json_object(folder / PICKLED_INDEX, read_small_file(folder / PICKLED_INDEX)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{where}/{PICKLED_INDEX}: weight_map must be an object that maps tensor names to file names.")
        names = tuple(sorted(set(weight_map.values())))
        if unsafe := [name for name in names if not is_plain_name(name)]:
            raise CheckpointError(f"{where}/{PICKLED_INDEX}: names {some(unsafe)}, which is no plain file in this folder.")
        if missing := [name for name in names if name not in there]:
            raise CheckpointError(f"{where}: {some(missing)} missing, of {len(names)} files that {PICKLED_INDEX} names.")
        return names, weight_map
    if "pytorch_model.bin" in there:
        return ("pytorch_model.bin",), None
    found = [name for name in pickled(there) if not name.startswith(("adapter_", "consolidated."))]
    if not found:
        if other := other_kind(folder):
            raise CheckpointError(other)
        raise CheckpointError(f"{where}: no file of pickled weights (.bin, .pt, .pth) is in it.")
    shards = [SHARD.fullmatch(name) for name in found]
    if all(shards):
        first = shards[0]
        assert first is not None
        expected = [f"{first[1]}-{n + 1:05d}-of-{first[3]}.{first[4]}" for n in range(int(first[3]))]
        if found != expected:
            lacking = [name for name in expected if name not in found] or found
            raise CheckpointError(f"{where}: {some(lacking)} missing, or of another model. Is the download complete?")
        return tuple(found), None
    if len(found) > 1:
        raise CheckpointError(f"{where}: {some(found)}: which of them is the model? Give that file in place of the folder.")
    return (found[0],), None
