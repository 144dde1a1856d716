"""The folder of an adapter, as PEFT saves it: adapter_config.json and adapter_model.safetensors."""

import os
from pathlib import Path

import xxhash

from bam_merge.checkpoints.folder import CONFIG, DAMAGED, Checkpoint, json_object, read_small_file
from bam_merge.checkpoints.header import read_header
from bam_merge.errors import CheckpointError
from bam_merge.text import printable, some

ADAPTER_CONFIG = "adapter_config.json"


ADAPTER_WEIGHTS = "adapter_model.safetensors"


class AdapterFolder(Checkpoint):
    """An adapter's folder: `config` is its adapter_config.json. A tokenizer that was saved beside it is not read."""

    def companions(self) -> list[str]:
        return []


def open_adapter(path: Path) -> AdapterFolder:
    """Open an adapter's folder by its headers. Raises CheckpointError with every problem found in it."""
    where = printable(str(path))
    if not path.is_dir():
        raise CheckpointError(f"{where}: {'not a folder' if os.path.lexists(path) else 'no such folder'}. Give an adapter's folder.")
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{where}: no {ADAPTER_CONFIG}, so this is not the folder of an adapter. {_instead(path)}")
    problems: list[str] = []
    config, digest, files = {}, "", {}
    try:
        data = read_small_file(path / ADAPTER_CONFIG)
        config, digest = json_object(path / ADAPTER_CONFIG, data, way_out=f". {DAMAGED}"), xxhash.xxh3_128_hexdigest(data)
    except CheckpointError as error:
        problems += error.problems
    try:
        files = {ADAPTER_WEIGHTS: read_header(str(_weights(path)), ADAPTER_WEIGHTS)}
    except CheckpointError as error:
        problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    tensors = {entry.name: entry for header in files.values() for entry in header.tensors}
    return AdapterFolder(path, config, digest, files, tensors)


def _weights(path: Path) -> Path:
    if os.path.lexists(path / ADAPTER_WEIGHTS):
        return path / ADAPTER_WEIGHTS
    where = printable(str(path))
    pickled = sorted(name for name in os.listdir(path) if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        raise CheckpointError(
            f"{where}: only {some(pickled)} present, no {ADAPTER_WEIGHTS}. Pickled weights are never loaded, since loading them runs code. "
            "Save the adapter anew with PEFT: PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER)."
        )
    raise CheckpointError(f"{where}: {ADAPTER_WEIGHTS} is missing. Is the download complete?")


def _instead(path: Path) -> str:
    """What to write instead of a folder that is no adapter's."""
    if (path / CONFIG).exists():
        return f"It has a {CONFIG}: a model of its own is written as a plain source, NAME: FOLDER."
    inside = sorted(name for name in os.listdir(path) if (path / name / ADAPTER_CONFIG).exists())
    if inside:
        return f"There are adapters inside: {some(inside)}. Name one of these."
    return "Give the folder that PEFT's save_pretrained wrote."
